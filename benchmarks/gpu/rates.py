"""A hardware profile measured on the device at hand, and what the published one predicts of the same layers.

python -m benchmarks.gpu.rates --output FILE [--seconds 10] [--tiny]
"""

import argparse
from pathlib import Path

import numpy as np

from benchmarks.gpu.rows import emit
from hmoe_megatron import machine

PUBLISHED = "h100"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the profile, for --profile of the planner")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--tiny", action="store_true", help="small layers, for a test on a CPU")
    given = parser.parse_args(argv)
    machine.prepare_environment()
    from hmoe_megatron.placement.profiles import PROFILES
    from hmoe_megatron.tools.calibration.fit import errors
    from hmoe_megatron.tools.calibration.layers import layers_kept_apart, layers_to_fit
    from hmoe_megatron.tools.calibration.machine import measure
    from hmoe_megatron.tools.profile_hardware import GPU_GRID

    grid = ((32,), (2, 8), (8, 32)) if given.tiny else tuple(GPU_GRID.values())
    apart = layers_kept_apart(*grid)
    measured = measure(layers_to_fit(*grid), apart, given.seconds)
    measured.profile.save(given.output)
    emit(
        profile=measured.profile.name,
        rates={name: value for name, value in measured.profile.to_dict().items() if isinstance(value, float)},
        file=given.output.name,
    )
    for name, off in (
        ("measured here", measured.errors["layers kept apart"]),
        (f"published {PUBLISHED}", errors(apart, measured.times_s, PROFILES[PUBLISHED])),
    ):
        sizes = np.abs(off)
        emit(
            profile=name,
            layers=len(off),
            median_error=float(np.median(sizes)),
            worst_error=float(sizes.max()),
            over_measured=float(np.median(off) + 1),
        )


if __name__ == "__main__":
    main()
