"""The report in headless Chromium on a phone, a laptop and paper, light and dark: layout, overlap, contrast, keys."""

import base64
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import CONTRAST, CONTRASTS, IN_CHROMIUM, OVERLAPS, SIZES, Browser, chromium
from report_folders import give_many_domains, make_reported_run, some_bench
from run_folders import make_place

from fedmerge.cli import main
from fedmerge.report.bench_tables import write_bench_tables

pytestmark = IN_CHROMIUM

LEGIBLE_PIXELS = 10.0
PICTURES = """
return [...document.querySelectorAll("figure svg[role=img]")].map((picture) => {
  const { x, y, width, height } = picture.getBoundingClientRect();
  return { x: x + scrollX, y: y + scrollY, width, height, scale: picture.getScreenCTM().a };
});
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of a run, a benchmark, a large one with long names and two datasets, and runs against each other."""
    place = make_place(tmp_path_factory.mktemp("place"))
    names = {"run": "shops-20260102-030405-abcd", "many": "shops-20260104-030405-abcd"}
    folders = {which: make_reported_run(place, name) for which, name in names.items()}
    give_many_domains(folders["many"], 300)
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
@pytest.mark.parametrize("which", ["run", "many", "bench", "large", "against"])
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
    assert len(pictures) >= {"against": 2, "many": 5}.get(which, 9)
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


def test_a_domain_is_found_by_a_part_of_its_name(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["many"], "laptop", "light")

    def find(part: str) -> tuple[list[list[str]], str]:
        """Type it by key presses; return the texts of the rows that are found, and what is said of them."""
        browser.ask("const field = document.getElementById('find'); field.value = ''; field.focus()")
        for key in part:
            browser.do("Input.insertText", text=key)
        rows = "return [...document.querySelectorAll('#found tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
        return browser.ask(rows), browser.ask("return document.getElementById('find-status').textContent").strip()

    rows, said = find("SHOP-27")
    assert [row[0] for row in rows] == ["shop-27", *(f"shop-27{i}" for i in range(10))]
    assert [row[2] for row in rows[:2]] == ["task-arithmetic 0.5", "task-arithmetic 0.5"]
    assert said == "11 of 300"
    rows, said = find("<b>")
    assert [row[0] for row in rows] == ["</script><b>shop"]
    rows, said = find("shop")
    assert (len(rows), said) == (20, "300 of 300, the first 20 are shown")
    assert find("nobody") == ([], "0 of 300")
