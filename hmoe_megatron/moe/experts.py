"""The experts of one layer on one rank: parameters by logical expert and piece, forward, sharded state.

Legend: R routed rows of this rank, H hidden size (--moe-latent-size where it is given), L slots of this rank, F full
width of a logical expert, W width of all pieces of this rank.
"""

import hashlib
from collections.abc import Sequence
from functools import partial

import torch
from megatron.core import utils
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule

from hmoe_megatron.moe.compute.flat import MATRICES, fc1_pieces, fc2_pieces
from hmoe_megatron.moe.compute.main_grad import placeholder
from hmoe_megatron.placement.plan import Piece


def expert_seed(seed: int, layer: int, expert: int) -> int:
    """Seed of an expert's initial weights: of (run seed, decoder layer, logical expert) only, never of a rank."""
    digest = hashlib.sha256(f"{seed} {layer} {expert}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


@torch.no_grad()
def initial_weights(config, seed: int, layer: int, expert: int, width: int, device):
    """(fc1 [2, F, H], fc2 [H, F]) of a whole expert in fp32, drawn by Megatron's init methods on ``device``: whoever
    needs a piece takes it from the same weights, under any plan. A GPU and a CPU draw different ones."""
    hidden = config.moe_latent_size or config.hidden_size
    fc1 = torch.empty(2 * width, hidden, device=device)
    fc2 = torch.empty(hidden, width, device=device)
    # The generator of this device only, which init methods draw from: torch.manual_seed would seed all of them, and the
    # ranks' streams would differ by what each has drawn here.
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    before = generator.get_state()
    try:
        generator.manual_seed(expert_seed(seed, layer, expert))
        config.init_method(fc1)
        config.output_layer_init_method(fc2)
    finally:
        generator.set_state(before)
    return fc1.view(2, width, -1), fc2


def shares_of(planned: Sequence[Piece], rank: int, size: int) -> tuple[Piece, ...]:
    """What expert-tensor-parallel rank ``rank`` of ``size`` has of planned pieces: of each an equal range."""
    widths = [piece.width // size for piece in planned]
    starts = [piece.lo + rank * width for piece, width in zip(planned, widths, strict=True)]
    return tuple(Piece(p.expert, lo, lo + width) for p, lo, width in zip(planned, starts, widths, strict=True))


class HMoEExperts(MegatronModule):
    """The pieces of one rank. ``config`` is the logical one; the plan says which pieces this rank holds.

    All pieces are in two parameters, so that autograd, Megatron's buffers and the optimizer see two tensors a layer
    however many there are: linear_fc1_weight [2 W, H] and linear_fc2_weight [W, H] (see compute/flat.py), in
    ``config.params_dtype``; None on a rank without pieces. Where experts may move W is ``held_width``, what this rank
    has room for.
    """

    def __init__(self, num_slots: int, config, *, layout, layer: int, pg_collection, name: str | None = None):
        super().__init__(config=config)
        self.layer, self.num_slots = layer, num_slots
        self.widths = layout.widths[layer]
        self.seed = layout.seed
        self.stats = layout.stats
        self.tp_group, self.dp_group, self.ep_group = pg_collection.expt_tp, pg_collection.expt_dp, pg_collection.ep
        self.take_pieces(layout)
        room = layout.most_width(layer)
        self.held_width = room // utils.get_pg_size(self.tp_group) if room else sum(self.piece_widths)
        for matrix, dim, stride, rows in (("linear_fc1_weight", 0, 2, 2), ("linear_fc2_weight", 1, 1, 1)):
            self.register_parameter(matrix, self._weight(rows * self.held_width, dim, stride))
        if config.perform_initialization:
            self._initialize()

    def take_pieces(self, layout) -> None:
        """Those of ``layout``'s plan for this rank. What the parameters hold is not looked at."""
        planned, share = layout.pieces(self.layer)[utils.get_pg_rank(self.ep_group)], utils.get_pg_rank(self.tp_group)
        self.pieces = shares_of(planned, share, utils.get_pg_size(self.tp_group))
        self.piece_widths = tuple(piece.width for piece in self.pieces)
        self.compute = partial(layout.compute, widths=self.piece_widths)

    def _weight(self, rows: int, dim: int, stride: int):
        if not rows:
            return None
        device = torch.device("cpu") if self.config.use_cpu_initialization else torch.cuda.current_device()
        hidden = self.config.moe_latent_size or self.config.hidden_size
        # Rows of no piece stay zero.
        make = torch.empty if self.held_width == sum(self.piece_widths) else torch.zeros
        weight = torch.nn.Parameter(make(rows, hidden, device=device, dtype=self.config.params_dtype))
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=stride)
        # Also without expert parallelism: otherwise EP 1 has one optimizer and EP 2 has two, and neither can load the
        # other's checkpoint.
        weight.allreduce = False
        weight.used_often = self.config.mtp_use_repeated_layer and self.layer >= self.config.num_layers
        placeholder(weight.shape, weight.dtype, weight.device)  # now: in a backward pass it would meet the activations
        return weight

    @torch.no_grad()
    def _initialize(self) -> None:
        for (piece, fc1), (_, fc2) in zip(*map(self.by_piece, MATRICES), strict=True):
            whole1, whole2 = initial_weights(
                self.config, self.seed, self.layer, piece.expert, self.widths[piece.expert], fc1.device
            )
            fc1.copy_(whole1[:, piece.lo : piece.hi].flatten(0, 1))
            fc2.copy_(whole2[:, piece.lo : piece.hi])

    def by_piece(self, matrix: str, tensor: torch.Tensor | None = None) -> list[tuple[Piece, torch.Tensor]]:
        """(piece, its part) of the parameter ``matrix``, or of a ``tensor`` of its shape."""
        if not self.pieces:
            return []
        tensor = getattr(self, matrix) if tensor is None else tensor
        return list(zip(self.pieces, MATRICES[matrix](tensor, self.piece_widths), strict=True))

    def forward(self, x_RH, tokens_per_slot_L, probs_R):
        """(y_RH, None): y = W2 (p * silu(Wg x) * (Wu x)) of each row by its piece; rows come sorted by slot. With
        --moe-apply-probs-on-input p is in x instead."""
        rows = tokens_per_slot_L.tolist()
        used = len(self.pieces)
        assert sum(rows[used:]) == 0, f"layer {self.layer}: tokens routed to an empty slot: {rows}"
        assert sum(rows) == x_RH.shape[0], f"layer {self.layer}: {x_RH.shape[0]} rows, but slots count {rows}"
        if not used:
            # Both inputs stay in the graph, or this rank would skip a backward all-to-all that the others wait in.
            y_RH = x_RH * probs_R.unsqueeze(-1).to(x_RH.dtype)
            if self.linear_fc1_weight is not None:  # of a plan to come; its gradient, zero, is waited for
                y_RH = y_RH + (self.linear_fc1_weight[:0].sum() + self.linear_fc2_weight[:0].sum())
            return y_RH, None
        if self.config.moe_apply_probs_on_input:
            x_RH, probs_R = (probs_R.unsqueeze(-1) * x_RH).to(x_RH.dtype), torch.ones_like(probs_R)
        with self.stats.expert_time(x_RH, self.training) as timed:
            y_RH = timed.output = self.compute(
                x_RH, probs_R, rows[:used], self.linear_fc1_weight, self.linear_fc2_weight
            )
        return y_RH, None

    def backward_dw(self):
        """Nothing is delayed: --delay-wgrad-compute is refused."""

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """One key a logical expert and matrix, one shard a piece: any plan loads what any other plan saved.

        Keys: ``{prefix}{expert}.linear_fc1.weight`` of global shape [2, F, H] and ``...linear_fc2.weight`` [H, F].
        """
        assert not sharded_offsets, "layers of different widths can't be stacked: hetereogenous_dist_checkpoint is on"
        if self.linear_fc1_weight is None:
            return {}
        replica_id = (0, 0, utils.get_pg_rank(self.dp_group))
        return {
            f"{prefix}{matrix}": ShardedTensorFactory(
                f"{prefix}{matrix.removesuffix('_weight')}.weight",
                getattr(self, matrix),
                partial(build, self.pieces, self.widths),
                partial(merge, getattr(self, matrix).shape),
                replica_id,
            )
            for matrix, build, merge in (
                ("linear_fc1_weight", _fc1_shards, _merge_fc1),
                ("linear_fc2_weight", _fc2_shards, _merge_fc2),
            )
        }


def _fc1_shards(pieces, widths, key, fc1, replica_id, flattened_range):
    """Of each piece [2 w, H] seen as [2, w, H], a block of [2, F, H] at width ``lo``; optimizer states go the same
    way."""
    hidden = fc1.shape[1]
    parts = [part.view(2, -1, hidden) for part in fc1_pieces(fc1.detach(), [piece.width for piece in pieces])]
    return _shards(
        pieces,
        key,
        parts,
        lambda piece: ((2, widths[piece.expert], hidden), (0, piece.lo, 0)),
        replica_id,
        flattened_range,
    )


def _fc2_shards(pieces, widths, key, fc2, replica_id, flattened_range):
    """Of each piece [H, w], columns of [H, F] from ``lo`` on."""
    parts, hidden = fc2_pieces(fc2.detach(), [piece.width for piece in pieces]), fc2.shape[1]
    return _shards(
        pieces, key, parts, lambda piece: ((hidden, widths[piece.expert]), (0, piece.lo)), replica_id, flattened_range
    )


def _shards(pieces, key, parts, place, replica_id, flattened_range) -> dict[str, ShardedTensor]:
    """``key``: "...experts.linear_fc1.weight", with what the optimizer puts before it. place: (global shape, offset) of
    a piece."""
    assert flattened_range is None, "optimizer state must be resharded whole: --dist-ckpt-optim-fully-reshardable"
    prefix, matrix, weight = key.rsplit(".", 2)
    shards = {}
    for index, (piece, part) in enumerate(zip(pieces, parts, strict=True)):
        global_shape, offset = place(piece)
        # axis_fragmentations None: pieces may start anywhere and differ in length.
        shards[str(index)] = ShardedTensor(
            f"{prefix}.{piece.expert}.{matrix}.{weight}",
            part,
            part.dtype,
            tuple(part.shape),
            global_shape,
            offset,
            None,
            replica_id,
        )
    return shards


def _merge_fc1(shape, shards):
    return _with_rows_of_no_piece(shape, [part.flatten(0, 1) for part in shards.values()])


def _merge_fc2(shape, shards):
    return _with_rows_of_no_piece(shape, [part.reshape(-1, part.shape[0]) for part in shards.values()])


def _with_rows_of_no_piece(shape, pieces: list[torch.Tensor]) -> torch.Tensor:
    """[rows, H] of a weight from its pieces; the rows behind them are zero."""
    if not pieces:
        return torch.zeros(shape)
    joined = torch.cat(pieces)
    more = shape[0] - len(joined)
    return torch.nn.functional.pad(joined, (0, 0, 0, more)) if more else joined
