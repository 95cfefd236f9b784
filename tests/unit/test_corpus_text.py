"""Text out of pages, manuals and dictionaries, cutting, decontamination, limits of archives."""

import gzip
import random
import re
import zipfile

import numpy as np
import pytest

from hmoe_megatron.tools.corpora.corpus import is_held_out
from hmoe_megatron.tools.corpora.debian_prose import cut_page, pack
from hmoe_megatron.tools.corpora.decontamination import GRAM_WORDS, EvaluationSets, Item, words_of
from hmoe_megatron.tools.corpora.dictionary import entries
from hmoe_megatron.tools.corpora.html_text import html_text
from hmoe_megatron.tools.corpora.manual_text import manual_text, unescape
from hmoe_megatron.tools.corpora.members import decode, gunzip, tar_members, zip_member


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<body><p>One\n  two.</p><p>Three</p></body>", "One two.\n\nThree"),
        ("<p>a<b>b</b>c <i>d</i>&amp;&lt;e&gt;</p>", "abc d&<e>"),
        ("<ul><li><p>one</p></li><li>two<ul><li>three</li></ul></li></ul>", "- one\n- two\n- three"),
        ("<p>x</p><pre>  a\n    b</pre><p>y</p>", "x\n\n  a\n    b\n\ny"),
        ("<table><tr><th>k</th><td><p>v</p><p>w</p></td></tr><tr><td>l</td></tr></table>", "k | v w\nl"),
        ("<dl><dt>f(x)</dt><dd><p>Does.</p></dd><dt>g</dt><dd>Not.</dd></dl>", "f(x)\n\nDoes.\n\ng\n\nNot."),
        ("<nav>no</nav><script>if (a<b) no()</script><h1>T<a class='headerlink'>¶</a></h1><p>x<br>y", "T\n\nx\ny"),
        ("<body>no<div class='b' role=\"main\"><p>yes</div>no<p>no</body>", "yes"),
        ("<body><div class='navheader'>no</div><p>yes</p><!-- no --><style>no</style></body>", "yes"),
        ("<body></b></i>yes</body>no", "yes"),
        ("", ""),
    ],
)
def test_html_is_what_a_reader_reads(html, text):
    assert html_text(html if "<body>" in html else f"<body>{html}</body>") == text


def test_html_of_random_nesting_keeps_every_word_once_in_order_and_no_tag():
    rng = random.Random(0)
    for _ in range(200):
        words, html = [], "<body>"
        for number in range(30):
            tag = rng.choice(["p", "div", "li", "td", "tr", "pre", "span", "br", "dd", "b", "blockquote"])
            words.append(f"w{number}")
            html += f"<{tag}> w{number} " + (f"</{tag}>" if rng.random() < 0.6 else "")
        text = html_text(html + "</body>")
        assert re.findall(r"w\d+", text) == words and "<" not in text and not re.search(r"[ \t]$|\n{3}", text, re.M)


def test_manual_page_is_paragraphs_without_requests_or_escapes():
    page = (
        '.\\" made\n.de Sp\n..\n.TH X 1 "a" "b"\n.nh\n.SH "NAME"\nx \\- y\n.IX Item "no"\n.PP\n\\&\\fBOne\\fR\n'
        'two \\*(C`f()\\*(C\' \\s-1BIG\\s0 \\*(L"q\\*(R".\n.Vb 1\n\\&    a \\e \\*(Aqb\\*(Aq\n\\&\n\\&    c\n.Ve\n'
        '.ie n .IP """it""" 4\n.el .IP "\\f(CWit\\fR" 4\nDoes.\n.IP "\\(bu" 4\npoint\n'
    )
    assert manual_text(page) == (
        'NAME\n\nx - y\n\nOne two f() BIG "q".\n\n    a \\ \'b\'\n\n    c\n\n"it"\n\nDoes.\n\n- point'
    )
    assert unescape("cafe\\*' \\*(--x") == "café --x"


def test_dictionary_has_every_entry_once_and_refuses_an_index_of_another_text():
    text = b"info\nA, {b c}.\n   [1913 Webster]\nB \x92s\n"
    index = "00-database-info\tA\tF\na\tF\tc\naa\tF\tc\nb\th\tF\n"
    assert entries(index, text) == ["A, b c.", "B ’s"]
    for bad in ("a\tF\tzz\n", "a\n", "a\t*\tB\n"):
        with pytest.raises(ValueError, match="dictionary index"):
            entries(bad, text)


def test_cut_loses_nothing_and_keeps_to_the_limit():
    rng = random.Random(1)
    pieces = ["x" * rng.randint(1, 40) + str(n) for n in range(200)]
    for limit in (1, 30, 100, 10_000):
        documents = pack(pieces, limit)
        assert "\n\n".join(document[:-1] for document in documents) == "\n\n".join(pieces)
        assert all(len(document) - 1 <= limit or "\n\n" not in document for document in documents)
    page = "\n\n".join(pieces)
    assert cut_page(page, len(page)) == [page + "\n"] and "".join(cut_page(page, 99)).split() == page.split()
    assert pack([], 5) == []


def test_held_out_share_and_decoding():
    share = np.mean([is_held_out(f"document {n}") for n in range(20_000)])
    assert abs(share - 0.05) < 0.006
    assert decode("é’".encode()) == "é’" and decode(b"it\x92s \x81") == "it’s \ufffd"


WORDS = [f"word{n}" for n in range(40)]


def rule(*texts: str, question: str = "") -> EvaluationSets:
    return EvaluationSets([Item("other", ["nothing to see"], ""), Item("set", list(texts), question)])


@pytest.mark.parametrize("start", [0, 11, len(WORDS) - GRAM_WORDS])
def test_thirteen_words_in_a_row_are_contamination_twelve_or_another_order_are_not(start):
    found = rule(" ".join(WORDS))
    shared = WORDS[start : start + GRAM_WORDS]
    assert found.find("Before; " + ", ".join(shared).upper() + "... after!") == "set"
    assert found.find("Before " + " ".join(shared[:-1]) + " after") is None
    assert found.find("Before " + " ".join(shared[1:]) + " after") is None
    assert found.find(" ".join([shared[1], shared[0], *shared[2:]])) is None
    assert found.find(" ".join(shared[:6] + ["in"] + shared[6:])) is None
    assert found.find("") is None and found.find("word0") is None


def test_short_questions_are_compared_whole():
    found = rule("Where is it? here", question="Where is it?")
    assert found.find("Question: where IS it? Answer: there", question=" where is it") == "set"
    assert found.find("Question: where is it now? Answer: there", question="where is it now?") is None
    assert found.find("where is it?") is None  # prose has no question
    assert rule("a b", question="").find("x", question="...") is None


def test_decontamination_agrees_with_a_plain_search():
    rng = random.Random(2)
    vocabulary = ["a", "b"]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(5, 40))) for _ in range(40)]
    found = EvaluationSets(Item("set", [text], "") for text in texts)
    runs = {tuple(w[i : i + GRAM_WORDS]) for w in map(words_of, texts) for i in range(len(w) - GRAM_WORDS + 1)}
    hits = 0
    for _ in range(2_000):
        words = rng.choices(vocabulary, k=16)
        expected = any(tuple(words[i : i + GRAM_WORDS]) in runs for i in range(4))
        assert (found.find(" ".join(words)) == "set") == expected
        hits += expected
    assert 0 < hits < 2_000


def test_archives_have_limits(tmp_path):
    assert gunzip("x", gzip.compress(b"abc"), 3) == b"abc"
    with pytest.raises(ValueError, match="more than 2 bytes"):
        gunzip("x", gzip.compress(b"abc"), 2)
    for bad in (b"abc", gzip.compress(b"abc" * 99)[:-9], b"\x1f\x8b\x08\x00" + b"\xff" * 30):
        with pytest.raises(ValueError, match="damaged"):
            gunzip("x", bad)
    with zipfile.ZipFile(tmp_path / "z", "w") as new:
        new.writestr("a", "abc")
    with zipfile.ZipFile(tmp_path / "z") as archive:
        assert zip_member(archive, "a") == b"abc"
        for name, message in (("a", "more than"), ("b", "no item")):
            with pytest.raises(ValueError, match=message):
                zip_member(archive, name, 2)
    for member, message in ((b"data.tar.zst", "damaged"), (b"control.tar.xz", "no data.tar")):
        (tmp_path / "bad.deb").write_bytes(b"!<arch>\n" + member.ljust(16) + b"0" * 32 + b"12        `\n")
        with pytest.raises(ValueError, match=message):
            list(tar_members(tmp_path / "bad.deb", re.compile("(.*)")))
