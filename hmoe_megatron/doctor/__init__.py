"""What this machine has, what a run on it will use, and how to mend what is broken.

Only the standard library is imported, and what may be broken (torch, Megatron, Transformer Engine, MPI) is
imported in a subprocess with a time-out: the doctor must explain a machine where none of them works, also
under a Python too old for the rest of the package.
"""

from __future__ import annotations

import json
import textwrap
from typing import Callable

from hmoe_megatron.machine.fused_kernels import APEX, implementation, summary, switched_off

from . import machine, software
from .finding import Finding

COLUMNS = 100


def run_settings() -> dict:
    """What a run here will use: backend, implementation, fused kernels that are off, optimizer, ranks."""
    facts, _ = software.torch_facts()
    gpus = len(facts.get("gpus", []))
    if not gpus:
        return {
            "backend": "gloo",
            "implementation": "local",
            "off": ["all"],
            "optimizer": "torch",
            "ranks": machine.cpu_ranks(),
        }
    kernels = software.kernels()
    return {
        "backend": "nccl",
        "implementation": implementation(kernels, {}),
        "off": [entry.kernel for entry in switched_off(kernels, {})],
        "optimizer": "Transformer Engine" if kernels.engine else "Apex" if APEX in kernels.modules else "torch",
        "ranks": gpus,
    }


def probe_run() -> Finding:
    if software.torch_facts()[1]:
        return Finding("fail", "run", "nothing can run without torch", "mend torch first, see there")
    use = run_settings()
    on_gpu = use["backend"] == "nccl"
    kernels = summary(software.kernels(), {}) if on_gpu else "implementation local, no fused kernels"
    found = f"{use['backend']}, {kernels}, optimizer {use['optimizer']}, up to {use['ranks']} ranks"
    if use["ranks"] < 1:
        return Finding("warn", "run", found, "free memory first")
    return Finding("ok", "run", found)


PROBES: dict[str, Callable[[], Finding]] = {
    "python": software.probe_python,
    "packages": software.probe_requirements,
    "torch": software.probe_torch,
    "gpu": software.probe_gpu,
    "nccl": software.probe_nccl,
    "megatron-core": software.probe_megatron,
    "transformer-engine": software.probe_transformer_engine,
    "apex": software.probe_apex,
    "mpi": software.probe_mpi,
    "cores": machine.probe_cores,
    "memory": machine.probe_memory,
    "shared-memory": machine.probe_shared_memory,
    "disk": machine.probe_disk,
    "open-files": machine.probe_open_files,
    "host-name": machine.probe_host_name,
    "run": probe_run,
}


def examine(probes: dict[str, Callable[[], Finding]] = PROBES) -> list[Finding]:
    """Every probe's finding. One that raises becomes a warn: it must not hide what the others found."""
    findings = []
    for what, probe in probes.items():
        try:
            findings.append(probe())
        except Exception as error:
            findings.append(Finding("warn", what, f"the probe failed: {type(error).__name__}: {error}"))
    return findings


def lines(finding: Finding) -> list[str]:
    """One line, `level what found -> remedy`, folded with an indent where it is wider than COLUMNS."""
    head = f"{finding.level:<5} {finding.what:<19}"
    text = finding.found + (f" -> {finding.remedy}" if finding.remedy else "")
    return textwrap.wrap(
        text, COLUMNS, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False
    )


def report(as_json: bool = False) -> int:
    """Prints the findings; returns the exit status, 1 where one is a fail."""
    findings = examine()
    failed = any(finding.level == "fail" for finding in findings)
    if as_json:
        run = None if software.torch_facts()[1] else run_settings()
        print(
            json.dumps({"ok": not failed, "run": run, "findings": [f._asdict() for f in findings]}, indent=1)
        )
    else:
        for finding in findings:
            print("\n".join(lines(finding)))
    return int(failed)
