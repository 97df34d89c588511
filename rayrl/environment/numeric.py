"""A numeric view of an environment, for policies over numbers: RLlib's, or any on Gymnasium.

What a seat has been told becomes an array, and the index of an action becomes the reply.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rayrl.config.registry import function_name
from rayrl.errors import ConfigError, EnvError, describe_error, safe_repr
from rayrl.types import Message

__all__ = ["LegalFunction", "NumericView", "ObserveFunction"]

ObserveFunction = Callable[[Sequence[Message]], Any]
"""`def observe(messages)`: the observation as numbers, from the whole conversation of a seat."""
LegalFunction = Callable[[Sequence[Message]], Sequence[int]]
"""`def legal(messages)`: indices of the actions that are legal now."""


@dataclass(frozen=True)
class NumericView:
    """How a policy over numbers sees a seat, and what its actions say.

    Attributes:
        observe: takes the conversation of a seat, the messages to answer last.
        shape: of the observation.
        low: least value in it.
        high: largest value in it.
        actions: the reply that each action stands for.
        legal: as `observe`, gives the indices of legal actions; None: all are.
    """

    observe: ObserveFunction
    shape: tuple[int, ...]
    low: float
    high: float
    actions: tuple[str, ...]
    legal: LegalFunction | None = None

    def __post_init__(self) -> None:
        if len(self.actions) < 2 or not all(isinstance(one, str) for one in self.actions):
            raise ConfigError(
                f"observation(actions={safe_repr(self.actions)}): give the reply of each action, "
                "at least two"
            )
        if not self.low < self.high:
            raise ConfigError(f"observation(low={self.low}, high={self.high}): low must be less")

    def observation(self, messages: Sequence[Message]) -> Any:
        """The observation, a float32 array of `shape`.

        Raises:
            EnvError: the function failed, or what it returned is not in the space.
        """
        import numpy as np  # not in `import rayrl`

        name = function_name(self.observe)
        seen = _call(self.observe, messages)
        try:
            array = np.asarray(seen, np.float32)
        except (TypeError, ValueError) as error:
            raise EnvError(f"{name} returned {safe_repr(seen)}: {error}") from error
        if array.shape != self.shape:
            raise EnvError(f"{name} returned the shape {array.shape}, declared is {self.shape}")
        if not ((array >= self.low) & (array <= self.high)).all():
            raise EnvError(
                f"{name} returned {safe_repr(seen)}: each number must lie between "
                f"low={self.low:g} and high={self.high:g}"
            )
        return array

    def mask(self, messages: Sequence[Message]) -> Any:
        """Which actions are legal: float32, 1 or 0 for each.

        Raises:
            EnvError: the function failed, or named no action or one that there is not.
        """
        import numpy as np

        if self.legal is None:
            return np.ones(len(self.actions), np.float32)
        found = list(_call(self.legal, messages))
        if not found or not set(found) <= set(range(len(self.actions))):
            raise EnvError(
                f"{function_name(self.legal)} returned {safe_repr(found)}: name at least one "
                f"action, from 0 to {len(self.actions) - 1}"
            )
        mask = np.zeros(len(self.actions), np.float32)
        mask[found] = 1.0
        return mask

    def any_action(self, messages: Sequence[Message], rng: random.Random) -> str:
        """Reply with a random legal action; a scripted player."""
        self.observation(messages)
        mask = self.mask(messages)
        return self.actions[rng.choice([k for k in range(len(self.actions)) if mask[k]])]


def _call(function: Callable[[Sequence[Message]], Any], messages: Sequence[Message]) -> Any:
    try:
        return function(messages)
    except Exception as error:
        raise EnvError(f"{function_name(function)} raised {describe_error(error)}") from error
