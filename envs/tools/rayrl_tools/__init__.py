"""Questions that need tools: a search over documents no model can know, and a calculator."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import rayrl
from rayrl import Agent, ConfigError, Episode, Message, Scores, Task, system, user

from . import players
from .desk import Desk
from .questions import LEVELS, ask, same

__all__ = ["Errand", "errands", "score", "tools"]

SYSTEM = (
    "Answer the question. Its facts are in documents that only the tools can find: search for a "
    "name, open its document, and use the calculator for arithmetic. You may make several calls "
    "at once. If a tool fails, try again. When you know the answer, write "
    "<answer>answer</answer>: a number in digits, or a name."
)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Errand(Task):
    """A question to be answered with tools.

    Attributes:
        needed: tool calls it takes.
        failure_rate: probability that a search or an opening of a document fails.
        protocol: how calls are written, see `Agent.__call__`.
        rounds: times the model may call tools before it must answer.
    """

    question: str
    answer: str
    level: int
    needed: int
    failure_rate: float
    protocol: Literal["native", "text"]
    rounds: int
    system_prompt: str


def errands(
    seed: int,
    u: float,
    *,
    split: Literal["train", "test"] = "train",
    easiest: int = 1,
    hardest: int = LEVELS,
    failure_rate: float = 0.0,
    protocol: Literal["native", "text"] = "native",
    rounds: int = 20,
    system_prompt: str = SYSTEM,
) -> Errand:
    """A question whose level is at `u` of the way from easiest to hardest.

    Raises:
        ConfigError: no level, no round, or a failure rate that is no probability below 1.
    """
    if not 1 <= easiest <= hardest <= LEVELS:
        raise ConfigError(
            f"easiest={easiest} and hardest={hardest} leave no level: choose 1 <= easiest <= "
            f"hardest <= {LEVELS}."
        )
    if not 0.0 <= failure_rate < 1.0:
        raise ConfigError(f"failure_rate={failure_rate}: choose 0 <= failure_rate < 1.")
    if rounds < 1:
        raise ConfigError(f"rounds={rounds} leaves no call of a tool: choose at least 1.")
    level = easiest + int(u * (hardest - easiest + 1))
    question = ask(Task(seed=seed).rng("question"), level, split)
    return Errand(
        seed=seed,
        question=question.text,
        answer=question.answer,
        level=level,
        needed=question.needed,
        failure_rate=failure_rate,
        protocol=protocol,
        rounds=rounds,
        system_prompt=system_prompt,
    )


def score(task: Errand, reply: str, calls: int, valid: int) -> dict[str, float]:
    """Scores of an episode.

    Args:
        task: the question.
        reply: the last one.
        calls: tool calls made, `valid` of which were as they should be.
    """
    found = _ANSWER.findall(reply)
    correct = float(len(found) == 1 and same(task.answer, found[0]))
    return {
        "correct": correct,
        "valid": valid / calls if calls else 0.0,
        "calls": correct * task.needed / max(calls, task.needed),
        "format": float(len(found) == 1 and reply.rstrip().endswith("</answer>")),
        "needed": float(task.needed),
    }


@rayrl.env(
    tasks=errands,
    rewards={"correct": 1.0, "valid": 0.1, "calls": 0.1, "format": 0.1, "needed": 0.0},
    form="<answer>{}</answer>",
)
async def tools(task: Errand, agent: Agent) -> Scores:
    """The model answers a question with a search, documents and a calculator."""
    desk = Desk(task, task.failure_rate)
    reply = await agent(
        [system(task.system_prompt), user(task.question)],
        tools=desk.tools,
        protocol=task.protocol,
        tool_rounds=task.rounds,
    )
    return score(task, reply, agent.tool_calls, desk.valid)


@tools.player("perfect")
def perfect(messages: Sequence[Message], rng: random.Random) -> str:
    """Looks everything up, calculates, answers; tries again what failed."""
    return players.perfect(messages)


@tools.player("clumsy")
def clumsy(messages: Sequence[Message], rng: random.Random) -> str:
    """Writes calls that cannot be run, then does what `perfect` does."""
    return players.clumsy(messages)


@tools.player("guesser")
def guesser(messages: Sequence[Message], rng: random.Random) -> str:
    """Answers with any number, without looking."""
    return f"<answer>{rng.randrange(1000)}</answer>"


@tools.statistics
def statistics(episode: Episode) -> dict[str, bool | float | str]:
    """What evaluations report."""
    scores = episode.scores["agent"]
    return {
        "correct %": scores["correct"] == 1.0,
        "answered %": _ANSWER.search(episode.turns[-1].text) is not None,
        "valid %": scores["valid"],
        "calls": scores["tool_calls"],
        "needed": scores["needed"],
        "format %": scores["format"],
    }
