"""Where a training step's time goes: router, permutation, dispatch, experts, gradient norm, optimizer, and the rest.

Works on our MoE layer and on Megatron's, whose steps it has: each is timed by events of the device, forward by a pair
around the call, backward from the gradient of its output to the gradient of its input.
"""

import contextlib
from collections import defaultdict

import torch

# Part of the step: methods of the MoE layer, of its dispatcher, of its experts.
PARTS = {
    "router": (("layer", "route"),),
    "permutation": (
        ("dispatcher", "dispatch_preprocess"),
        ("dispatcher", "dispatch_postprocess"),
        ("dispatcher", "combine_preprocess"),
        ("dispatcher", "combine_postprocess"),
    ),
    "dispatch": (("dispatcher", "token_dispatch"), ("dispatcher", "token_combine")),
    "experts": (("experts", "forward"),),
}


class StepParts:
    """Times of the parts while it is open (``with``), over all MoE layers of ``model`` and one optimizer."""

    def __init__(self, model, optimizer):
        self.intervals = defaultdict(list)  # part -> [(start, end)]
        self._model, self._optimizer = model, optimizer
        self._undo = contextlib.ExitStack()

    def __enter__(self):
        for layer in (module for module in self._model.modules() if hasattr(module, "token_dispatcher")):
            owners = {"layer": layer, "dispatcher": layer.token_dispatcher, "experts": layer.experts}
            for part, methods in PARTS.items():
                for owner, name in methods:
                    self._wrap(owners[owner], name, part, backward=True)
        self._wrap(self._optimizer, "get_grad_norm", "gradient norm")
        self._wrap(self._optimizer, "step", "optimizer")
        return self

    def __exit__(self, *_):
        self._undo.close()

    def ms(self) -> dict[str, float]:
        """Milliseconds of each part in all. The optimizer's are without the gradient norm, which it asks for."""
        torch.cuda.synchronize()
        parts = {part: sum(start.elapsed_time(end) for start, end in of) for part, of in self.intervals.items()}
        if "optimizer" in parts:
            parts["optimizer"] -= parts.get("gradient norm", 0.0)
        return parts

    def _wrap(self, owner, name, part, backward=False):
        stock = getattr(owner, name)

        def timed(*args, **kwargs):
            if backward:
                args, entered = _through_views(args)
            start = _event()
            out = stock(*args, **kwargs)
            self.intervals[part].append((start, _event()))
            if backward:
                self._time_backward(part, entered, out)
            return out

        setattr(owner, name, timed)  # of the instance: the class is left alone
        self._undo.callback(delattr, owner, name)

    def _time_backward(self, part, entered, out):
        leaving = next((t for t in _tensors(out) if t.requires_grad), None)
        if leaving is None or entered is None or not entered.requires_grad:
            return
        begun = []
        leaving.register_hook(lambda gradient: begun.append(_event()))
        entered.register_hook(lambda gradient: begun and self.intervals[part].append((begun[0], _event())))


def _through_views(args):
    """(args with the first floating-point tensor replaced by a view of its own, that view): the gradient of the view is
    the one that this call gives, whoever else uses the tensor."""
    for index, value in enumerate(args):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            view = value.view_as(value)
            return (*args[:index], view, *args[index + 1 :]), view
    return args, None


def _tensors(out):
    return [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor)]


def _event():
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def kernels(run, most: int = 12) -> list[tuple[str, int, float]]:
    """[(kernel, calls, milliseconds)] of one call of ``run``, the longest first; operators on a CPU."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        run()
        torch.cuda.synchronize()
    rows = [
        (event.key, event.count, (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3)
        for event in profiled.key_averages()
    ]
    return sorted(rows, key=lambda row: -row[2])[:most]
