"""Environments that a model of noise gets different rewards in, and some that go wrong."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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


_below_four = itertools.count()


async def closed(k: int) -> None:
    """Wait for ever, in a process that TALK_CLOSED tells so, once three batches were let through.

    Half of each batch's episodes, those with a number below 4, count themselves in that file.
    """
    count = os.environ.get("TALK_CLOSED")
    if count and k < 4 and next(_below_four) >= 3 * 8:
        count_one(Path(count))
        await asyncio.Event().wait()


@rayrl.env(tasks=numbers, rewards={"vowels": 1.0})
async def talk(task: Number, agent: Any) -> Scores:
    """Two turns; the reward is the share of vowels in what was said."""
    said = await agent(f"the number is {task.k}")
    await closed(task.k)
    match task.fault:
        case "raise":
            raise ZeroDivisionError("the fault of number 3")
        case "hang":
            time.sleep(600)  # noqa: ASYNC251  # what is tested
        case "stuck":  # in C code that holds the interpreter's lock, so that no thread goes on
            ctypes.PyDLL(None).sleep(600)
        case "nan":
            return {"vowels": float("nan")}
        case "exit":
            os._exit(1)
    said += await agent("go on")
    return {"vowels": sum(letter in "aeiou" for letter in said) / max(1, len(said))}


@rayrl.env(tasks=numbers, rewards={"vowels": 1.0, "any": 0.0})
async def brief(task: Number, agent: Any) -> Scores:
    """One turn; the share of vowels in it, and whether there is any."""
    said = await agent(f"the number is {task.k}")
    vowels = sum(letter in "aeiou" for letter in said) / max(1, len(said))
    return {"vowels": vowels, "any": float(vowels > 0)}


@rayrl.env(tasks=numbers, rewards={"vowels": 1.0})
async def team(task: Number, agent: Any) -> Scores:
    """Two sub-agents at once, which begin with the plan or anew, of two turns each; a compaction.

    If TEAM_KILLED names a folder, its process dies after the first turn of a task, after the second
    of another one, and so on up to the seventh: files there name these tasks.
    """
    replies: list[str] = []

    async def ask(who: Any, prompt: str) -> None:
        replies.append(await who(prompt))
        if folder := os.environ.get("TEAM_KILLED"):
            died = os.listdir(folder)
            if len(died) == len(replies) - 1 and str(task.seed) not in died:
                (Path(folder) / str(task.seed)).touch()
                os.kill(os.getpid(), signal.SIGKILL)

    async def part(number: int) -> None:
        own = agent.branch(f"part{number}", empty=number == 1)
        for _ in range(2):
            await ask(own, f"part {number} of {task.k}")

    await ask(agent, f"plan {task.k}")
    await asyncio.gather(*[part(number) for number in range(2)])
    await ask(agent, "put it together")
    agent.restart()
    await ask(agent, f"and {task.k} again")
    said = "".join(sorted(replies))
    return {"vowels": sum(letter in "aeiou" for letter in said) / max(1, len(said))}


_judged = {"EVAL_OPEN": itertools.count(), "TRAIN_OPEN": itertools.count()}


async def vowels(reply: str, row: rayrl.Row) -> float:
    """The share of vowels; a reward of rows whose k says whether they are for evaluation: from 8.

    In a process that has one of these variables, so many replies are let through: EVAL_OPEN of
    evaluations, TRAIN_OPEN of training.
    """
    part = "EVAL_OPEN" if row["k"] >= 8 else "TRAIN_OPEN"
    if next(_judged[part]) >= int(os.environ.get(part, "1000000")):
        await asyncio.Event().wait()
    return sum(letter in "aeiou" for letter in reply) / max(1, len(reply))


def has_vowel(reply: str, row: rayrl.Row) -> float:
    return float(any(letter in "aeiou" for letter in reply))


@dataclass(frozen=True, kw_only=True)
class Mortal(Task):
    k: int
    flag: str


def mortals(seed: int, u: float, *, flag: str = "") -> Mortal:
    """Numbers 0 to 7, and a file that says that the worker has died already."""
    return Mortal(seed=seed, k=int(u * 8), flag=flag)


def die_once(flag: Path) -> None:
    if not flag.exists():
        flag.touch()
        os._exit(1)


@rayrl.env(tasks=mortals, rewards={"letters": 1.0})
async def mortal(task: Mortal, agent: Any) -> Scores:
    """Three turns; before its third, number 3 takes its worker down, once.

    It waits for the file `flag`-recorded: until the recorder has what was said.
    """
    said = [await agent(f"turn {turn} of {task.k}") for turn in range(2)]
    if task.k == 3 and not is_there(task.flag):
        while not is_there(f"{task.flag}-recorded"):  # noqa: ASYNC110  # a file tells nobody
            await asyncio.sleep(0.02)
        die_once(Path(task.flag))
    said.append(await agent("the last"))
    return {"letters": float(len("".join(said)))}


@dataclass(frozen=True, kw_only=True)
class Gated(Task):
    k: int
    gate: str


def gated(seed: int, u: float, *, gate: str) -> Gated:
    """Numbers 0 to 7, and a file that lets them end."""
    return Gated(seed=seed, k=int(u * 8), gate=gate)


@rayrl.env(tasks=gated, rewards={"letters": 1.0, "process": 0.0})
async def waits(task: Gated, agent: Any) -> Scores:
    """Two turns, the second once the gate is open; `process` says where it was played.

    Who waits leaves a file beside the gate, named after its process.
    """
    said = await agent(f"the number is {task.k}")
    Path(f"{task.gate}.{os.getpid()}").touch()  # noqa: ASYNC240
    while not Path(task.gate).exists():  # noqa: ASYNC110, ASYNC240
        await asyncio.sleep(0.02)
    said += await agent("go on")
    return {"letters": float(len(said)), "process": float(os.getpid())}


def is_there(flag: str) -> bool:
    return Path(flag).exists()


def count_one(file: Path) -> None:
    with file.open("a") as out:
        out.write(".")


@waits.player("parrot")
@talk.player("parrot")
def parrot(messages: Sequence[Message], rng: random.Random) -> str:
    return messages[-1].content
