"""Tiny runs, converted."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from hmoe_megatron.hf.checkpoint_tensors import CheckpointTensors
from hmoe_megatron.hf.importing import HFDirectory
from tests.distributed.pretrain_run import pretrain
from tests.distributed.ranks import run_alone, run_ranks
from tests.unit.hf.preloaded_logits import fork_ahead

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "tools"))
import convert_checkpoint  # noqa: E402

STEPS = "--train-iters 2 --save-interval 2"


TIED = "tied"  # among the flags: without TINY's --untie-embeddings-and-output-weights


def train(root: Path, ranks: int, flags: str) -> Path:
    """A run of two steps, saved in `root`."""
    words = [word for word in flags.split() if word != TIED]
    without = ("--untie-embeddings-and-output-weights",) if TIED in flags.split() else ()
    ends = run_ranks(ranks, pretrain, f"{STEPS} --save {root} {' '.join(words)}", without=without, timeout_s=240)
    assert [end.code for end in ends] == [0] * ranks, ends[0].output
    return root


def to_hf(run, output, *flags) -> int:
    return convert_checkpoint.main(["to-hf", "--load", str(run), "--output", str(output), *flags])


def convert(*words) -> subprocess.CompletedProcess:
    """In a process of its own, which has Megatron imported: Megatron is set up once a process."""
    return run_alone(_converted, list(map(str, words)), timeout_s=240)


def _converted(words):
    fork_ahead()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = convert_checkpoint.main(words)
        except SystemExit as left:  # argparse's
            code = left.code
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def from_hf(folder: Path, root: Path, *words) -> subprocess.CompletedProcess:
    return convert("from-hf", "--load", folder, "--save", root, *(words or ("--no-logits",)))


def assert_same_logits(one, other) -> None:
    """Of two models of transformers, on 16 tokens."""
    tokens_T = torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(one(tokens_T).logits, other(tokens_T).logits, rtol=0, atol=1e-5)


def assert_same_tensors(run: Path, back: Path) -> None:
    """Of two runs' last checkpoints, to the bit."""
    ours, others = CheckpointTensors(run), CheckpointTensors(back)
    assert others.shapes == ours.shapes and others.dtypes == ours.dtypes
    for key, tensor in ours.read(list(ours.shapes)).items():
        assert torch.equal(tensor, others.read([key])[key]), key


WRONG = [None, -1, 0, "x", 1e30, float("nan"), [], {}, [[]], [[-1]], [["x"] * 4] * 2, 2**40, True, [[2**70] * 4] * 2]


def assert_configs_are_refused_or_fit(exported: Path, folder: Path) -> None:
    """Each field of an exported directory's config.json with each wrong value, in `folder`."""
    for path in exported.glob("model*"):
        (folder / path.name).symlink_to(path)  # as the hub's cache has it
    config = json.loads((exported / "config.json").read_text())
    refused = 0
    for name in config:
        for value in WRONG:
            (folder / "config.json").write_text(json.dumps(config | {name: value}))
            try:
                HFDirectory(folder)
            except ValueError:
                refused += 1
    assert refused > 100


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found
