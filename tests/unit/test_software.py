"""What a run says of the code that ran."""

import subprocess

import pytest

import hmoe_megatron
from hmoe_megatron.machine import software


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of one commit with a module and a page."""
    monkeypatch.setattr(software, "ROOT", tmp_path)
    for name in ("module.py", "page.md"):
        (tmp_path / name).write_text("one\n")
    for words in ("init -q", "add .", "-c user.name=a -c user.email=a@b -c commit.gpgsign=false commit -q -m one"):
        subprocess.run(["git", *words.split()], cwd=tmp_path, check=True)
    return tmp_path


def test_the_commit_and_whether_code_was_changed(checkout):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True).stdout
    assert len(software.commit()) == 10 and head.startswith(software.commit())
    (checkout / "page.md").write_text("two\n")
    (checkout / "data.bin").write_text("new")
    assert head.startswith(software.commit()), "neither a page nor a new file is a change of the code"
    (checkout / "module.py").write_text("two\n")
    assert software.commit() == head[:10] + software.CHANGED


def test_outside_a_checkout_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(software, "ROOT", tmp_path)
    assert software.commit() is None


def test_without_git_there_is_no_commit(checkout, monkeypatch):
    monkeypatch.setenv("PATH", str(checkout))
    assert software.commit() is None


def test_versions():
    assert software.versions()["hmoe-megatron"] == hmoe_megatron.__version__
    assert {"torch", "megatron-core"} < software.versions().keys()
