"""SIGTERM, with and without --exit-signal-handler."""

import signal
from functools import partial

import pytest

from tests.faults.harness import check_finished, check_lasting, check_little_lost, run
from tests.faults.inside import at_step, before, signal_self

HANDLER = "--exit-signal-handler"


def test_sigterm_without_a_handler_ends_the_run(two, tmp_path, told):
    root, scratch = tmp_path / "run", tmp_path / "scratch"
    ended = run(2, root, scratch, partial(at_step, step=6, victim=1, function=partial(signal_self, signal.SIGTERM)))
    assert ended.codes[1] == -signal.SIGTERM and ended.codes[0] not in (0, None), ended.tail
    tracked = check_lasting(root, two)
    assert tracked == 4
    check_little_lost(ended, tracked)
    check_finished(run(2, root, scratch), root, two)
    told("SIGTERM to one rank", 1, "the run ended, exit code not 0; it went on bitwise from the last checkpoint")


@pytest.mark.parametrize("victim", [0, 1])
def test_sigterm_with_a_handler_saves_first(victim, two, tmp_path, told):
    root, scratch = tmp_path / "run", tmp_path / "scratch"
    term = partial(at_step, step=5, victim=victim, function=partial(signal_self, signal.SIGTERM))
    ended = run(2, root, scratch, term, flags=HANDLER)
    assert ended.codes == [0, 0] and max(ended.losses) == 5, ended.tail
    assert check_lasting(root, two) == 5
    check_finished(run(2, root, scratch, flags=HANDLER), root, two)
    told(f"SIGTERM to rank {victim}, `{HANDLER}`", 1, "saved after the step, exit code 0; went on bitwise")


def test_sigterm_in_a_save_lets_it_end(two, tmp_path, told):
    root, scratch = tmp_path / "run", tmp_path / "scratch"
    publish = ("hmoe_megatron.checkpoint.directory", "publish")
    ended = run(2, root, scratch, partial(before, publish, (1, 1), 0, signal_self, signal.SIGTERM), flags=HANDLER)
    assert ended.codes == [0, 0] and max(ended.losses) == 3, ended.tail
    assert check_lasting(root, two) == 3
    check_finished(run(2, root, scratch), root, two)
    told(f"SIGTERM during a save, `{HANDLER}`", 1, "saved, exit code 0; went on bitwise")
