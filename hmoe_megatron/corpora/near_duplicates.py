"""Documents that hold a piece of an evaluation set.

A document is a near-duplicate of an evaluation item if any 13 words in a row of it stand, in the same order, in a
text of the item (its passage, its question with a choice, its sentence with an option), or if its question is the
item's question. Words are runs of letters and digits, case folded: punctuation, quotes and white space don't count.
The second rule is for questions of fewer than 13 words; a document of prose has none.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

GRAM_WORDS = 13
RULE = (f"a document goes if {GRAM_WORDS} words in a row of it (letters and digits, case folded) stand in a text of an "
        "evaluation item, or if its question is the item's question")  # fmt: skip
MAX_CACHED_WORDS = 2_000_000
WORD = re.compile(r"[^\W_]+")
FACTORS = np.array([pow(0x9E3779B97F4A7C15, power, 2**64) for power in range(GRAM_WORDS)], dtype=np.uint64)


@dataclass(frozen=True)
class Item:
    """One item of an evaluation set: `texts` that may not be trained on, `question` that identifies it."""

    set_name: str
    texts: tuple[str, ...]
    question: str


def words_of(text: str) -> list[str]:
    return WORD.findall(text.casefold())


@dataclass
class WordHashes:
    """64-bit hashes that are the same in every process, unlike hash()."""

    cache: dict[str, int] = field(default_factory=dict)

    def __call__(self, words: list[str]) -> np.ndarray:
        if len(self.cache) > MAX_CACHED_WORDS:
            self.cache.clear()
        for word in set(words).difference(self.cache):
            self.cache[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        return np.fromiter((self.cache[word] for word in words), dtype=np.uint64, count=len(words))

    def grams(self, text: str) -> np.ndarray:
        """Hash of every GRAM_WORDS words in a row: sum of word hashes times powers of an odd number, modulo 2^64."""
        hashes = self(words_of(text))
        count = len(hashes) - GRAM_WORDS + 1
        if count < 1:
            return np.empty(0, dtype=np.uint64)
        return sum(hashes[at : at + count] * FACTORS[at] for at in range(GRAM_WORDS))


class NearDuplicates:
    """About 16 bytes for each different run of 13 words of the evaluation sets."""

    def __init__(self, items: Iterable[Item]):
        self.hashes = WordHashes()
        self.sets: list[str] = []
        self.questions: dict[str, str] = {}
        grams, owners = [], []
        for item in items:
            if item.set_name not in self.sets:
                self.sets.append(item.set_name)
            self.questions.setdefault(" ".join(words_of(item.question)), item.set_name)
            found = np.unique(np.concatenate([self.hashes.grams(text) for text in item.texts]))
            grams.append(found)
            owners.append(np.full(len(found), self.sets.index(item.set_name), dtype=np.uint8))
        every, first = np.unique(np.concatenate(grams), return_index=True)
        self.grams, self.owners = every, np.concatenate(owners)[first]
        self.questions.pop("", None)

    def set_of(self, text: str, question: str = "") -> str | None:
        """Name of an evaluation set that the document has a piece of, None if of none."""
        if question and (owner := self.questions.get(" ".join(words_of(question)))):
            return owner
        grams = self.hashes.grams(text)
        at = np.minimum(np.searchsorted(self.grams, grams), len(self.grams) - 1)
        hits = np.flatnonzero(self.grams[at] == grams) if len(self.grams) else []
        return self.sets[self.owners[at[hits[0]]]] if len(hits) else None
