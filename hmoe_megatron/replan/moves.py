"""A change of plan, layer by layer: staged, checked, agreed on, switched.

Nothing of a layer changes before every rank has said that its part is staged and that the digest of each expert's state
is what it was. So where a rank fails the layer stays under its old plan on all of them, and so do the layers after it;
the plan in force is then partly the new one. A rank that dies ends the run, which goes on from its last checkpoint.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from megatron.core import parallel_state

from hmoe_megatron import collectives
from hmoe_megatron.moe.compute.flat import MATRICES
from hmoe_megatron.moe.experts import shares_of
from hmoe_megatron.moe.gradient_norm import expert_part, is_shared
from hmoe_megatron.moe.layer import HMoELayer
from hmoe_megatron.placement.plan import LayerPlan, PlacementPlan
from hmoe_megatron.replan.states import held_of, whole
from hmoe_megatron.replan.transfer import digest, exchange, segments


class Moved(NamedTuple):
    """layers: those that are under the new plan; sent_bytes: by this rank; failure: why the others are not, or ""."""

    layers: list[int]
    sent_bytes: int
    seconds: float
    failure: str


def layers_of(model: Sequence) -> dict[int, HMoELayer]:
    """Number -> layer with experts, of the chunks of this rank."""
    return {module.layer: module for chunk in model for module in chunk.modules() if isinstance(module, HMoELayer)}


def change_plan(model: Sequence, optimizer, layout, new: PlacementPlan) -> Moved:
    """Bring the experts of ``model``, its chunks on this rank, with the optimizer's state under ``new``. Every rank
    calls it, between two steps.

    Memory beyond what is held: validate_args.memory.moving_bytes.
    """
    began_s = time.monotonic()
    part, mine = expert_part(optimizer), layers_of(model)
    kinds = sorted(set().union(*collectives.all_ranks(lambda: _kinds(part, mine))))
    places = _places() if mine else []
    done, sent_bytes, failure = [], 0, ""
    for place, number in enumerate(new.numbers):
        if layout.plan.layers[place].pieces == new.layers[place].pieces:
            continue
        try:
            stage = _staged(part, mine.get(number), places, layout.plan.layers[place], new.layers[place], kinds)
        except collectives.StepFailed as error:
            failure = f"layer {number}: {error}"
            break
        layers = list(layout.plan.layers)
        layers[place] = new.layers[place]
        layout.plan = replace(layout.plan, layers=tuple(layers))
        if stage:
            sent_bytes += stage.switch()
        stage = None  # its memory is the next one's
        done.append(number)
    if done and mine:
        _to_model(part, model)
    return Moved(done, sent_bytes, time.monotonic() - began_s, failure)


def _staged(part, layer: HMoELayer | None, places, old: LayerPlan, new: LayerPlan, kinds: list[str]):
    """The `_Stage` of a layer, full and checked, None on a rank of another pipeline stage. Raises StepFailed on all
    ranks if one has failed."""
    stage = _agreed(lambda: _Stage(part, layer, places, old.pieces, new.pieces, kinds) if layer else None)
    problem = stage.exchange() if stage else ""
    _agreed(lambda: _raise(problem))
    return stage


class _Stage:
    """One layer on its way: memory is taken when it is made, `exchange` fills it, `switch` puts it in place."""

    def __init__(self, part, layer: HMoELayer, places, old, new, kinds: list[str]):
        self.part, self.layer, self.kinds, self.sent_bytes = part, layer, kinds, 0
        self.group = parallel_state.get_expert_tensor_and_model_parallel_group()
        experts = layer.experts
        size = experts.tp_group.size()
        self.old, self.new = ([shares_of(pieces[ep], tp, size) for ep, tp in places] for pieces in (old, new))
        self.ways = segments(self.old, self.new)
        if (most := max(sum(piece.width for piece in pieces) for pieces in self.new)) > experts.held_width:
            raise ValueError(f"a rank would hold {most} of width, and has room for {experts.held_width}")
        self.weights = {matrix: getattr(experts, matrix) for matrix in MATRICES}
        self.after = {
            (matrix, kind): torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            for matrix, weight in self.weights.items()
            for kind in kinds
        }

    def exchange(self) -> str:
        """Fill the new state from all ranks; what is wrong with it, or "". Collective over the stage's ranks."""
        rank, widths_E, sums = self.group.rank(), self.layer.experts.widths, []
        for matrix, weight in self.weights.items():
            held = held_of(self.part, weight)
            before = [whole(self.part, weight, held, kind) for kind in self.kinds]
            after = [self.after[matrix, kind] for kind in self.kinds]
            self.sent_bytes += exchange(matrix, before, after, self.old, self.new, self.ways, self.group)
            sums.append(
                digest(matrix, before, self.old[rank], widths_E) - digest(matrix, after, self.new[rank], widths_E)
            )
        differ = torch.cat(sums)
        torch.distributed.all_reduce(differ, group=self.group)
        of = list(self.after)
        wrong = [f"{of[row][1]} of {of[row][0]} of expert {expert}" for row, expert in differ.nonzero().tolist()]
        return f"changed on the way: {', '.join(wrong[:8])}" if wrong else ""

    def switch(self) -> int:
        """Put it in place, and the layer under the layout's plan; the bytes that this rank sent."""
        for matrix, weight in self.weights.items():
            held = held_of(self.part, weight)
            for kind, now in held.states.items():
                now.copy_(self.after[matrix, kind].view(-1)[held.start : held.start + now.numel()])
        self.layer.take_plan()
        return self.sent_bytes


def _kinds(part, mine: dict[int, HMoELayer]) -> set[str]:
    """Of state, as far as this rank has any."""
    weights = [getattr(layer.experts, matrix) for layer in mine.values() for matrix in MATRICES]
    return set().union(*(held_of(part, weight).states for weight in weights))


def _places() -> list[tuple[int, int]]:
    """(expert-parallel rank, expert-tensor-parallel rank) of each rank of the group that has both."""
    group = parallel_state.get_expert_tensor_and_model_parallel_group()
    own = parallel_state.get_expert_model_parallel_rank(), parallel_state.get_expert_tensor_parallel_rank()
    places = [None] * group.size()
    torch.distributed.all_gather_object(places, own, group=group)
    return places


def _agreed(step):
    """What ``step`` returns, when it has succeeded on every rank. Raises StepFailed on all of them."""
    kept = []
    collectives.all_ranks(lambda: kept.append(step()))
    return kept[0]


def _raise(problem: str) -> None:
    if problem:
        raise ValueError(problem)


def _to_model(part, model) -> None:
    """The masters into the weights that the model computes with, on every copy."""
    if hasattr(part, "_copy_main_params_to_model_params"):
        part._copy_main_params_to_model_params()
    if is_shared(part):
        for chunk in model:
            if not chunk.ddp_config.overlap_param_gather:  # then the next forward pass gathers
                chunk.start_param_sync()
