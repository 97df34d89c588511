"""Environments of Gymnasium in text, `env.name=gymnasium:ID`: an observation, and an action back.

What is shown is the environment's own rendering as text, where it has one, or the observation: what
is highlighted there stands between stars, the colour of a letter in brackets behind it. An
action is the whole reply or what stands between `<action>` and `</action>`: the number of one of
`Discrete` actions or its name, the numbers of a `Box`, anything that a `Text` space has.
"""

from __future__ import annotations

import functools
import importlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from rayrl.environment.environment import Environment
from rayrl.errors import ConfigError
from rayrl.types import Message, Scores, Task

__all__ = ["Start", "load"]

_TAGGED = re.compile(r"<action>(.*?)</action>", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_HIGHLIGHT = re.compile(r"\x1b\[4\d(?:;1)?m(.*?)\x1b\[0m", re.DOTALL)  # where the agent is, say
_COLOUR = re.compile(r"\x1b\[3(\d)(?:;1)?m(.*?)\x1b\[0m", re.DOTALL)
_COLOURS = ("black", "red", "green", "yellow", "blue", "magenta", "cyan", "white")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, kw_only=True)
class Start(Task):
    """An environment that is reset with the task's seed.

    Attributes:
        id: in Gymnasium's registry.
        make: keywords for `gymnasium.make`.
        actions: names of its discrete actions, in order; empty: their numbers.
        max_turns: replies until the episode is cut off.
    """

    id: str
    make: Mapping[str, Any]
    actions: tuple[str, ...]
    max_turns: int


def load(name: str) -> Environment:
    """The environment that Gymnasium's registry has under an ID.

    Scores are `reward`, the sum over the steps, and `illegal`, the share of replies that were no
    action; such a reply changes nothing in the environment. Its player `random` takes any action.

    Args:
        name: `ID`, or `module:ID`, where importing the module registers it.

    Raises:
        ConfigError: there is none.
    """
    try:
        _spec(name)
    except (gymnasium.error.Error, ImportError) as error:
        raise ConfigError(f"env.name=gymnasium:{name}: {error}") from error

    def starts(
        seed: int,
        u: float,
        *,
        make: dict[str, Any] | None = None,
        actions: tuple[str, ...] = (),
        max_turns: int = 50,
    ) -> Start:
        if max_turns < 1:
            raise ConfigError(f"env.args.max_turns={max_turns}: an episode has at least one turn")
        start = Start(seed=seed, id=name, make=make or {}, actions=actions, max_turns=max_turns)
        _action_space(start)
        return start

    rewards = {"reward": 1.0, "illegal": -0.1}
    environment = Environment(
        _play, name=_spec(name).id.rpartition("/")[2], source=starts, rewards=rewards
    )
    environment.player("random")(_any_action)
    return environment


def _spec(name: str) -> Any:
    module, _, registered = name.rpartition(":")
    if module:
        importlib.import_module(module)
    return gymnasium.spec(registered)


async def _play(task: Start, agent: Any) -> Scores:
    world = _made(task.id, task.make)
    try:
        observation, _ = world.reset(seed=task.seed % 2**31)
        space = world.action_space
        how = _instruction(space, task.actions)
        seen = _text(world, observation)
        shown = f"{how}\n\n{seen}"
        total, illegal, turns = 0.0, 0, 0
        while turns < task.max_turns:
            turns += 1
            reply = await agent(shown, state=seen)
            action = _action(str(reply), space, task.actions)
            if action is None:
                illegal += 1
                shown = f"That is no action. {how}"
                continue
            observation, reward, terminated, truncated, _ = world.step(action)
            total += float(reward)
            if terminated or truncated:
                break
            seen = _text(world, observation)
            shown = f"Reward: {float(reward):g}\n\n{seen}"
    finally:
        world.close()
    return {"reward": total, "illegal": illegal / turns}


def _any_action(messages: Sequence[Message], rng: random.Random, task: Start) -> str:
    space = _action_space(task)
    if isinstance(space, spaces.Discrete):
        index = rng.randrange(int(space.n))
        return task.actions[index] if task.actions else str(int(space.start) + index)
    if isinstance(space, spaces.Text):
        length = rng.randint(space.min_length, space.max_length)
        return "".join(rng.choices(sorted(space.character_set), k=length))
    low, high = np.clip(space.low, -1e3, None).ravel(), np.clip(space.high, None, 1e3).ravel()
    ends = zip(low, high, strict=True)
    if np.issubdtype(space.dtype, np.integer):
        return " ".join(str(rng.randint(int(least), int(most))) for least, most in ends)
    return " ".join(f"{rng.uniform(least, most):.3f}" for least, most in ends)


def _made(name: str, make: Mapping[str, Any]) -> Any:
    kind: Any = _spec(name).entry_point
    kind = gymnasium.envs.registration.load_env_creator(kind) if isinstance(kind, str) else kind
    in_text = "ansi" in (getattr(kind, "metadata", None) or {}).get("render_modes", ())
    options = {"render_mode": "ansi"} if in_text else {}
    return gymnasium.make(name, disable_env_checker=True, **{**options, **make})


def _action_space(task: Start) -> Any:
    """The space of an environment's actions.

    Raises:
        ConfigError: it cannot be made, or its actions have no text.
    """
    space = _space(task.id, json.dumps(dict(task.make)))
    if isinstance(space, spaces.Discrete):
        if len(task.actions) not in (0, int(space.n)):
            raise ConfigError(
                f"env.args.actions has {len(task.actions)} names, and gymnasium:{task.id} has "
                f"{space.n} actions"
            )
    elif task.actions:
        raise ConfigError(f"env.args.actions: gymnasium:{task.id} has no actions to name: {space}")
    return space


@functools.lru_cache(64)
def _space(name: str, make: str) -> Any:
    try:
        world = _made(name, json.loads(make))
    except Exception as error:  # whatever the environment's own code raises
        raise ConfigError(f"gymnasium:{name} could not be made with {make}: {error}") from error
    space = world.action_space
    world.close()
    if not isinstance(space, spaces.Discrete | spaces.Box | spaces.Text):
        raise ConfigError(
            f"gymnasium:{name} has actions of {space}, which have no text here: Discrete, Box and "
            "Text have. Wrap it in an environment of your own, see rayrl.from_gymnasium."
        )
    return space


def _instruction(space: Any, names: Sequence[str]) -> str:
    if names:
        return f"Actions: {', '.join(names)}. Answer with one of them only."
    if isinstance(space, spaces.Discrete):
        first = int(space.start)
        return (
            f"Actions: {first} to {first + int(space.n) - 1}. Answer with the number of one only."
        )
    if isinstance(space, spaces.Text):
        of = space.characters
        return f"Answer with {space.min_length} to {space.max_length} of the characters {of}"
    ends = zip(space.low.ravel(), space.high.ravel(), strict=True)
    ranges = ", ".join(f"{low:g} to {high:g}" for low, high in ends)
    return f"An action has these numbers: {ranges}. Answer with the numbers only."


def _action(reply: str, space: Any, names: Sequence[str]) -> Any:
    """The action that a reply is; None if it is none."""
    tagged = _TAGGED.findall(reply)
    text = (tagged[-1] if tagged else reply).strip()
    if isinstance(space, spaces.Text):
        return text if space.contains(text) else None
    if isinstance(space, spaces.Discrete):
        known = [name.lower() for name in names] or [
            str(int(space.start) + k) for k in range(int(space.n))
        ]
        return int(space.start) + known.index(text.lower()) if text.lower() in known else None
    if _NUMBER.sub("", text).strip(" \n\t,[]()"):
        return None  # there is more than numbers
    numbers = np.array([float(number) for number in _NUMBER.findall(text)])
    if numbers.size != space.low.size:
        return None
    with np.errstate(all="ignore"):  # what does not fit the type is not in the space
        action = numbers.astype(space.dtype).reshape(space.shape)
    if np.issubdtype(space.dtype, np.integer) and (action.ravel() != numbers).any():
        return None
    return action if space.contains(action) else None


def _text(world: Any, observation: Any) -> str:
    if world.render_mode != "ansi":
        return str(observation)
    text = _HIGHLIGHT.sub(r"*\1*", world.render())
    text = _COLOUR.sub(lambda found: f"{found[2]}({_COLOURS[int(found[1]) % 8]})", text)
    return _ANSI.sub("", text).strip()
