"""Reference backend: Megatron's own linear function, one piece after the other; what every other backend is held to."""

import torch
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce


def reference_experts(x_RH, probs_R, rows, fc1_weights, fc2_weights, config, tp_group):
    """See ExpertCompute. Bitwise equal to Megatron's SequentialMLP where the widths are equal."""
    if len(rows) == 1:
        return _expert(x_RH, probs_R, fc1_weights[0], fc2_weights[0], config, tp_group)
    outputs = [
        _expert(x, probs, fc1, fc2, config, tp_group)
        for x, probs, fc1, fc2 in zip(x_RH.split(rows), probs_R.split(rows), fc1_weights, fc2_weights, strict=True)
    ]
    return torch.cat(outputs)


def _expert(x, probs, fc1, fc2, config, tp_group):
    gate_up = _linear(x, fc1, config, tp_group)
    if config.bias_activation_fusion:
        hidden = weighted_bias_swiglu_impl(gate_up, None, probs.unsqueeze(-1), config.activation_func_fp8_input_store)
    else:
        gate, up = gate_up.chunk(2, dim=-1)
        hidden = (torch.nn.functional.silu(gate) * up * probs.unsqueeze(-1)).to(gate_up.dtype)
    return _linear(hidden, fc2, config, tp_group)


def _linear(x, weight, config, tp_group):
    # Megatron's function rather than F.linear: it accumulates into main_grad when gradient-accumulation fusion is on.
    if not weight.requires_grad:
        return torch.nn.functional.linear(x, weight)
    return linear_with_grad_accumulation_and_async_allreduce(
        x, weight, None, config.gradient_accumulation_fusion, allreduce_dgrad=False, sequence_parallel=False,
        tp_group=tp_group,
    )
