"""The logits of a run's checkpoint and of its export, on the same tokens, each model in a process of its own.

python -m hmoe_megatron.hf.proof megatron RUN ITERATION TOKENS.npy OUT.npy
python -m hmoe_megatron.hf.proof hf DIRECTORY - TOKENS.npy OUT.npy
"""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hmoe_megatron.hf.model_settings import ModelSettings, last_value
from hmoe_megatron.hf.tokenizer_files import megatron_tokenizer

BOUND = 1e-5  # of fp32 logits: the order of sums in matrix products differs
MAX_TOKENS = 2048


def logits_difference(root: Path, iteration: int, exported: Path, tokens_T: np.ndarray) -> float:
    """The largest |difference| of fp32 logits over T tokens. Raises OSError if a process fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "tokens.npy", tokens_T)
        found = []
        for kind, place, step in (("megatron", root, iteration), ("hf", exported, "-")):
            command = [sys.executable, "-m", __name__, kind, place, step, folder / "tokens.npy", folder / f"{kind}.npy"]
            ended = subprocess.run([*map(str, command)], capture_output=True, text=True, errors="replace", check=False)
            if ended.returncode:
                raise OSError(f"logits of {place}: exit code {ended.returncode}\n{ended.stderr[-2000:]}")
            found.append(np.load(folder / f"{kind}.npy"))
    # Rows that only pad the vocabulary depend on the layout that trained it; one process has fewer.
    rows = min(logits_TV.shape[1] for logits_TV in found)
    found = [logits_TV[:, :rows] for logits_TV in found]
    return float(np.abs(found[0] - found[1]).max())


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


def check_logits(root: Path, iteration: int, exported: Path, tokens_T: np.ndarray, is_lossless: bool) -> None:
    """Print how far the two models' logits are apart. Raises ValueError if weights are the same and logits are not."""
    largest = logits_difference(root, iteration, exported, tokens_T)
    print(f"logits of Megatron and transformers, fp32, {len(tokens_T)} tokens: at most {largest:.1e} apart", flush=True)
    if is_lossless and not largest <= BOUND:
        raise ValueError(f"the logits of the export are {largest:.1e} apart from Megatron's, over {BOUND}; "
                         "nothing is left")


def _megatron(root: Path, iteration: int, tokens_T):
    import torch

    from hmoe_megatron import generation, training

    training.prepare()
    model = generation.load_model(root, ["--ckpt-step", str(iteration)], dropped=("--bf16", "--fp16"))
    positions_T = torch.arange(tokens_T.shape[1])[None]
    return model(tokens_T, positions_T, None)


def _hf(directory: Path, tokens_T):
    import torch
    from transformers import AutoModelForCausalLM

    # The code in the directory is this package's own, just written.
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32)
    return model.eval()(tokens_T, use_cache=False).logits


def main(kind: str, place: str, step: str, tokens: str, out: str) -> None:
    from hmoe_megatron import host

    host.prepare_environment()
    import torch

    with torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
        tokens_T = torch.from_numpy(np.load(tokens)).long()[None]
        run = _hf(Path(place), tokens_T) if kind == "hf" else _megatron(Path(place), int(step), tokens_T)
        np.save(out, run[0].float().numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
