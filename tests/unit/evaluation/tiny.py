"""A tokenizer, a checkpoint of a few training steps, and questions: what a user of tools/evaluate.py has."""

import contextlib
import functools
import hashlib
import io
import json

from hmoe_megatron.tools.evaluation.benchmarks import BENCHMARKS
from tests.distributed.pretrain_run import pretrain
from tests.distributed.ranks import run_ranks

VOCABULARY, CONTEXT = 320, 64
FLAGS = (
    f"--seq-length {CONTEXT} --max-position-embeddings {CONTEXT} --tokenizer-type HuggingFaceTokenizer "
    "--hmoe-router topk --hmoe-widths 16,16,24,40 --train-iters 3 --save-interval 3"
)
SENTENCES = [
    "The cat sat on the mat, and the dog lay by the door.",
    "A river runs to the sea; the sea is not full.",
    "What is the likely cause of a wet street? It rained in the night.",
]
ROWS = {
    "piqa": {"goal": "dry a wet {}", "sol1": "hang it in the sun", "sol2": "put it in a bucket", "label": 0},
    "hellaswag": {
        "activity_label": "Cooking",
        "ctx_a": "A {} is on the stove.",
        "ctx_b": "the cook",
        "label": "2",
        "endings": ["swims.", "falls [title] asleep.", "takes it off.", "reads."],
    },
    "boolq": {"passage": "Water boils at a hundred degrees.", "question": "does {} boil", "answer": True},
    "winogrande": {
        "sentence": "The {} did not fit the box because the _ was too big.",
        "option1": "trophy",
        "option2": "box",
        "answer": "1",
    },
    "siqa": {
        "context": "Ann gave the {} away.",
        "question": "How does she feel?",
        "answerA": "kind",
        "answerB": "red",
        "answerC": "wet",
        "label": "1",
    },
    "arc_easy": {
        "question": "Which {} is warm?",
        "answerKey": "B",
        "choices": {"text": ["ice", "fire", "snow"], "label": ["A", "B", "C"]},
    },
}
WORDS = ("coat", "pan", "sea", "hat", "cup", "stone")


def write_benchmarks(folder, names=tuple(BENCHMARKS)):
    """As `tools/get_corpus.py benchmarks-eval` leaves them, six questions each."""
    files = {}
    for name in names:
        rows = [json.dumps(ROWS[name]).replace("{}", word) for word in WORDS]
        data = ("\n".join(rows) + "\n").encode()
        (folder / f"{name}.jsonl").write_bytes(data)
        files[f"{name}.jsonl"] = {"sha256": hashlib.sha256(data).hexdigest()}
    (folder / "benchmarks-eval.json").write_text(json.dumps({"files": files}))
    return folder


def write_tokenizer(folder):
    """A byte-level BPE as transformers saves it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def train(run, tokenizer, seed):
    """Three steps on random tokens; the checkpoint of the last."""
    (end,) = run_ranks(1, pretrain, f"{FLAGS} --tokenizer-model {tokenizer} --save {run} --seed {seed}")
    assert end.code == 0, end.output
    return run


def use_tools(evaluate_words, draws):
    """What tools/evaluate.py prints, then tools/generate.py of each of `draws`, in this process: each model is opened
    once. Megatron is set up once a process, so at most one model is a run's."""
    from hmoe_megatron.tools import evaluate, generate
    from hmoe_megatron.tools.evaluation import models, work

    def output_of(tool, words):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            assert tool.main([*map(str, words)]) == 0
        return output.getvalue()

    models.open_model = functools.cache(models.open_model)
    evaluate.evaluate_apart = work.evaluate
    return [output_of(evaluate, evaluate_words), *(output_of(generate, words) for words in draws)]
