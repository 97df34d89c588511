from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rayrl.commands.synth import write_whole
from rayrl.config import Config, from_dict
from rayrl.errors import DataError
from rayrl.report.collect import collect_report, compact, duration, write_report
from rayrl.report.page import choose_samples
from rayrl.report.statistics import Share, Split
from rayrl.report.table import Cell, Result
from rayrl.run.folder import RunDir
from rayrl.run.metrics import timeline_row
from rayrl.run.stage import EPISODES
from rayrl.types import Episode, Failure, Group, Task, Turn, system, user

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)></pre>&amp;\u2028]]>"


class Page(HTMLParser):
    """Tags with attributes, and all text outside of style and scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        (self.scripts if self._inside == "script" else self.texts).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def episode(name: str, reward: float, text: str = "ok") -> Episode:
    turns = (Turn("agent", (system("rules"), user(f"board of {name}")), text, "stop"),)
    scores = {"agent": {"win": reward}}
    return Episode(name, "game", Task(), 0, turns, scores, {"agent": reward})


def config(folder: Path, name: str, **changes: object) -> Config:
    return from_dict(
        {"run": {"dir": str(folder), "name": name}, "env": {"name": "tictactoe"}, **changes}
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished recipe: a teacher's games, a training phase and two evaluations."""
    recipe = [
        {"name": "synth", "verb": "synth"},
        {"name": "rl1", "verb": "train"},
        {"name": "eval_teacher", "verb": "eval"},
        {"name": "eval", "verb": "eval"},
        {"name": "never_ran", "verb": "train"},
    ]
    run = tmp_path / "run"
    with RunDir(run, config(run, "main", recipe=recipe)) as whole:
        record = {"seconds": {"synth": 2.0, "rl1": 60.0}, "peak_memory": 3 << 30}
        whole.write_json("recipe.json", {**record, "versions": {"torch": "2.13"}})
    with RunDir(run / "synth", config(run / "synth", "main-synth")) as stage:
        write_whole(stage.path / EPISODES, [episode("t", 1.0)])
    rl1 = config(run / "rl1", "main-rl1", learner={"lr": 0.125})
    with RunDir(run / "rl1", rl1) as stage:
        for step in range(4):
            times = {"time/collect": 3.0, "time/update": 1.0, "time/total": 5.0}
            stage.log(step, {"reward": step / 4, "score/win": 0.5, "my_figure": 7.0, **times})
        played = [episode(str(k), k / 4) for k in range(4)] + [episode("evil", 1.5, EVIL)]
        stage.write_episodes(3, [Group("g", Task(), tuple(played))])
    for name, wins, player in (("eval_teacher", 3, "teacher"), ("eval", 9, "model")):
        with RunDir(run / name, config(run / name, name)):
            figures = {"win/loss": Split({"win": wins, "loss": 10 - wins}, 10), "bad": Share(0, 10)}
            cells = {"random": Cell({}, 10, 0, figures)}
            checks = {"unbeatable": {"losing": 0.0, "lines": 4120.0}} if wins == 9 else {}
            row = {"eval_teacher": "teacher", "eval": "rl1"}[name]
            Result(row, cells, checks, {"player": player}).save(run / name / "eval.json")
    return run


def test_the_page_shows_everything(folder: Path) -> None:
    page = Page(write_report(folder).read_text())
    for expected in (
        "tictactoe: main",
        "rl1. random: win/loss 90/10; unbeatable: losing 0, lines 4,120",
        "1 min 2 s",
        "3.0 GiB",
        "torch 2.13",
        "5 s per step × 4 steps",
        "collect 60% 3 s",
        "other 20% 1 s",
        "learner.lr",
        "0.125",
        "board of evil",
        "win 59.6–98.2",
    ):
        assert expected in page.text, expected
    assert "never_ran" not in page.text


def test_nothing_a_model_wrote_is_markup(folder: Path) -> None:
    page = Page(write_report(folder).read_text())
    assert EVIL in "".join(page.texts)
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert sum(tag == "script" for tag, _ in page.tags) == 2  # the data and the drawing
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]


def test_a_hostile_name_cannot_leave_the_data(folder: Path) -> None:
    with (folder / "rl1" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "reward": 1.0, "</script><u>": 1.0}) + "\n")
    html = write_report(folder).read_text()
    data, _ = Page(html).scripts
    assert "</script><u>" in [chart["title"] for chart in json.loads(data).values()]
    assert "<u>" not in html


def test_only_the_one_script_may_run_and_nothing_is_fetched(folder: Path) -> None:
    html = write_report(folder).read_text()
    page = Page(html)
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    links = {a[key] for _, a in page.tags for key in ("src", "href") if key in a}
    assert all(link is not None and link.startswith(("#", "data:")) for link in links)
    names = {"http://www.w3.org/2000/svg", "https://github.com/leeoniya/uPlot"}  # not asked
    assert set(re.findall(r"https?://[\w./]+", html)) == names


def test_the_licence_of_what_draws_is_on_the_page(folder: Path) -> None:
    html = write_report(folder).read_text()
    assert re.search(r"uPlot \(v1\.\d+\.\d+\)", html)
    assert "The above copyright notice and this permission notice shall be included in" in html


def test_curves_are_in_the_data_by_phase(folder: Path) -> None:
    page = Page(write_report(folder).read_text())
    charts = {chart["title"]: chart for chart in json.loads(page.scripts[0]).values()}
    (line,) = charts["Reward"]["lines"]
    assert line["name"] == "rl1"
    assert line["steps"] == [0, 1, 2, 3]
    assert line["values"] == [0, 0.25, 0.5, 0.75]
    assert charts["win"]["unit"] is True
    assert "my_figure" in charts  # what nobody knows is shown all the same
    assert not [title for title in charts if title.startswith("time")]
    holders = [a["data-chart"] for _, a in page.tags if "data-chart" in a]
    assert sorted(map(str, holders)) == sorted(json.loads(page.scripts[0]))


def test_the_timeline_of_the_last_steps(folder: Path) -> None:
    """Its data is in an attribute, where a hostile name stays text."""
    assert "Timeline" not in Page(write_report(folder).read_text()).text
    lines = [timeline_row(k, [("update", 100.0 + k, 100.5 + k)], []) for k in range(60)]
    lines[59]["stages"].append([f'"><u>{EVIL}', 160.0, 161.0])
    with (folder / "rl1" / "timeline.jsonl").open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.write('{"step": 60, "sta')  # being written
    page = Page(write_report(folder).read_text())
    assert "Timeline" in page.text
    (data,) = [a["data-steps"] for _, a in page.tags if "data-steps" in a]
    assert data is not None
    steps = json.loads(data)
    assert [one["step"] for one in steps] == list(range(10, 60))
    assert steps[0]["stages"] == [["update", 0.0, 0.5]]
    assert steps[-1]["stages"] == [["update", 49.0, 49.5], [f'"><u>{EVIL}', 50.0, 51.0]]
    assert not [tag for tag, _ in page.tags if tag in ("u", "img")]
    (slider,) = [a for tag, a in page.tags if tag == "input"]
    assert (slider["max"], slider["value"]) == ("49", "49")


def test_rows_of_the_table(folder: Path) -> None:
    report = collect_report(folder)
    assert [result.name for result in report.results] == ["teacher", "rl1"]
    assert report.references == {"teacher"}
    page = Page(write_report(folder).read_text())
    kinds = [a.get("class") for tag, a in page.tags if tag == "tr" and a.get("class")]
    assert kinds == ["reference", "last"]


def test_a_run_still_being_written_can_be_reported(folder: Path) -> None:
    with (folder / "rl1" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    assert len(collect_report(folder).phases[1].metrics) == 4
    with (folder / "rl1" / "metrics.jsonl").open("a") as file:
        file.write("\n{}\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:5: not a line of metrics"):
        collect_report(folder)


def test_one_stage_alone(folder: Path) -> None:
    report = collect_report(folder / "rl1")
    assert [(phase.name, phase.verb) for phase in report.phases] == [("main-rl1", "train")]
    assert report.results == []
    assert collect_report(folder / "eval").phases == []
    assert "board of t" in write_report(folder / "synth").read_text()


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no run here"):
        write_report(tmp_path)


def test_a_run_with_nothing_in_it_yet(tmp_path: Path) -> None:
    with RunDir(tmp_path, config(tmp_path, "new")):
        pass
    assert "new" in write_report(tmp_path).read_text()


def test_best_median_and_worst() -> None:
    failed = Episode("f", "game", Task(), 0, (), failure=Failure("env", "broke"))
    played = [episode(str(k), float(k)) for k in (3, 1, 4, 0, 2)]
    chosen = [(label, e.id) for label, e in choose_samples([*played, failed])]
    assert chosen == [("best", "4"), ("median", "2"), ("worst", "0"), ("failed", "f")]
    assert [label for label, _ in choose_samples(played[:2])] == ["best", "worst"]
    assert [label for label, _ in choose_samples(played[:1])] == ["best"]
    assert choose_samples([]) == []


def test_words_for_numbers() -> None:
    assert [duration(s) for s in (4.21, 75, 3 * 3600 + 300)] == ["4.2 s", "1 min 15 s", "3 h 5 min"]
    assert [compact(n) for n in (812, 12_345, 3_900_000)] == ["812", "12.3 k", "3.9 M"]
