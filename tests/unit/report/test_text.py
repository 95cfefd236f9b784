"""Text and questions: what is read, cut and refused."""

import json
from types import SimpleNamespace

import pytest

from hmoe_megatron.tools.report import text

WORDS = SimpleNamespace(tokenize=lambda text: [int(word) for word in text.split()], eod=99, vocab_size=100)
ARC = {"question": "Why?", "choices": {"text": ["no", "so"], "label": ["1", "2"]}, "answerKey": "2", "id": "x"}


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_documents_of_lines_and_of_plain_text(tmp_path):
    lines = write(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two", "source": 3})
    plain = tmp_path / "b.txt"
    plain.write_text("three\n\nfour\n")
    assert list(text.read_documents([lines, plain])) == ["one", "two", "three\n\nfour\n"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "broken_json"),
        ("[]", "the record is a list, not an object"),
        ({"txt": "a"}, "no key 'text'"),
        ({"text": 3}, "'text' is a int"),
        ({"text": " "}, "only white space"),
        ('{"text": "\\ud83d"}', "half of a surrogate pair"),
    ],
)
def test_bad_lines_are_refused_with_file_and_line(tmp_path, line, said):
    path = write(tmp_path / "a.jsonl", {"text": "one"}, line)
    with pytest.raises(ValueError, match=r'a.jsonl:2: .*give JSON lines with "text"') as error:
        list(text.read_documents([path]))
    assert said in str(error.value)


def test_files_that_are_no_text_are_refused(tmp_path, monkeypatch):
    for name in ("none.jsonl", "none.txt"):
        with pytest.raises(ValueError, match=f"{name}: No such file"):
            list(text.read_documents([tmp_path / name]))
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="bytes.txt: not UTF-8 text"):
        list(text.read_documents([tmp_path / "bytes.txt"]))
    monkeypatch.setattr(text, "MAX_TEXT_BYTES", 10)
    monkeypatch.setattr(text, "MAX_LINE_BYTES", 10)
    for name, said in (("long.txt", "more than 10 bytes"), ("long.jsonl", ":1: longer than 10 bytes")):
        (tmp_path / name).write_text("x" * 11)
        with pytest.raises(ValueError, match=said):
            list(text.read_documents([tmp_path / name]))


def test_questions_have_their_right_answer(tmp_path):
    path = write(tmp_path / "q.jsonl", ARC, {"text": "as it is"})
    assert text.read_questions(path) == ["Question: Why?\nAnswer: so", "as it is"]


@pytest.mark.parametrize(
    "change",
    [
        {"answerKey": "3"},
        {"answerKey": None},
        {"choices": None},
        {"choices": {"text": [], "label": ["2"]}},
        {"question": 3},
        {"choices": {"text": "ab", "label": 2}},
        {"choices": {"text": [1, 2], "label": "12"}},
    ],
)
def test_other_questions_are_refused(tmp_path, change):
    path = write(tmp_path / "q.jsonl", ARC, ARC | change)
    with pytest.raises(ValueError, match='q.jsonl:2: no "text", and no "question"'):
        text.read_questions(path)


def test_a_single_question_and_a_line_that_is_no_object_are_refused(tmp_path):
    with pytest.raises(ValueError, match="1 questions; a mean over questions needs 2"):
        text.read_questions(write(tmp_path / "q.jsonl", ARC))
    with pytest.raises(ValueError, match='q.jsonl:1: no "text"'):
        text.read_questions(write(tmp_path / "q.jsonl", "3"))


def windows(documents, context=7, tokens=None, most=10**6):
    return text.text_windows(documents, WORDS, context, tokens, most)


def test_windows_hold_the_documents_in_order_with_an_end_after_each():
    documents = ["1 2 3 " * 100, "4 5 " * 400]
    found = windows(documents)
    assert sum(found, []) == [1, 2, 3] * 100 + [99] + [4, 5] * 400 + [99]
    assert {len(window) for window in found[:-1]} == {7} and 0 < len(found[-1]) <= 7


def test_a_tokenizer_without_an_end_gives_none():
    for end in ({}, {"eod": None}, {"eod": -1}, {"eod": 100}):
        tokenizer = SimpleNamespace(tokenize=WORDS.tokenize, vocab_size=100, **end)
        assert sum(text.text_windows(["1 " * 1000], tokenizer, 10, None, 10**6), []) == [1] * 1000


@pytest.mark.parametrize(("tokens", "most", "expected"), [(1500, 10**6, 1500), (None, 1200, 1200), (None, 9999, 2002)])
def test_no_more_than_wanted_is_read(tokens, most, expected):
    read = []

    def documents():
        for number in range(2):
            read.append(number)
            yield "1 " * 1000

    assert sum(map(len, windows(documents(), tokens=tokens, most=most))) == expected
    windows(documents(), tokens=1001)
    assert read == [0, 1, 0]


@pytest.mark.parametrize(("tokens", "said"), [(None, "which need 1,000"), (3000, "--tokens 3000")])
def test_too_few_tokens_are_refused(tokens, said):
    with pytest.raises(ValueError, match=f"--text holds 901 tokens, too few for .*{said}: give more text"):
        windows(["1 " * 900], tokens=tokens)


def test_a_text_that_the_tokenizer_cannot_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--text: the tokenizer fails on 'four five': invalid literal"):
        windows(["four five"])
    with pytest.raises(ValueError, match=":1: the tokenizer fails on 'six'"):
        text.question_windows(tmp_path, ["six"], WORDS, 2)


def test_question_windows_are_cut_and_not_empty(tmp_path):
    assert text.question_windows(tmp_path, ["1 2 3", "4"], WORDS, 2) == [[4], [1, 2]]
    with pytest.raises(ValueError, match=":2: the tokenizer makes no token of it"):
        text.question_windows(tmp_path, ["1", ""], WORDS, 2)
