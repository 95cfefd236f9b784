"""Faster ways to the ids that Megatron's tokenizer makes, each proven on a sample of the input before it is used.

A way is a function: list of texts -> list of id arrays. Megatron's own calls the library once a text and, for Hugging
Face tokenizers, builds what nobody reads. A byte-level BPE of Hugging Face also goes through tiktoken, several times
faster: it merges the pair with the lowest rank, as the merges in their order say. What it can't see (added tokens in
the text, a normaliser) goes Megatron's way, text by text. So does SentencePiece's BPE (sentencepiece_bpe.py).
"""

import contextlib
import json
import re
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

from hmoe_megatron.data.sentencepiece_bpe import tiktoken_encoder
from hmoe_megatron.data.tiktoken_ranks import rank_encoder

Way = Callable[[list[str]], list[np.ndarray]]
# What tokenizers' ByteLevel splits by (GPT-2's pattern).
BYTE_LEVEL_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Patterns that mean the same to both regular-expression engines: GPT-2's, Llama 3's, Qwen's. Others may not: what
# [[:alpha:]], ^ or (?m: are differs, in texts that no sample need hold.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KNOWN_PATTERNS = {
    BYTE_LEVEL_PATTERN,
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    rf"{_WORDS}\p{{N}}{{1,3}}{_REST}",
    rf"{_WORDS}\p{{N}}{_REST}",
}


class NotEqual(ValueError):
    """Why a way can't be used."""


def megatron_way(tokenizer) -> Way:
    """Megatron's own, text by text."""
    return lambda texts: [np.asarray(tokenizer.tokenize(text), dtype=np.int64) for text in texts]


def find_way(tokenizer, sample: Sequence[str], stock: Way) -> tuple[str, Way]:
    """(its name and why no faster one, the fastest way that is equal to `stock`, Megatron's own, on `sample`)."""
    sample, expected = _encodable(sample, stock)
    if not sample:
        return "Megatron's tokenizer, text by text; no text of the input to prove a faster way on", stock
    reasons = []
    for name, build in WAYS.items():
        try:
            way = build(tokenizer, stock)
            if way is None:
                continue
            for text, ids, found in zip(sample, expected, way(sample), strict=True):
                if not np.array_equal(ids, found):
                    raise NotEqual(f"other ids for {text[:40]!r}")
        except NotEqual as error:
            reasons.append(f"not {name}: {error}")
            continue
        return "; ".join([f"{name}, equal on {len(sample)} documents of the input", *reasons]), way
    return "; ".join(["Megatron's tokenizer, text by text", *reasons]), stock


def _encodable(texts: Sequence[str], stock: Way) -> tuple[list[str], list[np.ndarray]]:
    """The texts that Megatron's tokenizer takes, and their ids; the others will be bad records."""
    taken, ids = [], []
    for text in texts:
        with contextlib.suppress(Exception):
            ids += stock([text])
            taken.append(text)
    return taken, ids


def _library(tokenizer):
    return getattr(getattr(tokenizer, "_tokenizer", None), "tokenizer", None)


def sentencepiece_way(tokenizer, stock: Way) -> Way | None:
    """SentencePiece on a whole list."""
    processor = _sentencepiece(tokenizer)
    if processor is None:
        return None
    return lambda texts: [np.array(ids, dtype=np.int32) for ids in processor.encode(texts, out_type=int, num_threads=1)]


def sentencepiece_bpe_way(tokenizer, stock: Way) -> Way | None:
    """tiktoken with the vocabulary of SentencePiece's BPE. Raises NotEqual for what it can't hold."""
    processor = _sentencepiece(tokenizer)
    if processor is None:
        return None
    try:
        return tiktoken_encoder(processor, stock)
    except ImportError:
        raise NotEqual("tiktoken is not installed") from None
    except ValueError as error:
        raise NotEqual(f"{error}") from None


def _sentencepiece(tokenizer):
    """SentencePiece's processor; None for another library. Raises NotEqual for what Megatron does around it."""
    processor, wrapper = _library(tokenizer), getattr(tokenizer, "_tokenizer", None)
    if not hasattr(processor, "EncodeAsIds"):
        return None
    if wrapper.legacy and wrapper.special_token_to_id:
        raise NotEqual("Megatron looks for special tokens in the text")
    if wrapper.removed_extra_spaces and not wrapper.ignore_extra_whitespaces:
        raise NotEqual("Megatron marks spaces that SentencePiece removes")
    return processor


def tiktoken_way(tokenizer, stock: Way) -> Way | None:
    """Megatron's TikTokenizer, whose library writes ids to an array."""
    encoding = _library(tokenizer)
    if not hasattr(encoding, "encode_to_numpy"):
        return None
    specials = set(encoding.special_tokens_set)
    return lambda texts: [encoding.encode_to_numpy(text, allowed_special=specials) for text in texts]


def hugging_face_way(tokenizer, stock: Way) -> Way | None:
    """The tokenizers library on a whole list, without offsets, masks and words."""
    backend = getattr(_library(tokenizer), "backend_tokenizer", None)
    if backend is None:
        return None
    with_specials = tokenizer._tokenizer.include_special_tokens

    def encode(texts):
        encodings = backend.encode_batch_fast(texts, add_special_tokens=with_specials)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    return encode


def byte_level_way(tokenizer, stock: Way) -> Way | None:
    """tiktoken with the vocabulary of Hugging Face's byte-level BPE. Raises NotEqual for what it can't hold."""
    backend = getattr(_library(tokenizer), "backend_tokenizer", None)
    if backend is None:
        return None
    parts = json.loads(backend.to_str())
    pattern = _pattern(parts)
    ranks, ids = _ranks(parts["model"], {token["content"] for token in parts["added_tokens"]})
    try:
        to_ranks = rank_encoder(pattern, ranks)
    except ImportError:
        raise NotEqual("tiktoken is not installed") from None
    sizes = np.zeros(max(ranks.values()) + 1, dtype=np.int64)
    sizes[list(ranks.values())] = [len(token) for token in ranks]
    _check_reachable(parts["model"])
    before, after = _surroundings(tokenizer, backend)
    needs_megatron = _needs_megatron(parts)

    def encode(texts):
        found = []
        for text in texts:
            if needs_megatron(text):
                found += stock([text])
                continue
            made = to_ranks(text)
            if sizes[made].sum() != len(text.encode()):  # tiktoken drops what its pattern does not match
                found += stock([text])
                continue
            made = made if ids is None else ids[made]
            found.append(np.concatenate([before, made, after]) if len(before) or len(after) else made)
        return found

    return encode


def _pattern(parts: dict) -> str:
    """The pattern that cuts a text before merging."""
    if parts["model"]["type"] != "BPE":
        raise NotEqual(f"the model is {parts['model']['type']}, no BPE")
    cutters = parts["pre_tokenizer"] or {}
    cutters = cutters["pretokenizers"] if cutters.get("type") == "Sequence" else [cutters]
    if not cutters or cutters[-1].get("type") != "ByteLevel":
        raise NotEqual("it is no byte-level BPE")
    if cutters[-1]["add_prefix_space"]:
        raise NotEqual("it adds a space before the text")
    if len(cutters) == 1 and cutters[0].get("use_regex", True):
        return BYTE_LEVEL_PATTERN
    splits = cutters[:-1]
    if len(splits) == 1 and splits[0]["type"] == "Split" and not cutters[-1]["use_regex"]:
        split = splits[0]
        if split["behavior"] == "Isolated" and not split["invert"] and "Regex" in split["pattern"]:
            if split["pattern"]["Regex"] in KNOWN_PATTERNS:
                return split["pattern"]["Regex"]
            raise NotEqual("it cuts by a pattern of its own")
    raise NotEqual(f"it cuts by {' and '.join(cutter['type'] for cutter in cutters)}")


def _byte_of_char() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones for themselves, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + number): byte for number, byte in enumerate(others)}


def _ranks(model: dict, added: set[str]) -> tuple[dict[bytes, int], np.ndarray | None]:
    """(tiktoken's ranks: bytes first, then the merges in their order; the vocabulary's id of each rank, None if equal).

    Raises NotEqual for a vocabulary that is not 256 bytes and one entry a merge.
    """
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise NotEqual("it has dropout, a prefix of continuing pieces or a suffix of words")
    byte_of, vocab = _byte_of_char(), model["vocab"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    tokens = [*byte_of, *("".join(merge) for merge in merges)]
    if len(set(tokens)) != len(tokens) or vocab.keys() - added != set(tokens):
        raise NotEqual("its vocabulary is not 256 bytes and one entry a merge")
    try:
        tokens_as_bytes = [bytes(byte_of[char] for char in token) for token in tokens]
    except KeyError as error:
        raise NotEqual(f"a merge has {error}, which is no byte") from None
    ids = np.array([vocab[token] for token in tokens], dtype=np.int64)
    if (np.diff(ids[256:]) > 0).all():  # then ids are ranks; those of single bytes are never compared
        return dict(zip(tokens_as_bytes, ids.tolist(), strict=True)), None
    return {token: rank for rank, token in enumerate(tokens_as_bytes)}, ids


def _check_reachable(model: dict) -> None:
    """tiktoken merges to any entry that bytes spell, and takes one that is a whole piece: merging must come to each."""
    from tokenizers import models

    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    merging = models.BPE(model["vocab"], merges)
    for token in map("".join, merges):
        if [piece.value for piece in merging.tokenize(token)] != [token]:
            raise NotEqual(f"its merges do not make its entry {token!r}")


def _surroundings(tokenizer, backend) -> tuple[np.ndarray, np.ndarray]:
    """Ids that are put before and after each text."""
    bare, whole = backend.encode("a", add_special_tokens=False).ids, list(tokenizer.tokenize("a"))
    starts = [at for at in range(len(whole)) if whole[at : at + len(bare)] == bare]
    if not starts:
        raise NotEqual("Megatron changes the text")
    return np.array(whole[: starts[0]], dtype=np.int64), np.array(whole[starts[0] + len(bare) :], dtype=np.int64)


def _needs_megatron(parts: dict) -> Callable[[str], bool]:
    """Whether a text holds what tiktoken does not know."""
    added = {token["content"] for token in parts["added_tokens"]}
    form = parts["normalizer"] and parts["normalizer"]["type"]
    if form not in (None, "NFC", "NFD", "NFKC", "NFKD"):
        raise NotEqual(f"it normalises by {form}")
    if form:  # an added token may be normalised before it is looked for
        added |= {unicodedata.normalize(form, content) for content in added}
    finds = re.compile("|".join(map(re.escape, sorted(added)))).search if added else lambda text: None
    return lambda text: finds(text) is not None or (form is not None and not unicodedata.is_normalized(form, text))


WAYS: dict[str, Callable[[object, Way], Way | None]] = {
    "tiktoken with the same vocabulary": byte_level_way,
    "the tokenizers library by lists": hugging_face_way,
    "SentencePiece's merges through tiktoken": sentencepiece_bpe_way,
    "SentencePiece by lists": sentencepiece_way,
    "tiktoken to arrays": tiktoken_way,
}
