"""Bugs planted into copies of the kernels: the checks of the other tests must find every one."""

import importlib
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from hmoe_megatron.moe.compute import ragged
from hmoe_megatron.moe.compute.ragged.self_test import Case, drawn, problem
from tests.distributed.ranks import run_ranks
from tests.rows import rarely
from tests.unit.ragged import cases

pytestmark = cases.INTERPRETED
HERE = Path(ragged.__file__).parent


class Bug(NamedTuple):
    """``right`` in the file becomes ``wrong``."""

    name: str
    file: str
    right: str
    wrong: str


BUGS = [
    Bug("tiles of a group walked without its remainder", "schedule", "top + place % height", "top + place % GROUP"),
    Bug("equal widths get one place in the list", "schedule", "((F_E == F) & (j < e))", "((F_E == F) & (j <= e))"),
    Bug(
        "h begins by this piece's width",
        "schedule",
        "m_E.to(tl.int64) * F_E.to(tl.int64)",
        "m_E.to(tl.int64) * F.to(tl.int64)",
    ),
    Bug(
        "a piece without rows is not written",
        "schedule",
        "(m_E > 0) | ((of_weights == 1) & (skip_empty == 0))",
        "m_E > 0",
    ),
    Bug("gate and up swapped", "row_products", "((ib // HALF) * F", "((1 - ib // HALF) * F"),
    Bug("no probability", "row_products", "sigmoid(gate) * up * p[:, None]", "sigmoid(gate) * up"),
    Bug(
        "rows past a piece stored",
        "row_products",
        "mask = (im < left)[:, None]\n    if not EVEN_F",
        "mask = (im < 1 << 20)[:, None]\n    if not EVEN_F",
    ),
    Bug("columns past the width stored", "row_products", "mask = mask & (ih < F - n0)[None, :]", "mask = mask"),
    Bug("columns past H stored", "row_products", "mask = mask & (i < N - n0)[None, :]", "mask = mask"),
    Bug("depth past the width not masked", "launches", "EVEN_K=layer.divides(tile.depth, times)", "EVEN_K=True"),
    Bug("up half of the input gradient lost", "row_products", "K = TIMES * tl.multiple_of", "K = tl.multiple_of"),
    Bug("derivative of SiLU", "activation", "(s + silu * (1.0 - s))", "(s - silu * (1.0 - s))"),
    Bug(
        "probability's gradient after the probability",
        "activation",
        "dp += dh * silu * up\n            dh *= p",
        "dh *= p\n            dp += dh * silu * up",
    ),
    Bug("h not computed again", "activation", "(silu * up * p).to(dtype)", "(silu * up).to(dtype)"),
    Bug("up's gradient without SiLU", "activation", "(dh * silu).to(dtype)", "(dh * gate).to(dtype)"),
    Bug(
        "last step too early",
        "row_products",
        "if step == STEPS - 1:\n            h0",
        "if step == STEPS - 2:\n            h0",
    ),
    Bug("a program's steps by one too few", "weight_products", "// BK, 1), axis=0)", "// BK, 1), axis=0) - 1"),
    Bug(
        "sum not begun anew",
        "weight_products",
        "ACCUMULATE, BM, BN)\n                acc = tl.zeros((BM, BN), dtype=tl.float32)",
        "ACCUMULATE, BM, BN)",
    ),
    Bug("rows of the next piece added", "weight_products", "(ik < m - k)[None, :]", "(ik < m)[None, :]"),
    Bug(
        "written where it should be added",
        "weight_products",
        "v += tl.load(dw, mask=mask, other=0.0).to(tl.float32)",
        "v += 0.0",
    ),
    Bug(
        "added where it should be written",
        "experts",
        "by_hidden, grad, accumulate=False)",
        "by_hidden, grad, accumulate=True)",
    ),
    Bug("fc2's gradient not transposed", "weight_products", "return i + n * F", "return i * H + n"),
    Bug(
        "a second backward pass on overwritten memory",
        "experts",
        "gate_up, ctx.gate_up = ctx.gate_up, None",
        "gate_up = ctx.gate_up",
    ),
]


def planted(folder, number, bug):
    """Writes a copy of the package that holds the bug; returns its name."""
    name = f"planted_{number}"
    for file in HERE.glob("*.py"):
        text = file.read_text()
        if file.stem == bug.file:
            assert bug.right in text, f"{bug.name}: not in {bug.file} any more"
            text = text.replace(bug.right, bug.wrong)
        (folder / name).mkdir(exist_ok=True)
        (folder / name / file.name).write_text(text.replace("hmoe_megatron.moe.compute.ragged", name))
        compile((folder / name / file.name).read_text(), file.name, "exec")
    return name


def found_by(package) -> str:
    """The first check that fails, and how; "" if none does."""
    for (name, case), flat in zip(cases.QUICK.items(), (True, False), strict=True):
        for tiles in (cases.tiles(flat=flat), cases.tiles(flat=not flat)):
            compute = cases.backend(package, tiles)
            try:
                wrong = problem(case, torch.float32, torch.device("cpu"), compute, torch.float64)
            except Exception as error:  # memory that is not ours, or a shape
                wrong = f"{type(error).__name__}"
            if wrong:
                return f"{name}: {wrong}"
    return second_pass(package)


def in_a_process_of_its_own(folder, number, bug) -> str:
    """What finds the bug: it may write to memory that is not its own, and then anything may end the process."""
    name = planted(folder, number, bug)
    try:
        return run_ranks(1, found_in_a_copy, folder, name, timeout_s=120)[0]
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


def found_in_a_copy(folder, name) -> str:
    sys.path.insert(0, str(folder))
    copy = importlib.import_module(name)
    for part in ("schedule", "experts"):
        importlib.import_module(f"{name}.{part}")
    return found_by(copy)


def second_pass(package) -> str:
    case = Case(16, (8, 16), (5, 4))
    tensors = [tensor.requires_grad_() for tensor in drawn(case, torch.device("cpu"))[0]]
    y = cases.backend(package, cases.tiles())(*tensors[:2], list(case.rows), *tensors[2:], case.widths)
    first, second = (torch.autograd.grad(y.sum(), tensors, retain_graph=True) for _ in range(2))
    return "" if all(map(torch.equal, first, second)) else "the second backward pass differs from the first"


@pytest.mark.parametrize(
    "bugs", [BUGS[::9], *rarely(*(BUGS[first::6] for first in range(6)))], ids=lambda bugs: bugs[0].name
)
def test_every_planted_bug_is_found(tmp_path, bugs):
    assert found_by(ragged) == ""
    how = {bug.name: in_a_process_of_its_own(tmp_path, number, bug) for number, bug in enumerate(bugs)}
    print(f"{sum(map(bool, how.values()))} of {len(bugs)} planted bugs found")
    print("\n".join(f"{name}: {found or 'NOT FOUND'}" for name, found in how.items()))
    assert len(bugs) >= 3 and all(how.values()), [name for name, found in how.items() if not found]


def test_every_bug_can_be_planted(tmp_path):
    for number, bug in enumerate(BUGS):
        name = planted(tmp_path, number, bug)
        assert bug.wrong in (tmp_path / name / f"{bug.file}.py").read_text(), bug.name


def test_a_bug_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(AssertionError, match="not in schedule any more"):
        planted(tmp_path, 0, Bug("none", "schedule", "no such text", ""))
