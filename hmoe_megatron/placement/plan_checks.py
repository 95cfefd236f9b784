"""Reading a plan file that may be damaged, hostile, or made for another run.

Every check returns its problems as sentences, so one error can name all of them.
"""

from collections.abc import Sequence
from itertools import islice

from hmoe_megatron.placement.ranks import MAX_RANKS
from hmoe_megatron.untrusted import checksum, parsed, shown
from hmoe_megatron.widths import MAX_EXPERTS, MAX_LAYERS, MAX_TOTAL_WIDTH, ranges_text, widths_fingerprint

SCHEMA = 3
MAX_FILE_BYTES = 64 << 20
MAX_NESTS = 1 << 21  # JSON lists and objects: each takes up to 30 times its text in memory
MAX_PROBLEMS = 20
MAX_PROBLEM_CHARS = 500
MAX_TOKENS = 1e18
MAX_AMOUNT = 1e300  # of a prediction
RANK_FIELDS = ("time", "tokens", "flops", "params", "bytes")
_WHOLE_FIELDS = ("params", "bytes")
_TOP_FIELDS = ("schema", "widths_fingerprint", "cost", "ranks", "stages", "numbers", "layers", "sha256")
_LAYER_FIELDS = ("widths", "tokens", "pieces", "predicted")


def parse_json(text: str):
    if text.count("[") + text.count("{") > MAX_NESTS:
        raise ValueError(f"placement plan: over {MAX_NESTS} lists and objects, too large to be one")
    return parsed("placement plan", text, MAX_FILE_BYTES)


def form_problems(body) -> list[str]:
    """What keeps parsed JSON from having the fields, types and lengths of a plan; `cost` checks itself."""
    if type(body) is dict and "schema" in body and not _is_int(body["schema"], SCHEMA, SCHEMA):
        return [f"schema {shown(body['schema'])}: this version reads {SCHEMA}; make the plan again"]
    if problems := _field_problems("the file", body, _TOP_FIELDS):
        return problems
    layers, ranks = body["layers"], body["ranks"]
    problems = []
    if not (type(ranks) is list and 1 <= len(ranks) <= MAX_RANKS and all(map(_is_rank, ranks))):
        problems.append(f"ranks is not a list of 1 to {MAX_RANKS} [node, speed, bytes or null]")
    if type(layers) is not list or not 1 <= len(layers) <= MAX_LAYERS:
        problems.append(f"layers is not a list of 1 to {MAX_LAYERS}")
    if problems:
        return problems
    problems = [f"{name} is not text" for name in ("widths_fingerprint", "sha256") if type(body[name]) is not str]
    if not _is_list_of(body["stages"], len(layers), lambda stage: _is_int(stage, 0, MAX_LAYERS)):
        problems.append(f"stages is not a list of {len(layers)} whole numbers, 0 to {MAX_LAYERS}")
    numbers = body["numbers"]
    rising = _is_list_of(numbers, len(layers), lambda n: _is_int(n, 0, MAX_LAYERS - 1)) and (
        sorted(set(numbers)) == numbers
    )
    if not rising:
        problems.append(f"numbers is not a list of {len(layers)} rising whole numbers, 0 to {MAX_LAYERS - 1}")
    for number, layer in zip(numbers if rising else range(len(layers)), layers, strict=True):
        where = f"layer {number}"
        found = _field_problems(where, layer, _LAYER_FIELDS) or _field_problems(
            f"{where} predicted", layer["predicted"], (*RANK_FIELDS, "bound")
        )
        problems += found or _layer_form_problems(where, layer, len(ranks))
    return problems


def _layer_form_problems(where: str, layer: dict, ranks: int) -> list[str]:
    widths, predicted = layer["widths"], layer["predicted"]
    experts = len(widths) if type(widths) is list else 0

    checks = {
        f"widths is not a list of 1 to {MAX_EXPERTS} positive whole numbers": 1 <= experts <= MAX_EXPERTS
        and _is_list_of(widths, experts, lambda F: _is_int(F, 1, MAX_TOTAL_WIDTH)),
        f"tokens is not a list of {experts} numbers, 0 to {MAX_TOKENS:g}": _is_list_of(
            layer["tokens"], experts, lambda m: _is_amount(m, MAX_TOKENS)
        ),
        f"pieces is not a list for each of {ranks} ranks of [expert, lo, hi]": _is_list_of(
            layer["pieces"], ranks, lambda rank: type(rank) is list and all(map(_is_piece, rank))
        ),
        "predicted bound is not a number, 0 or more": _is_amount(predicted["bound"]),
    }
    for name in RANK_FIELDS:
        kind, is_item = ("whole numbers", _is_whole_amount) if name in _WHOLE_FIELDS else ("numbers", _is_amount)
        checks[f"predicted {name} is not a list of {ranks} {kind}, 0 or more"] = _is_list_of(
            predicted[name], ranks, is_item
        )
    return [f"{where}: {problem}" for problem, holds in checks.items() if not holds]


def _field_problems(where: str, value, names: Sequence[str]) -> list[str]:
    if type(value) is not dict:
        return [f"{where} is not a JSON object"]
    unknown = islice((name for name in value if name not in names), MAX_PROBLEMS)
    return [f"{where}: unknown field {name!r:.80}" for name in unknown] + [
        f"{where}: field {name!r} is missing" for name in names if name not in value
    ]


def content_problems(body: dict) -> list[str]:
    """Damage that the form does not show."""
    problems = []
    content = {name: body[name] for name in body if name != "sha256"}
    if body["sha256"] != checksum(content):
        problems.append("altered after it was written (sha256 does not match); make the plan again")
    if body["widths_fingerprint"] != widths_fingerprint([layer["widths"] for layer in body["layers"]]):
        problems.append(f"widths_fingerprint {shown(body['widths_fingerprint'])} is not that of its widths")
    return problems


def mismatches(body: dict, widths_LE: Sequence[Sequence[int]] | None, ep_size: int | None) -> list[str]:
    """How a plan differs from the run it shall serve."""
    problems = []
    if ep_size is not None and len(body["ranks"]) != ep_size:
        problems.append(
            f"made for {len(body['ranks'])} ranks, but --expert-model-parallel-size {ep_size}; make "
            "the plan again, or use --hmoe-placement auto"
        )
    if widths_LE is None:
        return problems
    numbers = body["numbers"]
    if len(body["layers"]) != len(widths_LE):
        problems.append(f"made for {len(body['layers'])} MoE layers, the model has {len(widths_LE)}")
    differ = [
        n
        for n, (layer, widths) in enumerate(zip(body["layers"], widths_LE, strict=False))
        if layer["widths"] != list(widths)
    ]
    if differ:
        planned, wanted = body["layers"][differ[0]]["widths"], list(widths_LE[differ[0]])
        problems.append(
            f"made for other widths (--hmoe-widths) in layers "
            f"{ranges_text([numbers[n] for n in differ])}: "
            f"{planned!s:.120} in layer {numbers[differ[0]]}, the model has {wanted!s:.120}"
        )
    return problems


def _is_int(value, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most  # `type`, for True is an int to isinstance


def _is_amount(value, most: float = MAX_AMOUNT) -> bool:
    return type(value) in (int, float) and 0 <= value <= most


def _is_whole_amount(value) -> bool:
    return type(value) is int and 0 <= value <= MAX_AMOUNT


def _is_list_of(value, length: int, is_item) -> bool:
    return type(value) is list and len(value) == length and all(map(is_item, value))


def _is_piece(value) -> bool:
    return _is_list_of(value, 3, lambda n: _is_int(n, 0, MAX_TOTAL_WIDTH))


def _is_rank(value) -> bool:
    """Types only: `Rank` checks the amounts."""
    return (
        type(value) is list
        and len(value) == 3
        and type(value[0]) is int
        and _is_amount(value[1])
        and type(value[2]) in (int, type(None))
    )


def listed(what: str, problems: list[str]) -> str:
    more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
    return f"{what}: " + "; ".join([problem[:MAX_PROBLEM_CHARS] for problem in problems[:MAX_PROBLEMS]] + more)
