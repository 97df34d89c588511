"""Games of TextArena, `env.name=textarena:ID` or `textarena:ID@SEATS`: a seat for each player.

TextArena's wrappers show a player the whole history at every move. Here each seat is told what is
new, the game's own messages and what the others said, so that its conversation only grows.
"""

from __future__ import annotations

import contextlib
import io
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import textarena
from textarena.envs.registration import ENV_REGISTRY

from rayrl.environment.environment import Environment
from rayrl.environment.signature import suggestion
from rayrl.errors import ConfigError, describe_error
from rayrl.types import Message, Scores, Task

__all__ = ["Match", "load"]

MOST_SEATS = 15
_RAW = "-raw"  # the form of a game without TextArena's wrappers
_MOVE = re.compile(r"\[\s*([\w+-][\w+ ,-]{0,20}?)\s*\]")


@dataclass(frozen=True, kw_only=True)
class Match(Task):
    """A game with the task's seed.

    Attributes:
        make: keywords for the game's class.
        max_turns: replies until it is broken off, without a reward for anybody.
    """

    make: dict[str, Any]
    max_turns: int


def load(name: str) -> Environment:
    """The environment of a game.

    Scores are `reward`, the game's own, and `legal`, 0 for a seat whose last move was not. Its
    player `random` takes a move that the last message shows in brackets, or a small number.

    Args:
        name: `ID`, for as few seats as it can be played with, or `ID@SEATS`.

    Raises:
        ConfigError: there is no such game, it cannot be played with that many seats, or it needs
            what is not there.
    """
    game, _, wanted = name.partition("@")
    game = game.removesuffix(_RAW)
    known = [other.removesuffix(_RAW) for other in ENV_REGISTRY if other.endswith(_RAW)]
    if game not in known:
        raise ConfigError(
            f"env.name=textarena:{name}: there is no such game.{suggestion(game, known)}"
        )
    if wanted and not (wanted.isdecimal() and 1 <= int(wanted) <= MOST_SEATS):
        raise ConfigError(f"env.name=textarena:{name}: give 1 to {MOST_SEATS} seats, as {game}@2")
    seats = _seats(name, game, int(wanted or 0))

    def matches(
        seed: int, u: float, *, make: dict[str, Any] | None = None, max_turns: int = 200
    ) -> Match:
        if max_turns < 1:
            raise ConfigError(f"env.args.max_turns={max_turns}: a game has at least one turn")
        return Match(seed=seed, make=make or {}, max_turns=max_turns)

    async def play(task: Match, *agents: Any) -> Scores:
        return await _play(game, task, agents)

    rewards = {"reward": 1.0, "legal": 0.1}
    environment = Environment(play, name=game, source=matches, rewards=rewards, seats=seats)
    environment.player("random")(_any_move)
    return environment


def _seats(name: str, game: str, wanted: int) -> list[str]:
    """Names of the seats: as many as are wanted, or the fewest that the game can begin with."""
    problem = ""
    for count in [wanted] if wanted else range(1, MOST_SEATS + 1):
        try:
            _begin(game, count, 0, {})
        except Exception as error:
            problem = problem or describe_error(error)
            if isinstance(error, AssertionError):  # the number of players
                continue
            break
        return ["agent"] if count == 1 else [f"player{k}" for k in range(count)]
    what = f"cannot be played with {wanted} seats" if wanted else "cannot be played"
    why = " ".join(problem.replace("*", " ").split())[:200]
    raise ConfigError(
        f"env.name=textarena:{name}: it {what} here: {why} … Some games need data that is "
        "downloaded first, an API key, or another release of Python."
    )


def _begin(game: str, seats: int, seed: int, make: dict[str, Any]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        world = textarena.make(f"{game}{_RAW}", **make)
        world.reset(num_players=seats, seed=seed % 2**32)
    return world


async def _play(game: str, task: Match, agents: Sequence[Any]) -> Scores:
    world = _begin(game, len(agents), task.seed, task.make)
    done, turns = False, 0
    while not done and turns < task.max_turns:
        turns += 1
        who, heard = world.get_observation()
        news = "\n".join(text for sender, text, _ in heard if sender != who).strip()
        reply = str(await agents[who](news or "Your move."))
        if "[" not in reply and reply.strip():  # as TextArena's own wrapper does
            reply = f"[{reply.strip()}]"
        done, _ = world.step(action=reply)
    rewards, facts = world.close() if done else ({}, world.state.game_info)
    scores = {
        agent.seat: {
            "reward": float((rewards or {}).get(k, 0.0)),
            "legal": float(not facts[k]["invalid_move"]),
        }
        for k, agent in enumerate(agents)
    }
    return scores if len(agents) > 1 else scores[agents[0].seat]


def _any_move(messages: Sequence[Message], rng: random.Random) -> str:
    shown = _MOVE.findall(messages[-1].content)
    return f"[{rng.choice(shown) if shown else rng.randrange(9)}]"
