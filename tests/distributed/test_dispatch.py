"""One rank's rows are not permuted a second time."""

import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.training_run import HIDDEN, SEQUENCE, TINY, build

FLAGS = "--hmoe-widths 16,32,48,64 --moe-token-dispatcher-type alltoall"


def with_each_dispatcher():
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from hmoe_megatron.moe.token_dispatcher import OneRankDispatcher

    _, _, model = build([*TINY, *FLAGS.split()])
    layer = model.decoder.layers[0].mlp
    ours = layer.token_dispatcher
    assert type(ours) is OneRankDispatcher
    stock = MoEAlltoAllTokenDispatcher(
        ours.num_local_experts, ours.local_expert_indices, config=ours.config, pg_collection=get_default_pg_collection()
    )
    x = torch.randn(SEQUENCE, 2, HIDDEN, requires_grad=True)
    passed, results = [], []
    inherited = OneRankDispatcher.dispatch_postprocess

    def dispatch_postprocess(self, rows, probs):
        found = inherited(self, rows, probs)
        passed.append(found[0] is rows)
        return found

    OneRankDispatcher.dispatch_postprocess = dispatch_postprocess
    for layer.token_dispatcher in (ours, stock):
        y, _ = layer(x)
        weights = list(layer.parameters())
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *weights])])
    return passed, list(map(torch.equal, *results))


def test_rows_of_one_rank_stay_where_they_are():
    ((same_tensor, equal),) = run_ranks(1, with_each_dispatcher)
    assert same_tensor == [True] and len(equal) == 5 and all(equal)


def on_two_ranks():
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    _, _, model = build([*TINY, *FLAGS.split(), "--expert-model-parallel-size", "2"])
    return type(model.decoder.layers[0].mlp.token_dispatcher) is MoEAlltoAllTokenDispatcher


def test_rows_of_two_ranks_are_sorted():
    assert run_ranks(2, on_two_ranks) == [True, True]
