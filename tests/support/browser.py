"""A page opened in headless Chromium: its layout measured, its picture taken.

Skips without `chromium`, or fails where the environment has POCKETDIFF_REQUIRE_CHROMIUM=1.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

MEASURE = """
<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">
<iframe id="page" style="border:0;width:%(width)dpx;height:%(height)dpx" srcdoc="%(page)s"></iframe>
<pre id="measured"></pre>
<script>
const frame = document.getElementById("page");
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement;
  const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  const inside = (a, b) => a[0] >= b[0] - 1 && a[1] >= b[1] - 1 && a[2] <= b[2] + 1 && a[3] <= b[3] + 1;
  const clipped = e => { for (let p = e; p !== page.body; p = p.parentElement)
    if (p.tagName === "svg" || p.tagName === "DETAILS" && !p.open) return true; return false; };
  const style = e => frame.contentWindow.getComputedStyle(e);
  document.getElementById("measured").textContent = JSON.stringify({
    viewport: root.clientWidth, wide: root.scrollWidth, high: root.scrollHeight,
    beyond: [...page.body.querySelectorAll("*")].filter(e => !clipped(e) && box(e)[2] > %(width)d + 0.5)
      .map(e => e.tagName + "." + e.className),
    plots: [...page.querySelectorAll("figure svg")].map(svg => ({
      name: svg.closest("figure").dataset.plot, box: box(svg),
      marks: [...svg.querySelectorAll("path, use")].filter(e => {
        const r = e.getBoundingClientRect(); return r.width + r.height > 0; }).length,
      cut: [...svg.querySelectorAll("text")].filter(e => !inside(box(e), box(svg)))
        .map(e => e.textContent),
      text_px: Math.min(...[...svg.querySelectorAll("text")].map(e => e.getBoundingClientRect().height)),
      ink: style(svg.querySelector("text")).fill,
    })),
    scripts: page.scripts.length, images: page.images.length, title: page.title,
    hostile: typeof window.hostile,
    ink: style(page.body).color, paper: style(page.body).backgroundColor,
  });
};
</script>
"""  # noqa: E501


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        if os.environ.get("POCKETDIFF_REQUIRE_CHROMIUM") == "1":
            pytest.fail("chromium is required by POCKETDIFF_REQUIRE_CHROMIUM and not installed")
        pytest.skip("chromium is not installed; install it to look at the page")
    return found


def browse(chromium: str, folder: Path, page: str, width: int, height: int, *options: str) -> str:
    """The page in a frame of `width`, as the DOM that came of it; `options` to chromium."""
    wrapper = folder / "wrapper.html"
    wrapper.write_text(
        MEASURE % {"width": width, "height": height, "page": html.escape(page)}, encoding="utf-8"
    )
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=10000", *options, wrapper.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=120, check=True, cwd=folder)
    return done.stdout.decode("utf-8")


def measure(chromium: str, folder: Path, page: str, width: int, *options: str) -> dict[str, Any]:
    dom = browse(chromium, folder, page, width, 2000, "--dump-dom", *options)
    (measured,) = re.findall(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)
    return json.loads(html.unescape(measured))
