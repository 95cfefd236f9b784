"""torchrun's agent of one node: it starts the ranks, and ends them as their messages and data loaders need it."""

import contextlib
import os
import signal
import socket
import subprocess
import time

from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException

from hmoe_megatron.launch.policy import Failure
from hmoe_megatron.launch.rendezvous import POLL_S, Rendezvous

GRACE_S = 2.0  # for the other ranks to end by themselves, with their own last words, after one failed


class Agent(LocalElasticAgent):
    """Its rendezvous decides about restarts: torchrun's own limit must be out of reach."""

    stopped_by: signal.Signals | None = None

    @property
    def rendezvous(self) -> Rendezvous:
        return self._worker_group.spec.rdzv_handler

    def on_signal(self, number: int, frame) -> None:
        """End the run; the second signal kills its ranks."""
        if self.stopped_by is None:
            raise SignalException("", signal.Signals(number))
        self._kill()
        self.rendezvous.kill()

    def _invoke_run(self, role: str = "") -> RunResult:
        try:
            return super()._invoke_run(role)
        except SignalException as received:
            self.stopped_by = received.sigval
            self.rendezvous.end(128 + self.stopped_by, number=self.stopped_by)
            raise

    def _start_workers(self, worker_group):
        self.ours = set()  # ranks reported or killed: how they end is no news
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group) -> RunResult:
        if any(process.poll() for process in self._processes().values()):
            self._let_end(GRACE_S)
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.SUCCEEDED and not self.rendezvous.all_done():
            return RunResult(state=WorkerState.HEALTHY)  # another node may still fail
        return result

    def _shutdown(self, death_sig=signal.SIGTERM, timeout: int = 30) -> None:
        if self.stopped_by:
            self._send(self.stopped_by)
        self._let_end(timeout if self.stopped_by else GRACE_S)
        super()._shutdown(signal.SIGKILL)

    def _processes(self) -> dict[int, subprocess.Popen]:
        """By rank."""
        if not self._pcontext:
            return {}
        first = self._worker_group.workers[0].global_rank
        return {first + local: of.proc for local, of in self._pcontext.subprocess_handlers.items()}

    def _let_end(self, seconds: float) -> None:
        """Until all ranks ended, then what they started is killed, or all are killed when the time is up."""
        until = time.monotonic() + seconds
        while self._report() and time.monotonic() < until and not self.rendezvous.killed():
            time.sleep(POLL_S)
        self._kill()

    def _report(self) -> bool:
        """Whether ranks are running. Reports those that failed; killed ones first, for the others follow from them."""
        codes = {rank: process.poll() for rank, process in self._processes().items()}
        failed = [rank for rank, code in codes.items() if code and rank not in self.ours]
        for rank in sorted(failed, key=lambda rank: codes[rank] > 0):
            self.ours.add(rank)
            self.rendezvous.report(Failure(socket.gethostname(), rank, codes[rank]))
            # Its data loaders hold its connections open: while they live, no other rank sees it gone.
            self._send_group(rank, signal.SIGKILL)
        return None in codes.values()

    def _send(self, number: int) -> None:
        """SIGINT also to what they started, as a terminal does: a rank that Ctrl-C ends waits for its data loaders,
        which take no other signal where Megatron handles SIGTERM."""
        for rank, process in self._processes().items():
            if number == signal.SIGINT:
                self._send_group(rank, number)
            else:
                process.send_signal(number)

    def _kill(self) -> None:
        for rank, process in self._processes().items():
            self.ours |= {rank} if process.poll() is None else set()
            self._send_group(rank, signal.SIGKILL)
            process.wait()

    def _send_group(self, rank: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._processes()[rank].pid, number)
