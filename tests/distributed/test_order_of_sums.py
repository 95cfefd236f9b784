"""Many plans in one process: a layer's outputs and gradients, and the gradient norm, do not depend on the plan."""

import dataclasses
import random
from types import SimpleNamespace

import pytest
import torch

from tests.distributed.plans import WIDTHS, cut, whole
from tests.distributed.ranks import run_ranks
from tests.distributed.training_run import EXPERTS, HIDDEN, ONE_ULP, SEQUENCE, TINY, configure
from tests.rows import rarely

TOP3 = "--moe-router-topk 3"
TOPP = "--hmoe-router topp --hmoe-top-p 0.6"
ALLTOALL, ALLGATHER = "--moe-token-dispatcher-type alltoall", "--moe-token-dispatcher-type allgather"
ORDERED = f"{ALLTOALL} --deterministic-mode"
PLANS = 25
WHOLE = whole(range(EXPERTS))[0]
CUT = cut(((0, 0, 16), (2, 0, 16), (3, 0, 23), (1, 0, 32), (2, 16, 48), (3, 23, 64)))[0]


def random_plan(draw, ranks, pieces):
    """Every one of `pieces` on a random rank, in random order; a rank may have none, but not two of one expert."""
    while True:
        plan = [[] for _ in range(ranks)]
        for piece in draw.sample(pieces, len(pieces)):
            plan[draw.randrange(ranks)].append(piece)
        if all(len({getattr(piece, "expert", piece) for piece in on_rank}) == len(on_rank) for on_rank in plan):
            return tuple(map(tuple, plan))


def in_order(ranks, pieces):
    """As Megatron lays them: contiguous."""
    ends = [rank * len(pieces) // ranks for rank in range(ranks + 1)]
    return tuple(tuple(pieces[lo:hi]) for lo, hi in zip(ends, ends[1:], strict=False))


def layer_under_plans(flags, pieces=WHOLE):
    """One MoE layer, forward and backward, under PLANS plans of `pieces`.

    Returns a list of {name: tensor}: this rank's output and gradients of its input, of the router and of its experts.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.moe_layer import MoESubmodules
    from megatron.training.initialize import initialize_megatron

    import hmoe_megatron.moe.layer
    from hmoe_megatron.placement.plan import PlacementPlan

    given = f"--hmoe-widths {','.join(map(str, WIDTHS))} {flags}".split()
    _, config, _, layout = configure([*TINY, *given])
    initialize_megatron()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    x_SBH, upstream_SBH = torch.randn(
        2, SEQUENCE, 4, HIDDEN, generator=torch.Generator().manual_seed(torch.distributed.get_rank())
    )
    results, router = [], None
    ranks = groups.ep.size()
    plans = [in_order(ranks, pieces), *(random_plan(random.Random(seed), ranks, pieces) for seed in range(1, PLANS))]
    for pieces in plans:
        first, *rest = layout.plan.layers
        plan = PlacementPlan((dataclasses.replace(first, pieces=pieces), *rest))
        layer = hmoe_megatron.moe.layer.HMoELayer(
            config.transformer,
            MoESubmodules(experts=None),
            layer_number=1,
            pg_collection=groups,
            layer=0,
            layout=dataclasses.replace(layout, plan=plan),
        )
        router = router or layer.router.state_dict()
        layer.router.load_state_dict(router)
        x_SBH = x_SBH.detach().requires_grad_()
        y_SBH, _ = layer(x_SBH)
        y_SBH.backward(upstream_SBH)
        result = {"output": y_SBH.detach(), "input": x_SBH.grad, "router": layer.router.weight.grad}
        for name, weight in layer.experts.named_parameters():
            for piece, grad in layer.experts.by_piece(name, weight.grad):
                result[f"{piece.expert}.{piece.lo}.{name}"] = grad
        results.append(result)
    return results


def by_rank_and_expert(ranks, number):
    """{name: tensor} of plan `number`: experts' gradients by name, everything else by rank and name."""
    return {
        name if name[0].isdigit() else f"{name} of rank {rank}": value
        for rank, results in enumerate(ranks)
        for name, value in results[number].items()
    }


def differing(ranks):
    """Names of what differs between the first plan and some other."""
    expected = by_rank_and_expert(ranks, 0)
    names = set()
    for number in range(1, PLANS):
        found = by_rank_and_expert(ranks, number)
        assert found.keys() == expected.keys()
        names |= {name for name in found if not torch.equal(found[name], expected[name])}
    return names


@pytest.mark.parametrize("flags", [TOP3, TOPP, f"{TOP3} --bf16", "--moe-router-topk 4"])
@pytest.mark.parametrize("ep", [2, *rarely(1, 4)])
def test_alltoall_under_any_plan(ep, flags):
    assert differing(run_ranks(ep, layer_under_plans, f"{flags} {ORDERED} --expert-model-parallel-size {ep}")) == set()


def test_pieces_of_the_same_cuts_anywhere():
    flags = f"--moe-router-topk 2 {ORDERED} --expert-model-parallel-size 2"
    assert differing(run_ranks(2, layer_under_plans, flags, CUT)) == set()


def test_expert_tensor_parallel_under_any_plan():
    flags = f"{TOP3} {ORDERED} --expert-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel"
    ranks = run_ranks(4, layer_under_plans, flags)
    assert differing([ranks[0], ranks[2]]) == set()


@pytest.mark.parametrize("dispatcher", [ALLGATHER, *rarely(ALLTOALL)])
def test_two_experts_a_token_commute_under_any_plan(dispatcher):
    flags = f"--moe-router-topk 2 {dispatcher} --expert-model-parallel-size 4"
    assert differing(run_ranks(4, layer_under_plans, flags)) == set()


@pytest.mark.parametrize("flags", [ALLTOALL, f"{ALLGATHER} --deterministic-mode"])
def test_three_experts_a_token_do_not_in_the_order_of_slots(flags):
    """Without --deterministic-mode; and allgather adds up within each rank first, whatever the order of its experts."""
    ranks = run_ranks(2, layer_under_plans, f"{TOP3} {flags} --expert-model-parallel-size 2")
    assert {"output of rank 0", "input of rank 0"} <= differing(ranks)


# --- gradient norm

EIGHT = range(8)
MANY_WIDTHS = (3, 5, 8, 9, 16, 17, 24, 33)
NORMS = 200
SHARD_BOUND = 2 * ONE_ULP


def norms_under_plans(shared):
    """[(ours, Megatron's own)] gradient norms under random plans of the same gradients, seen on this rank.

    shared: the ranks are two expert-parallel ranks of two replicas each, which share every matrix, cut at random.
    """
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

    from hmoe_megatron.moe.compute.flat import MATRICES
    from hmoe_megatron.moe.gradient_norm import logical_norms
    from hmoe_megatron.placement.plan import Piece

    world = torch.distributed.group.WORLD
    rank, ranks = world.rank(), world.size()
    experts, replicas, replica = world, None, 0
    if shared:
        ranks, replica = ranks // 2, rank % 2
        experts = _group([[0, 2], [1, 3]])
        replicas = _group([[0, 1], [2, 3]])
        rank //= 2
    found = []
    for number in range(NORMS):
        draw = random.Random(number)
        layers, held, own = [], {}, []
        for layer in range(2):
            plan = in_order(ranks, EIGHT) if number == 0 else random_plan(draw, ranks, EIGHT)
            on_rank = plan[rank]
            parts = {name: [] for name in MATRICES}
            for expert in on_rank:
                generator = torch.Generator().manual_seed(100 * layer + expert)
                for name, rows in (("linear_fc1_weight", 2), ("linear_fc2_weight", 1)):
                    parts[name].append(torch.randn(rows * MANY_WIDTHS[expert], HIDDEN, generator=generator))
            weights = {name: torch.cat(found) if found else None for name, found in parts.items()}
            for name, grad in weights.items():
                if grad is not None:
                    cut = random.Random(f"{number} {layer} {name}").randrange(grad.numel() + 1) if shared else 0
                    start, end = (0, cut) if shared and not replica else (cut, grad.numel())
                    held[grad] = start, grad.flatten()[start:end]
            # Megatron has a tensor an expert and matrix, expert by expert.
            own += (
                [held[grad][1] for grad in weights.values() if grad is not None]
                if shared
                else [part for of_expert in zip(*parts.values(), strict=True) for part in of_expert]
            )
            layers.append(
                SimpleNamespace(
                    pieces=[Piece(expert, 0, MANY_WIDTHS[expert]) for expert in on_rank],
                    ep_group=experts,
                    held_width=sum(MANY_WIDTHS[expert] for expert in on_rank),
                    **weights,
                    config=SimpleNamespace(num_moe_experts=len(MANY_WIDTHS)),
                )
            )
        ours = logical_norms(layers, held.get, replicas)
        found.append(
            (
                get_grad_norm_fp32(ours, grad_stats_parallel_group=world),
                get_grad_norm_fp32(own, grad_stats_parallel_group=world),
            )
        )
    return found


def _group(ranks_by_group):
    groups = [torch.distributed.new_group(ranks) for ranks in ranks_by_group]
    return next(group for group in groups if group is not torch.distributed.GroupMember.NON_GROUP_MEMBER)


@pytest.mark.parametrize(("world", "shared"), [(2, False), (4, True), *rarely((1, False), (4, False))])
def test_the_gradient_norm_under_any_plan(world, shared):
    ranks = run_ranks(world, norms_under_plans, shared)
    assert all(rank == ranks[0] for rank in ranks)
    ours, megatrons = zip(*ranks[0], strict=True)
    assert len(set(ours)) == 1
    assert len(set(megatrons)) > 1, "Megatron's own depends on the plan"
    assert ours[0] == pytest.approx(megatrons[0], rel=SHARD_BOUND)
    if not shared:
        assert ours[0] == megatrons[0], "in Megatron's own layout it is Megatron's"
