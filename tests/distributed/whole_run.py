"""A whole run on gloo ranks as pretrain_hmoe.py does it, with a fault put in, for tests of how it ends.

``pretrain`` is run on ranks by ``run_ranks``.
"""

import contextlib
import io

import torch

from tests.distributed.training_run import TINY

NAN, INFINITY = float("nan"), float("inf")


def pretrain(flags: str, fault=None) -> dict:
    """Train TINY plus ``flags`` through Megatron's loop on mock data. ``fault``: called first, spoils the model's code.

    Returns, for this rank: exit code (0 for a run to its end), what it printed, steps done.
    """
    from hmoe_megatron import training

    training.prepare()
    argv = [*TINY, "--num-workers", "0", *flags.split()]
    args, layout = training.parse_arguments(argv)
    if fault:
        fault()
    printed, code = io.StringIO(), 0
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        try:
            training.train(args, layout, argv)
        except SystemExit as ended:
            code = ended.code
    print(printed.getvalue(), flush=True)
    return {"code": code, "printed": printed.getvalue(), "step": args.curr_iteration}


def now() -> int:
    """Step under way, from 1."""
    from megatron.training import get_args

    return get_args().curr_iteration + 1


class BadLogits:
    """In ``step`` the router of ``layer`` gives ``value`` as one logit, on ``rank``; ``times``: then no more."""

    def __init__(self, layer, step, rank=0, value=NAN, times=1 << 30):
        self.layer, self.step, self.rank, self.value, self.times = layer, step, rank, value, times

    def __call__(self):
        from hmoe_megatron.router import HMoERouter

        stock = HMoERouter.gating

        def gating(router, hidden):
            logits = stock(router, hidden)
            if router.layer != self.layer or now() != self.step or torch.distributed.get_rank() != self.rank:
                return logits
            self.times -= 1
            if self.times < 0:
                return logits
            spoilt = torch.zeros_like(logits)
            spoilt.view(-1)[1] = self.value
            return logits + spoilt

        HMoERouter.gating = gating


class BadExpert:
    """In ``step`` one weight of an expert (``what``: "weight"), or of its gradient ("gradient"), is ``value``."""

    def __init__(self, layers, expert, step, what, value=NAN):
        self.layers, self.expert, self.step, self.what, self.value = layers, expert, step, what, value

    def __call__(self):
        from hmoe_megatron.experts import HMoEExperts

        stock = HMoEExperts.forward

        def forward(experts, x_RH, tokens_per_slot_L, probs_R):
            if experts.layer in self.layers and now() == self.step:
                for piece in (piece for piece in experts.pieces if piece.expert == self.expert):
                    if self.what == "weight":
                        piece.linear_fc1_weight.data[0, 0] = self.value
                    else:
                        piece.linear_fc1_weight.main_grad[0, 0] = self.value
            return stock(experts, x_RH, tokens_per_slot_L, probs_R)

        HMoEExperts.forward = forward


class OneExpert:
    """The router sends every token to one expert, with probability 1."""

    def __init__(self, expert):
        self.expert = expert

    def __call__(self):
        from hmoe_megatron.router import HMoERouter

        stock = HMoERouter.gating

        def gating(router, hidden):
            logits = stock(router, hidden)
            forced = torch.zeros_like(logits)
            forced[..., self.expert] = 1e4
            return logits + forced

        HMoERouter.gating = gating
