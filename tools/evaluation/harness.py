"""lm-eval on our models and files, without a network. The only module that imports lm-eval.

Prompts, choices, targets and metrics are those of lm-eval's own task files; the data are rows that were read here.
lm-eval's own model of a Hugging Face directory stops at a choice longer than the context and counts the vocabulary's
padding, so both kinds of model go through `live_model`; a test compares the two.
"""

import logging
from functools import partial
from pathlib import Path

from hmoe_megatron.tools.evaluation.benchmarks import BENCHMARKS
from hmoe_megatron.tools.evaluation.models import Model
from hmoe_megatron.tools.evaluation.scoring import Limits, scores
from hmoe_megatron.tools.evaluation.texts import added_tokens


def load_tasks(rows: dict[str, list[dict]]) -> dict:
    """lm-eval's TaskDict of the benchmarks in `rows`, each on its rows, with no example before a question."""
    import lm_eval.tasks

    own = Path(lm_eval.tasks.__file__).parent
    folders = [own / BENCHMARKS[name][1] for name in rows]
    manager = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)
    ours = {"training_split": None, "test_split": None, "num_fewshot": 0}
    tasks = [
        {"task": BENCHMARKS[name][0], "custom_dataset": partial(_dataset, name, its_rows), **ours}
        for name, its_rows in rows.items()
    ]
    return manager.load({"group": "benchmarks", "task": tasks})


def _dataset(name: str, rows: list[dict], **_) -> dict:
    """In memory: `load_dataset` would keep a copy in the user's cache, and take it for a changed file."""
    import datasets

    datasets.disable_progress_bars()
    if name == "boolq":  # lm-eval's task reads the columns of SuperGLUE, where the answer is a label
        rows = [row | {"label": int(row["answer"])} for row in rows]
    return {"validation": datasets.Dataset.from_list(rows)}


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
            for texts, _, choice in requests:
                if not choice:
                    where = f"{texts[1]!r} after {texts[0][-40:]!r}"
                    raise ValueError(f"the tokenizer leaves no token of {where}: a choice can't be scored")
            sequences = [(context + choice, len(context)) for _, context, choice in requests]
            return scores(model, sequences, limits, "questions")

        def generate_until(self, *_, **__):
            raise NotImplementedError("no benchmark asks for it: texts.py scores texts, tools/generate.py writes them")

        loglikelihood_rolling = generate_until

    return LiveModel()


def evaluate_tasks(model: Model, rows: dict[str, list[dict]], limits: Limits, limit: int | None = None) -> dict:
    """{benchmark: {"questions", "acc", "acc_stderr", "acc_norm" ..., "log_likelihoods": [[of each choice] ...]}}.

    limit: only the first questions of each. Standard errors are lm-eval's; None of a single question.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import lm_eval

    found = lm_eval.evaluate(live_model(model, limits), load_tasks(rows), limit=limit, log_samples=True)
    return {name: _result(found, BENCHMARKS[name][0]) for name in rows}


def _result(found: dict, task: str) -> dict:
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    result, values = {"questions": len(samples)}, found["results"][task]
    for metric in ("acc", "acc_norm"):
        if f"{metric},none" in values:
            stderr = values[f"{metric}_stderr,none"]
            result[metric] = values[f"{metric},none"]
            result[f"{metric}_stderr"] = stderr if isinstance(stderr, float) else None
    result["log_likelihoods"] = [[choice[0] for choice in sample["filtered_resps"]] for sample in samples]
    return result
