"""What this machine has, what a run on it will use, and how to repair what is broken.

Only the standard library is imported, and what may be broken (torch, Megatron, Transformer Engine, MPI) is
imported in a subprocess with a time-out: the doctor must explain a machine where none of them works, also
under a Python too old for the rest of the package.
"""

from __future__ import annotations

import json
import textwrap
from typing import Callable

from hmoe_megatron.tools.machine_checks import machine, software
from hmoe_megatron.tools.machine_checks.finding import Finding, warn

COLUMNS = 100
run_settings = software.run_settings

PROBES: dict[str, Callable[[], Finding]] = {
    "python": software.probe_python,
    "packages": software.probe_requirements,
    "torch": software.probe_torch,
    "gpu": software.probe_gpu,
    "megatron-core": software.probe_megatron,
    "transformer-engine": software.probe_transformer_engine,
    "apex": software.probe_apex,
    "mpi": software.probe_mpi,
    "memory": machine.probe_memory,
    "shared-memory": machine.probe_shared_memory,
    "disk": machine.probe_disk,
    "open-files": machine.probe_open_files,
    "host-name": machine.probe_host_name,
    "run": software.probe_run,
    "patches": software.probe_patches,
}


def examine(probes: dict[str, Callable[[], Finding]] = PROBES) -> dict[str, Finding]:
    """Every probe's finding. One that raises becomes a warn: it must not hide what the others found."""
    findings = {}
    for what, probe in probes.items():
        try:
            findings[what] = probe()
        except Exception as error:
            findings[what] = warn(f"the probe failed: {type(error).__name__}: {error}")
    return findings


def lines(head: str, text: str) -> list[str]:
    """`head` and the text beside it, folded with an indent where it is wider than COLUMNS."""
    return textwrap.wrap(text, COLUMNS, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)


def report(as_json: bool = False) -> int:
    """Prints the findings; returns the exit status, 1 where one is a fail."""
    findings = examine()
    failed = any(finding.level == "fail" for finding in findings.values())
    (facts, error), (patches, _) = software.torch_facts(), software.patches()
    if as_json:
        rows = [{"what": what, **finding._asdict()} for what, finding in findings.items()]
        answer = {"ok": not failed, "run": None if error else run_settings(), "findings": rows, "patches": patches}
        print(json.dumps({**answer, "environment": facts.get("environment")}, indent=1))
        return int(failed)
    for what, finding in findings.items():
        text = finding.found + (f" -> {finding.remedy}" if finding.remedy else "")
        print(*lines(f"{finding.level:<5} {what:<19}", text), sep="\n")
    for name, reason in patches.items():
        print(*lines(" " * 25, f"{name}: {reason}"), sep="\n")
    return int(failed)
