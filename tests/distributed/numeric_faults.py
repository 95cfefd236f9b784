"""Faults put into a whole run: each is called on its rank before the run starts (``prepare`` of `pretrain_run`)."""

import torch

NAN, INFINITY = float("nan"), float("inf")


def now() -> int:
    """Step under way, from 1."""
    from megatron.training import get_args

    return get_args().curr_iteration + 1


class BadLogits:
    """In ``step`` the router of ``layer`` gives ``value`` as one logit, on ``rank``; ``times``: then no more."""

    def __init__(self, layer, step, rank=0, value=NAN, times=1 << 30):
        self.layer, self.step, self.rank, self.value, self.times = layer, step, rank, value, times

    def __call__(self):
        from hmoe_megatron.moe.router import HMoERouter

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
        from hmoe_megatron.moe.experts import HMoEExperts

        stock = HMoEExperts.forward

        def forward(experts, x_RH, tokens_per_slot_L, probs_R):
            if experts.layer in self.layers and now() == self.step:
                weight = experts.linear_fc1_weight
                spoilt = weight.data if self.what == "weight" else weight.main_grad
                for piece, part in experts.by_piece("linear_fc1_weight", spoilt):
                    if piece.expert == self.expert:
                        part[0, 0] = self.value
            return stock(experts, x_RH, tokens_per_slot_L, probs_R)

        HMoEExperts.forward = forward


class OneExpert:
    """The router sends every token to one expert, with probability 1."""

    def __init__(self, expert):
        self.expert = expert

    def __call__(self):
        from hmoe_megatron.moe.router import HMoERouter

        stock = HMoERouter.gating

        def gating(router, hidden):
            logits = stock(router, hidden)
            forced = torch.zeros_like(logits)
            forced[..., self.expert] = 1e4
            return logits + forced

        HMoERouter.gating = gating
