"""The `reset`/`step` form of an environment, as a thin layer over the coroutine form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from rayrl.environment.environment import Environment, TaskSource
from rayrl.environment.group_reward import GroupReward
from rayrl.types import Message, Scores, Task, user

__all__ = ["TextWorld", "from_gymnasium"]


class TextWorld(Protocol):
    """What `from_gymnasium` drives: Gymnasium's interface with text (or messages) to read.

    The first observation comes from `reset(seed=, options={"task": task})`; every reply goes to
    `step`, until it says terminated or truncated.
    """

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start over; returns what the model reads first, and extra information."""
        ...

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take the model's reply; returns observation, reward, terminated, truncated, info."""
        ...


def from_gymnasium(
    make: Callable[[], TextWorld],
    *,
    tasks: TaskSource,
    rewards: Mapping[str, float | GroupReward] | None = None,
    name: str | None = None,
) -> Environment:
    """An `Environment` out of a class with `reset` and `step`.

    Args:
        make: called once an episode; usually the class.
        tasks: as for `rayrl.env`.
        rewards: weights of `reward` (the sum of the steps' rewards; 1.0 unless given) and of the
            scores the class puts into `info["scores"]` of its last step.
        name: by default that of `make`.
    """
    label = name or str(getattr(make, "__name__", type(make).__name__))

    async def play(task: Task, agent: Any) -> Scores:
        world = make()
        try:
            observation, info = world.reset(seed=task.seed, options={"task": task})
            total, over = 0.0, False
            while not over:
                reply = await agent(_prompt(observation))
                observation, reward, terminated, truncated, info = world.step(str(reply))
                total += float(reward)
                over = terminated or truncated
            return {"reward": total, **info.get("scores", {})}
        finally:
            close = getattr(world, "close", None)
            if close is not None:
                close()

    declared: dict[str, float | GroupReward] = {"reward": 1.0, **(rewards or {})}
    return Environment(play, name=label, source=tasks, rewards=declared, ref="")


def _prompt(observation: Any) -> Any:
    is_message = isinstance(observation, Message)
    is_messages = isinstance(observation, (list, tuple)) and all(
        isinstance(item, Message) for item in observation
    )
    return observation if is_message or is_messages else user(str(observation))
