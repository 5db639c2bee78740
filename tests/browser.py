"""Pages in a real browser: what they do when somebody uses them, on a desktop, on a phone, in the dark."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from tests.test_report import BROWSERS

PHONE_PX = 390
DARK = "--blink-settings=preferredColorScheme=0"

# Runs in the page once its figures are drawn; what `use` returns is told to the page around it.
_DRIVER = """
<script>
{
  const wait = ms => new Promise(done => setTimeout(done, ms));
  const click = element => { element.click(); return wait(150); };
  const change = (element, value, event = "change") => {
    element.value = value;
    element.dispatchEvent(new Event(event, { bubbles: true }));
    return wait(400);
  };
  const drawn = id => document.getElementById(id).data;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const scrolling = ".box, .scroll, pre, select";
  const wider = () => all("body *").filter(each => !each.closest(scrolling) || each.matches(scrolling))
    .filter(each => each.getBoundingClientRect().right > innerWidth + 0.5).map(each => each.outerHTML.slice(0, 80));
  const pixel = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const paint = colours => {
    pixel.globalCompositeOperation = "source-over";
    for (const colour of ["#fff", ...colours]) { pixel.fillStyle = colour; pixel.fillRect(0, 0, 1, 1); }
    return [...pixel.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = colour => colour.map(part => part / 255)
    .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
  // The least of all ratios of WCAG 2 between texts and what is behind them, and where it is.
  const contrast = selector => {
    let least = [99, ""];
    for (const each of all(selector)) {
      const own = [...each.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
      if (!own || !each.getClientRects().length) continue;
      const behind = [];
      for (let up = each; up; up = up.parentElement) behind.unshift(getComputedStyle(up).backgroundColor);
      const ink = each.ownerSVGElement ? getComputedStyle(each).fill : getComputedStyle(each).color;
      const [one, other] = [light(paint(behind)), light(paint([...behind, ink]))].sort((a, b) => b - a);
      const ratio = (one + 0.05) / (other + 0.05);
      if (ratio < least[0]) least = [ratio, each.outerHTML.slice(0, 120)];
    }
    return least;
  };
  const errors = [];
  const { error } = console;
  console.error = (...words) => { errors.push(words.join(" ")); error(...words); };
  const use = async () => { USE };
  (async () => {
    const { dataset } = document.documentElement;
    for (let tries = 0; tries < 100 && !(READY) && !dataset.error; tries++) await wait(50);
    let found = null, problem = null;
    try { found = await use(); } catch (thrown) { problem = String(thrown); }
    parent.postMessage({ page: NUMBER, found, problem, errors, error: dataset.error ?? null }, "*");
  })();
}
</script>
"""
_FRAMES = """<!DOCTYPE html><title>pages</title><body style="margin:0">FRAMES<script>
const told = [];
addEventListener("message", ({ data }) => {
  told.push(data);
  document.documentElement.dataset.told = JSON.stringify(told);
});
</script>"""
_READY = "dataset.explored || (dataset.rendered && !document.getElementById('explored'))"


def use(
    folder: Path, pages: dict[Path, str], *arguments: str, width: int = 1200, ready: str = _READY
) -> list[dict[str, Any]]:
    """What comes of running a script in each page, side by side in one browser: the body of an async function.

    There is `wait(ms)`, `click(element)`, `change(element, value)`, `all(selector)`, `drawn(id)` (a figure's traces),
    `wider()` (elements that reach beyond the window) and `contrast(selector)`. A page must not log an error, nor ask
    for anything from outside.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser found: looked for {', '.join(BROWSERS)}")
    frames = []
    for number, (page, script) in enumerate(pages.items()):
        driver = _DRIVER.replace("NUMBER", str(number)).replace("READY", ready).replace("USE", script)
        copy = folder / f"driven-{number}.html"
        copy.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{driver}</body>"), encoding="utf-8")
        frames.append(f'<iframe src="{copy.as_uri()}" width="{width}" height="2400" style="border:0"></iframe>')
    around = folder / "pages.html"
    around.write_text(_FRAMES.replace("FRAMES", "".join(frames)), encoding="utf-8")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        f"--user-data-dir={folder / 'browser'}", "--virtual-time-budget=8000", "--enable-logging=stderr",
        f"--window-size={max(width, 600)},2400", *arguments, "--dump-dom", around.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    logged = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not logged, logged
    told = re.search(r'data-told="([^"]*)"', done.stdout)
    assert told is not None, "no page answered"
    answers: list[dict[str, Any]] = sorted(json.loads(unescape(told[1])), key=lambda answer: int(answer["page"]))
    assert [answer["page"] for answer in answers] == list(range(len(pages)))
    for answer in answers:
        assert answer["errors"] == [] and answer["error"] is None, answer
        assert answer["problem"] is None, answer["problem"]
    return answers
