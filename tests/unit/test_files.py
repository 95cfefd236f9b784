"""Files that are written atomically."""

import os

import pytest

from hmoe_megatron.files import atomic_directory, atomic_write, check_output, is_utf8


def test_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a"
    atomic_write(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_directory_is_whole_or_not_there(tmp_path):
    with atomic_directory(tmp_path / "out", "--output") as folder:
        (folder / "inner").mkdir()
        (folder / "inner/file").write_text("x")
        assert not (tmp_path / "out").exists()
        with pytest.raises(ValueError, match="another process is writing it"), atomic_directory(tmp_path / "out", "-o"):
            pass
    assert (tmp_path / "out/inner/file").read_text() == "x" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="--output .*exists already"), atomic_directory(tmp_path / "out", "--output"):
        pass
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "other", "--output") as folder:
        (folder / "file").write_text("x")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_left_of_a_directory_is_cleared(tmp_path):
    (tmp_path / ".out.writing/inner").mkdir(parents=True)
    (tmp_path / ".out.writing/file").write_text("half")
    with atomic_directory(tmp_path / "out", "--output") as folder:
        assert list(folder.iterdir()) == []


def test_a_directory_that_came_to_be_meanwhile_is_kept(tmp_path):
    with pytest.raises(OSError, match="not empty"), atomic_directory(tmp_path / "out", "--output"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/precious").write_text("x")
    assert (tmp_path / "out/precious").read_text() == "x" and len(list(tmp_path.iterdir())) == 1


def test_the_folders_of_a_file_are_made(tmp_path):
    check_output(tmp_path / "a/b/c", "--output")
    assert list(tmp_path.iterdir()) == []  # by the writing
    atomic_write(tmp_path / "a/b/c", b"x")
    assert (tmp_path / "a/b/c").read_bytes() == b"x"
    with atomic_directory(tmp_path / "d/e", "--output") as folder:
        (folder / "file").touch()
    assert (tmp_path / "d/e/file").exists()


def test_a_file_that_can_not_be_written_is_refused_before_work(tmp_path):
    with pytest.raises(ValueError, match=f"--output {tmp_path}: a directory; give a file"):
        check_output(tmp_path, "--output")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--output .*: .*/file is no directory that this user can write to"):
        check_output(tmp_path / "file/of/it", "--output")


def test_words_of_the_command_line_that_were_no_utf8():
    assert is_utf8("ü😀") and not is_utf8(b"a\xff".decode(errors="surrogateescape"))
