"""The helper that runs ranks: results, a failing rank, a hanging rank, a dying rank."""

import os
import sys
import time

import pytest
import torch

from tests.distributed import ranks
from tests.distributed.ranks import end_ranks, run_ranks


class OwnError(Exception):
    def __init__(self, a, b):  # does not pickle
        super().__init__(f"{a} and {b}")


def _sum(offset, times=1):
    total = torch.tensor([torch.distributed.get_rank() + offset])
    torch.distributed.all_reduce(total)
    return torch.distributed.get_rank(), total * times


def _environment():
    return (
        os.environ["RANK"],
        os.environ["WORLD_SIZE"],
        os.environ["MARK"],
        os.environ["OMP_NUM_THREADS"],
        torch.get_num_threads(),
        "megatron.training.training" in sys.modules,
    )


def _fail_on_rank_1():
    if torch.distributed.get_rank() == 1:
        print("words before the fall")
        raise ValueError("the reason")
    torch.distributed.barrier()


def _own_error():
    raise OwnError("this", "that")


def _hang_on_rank_1(pid_file):
    if torch.distributed.get_rank() == 1:
        if os.fork() == 0:
            with open(pid_file, "w") as file:
                file.write(str(os.getpid()))
            time.sleep(600)
        time.sleep(600)


def _die():
    os._exit(7)


def test_results_come_back_in_rank_order():
    assert run_ranks(2, _sum, 5, times=2) == [(0, torch.tensor([22])), (1, torch.tensor([22]))]


def test_one_rank_and_unequal_numbers_of_ranks_after_each_other():
    assert [value.item() for _, value in run_ranks(1, _sum, 0) + run_ranks(3, _sum, 0)] == [0, 3, 3, 3]


def test_ranks_see_the_callers_environment(monkeypatch):
    monkeypatch.setenv("MARK", "seen")
    assert run_ranks(2, _environment) == [("0", "2", "seen", "1", 1, True), ("1", "2", "seen", "1", 1, True)]


def test_the_error_of_a_rank_is_raised_with_its_traceback_and_output():
    started = time.monotonic()
    with pytest.raises(ValueError, match="the reason") as raised:
        run_ranks(2, _fail_on_rank_1)
    notes = "\n".join(raised.value.__notes__)
    assert "on rank 1 of 2" in notes and "in _fail_on_rank_1" in notes and "words before the fall" in notes
    assert time.monotonic() - started < 30


def test_an_error_that_does_not_pickle_is_named():
    with pytest.raises(RuntimeError, match="OwnError: this and that"):
        run_ranks(1, _own_error)


def test_hanging_ranks_are_killed_with_what_they_started(tmp_path):
    pid_file = tmp_path / "pid"
    with pytest.raises(TimeoutError, match="(?s)still ran after 3.*_hang_on_rank_1"):
        run_ranks(2, _hang_on_rank_1, pid_file, timeout_s=3)
    pid = int(pid_file.read_text())
    for _ in range(50):
        if _gone(pid):
            break
        time.sleep(0.1)
    assert _gone(pid)


def test_a_rank_that_dies_without_a_word():
    with pytest.raises(RuntimeError, match=r"(?s)ranks \[0\] died.*exit code 7"):
        run_ranks(1, _die)


def _end_as(codes):
    os._exit(codes[torch.distributed.get_rank()])


def _leave_a_process():
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)


def _sleep_on_rank_1(seconds):
    if torch.distributed.get_rank() == 1:
        time.sleep(seconds)
    os._exit(9)


def test_how_ranks_end_is_told():
    assert [(end.exit_code, end.told, end.orphans) for end in end_ranks(2, _end_as, [3, 0])] == [
        (3, False, ()),
        (0, False, ()),
    ]


def test_a_rank_that_outlives_another_is_told_to_end(monkeypatch):
    monkeypatch.setattr(ranks, "ALONE_S", 1.0)
    first, second = end_ranks(2, _sleep_on_rank_1, 600)
    assert (first.exit_code, first.told) == (9, False) and (second.exit_code, second.told) == (-15, True)


def test_a_rank_that_hangs_and_a_process_that_is_left_are_told(monkeypatch):
    monkeypatch.setattr(ranks, "ORPHAN_S", 0.5)
    assert [end.exit_code for end in end_ranks(1, time.sleep, 600, timeout_s=2)] == [None]
    (end,) = end_ranks(1, _leave_a_process)
    assert end.exit_code == 0 and len(end.orphans) == 1
    for _ in range(50):
        if _gone(end.orphans[0]):
            break
        time.sleep(0.1)
    assert _gone(end.orphans[0])


def _gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True
