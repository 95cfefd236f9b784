"""Experts move between training steps with their optimizer state, and not one bit is lost."""

import gc
import json
import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmoe_megatron.config import HMoEConfig
from hmoe_megatron.files import PLAN_FILE, REPLANS_FILE
from hmoe_megatron.moe.compute.flat import MATRICES
from hmoe_megatron.placement.plan import Piece, PlacementPlan
from hmoe_megatron.replan.transfer import digest, exchange, segments
from tests.distributed.layouts import BF16_LOSS_BOUND, LOSS_BOUND, MODEL_WORDS, WEIGHT_BOUND, WORDS
from tests.distributed.plans import WIDTHS, whole
from tests.distributed.pretrain_run import pretrain
from tests.distributed.ranks import run_ranks
from tests.distributed.test_resume import step_lines
from tests.distributed.training_run import LAYERS, TINY, UNCLIPPED, logical_state
from tests.live_bytes import LiveBytes
from tests.rows import rarely

MODEL = f"--hmoe-widths {','.join(map(str, WIDTHS))} --hmoe-replan-interval 1000 --hmoe-replan-room 3"


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


def moving(flags: str, count: int, moves, cut: bool, seed=0, fail=None, each: int = 1, then=lambda done: None) -> dict:
    """Train, and before the steps ``moves`` change to a random plan, ``each`` times; the state at the end.

    fail: (phase, rank, layer) of what goes wrong once. then: called with the number of changes so far.
    """
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
        for _ in range(each if step in moves else 0):
            plan = layout.plan
            layers = [
                predicted_layer(
                    random_pieces(draw, plan.ranks, cut), layer.widths, layer.tokens, plan.rank_specs, plan.cost
                )
                for layer in plan.layers
            ]
            moved = replan.change_plan(trainer.model, trainer.optimizer, layout, replace(plan, layers=tuple(layers)))
            told.append((moved.layers, moved.failure, [layer.pieces for layer in layout.plan.layers]))
            then(len(told))
        loss, norm = trainer.step()
        losses.append(loss)
        norms.append(norm)
    trainer.end_overlap()
    return _snapshot(trainer.model, trainer.optimizer) | {"losses": losses, "norms": norms, "told": told}


def _fail_in_staging(replan, phase: str, rank: int, layer: int) -> None:
    stage = replan._Stage

    class Failing(stage):
        def __init__(self, part, own, *given):
            self.fails = torch.distributed.get_rank() == rank and own.layer == layer
            if self.fails:
                replan._Stage = stage
                if phase == "memory":
                    raise MemoryError("planted")
            super().__init__(part, own, *given)

        def exchange(self):
            exchange = replan.exchange
            replan.exchange = self._garbled if self.fails else exchange
            try:
                return super().exchange()
            finally:
                replan.exchange = exchange

        def _garbled(self, matrix, before, after, *given):
            sent = exchange(matrix, before, after, *given)
            after[0].view(torch.int32)[0, 0] ^= 1
            return sent

    replan._Stage = Failing


def states(ranks) -> dict[str, torch.Tensor]:
    found = {"weights": ranks}
    for kind in ranks[0]["optimizer"]:
        found[kind] = [rank["optimizer"][kind] | {"split": rank["split"]} for rank in ranks]
    return {f"{kind} {name}": value for kind, of in found.items() for name, value in logical_state(of).items()}


SEED_OF_FULL_RANKS = 9  # its first plan has an expert on each rank, so that a garbled number is of one
LAYOUTS = {
    "EP2": (2, "EP2 alltoall"),
    "allgather": (2, "EP2 allgather"),
    "distributed optimizer": (2, "EP2 alltoall DO"),
    "bf16": (2, "EP2 alltoall bf16"),
    "bf16, two copies, distributed optimizer, overlap": (4, "EP2 alltoall bf16 DO overlap"),
    "TP2 ETP2": (4, "TP2 EP2 ETP2 alltoall"),
    "TP2 ETP1": (4, "TP2 EP4 ETP1 alltoall DO"),
    "EP4": (4, "EP4 alltoall"),
    "PP2": (4, "PP2 EP2 alltoall"),
    "virtual stages": (4, "4-layers PP2 VPP2 EP2 alltoall DO"),
    "multi-token prediction": (2, "MTP EP2 alltoall"),
    "Top-P": (2, "Top-P EP2 alltoall"),
    "overlapped dispatch": (2, "EP2 bf16 alltoall overlap-dispatch"),
}
SUITE = ("bf16, two copies, distributed optimizer, overlap",)


def flags_of(words: str) -> str:
    return " ".join((WORDS | MODEL_WORDS)[word] for word in words.split())


@pytest.mark.parametrize(
    ("ranks", "words"),
    [pytest.param(*of, id=name, marks=() if name in SUITE else pytest.mark.campaign) for name, of in LAYOUTS.items()],
)
def test_whole_experts_that_move_change_nothing(ranks, words):
    """Bitwise: losses, norms, every weight and moment, against the run that never moves."""
    flags = f"{flags_of(words)} --deterministic-mode --hmoe-max-cuts 0"
    still = run_ranks(ranks, moving, flags, 6, (), False)
    moved = run_ranks(ranks, moving, flags, 6, (1, 2, 4), False)
    changes = [pieces for _, failure, pieces in moved[0]["told"] if not failure]
    assert len(changes) == 3 and len({str(pieces) for pieces in changes}) == 3
    equal_to_the_bit(moved, still)


def equal_to_the_bit(ranks, others):
    for own, other in zip(ranks, others, strict=True):
        assert own["losses"] == other["losses"] and own["norms"] == other["norms"]
    found, expected = states(ranks), states(others)
    assert found.keys() == expected.keys() and len({name.split()[0] for name in found}) == 4
    assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        *rarely(
            (2, "EP2 alltoall DO"),
            (4, "EP2 alltoall DO overlap"),
            (4, "TP2 EP2 ETP2 alltoall"),
            (4, "PP2 EP2 allgather"),
            (4, "MTP MLA TP2 EP2 ETP1 alltoall DO overlap"),
        )
    ],
)
def test_cut_experts_move_too(ranks, words):
    """Against the run that never moves, with the bounds of a cut expert under another plan."""
    flags = f"{flags_of(words)} {UNCLIPPED}"
    still = run_ranks(ranks, moving, flags, 6, (), True)
    moved = run_ranks(ranks, moving, flags, 6, (1, 2, 3, 5), True)
    assert [failure for _, failure, _ in moved[0]["told"]] == [""] * 4
    if still[-1]["losses"][0] is not None:
        assert moved[-1]["losses"] == pytest.approx(still[-1]["losses"], rel=LOSS_BOUND)
    found, expected = states(moved), states(still)
    assert max((found[name] - expected[name]).abs().max().item() for name in expected) <= WEIGHT_BOUND


@pytest.mark.parametrize(("layer", "rank"), [(0, 1), *rarely((0, 0), (1, 0), (1, 1))], ids=lambda at: str(at))
@pytest.mark.parametrize("phase", ["digest", *rarely("memory")])
def test_a_rank_that_fails_before_the_switch_leaves_all_on_the_old_plan(layer, rank, phase):
    flags = f"{flags_of('EP2 alltoall DO')} --deterministic-mode"
    still = run_ranks(2, moving, flags, 4, (), False)
    moved = run_ranks(2, moving, flags, 4, (1, 2), False, SEED_OF_FULL_RANKS, (phase, rank, layer))
    for own in moved:
        (first, failure, pieces), (second, none, after) = own["told"]
        assert first == list(range(layer)) and failure.startswith(f"layer {layer}: rank ")
        assert (
            f"rank {rank}: MemoryError: planted" in failure if phase == "memory" else "changed on the way: " in failure
        )
        assert (second, none) == ([0, 1], "") and pieces != after
        assert own["told"] == moved[0]["told"]
    equal_to_the_bit(moved, still)


def many_moves(flags: str) -> list[int]:
    """Bytes of all tensors alive after 1, 100 and 200 changes, with a step after each tenth."""
    counts = []

    def count(done):
        if done in (10, 100, 200):
            gc.collect()
            alive = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
            counts.append(sum(tensor.nbytes for tensor in alive))

    moving(flags, 21, tuple(range(1, 21)), True, 0, None, 10, count)
    return counts


@pytest.mark.campaign
def test_two_hundred_changes_leave_memory_where_it_was():
    for counts in run_ranks(2, many_moves, flags_of("EP2 alltoall DO"), timeout_s=300):
        assert len(counts) == 3 and max(counts) - min(counts) <= 0.01 * min(counts)


def memory_of_a_change(flags: str) -> tuple[int, int]:
    """(most bytes of tensors in a change of all layers beside what the rank holds, what is said of it before)."""
    from benchmarks.trainer import Trainer
    from hmoe_megatron.placement.planner import predicted_layer
    from hmoe_megatron.replan.moves import change_plan
    from hmoe_megatron.validate_args.memory import moving_bytes

    trainer = Trainer([*TINY, *MODEL.split(), *"--hidden-size 256 --hmoe-replan-room 0.3".split(), *flags.split()])
    trainer.step()
    plan = trainer.layout.plan
    swapped = tuple(
        predicted_layer(layer.pieces[::-1], layer.widths, layer.tokens, plan.rank_specs, plan.cost)
        for layer in plan.layers
    )
    held = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    with LiveBytes(held) as live:
        moved = change_plan(trainer.model, trainer.optimizer, trainer.layout, replace(plan, layers=swapped))
    assert moved.failure == "" and len(moved.layers) == LAYERS
    return live.most, moving_bytes(trainer.args, trainer.layout)


@pytest.mark.parametrize("words", ["EP2 alltoall DO", *rarely("EP2 alltoall", "EP2 alltoall bf16")])
def test_the_memory_of_a_change_is_said_before(words):
    for most, said in run_ranks(2, memory_of_a_change, flags_of(words)):
        print(f"{most / said:.2f} of what is said")
        assert 0.5 * said < most <= said


@given(st.integers(0, 10_000), st.integers(1, 6), st.booleans(), st.booleans())
def test_every_unit_of_width_has_one_way(seed, ranks, cut, then_cut):
    draw = random.Random(seed)
    if ranks == 1:
        cut = then_cut = False
    old, new = random_pieces(draw, ranks, cut), random_pieces(draw, ranks, then_cut)
    units = Counter((way.expert, unit) for way in segments(old, new) for unit in range(way.lo, way.hi))
    assert units == Counter({(expert, unit): 1 for expert, width in enumerate(WIDTHS) for unit in range(width)})
    for pieces, end in ((old, "source"), (new, "to")):
        for way in segments(old, new):
            there = pieces[getattr(way, end)]
            assert any(p.expert == way.expert and p.lo <= way.lo and way.hi <= p.hi for p in there)


@pytest.mark.parametrize("matrix", MATRICES)
def test_the_digest_knows_bits_and_places(matrix):
    pieces = (Piece(1, 0, 8), Piece(0, 0, 16))
    rows = 48 if matrix == "linear_fc1_weight" else 24
    tensor = torch.randn(rows, 5, generator=torch.Generator().manual_seed(0))
    told = digest(matrix, [tensor], pieces, (16, 8))
    flipped, swapped, negated = tensor.clone(), tensor.clone(), tensor.clone()
    flipped.view(torch.int32)[3, 2] ^= 1
    swapped[[0, 1]] = tensor[[1, 0]]
    negated[0, 0] = -0.0
    zero = tensor.clone()
    zero[0, 0] = 0.0
    assert not torch.equal(digest(matrix, [flipped], pieces, (16, 8)), told)
    assert not torch.equal(digest(matrix, [swapped], pieces, (16, 8)), told)
    assert not torch.equal(digest(matrix, [negated], pieces, (16, 8)), digest(matrix, [zero], pieces, (16, 8)))
    split = (Piece(1, 0, 3), Piece(1, 3, 8), Piece(0, 0, 16))
    parts = MATRICES[matrix](tensor, (8, 16))
    if matrix == "linear_fc1_weight":
        first = parts[0].view(2, 8, 5)
        laid = torch.cat([first[:, :3].flatten(0, 1), first[:, 3:].flatten(0, 1), parts[1]])
    else:
        laid = torch.cat([parts[0][:, :3].reshape(3, 5), parts[0][:, 3:].reshape(5, 5), parts[1].reshape(16, 5)])
    assert torch.equal(digest(matrix, [laid], split, (16, 8)), told)


RUN = (
    "--hmoe-widths 16,32,48,64 --expert-model-parallel-size 2 --hmoe-placement contiguous --moe-token-dispatcher-type "
    "alltoall --override-opt_param-scheduler"
)
REPLAN = f"{RUN} --hmoe-replan-interval 2 --hmoe-replan-max-loss 1"


@pytest.mark.parametrize(
    "more", ["", *rarely("--async-save --use-persistent-ckpt-worker --eval-interval 2 --eval-iters 1 --bf16")]
)
def test_a_run_balances_itself_and_goes_on_from_its_checkpoints(tmp_path, more):
    """Whole experts in order are 48 and 112 wide; the first look makes that even."""
    run = tmp_path / "run"
    saves = f"--save {run} --save-interval {3 if not more else 2} --use-distributed-optimizer {more}"
    bound = BF16_LOSS_BOUND if more else LOSS_BOUND
    still = run_ranks(2, pretrain, f"{RUN} --train-iters 6 {more}")
    moved = run_ranks(2, pretrain, f"{REPLAN} {saves} --train-iters 6")
    assert {rank.code for rank in (*still, *moved)} == {0}
    losses = [[float(loss) for _, loss, _ in step_lines(ranks[-1].output)] for ranks in (still, moved)]
    assert losses[1] == pytest.approx(losses[0], rel=bound) and len(losses[0]) == 6
    lines = [line for line in moved[0].output.splitlines() if "experts moved in " in line]
    assert lines[0].startswith(" step      2 | experts moved in 2 layers") and "slowest rank over mean 1." in lines[0]

    records = [json.loads(line) for line in (run / REPLANS_FILE).read_text().splitlines()]
    first = records[0]
    assert first["iteration"] == 2 and first["layers"] == [0, 1] and first["failure"] == ""
    assert first["balance_before"] > 1.2 > 1.1 > first["balance_after"] and first["gain"] > 0.1
    plan = loaded(run)
    assert plan.layers[0].pieces != whole((0, 1), (2, 3)) and max(map(len, plan.layers[0].pieces)) < 4
    first_save = 4 if more else 3  # one at step 2 comes before the change
    saved = {step: loaded(run / f"iter_{step:07d}") for step in (first_save, 6)}
    assert [layer.pieces for layer in saved[6].layers] == [layer.pieces for layer in plan.layers]
    if more:
        assert loaded(run / "iter_0000002").layers[0].pieces == whole((0, 1), (2, 3))
        return
    units = sum(way.hi - way.lo for way in _moved_ways(saved[3]))
    assert first["bytes"] == units * 3 * 32 * 3 * 4  # three matrices of hidden size 32; fp32 weight and two moments

    more = f"--load {run} --train-iters 8"
    on = run_ranks(2, pretrain, f"{REPLAN.replace('contiguous', 'checkpoint')} {more} --use-distributed-optimizer")
    alone = run_ranks(
        1, pretrain, f"{RUN.replace('-size 2', '-size 1')} {more} --use-distributed-optimizer --micro-batch-size 4"
    )
    assert {rank.code for rank in (*on, *alone)} == {0}
    found = [[float(loss) for _, loss, _ in step_lines(ranks[-1].output)] for ranks in (on, alone)]
    assert found[0] == pytest.approx(found[1], rel=1e-4) and len(found[0]) == 2


def loaded(folder):
    return PlacementPlan.load(folder / PLAN_FILE, (WIDTHS,) * LAYERS, 2)


def _moved_ways(plan):
    contiguous = whole((0, 1), (2, 3))
    return [way for layer in plan.layers for way in segments(contiguous, layer.pieces) if way.source != way.to]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--hmoe-replan-interval 0", "--hmoe-replan-interval 0: give a whole number of at least 1, or auto"),
        ("--hmoe-replan-interval often", "--hmoe-replan-interval often: give a whole number"),
        ("--hmoe-replan-max-loss 2", "--hmoe-replan-max-loss 2.0: give a number from 0 to 1"),
        ("--hmoe-replan-room -1", "--hmoe-replan-room -1.0: give a number from 0 to 100"),
        ("--hmoe-replan-interval 2 --expert-model-parallel-size 1", "needs --expert-model-parallel-size of 2 or more"),
    ],
)
def test_what_can_not_be_is_refused(flags, said):
    (ended,) = run_ranks(1, pretrain, flags)
    assert ended.code == 2 and said in ended.errors()[0]


@pytest.mark.parametrize(
    ("interval", "changes", "looks"),
    [("4", (), [4, 8, 12, 16]), ("auto", (), [10, 30, 70]), ("auto", (30,), [10, 30, 40, 60, 100])],
)
def test_when_is_looked(interval, changes, looks, monkeypatch):
    from hmoe_megatron.replan import replanner

    settings = HMoEConfig(replan_interval=interval)
    layout = SimpleNamespace(settings=settings, stats=SimpleNamespace(open_window=lambda: None), plan=None)
    found = []
    look = replanner.Replanner(layout, 16, None, lambda: None)
    monkeypatch.setattr(look, "_loads", lambda: found.append(step))
    monkeypatch.setattr(look, "_judged", lambda _: replanner.Verdict("plan" if step in changes else None, 0, 1, 1, ""))
    monkeypatch.setattr(look, "_change", lambda *_: None)
    for step in range(looks[-1] + 1):
        look.before_step(step, [], None)
    assert found == looks
