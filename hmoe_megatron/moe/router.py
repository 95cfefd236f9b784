"""The router over logical experts: Megatron's Top-K, Top-P, and the HMoE losses.

Legend: T tokens on this rank, E logical experts.
"""

import copy

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.router import TopKRouter

from hmoe_megatron.moe.capacity import capacities, within_capacity
from hmoe_megatron.moe.losses import load_balance, p_penalty, router_entropy


def top_p_routing(
    probs_TE: torch.Tensor, top_p: float, max_experts: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest experts a token whose probabilities add up to ``top_p`` (arXiv 2403.07652), renormalised.

    probs_TE: float32 softmax over all experts. Returns (weights_TE float32, rows summing to 1; routing_map_TE bool).
    A token always has one expert or more, at most ``max_experts``; among equal probabilities the lower expert wins.
    """
    sorted_TE, order_TE = probs_TE.sort(dim=-1, descending=True, stable=True)
    keep_TE = (sorted_TE.cumsum(dim=-1) - sorted_TE) < top_p
    keep_TE[:, 0] = True  # also where a NaN makes every comparison false
    if max_experts is not None:
        keep_TE[:, max_experts:] = False
    routing_map_TE = torch.zeros_like(keep_TE).scatter(1, order_TE, keep_TE)
    chosen_TE = probs_TE * routing_map_TE
    return chosen_TE / chosen_TE.sum(dim=-1, keepdim=True), routing_map_TE


class HMoERouter(TopKRouter):
    """Megatron's router with ``config.num_moe_experts`` logical experts; knows nothing of slots, pieces or ranks."""

    def __init__(self, config, pg_collection=None, is_mtp_layer=False, *, layout, layer: int):
        self.capacity_factor = config.moe_expert_capacity_factor
        config = copy.copy(config)
        config.moe_expert_capacity_factor = None  # Megatron's is one number of tokens, whatever an expert's width
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.layer = layer
        self.hmoe, self.stats, self.widths = layout.settings, layout.stats, layout.widths[layer]
        # Integers: Megatron casts every floating-point buffer of a bf16 model to bf16.
        # On the device at once, as Megatron's own: with --use-cpu-initialization the model is not moved.
        width_E = torch.tensor(self.widths, device=torch.cuda.current_device())
        self.register_buffer("width_E", width_E, persistent=False)
        self.relative_width_E = None  # float32, made once: at every call it would be three kernels

    def routing(self, logits, padding_mask=None):
        """Route (see TopKRouter.routing), attach the HMoE losses to the probabilities, count tokens for telemetry."""
        logits_TE = logits.view(-1, self.config.num_moe_experts)
        flat_mask_T = None if padding_mask is None else padding_mask.reshape(-1)
        if self.hmoe.router == "topp":
            logits_TE = self.apply_z_loss(logits_TE, padding_mask=flat_mask_T)
            weights_TE, routing_map_TE = top_p_routing(
                torch.softmax(logits_TE, dim=-1, dtype=torch.float32), self.hmoe.top_p, self.hmoe.max_experts_per_token
            )
            weights_TE = weights_TE.type_as(logits)
        else:
            weights_TE, routing_map_TE = super().routing(logits, padding_mask)
        chosen_TE = routing_map_TE
        if self.capacity_factor is not None:
            rows = routing_map_TE.sum() if self.hmoe.router == "topp" else len(routing_map_TE) * self.topk
            capacity_E = capacities(self.width_E, rows, self.capacity_factor)
            routing_map_TE = within_capacity(weights_TE, chosen_TE, capacity_E, self.config.moe_token_drop_policy)
            weights_TE = weights_TE * routing_map_TE
            super()._apply_expert_bias(routing_map_TE, padding_mask=flat_mask_T)
        if self.training and torch.is_grad_enabled():  # so once a step under recompute, and not in evaluation
            weights_TE = self._attach_losses(weights_TE, chosen_TE, routing_map_TE, logits_TE, flat_mask_T)
        return weights_TE, routing_map_TE

    def _apply_expert_bias(self, routing_map, padding_mask=None):
        """As Megatron's, which counts what experts compute: tokens that `routing` drops later are not counted."""
        if self.capacity_factor is None:
            super()._apply_expert_bias(routing_map, padding_mask=padding_mask)

    def _attach_losses(self, weights_TE, chosen_TE, routing_map_TE, logits_TE, padding_mask_T):
        """Telemetry counts ``routing_map_TE``, what is computed; the losses ``chosen_TE``, dropped tokens too."""
        valid_T = None if padding_mask_T is None else ~padding_mask_T
        counts_E = _counts(routing_map_TE, valid_T)
        local_tokens = weights_TE.shape[0] if valid_T is None else valid_T.sum()
        # 0, or NaN where a logit is NaN or infinite: who is to blame is known without a copy from the device.
        least, most = logits_TE.detach().aminmax()
        self.stats.record(self.layer, counts_E, local_tokens, mark=least * 0 + most * 0)

        coeffs = self.hmoe.loss_coeffs
        if not coeffs:
            return weights_TE
        if chosen_TE is not routing_map_TE:
            counts_E = _counts(chosen_TE, valid_T)
        counts_E = reduce_from_tensor_model_parallel_region(counts_E, self.tp_cp_group)
        num_tokens = local_tokens * self.tp_cp_group.size()
        if valid_T is not None:
            # A copy: the reduction works in place.
            num_tokens = reduce_from_tensor_model_parallel_region(local_tokens.clone(), self.tp_cp_group)
        log_probs_TE = torch.log_softmax(logits_TE, dim=-1, dtype=torch.float32)
        probs_TE = log_probs_TE.exp()
        prob_sum_E = (probs_TE if valid_T is None else probs_TE * valid_T.unsqueeze(-1)).sum(dim=0)
        if self.relative_width_E is None:
            self.relative_width_E = self.width_E / self.width_E.float().mean()
        losses = {
            "p_penalty_loss": lambda: p_penalty(counts_E, prob_sum_E, self.relative_width_E, num_tokens),
            "load_balance_loss": lambda: load_balance(counts_E, prob_sum_E, num_tokens),
            "router_entropy_loss": lambda: router_entropy(log_probs_TE, valid_T, num_tokens),
        }
        for name, coeff in coeffs.items():
            weights_TE = self.attach_and_log_load_balancing_loss(
                weights_TE, coeff, losses[name]() * coeff, name, self.tp_cp_group, valid_token_count=local_tokens
            )
        return weights_TE


def _counts(routing_map_TE, valid_T):
    """Tokens of each expert, float32: exact, and summing booleans takes a CPU six times as long."""
    counted_TE = routing_map_TE if valid_T is None else routing_map_TE & valid_T.unsqueeze(-1)
    return counted_TE.float().sum(dim=0)
