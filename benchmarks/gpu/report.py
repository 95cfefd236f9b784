"""gpu.json and gpu.md from the rows of the items."""

import json
from pathlib import Path

from hmoe_megatron.files import atomic_write


def write(folder: Path, machine: dict, rows: dict[str, list[dict]], notes: dict[str, str]) -> None:
    """Both files, whole. rows: item -> its rows so far; notes: item -> why it is not whole."""
    data = {"machine": machine, "items": rows, "not whole": notes}
    atomic_write(folder / "gpu.json", (json.dumps(data, indent=1) + "\n").encode())
    atomic_write(folder / "gpu.md", page(machine, rows, notes).encode())


def page(machine: dict, rows: dict[str, list[dict]], notes: dict[str, str]) -> str:
    """gpu.md."""
    text = ["# Measured on a GPU", "", f"`make gpu` on {machine.get('stamp', 'a machine that is not known')}.", ""]
    for item, of in rows.items():
        text += [f"## {TITLES[item]}", ""]
        if item in notes:
            text += [f"Not whole: {notes[item]}.", ""]
        text += [*TABLES[item](of), ""]
    return "\n".join(text)


def line(item: str, row: dict) -> str:
    """A row for the console, at most 100 columns."""
    words = " ".join(f"{name} {_short(value)}" for name, value in row.items())
    return f"{item:<12} {words}"[:100]


def _short(value) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return " ".join(f"{name} {_short(of)}" for name, of in value.items())
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value[:3]))}{', ...' if len(value) > 3 else ''}]" if value else "none"
    return str(value)


def _table(head: str, lines) -> list[str]:
    return [f"| {head} |", "|" + "---|" * (head.count("|") + 1), *(f"| {' | '.join(cells)} |" for cells in lines)]


def _correctness(rows):
    return _table(
        "what | dtype | cases | failed | differ in a second run | largest error of the norm",
        (
            [
                row["what"],
                row.get("dtype", ""),
                f"{row['cases']} of {row.get('of', row['cases'])}",
                row.get("skipped") or str(len(row.get("failed", ()))),
                str(len(row.get("different in a second run", ()))),
                row.get("said") or _short(row.get("worst", {})),
            ]
            for row in rows
        ),
    )


def _ffn(rows):
    lines, shapes = [], list(dict.fromkeys(row["shape"] for row in rows))
    for shape in shapes:
        ratios = next((row["ratios"] for row in rows if row["shape"] == shape and "ratios" in row), {})
        for row in (row for row in rows if row["shape"] == shape and "way" in row):
            over = ratios.get(row["way"])
            lines.append(
                [
                    shape,
                    row["way"],
                    row["failed"] if "failed" in row else f"{row['ms']:.3f}",
                    f"{row.get('tflops', 0):.0f}",
                    f"{row.get('bytes', 0) / 2**30:.2f}",
                    f"{over:.2f}" if over else "",
                ]
            )
    kernels = (
        [row["shape"], row["kernel"], f"{row['ms']:.4f}", f"{row.get('tflops', row.get('gb_per_s', 0)):.0f}"]
        for row in rows
        if "kernel" in row
    )
    return [
        *_table("shape | way | ms | TFLOP/s | peak GiB | triton over it", lines),
        "",
        *_table("shape | kernel | ms | TFLOP/s, or GB/s of the activation", kernels),
    ]


def _steps(rows):
    summary, parts, kernels = [], [], []
    for row in rows:
        name = f"{row['model']}, {row.get('side', row.get('what', ''))}"
        if "ratio" in row:
            spread = f" ({row['least']:.3f} to {row['most']:.3f})" if "least" in row else ""
            ms = f", {' against '.join(f'{of:.1f}' for of in row['ms'].values())} ms" if "ms" in row else ""
            summary.append([name, f"{row['ratio']:.3f}{spread}{ms}"])
        elif "build_s" in row:
            summary.append(
                [
                    name,
                    f"model built in {row['build_s']:.2f} s, {row['expert_parameters'] / 1e6:.0f} M in a "
                    f"layer's experts; first loss after {row['to_first_loss_s']:.1f} s",
                ]
            )
        elif "parts_ms" in row:
            parts.append(
                [
                    name,
                    f"{row['step_ms']:.1f}",
                    *(f"{row['parts_ms'].get(part, 0):.1f}" for part in PARTS),
                    f"{row['bytes'] / 2**30:.1f}",
                    f"{row['experts']:.2f}" if "experts" in row else "",
                ]
            )
        elif "kernels" in row:
            kernels += [[name, f"`{kernel[:80]}`", str(calls), f"{ms:.2f}"] for kernel, calls, ms in row["kernels"]]
        elif "failed" in row:
            summary.append([name, f"failed: {row['failed'].splitlines()[-1]}"])
    return [
        "Routing is random and even on both sides, so FLOPs are equal. Without Apex neither side's other layers",
        "add to gradients in their kernels, nor do Megatron's experts; ours do. The first loss counts imports,",
        "which all processes do at the same time.",
        "",
        *_table("model | seen", summary),
        "",
        *_table(f"a step, ms | whole | {' | '.join(PARTS)} | peak GiB | experts a token", parts),
        "",
        *_table("model | kernel | calls a step | ms", kernels),
    ]


PARTS = ("router", "permutation", "dispatch", "experts", "gradient norm", "optimizer", "rest")


def _runs(rows):
    return _table(
        "run | outcome | apart | bound",
        (
            [
                row["run"],
                row.get("skipped") or ("ok" if row["ok"] else f"FAILED {row.get('failed', '')}"),
                f"{row['apart']:.1e}" if "apart" in row else "",
                f"{row['bound']:.0e}" if "bound" in row else "",
            ]
            for row in rows
        ),
    )


def _rates(rows):
    return ["Layers that are small measure how fast the host launches kernels, not the device.", ""] + _table(
        "profile | seen",
        (
            [
                row["profile"],
                _short(
                    row.get("rates")
                    or {
                        "median error": row["median_error"],
                        "worst": row["worst_error"],
                        "predicted over measured": row["over_measured"],
                    }
                ),
            ]
            for row in rows
        ),
    )


TITLES = {
    "correctness": "Correctness of the triton backend",
    "ffn": "Experts alone, forward and backward",
    "steps": "Training steps beside Megatron's MoE",
    "runs": "Training runs",
    "rates": "Hardware profile",
}
TABLES = {"correctness": _correctness, "ffn": _ffn, "steps": _steps, "runs": _runs, "rates": _rates}
