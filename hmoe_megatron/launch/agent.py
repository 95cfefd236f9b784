"""torchrun's agent of one node, which starts the ranks; here is how they end."""

import contextlib
import os
import signal
import socket
import time
from subprocess import Popen

from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException

from hmoe_megatron.launch.policy import Failure
from hmoe_megatron.launch.rendezvous import POLL_S, Rendezvous

GRACE_S = 2.0  # for the other ranks to end by themselves, with their own last words, after one failed


class Agent(LocalElasticAgent):
    """Its rendezvous decides about restarts, so the agent's own limit must be out of reach."""

    stopped_by: signal.Signals | None = None
    _known: set[int] | frozenset = frozenset()  # ranks reported or killed: how they end is no news

    @property
    def rendezvous(self) -> Rendezvous:
        return self._worker_group.spec.rdzv_handler

    def on_signal(self, number: int, frame) -> None:
        """End the run; a second signal kills its ranks."""
        if self.stopped_by is None:
            raise SignalException("", signal.Signals(number))
        self.rendezvous.end(128 + number, number=number, kill=True)

    def _invoke_run(self, role: str = "") -> RunResult:
        try:
            return super()._invoke_run(role)
        except SignalException as received:  # of this launcher, or of another that passed it on
            self.stopped_by = received.sigval
            if not self.rendezvous.ending():
                self.rendezvous.end(128 + self.stopped_by, number=self.stopped_by)
            raise

    def _start_workers(self, worker_group) -> dict[int, int]:
        self._known = set()
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group) -> RunResult:
        if any(process.poll() for process in self._processes().values()):
            self._end_ranks(GRACE_S)
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.SUCCEEDED and not self.rendezvous.all_done():
            return RunResult(state=WorkerState.HEALTHY)  # a rank of another node may still fail
        return result

    def _shutdown(self, death_sig=signal.SIGTERM, timeout: int = 30) -> None:
        if self.stopped_by:
            # SIGINT also to what the ranks started, as a terminal does: a rank that Ctrl-C ends waits for its data
            # loaders, which take no other signal where Megatron handles SIGTERM.
            send = os.killpg if self.stopped_by == signal.SIGINT else os.kill
            for process in self._processes().values():
                if process.poll() is None:
                    send(process.pid, self.stopped_by)
        self._end_ranks(timeout if self.stopped_by else GRACE_S)
        super()._shutdown(signal.SIGKILL)

    def _processes(self) -> dict[int, Popen]:
        """By rank."""
        handlers = self._pcontext.subprocess_handlers if self._pcontext else {}
        return {
            worker.global_rank: handlers[worker.local_rank].proc for worker in self._worker_group.workers if handlers
        }

    def _end_ranks(self, seconds: float) -> None:
        """Wait that long for all ranks to end, then kill those left, and what any of them started."""
        until = time.monotonic() + seconds
        while self._running() and time.monotonic() < until and not self.rendezvous.kill:
            time.sleep(POLL_S)
        for rank, process in self._processes().items():
            self._known.add(rank)
            _kill_group(process)
            process.wait()

    def _running(self) -> bool:
        """Whether ranks are running. Reports those that failed: killed ones first, for the others follow from them."""
        processes = self._processes()
        codes = {rank: code for rank, process in processes.items() if (code := process.poll())}
        for rank in sorted(codes.keys() - self._known, key=lambda rank: codes[rank] > 0):
            self._known.add(rank)
            self.rendezvous.report(Failure(socket.gethostname(), rank, codes[rank]))
            _kill_group(processes[rank])  # its data loaders hold its connections open, so other ranks wait for it
        return any(process.poll() is None for process in processes.values())


def _kill_group(process: Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
