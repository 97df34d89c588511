"""No name that a user chooses collides with one of ours, or with markup: nothing is lost."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import rayrl
from rayrl import Agent, Scores, Task
from rayrl.cluster.rollouts import CollectedGroups
from rayrl.commands.evaluate import cell_of
from rayrl.commands.replay import _figures
from rayrl.commands.synth import summary
from rayrl.config import from_dict
from rayrl.learner.advantage import advantages
from rayrl.learner.batch import make_batch
from rayrl.report.console import episode_panel
from rayrl.report.page import Phase, Report, render
from rayrl.report.table import Result, columns, entry, markdown, rich_table
from rayrl.rollout.check import check_env
from rayrl.rollout.episode_io import LoggedTask, read_episodes, restore_task, write_episodes
from rayrl.rollout.rollout import play_group
from rayrl.run.metrics import Clock, headline, step_metrics
from rayrl.run.progress_bar import ProgressBar
from rayrl.types import Episode, Group
from tests.act import instant

SCORES = [
    "done", "step", "reward", "total", "time/collect", "time/total", "score", "score/x", "", " ",
    "entropy", "grad", "play", "learn", "loss", "figures", "self", "title", "tool_calls", "type",
    "[/x]", "[red]", "{x}", "{}", "%", "a|b", "a.b", "a\nb", "<b>", "__class__", "agent", "x",
]  # fmt: skip
FIELDS = ["type", "fields", "kind", "task", "turns", "scores", "id", "index", "class_", "task_type"]
NAMES = st.lists(
    st.sampled_from(SCORES) | st.text(st.characters(codec="utf-8"), max_size=6),
    min_size=1,
    max_size=6,
    unique=True,
)


_numbers = itertools.count()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def environment(names: list[str], fields: list[str], seats: str) -> rayrl.Environment:
    kind = make_dataclass(
        f"Nasty{next(_numbers)}",  # a file's tasks are found by the name of their class
        [(name, str, field(default=f"value of {name}")) for name in fields],
        bases=(Task,),
        frozen=True,
        kw_only=True,
    )

    kind.__module__ = __name__
    globals()[kind.__name__] = kind  # where pickle finds it

    def tasks(seed: int, u: float) -> Task:
        return kind(seed=seed)

    async def play(task: Task, *agents: Agent) -> Scores:
        for agent in agents:
            await agent("go")
        of_seat = {name: k + len(task.rng().choice("ab")) / 4 for k, name in enumerate(names)}
        return of_seat if len(agents) == 1 else {agent.seat: of_seat for agent in agents}

    if seats == "x":

        async def one(task: Task, x: Agent) -> Scores:
            return await play(task, x)

        return rayrl.env(tasks=tasks, rewards=dict.fromkeys(names, 1.0), name="nasty")(one)

    async def two(task: Task, done: Agent, reward: Agent) -> Scores:
        return await play(task, done, reward)

    return rayrl.env(tasks=tasks, rewards=dict.fromkeys(names, 1.0), name="nasty")(two)


def group_of(env: rayrl.Environment) -> Group:
    (task,) = env.tasks(0, 1)
    player = instant(trainable=True)["agent"]
    return asyncio.run(play_group(env, task, dict.fromkeys(env.seats, player), id="g", size=2))


def shown(what: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=1000).print(what)
    return out.getvalue()


@settings(max_examples=15)
@given(
    NAMES, st.lists(st.sampled_from(FIELDS), max_size=4, unique=True), st.sampled_from(["x", "2"])
)
def test_an_environment_goes_through_everything(
    names: list[str], fields: list[str], seats: str
) -> None:
    env = environment(names, fields, seats)
    assert check_env(env) == []
    group = group_of(env)
    scores = {seat: dict(own) for seat, own in group.episodes[0].scores.items()}
    assert group.complete
    assert all(set(own) == set(names) for own in scores.values())

    # training
    algo = from_dict({}).algo
    batch = make_batch([group], advantages([group], algo), keep_zero=True)
    clock = Clock()
    for stage in ("collect", "update"):
        with clock(stage):
            pass
    learned = {"entropy": 1.0, "grad_norm": 1.0, "loss/reward": -7.0, "loss/{odd}": 1.0}
    metrics = step_metrics(0, CollectedGroups((group,)), batch, learned, clock)
    several = len(env.seats) > 1
    for seat, own in scores.items():
        for name, value in own.items():
            assert metrics[f"score/{seat}/{name}" if several else f"score/{name}"] == value
    assert metrics["reward"] != -7.0
    assert (metrics["loss/reward"], metrics["loss/{odd}"]) == (-7.0, 1.0)
    figures = headline(metrics)
    assert len(figures) == 5 + min(4, len(names) * len(env.seats))
    for stream in (io.StringIO(), Terminal()):
        with ProgressBar("[/odd] {title}", 2, stream=stream) as bar:
            bar.update(1, figures)
            bar.update(2, figures)

    # evaluation and its table
    cell = cell_of(env, {"[/x]": "{}"}, CollectedGroups((group,)))
    result = Result("[/row]", {"done": cell}, {"done": {"total": 1, "[/x]": 2}})
    assert Result.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    assert len(columns([result])) == len(names) * len(env.seats) + 2
    for column in columns([result]):
        assert entry(result, column)[0] != "–"
    rows = markdown([result]).splitlines()
    assert rows[0].replace("\\|", "").count("|") == len(columns([result])) + 2
    shown(rich_table([result]))

    # data and the report
    shown(summary(group.episodes, group.episodes, env))
    for episode in group.episodes:
        text = shown(episode_panel(episode, "[/x]"))
        assert all(f"{name} value of {name}" in text for name in fields)
    phase = Phase("[/x]", "train", from_dict({}), [{"step": 0, **metrics}], group.episodes)
    page = render(Report("{x}", "here", [phase], [result]))
    assert page.count('id="') >= 0


@pytest.mark.parametrize("fields", [["type"], ["task_type"], ["type", "task_type", "fields"], []])
def test_task_fields_are_read_as_they_were_written(tmp_path: Path, fields: list[str]) -> None:
    group = group_of(environment(["win"], fields, "x"))
    file, again = tmp_path / "e.jsonl", tmp_path / "f.jsonl"
    write_episodes(file, group.episodes)
    read = list(read_episodes(file))
    assert all(isinstance(e.task, LoggedTask) for e in read) or read == list(group.episodes)
    back = [restore_task(e, [type(group.task)]) for e in read]
    assert [e.task for e in back] == [group.task] * 2
    write_episodes(again, read)  # by who does not know the class
    assert again.read_text() == file.read_text()


@dataclass(frozen=True, kw_only=True)
class Typed(Task):
    type: str = "mine"


def test_a_loaded_class_with_a_field_called_type(tmp_path: Path) -> None:
    episode = Episode("e", "x", Typed(type="knight"), 0, ())
    write_episodes(tmp_path / "e.jsonl", [episode])
    assert list(read_episodes(tmp_path / "e.jsonl")) == [episode]


@dataclass(frozen=True, kw_only=True)
class Hides(Task):
    rng: int = 1  # type: ignore[assignment]


def test_what_cannot_be_is_said() -> None:
    async def play(task: Task, agent: Agent) -> Scores:
        await agent("go")
        return {"win": 1.0}

    env = rayrl.env(tasks=[Hides()], rewards={"win": 1.0})(play)
    assert "Hides has a field 'rng', which hides Task.rng" in check_env(env)

    other = rayrl.env(tasks=[Task()], rewards={"win": 1.0})(play)

    @other.player("model")
    def mine(messages: Any, rng: Any) -> str:
        return "yes"

    assert any("player 'model' cannot be chosen" in problem for problem in check_env(other))


def test_a_score_called_reward_is_compared_as_well() -> None:
    scores, rewards = {"agent": {"reward": 1.0}}, {"agent": 3.0}
    assert _figures(Episode("e", "x", Task(), 0, (), scores, rewards)) == {
        "reward": 1.0,
        "reward (weighted)": 3.0,
    }


def test_an_only_seat_called_as_its_score() -> None:
    async def play(task: Task, win: Agent) -> Scores:
        return {"win": 1.0}

    env = rayrl.env(tasks=[Task()], rewards={"win": 1.0})(play)
    assert env.scores({"win": 1.0}) == {"win": {"win": 1.0}} == env.scores({"win": {"win": 1.0}})
