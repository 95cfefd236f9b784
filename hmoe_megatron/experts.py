"""The experts of one layer on one rank: parameters by logical expert and piece, forward, sharded state.

Legend: R routed rows of this rank, H hidden size, L slots of this rank, F full width of a logical expert.
"""

import hashlib

import torch
from megatron.core import utils
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule


class ExpertPiece(torch.nn.Module):
    """Weights of the width range [lo, hi) of one logical expert, or this expert-tensor-parallel rank's share of it.

    linear_fc1_weight: [2 (hi - lo), H], gate above up. linear_fc2_weight: [H, hi - lo]. In ``config.params_dtype``.
    """

    def __init__(self, config, expert: int, lo: int, hi: int):
        super().__init__()
        self.expert, self.lo, self.hi = expert, lo, hi
        width, hidden = hi - lo, config.hidden_size
        device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
        self.linear_fc1_weight = torch.nn.Parameter(
            torch.empty(2 * width, hidden, device=device, dtype=config.params_dtype)
        )
        self.linear_fc2_weight = torch.nn.Parameter(
            torch.empty(hidden, width, device=device, dtype=config.params_dtype)
        )
        for weight, dim, stride in ((self.linear_fc1_weight, 0, 2), (self.linear_fc2_weight, 1, 1)):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=stride)
            # Also without expert parallelism: otherwise EP 1 has one optimizer and EP 2 has two, and neither can
            # load the other's checkpoint.
            weight.allreduce = False

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(fc1, fc2) weights. Called, not read, so that Megatron's forward hooks run: they wait for the parameters that
        ``--overlap-param-gather`` is still gathering."""
        return self.linear_fc1_weight, self.linear_fc2_weight


def expert_seed(seed: int, layer: int, expert: int) -> int:
    """Seed of an expert's initial weights: of (run seed, decoder layer, logical expert) only, never of a rank."""
    digest = hashlib.sha256(f"{seed} {layer} {expert}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


@torch.no_grad()
def initialize_piece(piece: ExpertPiece, config, seed: int, layer: int, full_width: int) -> None:
    """Draw the whole expert by Megatron's init methods on the CPU, keep this piece: the same weights under any plan."""
    fc1 = torch.empty(2 * full_width, config.hidden_size)
    fc2 = torch.empty(config.hidden_size, full_width)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the GPUs too and so differ from rank to rank afterwards.
        torch.default_generator.manual_seed(expert_seed(seed, layer, piece.expert))
        config.init_method(fc1)
        config.output_layer_init_method(fc2)
    range_ = slice(piece.lo, piece.hi)
    piece.linear_fc1_weight.copy_(fc1.view(2, full_width, -1)[:, range_].reshape_as(piece.linear_fc1_weight))
    piece.linear_fc2_weight.copy_(fc2[:, range_])


class HMoEExperts(MegatronModule):
    """The pieces of one rank. ``config`` is the logical one; the plan says which pieces this rank holds."""

    def __init__(self, num_slots: int, config, *, layer: int, pg_collection, name: str | None = None):
        super().__init__(config=config)
        layout = config.hmoe
        self.layer, self.num_slots = layer, num_slots
        self.widths = layout.widths[layer]
        self.compute = layout.compute
        self.stats = layout.stats
        self.tp_group, self.dp_group, self.ep_group = pg_collection.expt_tp, pg_collection.expt_dp, pg_collection.ep
        planned = layout.pieces(layer)[utils.get_pg_rank(self.ep_group)]
        self.pieces = torch.nn.ModuleList(self._build(piece) for piece in planned)

    def _build(self, planned) -> ExpertPiece:
        size, rank = utils.get_pg_size(self.tp_group), utils.get_pg_rank(self.tp_group)
        share = planned.width // size
        lo = planned.lo + rank * share
        piece = ExpertPiece(self.config, planned.expert, lo, lo + share)
        if self.config.perform_initialization:
            initialize_piece(piece, self.config, self.config.hmoe.seed, self.layer, self.widths[planned.expert])
        return piece

    def forward(self, x_RH, tokens_per_slot_L, probs_R):
        """(y_RH, None): y = W2 (p * silu(Wg x) * (Wu x)) of each row by its piece; rows come sorted by slot."""
        rows = tokens_per_slot_L.tolist()
        used = len(self.pieces)
        assert sum(rows[used:]) == 0, f"layer {self.layer}: tokens routed to an empty slot: {rows}"
        assert sum(rows) == x_RH.shape[0], f"layer {self.layer}: {x_RH.shape[0]} rows, but slots count {rows}"
        if not used:
            # Both inputs stay in the graph, or this rank would skip a backward all-to-all that the others wait in.
            return x_RH * probs_R.unsqueeze(-1).to(x_RH.dtype), None
        with self.stats.expert_time(x_RH, self.training) as timed:
            fc1_weights, fc2_weights = zip(*(piece() for piece in self.pieces), strict=True)
            y_RH = self.compute(x_RH, probs_R, rows[:used], fc1_weights, fc2_weights, self.config, self.tp_group)
            timed.output = y_RH
        return y_RH, None

    def backward_dw(self):
        """Nothing is delayed: --delay-wgrad-compute is refused."""

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """One key a logical expert and matrix, one shard a piece: any plan loads what any other plan saved.

        Keys: ``{prefix}{expert}.linear_fc1.weight`` of global shape [2, F, H] and ``...linear_fc2.weight`` [H, F].
        """
        assert not sharded_offsets, "layers of different widths can't be stacked: hetereogenous_dist_checkpoint is on"
        hidden, replica_id = self.config.hidden_size, (0, 0, utils.get_pg_rank(self.dp_group))
        state = {}
        for index, piece in enumerate(self.pieces):
            full = self.widths[piece.expert]
            key, name = f"{prefix}{piece.expert}", f"{prefix}pieces.{index}"
            state[f"{name}.linear_fc1_weight"] = _gate_up_factory(
                f"{key}.linear_fc1.weight", piece.linear_fc1_weight, piece.lo, full, replica_id
            )
            fc2 = piece.linear_fc2_weight
            state[f"{name}.linear_fc2_weight"] = ShardedTensor(
                f"{key}.linear_fc2.weight", fc2, fc2.dtype, tuple(fc2.shape), (hidden, full), (0, piece.lo), None,
                replica_id,
            )  # fmt: skip
        return state


def _gate_up_factory(key: str, weight: torch.Tensor, lo: int, full_width: int, replica_id) -> ShardedTensorFactory:
    """[2 w, H] seen as [2, w, H], a block of [2, F, H] at width ``lo``; optimizer states go the same way."""

    def build(key, tensor, replica_id, flattened_range):
        assert flattened_range is None, "optimizer state must be resharded whole: --dist-ckpt-optim-fully-reshardable"
        block = tensor.view(2, -1, tensor.shape[-1])
        global_shape = (2, full_width, tensor.shape[-1])
        # axis_fragmentations None: pieces may start anywhere and differ in length.
        return ShardedTensor(key, block, block.dtype, tuple(block.shape), global_shape, (0, lo, 0), None, replica_id)

    def merge(block):
        return block.reshape(-1, block.shape[-1])

    return ShardedTensorFactory(key, weight, build, merge, replica_id)
