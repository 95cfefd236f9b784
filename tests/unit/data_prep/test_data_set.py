"""A data set that is damaged, or of another tokenizer, is found before a run reads it, and by tools/inspect_data.py."""

import argparse
import json
import sys
import typing

import numpy as np
import pytest

from hmoe_megatron.data import checks as data_checks
from hmoe_megatron.data.data_set import DTYPES, HEADER, DataSet, smallest_dtype
from hmoe_megatron.data.tokenizer_flags import TYPES
from hmoe_megatron.tools.data_prep.inspection import bin_edges, read_document
from tests.unit.data_prep.calls import ROOT, make_texts, preprocess, read_data_set, write_jsonl

sys.path.insert(0, str(ROOT / "tools"))
import inspect_data  # noqa: E402


@pytest.fixture
def data(sp_model, tmp_path) -> DataSet:
    corpus = write_jsonl(tmp_path / "a.jsonl", make_texts(60))
    assert preprocess(corpus, prefix=tmp_path / "out", model=sp_model, flags=("--append-eod",)) == 0
    return DataSet(str(tmp_path / "out_text_document"))


def run_args(data, model, **changed):
    unset = """train_data_path valid_data_path test_data_path data_args_path per_split_data_args_path vocab_file
               merge_file""".split()
    fields = {
        "data_path": [data.prefix],
        "split": "1,0,0",
        "mock_data": False,
        "sft": False,
        "multiple_validation_sets": False,
        "full_validation": False,
        "eval_iters": 0,
        "seq_length": 16,
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer_model": str(model),
    }
    return argparse.Namespace(**dict.fromkeys(unset) | fields | changed)


def test_dtypes_are_megatrons():
    from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType

    assert {code: DType.dtype_from_code(code) for code in DTYPES} == DTYPES
    for vocab_size in (100, 65499, 65500, 1 << 20):
        assert smallest_dtype(vocab_size) is DType.optimal_dtype(vocab_size)
    assert len(DType) == len(DTYPES) and len(_INDEX_HEADER) == 9 and HEADER.size == 34


def test_a_sound_data_set_passes(data, sp_model):
    args = run_args(data, sp_model)
    data_checks.check_data(args)
    for rank in range(2):
        data_checks.verify_data(args, rank, 2)
    data.check_structure()
    documents = read_data_set(data.prefix.removesuffix("_text_document"))
    assert [read_document(data, number).tolist() for number in range(60)] == documents


def test_without_a_sidecar_lengths_are_checked_and_hashes_are_asked_for(data, sp_model, tmp_path):
    (tmp_path / "out_text_document.json").unlink()
    args = run_args(data, sp_model, tokenizer_type="HuggingFaceTokenizer")
    data_checks.check_data(args)
    with pytest.raises(ValueError, match="out_text_document.json: missing.*leave --hmoe-verify-data out"):
        data_checks.verify_data(args, 0, 1)


def flip(path, at: int):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a .bin cut short": (lambda data: data.bin.write_bytes(data.bin.read_bytes()[:-2]), "out_text_document.bin: has "),
    "a .bin that grew": (lambda data: data.bin.write_bytes(data.bin.read_bytes() + b"ab"), "its index says"),
    "an .idx cut short": (lambda data: data.idx.write_bytes(data.idx.read_bytes()[:-1]), "with 60 sequences it has"),
    "no index": (lambda data: data.idx.write_bytes(b"MMIDIDX"), "is no index of Megatron's"),
    "no .bin": (lambda data: data.bin.unlink(), "No such file"),
    "another dtype": (lambda data: flip(data.idx, 17), "dtype 9"),
    "a sidecar of another": (lambda data: _edit(data, outputs={}), "says nothing of"),
    "a deep sidecar": (lambda data: data.bin.with_suffix(".json").write_text("[" * 200_000), "document.json:"),
    "an endless count": (lambda data: _edit(data, vocab_size=float("inf")), "its vocab_size can't be read"),
    "a count that is text": (lambda data: _edit(data, counts={"records": "7"}), "its counts.records, "),
    "no tokenizer": (lambda data: _edit(data, request={"inputs": []}), "its request.tokenizer.type, "),
    "another version": (lambda data: _edit(data, schema=99), "is of version 99"),
    "a sidecar that is no JSON": (lambda data: data.bin.with_suffix(".json").write_text("{"), "document.json:"),
}
ONLY_HASHED = {
    "a bit of the .bin": (lambda data: flip(data.bin, 100), "out_text_document.bin: is altered"),
    "a bit of the index": (lambda data: flip(data.idx, 40), ".idx: "),
}


def _edit(data, **changed):
    path = data.bin.with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_ends_a_run_before_it_starts(damage, data, sp_model, capsys):
    spoil, said = DAMAGE[damage]
    spoil(data)
    with pytest.raises(ValueError, match="again|fetch") as refused:
        data_checks.check_data(run_args(data, sp_model))
    assert said in str(refused.value)
    assert inspect_data.main([data.prefix]) == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("damage", ONLY_HASHED)
def test_altered_bytes_are_found_by_their_hash(damage, data, sp_model, capsys):
    spoil, said = ONLY_HASHED[damage]
    spoil(data)
    args = run_args(data, sp_model)
    data_checks.check_data(args)
    with pytest.raises(ValueError, match="is altered"):
        data_checks.verify_data(args, 0, 1)
    assert inspect_data.main([data.prefix]) == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("changed", [{"tokenizer_type": "Llama2Tokenizer"}, {"tokenizer_model": __file__}])
def test_another_tokenizer_is_refused(changed, data, sp_model):
    with pytest.raises(ValueError, match="was made with --tokenizer-type SentencePieceTokenizer.*prepare the data"):
        data_checks.check_data(run_args(data, sp_model, **changed))


def test_ranks_share_the_hashes(data, sp_model, monkeypatch):
    checked = []
    monkeypatch.setattr(DataSet, "check_hashes", lambda self: checked.append(self.prefix))
    monkeypatch.setattr(data_checks, "data_sets", lambda args: [DataSet(str(number)) for number in range(5)])
    for rank in range(3):
        data_checks.verify_data(None, rank, 3)
    assert sorted(checked) == list("01234")


def test_megatrons_blends_are_all_checked(data, sp_model, tmp_path):
    args = run_args(data, sp_model, data_path=["0.3", data.prefix, "0.7", str(tmp_path / "none")])
    with pytest.raises(ValueError, match="none.idx: No such file"):
        data_checks.check_data(args)
    assert data_checks.data_sets(run_args(data, sp_model, mock_data=True, data_path=None)) == []


def test_a_name_that_is_nearly_right(data, sp_model, tmp_path):
    for name in ("out", "out_text_documents", "Out_text_document"):
        with pytest.raises(ValueError, match=rf"did you mean {tmp_path}/out_text_document\?"):
            data_checks.check_data(run_args(data, sp_model, data_path=[str(tmp_path / name)]))


def test_a_tokenizer_that_is_not_there(data, sp_model):
    for changed, said in (
        ({"tokenizer_model": "nowhere"}, "--tokenizer-model nowhere: no such file"),
        ({"tokenizer_model": None}, "--tokenizer-model is missing"),
        ({"tokenizer_type": "Sentencepiecetokenizer"}, "did you mean SentencePieceTokenizer"),
    ):
        with pytest.raises(ValueError, match=said):
            data_checks.check_data(run_args(data, sp_model, **changed))


def test_types_of_tokenizers_are_megatrons():
    from megatron.training.config import TokenizerConfig

    assert set(TYPES) == set(typing.get_args(typing.get_type_hints(TokenizerConfig)["tokenizer_type"]))


def test_inspection_says_what_is_there(data, tmp_path, capsys):
    lengths = [len(ids) for ids in read_data_set(tmp_path / "out")]
    assert inspect_data.main([data.prefix, "--samples", "2", "--picture", str(tmp_path / "lengths.png")]) == 0
    out = capsys.readouterr().out
    assert f"documents  {len(lengths)}\n" in out and f"tokens     {sum(lengths):,} of uint16" in out
    assert f"{min(lengths)} to {max(lengths)} tokens a sequence" in out
    assert "SHA-256 of both files compared" in out and out.count("--- document ") == 2
    number = int(out.split("--- document ")[1].split(",")[0])
    assert make_texts(60)[number].split("\n")[1] in out
    assert max(len(line) for line in out.splitlines()[:20] if "/" not in line) <= 100
    assert (tmp_path / "lengths.png").read_bytes()[:4] == b"\x89PNG"
    shown = sum(int(line.split()[3]) for line in out.splitlines() if " to " in line and line.startswith("   "))
    assert shown == len(lengths)


def test_inspection_of_a_data_set_without_sidecar_shows_ids(data, tmp_path, capsys):
    (tmp_path / "out_text_document.json").unlink()
    assert inspect_data.main([f"{data.prefix}.bin", "--samples", "1"]) == 0
    out = capsys.readouterr().out
    assert "no sidecar" in out and out.split("tokens\n")[-1].split()[0].isdecimal()


@pytest.mark.parametrize("longest", [0, 1, 2, 5, 100, 10**6])
@pytest.mark.parametrize("shortest", [0, 1, 90])
def test_bins_hold_every_length(shortest, longest):
    longest = max(shortest, longest)
    edges = bin_edges(shortest, longest)
    lengths = np.arange(shortest, min(longest, 10_000) + 1)
    counts, _ = np.histogram(lengths, bins=[*edges, edges[-1] + 1])
    assert edges[0] == shortest and edges[-1] == longest + 1 and counts.sum() == len(lengths)
    assert edges == sorted(set(edges))
