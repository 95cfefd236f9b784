"""The flags of Megatron and HMoE that a placement depends on. Light: tools/plan_placement.py --help reads it."""

import argparse
from collections.abc import Sequence

from hmoe_megatron.config import add_hmoe_arguments

SIZES = {  # Megatron's flags: default
    "--num-layers": 1,
    "--num-experts": None,
    "--hidden-size": None,
    "--moe-ffn-hidden-size": None,
    "--moe-latent-size": None,
    "--seq-length": 4096,
    "--micro-batch-size": 1,
    "--moe-router-topk": 2,
    "--expert-model-parallel-size": None,
    "--tensor-model-parallel-size": 1,
    "--expert-tensor-parallel-size": None,
    "--context-parallel-size": 1,
    "--pipeline-model-parallel-size": 1,
    "--mtp-num-layers": None,
}
MODEL_FLAGS = (*SIZES, "--moe-layer-freq", "--recompute-granularity")


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(values of MODEL_FLAGS and --hmoe-*, words that are none of them). Raises ValueError with flag and value."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag, default in SIZES.items():
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--moe-layer-freq", default="1")
    parser.add_argument("--recompute-granularity")
    parser.add_argument("--mtp-use-repeated-layer", action="store_true")
    try:
        return add_hmoe_arguments(parser).parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
