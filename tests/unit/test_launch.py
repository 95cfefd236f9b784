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

from hmoe_megatron.launch.nodes import Nodes, interface_towards, nodes_from, own_address, reserved_port, tell_gloo
from hmoe_megatron.launch.policy import TRACKER, Failure, Restarts, cause

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


class Run:
    """Launchers of one run on this host, and what its ranks wrote."""

    def __init__(self, folder, plan, nodes=1):
        self.folder, self.nodes, self.port, self.launchers = folder, nodes, free_port(), {}
        (folder / "rank.py").write_text(RANK)
        (folder / "plan.json").write_text(json.dumps(plan))

    def launch(self, *flags, node=0, ranks=2, nodes=None, **environment):
        names = {"NNODES": nodes or self.nodes, "NODE_RANK": node, "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": self.port} | environment  # fmt: skip
        command = [sys.executable, LAUNCH, "--nproc-per-node", ranks, "--backoff", "0.1", *flags,
                   self.folder / "rank.py", "--save", self.folder, "--load", self.folder]  # fmt: skip
        launcher = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                    env=os.environ | {name: str(value) for name, value in names.items()})  # fmt: skip
        self.launchers[launcher.pid] = launcher
        return launcher

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
    code, lines = ended(run.launch())
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


@pytest.mark.parametrize(("code", "why"), [(2, "settings refused"), (3, "checkpoint refused")])
def test_a_refusal_is_not_retried(start, code, why):
    run = start({"0": ["exit:1"], "1": [f"exit:{code}"]}, nodes=2)
    launchers = [run.launch(node=node, ranks=1) for node in range(2)]
    assert [ended(launcher)[0] for launcher in launchers] == [code, code]
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
    assert [line.split("restart ")[1].split(" in")[0] for line in lines] == [
        "1 of 2 from step 5", "1 of 2 from step 9", "2 of 2 from step 9",
    ]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_ranks_of_all_nodes_and_ends_the_run(start, number):
    run = start({str(rank): ["hang"] for rank in range(2)}, nodes=2)
    launchers = [run.launch(node=node, ranks=1) for node in range(2)]
    for rank in range(2):
        run.note(rank)
    launchers[1].send_signal(number)
    assert [ended(launcher) for launcher in launchers] == [(128 + number, [])] * 2
    assert sorted(path.name for path in run.folder.glob("signal*")) == [f"signal{number}.rank{n}" for n in range(2)]
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
    launchers = [run.launch(node=node, ranks=1) for node in range(2)]
    for rank in range(2):
        run.note(rank)
    for launcher in launchers:
        launcher.send_signal(signal.SIGTERM)
    assert [ended(launcher) for launcher in launchers] == [(143, [])] * 2
    assert len(list(run.folder.glob("signal*"))) == 2, "both came to their end"


def test_a_second_signal_kills(start):
    run = start({str(rank): ["hang"] for rank in range(2)}, nodes=2)
    (run.folder / "slow").touch()
    launchers = [run.launch(node=node, ranks=1) for node in range(2)]
    for rank in range(2):
        run.note(rank)
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


@pytest.mark.parametrize("killed", [0, 1])
def test_a_launcher_that_was_killed_may_come_back(start, killed):
    run = start({"0": ["hang", ""], "1": ["hang", ""]}, nodes=2)
    launchers = [run.launch(node=node, ranks=1) for node in range(2)]
    pids = [run.note(rank)["pid"] for rank in range(2)]
    launchers[killed].kill()
    assert_gone([pids[killed]])
    launchers[killed] = run.launch(node=killed, ranks=1)
    said = [ended(launcher) for launcher in launchers]
    assert [code for code, _ in said] == [0, 0], said
    gone = "the launcher on .* is gone: restart 1 of 10" if killed else "node 0's launcher is gone.* looking for it"
    assert re.search(gone, "\n".join(said[1 - killed][1]))
    assert run.attempts(0) == run.attempts(1) == 2


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
    first, until = run.launch(node=0, ranks=1), time.monotonic() + TIMEOUT_S
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"x" * 100_000):
        while True:
            try:
                with socket.create_connection(("127.0.0.1", run.port), timeout=10) as visitor:
                    with contextlib.suppress(ConnectionError):  # closed with our words unread
                        visitor.sendall(noise)
                break
            except ConnectionRefusedError:
                assert time.monotonic() < until
                time.sleep(0.05)
    second = run.launch(node=1, ranks=1)
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
    done = subprocess.run([sys.executable, LAUNCH, *words.split()], cwd=LAUNCH.parents[1], capture_output=True,
                          text=True, timeout=TIMEOUT_S)  # fmt: skip
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_the_launcher_imports_no_torch():
    code = "import sys; sys.path.insert(0, 'tools'); import launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=LAUNCH.parents[1], timeout=TIMEOUT_S).returncode == 0


def test_the_cause_is_the_first_failure_or_a_refusal():
    first, killed, refused = Failure("a", 0, 1), Failure("b", 3, -9), Failure("b", 2, 3)
    assert cause([first, killed]) == first and cause([killed, first]) == killed
    assert cause([first, killed, refused]) == refused
    assert str(killed) == "rank 3 on b was killed by SIGKILL"
    assert str(Failure("b", 3, -64)) == "rank 3 on b was killed by SIGRTMAX"
    assert str(Failure("b", 3, -40)) == "rank 3 on b was killed by signal 40"
    assert str(first) == "rank 0 on a ended with exit code 1"
    assert str(Failure("a", None, 1)) == "the launcher on a is gone"


def test_waits_double_up_to_the_cap_and_begin_again_after_a_checkpoint(tmp_path):
    def decisions(restarts, number):
        return [restarts.decide([Failure("a", 0, 1)])[::2] for _ in range(number)]

    restarts = Restarts(limit=4, first_wait_s=1, most_wait_s=6, checkpoints=tmp_path)
    assert decisions(restarts, 5) == [(None, 1), (None, 2), (None, 4), (None, 6), (1, 0)]
    endless = Restarts(limit=10**9, first_wait_s=1, most_wait_s=300, checkpoints=tmp_path)
    assert decisions(endless, 5000)[-1] == (None, 300)
    for step, wait_s in ((5, 1), (5, 2), (9, 1)):
        (tmp_path / TRACKER).write_text(str(step))
        assert decisions(endless, 1) == [(None, wait_s)]


def test_nodes_from_the_environment():
    assert nodes_from({}) == nodes_from({"NNODES": "1", "NODE_RANK": "5"}) == Nodes()
    many = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"}
    assert nodes_from(many) == Nodes(2, 1, "node0", 1234)
    for name, wrong in (("NNODES", "x"), ("NNODES", "0"), ("NODE_RANK", "2"), ("MASTER_PORT", "70000")):
        with pytest.raises(ValueError, match=f"{name}={wrong}: give a whole number"):
            nodes_from(many | {name: wrong})
    with pytest.raises(ValueError, match="NNODES=2: NODE_RANK and MASTER_ADDR missing"):
        nodes_from({"NNODES": "2"})


def test_a_reserved_port_is_given_to_nobody_else_and_torchs_store_can_listen_there():
    import torch.distributed

    with reserved_port() as held:
        port = held.getsockname()[1]
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        store.set("key", "value")
        client = torch.distributed.TCPStore("127.0.0.1", port, is_master=False)
        assert client.get("key") == b"value"


def test_gloo_is_told_the_interface_towards_node_0():
    loopback = interface_towards("127.0.0.1")
    assert own_address("127.0.0.1") == "127.0.0.1"
    assert "127.0.0.1" in [address.address for address in psutil.net_if_addrs()[loopback]]
    assert interface_towards("no.such.host.invalid") is None
    environment = {}
    tell_gloo(1, "127.0.0.1", environment)
    assert environment == {}, "one node needs none"
    tell_gloo(2, "127.0.0.1", environment)
    assert environment == {"GLOO_SOCKET_IFNAME": loopback}
    tell_gloo(2, "127.0.0.1", given := {"GLOO_SOCKET_IFNAME": "mine"})
    assert given == {"GLOO_SOCKET_IFNAME": "mine"}


def test_the_tracker_is_megatrons():
    from megatron.training.checkpointing import get_checkpoint_tracker_filename

    assert get_checkpoint_tracker_filename("x") == os.path.join("x", TRACKER)


def test_a_process_alone_takes_no_port_that_another_may_have_by_then(monkeypatch):
    from hmoe_megatron.training import alone_without_torchrun

    monkeypatch.setattr(os, "environ", {})
    alone_without_torchrun()
    assert os.environ["WORLD_SIZE"] == "1" and os.environ["MASTER_PORT"] == "0", "0: the system gives a free one"
    monkeypatch.setattr(os, "environ", {"RANK": "3"})
    alone_without_torchrun()
    assert os.environ == {"RANK": "3"}
