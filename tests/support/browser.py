"""Headless Chromium, and measurements of a page in it: layout, overlap, contrast."""

import base64
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

webdriver: Any = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

IN_CHROMIUM = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Chromium or its chromedriver is not installed"),
]

SIZES = {
    "phone": (390, 844),
    "laptop": (1366, 768),
    "narrowest": (320, 640),  # WCAG 2.2 AA, 1.4.10: nothing but tables scrolls sideways
    "paper": (718, 1047),  # A4 within margins of a centimetre
}
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


@dataclass
class Browser:
    """Chromium, and measurements of a page."""

    driver: Any

    def open(self, page: Path | str, size: str, scheme: str, medium: str = "screen") -> None:
        """Open a file or an address."""
        width, height = SIZES[size]
        phone = size in ("phone", "narrowest")
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.do("Emulation.setEmulatedMedia", media=medium, features=features)
        self.driver.get(page if isinstance(page, str) else page.as_uri())

    def do(self, command: str, **parameters: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, parameters)

    def ask(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def screenshot(self, height: float) -> Image.Image:
        """Return a screenshot of the whole page."""
        clip = {"x": 0, "y": 0, "width": self.ask("return innerWidth"), "height": height, "scale": 1}
        taken = self.do("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start a browser, and end it."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    os.environ["SE_AVOID_STATS"] = "true"  # no usage statistics
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
