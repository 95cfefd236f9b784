"""What a run shows and what it hides."""

import io
import logging
import sys
import warnings

import pytest

from hmoe_megatron.files import LOG_FILE
from hmoe_megatron.telemetry import console
from hmoe_megatron.telemetry.console import Console
from tests.distributed.pretrain_run import start
from tests.distributed.ranks import run_ranks
from tests.distributed.training_run import TINY

STEP = (
    " [2026-11-28 12:10:48.332124] iteration        3/     240 | consumed samples:           24 | "
    "elapsed time per iteration (ms): 137.5 | learning rate: 1.000000E-02 | global batch size:     8 | "
    "lm loss: 4.525670E+00 | p_penalty_loss: 2.0 | loss scale: 1.0 | grad norm: 0.812 | "
    "number of skipped iterations:   0 | number of nan iterations:   1 |\n"
)
MEMORY = "[Rank 0] (after 1 iterations) memory (MB) | allocated: 841.04 | max allocated: 2048.0 | reserved: 841.04\n"


def shown_of(text, tokens=0, flops=0.0, peak=None):
    out = io.StringIO()
    made = Console(out, io.StringIO())
    made.run_is(tokens, lambda samples: flops * samples, peak)
    made.take(text)
    return out.getvalue()


def test_a_step_is_a_line():
    assert shown_of(STEP) == (" step      3/240 | loss 4.5257 | lr 1.00e-02 | norm 0.81 | 1 NaN steps | 33 s left\n")
    assert "| 14,895 tokens/s |" in shown_of(STEP, tokens=256)
    assert "tokens/s | MFU 40.0% |" in shown_of(STEP, tokens=256, flops=0.4 * 0.1375 / 8 * 1e12, peak=1e12)
    assert "| 7 h 31 min left" in shown_of(STEP.replace("/     240", "/  197003"))


def test_what_else_is_shown_of_megatrons_output():
    validation = " validation loss at iteration 60 | lm loss value: 5.823910E+00 | lm loss PPL: 3.382E+02 | \n"
    assert shown_of(validation) == " step     60 | validation loss 5.8239, perplexity 338.2\n"
    assert "on the test set" in shown_of(validation.replace("iteration 60", "iteration 60 on test set"))
    saved = "  [2026] successfully saved checkpoint from iteration       4 to /runs/a [ t 1/1 ]\n"
    assert shown_of(saved) == " step      4 | saved to /runs/a\n"
    loaded = "  successfully loaded checkpoint from /runs/a [ t 1/1, gtp_remat 1/1, p 1/1 ] at iteration 4\n"
    assert shown_of(loaded) == " goes on from /runs/a, step 4\n"
    assert shown_of(MEMORY + MEMORY) == " memory of rank 0: at most 2.00 GiB so far\n"
    assert shown_of("-- arguments --\n  lr .... 1\n>> building\n") == ""


def test_lines_come_in_parts(tmp_path):
    out = io.StringIO()
    made = Console(out, io.StringIO())
    for part in (STEP[:50], STEP[50:-1], "\n", "hidden"):
        made.take(part)
    assert out.getvalue().count(" step ") == 1 and made.tail().endswith("hidden")
    made.log_to(tmp_path)
    made.take(" too\n")
    made.end()
    assert (tmp_path / LOG_FILE).read_text() == f"{STEP}hidden too\n"


def test_who_writes_decides(capsys, tmp_path):
    with console.of_run([]):
        assert console.current()
        stock = {"__name__": "megatron.training.training", "print": print, "logging": logging, "warnings": warnings}
        exec("print('of megatron')\nlogging.getLogger('x').warning('logged')\nwarnings.warn('warned')", stock)
        ours = {"__name__": "hmoe_megatron.training", "print": print, "sys": sys}
        exec("print('of ours')\nprint('an error', file=sys.stderr)", ours)
        kept = console.current().tail()
    said = capsys.readouterr()
    assert said.out == "of ours\n" and said.err == "an error\n"
    assert "of megatron\n" in kept and console.current() is None
    print("afterwards")
    assert capsys.readouterr().out == "afterwards\n"


def test_all_of_it(capsys):
    for words in (["--hmoe-console", "megatron"], ["--hmoe-console=megatron"], ["--help-all"]):
        with console.of_run(words):
            assert console.current() is None
    with console.of_run(["--hmoe-console", "megatron", "--hmoe-console", "short"]):
        assert console.current()


def test_an_error_that_nobody_expected_shows_what_was_hidden(capsys):
    with pytest.raises(RuntimeError), console.of_run([]):
        console.current().take("the last words\n")
        raise RuntimeError
    assert "the last words\n\n(the end of Megatron's output" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_a_bar_below_the_lines():
    out = Terminal()
    made = Console(out, io.StringIO())
    made.take(STEP)
    made.show("a line\n", out)
    made.end()
    assert "3/240" in out.getvalue() and "step" in out.getvalue() and "a line\n" in out.getvalue()


def test_a_runs_console_is_short_and_the_rest_is_beside_the_run(tmp_path):
    words = [*TINY, *f"--hmoe-widths 16,32,48,64 --num-workers 0 --train-iters 3 --save {tmp_path}/run".split()]
    words += "--save-interval 3 --expert-model-parallel-size 2".split()
    (code, first), (_, last) = run_ranks(2, start, words)
    assert code == 0
    lines = [*first.splitlines(), *last.splitlines()]
    assert len(lines) < 30 and max(map(len, lines)) <= 100 + len(str(tmp_path)), lines
    for part in ("experts on 2 ranks", "parameters: 0.05 M", "saved to", "memory of rank 0"):
        assert part in first
    assert [line.split(" | ")[0] for line in last.splitlines() if line.startswith(" step")] == [
        " step      1/3",
        " step      2/3",
        " step      3/3",
    ]
    assert "-- arguments --" in (tmp_path / "run" / LOG_FILE).read_text()
