"""Logical columns to slots: each piece gets its expert's column, empty slots nothing."""

import argparse
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization

from hmoe_megatron.config import HMoEConfig
from hmoe_megatron.moe.slots import dispatch_slots, most_slots, slot2expert, to_slots, unpadded
from hmoe_megatron.placement.plan import Piece
from hmoe_megatron.validate_args import check_dispatch

PIECES = ((Piece(2, 0, 5), Piece(0, 0, 3), Piece(1, 0, 2)), (Piece(1, 2, 9),), ())


def test_slots_of_a_plan():
    assert slot2expert(PIECES, 3) == [2, 0, 1, 1, 3, 3, 3, 3, 3]
    assert slot2expert(((), ()), 3) == [3, 3], "a rank has one slot at least"


def test_columns_follow_their_expert_and_gradients_come_back_summed():
    columns_TE = torch.arange(6.0).view(2, 3).requires_grad_()
    slots_TS = to_slots(columns_TE, torch.tensor(slot2expert(PIECES, 3)))
    assert slots_TS.tolist() == [[2, 0, 1, 1, 0, 0, 0, 0, 0], [5, 3, 4, 4, 0, 0, 0, 0, 0]]
    slots_TS.sum().backward()
    assert columns_TE.grad.tolist() == [[1, 2, 1], [1, 2, 1]]


def test_a_routing_map_stays_boolean():
    routing_map = torch.tensor([[True, False, True]])
    slots = to_slots(routing_map, torch.tensor(slot2expert(PIECES, 3)))
    assert slots.dtype == torch.bool and slots.sum() == 2


TOPP = HMoEConfig(router="topp", top_p=0.6)


@pytest.mark.parametrize(
    ("settings", "topk", "most"),
    [
        (HMoEConfig(), 1, 2),
        (HMoEConfig(), 2, 3),
        (TOPP, 1, 4),
        (HMoEConfig(router="topp", top_p=0.6, max_experts_per_token=2), 1, 3),
    ],
)
def test_most_slots_of_a_token(settings, topk, most):
    """Experts 0 and 2 have one slot, 1 has two."""
    assert most_slots(slot2expert(PIECES, 3), 3, settings, topk) == most


def model(settings=None, pieces=PIECES, **config):
    """Config of a model whose other layer has four slots on each of three ranks."""
    layout = SimpleNamespace(
        settings=settings or HMoEConfig(),
        pieces=lambda layer: pieces,
        slots=lambda: 12,
        layers=[0],
        plan=SimpleNamespace(ranks=3),
        has_cuts=lambda layer: pieces is PIECES,
    )
    values = {
        "num_moe_experts": 3,
        "moe_router_topk": 2,
        "moe_expert_capacity_factor": None,
        "moe_token_dispatcher_type": "alltoall",
        "moe_flex_dispatcher_backend": "deepep",
    }
    return SimpleNamespace(**(values | config)), layout


WHOLE = ((Piece(2, 0, 5),), (Piece(0, 0, 3),), (Piece(1, 0, 9),))


@pytest.mark.parametrize(
    ("config", "counted"),
    [
        (model(pieces=WHOLE), (3, 2, None)),
        (model(), (9, 3, 1.0)),
        (model(TOPP, WHOLE), (3, 3, 1.0)),
        (model(pieces=WHOLE, moe_token_dispatcher_type="flex"), (3, 2, 1.0)),
        (model(moe_token_dispatcher_type="flex"), (9, 3, 1.0)),
        (model(moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="hybridep"), (12, 3, 1.0)),
    ],
)
def test_what_the_dispatchers_count(config, counted):
    """Slots, the most of a token, and a capacity factor wherever a token's number of slots varies."""
    config, layout = config
    slots, found = dispatch_slots(config, layout, 0)
    assert (found.num_moe_experts, found.moe_router_topk, found.moe_expert_capacity_factor) == counted
    assert len(slots) == counted[0] and len(slots) % 3 == 0
    assert config.num_moe_experts == 3, "the model's own config counts experts"


@pytest.mark.parametrize("quantized", [{"fp8": "hybrid"}, {"fp4": "e2m1"}, {"use_transformer_engine_op_fuser": True}])
def test_no_dispatcher_pads_rows_for_fp8_kernels(quantized):
    plain = {
        "fp8": None,
        "fp4": None,
        "use_transformer_engine_op_fuser": False,
        "fp8_recipe": "delayed",
        "fp4_recipe": "nvfp4",
    }
    config = SimpleNamespace(**(plain | quantized))
    assert get_align_size_for_quantization(config) > 0
    assert get_align_size_for_quantization(unpadded(config)) == 0
    assert vars(config) == plain | quantized


def test_more_slots_than_deepep_moves():
    many = tuple(tuple(Piece(expert, rank, rank + 1) for expert in range(9)) for rank in range(4))
    args = argparse.Namespace(
        moe_token_dispatcher_type="flex",
        moe_flex_dispatcher_backend="deepep",
        num_experts=9,
        moe_router_topk=8,
        expert_tensor_parallel_size=None,
        tensor_model_parallel_size=1,
    )
    check_dispatch(args, model(pieces=many)[1])
    with pytest.raises(ValueError, match="a token can fill 36 slots in layer 0, its kernels move 32 at most"):
        check_dispatch(args, model(TOPP, many)[1])
    args.tensor_model_parallel_size = 2
    with pytest.raises(ValueError, match="a token can fill 64 slots"):
        check_dispatch(args, model(pieces=many)[1])
    args.moe_flex_dispatcher_backend = "hybridep"
    check_dispatch(args, model(TOPP, many)[1])
