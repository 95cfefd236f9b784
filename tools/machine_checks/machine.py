"""Probes of the machine: each takes no argument and returns a Finding."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

from hmoe_megatron.tools.machine_checks.finding import GIB, ROOT, Finding, ask_python, ok, warn

RANK_BYTES = 2 * GIB  # of a CPU rank: 0.75 GiB of imports were measured, the rest is for a model of the demo's size
MIN_SHM_BYTES = GIB  # containers start with 64 MiB; NCCL and data loader workers need more
MIN_DISK_BYTES = 10 * GIB  # half of it for the Python packages
MIN_OPEN_FILES = 1024
CGROUP = Path("/sys/fs/cgroup")


def cgroup_limit(name: str) -> list[str]:
    """Words of a cgroup v2 file; "max" where there is none or no limit."""
    try:
        return (CGROUP / name).read_text().split() or ["max"]
    except OSError:
        return ["max"]


def memory_bytes() -> tuple[int, int]:
    """(total, available), the container's limit included."""
    total = available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if os.path.exists("/proc/meminfo"):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    limit, used = cgroup_limit("memory.max")[0], cgroup_limit("memory.current")[0]
    if limit != "max":
        total = min(total, int(limit))
        available = min(available, total - (0 if used == "max" else int(used)))
    return total, max(available, 0)


def cores() -> int:
    """Cores this process may use: affinity and the container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_limit("cpu.max")
    return count if quota[0] == "max" else min(count, max(1, int(quota[0]) // int(quota[1])))


def cpu_ranks() -> int:
    """Ranks that fit without a GPU: one a core, RANK_BYTES each; 0 where memory is too small for one."""
    return min(cores(), memory_bytes()[1] // RANK_BYTES)


def probe_memory() -> Finding:
    total, available = memory_bytes()
    found = f"{available / GIB:.1f} GiB available of {total / GIB:.1f}; {cores()} cores"
    if available < RANK_BYTES:
        return warn(found, f"a rank takes about {RANK_BYTES / GIB:g} GiB: free some first")
    return ok(found)


def probe_shared_memory() -> Finding:
    if not os.path.isdir("/dev/shm"):
        return warn("no /dev/shm", "mount a tmpfs there")
    usage = shutil.disk_usage("/dev/shm")
    found = f"{usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f} in /dev/shm"
    if usage.free < MIN_SHM_BYTES:
        return warn(found, "docker run --shm-size=8g, or --ipc=host; or empty it")
    return ok(found)


def probe_disk() -> Finding:
    free = shutil.disk_usage(str(ROOT)).free
    found = f"{free / GIB:.1f} GiB free at {ROOT}"
    if free < MIN_DISK_BYTES:
        return warn(found, f"packages, data and checkpoints want {MIN_DISK_BYTES // GIB} GiB")
    return ok(found)


def probe_open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        return warn(f"limit {soft}", f"ulimit -n 65536, or the hard limit {hard}")
    return ok("no limit" if soft == resource.RLIM_INFINITY else f"limit {soft}")


def probe_host_name() -> Finding:
    """gloo listens on the address of this machine's name; where it has none, ranks cannot meet."""
    code = "import socket; name = socket.gethostname(); answer.update(name=name, address=socket.gethostbyname(name))"
    answer, error = ask_python(code, timeout_s=10)
    if error:
        return warn(error, "export GLOO_SOCKET_IFNAME=lo on one machine, else its network interface")
    return ok(f"{answer['name']} is {answer['address']}")
