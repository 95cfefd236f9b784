"""What the layers count while they run, on the device, without a device-to-host copy until it is asked for.

Legend: L MoE layers, E logical experts.
"""

import contextlib
from types import SimpleNamespace

import torch


class RoutingStats:
    """Tokens of every expert of every MoE layer, and the time of this rank's expert compute.

    ``timing`` switches the time measurement on, for the steps that log.
    """

    def __init__(self, layers: list[int], num_experts: int):
        self._row = {layer: row for row, layer in enumerate(layers)}
        self._shape = (len(layers), num_experts + 2)  # and: tokens routed, 0 or NaN of a router that was not finite
        self._totals = self._window = None
        self._intervals = []
        self.timing = False

    def record(self, layer: int, counts_E: torch.Tensor, num_tokens: torch.Tensor | int, mark=0.0) -> None:
        """Add one micro-batch of this rank: tokens that chose each expert of ``layer``, tokens routed.

        mark: scalar, 0, or NaN where the router's logits were not finite, which stays in the layer's sum.
        """
        totals = self._on(counts_E.device)[self._row[layer]]
        totals[:-2] += counts_E
        totals[-2] += num_tokens
        totals[-1] += mark

    def layers_not_finite(self) -> list[int]:
        """Layers that this rank has marked with a NaN since the last ``take``. Copies from the device."""
        return [] if self._totals is None else self._marked(self._totals)

    def _marked(self, totals) -> list[int]:
        marked_L = totals[:, -1].isnan().tolist()
        return [layer for layer, row in self._row.items() if marked_L[row]]

    def _on(self, device):
        if self._totals is None:
            # float64 holds counts exactly up to 2^53, and every backend reduces it.
            self._totals = torch.zeros(self._shape, dtype=torch.float64, device=device)
        return self._totals

    @contextlib.contextmanager
    def expert_time(self, x_RH, training: bool = True):
        """Time the block, and the backward pass from the gradient of ``.output`` to the gradient of ``x_RH``."""
        timed = SimpleNamespace(output=None)
        if not (self.timing and training):
            yield timed
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield timed
        end.record()
        self._intervals.append((start, end))
        if torch.is_grad_enabled() and x_RH.requires_grad:
            self._time_backward(timed.output, x_RH)

    def _time_backward(self, output, x_RH):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun = []

        def begin(_):
            start.record()
            begun.append(True)

        def finish(_):
            if begun:  # x may get a gradient where the output's is not asked for
                end.record()
                self._intervals.append((start, end))

        output.register_hook(begin)
        x_RH.register_hook(finish)

    def take(self, groups, device) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """(counts_LE, tokens_L, marked) since the last call, float64 on the CPU, summed over each group in turn.

        marked: the layers whose router gave logits that are not finite, on any rank.
        """
        totals = self._on(device).clone()
        if self._window is not None:
            self._window = self._window + totals
        self._totals.zero_()
        totals = _over_ranks(totals, groups)
        return totals[:, :-2], totals[:, -2], self._marked(totals)

    def open_window(self) -> None:
        """From now on `take_window` can be called."""
        self._window = 0.0

    def take_window(self, groups, device) -> torch.Tensor:
        """counts_LE since the last call, or since `open_window`, whatever `take` took of them: float64 on the CPU,
        summed over each group."""
        window = self._window + self._on(device)
        self._window = -self._on(device)  # what is in them has been seen
        return _over_ranks(window, groups)[:, :-2]

    def take_expert_time_ms(self) -> float:
        """Milliseconds this rank spent in its experts, forward and backward, in the steps timed since the last call."""
        if self._intervals:
            torch.cuda.synchronize()
        elapsed_ms = sum(start.elapsed_time(end) for start, end in self._intervals)
        self._intervals.clear()
        return elapsed_ms


def _over_ranks(totals: torch.Tensor, groups) -> torch.Tensor:
    """Summed over each group in turn, on the CPU."""
    for group in groups:
        torch.distributed.all_reduce(totals, group=group)
    return totals.cpu()


def groups_of_all_ranks() -> tuple:
    """Over which sums of counters are those of all ranks: those that share a stage's tokens, then the stages."""
    from megatron.core import parallel_state  # whoever lays experts out without Megatron does without

    return (
        parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        parallel_state.get_pipeline_model_parallel_group(),
    )
