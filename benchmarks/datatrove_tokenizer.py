"""datatrove's tokenizer stage on one file, in the order of the input. For benchmarks/data.py.

python -m benchmarks.datatrove_tokenizer INPUT.jsonl FOLDER TOKENIZER.json WORKERS
"""

import sys

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer


def main(path: str, folder: str, tokenizer: str, workers: int) -> None:
    parent, _, name = path.rpartition("/")
    stages = [
        JsonlReader(parent, glob_pattern=name),
        DocumentTokenizer(folder, tokenizer_name_or_path=tokenizer, eos_token="<|endoftext|>", shuffle_documents=False),
    ]
    # A task reads whole files: of one file there is one task, whatever the number of workers.
    LocalPipelineExecutor(pipeline=stages, tasks=1, workers=workers, logging_dir=f"{folder}/logs").run()


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
