"""The report whole: page, pictures, files, refusals; telemetry by the code that writes it."""

import json
import re

import numpy as np
import pytest

from hmoe_megatron.tools import routing_report
from hmoe_megatron.tools.report import page
from hmoe_megatron.tools.report import routing_page as report
from hmoe_megatron.tools.report.drawing import draw
from hmoe_megatron.tools.report.statistics import Routing
from hmoe_megatron.tools.report.text import DEFAULT_TOKENS
from tests.distributed.pretrain_run import pretrain
from tests.distributed.ranks import run_ranks
from tests.distributed.training_run import VOCABULARY
from tests.unit.report.made_up import make_model, make_routing
from tests.unit.report.test_run_report import make_run

HOSTILE = "<script>alert('x')</script>&\x00\x1b[31m\u202e\u2028 \ud800\U000e0041"


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run")


def tool(*words):
    return routing_report.main([str(word) for word in words])


def test_telemetry_alone_gives_the_figures_over_training(run_dir, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert tool("--load", run_dir, "--output", out) == 0
    assert {path.name for path in out.iterdir()} == set(report.OVER_TRAINING) | {"report.html"}
    assert capsys.readouterr().out.splitlines()[0] == str(out / "report.html")
    text = (out / "report.html").read_text()
    assert text.count("data:image/png;base64,") == 2 and "1.42 k (65%)" in text
    assert "No --text was given" in text and "No --easy and --hard were given" in text
    stripped = re.sub(r'src="data:image/png;base64,[A-Za-z0-9+/=]+"', "", text)
    assert not re.search(r"//|<script|<link|<iframe|src=|href=|@import|url\(", stripped)


def test_a_picture_of_an_earlier_report_goes(run_dir, tmp_path):
    (tmp_path / "similarity.png").write_bytes(b"old")
    (tmp_path / "mine.png").write_bytes(b"kept")
    assert tool("--load", run_dir, "--output", tmp_path) == 0
    assert not (tmp_path / "similarity.png").exists() and (tmp_path / "mine.png").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--load", "none"], "--load none: no such directory"),
        (["--load", "run", "--output", "file"], "--output file: is a file; give a directory"),
        (["--load", "empty"], "no telemetry.jsonl is there, and no --text"),
        (["--load", "run", "--tokens", "5000"], "--tokens 5000: of what? give --text"),
        (["--load", "run", "--text", "file", "--tokens", "999"], "--tokens 999: give 1000 at least"),
        (["--load", "run", "--text", "good", "none"], "none: no such file"),
        (["--load", "run", "--easy", "file"], "--easy needs --hard"),
        (["--load", "run", "--hard", "file"], "--hard needs --easy"),
        (["--load", "run", "--easy", "file", "--hard", "file"], "file:1: Expecting value"),
        (["--load", "run", "--easy", "good", "--hard", "none"], "none: no such file"),
    ],
)
def test_wrong_flags_are_refused_before_megatron_is_imported(run_dir, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no json\n")
    (tmp_path / "good").write_text('{"text": "one"}\n' * 2)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("hmoe_megatron.machine.prepare_environment", lambda: pytest.fail("too late"))
    assert tool("--output", "out", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("routing_report: error: ") and said in error and not (tmp_path / "out").exists()


def test_the_text_of_tokens_is_inert():
    model = make_model(layers=2)
    routing = make_routing(model)
    html = report.top_tokens(model, routing, lambda ids: [HOSTILE] * len(ids))
    text = page.html_page("<b>run</b>", report.text_facts(7, routing), ["<i>note"], [("Top & tokens", html)]).decode()
    assert "<script" not in text and "<b>run" not in text and "<i>note" not in text
    assert "<h2>Top &amp; tokens</h2>" in text
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&amp;\\x00\\x1b" in text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\ud800-\udfff]", text)


def test_visible_characters_stay_and_others_are_escaped():
    assert report.visible(" the") == "\u2423the" and report.visible("\u00e9\u4e2d\u0301") == "\u00e9\u4e2d\u0301"
    assert report.visible("\n\t\u00a0\u200b\ud800") == r"\n\t\xa0\u200b\ud800"
    assert report.visible("x" * 99) == "x" * report.MAX_TOKEN_CHARS + "\u2026"


def test_the_help_says_how_many_tokens_are_read(capsys):
    with pytest.raises(SystemExit):
        tool("--help")
    assert f"at most {DEFAULT_TOKENS:,}" in " ".join(capsys.readouterr().out.split())


def test_top_tokens_name_the_tokens_of_each_expert():
    """Expert 0 takes token 5 always, expert 1 token 6 half of the times."""
    model = make_model(layers=1, widths=(20, 10))
    token_T = np.repeat([5, 6], 10)
    chosen_TLE = np.zeros((20, 1, 2), bool)
    chosen_TLE[:10, 0, 0] = chosen_TLE[10:15, 0, 1] = True
    routing = Routing(token_T, np.zeros(20, int), np.ones(20), chosen_TLE, np.zeros(chosen_TLE.shape))
    rows = re.findall(r"<tr><td>.*?</tr>", report.top_tokens(model, routing, lambda ids: [f"t{i}" for i in ids]))
    cells = [re.sub("(<[^>]*>|&nbsp;)+", " ", row).split() for row in rows]
    assert cells == [["1", "10", "25.00%", "t6", "50%"], ["0", "20", "50.00%", "t5", "100%"]]


@pytest.mark.parametrize(("layers", "widths"), [(1, (64,) * 4), (2, tuple(range(8, 8 * 41, 8))), (40, (8, 16))])
def test_pictures_of_any_shape(layers, widths):
    model = make_model(layers, widths)
    routing = make_routing(model, tokens=1000)
    routing.chosen_TLE[:, 0, 0] = False  # an expert without a token
    both = (routing, make_routing(model, seed=1))
    drawn = draw(report.ON_TEXT, model, routing) | draw(report.ON_QUESTIONS, model, *both)
    assert all(png[:4] == b"\x89PNG" for png, _ in drawn.values()) and len(drawn) == 6


def on_rank(*calls):
    return [tool(*words) for words in calls]


def test_a_checkpoint_and_text_give_every_figure(tmp_path):
    """Saved, loaded and reported by the tool itself, on one rank."""
    run, out = tmp_path / "run", tmp_path / "out"
    (ended,) = run_ranks(1, pretrain, f"--train-iters 3 --save-interval 3 --save {run}")
    assert ended.code == 0, ended.output[-3000:]
    random = np.random.default_rng(0)
    for name, lines, length in (("text", 20, 60), ("easy", 9, 12), ("hard", 5, 30)):
        texts = (" ".join(map(str, random.integers(0, VOCABULARY - 1, length))) for _ in range(lines))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["--load", run, "--output", out, "--text", tmp_path / "text.jsonl", "--tokens"]
    more = ["--easy", tmp_path / "easy.jsonl", "--hard", tmp_path / "hard.jsonl"]
    (codes,) = run_ranks(1, on_rank, [*words, 5000], [*words, 1100, *more])
    assert codes == [2, 0], "there are 1,220 tokens"
    assert {path.name for path in out.iterdir()} == set(report.PICTURES) | {report.PAGE_FILE}
    text = (out / report.PAGE_FILE).read_text()
    for part in ("1,100", "checkpoint of step</dt><dd>3<", "experts a token</dt><dd>2.00<", "Layer 1", "Over training"):
        assert part in text, part
    assert text.count("data:image/png;base64,") == len(report.PICTURES) and "No --" not in text
