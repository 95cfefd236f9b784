"""The two processes of hf/parity.py, forked where Megatron and transformers are imported: a quarter of the time."""

import multiprocessing
import os
import subprocess
import traceback
from types import SimpleNamespace

from hmoe_megatron.hf import parity
from tests.distributed.ranks import run_alone

SIDES = 2


def use_alone(monkeypatch) -> None:
    """In pytest's process."""

    def run(words, env, **_):
        return _ended(words, *run_alone(_main, words[3:], dict(env), timeout_s=240))

    monkeypatch.setattr(parity, "subprocess", SimpleNamespace(run=run))


def fork_ahead() -> None:
    """In a process of `run_alone`: both are forked now, before Megatron is set up here, which is once a process."""
    sides = []
    for _ in range(SIDES):
        here, there = multiprocessing.Pipe()
        multiprocessing.get_context("fork").Process(target=_wait_for_words, args=(there,), daemon=True).start()
        sides.append(here)

    def run(words, env, **_):
        side = sides.pop(0)
        side.send((words[3:], dict(env)))
        return _ended(words, *side.recv())

    parity.subprocess = SimpleNamespace(run=run)


def _ended(words, code, error):
    return subprocess.CompletedProcess(words, code, "", error)


def _wait_for_words(pipe):
    pipe.send(_main(*pipe.recv()))


def _main(words, environment):
    """(exit code, error) of parity's main."""
    os.environ.clear()
    os.environ.update(environment)
    try:
        parity.main(*words)
    except BaseException:
        return 1, traceback.format_exc()
    return 0, ""
