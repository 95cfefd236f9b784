"""The reports in a browser: pictures are shown, under the page's own policy; tokens are text and do nothing."""

import json
import re
import shutil
import subprocess
from html import escape, unescape

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from hmoe_megatron.tools.report import page, routing_page, run_page
from hmoe_megatron.tools.report.drawing import BLUE, GREEN, NARROW_TO_WIDE, VERMILLION, draw
from tests.unit.report.made_up import make_model, make_routing
from tests.unit.report.test_run_report import make_run

HOSTILE = "<script>title='owned'</script>"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1100,6000"
).split()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt-get install -y chromium)")


def chromium(html, *words):
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={html.parent / 'profile'}", *words, html.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def shown(html, *colours):
    """Whether the page has these colours, which only its pictures have."""
    shot = html.with_name("shot.png")
    done = chromium(html, f"--screenshot={shot}")
    assert shot.exists(), done.stderr[-2000:]
    pixels_YXC = imread(shot)[..., :3]
    for colour in colours:
        count = (np.abs(pixels_YXC - to_rgb(colour)).max(-1) < 0.02).sum()
        assert count > 50, f"{colour}: {count} pixels; the pictures are not shown"


def test_the_run_report(tmp_path):
    shown(run_page.write_report(make_run(tmp_path / "run"))[0], BLUE, VERMILLION, GREEN)


PROBE = """<script>addEventListener("load", () => { parent.document.title = JSON.stringify({
  inner: innerWidth, page: document.documentElement.scrollWidth,
  tables: [...document.querySelectorAll(".wide")].map(e => e.scrollWidth - e.clientWidth),
  images: [...document.images].map(e => e.clientWidth)}) })</script>"""


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_of_the_run_report_is_off_the_screen(tmp_path, width):
    """The page is as wide as the screen; on a phone tables fit, and pictures keep a readable size and scroll."""
    text = run_page.write_report(make_run(tmp_path / "run"))[0].read_text()
    text = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', PROBE, text)
    frame = f'<iframe style="width: {width}px; height: 9000px; border: 0" srcdoc="{escape(text)}"></iframe>'
    (tmp_path / "probe.html").write_text(frame)  # a window is never narrower than 500 pixels
    dom = chromium(tmp_path / "probe.html", "--dump-dom").stdout
    found = json.loads(unescape(re.search("<title>({.*?})</title>", dom)[1]))
    assert found["inner"] == found["page"] == width
    assert found["tables"] and max(found["tables"]) <= 0
    assert min(found["images"]) >= 640


def test_the_routing_report(tmp_path):
    """Of a made-up routing, every token of which is a script."""
    model = make_model(layers=2)
    easy, hard = make_routing(model, seed=1), make_routing(model, seed=2, harder=0.3)
    drawn = draw(routing_page.ON_TEXT, model, easy) | draw(routing_page.ON_QUESTIONS, model, easy, hard)
    top = routing_page.top_tokens(model, easy, lambda ids: [HOSTILE] * len(ids))
    sections = [("Figures", page.figures(drawn)), ("Top tokens", top)]
    html = tmp_path / "report.html"
    page.write_files(html, page.html_page("HMoE routing: made up", {}, [], sections), tmp_path, drawn, drawn)
    shown(html, BLUE, VERMILLION, NARROW_TO_WIDE(1.0)[:3])
    dom = chromium(html, "--dump-dom").stdout
    assert "<title>HMoE routing: made up</title>" in dom and "&lt;script&gt;" in dom and "<script" not in dom
