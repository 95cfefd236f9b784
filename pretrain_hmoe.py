"""Train a language model whose experts differ in width.

    torchrun --nproc-per-node 2 pretrain_hmoe.py --num-experts 8 --hmoe-widths arithmetic:9:23 ...
    mpirun -n 2 python pretrain_hmoe.py ...

Flags: Megatron's own and ``--hmoe-*`` (``--help``; ``--help-all``: Megatron's too). Without a GPU it runs on the CPU
with gloo by itself.
"""

import sys

# Everything else is imported in main: a process that saves a checkpoint may import this file again.


def main() -> int:
    """Exit code: 0, 2 for settings that can't work, those of hmoe_megatron/exits.py."""
    argv = ["--help" if word == "--help-all" else word for word in sys.argv[1:]]
    try:
        from hmoe_megatron import machine
        from hmoe_megatron.command_line import short_help
        from hmoe_megatron.telemetry import console

        if {"--help", "-h"} & {*sys.argv[1:]}:
            print(short_help(), end="")
            return 0
    except ModuleNotFoundError as error:
        return missing(error)
    with console.of_run(sys.argv[1:]):
        try:
            machine.prepare_environment()  # before torch and Megatron read it
            from hmoe_megatron import training
        except ModuleNotFoundError as error:
            return missing(error)
        return run(argv, training)


def missing(error: ModuleNotFoundError) -> int:
    """Say what this Python lacks."""
    remedy = "take the Python that has it (.venv/bin/python after `make`), or pip install -e . here"
    print(f"pretrain_hmoe.py: error: {sys.executable} has no {error.name!r}: {remedy}", file=sys.stderr)
    return 2


def run(argv: list[str], training) -> int:
    """The run that the flags describe."""
    from hmoe_megatron.checkpoint.run_flags import with_checkpoint_flags
    from hmoe_megatron.data.checks import check_data
    from hmoe_megatron.exits import RunEnded

    if "--hmoe-check-only" in argv:
        return training.check_only(argv)
    try:
        training.prepare()  # ranks of torchrun or mpirun; Megatron, made to run on this machine
        argv = with_checkpoint_flags(argv)
        args, layout, start = training.parse_arguments(argv)  # flags, checkpoint, plan; nothing has started yet
        check_data(args)  # lengths, tokenizer
        checkpoints = training.open_checkpoints(args, layout, start)  # compared, --save locked
    except (ValueError, AssertionError, RunEnded) as error:
        return training.refuse(error)
    try:
        training.train(args, layout, checkpoints, argv)  # model, data, telemetry, Megatron's loop
    except RunEnded as error:
        return training.refuse(error)
    except KeyboardInterrupt:  # before the first step, or with --hmoe-default-signals: nothing is saved
        return training.interrupted()
    return 0


if __name__ == "__main__":
    sys.exit(main())
