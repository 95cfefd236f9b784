"""The report in a browser: pictures are shown, tokens are text and do nothing."""

import subprocess

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from hmoe_megatron.report.pictures import BLUE, NARROW_TO_WIDE, VERMILLION
from hmoe_megatron.routing_report import command, page, pictures
from tests.end_to_end.test_report_page import CHROMIUM, FLAGS
from tests.unit.routing_report.made_up import make_model, make_routing

HOSTILE = "<script>title='owned'</script>"


def make_report(folder):
    """Of a made-up routing, every token of which is a script."""
    model = make_model(layers=2)
    easy, hard = make_routing(model, seed=1), make_routing(model, seed=2, harder=0.3)
    drawn = pictures.draw_text(model, easy) | pictures.draw_questions(model, easy, hard)
    top = page.top_tokens(model, easy, lambda ids: [HOSTILE] * len(ids))
    sections = [("Figures", page.figures(drawn)), ("Top tokens", top)]
    return command.write(folder, page.page("HMoE routing: made up", {}, [], sections), drawn)[0]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt-get install -y chromium)")
def test_chromium_shows_the_page(tmp_path):
    html = make_report(tmp_path / "report")

    def chromium(*words):
        words = [*FLAGS, "--window-size=1100,6000", f"--user-data-dir={tmp_path / 'profile'}", *words, html.as_uri()]
        return subprocess.run([CHROMIUM, *words], capture_output=True, text=True, timeout=120)

    shot = tmp_path / "page.png"
    done = chromium(f"--screenshot={shot}")
    assert shot.exists(), done.stderr[-2000:]
    pixels_YXC = imread(shot)[..., :3]
    for colour in (BLUE, VERMILLION, NARROW_TO_WIDE(1.0)[:3]):  # only the pictures have these
        count = (np.abs(pixels_YXC - to_rgb(colour)).max(-1) < 0.02).sum()
        assert count > 50, f"{colour}: {count} pixels; the pictures are not shown"
    dom = chromium("--dump-dom").stdout
    assert "<title>HMoE routing: made up</title>" in dom and "&lt;script&gt;" in dom and "<script" not in dom
