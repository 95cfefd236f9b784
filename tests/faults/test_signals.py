"""SIGTERM and Ctrl-C, as they are and with --hmoe-default-signals."""

import signal
from functools import partial

import pytest

from tests.faults.harness import check_finished, check_lasting, check_little_lost, run
from tests.faults.inside import at_step, before, signal_self
from tests.rows import rarely

AS_PYTHON = "--hmoe-default-signals"


def test_sigterm_as_python_has_it_ends_the_run(two, tmp_path, told):
    root, scratch = tmp_path / "run", tmp_path / "scratch"
    ended = run(
        2,
        root,
        scratch,
        partial(at_step, step=6, victim=1, function=partial(signal_self, signal.SIGTERM)),
        flags=AS_PYTHON,
    )
    assert ended.codes[1] == -signal.SIGTERM and ended.codes[0] not in (0, None), ended.tail
    tracked = check_lasting(root, two)
    assert tracked == 4
    check_little_lost(ended, tracked)
    check_finished(run(2, root, scratch), root, two)
    told(
        f"SIGTERM to one rank, `{AS_PYTHON}`",
        1,
        "the run ended, exit code not 0; it went on bitwise from the last checkpoint",
    )


@pytest.mark.parametrize(
    ("number", "victim"), [(signal.SIGTERM, 0), *rarely((signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGINT, 0))]
)
def test_a_signal_saves_first(number, victim, two, tmp_path, told):
    root, scratch = tmp_path / "run", tmp_path / "scratch"
    ended = run(2, root, scratch, partial(at_step, step=5, victim=victim, function=partial(signal_self, number)))
    assert ended.codes == [0, 0] and max(ended.losses) == 5, ended.tail
    assert ("the run ends after this step, with a checkpoint" in ended.tail) == (victim == 0)
    assert check_lasting(root, two) == 5
    check_finished(run(2, root, scratch), root, two)
    told(f"{signal.Signals(number).name} to rank {victim}", 1, "saved after the step, exit code 0; went on bitwise")


def test_sigterm_in_a_save_lets_it_end(two, tmp_path, told):
    root, scratch = tmp_path / "run", tmp_path / "scratch"
    publish = ("hmoe_megatron.checkpoint.directory", "publish")
    ended = run(2, root, scratch, partial(before, publish, (1, 1), 0, signal_self, signal.SIGTERM))
    assert ended.codes == [0, 0] and max(ended.losses) == 3, ended.tail
    assert check_lasting(root, two) == 3
    check_finished(run(2, root, scratch), root, two)
    told("SIGTERM during a save", 1, "saved, exit code 0; went on bitwise")
