"""The report in a browser: at the widths of a phone and a desk, in light and dark, offline."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from reports import many, wide_page

WIDTHS = (360, 1280)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the PATH")

# A window cannot be as narrow as a phone, a frame can. It tells its measures to the page around it, which --dump-dom
# prints.
AROUND = """<!doctype html><body>{frames}<pre id="measures"></pre><script>
const measures = [];
onmessage = event => {{
  measures.push(event.data);
  document.getElementById("measures").textContent = JSON.stringify(measures);
}};
</script></body>"""

MEASURE = """<script>
// load comes after all images; to wait for more would race with the browser's virtual time
addEventListener("load", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
  const images = [...document.images];
  const box = element => { const r = element.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; };
  const rgb = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const luminance = colour => colour.slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = rgb(getComputedStyle(element).backgroundColor);
      if (colour[3] > 0) return colour;
    }
    return [255, 255, 255, 1];
  };
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
    if (!text || element.closest("script, style, title") || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const [a, b] = [luminance(rgb(style.color)), luminance(behind(element))].sort((x, y) => y - x);
    texts.push({ text: text.slice(0, 60), contrast: (a + 0.05) / (b + 0.05), size: parseFloat(style.fontSize),
      plot: Boolean(element.closest(".plot")), box: box(element), axis: element.className === "tick" });
  }
  const before = images.map(box), across = document.documentElement.scrollWidth;
  images[0]?.click();
  parent.postMessage({
    width: innerWidth, across, dark: matchMedia("(prefers-color-scheme: dark)").matches, texts, images: before,
    empty: images.filter(image => !image.naturalWidth).length, enlarged: images.length ? box(images[0]) : null,
    acrossEnlarged: document.documentElement.scrollWidth,
    plots: [...document.querySelectorAll(".plot")].map(box),
    ticks: [...document.querySelectorAll(".ticks, .x, .y")].map(a => [...a.querySelectorAll(".tick")].map(box)),
    tall: [...document.querySelectorAll("tr")].map(row => row.getBoundingClientRect().height),
    fetched: performance.getEntriesByType("resource").map(entry => entry.name.slice(0, 80)),
  }, "*");
});
</script>"""


def look(page: str, folder: Path, *, dark: bool) -> dict[int, dict[str, Any]]:
    """What a browser makes of a page, by width. Fails where it says anything on its console."""
    assert BROWSER is not None
    measured, around = folder / "measured.html", folder / "around.html"
    measured.write_text(page.replace("</body>", MEASURE + "</body>"))
    frames = "".join(f'<iframe src="{measured.as_uri()}" width="{width}" height="900"></iframe>' for width in WIDTHS)
    around.write_text(AROUND.format(frames=frames))
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={folder / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        "--virtual-time-budget=10000",
        "--window-size=1400,1000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--dump-dom",
        around.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    found = re.search('<pre id="measures">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None
    return {measures["width"]: measures for measures in json.loads(html.unescape(found[1]))}


@pytest.fixture(scope="module", params=["light", "dark"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["a run", "many students and long names"])
def seen(
    request: pytest.FixtureRequest, finished: Run, scheme: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, Any]]:
    if request.param == "a run":
        page = (finished.folder / "runs" / "tiny" / "report.html").read_text()
    else:
        page = wide_page(finished.plan, many(finished.summary))
    seen = look(page, tmp_path_factory.mktemp("browser"), dark=scheme == "dark")
    assert sorted(seen) == sorted(WIDTHS)
    assert {measures["dark"] for measures in seen.values()} == {scheme == "dark"}
    return seen


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_works(seen: dict[int, dict[str, Any]], width: int) -> None:
    measures = seen[width]
    assert [name for name in measures["fetched"] if not name.startswith("data:")] == []
    assert measures["across"] <= width  # it does not scroll sideways
    assert measures["acrossEnlarged"] <= width
    assert len(measures["images"]) >= 30
    assert measures["empty"] == 0
    assert min(min(image[2:]) for image in measures["images"]) > 10  # strips can be seen
    assert measures["enlarged"][2] > 1.5 * measures["images"][0][2]
    assert max(measures["tall"]) < 150  # no column is squeezed to a word a line


@pytest.mark.parametrize("width", WIDTHS)
def test_text_can_be_read(seen: dict[int, dict[str, Any]], width: int) -> None:
    texts = seen[width]["texts"]
    assert len(texts) > 100
    assert [text["text"] for text in texts if text["contrast"] < 4.5] == []
    assert [text["text"] for text in texts if text["size"] < 12] == []


@pytest.mark.parametrize("width", WIDTHS)
def test_plots_can_be_read(seen: dict[int, dict[str, Any]], width: int) -> None:
    measures = seen[width]
    assert len(measures["plots"]) >= 3
    for left, _, wide, high in measures["plots"]:
        assert left >= 0
        assert left + wide <= width
        assert wide > 250
        assert high > 100
    in_plots = [text for text in measures["texts"] if text["plot"]]
    assert len(in_plots) > 20
    for text in in_plots:
        assert text["size"] >= 13
        assert text["box"][0] >= 0, text
        assert text["box"][0] + text["box"][2] <= width, text
    for ticks in measures["ticks"]:
        assert len(ticks) >= 2
        for (x, y, w, h), (x2, y2, w2, h2) in pairwise(ticks):
            assert x + w < x2 or x2 + w2 < x or y + h < y2 or y2 + h2 < y  # labels stand clear of each other


@pytest.mark.parametrize("width", WIDTHS)
def test_each_distilled_image_stands_below_its_start(seen: dict[int, dict[str, Any]], width: int) -> None:
    images = seen[width]["images"]
    for first in range(0, len(images), 3):
        strips = images[first : first + 3]
        assert len({(left, wide) for left, _, wide, _ in strips}) == 1
        tops = [top for _, top, _, _ in strips]
        assert tops == sorted(tops)
