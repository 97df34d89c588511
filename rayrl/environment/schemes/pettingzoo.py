"""Games of PettingZoo in text, `env.name=pettingzoo:ID`: a seat for each of its agents.

Each time it is a seat's turn, it is shown the game's own rendering as text where there is one, else
its agent's observation. `spaces` says how observations read and which replies are actions. Of
`Discrete` actions with a mask, only those that it allows are legal.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import keyword
import random
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pettingzoo
from gymnasium import spaces
from pettingzoo.env_registry.exceptions import PettingZooRegistryError
from pettingzoo.utils.conversions import parallel_to_aec

from rayrl.config.registry import attribute_of, load_module, split_reference
from rayrl.environment.environment import Environment
from rayrl.environment.schemes.pettingzoo_guides import Guide, guide_of
from rayrl.environment.schemes.spaces import (
    any_action,
    check_actions,
    check_observations,
    choices,
    instruction,
    listed,
    parse,
    plain,
    readable,
)
from rayrl.environment.signature import suggestion
from rayrl.errors import ConfigError, describe_error
from rayrl.types import Message, Scores, Task

__all__ = ["Match", "load"]

_ANSWER = "Answer with one legal action only."
MASK = "action_mask"  # in an observation or in an agent's info
_YOU = re.compile(r"^You are (.*)\.$", re.MULTILINE)
_LEGAL = re.compile(r"^Legal actions: (.*)$", re.MULTILINE)
_RANGE = re.compile(r"(-?\d+) to (-?\d+)")


@dataclass(frozen=True, kw_only=True)
class Match(Task):
    """A game that is reset with the task's seed.

    Attributes:
        make: keywords for the function that makes it.
        actions: names of its discrete actions, in order; empty: their numbers.
        rules: what every seat is told first.
        planes: those of a board's observation that are shown; empty: all.
        tries: replies in a row that are no legal action until one is drawn.
        max_turns: replies of all seats until it is broken off.
    """

    make: dict[str, Any]
    actions: tuple[str, ...]
    rules: str
    planes: tuple[int, ...]
    tries: int
    max_turns: int


@dataclass(frozen=True)
class _Cast:
    """Who plays a game: its agents, by number the seat and the space of actions of each."""

    agents: tuple[Any, ...]
    seats: tuple[str, ...]
    spaces: tuple[Any, ...]
    planes: int  # that observations have, if those are boards
    renders: bool  # as text


@dataclass
class _Seat:
    """What a seat has done so far, and what it is told with its next observation."""

    agent: Any
    space: Any
    news: str
    reward: float = 0.0
    replies: int = 0
    illegal: int = 0


def load(name: str) -> Environment:
    """The environment of a game.

    Scores of a seat are `reward`, the sum over the game, and `illegal`, the share of its replies
    that were no legal action. Such a reply changes nothing; after some in a row an action is drawn.
    Its player `random` takes any legal action.

    Args:
        name: the ID in PettingZoo's registry, also with a dot for the slash; a module with a
            function `env` or `parallel_env`; `module:function`, `path/to/file.py:function`; or
            `module:ID`, where importing the module registers it.

    Raises:
        ConfigError: there is no such game, it cannot be made, or it has no text.
    """
    guide = guide_of(_maker(name)[1])

    def matches(
        seed: int,
        u: float,
        *,
        make: dict[str, Any] | None = None,
        actions: tuple[str, ...] = guide.actions,
        rules: str = guide.rules,
        planes: tuple[int, ...] = guide.planes,
        tries: int = 3,
        max_turns: int = 200,
    ) -> Match:
        for key, value in (("tries", tries), ("max_turns", max_turns)):
            if value < 1:
                raise ConfigError(f"env.args.{key}={value}: give at least 1")
        cast = _cast(name, make)
        if not all(0 <= plane < cast.planes for plane in planes):
            raise ConfigError(
                f"env.args.planes={list(planes)}: observations of pettingzoo:{name} have "
                f"{cast.planes} planes, counted from 0"
            )
        for agent, space in zip(cast.agents, cast.spaces, strict=True):
            check_actions(f"agent {agent!r} of pettingzoo:{name}", space, actions)
        return Match(
            seed=seed,
            make=make or {},
            actions=actions,
            rules=rules,
            planes=planes,
            tries=tries,
            max_turns=max_turns,
        )

    def seats(make: dict[str, Any] | None, **others: Any) -> Sequence[str]:
        return _cast(name, make).seats

    async def play(task: Match, *agents: Any) -> Scores:
        return await _play(name, guide, task, agents)

    def any_move(messages: Sequence[Message], rng: random.Random, task: Match) -> str:
        return _any_move(_cast(name, task.make), messages, rng, task.actions)

    environment = Environment(
        play,
        name=re.split(r"[/:.]", name)[-1],
        source=matches,
        rewards={"reward": 1.0, "illegal": -0.1},
        seats=seats,
    )
    environment.player("random")(any_move)
    return environment


async def _play(name: str, guide: Guide, task: Match, agents: Sequence[Any]) -> Scores:
    cast = _cast(name, task.make)
    seats = {
        who: _Seat(agent, space, f"You are {who}.\n{task.rules}".strip())
        for who, agent, space in zip(cast.agents, agents, cast.spaces, strict=True)
    }
    left = task.max_turns
    world = _made(name, task.make, cast.renders)
    try:
        world.reset(seed=task.seed % 2**31)
        while world.agents and left:
            who = world.agent_selection
            observation, gained, terminated, truncated, info = world.last()
            if terminated or truncated:
                world.step(None)
                continue
            seat = seats[who]
            mask = _mask(observation, info)
            offered = _offered(guide, world, seat.space, task.actions, mask)
            seen = guide.text(world, who) if guide.text else _text(world, observation, task.planes)
            if mask is None:
                how = instruction(seat.space, task.actions)
            else:
                how = f"Legal actions: {listed(list(offered))}"
                seen += f"\n{how}"
            if not seat.replies:
                seat.news += f"\n{_ANSWER if mask is not None else how}\n\n"
            elif gained:
                seat.news += f"Reward: {float(gained):g}\n\n"
            before = seat.replies
            action = await _action(seat, seen, how, offered, min(task.tries, left))
            left -= seat.replies - before
            if action is None:
                drawn = any_action(seat.space, offered, task.rng("drawn", who, seen))
                action = parse(drawn, seat.space, offered)
                seat.news = f"That was no legal action. {drawn} was played for you.\n\n"
            world.step(action)
            for each, value in world.rewards.items():
                seats[each].reward += float(value)
    finally:
        world.close()
    return {
        seat.agent.seat: {"reward": seat.reward, "illegal": seat.illegal / max(seat.replies, 1)}
        for seat in seats.values()
    }


async def _action(seat: _Seat, seen: str, how: str, offered: Mapping[str, int], tries: int) -> Any:
    """The action that a seat replies; None if so many replies in a row are no legal one."""
    said, seat.news = f"{seat.news}{seen}", ""
    for _ in range(tries):
        reply = await seat.agent(said, state=seen)
        seat.replies += 1
        action = parse(str(reply), seat.space, offered)
        if action is not None:
            return action
        seat.illegal += 1
        said = f"That is no legal action.\n{how}"
    return None


def _offered(
    guide: Guide, world: Any, space: Any, names: Sequence[str], mask: Any
) -> dict[str, int]:
    """`Discrete` actions that can be taken now, by name; all where a mask allows none."""
    if guide.moves and not names:
        return guide.moves(world)
    offered = choices(space, names)
    if mask is None or not np.any(mask):
        return offered
    first = int(space.start)
    return {key: action for key, action in offered.items() if mask[action - first]}


def _mask(observation: Any, info: Any) -> Any:
    """Which actions are legal, if the game says: an array of 0 and 1, or None."""
    for place in (observation, info):
        if isinstance(place, Mapping) and place.get(MASK) is not None:
            return place[MASK]
    return None


def _text(world: Any, observation: Any, planes: Sequence[int]) -> str:
    if getattr(world, "render_mode", None) == "ansi":
        return plain(str(world.render()))
    if isinstance(observation, Mapping):
        observation = {key: part for key, part in observation.items() if key != MASK}
    return readable(observation, planes)


def _any_move(
    cast: _Cast, messages: Sequence[Message], rng: random.Random, names: Sequence[str]
) -> str:
    legal = _LEGAL.findall(messages[-1].content)
    if not legal:
        (who, *_) = _YOU.findall(messages[0].content)
        space = cast.spaces[[str(agent) for agent in cast.agents].index(who)]
        return any_action(space, choices(space, names), rng)
    moves: list[str] = []
    for move in legal[-1].split(", "):
        ends = _RANGE.fullmatch(move)
        moves += map(str, range(int(ends[1]), int(ends[2]) + 1)) if ends else [move]
    return rng.choice(moves)


def _cast(name: str, make: Mapping[str, Any] | None) -> _Cast:
    """Who plays a game that is made with these keywords.

    Raises:
        ConfigError: it cannot be made, or has no text.
    """
    return _cast_of(name, json.dumps(make or {}, sort_keys=True))


@functools.lru_cache(64)
def _cast_of(name: str, make: str) -> _Cast:
    keywords = json.loads(make)
    world = _begun(name, keywords, False)
    agents = tuple(getattr(world, "possible_agents", None) or ())
    if not agents:
        raise ConfigError(
            f"pettingzoo:{name} does not know its agents before it begins (possible_agents), so "
            "they cannot have seats. Write an environment of your own around it."
        )
    renders = "ansi" in (getattr(world, "metadata", None) or {}).get("render_modes", ())
    if renders:
        world.close()
        world = _begun(name, keywords, True)
    actions, planes = [], 0
    shown = getattr(world, "render_mode", None) == "ansi" or guide_of(_maker(name)[1]).text
    for agent in agents:
        where = f"agent {agent!r} of pettingzoo:{name}"
        actions.append(world.action_space(agent))
        check_actions(where, actions[-1], ())
        observations = world.observation_space(agent)
        masked = isinstance(observations, spaces.Dict) and MASK in observations.spaces
        parts = observations.values() if isinstance(observations, spaces.Dict) else [observations]
        shapes = [part.shape or () for part in parts]
        planes = max([planes, *(shape[2] for shape in shapes if len(shape) == 3)])
        if (masked or MASK in world.infos.get(agent, ())) and not isinstance(
            actions[-1], spaces.Discrete
        ):
            raise ConfigError(f"{where} has a mask of actions that are not Discrete: {actions[-1]}")
        if not shown:
            check_observations(where, observations)
    world.close()
    return _Cast(agents, _seat_names(agents), tuple(actions), planes, renders)


def _begun(name: str, make: Mapping[str, Any], renders: bool) -> Any:
    try:
        world = _made(name, make, renders)
        world.reset(seed=0)
    except Exception as error:  # whatever the game's own code raises
        lacking = error if isinstance(error, ImportError) else error.__cause__
        if isinstance(lacking, ImportError):
            raise ConfigError(
                f"pettingzoo:{name} needs what is not installed here ({lacking}): {_remedy(name)}"
            ) from error
        raise ConfigError(
            f"pettingzoo:{name} could not be made with env.args.make={json.dumps(dict(make))}: "
            f"{describe_error(error)}"
        ) from error
    return world


def _made(name: str, make: Mapping[str, Any], renders: bool) -> Any:
    maker, _ = _maker(name)
    with warnings.catch_warnings():  # of spaces and render modes, each time
        warnings.simplefilter("ignore")
        world = maker(**{**({"render_mode": "ansi"} if renders else {}), **make})
        return parallel_to_aec(world) if isinstance(world, pettingzoo.ParallelEnv) else world


def _remedy(name: str) -> str:
    """What to install for one of PettingZoo's own games."""
    family = _maker(name)[1].partition("/")[0]
    return f"pip install 'pettingzoo[{family}]'" if family else "install it"


@functools.lru_cache(64)
def _maker(name: str) -> tuple[Callable[..., Any], str]:
    """The function that makes a game, and its ID in PettingZoo's registry, or "".

    Raises:
        ConfigError: there is none.
    """
    place, attribute = split_reference(name)
    if not attribute:
        if found := _registered(name) or _registered(_slashed(name)):
            return found
        top, dot, _ = name.partition(".")
        module = top if dot and top.isidentifier() else ""
        if not module or importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"env.name=pettingzoo:{name}: there is no such game"
                + (f", and no module {module!r} is installed" if module else "")
                + f".{_nearest(name)} Those of other packages are named by their module, as "
                "mpe2.simple_spread_v3."
            )
    home = load_module("env.name", f"{place}:{attribute}")
    for function in [attribute] if attribute else ["env", "parallel_env"]:
        if callable(made := attribute_of(home, function)):
            return made, ""
    if attribute and (found := _registered(attribute)):
        return found
    raise ConfigError(
        f"env.name=pettingzoo:{name}: {place} has no {attribute or 'env or parallel_env'}"
        + (" and registers no such game" if attribute else "")
    )


def _slashed(name: str) -> str:
    """`classic/tictactoe_v3` for `classic.tictactoe_v3` and `pettingzoo.classic.tictactoe_v3`."""
    return "/".join(name.removeprefix("pettingzoo.").rsplit(".", 1))


def _registered(name: str) -> tuple[Callable[..., Any], str] | None:
    for kind in ("aec", "parallel"):
        try:
            spec = pettingzoo.spec(kind, name)
        except PettingZooRegistryError:
            continue
        return functools.partial(pettingzoo.make, kind, spec.id), spec.id
    return None


def _nearest(name: str) -> str:
    """Games whose name is like this one, of whichever version."""
    known = sorted({*pettingzoo.aec_registry, *pettingzoo.parallel_registry})
    wanted = re.sub(r"[-_]v\d+$", "", _slashed(name))
    same = [game for game in known if game.rpartition("-v")[0].endswith(wanted.rpartition("/")[2])]
    return suggestion(same[0] if same else _slashed(name).replace("_v", "-v"), known)


def _seat_names(agents: Sequence[Any]) -> tuple[str, ...]:
    """Agents' names as parameters may be called; numbered ones if they are the same then."""
    names = [re.sub(r"\W", "_", str(agent)) for agent in agents]
    names = [
        name if name.isidentifier() and not keyword.iskeyword(name) else f"agent_{name}"
        for name in names
    ]
    if len(set(names)) < len(names):
        return tuple(f"agent_{k}" for k in range(len(names)))
    return tuple(names)
