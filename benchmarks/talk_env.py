"""The environments of `benchmarks/grpo_step.py`: `single` and `multi`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import rayrl

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
import talk  # type: ignore[import-not-found]  # shared with the peer


@dataclass(frozen=True, kw_only=True)
class Subject(rayrl.Task):
    """Task: what to write about."""

    subject: str


def subjects(seed: int, u: float) -> Subject:
    """Choose a subject."""
    return Subject(seed=seed, subject=talk.SUBJECTS[int(u * len(talk.SUBJECTS))])


async def _story(task: Subject, agent: rayrl.Agent, turns: int) -> dict[str, float]:
    text = str(await agent(talk.ASK.format(task.subject)))
    for _ in range(turns - 1):
        text += await agent(talk.CONTINUE)
    return {"vowels": talk.score(text)}


@rayrl.env(tasks=subjects, rewards={"vowels": 1.0})
async def single(task: Subject, agent: rayrl.Agent) -> rayrl.Scores:
    """One question, one reply."""
    return await _story(task, agent, talk.TURNS["single"])


@rayrl.env(tasks=subjects, rewards={"vowels": 1.0})
async def multi(task: Subject, agent: rayrl.Agent) -> rayrl.Scores:
    """Four questions, four replies."""
    return await _story(task, agent, talk.TURNS["multi"])
