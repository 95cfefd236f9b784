"""The software of a run: versions of its packages, and the commit of this one where it runs from a checkout."""

import contextlib
import importlib.metadata
import subprocess
from pathlib import Path

import hmoe_megatron

ROOT = Path(__file__).parents[2]
CHANGED = " with uncommitted changes"


def versions() -> dict[str, str]:
    """Package -> version."""
    stock = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")}
    return stock | {"hmoe-megatron": hmoe_megatron.__version__}


def commit() -> str | None:
    """Of the checkout that holds this package, with CHANGED where more than documents differ from it. None without a
    checkout or git."""
    if not (ROOT / ".git").exists():  # an installed package may lie inside a checkout of something else
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        # New files are not looked for: a run's data may lie in the checkout, and every rank waits for this.
        found = _git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
        changed = [line for line in found.splitlines() if not line.endswith(".md")]
        return _git("rev-parse", "--short=10", "HEAD").strip() + (CHANGED if changed else "")
    return None


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout
