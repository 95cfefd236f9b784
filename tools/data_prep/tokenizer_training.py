"""Tokenizers trained on a sample of text, and measured on text that they have not seen."""

import heapq
import io
import os
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from hmoe_megatron.tools.data_prep.records import Bad, count_lines, parse_block
from hmoe_megatron.tools.data_prep.sources import Source, Span, line_number, read_blocks

UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
END_OF_TEXT = "<|endoftext|>"
NEWLINE_PIECE = "<0x0A>"
SPACE_MARK = "\u2581"  # SentencePiece's own; comes back as a space
MAX_SENTENCE_CHARS = 16_384  # SentencePiece's trainer drops longer ones without a word, so they are cut here
MAX_RECORD_BYTES = 256 << 20


class Measure(NamedTuple):
    """Of a tokenizer on text. fallback_share: of the tokens, those that are bytes of a character instead of text."""

    bytes_per_token: float
    fallback_share: float


def texts_of(sources: Iterable[Source], json_key: str) -> Iterator[str]:
    """All documents. Raises ValueError with file and line for one that is not usable."""
    for source in sources:
        line = line_number(source, 0)
        for block in read_blocks(Span(source, 0, None), [json_key], MAX_RECORD_BYTES):
            for record in parse_block(block, source.kind, [json_key], MAX_RECORD_BYTES):
                if isinstance(record, Bad):
                    raise ValueError(
                        f"{source.path}:{line + record.line}: {record.reason}: {record.detail}; correct or remove it"
                    )
                yield record.texts[0]
            line += count_lines(block, source.kind)


def sample(texts: Iterator[str], max_bytes: int, seed: int) -> tuple[list[str], int]:
    """(a uniform sample in input order, of at most max_bytes of UTF-8; how many texts there were).

    Each text gets a random key and the smallest keys stay: one pass, memory bounded by max_bytes. A text that is longer
    than that alone is left out.
    """
    rng, kept, kept_bytes, seen, limit = random.Random(seed), [], 0, 0, 1.0
    for seen, text in enumerate(texts, start=1):
        size, key = len(text.encode()), rng.random()
        if size > max_bytes or key >= limit:  # a key over one that had to go
            continue
        heapq.heappush(kept, (-key, seen, size, text))
        kept_bytes += size
        while kept_bytes > max_bytes:
            highest, _, gone_bytes, _ = heapq.heappop(kept)
            kept_bytes, limit = kept_bytes - gone_bytes, -highest
    return [text for _, _, _, text in sorted(kept, key=lambda entry: entry[1])], seen


class SentencePiece:
    """A SentencePiece BPE with bytes for unknown characters: any text comes back, but for SPACE_MARK.

    Ids: 0 <unk>, 1 <s>, 2 </s> (end of document), 3 <pad>, then the special tokens, the 256 bytes, the learned pieces.
    """

    min_vocab_size = 4 + 256 + 1

    def __init__(self, model: bytes):
        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    @classmethod
    def train(cls, texts: Sequence[str], vocab_size: int, special_tokens: Sequence[str]) -> "SentencePiece":
        """The same for the same texts: the model records no path, and always one thread. Raises RuntimeError."""
        sentences = (
            line[start : start + MAX_SENTENCE_CHARS]
            for text in texts
            for line in text.split("\n")
            for start in range(0, len(line), MAX_SENTENCE_CHARS)
        )
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            user_defined_symbols=list(special_tokens),
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            max_sentence_length=4 * MAX_SENTENCE_CHARS,
            num_threads=1,
            minloglevel=2,
        )
        return cls(model.getvalue())

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def gives_back(self, ids: list[int], text: str) -> bool:
        return self.processor.decode(ids) == text.replace(SPACE_MARK, " ")

    def is_fallback(self, id: int) -> bool:
        """A byte of a character; the newline is always the byte piece <0x0A>."""
        return self.processor.is_byte(id) and self.processor.id_to_piece(id) != NEWLINE_PIECE

    def files(self) -> dict[str, bytes]:
        """Name behind the output prefix -> content; the one that is loaded last."""
        ids = range(self.processor.get_piece_size())
        listing = "".join(f"{self.processor.id_to_piece(id)}\t{self.processor.get_score(id):g}\n" for id in ids)
        return {".vocab": listing.encode(), ".model": self.model}

    flags = "--tokenizer-type SentencePieceTokenizer --tokenizer-model {prefix}.model"


class ByteLevelBPE:
    """Hugging Face's byte-level BPE, cut by GPT-2's pattern: any text comes back.

    Ids: 0 <|endoftext|> (end of document), then the special tokens, the 256 bytes, the merges in their order.
    """

    min_vocab_size = 1 + 256 + 1

    def __init__(self, tokenizer):
        self.tokenizer, self._is_fallback = tokenizer, {}

    @classmethod
    def train(cls, texts: Sequence[str], vocab_size: int, special_tokens: Sequence[str]) -> "ByteLevelBPE":
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread: the same for the same texts
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT, *special_tokens],
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        tokenizer.train_from_iterator(texts, trainer, length=len(texts))
        if tokenizer.get_vocab_size() != vocab_size:
            raise RuntimeError(f"the text gives {tokenizer.get_vocab_size()} entries only")
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def gives_back(self, ids: list[int], text: str) -> bool:
        return self.tokenizer.decode(ids, skip_special_tokens=False) == text

    def is_fallback(self, id: int) -> bool:
        """Part of a character: it is no text by itself."""
        if id not in self._is_fallback:
            self._is_fallback[id] = "\ufffd" in self.tokenizer.decode([id], skip_special_tokens=False)
        return self._is_fallback[id]

    def files(self) -> dict[str, bytes]:
        """Name behind the output prefix -> content; the one that is loaded last."""
        from transformers import PreTrainedTokenizerFast

        whole = PreTrainedTokenizerFast(
            tokenizer_object=self.tokenizer,
            eos_token=END_OF_TEXT,
            bos_token=END_OF_TEXT,
            clean_up_tokenization_spaces=False,
        )
        with tempfile.TemporaryDirectory() as folder:
            whole.save_pretrained(folder)
            names = sorted((path.name for path in Path(folder).iterdir()), key=lambda name: name == "tokenizer.json")
            return {f"/{name}": (Path(folder) / name).read_bytes() for name in names}

    flags = "--tokenizer-type HuggingFaceTokenizer --tokenizer-model {prefix}"


KINDS = {"sentencepiece": SentencePiece, "byte-level-bpe": ByteLevelBPE}


def measure(tokenizer: SentencePiece | ByteLevelBPE, texts: Sequence[str]) -> Measure:
    """Raises ValueError if the tokenizer does not give a text back."""
    tokens = text_bytes = fallback = 0
    for text in texts:
        ids = tokenizer.encode(text)
        if not tokenizer.gives_back(ids, text):
            raise ValueError(f"the tokenizer does not give this text back: {text[:60]!r}; report it")
        tokens += len(ids)
        text_bytes += len(text.encode())
        fallback += sum(map(tokenizer.is_fallback, ids))
    return Measure(text_bytes / tokens, fallback / tokens)
