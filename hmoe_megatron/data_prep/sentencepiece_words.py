"""SentencePiece's BPE word by word: a text's ids are those of its words, and words come again and again.

A merge makes an entry of the vocabulary, so none joins two characters that no entry has side by side. Where a text is
cut between such characters only, its words are merged alone as in the text, and in the same order.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

SPACE = "▁"  # U+2581, as SentencePiece writes a space
# What a text is rewritten with, so that str.split, ten times as fast as a regular expression, finds its words: each
# comes after a SPACE of its own. NO_SPACE: the word has none before it; MORE: it has one more.
LINE_END, NO_SPACE, MORE = "\ue000", "\ue001", "\ue002"
# Letters, or all that is neither letter nor space nor line end, with the spaces before them.
_PARTS = re.compile(rf"{SPACE}*[^\W\d_]+|{SPACE}*(?:[^\w{SPACE}\n]|[\d_])+|{SPACE}+|\n")
MAX_REMEMBERED = 1 << 17  # in each of two generations, some 200 bytes each
MAX_CHARS = 64
BPE = 2  # ModelType in SentencePiece's own format


class _Memory(dict):
    """Text -> what `make` makes of it, remembered. When it is full only what was used since it last was stays."""

    def __init__(self, make: Callable[[str], bytes]):
        super().__init__()
        self.make, self.older = make, {}

    def __missing__(self, text: str) -> bytes:
        made = self.older.get(text)
        if made is None:
            made = self.make(text)
        if len(text) <= MAX_CHARS:
            if len(self) >= MAX_REMEMBERED:
                self.older = dict(self)
                self.clear()
            self[text] = made
        return made


def word_encoder(processor, stock):
    """A way (see fast_encoding.py) that is equal to ``processor``'s own encoding of each text; a text with a word that
    can't stand alone goes by `stock`. Raises ValueError with the reason if words are not independent."""
    cuts = _cuts(processor)

    def encode_alone(word: str) -> bytes:
        raw = (word[1:] if cuts.adds_space else word).replace(SPACE, " ")
        if word and processor.normalize(raw) != word:  # alone it would become another
            raise KeyError(word)
        return np.array(processor.encode(raw) if word else [], dtype=np.int32).tobytes()

    parts = _Memory(encode_alone)

    def encode_word(rewritten: str) -> bytes:
        word = _original(rewritten)
        return b"".join(map(parts.__getitem__, _PARTS.findall(word))) if cuts.parts else encode_alone(word)

    words, several = _Memory(encode_word), re.compile(f"{SPACE}{SPACE}+")

    def rewrite(text: str) -> list[str]:
        text = processor.normalize(text)
        if LINE_END in text or NO_SPACE in text or MORE in text:
            raise KeyError(text[:MAX_CHARS])
        text = several.sub(lambda spaces: SPACE + MORE * (len(spaces[0]) - 1), text)
        if cuts.lines:
            text = text.replace("\n", f"{SPACE}{LINE_END}{SPACE}{NO_SPACE}")
        return f"{NO_SPACE}{text}".split(SPACE)

    def encode(texts: Iterable[str]) -> list[np.ndarray]:
        found = []
        for text in texts:
            try:
                found.append(np.frombuffer(b"".join(map(words.__getitem__, rewrite(text))), dtype=np.int32))
            except KeyError:
                found += stock([text])
        return found

    return encode


def _original(rewritten: str) -> str:
    if rewritten == LINE_END:
        return "\n"
    return rewritten[1:] if rewritten.startswith(NO_SPACE) else SPACE + rewritten.replace(MORE, SPACE)


class _Cuts(NamedTuple):
    """adds_space: SentencePiece puts a space before each text, so that nothing without one stands alone. lines: line
    ends are words too. parts: words are cut into _PARTS."""

    adds_space: bool
    lines: bool
    parts: bool


def _cuts(processor) -> _Cuts:
    """Raises ValueError if not even spaces begin words."""
    model = _model(processor)
    if model.trainer_spec.model_type != BPE:
        raise ValueError("it is no BPE")
    entries = {piece.piece for piece in model.pieces if piece.type in (piece.NORMAL, piece.USER_DEFINED)}
    if any(SPACE in entry.lstrip(SPACE) for entry in entries):
        raise ValueError("an entry holds a space after other characters")
    # Unknown characters side by side become one id, unless they become bytes.
    by_bytes = model.trainer_spec.byte_fallback
    if not by_bytes and SPACE not in entries:
        raise ValueError("a space is no entry")
    adds_space = processor.normalize("a").startswith(SPACE)
    lines = all(entry == "\n" for entry in entries if "\n" in entry) and (by_bytes or "\n" in entries)
    parts = by_bytes and all(_PARTS.findall(entry) == [entry] for entry in entries)
    return _Cuts(adds_space, lines and not adds_space, parts and not adds_space)


def _model(processor):
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise ValueError("protobuf is not installed") from None
    return sentencepiece_model_pb2.ModelProto.FromString(processor.serialized_model_proto())
