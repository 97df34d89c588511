"""Prompts and score of both sides of `benchmarks/grpo_step.py`. Standard library only.

Replies to these prompts almost never end before the token limit, so both sides sample the same
number of tokens.
"""

from __future__ import annotations

SUBJECTS = (
    "a lake", "a train", "the moon", "an old dog", "a storm", "two ships", "the desert",
    "a bridge", "a school", "the first snow", "a lighthouse", "a garden", "the market",
    "a violin", "the sea", "a tall tree", "a small town", "an island", "the harvest",
    "a long road", "a clock", "the night", "a river", "a mountain", "a letter", "the king",
    "a castle", "a farm", "the forest", "a fire", "a wolf", "the summer",
)  # fmt: skip
ASK = "Write a long story about {}."
CONTINUE = "Go on with the story, and tell more about it."
TURNS = {"single": 1, "multi": 4}
TOKENS = {"single": 32, "multi": 16}  # per reply


def score(text: str) -> float:
    """Return the share of vowels among the letters, which differs between replies."""
    letters = [letter for letter in text.lower() if letter.isalpha()]
    return sum(letter in "aeiou" for letter in letters) / max(1, len(letters))
