"""Checkpoints of pretrain_hmoe.py to Hugging Face and back.

python tools/convert_checkpoint.py to-hf --load runs/a --output exported --text held_out.txt
python tools/convert_checkpoint.py from-hf --load exported --save runs/b

to-hf writes sharded safetensors, config, tokenizer, modeling_hmoe.py and a model card, a layer at a time on
one CPU, from a checkpoint of any layout and plan. Each tensor is read back from the disk and compared with
the checkpoint's; then the logits of both models are compared in fp32 on --text (the beginning of it), each
in a process that holds the whole model; --no-logits leaves that out.

from-hf reads what to-hf wrote, native or padded, and stock Mixtral and Qwen3-MoE, whose experts then have one
width. The checkpoint holds weights and tokenizer, for `pretrain_hmoe.py --finetune --load runs/b` under any layout
and plan; the flags of the model are in runs/b/run_arguments.json.

Exit codes: 0 done, 1 the machine failed, 2 a flag is wrong or the model can't be converted, 3 the checkpoint is
refused.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser("to-hf", help="a checkpoint to a Hugging Face directory", allow_abbrev=False)
    to_hf.add_argument("--load", type=Path, required=True, metavar="RUN", help="--save directory of a run")
    to_hf.add_argument("--ckpt-step", type=int, metavar="N", help="iteration (default: the last)")
    to_hf.add_argument("--output", type=Path, required=True, metavar="DIR", help="a directory that does not exist yet")
    to_hf.add_argument("--dtype", choices=["fp32", "bf16"], help="of the weights (default: the checkpoint's)")
    to_hf.add_argument("--padded", choices=["mixtral"], help="a stock model of transformers, without our code: "
                       "each expert padded with zeros to the widest; Top-K only")  # fmt: skip
    to_hf.add_argument("--text", type=Path, metavar="FILE", help="text on which the logits are compared")
    to_hf.add_argument("--no-logits", action="store_true", help="do not load the whole models to compare logits")
    to_hf.add_argument("--skip-integrity", action="store_true", help="do not hash the checkpoint's files first")
    from_hf = commands.add_parser("from-hf", help="a Hugging Face directory to a checkpoint", allow_abbrev=False)
    from_hf.add_argument("--load", type=Path, required=True, metavar="DIR", help="directory of safetensors")
    from_hf.add_argument("--save", type=Path, required=True, metavar="RUN", help="a directory that does not exist yet")
    from_hf.add_argument("--tokenizer-type", help="Megatron's (default: the directory's tokenizer)")
    from_hf.add_argument("--tokenizer-model", help="file or folder of the tokenizer")
    args = parser.parse_args(argv)
    if args.command == "from-hf":
        if bool(args.tokenizer_type) != bool(args.tokenizer_model):
            parser.error("--tokenizer-type and --tokenizer-model: give both, or none")
    elif args.no_logits == bool(args.text):
        parser.error("--text FILE or --no-logits: give one of them")
    return args


def export(args: argparse.Namespace) -> None:
    """Raises ValueError, OSError or CheckpointRefused; then --output is not there."""
    from hmoe_megatron.hf.export import to_hf
    from hmoe_megatron.hf.proof import check_logits, first_tokens

    text = args.text.read_text(encoding="utf-8", errors="strict") if args.text else None
    done = to_hf(
        args.load, args.output, form=args.padded or "hmoe", iteration=args.ckpt_step, dtype=args.dtype,
        skip_integrity=args.skip_integrity,
        check=None if text is None else lambda folder, model, iteration, flags: check_logits(
            args.load, iteration, folder, first_tokens(flags, text, model), is_lossless=args.dtype is None),
    )  # fmt: skip
    if args.padded:
        print(f"padded: {done.cost:.2f} times the parameters of the experts")
    print(f"{args.output}: iteration {done.iteration}, {done.tensors} tensors, {done.bytes / 1e6:,.1f} MB, each equal "
          f"to the checkpoint's; SHA-256 of all: {done.digest}")  # fmt: skip


def bring_back(args: argparse.Namespace) -> None:
    """Raises ValueError, OSError or RunEnded; then --save is not there."""
    from hmoe_megatron.hf.importing import ITERATION, from_hf

    tokenizer = ["--tokenizer-type", args.tokenizer_type, "--tokenizer-model", args.tokenizer_model]
    tensors = from_hf(args.load, args.save, tokenizer if args.tokenizer_type else [])
    print(f"{args.save}: checkpoint {ITERATION} of {tensors} tensors; go on with pretrain_hmoe.py --finetune --load "
          f"{args.save}")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    from hmoe_megatron import host

    host.prepare_environment()
    from hmoe_megatron.exits import RunEnded

    try:
        (export if args.command == "to-hf" else bring_back)(args)
    except (ValueError, RunEnded) as error:  # also text that is not UTF-8
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    except OSError as error:
        print(f"convert_checkpoint: {error}; nothing was written", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
