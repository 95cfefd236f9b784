"""Every patch has a check that fails without it. Those of a CPU are here: each passes with its patch, and fails when
any one of its replacements is undone. A fix or a hook names the test that compares runs with and without it."""

import ast
import contextlib
import functools
import multiprocessing
import os
import queue
import signal
import time
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hmoe_megatron
from hmoe_megatron import patches
from hmoe_megatron.patches import registry
from tests.distributed.ranks import run_ranks

CHECKS = {}


def check(function):
    """Register the check of the patch of the same name; it gets an empty folder that both ranks share."""
    CHECKS[function.__name__] = function
    return function


@check
def cuda_device_is_the_cpu(folder):
    torch.cuda.set_device(torch.distributed.get_rank())
    assert torch.cuda.device_count() == 2
    assert torch.zeros(1, device=torch.cuda.current_device()).device.type == "cpu"


@check
def cuda_device_properties(folder):
    from megatron.training.utils import get_device_arch_version

    assert get_device_arch_version() == 0
    assert torch.cuda.get_device_properties(0).total_memory > 2**30


@check
def cuda_streams(folder):
    side, start = torch.cuda.Stream(device="cuda"), torch.cuda.Event(enable_timing=True)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        start.record()
        time.sleep(0.05)
        end = side.record_event()
        torch.zeros(1).record_stream(side)
    torch.cuda.current_stream().wait_event(end)
    torch.cuda.synchronize()
    assert 50 <= start.elapsed_time(end) < 5000  # milliseconds
    assert not torch.cuda.is_current_stream_capturing()


@check
def cuda_memory(folder):
    before_bytes = torch.cuda.memory_allocated()
    held = torch.ones(2**25)
    assert 100 * 2**20 < torch.cuda.memory_allocated() - before_bytes < 160 * 2**20
    for current, peak in (("memory_allocated", "max_memory_allocated"), ("memory_reserved", "max_memory_reserved")):
        current_bytes = getattr(torch.cuda, current)()
        assert getattr(torch.cuda, peak)() >= current_bytes > held.nbytes
    assert {
        "reserved_bytes.all.current",
        "allocated_bytes.all.current",
        "allocated_bytes.all.peak",
        "allocation.all.current",
    } <= torch.cuda.memory_stats().keys()
    assert torch.cuda.device_memory_used() > held.nbytes


@check
def cuda_rng(folder):
    torch.cuda.manual_seed(5)
    first = torch.rand(4)
    torch.manual_seed(5)
    assert torch.equal(first, torch.rand(4))
    state = torch.cuda.get_rng_state()
    assert torch.equal(state, torch.cuda.random.get_rng_state())
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, torch.rand(4))


@check
def cuda_factories(folder):
    for device in ("cuda", "cuda:0", torch.device("cuda")):
        made = [
            torch.empty(2, device=device),
            torch.empty_like(torch.zeros(2), device=device),
            torch.ones(2, device=device),
            torch.tensor([1, 2], device=device),
            torch.zeros(2, device=device),
        ]
        assert {tensor.device.type for tensor in made} == {"cpu"}
    with torch.device("meta"):
        assert torch.empty(2).is_meta and torch.ones(2).is_meta and torch.zeros(2).is_meta
        assert torch.tensor([1]).is_meta and not torch.zeros(2, device="cpu").is_meta
    assert torch.zeros(2, device="meta").is_meta and torch.empty_like(torch.zeros(2, device="meta")).is_meta


@check
def tensor_cuda(folder):
    batch = torch.zeros(2)
    assert batch.cuda(non_blocking=True) is batch
    assert torch.nn.Linear(2, 2).cuda(torch.device("cpu")).weight.device.type == "cpu"


@check
def tensor_type(folder):
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), 3.0)
    clip_grad_by_total_norm_fp32([parameter], 1.0, 3 * 2**0.5)
    torch.testing.assert_close(parameter.grad, torch.full((2,), 0.5**0.5))
    assert parameter.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert parameter.type(torch.float64).dtype == parameter.type("torch.DoubleTensor").dtype == torch.float64


@check
def megatron_without_cuda(folder):
    from megatron.training.training import initialize_megatron

    with pytest.raises(AssertionError, match="args is not initialized"):  # past the assertion on CUDA
        initialize_megatron()
    assert not torch.cuda.is_available()


@check
def no_fusion_warmup(folder):
    from megatron.training import global_vars
    from megatron.training.training import set_jit_fusion_options

    global_vars._GLOBAL_ARGS = SimpleNamespace(
        bf16=False,
        fp16=False,
        ffn_hidden_size=8,
        tensor_model_parallel_size=1,
        seq_length=4,
        context_parallel_size=1,
        micro_batch_size=1,
        swiglu=True,
        sequence_parallel=False,
        hidden_size=8,
    )
    try:
        before = torch.get_rng_state()
        set_jit_fusion_options(tp_size=1)
        assert torch.equal(before, torch.get_rng_state())
    finally:
        global_vars._GLOBAL_ARGS = None


@check
def megatron_rng_state(folder):
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("experts", 11)
    torch.manual_seed(3)
    outside = torch.rand(4), torch.rand(4)
    torch.manual_seed(3)
    first = torch.rand(4)
    with tracker.fork("experts"):
        inside = torch.rand(4)
    assert torch.equal(outside[0], first) and torch.equal(outside[1], torch.rand(4))
    torch.manual_seed(11)
    assert torch.equal(inside, torch.rand(4))


@check
def permutation_without_a_sort(folder):
    from megatron.core.transformer.moe import moe_utils, token_dispatcher
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoSort(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert "sort" not in str(function)
            return function(*args, **(kwargs or {}))

    tokens, probs = torch.randn(7, 4), torch.rand(7, 5)
    routing_map = probs > 0.5
    for owner in (moe_utils, token_dispatcher):
        stock = moe_utils.permute.__wrapped__(tokens, routing_map, probs, num_out_tokens=int(routing_map.sum()))
        with NoSort():
            found = owner.permute(tokens, routing_map, probs=probs, num_out_tokens=int(routing_map.sum()), fused=False)
        assert all(map(torch.equal, found[:3], stock[:3])) and found[3:] == stock[3:] == (None, None)


@check
def queue_of_a_synchronous_save(folder):
    from multiprocessing import managers

    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def start(self, *args):
        raise RuntimeError("a manager process was started")

    stock, managers.BaseManager.start = managers.BaseManager.start, start
    try:
        dist_checkpointing.save(_sharded(torch.distributed.get_rank() + torch.arange(4.0)), folder)
    finally:
        managers.BaseManager.start = stock
    assert filesystem_async._results_queue is None
    _assert_saved(folder)


def _sharded(values):
    from megatron.core.dist_checkpointing import ShardedTensor

    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return {"values": ShardedTensor.from_rank_offsets("values", values, (0, rank, ranks))}


def _assert_saved(folder):
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load(_sharded(torch.zeros(4)), folder)
    assert torch.equal(loaded["values"], torch.distributed.get_rank() + torch.arange(4.0))


@check
def worker_of_asynchronous_saves(folder):
    """In a process whose torch.cuda is as in one that has just been started. tests/end_to_end has the real one."""
    worker = multiprocessing.get_context("fork").Process(target=_work_as_if_new, args=(folder,))
    worker.start()
    worker.join()
    assert worker.exitcode == 0 and torch.load(f"{folder}/{torch.distributed.get_rank()}").tolist() == [4, 4]


def _work_as_if_new(folder):
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, PersistentAsyncCaller

    for replaced in registry.REPLACED:
        if replaced.owner is torch.cuda:
            setattr(torch.cuda, replaced.attribute, replaced.before)
    registry.DONE.clear()
    requests, preloads, finished = queue.Queue(), queue.Queue(), queue.Queue()
    requests.put(
        AsyncRequest(
            torch.save, [torch.full((2,), 4), None], [], preload_fn=functools.partial(_file_after_synchronizing, folder)
        )
    )
    requests.put("DONE")
    preloads.put(0)
    PersistentAsyncCaller.async_loop(torch.distributed.get_rank(), requests, preloads, finished)


def _file_after_synchronizing(folder):
    torch.cuda.synchronize()
    return f"{folder}/{torch.distributed.get_rank()}"


@check
def queue_of_asynchronous_saves(folder):
    context = multiprocessing.get_context("fork")
    server, of_rank = context.Pipe(duplex=False)
    rank = context.Process(target=_open_queue_and_stay, args=(of_rank,))
    rank.start()
    pid = server.recv()
    rank.kill()
    rank.join()
    try:
        _wait_until_gone(pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _open_queue_and_stay(of_rank):
    from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

    results = get_write_results_queue("fork")
    results.put("written")
    assert results.get() == "written"
    of_rank.send(results._manager._process.pid)
    time.sleep(60)


def _wait_until_gone(pid, timeout_s=5):
    deadline = time.monotonic() + timeout_s
    while _runs(pid):
        assert time.monotonic() < deadline, f"process {pid} is there {timeout_s} s after its rank"
        time.sleep(0.05)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@check
def copies_for_asynchronous_saves(folder):
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    file = f"{folder}/{torch.distributed.get_rank()}"
    tensors = [torch.arange(6.0).view(2, 3), torch.arange(3).bfloat16(), torch.tensor(7.0), torch.zeros(0, 2)]
    before = [tensor.clone() for tensor in tensors]
    buckets = [("path", "key", ([], [(None, tensor) for tensor in tensors]))]
    preload = functools.partial(FileSystemWriterAsync.preload_tensors, buckets, True)
    calls = AsyncCallsQueue(persistent=True)
    calls.warmup_persistent_caller(torch.distributed.get_rank(), mp_mode="fork")
    calls.schedule_async_request(
        AsyncRequest(functools.partial(_write_late, file), [0, None, None], [], preload_fn=preload)
    )
    for tensor in tensors:
        tensor += 1
    calls.close()
    for expected, found in zip(before, torch.load(file), strict=True):
        assert torch.equal(expected, found) and expected.dtype == found.dtype


def _write_late(file, rank, buckets, results):
    time.sleep(0.5)  # the training loop has gone on
    torch.save([tensor for _, tensor in buckets[0][2][1]], file)


@check
def quiet_pin_memory(folder):
    loader = torch.utils.data.DataLoader(torch.arange(4), pin_memory=True)
    with warnings.catch_warnings(record=True) as caught:
        assert len(list(loader)) == 4
    assert not caught


@check
def all_to_all_split_tensors(folder):
    rank = torch.distributed.get_rank()
    received = torch.zeros(3)
    torch.distributed.all_to_all_single(
        received,
        torch.full((3,), float(rank)),
        torch.tensor([1 + rank, 2 - rank]),
        input_split_sizes=torch.tensor([1 + rank, 2 - rank]),
    )
    assert received.tolist() == [[0, 1, 1], [0, 0, 1]][rank]


@check
def all_gather_uneven(folder):
    rows = [3, 0]
    parts = [torch.zeros(count, 2) for count in rows]
    torch.distributed.all_gather(parts, torch.full((rows[torch.distributed.get_rank()], 2), 4.0))
    assert torch.equal(parts[0], torch.full((3, 2), 4.0)) and parts[1].shape == (0, 2)
    parts = [torch.zeros(2), torch.zeros(2)]
    work = torch.distributed.all_gather(parts, torch.ones(2), async_op=True)
    work.wait()
    assert torch.equal(torch.cat(parts), torch.ones(4))
    with pytest.raises(NotImplementedError, match="async_op=True"):
        torch.distributed.all_gather([torch.zeros(1), torch.zeros(2)], torch.ones(1), async_op=True)


def _with_and_without(name, folder):
    """[error with the patch, {attribute: error without its replacement}], None for no error."""
    errors = [_error(CHECKS[name], f"{folder}/with"), {}]
    replacements = [replacement for replacement in registry.REPLACED if replacement.patch == name]
    assert replacements, "the patch replaced nothing"
    for attribute in dict.fromkeys(replacement.attribute for replacement in replacements):
        group = [replacement for replacement in replacements if replacement.attribute == attribute]
        after = [getattr(replacement.owner, attribute) for replacement in group]
        for replacement in group:
            setattr(replacement.owner, attribute, replacement.before)
        errors[1][attribute] = _error(CHECKS[name], f"{folder}/without_{attribute}")
        for replacement, value in zip(group, after, strict=True):
            setattr(replacement.owner, attribute, value)
    return errors


def _error(function, folder):
    if torch.distributed.get_rank() == 0:
        os.makedirs(folder)
    torch.distributed.barrier()
    try:
        function(folder)
    except BaseException as error:
        line = traceback.extract_tb(error.__traceback__)[1]
        return f"{type(error).__name__}: {error} at `{line.line}`"


# Of fixes and hooks: the test that fails without it, file and function.
TESTS = {
    "dataset_helpers": (
        "distributed/test_patches_optimizer",
        "test_dataset_helpers_are_not_compiled_where_there_is_no_makefile",
    ),
    "torch_adam_of_the_distributed_optimizer": ("distributed/test_patches_optimizer", "test_stock_shares_one_step"),
    "optimizer_checkpoints": (
        "distributed/test_patches_optimizer_checkpoints",
        "test_stock_loses_the_step_where_rank_0_holds_no_expert",
    ),
    "learning_rate_at_a_resume": (
        "distributed/test_resume",
        "test_the_learning_rate_changes_at_a_resume_and_the_moments_stay",
    ),
    "latent_projections_of_experts": ("distributed/test_layouts", "test_equal_widths_are_bitwise_megatrons"),
    "name_of_report_stats": (
        "distributed/test_numeric_faults",
        "test_what_is_not_finite_ends_every_rank_with_its_cause",
    ),
    "head_sizes_of_latent_attention": ("unit/test_accounting", "test_counted_parameters_are_those_of_the_built_model"),
    "key_positions_of_latent_attention": ("distributed/test_layouts", "test_unequal_widths_agree_with_one_rank"),
    "rng_of_ranks": (
        "distributed/test_determinism",
        "test_stock_gives_all_expert_parallel_ranks_the_streams_of_the_first",
    ),
    "sequence_parallel_norm": (
        "distributed/test_patches_norm",
        "test_the_norm_is_marked_for_the_sum_over_tensor_parallel_ranks",
    ),
    "optimizer_is_built": ("distributed/test_determinism", "test_the_norm_with_cut_experts_is_that_of_whole_ones"),
    "multi_token_prediction": ("distributed/test_layouts", "test_unequal_widths_agree_with_one_rank"),
    "reports_of_flops_and_memory": ("unit/test_accounting", "test_flops_use_the_measured_activated_width"),
    "transformer_engine_is_there": ("unit/test_check_only", "test_a_configuration_for_gpus_is_checked_without_one"),
    "training_step": ("distributed/test_numeric_faults", "test_stock_saves_the_step_and_locks_out"),
    "checkpoints": ("distributed/test_saving", "test_a_save_that_fails_once_is_tried_again"),
    "unpadded_flex_dispatcher": ("unit/test_slots", "test_no_dispatcher_pads_rows_for_fp8_kernels"),
}


def test_every_patch_has_a_check_and_a_reason():
    listed = patches.listed()
    assert set(CHECKS) == {name for name, patch in listed.items() if patch.kind == "cpu"}
    assert set(TESTS) == set(listed) - set(CHECKS)
    for name, (file, function) in TESTS.items():
        path = Path(__file__).parents[1] / f"{file}.py"
        assert f"def {function}(" in path.read_text(), f"{name}: {path} has no {function}"
    assert all(len(patch.reason) > 60 for patch in listed.values())


def test_nothing_else_changes_megatron():
    """No module outside patches/ sets an attribute of what it imported from Megatron or torch, but torch's settings."""
    package = Path(hmoe_megatron.__file__).parent
    found = []
    for path in package.rglob("*.py"):
        if path.parent.name == "patches":
            continue
        tree = ast.parse(path.read_text())
        foreign = {
            alias.asname or alias.name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
            if (getattr(node, "module", None) or alias.name).split(".")[0] in ("megatron", "torch")
        }
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                root = target
                while isinstance(root, ast.Attribute):
                    root = root.value
                if (
                    isinstance(target, ast.Attribute)
                    and isinstance(root, ast.Name)
                    and root.id in foreign
                    and "deterministic" not in ast.dump(target)
                ):
                    found.append(f"{path.relative_to(package)}:{node.lineno}")
    assert found == []


@pytest.mark.parametrize("name", CHECKS)
def test_a_patch_works_and_each_of_its_replacements_is_needed(name, tmp_path):
    for with_patch, without in run_ranks(2, _with_and_without, name, str(tmp_path)):
        assert with_patch is None
        assert without and all(without.values()), without


def test_an_asynchronous_save_still_has_its_manager(tmp_path):
    run_ranks(2, _save_asynchronously, str(tmp_path))


def _save_asynchronously(folder):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    request = dist_checkpointing.save(
        _sharded(torch.distributed.get_rank() + torch.arange(4.0)),
        folder,
        async_sharded_save=True,
        async_strategy="mcore",
    )
    calls = AsyncCallsQueue()
    calls.schedule_async_request(request)
    calls.maybe_finalize_async_calls(blocking=True)
    _assert_saved(folder)
