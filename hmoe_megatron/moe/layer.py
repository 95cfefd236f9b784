"""The MoE layer: Megatron's, with slots in place of experts and a router that doesn't know it.

A token's way:
1. router.py scores it against the E logical experts, chooses by Top-K or Top-P, and adds the losses (losses.py).
2. slots.py turns the E columns into S: a piece of an expert that this layer's plan puts on a rank is a slot.
3. Megatron's dispatcher, or token_dispatcher.py's where the order of sums must not depend on the plan, sends the token
   by all-to-all to the ranks of its slots.
4. experts.py computes the rows of each piece with the backend that compute/choice.py chose.
5. The dispatcher sends the results back and adds them up: pieces of one expert sum to the whole.

Legend: T tokens, E logical experts, S slots over all expert-parallel ranks.
"""

from functools import partial

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher

from hmoe_megatron.moe.experts import HMoEExperts
from hmoe_megatron.moe.router import HMoERouter
from hmoe_megatron.moe.slots import dispatch_slots, logical_slot_order, to_slots, unpadded
from hmoe_megatron.moe.token_dispatcher import LogicalOrderDispatcher, OneRankDispatcher
from hmoe_megatron.patches.hooks import unpadded_flex_dispatcher

_DISPATCHERS = {"alltoall": MoEAlltoAllTokenDispatcher, "allgather": MoEAllGatherTokenDispatcher}


class HMoELayer(MoELayer):
    """MoELayer whose dispatcher counts slots and whose router, losses and experts count logical experts.

    ``config.num_moe_experts`` is the number of logical experts; the layer hands Megatron's own parts a copy that holds
    the number of slots instead. ``layout`` (ExpertLayout) and ``layer``, the decoder layer from 0, come with the spec:
    Megatron gives a layer its number after construction, too late for parameters that depend on it.
    """

    def __init__(
        self,
        config,
        submodules=None,
        layer_number=None,
        pg_collection=None,
        is_mtp_layer=False,
        name=None,
        *,
        layout,
        layer: int,
    ):
        slots, slot_config = dispatch_slots(config, layout, layer)

        # MoELayer hands its builders the config of slots; ours take the logical one instead.
        def router(*, config, pg_collection, is_mtp_layer):
            return HMoERouter(logical_config, pg_collection, is_mtp_layer, layout=layout, layer=layer)

        def experts(num_slots, config, *, pg_collection, name=None):
            return HMoEExperts(
                num_slots, logical_config, layout=layout, layer=layer, pg_collection=pg_collection, name=name
            )

        logical_config = config
        submodules = MoESubmodules(experts=experts, shared_experts=submodules.shared_experts, router=router)
        super().__init__(slot_config, submodules, layer_number, pg_collection, is_mtp_layer, name)
        self.flex = config.moe_token_dispatcher_type == "flex"
        if self.flex:
            unpadded_flex_dispatcher(self.token_dispatcher, unpadded(slot_config))
        self.register_buffer("slot2expert_S", None, persistent=False)
        self.layout, self.layer, self.logical_config = layout, layer, config
        self.groups = pg_collection or get_default_pg_collection()
        self._dispatch_to(slots)

    def take_plan(self) -> None:
        """The layout's plan: slots, dispatcher and pieces of this layer. What the parameters hold is not looked at."""
        slots, self.config = dispatch_slots(self.logical_config, self.layout, self.layer)
        self.num_local_experts = len(slots) // self.groups.ep.size()
        first = self.groups.ep.rank() * self.num_local_experts
        self.local_expert_indices = list(range(first, first + self.num_local_experts))
        self.token_dispatcher = self._new_dispatcher(_DISPATCHERS[self.config.moe_token_dispatcher_type])
        self._dispatch_to(slots)
        self.experts.take_pieces(self.layout)

    def _dispatch_to(self, slots: list[int]) -> None:
        """slots: logical expert of each."""
        self.slot2expert_S = None
        if slots != list(range(self.logical_config.num_moe_experts)):
            self.slot2expert_S = torch.tensor(slots, device=torch.cuda.current_device())
        if self.config.moe_token_dispatcher_type == "alltoall":
            self._choose_dispatcher(logical_slot_order(self.layout.pieces(self.layer)))

    def _choose_dispatcher(self, slot_order: list[int]) -> None:
        """Another than Megatron's where the order of the slots could show in the last bit, or rows are of one rank."""
        # Two addends commute: with at most two rows a token Megatron's own order gives the same bits.
        several = self.config.moe_router_topk > 2 or self.config.moe_expert_capacity_factor is not None
        if self.config.deterministic_mode and several and slot_order != sorted(slot_order):
            kind = partial(LogicalOrderDispatcher, slot_order=slot_order)
        elif self.token_dispatcher.ep_size == self.token_dispatcher.tp_size == 1:
            kind = OneRankDispatcher
        else:
            return
        self.token_dispatcher = self._new_dispatcher(kind)

    def _new_dispatcher(self, kind):
        """One of this kind in place of the one at hand, whose shared experts it takes over."""
        shared_experts = self.token_dispatcher.shared_experts
        dispatcher = kind(
            self.num_local_experts, self.local_expert_indices, config=self.config, pg_collection=self.groups
        )
        if shared_experts is not None:
            dispatcher.set_shared_experts(shared_experts)
        return dispatcher

    def route(self, hidden_states, padding_mask=None):
        """Probabilities and routing map of the slots, [T, S] each, from the router's [T, E]."""
        probs_TE, routing_map_TE = super().route(hidden_states, padding_mask)
        if self.flex:
            probs_TE = probs_TE.float()  # what DeepEP and HybridEP move; Megatron casts too, with a warning a step
        if self.slot2expert_S is None:
            return probs_TE, routing_map_TE
        return to_slots(probs_TE, self.slot2expert_S), to_slots(routing_map_TE, self.slot2expert_S)


def hmoe_layer(layout, shared_experts, layer: int):
    """Builder of the MLP submodule of decoder layer ``layer`` (from 0), for a transformer layer's spec."""
    return partial(
        HMoELayer, layout=layout, layer=layer, submodules=MoESubmodules(experts=None, shared_experts=shared_experts)
    )
