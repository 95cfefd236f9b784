"""A few real training steps on gloo ranks, through Megatron's own set-up and train_step, for tests that compare runs.

``steps`` is run on ranks by ``run_ranks``; ``logical_state`` puts what the ranks return together by logical expert.
"""

import functools
import time
import zlib

import torch

from benchmarks.trainer import Trainer, configure

HIDDEN, LAYERS, EXPERTS, VOCABULARY, SEQUENCE = 32, 2, 4, 128, 16
TINY = (
    f"--num-layers {LAYERS} --hidden-size {HIDDEN} --num-attention-heads 4 --seq-length {SEQUENCE} "
    f"--max-position-embeddings {SEQUENCE} --position-embedding-type rope --swiglu --disable-bias-linear "
    f"--normalization RMSNorm --untie-embeddings-and-output-weights --num-experts {EXPERTS} --moe-router-topk 2 "
    "--hidden-dropout 0 --attention-dropout 0 --init-method-std 0.1 --micro-batch-size 2 --global-batch-size 8 "
    "--lr 1e-2 --min-lr 1e-2 --lr-decay-style constant --train-iters 100 --clip-grad 1.0 --seed 1234 --mock-data "
    f"--tokenizer-type NullTokenizer --vocab-size {VOCABULARY} --log-interval 1 --eval-interval 1000 --eval-iters 0 "
    "--dist-ckpt-optim-fully-reshardable"
).split()

# Equal widths laid out as Megatron does, and the same in Megatron's own flags.
EQUAL = "--hmoe-widths equal --hmoe-total-width 96 --hmoe-placement contiguous"
STOCK = "--moe-ffn-hidden-size 24"
UNCLIPPED = "--clip-grad 1e6"
ONE_ULP = 1.2e-7


def steps(
    flags: str,
    count: int = 5,
    *,
    stock: bool = False,
    own_optimizer: bool = True,
    force_expert: int | None = None,
    telemetry: bool = False,
    skip: int = 0,
    save: bool = False,
    after: int = 0,
    same_dense: bool = False,
) -> dict:
    """Train ``count`` steps from TINY plus ``flags``; ``stock``: Megatron's own MoE, experts initialised as ours.

    own_optimizer: stock experts have an optimizer of their own, as Megatron gives them with expert parallelism and we
    always do; False leaves Megatron's choice. force_expert: add 1e4 to its router logit. skip: steps whose data a run
    before this one, loaded by --load, has seen. save: a checkpoint to --save at the end, followed by ``after`` steps.
    same_dense: draw dense weights by name, so that every layout starts from the same ones (experts always do).

    Returns, for this rank at the moment of the save: losses, grad_norms; dense {name: tensor}, experts {(layer, expert,
    matrix, lo, hi): tensor} and split {name: (dimension, tensor-parallel rank)} of the weights and, in optimizer[kind],
    of its states; what ``run_state`` returns. loaded: the same right after --load. save_s: time for the save.
    """
    hooks = [_draw_dense] if same_dense else []
    if stock:
        hooks.append(lambda chunks: _initialize_stock_experts(chunks, own_optimizer))
    trainer = Trainer([*TINY, *flags.split()], stock, batches=lambda args: _batches(args, skip), hooks=hooks)
    from megatron.training.async_utils import maybe_finalize_async_save
    from megatron.training.checkpointing import save_checkpoint

    from tests.distributed.optimizer_states import run_state

    args, model, optimizer, scheduler = trainer.args, trainer.model, trainer.optimizer, trainer.scheduler
    if force_expert is not None:
        _force(model, force_expert)
    losses, norms = [], []

    def state():
        return _snapshot(model, optimizer) | run_state(args, scheduler, optimizer)

    def train(first, last):
        for _ in range(first, last):
            loss, norm = trainer.step()
            losses.append(loss)
            norms.append(norm)

    result = {"losses": losses, "grad_norms": norms, "loaded": state() if args.load else None}
    train(0, count)
    if count > 1:
        trainer.end_overlap()
    result |= state()
    if save:
        started_s = time.perf_counter()
        save_checkpoint(max(1, skip + count), model, optimizer, scheduler, 0)
        result["save_s"] = time.perf_counter() - started_s
        train(count, count + after)
        maybe_finalize_async_save(blocking=True, terminate=True)
    if telemetry:
        stats, groups = trainer.layout.stats, trainer.groups
        result["expert_time_ms"] = stats.take_expert_time_ms()
        counts, tokens, _ = stats.take([groups.tp_dp_cp, groups.pp], torch.device("cpu"))
        result["counts"], result["tokens"] = counts.numpy(), tokens.numpy()
    return result


def build(argv: list[str]):
    """(arguments, layout, model) of our command line in a world of one pipeline stage; nothing is trained."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.initialize import initialize_megatron

    args, config, _, layout = configure(argv)
    initialize_megatron()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    (model,) = config.get_builder_cls()(config).build_distributed_models(groups, wrap_with_ddp=False)
    return args, layout, model


def _initialize_stock_experts(chunks, own_optimizer):
    from megatron.training import get_args

    from hmoe_megatron.moe.experts import initial_weights

    seed = get_args().seed
    for chunk in chunks:
        for number, layer in _layers(chunk):
            for local, mlp in enumerate(layer.mlp.experts.local_experts):
                expert = layer.mlp.local_expert_indices[local]
                group, width = layer.mlp.experts.tp_group, mlp.config.moe_ffn_hidden_size
                share = width // group.size()
                kept = slice(group.rank() * share, (group.rank() + 1) * share)
                fc1, fc2 = initial_weights(mlp.config, seed, number, expert, width, torch.device("cpu"))
                mlp.linear_fc1.weight.data.copy_(fc1[:, kept].flatten(0, 1))
                mlp.linear_fc2.weight.data.copy_(fc2[:, kept])
                if own_optimizer:
                    mlp.linear_fc1.weight.allreduce = mlp.linear_fc2.weight.allreduce = False
    return chunks


def _layers(model):
    """(number, transformer layer) of the decoder and of multi-token prediction, whose numbers go on."""
    for layer in model.decoder.layers:
        yield layer.layer_number - 1, layer
    for layer in model.mtp.layers if getattr(model, "mtp", None) else ():
        yield model.config.num_layers + layer.layer_number - 1, layer.mtp_model_layer


@torch.no_grad()
def _draw_dense(chunks):
    """Draw each dense weight whole, from a seed that is its global name, and keep this tensor-parallel rank's share."""
    from megatron.core import mpu

    rank, size = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
    for chunk in chunks:
        for name, weight in chunk.named_parameters():
            if ".experts." in name or weight.dim() < 2:
                continue
            split = getattr(weight, "tensor_model_parallel", False)
            shape = list(weight.shape)
            if split:
                shape[weight.partition_dim] *= size
            generator = torch.Generator().manual_seed(zlib.crc32(_global_name(name, chunk).encode()))
            whole = torch.randn(shape, generator=generator) * 0.1
            if split:
                parts = whole.chunk(size * weight.partition_stride, weight.partition_dim)
                whole = torch.cat(parts[rank::size], weight.partition_dim)
            weight.copy_(whole)
    return chunks


def _force(chunks, expert):
    bias_E = torch.zeros(EXPERTS)
    bias_E[expert] = 1e4
    for router in (module for chunk in chunks for module in chunk.modules() if hasattr(module, "gating")):
        router.gating = lambda x, gating=router.gating: gating(x) + bias_E


def _batches(args, skip):
    """Endless micro-batches of this data-parallel rank; sample i of a step is the same under every layout."""
    from megatron.core import mpu

    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    micro = args.micro_batch_size
    generator = torch.Generator().manual_seed(7)
    while True:
        tokens = torch.randint(0, VOCABULARY - 2, (args.global_batch_size, SEQUENCE + 1), generator=generator)
        if skip:
            skip -= 1
            continue
        for start in range(rank * micro, args.global_batch_size, micro * size):
            rows = tokens[start : start + micro]
            yield {
                "tokens": rows[:, :-1].contiguous(),
                "labels": rows[:, 1:].contiguous(),
                "loss_mask": torch.ones(micro, SEQUENCE),
                "position_ids": torch.arange(SEQUENCE).expand(micro, -1).contiguous(),
            }


def _snapshot(model, optimizer):
    """{"dense", "experts", "split"} of the weights of this rank, and the same of every kind of optimizer state."""
    from megatron.core.utils import unwrap_model

    from tests.distributed.optimizer_states import states_of

    weights, states, keys = _empty(), {}, {}
    for chunk in map(unwrap_model, model):
        pieces, kept = _piece_keys(chunk), chunk.state_dict(keep_vars=True)
        for name, value in [*chunk.named_parameters(), *chunk.named_buffers()]:
            if name in kept:
                keys[id(value)] = pieces.get(id(value)) or _whole(_global_name(name, chunk))
                _put(weights, keys[id(value)], value, value.detach())
    for inner in optimizer.chained_optimizers:
        for parameter, tensors in states_of(inner):
            for name, value in tensors.items():
                _put(states.setdefault(name, _empty()), keys[id(parameter)], parameter, value)
    return weights | {"optimizer": states}


def _empty():
    return {"dense": {}, "experts": {}, "split": {}}


def _put(into, by_key, parameter, value):
    """Keep a copy of ``value``, of the shape of ``parameter``, under its logical names."""
    from megatron.core import mpu

    for key, part in by_key(value.float().clone()).items():
        if not isinstance(key, str):
            into["experts"][key] = part.view(2, -1, HIDDEN) if key[2] == "fc1" else part.t()
            continue
        into["dense"][key] = part
        if getattr(parameter, "tensor_model_parallel", False) and mpu.get_tensor_model_parallel_world_size() > 1:
            into["split"][key] = parameter.partition_dim, mpu.get_tensor_model_parallel_rank()


def _whole(key):
    return lambda tensor: {key: tensor}


def _piece_keys(model):
    """{id of an experts' parameter: what takes a tensor of its shape apart by (layer, expert, matrix, lo, hi)}."""
    keys = {}
    for number, layer in _layers(model):
        experts = getattr(layer.mlp, "experts", None)
        if hasattr(experts, "local_experts"):
            for local, mlp in enumerate(experts.local_experts):
                share, expert = mlp.linear_fc2.weight.shape[1], layer.mlp.local_expert_indices[local]
                lo = experts.tp_group.rank() * share
                for matrix, linear in (("fc1", mlp.linear_fc1), ("fc2", mlp.linear_fc2)):
                    keys[id(linear.weight)] = _whole((number, expert, matrix, lo, lo + share))
        for name, weight in experts.named_parameters() if hasattr(experts, "by_piece") else ():
            keys[id(weight)] = functools.partial(_by_piece, number, experts, name)
    return keys


def _by_piece(layer, experts, name, tensor):
    matrix = name.removeprefix("linear_").removesuffix("_weight")
    return {(layer, piece.expert, matrix, piece.lo, piece.hi): part for piece, part in experts.by_piece(name, tensor)}


def _global_name(name, model):
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
    return ".".join(parts)


def logical_state(ranks: list[dict]) -> dict[str, torch.Tensor]:
    """Weights by logical name, whole over tensor-parallel ranks and pieces. NaN stands for an element that the rank
    does not hold. Fails where replicas differ, or a range or an element is missing."""
    parts, dims = {}, {}
    for rank in ranks:
        for name, value in rank["dense"].items():
            dims[name], index = rank["split"].get(name, (0, 0))
            _merge(parts.setdefault(name, {}), index, value, name)
        for (layer, expert, matrix, lo, hi), value in rank["experts"].items():
            name = f"expert.{layer}.{expert}.{matrix}"
            dims[name] = 1 if matrix == "fc1" else 0
            _merge(parts.setdefault(name, {}), (lo, hi), value, name)
    state = {}
    for name, found in parts.items():
        ordered = sorted(found)
        if name.startswith("expert."):
            assert ordered[0][0] == 0 and all(a[1] == b[0] for a, b in zip(ordered, ordered[1:], strict=False)), ordered
        state[name] = torch.cat([found[part] for part in ordered], dim=dims[name])
        assert not state[name].isnan().any(), f"{name}: no rank holds some elements"
    return state


def _merge(found, part, value, name):
    before = found.get(part, value)
    both = ~(before.isnan() | value.isnan())
    assert torch.equal(before[both], value[both]), f"{name} {part} differs between ranks"
    found[part] = torch.where(before.isnan(), value, before)


def losses(ranks: list[dict]) -> list[float]:
    """Losses of a run, from a rank of the last pipeline stage."""
    return next(rank["losses"] for rank in reversed(ranks) if rank["losses"][0] is not None)
