"""A layer as a mixed integer program for HiGHS: the last resort under tight caps, and what tests measure against.

Variables, with P = E * R pairs of expert e and rank r: held_P (binary: r holds a piece of e), units_P (its cut units),
last_P (binary: it has the last units of a width that is no multiple of the cut unit), and the slowest rank's time.
"""

import contextlib
import ctypes
import os
import sys
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, eye_array, hstack, kron

from hmoe_megatron.placement.problem import LayerProblem

_OPTIMAL, _INFEASIBLE = 0, 2  # statuses of scipy.optimize.milp


@dataclass(frozen=True)
class Exact:
    """held: the placement found, None if none; proven: that none is faster, or that there is none at all."""

    held: list[dict[int, int]] | None
    proven: bool


def fastest(problem: LayerProblem, node_limit: int) -> Exact:
    """The least time of the slowest rank; where experts are cut, widths are not rounded up to tiles."""
    return _solve(problem, _program(problem), node_limit)


def any_that_fits(problem: LayerProblem, node_limit: int) -> Exact:
    """The first placement found under the caps, on the way to that with fewest pieces, whatever its time.

    Under tight caps it is found far more often than on the way to the fastest.
    """
    program = _program(problem)
    pairs = len(problem.widths_E) * problem.ranks
    return _solve(problem, program | {"c": np.arange(program["c"].size) < pairs}, node_limit, mip_rel_gap=1.0)


def _solve(problem: LayerProblem, program: dict, node_limit: int, **options) -> Exact:
    """node_limit is a count, not a time: the same input gives the same placement.

    What HiGHS finds is counted again in whole bytes: its tolerance lets none over a cap.
    """
    with _silenced():
        found = milp(**program, options={"node_limit": node_limit, **options})
    if found.x is None:
        return Exact(None, proven=found.status == _INFEASIBLE)
    held = _held(problem, np.rint(found.x[:-1]).astype(int))
    if any(problem.overflow(held)):
        return Exact(None, proven=False)
    return Exact(held, proven=found.status == _OPTIMAL)


@contextlib.contextmanager
def _silenced():
    """HiGHS as scipy 1.18 has it now and then prints a line of debugging to standard output, whatever its options."""
    try:
        kept = os.dup(1)
    except OSError:  # there is none
        yield
        return
    libc, null = ctypes.CDLL(None), os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    libc.fflush(None)
    os.dup2(null, 1)
    try:
        yield
    finally:
        libc.fflush(None)  # what C has buffered would come out later
        os.dup2(kept, 1)
        os.close(kept)
        os.close(null)


def _program(problem: LayerProblem) -> dict:
    return _with_cuts(problem) if problem.max_cuts else _whole(problem)


def _whole(problem: LayerProblem) -> dict:
    """The program of whole experts: held_P and the time."""
    pairs = problem.whole_CE[list(problem.kind_R)].T.ravel()  # [E * R], as all pairs are ordered
    held_bytes_E = problem.piece_bytes_E + problem.width_bytes_E * problem.widths_E
    return _arguments(
        problem,
        [pairs],
        [np.repeat(held_bytes_E, problem.ranks)],
        most=[np.ones(pairs.size)],
        constraints=[(_by_expert(problem), 1, 1)],
    )


def _with_cuts(problem: LayerProblem) -> dict:
    """The program with cuts: held_P, units_P, last_P and the time."""
    R, unit, widths_E = problem.ranks, problem.unit, np.array(problem.widths_E)
    units_E, rest_E = np.divmod(widths_E, unit)
    P, by_expert = widths_E.size * R, _by_expert(problem)
    fixed_P, slope_P = (values_CE[list(problem.kind_R)].T.ravel() for values_CE in (problem.fixed_CE, problem.slope_CE))
    width_bytes_P, rest_P = np.repeat(problem.width_bytes_E, R), np.repeat(rest_E, R)
    none, same = csr_array((P, P)), eye_array(P)
    no_expert = csr_array(by_expert.shape)
    constraints = [
        (hstack([no_expert, by_expert, no_expert]), units_E, units_E),
        (hstack([no_expert, no_expert, by_expert]), rest_E > 0, rest_E > 0),
        (hstack([same * -np.repeat(units_E, R), same, none]), -np.inf, 0),  # no unit without a piece
        (hstack([-same, none, same]), -np.inf, 0),
        (csr_array(np.repeat([1, 0, 0], P)[None]), 0, widths_E.size + problem.max_cuts),
    ]
    return _arguments(
        problem,
        times=[fixed_P, slope_P * unit, slope_P * rest_P],
        held_bytes=[np.repeat(problem.piece_bytes_E, R), width_bytes_P * unit, width_bytes_P * rest_P],
        most=[np.ones(P), np.repeat(units_E, R), (rest_P > 0).astype(float)],
        constraints=constraints,
    )


def _arguments(problem: LayerProblem, times, held_bytes, most, constraints) -> dict:
    """Arguments of milp: least time under the caps; each of times, held_bytes, most has one array [P] a variable."""
    scale = float(problem.whole_CE.max(axis=0).sum()) / problem.ranks or 1.0
    by_rank = kron(np.ones((1, len(problem.widths_E))), eye_array(problem.ranks), format="csr")

    def rows(values, divisor_R):  # [R, variables], in units in which HiGHS's tolerances mean something
        return hstack([(by_rank * value_P) / divisor_R[:, None] for value_P in values], format="csr")

    size = sum(map(len, most))
    all_constraints = [(hstack([rows(times, np.full(problem.ranks, scale)), -np.ones((problem.ranks, 1))]), -np.inf, 0)]
    if (capped := np.isfinite(problem.cap_R)).any():
        cap_R = np.where(capped, np.maximum(problem.cap_R, 1.0), 1.0)
        most_R = np.where(capped, np.minimum(problem.cap_R, 1.0), np.inf)
        all_constraints.append((_padded(rows(held_bytes, cap_R)), -np.inf, most_R))
    all_constraints += [(_padded(matrix), low, high) for matrix, low, high in constraints]
    return {
        "c": np.append(np.zeros(size), 1.0),
        "integrality": np.append(np.ones(size), 0.0),
        "bounds": Bounds(0, np.append(np.concatenate(most), np.inf)),
        "constraints": [LinearConstraint(*constraint) for constraint in all_constraints],
    }


def _padded(matrix):
    """With a column of zeros for the time."""
    return hstack([matrix, csr_array((matrix.shape[0], 1))], format="csr")


def _by_expert(problem: LayerProblem):
    """[E, P] sums over an expert's pairs."""
    return kron(eye_array(len(problem.widths_E)), np.ones((1, problem.ranks)), format="csr")


def _held(problem: LayerProblem, values: np.ndarray) -> list[dict[int, int]]:
    widths_E = np.array(problem.widths_E)
    shape = (-1, widths_E.size, problem.ranks)
    if problem.max_cuts:
        _, units_ER, last_ER = values.reshape(shape)
        width_ER = units_ER * problem.unit + last_ER * (widths_E % problem.unit)[:, None]
    else:
        width_ER = values.reshape(shape)[0] * widths_E[:, None]
    return [{e: int(column[e]) for e in np.flatnonzero(column).tolist()} for column in width_ER.T]
