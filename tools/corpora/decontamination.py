"""Find documents that contain a piece of an evaluation set.

A document is contaminated if any 13 words in a row of it are, in the same order, in a text of an evaluation item (its
passage, its question with a choice, its sentence with an option), or if its question is the item's question. Words are
runs of letters and digits, case folded: punctuation, quotes and white space don't count. The second rule is for
questions of fewer than 13 words; a document of prose has none.
"""

import functools
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

GRAM_WORDS = 13
RULE = (
    f"a document goes if {GRAM_WORDS} words in a row of it (letters and digits, case folded) stand in a text of an "
    "evaluation item, or if its question is the item's question"
)
WORD = re.compile(r"[^\W_]+")
FACTORS = np.array([pow(0x9E3779B97F4A7C15, power, 2**64) for power in range(GRAM_WORDS)], dtype=np.uint64)


@dataclass(frozen=True)
class Item:
    """One item of an evaluation set: `texts` that may not be trained on, `question` that identifies it."""

    set_name: str
    texts: list[str]
    question: str


def words_of(text: str) -> list[str]:
    return WORD.findall(text.casefold())


@functools.lru_cache(maxsize=1_000_000)
def word_hash(word: str) -> int:
    """64 bits that are the same in every process, unlike hash()."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def gram_hashes(text: str) -> np.ndarray:
    """Hash of every GRAM_WORDS words in a row: sum of word hashes times powers of an odd number, modulo 2^64."""
    hashes = np.fromiter(map(word_hash, words_of(text)), dtype=np.uint64)
    count = max(len(hashes) - GRAM_WORDS + 1, 0)
    return sum(hashes[at : at + count] * factor for at, factor in enumerate(FACTORS))


class EvaluationSets:
    """The items to search for. About 16 bytes for each different run of 13 words."""

    def __init__(self, items: Iterable[Item]):
        self.questions: dict[str, str] = {}  # words of the question: name of the set
        self.sets: list[str] = []
        grams, owners = [], []
        for item in items:
            if item.set_name not in self.sets:
                self.sets.append(item.set_name)
            self.questions.setdefault(" ".join(words_of(item.question)), item.set_name)
            grams.append(np.unique(np.concatenate([gram_hashes(text) for text in item.texts])))
            owners.append(np.full(len(grams[-1]), self.sets.index(item.set_name), dtype=np.uint8))
        self.grams, first = np.unique(np.concatenate(grams), return_index=True)
        self.owners = np.concatenate(owners)[first]
        self.questions.pop("", None)

    def find(self, text: str, question: str = "") -> str | None:
        """Name of an evaluation set that the document has a piece of, None if there is none."""
        if question and (owner := self.questions.get(" ".join(words_of(question)))):
            return owner
        grams = gram_hashes(text)
        at = np.searchsorted(self.grams[:-1], grams)  # at most the last
        hits = np.flatnonzero(self.grams[at] == grams) if self.grams.size else []
        return self.sets[self.owners[at[hits[0]]]] if len(hits) else None
