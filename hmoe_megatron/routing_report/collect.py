"""Model and text to arrays: where each router sends each token, and the model's loss on it.

Legend: B windows of a batch, S positions, T tokens, L MoE layers, E logical experts.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from hmoe_megatron.data_prep.encoding import Encoder
from hmoe_megatron.data_prep.tokenizer_flags import tokenizer_parser
from hmoe_megatron.flag_files import run_arguments
from hmoe_megatron.moe.router import HMoERouter
from hmoe_megatron.routing_report.statistics import Model, Routing

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

    Windows of a batch are padded at their ends, where causal attention keeps the padding from being seen. Raises
    ValueError where the arrays would be too large.
    """
    model_facts = facts(model)
    tokens = sum(map(len, windows))
    if tokens * model_facts.width_LE.size > MAX_NUMBERS:
        most = MAX_NUMBERS // model_facts.width_LE.size
        raise ValueError(f"{tokens:,} tokens x {model_facts.width_LE.size:,} experts are too many: --tokens {most}")
    longest = max(map(len, windows))
    size = max(1, BATCH_TOKENS // longest)
    loss, chosen, log_probs = [], [], []
    for start in tqdm(range(0, len(windows), size), desc=title, unit="batch", leave=False, disable=None):
        for parts, part in zip((loss, chosen, log_probs), _batch(model, windows[start : start + size]), strict=True):
            parts.append(part)
    return Routing(
        token_T=np.concatenate(windows),
        window_T=np.repeat(np.arange(len(windows)), list(map(len, windows))),
        loss_T=np.concatenate(loss),
        chosen_TLE=np.concatenate(chosen),
        log_probs_TLE=np.concatenate(log_probs),
    )


def _batch(model, windows: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(loss_T, chosen_TLE, log_probs_TLE) of the windows' tokens, one window behind the other."""
    device = torch.device(torch.cuda.current_device())
    shape = (len(windows), max(map(len, windows)))
    token_BS, valid_BS = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    for row, window in enumerate(windows):
        token_BS[row, : len(window)] = torch.tensor(window)
        valid_BS[row, : len(window)] = True
    token_BS, valid_BS = token_BS.to(device), valid_BS.to(device)
    position_BS = torch.arange(shape[1], device=device).expand(shape)
    kept = []
    with ExitStack() as hooks:
        for router in routers(model):
            hooks.callback(router.register_forward_hook(_keep_in(kept, shape, valid_BS)).remove)
        # Of position s the loss of predicting s + 1, as in training; of the last it means nothing.
        loss_BS = model(token_BS, position_BS, None, labels=token_BS.roll(-1, dims=1))
    own_loss_BS = torch.full(shape, torch.nan, device=device)
    own_loss_BS[:, 1:] = loss_BS[:, :-1]
    chosen, log_probs = zip(*kept, strict=True)
    return own_loss_BS[valid_BS].cpu().numpy(), np.stack(chosen, axis=1), np.stack(log_probs, axis=1)


def _keep_in(kept: list, shape: tuple[int, int], valid_BS: torch.Tensor) -> Callable:
    """A forward hook that appends (chosen_TE, log_probs_TE) of the valid tokens, window by window."""

    def by_window(values_TE):
        # Megatron's tokens go position by position: [S, B, E].
        return values_TE.view(shape[1], shape[0], -1).transpose(0, 1)[valid_BS].cpu().numpy()

    def hook(router, inputs, output):
        logits_TE = router.gating(inputs[0]).view(-1, router.config.num_moe_experts)
        kept.append((by_window(output[1]), by_window(torch.log_softmax(logits_TE, -1, dtype=torch.float32))))

    return hook


def token_texts(tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each token alone. SentencePiece's leading space, which it drops when it decodes, is kept."""
    if getattr(tokenizer, "library", None) == "sentencepiece":
        return [piece.replace("\u2581", " ") for piece in tokenizer._tokenizer.ids_to_tokens(list(map(int, ids)))]
    return [tokenizer.detokenize([int(token)]) for token in ids]
