"""Experts that move while training, on traces of loads: the time beside staying and an oracle that knows all loads.

What training runs is simulated: `Decision` and `proposed_plan`, on windows of steps. Letters: T steps, E experts.
`python -m benchmarks.replan_simulation` prints the table of benchmarks/planner.md.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from benchmarks.load_traces import trace
from hmoe_megatron.moe.layout import most_widths
from hmoe_megatron.placement.cost import CostModel
from hmoe_megatron.placement.moves import diff, moved_bytes
from hmoe_megatron.placement.plan import PlacementPlan
from hmoe_megatron.placement.planner import contiguous_plan, plan_model
from hmoe_megatron.placement.profiles import profile_named
from hmoe_megatron.replan.decision import Decision
from hmoe_megatron.replan.proposal import LEAST_GAIN, proposed_plan
from hmoe_megatron.widths import expert_widths


@dataclass(frozen=True)
class Result:
    """Sums over a trace, in the unit of the plan's cost. moves: steps before which experts moved.

    stay: with the first plan. replanned: with changes of plan, of it `moving`. oracle: with the fastest of the first
    plan, the plan for the mean of all loads and every plan that was used, from the beginning to the end, the move there
    paid.
    """

    stay: float
    replanned: float
    oracle: float
    moving: float
    moves: tuple[int, ...]

    @property
    def gain(self) -> float:
        """Share of the time of staying that changes of plan gain; negative if they lose."""
        return 1 - self.replanned / self.stay

    @property
    def possible(self) -> float:
        """Share of the time of staying that the oracle gains."""
        return 1 - self.oracle / self.stay

    @property
    def gain_of_oracle(self) -> float:
        """The gain over the oracle's, above 1 where moving more than once pays.

        nan where the oracle gains less than LEAST_GAIN: there the ratio says nothing, and `gain` what was lost.
        """
        return self.gain / self.possible if self.possible >= LEAST_GAIN else math.nan


def step_times(plan: PlacementPlan, tokens_TE: np.ndarray) -> np.ndarray:
    """[T] time of a micro-batch of each step, for a plan of one layer: its slowest rank."""
    per_piece_TE, per_width_TE = plan.cost.compute(tokens_TE)
    travel_R, time_TR = plan.cost.travel(plan.rank_specs), np.zeros((len(tokens_TE), plan.ranks))
    for rank, pieces in enumerate(plan.layers[0].pieces):
        for expert, lo, hi in pieces:
            padded = -(-(hi - lo) // plan.cost.width_tile) * plan.cost.width_tile
            compute_T = per_piece_TE[:, expert] + padded * per_width_TE[:, expert]
            time_TR[:, rank] += compute_T / plan.rank_specs[rank].speed + travel_R[rank] * tokens_TE[:, expert]
    return time_TR.max(axis=1)


def simulate(first: PlacementPlan, tokens_TE, window: int, max_loss: float, room: float, multiple: int, move_time):
    """Result of a run of one layer under tokens_TE, rows of a step; a change may come after every ``window`` steps.

    move_time(old, new): what a change takes, in the unit of the plan's cost. A change takes half to twice that.
    """
    decision, plan, now, moving, moves = Decision(max_loss), first, 0.0, 0.0, []
    most, used, slower = most_widths(first, room, multiple), [first], np.random.default_rng(0)
    for begin in range(0, len(tokens_TE), window):
        steps_TE = tokens_TE[begin : begin + window]
        now += step_times(plan, steps_TE).sum()
        if (end := begin + window) >= len(tokens_TE):
            break
        tokens_LE = [steps_TE.mean(axis=0)]
        proposed = proposed_plan(plan, tokens_LE, most, None, multiple)
        if (verdict := decision.judge(plan, proposed, tokens_LE, now)).plan is None:
            continue
        took = move_time(plan, verdict.plan) * slower.uniform(0.5, 2.0)
        decision.made(plan, verdict.plan, took)
        plan, now, moving = verdict.plan, now + took, moving + took
        used.append(plan)
        moves.append(end)
    best = proposed_plan(first, [tokens_TE.mean(axis=0)], most, None, multiple)
    stay = step_times(first, tokens_TE).sum()
    oracle = min(stay, *(step_times(one, tokens_TE).sum() + move_time(first, one) for one in (best, *used[1:])))
    return Result(float(stay), float(now), float(oracle), float(moving), tuple(moves))


# The standard cases: one layer on 8 GPUs of the h100 profile. Moves are dear: with one copy of an expert its rank sends
# the whole optimizer state, over the network between nodes, and training waits on top.
RANKS, HIDDEN_SIZE, MULTIPLE = 8, 4096, 128
TOKENS = 8 * 4096  # of a micro-batch of all ranks
STEPS, MICRO_BATCHES = 2000, 8  # of a step
PAUSE_STEPS = 5
WINDOW, ROOM, MAX_LOSS = 24, 0.25, 0.015
WORKLOADS = ("W1", "W2", "W3", "W4", "W5", "W6")
STARTS = ("contiguous", "planned")
LAYERS = {  # experts: (schedule, top-k)
    64: ("arithmetic:9:23", 4),
    16: ("hybrid:9,9,9,9,13,13,13,13,19,19,19,19,23,23,23,23", 2),
}
MEAN_WIDTH = 16 * MULTIPLE


@dataclass(frozen=True)
class Case:
    """A run on a workload of `load_traces`, which lies along the ranks of the plan at the start.

    start: contiguous placement, or planned for loads that are all equal.
    """

    workload: str
    start: str
    experts: int
    profile: str
    seed: int
    steps: int = STEPS

    def result(self, window: int = WINDOW, room: float = ROOM, max_loss: float = MAX_LOSS) -> Result:
        """What training makes of it with these flags."""
        schedule, topk = LAYERS[self.experts]
        widths_LE = [expert_widths(schedule, self.experts, self.experts * MEAN_WIDTH, MULTIPLE)]
        h100, cost = profile_named("h100"), CostModel(profile_named(self.profile), HIDDEN_SIZE)
        second = 1.0 if cost.unit == "s" else h100.flops_per_s  # in the cost's unit

        equal_LE = [[TOKENS * topk / self.experts] * self.experts]
        first = {
            "contiguous": lambda: contiguous_plan(widths_LE, RANKS, equal_LE, cost),
            "planned": lambda: plan_model(equal_LE, widths_LE, RANKS, cost, cut_multiple=MULTIPLE),
        }[self.start]()
        tokens_TE = trace(
            self.workload, self.steps, self.experts, RANKS, self.seed, TOKENS, topk, rank_E=_holders(first)
        )
        pause = PAUSE_STEPS * step_times(first, np.array(equal_LE))[0]  # of micro-batches, as all times here

        def move_time(old, new):
            return pause + _busiest_bytes(old, new) / h100.inter_node_bytes_per_s * second / MICRO_BATCHES

        return simulate(first, tokens_TE, window, max_loss, room, MULTIPLE, move_time)


def standard_cases(workloads: Iterable[str] = WORKLOADS, seeds: Iterable[int] = (0,)) -> list[Case]:
    """On each workload both starts, both layers, with the h100 and the FLOPs profile, by seed."""
    return [Case(*values) for values in product(workloads, STARTS, LAYERS, ("h100", "flops"), seeds)]


def campaign(cases: Iterable[Case], **flags) -> Iterator[tuple[Case, Result]]:
    """Each case with its result, as they are done."""
    return ((case, case.result(**flags)) for case in cases)


def campaign_table(results: Iterable[tuple[Case, Result]]) -> str:
    """Markdown, a row for each workload and start: least and most over its cases.

    The share is of cases in which the oracle gains LEAST_GAIN or more; a dash where there is none.
    """
    rows = {}
    for case, result in results:
        rows.setdefault((case.workload, case.start), []).append(result)
    lines = [
        "| workload | start | oracle gains, % | replanning gains, % | least share of the oracle's | moves |",
        "|---|---|---|---|---|---|",
    ]
    for (workload, start), of in rows.items():
        shares = [result.gain_of_oracle for result in of if not math.isnan(result.gain_of_oracle)]
        lines.append(
            f"| {workload} | {start} | {_range(100 * r.possible for r in of)} | "
            f"{_range(100 * r.gain for r in of)} | {f'{min(shares):.3f}' if shares else '-'} | "
            f"{_range((len(r.moves) for r in of), digits=0)} |"
        )
    return "\n".join(lines) + "\n"


def _range(values: Iterable[float], digits: int = 2) -> str:
    least, *_, most = sorted(values) * 2
    return f"{least:.{digits}f} to {most:.{digits}f}"


def _holders(plan: PlacementPlan) -> list[int]:
    """Rank of the widest piece of each expert of the first layer."""
    pieces = sorted((p.width, rank, p.expert) for rank, held in enumerate(plan.layers[0].pieces) for p in held)
    rank_by_expert = {expert: rank for _, rank, expert in pieces}
    return [rank_by_expert[e] for e in range(len(rank_by_expert))]


def _busiest_bytes(old: PlacementPlan, new: PlacementPlan) -> float:
    """State bytes of the rank that sends or receives most."""
    moves = diff(old, new)
    ends = [(end, rank) for end in ("source", "to") for rank in range(RANKS)]
    by_rank = [[move for move in moves if getattr(move, end) == rank] for end, rank in ends]
    return max(moved_bytes(of, new.cost) for of in by_rank)


if __name__ == "__main__":
    print(campaign_table(campaign(standard_cases())), end="")
