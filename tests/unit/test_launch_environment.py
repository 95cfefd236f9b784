"""What a process finds in its environment about the rank it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hmoe_megatron.launch.nodes import gpus_here
from hmoe_megatron.launch.process import check_rank_environment
from tests.distributed.pretrain_run import start
from tests.distributed.ranks import run_alone
from tests.distributed.training_run import TINY
from tests.rows import rarely

ROOT = Path(__file__).parents[2]


def test_an_empty_variable_is_not_set():
    environment = {"RANK": "", "WORLD_SIZE": " ", "LOCAL_RANK": "", "HOME": ""}
    check_rank_environment(environment)
    assert environment == {"HOME": ""}
    whole = {"RANK": "1", "WORLD_SIZE": "2"}
    check_rank_environment(whole)
    assert whole == {"RANK": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one' in the environment is no number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, "LOCAL_RANK='-1'"),
        ({"RANK": "0"}, "RANK is in the environment without WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is in the environment without RANK"),
    ],
)
def test_what_names_no_rank_is_refused(environment, said):
    with pytest.raises(ValueError, match=said):
        check_rank_environment(environment)


@pytest.mark.parametrize(
    "words", [["pretrain_hmoe.py"], *rarely(["tools/profile_hardware.py", "--output", "any.json"])]
)
def test_the_commands_say_it_in_one_line(words, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, ROOT / words[0], *words[1:]]
    ended = subprocess.run(command, env=environment | {"RANK": "x"}, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2
    assert [line for line in ended.stderr.splitlines() if "error: " in line or "profile_hardware: " in line] == [
        next(line for line in ended.stderr.splitlines() if "RANK='x' in the environment is no number" in line)
    ]
    assert "Traceback" not in ended.stderr and list(tmp_path.iterdir()) == []


def refused_under_torchrun(error_file):
    os.environ["TORCHELASTIC_ERROR_FILE"] = error_file
    return start([*TINY, "--lr", "-1"])


def test_torchruns_report_ends_with_the_reason(tmp_path):
    """Of a rank that does not print it, too. The report is torch's own, from the file that it gives each rank."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    file = str(tmp_path / "error.json")
    code, said = run_alone(refused_under_torchrun, file)
    reason = said[said.index("pretrain_hmoe.py: error: ") :].strip()
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file=file)
    report = str(ChildFailedError("pretrain_hmoe.py", {0: failure}))
    told = "\n".join(line.strip() for line in report.partition("  traceback : ")[2].splitlines()[:-1])
    assert told == reason and code == 2 and "--lr -1.0: give a number above 0" in reason


def test_gpus_are_counted_by_their_files_and_by_what_is_visible(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    devices = str(tmp_path / "nvidia[0-9]*")
    counts = {None: 3, "": 0, "0,2": 2, "-1": 0, "1,-1,2": 1, "0,1,2,3": 3, " GPU-1f, GPU-2e ": 2}
    for visible, count in counts.items():
        environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
        assert gpus_here(environment, devices) == count, visible
    assert gpus_here({"CUDA_VISIBLE_DEVICES": "0"}, str(tmp_path / "none*")) == 0
