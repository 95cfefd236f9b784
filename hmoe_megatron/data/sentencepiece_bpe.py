"""SentencePiece's BPE through tiktoken, which merges bytes where SentencePiece merges characters.

Both merge the neighbours whose text is the best entry, the leftmost of equals. Before any such merge the bytes of a
character are put together, by ranks better than every entry's; a character that is no entry then falls into its bytes'
ids. A text is cut into words first, between characters that no entry has side by side.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from hmoe_megatron.data.tiktoken_ranks import rank_encoder

SPACE = "▁"  # U+2581, as SentencePiece writes a space
BPE = 2  # ModelType in SentencePiece's own format
# ASCII alone decides: what else a letter is differs between libraries. Others go with the letters.
_LETTER = r"A-Za-z\x{80}-\x{10FFFF}"
COARSE = r" *[^ ]+| +"
LINES = r" *[^ \n]+|\n| +"
FINE = rf" *[{_LETTER}]+| *[^{_LETTER} \n]+|\n| +"


def tiktoken_encoder(processor, stock: Callable) -> Callable[[Iterable[str]], list[np.ndarray]]:
    """A way (see fast_encoding.py) that is equal to ``processor``'s own encoding of each text; a text that holds what
    tiktoken can't know goes by `stock`. Raises ValueError with the reason if the model is not of that kind."""
    model = parsed_model(processor.serialized_model_proto())
    entries = _entries(model)
    ranks, id_R4, size_R = _vocabulary(entries)
    to_ranks, symbols, is_plain = rank_encoder(_pattern(entries), ranks), entries.symbols, _is_plain(model)
    first_R, is_one = np.ascontiguousarray(id_R4[:, 0]), (size_R == 1)

    def encode(texts: Iterable[str]) -> list[np.ndarray]:
        found = []
        for text in texts:
            spaced = (text if is_plain else processor.normalize(text)).replace(SPACE, " ")
            if any(symbol in spaced for symbol in symbols):
                found += stock([text])
                continue
            rank_N = to_ranks(spaced)
            id_N = first_R[rank_N] if is_one[rank_N].all() else _bytes_too(rank_N, id_R4, size_R)
            found += stock([text]) if len(id_N) and id_N.min() < 0 else [id_N]
        return found

    return encode


class _Entries(NamedTuple):
    """scores, ids: of the pieces that merging makes, a space written as one; bytes: byte -> id, with byte fallback;
    symbols: texts that SentencePiece takes out of a text before it merges."""

    scores: dict[str, float]
    ids: dict[str, int]
    bytes: dict[int, int]
    symbols: list[str]


def _entries(model) -> _Entries:
    if model.trainer_spec.model_type != BPE:
        raise ValueError("it is no BPE")
    scores, ids, byte_ids, symbols = {}, {}, {}, []
    for number, piece in enumerate(model.pieces):
        text = piece.piece.replace(SPACE, " ")
        if text in ids or (piece.type == piece.NORMAL and " " in piece.piece):
            raise ValueError("entries differ only in how a space is written")
        if piece.type == piece.NORMAL:
            scores[text], ids[text] = piece.score, number
        elif piece.type == piece.BYTE:
            byte_ids[int(piece.piece[1:-1], 16)] = number
        elif piece.type == piece.USER_DEFINED:
            symbols.append(text)
            ids[text] = number
        elif piece.type == piece.UNUSED:
            raise ValueError("it has unused entries")
    # One that is a character of its own needs no search.
    alone = {
        symbol for symbol in symbols if len(symbol) == 1 and not any(symbol in text for text in ids if text != symbol)
    }
    symbols = [symbol for symbol in symbols if symbol not in alone]
    for symbol in symbols:
        del ids[symbol]
    if any(" " in text.lstrip(" ") for text in scores):
        raise ValueError("an entry holds a space after other characters")
    several = [score for text, score in scores.items() if len(text) > 1]
    if len(set(several)) != len(several):
        raise ValueError("entries have equal scores")
    return _Entries(scores, ids, byte_ids, symbols)


class _Vocabulary(NamedTuple):
    """ranks: tiktoken's; id_R4 int32: the ids of each rank R, -1 where there is none; size_R: how many of the four."""

    ranks: dict[bytes, int]
    id_R4: np.ndarray
    size_R: np.ndarray


def _vocabulary(entries: _Entries) -> _Vocabulary:
    chars = dict.fromkeys("".join(entries.ids))
    starts = {char.encode()[:size]: None for char in chars for size in range(2, len(char.encode()) + 1)}
    merged = sorted((text for text in entries.scores if len(text) > 1), key=lambda text: -entries.scores[text])
    order = {text: at for at, text in enumerate(merged)}
    # What merging never makes from its own characters it makes in no text; tiktoken would take it for a whole word.
    made = [text.encode() for text in merged if _merges_to_itself(text, order)]
    tokens = [*(bytes([byte]) for byte in range(256)), *starts, *made]
    id_of = {text.encode(): number for text, number in entries.ids.items()}
    id_R4, size_R = np.full((len(tokens), 4), -1, dtype=np.int32), np.ones(len(tokens), dtype=np.int64)
    for rank, token in enumerate(tokens):
        number = id_of.get(token)
        if number is not None:
            id_R4[rank, 0] = number
        else:  # part of a character, or one that is no entry
            written = SPACE.encode() if token == b" " else token
            size_R[rank] = len(written)
            id_R4[rank, : len(written)] = [entries.bytes.get(byte, -1) for byte in written]
    return _Vocabulary({token: rank for rank, token in enumerate(tokens)}, id_R4, size_R)


def _merges_to_itself(text: str, order: Mapping[str, int]) -> bool:
    parts = list(text)
    while len(parts) > 1:
        best, at = min((order.get(left + right, len(order)), at) for at, (left, right) in enumerate(pairwise(parts)))
        if best == len(order):
            return False
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return True


def _bytes_too(rank_N: np.ndarray, id_R4: np.ndarray, size_R: np.ndarray) -> np.ndarray:
    """The ids, where a rank may have up to four."""
    size_N = size_R[rank_N]
    of_M = np.repeat(rank_N, size_N)
    nth_M = np.arange(len(of_M)) - np.repeat(size_N.cumsum() - size_N, size_N)
    return id_R4[of_M, nth_M]


def _pattern(entries: _Entries) -> str:
    """The finest that cuts through no entry."""
    texts = [text.lstrip(" ") for text in entries.scores if len(text) > 1]
    if any("\n" in text for text in texts):
        return COARSE
    is_mixed = any(len({char.isalpha() or char > "\x7f" for char in text}) > 1 for text in texts)
    return LINES if is_mixed else FINE


def _is_plain(model) -> bool:
    """Whether normalising only writes spaces as SPACE."""
    spec = model.normalizer_spec
    return not (spec.precompiled_charsmap or spec.add_dummy_prefix or spec.remove_extra_whitespaces)


def parsed_model(data: bytes):
    """A SentencePiece model's own description. Raises ValueError without protobuf."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise ValueError("protobuf is not installed") from None
    return sentencepiece_model_pb2.ModelProto.FromString(data)
