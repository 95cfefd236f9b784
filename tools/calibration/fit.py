"""The profile under which the cost model comes closest to measured times."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import least_squares

from hmoe_megatron.placement.cost import CostModel, expert_params, piece_times, training_flops
from hmoe_megatron.placement.plan import Piece
from hmoe_megatron.placement.profiles import Profile
from hmoe_megatron.placement.ranks import Rank
from hmoe_megatron.tools.calibration.layers import Layer

FITTED = ("flops_per_s", "launch_s", "activation_bytes_per_s", "memory_bytes_per_s", "row_tile")
OUTLIER = 0.1  # errors beyond it count by their size, not by their square
# Of FITTED, times the first guess. Where reading weights takes longer than every product, or less time than any,
# nothing says which way is better.
STARTS = np.log([[1, 1, 1, factor, 1] for factor in (1, 5, 25)])
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
    """The profile whose FITTED rates have the least error relative to `times_s`; widths have no tile."""
    base = Profile(name, flops_per_s=1.0, element_bytes=element_bytes)

    def profile(logs) -> Profile:
        rates = dict(zip(FITTED, np.exp(logs).tolist(), strict=True))
        return replace(base, **rates | {"row_tile": 1 + rates["row_tile"]})

    def log_errors(logs) -> np.ndarray:  # those of a prediction near 0 have no floor: no rate runs away
        return np.log(predicted_s(layers, profile(logs)) / times_s)

    guess = np.log(_first_guess(layers, times_s, element_bytes))
    found = [
        least_squares(
            log_errors, guess + start, loss="soft_l1", f_scale=OUTLIER, bounds=(guess - WITHIN, guess + WITHIN)
        )
        for start in STARTS
    ]
    return profile(min(found, key=lambda one: one.cost).x)


def _first_guess(layers: Sequence[Layer], times_s: np.ndarray, element_bytes: int) -> tuple[float, ...]:
    """As if the longest run were products, a tenth of it activations, and the shortest nothing but fixed time.

    And as if the layer with most weights for its rows took half its time to read them once.
    """
    long, short = int(np.argmax(times_s)), int(np.argmin(times_s))
    longest, lean = layers[long], max(range(len(layers)), key=lambda i: sum(layers[i].widths) / sum(layers[i].rows))
    work = list(zip(longest.rows, longest.widths, strict=True))
    return (
        sum(training_flops(m, w, longest.hidden_size) for m, w in work) / times_s[long],
        times_s[short] / len(layers[short].rows),
        10 * element_bytes * sum(m * w for m, w in work) / times_s[long],
        2 * element_bytes * expert_params(sum(layers[lean].widths), layers[lean].hidden_size) / times_s[lean],
        32.0,
    )
