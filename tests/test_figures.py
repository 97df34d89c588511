import math

import pytest

from rayrl.errors import DataError, EnvError
from rayrl.figures import Mean, Share, Split, figure_from_dict, measure, percent, scores_of
from rayrl.types import Episode, Failure, Task


def episode(win: float, **other: float) -> Episode:
    scores = {"agent": {"win": win, **other}}
    return Episode("e", "game", Task(), 0, (), scores, {"agent": win})


FAILED = Episode("f", "game", Task(), 0, (), failure=Failure("env", "broke"))


def test_types_say_how_episodes_are_put_together() -> None:
    def hook(e: Episode) -> dict[str, bool | float | str]:
        win = e.scores["agent"]["win"]
        outcome = {1.0: "win", 0.5: "draw", 0.0: "loss"}[win]
        return {"win/draw/loss": outcome, "lost": win == 0, "format %": win, "moves": 3}

    figures = measure([episode(1), episode(1), episode(0.5), episode(0), FAILED], hook)

    assert list(figures) == ["win/draw/loss", "lost", "format %", "moves"]
    assert figures["win/draw/loss"] == Split({"win": 2, "draw": 1, "loss": 1}, 4)
    assert figures["win/draw/loss"].text() == "50/25/25"
    assert figures["lost"] == Share(1, 4)
    assert figures["lost"].text() == "25"
    assert figures["format %"].text() == "62.5"
    assert figures["moves"].text() == "3.000"


def test_an_outcome_nobody_had_is_still_counted() -> None:
    figures = measure([episode(1)], lambda e: {"win/draw/loss": "win"})
    assert figures["win/draw/loss"].text() == "100/0/0"


def test_without_a_hook_every_score_is_a_mean() -> None:
    figures = measure([episode(1, format=0.5), episode(0, format=0.5)])
    assert figures["win"].text() == "0.500"
    assert figures["format"] == Mean(0.5, 0.5, 0.5, 2)


def test_a_count_of_tools_is_over_the_episodes_that_offered_some() -> None:
    figures = measure([episode(1), episode(0, tool_calls=3.0), episode(0, tool_calls=1.0)])
    assert list(figures) == ["win", "tool_calls"]
    assert (figures["win"].text(), figures["win"].n) == ("0.333", 3)
    assert (figures["tool_calls"].text(), figures["tool_calls"].n) == ("2.000", 2)


def test_seats_are_named() -> None:
    both = Episode("e", "g", Task(), 0, (), {"x": {"win": 1.0}, "o": {"win": 0.0}})
    assert scores_of(both) == {"x.win": 1.0, "o.win": 0.0}


def test_no_scored_episode_gives_no_figures() -> None:
    assert measure([FAILED]) == {}


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
        measure([episode(1)] * len(values), lambda e: next(answers))


@pytest.mark.parametrize(
    "figure",
    [
        Share(3, 7),
        Split({"a": 1, "b": 0}, 1),
        Mean(0.5, 0.25, 0.75, 9, in_percent=True),
        Mean(0.5, -math.inf, math.inf, 1),
    ],
)
def test_figures_survive_json(figure: Share | Split | Mean) -> None:
    assert figure_from_dict(figure.to_dict()) == figure


@pytest.mark.parametrize("data", [{}, {"kind": "median"}, {"kind": "share", "count": 1}])
def test_what_is_not_a_figure_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(DataError, match="not a figure"):
        figure_from_dict(data)


def test_percent_keeps_what_matters() -> None:
    assert [percent(x) for x in (1, 0.975, 0.0033, 0)] == ["100", "97.5", "0.3", "0"]
