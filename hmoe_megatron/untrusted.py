"""JSON from outside and back: parsed within limits, every field there, of its type and in its range; checksums."""

import difflib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import fields
from numbers import Integral, Real

MAX_LISTED = 20
_OPTIONAL = float | None


def parsed(where: str, text: str, max_chars: int):
    """Value of a JSON text. ValueError for anything else, repeated fields, NaN, and texts over `max_chars`."""

    def no_repeats(pairs):
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a field is there twice")
        return found

    def no_constants(name):
        raise ValueError(f"{name} is no number here")

    if len(text) > max_chars:
        raise ValueError(f"{where}: over {max_chars} characters, too large to be one")
    try:
        return json.loads(text, object_pairs_hook=no_repeats, parse_constant=no_constants)
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply to be one") from None
    except ValueError as error:
        raise ValueError(f"{where}: not read as JSON: {str(error)[:200]}") from None


def checked_fields(where: str, names, value) -> dict:
    """`value` if it is an object with exactly these fields; else ValueError that lists what differs."""
    if type(value) is not dict:
        raise ValueError(f"{where}: not a JSON object")
    unknown = [name for name in value if name not in names]
    problems = [f"unknown field {shown(name)}" for name in unknown[:MAX_LISTED]]
    problems += [f"field {name!r} is missing" for name in names if name not in value]
    if problems:
        raise ValueError(f"{where}: " + "; ".join(problems))
    return value


def names_of(cls) -> list[str]:
    return [f.name for f in fields(cls)]


def plain(record) -> dict:
    """Fields of a dataclass as JSON has them: numbers as Python's int or float, as the field says."""
    return {f.name: _plain(f.type, getattr(record, f.name)) for f in fields(record)}


def _plain(kind, value):
    if value is None or kind not in (int, float, _OPTIONAL):
        return value
    return int(value) if kind is int else float(value)


def range_problems(record, ranges: dict[str, tuple[float, float]]) -> list[str]:
    """A sentence for each of these fields that is no number of its type and range; None where the type has it."""
    problems = []
    for f in fields(record):
        value = getattr(record, f.name)
        if f.name not in ranges or (value is None and f.type == _OPTIONAL):
            continue
        (least, most), number = ranges[f.name], Integral if f.type is int else Real
        if not isinstance(value, number) or isinstance(value, bool) or not least <= value <= most:
            problems.append(
                f"{f.name} {shown(value)} is not a {'whole ' if f.type is int else ''}number from {least:g} to {most:g}"
            )
    return problems


def is_text(value, max_chars: int) -> bool:
    return type(value) is str and 1 <= len(value) <= max_chars and value.isprintable()


def shown(value) -> str:
    """A value in an error's text: short, and without the digits that Python refuses to print."""
    if type(value) is int and abs(value) >= 10**300:
        return "of over 300 digits"
    return f"{value!r:.80}" if type(value) in (str, int, float, bool, type(None)) else type(value).__name__


def near(word: str, known: Iterable[str], folder: str = "") -> str:
    """ "; did you mean X?" for the known word that is closest, whatever its case; "" where none is."""
    words = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), words, 1, 0.75)
    return f"; did you mean {folder}{words[found[0]]}?" if found else ""


def canonical(value) -> str:
    """JSON that is the same text for the same value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def checksum(content: dict) -> str:
    """SHA-256 of the canonical text, in hexadecimal."""
    return hashlib.sha256(canonical(content).encode()).hexdigest()
