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
    pairs = []
    for task, found in first["tasks"].items():
        pairs += zip(found["log_likelihoods"], other["tasks"][task]["log_likelihoods"], strict=True)
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
                cells[f"{name} {metric}"] = _cell(task[metric], task[f"{metric}_stderr"], 2, 100)
    if len(result["tasks"]) > 1:
        cells["mean acc"] = _cell(*mean_accuracy(result["tasks"]), 2, 100)
    files = [os.path.basename(name) for name in result["texts"]]
    for name, file, text in zip(result["texts"], files, result["texts"].values(), strict=True):
        for metric, digits in (("perplexity", 2), ("bits_per_byte", 4)):
            label = f"{file if files.count(file) == 1 else name} {metric.replace('_', ' ')}"
            cells[label] = _cell(text[metric], text[f"{metric}_stderr"], digits)
    return cells


def _cell(value: float, stderr: float | None, digits: int, times: int = 1) -> str:
    error = "" if stderr is None or math.isnan(stderr) else f" ± {times * stderr:.{digits}f}"
    return f"{times * value:,.{digits}f}{error}"


def table(results: Sequence[dict]) -> str:
    """Models beside each other under their letters, in at most 100 columns; letters and differences below."""
    rows, at_once = [measures(result) for result in results], (WIDTH - LABEL_CHARS) // COLUMN_CHARS
    names, lines = [chr(ord("A") + i) for i in range(len(results))], []
    for start in range(0, len(results), at_once):
        shown = slice(start, start + at_once)
        lines.append(" " * LABEL_CHARS + "".join(name.rjust(COLUMN_CHARS) for name in names[shown]))
        for label in rows[0]:
            cells = "".join(row[label].rjust(COLUMN_CHARS) for row in rows[shown])
            lines.append(_cut(label, LABEL_CHARS).ljust(LABEL_CHARS) + cells)
        lines.append("")
    lines += map(_line, names, results)
    for name, found in zip(names, (result["against_first"] for result in results), strict=True):
        if found:
            answers = f"{found['answered_differently']:,} of {found['questions']:,} questions answered otherwise"
            choices = f"{found['choices_apart']:,} of {found['choices']:,} log-likelihoods more than {APART} apart"
            lines.append(f"{name} against A: {answers},")
            lines.append(f"             {choices}, the most {found['largest_difference']:.3g}")
    return "\n".join(lines)


def _line(name: str, result: dict) -> str:
    facts = f"{result['parameters'] / 1e6:,.1f} M parameters, {result['dtype']}, context {result['context']:,}"
    step = f", iteration {result['iteration']}" if "iteration" in result else ""
    return f"{name}  {_cut(result['path'], WIDTH - len(name + facts + step) - 4)}{step}: {facts}"


def _cut(text: str, room: int) -> str:
    """The end of a text that is longer than `room`."""
    return text if len(text) <= room else "…" + text[1 - room :]
