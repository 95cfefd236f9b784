"""Model and text to arrays: where each router sends each token, and the model's loss on it.

Legend: B windows of a batch, S positions, T tokens, L MoE layers, E logical experts.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import batched, groupby
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from hmoe_megatron.data.tokenizer_flags import tokenizer_parser
from hmoe_megatron.flag_files import run_arguments
from hmoe_megatron.moe.router import HMoERouter
from hmoe_megatron.tools.data_prep.encoding import Encoder
from hmoe_megatron.tools.report.statistics import Model, Routing

BATCH_TOKENS = 2048
MAX_NUMBERS = 1 << 27  # of log_probs_TLE: 0.5 GiB


def run_tokenizer(run_dir: Path, flags: Sequence[str] = ()) -> tuple[object, int]:
    """(tokenizer, --seq-length) of the flags that the run was started with, and of ``flags``, without its model.

    Raises ValueError if Megatron can't build the tokenizer.
    """
    parser = tokenizer_parser()
    parser.add_argument("--seq-length", type=int)
    args, _ = parser.parse_known_args([*run_arguments(run_dir), *flags])
    return Encoder(args, ["text"], False, 1, None).tokenizer, args.seq_length


def token_texts(tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each token alone. SentencePiece's leading space, which it drops when it decodes, is kept."""
    if getattr(tokenizer, "library", None) == "sentencepiece":
        return [piece.replace("\u2581", " ") for piece in tokenizer._tokenizer.ids_to_tokens(list(map(int, ids)))]
    return [tokenizer.detokenize([int(token)]) for token in ids]


def routers(model: torch.nn.Module) -> list[HMoERouter]:
    """By decoder layer. Raises ValueError where there is none."""
    found = sorted((m for m in model.modules() if isinstance(m, HMoERouter)), key=lambda router: router.layer)
    if not found:
        raise ValueError("the model has no layer with HMoE experts: nothing is routed")
    return found


def facts(model: torch.nn.Module) -> Model:
    """What the statistics need to know of the model."""
    found = routers(model)
    width_LE = np.array([router.widths for router in found])
    return Model(np.array([router.layer for router in found]), width_LE, found[0].config.hidden_size)


@torch.no_grad()
def collect(model: torch.nn.Module, windows: list[list[int]], title: str = "routing") -> Routing:
    """Every window through the model, which must be in evaluation mode; no window sees another.

    Windows of the same length that follow each other share a batch. Raises ValueError where the arrays would be too
    large.
    """
    tokens, pairs = sum(map(len, windows)), facts(model).width_LE.size
    if tokens * pairs > MAX_NUMBERS:
        raise ValueError(f"{tokens:,} tokens x {pairs:,} experts are too many: --tokens {MAX_NUMBERS // pairs}")
    parts = []
    with tqdm(total=tokens, desc=title, unit="token", leave=False, disable=None) as progress:
        for length, same in groupby(windows, len):
            for batch in batched(same, max(1, BATCH_TOKENS // length)):
                parts.append(_of_batch(model, torch.tensor(batch)))
                progress.update(len(batch) * length)
    loss_T, chosen_TLE, log_probs_TLE = map(np.concatenate, zip(*parts, strict=True))
    window_T = np.repeat(np.arange(len(windows)), list(map(len, windows)))
    return Routing(np.concatenate(windows), window_T, loss_T, chosen_TLE, log_probs_TLE)


def _of_batch(model, token_BS: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(loss_T, chosen_TLE, log_probs_TLE) of the windows' tokens, one window behind the other."""
    token_BS = token_BS.to(torch.device(torch.cuda.current_device()))
    batch, positions = token_BS.shape
    chosen_L, log_probs_L = [], []

    def keep(router, inputs, output):
        logits_TE = router.gating(inputs[0]).view(-1, router.config.num_moe_experts)
        chosen_L.append(output[1])
        log_probs_L.append(torch.log_softmax(logits_TE, -1, dtype=torch.float32))

    with ExitStack() as hooks:
        for router in routers(model):
            hooks.callback(router.register_forward_hook(keep).remove)
        # Of position s the loss of predicting s + 1, as in training; of the last it means nothing.
        position_BS = torch.arange(positions, device=token_BS.device).expand_as(token_BS)
        next_loss_BS = model(token_BS, position_BS, None, labels=token_BS.roll(-1, dims=1))
    loss_BS = torch.full_like(next_loss_BS, torch.nan)
    loss_BS[:, 1:] = next_loss_BS[:, :-1]

    def by_window(values_L):  # Megatron's tokens go position by position
        values_TLE = torch.stack(values_L, dim=1)
        return values_TLE.unflatten(0, (positions, batch)).transpose(0, 1).flatten(0, 1).cpu().numpy()

    return loss_BS.flatten().cpu().numpy(), by_window(chosen_L), by_window(log_probs_L)
