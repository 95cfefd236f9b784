"""Alltoall dispatch where Megatron's does too much or too little for slots.

Legend: T tokens, S slots over all ranks, R routed rows of this rank, H hidden size.
"""

import torch
from megatron.core.transformer.moe.moe_utils import sort_chunks_by_idxs
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher


class OneRankDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's dispatcher without its second permutation, for one expert-parallel and expert-tensor-parallel rank.

    Rows of several ranks must be sorted by expert once more when they have arrived. Those of one rank are sorted
    already: the permutation would copy all of them as they are, four times a step.
    """

    def dispatch_postprocess(self, rows_RH, probs_R):
        """(rows, tokens of each expert, probabilities), rows as they came."""
        tokens_per_expert_S = self.tokens_per_expert
        for point in ("before_permutation_2", "before_finish"):  # where the counts may have to be waited for
            tokens_per_expert_S = self._maybe_dtoh_and_synchronize(point, tokens_per_expert_S)
        self.tokens_per_expert = None
        return rows_RH, tokens_per_expert_S, probs_R

    def combine_preprocess(self, rows_RH):
        """Rows as they are."""
        return rows_RH


class LogicalOrderDispatcher(MoEAlltoAllTokenDispatcher):
    """Adds up a token's experts in logical order, so that the sum does not depend on the plan: rows are permuted by
    logical expert first and moved to their slots as blocks.

    Megatron adds up a token's rows in the order of the slots, forward in the combine and backward in the dispatch; with
    more than two rows a token that order shows in the last bit. Moving blocks adds nothing up in either direction, but
    copies all rows once more each way: only under --deterministic-mode.
    ``slot_order``: slots in the order of (logical expert, width range), empty ones anywhere.
    """

    def __init__(self, *args, slot_order: list[int], **kwargs):
        super().__init__(*args, **kwargs)
        device = torch.cuda.current_device()
        self.slot_order_S = torch.tensor(slot_order, device=device)
        self.place_of_slot_S = torch.argsort(self.slot_order_S)

    def preprocess(self, routing_map_TS):
        """Counts are by slot; ``routing_map_TS`` has its columns in logical order."""
        return super().preprocess(routing_map_TS.index_select(1, self.place_of_slot_S))

    def dispatch_preprocess(self, hidden_states, routing_map_TS, probs_TS):
        """Rows and probabilities by slot, from columns by slot."""
        routing_map_TS = routing_map_TS.index_select(1, self.slot_order_S)
        rows_RH, probs_R = super().dispatch_preprocess(
            hidden_states, routing_map_TS, probs_TS.index_select(1, self.slot_order_S)
        )
        self.rows_per_place_S = routing_map_TS.sum(dim=0)
        return sort_chunks_by_idxs(
            rows_RH, self.rows_per_place_S, self.place_of_slot_S, probs=probs_R, fused=self.config.moe_permute_fusion
        )

    def combine_postprocess(self, rows_RH):
        """Sum of each token's rows in logical order, from rows by slot."""
        rows_per_slot_S = self.rows_per_place_S.index_select(0, self.place_of_slot_S)
        rows_RH, _ = sort_chunks_by_idxs(
            rows_RH, rows_per_slot_S, self.slot_order_S, fused=self.config.moe_permute_fusion
        )
        return super().combine_postprocess(rows_RH)
