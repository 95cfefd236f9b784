"""From a command line to a running ``megatron.training.pretrain``: arguments, layout, model config, loop."""

import argparse
import json
import math
import signal
import sys
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from hmoe_megatron import collectives, machine, patches
from hmoe_megatron.checkpoint.run_flags import with_checkpoint_flags
from hmoe_megatron.checkpoint.session import Checkpoints, Start, starting_checkpoint
from hmoe_megatron.command_line import add_arguments, checked_ranks
from hmoe_megatron.config import HMoEConfig, expert_hidden_size, hmoe_config_from_args, widths_from_args
from hmoe_megatron.data.checks import check_data, data_is_here
from hmoe_megatron.exits import DataRefused, RunEnded, SavingFailed
from hmoe_megatron.files import PLAN_FILE, RUN_ARGUMENTS_FILE, RUN_SOFTWARE_FILE, atomic_write
from hmoe_megatron.launch.mpi import set_environment_from_mpi
from hmoe_megatron.launch.process import alone_without_torchrun, check_rank_environment, tell_torchrun
from hmoe_megatron.launch.stop import end_after_the_step, end_at_once
from hmoe_megatron.machine import software
from hmoe_megatron.moe import gradient_norm
from hmoe_megatron.moe.compute.choice import Activation, ExpertShapes, choose_compute
from hmoe_megatron.moe.layout import ExpertLayout, most_widths
from hmoe_megatron.patches import hooks
from hmoe_megatron.patches.as_if_gpu import transformer_engine_is_there
from hmoe_megatron.placement.cost import CostModel
from hmoe_megatron.placement.plan import PlacementPlan
from hmoe_megatron.placement.planner import contiguous_plan, plan_model
from hmoe_megatron.placement.profiles import peak_flops
from hmoe_megatron.placement.table import plan_table
from hmoe_megatron.telemetry import console
from hmoe_megatron.telemetry.accounting import (
    expected_active_width,
    expert_parameters,
    parameter_counts,
    report_real_widths,
)
from hmoe_megatron.telemetry.counters import RoutingStats
from hmoe_megatron.telemetry.speed import step_flops, tokens_per_s
from hmoe_megatron.validate_args import check_dispatch, check_megatron_arguments, met_flags
from hmoe_megatron.validate_args.memory import fullest_rank, memory_lines, moving_bytes
from hmoe_megatron.validate_args.sizes import expert_tensor_parallel_size, pad_vocabulary
from hmoe_megatron.validate_args.unread import unread_problems


def prepare() -> None:
    """What must happen before Megatron is used: this process's place among the ranks, patches for a machine without a
    GPU, repairs. ValueError where the ranks are not known."""
    check_rank_environment()
    if not set_environment_from_mpi():
        alone_without_torchrun()
    patches.apply()
    patches.fix()
    hooks.optimizer_is_built(gradient_norm.attach)
    from hmoe_megatron.moe.specs import prediction_layers_with_experts  # Megatron is patched by now

    hooks.multi_token_prediction(prediction_layers_with_experts)


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, ExpertLayout, Start | None]:
    """Parse and check Megatron's and HMoE's flags, find the checkpoint to go on from, and lay out the experts.

    Returns Megatron's validated arguments, not yet made global, the layout and the checkpoint. No process group is
    started. Raises ValueError, with every problem it found, for settings that can't work, and CheckpointRefused.
    """
    from megatron.training.argument_utils import core_transformer_config_from_args
    from megatron.training.arguments import parse_args, validate_args

    from hmoe_megatron.moe.specs import spec_of_user

    given = sys.argv
    sys.argv = [given[0], *machine.machine_argv(argv)]
    try:
        args = parse_args(add_arguments)
    finally:
        sys.argv = given
    settings = checked_settings(args, argv)
    changes_nothing = met_flags(args)
    if collectives.rank() == 0:
        print("".join(f" {line}\n" for line in changes_nothing), end="", flush=True)
    args.exit_signal_handler |= not settings.default_signals
    start = starting_checkpoint(args)
    if start and args.padded_vocab_size is None:  # Megatron's own number of rows depends on the tensor-parallel size
        args.padded_vocab_size = start.vocabulary_rows()
    pad_vocabulary(args)
    layout = expert_layout(args, settings, start)
    check_dispatch(args, layout)
    # Megatron checks that --num-experts divides by the expert-parallel size: show it the slots, which do. The width is
    # for its checks too; no layer uses it.
    logical = args.num_experts
    args.num_experts, args.moe_ffn_hidden_size = layout.slots(), max(max(w) for w in layout.widths.values())
    validate_args(args, {"tokenizer_type": "GPT2BPETokenizer"})
    args.num_experts = logical
    core_transformer_config_from_args(args)  # for its checks, before anything starts
    spec_of_user(args.spec)
    return args, layout, start


def checked_settings(args: argparse.Namespace, argv: list[str]) -> HMoEConfig:
    """Of parsed arguments. Raises ValueError with all that is wrong with the flags by themselves."""
    problems, settings = list(unread_problems(argv)), HMoEConfig()
    try:
        settings = hmoe_config_from_args(args)
    except ValueError as error:
        problems.append(str(error))
    try:
        check_megatron_arguments(args, settings, machine.has_gpu())
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return settings


def expert_layout(args: argparse.Namespace, settings: HMoEConfig, start: Start | None) -> ExpertLayout:
    """Widths, plan, backend and counters of the model that the flags describe."""
    widths = widths_from_args(args, settings)
    plan = placement_plan(args, settings, widths, start)
    shapes = expert_shapes(args, plan)
    most = None
    if settings.replan_interval:
        most = most_widths(plan, settings.replan_room, settings.cut_multiple * expert_tensor_parallel_size(args))
    compute, words = choose_compute(
        settings.gemm_backend,
        machine.has_gpu(),
        shapes,
        settings.keep_hidden,
        Activation(args.activation_func_clamp_value, args.glu_linear_offset),
    )
    return ExpertLayout(
        settings=settings,
        widths=widths,
        plan=plan,
        compute=compute,
        computed_by=words,
        stats=RoutingStats(list(widths), args.num_experts),
        seed=args.seed,
        most=most,
    )


def expert_shapes(args: argparse.Namespace, plan: PlacementPlan) -> ExpertShapes:
    """What the ranks' experts will compute."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    # As Megatron's validate_args will decide.
    bf16_in_fp32 = args.bf16 and args.main_grads_dtype == "fp32"
    in_fp32 = (args.accumulate_allreduce_grads_in_fp32 or bf16_in_fp32) and not args.grad_reduce_in_bf16
    share = expert_tensor_parallel_size(args)
    on_ranks = {tuple(piece.width // share for piece in pieces) for layer in plan.layers for pieces in layer.pieces}
    hidden, grad_dtype = expert_hidden_size(args), torch.float32 if in_fp32 else dtype
    return ExpertShapes(hidden, dtype, frozenset(filter(None, on_ranks)), grad_dtype)


def placement_plan(args: argparse.Namespace, settings: HMoEConfig, widths, start: Start | None) -> PlacementPlan:
    """The plan that ``--hmoe-placement`` asks for, for every expert-parallel rank and MoE layer."""
    widths_LE, ranks = tuple(widths.values()), args.expert_model_parallel_size
    expert_tp = expert_tensor_parallel_size(args)
    cost = CostModel(hidden_size=expert_hidden_size(args))
    # Nothing is measured before a run: None expects the same number of tokens for every expert.
    if settings.placement == "contiguous":
        plan = contiguous_plan(widths_LE, ranks, cost=cost, numbers=tuple(widths))
    elif settings.placement == "auto":
        plan = plan_model(
            None,
            widths_LE,
            ranks,
            cost,
            max_cuts=settings.max_cuts,
            cut_multiple=settings.cut_multiple * expert_tp,
            numbers=tuple(widths),
        )
    else:
        if settings.placement == "checkpoint" and start is None:
            raise ValueError(
                "--hmoe-placement checkpoint needs --load of a run that has one: give its directory, or use auto"
            )
        path = start.plan_file() if settings.placement == "checkpoint" else Path(settings.placement)
        plan = replace(PlacementPlan.load(path, widths_LE, ranks), numbers=tuple(widths))
    check_plan(plan, widths, expert_tp)
    return plan


def check_plan(plan: PlacementPlan, widths, expert_tp: int) -> None:
    """Raise ValueError for a plan that Megatron's parallelism can't hold."""
    for layer, layer_plan in zip(widths, plan.layers, strict=True):
        for piece in (piece for pieces in layer_plan.pieces for piece in pieces):
            if piece.width % expert_tp:
                raise ValueError(
                    f"layer {layer}: {piece} has width {piece.width}, which does not divide by "
                    f"--expert-tensor-parallel-size {expert_tp}: use --hmoe-width-multiple {expert_tp}"
                )


def model_config(args: argparse.Namespace, layout: ExpertLayout):
    """Megatron's GPTModelConfig with HMoE's layer specs for ``layout``."""
    from megatron.training.argument_utils import core_transformer_config_from_args, gpt_config_from_args

    from hmoe_megatron.moe.specs import hmoe_block_spec, spec_of_user

    transformer = core_transformer_config_from_args(args)
    # Layers of different widths can't be stacked in one checkpoint key. (The spelling is Megatron's.)
    transformer.hetereogenous_dist_checkpoint = True
    config = gpt_config_from_args(args, config=transformer)
    config.transformer_layer_spec = partial(hmoe_block_spec, layout, given=spec_of_user(args.spec))
    return config


def run_directory(args: argparse.Namespace, settings: HMoEConfig) -> Path | None:
    """Where the plan and the telemetry go: ``--hmoe-run-dir``, else ``--save``, else nowhere."""
    directory = settings.run_dir or args.save
    return Path(directory) if directory else None


def open_checkpoints(args: argparse.Namespace, layout: ExpertLayout, start: Start | None) -> Checkpoints:
    """The run's checkpoints, ready to be loaded and saved; see ``Checkpoints.prepare`` for what it raises."""
    checkpoints = Checkpoints(args, layout, start)
    checkpoints.prepare()
    checkpoints.install()
    return checkpoints


def start_megatron(args: argparse.Namespace) -> None:
    """Make the arguments Megatron's and build its tokenizer. Raises DataRefused for one that the model has no rows
    for."""
    from megatron.training import get_tokenizer
    from megatron.training.global_vars import get_signal_handler, set_global_variables

    set_global_variables(args)
    if args.exit_signal_handler:
        end_at_once(get_signal_handler())
    if get_tokenizer().vocab_size > (args.padded_vocab_size or math.inf):
        raise DataRefused(
            f"the tokenizer has {get_tokenizer().vocab_size} tokens and the model {args.padded_vocab_size} rows for "
            "them (--padded-vocab-size): give the model's own tokenizer"
        )


def check_only(argv: list[str]) -> int:
    """What --hmoe-check-only does; the exit code. Writes nothing."""
    try:
        ranks = checked_ranks(argv)
        prepare()
        if ranks:
            machine.assume_gpus(ranks)
            transformer_engine_is_there()
        argv = with_checkpoint_flags(argv)
        args, layout, start = parse_arguments(argv)
        if there := data_is_here(args):
            check_data(args)
        if start:
            Checkpoints(args, layout, start).compare(start.path)
        if args.padded_vocab_size is None:
            pad_vocabulary_of_tokenizer(args)
    except (ValueError, AssertionError, RunEnded) as error:
        return refuse(error)
    announce(args, layout, parameter_counts(args, layout.widths))
    print("\n".join(memory_lines(fullest_rank(args, layout), moving_bytes(args, layout))))
    print(f" {args.world_size} ranks: all that can be checked without them is in order, nothing was written")
    if not there:
        print(" the data is not on this machine and was not looked at")
    return 0


def pad_vocabulary_of_tokenizer(args: argparse.Namespace) -> None:
    """As Megatron will when it has built the tokenizer. Raises ValueError where that is not on this machine."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    try:
        build_tokenizer(args)
    except Exception as error:
        raise ValueError(
            f"--tokenizer-model {args.tokenizer_model}: {type(error).__name__}: {error!s:.200}: give "
            "--padded-vocab-size where the tokenizer is not on this machine"
        ) from None


def train(args: argparse.Namespace, layout: ExpertLayout, checkpoints: Checkpoints, argv: list[str]) -> None:
    """Train: everything from here on needs the process group, which Megatron starts. ``argv``: the flags as given.

    Raises RunEnded for what ends the run with a reason of its own.
    """
    from megatron.core.enums import ModelType
    from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.global_vars import get_signal_handler

    from hmoe_megatron.data.batches import datasets_provider, forward_step
    from hmoe_megatron.nan_guard import guard as numeric_guard
    from hmoe_megatron.replan.replanner import replanner_of
    from hmoe_megatron.telemetry.tracker import HMoEMetricsTracker

    start_megatron(args)
    config = model_config(args, layout)
    parameters, run_dir = parameter_counts(args, layout.widths), run_directory(args, layout.settings)
    speed = partial(tokens_per_s, args)
    tracker = HMoEMetricsTracker(
        layout, expert_hidden_size(args), parameters, args.log_interval, run_dir, numeric_guard.end_for_router, speed
    )
    set_moe_metrics_tracker(tracker)
    expected = sum(
        expected_active_width(layout.settings, args.moe_router_topk, widths) for widths in layout.widths.values()
    ) / len(layout.widths)
    report_real_widths(layout.widths, lambda: tracker.active_width or expected)
    numeric_guard.install(layout.stats, replanner_of(args, layout, run_dir))
    if screen := console.current():
        peak = peak_flops(torch.cuda.get_device_name()) if machine.has_gpu() else None
        screen.run_is(args.seq_length, partial(step_flops, args), peak and peak * args.world_size)
    fell_back = layout.settings.gemm_backend == "auto" and machine.has_gpu() and "triton" not in layout.computed_by
    if fell_back and args.rank != 0:  # rank 0 says it below
        print(f" rank {args.rank}: experts computed by {layout.computed_by}", flush=True)
    if args.rank == 0:
        announce(args, layout, parameters)
    started = False

    def step(data_iterator, model, return_schedule_plan=False):
        """Model, checkpoint and data are there by now: a start that fails before leaves the files of the run before."""
        nonlocal started
        if not started:
            started = True
            if args.exit_signal_handler:
                end_after_the_step(get_signal_handler(), args)
            if args.rank == 0 and run_dir:
                write_run(layout, run_dir, argv)
            if screen:
                screen.log_to(run_dir if args.rank in (0, args.world_size - 1) else None)
        return forward_step(data_iterator, model, return_schedule_plan)

    try:
        pretrain(pretrain_cfg_container_from_args(args, config), datasets_provider, ModelType.encoder_or_decoder, step)
    except SystemExit as left:  # Megatron leaves so after a signal, --exit-interval, --exit-duration-in-mins
        if not left.code:
            checkpoints.end()
        raise
    checkpoints.end()


def announce(args: argparse.Namespace, layout: ExpertLayout, parameters) -> None:
    """Print what will be trained, and where. Activated parameters are those of even routing."""
    width = sum(expected_active_width(layout.settings, args.moe_router_topk, of) for of in layout.widths.values())
    active = parameters.always_active + expert_parameters(expert_hidden_size(args), width)
    print(f" {machine.machine_line(args)}\n experts computed by {layout.computed_by}")
    print(plan_table(layout.plan))
    print(
        f" parameters: {parameters.total / 1e6:,.2f} M, of them {parameters.experts / 1e6:,.2f} M in experts and "
        f"{parameters.always_active / 1e6:,.2f} M outside; {active / 1e6:,.2f} M active in a token",
        flush=True,
    )


def write_run(layout: ExpertLayout, run_dir: Path, argv: list[str]) -> None:
    """Write plan, flags, versions and commit beside the run. Raises SavingFailed where nothing can be written."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        layout.plan.save(run_dir / PLAN_FILE)
        made_of = {"commit": software.commit(), **software.versions()}
        for name, content in ((RUN_ARGUMENTS_FILE, argv), (RUN_SOFTWARE_FILE, made_of)):
            atomic_write(run_dir / name, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise SavingFailed(
            f"{run_dir} can't be written to: {error.strerror}: fix that, or give another directory", on_every_rank=False
        ) from None
    print(f" placement plan: {run_dir / PLAN_FILE}", flush=True)


def refuse(error: Exception) -> int:
    """Say why the run can't start or go on; the exit code, 2 for settings that can't work."""
    ended = isinstance(error, RunEnded)
    rank = collectives.rank()
    of_one_rank = not getattr(error, "on_every_rank", True)
    where = f"rank {rank}: " if rank and of_one_rank else ""
    line = f"pretrain_hmoe.py: error: {where}{str(error) or asserted(error)}"
    tell_torchrun(line)
    if rank == 0 or of_one_rank:
        print(line, file=sys.stderr, flush=True)
    return error.exit_code if ended else 2


def interrupted() -> int:
    """Say that Ctrl-C ended the run; the exit code, as a shell has it."""
    if collectives.rank() == 0:
        print("pretrain_hmoe.py: Ctrl-C: ended at once, nothing was saved", file=sys.stderr, flush=True)
    return 128 + signal.SIGINT


def asserted(error: Exception) -> str:
    """What an assertion without a message asserts: Megatron has some among its checks of arguments."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"Megatron requires: {last.line} ({Path(last.filename).name}:{last.lineno})"
