"""The report in a browser: the pictures are really shown, under the page's own policy."""

import shutil
import subprocess

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from hmoe_megatron.report import write_report
from hmoe_megatron.report.pictures import BLUE, GREEN, VERMILLION
from tests.unit.test_report import make_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1100,3600",
)  # fmt: skip


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt-get install -y chromium)")
def test_chromium_shows_the_page(tmp_path):
    page = write_report(make_run(tmp_path / "run"))[0]
    shot = tmp_path / "page.png"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shot.exists(), done.stderr[-2000:]
    pixels_YXC = imread(shot)[..., :3]
    assert pixels_YXC.shape[:2] == (3600, 1100)
    for colour in (BLUE, VERMILLION, GREEN):  # only the pictures have these three
        count = (np.abs(pixels_YXC - to_rgb(colour)).max(-1) < 0.02).sum()
        assert count > 50, f"{colour}: {count} pixels; the pictures are not shown"
