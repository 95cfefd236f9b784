"""The manifest of a checkpoint: every damage is found, and what it says is not believed."""

import json
import os

import pytest

from hmoe_megatron.checkpoint import manifest
from hmoe_megatron.checkpoint.directory import MANIFEST_FILE
from hmoe_megatron.checkpoint.manifest import FileRecord, Manifest, damaged_files, load_manifest, record_files, share_of
from hmoe_megatron.exits import CheckpointRefused
from hmoe_megatron.untrusted import canonical, checksum

NAMES = ("a", "b.distcp", ".metadata")


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(bytes(range(256)) * (number + 1))
    made().save(tmp_path)
    return tmp_path


def made(files=None):
    return Manifest(7, {"num_layers": 2}, {"world_size": 2}, {"torch": "2"}, files or {"a": FileRecord(1, "0" * 64)})


def test_it_comes_back_as_it_went(folder):
    saved = made(record_files(folder, NAMES))
    saved.save(folder)
    assert load_manifest(folder) == saved
    assert damaged_files(folder, saved.files) == []


def test_every_damage_is_named(folder):
    files = record_files(folder, [*NAMES, MANIFEST_FILE])
    (folder / "a").unlink()
    (folder / "b.distcp").write_bytes((folder / "b.distcp").read_bytes()[:-1])
    text = bytearray((folder / ".metadata").read_bytes())
    text[100] ^= 1
    (folder / ".metadata").write_bytes(text)
    found = damaged_files(folder, files)
    assert [next(phrase for phrase in found if phrase.startswith(name)) for name in ("a", "b.distcp", ".metadata")] == [
        "a: No such file or directory",
        "b.distcp has 511 bytes, 512 were saved",
        ".metadata is altered (SHA-256 does not match)",
    ]
    assert len(found) == 3


def test_links_and_pipes_are_damage(folder):
    files = record_files(folder, NAMES)
    (folder / "a").rename(folder / "elsewhere")
    (folder / "a").symlink_to("elsewhere")
    (folder / "b.distcp").unlink()
    os.mkfifo(folder / "b.distcp")
    assert damaged_files(folder, files) == ["a is a symbolic link", "b.distcp is a special file"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_share_the_files_each_once(ranks):
    files = {str(n): FileRecord(n * n, "") for n in range(20)}
    shares = [share_of(files, rank, ranks) for rank in range(ranks)]
    assert sorted(name for share in shares for name in share) == sorted(files)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_flip_of_any_bit_is_found(folder):
    path = folder / MANIFEST_FILE
    text = path.read_bytes()
    for position in range(len(text) - 1):  # the last is the newline
        for bit in (0, 3, 7):
            flipped = bytearray(text)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(CheckpointRefused, match=MANIFEST_FILE):
                load_manifest(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        "NaN",
        '{"schema": 1}',
        "{" * 100_000,
        "[" * 100_000,
        "\x00",
        '{"schema": 2}',
        '{"schema": 1, "schema": 1}',
    ],
)
def test_other_texts_are_refused(folder, text):
    (folder / MANIFEST_FILE).write_text(text)
    with pytest.raises(CheckpointRefused, match="--ckpt-step N"):
        load_manifest(folder)


@pytest.mark.parametrize(
    "alter",
    [
        {"files": {"../../etc/passwd": [1, "0" * 64]}},
        {"files": {"/etc/passwd": [1, "0" * 64]}},
        {"files": []},
        {"files": {"..": [1, "0" * 64]}},
        {"files": {"a": [1, "0" * 63]}},
        {"files": {"a": ["1", "0" * 64]}},
        {"files": {"a": [1]}},
        {"iteration": 0},
        {"iteration": "7"},
        {"iteration": 10**400},
        {"settings": 3},
        {"more": 1},
        {"schema": 1.5},
        {"sha256": None},
    ],
)
def test_a_sound_checksum_does_not_make_it_believed(folder, alter):
    body = json.loads((folder / MANIFEST_FILE).read_text()) | alter
    del body["sha256"]
    body["sha256"] = checksum(body) if "sha256" not in alter else None
    (folder / MANIFEST_FILE).write_text(canonical(body))
    with pytest.raises(CheckpointRefused, match=MANIFEST_FILE):
        load_manifest(folder)


def test_a_missing_one_and_a_large_one(folder, monkeypatch):
    monkeypatch.setattr(manifest, "MAX_BYTES", 10)
    with pytest.raises(CheckpointRefused, match="too large"):
        load_manifest(folder)
    (folder / MANIFEST_FILE).unlink()
    with pytest.raises(CheckpointRefused, match="not a complete checkpoint.*--hmoe-skip-integrity"):
        load_manifest(folder)
