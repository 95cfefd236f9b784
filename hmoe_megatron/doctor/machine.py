"""Probes of the machine: each takes no argument and returns a Finding."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

from .finding import GIB, ROOT, Finding, ask_python

RANK_BYTES = (
    2 * GIB
)  # a CPU rank: 0.75 GiB of imports were measured, the rest is for a model of the demo's size
MIN_SHM_BYTES = GIB  # containers start with 64 MiB; NCCL and data loader workers need more
MIN_DISK_BYTES = 10 * GIB  # half of it for the Python packages
MIN_OPEN_FILES = 1024
CGROUP = Path("/sys/fs/cgroup")


def cgroup_limit(name: str) -> str:
    """First word of a cgroup v2 file; "max" where there is none or no limit."""
    try:
        return (CGROUP / name).read_text().split()[0]
    except (OSError, IndexError):
        return "max"


def memory_bytes() -> tuple[int, int]:
    """(total, available), the container's limit included."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    available = total
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except OSError:
        pass
    limit = cgroup_limit("memory.max")
    if limit != "max":
        total = min(total, int(limit))
        used = cgroup_limit("memory.current")
        available = min(available, total - (0 if used == "max" else int(used)))
    return total, max(available, 0)


def cores() -> int:
    """Cores this process may use: affinity and the container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return count


def cpu_ranks() -> int:
    """Ranks that fit without a GPU: one a core, RANK_BYTES each; 0 where memory is too small for one."""
    return min(cores(), memory_bytes()[1] // RANK_BYTES)


def probe_cores() -> Finding:
    return Finding("ok", "cores", str(cores()))


def probe_memory() -> Finding:
    total, available = memory_bytes()
    found = f"{available / GIB:.1f} GiB available of {total / GIB:.1f}"
    if available < RANK_BYTES:
        return Finding(
            "warn", "memory", found, f"a rank takes about {RANK_BYTES / GIB:g} GiB: free some first"
        )
    return Finding("ok", "memory", found)


def probe_shared_memory() -> Finding:
    if not os.path.isdir("/dev/shm"):
        return Finding("warn", "shared-memory", "no /dev/shm", "mount a tmpfs there")
    usage = shutil.disk_usage("/dev/shm")
    found = f"{usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f} in /dev/shm"
    if usage.free < MIN_SHM_BYTES:
        return Finding("warn", "shared-memory", found, "docker run --shm-size=8g, or --ipc=host; or empty it")
    return Finding("ok", "shared-memory", found)


def probe_disk() -> Finding:
    free = shutil.disk_usage(str(ROOT)).free
    found = f"{free / GIB:.1f} GiB free at {ROOT}"
    if free < MIN_DISK_BYTES:
        return Finding(
            "warn", "disk", found, f"packages, data and checkpoints want {MIN_DISK_BYTES // GIB} GiB"
        )
    return Finding("ok", "disk", found)


def probe_open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        return Finding(
            "warn",
            "open-files",
            f"limit {soft}",
            f"ulimit -n {max(MIN_OPEN_FILES, 65536)}, or the hard limit {hard}",
        )
    return Finding("ok", "open-files", "no limit" if soft == resource.RLIM_INFINITY else f"limit {soft}")


def probe_host_name() -> Finding:
    """gloo listens on the address of this machine's name; where it has none, ranks cannot meet."""
    answer, error = ask_python(
        "import socket; answer['name'] = socket.gethostname()\n"
        "answer['address'] = socket.gethostbyname(answer['name'])",
        timeout_s=10,
    )
    if error:
        return Finding(
            "warn",
            "host-name",
            error,
            "export GLOO_SOCKET_IFNAME=lo on one machine, else its network interface",
        )
    return Finding("ok", "host-name", f"{answer['name']} is {answer['address']}")
