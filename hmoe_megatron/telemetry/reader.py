"""telemetry.jsonl of a run, read line by line as untrusted input.

Legend: L MoE layers, E logical experts.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from hmoe_megatron.files import open_regular
from hmoe_megatron.placement.ranks import MAX_RANKS
from hmoe_megatron.untrusted import shown
from hmoe_megatron.widths import MAX_EXPERTS, MAX_LAYERS

MAX_LINE_BYTES = 16 << 20
MAX_ITERATION = 1 << 53
MAX_AMOUNT = 1e18  # parameters, milliseconds
BALANCES = ("flops_balance", "token_balance", "time_balance")
_REMEDY = "give the directory that --hmoe-run-dir (default: --save) of a run named, after its first logged step"


def read_records(path: Path, notes: list[str]) -> Iterator[tuple[int, dict]]:
    """(number of the line, record) of every logged step, one at least.

    A last line that was cut off when the run was killed is left out, which is said in `notes`. Raises ValueError with
    file, line where there is one, and remedy.
    """
    is_empty = True
    for numbered in _read_lines(path, notes, _check):
        is_empty = False
        yield numbered
    if is_empty:
        raise ValueError(f"{path}: holds no step; {_REMEDY}")


def read_changes(path: Path, notes: list[str]) -> Iterator[tuple[int, dict]]:
    """The same of replans.jsonl: every change of plan while training."""
    return _read_lines(path, notes, _check_change)


def _read_lines(path: Path, notes: list[str], check) -> Iterator[tuple[int, dict]]:
    last, number = None, 0
    with open_with_remedy(path, _REMEDY) as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            try:
                record = _parse(line)
                if record is None and not line.endswith(b"\n"):
                    notes.append(f"{path.name} ends in the middle of line {number}, which is left out.")
                    break
                check(record, last)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
            last = record
            yield number, record


def open_with_remedy(path: Path, remedy: str) -> BinaryIO:
    """The file, open to read bytes. Raises ValueError with the path and `remedy` if it is none."""
    try:
        return open_regular(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {remedy}") from None


def _parse(line: bytes) -> dict | None:
    """The record of a line; None for a line that was cut off when the run was killed."""

    def no_constants(name):
        raise ArithmeticError(name)

    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"longer than {MAX_LINE_BYTES} bytes, too long for a step")
    try:
        return json.loads(line.decode(), parse_constant=no_constants)
    except ArithmeticError as error:
        raise ValueError(f"{error} is no number here") from None
    except RecursionError:
        raise ValueError("nested too deeply for a step") from None
    except ValueError as error:
        if not line.endswith(b"\n"):
            return None
        raise ValueError(f"not read as JSON: {str(error)[:200]}") from None


def _check(record, last: dict | None) -> None:
    """Raises ValueError for wrong types and sizes, numbers out of range, and steps that do not follow each other."""
    _check_iteration(record, last)
    _number(record, "total_parameters", MAX_AMOUNT)
    _number(record, "activated_parameters", MAX_AMOUNT)
    for name in BALANCES:
        _number(record, name, MAX_RANKS)
    if "tokens_per_s" in record:  # older runs did not say it
        _number(record, "tokens_per_s", MAX_AMOUNT)
    _numbers(record, "expert_time_ms", MAX_AMOUNT, 1, MAX_RANKS)
    layers = _listed(record, "layers", 1, MAX_LAYERS)
    experts = len(last["layers"][0]["token_share"]) if last else None
    for row, layer in enumerate(layers):
        try:
            experts = _check_layer(layer, experts)
        except ValueError as error:
            raise ValueError(f"layers[{row}]: {error}") from None
    numbers = [layer["layer"] for layer in layers]
    if last and numbers != (before := [layer["layer"] for layer in last["layers"]]):
        raise ValueError(f"layers {numbers!s:.80}, the line before has {before!s:.80}")
    if numbers != sorted(known := set(numbers)):
        raise ValueError(f"layers {numbers!s:.80} are not in ascending order")
    idle = _listed(record, "experts_without_token", 0, len(layers) * experts)
    for pair in idle:
        if type(pair) is not list or [type(x) for x in pair] != [int, int]:
            raise ValueError(f"experts_without_token: {shown(pair)} is not [layer, expert]")
        if pair[0] not in known or not 0 <= pair[1] < experts:
            raise ValueError(f"experts_without_token: no layer {shown(pair[0])} with expert {shown(pair[1])}")


def _check_change(record, last: dict | None) -> None:
    _check_iteration(record, last)
    for name, most in (("bytes", MAX_AMOUNT), ("seconds", MAX_AMOUNT), ("balance_before", MAX_RANKS)):
        _number(record, name, most)
    _number(record, "balance_after", MAX_RANKS)


def _check_iteration(record, last: dict | None) -> None:
    if type(record) is not dict:
        raise ValueError(f"a {type(record).__name__}, not a JSON object")
    after = last["iteration"] + 1 if last else 0
    if type(record.get("iteration")) is not int or not after <= record["iteration"] <= MAX_ITERATION:
        raise ValueError(f"iteration {shown(record.get('iteration'))} is not a whole number from {after} on")


def _check_layer(layer, experts: int | None) -> int:
    """The number of experts."""
    if type(layer) is not dict:
        raise ValueError(f"a {type(layer).__name__}, not a JSON object")
    if type(layer.get("layer")) is not int or not 0 <= layer["layer"] <= MAX_ITERATION:
        raise ValueError(f"layer {shown(layer.get('layer'))} is not the number of a layer")
    fewest, most = (experts, experts) if experts else (1, MAX_EXPERTS)
    shares = _numbers(layer, "token_share", 1.000001, fewest, most)
    _numbers(layer, "flops_share", 1.000001, len(shares), len(shares))
    _number(layer, "activated_expert_parameters", MAX_AMOUNT)
    _number(layer, "experts_per_token", MAX_EXPERTS)
    for name in ("flops_balance", "token_balance"):
        _number(layer, name, MAX_RANKS)
    return len(shares)


def _is_amount(value, most: float) -> bool:
    return type(value) in (int, float) and 0 <= value <= most  # `type`: True is an int; NaN compares as False


def _number(fields: dict, name: str, most: float) -> None:
    if not _is_amount(fields.get(name), most):
        raise ValueError(f"{name} {shown(fields.get(name))} is not a number from 0 to {most:g}")


def _listed(fields: dict, name: str, fewest: int, most: int) -> list:
    value = fields.get(name)
    if type(value) is not list or not fewest <= len(value) <= most:
        size = len(value) if type(value) is list else shown(value)
        raise ValueError(f"{name} is not a list of {fewest} to {most}, but {size}")
    return value


def _numbers(fields: dict, name: str, most: float, fewest: int, longest: int) -> list:
    values = _listed(fields, name, fewest, longest)
    for index, value in enumerate(values):
        if not _is_amount(value, most):
            raise ValueError(f"{name}[{index}] {shown(value)} is not a number from 0 to {most:g}")
    return values
