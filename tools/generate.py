"""Text from the last checkpoint of a run, or from a Hugging Face directory, written as it is drawn.

    python tools/generate.py --load RUN --prompt "ROMEO:" --tokens 200
    python tools/generate.py --hf DIRECTORY --trust-remote-code --prompt "ROMEO:" --top-p 0.95 --seed 7

The same weights, flags and seed give the same text both ways. A GPU is used where there is one; CUDA_VISIBLE_DEVICES=
takes the CPU. The text goes to standard output, everything else to standard error.
"""

import argparse
import contextlib
import math
import sys
import time
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hmoe_megatron.files import atomic_write, check_output, is_utf8
from hmoe_megatron.tools.evaluation.inputs import Source, go_offline


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--load", metavar="RUN", help="--save directory of a run of pretrain_hmoe.py")
    model.add_argument("--hf", metavar="DIR", help="a directory that transformers loads")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's code in --hf's directory")
    parser.add_argument("--prompt", default="\n", help="text to go on from (default: a newline)")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="most tokens to draw (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that add up to P"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ignore-eod", action="store_true", help="go on after the end of a document")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the text there too")
    parser.add_argument("flags", nargs="*", help="after --: flags of pretrain_hmoe.py that override those of the run")
    given = parser.parse_args(argv)
    if given.tokens < 1 or not 0 <= given.temperature < math.inf or not 0 < given.top_p <= 1:
        parser.error("--tokens must be at least 1, --temperature at least 0, --top-p over 0 and at most 1")
    if given.top_k is not None and given.top_k < 1:
        parser.error("--top-k must be at least 1")
    if not is_utf8(given.prompt):
        parser.error("--prompt: not UTF-8: give the text in a UTF-8 terminal or script")
    if given.hf and given.flags:
        parser.error("flags after -- are for --load")
    return given


def main(argv: list[str] | None = None) -> int:
    given = parse_flags(argv)
    go_offline()
    kind, path = ("load", given.load) if given.load else ("hf", given.hf)
    try:
        source = Source(kind, path, tuple(given.flags), given.trust_remote_code)
        source.check()
        if given.output:
            check_output(given.output, "--output")
        from hmoe_megatron.tools.evaluation import text as drawing
        from hmoe_megatron.tools.evaluation.models import open_model

        with contextlib.redirect_stdout(sys.stderr):  # Megatron's set-up talks; standard output is for the text
            model = open_model(source)
        prompt = model.encode(given.prompt)
        if not prompt:
            raise ValueError("--prompt has no token: give some text")
    except ValueError as error:
        print(f"generate.py: error: {error}", file=sys.stderr)
        return 2
    drawn, started_s = [], time.monotonic()
    tokens = drawing.generate(
        model,
        prompt,
        given.tokens,
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        seed=given.seed,
        stop_at=None if given.ignore_eod else model.end_of_document,
    )
    text = ""
    for piece in drawing.pieces(model.decode, prompt, (drawn.append(token) or token for token in tokens)):
        print(piece, end="", flush=True)
        text += piece
    print()
    wall_s = time.monotonic() - started_s
    print(f"{len(drawn)} tokens in {wall_s:.1f} s, {len(drawn) / wall_s:.1f} tokens/s", file=sys.stderr)
    if given.output:
        atomic_write(given.output, (text + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
