"""Programs that know nothing of rayrl as agents of an environment."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import rayrl
from rayrl import Agent, Scores, Task

AGENTS = Path(__file__).parent / "rollout" / "programs" / "agents"
FILES = ("chat_loop", "claude", "graph", "openai_agents", "team")


@dataclass(frozen=True, kw_only=True)
class Sum(Task):
    file: str
    a: int
    b: int


def sums(seed: int, u: float, *, file: str = "") -> Sum:
    """A sum for the program of that name, by default for each of them in turn."""
    rng = Task(seed=seed).rng("numbers")
    chosen = file or FILES[int(u * len(FILES))]
    return Sum(seed=seed, file=chosen, a=rng.randrange(100), b=rng.randrange(100))


@rayrl.env(tasks=sums, rewards={"vowels": 1.0})
async def asks(task: Sum, agent: Agent) -> Scores:
    """The share of vowels in what the program prints; some do not cope with a reply cut short."""
    async with agent.endpoint() as at:
        more = {"seed": task.seed, "stream": task.seed % 2 == 1}
        given = json.dumps({"a": task.a, "b": task.b, **more})
        words = [sys.executable, AGENTS / f"{task.file}.py"]
        done = await rayrl.program(words, at, stdin=given, check=False)
    said = done.stdout + done.stderr
    return {"vowels": sum(letter in "aeiou" for letter in said) / max(1, len(said))}
