"""The page of ``fedmerge serve --page`` in headless Chromium: layout, contrast, keys, hostile titles, the key."""

import time
from collections.abc import Iterator

import pytest
from browser import CONTRAST, CONTRASTS, IN_CHROMIUM, OVERLAPS, SIZES, Browser, chromium
from http_calls import DOMAIN, answering, shelf_of
from run_folders import make_place
from runs_with_heads import config_of, make_run_with_heads, train_head

from fedmerge.serving.http.page.models import with_models_beside
from fedmerge.serving.http.service import Service
from fedmerge.serving.http.shelf import ItemChange, Shelf

pytestmark = IN_CHROMIUM

HOSTILE = (
    '<img src=x onerror=alert(1)> & "quoted" <script>alert(2)</script> averyveryveryveryverylongwordwithoutanyspace'
)
TAB, ENTER = "\ue004", "\ue007"
# Pairs of controls whose boxes overlap, and controls of a size that a finger misses (WCAG 2.2 AA, 2.5.8).
CONTROLS = """
const seen = [...document.querySelectorAll("input, select, button, summary, h1, h2, h3")]
  .filter((each) => each.checkVisibility());
const name = (each) => (each.ariaLabel ?? each.textContent).slice(0, 40) || each.id;
const found = [];
seen.forEach((one, place) => {
  const a = one.getBoundingClientRect();
  if (["INPUT", "SELECT", "BUTTON"].includes(one.tagName) && a.height < 24) found.push([name(one), "small"]);
  for (const other of seen.slice(place + 1)) {
    const b = other.getBoundingClientRect();
    const beside = a.right - 1 <= b.left || b.right - 1 <= a.left;
    if (!beside && a.bottom - 1 > b.top && b.bottom - 1 > a.top) found.push([name(one), name(other)]);
  }
});
return found;
"""
REACHABLE = """
return [...document.querySelectorAll("input, select, button, summary")]
  .filter((each) => each.checkVisibility() && !each.disabled)
  .filter((each) => !(each.closest("details:not([open])") && each.tagName !== "SUMMARY"))
  .map((each) => each.id || each.ariaLabel || each.textContent);
"""
ACTIVE = """
const each = document.activeElement;
return [each.id || each.ariaLabel || each.textContent, getComputedStyle(each).outlineStyle];
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    place = make_place(tmp_path_factory.mktemp("place"))
    run = make_run_with_heads(place)
    train_head(place, run)

    def load(model: str | None, served: str | None) -> Shelf:
        shelf = shelf_of(place, run, served, popularity=False)
        config = config_of(run)
        return with_models_beside(shelf, place.domains / DOMAIN, config)

    found = Service(load, place.root / "items.jsonl", threads=2)
    found.change([ItemChange("hostile", {"title": HOSTILE}, None)])
    return found


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with answering(service, page=True) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


def wait_for(browser: Browser, condition: str) -> None:
    """Wait until a condition in JavaScript is true."""
    for _ in range(200):
        if browser.ask(f"return Boolean({condition})"):
            return
        time.sleep(0.05)
    raise TimeoutError(f"{condition}: {browser.ask('return document.body.innerText')}")


LISTS_ARE_THERE = (
    "document.querySelectorAll('#lists article').length === 4 && !document.querySelector('#lists').ariaBusy"
)


def click(browser: Browser, selector: str) -> None:
    browser.driver.find_element("css selector", selector).click()


def with_a_history(browser: Browser, address: str, size: str, scheme: str) -> None:
    """Open the page with an example, a hostile title, an item that is described, and what was found still shown."""
    browser.open(f"{address}/", size, scheme)
    wait_for(browser, "document.querySelector('#example').checkVisibility()")
    click(browser, "#example")
    wait_for(browser, LISTS_ARE_THERE)
    browser.driver.find_element("css selector", "#search").send_keys("IMG quoted")
    wait_for(browser, "document.querySelectorAll('#found button').length === 1")
    click(browser, "#found button")
    click(browser, "#describe summary")
    browser.driver.find_element("css selector", "#attributes input").send_keys("A red tent for two")
    click(browser, "#describe-form button")
    wait_for(browser, f"{LISTS_ARE_THERE} && document.querySelector('#lists').innerText.includes('describes another')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["phone", "laptop", "narrowest"])
def test_the_page_fits_and_is_readable(browser: Browser, address: str, size: str, scheme: str) -> None:
    with_a_history(browser, address, size, scheme)
    assert browser.ask("return matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    assert browser.ask("return document.documentElement.scrollWidth") <= SIZES[size][0]
    for state in ("true", "false"):
        browser.ask(f"for (const details of document.querySelectorAll('details')) details.open = {state}")
        assert browser.ask(OVERLAPS) == []
        assert browser.ask(CONTROLS) == []
    contrasts = browser.ask(CONTRASTS)
    assert len(contrasts) > 80
    assert [(contrast, text) for contrast, text in contrasts if contrast < CONTRAST] == []
    brightness = browser.ask("return getComputedStyle(document.body).backgroundColor")
    assert brightness == ("rgb(245, 246, 248)" if scheme == "light" else "rgb(14, 17, 22)")
    asked = browser.ask("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith(f"{address}/") for name in asked)
    assert browser.driver.get_log("browser") == []


def test_titles_are_text_and_never_markup(browser: Browser, address: str) -> None:
    with_a_history(browser, address, "laptop", "light")
    assert browser.ask("return document.querySelectorAll('img, script:not([src=\"/page.js\"]), iframe').length") == 0
    assert HOSTILE in browser.ask("return document.querySelector('#history').innerText")
    assert HOSTILE in browser.ask("return document.querySelector('#found').innerText")
    refused = (
        "try { document.body.innerHTML = '<b>x</b>'; return false } catch (error) { return error instanceof TypeError }"
    )
    assert browser.ask(refused)  # the policy refuses markup, whoever writes it
    browser.driver.get_log("browser")


def test_everything_is_reached_and_done_by_the_keyboard(browser: Browser, address: str) -> None:
    browser.open(f"{address}/", "laptop", "light")
    wait_for(browser, "document.querySelector('#search').checkVisibility()")

    def press(*keys: str) -> str:
        for key in keys:
            browser.driver.switch_to.active_element.send_keys(key)
        return str(browser.ask(ACTIVE)[0])

    assert press(TAB) == "search"
    press("e")
    wait_for(browser, "document.querySelectorAll('#found button').length >= 3")
    first = press(TAB)
    press(ENTER)
    second = press(TAB)
    press(ENTER)
    wait_for(browser, LISTS_ARE_THERE)
    assert first != second
    order = "return [...document.querySelectorAll('#history li > span')].map((each) => each.innerText)"
    before = browser.ask(order)
    browser.ask("document.querySelector('#history li:nth-child(2) button').focus()")
    press(ENTER)  # up
    assert browser.ask(order) == before[::-1]
    assert browser.ask(ACTIVE)[0].startswith("Move ")
    browser.ask("document.querySelector('#history li:nth-child(2) button:last-child').focus()")
    assert press(ENTER).startswith("Remove ")
    assert len(browser.ask(order)) == 1
    wait_for(browser, LISTS_ARE_THERE)
    browser.ask("document.activeElement.blur(); scrollTo(0, 0)")
    expected = browser.ask(REACHABLE)
    browser.ask("document.querySelector('#search').focus()")
    reached = [browser.ask(ACTIVE)[0]]
    for _ in expected[1:]:
        press(TAB)
        said, outline = browser.ask(ACTIVE)
        assert outline == "solid", said
        reached.append(said)
    assert reached == expected
    assert len(expected) > 30
    unnamed = "return [...document.querySelectorAll('input, select')].filter((each) => !each.labels.length).length"
    assert browser.ask(unnamed) == 0
    assert browser.driver.get_log("browser") == []


def test_an_item_of_a_list_is_added_and_the_focus_stays_there(browser: Browser, address: str) -> None:
    browser.open(f"{address}/", "laptop", "light")
    wait_for(browser, "document.querySelector('#example').checkVisibility()")
    click(browser, "#example")
    wait_for(browser, LISTS_ARE_THERE)
    title = browser.driver.find_element("css selector", "#lists article:nth-child(2) button").text
    browser.driver.find_element("css selector", "#lists article:nth-child(2) button").send_keys(ENTER)
    wait_for(browser, f"{LISTS_ARE_THERE} && document.querySelectorAll('#history li').length === 5")
    assert title in browser.driver.find_element("css selector", "#history li:last-child").text
    wait_for(browser, "document.querySelector('#lists article:nth-child(2)').contains(document.activeElement)")


def test_the_key_is_asked_for_and_kept_in_memory_alone(browser: Browser, service: Service) -> None:
    with answering(service, key="secret", page=True) as address:
        browser.open(f"{address}/", "phone", "light")
        wait_for(browser, "document.querySelector('#key').checkVisibility()")
        assert browser.driver.get_log("browser") == []  # nothing was asked without the key
        browser.driver.find_element("css selector", "#key").send_keys("wrong", ENTER)
        wait_for(browser, "document.querySelector('#problem').innerText.includes('does not accept this key')")
        assert browser.ask(OVERLAPS) == browser.ask(CONTROLS) == []
        assert [text for contrast, text in browser.ask(CONTRASTS) if contrast < CONTRAST] == []
        browser.driver.get_log("browser")  # Chromium itself reports the 401
        browser.driver.find_element("css selector", "#key").send_keys("secret", ENTER)
        wait_for(browser, "document.querySelector('#search').checkVisibility()")
        click(browser, "#example")
        wait_for(browser, LISTS_ARE_THERE)
        stored = (
            "return [localStorage.length, sessionStorage.length, document.cookie, document.querySelector('#key').value]"
        )
        assert browser.ask(stored) == [0, 0, "", ""]
        assert "secret" not in browser.ask("return location.href")
        assert browser.driver.get_log("browser") == []
        browser.driver.refresh()
        wait_for(browser, "document.querySelector('#key').checkVisibility()")


def test_a_server_that_is_gone_is_said(browser: Browser, service: Service) -> None:
    with answering(service, page=True) as address:
        browser.open(f"{address}/", "phone", "light")
        wait_for(browser, "document.querySelector('#example').checkVisibility()")
    click(browser, "#example")
    wait_for(browser, "document.querySelector('#problem').innerText.includes('does not answer')")
    browser.driver.get_log("browser")
