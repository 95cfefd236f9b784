"""What an attacker can put into a checkpoint's files is not run and not followed."""

import argparse
import os
import pickle
import random
import resource

import pytest
import torch
from megatron.core.rerun_state_machine import Call, Caller
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from hmoe_megatron.checkpoint.reader import CachingCheckpointReader, CheckpointReader, checkpoint_reader, read_metadata
from hmoe_megatron.exits import CheckpointRefused

WEIGHT = torch.arange(12.0).view(3, 4)
OBJECT = argparse.Namespace(num_layers=2, rng=torch.arange(5, dtype=torch.uint8))


class Attack:
    """Unpickled, it makes a file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "iter_0000001"
    dcp.save({"weight": WEIGHT, "object": OBJECT}, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


def load(folder, reader=CheckpointReader):
    torch.serialization.add_safe_globals([argparse.Namespace])  # as Megatron does
    state = {"weight": torch.zeros(3, 4), "object": argparse.Namespace()}
    dcp.load(state, storage_reader=reader(folder), no_dist=True)
    return state


def refusal(folder):
    """What loading says of it."""
    try:
        load(folder)
    except CheckpointRefused as error:
        return str(error)
    except dcp.api.CheckpointException as error:
        (failure, _), *_ = error.failures.values()
        return str(failure)
    return None


@pytest.mark.parametrize("reader", [CheckpointReader, CachingCheckpointReader])
def test_a_sound_checkpoint_is_read_whole(folder, reader):
    state = load(folder, reader)
    assert torch.equal(state["weight"], WEIGHT)
    assert state["object"].num_layers == 2 and torch.equal(state["object"].rng, OBJECT.rng)


def test_the_reader_follows_megatrons_choice_of_caching(folder):
    assert type(checkpoint_reader(folder)) is CheckpointReader
    caching = checkpoint_reader(folder, cache_metadata=True)
    assert type(caching) is CachingCheckpointReader and caching.read_metadata() is caching.read_metadata()


def rewrite(folder, alter):
    """Alter the unpickled `.metadata`."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    alter(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def stored(folder, **changed):
    """Let every entry of the metadata lie elsewhere."""

    def alter(metadata):
        for index, info in metadata.storage_data.items():
            fields = {"relative_path": info.relative_path, "offset": info.offset, "length": info.length}
            metadata.storage_data[index] = _StorageInfo(**fields | changed)

    rewrite(folder, alter)


def test_a_pickle_in_the_metadata_does_not_run(folder, tmp_path):
    canary = tmp_path / "canary"
    for content in (Attack(canary), Metadata({"x": Attack(canary)}), [Attack(canary)]):
        (folder / ".metadata").write_bytes(pickle.dumps(content))
        assert "no checkpoint has" in refusal(folder) and not canary.exists()
    (folder / ".metadata").write_bytes(pickle.dumps(Attack(canary)))
    dcp.FileSystemReader(folder).read_metadata()  # torch's own
    assert canary.exists(), "the attack must work where nothing guards against it"


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "builtins.getattr",
        "torch.load",
        "torch.hub.load",
        "torch.serialization.load",
        "subprocess.Popen",
        "functools.partial",
        "torch.distributed.checkpoint.metadata.os",
    ],
)
def test_no_other_name_is_looked_up(folder, name):
    module, _, attribute = name.rpartition(".")
    (folder / ".metadata").write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(CheckpointRefused, match=f"holds {name}, which no checkpoint has"):
        read_metadata(folder)


def replace_stored(folder, name, content):
    """Let the entry `name` of the checkpoint be `content`, as torch.save writes it, in a file of its own."""
    torch.save(content, folder / "evil.distcp")

    def alter(metadata):
        for index in metadata.storage_data:
            if index.fqn == name:
                size = (folder / "evil.distcp").stat().st_size
                metadata.storage_data[index] = _StorageInfo("evil.distcp", 0, size)

    rewrite(folder, alter)


def test_a_pickle_in_an_object_does_not_run(folder, tmp_path):
    canary = tmp_path / "canary"
    replace_stored(folder, "object", {"args": Attack(canary)})
    assert "object object: it holds _io.open, which no checkpoint has" in refusal(folder) and not canary.exists()


def test_a_pickle_in_a_tensor_does_not_run(folder, tmp_path):
    canary = tmp_path / "canary"
    replace_stored(folder, "weight", Attack(canary))
    assert refusal(folder) and not canary.exists()


def test_another_object_in_its_place_is_read(folder):
    replace_stored(folder, "object", argparse.Namespace(num_layers=5, rng=OBJECT.rng))
    assert load(folder)["object"].num_layers == 5


def test_what_megatron_notes_of_a_loss_is_read(folder):
    """--check-for-spiky-loss keeps the largest value by who called; a failed check keeps the call."""
    caller = Caller("loss", 1)
    noted = argparse.Namespace(max_values={caller: 3.5}, failed_validation_call=Call(caller, 2))
    replace_stored(folder, "object", noted)
    assert load(folder)["object"] == noted


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "sub/file", "", ".", "..", b"x", "missing"])
def test_no_path_leaves_the_directory(folder, path):
    (folder.parent / "outside").write_bytes(bytes(10_000))
    stored(folder, relative_path=path)
    with pytest.raises(CheckpointRefused, match="no plain file name|No such file"):
        read_metadata(folder)


@pytest.mark.parametrize(
    "changed", [{"offset": 10**9}, {"length": 10**9}, {"offset": -1}, {"length": -5}, {"offset": 1.5}, {"length": "5"}]
)
def test_no_entry_lies_beyond_its_file(folder, changed):
    stored(folder, **changed)
    with pytest.raises(CheckpointRefused, match="beyond the end"):
        read_metadata(folder)


def test_a_transformed_entry_is_refused(folder):
    def alter(metadata):
        for index, info in metadata.storage_data.items():
            metadata.storage_data[index] = _StorageInfo(info.relative_path, info.offset, info.length, ["zstd"])

    rewrite(folder, alter)
    with pytest.raises(CheckpointRefused, match="transformed"):
        read_metadata(folder)


def test_links_are_not_followed(folder, tmp_path):
    shard = next(folder.glob("*.distcp"))
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointRefused, match="no regular file"):
        read_metadata(folder)
    (folder / ".metadata").rename(tmp_path / "metadata")
    (folder / ".metadata").symlink_to(tmp_path / "metadata")
    with pytest.raises(CheckpointRefused, match="no regular file"):
        read_metadata(folder)


def test_a_pipe_is_not_waited_for(folder):
    (folder / ".metadata").unlink()
    os.mkfifo(folder / ".metadata")
    with pytest.raises(CheckpointRefused, match="no regular file"):
        read_metadata(folder)


@pytest.mark.parametrize(
    "alter",
    [
        lambda metadata: setattr(metadata, "state_dict_metadata", [1]),
        lambda metadata: setattr(metadata, "state_dict_metadata", {1: BytesStorageMetadata()}),
        lambda metadata: setattr(metadata, "state_dict_metadata", {"x": MetadataIndex("x")}),
        lambda metadata: setattr(metadata, "storage_data", {MetadataIndex("x"): MetadataIndex("y")}),
    ],
)
def test_objects_of_the_wrong_kind(folder, alter):
    rewrite(folder, alter)
    with pytest.raises(CheckpointRefused, match=r"\.metadata: "):
        read_metadata(folder)


def test_a_few_bytes_do_not_fill_the_memory(folder):
    """PUT with an index of 2^31: the unpickler in C would take 32 GiB. No length in a pickle is believed either."""
    texts = (b"Nr\xff\xff\xff\x7f.", b"\x8e" + b"\xff" * 7 + b"\x0fx.", b"\x95" + b"\x7f" * 8 + b"N.")
    for text in texts:
        (folder / ".metadata").write_bytes(b"\x80\x04" + text)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(CheckpointRefused, match=r"\.metadata: "):
            read_metadata(folder)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "KiB"


def test_damaged_metadata_raises_nothing_but_a_refusal(folder):
    """Bytes altered, cut and repeated at random, by a seed."""
    sound, draw = (folder / ".metadata").read_bytes(), random.Random(7)
    refused = 0
    for _ in range(2_000):
        text = bytearray(sound)
        for _ in range(draw.randint(1, 4)):
            kind, position = draw.randrange(3), draw.randrange(len(text))
            if kind == 0:
                text[position] = draw.randrange(256)
            elif kind == 1:
                del text[position : position + draw.randint(1, 30)]
            else:
                text[position:position] = text[position : position + draw.randint(1, 30)]
        (folder / ".metadata").write_bytes(text)
        try:
            read_metadata(folder)
        except CheckpointRefused:
            refused += 1
    assert refused > 1_000
