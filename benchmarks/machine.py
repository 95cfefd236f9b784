"""Where and on what code a figure was measured."""

import importlib.metadata
import os
import platform
from datetime import date
from pathlib import Path

from hmoe_megatron.machine import software
from hmoe_megatron.tools.calibration.cpu import cpu_name

ROOT = Path(__file__).parents[1]


def stamp(*packages: str) -> str:
    """Machine, versions, date and commit, in a line."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return (
        f"{cpu_name()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, {versions}; {date.today()}, commit {_commit()}"
    )


def _commit() -> str:
    """Of the code here; what COMMIT in the environment says where the code was copied without its history."""
    return os.environ.get("COMMIT") or software.commit() or "unknown"
