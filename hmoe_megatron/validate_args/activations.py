"""Bytes of activations that a rank keeps between the passes of its micro-batches, and what comes on top at the peak.

Each term is a tensor that autograd keeps in megatron-core 0.19.2, as a list of live tensors after a forward pass shows
it (tests/unit/test_memory_prediction.py compares whole steps). With Transformer Engine, which the machine that checks
may lack, the terms are those of its fused layers: a norm keeps input and output, attention no scores.

Legend: h hidden size, e bytes of an element, T tokens of a micro-batch on this rank's part of the sequence, t of them
those that are here between layers (sequence parallelism leaves T / tensor-parallel size), V rows of the vocabulary.
"""

import argparse
from typing import NamedTuple

from hmoe_megatron.config import expert_hidden_size
from hmoe_megatron.moe.layout import ExpertLayout
from hmoe_megatron.telemetry.accounting import expected_active_width, query_groups
from hmoe_megatron.validate_args.sizes import expert_tensor_parallel_size

FP32 = 4


class Kept(NamedTuple):
    """Bytes: of attention with the norms beside it, of experts or the dense FFN with the router."""

    attention: float
    experts: float


class Activations:
    """Of one pipeline stage and expert-parallel rank, under even routing."""

    def __init__(self, args: argparse.Namespace, layout: ExpertLayout, rank: int):
        self.args, self.layout, self.rank = args, layout, rank
        self.fused = args.transformer_impl != "local"  # Transformer Engine's layers
        self.e = 2 if args.bf16 or args.fp16 else FP32
        self.tensor = args.tensor_model_parallel_size
        self.sequence = args.seq_length // args.context_parallel_size
        self.T = self.sequence * args.micro_batch_size
        self.t = self.T / self.tensor
        self.selected = set()
        if args.recompute_granularity == "selective":  # Megatron's default comes with its config
            self.selected |= {"core_attn"} if args.recompute_modules is None else set(args.recompute_modules)
        if args.moe_layer_recompute:
            self.selected.add("moe")

    def of_layers(self, layers: range) -> Kept:
        """Of one micro-batch in these decoder layers, by the recompute setting."""
        if self.args.recompute_granularity != "full":
            return self._whole(layers)
        if self.args.recompute_method == "block":
            again, rest = self._block(layers)
            attention, experts = self._whole(rest)
            inputs = len(again)
        else:
            attention = experts = 0.0
            inputs = -(-len(layers) // self.args.recompute_num_layers)
        return Kept(attention + inputs * self.t * self.args.hidden_size * self.e, experts)

    def _block(self, layers: range) -> tuple[list[int], list[int]]:
        """Decoder layers that the block method computes again, the first of each model chunk, and all others: it leaves
        multi-token prediction alone."""
        decoder = [layer for layer in layers if layer < self.args.num_layers]
        number = self.args.recompute_num_layers * (self.args.virtual_pipeline_model_parallel_size or 1)
        return decoder[:number], [*decoder[number:], *layers[len(decoder) :]]

    def _whole(self, layers) -> Kept:
        often = self.args.mtp_num_layers if self.args.mtp_use_repeated_layer else 1
        layers = [layer for layer in layers for _ in range(often if layer >= self.args.num_layers else 1)]
        return Kept(sum(map(self._attention, layers)), sum(map(self._ffn, layers)))

    def embedding(self) -> float:
        """The first layer's input; a later stage's comes from the stage before."""
        return self.t * self.args.hidden_size * self.e

    def logits(self) -> float:
        """At the end of the loss: the last norm, logits, their softmax in fp32, written over by its gradient, and what
        the output layer's weight gradient is computed into where it is not added in place. Each layer of multi-token
        prediction has the norm and the softmax too."""
        args, predictions = self.args, self.args.mtp_num_layers or 0
        places = self.T * args.padded_vocab_size / self.tensor
        kept = (1 + predictions) * (self._norm() + places * FP32)
        gradient = places * (self.e if self.e < FP32 else 0) + self.T * args.hidden_size * self.e
        weight = args.padded_vocab_size / self.tensor * args.hidden_size * self.e
        return kept + gradient + (0 if args.gradient_accumulation_fusion else weight)

    def backward(self, layers: range) -> float:
        """The most that a layer's backward pass has beside what is kept: what it computes again, and its gradients."""
        args, again = self.args, 0.0
        if args.recompute_granularity == "full" and args.recompute_method == "block":
            computed, rest = self._block(layers)
            freed = sum(self._whole(rest))  # by then
            again = max(0.0, max(sum(self._whole([layer])) for layer in computed) - freed)
        elif args.recompute_granularity == "full":
            number = args.recompute_num_layers
            again = max(sum(self._whole(layers[at : at + number])) for at in range(0, len(layers), number))
        elif "moe" in self.selected:
            again = max((self._experts(layer) for layer in layers if layer in self.layout.widths), default=0.0)
        if args.multi_latent_attention and "mla_up_proj" in self.selected:
            again += self.T * self._heads() * self._latent_head() * self.e
        scores = self._scores() * (2 if "core_attn" not in self.selected else 3)
        return again + max(scores, *(self._ffn_gradients(layer) for layer in layers))

    def scratch(self) -> float:
        """What Megatron's own attention computes scores into; one for all layers."""
        return self._scores()

    def _norm(self) -> float:
        return self.t * self.args.hidden_size * self._norm_bytes()

    def _norm_bytes(self) -> int:
        """Of an element: input and output; Megatron's own keeps both in fp32, and bf16's output besides."""
        if self.fused:
            return self.e if "layernorm" in self.selected else 2 * self.e
        return 3 * self.e if self.e == FP32 else 2 * FP32 + self.e

    def _scores(self) -> float:
        """Of all heads here, once; none with flash attention."""
        return 0.0 if self.fused else self._heads() * self.sequence * self.T * self.e

    def _heads(self) -> float:
        return self.args.num_attention_heads / self.tensor

    def _attention(self, layer: int) -> float:
        """Both norms, what goes into attention and comes from it, and where they are kept its probabilities. A layer of
        multi-token prediction has two norms more, and what they give in one."""
        args, heads = self.args, self._heads()
        kept = self._latent_inputs() if args.multi_latent_attention else self._inputs()
        turned = args.qk_pos_emb_head_dim if args.multi_latent_attention else args.kv_channels
        if self.fused:
            kept += heads * self.T * FP32  # log of the sums of each row of scores
        elif "core_attn" not in self.selected:
            kept += self._scores() + self.sequence**2  # probabilities, and the mask in bytes
        if args.position_embedding_type == "rope" and not self.fused:
            kept += 4 * self.sequence * turned * self.e  # sine and cosine for q and for k
        if layer >= args.num_layers:
            kept += 2 * self._norm() + self.t * 2 * args.hidden_size * self.e
        return 2 * self._norm() + kept

    def _inputs(self) -> float:
        """q, k, v and what attention gives."""
        args, heads = self.args, self._heads()
        groups = query_groups(args) / self.tensor
        rope, repeats = args.position_embedding_type == "rope", groups < heads and not self.fused
        qkv = 0 if rope and repeats else heads + 2 * groups  # as they leave their product: v stays in it
        turned = heads + (0 if repeats else groups) if rope else 0
        repeated = 2 * heads if repeats else 0  # k and v for each head of a group
        gated = 3 * heads if args.attention_output_gate else 0  # the gate, its sigmoid, and what it lets through
        kept = self.T * args.kv_channels * (qkv + turned + repeated + heads + gated) * self.e
        if args.qk_layernorm:
            kept += self.T * args.kv_channels * (heads + groups) * self._norm_bytes()
        return kept

    def _latent_inputs(self) -> float:
        """The same of multi-latent attention, and the short vectors that they come from."""
        args = self.args
        of_head = self._latent_head() + args.v_head_dim
        if "mla_up_proj" in self.selected:
            of_head = args.v_head_dim
        short = args.kv_lora_rank + (args.q_lora_rank or 0)
        kept = self.t * short * (self._norm_bytes() if args.qk_layernorm else self.e)
        if self.tensor > 1 and not self.fused:
            kept += self.T * short * self.e  # gathered from the ranks
        return kept + self.T * (self._heads() * of_head + args.qk_pos_emb_head_dim) * self.e

    def _latent_head(self) -> int:
        """Numbers of q, k and v of a head."""
        return 2 * (self.args.qk_head_dim + self.args.qk_pos_emb_head_dim) + self.args.v_head_dim

    def _ffn(self, layer: int) -> float:
        if layer in self.layout.widths:
            return 0.0 if "moe" in self.selected else self._experts(layer)
        if "mlp" in self.selected:
            return 0.0
        return self._swiglu(self.T, self.args.ffn_hidden_size / self.tensor)

    def _swiglu(self, rows: float, width: float) -> float:
        """Of a dense FFN or the shared expert: gate and up, and their product; unfused also between."""
        return rows * width * (3 if self.args.bias_swiglu_fusion else 5) * self.e

    def _experts(self, layer: int) -> float:
        """Router, dispatched rows, gate and up of the pieces here, and the shared expert."""
        args, widths = self.args, self.layout.widths[layer]
        router = self.t * (len(widths) * (2 * FP32 + self.e) + self._chosen(layer) * 24)  # 24: places and probabilities
        numbers = 3 if self.layout.settings.keep_hidden else 2
        rows, e = self._rows(layer), FP32 if self._on_cpu() else self.e
        pieces = sum(rows * piece.width for piece in self._pieces(layer)) * numbers * e
        dispatched = len(self._pieces(layer)) * rows * self._share() * expert_hidden_size(args) * self.e
        dispatched += self.t * (args.moe_latent_size or 0) * self.e  # what goes back to the hidden size
        shared = self._swiglu(self.T, (args.moe_shared_expert_intermediate_size or 0) / self.tensor)
        return router + dispatched + pieces + (0 if "shared_experts" in self.selected else shared)

    def _ffn_gradients(self, layer: int) -> float:
        """Of the hidden state and of gate and up, and rows that come and go."""
        rows_of_hidden = 2 * self.args.hidden_size * self.e
        if layer not in self.layout.widths:
            return self.T * (3 * self.args.ffn_hidden_size / self.tensor * self.e + rows_of_hidden / self.tensor)
        rows, pieces = self._rows(layer), self._pieces(layer)
        dispatched = len(pieces) * rows * self._share() * 2 * expert_hidden_size(self.args) * self.e
        if self._on_cpu():  # piece by piece, in fp32
            return dispatched + 10 * max((rows * piece.width for piece in pieces), default=0.0) * FP32
        return dispatched + sum(rows * piece.width for piece in pieces) * self.e

    def _on_cpu(self) -> bool:
        return not self.layout.computed_by.startswith("triton")

    def _pieces(self, layer: int):
        return self.layout.pieces(layer)[self.rank]

    def _share(self) -> int:
        return expert_tensor_parallel_size(self.args)

    def _chosen(self, layer: int) -> float:
        """Experts a token."""
        widths = self.layout.widths[layer]
        mean = sum(widths) / len(widths)
        return expected_active_width(self.layout.settings, self.args.moe_router_topk, widths) / mean

    def _rows(self, layer: int) -> float:
        """Of one expert, times its share of the width here: from the tokens of all expert-parallel ranks."""
        return self.t * self._chosen(layer) / len(self.layout.widths[layer]) * self.layout.plan.ranks
