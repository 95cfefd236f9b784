"""SIGTERM and Ctrl-C in a rank: the run ends after its step, with a checkpoint. A second Ctrl-C ends it at once."""

import argparse
import os
import signal
import time

import torch

# A terminal and torchrun both send it to a rank: what follows within this time is the same Ctrl-C.
SAME_S = 2.0


def end_at_once(handler) -> None:
    """Until the first step: nothing can be saved, and a rank that waits for a dead one must not wait longer. handler:
    Megatron's DistributedSignalHandler, in force since the arguments were made global."""
    signal.signal(handler.sig, handler.original_handler)


def end_after_the_step(handler, args: argparse.Namespace) -> None:
    """From the first step on. handler: as above; Megatron's loop asks it after every step on all ranks together."""
    handler.signals_received = lambda: [_anywhere(handler._signal_received)]
    first_s = None

    def on_signal(number, frame):
        nonlocal first_s
        now_s = time.monotonic()
        if first_s is None:
            first_s, handler._signal_received = now_s, True
            saved = f"with a checkpoint in {args.save}" if args.save else "without --save nothing is kept"
            _say(f"{signal.Signals(number).name}: the run ends after this step, {saved} (Ctrl-C again: at once)")
        elif number == signal.SIGINT and now_s - first_s > SAME_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in {signal.SIGTERM, signal.SIGINT, args.exit_signal}:
        if signal.getsignal(number) != signal.SIG_IGN:  # as in a shell's background job
            signal.signal(number, on_signal)


def _anywhere(received: bool) -> int:
    """Whether any rank has got it, by one sum; Megatron gathers it and reads the answer of each rank by itself."""
    found = torch.tensor([int(received)], dtype=torch.int32, device=torch.cuda.current_device())
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return found.item()


def _say(text: str) -> None:
    """Not by print, which may be in the middle of another line. One rank of those that are told may be any."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f" {text}\n".encode())
