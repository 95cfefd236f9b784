"""tools/launch.py in a process that has torch imported, as subprocess.Popen has it: imports are most of its time."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.distributed.ranks import forked

TOOLS = Path(__file__).parents[2] / "tools"


class ForkedLauncher:
    def __init__(self, words: list[str], environment: dict[str, str]):
        self._folder = tempfile.TemporaryDirectory(prefix="launcher-")
        files = [Path(self._folder.name) / name for name in ("out", "err")]
        for file in files:
            file.touch()
        self._process = forked(_launch, words, environment, *map(str, files))
        self.args, self.pid, self.stderr = words, self._process.pid, _Lines(files[1])
        self._files = files

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return tuple(file.read_text() for file in self._files)


class _Lines:
    def __init__(self, file: Path):
        self._file = file.open()

    def readline(self) -> str:
        line = ""
        while not line.endswith("\n"):
            line += self._file.readline()
            time.sleep(0.02)
        return line


def _launch(words, environment, out, err):
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, str(TOOLS))
    code = 1
    with contextlib.suppress(BaseException):
        try:
            import launch

            code = launch.main(words)
        except SystemExit as left:
            code = left.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
