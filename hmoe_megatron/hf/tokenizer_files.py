"""The tokenizer of an export: the run's own, as files that transformers reads, with the ids that Megatron gives."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from hmoe_megatron.data.sentencepiece_bpe import BPE, SPACE, parsed_model
from hmoe_megatron.data.tokenizer_flags import tokenizer_parser
from hmoe_megatron.flag_files import last_value

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
SENTENCEPIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
# On which both must agree; `--text` of the proof is a longer one.
SAMPLE = (
    "Once more unto the breach, dear friends, once more;\nOr close the wall up with our English dead.\n\n",
    "  def f(x):\n\treturn {'a': x ** 2}  # 1,234.5e-6\r\n",
    "Zwölf Boxkämpfer; ça va?; Ελληνικά; русский; 日本語; 😀☃",
    "a",
    " ",
    "\n",
    "  two  spaces  ",
    "e\u0301 ﬁ \u3000 \u2028 \x01",
)


# The tokenizers library normalises several characters that are seen as one by the first of them.
NORMALIZES = (
    "the tokenizer normalises text, which transformers does otherwise where characters combine: a text with "
    "combining marks may get other ids than in training"
)


class Tokens(NamedTuple):
    """ids: bos_token_id, eos_token_id, pad_token_id for config.json; size: entries; None for a run without a
    tokenizer's files. doubt: where ids may differ from Megatron's, though not on SAMPLE."""

    ids: dict[str, int | None]
    size: int | None
    doubt: str | None = None

    def generation_config(self, rows: int) -> dict:
        """Rows that only pad the vocabulary stand for no text and are not drawn."""
        padding = list(range(self.size, rows)) if self.size is not None else []
        given = {name: value for name, value in self.ids.items() if value is not None}
        return given | ({"suppress_tokens": padding} if padding else {})


def write(flags: Sequence[str], folder: Path) -> Tokens:
    """The tokenizer that the run's flags name, into `folder`. Raises ValueError if transformers' ids would differ."""
    kind, model = last_value(flags, "--tokenizer-type"), last_value(flags, "--tokenizer-model")
    if kind in SENTENCEPIECE or kind == "HuggingFaceTokenizer":
        if not model or not Path(model).exists():
            raise ValueError(
                f"--tokenizer-model {model}: no file or directory here; give the place where it is as --tokenizer-model"
            )
        stock = megatron_tokenizer(flags)
        if kind == "HuggingFaceTokenizer":
            for name in COPIED:
                if (Path(model) / name).is_file():
                    shutil.copyfile(Path(model) / name, folder / name)
            return _checked(stock, folder, SAMPLE)
        described = parsed_model(Path(model).read_bytes())
        _from_sentencepiece(described, Path(model), folder)
        tokens = _checked(stock, folder, _with(_user_symbols(described)))
        return tokens._replace(doubt=NORMALIZES if described.normalizer_spec.precompiled_charsmap else None)
    if kind == "NullTokenizer":
        return Tokens({}, None)
    raise ValueError(
        f"--tokenizer-type {kind}: only HuggingFaceTokenizer and SentencePieceTokenizer become files that "
        "transformers reads; it can't be exported"
    )


def megatron_tokenizer(flags: Sequence[str]):
    """Megatron's tokenizer of the run. Raises ValueError for files that are none."""
    args, _ = tokenizer_parser().parse_known_args(list(flags))
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    try:
        return build_tokenizer(args)
    except Exception as error:  # each library behind it raises its own
        raise ValueError(
            f"--tokenizer-model {args.tokenizer_model}: can't be read as {args.tokenizer_type} "
            f"({type(error).__name__}: {str(error)[:200]}); give the model's own"
        ) from error


def has_the_ids_of(folder: Path, flags: Sequence[str]) -> bool:
    """Whether transformers' tokenizer of a directory has the size and, on SAMPLE and its added tokens, the ids of
    Megatron's by these flags."""
    from transformers import AutoTokenizer

    stock, theirs = megatron_tokenizer(flags), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return len(theirs) == stock.vocab_size and _difference(stock, theirs, _with(theirs.get_added_vocab())) is None


def _with(tokens: Iterable[str]) -> tuple[str, ...]:
    """SAMPLE, and texts with these tokens in them."""
    return (*SAMPLE, *(f"a{token} b{token}{token}c" for token in tokens))


def _difference(stock, theirs, sample: Sequence[str]) -> tuple[str, list[int], list[int]] | None:
    """(text, Megatron's ids, transformers' ids) of the first text on which they differ."""
    pairs = ((text, list(stock.tokenize(text)), theirs(text)["input_ids"]) for text in sample)
    return next((pair for pair in pairs if pair[1] != pair[2]), None)


def _checked(stock, folder: Path, sample: Sequence[str]) -> Tokens:
    from transformers import AutoTokenizer

    written = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if difference := _difference(stock, written, sample):
        text, ours, theirs = difference
        raise ValueError(
            f"the tokenizer's ids for {text[:40]!r} are {ours[:12]} in Megatron and {theirs[:12]} in "
            "transformers: it can't be exported"
        )
    if written.eos_token_id != stock.eod:
        written.eos_token = written.convert_ids_to_tokens(stock.eod)
        written.save_pretrained(folder)
    ids = {"bos_token_id": written.bos_token_id, "eos_token_id": stock.eod, "pad_token_id": written.pad_token_id}
    return Tokens(ids, int(stock.vocab_size))


def _from_sentencepiece(model, path: Path, folder: Path) -> None:
    """The same BPE as the tokenizers library has it, and the model file itself, for the way back."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    if model.trainer_spec.model_type != BPE:
        raise ValueError(f"--tokenizer-model {path}: a SentencePiece model that is no BPE can't be exported")
    pieces = [piece.piece for piece in model.pieces]
    ids = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(
        models.BPE(
            ids,
            _merges(model),
            unk_token=pieces[model.trainer_spec.unk_id],
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
        )
    )
    spec = model.normalizer_spec
    steps = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:  # normalizers.Strip would take other white space too
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    undo = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(undo + ([decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []))
    control = [piece.piece for piece in model.pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    backend.add_tokens([AddedToken(symbol, normalized=False) for symbol in _user_symbols(model)])
    spec = model.trainer_spec
    named = {"unk_token": spec.unk_id, "bos_token": spec.bos_id, "eos_token": spec.eos_id, "pad_token": spec.pad_id}
    special = {name: pieces[number] for name, number in named.items() if 0 <= number < len(pieces)}
    # SentencePiece takes "<s>" in a text for text.
    PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, split_special_tokens=True, **special
    ).save_pretrained(folder)
    shutil.copyfile(path, folder / "tokenizer.model")


def _user_symbols(model) -> list[str]:
    """Texts that are one id wherever they stand."""
    return [piece.piece for piece in model.pieces if piece.type == piece.USER_DEFINED]


def _merges(model) -> list[tuple[str, str]]:
    """SentencePiece merges to the entry of the highest score; here the pairs that make each, in that order."""
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == piece.NORMAL}
    ranked = sorted((entry for entry in scores if len(entry) > 1), key=lambda entry: -scores[entry])
    return [
        (entry[:at], entry[at:])
        for entry in ranked
        for at in range(1, len(entry))
        if entry[:at] in scores and entry[at:] in scores
    ]
