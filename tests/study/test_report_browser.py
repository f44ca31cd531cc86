"""The report in a real browser, on a phone's screen and on a desktop's."""

import html
import json
import re
import shutil
import subprocess
import time

import pytest
from PIL import Image

from rt_detectron.study.evaluations import compared
from rt_detectron.study.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)"
)

# A page around the report, as the report's own policy forbids scripts in it.
WRAPPER = """<!doctype html><iframe src="{page}" style="border:0;width:{width}px;height:844px"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const page = frame.contentDocument, view = frame.contentWindow;
  const folded = page.documentElement.scrollHeight;
  page.querySelectorAll("details").forEach(details => details.open = true);
  document.title = JSON.stringify({{
    folded,
    screen: view.innerWidth,
    width: page.documentElement.scrollWidth,
    images: page.images.length,
    broken: [...page.images].filter(image => !image.naturalWidth).map(image => image.alt),
    requests: view.performance.getEntriesByType("resource").map(entry => entry.name),
    background: view.getComputedStyle(page.body).backgroundColor,
  }});
}};
</script>
"""


@pytest.fixture
def browse(tmp_path):
    """``browse(*options, dark)``: the browser's finished process."""

    def browse(*options, dark):
        command = [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--disable-dev-shm-usage", "--enable-logging=stderr", "--allow-file-access-from-files"),
            *("--virtual-time-budget=20000", f"--user-data-dir={tmp_path / 'profile'}"),
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            *options,
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    return browse


@pytest.fixture
def look(tmp_path, browse):
    """``look(page, width, dark)``: what the browser finds on the page, and what its console says."""

    def look(page, width=390, dark=False):
        wrapper = tmp_path / "wrapper.html"
        wrapper.write_text(WRAPPER.format(page=page.as_uri(), width=width))
        finished = browse("--dump-dom", wrapper.as_uri(), dark=dark)
        title = re.search("<title>(.*?)</title>", finished.stdout, re.DOTALL)
        assert title, finished.stderr
        console = [line for line in finished.stderr.splitlines() if ":CONSOLE" in line]
        return json.loads(html.unescape(title[1])), console

    return look


@pytest.fixture
def colors(tmp_path, browse):
    """``colors(page, dark)``: those of the pixels of the page's first 2,000 lines, enlarged for pure ones."""

    def colors(page, dark):
        picture = tmp_path / f"{dark}.png"
        options = ("--window-size=800,2000", "--force-device-scale-factor=2", f"--screenshot={picture}")
        finished = browse(*options, page.as_uri(), dark=dark)
        assert picture.exists(), finished.stderr
        with Image.open(picture) as image:
            return {color for _, color in image.convert("RGB").getcolors(maxcolors=2**24)}

    return colors


@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_the_screen_and_asks_the_network_for_nothing(look, whole_report, width):
    found, console = look(whole_report.page, width)
    assert found["screen"] == width
    assert found["width"] <= width
    assert found["images"] > 15
    assert found["broken"] == []
    assert found["requests"] == []
    assert console == []


def test_dark_mode_changes_page_and_plots(look, colors, whole_report):
    light, dark = (look(whole_report.page, dark=dark)[0] for dark in (False, True))
    assert light["background"] == "rgb(255, 255, 255)"
    assert dark["background"] == "rgb(20, 23, 27)"
    assert dark["broken"] == []
    # What a plot's axes are drawn in, where it is an image of the page.
    ink = {(58, 63, 71), (201, 206, 214)}
    assert colors(whole_report.page, dark=False) & ink == {(58, 63, 71)}
    assert colors(whole_report.page, dark=True) & ink == {(201, 206, 214)}


@pytest.mark.slow
def test_twenty_arms_and_two_detectors_fit_thirty_screens_of_a_phone(look, build_study, tmp_path):
    arms = ("standard", *(f"l2_{number}" for number in range(19)))
    study, outcomes = build_study(tmp_path, arms=arms, rates=(0.02,))
    start = time.process_time()
    page = write_report(compared(study, outcomes), tmp_path / "out", "python tools/compare.py --study x")
    assert time.process_time() - start < 20
    assert page.stat().st_size < 4e6
    found, console = look(page)
    assert (found["screen"], found["broken"], console) == (390, [], [])
    assert found["folded"] < 30 * 844
    first = page.read_text().split('<details class="target"')[0]
    assert first.count("<img") <= 3 + 4  # the answers', and clean against changed images


def test_this_test_would_notice(look, whole_report, tmp_path):
    """A page with what the others must not have."""
    spoilt = tmp_path / "spoilt.html"
    extra = '<img alt="x" src="http://127.0.0.1:9/x.png"><p style="width:999px">wide</p><script>1</script>'
    spoilt.write_text(whole_report.page.read_text().replace("</body>", f"{extra}</body>"))
    found, console = look(spoilt)
    assert found["width"] > 390
    assert found["broken"] == ["x"]
    assert len(console) == 2
    assert all("Content Security Policy" in line for line in console)
