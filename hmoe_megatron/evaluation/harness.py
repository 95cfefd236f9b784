"""lm-eval on our models and files, without a network. The only module that imports lm-eval.

Prompts, choices, targets and metrics are those of lm-eval's own task files; the data are rows that were read here.
"""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hmoe_megatron.evaluation.benchmarks import BENCHMARKS, lm_eval_row
from hmoe_megatron.evaluation.models import Model
from hmoe_megatron.evaluation.scoring import Limits, Tokens, scores
from hmoe_megatron.evaluation.texts import added_tokens, document_tokens


def load_tasks(rows: dict[str, list[dict]]) -> dict:
    """lm-eval's TaskDict of the benchmarks in `rows`, each on its rows, with no example before a question."""
    import lm_eval.tasks

    own = Path(lm_eval.tasks.__file__).parent
    folders = [own / BENCHMARKS[name].folder for name in rows]
    manager = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)
    overrides = [
        {"task": BENCHMARKS[name].task, "custom_dataset": partial(_dataset, name, its_rows), "training_split": None,
         "test_split": None, "num_fewshot": 0}
        for name, its_rows in rows.items()
    ]  # fmt: skip
    return manager.load({"group": "benchmarks", "task": overrides})


def _dataset(name: str, rows: list[dict], **_) -> dict:
    """In memory: `load_dataset` would keep a copy in the user's cache, and take it for a changed file."""
    import datasets

    datasets.disable_progress_bars()

    return {"validation": datasets.Dataset.from_list([lm_eval_row(name, row) for row in rows])}


def live_model(model: Model, limits: Limits):
    """An lm-eval model around ours."""
    from lm_eval.api.model import TemplateLM

    added = added_tokens(model)

    class LiveModel(TemplateLM):
        eot_token_id = model.end_of_document

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
            tokens = model.encode(string)
            return tokens[len(added) :] if add_special_tokens is False else tokens

        def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
            for texts, _, continuation in requests:
                if not continuation:
                    raise ValueError(f"the tokenizer leaves no token of {texts[1]!r} after {texts[0][-40:]!r}: "
                                     "a choice can't be scored")  # fmt: skip
            sequences = [Tokens(context + continuation, len(context)) for _, context, continuation in requests]
            return [tuple(score) for score in scores(model, sequences, limits, "questions")]

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            documents = [document_tokens(model, request.args[0], added) for request in requests]
            return [score.log_likelihood for score in scores(model, documents, limits, "documents")]

        def generate_until(self, requests, disable_tqdm: bool = False):
            raise NotImplementedError("tools/evaluate.py scores given texts; tools/generate.py writes text")

    return LiveModel()


def evaluate_tasks(model: Model, rows: dict[str, list[dict]], limits: Limits, limit: int | None = None) -> dict:
    """{benchmark: {"questions", "acc", "acc_stderr", "acc_norm" ..., "log_likelihoods": [[of each choice] ...]}}.

    limit: only the first questions of each. Standard errors are lm-eval's; None of a single question.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import lm_eval

    tasks = load_tasks(rows)
    found = lm_eval.evaluate(live_model(model, limits), tasks, limit=limit, log_samples=True)
    return {name: _result(found, BENCHMARKS[name].task) for name in rows}


def _result(found: dict, task: str) -> dict:
    samples: Sequence[dict] = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    result = {"questions": len(samples)}
    for metric in ("acc", "acc_norm"):
        if f"{metric},none" in found["results"][task]:
            stderr = found["results"][task][f"{metric}_stderr,none"]
            result[metric] = found["results"][task][f"{metric},none"]
            result[f"{metric}_stderr"] = stderr if isinstance(stderr, float) else None
    result["log_likelihoods"] = [[choice[0] for choice in sample["filtered_resps"]] for sample in samples]
    return result
