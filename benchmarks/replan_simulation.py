"""A placement policy on a trace of loads: time with it, beside staying and an oracle that knows all loads.

Letters: T observations, L MoE layers, E experts, X experts of all layers end to end.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np

from benchmarks.load_traces import TRACES, trace
from hmoe_megatron.placement.cost import CostModel
from hmoe_megatron.placement.plan import PlacementPlan
from hmoe_megatron.placement.planner import contiguous_plan, plan_model
from hmoe_megatron.placement.profiles import profile_named
from hmoe_megatron.placement.replan import ReplanPolicy, StepTimes, moving_time
from hmoe_megatron.widths import expert_widths

NOTHING = 0.005  # share of the time: what the policy's hysteresis lets lie is no gain to compare with


@dataclass(frozen=True)
class Result:
    """Sums over a trace, in the unit of the plan's cost. moves: numbers of the observations after which experts moved.

    stay: with the first plan. policy: with the policy, of it `moving` and `planning`. oracle: with the fastest of the
    first plan, the plan for the mean of all loads and every plan that the policy used, from the beginning to the end,
    the move there paid.
    """

    stay: float
    policy: float
    oracle: float
    moving: float
    planning: float
    moves: tuple[int, ...]

    @property
    def gain(self) -> float:
        """Share of the time of staying that the policy gains; negative if it loses."""
        return 1 - self.policy / self.stay

    @property
    def possible(self) -> float:
        """Share of the time of staying that the oracle gains."""
        return 1 - self.oracle / self.stay

    @property
    def gain_of_oracle(self) -> float:
        """The policy's gain over the oracle's, above 1 where moving more than once pays.

        nan where the oracle gains less than NOTHING: there the ratio says nothing, and `gain` what was lost.
        """
        return self.gain / self.possible if self.possible >= NOTHING else math.nan


def simulate(tokens_TLE: np.ndarray | Sequence[np.ndarray], policy: ReplanPolicy, micro_batches: int = 1) -> Result:
    """Run a fresh policy over tokens_TLE, each observation the mean over so many micro-batches.

    tokens_TLE: array [T, E] for one layer, [T, L, E], or an array [T, E] for each layer where they differ in E.
    """
    tokens_TX, first = _end_to_end(tokens_TLE), policy.first
    offsets = np.cumsum([len(layer.widths) for layer in first.layers])[:-1]

    def time(plan: PlacementPlan, begin: int = 0, end: int = len(tokens_TX)) -> float:
        return micro_batches * float(StepTimes(plan)(tokens_TX[begin:end]).sum())

    plans, begins = [first], [0]  # used, and from which observation on
    for t, tokens_X in enumerate(tokens_TX):
        if (plan := policy.observe(np.split(tokens_X, offsets), micro_batches)) is not None:
            plans.append(plan)
            begins.append(t + 1)
    moving = sum(policy.move_time(old, new) for old, new in pairwise(plans))
    planning = policy.calls * policy.planning_time
    running = sum(map(time, plans, begins, [*begins[1:], len(tokens_TX)]))
    mean = policy.replan(np.split(tokens_TX.mean(axis=0), offsets), first)
    stay = time(first)
    oracle = min(stay, *(time(plan) + policy.move_time(first, plan) for plan in (mean, *plans[1:])))
    return Result(stay, running + moving + planning, oracle, moving, planning, tuple(t - 1 for t in begins[1:]))


def _end_to_end(tokens_TLE) -> np.ndarray:
    if isinstance(tokens_TLE, np.ndarray):
        return tokens_TLE.reshape(len(tokens_TLE), -1)
    return np.concatenate(list(tokens_TLE), axis=1)


# The standard cases: one layer on 8 GPUs of the h100 profile. Moves are dear: with one copy of an expert its rank sends
# the whole optimizer state, over the network between nodes, and training waits on top. A move there and back
# takes 10 to 17 steps: the policy's account lets none happen in a run that is much shorter than STEPS.
RANKS, HIDDEN_SIZE, MULTIPLE = 8, 4096, 128
TOKENS = 8 * 4096  # of a micro-batch of all ranks
STEPS, MICRO_BATCHES = 2000, 8  # of a step
PAUSE_STEPS = 5
PLANNING_S = 0.005
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

    def result(self, **options) -> Result:
        """With a policy of these options, its defaults unless given."""
        schedule, topk = LAYERS[self.experts]
        widths_LE = [expert_widths(schedule, self.experts, self.experts * MEAN_WIDTH, MULTIPLE)]
        h100, cost = profile_named("h100"), CostModel(profile_named(self.profile), HIDDEN_SIZE)
        second = 1.0 if cost.unit == "s" else h100.flops_per_s  # in the cost's unit

        def replan(tokens_LE, old):
            return plan_model(tokens_LE, widths_LE, RANKS, cost, cut_multiple=MULTIPLE, old=old)

        def move_time(old, new):
            return moving_time(old, new, h100.inter_node_bytes_per_s / second, pause)

        equal_LE = [[TOKENS * topk / self.experts] * self.experts]
        planned, contiguous = replan(equal_LE, None), contiguous_plan(widths_LE, RANKS, equal_LE, cost)
        first = dict(zip(STARTS, (contiguous, planned), strict=True))[self.start]
        pause = PAUSE_STEPS * MICRO_BATCHES * max(planned.layers[0].predicted.time)
        tokens_TE = trace(
            self.workload, self.steps, self.experts, RANKS, self.seed, TOKENS, topk, rank_E=_holders(first)
        )
        policy = ReplanPolicy(first, self.steps * MICRO_BATCHES, replan, move_time, PLANNING_S * second, **options)
        return simulate(tokens_TE, policy, MICRO_BATCHES)


def standard_cases(workloads: Iterable[str] = TRACES, seeds: Iterable[int] = range(3)) -> list[Case]:
    """On each workload both starts, both layers, with the h100 and the FLOPs profile, by seed."""
    return [Case(*values) for values in product(workloads, STARTS, LAYERS, ("h100", "flops"), seeds)]


def campaign(cases: Iterable[Case], **options) -> Iterator[tuple[Case, Result]]:
    """Each case with its result, as they are done. options: of the policy, its defaults unless given."""
    return ((case, case.result(**options)) for case in cases)


def campaign_table(results: Iterable[tuple[Case, Result]]) -> str:
    """Markdown, a row for each workload and start: least and most over its cases.

    The share is of cases in which the oracle gains NOTHING or more; a dash where there is none.
    """
    rows = {}
    for case, result in results:
        rows.setdefault((case.workload, case.start), []).append(result)
    lines = [
        "| workload | start | oracle gains, % | policy gains, % | least share of the oracle's | moves |",
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
