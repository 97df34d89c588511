"""Reverse a text: one message, one reply, rewarded by the longest common subsequence."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from rapidfuzz.distance import Indel

import rayrl
from rayrl import (
    Agent,
    ConfigError,
    Episode,
    Message,
    Scores,
    Task,
    assistant,
    derive_seed,
    system,
    user,
)

from .words import WORDS

__all__ = ["Split", "Text", "reverse_text", "score", "split_of", "texts", "vocabulary"]

Split = Literal["train", "test"]

SYSTEM = (
    "Reverse the text character by character. Answer in this form:\n"
    "<reversed_text>answer</reversed_text>"
)
FORM = "<reversed_text>{}</reversed_text>"  # a person types the answer only

EXAMPLES = ("fun", "odd bun", "ill kid rug")
"""Few-shot examples, asked and answered before the text. None of their words is ever drawn."""

TEST_SHARE = 5  # one in five words belongs to the test split
DROPS = 0.1  # probability that the teacher omits a character

_ANSWER = re.compile(r"<reversed_text>(.*?)</reversed_text>", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Text(Task):
    """A text to reverse.

    Attributes:
        text: words separated by single spaces.
        reversed: the right answer; a field so that it appears in the episode log.
        examples: number of worked examples before the text.
        system_prompt: system message.
    """

    text: str
    reversed: str
    examples: int
    system_prompt: str


def split_of(word: str) -> Split:
    """Return the split of a word, which depends only on the word."""
    return "train" if derive_seed("reverse_text", word) % TEST_SHARE else "test"


@cache
def vocabulary(split: Split, letters: int) -> tuple[str, ...]:
    """Return the words of a split with at most `letters` letters."""
    return tuple(word for word in WORDS if len(word) <= letters and split_of(word) == split)


def texts(
    seed: int,
    u: float,
    *,
    split: Split = "train",
    shortest: int = 1,
    longest: int = 3,
    letters: int = 5,
    examples: int = 2,
    system_prompt: str = SYSTEM,
) -> Text:
    """Draw a text of words of one split, its length a fraction `u` of the way through the range.

    Args:
        shortest: minimum number of words.
        longest: maximum number of words.
        letters: maximum length of a word.

    Raises:
        ConfigError: an empty range of lengths, no word that is short enough, or more examples than
            there are.
    """
    if not 1 <= shortest <= longest:
        raise ConfigError(
            f"shortest={shortest} and longest={longest} leave no number of words: "
            "choose 1 <= shortest <= longest."
        )
    words = vocabulary(split, letters)
    if not words:
        raise ConfigError(f"letters={letters}: no word is that short; the shortest have 3.")
    if not 0 <= examples <= len(EXAMPLES):
        raise ConfigError(f"examples={examples}: choose from 0 to {len(EXAMPLES)}.")
    count = shortest + int(u * (longest - shortest + 1))
    text = " ".join(Task(seed=seed).rng("words").choices(words, k=count))
    return Text(
        seed=seed,
        text=text,
        reversed=text[::-1],
        examples=examples,
        system_prompt=system_prompt,
    )


def score(right: str, reply: str) -> dict[str, float]:
    """Score a reply.

    Args:
        right: the reversed text.
        reply: the model's reply; its answer is the stripped content of the last pair of tags.

    Returns:
        `lcs`: 2·L / (letters of the right text + letters of the answer), where L is the length of
        their longest common subsequence; 1 only for the right answer, 0 without one. `exact`: 1 for
        the right answer. `format`: 1 if the reply is one pair of tags and nothing around it.
    """
    found = _ANSWER.findall(reply)
    answer = found[-1].strip() if found else ""
    return {
        "lcs": Indel.normalized_similarity(right, answer),
        "exact": float(answer == right),
        "format": float(len(found) == 1 and _ANSWER.fullmatch(reply.strip()) is not None),
    }


@rayrl.env(tasks=texts, rewards={"lcs": 1.0, "format": 0.2, "exact": 0.0}, form=FORM)
async def reverse_text(task: Text, agent: Agent) -> Scores:
    """Ask the model to reverse a text inside `<reversed_text>` tags."""
    messages = [system(task.system_prompt)]
    for text in EXAMPLES[: task.examples]:
        messages += [user(text), assistant(FORM.format(text[::-1]))]
    return score(task.reversed, await agent([*messages, user(task.text)]))


@reverse_text.statistics
def statistics(episode: Episode) -> dict[str, bool | float | str]:
    """Return the statistics that evaluations report: right answers, similarity and form."""
    scores = episode.scores["agent"]
    return {
        "exact %": scores["exact"] == 1.0,
        "lcs %": scores["lcs"],
        "format %": scores["format"] == 1.0,
    }


@reverse_text.player("perfect")
def perfect(messages: Sequence[Message], rng: random.Random) -> str:
    """Give the right answer."""
    return FORM.format(messages[-1].content[::-1])


@reverse_text.player("copy")
def copy(messages: Sequence[Message], rng: random.Random) -> str:
    """Repeat the text unchanged, as a baseline without any reversing."""
    return FORM.format(messages[-1].content)


@reverse_text.player("teacher")
def teacher(messages: Sequence[Message], rng: random.Random) -> str:
    """Reverse the text, but omit each character with a probability of 10%."""
    letters = [letter for letter in reversed(messages[-1].content) if rng.random() >= DROPS]
    return FORM.format("".join(letters))
