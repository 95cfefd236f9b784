"""Generate text from the last checkpoint of a run.

    python tools/generate.py RUN_DIRECTORY --prompt "ROMEO:" --tokens 200
"""

import argparse
import contextlib
import sys
from pathlib import Path


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_directory", type=Path, help="--save directory of a run of pretrain_hmoe.py")
    parser.add_argument("--prompt", default="\n", help="text to go on from")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token every time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the text there too")
    parser.add_argument("flags", nargs="*", help="after --: flags of pretrain_hmoe.py that override those of the run")
    given = parser.parse_args(argv)
    if given.tokens < 1 or given.temperature < 0:
        parser.error("--tokens must be at least 1 and --temperature at least 0")

    from hmoe_megatron import host

    host.prepare_environment()
    from hmoe_megatron import generation, training

    training.prepare()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Megatron's set-up talks; standard output is for the text
            model = generation.load_model(given.run_directory, given.flags)
    except ValueError as error:
        print(f"generate.py: error: {error}", file=sys.stderr)
        return 2
    from megatron.training import get_args, get_tokenizer

    tokenizer = get_tokenizer()
    prompt = tokenizer.tokenize(given.prompt)
    if not prompt:
        parser.error("--prompt has no token: give some text")
    tokens = generation.generate(
        model, prompt, given.tokens, context=get_args().seq_length, vocabulary=tokenizer.vocab_size,
        temperature=given.temperature, seed=given.seed,
    )  # fmt: skip
    text = tokenizer.detokenize(prompt + tokens)
    print(text)
    if given.output:
        given.output.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
