"""The report of a training run: one HTML page that stands alone, and its pictures as PNG files. Imports no torch.

Run files, none of them trusted: telemetry.jsonl, placement_plan.json, TensorBoard's event files.
"""

import os
from pathlib import Path

from hmoe_megatron.files import atomic_write
from hmoe_megatron.report.page import html_page
from hmoe_megatron.report.pictures import draw
from hmoe_megatron.report.run_files import read_run
from hmoe_megatron.report.series import series

__all__ = ["draw", "html_page", "read_run", "series", "write_report"]


def write_report(
    run_dir: str | os.PathLike,
    output: str | os.PathLike | None = None,
    png_dir: str | os.PathLike | None = None,
    tensorboard_dir: str | os.PathLike | None = None,
) -> list[Path]:
    """Write the page, then its pictures, each file whole or not at all; returns their paths, the page first.

    output: default report.html in the run directory; png_dir: default figures/ beside the page; tensorboard_dir:
    default tensorboard/ in the run directory. Missing directories are made. Raises ValueError with file and line for
    what cannot be read.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir, Path(tensorboard_dir or run_dir / "tensorboard"))
    drawn = series(run)
    pngs = draw(drawn)
    page = Path(output or run_dir / "report.html")
    png_dir = Path(png_dir or page.parent / "figures")
    files = {page: html_page(run, drawn, pngs)} | {png_dir / name: png for name, png in pngs.items()}
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, content)
    return list(files)
