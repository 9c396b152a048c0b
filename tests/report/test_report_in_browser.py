"""The report in headless Chromium on a phone, a laptop and paper, light and dark: layout, overlap, contrast, keys."""

import base64
import io
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_folders import make_reported_run, some_bench
from run_folders import make_place

from fedmerge.cli import main
from fedmerge.report.bench_tables import write_bench_tables

webdriver: Any = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Chromium or its chromedriver is not installed"),
]

SIZES = {
    "phone": (390, 844),
    "laptop": (1366, 768),
    "narrowest": (320, 640),  # WCAG 2.2 AA, 1.4.10: nothing but tables scrolls sideways
    "paper": (718, 1047),  # A4 within margins of a centimetre
}
LEGIBLE_PIXELS = 10.0
CONTRAST = 4.5  # text against its background, WCAG 2.2 AA

# Contrast of every text with the nearest opaque background. A canvas converts any CSS colour to red, green and blue.
CONTRASTS = """
const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
const known = new Map();
function rgba(colour) {
  if (!known.has(colour)) {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    known.set(colour, canvas.getImageData(0, 0, 1, 1).data);
  }
  return known.get(colour);
}
function luminance(colour) {
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const [red, green, blue] = [...rgba(colour)].map((c) => linear(c / 255));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}
const found = [];
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (texts.nextNode()) {
  const element = texts.currentNode.parentElement;
  if (!texts.currentNode.data.trim() || element.closest("script, title, .hidden")) continue;
  let ground = element;
  while (ground.parentElement && rgba(getComputedStyle(ground).backgroundColor)[3] < 255) ground = ground.parentElement;
  const style = getComputedStyle(element);
  const colour = element.closest("svg") ? style.fill : style.color;
  const pair = [luminance(colour), luminance(getComputedStyle(ground).backgroundColor)].sort((a, b) => b - a);
  found.push([(pair[0] + 0.05) / (pair[1] + 0.05), texts.currentNode.data.trim().slice(0, 40)]);
}
return found;
"""
# Pairs of visible texts whose boxes overlap by more than a pixel each way, and texts crossed by a line of a picture.
OVERLAPS = """
const clip = (rect, element) => {
  const box = element.closest(".scroll, pre")?.getBoundingClientRect();
  if (!box) return rect;
  const left = Math.max(rect.left, box.left), right = Math.min(rect.right, box.right);
  const top = Math.max(rect.top, box.top), bottom = Math.min(rect.bottom, box.bottom);
  return right > left && bottom > top ? new DOMRect(left, top, right - left, bottom - top) : null;
};
const texts = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || element.closest("script, title, .hidden")) continue;
  if (!element.checkVisibility()) continue;
  const range = document.createRange();
  range.selectNodeContents(walker.currentNode);
  for (const whole of range.getClientRects()) {
    const rect = whole.width > 1 ? clip(whole, element) : null;
    if (rect) texts.push({ rect, element, said: walker.currentNode.data.trim().slice(0, 40) });
  }
}
const found = [];
const apart = (a, b) =>
  a.right - 1 <= b.left || b.right - 1 <= a.left || a.bottom - 1 <= b.top || b.bottom - 1 <= a.top;
texts.sort((a, b) => a.rect.top - b.rect.top);
texts.forEach((one, place) => {
  for (const other of texts.slice(place + 1)) {
    if (other.rect.top >= one.rect.bottom) break;
    if (!apart(one.rect, other.rect)) found.push([one.said, other.said]);
  }
});
for (const picture of document.querySelectorAll("figure")) {
  const words = texts.filter((each) => picture.contains(each.element)).map((each) => [each.rect, each.said]);
  for (const line of picture.querySelectorAll("svg[role=img] line")) {
    const rect = line.getBoundingClientRect();
    const thick = new DOMRect(rect.left - 1.5, rect.top - 1.5, rect.width + 3, rect.height + 3);
    for (const [box, said] of words) if (!apart(thick, box)) found.push([`line.${line.getAttribute("class")}`, said]);
  }
  for (const line of picture.querySelectorAll("svg[role=img] path.line")) {
    const matrix = line.getScreenCTM();
    for (let step = 0; step <= 200; step += 1) {
      const at = line.getPointAtLength((line.getTotalLength() * step) / 200).matrixTransform(matrix);
      const dot = new DOMRect(at.x - 1, at.y - 1, 2, 2);
      for (const [box, said] of words) if (!apart(dot, box)) found.push(["curve", said]);
    }
  }
}
return found;
"""
PICTURES = """
return [...document.querySelectorAll("figure svg[role=img]")].map((picture) => {
  const { x, y, width, height } = picture.getBoundingClientRect();
  return { x: x + scrollX, y: y + scrollY, width, height, scale: picture.getScreenCTM().a };
});
"""


@dataclass
class Browser:
    """Chromium, and measurements of a page."""

    driver: Any

    def open(self, path: Path, size: str, scheme: str, medium: str = "screen") -> None:
        width, height = SIZES[size]
        phone = size in ("phone", "narrowest")
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.do("Emulation.setEmulatedMedia", media=medium, features=features)
        self.driver.get(path.as_uri())

    def do(self, command: str, **parameters: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, parameters)

    def ask(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def screenshot(self, height: float) -> Image.Image:
        """Return a screenshot of the whole page."""
        clip = {"x": 0, "y": 0, "width": self.ask("return innerWidth"), "height": height, "scale": 1}
        taken = self.do("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    os.environ["SE_AVOID_STATS"] = "true"  # no usage statistics
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield Browser(driver)
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of a run, a benchmark, a large one with long names and two datasets, and runs against each other."""
    place = make_place(tmp_path_factory.mktemp("place"))
    folders = {"run": make_reported_run(place, "shops-20260102-030405-abcd")}
    other = make_reported_run(place, "shops-20260103-030405-abcd", ["lora.rank=4"])
    strategies = (
        "backbone",
        "average",
        "task-arithmetic",
        "ties",
        "localize-and-stitch",
        "mergerec",
        "fedit",
        "flexlora",
    )
    domains = ("books", "Cell_Phones_and_Accessories", "Musical Instruments & more, with a long name")
    benches = {
        "bench": some_bench(),
        "large": some_bench((*strategies, "joint training"), domains, ("demo", "amazon3"), (0, 1), num_layers=24),
    }
    for name, tables in benches.items():
        folders[name] = tmp_path_factory.mktemp(name)
        write_bench_tables(folders[name], tables)
    for folder in folders.values():
        assert main(["report", str(folder)]) == 0
    assert main(["report", str(folders["run"]), str(other)]) == 0
    return {name: folder / "report.html" for name, folder in folders.items()} | {"against": other / "compared.html"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["phone", "laptop"])
@pytest.mark.parametrize("which", ["run", "bench", "large", "against"])
def test_the_page_fits_and_is_readable(
    browser: Browser, pages: dict[str, Path], which: str, size: str, scheme: str
) -> None:
    browser.open(pages[which], size, scheme)
    width = SIZES[size][0]
    assert browser.ask("return innerWidth") == width
    assert browser.ask("return matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    assert browser.ask("return performance.getEntriesByType('resource').length") == 0
    browser.ask("for (const details of document.querySelectorAll('details')) details.open = true")
    assert browser.ask("return document.documentElement.scrollWidth") <= width
    browser.ask("scrollTo(500, 0)")
    assert browser.ask("return scrollX") == 0
    outside = browser.ask(
        "return [...document.querySelectorAll('h1, h2, h3, p, figure, .scroll, pre, dl')]"
        ".filter((e) => e.getBoundingClientRect().right > innerWidth).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert outside == []

    assert browser.ask(OVERLAPS) == []

    contrasts = browser.ask(CONTRASTS)
    assert len(contrasts) > (100 if which == "against" else 300)
    assert [(contrast, text) for contrast, text in contrasts if contrast < CONTRAST] == []

    pictures = browser.ask(PICTURES)
    assert len(pictures) >= (2 if which == "against" else 9)
    page = np.asarray(browser.screenshot(max(box["y"] + box["height"] for box in pictures)))
    for box in pictures:
        assert box["width"] > 200
        assert box["height"] > 60
        assert 12 * box["scale"] >= LEGIBLE_PIXELS  # the font size
        x, y = int(box["x"]), int(box["y"])
        inside = page[y : y + int(box["height"]), x : x + int(box["width"])].reshape(-1, 3)
        ground = np.median(inside, axis=0)
        drawn = np.abs(inside - ground).max(axis=1) > 40
        assert 0.002 < drawn.mean() < 0.5
    brightness = page[:5, :5].mean()
    assert brightness > 200 if scheme == "light" else brightness < 60
    assert browser.driver.get_log("browser") == []


@pytest.mark.parametrize("which", ["run", "large"])
def test_the_page_fits_the_narrowest_screen(browser: Browser, pages: dict[str, Path], which: str) -> None:
    browser.open(pages[which], "narrowest", "dark")
    assert browser.ask("return document.documentElement.scrollWidth") <= SIZES["narrowest"][0]
    assert browser.ask(OVERLAPS) == []


@pytest.mark.parametrize("which", ["run", "large"])
def test_printed_it_is_light_and_nothing_is_cut(browser: Browser, pages: dict[str, Path], which: str) -> None:
    browser.open(pages[which], "paper", "dark", "print")
    assert browser.ask("return document.documentElement.scrollWidth") <= SIZES["paper"][0]
    grounds = browser.ask(
        "return ['body', 'section', 'td'].map((name) => getComputedStyle(document.querySelector(name)).backgroundColor)"
    )
    assert {*grounds} <= {"rgb(255, 255, 255)", "rgba(0, 0, 0, 0)"}
    assert browser.ask("return getComputedStyle(document.body).color") == "rgb(27, 32, 39)"
    cut = browser.ask(
        "return [...document.querySelectorAll('table, figure, p, pre')]"
        ".filter((e) => e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert cut == []
    assert browser.ask(OVERLAPS) == []
    kept = "return getComputedStyle(document.querySelector(arguments[0])).breakInside"
    assert [browser.ask(kept, what) for what in ("figure", "tr")] == ["avoid", "avoid"]
    printed = base64.b64decode(browser.do("Page.printToPDF", preferCSSPageSize=True)["data"])
    assert printed.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 40


def test_everything_is_reached_by_the_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"], "laptop", "light")
    expected = browser.ask(
        "return [...document.querySelectorAll('a, button, summary, [tabindex=\"0\"]')]"
        ".filter((e) => e.checkVisibility() && !(e.closest('details:not([open])') && e.tagName !== 'SUMMARY'))"
        ".map((e) => e.textContent.slice(0, 60))"
    )
    reached = []
    for _ in range(len(expected)):
        browser.driver.switch_to.active_element.send_keys("\ue004")  # the tab key
        said, outline = browser.ask(
            "const e = document.activeElement; return [e.textContent.slice(0, 60), getComputedStyle(e).outlineStyle]"
        )
        reached.append(said)
        assert outline == "solid", said
    assert reached == expected
    assert len(expected) > 20


def test_the_measure_of_overlap_finds_it(browser: Browser, tmp_path: Path) -> None:
    texts = "<p style='margin:0'>one</p><p style='margin:-12px 0 30px'>two</p>"
    line = "<line class='grid' x1='20' x2='20' y1='0' y2='60' stroke='red'/>"
    picture = f"<figure><svg role='img' width='300' height='60'><text x='10' y='20'>words</text>{line}</svg></figure>"
    (tmp_path / "page.html").write_text(f"<!doctype html>{texts}{picture}")
    browser.open(tmp_path / "page.html", "laptop", "light")
    assert browser.ask(OVERLAPS) == [["one", "two"], ["line.grid", "words"]]


@pytest.mark.parametrize("size", ["phone", "laptop"])
def test_tables_sort_by_click_and_by_key(browser: Browser, pages: dict[str, Path], size: str) -> None:
    browser.open(pages["run"], size, "light")
    table = browser.driver.find_element("css selector", "#d0-scores-table")
    headings = table.find_elements("css selector", "thead th")

    def column(number: int) -> list[str | None]:
        script = "return [...arguments[0].querySelectorAll('tbody tr')].map((row) => row.cells[arguments[1]])"
        script += ".map((cell) => cell.dataset.sort ?? null)"
        values: list[str | None] = browser.ask(script, table, number)
        return values

    def sorts() -> list[str]:
        return [heading.get_attribute("aria-sort") for heading in headings]

    assert sorts() == ["none"] * 5
    before = column(0)
    unseen = 3  # the expert has no score on that domain
    for direction in ("descending", "ascending"):
        headings[unseen].find_element("tag name", "button").click()
        assert sorts() == ["none", "none", "none", direction, "none"]
        *values, last = column(unseen)
        assert last is None
        numbers = [float(str(value)) for value in values]
        assert numbers == sorted(numbers, reverse=direction == "descending")
        assert len(set(numbers)) > 2
    button = headings[0].find_element("tag name", "button")
    browser.ask("arguments[0].focus()", button)
    button.send_keys("\ue007")  # the enter key
    assert sorts()[0] == "ascending"
    assert column(0) == sorted(before, key=str)
    assert column(0) != before
    assert browser.driver.get_log("browser") == []


def test_wide_tables_scroll_separately_with_visible_names(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["large"], "phone", "dark")
    box = browser.driver.find_element("css selector", "#d0-scores-table")
    assert browser.ask("return arguments[0].scrollWidth > arguments[0].clientWidth + 50", box)
    name = box.find_element("css selector", "tbody th")
    before = name.rect["x"]
    browser.ask("arguments[0].focus(); arguments[0].scrollLeft = 80", box)
    assert browser.ask("return document.activeElement === arguments[0]", box)
    assert browser.ask("return arguments[0].getBoundingClientRect().x", name) == pytest.approx(before, abs=1)
