"""What Megatron asks of collectives and gloo does not do."""

import functools

import torch
import torch.distributed

from hmoe_megatron.patches.registry import patch, replace


@patch("cpu")
def all_to_all_split_tensors():
    """Megatron's dispatcher hands split sizes as tensors (on a GPU it turns them into arrays first); gloo
    wants lists."""
    stock = torch.distributed.all_to_all_single

    @functools.wraps(stock)
    def all_to_all_single(output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
        splits = _as_list(output_split_sizes), _as_list(input_split_sizes)
        return stock(output, input, *splits, group, async_op)

    replace(torch.distributed, "all_to_all_single", all_to_all_single)


def _as_list(sizes):
    return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes


@patch("cpu")
def all_gather_uneven():
    """gloo refuses an all_gather of unequal tensors (tensor_parallel/mappings.py, expert tensor parallel >
    1). Pads to the largest. Its reduce_scatter of unequal tensors is right as it is."""
    stock = torch.distributed.all_gather

    @functools.wraps(stock)
    def all_gather(tensor_list, tensor, group=None, async_op=False):
        if len({part.shape for part in tensor_list}) <= 1:
            return stock(tensor_list, tensor, group, async_op)
        if async_op:
            raise NotImplementedError("all_gather of unequal tensors with async_op=True on gloo")
        padded = tensor.new_zeros(max(part.numel() for part in tensor_list))
        padded[: tensor.numel()] = tensor.flatten()
        gathered = [torch.empty_like(padded) for _ in tensor_list]
        stock(gathered, padded, group)
        for part, values in zip(tensor_list, gathered, strict=True):
            part.copy_(values[: part.numel()].view_as(part))
        return None

    replace(torch.distributed, "all_gather", all_gather)
