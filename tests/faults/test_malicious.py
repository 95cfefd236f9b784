"""Files that an attacker made: no code of theirs runs (a canary is not made), and they are refused."""

import json
import os
import pickle
import shutil

import numpy
import pytest
import torch

from hmoe_megatron.checkpoint import directory
from hmoe_megatron.checkpoint.manifest import MANIFEST_FILE, load_manifest, record_files
from hmoe_megatron.untrusted import canonical, checksum
from tests.faults.harness import run


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def test_the_canary_would_be_made(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def forge(path):
    """The manifest for what the files are now: who can alter them can alter it."""
    saved = load_manifest(path)
    names = [entry.name for entry in path.iterdir() if entry.name != MANIFEST_FILE and entry.is_file()]
    type(saved)(saved.iteration, saved.settings, saved.layout, saved.versions, record_files(path, names)).save(path)


def rewrite_manifest(path, change):
    body = json.loads((path / MANIFEST_FILE).read_text())
    del body["sha256"]
    change(body)
    (path / MANIFEST_FILE).write_text(canonical(body | {"sha256": checksum(body)}))


def metadata_pickle(path, canary):
    (path / ".metadata").write_bytes(pickle.dumps(Evil(canary)))
    forge(path)


def _stored_as(path, canary, wanted):
    """Let the entry of this name point at a pickle at the end of its shard."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if wanted in index.fqn)
    stored = metadata.storage_data[index]
    shard = path / stored.relative_path
    start = shard.stat().st_size
    with shard.open("ab") as file:
        torch.save(Evil(canary), file)
    stored.offset, stored.length = start, shard.stat().st_size - start
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    forge(path)


def object_pickle(path, canary):
    _stored_as(path, canary, "common_state")


def tensor_pickle(path, canary):
    _stored_as(path, canary, "word_embeddings")


def path_out_of_the_directory(path, canary):
    metadata = pickle.loads((path / ".metadata").read_bytes())
    shutil.copytree(path, path.with_name("elsewhere"))
    for stored in metadata.storage_data.values():
        stored.relative_path = f"../elsewhere/{stored.relative_path}"
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    forge(path)


def symbolic_link(path, canary):
    shard = path / "__0_0.distcp"
    shard.rename(path.with_name("elsewhere"))
    shard.symlink_to(path.with_name("elsewhere"))
    forge(path)


def common_file(path, canary):
    """Megatron reads a legacy common.pt instead of what the shards hold."""
    torch.save(Evil(canary), path / "common.pt")


def manifest_path(path, canary):
    rewrite_manifest(path, lambda body: body["files"].update({"../../etc/passwd": [1, "0" * 64]}))


def nested_manifest(path, canary):
    (path / MANIFEST_FILE).write_text("[" * 1_000_000)


def huge_manifest(path, canary):
    with (path / MANIFEST_FILE).open("wb") as file:
        file.truncate(1 << 40)


def tracker_path(path, canary):
    (path.parent / directory.TRACKER_FILE).write_text("../../somewhere/else")


# attack -> what the refusal names
ATTACKS = {
    metadata_pickle: "posix.mkdir",
    object_pickle: "object common_state/shard_0_1: it holds posix.mkdir",
    tensor_pickle: "posix.mkdir",
    path_out_of_the_directory: "../elsewhere",
    symbolic_link: "__0_0.distcp",
    common_file: "common.pt",  # with --hmoe-skip-integrity what it holds
    manifest_path: "../../etc/passwd",
    nested_manifest: "nested too deeply",
    huge_manifest: MANIFEST_FILE,
    tracker_path: "../../somewhere/else",
}
CHECKED_BY_SKIP = (metadata_pickle, object_pickle, tensor_pickle, path_out_of_the_directory, symbolic_link, common_file)
CASES = [(attack, "") for attack in ATTACKS]
SKIPPED = [pytest.param(attack, "--hmoe-skip-integrity", marks=pytest.mark.campaign) for attack in CHECKED_BY_SKIP]


@pytest.mark.parametrize(("attack", "flags"), [*CASES, *SKIPPED], ids=lambda value: getattr(value, "__name__", value))
def test_a_malicious_checkpoint(attack, flags, two, tmp_path, told):
    root, canary = tmp_path / "run", tmp_path / "canary"
    attack(two.copy_to(root, 4), canary)
    ended = run(2, root, tmp_path / "scratch", flags=flags)
    assert not canary.exists(), "code of the attacker ran"
    assert ended.losses == {} and 0 not in ended.codes and 3 in ended.codes, ended.tail
    named = "posix.mkdir" if flags and attack is common_file else ATTACKS[attack]
    assert named in ended.output and str(root) in ended.error
    told(
        f"malicious: {attack.__name__.replace('_', ' ')} {flags and f'`{flags}`'}",
        1,
        "no code ran, exit code 3, it is named",
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Prefix of a tokenized corpus, and flags that train on it with its index cached in `cache`."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder = tmp_path_factory.mktemp("corpus")
    builder = IndexedDatasetBuilder(str(folder / "text.bin"), dtype=numpy.int32)
    for number in range(50):
        builder.add_document(torch.arange(number, number + 60) % 120, [60])
    builder.finalize(str(folder / "text.idx"))
    flags = f"--data-path {folder / 'text'} --split 100,0,0"
    cached = f"{flags} --data-cache-path {folder / 'cache'}"
    ended = run(2, folder / "run", folder / "scratch", flags=cached, mock=False)
    assert ended.codes == [0, 0], ended.tail
    assert len(list((folder / "cache").glob("*.npy"))) == 3
    return folder, flags


def raw_pickle(file, canary):
    file.write_bytes(pickle.dumps(Evil(canary)))


def object_array(file, canary):
    numpy.save(file, numpy.array([Evil(canary)] * 10, dtype=object), allow_pickle=True)


@pytest.mark.parametrize("attack", [raw_pickle, object_array], ids=lambda attack: attack.__name__)
def test_a_malicious_dataset_index(attack, corpus, tmp_path, told):
    folder, flags = corpus
    shutil.copytree(folder / "cache", tmp_path / "cache")
    files = sorted((tmp_path / "cache").glob("*.npy"))
    for file in files:
        attack(file, tmp_path / "canary")
    ended = run(
        2, tmp_path / "run", tmp_path / "scratch", flags=f"{flags} --data-cache-path {tmp_path / 'cache'}", mock=False
    )
    assert not (tmp_path / "canary").exists(), "code of the attacker ran"
    assert 0 not in ended.codes and ended.losses == {}, ended.tail
    assert str(tmp_path / "cache") in ended.error
    told(
        f"malicious: {attack.__name__.replace('_', ' ')} as cached dataset index",
        1,
        "no code ran, exit code 2, the cache is named",
    )
