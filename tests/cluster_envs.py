"""Environments that a model of noise gets different rewards in, and some that go wrong."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import rayrl
from rayrl import Message, Scores, Task


@dataclass(frozen=True, kw_only=True)
class Number(Task):
    k: int
    fault: str = ""


def numbers(seed: int, u: float, *, fault: str = "") -> Number:
    """Numbers 0 to 7; number 3 goes wrong in the way `fault` says."""
    k = int(u * 8)
    return Number(seed=seed, k=k, fault=fault if k == 3 else "")


@rayrl.env(tasks=numbers, rewards={"vowels": 1.0})
async def talk(task: Number, agent: Any) -> Scores:
    """Two turns; the reward is the share of vowels in what was said."""
    said = await agent(f"the number is {task.k}")
    match task.fault:
        case "raise":
            raise ZeroDivisionError("the fault of number 3")
        case "hang":
            time.sleep(600)  # noqa: ASYNC251  # what is tested
        case "nan":
            return {"vowels": float("nan")}
        case "exit":
            os._exit(1)
    said += await agent("go on")
    return {"vowels": sum(letter in "aeiou" for letter in said) / max(1, len(said))}


@talk.player("parrot")
def parrot(messages: Sequence[Message], rng: random.Random) -> str:
    return messages[-1].content
