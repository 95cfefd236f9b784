"""Plan where the experts of a model live: balance predicted time, compare with other methods, write the plan.

python tools/plan_placement.py --num-experts 64 --hmoe-total-width 98304 --expert-model-parallel-size 16
python tools/plan_placement.py --args examples/hmoe_3b/shape.args --expert-model-parallel-size 8 --profile h100
python tools/plan_placement.py --run runs/mine --profile profile.json --output plan.json --plot plan.png
python tools/plan_placement.py --args mine.args --loads counts.jsonl --gib 20 --old-plan plan.json --json

The model is said by Megatron's and --hmoe-* flags, given here or in files; those given here win. Train with the plan by
--hmoe-placement plan.json. Exit status 2: wrong input, or no plan that keeps the caps.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hmoe_megatron.tools.plan_tool.model_flags import MODEL_FLAGS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog=f"flags of the model: {' '.join(MODEL_FLAGS)} and all --hmoe-* flags",
    )
    source = parser.add_argument_group("the model and its loads")
    source.add_argument("--args", metavar="FILE.args", help="flags of the model, as examples/run.py reads them")
    source.add_argument(
        "--run",
        metavar="DIR",
        help="--save directory of a run (its checkpoints): its flags, its plan as --old-plan, its measured loads",
    )
    source.add_argument(
        "--loads",
        metavar="FILE.jsonl",
        help="measured loads: telemetry.jsonl, or a line "
        '{"tokens": [[rows of each expert], ...]} a step; default: equal',
    )
    source.add_argument("--last", metavar="N", type=int, default=10, help="lines of loads to average; default: 10")
    machine = parser.add_argument_group("the machine")
    machine.add_argument(
        "--profile",
        metavar="NAME|FILE",
        default="flops",
        help="flops, h100, h200, a100, b200, or a file of "
        "tools/profile_hardware.py; default: flops, where a cut costs nothing",
    )
    machine.add_argument("--nodes", metavar="N", type=int, default=1, help="of the ranks, in order; default: 1")
    machine.add_argument(
        "--speeds", metavar="X[,X,...]", default="1", help="of the ranks relative to the profile; default: 1"
    )
    machine.add_argument(
        "--gib",
        metavar="X[,X,...]",
        help="GiB of a GPU for the experts of its stage: weights, "
        "gradients, optimizer, activations; one number, or one a rank; default: no cap",
    )
    machine.add_argument(
        "--expert-data-parallel-size",
        metavar="N",
        type=int,
        default=1,
        help="copies of each expert, which share the optimizer's state; default: 1",
    )
    result = parser.add_argument_group("the result")
    result.add_argument("--old-plan", metavar="FILE.json", help="plan in force: the fewest bytes move from it")
    result.add_argument("--output", metavar="FILE.json", help="write the plan there")
    result.add_argument("--plot", metavar="FILE.png", help="draw the ranks before and after there")
    result.add_argument("--layer", metavar="N", type=int, help="show and draw this decoder layer only, from 0")
    result.add_argument("--compare", action="store_true", help="every method's balance layer by layer, too")
    result.add_argument("--json", action="store_true", help="print JSON instead of tables")
    given, model_flags = parser.parse_known_args(argv)
    from hmoe_megatron.tools.plan_tool.command import run  # scipy behind it takes seconds to import

    try:
        print(run(given, model_flags))
    except (ValueError, OSError) as error:
        print(f"plan_placement: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
