"""The profile under which the cost model comes closest to measured times."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import least_squares

from hmoe_megatron.placement.cost import CostModel, piece_times, training_flops
from hmoe_megatron.placement.plan import Piece
from hmoe_megatron.placement.profiles import Profile
from hmoe_megatron.placement.ranks import Rank
from hmoe_megatron.profiling.layers import Layer

OUTLIER = 0.1  # errors beyond it count by their size, not by their square
WITHIN = np.log(1e4)  # of the first guess: a rate that the times say nothing of must end somewhere


def predicted_s(layers: Sequence[Layer], profile: Profile) -> np.ndarray:
    """Expert time of each layer on one rank, as a plan predicts it."""
    return np.array([_layer_s(layer, CostModel(profile, layer.hidden_size)) for layer in layers])


def _layer_s(layer: Layer, cost: CostModel) -> float:
    pieces = [Piece(e, 0, w) for e, w in enumerate(layer.widths)]
    return sum(piece_times([pieces], layer.rows, cost, [Rank()])[0])


def errors(layers: Sequence[Layer], times_s: np.ndarray, profile: Profile) -> np.ndarray:
    """Predicted over measured time of each layer, minus 1."""
    return predicted_s(layers, profile) / times_s - 1


def fit_profile(layers: Sequence[Layer], times_s: np.ndarray, name: str, element_bytes: int) -> Profile:
    """Rate of FLOPs and of activations, fixed time and row tile of least error relative to `times_s`.

    It has no memory rate: the tile has what few rows lose, whether to reading weights or to the products themselves.
    """
    base = Profile(name, flops_per_s=1.0, element_bytes=element_bytes)

    def profile(logs) -> Profile:
        flops_per_s, launch_s, activation_bytes_per_s, lost_rows = np.exp(logs).tolist()
        return replace(base, flops_per_s=flops_per_s, launch_s=launch_s, row_tile=1 + 2 * lost_rows,
                       activation_bytes_per_s=activation_bytes_per_s)

    guess = np.log(_first_guess(layers, times_s, element_bytes))
    found = least_squares(lambda logs: errors(layers, times_s, profile(logs)), guess, loss="soft_l1", f_scale=OUTLIER,
                          bounds=(guess - WITHIN, guess + WITHIN))
    return profile(found.x)


def _first_guess(layers: Sequence[Layer], times_s: np.ndarray, element_bytes: int) -> tuple[float, ...]:
    """As if the longest run were products, and a tenth of it activations, and the shortest nothing but fixed time."""
    longest, shortest = layers[int(np.argmax(times_s))], layers[int(np.argmin(times_s))]
    long_s, short_s = float(times_s.max()), float(times_s.min())
    work = list(zip(longest.rows, longest.widths, strict=True))
    flops = sum(training_flops(m, w, longest.hidden_size) for m, w in work)
    return flops / long_s, short_s / len(shortest.rows), 10 * element_bytes * sum(m * w for m, w in work) / long_s, 16.0
