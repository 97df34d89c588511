"""Questions that require tools: a search over documents no model can know, and a calculator."""

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
        needed: minimum number of tool calls.
        failure_rate: probability that searching or opening a document fails.
        protocol: format of calls, see `Agent.__call__`.
        rounds: maximum rounds of tool calls before the model must answer.
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
    """Draw a question whose level is a fraction `u` of the way from easiest to hardest.

    Raises:
        ConfigError: no level, no round, or a failure rate outside [0, 1).
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
    """Compute the scores of an episode.

    Args:
        task: the question.
        reply: the model's last reply.
        calls: number of tool calls made.
        valid: number of valid ones among them.
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
    """Ask the model a question to answer with a search, documents and a calculator."""
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
    """Look everything up, calculate, answer; retry failed calls."""
    return players.perfect(messages)


@tools.player("clumsy")
def clumsy(messages: Sequence[Message], rng: random.Random) -> str:
    """Write invalid calls first, then play like `perfect`."""
    return players.clumsy(messages)


@tools.player("guesser")
def guesser(messages: Sequence[Message], rng: random.Random) -> str:
    """Answer with a random number, without calling tools."""
    return f"<answer>{rng.randrange(1000)}</answer>"


@tools.statistics
def statistics(episode: Episode) -> dict[str, bool | float | str]:
    """Return the statistics that evaluations report."""
    scores = episode.scores["agent"]
    return {
        "correct %": scores["correct"] == 1.0,
        "answered %": _ANSWER.search(episode.turns[-1].text) is not None,
        "valid %": scores["valid"],
        "calls": scores["tool_calls"],
        "needed": scores["needed"],
        "format %": scores["format"],
    }
