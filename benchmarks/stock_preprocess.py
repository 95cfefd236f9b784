"""What Megatron's users run: a pool of processes calls its tokenizer text by text, one process feeds its builder.

python -m benchmarks.stock_preprocess INPUT.jsonl OUTPUT TOKENIZER_TYPE TOKENIZER_MODEL WORKERS. For benchmarks/data.py.
"""

import argparse
import json
import multiprocessing
import sys
import warnings

_tokenizer = None


def _start(kind: str, model: str) -> None:
    global _tokenizer
    _tokenizer = tokenizer(kind, model)


def tokenizer(kind: str, model: str):
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    from hmoe_megatron.tools.data_prep.runs import megatron_tokenizer_args

    args = argparse.Namespace(tokenizer_type=kind, tokenizer_model=model, vocab_file=None, merge_file=None)
    return build_tokenizer(megatron_tokenizer_args(args, []))


def _encode(line: str) -> list[int]:
    return [*_tokenizer.tokenize(json.loads(line)["text"]), _tokenizer.eod]


def main(path: str, output: str, kind: str, model: str, workers: int) -> None:
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(tokenizer(kind, model).vocab_size)
    builder = IndexedDatasetBuilder(f"{output}.bin", dtype=dtype)
    with open(path, encoding="utf-8") as lines, multiprocessing.Pool(workers, _start, (kind, model)) as pool:
        for ids in pool.imap(_encode, lines, 32):
            builder.add_document(ids, [len(ids)])
    builder.finalize(f"{output}.idx")


if __name__ == "__main__":
    main(*sys.argv[1:5], int(sys.argv[5]))
