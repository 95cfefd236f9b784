"""A dense LLaMA or Qwen3 to HMoE: each layer's neurons are cut, in their order, into experts of unequal widths.

With all E experts on and a router that prefers none, the layer is the dense one: E experts of weight 1/E, their
down_proj times E. With fewer the sum over the chosen ones is scaled so that, for experts drawn evenly, its mean stays
the dense layer's (arXiv 2410.07524, weight scaling).
"""

import math
from dataclasses import replace
from pathlib import Path

import torch

from hmoe_megatron.hf.architectures import EXPERT, Native
from hmoe_megatron.hf.importing import HFDirectory


def scale(experts: int, chosen: int | None, pre_softmax: bool) -> float:
    """What down_proj is multiplied with. E experts, K chosen: weights renormalised over the chosen, Top-P's too, give
    E; --moe-router-pre-softmax, weights of the softmax over all, E^2/K."""
    return experts**2 / chosen if pre_softmax else float(experts)


class Upcycled(HFDirectory):
    """The HMoE that a dense directory becomes; a source of `from_hf`. In fp32 and bf16 a down_proj keeps every bit if
    `scale` is a power of two; else it is rounded once."""

    def __init__(self, folder: Path, widths_E: tuple[int, ...], router: dict, seed: int = 0):
        """router: fields of ModelSettings. Raises ValueError for a directory that is incomplete or not dense, and for
        widths that do not add up."""
        super().__init__(folder)
        dense = self.form.model
        if any(dense.widths):
            raise ValueError(f"{folder}: has experts already: use from-hf")
        if sum(widths_E) != dense.dense_width:
            raise ValueError(
                f"--hmoe-widths: {sum(widths_E)} neurons; the dense layers have {dense.dense_width}, and "
                "each goes to one expert: give widths of that sum"
            )
        self.seed = seed
        self.form = Native(replace(dense, widths=(widths_E,) * dense.layers, dense_width=None, **router))
        model = self.form.model
        self.scale = scale(model.experts, model.experts_per_token, model.router == "topk" and model.pre_softmax)

    @property
    def is_lossless(self) -> bool:
        return self.dtype == torch.float32 or math.frexp(self.scale)[0] == 0.5  # a power of two

    def read(self, name: str) -> torch.Tensor:
        if name.endswith(".mlp.gate.weight"):
            return self._router(int(name.split(".")[2]))
        found = EXPERT.fullmatch(name)
        if found is None:
            return super().read(name)
        layer, expert, matrix = int(found[1]), int(found[2]), found[3]
        widths_E = self.form.model.widths[layer]
        own = slice(sum(widths_E[:expert]), sum(widths_E[: expert + 1]))
        with self.opened(f"model.layers.{layer}.mlp.{matrix}_proj.weight") as rows:
            return rows[:, own].to(self.dtype) * self.scale if matrix == "down" else rows[own]

    def _router(self, layer: int) -> torch.Tensor:
        """Zeros with all experts on, else drawn with the model's deviation: even scores would choose the same experts
        for every token."""
        model = self.form.model
        weight_EH = torch.zeros(model.experts, model.hidden)
        if model.router == "topp" or model.experts_per_token < model.experts:
            weight_EH.normal_(0, model.init_std, generator=torch.Generator().manual_seed(self.seed * 100003 + layer))
        return weight_EH.to(self.dtype)
