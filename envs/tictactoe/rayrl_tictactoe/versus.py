"""Two-player tic-tac-toe: self-play, model against model, or a person against a model.

Each seat sees itself as X, as the model was trained, and its rival as O. So a model can take either
seat, or both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import rayrl
from rayrl import Message, Scores, system, user

from . import env, players
from .board import FREE, other, winner
from .env import Game, games
from .match import INVALID_SCORE, Match

if TYPE_CHECKING:
    from rayrl import Agent, Episode

__all__ = ["versus"]

POINTS = {"win": 1.0, "draw": 0.5, "loss": 0.0}


@rayrl.env(
    name="tictactoe_versus",
    tasks=games,
    rewards={"win": 1.0, "format": 0.2, "invalid": 1.0},
    form=env.FORM,
)
async def versus(task: Game, x: Agent, o: Agent) -> Scores:
    """Play seat `x` against seat `o`; the task decides who starts, its opponent is unused.

    A seat that runs out of turns loses and its rival wins.
    """
    agents = {"x": x, "o": o}
    views = _start(task)
    new: dict[str, list[Message]] = {seat: [system(task.system_prompt)] for seat in agents}
    while not any(view.over for view in views.values()):
        seat = "x" if views["x"].to_move == "X" else "o"
        new[seat].append(user(views[seat].prompt()))
        _hear(views, seat, await agents[seat](new[seat], state=views[seat].state))
        new[seat] = []
    return {seat: _scores(view, _result(view)) for seat, view in views.items()}


def _start(task: Game) -> dict[str, Match]:
    """Return each seat's view of the start."""
    return {
        "x": Match(max_turns=task.max_turns, to_move=task.first),
        "o": Match(max_turns=task.max_turns, to_move=other(task.first)),
    }


def _hear(views: dict[str, Match], seat: str, text: str) -> None:
    """Update both views after a seat's message; its move is O's in the rival's view."""
    before, rival = views[seat], "o" if seat == "x" else "x"
    after = views[seat] = before.hear(text)
    if after.to_move == "O":
        cell = next(i for i in range(9) if before.key[i] != after.key[i])
        views[rival] = views[rival].reply(cell)


def _result(view: Match) -> str:
    """Return win, draw or loss of a seat; one that ran out of turns has lost."""
    if winner(view.key) is None and FREE in view.key:
        return "loss" if view.turns >= view.max_turns else "win"
    return view.result


def _scores(view: Match, result: str) -> Mapping[str, float]:
    return {
        "win": POINTS[result],
        "format": view.formatted / view.turns if view.turns else 1.0,
        "invalid": INVALID_SCORE if view.invalid else 0.0,
    }


@versus.statistics
def statistics(episode: Episode) -> dict[str, bool | float | str]:
    """Return seat x's statistics, as in `tictactoe`."""
    return env.game_statistics(episode.scores["x"])


@versus.ending
def ending(episode: Episode, seat: str) -> str:
    """Return the final board in the seat's view and its rival's last move."""
    assert isinstance(episode.task, Game)
    views = _start(episode.task)
    for turn in episode.turns:
        _hear(views, turn.seat, turn.text)
    return views[seat].ending()


versus.player("optimal")(players.optimal)
versus.player("random")(players.random_legal)
versus.player("teacher")(players.teacher)
versus.observation(shape=(18,), low=0.0, high=1.0, actions=players.REPLIES, legal=players.free)(
    players.marks
)
