"""The report in a real browser: what a person sees when they point, click, and turn their phone."""

from __future__ import annotations

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
VALUES = {"tiny": 2e-7, "share": 0.25, "tens": 37.5, "thousands": 25_000.0, "millions": -3.2e6}
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
ALARM = "alarm entropy_floor: the entropy is 0.001. Raise sampling.temperature."


def phase(name: str, steps: range) -> Phase:
    metrics = [
        {"step": step, "reward": step / 100, **{k: v * (1 + step / 50) for k, v in VALUES.items()}}
        for step in steps
    ]
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
    one.goto(page_file.as_uri())
    yield one
    assert wrong == []
    one.close()


def test_pointing_at_a_curve_says_the_step_that_is_there(page: Any) -> None:
    svg = page.locator(".chart svg").first
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    said = []
    for k in range(60, 100):
        page.mouse.move(box["x"] + box["width"] * k / 100, box["y"] + box["height"] / 2)
        phase_name, step = re.match(r"(\w+) · step (\d+) ·", page.inner_text("#tip")).groups()
        assert int(step) in STEPS[phase_name]
        said.append((list(STEPS).index(phase_name), int(step)))
    assert said == sorted(said), "further right is later"
    assert len(set(said)) > 25, "a phase has many steps, not one"
    assert said[-1] == (1, STEPS["rl1"][-1])
    hairs = page.eval_on_selector_all(".chart .hair", "all => all.map(h => h.getAttribute('x1'))")
    assert all(float(x) > 0 for x in hairs[:2]), "and the other charts follow"


@pytest.mark.parametrize("page", [(WIDE, "light"), (NARROW, "light")], indirect=True)
def test_no_label_of_a_chart_is_cut(page: Any) -> None:
    page.locator("details.more > summary").first.click()
    page.wait_for_function("document.querySelectorAll('details.more .chart svg').length > 3")
    outside = page.evaluate(
        """() => [...document.querySelectorAll('.chart svg text')].filter(text => {
            const own = text.getBoundingClientRect();
            const all = text.ownerSVGElement.getBoundingClientRect();
            return own.left < all.left - 0.5 || own.right > all.right + 0.5;
        }).map(text => text.textContent)"""
    )
    assert outside == []
    labels = page.locator(".chart svg text").all_text_contents()
    assert "25,000" in labels


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
    marks = page.locator(".chart").first.locator(".alarm title")
    assert marks.all_text_contents() == [f"rl1 · step {STEPS['rl1'][7]} · alarm"]


@pytest.mark.parametrize("page", [(WIDE, "dark")], indirect=True)
def test_in_the_dark_it_is_dark(page: Any) -> None:
    for selector in ("body", ".card", ".tile, h1", "td"):
        ink, paper = page.locator(selector).first.evaluate(BRIGHTNESS)
        assert ink > 150 > 80 > paper, selector


def test_the_slider_shows_another_step(page: Any) -> None:
    timeline = page.locator(".timeline").first
    assert timeline.locator(".now").inner_text() == "step 2"
    timeline.locator("input").fill("0")
    assert timeline.locator(".now").inner_text() == "step 0"
    assert timeline.locator("svg title").first.text_content() == "Timeline of step 0"
