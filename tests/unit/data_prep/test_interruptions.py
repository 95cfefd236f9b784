"""Runs that are killed, refused, sharded: the same command goes on and the bytes are those of one whole run."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from hmoe_megatron.tools.data_prep import encoding, shard
from tests.rows import rarely
from tests.unit.data_prep.calls import (
    ROOT,
    argv_of,
    contents,
    left_in,
    make_texts,
    preprocess,
    preprocess_data,
    read_data_set,
    write_jsonl,
)

KILLS = 24
TIMEOUT_S = 60


def forked(argv: list[str], before=lambda: None) -> multiprocessing.Process:
    """The tool in a process of its own; `before` is called there first."""

    def call():
        tqdm.set_lock(threading.RLock())  # its own is shared with forked processes, and a killed one may hold it
        before()
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  lives as long as the process
        os._exit(preprocess_data.main(argv))

    process = multiprocessing.get_context("fork").Process(target=call)
    process.start()
    return process


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(holds, what: str) -> None:
    end_s = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < end_s, what
        time.sleep(0.005)


def kill(process, *others: int) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    wait_until(lambda: not any(map(is_running, others)), "a worker outlived the run")


@pytest.fixture
def work(tmp_path, monkeypatch, small_blocks):
    """(argv of a run, what it writes): several files, keys and bad records; it commits after each block."""
    monkeypatch.setattr(shard, "COMMIT_S", 0.0)
    rng = random.Random(7)
    for number in range(3):
        lines = [
            json.dumps({"a": " ".join(str(rng.randrange(100)) for _ in range(rng.randint(1, 40))), "b": "7 8"})
            for _ in range(150)
        ]
        for bad in ('{"a": "1"', "", '{"a": "1"}', '{"a": "100", "b": "1"}', "null"):
            lines.insert(rng.randrange(len(lines)), bad)
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    flags = ("--json-keys", "a", "b", "--append-eod", "--on-bad-record", "quarantine")
    (tmp_path / "whole").mkdir()
    assert preprocess(tmp_path / "*.jsonl", prefix=tmp_path / "whole" / "out", flags=flags) == 0
    assert len(contents(tmp_path / "whole")) == 7
    return argv_of(tmp_path / "*.jsonl", prefix=tmp_path / "out", flags=flags), contents(tmp_path / "whole")


@pytest.mark.parametrize("workers", [2, *rarely(1)])
def test_killed_at_random_moments(workers, work, tmp_path):
    """After each kill the same command goes on; whenever a run ends by itself its bytes are those of a whole one."""
    argv, whole = work[0] + ["--workers", str(workers)], work[1]
    rng, kills, ends, resumed = random.Random(workers), 0, 0, 0
    started_s = time.monotonic()
    process = forked(argv)
    process.join()
    duration_s = time.monotonic() - started_s
    while kills < KILLS // 2 or not resumed:
        if process.exitcode == 0:
            assert contents(tmp_path) == whole
            ends += 1
            for name in left_in(tmp_path):
                (tmp_path / name).unlink()
        else:
            kills += 1
            partial = tmp_path / ".out.partial" / shard.STATE
            resumed += partial.exists() and json.loads(partial.read_text())["progress"]["records"] > 0
        process = forked(argv)
        time.sleep(rng.uniform(0, duration_s))
        if process.is_alive():
            kill(process, *children_of(process.pid))
        process.join()
    if process.exitcode:
        process = forked(argv)
        process.join()
    assert process.exitcode == 0 and contents(tmp_path) == whole


@pytest.mark.parametrize("function", ["os.replace", "os.fsync", *rarely("os.link", "os.unlink", "shutil.rmtree")])
def test_killed_before_any_operation_of_publishing(function, work, tmp_path, monkeypatch):
    """Before the first, the second, ... call of it; the last .idx is there only when all is."""
    argv, whole = work
    monkeypatch.setattr(shard, "COMMIT_S", 1e9)
    module, name = {"os": os, "shutil": shutil}[function.split(".")[0]], function.split(".")[1]
    number, code = 0, None
    while code != 0:
        number += 1
        assert number < 60

        def arm(left=number):
            stock, calls = getattr(module, name), iter(range(left - 1, -1, -1))

            def killing(*args, **named):
                if next(calls) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return stock(*args, **named)

            setattr(module, name, killing)

        for path in tmp_path.glob("*out*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(tmp_path / ".out.partial", ignore_errors=True)
        process = forked(argv, arm)
        process.join()
        code = process.exitcode
        for key in "ab":
            if (tmp_path / f"out_{key}_document.idx").exists():
                for suffix in ("bin", "idx", "json"):
                    name_of = f"out_{key}_document.{suffix}"
                    assert (tmp_path / name_of).read_bytes() == whole[name_of]
        again = forked(argv)
        again.join()
        assert again.exitcode == 0 and contents(tmp_path) == whole, f"{function} number {number}"
    assert number > 1


def test_a_merge_that_is_killed_is_finished_by_the_next(work, tmp_path):
    argv, whole = work
    for number in range(3):
        assert preprocess_data.main([*argv, "--shard", f"{number}/3"]) == 0
    shards = tmp_path / "shards"
    shards.mkdir()
    for path in tmp_path.glob(".out.partial*"):
        shutil.copytree(path, shards / path.name)
    number, code = 0, None
    while code != 0:
        number += 1

        def arm(left=number):
            stock, calls = shutil.rmtree, iter(range(left - 1, -1, -1))

            def killing(*args, **named):
                if next(calls) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return stock(*args, **named)

            shutil.rmtree = killing

        for name in left_in(tmp_path):
            shutil.rmtree(tmp_path / name) if (tmp_path / name).is_dir() else (tmp_path / name).unlink()
        shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
        process = forked([*argv, "--merge", "3"], arm)
        process.join()
        code = process.exitcode
        assert preprocess_data.main([*argv, "--merge", "3"]) == 0
        assert contents(tmp_path) == whole  # and no folder is left
    assert number == 5  # building, and three folders


def test_two_kills_between_commits(tmp_path, monkeypatch, small_blocks):
    """What was written and not committed is cut off, and the next commit counts from there."""
    corpus = tmp_path / "in.jsonl"
    corpus.write_text('{"text": "1"}\n' * 100 + "{}\n" * 100 + '{"text": "2"}\n' * 400)
    flags = ("--on-bad-record", "quarantine")
    real, commits = shard.Shard.add, []

    def add(self, *args):
        shard.COMMIT_S = 0.0 if len(commits) in plan else 1e9
        commits.append(0)
        if len(commits) > stop:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(shard, "COMMIT_S", 1e9)
    monkeypatch.setattr(shard.Shard, "add", add)
    argv = argv_of(corpus, prefix=tmp_path / "out", flags=flags)
    plan, stop = {1}, 4  # committed before the bad records, killed after some of them
    assert preprocess_data.main(argv) == 130
    commits.clear()
    plan, stop = {0}, 1  # committed again before any bad record, killed
    assert preprocess_data.main(argv) == 130
    commits.clear()
    plan, stop = set(), 10**6
    assert preprocess_data.main(argv) == 0
    assert read_data_set(tmp_path / "out") == [[1]] * 100 + [[2]] * 400
    assert len((tmp_path / "out.quarantine.jsonl").read_text().splitlines()) == 100


def test_another_way_to_the_ids_starts_again(work, tmp_path, capsys):
    argv, _ = work
    assert preprocess_data.main([*argv, "--max-bad-records", "9"]) == 2
    assert preprocess_data.main([*argv, "--stock-tokenizer"]) == 2
    assert "of other stock_tokenizer" in capsys.readouterr().err


def test_skipped_records_leave_no_quarantine(tmp_path, capsys):
    corpus = tmp_path / "in.jsonl"
    corpus.write_text('{"text": "1"}\n{}\n')
    (tmp_path / "out.quarantine.jsonl").write_text("of an older run")
    assert preprocess(corpus, prefix=tmp_path / "out", flags=("--on-bad-record", "skip")) == 0
    assert "missing_key 1; " in capsys.readouterr().out
    assert not (tmp_path / "out.quarantine.jsonl").exists()


def test_a_killed_run_leaves_no_name_and_no_process(sp_model, tmp_path, monkeypatch):
    corpus = write_jsonl(tmp_path / "in.jsonl", make_texts(2000) * 10)
    argv = argv_of(corpus, prefix=tmp_path / "out", model=sp_model, flags=("--workers", "2"))
    monkeypatch.setattr(shard, "COMMIT_S", 0.0)
    process = forked(argv)
    partial = tmp_path / ".out.partial" / "0.bin"
    wait_until(lambda: partial.exists() and partial.stat().st_size and len(children_of(process.pid)) == 2, "no start")
    kill(process, *children_of(process.pid))
    assert left_in(tmp_path) == [".out.partial"]


@pytest.mark.parametrize("shards", [2, 3, 5])
def test_shards_merge_to_the_bytes_of_one_run(shards, work, tmp_path, capsys):
    argv, whole = work
    for number in reversed(range(shards)):
        assert preprocess_data.main([*argv, "--merge", str(shards)]) == 2
        assert f"--merge {shards}: nothing is there of --shard 0/{shards}" in capsys.readouterr().err
        assert preprocess_data.main([*argv, "--shard", f"{number}/{shards}"]) == 0
    assert not any(name.endswith(".idx") for name in left_in(tmp_path))
    assert preprocess_data.main([*argv, "--merge", str(shards)]) == 0
    assert contents(tmp_path) == whole
    assert preprocess_data.main([*argv, "--merge", str(shards)]) == 0
    assert "nothing done" in capsys.readouterr().out
    assert preprocess_data.main(argv) == 0  # one run makes the same data set


def test_a_shard_that_is_not_finished_is_not_merged(work, tmp_path, capsys, monkeypatch):
    argv, _ = work
    assert preprocess_data.main([*argv, "--shard", "0/2"]) == 0
    bad = [word if word != "quarantine" else "stop" for word in argv]
    assert preprocess_data.main([*bad, "--shard", "1/2"]) == 2
    capsys.readouterr()
    assert preprocess_data.main([*argv, "--merge", "2"]) == 2
    assert "--shard 1/2 is not finished" in capsys.readouterr().err


def test_line_numbers_of_a_shard_are_those_of_the_file(work, tmp_path):
    argv, _ = work
    for number in range(4):
        assert preprocess_data.main([*argv, "--shard", f"{number}/4"]) == 0
        for line in (tmp_path / f".out.partial-{number}-of-4" / shard.QUARANTINE).read_text().splitlines():
            record = json.loads(line)
            assert Path(record["file"]).read_text().splitlines()[record["line"] - 1] == record["raw"]


MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
NO_MPIRUN = MPIRUN is None


def by_mpirun(argv):
    command = [MPIRUN, "-n", "2", sys.executable, str(ROOT / "tools/preprocess_data.py"), *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.campaign
@pytest.mark.skipif(NO_MPIRUN, reason="no mpirun is installed")
def test_mpirun_makes_the_same_bytes(work, tmp_path):
    argv, whole = work
    done = by_mpirun(argv)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == whole


@pytest.mark.campaign
@pytest.mark.skipif(NO_MPIRUN, reason="no mpirun is installed")
def test_mpirun_ends_on_every_process_where_one_meets_a_bad_record(work, tmp_path):
    done = by_mpirun([word if word != "quarantine" else "stop" for word in work[0]])
    assert done.returncode != 0 and ".jsonl:" in done.stderr and "correct the record" in done.stderr
    assert not any(name.endswith(".idx") for name in left_in(tmp_path))


def test_other_flags_and_input_are_refused_until_the_work_is_removed(work, tmp_path, capsys):
    argv, whole = work
    stop = [word if word != "quarantine" else "stop" for word in argv]
    assert preprocess_data.main(stop) == 2
    capsys.readouterr()
    for other, named in ((["--max-doc-bytes", "77777"], "max_doc_bytes"), (["--json-keys", "a"], "json_keys")):
        assert preprocess_data.main([*argv, *other]) == 2
        error = capsys.readouterr().err
        assert f"of other {named}" in error and "remove the folder" in error
    os.utime(tmp_path / "1.jsonl")
    assert preprocess_data.main(argv) == 2
    assert "of other inputs" in capsys.readouterr().err
    shutil.rmtree(tmp_path / ".out.partial")
    assert preprocess_data.main(argv) == 0
    found = contents(tmp_path)
    assert {name: found[name] for name in whole if not name.endswith("json")} == {
        name: data for name, data in whole.items() if not name.endswith("json")
    }


def test_another_policy_is_refused_once_there_are_bad_records(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shard, "COMMIT_S", 0.0)
    corpus = tmp_path / "in.jsonl"
    corpus.write_text('{"text": "1"}\n{}\n{"text": "2"}\n{}\n')
    limited = ("--on-bad-record", "skip", "--max-bad-records", "1")
    assert preprocess(corpus, prefix=tmp_path / "out", flags=limited) == 2
    state = tmp_path / ".out.partial" / shard.STATE
    assert json.loads(state.read_text())["progress"]["bad"] == {}  # one block: nothing of it is kept
    assert preprocess(corpus, prefix=tmp_path / "out", flags=("--on-bad-record", "quarantine")) == 0
    assert read_data_set(tmp_path / "out") == [[1], [2]]


def test_damaged_state_is_refused(work, tmp_path, capsys):
    argv, _ = work
    assert preprocess_data.main([*argv, "--max-bad-records", "9"]) == 2
    folder = tmp_path / ".out.partial"
    state = (folder / shard.STATE).read_bytes()
    for damage in (b"", b"{}", state[:-5], b"[]"):
        (folder / shard.STATE).write_bytes(damage)
        assert preprocess_data.main(argv) == 2
        assert "remove the folder" in capsys.readouterr().err
    (folder / shard.STATE).write_bytes(state)
    (folder / "0.bin").write_bytes(b"")
    assert preprocess_data.main(argv) == 2
    assert "0.bin: shorter than what was committed" in capsys.readouterr().err


def test_a_dead_worker_ends_the_run_and_its_work_is_kept(tmp_path, monkeypatch, capsys, small_blocks):
    corpus = tmp_path / "in.jsonl"
    corpus.write_text('{"text": "1"}\n' * 200 + '{"text": "13"}\n' + '{"text": "1"}\n' * 200)
    real = encoding.Encoder.encode

    def dying(self, block, kind):
        if b'"13"' in block.data and os.getpid() != owner:
            os._exit(9)
        return real(self, block, kind)

    owner = os.getpid()
    monkeypatch.setattr(encoding.Encoder, "encode", dying)
    assert preprocess(corpus, prefix=tmp_path / "out", flags=("--workers", "2")) == 1
    assert "a worker process died" in capsys.readouterr().err
    assert left_in(tmp_path) == [".out.partial"]
    assert preprocess(corpus, prefix=tmp_path / "out") == 0
    assert len(read_data_set(tmp_path / "out")) == 401


def test_a_full_disk_ends_the_run_and_its_work_is_kept(tmp_path, monkeypatch, capsys):
    corpus = write_jsonl(tmp_path / "in.jsonl", ["1 2"] * 50)
    real = shard.Shard.commit

    def full(self, is_done=False):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard.Shard, "commit", full)
    assert preprocess(corpus, prefix=tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and "the same command goes on" in error
    monkeypatch.setattr(shard.Shard, "commit", real)
    assert preprocess(corpus, prefix=tmp_path / "out") == 0
    assert read_data_set(tmp_path / "out") == [[1, 2]] * 50


def test_a_second_run_on_the_same_prefix_is_refused(tmp_path, capsys):
    corpus = write_jsonl(tmp_path / "in.jsonl", ["1"])
    first = shard.Shard(shard.folder_of(tmp_path / "out"), 1, {}, "stop")
    assert preprocess(corpus, prefix=tmp_path / "out") == 2
    assert "another run is writing" in capsys.readouterr().err
    first.remove()
    assert preprocess(corpus, prefix=tmp_path / "out") == 0
