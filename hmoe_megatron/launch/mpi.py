"""Ranks that mpirun started: who they are goes into the environment as torchrun would set it, and MPI ends."""

import functools
import importlib.util
import os
import socket
from collections.abc import Mapping

from hmoe_megatron.launch.nodes import own_address, reserved_port, tell_gloo

# (rank, size) in the environment, by MPI: OpenMPI; MPICH, Intel MPI and srun --mpi=pmi2.
NAMES = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))
OUTSIDE = "192.0.2.1"  # no host has it (RFC 5737): the way there is the default route


def process_of(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """(rank, size) that an MPI launcher gave this process; None where it did not, or gave it no company.

    Slurm's own variables say nothing of MPI: a task of srun has them also where it starts torchrun."""
    for names in NAMES:
        rank, size = (environment.get(name, "") for name in names)
        if rank.isdecimal() and size.isdecimal() and int(size) > 1:
            return int(rank), int(size)
    return None


def start_mpi(size: int):
    """mpi4py's MPI, started, of `size` processes. ValueError where mpi4py is missing or belongs to another MPI."""
    mismatch = f"mpirun started {size} processes and mpi4py"
    if importlib.util.find_spec("mpi4py") is None:
        remedy = "pip install mpi4py, with the MPI of this mpirun, or start with torchrun"
        raise ValueError(f"{mismatch} is missing: {remedy}")
    try:
        from mpi4py import MPI  # starts MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: no libmpi was found
        remedy = "reinstall mpi4py with the MPI of this mpirun"
        raise ValueError(f"{mismatch} does not find its MPI ({error}): {remedy}") from None
    if (seen := MPI.COMM_WORLD.Get_size()) != size:
        why = f"it was built for another MPI ({MPI.get_vendor()[0]}) than this mpirun"
        raise ValueError(f"{mismatch} sees {seen}: {why}; reinstall it or use the mpirun of that MPI")
    return MPI


def set_environment_from_mpi() -> bool:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and end MPI.

    False, with nothing done, where no MPI launcher started this process or RANK is set. MASTER_ADDR and MASTER_PORT of
    rank 0 win where they are set. ValueError where mpi4py is missing or belongs to another MPI than the launcher.
    """
    process = process_of(os.environ)
    if process is None or "RANK" in os.environ:
        return False
    rank, size = process
    MPI = start_mpi(size)
    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    one_host = world.allreduce(node.Get_size(), MPI.MIN) == size
    place = None
    if rank == 0:
        place = (
            os.environ.get("MASTER_ADDR") or ("127.0.0.1" if one_host else address_for_others()),
            os.environ.get("MASTER_PORT") or str(_held().getsockname()[1]),
        )
    address, port = world.bcast(place)
    os.environ |= {
        "RANK": str(world.Get_rank()),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(node.Get_rank()),
        "LOCAL_WORLD_SIZE": str(node.Get_size()),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    node.Free()
    MPI.Finalize()
    tell_gloo(1 if one_host else 2, address)
    return True


_held = functools.cache(reserved_port)  # for as long as this process lives


def address_for_others() -> str:
    """An address of this host that others may reach: of its name, unless that is the loopback, or of the default
    route, else its name."""
    try:
        named = socket.gethostbyname(socket.gethostname())
    except OSError:
        named = "127."
    if not named.startswith("127."):
        return named
    return own_address(OUTSIDE) or socket.gethostname()
