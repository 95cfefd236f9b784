"""Who a process of mpirun is, with MPI played by a stand-in; mpich's own: tests/distributed/test_mpi.py."""

import importlib.util
import os
import sys
import types

import pytest

from hmoe_megatron.launch import mpi

OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(
    ("environment", "process"),
    [
        ({"PMI_RANK": "1", "PMI_SIZE": "4"}, (1, 4)),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, (0, 2)),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, None),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "3"}, None),
        ({"PMIX_RANK": "3", "SLURM_PROCID": "3"}, None),
        ({"PMI_RANK": "x", "PMI_SIZE": "4"}, None),
        ({}, None),
    ],
)
def test_what_an_mpi_launcher_leaves_in_the_environment(environment, process):
    assert mpi.process_of(environment) == process


class Communicator:
    """Rank ``rank`` of ``size``, ``on_node`` of them on this host, the first of them rank ``first``."""

    def __init__(self, rank, size, on_node=None, first=0, sent=None):
        self.rank, self.size, self.on_node, self.first, self.sent = rank, size, on_node, first, sent

    def Get_rank(self):
        return self.rank

    def Get_size(self):
        return self.size

    def Split_type(self, kind):
        assert kind == "shared"
        return Communicator(self.rank - self.first, self.on_node)

    def allreduce(self, value, operation):
        assert operation == "min"
        return value

    def bcast(self, value):
        return self.sent or value

    def Free(self):
        pass


@pytest.fixture
def started(monkeypatch):
    """started(rank, size, ...): as a process of an mpirun, whose MPI is returned."""
    for name in (*OF_TORCHRUN, "GLOO_SOCKET_IFNAME", *sum(mpi.NAMES, ())):
        monkeypatch.setenv(name, "")  # so that what the code sets is taken back
        monkeypatch.delenv(name)

    def started(rank, size, seen=None, **more):
        finalized = []
        module = types.SimpleNamespace(
            COMM_WORLD=Communicator(rank, seen or size, **more),
            COMM_TYPE_SHARED="shared",
            MIN="min",
            Finalize=lambda: finalized.append(True),
            finalized=finalized,
            get_vendor=lambda: ("MPICH", (5, 0, 2)),
        )
        package = types.ModuleType("mpi4py")
        package.MPI, package.__spec__ = module, importlib.util.spec_from_loader("mpi4py", None)
        monkeypatch.setitem(sys.modules, "mpi4py", package)
        monkeypatch.setenv("PMI_RANK", str(rank))
        monkeypatch.setenv("PMI_SIZE", str(size))
        return module

    return started


def environment():
    return {name: os.environ[name] for name in OF_TORCHRUN}


def test_ranks_of_one_host_meet_on_it(started):
    module = started(0, 4, on_node=4)
    assert mpi.set_environment_from_mpi() and module.finalized == [True]
    port = environment()["MASTER_PORT"]
    assert environment() == dict(zip(OF_TORCHRUN, ("0", "4", "0", "4", "127.0.0.1", port), strict=True))
    assert 0 < int(port) < 65536


def test_a_rank_of_another_host_meets_rank_0_where_it_says(started):
    started(5, 8, on_node=4, first=4, sent=("10.0.0.1", "1234"))
    assert mpi.set_environment_from_mpi()
    assert environment() == dict(zip(OF_TORCHRUN, ("5", "8", "1", "4", "10.0.0.1", "1234"), strict=True))


def test_rank_0_of_several_hosts_gives_an_address_that_others_reach(started, monkeypatch):
    monkeypatch.setattr("socket.gethostbyname", lambda name: "127.0.1.1")  # as Debian has it
    monkeypatch.setattr(mpi, "own_address", lambda towards: "10.1.2.3")
    started(0, 2, on_node=1)
    assert mpi.set_environment_from_mpi() and environment()["MASTER_ADDR"] == "10.1.2.3"


def test_the_users_address_and_port_win(started, monkeypatch):
    started(0, 2, on_node=1)
    monkeypatch.setenv("MASTER_ADDR", "10.9.9.9")
    monkeypatch.setenv("MASTER_PORT", "77")
    assert mpi.set_environment_from_mpi()
    assert (environment()["MASTER_ADDR"], environment()["MASTER_PORT"]) == ("10.9.9.9", "77")


def test_ranks_of_torchrun_are_left_alone(started, monkeypatch):
    module = started(1, 4, on_node=4)
    monkeypatch.setenv("RANK", "0")
    assert not mpi.set_environment_from_mpi() and module.finalized == []


def test_mpi4py_of_another_mpi(started):
    started(1, 4, seen=1, on_node=1)
    with pytest.raises(ValueError, match=r"started 4 processes and mpi4py sees 1: .*\(MPICH\).*reinstall it"):
        mpi.set_environment_from_mpi()


def test_mpi4py_is_missing(started, monkeypatch):
    started(1, 4)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="started 4 processes and mpi4py is missing: pip install mpi4py"):
        mpi.set_environment_from_mpi()


def test_mpi4py_without_a_library(started):
    started(1, 4)
    del sys.modules["mpi4py"].MPI
    with pytest.raises(ValueError, match="mpi4py does not find its MPI"):
        mpi.set_environment_from_mpi()
