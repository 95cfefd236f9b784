"""The logits of a checkpoint and of a Hugging Face directory on the same tokens, each model in a process of its own.

python -m hmoe_megatron.hf.parity KIND PLACE TOKENS.npy OUT.npy [FLAG ...]
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hmoe_megatron.flag_files import last_value
from hmoe_megatron.hf.model_settings import ModelSettings
from hmoe_megatron.hf.tokenizer_files import megatron_tokenizer

# Of fp32 logits up to 1, and of larger ones as they are: the order of sums in matrix products differs.
BOUND = 1e-5
MAX_TOKENS = 2048
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Side(NamedTuple):
    """Whose logits. kind: a key of KINDS; place: --save directory of a run, or a Hugging Face directory; flags: of
    pretrain_hmoe.py, over those of the run."""

    kind: str
    place: Path
    flags: tuple[str, ...] = ()


class Difference(NamedTuple):
    """Of two models' fp32 logits over some tokens."""

    tokens: int
    largest_difference: float
    largest_logit: float


def logits_difference(sides: Sequence[Side], tokens_T: np.ndarray) -> Difference:
    """Raises OSError if a process fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "tokens.npy", tokens_T)
        alone = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
        alone["CUDA_VISIBLE_DEVICES"] = ""  # a GPU sums in an order of its own
        found = []
        for number, (kind, place, flags) in enumerate(sides):
            words = [
                sys.executable,
                "-m",
                __name__,
                kind,
                place,
                folder / "tokens.npy",
                folder / f"{number}.npy",
                *flags,
            ]
            ended = subprocess.run(
                [*map(str, words)], capture_output=True, text=True, errors="replace", check=False, env=alone
            )
            if ended.returncode:
                raise OSError(f"logits of {place}: exit code {ended.returncode}\n{ended.stderr[-2000:]}")
            found.append(np.load(folder / f"{number}.npy"))
    # Rows that only pad the vocabulary depend on the layout that trained it; one process has fewer.
    rows = min(logits_TV.shape[1] for logits_TV in found)
    found = [logits_TV[:, :rows] for logits_TV in found]
    return Difference(len(tokens_T), float(np.abs(found[0] - found[1]).max()), float(np.abs(found[0]).max()))


def first_tokens(flags: Sequence[str], text: str, model: ModelSettings) -> np.ndarray:
    """Ids [T] of the beginning of `text`, as many as the model sees at once, at most MAX_TOKENS; without a tokenizer
    random ones. Raises ValueError for a text without a token."""
    most = min(model.max_positions, MAX_TOKENS)
    if last_value(flags, "--tokenizer-type") == "NullTokenizer":
        size = int(last_value(flags, "--vocab-size", model.vocabulary_rows))
        return np.random.default_rng(0).integers(0, min(size, model.vocabulary_rows), most)
    tokens = list(megatron_tokenizer(flags).tokenize(text[: most * 40]))[:most]
    if not tokens:
        raise ValueError("--text: there is no token in it; give text of the kind that the model was trained on")
    return np.array(tokens)


def check_logits(megatron: Side, other: Side, tokens_T: np.ndarray, is_lossless: bool = True) -> Difference:
    """Print how far the two models' logits are apart. Raises ValueError if weights are the same and logits are not."""
    found = logits_difference((megatron, other), tokens_T)
    print(
        f"logits of Megatron and transformers, fp32, {found.tokens} tokens: at most {found.largest_difference:.1e} "
        f"apart, of up to {found.largest_logit:.1f}",
        flush=True,
    )
    bound = BOUND * max(1, found.largest_logit)
    if is_lossless and not found.largest_difference <= bound:
        raise ValueError(
            f"logits of Megatron and transformers are {found.largest_difference:.1e} apart, over "
            f"{bound:.1e}; nothing is left"
        )
    return found


def _megatron(
    root: Path, tokens_T, flags: Sequence[str], dropped: tuple[str, ...] = (), prepare: Callable = lambda model: None
):
    import torch

    from hmoe_megatron import training
    from hmoe_megatron.hf import one_process

    training.prepare()
    model = one_process.load_model(root, list(flags), dropped=("--bf16", "--fp16", *dropped))
    prepare(model)
    positions_T = torch.arange(tokens_T.shape[1])[None]
    return model(tokens_T, positions_T, None)


def _all_experts_on(root: Path, tokens_T, flags: Sequence[str]):
    """What `upcycling` made, every expert with the weight that makes the layer the dense one."""
    from hmoe_megatron.flag_files import run_arguments
    from hmoe_megatron.hf.upcycling import scale

    trained = run_arguments(root)
    experts = last_value(trained, "--num-experts")
    dropped = (
        "--hmoe-router",
        "--hmoe-top-p",
        "--hmoe-max-experts-per-token",
        "--hmoe-router-entropy-coeff",
        "--moe-router-topk",
        "--moe-router-pre-softmax",
    )
    chosen = int(last_value(trained, "--moe-router-topk", 0))
    over_weight_one = scale(int(experts), chosen, "--moe-router-pre-softmax" in trained) / int(experts)

    def prepare(model):
        for name, weight in model.named_parameters():
            if name.endswith("router.weight"):
                weight.zero_()
            elif ".experts." in name and "linear_fc2" in name:
                weight.div_(over_weight_one)

    return _megatron(root, tokens_T, (*flags, "--finetune", "--moe-router-topk", experts), dropped, prepare)


def _exported(directory: Path, tokens_T, _):
    """With the code in the directory, which this package has just written."""
    from transformers import AutoModelForCausalLM

    return _logits(AutoModelForCausalLM, directory, tokens_T, trust_remote_code=True)


def _foreign(directory: Path, tokens_T, _):
    """Without any code of the directory."""
    from transformers import AutoModelForCausalLM

    from hmoe_megatron.hf.model_settings import MODEL_TYPE

    is_ours = json.loads((directory / "config.json").read_text())["model_type"] == MODEL_TYPE
    if is_ours:
        from hmoe_megatron.hf.modeling_hmoe import HMoEForCausalLM
    return _logits(HMoEForCausalLM if is_ours else AutoModelForCausalLM, directory, tokens_T, trust_remote_code=False)


def _logits(model_class, directory: Path, tokens_T, trust_remote_code: bool):
    import torch

    model = model_class.from_pretrained(
        directory, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
    )
    return model.eval()(tokens_T, use_cache=False).logits


KINDS = {"megatron": _megatron, "all experts on": _all_experts_on, "exported": _exported, "foreign": _foreign}


def main(kind: str, place: str, tokens: str, out: str, *flags: str) -> None:
    from hmoe_megatron import machine

    machine.prepare_environment()
    import torch

    with torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
        tokens_T = torch.from_numpy(np.load(tokens)).long()[None]
        np.save(out, KINDS[kind](Path(place), tokens_T, flags)[0].float().numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
