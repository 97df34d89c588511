"""Write word problems of one or two steps, each with a solution and its answer.

    python examples/make_sums.py examples/sums.jsonl
    python examples/make_sums.py sums

The first writes 300 of them. The second writes a folder to learn from, of other problems:
train.jsonl (4,000), test.jsonl (300), and chats.jsonl: train.jsonl with its solutions as the
replies of chats. They are made up here, in the form of GSM8K: a solution ends
with `####` and the answer.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

NAMES = ("Mia", "Tom", "Ana", "Leo", "Zoe", "Sam", "Eva", "Ben")
THINGS = ("apples", "books", "coins", "cards", "pens", "shells")


def problem(rng: random.Random) -> tuple[str, str, int]:
    """A question, the steps of its solution, and the answer."""
    name, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    a, b, c = rng.randint(2, 20), rng.randint(2, 9), rng.randint(2, 9)
    kind = rng.randrange(5)
    if kind == 0:
        question = f"{name} has {a} {thing} and gets {b} more. How many now?"
        return question, f"{a} + {b}", a + b
    if kind == 1:
        question = f"{name} has {a + b} {thing} and gives {other} {b}. How many are left?"
        return question, f"{a + b} - {b}", a
    if kind == 2:
        question = f"{name} fills {b} boxes with {c} {thing} each. How many in all?"
        return question, f"{b} * {c}", b * c
    if kind == 3:
        question = f"{name} has {b} bags of {c} {thing} and finds {a} more. How many in all?"
        return question, f"{b} * {c} = {b * c}, {b * c} + {a}", b * c + a
    question = f"{name} and {other} share {b * 2} {thing} equally. {name} then buys {a}. How many?"
    return question, f"{b * 2} / 2 = {b}, {b} + {a}", b + a


def rows(n: int, seed: int) -> Iterator[dict[str, Any]]:
    """`n` problems with different questions."""
    rng = random.Random(seed)
    seen = set[str]()
    while len(seen) < n:
        question, steps, answer = problem(rng)
        if question not in seen:
            seen.add(question)
            solution = f"{steps} = {answer} #### {answer}"
            yield {"question": question, "solution": solution, "answer": answer}


def chat(row: dict[str, Any]) -> dict[str, Any]:
    """A problem and its solution as a conversation."""
    said = (("user", row["question"]), ("assistant", row["solution"]))
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def write(file: Path, data: Iterable[dict[str, Any]]) -> None:
    """One line for each."""
    file.write_text("\n".join(map(json.dumps, data)) + "\n")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if target.suffix == ".jsonl":
        write(target, rows(300, seed=0))
    else:
        target.mkdir(exist_ok=True)
        made = [*rows(4300, seed=1)]
        write(target / "test.jsonl", made[:300])
        write(target / "train.jsonl", made[300:])
        write(target / "chats.jsonl", map(chat, made[300:]))
