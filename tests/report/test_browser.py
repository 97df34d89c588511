"""The report in a real browser: what a person sees when they point, click, and turn their phone."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayrl.config import Config, from_dict
from rayrl.report.page import Phase, Report, render
from rayrl.report.statistics import Share, Split
from rayrl.report.table import Cell, Result
from rayrl.run.metrics import timeline_row
from rayrl.types import Episode, Group, Task

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium here: install it, or let CHROMIUM say where it is"
)

WIDE, NARROW = 1280, 400
STEPS = {"sft": range(60), "rl1": range(100, 130)}
GAP = range(10, 30)  # of sft
ALONE = 20  # has a value between two gaps
VALUES = {
    "zero": 0.0,
    "tiny": 2e-7,
    "share": 0.25,
    "tens": 37.5,
    "thousands": 25_000.0,
    "millions": -3.2e6,
}
# of a text and of what is under it, 0 to 255
BRIGHTNESS = """node => {
    const pen = document.createElement('canvas').getContext('2d');
    const brightness = (color) => {
        pen.fillStyle = color;
        pen.fillRect(0, 0, 1, 1);
        const [red, green, blue] = pen.getImageData(0, 0, 1, 1).data;
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    };
    const clear = (one) => getComputedStyle(one).backgroundColor === 'rgba(0, 0, 0, 0)';
    let under = node;
    while (clear(under)) under = under.parentElement;
    return [getComputedStyle(node).color, getComputedStyle(under).backgroundColor].map(brightness);
}"""
# Keeps what is written on each canvas, with its place in pixels.
NOTE_LABELS = """(() => {
    const pen = CanvasRenderingContext2D.prototype;
    const { clearRect, fillText } = pen;
    pen.clearRect = function (...box) {
        this.canvas.labels = [];
        return clearRect.apply(this, box);
    };
    pen.fillText = function (text, x, y) {
        const width = this.measureText(text).width;
        const share = { left: 0, start: 0, center: 0.5, right: 1, end: 1 }[this.textAlign];
        const left = this.getTransform().transformPoint({ x, y }).x - share * width;
        const { textAlign: align, fillStyle: color } = this;
        this.canvas.labels.push({ text, align, left, right: left + width, color });
        return fillText.call(this, text, x, y);
    };
})()"""
LABELS = """() => [...document.querySelectorAll('.chart canvas')].flatMap(canvas =>
    canvas.labels.map(label => ({ ...label, room: canvas.width, title: canvas.ariaLabel })))"""
# of a chart: the coloured pixels (not grey) of its plot at a share of its width, from top to bottom
COLORED = """(chart, share) => {
    const canvas = chart.querySelector('canvas');
    const [plot, whole] = [chart.querySelector('.u-over'), canvas].map(
        node => node.getBoundingClientRect());
    const x = Math.round(plot.left - whole.left + share * plot.width), y = plot.top - whole.top;
    const { data } = canvas.getContext('2d').getImageData(x - 1, y, 3, plot.height);
    const pixels = Array.from(
        { length: data.length / 4 }, (_, i) => [...data.slice(4 * i, 4 * i + 4)]);
    return pixels.filter(
        ([r, g, b, alpha]) => alpha > 100 && Math.max(r, g, b) - Math.min(r, g, b) > 40);
}"""
DRAWN = """() => [...document.querySelectorAll('.chart')].every(
    chart => !chart.checkVisibility() || chart.querySelector('canvas')?.labels?.length)"""
ALARM = "alarm entropy_floor: the entropy is 0.001. Raise sampling.temperature."


def phase(name: str, steps: range) -> Phase:
    metrics = [
        {"step": step, "reward": step / 100, **{k: v * (1 + step / 50) for k, v in VALUES.items()}}
        for step in steps
    ]
    if name == "sft":
        for row in metrics:
            row["close"] = 5e-7 + 1e-10 * row["step"]
            row["gappy"] = math.nan if row["step"] in GAP and row["step"] != ALONE else row["step"]
    alarms = [{"step": steps[7], "text": ALARM}] if name == "rl1" else []
    episode = Episode("e", "game", Task(), 0, (), {"agent": {"win": 1.0}}, {"agent": 1.0})
    times = [
        timeline_row(step, [("collect", 10.0 * step, 10.0 * step + 4)], [Group("g", Task(), ())])
        for step in steps[:3]
    ]
    return Phase(name, "train", Config(), metrics, [episode], "step 1", times, alarms)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    figures = {
        "win/draw/loss": Split({"win": 5, "draw": 3, "loss": 2}, 10),
        **{f"share number {k}": Share(k, 10) for k in range(5)},
    }
    cells = {name: Cell({}, 10, 0, figures) for name in ("random", "optimal")}
    results = [Result("base", cells), Result("rl1", cells)]
    phases = [phase(name, steps) for name, steps in STEPS.items()]
    long = from_dict({"env": {"name": "x" * 90, "args": {"a": "some words " * 20}}})
    phases.append(Phase("long", "train", long))
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(render(Report("title", "folder", phases, results)))
    return file


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, page_file: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The report, wide and light unless the test's parameters say otherwise."""
    width, scheme = getattr(request, "param", (WIDE, "light"))
    one = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    wrong: list[str] = []
    one.on("pageerror", lambda error: wrong.append(str(error)))
    one.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    one.add_init_script(NOTE_LABELS)
    one.goto(page_file.as_uri())
    one.wait_for_function(DRAWN)
    yield one
    assert wrong == []
    one.close()


def open_more(page: Any) -> None:
    page.locator("details.more > summary").first.click()
    page.wait_for_function(DRAWN)
    assert page.locator(".chart canvas").count() > len(VALUES)


def share(name: str, step: float) -> float:
    """Where a step is in a chart of both phases, as a share of the chart's width."""
    (sft, rl1), gap = STEPS.values(), 2  # 2% of 59 + 29 steps, rounded up
    whole = sft[-1] + gap + rl1[-1] - rl1[0]
    return (step if name == "sft" else sft[-1] + gap + step - rl1[0]) / whole


def point_at(page: Any, name: str, step: float) -> str:
    """Point at a step of the first chart; return what the tip says."""
    box = page.locator(".chart .u-over").first.bounding_box()
    page.mouse.move(box["x"] + (box["width"] - 1) * share(name, step), box["y"] + 20)
    return str(page.inner_text("#tip"))


def test_pointing_at_a_curve_says_the_step_that_is_there(page: Any) -> None:
    open_more(page)
    page.locator(".chart").first.scroll_into_view_if_needed()
    for name, steps in STEPS.items():
        for step in (*steps[::7], steps[-1]):
            said = re.fullmatch(
                r"(\w+) · step (\d+) · (\S+) · mean (\S+)( · alarm)?", point_at(page, name, step)
            )
            assert said
            assert said[1] == name
            assert int(said[2]) == step
            assert float(said[3]) == pytest.approx(step / 100, rel=0.01)
            assert float(said[4]) <= float(said[3]) + 0.01, "the mean is behind"
    step = STEPS["rl1"][-1]
    hairs = page.locator(".chart .u-cursor-x:not(.u-off)")
    figures = page.locator(".chart .now").all_text_contents()
    both = [figure for figure in figures if figure.startswith(f"step {step} · ")]
    assert hairs.count() == len(both) == 1 + len(VALUES), "and the other charts of it follow"
    page.mouse.move(0, 0)
    assert page.locator("#tip").evaluate("tip => tip.style.opacity") == "0"


def test_evaluations_are_shown_as_they_are_and_metrics_of_parts_by_their_names(
    browser: Any, tmp_path: Path
) -> None:
    """Four lost lines, then two, then none: a running mean would end with some."""
    lost = {"eval/unbeatable/losing": (4, 2, 0), "eval/win/gain": (0.0, 0.1, 0.3)}
    metrics = [
        {"step": step, "groups/a/zero_variance_share": 0.5, **{k: v[step] for k, v in lost.items()}}
        for step in range(3)
    ]
    file = tmp_path / "report.html"
    file.write_text(render(Report("title", "folder", [Phase("rl", "train", Config(), metrics)])))
    page = browser.new_page()
    page.add_init_script(NOTE_LABELS)
    page.goto(file.as_uri())
    page.locator("details.more > summary").click()
    page.wait_for_function(DRAWN)
    shown = {
        chart.locator("h3").inner_text(): chart.locator(".now").inner_text()
        for chart in page.locator(".chart").all()
    }
    assert shown == {
        "Zero-variance groups: a": "0.5",
        "Evaluation: unbeatable/losing": "0",
        "Gain: win": "0.3",
    }
    page.locator(".chart .u-over").nth(1).hover()
    assert page.inner_text("#tip") == "rl · step 1 · 2"
    page.close()


@pytest.mark.parametrize("page", [(WIDE, "light"), (NARROW, "light")], indirect=True)
def test_no_label_of_a_chart_is_cut(page: Any) -> None:
    open_more(page)
    labels = page.evaluate(LABELS)
    assert [one for one in labels if one["left"] < 0 or one["right"] > one["room"]] == []
    texts = {one["text"] for one in labels}
    assert {"20,000", "-1.0e7", "sft", "rl1"} <= texts
    assert not {text for text in texts if re.search("NaN|undefined|null", text)}
    for title in {one["title"] for one in labels}:
        up = [one["text"] for one in labels if one["title"] == title and one["align"] == "right"]
        assert len(set(up)) == len(up) > 1, title
        assert title != "zero" or up[-1] == "1"


@pytest.mark.parametrize("page", [(NARROW, "light"), (320, "light")], indirect=True)
def test_on_a_telephone_nothing_is_out_of_sight(page: Any) -> None:
    width = page.viewport_size["width"]
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    for cell in page.locator("table td:visible, table th:visible").all():
        box = cell.bounding_box()
        assert box["x"] >= 0, cell.inner_text()
        assert box["x"] + box["width"] <= width, cell.inner_text()
    first = page.locator("table.results td").first
    label = first.evaluate("td => getComputedStyle(td, '::before').content")
    assert label == '"random · win/draw/loss"', "without its heading a figure says nothing"


def test_alarms_are_listed_and_marked(page: Any) -> None:
    assert ALARM in page.inner_text("#alarms")
    assert f"rl1 · step {STEPS['rl1'][7]}" in page.inner_text("#alarms")
    page.locator(".chart").first.scroll_into_view_if_needed()
    points = [("sft", 7), *(("rl1", step) for step in range(105, 110))]
    assert [at for at in points if point_at(page, *at).endswith(" · alarm")] == [("rl1", 107)]
    page.mouse.move(0, 0)
    is_red = {}
    for step in (107, 115):
        pixels = page.locator(".chart").first.evaluate(COLORED, share("rl1", step))
        is_red[step] = any(abs(green - blue) < 25 < red - green for red, green, blue, _ in pixels)
    assert is_red == {107: True, 115: False}


def test_a_legend_names_the_phases_and_hides_one(page: Any) -> None:
    chart = page.locator(".chart").first
    names = chart.locator(".u-legend .u-label:visible")
    assert names.all_text_contents() == ["sft", "rl1", "alarm"]

    def inked() -> list[bool]:
        return [bool(chart.evaluate(COLORED, share(*at))) for at in (("sft", 40), ("rl1", 120))]

    assert inked() == [True, True]
    names.first.click()
    page.wait_for_function("document.querySelector('.u-legend .u-off')")
    assert inked() == [False, True]
    names.first.click()
    assert inked() == [True, True]


def test_dragging_zooms_all_charts_and_a_double_click_shows_all(page: Any) -> None:
    plot = page.locator(".chart .u-over").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    ends = [box["x"] + 2, box["x"] + box["width"] - 2]

    def seen() -> list[str]:
        said = []
        for x in ends:
            page.mouse.move(x, box["y"] + 20)
            said.append(" ".join(page.inner_text("#tip").split()[:4]))
        return said

    whole = ["sft · step 0", "rl1 · step 129"]
    assert seen() == whole
    point_at(page, "sft", 19.6)
    page.mouse.down()
    point_at(page, "sft", 30)
    point_at(page, "sft", 40.4)
    page.mouse.up()
    assert "step 29" in page.inner_text("#tip"), "what the pointer is over now"
    assert seen() == ["sft · step 20", "sft · step 40"]
    assert {one["text"] for one in page.evaluate(LABELS)} >= {"20", "30", "40"}
    page.mouse.dblclick(box["x"] + 50, box["y"] + 20)
    assert seen() == whole


def test_missing_values_are_gaps_and_a_lone_value_is_a_point(page: Any) -> None:
    open_more(page)
    chart = page.locator(".chart", has_text="gappy")
    drawn = {
        step: bool(chart.evaluate(COLORED, step / STEPS["sft"][-1]))
        for step in (5, 15, ALONE, 25, 40)
    }
    assert drawn == {5: True, 15: False, ALONE: True, 25: False, 40: True}


def test_a_finger_can_point_too(browser: Any, page_file: Path) -> None:
    context = browser.new_context(viewport={"width": NARROW, "height": 900}, has_touch=True)
    page = context.new_page()
    page.goto(page_file.as_uri())
    plot = page.locator(".chart .u-over").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] * share("rl1", 120), box["y"] + 40)
    assert page.inner_text("#tip").startswith("rl1 · step 120 · 1.2 · ")
    device = context.new_cdp_session(page)

    def touch(kind: str, *steps: int) -> None:
        points = [
            {"x": box["x"] + box["width"] * share("sft", step), "y": box["y"] + 40}
            for step in steps
        ]
        device.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    tip = "document.getElementById('tip')"
    touch("touchStart", 10)
    for step in (20, 30, 40):
        touch("touchMove", step)
        page.wait_for_function(f"() => {tip}.textContent.includes(' {step} ')")
    touch("touchEnd")
    page.wait_for_function(f"() => {tip}.style.opacity === '0'")
    context.close()


@pytest.mark.parametrize("page", [(WIDE, "dark")], indirect=True)
def test_in_the_dark_it_is_dark(page: Any) -> None:
    for selector in ("body", ".card", ".tile, h1", "td"):
        ink, paper = page.locator(selector).first.evaluate(BRIGHTNESS)
        assert ink > 150 > 80 > paper, selector
    assert {one["color"] for one in page.evaluate(LABELS)} == {"#a09d97"}
    page.emulate_media(color_scheme="light")
    page.wait_for_function(f"() => ({LABELS})().every(label => label.color === '#6d6a64')")


def test_the_slider_shows_another_step(page: Any) -> None:
    timeline = page.locator(".timeline").first
    assert timeline.locator(".now").inner_text() == "step 2"
    timeline.locator("input").fill("0")
    assert timeline.locator(".now").inner_text() == "step 0"
    assert timeline.locator("svg title").first.text_content() == "Timeline of step 0"
