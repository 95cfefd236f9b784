"""pretrain_hmoe.py as ranks of mpirun, with the mpich and mpi4py of the registry."""

import shutil
import sys
from pathlib import Path

import pytest

from tests.distributed.commands import FLAGS, finish, start, steps
from tests.distributed.pretrain_run import pretrain
from tests.distributed.ranks import run_ranks
from tests.rows import rarely

MPIRUN = Path(sys.executable).with_name("mpirun")
NO_MPI = not (MPIRUN.exists() or shutil.which("mpirun"))
LINE = "pretrain_hmoe.py: error: mpirun started 2 processes and mpi4py sees 1"


def all_mock_data():
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset

    from tests.distributed.preloaded import MOCK_DOCUMENTS

    MockGPTLowLevelDataset.size = MOCK_DOCUMENTS


@pytest.mark.skipif(NO_MPI, reason="no mpirun: pip install mpich mpi4py")
def test_mpirun_trains_as_torchrun_does():
    flags = ["pretrain_hmoe.py", *FLAGS, "--train-iters", "3"]
    by_mpi = steps(finish(start(MPIRUN if MPIRUN.exists() else "mpirun", "-n", "2", sys.executable, *flags)))
    ranks = run_ranks(2, pretrain, "--expert-model-parallel-size 2 --train-iters 3", all_mock_data)
    by_torchrun = steps("\n".join(rank.output for rank in ranks))  # the environment that torchrun sets
    assert len(by_mpi) == 3 and by_mpi == by_torchrun


@pytest.mark.parametrize(("rank", "lines"), rarely(("0", 1), ("1", 0)))
def test_an_mpirun_that_is_not_mpi4pys_is_refused_in_one_line(rank, lines):
    pytest.importorskip("mpi4py")
    output = finish(start(sys.executable, "-W", "ignore", "pretrain_hmoe.py", *FLAGS, PMI_RANK=rank, PMI_SIZE="2"), 2)
    assert output.count(LINE) == lines and "Traceback" not in output
