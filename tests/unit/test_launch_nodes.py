"""Restarts as decided, the nodes of a run, and their network: without a launcher (tests/unit/test_launch.py)."""

import os
import socket

import psutil
import pytest

from hmoe_megatron.launch.nodes import Nodes, interface_towards, nodes_from, own_address, reserved_port, tell_gloo
from hmoe_megatron.launch.policy import TRACKER, Failure, Restarts, cause


def test_the_cause_is_the_first_failure_or_a_refusal(tmp_path):
    first, killed, refused = Failure("a", 0, 1), Failure("b", 3, -9), Failure("b", 2, 2)
    assert cause([first, killed]) == first and cause([killed, first]) == killed
    assert cause([first, killed, refused]) == refused
    restarts = Restarts(9, 1, 1, tmp_path)
    code, line, _ = restarts.decide([first, refused])
    assert code == 2 and line == "rank 2 on b ended with exit code 2: settings refused, no restart"
    assert str(killed) == "rank 3 on b was killed by SIGKILL"
    assert str(Failure("b", 3, -64)) == "rank 3 on b was killed by SIGRTMAX"
    assert str(Failure("b", 3, -40)) == "rank 3 on b was killed by signal 40"
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
    from hmoe_megatron.launch.process import alone_without_torchrun

    monkeypatch.setattr(os, "environ", {})
    alone_without_torchrun()
    assert os.environ["WORLD_SIZE"] == "1" and os.environ["MASTER_PORT"] == "0", "0: the system gives a free one"
    monkeypatch.setattr(os, "environ", {"RANK": "3"})
    alone_without_torchrun()
    assert os.environ == {"RANK": "3"}
