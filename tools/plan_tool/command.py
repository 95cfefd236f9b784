"""From the flags of tools/plan_placement.py to what it prints and writes."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from hmoe_megatron.files import PLAN_FILE, TELEMETRY_FILE, atomic_write, check_output
from hmoe_megatron.flag_files import read_args, run_arguments
from hmoe_megatron.placement.baselines import CONTIGUOUS, baselines
from hmoe_megatron.placement.cost import CostModel
from hmoe_megatron.placement.moves import diff, moved_bytes
from hmoe_megatron.placement.plan import PlacementPlan
from hmoe_megatron.placement.planner import plan_model, under
from hmoe_megatron.placement.profiles import FLOPS, profile_named
from hmoe_megatron.placement.ranks import Rank
from hmoe_megatron.placement.table import plan_table
from hmoe_megatron.tools.plan_tool.compare import comparison_table, layers_table, outcomes
from hmoe_megatron.tools.plan_tool.loads import mean_loads
from hmoe_megatron.tools.plan_tool.model import Model, model_of
from hmoe_megatron.untrusted import shown

MAX_LAST, MAX_NUMBER = 100_000, 1e6
PLANNED, OLD = "planned", "old plan"


def run(given: argparse.Namespace, model_flags: list[str]) -> str:
    """Plan, write what was asked for, and return the text to print. Raises ValueError and OSError for wrong input."""
    notes: list[str] = []
    model = _model(given, model_flags)
    tokens_LE = _loads(given, model, notes)
    cost = _cost(given, model, notes)
    ranks = _ranks(given, model)
    old = _old_plan(given, model, notes)
    _check_outputs(given)
    plan = plan_model(
        tokens_LE, model.widths_LE, ranks, cost, model.max_cuts, model.cut_multiple, model.stages, old, model.layers
    )
    plans = baselines(plan)
    if old:
        plans[OLD] = under(old, plan)
    plans[PLANNED] = plan
    drawn = plan.numbers[0] if given.layer is None else given.layer
    plan.index(drawn)
    moves = diff(plans[OLD], plan) if old else None
    if given.output:
        plan.save(given.output)
    if given.plot:
        from hmoe_megatron.tools.plan_tool.picture import draw_plans  # matplotlib takes a second to import

        before = OLD if old else CONTIGUOUS
        atomic_write(given.plot, draw_plans({before: plans[before], PLANNED: plan}, drawn))
    if given.json:
        return _json(plans, moves, notes)
    return "\n".join(_text(given, plans, moves, notes))


def _check_outputs(given: argparse.Namespace) -> None:
    named = {"--output": given.output, "--plot": given.plot}
    paths = [Path(path).absolute() for path in named.values() if path is not None]
    for flag, path in named.items():
        if path is not None:
            check_output(path, flag)
    if len({*paths}) < len(paths):
        raise ValueError(f"--output and --plot {paths[0]}: give two files")


def _model(given: argparse.Namespace, model_flags: list[str]) -> Model:
    if given.args and given.run:
        raise ValueError("--args and --run: give one of them; flags on the command line win over either")
    words = run_arguments(Path(given.run)) if given.run else read_args(given.args) if given.args else []
    return model_of(words, model_flags)


def _loads(given: argparse.Namespace, model: Model, notes: list[str]):
    if not 1 <= given.last <= MAX_LAST:
        raise ValueError(f"--last {shown(given.last)}: give 1 to {MAX_LAST} lines of loads")
    path = Path(given.loads) if given.loads else Path(given.run) / TELEMETRY_FILE if given.run else None
    if path and (given.loads or path.exists()):
        return mean_loads(path, model, given.last, notes)
    notes.append("loads: none measured, all experts of a layer get the same")
    return model.even_loads()


def _cost(given: argparse.Namespace, model: Model, notes: list[str]) -> CostModel:
    profile = profile_named(given.profile)
    if model.hidden_size is None:
        if profile.unit != FLOPS.unit:
            raise ValueError(f"--hidden-size: --profile {given.profile} predicts seconds, which depend on it")
        if given.gib is not None:
            raise ValueError(f"--hidden-size: the bytes under --gib {given.gib:.80} depend on it")
        notes.append("no --hidden-size: FLOPs and bytes are those of a hidden size of 1")
    return CostModel(profile, model.hidden_size or 1, given.expert_data_parallel_size, model.live_micro_batches)


def _ranks(given: argparse.Namespace, model: Model) -> list[Rank]:
    """expert_tp GPUs work on one piece: a rank has the speed and the bytes of all of them."""
    number = model.ranks
    if not 1 <= given.nodes <= number or number % given.nodes:
        raise ValueError(
            f"--nodes {given.nodes}: give a number that divides the {number} ranks (--expert-model-parallel-size)"
        )
    speeds = _numbers("--speeds", given.speeds, number)
    caps = [None] * number if given.gib is None else _numbers("--gib", given.gib, number)
    return [
        Rank(
            rank * given.nodes // number,
            speed * model.expert_tp,
            None if cap is None else int(cap * 2**30) * model.expert_tp,
        )
        for rank, (speed, cap) in enumerate(zip(speeds, caps, strict=True))
    ]


def _numbers(flag: str, text: str, ranks: int) -> list[float]:
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, ranks) or not all(0 < x <= MAX_NUMBER for x in numbers):
        raise ValueError(
            f"{flag} {text:.80}: give one number above 0, or {ranks} with commas, one a rank (at most {MAX_NUMBER:g})"
        )
    return numbers * (ranks // len(numbers))


def _old_plan(given: argparse.Namespace, model: Model, notes: list[str]) -> PlacementPlan | None:
    path = Path(given.old_plan) if given.old_plan else Path(given.run) / PLAN_FILE if given.run else None
    if path is None or not (given.old_plan or path.exists()):
        return None
    plan = PlacementPlan.load(path, model.widths_LE, model.ranks)
    notes.append(f"old plan: {path}")
    return plan


def _text(given, plans: dict[str, PlacementPlan], moves, notes: list[str]):
    plan = plans[PLANNED]
    yield f"profile: {plan.cost.profile.name}, hidden size {plan.cost.hidden_size}"
    yield from notes
    yield ""
    yield plan_table(plan, given.layer)
    yield ""
    yield comparison_table(plans)
    if given.compare:
        yield ""
        yield layers_table(plans)
    if moves is not None:
        yield f"\nfrom the old plan: {len(moves)} moves, {moved_bytes(moves, plan.cost) / 2**30:.3f} GiB"
    for path in (given.output, given.plot):
        if path:
            yield f"written: {path}"


def _json(plans: dict[str, PlacementPlan], moves, notes: list[str]) -> str:
    plan = plans[PLANNED]
    value = {
        "notes": notes,
        "unit": plan.cost.unit,
        "compared": {name: asdict(outcome) for name, outcome in outcomes(plans).items()},
        "plan": json.loads(plan.to_json()),
    }
    if moves is not None:
        value["moves"] = [vars(move) for move in moves]
    return json.dumps(value, indent=1, allow_nan=False)
