"""Experts move between training steps with their optimizer state, and not one bit is lost."""

import random

import pytest
import torch

from hmoe_megatron.moe.compute.flat import MATRICES
from hmoe_megatron.placement.plan import Piece
from hmoe_megatron.replan.transfer import digest, segments
from tests.distributed.layouts import WORDS
from tests.distributed.plans import WIDTHS
from tests.distributed.ranks import run_ranks
from tests.distributed.training_run import TINY, UNCLIPPED, logical_state

MODEL = f"--hmoe-widths {','.join(map(str, WIDTHS))} --hmoe-replan-interval 1000 --hmoe-replan-room 1"


def random_pieces(draw: random.Random, ranks: int, cut: bool):
    """WIDTHS on so many ranks, each expert whole or in two pieces; some ranks may have none."""
    held = [[] for _ in range(ranks)]
    for expert in draw.sample(range(len(WIDTHS)), len(WIDTHS)):
        ends = (
            [0, draw.randrange(8, WIDTHS[expert], 8), WIDTHS[expert]]
            if cut and draw.random() < 0.6
            else [0, WIDTHS[expert]]
        )
        for rank, lo, hi in zip(draw.sample(range(ranks), len(ends) - 1), ends, ends[1:], strict=False):
            held[rank].append(Piece(expert, lo, hi))
    return tuple(map(tuple, held))


def moving(flags: str, count: int, moves: tuple[int, ...], cut: bool, seed: int = 0, fail=None) -> dict:
    """Train, and before the steps ``moves`` change to a random plan; the state at the end. fail: (rank, layer) where
    staging fails once."""
    from benchmarks.trainer import Trainer
    from hmoe_megatron.placement.planner import predicted_layer
    from hmoe_megatron.replan import moves as replan
    from tests.distributed.training_run import _batches, _draw_dense, _snapshot

    trainer = Trainer(
        [*TINY, *MODEL.split(), *flags.split()], batches=lambda args: _batches(args, 0), hooks=[_draw_dense]
    )
    layout, draw, told = trainer.layout, random.Random(seed), []
    if fail:
        _fail_in_staging(replan, *fail)
    losses, norms = [], []
    for step in range(count):
        if step in moves:
            plan = layout.plan
            layers = []
            for layer in plan.layers:
                pieces = random_pieces(draw, plan.ranks, cut)
                layers.append(predicted_layer(pieces, layer.widths, layer.tokens, plan.rank_specs, plan.cost))
            wanted = type(plan)(tuple(layers), plan.cost, plan.rank_specs, plan.stages, plan.numbers)
            moved = replan.change_plan(trainer.model, trainer.optimizer, layout, wanted)
            told.append((moved.layers, moved.failure, [layer.pieces for layer in layout.plan.layers]))
        loss, norm = trainer.step()
        losses.append(loss)
        norms.append(norm)
    trainer.end_overlap()
    return _snapshot(trainer.model, trainer.optimizer) | {"losses": losses, "norms": norms, "told": told}


def _fail_in_staging(replan, rank: int, layer: int) -> None:
    stage = replan._Stage

    class Failing(stage):
        def __init__(self, part, own, *given):
            if torch.distributed.get_rank() == rank and own.layer == layer:
                raise MemoryError("planted")
            super().__init__(part, own, *given)

    replan._Stage = Failing


def states(ranks) -> dict[str, torch.Tensor]:
    found = {"weights": ranks}
    for kind in ranks[0]["optimizer"]:
        found[kind] = [rank["optimizer"][kind] | {"split": rank["split"]} for rank in ranks]
    return {f"{kind} {name}": value for kind, of in found.items() for name, value in logical_state(of).items()}


LAYOUTS = {
    "EP2": (2, "EP2 alltoall"),
    "allgather": (2, "EP2 allgather"),
    "EP2 distributed optimizer": (2, "EP2 alltoall DO"),
    "TP2 ETP2": (4, "TP2 EP2 ETP2 alltoall"),
    "two copies, distributed optimizer, overlap": (4, "EP2 alltoall DO overlap"),
    "EP4": (4, "EP4 alltoall"),
    "PP2": (4, "PP2 EP2 alltoall"),
}
SUITE = ("EP2", "two copies, distributed optimizer, overlap")


@pytest.mark.parametrize(
    ("ranks", "words"),
    [pytest.param(*of, id=name, marks=() if name in SUITE else pytest.mark.campaign) for name, of in LAYOUTS.items()],
)
def test_whole_experts_that_move_change_nothing(ranks, words):
    """Bitwise: losses, norms, every weight and moment, against the run that never moves."""
    flags = f"{' '.join(WORDS[word] for word in words.split())} --deterministic-mode"
    still = run_ranks(ranks, moving, flags, 6, (), False)
    moved = run_ranks(ranks, moving, flags, 6, (1, 2, 4), False)
    changes = [pieces for _, failure, pieces in moved[0]["told"] if not failure]
    assert len(changes) == 3 and len({str(pieces) for pieces in changes}) == 3
    for own, other in zip(moved, still, strict=True):
        assert own["losses"] == other["losses"] and own["norms"] == other["norms"]
    found, expected = states(moved), states(still)
    assert found.keys() == expected.keys() and len({name.split()[0] for name in found}) == 4
    assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []
