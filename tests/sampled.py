"""What task samplers are tried on: an environment, rows, and groups of given rewards."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rayrl
from rayrl import Agent, Scores
from rayrl.environment.environment import Environment, TaskSource
from rayrl.types import Episode, Failure, Group, Task, Turn


@dataclass(frozen=True, kw_only=True)
class At(Task):
    u: float = 0.0


def source(seed: int, u: float) -> At:
    return At(seed=seed, u=u)


def environment(tasks: TaskSource = source) -> Environment:
    async def play(task: Task, agent: Agent) -> Scores:
        raise NotImplementedError

    return rayrl.env(tasks=tasks, rewards={"right": 1.0}, name="x")(play)


def rows(folder: Path, n: int) -> rayrl.Rows[Any]:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"k": k}) + "\n" for k in range(n)))
    return rayrl.rows(file)


def group(*rewards: float, kind: str = "", task: Task | None = None, tokens: int = 1) -> Group:
    task = task or Task()
    turn = Turn("agent", (), "", "stop", completion_ids=(1,) * tokens)
    failure = Failure(kind, "because") if kind else None  # type: ignore[arg-type]
    return Group(
        "g",
        task,
        tuple(
            Episode(f"g/{k}", "x", task, k, (turn,), {}, {"agent": reward}, failure)
            for k, reward in enumerate(rewards)
        ),
    )


SAME, DIFFERENT = (1.0, 1.0), (0.0, 1.0)
