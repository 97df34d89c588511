"""Repeat a word: the smallest environment, one message and one reply."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

import rayrl
from rayrl import Agent, ConfigError, Message, Scores, Task

__all__ = ["Word", "copyword", "score", "words"]

_ANSWER = re.compile(r"<word>(.*?)</word>", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Word(Task):
    """The word to repeat."""

    word: str


def words(
    seed: int,
    u: float,
    *,
    alphabet: str = string.ascii_lowercase,
    shortest: int = 2,
    longest: int = 8,
) -> Word:
    """Draw a word of random letters whose length is a fraction `u` of the way through the range.

    Raises:
        ConfigError: no letters, or an empty range of lengths.
    """
    if not alphabet:
        raise ConfigError("alphabet='' has no letters: give at least one.")
    if not 1 <= shortest <= longest:
        raise ConfigError(
            f"shortest={shortest} and longest={longest} leave no length: "
            "choose 1 <= shortest <= longest."
        )
    length = shortest + int(u * (longest - shortest + 1))
    letters = Task(seed=seed).rng("letters").choices(alphabet, k=length)
    return Word(seed=seed, word="".join(letters))


def score(word: str, reply: str) -> dict[str, float]:
    """Score a reply: `copied` is the share of correct letters, `format` 1 for a tag and no more."""
    found = _ANSWER.findall(reply)
    answer = found[-1].strip() if found else ""
    right = sum(a == b for a, b in zip(word, answer, strict=False))
    return {
        "copied": right / max(len(word), len(answer)),
        "format": float(_ANSWER.fullmatch(reply.strip()) is not None and len(found) == 1),
    }


@rayrl.env(tasks=words, rewards={"copied": 1.0, "format": 0.2})
async def copyword(task: Word, agent: Agent) -> Scores:
    """Ask the model to repeat a word inside `<word>` tags."""
    return score(task.word, await agent(f"Repeat this word: {task.word}"))


@copyword.player("perfect")
def perfect(messages: Sequence[Message], rng: random.Random) -> str:
    """Repeat the word."""
    return f"<word>{messages[-1].content.removeprefix('Repeat this word: ')}</word>"
