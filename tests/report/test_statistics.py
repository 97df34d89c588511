import itertools
import math
from dataclasses import dataclass, replace

import pytest

from rayrl.environment.scoring import scores_of
from rayrl.environment.tasks import task_key
from rayrl.errors import DataError, EnvError
from rayrl.report.statistics import (
    Mean,
    Share,
    Split,
    eval_statistics,
    percent,
    statistic_from_dict,
)
from rayrl.rollout.episode_io import LoggedTask
from rayrl.types import Episode, Failure, Task


@dataclass(frozen=True, kw_only=True)
class Words(Task):
    words: tuple[str, ...] = ()


_seeds = itertools.count()


def episode(win: float, task: int | None = None, **other: float) -> Episode:
    """An episode of a task of its own, or of a given one."""
    scores = {"agent": {"win": win, **other}}
    seed = next(_seeds) if task is None else task
    return Episode("e", "game", Task(seed=seed), 0, (), scores, {"agent": win})


FAILED = Episode("f", "game", Task(), 0, (), failure=Failure("env", "broke"))


def test_types_say_how_episodes_are_put_together() -> None:
    def hook(e: Episode) -> dict[str, bool | float | str]:
        win = e.scores["agent"]["win"]
        outcome = {1.0: "win", 0.5: "draw", 0.0: "loss"}[win]
        return {"win/draw/loss": outcome, "lost": win == 0, "format %": win, "moves": 3}

    statistics = eval_statistics([episode(1), episode(1), episode(0.5), episode(0), FAILED], hook)

    assert list(statistics) == ["win/draw/loss", "lost", "format %", "moves"]
    assert statistics["win/draw/loss"] == Split({"win": 2, "draw": 1, "loss": 1}, 4)
    assert statistics["win/draw/loss"].text() == "50/25/25"
    assert statistics["lost"] == Share(1, 4)
    assert statistics["lost"].text() == "25"
    assert statistics["format %"].text() == "62.5"
    assert statistics["moves"].text() == "3.000"


def test_an_outcome_nobody_had_is_still_counted() -> None:
    statistics = eval_statistics([episode(1)], lambda e: {"win/draw/loss": "win"})
    assert statistics["win/draw/loss"].text() == "100/0/0"


def test_without_a_hook_every_score_is_a_mean() -> None:
    statistics = eval_statistics([episode(1, format=0.5), episode(0, format=0.5)])
    assert statistics["win"].text() == "0.500"
    assert statistics["format"] == Mean(0.5, 0.5, 0.5, 2)


def test_a_count_of_tools_is_over_the_episodes_that_offered_some() -> None:
    statistics = eval_statistics(
        [episode(1), episode(0, tool_calls=3.0), episode(0, tool_calls=1.0)]
    )
    assert list(statistics) == ["win", "tool_calls"]
    assert (statistics["win"].text(), statistics["win"].n) == ("0.333", 3)
    assert (statistics["tool_calls"].text(), statistics["tool_calls"].n) == ("2.000", 2)


def test_numbers_that_are_0_or_1_have_the_interval_of_a_share() -> None:
    right = eval_statistics([episode(1) for _ in range(100)])["win"]
    assert (right.text(), right.interval_text()) == ("1.000", "0.963–1.000")  # 100/(100 + z²)
    assert right.interval == Share(100, 100).interval
    some = eval_statistics([episode(float(k < 90)) for k in range(100)])["win"]
    assert some.interval == Share(90, 100).interval
    other = eval_statistics([episode(float(k)) for k in range(3)])["win"]  # t with 2 degrees: 4.303
    half = 4.30265273 / math.sqrt(3)
    assert other == Mean(1.0, pytest.approx(1 - half), pytest.approx(1 + half), 3)


def test_percent_stays_within_0_and_100() -> None:
    nearly = [episode(value) for value in (1.0, 1.0, 0.9, 1.0)]
    shown = eval_statistics(nearly, lambda e: {"like %": e.scores["agent"]["win"]})["like %"]
    assert shown.interval_text() == "89.5–100"  # 0.975 ± 3.182·0.05/√4
    grown = eval_statistics(nearly, lambda e: {"growth %": 2 * e.scores["agent"]["win"]})[
        "growth %"
    ]
    assert grown.interval_text() == "179.1–210.9"  # no share


REPEATED = {  # hook -> what 400 episodes of 100 tasks, all four of which end alike, come to
    "bool": lambda e: {"won %": e.scores["agent"]["win"] == 1},
    "outcome": lambda e: {"win/loss": "win" if e.scores["agent"]["win"] else "loss"},
    "0 or 1": lambda e: {"win": e.scores["agent"]["win"]},
    "number": lambda e: {"points": 10 * e.scores["agent"]["win"]},
}


@pytest.mark.parametrize("kind", REPEATED)
@pytest.mark.parametrize("won", [100, 90, 50])
def test_repeated_tasks_tell_what_their_tasks_do(kind: str, won: int) -> None:
    """Four episodes that end alike are worth one: at most a little less than that."""
    hook = REPEATED[kind]
    once = [episode(float(k < won), task=k) for k in range(100)]
    (alone,) = eval_statistics(once, hook).values()
    (repeated,) = eval_statistics(once * 4, hook).values()
    (independent,) = eval_statistics(
        [episode(float(k % 100 < won)) for k in range(400)], hook
    ).values()
    assert (repeated.text(), repeated.n) == (independent.text(), 400)
    widths = [width_of(one) for one in (alone, repeated, independent)]
    assert widths[1] == pytest.approx(widths[0], rel=0.03)
    if won < 100 or kind != "number":
        assert widths[1] > 1.8 * widths[2]
    assert statistic_from_dict(repeated.to_dict()) == repeated


def width_of(statistic: Share | Split | Mean) -> float:
    low, high = (
        statistic.share("win") if isinstance(statistic, Split) else statistic
    ).interval or (0, 9)
    return high - low


def test_equal_tasks_are_the_same_wherever_they_come_from() -> None:
    fresh = Words(seed=1, words=("a", "b"))
    (stored,) = [LoggedTask(seed=1, type="m:Words", fields={"seed": 1, "words": ["a", "b"]})]
    assert task_key(fresh) == task_key(stored)
    assert task_key(fresh) != task_key(Words(seed=2, words=("a", "b")))
    one = [replace(episode(1.0), task=fresh), replace(episode(0.0), task=stored)]
    assert eval_statistics(one)["win"].interval is None


@pytest.mark.parametrize("kind", REPEATED)
def test_one_episode_or_one_task_has_no_interval(kind: str) -> None:
    for episodes in ([episode(1.0)], [episode(1.0, task=3), episode(1.0, task=3)]):
        (statistic,) = eval_statistics(episodes, REPEATED[kind]).values()
        assert statistic.interval_text() == ""
        data = statistic.to_dict()
        for share in data.get("shares", {"": data}).values():
            assert share["low"] is share["high"] is None
        assert statistic_from_dict(data) == statistic


def test_seats_are_named() -> None:
    both = Episode("e", "g", Task(), 0, (), {"x": {"win": 1.0}, "o": {"win": 0.0}})
    assert scores_of(both) == {"x.win": 1.0, "o.win": 0.0}


def test_no_scored_episode_gives_no_figures() -> None:
    assert eval_statistics([FAILED]) == {}


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ([{"a": 1.0}, {"b": 1.0}], "a, b not in all"),
        ([{"win/loss": "winn"}], "'winn'.*Did you mean 'win'"),
        ([{"a": math.nan}], "not finite"),
        ([{"a": 1.0}, {"a": "x"}], "text in some episodes"),
    ],
)
def test_a_bad_hook_is_named(values: list[dict[str, float | str]], complaint: str) -> None:
    answers = iter(values)
    with pytest.raises(EnvError, match=complaint):
        eval_statistics([episode(1)] * len(values), lambda e: next(answers))


@pytest.mark.parametrize(
    "statistic",
    [
        Share(3, 7),
        Share(3, 7, 2.5),
        Split({"a": 1, "b": 0}, 1),
        Split({"a": 2, "b": 1}, 3, {"a": 1.5, "b": 3.0}),
        Mean(0.5, 0.25, 0.75, 9, in_percent=True),
        Mean(0.5, -math.inf, math.inf, 1),
    ],
)
def test_statistics_survive_json(statistic: Share | Split | Mean) -> None:
    assert statistic_from_dict(statistic.to_dict()) == statistic


@pytest.mark.parametrize("data", [{}, {"kind": "median"}, {"kind": "share", "count": 1}])
def test_what_is_not_a_figure_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(DataError, match="not a statistic"):
        statistic_from_dict(data)


def test_percent_keeps_what_matters() -> None:
    assert [percent(x) for x in (1, 0.975, 0.0033, 0)] == ["100", "97.5", "0.3", "0"]
