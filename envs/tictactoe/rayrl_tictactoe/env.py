"""The tic-tac-toe environment: task source, game, scripted players, exhaustive check."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import rayrl
from rayrl import ConfigError, Message, Scores, Task, system, user

from . import players
from .board import SYSTEM, Board, best_moves
from .match import Match

if TYPE_CHECKING:
    from rayrl import Agent, Episode

__all__ = ["Game", "game_statistics", "games", "opponent_move", "tictactoe", "unbeatable"]


FORM = "<think></think><move>{}</move>"  # a person types the position only


@dataclass(frozen=True, kw_only=True)
class Game(Task):
    """The settings of one game.

    Attributes:
        first: mark that moves first, "X" (the model) or "O".
        random_move_prob: probability that the opponent plays a random cell, not an optimal move.
        max_turns: maximum messages by the model before the game counts as lost.
        system_prompt: system message.
    """

    first: str
    random_move_prob: float
    max_turns: int
    system_prompt: str


def games(
    seed: int,
    u: float,
    *,
    random_min: float = 0.0,
    random_max: float = 1.0,
    max_turns: int = 8,
    system_prompt: str = SYSTEM,
) -> Game:
    """Draw a game, its opponent's randomness a fraction `u` of the way from min to max.

    Raises:
        ConfigError: the range is empty or not within [0, 1], or there are no turns.
    """
    if not 0.0 <= random_min <= random_max <= 1.0:
        raise ConfigError(
            f"random_min={random_min} and random_max={random_max} do not give a range of "
            "probabilities: choose 0 <= random_min <= random_max <= 1."
        )
    if max_turns < 1:
        raise ConfigError(f"max_turns={max_turns} leaves no turn to play: choose at least 1.")
    return Game(
        seed=seed,
        first="X" if Task(seed=seed).rng("first").random() < 0.5 else "O",
        random_move_prob=random_min + u * (random_max - random_min),
        max_turns=max_turns,
        system_prompt=system_prompt,
    )


def opponent_move(task: Game, key: str) -> int:
    """Return O's move on the board `key`, always the same within a task."""
    rng = task.rng("opponent", key)
    if rng.random() < task.random_move_prob:
        return rng.choice(Board(key).free())
    return rng.choice(best_moves(key, "O"))


@rayrl.env(tasks=games, rewards={"win": 1.0, "format": 0.2, "invalid": 1.0}, form=FORM)
async def tictactoe(task: Game, agent: Agent) -> Scores:
    """Let the model play X against an opponent of adjustable strength."""
    match = Match(max_turns=task.max_turns, to_move=task.first)
    new = [system(task.system_prompt)]
    while not match.over:
        if match.to_move == "O":
            match = match.reply(opponent_move(task, match.key))
            continue
        new.append(user(match.prompt()))
        match = match.hear(await agent(new, state=match.state))
        new = []
    return match.scores()


@tictactoe.player("optimal")
def optimal(messages: Sequence[Message], rng: random.Random) -> str:
    """Play perfectly, without trying to exploit mistakes."""
    return players.optimal(messages, rng)


@tictactoe.player("random")
def random_legal(messages: Sequence[Message], rng: random.Random) -> str:
    """Play a random free cell."""
    return players.random_legal(messages, rng)


@tictactoe.player("teacher")
def teacher(messages: Sequence[Message], rng: random.Random) -> str:
    """Play well but fallibly; its games are the data to imitate."""
    return players.teacher(messages, rng)


tictactoe.observation(shape=(18,), low=0.0, high=1.0, actions=players.REPLIES, legal=players.free)(
    players.marks
)


@tictactoe.statistics
def statistics(episode: Episode) -> dict[str, bool | float | str]:
    """Return the statistics that evaluations report: result, form and invalid moves."""
    return game_statistics(episode.scores["agent"])


@tictactoe.ending
def ending(episode: Episode, seat: str) -> str:
    """Return the final board and the opponent's last move."""
    task = episode.task
    assert isinstance(task, Game)
    match = Match(max_turns=task.max_turns, to_move=task.first)
    replies = iter(episode.turns)
    while not match.over:
        if match.to_move == "O":
            match = match.reply(opponent_move(task, match.key))
        else:
            match = match.hear(next(replies).text)
    return match.ending()


def game_statistics(scores: Mapping[str, float]) -> dict[str, bool | float | str]:
    """Compute the statistics of one game from its player's scores."""
    return {
        "win/draw/loss": {1.0: "win", 0.5: "draw", 0.0: "loss"}[scores["win"]],
        "format %": scores["format"],
        "invalid %": scores["invalid"] < 0,
    }


@tictactoe.check("unbeatable")
async def unbeatable(new_agent: Callable[[], Agent], args: Mapping[str, Any]) -> dict[str, float]:
    """Play every line an opponent can play: both starts, every free cell at every turn of O.

    For an agent whose reply is a function of the conversation (greedy decoding), this proves that
    it cannot be beaten if there is no losing line.

    The lines form a tree. Each conversation is continued once, by an agent forked from its parent,
    so the model sees exactly the ids of a real game. All conversations of one depth run
    concurrently, so that an engine can batch them.

    Args:
        new_agent: creates an agent at the start of a conversation.
        args: `max_turns` and `system_prompt` of the task source are used.

    Returns:
        The number of `lines`, of `wins`, `draws` and `losing` lines, and of lines with an `invalid`
        move (whatever their result).
    """
    results: Counter[str] = Counter()
    rules = system(args["system_prompt"])
    level: list[tuple[Match, Agent, list[Message]]] = [
        (match, new_agent(), [rules])
        for first in "XO"
        for match in _next_decisions(Match(max_turns=args["max_turns"], to_move=first))
    ]
    while level:
        replies = await asyncio.gather(
            *(agent([*new, user(m.prompt())], state=m.state) for m, agent, new in level)
        )
        after = [(m.hear(r), agent) for (m, agent, _), r in zip(level, replies, strict=True)]
        level = []
        for match, agent in after:
            children = _next_decisions(match)
            ended = [child for child in children if child.over]
            results.update(child.result for child in ended)
            results["invalid"] += sum(child.invalid > 0 for child in ended)
            unfinished = [child for child in children if not child.over]
            level += [(child, agent.fork(), []) for child in unfinished[1:]]
            if unfinished:  # the first one reuses the agent itself and its cached state
                level.append((unfinished[0], agent, []))
            else:
                agent.close()
    return {
        "lines": float(results["win"] + results["draw"] + results["loss"]),
        "losing": float(results["loss"]),
        "draws": float(results["draw"]),
        "wins": float(results["win"]),
        "invalid": float(results["invalid"]),
    }


def _next_decisions(match: Match) -> list[Match]:
    """Return the matches at X's next turn, or at the game's end: one per possible move of O."""
    if match.over or match.to_move == "X":
        return [match]
    return [match.reply(cell) for cell in Board(match.key).free()]
