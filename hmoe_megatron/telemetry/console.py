"""The console of a run: what is trained and where, a line a logged step, what is saved, what goes wrong.

Megatron's own output, a thousand lines before the first step, goes to a file beside the run; `--hmoe-console megatron`
shows it instead. Whose output it is says the module that calls print. Imports no torch.
"""

import contextlib
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from hmoe_megatron.files import LOG_FILE
from hmoe_megatron.flag_files import last_value

KEPT_LINES = 20_000  # until the first step says where the file is
TAIL_LINES = 100  # of a run that ends by an error of which nobody knew
_OURS = ("hmoe_megatron", "pretrain_hmoe", "__main__")
_HIDDEN = ("logging", "warnings", "megatron", "torch._logging")  # of what goes to standard error
_STEP = re.compile(r" iteration +(\d+)/ *(\d+) \|")
_VALIDATION = re.compile(r"validation\S* loss at (iteration (\d+)\D.*?)\| lm loss value: (\S+) \| lm loss PPL: (\S+)")
_SAVED = re.compile(r"successfully saved checkpoint from iteration +(\d+) to (\S+)")
_LOADED = re.compile(r"successfully loaded checkpoint from (\S+) .* at iteration (\d+)")
_MEMORY = re.compile(
    r"\[Rank (\d+)\] \(after (\d+) iterations\) memory \(MB\).* allocated: \S+ \| max allocated: ([\d.]+)"
)


class Console:
    """tokens_a_sample, flops, peak_flops: what `run_is` says; until then a step has no tokens/s and no MFU."""

    def __init__(self, out: TextIO, err: TextIO):
        self.out, self.err = out, err
        self._file, self._lines, self._part = None, deque(maxlen=KEPT_LINES), ""
        self._bar, self._memory_is_shown = None, False
        self.tokens_a_sample, self.flops, self.peak_flops = 0, lambda samples: 0.0, None

    def run_is(self, tokens_a_sample: int, flops: Callable[[int], float], peak_flops: float | None) -> None:
        """flops: of a step of so many samples, on all ranks; peak_flops: of all of them a second, None if not known."""
        self.tokens_a_sample, self.flops, self.peak_flops = tokens_a_sample, flops, peak_flops

    def log_to(self, directory: Path | None) -> None:
        """What was kept and what comes goes to the file there; without a directory nowhere."""
        with contextlib.suppress(OSError):
            self._file = directory and (directory / LOG_FILE).open("a", buffering=1, errors="replace")
        if self._file:
            self._file.writelines(self._lines)
        self._lines = deque(maxlen=TAIL_LINES)

    def show(self, text: str, stream: TextIO) -> None:
        if self._bar is None:
            stream.write(text)
        else:
            self._bar.clear()
            stream.write(text)
            if text.endswith("\n"):
                stream.flush()
                self._bar.refresh()

    def take(self, text: str) -> None:
        """Output that is not ours."""
        *lines, self._part = (self._part + text).split("\n")
        for line in lines:
            self._keep(line + "\n")
            if (shown := self._short(line)) is not None:
                self.show(shown + "\n", self.out)
                self.out.flush()

    def tail(self) -> str:
        return "".join(list(self._lines)[-TAIL_LINES:]) + self._part

    def _keep(self, line: str) -> None:
        self._lines.append(line)
        if self._file:
            with contextlib.suppress(OSError):  # a full disk costs the file's lines, not the run
                self._file.write(line)

    def _short(self, line: str) -> str | None:
        """What of a line of Megatron's is shown."""
        if found := _STEP.search(line):
            return self._step(int(found[1]), int(found[2]), line)
        if found := _VALIDATION.search(line):
            where = " on the test set" if "test set" in found[1] else ""
            return (
                f" step {found[2]:>6} | validation loss {float(found[3]):.4f}, perplexity {float(found[4]):.1f}{where}"
            )
        if found := _SAVED.search(line):
            return f" step {found[1]:>6} | saved to {found[2]}"
        if found := _LOADED.search(line):
            return f" goes on from {found[1]}, step {found[2]}"
        if (found := _MEMORY.search(line)) and not self._memory_is_shown:
            self._memory_is_shown = True
            return f" memory of rank {found[1]}: at most {float(found[3]) / 1024:.2f} GiB so far"
        return f" {line.strip()}" if line.startswith(("exiting program", "WARNING: the run")) else None

    def _step(self, step: int, steps: int, line: str) -> str:
        fields = dict(part.split(":", 1) for part in line.partition("|")[2].split("|") if ":" in part)
        number = {name.strip(): float(value) for name, value in fields.items() if _is_number(value)}
        step_s = number.get("elapsed time per iteration (ms)", 0.0) / 1e3
        parts = [f" step {step:>6}/{steps}"]
        parts += [
            f"{label} {number[name]:{form}}"
            for name, label, form in (
                ("lm loss", "loss", ".4f"),
                ("learning rate", "lr", ".2e"),
                ("grad norm", "norm", ".2f"),
            )
            if name in number
        ]
        samples = int(number.get("global batch size", 0))
        if step_s and self.tokens_a_sample:
            parts.append(f"{samples * self.tokens_a_sample / step_s:,.0f} tokens/s")
            if self.peak_flops:
                parts.append(f"MFU {self.flops(samples) / step_s / self.peak_flops:.1%}")
        parts += [
            f"{number[name]:.0f} {label} steps"
            for name, label in (("number of skipped iterations", "skipped"), ("number of nan iterations", "NaN"))
            if number.get(name)
        ]
        parts.append(f"{_duration((steps - step) * step_s)} left")
        self._draw(step, steps)
        return " | ".join(parts)

    def _draw(self, step: int, steps: int) -> None:
        """A progress bar, where the console is a terminal."""
        if not self.out.isatty():
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=steps, unit="step", ncols=100, file=self.out, leave=False)
        self._bar.n = step
        self._bar.refresh()

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._file:
            self._file.close()


class _Stream:
    """In place of sys.stdout or sys.stderr. hides(module): whether what it writes is not for the console."""

    def __init__(self, console: Console, stream: TextIO, hides: Callable[[str], bool]):
        self._console, self._stream, self._hides = console, stream, hides

    def write(self, text: str) -> int:
        frame = sys._getframe(1)
        while (module := frame.f_globals.get("__name__", "")).startswith("wandb") and frame.f_back:
            frame = frame.f_back  # wandb stands in between where it is installed
        if self._hides(module):
            self._console.take(text)
        else:
            self._console.show(text, self._stream)
        return len(text)

    def __getattr__(self, name):
        return getattr(self._stream, name)


_current: Console | None = None


def current() -> Console | None:
    """The console in force; None with --hmoe-console megatron, and outside a run."""
    return _current


@contextlib.contextmanager
def of_run(argv: Sequence[str]) -> Iterator[None]:
    """The console while the block runs. An error that nobody expected shows the end of what was hidden."""
    global _current
    if _wants_all(argv):
        yield
        return
    out, err = sys.stdout, sys.stderr
    console = _current = Console(out, err)
    sys.stdout = _Stream(console, out, lambda module: not module.startswith(_OURS))
    sys.stderr = _Stream(console, err, lambda module: module.startswith(_HIDDEN))
    try:
        yield
    except Exception:
        err.write(f"{console.tail()}\n(the end of Megatron's output; all of it: --hmoe-console megatron)\n")
        raise
    finally:
        console.end()
        sys.stdout, sys.stderr, _current = out, err, None


def _wants_all(argv: Sequence[str]) -> bool:
    return "--help-all" in argv or last_value(argv, "--hmoe-console") == "megatron"


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return float(text) == float(text)
    return False


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
