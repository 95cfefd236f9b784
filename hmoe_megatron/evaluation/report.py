"""What two results differ by, and the table of all."""

import math
import os
from collections.abc import Sequence

WIDTH = 100
LABEL_CHARS, COLUMN_CHARS = 24, 18
APART = 1e-4  # five times what rounding did to sums of up to 5,000; what is above chose other experts somewhere


def difference(first: dict, other: dict) -> dict | None:
    """Of two models on the same questions: how many they answer differently (by log-likelihood, as `acc` does), and of
    all choices how many log-likelihoods are more than APART apart, and the most. None where there are no questions."""
    pairs = [(mine, its) for task in first["tasks"]
             for mine, its in zip(first["tasks"][task]["log_likelihoods"], other["tasks"][task]["log_likelihoods"],
                                  strict=True)]  # fmt: skip
    if not pairs:
        return None
    differences = [abs(a - b) for mine, its in pairs for a, b in zip(mine, its, strict=True)]
    return {
        "questions": len(pairs),
        "answered_differently": sum(mine.index(max(mine)) != its.index(max(its)) for mine, its in pairs),
        "choices": len(differences),
        "choices_apart": sum(value > APART for value in differences),
        "largest_difference": max(differences),
    }


def mean_accuracy(tasks: dict) -> tuple[float, float | None]:
    """Unweighted mean of `acc` and its standard error: benchmarks are independent of each other."""
    errors = [task["acc_stderr"] for task in tasks.values()]
    mean = sum(task["acc"] for task in tasks.values()) / len(tasks)
    return mean, None if None in errors else math.hypot(*errors) / len(tasks)


def measures(result: dict) -> dict[str, str]:
    """{label of a row: value ± standard error} of one model; accuracies in percent."""
    cells = {}
    for name, task in result["tasks"].items():
        for metric in ("acc", "acc_norm"):
            if metric in task:
                cells[f"{name} {metric}"] = _percent(task[metric], task[f"{metric}_stderr"])
    if len(result["tasks"]) > 1:
        cells["mean acc"] = _percent(*mean_accuracy(result["tasks"]))
    files = [os.path.basename(name) for name in result["texts"]]
    for name, file, text in zip(result["texts"], files, result["texts"].values(), strict=True):
        for metric, digits in (("perplexity", 2), ("bits_per_byte", 4)):
            label = f"{file if files.count(file) == 1 else name} {metric.replace('_', ' ')}"
            cells[label] = _cell(text[metric], text[f"{metric}_stderr"], digits)
    return cells


def table(results: Sequence[dict]) -> str:
    """Models beside each other under their letters, in at most 100 columns; letters and differences below."""
    rows, at_once = [measures(result) for result in results], (WIDTH - LABEL_CHARS) // COLUMN_CHARS
    names = [chr(ord("A") + i) for i in range(len(results))]
    lines = []
    for start in range(0, len(results), at_once):
        shown = range(start, min(start + at_once, len(results)))
        lines.append(" " * LABEL_CHARS + "".join(names[i].rjust(COLUMN_CHARS) for i in shown))
        for label in rows[0]:
            cut = label if len(label) <= LABEL_CHARS else "…" + label[1 - LABEL_CHARS :]
            lines.append(cut.ljust(LABEL_CHARS) + "".join(rows[i][label].rjust(COLUMN_CHARS) for i in shown))
        lines.append("")
    lines += [_line(names[i], result) for i, result in enumerate(results)]
    for i, result in enumerate(results):
        if i and (found := result["against_first"]):
            lines += [f"{names[i]} against {names[0]}: {found['answered_differently']:,} of {found['questions']:,} "
                      "questions answered otherwise,",
                      f"             {found['choices_apart']:,} of {found['choices']:,} log-likelihoods more than "
                      f"{APART} apart, the most {found['largest_difference']:.3g}"]  # fmt: skip
    return "\n".join(lines)


def _line(name: str, result: dict) -> str:
    facts = f"{result['parameters'] / 1e6:,.1f} M parameters, {result['dtype']}, context {result['context']:,}"
    step = f", iteration {result['iteration']}" if "iteration" in result else ""
    room = WIDTH - len(name) - len(facts) - len(step) - 4
    path = result["path"] if len(result["path"]) <= room else "…" + result["path"][1 - room :]
    return f"{name}  {path}{step}: {facts}"


def _percent(value: float, stderr: float | None) -> str:
    return _cell(100 * value, None if stderr is None else 100 * stderr, 2)


def _cell(value: float, stderr: float | None, digits: int) -> str:
    error = "" if stderr is None or math.isnan(stderr) else f" ± {stderr:.{digits}f}"
    return f"{value:,.{digits}f}{error}"
