"""Environments of Gymnasium in text, `env.name=gymnasium:ID`: an observation, and an action back.

What is shown is the environment's own rendering as text, where it has one, or the observation.
`spaces` says how they read and which replies are actions.
"""

from __future__ import annotations

import functools
import importlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium

from rayrl.environment.environment import Environment
from rayrl.environment.schemes.spaces import (
    any_action,
    check_actions,
    check_observations,
    choices,
    instruction,
    parse,
    plain,
    readable,
)
from rayrl.errors import ConfigError
from rayrl.types import Message, Scores, Task

__all__ = ["Start", "load"]


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
        offered = choices(space, task.actions)
        how = instruction(space, task.actions)
        seen = _text(world, observation)
        shown = f"{how}\n\n{seen}"
        total, illegal, turns = 0.0, 0, 0
        while turns < task.max_turns:
            turns += 1
            reply = await agent(shown, state=seen)
            action = parse(str(reply), space, offered)
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
    return any_action(space, choices(space, task.actions), rng)


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
    check_actions(f"gymnasium:{task.id}", space, task.actions)
    return space


@functools.lru_cache(64)
def _space(name: str, make: str) -> Any:
    try:
        world = _made(name, json.loads(make))
    except Exception as error:  # whatever the environment's own code raises
        raise ConfigError(f"gymnasium:{name} could not be made with {make}: {error}") from error
    space, mode = world.action_space, world.render_mode
    seen = world.observation_space
    world.close()
    if mode != "ansi":
        check_observations(f"gymnasium:{name}", seen)
    return space


def _text(world: Any, observation: Any) -> str:
    return plain(world.render()) if world.render_mode == "ansi" else readable(observation)
