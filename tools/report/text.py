"""Text and questions from files, and the windows of tokens that a model reads. Imports no torch."""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from hmoe_megatron.files import read_text
from hmoe_megatron.telemetry.reader import open_with_remedy
from hmoe_megatron.tools.data_prep.records import BadRecord, parse_record
from hmoe_megatron.tools.data_prep.sources import JSON_SUFFIXES

MAX_LINE_BYTES = 16 << 20
MAX_TEXT_BYTES = 64 << 20
DEFAULT_TOKENS, MIN_TOKENS = 65_536, 1000  # the fewest are 100 in a tenth of them
MIN_QUESTIONS = 2
REMEDY = 'give JSON lines with "text", as tools/get_corpus.py writes them, or plain text'


def read_documents(paths: Iterable[Path]) -> Iterator[str]:
    """Texts of .jsonl, .ndjson and .json files, a line each, and any other file as one. Raises ValueError."""
    for path in paths:
        if path.suffix in JSON_SUFFIXES:
            yield from (text for _, (text,) in _lines(path, partial(parse_record, keys=["text"])))
            continue
        try:
            text = read_text(path, MAX_TEXT_BYTES)
        except ValueError as error:
            raise ValueError(f"--text {path}: {error}; {REMEDY}") from None
        if len(text) > MAX_TEXT_BYTES:
            raise ValueError(f"--text {path}: more than {MAX_TEXT_BYTES:,} bytes for one text; {REMEDY}")
        yield text


def read_questions(path: Path) -> list[str]:
    """A question of each line, with its right answer, in the words of lm-eval's arc_easy and arc_challenge.

    Lines are those of ARC ("question", "choices" of "text" and "label", "answerKey") or have a "text". Raises
    ValueError for anything else and for fewer than MIN_QUESTIONS.
    """
    texts = [_question(f"{path}:{number}", record) for number, record in _lines(path, json.loads)]
    if len(texts) < MIN_QUESTIONS:
        raise ValueError(f"{path}: {len(texts)} questions; a mean over questions needs {MIN_QUESTIONS} at least")
    return texts


def _question(where: str, record) -> str:
    try:
        if isinstance(record.get("text"), str):
            return record["text"]
        choices = record["choices"]
        answer = choices["text"][choices["label"].index(record["answerKey"])]
        if not isinstance(record["question"], str) or not isinstance(answer, str):
            raise TypeError
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise ValueError(
            f'{where}: no "text", and no "question" with "choices" and "answerKey" as ARC has them; '
            "tools/get_corpus.py benchmarks-eval writes such files"
        ) from None
    return f"Question: {record['question']}\nAnswer: {answer}"


def _lines(path: Path, parse: Callable[[bytes], object]) -> Iterator[tuple[int, object]]:
    """(number, what `parse` makes of it) for each line. Raises ValueError with file, line and remedy."""
    with open_with_remedy(path, REMEDY) as file:
        for number, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES + 1), b""), 1):
            try:
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"longer than {MAX_LINE_BYTES:,} bytes")
                yield number, parse(line)
            except (BadRecord, ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: {error!s:.200}; {REMEDY}") from None


def text_windows(
    documents: Iterable[str], tokenizer, context: int, tokens: int | None, most: int = DEFAULT_TOKENS
) -> list[list[int]]:
    """The documents' tokens as training reads them, one behind the other with its end-of-document token, in windows of
    `context`, the last may be shorter. No more documents are read than are needed.

    tokens: how many; None: all there are up to `most`. Raises ValueError for fewer than that or than MIN_TOKENS.
    """
    wanted, ids = tokens or most, []
    try:
        end = [] if tokenizer.eod is None or not 0 <= tokenizer.eod < tokenizer.vocab_size else [tokenizer.eod]
    except (AttributeError, NotImplementedError):  # a tokenizer without one
        end = []
    for text in documents:
        ids += _ids(tokenizer, text, "--text") + end
        if len(ids) >= wanted:
            break
    needed = max(tokens or 0, MIN_TOKENS)
    if len(ids) < needed:
        what = f"--tokens {tokens}" if needed == tokens else f"the figures, which need {needed:,}"
        raise ValueError(f"--text holds {len(ids):,} tokens, too few for {what}: give more text")
    ids = ids[:wanted]
    return [ids[start : start + context] for start in range(0, len(ids), context)]


def question_windows(path: Path, texts: list[str], tokenizer, context: int) -> list[list[int]]:
    """A window of each question, up to `context` tokens from its start, the short ones first: those of one length may
    share a batch. Raises ValueError for one without tokens."""
    windows = [_ids(tokenizer, text, f"{path}:{number}")[:context] for number, text in enumerate(texts, 1)]
    if empty := [number for number, window in enumerate(windows, 1) if not window]:
        raise ValueError(f"{path}:{empty[0]}: the tokenizer makes no token of it; remove the line")
    return sorted(windows, key=len)


def _ids(tokenizer, text: str, where: str) -> list[int]:
    try:
        return list(tokenizer.tokenize(text))
    except Exception as error:  # each library raises its own
        raise ValueError(f"{where}: the tokenizer fails on {text[:40]!r}: {error!s:.200}") from None
