"""Width schedules: from a flag's text to the FFN width of every logical expert of every layer.

Letters: L MoE layers, E logical experts, F width of one expert.

    arithmetic:9:23           E ratios equally spaced from 9 to 23, both included (the paper's main setting)
    geometric:2               ratios 1, 2, 4, ...
    hybrid:1,1,1,1,2,2,4,4    the ratios themselves
    equal                     all ratios 1
    explicit:864,1056,1248    the widths themselves; `864,1056,1248` is the same

By layer, first layer 0: `0-3=arithmetic:9:23;7=equal;*=hybrid:1,1,2,4`; `*=`, or no selector, is the default.
Schedules and their names: arXiv 2408.10681. All arithmetic is on whole numbers, never on floats.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from fractions import Fraction
from math import lcm, log
from operator import index

WIDTHS_FLAG = "--hmoe-widths"
TOTAL_FLAG = "--hmoe-total-width"
MULTIPLE_FLAG = "--hmoe-width-multiple"
EXPERTS_FLAG = "--num-experts"
LAYERS_FLAG = "--num-layers"

MAX_EXPERTS = 4096
MAX_LAYERS = 4096
MAX_TOTAL_WIDTH = 2**31 - 1
MAX_SPEC_CHARS = 1 << 20

GRAMMAR = "write arithmetic:FIRST:LAST, geometric:FACTOR, hybrid:RATIO,RATIO,..., equal, or explicit:WIDTH,WIDTH,..."
_RATIO = re.compile(r"[0-9]{1,10}(\.[0-9]{1,6})?")
_WIDTH = re.compile(r"[0-9]{1,10}")
_BARE_LIST = re.compile(r"[\s0-9,]+")
_SELECTOR = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


def expert_widths(
    schedule: str, num_experts: int, total_width: int | None = None, multiple: int | None = None
) -> tuple[int, ...]:
    """Widths F of the E logical experts of one layer, positive, in the schedule's order.

    A ratio schedule needs `total_width`: expert e gets total_width * ratio_e / sum(ratio), made whole by the
    largest remainder, so the sum is exactly `total_width`; equal remainders go to the lower expert. With
    `multiple` the same is done in units of it, at least one unit an expert. Explicit widths are never
    altered: `total_width` and `multiple`, when given, must fit them. ValueError has flag, value and remedy.
    """
    _check_count(EXPERTS_FLAG, num_experts, MAX_EXPERTS)
    if total_width is not None:
        _check_count(TOTAL_FLAG, total_width, MAX_TOTAL_WIDTH)
    if multiple is not None:
        _check_count(MULTIPLE_FLAG, multiple, MAX_TOTAL_WIDTH)
    _check_text(schedule)
    name, _, rest = schedule.strip().partition(":")
    if _BARE_LIST.fullmatch(schedule):
        name, rest = "explicit", schedule
    if name == "explicit":
        return _explicit(schedule, rest, num_experts, total_width, multiple)
    return _apportion(schedule, _ratios(schedule, name, rest, num_experts), total_width, multiple)


def layer_widths(
    spec: str, num_layers: int, num_experts: int, total_width: int | None = None, multiple: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """Widths [L][E] from one schedule, or from `;`-separated schedules with layer selectors (grammar above).

    Every layer is named by one selector at most; the others take the default. `num_layers` counts the layers
    that have experts. Raises ValueError that lists the layers named twice or by nothing, and for a default
    that no layer takes.
    """
    _check_count(LAYERS_FLAG, num_layers, MAX_LAYERS)
    _check_text(spec)
    default, by_layer, doubled = None, {}, set()
    for entry in spec.split(";"):
        selector, equals, schedule = entry.rpartition("=")
        if not equals or selector.strip() == "*":
            if default is not None:
                raise _wrong(
                    spec,
                    f"two defaults, {_short(default)} and {_short(schedule)}; name the layers of one, as in 0-3=equal",
                )
            default = schedule
            continue
        for layer in _selected_layers(entry, selector, num_layers):
            if layer in by_layer:
                doubled.add(layer)
            by_layer[layer] = schedule
    missing = [layer for layer in range(num_layers) if layer not in by_layer] if default is None else []
    if doubled or missing:
        listed = [
            f"{what} {ranges_text(layers)}"
            for what, layers in (("named twice:", sorted(doubled)), ("named by nothing:", missing))
            if layers
        ]
        raise _wrong(
            spec,
            f"layers {', '.join(listed)} (of 0-{num_layers - 1}); name every layer once, or add a default *=SCHEDULE",
        )
    if default is not None and len(by_layer) == num_layers:
        raise _wrong(spec, f"no layer is left for the default {_short(default)}; remove it")
    schedules = [by_layer.get(layer, default) for layer in range(num_layers)]
    widths = {s: expert_widths(s, num_experts, total_width, multiple) for s in dict.fromkeys(schedules)}
    return tuple(widths[s] for s in schedules)


def widths_fingerprint(widths_LE: Sequence[Sequence[int]]) -> str:
    """First 16 hex digits of the sha256 of the widths as JSON without spaces: names what a plan is for."""
    text = json.dumps([[index(F) for F in layer] for layer in widths_LE], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _ratios(schedule: str, name: str, rest: str, num_experts: int) -> list[int]:
    """The E positive ratios of a ratio schedule, on a common denominator."""
    if name == "equal" and ":" not in schedule:
        return [1] * num_experts
    if name == "arithmetic":
        ends = _parse(schedule, rest.split(":"), _RATIO)
        if len(ends) != 2:
            raise _wrong(
                schedule,
                f"{len(ends)} numbers where the first and the last ratio are wanted; write it as arithmetic:9:23",
            )
        first, last = ends
        return _common([first + (last - first) * e / max(num_experts - 1, 1) for e in range(num_experts)])
    if name == "geometric":
        (factor,) = _parse(schedule, [rest], _RATIO)
        # Beyond this spread the narrowest expert has no width under any total; it bounds the digits too.
        if abs(log(factor)) * (num_experts - 1) > log(MAX_TOTAL_WIDTH):
            raise _wrong(
                schedule,
                f"with {EXPERTS_FLAG} {num_experts} the widest expert would be over "
                f"{MAX_TOTAL_WIDTH} times the narrowest; take a factor nearer to 1",
            )
        up, down = factor.as_integer_ratio()
        return [up**e * down ** (num_experts - 1 - e) for e in range(num_experts)]
    if name == "hybrid":
        ratios = _parse(schedule, rest.split(","), _RATIO)
        if len(ratios) != num_experts:
            raise _wrong(
                schedule,
                f"{len(ratios)} ratios, but {EXPERTS_FLAG} {num_experts}; give one ratio "
                f"an expert, or change {EXPERTS_FLAG}",
            )
        return _common(ratios)
    raise _wrong(schedule, f"unknown schedule; {GRAMMAR}")


def _common(ratios: list[Fraction]) -> list[int]:
    denominator = lcm(*(r.denominator for r in ratios))
    return [int(r * denominator) for r in ratios]


def _explicit(
    schedule: str, rest: str, num_experts: int, total_width: int | None, multiple: int | None
) -> tuple[int, ...]:
    widths = tuple(int(F) for F in _parse(schedule, rest.split(","), _WIDTH))
    if len(widths) != num_experts:
        raise _wrong(
            schedule,
            f"{len(widths)} widths, but {EXPERTS_FLAG} {num_experts}; give one width an "
            f"expert, or change {EXPERTS_FLAG}",
        )
    if sum(widths) > MAX_TOTAL_WIDTH:
        raise _wrong(
            schedule, f"the widths add up to {sum(widths)}, over the limit of {MAX_TOTAL_WIDTH}; give smaller widths"
        )
    if total_width is not None and sum(widths) != total_width:
        raise _wrong(
            schedule,
            f"the widths add up to {sum(widths)}, but {TOTAL_FLAG} {total_width}; leave "
            f"{TOTAL_FLAG} out, or set it to {sum(widths)}",
        )
    odd = [F for F in widths if multiple is not None and F % multiple]
    if odd:
        raise _wrong(
            schedule,
            f"{_short(odd, '')} are no multiples of {MULTIPLE_FLAG} {multiple}; explicit "
            f"widths are not rounded: change them, or leave {MULTIPLE_FLAG} out",
        )
    return widths


def _apportion(schedule: str, ratios: list[int], total_width: int | None, multiple: int | None) -> tuple[int, ...]:
    """Whole widths nearest to `ratios` (largest remainder) that add up to total_width."""
    if total_width is None:
        raise _wrong(schedule, f"gives ratios only; set {TOTAL_FLAG} to the sum of the widths of one layer")
    unit = multiple or 1
    units, rest = divmod(total_width, unit)
    if rest:
        near = f"{units * unit} or {(units + 1) * unit}" if units else f"{unit}"
        raise ValueError(
            f"{TOTAL_FLAG} {total_width} is no multiple of {MULTIPLE_FLAG} {unit}; set {TOTAL_FLAG} to {near}"
        )
    if units < len(ratios):
        raise ValueError(
            f"{TOTAL_FLAG} {total_width} is too small for {EXPERTS_FLAG} {len(ratios)} at a "
            f"width of at least {unit} each; set {TOTAL_FLAG} to {unit * len(ratios)} or more"
        )
    held = set()  # with `multiple`, experts due less than one unit get one; the others share what is left
    while True:
        share, total_ratio = units - len(held), sum(r for e, r in enumerate(ratios) if e not in held)
        due = [(1, 0) if e in held else divmod(r * share, total_ratio) for e, r in enumerate(ratios)]
        short = {e for e, (whole, _) in enumerate(due) if whole < 1}
        if multiple is None or not short:
            break
        held |= short
    widths = [whole for whole, _ in due]
    for e in sorted(range(len(due)), key=lambda e: (-due[e][1], e))[: units - sum(widths)]:
        widths[e] += 1
    if min(widths) < 1:
        narrow = ranges_text([e for e, F in enumerate(widths) if F < 1])
        raise _wrong(
            schedule,
            f"with {TOTAL_FLAG} {total_width} experts {narrow} would have width 0; raise "
            f"{TOTAL_FLAG}, or take ratios nearer to each other",
        )
    return tuple(F * unit for F in widths)


def _parse(schedule: str, texts: list[str], pattern: re.Pattern) -> list[Fraction]:
    kind = (
        "whole number of at most 10 digits"
        if pattern is _WIDTH
        else "number of at most 10 digits before and 6 after the point, with no exponent"
    )
    for text in texts:
        if not pattern.fullmatch(text.strip()) or not float(text):
            raise _wrong(schedule, f"{_short(text)} is not a positive {kind}; {GRAMMAR}")
    return [Fraction(text.strip()) for text in texts]


def _selected_layers(entry: str, selector: str, num_layers: int) -> range:
    match = _SELECTOR.fullmatch(selector.strip())
    if not match:
        raise _wrong(
            entry, f"{_short(selector)} selects no layers; write one layer as 5=, a range as 0-3=, or the default as *="
        )
    first, last = int(match[1]), int(match[2] or match[1])
    if first > last or last >= num_layers:
        raise _wrong(
            entry,
            f"{_short(selector)} is no rising range within the layers 0-{num_layers - 1} of "
            f"{LAYERS_FLAG} {num_layers}; layers count from 0, both ends included",
        )
    return range(first, last + 1)


def _check_count(flag: str, value: int, limit: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
        raise ValueError(f"{flag} {_short(value)}: must be a whole number from 1 to {limit}")


def _check_text(spec: str) -> None:
    if not isinstance(spec, str) or len(spec) > MAX_SPEC_CHARS:
        raise ValueError(f"{WIDTHS_FLAG}: must be text of at most {MAX_SPEC_CHARS} characters; {GRAMMAR}")


def _wrong(spec: str, problem: str) -> ValueError:
    return ValueError(f"{WIDTHS_FLAG} {_short(spec)}: {problem}")


def ranges_text(numbers: list[int]) -> str:
    """Sorted numbers as text: [0, 1, 2, 5] is `0-2, 5`."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return _short(", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs), "")


def _short(value, quote: str = "'", limit: int = 120) -> str:
    """A user's value for a message, bounded in length and with control characters escaped."""
    text = value if isinstance(value, str) else repr(value)
    text = text if len(text) <= limit else text[:limit] + "..."
    return quote + text.encode("unicode_escape").decode() + quote
