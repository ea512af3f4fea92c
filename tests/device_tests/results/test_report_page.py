"""The report's page: needs nothing from outside, runs nothing, and looks right in a real browser.

The browser tests need `chromium`; they are skipped without it, or fail where the environment has
POCKETDIFF_REQUIRE_CHROMIUM=1.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from device_tests.results import plots, report
from device_tests.results.planned import with_forecasts
from device_tests.results.summary import summarize
from export.families import read_shape
from export.plan.device import open_device
from export.plan.presets import read_config
from quantize.recipe import preset
from tests.support.browser import browse, measure
from tests.support.record_samples import FAILURE, HOSTILE, bench, hostile_bench, run

NARROW = 400
"""CSS pixels: less than most phones have."""

LOADING = {"script", "iframe", "object", "embed", "link", "base", "form", "img", "video", "audio"}


class Tags(HTMLParser):
    """Every tag of a page with its attributes, and the text outside of style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(records: list[dict]) -> str:
    return report.to_html(summarize(records))


@pytest.fixture(scope="module")
def page() -> str:
    """A bench with a failure, and one of a device without sensors, both with their forecast."""
    summary = summarize(
        [
            *bench(with_failure=True, puzzles=1),
            *bench(threads=4, has_sensors=False, bench_id="bench-2"),
        ]
    )
    shape = read_shape(read_config("diffusiongemma-26b-a4b")[1])
    planned = with_forecasts(summary, shape, preset("int4-g32"), open_device("oneplus-12"))
    return report.to_html(planned)


@pytest.fixture(scope="module")
def hostile_page() -> str:
    return page_of(hostile_bench())


def inert(page: str) -> None:
    """The page loads and runs nothing, as far as its tags tell."""
    tags = Tags(page)
    assert not LOADING & {tag for tag, _ in tags.found}
    for tag, attributes in tags.found:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, name)
        assert tag != "meta" or "refresh" not in str(attributes.get("http-equiv")).lower()
        assert "url(" not in (attributes.get("style") or "").replace("url(#", "")
    (policy,) = [a["content"] for _, a in tags.found if "http-equiv" in a]
    assert policy.startswith("default-src 'none'") and "script" not in policy


def test_the_page_loads_and_runs_nothing(page, hostile_page):
    inert(page)
    inert(hostile_page)
    assert "@import" not in page and "http:" not in re.sub(r"http://www\.w3\.org/\S+", "", page)


def test_hostile_text_is_only_text(page, hostile_page):
    hostile, tame = Tags(hostile_page), Tags(page)
    assert {tag for tag, _ in hostile.found} <= {tag for tag, _ in tame.found}
    assert "<script>top.hostile=1</script>" in hostile.text, "shown as what it is"
    assert "{{7*7}}" in hostile.text, "no template of its own"
    assert HOSTILE not in hostile.text and "\x1b" not in hostile_page
    assert "\u202e" not in hostile_page


def test_the_same_records_make_the_same_page(hostile_page):
    assert page_of(hostile_bench()) == hostile_page


def test_no_two_plots_share_an_identifier(page):
    identifiers = [a["id"] for _, a in Tags(page).found if a.get("id")]
    assert len(identifiers) == len(set(identifiers))
    for used in re.findall(r"url\(#([^)]*)\)|href=\"#([^\"]*)\"", page):
        assert "".join(used) in identifiers


def test_the_page_says_what_is_missing_instead_of_an_empty_plot(page):
    assert "This device shows neither temperatures nor clocks to the shell." in page
    assert page.count('role="img"') == 2 * len(plots.PLOTS) - 1


def test_the_page_explains_every_number_and_lists_every_run(page):
    text = " ".join(Tags(page).text.split())
    records = bench(with_failure=True, puzzles=1)
    (group,) = summarize(records).groups
    for found in group.quantities:
        assert found.metric.formula in text
        for repeat in found.repeats:
            assert found.show(repeat.value) in text
    for leaf, shown in group.conditions:
        assert shown in text, leaf
    assert FAILURE["sentence"] in text and "evidence: exit_code 137" in text


@pytest.mark.parametrize("records", [[], [run("speed", failure=FAILURE, has_sensors=False)]])
def test_little_or_nothing_makes_a_page_too(records):
    page = page_of(records)
    inert(page)
    assert f"{len(records)} run" in page


def test_many_long_repeats_make_no_page_of_megabytes():
    page = page_of(bench(speed=30, steps=40, canvases=4))
    assert page.count("<use") < 10 * plots.MAXIMUM_POINTS
    assert len(page) < 1_500_000
    assert "One step in 4 of every repeat" in page


def test_benches_put_together_number_their_runs():
    drawn = plots.draw_all([*bench(), *bench(bench_id="bench-2", seed=1)], "p")
    steps = next(plot for plot in drawn if plot.name == "step-spread")
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", str(steps.svg))
    assert {str(number) for number in range(1, 11)} <= set(labels) and "run" in labels


def test_colours_of_plots_are_the_style_sheets(page):
    style = (Path(report.__file__).parent / "report.css").read_text(encoding="utf-8")
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert not re.search(r"(fill|stroke): ?#", svg), "a colour that would not follow the theme"
        for variable in re.findall(r"var\((--[a-z0-9-]+)\)", svg):
            assert f"{variable}:" in style


# In a real browser


@pytest.mark.parametrize("width", [NARROW, 1200])
def test_nothing_is_wider_than_the_screen_and_every_plot_is_whole(chromium, tmp_path, page, width):
    found = measure(chromium, tmp_path, page, width)
    assert found["title"].startswith("Benchmark: 24 runs")
    assert found["viewport"] == width
    assert found["wide"] <= width and found["beyond"] == []
    assert len(found["plots"]) == 2 * len(plots.PLOTS) - 1
    for plot in found["plots"]:
        left, top, right, bottom = plot["box"]
        assert right - left > 300 and bottom - top > 150, plot["name"]
        assert plot["marks"] > 20, plot["name"]
        assert plot["cut"] == [], plot["name"]
        assert plot["text_px"] >= 9, plot["name"]


def test_hostile_text_is_inert_in_the_browser(chromium, tmp_path, hostile_page):
    found = measure(chromium, tmp_path, hostile_page, NARROW)
    assert (found["scripts"], found["images"], found["hostile"]) == (0, 0, "undefined")
    assert found["wide"] <= NARROW and found["beyond"] == []
    assert all(plot["cut"] == [] for plot in found["plots"])


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)` (WCAG 2.1)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("scheme", "is_dark"), [(0, True), (1, False)])
def test_light_and_dark_have_contrast_in_text_and_plots(chromium, tmp_path, page, scheme, is_dark):
    option = f"--blink-settings=preferredColorScheme={scheme}"
    found = measure(chromium, tmp_path, page, 1200, option)
    paper = luminance(found["paper"])
    assert (paper < 0.2) is is_dark
    for ink in [found["ink"], *(plot["ink"] for plot in found["plots"])]:
        light, dark = sorted((paper, luminance(ink)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, "the least that WCAG AA asks for text"


def test_the_plots_are_painted(chromium, tmp_path, page):
    boxes = [plot["box"] for plot in measure(chromium, tmp_path, page, NARROW)["plots"][:6]]
    height = int(max(box[3] for box in boxes)) + 20
    picture = tmp_path / "picture.png"
    size = f"--window-size={NARROW + 200},{height}"
    browse(chromium, tmp_path, page, NARROW, height, f"--screenshot={picture}", size)
    with Image.open(picture) as image:
        for left, top, right, bottom in boxes:
            part = image.convert("RGB").crop((int(left), int(top), int(right), int(bottom)))
            colours = part.getcolors(maxcolors=1 << 20) or []
            most = max(count for count, _ in colours) / (part.width * part.height)
            assert len(colours) > 50 and 0.5 < most < 0.99, "lines and text on paper"
