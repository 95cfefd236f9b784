"""tools/launch.py with ranks that only say who they are and end as the test wants; real training: tests/distributed."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hmoe_megatron.launch.nodes import reserved_port
from tests.rows import rarely
from tests.unit.forked_launcher import ForkedLauncher

LAUNCH = Path(__file__).parents[2] / "tools" / "launch.py"
TIMEOUT_S = 120  # to import torch takes a launcher ten seconds on two busy cores

# A rank: writes its environment to a file of its own, then does what `plan.json` says for its rank and attempt.
RANK = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
here = Path(sys.argv[sys.argv.index("--save") + 1])
rank = os.environ["RANK"]
attempt = len(list(here.glob(f"rank{rank}.*")))
def on_term(number, frame):
    if (here / "slow").exists():
        time.sleep(7)  # longer than the grace after a failure
    if (here / "child").exists():
        child.wait()
    (here / f"signal{number}.rank{rank}").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, on_term)
signal.signal(signal.SIGINT, on_term)
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
note = {name: os.environ[name] for name in names} | {"pid": os.getpid(), "time": time.time()}
temporary = here / f"tmp{rank}"
temporary.write_text(json.dumps(note))
temporary.rename(here / f"rank{rank}.{attempt}")
plan = json.loads((here / "plan.json").read_text()).get(rank, [])
for word in (plan[min(attempt, len(plan) - 1)] if plan else "").split():
    what, _, value = word.partition(":")
    if what == "save":
        (here / "latest_checkpointed_iteration.txt").write_text(value)
    elif what == "together":  # until this many ranks have come so far
        while len(list(here.glob(f"rank*.{attempt}"))) < int(value):
            time.sleep(0.02)
    elif what == "child":
        child = subprocess.Popen(["sleep", "600"])
        (here / "child.tmp").write_text(str(child.pid))
        (here / "child.tmp").rename(here / "child")
    elif what == "kill":
        os.kill(os.getpid(), int(value))
    elif what == "exit":
        sys.exit(int(value))
    elif what == "hang":
        time.sleep(600)
"""


def free_port():
    with reserved_port() as free:
        return free.getsockname()[1]


def by_itself(words, environment):
    """The command as a user starts it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(LAUNCH), *words], env=environment, **pipes)


class Run:
    """Launchers of one run on this host, and what its ranks wrote."""

    def __init__(self, folder, plan, nodes=1):
        self.folder, self.nodes, self.port, self.launchers = folder, nodes, free_port(), {}
        (folder / "rank.py").write_text(RANK)
        (folder / "plan.json").write_text(json.dumps(plan))

    def launch(self, *flags, node=0, ranks=2, nodes=None, start=ForkedLauncher, **environment):
        names = {"NNODES": nodes or self.nodes, "NODE_RANK": node, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.port}
        environment = os.environ | {name: str(value) for name, value in (names | environment).items()}
        words = ["--nproc-per-node", ranks, "--backoff", "0.1", *flags]
        words += [self.folder / "rank.py", "--save", self.folder, "--load", self.folder]
        launcher = start(list(map(str, words)), environment)
        self.launchers[launcher.pid] = launcher
        return launcher

    def launch_all(self, *flags):
        """A launcher on each node, of one rank, and all ranks started."""
        launchers = [self.launch(*flags, node=node, ranks=1) for node in range(self.nodes)]
        for rank in range(self.nodes):
            self.note(rank)
        return launchers

    def note(self, rank, attempt=0):
        """What the rank wrote in that attempt; waits for it."""
        path, until = self.folder / f"rank{rank}.{attempt}", time.monotonic() + TIMEOUT_S
        while not path.exists():
            assert time.monotonic() < until, f"no {path.name}: {sorted(p.name for p in self.folder.iterdir())}"
            time.sleep(0.02)
        return json.loads(path.read_text())

    def attempts(self, rank):
        return len(list(self.folder.glob(f"rank{rank}.*")))

    def pids(self):
        return [json.loads(path.read_text())["pid"] for path in self.folder.glob("rank*.?")]

    def close(self):
        for launcher in self.launchers.values():
            launcher.kill()
            launcher.communicate()


@pytest.fixture
def start(tmp_path):
    runs = []

    def start(plan, **more):
        runs.append(Run(tmp_path, plan, **more))
        return runs[-1]

    yield start
    for run in runs:
        run.close()
        assert_gone(run.pids())


def ended(launcher):
    """(exit code, what it said in lines)."""
    _, err = launcher.communicate(timeout=TIMEOUT_S)
    return launcher.returncode, err.splitlines()


def assert_gone(pids):
    until = time.monotonic() + TIMEOUT_S
    while alive := [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < until, f"still there: {alive}"
        time.sleep(0.02)


def test_ranks_of_two_nodes_know_where_they_are(start):
    run = start({}, nodes=2)
    launchers = [run.launch(node=1, ranks=1), run.launch(node=0, ranks=2)]  # of different size, the second first
    assert [ended(launcher) for launcher in launchers] == [(0, []), (0, [])]
    notes = [run.note(rank) for rank in range(3)]
    assert [note["LOCAL_RANK"] for note in notes] == ["0", "1", "0"]
    assert [note["LOCAL_WORLD_SIZE"] for note in notes] == ["2", "2", "1"]
    assert {note["WORLD_SIZE"] for note in notes} == {"3"}
    assert len({(note["MASTER_ADDR"], note["MASTER_PORT"]) for note in notes}) == 1


def test_a_killed_rank_starts_all_again_with_one_line(start):
    run = start({"0": ["together:2 exit:1", ""], "1": ["together:2 kill:9", ""]})
    code, lines = ended(run.launch(start=by_itself))
    assert (code, len(lines)) == (0, 1), lines
    assert lines[0].startswith("launch: rank ") and socket.gethostname() in lines[0]
    assert lines[0].endswith("restart 1 of 10 from the beginning in 0.1 s")
    assert run.attempts(0) == run.attempts(1) == 2
    assert run.note(0, 0)["MASTER_PORT"] != run.note(0, 1)["MASTER_PORT"], "a fresh rendezvous"


def test_a_rank_that_hangs_beside_a_failed_one_is_killed_with_its_children(start):
    run = start({"0": ["child hang"], "1": ["together:2 kill:11"]})
    code, lines = ended(run.launch("--restarts", "0"))
    assert code == 1 and len(lines) == 1
    assert "rank 1 on" in lines[0] and "killed by SIGSEGV: 0 restarts without a new checkpoint, giving up" in lines[0]
    assert_gone([int((run.folder / "child").read_text())])


def test_a_refusal_is_not_retried(start):
    run = start({"0": ["exit:1"], "1": ["exit:3"]}, nodes=2)
    launchers = run.launch_all()
    assert [ended(launcher)[0] for launcher in launchers] == [3, 3]
    assert run.attempts(0) == run.attempts(1) == 1


def test_restarts_are_used_up_with_growing_waits(start):
    run = start({"0": ["exit:7"]})
    code, lines = ended(run.launch("--restarts", "3", "--backoff", "0.3", "--max-backoff", "0.5", ranks=1))
    assert code == 1 and len(lines) == 4
    assert [line.rsplit("in ", 1)[1] for line in lines[:3]] == ["0.3 s", "0.5 s", "0.5 s"]
    assert lines[3].endswith("ended with exit code 7: 3 restarts without a new checkpoint, giving up")
    times = [run.note(0, attempt)["time"] for attempt in range(4)]
    assert run.attempts(0) == 4 and times[1] - times[0] > 0.3 and times[2] - times[1] > 0.5


def test_a_new_checkpoint_gives_the_restarts_back(start):
    run = start({"0": ["save:5 exit:7", "save:9 exit:7", "save:9 exit:7", ""]})
    code, lines = ended(run.launch("--restarts", "2", ranks=1))
    assert code == 0
    said = [line.split("restart ")[1].split(" in")[0] for line in lines]
    assert said == ["1 of 2 from step 5", "1 of 2 from step 9", "2 of 2 from step 9"]


def test_a_signal_reaches_the_ranks_of_all_nodes_and_ends_the_run(start):
    run = start({str(rank): ["hang"] for rank in range(2)}, nodes=2)
    launchers = run.launch_all()
    launchers[1].send_signal(signal.SIGTERM)
    assert [ended(launcher) for launcher in launchers] == [(143, [])] * 2
    assert sorted(path.name for path in run.folder.glob("signal*")) == ["signal15.rank0", "signal15.rank1"]
    assert run.attempts(0) == 1


def test_ctrl_c_reaches_what_a_rank_started(start):
    run = start({"0": ["child hang"]})  # which waits for its child before it ends
    launcher = run.launch(ranks=1)
    while not (run.folder / "child").exists():
        run.note(0)
    launcher.send_signal(signal.SIGINT)
    assert ended(launcher)[0] == 130 and (run.folder / "signal2.rank0").exists()


def test_a_signal_to_all_launchers_at_once_lets_the_ranks_save(start):
    """As Slurm sends it: the launchers' messages cross."""
    run = start({str(rank): ["hang"] for rank in range(2)}, nodes=2)
    (run.folder / "slow").touch()
    launchers = run.launch_all()
    for launcher in launchers:
        launcher.send_signal(signal.SIGTERM)
    assert [ended(launcher) for launcher in launchers] == [(143, [])] * 2
    assert len(list(run.folder.glob("signal*"))) == 2, "both came to their end"


def test_a_second_signal_kills(start):
    run = start({str(rank): ["hang"] for rank in range(2)}, nodes=2)
    (run.folder / "slow").touch()
    launchers = run.launch_all()
    for _ in range(2):
        launchers[0].send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert [ended(launcher)[0] for launcher in launchers] == [130, 130]
    assert not (run.folder / "signal2.rank0").exists()


def test_a_signal_while_it_waits_for_a_restart_ends_it(start):
    run = start({"0": ["exit:1"]})
    launcher = run.launch("--backoff", "100", ranks=1)
    assert "in 100 s" in launcher.stderr.readline()
    launcher.send_signal(signal.SIGTERM)
    assert ended(launcher)[0] == 143 and run.attempts(0) == 1


def test_a_killed_launcher_leaves_no_rank(start):
    run = start({"0": ["hang"], "1": ["hang"]})
    launcher = run.launch()
    pids = [run.note(rank)["pid"] for rank in range(2)]
    launcher.kill()
    assert_gone(pids)


@pytest.mark.parametrize("killed", [0, *rarely(1)])  # node 1 is lost only after 20 s of silence
def test_a_launcher_that_was_killed_may_come_back(start, killed):
    run = start({"0": ["hang", ""], "1": ["hang", ""]}, nodes=2)
    launchers = run.launch_all()
    pids = [run.note(rank)["pid"] for rank in range(2)]
    launchers[killed].kill()
    assert_gone([pids[killed]])
    launchers[killed] = run.launch(node=killed, ranks=1)
    said = [ended(launcher) for launcher in launchers]
    assert [code for code, _ in said] == [0, 0], said
    gone = "the launcher on .* is gone: restart 1 of 10" if killed else "node 0's launcher is gone.* looking for it"
    assert re.search(gone, "\n".join(said[1 - killed][1]))
    assert run.attempts(0) == run.attempts(1) == 2


@pytest.mark.campaign
def test_launchers_that_do_not_find_each_other(start):
    run = start({}, nodes=2)
    for node, said in ((0, "node 1's launcher did not come in 0.5 s"), (1, "node 0 not found at 127.0.0.1:")):
        code, lines = ended(run.launch("--join-timeout", "0.5", node=node, ranks=1))
        assert code == 1 and len(lines) == 1 and said in lines[0]
    assert run.pids() == []


def test_a_node_that_is_there_already_and_another_number_of_nodes(start):
    run = start({}, nodes=3)
    run.launch(node=0, ranks=1)
    twice, until = [run.launch(node=1, ranks=1) for _ in range(2)], time.monotonic() + TIMEOUT_S
    code, lines = ended(run.launch(node=1, ranks=1, nodes=2))
    assert code == 2 and "NODE_RANK=1 of NNODES=2, but node 0 has 3" in lines[0]
    while not (late := [launcher for launcher in twice if launcher.poll() is not None]):
        assert time.monotonic() < until
        time.sleep(0.05)
    code, lines = ended(late[0])
    assert code == 2 and "NODE_RANK=1 is taken by another launcher" in lines[0]
    assert run.pids() == []


def test_strangers_at_the_port_do_no_harm(start):
    run = start({}, nodes=2)
    first, second = run.launch(node=0, ranks=1), None
    until = time.monotonic() + TIMEOUT_S
    with contextlib.ExitStack() as visitors:
        while second is None:
            try:
                for noise in (b"GET / HTTP/1.1\r\n\r\n", b"x" * 100_000):
                    visitor = visitors.enter_context(socket.create_connection(("127.0.0.1", run.port), timeout=10))
                    with contextlib.suppress(ConnectionError):  # closed with our words unread
                        visitor.sendall(noise)
                second = run.launch(node=1, ranks=1)
            except ConnectionRefusedError:
                assert time.monotonic() < until
                time.sleep(0.05)
        assert [ended(first), ended(second)] == [(0, []), (0, [])]


def test_a_port_in_use(start):
    run = start({}, nodes=2)
    with socket.create_server(("", run.port)):
        code, lines = ended(run.launch(node=0, ranks=1))
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith(f"launch.py: error: MASTER_PORT={run.port}: Address already in use on this host")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("pretrain_hmoe.py --save a", "no --load: a restart would begin anew; add --save DIR --load DIR"),
        ("pretrain_hmoe.py --lr 1", "no --save and no --load"),
        ("pretrain_hmoe.py --save=a --load b", "--save a is not --load b"),
        ("nowhere.py --save a --load a", "nowhere.py: no such file"),
        ("nowhere.args --save a --load a", "nowhere.args"),
        ("--restarts -1 pretrain_hmoe.py --save a --load a", "--restarts: give a number of at least 0"),
        ("--backoff nan pretrain_hmoe.py --save a --load a", "--backoff: give a number"),
        ("--nproc 2 pretrain_hmoe.py --save a --load a", "unrecognized arguments: --nproc"),
    ],
)
def test_refused(words, said):
    command = [sys.executable, LAUNCH, *words.split()]
    done = subprocess.run(command, cwd=LAUNCH.parents[1], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_no_torch_up_to_the_dry_run():
    code = "import sys; sys.path.insert(0, 'tools'); import launch; done = launch.main(sys.argv[1:]); "
    words = "--nproc-per-node 2 --dry-run pretrain_hmoe.py --save a --load a".split()
    command = [sys.executable, "-c", code + "sys.exit(done or 'torch' in sys.modules)", *words]
    assert subprocess.run(command, cwd=LAUNCH.parents[1], timeout=TIMEOUT_S).returncode == 0
