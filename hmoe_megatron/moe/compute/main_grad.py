"""Weight gradients straight into Megatron's ``main_grad``, without a tensor of their own.

Megatron's data-parallel wrapper adds each weight's gradient to a buffer when autograd is done with it. A backend that
adds to the buffer itself saves writing and reading the gradient once, and its memory; Megatron knows this from its own
gradient-accumulation fusion.
"""

import functools

import torch


def main_grads(*weights: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """Megatron's buffers of the weights' gradients, where all have one that a kernel can write to. None for weights
    that are used more than once in a pass: autograd adds their gradients up itself."""
    if any(getattr(weight, "used_often", False) for weight in weights):
        return None
    grads = [getattr(weight, "main_grad", None) for weight in weights]
    fit = all(grad is not None and grad.is_contiguous() and grad.data_ptr() % 16 == 0 for grad in grads)
    return tuple(grads) if fit else None


def added(weight: torch.Tensor) -> torch.Tensor:
    """Tell Megatron that the gradient of ``weight``, the parameter itself, is in its buffer.

    Returns what autograd gets: a tensor without memory, which nothing may read. Megatron's hook does not, and takes it
    away. So no weight may be in a graph twice, and none of its gradient may be left from before.
    """
    weight.grad_added_to_main_grad = True
    if torch.is_anomaly_enabled():  # autograd then looks for NaN in it
        return torch.zeros_like(weight)
    return placeholder(weight.shape, weight.dtype, weight.device).detach()


@functools.cache
def placeholder(shape, dtype, device) -> torch.Tensor:
    """A tensor of this shape that occupies nothing, after it is made. Megatron's hook wants a gradient of the right
    shape, so that it runs in autograd's thread and knows the weight's turn."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    tensor.untyped_storage().resize_(0)
    return tensor
