"""Environments on a server of OpenEnv, `env.name=openenv:URL`: an observation, and an action back.

Each episode is a session of its own on the server. What an action is comes from the server's
schema: the reply itself, a number or one of several choices if the action has one field; else a
JSON object. If the actions are calls of tools (MCP), the server lists the tools.
"""

from __future__ import annotations

import asyncio
import math
import random
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rayrl.environment.environment import Environment
from rayrl.environment.schemes.openenv_server import Rejected, base_url, inspect_server, session
from rayrl.environment.schemes.schema_actions import NoAction
from rayrl.errors import ConfigError, EnvError, safe_repr
from rayrl.types import Message, Scores, Task

__all__ = ["Session", "load"]


@dataclass(frozen=True, kw_only=True)
class Session(Task):
    """A session that is reset with the task's seed.

    Attributes:
        reset: keywords of the environment's reset.
        seeded: whether the seed is one of them.
        field: the action's field that a reply is the value of; empty: its only one, or a JSON
            object of all.
        max_turns: replies until the episode is cut off.
        max_chars: longest text of an observation; the middle of a longer one is left out.
        timeout_s: longest wait for an answer of the server.
    """

    reset: Mapping[str, Any]
    seeded: bool
    field: str
    max_turns: int
    max_chars: int
    timeout_s: float


def load(name: str) -> Environment:
    """The environment of a server.

    Scores are `reward`, the sum over the steps, and `illegal`, the share of replies that were no
    action or that the server rejected. Its player `random` takes any action of the schema.

    Args:
        name: the server's URL, as OpenEnv's client takes it.

    Raises:
        ConfigError: it is no URL, no OpenEnv server answers there, or its actions have no text.
    """
    url = base_url(name)
    with ThreadPoolExecutor(1) as thread:  # an event loop may be running in this one
        all_fields, slots = thread.submit(asyncio.run, inspect_server(url)).result()

    def sessions(
        seed: int,
        u: float,
        *,
        reset: dict[str, Any] | None = None,
        seeded: bool = True,
        field: str = "",
        max_turns: int = 50,
        max_chars: int = 20_000,
        timeout_s: float = 60.0,
    ) -> Session:
        if seeded and "seed" in (reset or {}):
            raise ConfigError(
                "env.args.reset has a seed, and so does every task: set env.args.seeded=false to "
                "begin each episode with the same one"
            )
        for key, value, least in (("max_turns", max_turns, 1), ("max_chars", max_chars, 100)):
            if value < least:
                raise ConfigError(f"env.args.{key}={value}: at least {least}")
        if not 0 < timeout_s < math.inf:
            raise ConfigError(f"env.args.timeout_s={timeout_s}: a number of seconds above 0")
        all_fields.with_field(field)
        return Session(
            seed=seed,
            reset=reset or {},
            seeded=seeded,
            field=field,
            max_turns=max_turns,
            max_chars=max_chars,
            timeout_s=timeout_s,
        )

    async def play(task: Session, agent: Any) -> Scores:
        actions = all_fields.with_field(task.field)
        async with session(url, task.timeout_s) as server:
            seed = {"seed": task.seed % 2**31} if task.seeded else {}
            try:
                seen, _, done = await server.act("reset", {**task.reset, **seed}, task.max_chars)
            except Rejected as error:
                raise EnvError(
                    f"{url} could not reset its environment with {safe_repr(dict(task.reset))} "
                    f"(env.args.reset): {error.code}: {error}"
                ) from error
            shown = f"{actions.instruction}{actions.details}\n\n{seen}"
            total, illegal, turns = 0.0, 0, 0
            while not done and turns < task.max_turns:
                turns += 1
                reply = str(await agent(shown, state=seen))
                try:
                    action = actions.parse(reply)
                    seen, reward, done = await server.act("step", action, task.max_chars)
                except (NoAction, Rejected) as error:
                    illegal += 1
                    if isinstance(error, Rejected) and error.is_last:
                        break
                    shown = f"That is no action: {error}\n{actions.instruction}"
                    continue
                total += reward or 0.0
                shown = seen if reward is None else f"Reward: {reward:g}\n\n{seen}"
        return {"reward": total, "illegal": illegal / max(turns, 1)}

    def any_action(messages: Sequence[Message], rng: random.Random, task: Session) -> str:
        return all_fields.with_field(task.field).sample(rng, messages[-1].content)

    environment = Environment(
        play,
        name=re.sub(r"[^\w.]+", "-", url.partition("://")[2]),
        source=sessions,
        rewards={"reward": 1.0, "illegal": -0.1},
        slots=slots,
    )
    environment.player("random")(any_action)
    return environment
