"""What training, validation and test read, and whether there is something to read.

Megatron finds out late: a part without tokens is added up for ever until it holds enough, another ends in a bare
assertion, and validation that was asked for and is not there fails at the first evaluation, before the first save.
"""

import argparse
import contextlib
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from hmoe_megatron.data.data_set import DataSet
from hmoe_megatron.flag_files import flag_named
from hmoe_megatron.untrusted import shown

NAMES = ("training", "validation", "test")
_NUMBER = r"\s*(\d+\.?\d*|\.\d+)\s*"
_SPLIT = re.compile(rf"{_NUMBER}(,{_NUMBER}){{0,2}}")
_OF_ALL = ("data_path", "data_args_path", "per_split_data_args_path")
_OF_ONE = ("train_data_path", "valid_data_path", "test_data_path")
_WITHOUT = "or --eval-iters 0 to train without evaluation"


class Part(NamedTuple):
    """Documents of one data set that one of NAMES reads. weight: of a blend that names them; is_one_of_many: of a blend
    without weights, which reads each of its data sets once; begin, end: in [0, 1]."""

    name: str
    prefix: str
    weight: float | None
    is_one_of_many: bool
    begin: float
    end: float


def given_prefixes(args: argparse.Namespace) -> list[str]:
    """Those of all blends, each once."""
    blend, per_split = given_blends(args)
    return list(dict.fromkeys(p for prefixes, _ in filter(None, [blend, *(per_split or [])]) for p in prefixes))


def given_blends(args: argparse.Namespace):
    """(blend of all, blend of each of NAMES), as Megatron's datasets take them; a blend is (prefixes, weights or None).

    Raises ValueError for what Megatron would take apart wrongly, or stop at without a word.
    """
    from megatron.training.utils.common_utils import get_blend_and_blend_per_split

    for name in ("data_path", *_OF_ONE):
        _check_words(flag_named(name), getattr(args, name))
    path = args.data_args_path or args.per_split_data_args_path
    try:
        blend, per_split = get_blend_and_blend_per_split(args)
    except (OSError, ValueError, LookupError, TypeError, AssertionError) as error:
        raise ValueError(
            f"{path}: {type(error).__name__}: {shown(str(error))}: give the prefixes of data sets, or a weight "
            "before each; --per-split-data-args-path takes JSON with such a list for train, valid and test"
        ) from None
    for prefixes, weights in filter(None, [blend, *(per_split or [])]):
        for prefix, weight in zip(prefixes, weights or (), strict=False):
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"weight {weight:g} of {prefix}: give a number above 0, or leave that data set out")
    return blend, per_split


def _check_sources(args) -> None:
    """Of several Megatron would read the first and say nothing."""
    sources = [name for name in _OF_ALL if getattr(args, name) is not None]
    sources += [next((name for name in _OF_ONE if getattr(args, name) is not None), None)]
    sources += ["mock_data" if args.mock_data else None]
    given = [flag_named(name) for name in filter(None, sources)]
    if not given:
        raise ValueError(
            "there is no data: give --data-path PREFIX, of what tools/preprocess_data.py made, or --mock-data to try "
            "without"
        )
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: data comes from one of them: remove the others")
    whole = given[0] in ("--data-path", "--data-args-path")
    if whole and args.split is None:
        raise ValueError("--split is missing: give the shares of training, validation and test, as --split 98,1,1")
    if args.split is not None and not whole and not args.mock_data:
        raise ValueError(f"--split {args.split} divides --data-path, and {given[0]} is divided already: remove it")


def _check_words(flag: str, words: list[str] | None) -> None:
    """A prefix, several, or a weight before each."""
    if words is None:
        return
    if not words:
        raise ValueError(f"{flag} is empty: give the prefix of a data set (its .bin and .idx without the suffix)")
    numbers = [_is_number(word) for word in words]
    if any(numbers) and numbers != [True, False] * (len(words) // 2):
        raise ValueError(f"{flag} {' '.join(words)}: give a weight before every data set, or before none")


def _is_number(word: str) -> bool:
    with contextlib.suppress(ValueError):
        return float(word) is not None
    return False


def split_shares(split: str) -> list[tuple[float, float] | None]:
    """Where each of NAMES begins and ends in every data set, from 0 to 1; None for one without a share."""
    from megatron.core.datasets import blended_megatron_dataset_config as stock

    if not _SPLIT.fullmatch(split) or not any(map(float, split.split(","))):
        raise ValueError(f"--split {split}: give the shares of training, validation and test, as 98,1,1")
    return stock.convert_split_vector_to_split_matrix(stock.parse_and_normalize_split(split))


def parts(args: argparse.Namespace) -> list[Part]:
    """Of the data flags."""
    blend, per_split = given_blends(args)
    if per_split:
        shares = [(0.0, 1.0) if blend else None for blend in per_split]
    elif blend:
        shares, per_split = split_shares(args.split), [blend] * len(NAMES)
    else:
        return []
    return [
        Part(name, prefix, weights and weights[number], not weights and len(prefixes) > 1, *share)
        for name, share, part in zip(NAMES, shares, per_split, strict=True)
        if share and part
        for prefixes, weights in [part]
        for number, prefix in enumerate(prefixes)
    ]


def wanted(args: argparse.Namespace) -> set[str]:
    """Which of NAMES the run reads, if they are there."""
    evaluated = {"validation", "test"} if args.eval_iters or args.full_validation else set()
    return {"training"} | evaluated


def check_splits(args: argparse.Namespace) -> None:
    """Raises ValueError with everything that the run would want and not find."""
    _check_sources(args)
    if args.mock_data:
        if args.split is not None:
            split_shares(args.split)
        return
    found = parts(args)
    names = {part.name for part in found}
    problems = [
        f"there is no {name} data ({_given(args)}): give it some{more}"
        for name, more in (("training", ""), ("validation", f", {_WITHOUT}"))
        if name in wanted(args) - names
    ]
    for part in found:
        if part.name in wanted(args) and "://" not in part.prefix:
            problems += _problems(part, args)
    if problems:
        raise ValueError("\n".join(problems))


def _given(args) -> str:
    return f"--split {args.split}" if args.data_path or args.data_args_path else "each has its own --*-data-path"


def _problems(part: Part, args) -> Iterator[str]:
    lengths, _, _ = DataSet(part.prefix).arrays()
    begin, end = (round(share * float(len(lengths))) for share in (part.begin, part.end))  # as Megatron rounds
    is_read_whole = args.full_validation and part.name == "validation"
    remedy = "" if part.name == "training" else f", {_WITHOUT}"
    if is_read_whole and part.weight is not None:
        yield "--full-validation reads each validation set once: give its data sets without weights"
    elif begin == end:
        yield (
            f"{_given(args)} gives {part.name} none of the {len(lengths)} documents of {part.prefix}: give it a larger "
            f"share, or none{remedy}"
        )
    elif not lengths[begin:end].any():
        yield f"{part.prefix}: no token is in the {end - begin} documents of {part.name}: leave it out{remedy}"
    elif (is_read_whole or part.is_one_of_many) and int(lengths[begin:end].sum(dtype="int64")) <= args.seq_length:
        yield (
            f"{part.prefix}: {part.name} has {lengths[begin:end].sum(dtype='int64')} tokens of it, less than a sample "
            f"of --seq-length {args.seq_length}: leave it out, or give weights, with which documents are read again"
        )
