"""A placement policy on a trace of loads: time with it, beside staying and an oracle that knows all loads.

Letters: T micro-batches, L MoE layers, X experts of all layers end to end, R ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hmoe_megatron.placement.plan import PlacementPlan
from hmoe_megatron.placement.policy import ReplanPolicy, StepTimes


@dataclass(frozen=True)
class Result:
    """Sums over a trace, in the unit of the plan's cost. moves: numbers of the micro-batches after which experts moved.

    stay: with the first plan; policy: with the policy, of it `moving` and `planning`; oracle: the first plan, or the
    plan for the mean of all loads from the beginning with what it takes to move there, whichever is faster.
    """

    stay: float
    policy: float
    oracle: float
    moving: float
    planning: float
    moves: tuple[int, ...]

    @property
    def loss(self) -> float:
        """Share of the time of staying that the policy takes more, or less if negative."""
        return self.policy / self.stay - 1

    @property
    def gain_of_oracle(self) -> float:
        """The policy's gain over staying as a share of the oracle's; 1 where the oracle stays and the policy too."""
        possible = self.stay - self.oracle
        return (self.stay - self.policy) / possible if possible else float(self.policy <= self.stay)


def simulate(
    tokens_TLE: np.ndarray | Sequence[np.ndarray],
    policy: ReplanPolicy,
) -> Result:
    """Run a fresh policy over tokens_TLE.

    tokens_TLE: array [T, E] for one layer, [T, L, E], or an array [T, E] for each layer where they differ in E.
    """
    tokens_TX = _end_to_end(tokens_TLE)
    first, time = policy.first, StepTimes(policy.first)
    offsets = np.cumsum([len(layer.widths) for layer in first.layers])[:-1]
    stay_T, spent, moves = time(tokens_TX), [], []
    running = time
    for t, tokens_X in enumerate(tokens_TX):
        spent.append(running(tokens_X[None])[0])
        if (plan := policy.observe(np.split(tokens_X, offsets))) is not None:
            running = StepTimes(plan)
            moves.append(t)
    best = policy.replan(np.split(tokens_TX.mean(axis=0), offsets), first)
    oracle = StepTimes(best)(tokens_TX).sum() + policy.move_time(first, best)
    return Result(stay=stay_T.sum(), policy=sum(spent) + policy.moving + policy.planning,
                  oracle=min(oracle, stay_T.sum()), moving=policy.moving, planning=policy.planning,
                  moves=tuple(moves))


def _end_to_end(tokens_TLE) -> np.ndarray:
    if isinstance(tokens_TLE, np.ndarray):
        return tokens_TLE.reshape(len(tokens_TLE), -1)
    return np.concatenate(list(tokens_TLE), axis=1)
