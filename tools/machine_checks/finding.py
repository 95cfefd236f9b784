"""What a probe says, and the safe ways to look at a package that may be broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
IMPORT_TIMEOUT_S = 180  # a first import of torch from a slow disk was seen to take more than a minute
INSTALL = "make venv"


class Finding(NamedTuple):
    """level: ok, warn or fail; remedy is empty where nothing need be done."""

    level: str
    found: str
    remedy: str = ""


def ok(found: str) -> Finding:
    return Finding("ok", found)


def warn(found: str, remedy: str = "") -> Finding:
    return Finding("warn", found, remedy)


def fail(found: str, remedy: str) -> Finding:
    return Finding("fail", found, remedy)


def ask_python(code: str, timeout_s: float = IMPORT_TIMEOUT_S) -> tuple[dict, str]:
    """Runs `code`, which fills the dict `answer`, in a subprocess: (answer, "") or ({}, error)."""
    script = f"answer = {{}}\n{code}\nimport json\nprint('\\nanswer:' + json.dumps(answer), flush=True)"
    # From the repository's root, so that the same modules are found as by a training script there.
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "errors": "replace"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=str(ROOT), timeout=timeout_s, encoding="utf-8", **pipes
        )
    except subprocess.TimeoutExpired:
        return {}, f"no answer within {timeout_s:g} s"
    # The answer counts even if the interpreter then dies while it shuts down.
    answers = [line for line in done.stdout.splitlines() if line.startswith("answer:")]
    if answers:
        return json.loads(answers[-1][len("answer:") :]), ""
    if done.returncode < 0:
        return {}, f"killed by signal {-done.returncode}"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return {}, lines[-1] if lines else f"exit status {done.returncode}"
