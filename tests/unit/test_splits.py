"""Data that a split would read and does not find: what is taken, Megatron can build; the rest is refused by name."""

import argparse
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from hmoe_megatron.data.splits import check_splits, parts, wanted

SEQ_LENGTH = 8


def write(prefix, lengths):
    """A data set of documents of these lengths."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in lengths:
        builder.add_document(np.arange(length, dtype=np.uint16), [length])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def arguments(**given):
    flags = dict.fromkeys(
        "data_path data_args_path train_data_path valid_data_path test_data_path per_split_data_args_path split".split()
    )
    flags |= {"mock_data": False, "full_validation": False, "eval_iters": 1, "seq_length": SEQ_LENGTH}
    return argparse.Namespace(**{**flags, **given})


def refused(**given):
    with pytest.raises(ValueError) as error:
        check_splits(arguments(**given))
    return str(error.value)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {
        "many": write(folder / "many", [20] * 100),
        "few": write(folder / "few", [20] * 45),
        "empty": write(folder / "empty", [0] * 100),
        "short": write(folder / "short", [3, 2]),
    }


def test_each_split_gets_documents_or_is_refused_by_name(data):
    check_splits(arguments(data_path=[data["many"]], split="98,1,1"))
    said = refused(data_path=[data["few"]], split="99,1,0")
    assert f"--split 99,1,0 gives validation none of the 45 documents of {data['few']}" in said
    assert "--eval-iters 0 to train without evaluation" in said
    assert "gives test none of the 45" in refused(data_path=[data["few"]], split="969, 30, 1")
    said = refused(data_path=["0.5", data["many"], "0.5", data["few"]], split="99,1,0")
    assert data["few"] in said and data["many"] not in said
    for split in ("99,1,0", "100,0,0"):
        check_splits(arguments(data_path=[data["few"]], split=split, eval_iters=0))


def test_evaluation_without_validation_data(data):
    for given_ in ({"data_path": [data["many"]], "split": "100,0,0"}, {"train_data_path": [data["many"]]}):
        assert "there is no validation data" in refused(**given_)
        check_splits(arguments(**given_, eval_iters=0))
        assert "there is no validation data" in refused(**given_, eval_iters=0, full_validation=True)
    assert "there is no training data" in refused(valid_data_path=[data["many"]])
    assert "no token is in the 100 documents of validation" in refused(
        train_data_path=[data["many"]], valid_data_path=[data["empty"]]
    )


def test_a_blend_without_weights_reads_each_once(data):
    said = refused(train_data_path=[data["many"], data["short"], data["few"]], eval_iters=0)
    assert f"{data['short']}: training has 5 tokens of it, less than a sample of --seq-length 8" in said
    check_splits(arguments(train_data_path=[data["short"]], eval_iters=0))  # is read again


@pytest.mark.parametrize("split", ["-1,1,0", "90,abc5,5", "1,1,1,1", "0,0,0", "", "1;1", "nan,1,1", "1e3,1,1"])
def test_a_split_that_megatron_would_take_apart_wrongly(data, split):
    assert f"--split {split}: give the shares" in refused(data_path=[data["many"]], split=split)
    assert f"--split {split}: give the shares" in refused(mock_data=True, split=split)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["0", "many"], "weight 0 of"),
        (["nan", "many"], "weight nan of"),
        (["inf", "many", "1", "few"], "weight inf of"),
        (["-1", "many"], "weight -1 of"),
        (["1", "many", "few"], "a weight before every data set, or before none"),
        (["1", "many", "few", "2"], "a weight before every data set, or before none"),
        ([], "--data-path is empty"),
    ],
)
def test_weights(data, words, said):
    assert said in refused(data_path=[data.get(word, word) for word in words], split="98,1,1")


def test_one_source(data, tmp_path):
    assert "there is no data: give --data-path" in refused()
    assert "--data-path and --train-data-path" in refused(
        data_path=[data["many"]], train_data_path=[data["many"]], split="1,1,1"
    )
    assert "--data-path and --mock-data" in refused(data_path=[data["many"]], mock_data=True, split="1,1,1")
    assert "--split 1,1,1 divides --data-path" in refused(train_data_path=[data["many"]], split="1,1,1")
    assert "--split is missing" in refused(data_args_path="any")
    for text in ("{", '{"train": ["a"]}', "[]"):
        (tmp_path / "parts.json").write_text(text)
        assert "parts.json" in refused(per_split_data_args_path=str(tmp_path / "parts.json"))
    (tmp_path / "parts.json").write_text(json.dumps(dict.fromkeys(("train", "valid", "test"), data["many"])))
    check_splits(arguments(per_split_data_args_path=str(tmp_path / "parts.json")))


def built(args):
    """What datasets_provider builds, without ranks."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers import MegatronTokenizer
    from megatron.training.utils.common_utils import get_blend_and_blend_per_split

    from hmoe_megatron.data.batches import leave_out_unread

    blend, per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQ_LENGTH,
        blend=blend,
        blend_per_split=per_split,
        split=args.split,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        tokenizer=MegatronTokenizer.from_pretrained(metadata_path={"library": "null-text"}, vocab_size=100),
    )
    sizes = [10, 5 if args.eval_iters else 0, 2 if args.eval_iters else 0]
    leave_out_unread(config, sizes)
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()


NUMBERS = itertools.count()
DOCUMENTS = st.lists(st.integers(0, 20), max_size=30)
SPLITS = st.tuples(st.integers(1, 5), st.integers(0, 3), st.integers(0, 3)).map(lambda s: ",".join(map(str, s)))


@settings(deadline=None)
@given(
    st.lists(DOCUMENTS, min_size=1, max_size=3),
    st.sampled_from([None, 1, 0.3]),
    SPLITS,
    st.sampled_from([0, 2]),
    st.booleans(),
)
def test_what_is_taken_megatron_builds(tmp_path_factory, sets, weight, split, eval_iters, per_split):
    folder = tmp_path_factory.mktemp(f"sets{next(NUMBERS)}")
    words = []
    for number, lengths in enumerate(sets):
        words += ([str(weight)] if weight else []) + [write(folder / str(number), lengths)]
    if per_split:
        args = arguments(train_data_path=words, valid_data_path=words, eval_iters=eval_iters)
    else:
        args = arguments(data_path=words, split=split, eval_iters=eval_iters)
    try:
        check_splits(args)
    except ValueError:
        return
    read = {part.name for part in parts(args)} & wanted(args)
    for name, found in zip(("training", "validation", "test"), built(args), strict=True):
        assert (found is not None) == (name in read), name
        assert found is None or len(found) >= 1 and len(found[0]["tokens"]) == SEQ_LENGTH
