"""Checkpoints of pretrain_hmoe.py to Hugging Face and back.

python tools/convert_checkpoint.py to-hf --load runs/a --output exported --text held_out.txt
python tools/convert_checkpoint.py from-hf --load exported --save runs/b --text held_out.txt
python tools/convert_checkpoint.py upcycle --load dense --save runs/c --text held_out.txt --num-experts 8 \
    --hmoe-widths arithmetic:9:23 --moe-router-topk 2

to-hf writes sharded safetensors, config, tokenizer, the model's code and a model card, a layer at a time on
one CPU, from a checkpoint of any layout and plan. Each tensor is read back from the disk and compared with
the checkpoint's; then the logits of both models are compared in fp32 on --text (the beginning of it), each
in a process that holds the whole model; --no-logits leaves that out.

from-hf reads what to-hf wrote, native or padded, and stock Mixtral, Qwen3-MoE and DeepSeek-V3, whose experts then
have one width. No code of the directory is run. The checkpoint is for any layout and plan, with the flags of its model:

examples/run.py runs/b/model.args --finetune --load runs/b --save runs/next ...

upcycle cuts the neurons of a dense LLaMA or Qwen3 into experts. --text compares with all experts on, where the
checkpoint computes what the dense model does; with fewer, down_proj is scaled as arXiv 2410.07524 has it.

Exit codes: 0 done, 1 the machine failed, 2 a flag is wrong or the model can't be converted, 3 the checkpoint is
refused.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file
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
    to_hf.add_argument(
        "--padded",
        choices=["mixtral", "qwen3_moe", "deepseek_v3"],
        help="a stock model of transformers, without our code: each expert padded with zeros to the widest; Top-K only",
    )
    to_hf.add_argument("--tokenizer-model", help="where the run's tokenizer is now (default: where it was)")
    to_hf.add_argument("--skip-integrity", action="store_true", help="do not hash the checkpoint's files first")
    from_hf = commands.add_parser("from-hf", help="a Hugging Face directory to a checkpoint", allow_abbrev=False)
    upcycle = commands.add_parser("upcycle", help="a dense directory to a checkpoint with experts", allow_abbrev=False)
    for command in (from_hf, upcycle):
        command.add_argument("--load", type=Path, required=True, metavar="DIR", help="directory of safetensors")
        command.add_argument("--save", type=Path, required=True, metavar="RUN", help="a directory that does not exist")
        command.add_argument("--tokenizer-type", help="Megatron's (default: the directory's tokenizer)")
        command.add_argument("--tokenizer-model", help="file or folder of the tokenizer")
    upcycle.add_argument("--num-experts", type=int, required=True, metavar="E")
    upcycle.add_argument(
        "--hmoe-widths",
        required=True,
        metavar="SCHEDULE",
        help="as of pretrain_hmoe.py; ratios are scaled to the dense width",
    )
    upcycle.add_argument("--hmoe-width-multiple", type=int, metavar="N", help="of every width")
    upcycle.add_argument("--moe-router-topk", type=int, metavar="K", help="Top-K; this or --hmoe-top-p")
    upcycle.add_argument("--moe-router-pre-softmax", action="store_true", help="weights of the softmax over all")
    upcycle.add_argument("--hmoe-top-p", type=float, metavar="P", help="Top-P")
    upcycle.add_argument("--seed", type=int, default=0, help="of the router")
    for command in (to_hf, from_hf, upcycle):
        command.add_argument("--text", type=Path, metavar="FILE", help="text on which the logits are compared")
        command.add_argument("--no-logits", action="store_true", help="do not load the whole models to compare logits")
    args = parser.parse_args(argv)
    if args.no_logits == bool(args.text):
        parser.error("--text FILE or --no-logits: give one of them")
    if args.command != "to-hf" and bool(args.tokenizer_type) != bool(args.tokenizer_model):
        parser.error("--tokenizer-type and --tokenizer-model: give both, or none")
    if args.command == "upcycle":
        if (args.moe_router_topk is None) == (args.hmoe_top_p is None):
            parser.error("--moe-router-topk K or --hmoe-top-p P: give one of them")
        if args.moe_router_topk is not None and not 1 <= args.moe_router_topk <= args.num_experts:
            parser.error("--moe-router-topk: 1 to --num-experts")
        if not 0 <= args.seed < 1 << 31:
            parser.error("--seed: 0 to 2147483647")
        if args.hmoe_top_p is not None and (args.moe_router_pre_softmax or not 0 < args.hmoe_top_p <= 1):
            parser.error("--hmoe-top-p: over 0, at most 1, and without --moe-router-pre-softmax, which is Top-K's")
    return args


def check_paths(args: argparse.Namespace) -> None:
    """What is cheap to see, before torch is imported. Raises ValueError."""
    from hmoe_megatron.files import check_new

    flag, path = ("--output", args.output) if args.command == "to-hf" else ("--save", args.save)
    check_new(path, flag)
    if args.text and not args.text.is_file():
        raise ValueError(f"--text {args.text}: no such file")


def export(args: argparse.Namespace) -> None:
    """Raises ValueError, OSError or CheckpointRefused; then --output is not there."""
    from hmoe_megatron.hf.export import to_hf
    from hmoe_megatron.hf.parity import Side, check_logits, first_tokens

    text = text_of(args)

    def check(folder, model, iteration, flags):
        if text is None:
            return None
        chosen = ["--ckpt-step", str(iteration)]
        if args.tokenizer_model:
            chosen += ["--tokenizer-model", args.tokenizer_model]
        sides = Side("megatron", args.load, tuple(chosen)), Side("exported", folder)
        return check_logits(*sides, first_tokens(flags, text, model), is_lossless=args.dtype is None)

    done = to_hf(
        args.load,
        args.output,
        form=args.padded or "hmoe",
        iteration=args.ckpt_step,
        dtype=args.dtype,
        tokenizer_model=args.tokenizer_model,
        skip_integrity=args.skip_integrity,
        check=check,
    )
    if done.doubt:
        print(f"convert_checkpoint: note: {done.doubt}", file=sys.stderr)
    if args.padded:
        print(f"padded: {done.cost:.2f} times the parameters of the experts")
    print(
        f"{args.output}: iteration {done.iteration}, {done.tensors} tensors, {done.bytes / 1e6:,.1f} MB, each equal "
        f"to the checkpoint's; SHA-256 of all: {done.digest}"
    )


def bring_back(args: argparse.Namespace) -> None:
    """Raises ValueError, OSError or RunEnded; then --save is not there."""
    from hmoe_megatron.flag_files import last_value
    from hmoe_megatron.hf.importing import ARGS_FILE, ITERATION, HFDirectory, from_hf
    from hmoe_megatron.hf.parity import Side, check_logits, first_tokens

    is_upcycled, text = args.command == "upcycle", text_of(args)
    source = upcycled(args) if is_upcycled else HFDirectory(args.load)

    def check(folder, flags):
        if text is not None:
            moved = last_value(flags, "--tokenizer-model")
            here = ("--tokenizer-model", moved) if moved else ()
            ours = Side("all experts on" if is_upcycled else "megatron", folder, here)
            is_lossless = not is_upcycled or source.is_lossless
            check_logits(ours, Side("foreign", args.load), first_tokens(flags, text, source.form.model), is_lossless)

    if source.is_less:
        said = "no tensors of the layers that predict more tokens: the checkpoint has none"
        print(f"convert_checkpoint: note: {said}", file=sys.stderr)
    tokenizer = []
    if args.tokenizer_type:  # a path from anywhere: it is in the flags of the checkpoint
        model = Path(args.tokenizer_model)
        tokenizer = [
            "--tokenizer-type",
            args.tokenizer_type,
            "--tokenizer-model",
            str(model.absolute()) if model.exists() else args.tokenizer_model,
        ]
    tensors = from_hf(source, args.save, tokenizer, check)
    if is_upcycled:
        print(f"experts of width {', '.join(map(str, source.form.model.widths[0]))}; down_proj times {source.scale:g}")
    print(
        f"{args.save}: checkpoint {ITERATION} of {tensors} tensors; go on with examples/run.py "
        f"{args.save / ARGS_FILE} --finetune --load {args.save}"
    )


def upcycled(args: argparse.Namespace):
    """Raises ValueError."""
    from hmoe_megatron.hf.importing import HFDirectory
    from hmoe_megatron.hf.upcycling import Upcycled
    from hmoe_megatron.widths import expert_widths

    dense_width = HFDirectory(args.load).form.model.dense_width
    widths_E = expert_widths(args.hmoe_widths, args.num_experts, dense_width, args.hmoe_width_multiple)
    router = {
        "router": "topk" if args.hmoe_top_p is None else "topp",
        "experts_per_token": args.moe_router_topk,
        "top_p": args.hmoe_top_p,
        "pre_softmax": args.moe_router_pre_softmax,
    }
    return Upcycled(args.load, widths_E, router, args.seed)


def text_of(args: argparse.Namespace) -> str | None:
    """Raises OSError, and ValueError for what is not UTF-8."""
    return args.text.read_text(encoding="utf-8", errors="strict") if args.text else None


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    from hmoe_megatron import machine
    from hmoe_megatron.exits import RunEnded

    machine.prepare_environment()
    try:
        check_paths(args)
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
