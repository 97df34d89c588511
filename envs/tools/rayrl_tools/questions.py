"""Questions of five levels, generated from the facts of the documents, with their answers."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from .calculator import evaluate
from .corpus import Corpus

__all__ = ["FORMS", "LEVELS", "Form", "Question", "ask", "same"]

LEVELS = 5
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
_THOUSANDS = re.compile(r"(?<=\d)[,' \u00a0\u202f](?=\d{3}(?!\d))")  # separators


@dataclass(frozen=True)
class Form:
    """A kind of question.

    Attributes:
        text: template; `{0}`, `{1}`, ... are titles, `{a}` and `{b}` small numbers.
        kinds: kinds of the documents named.
        paths: where the values are; `0.inventor.born` starts at title 0, goes to its inventor's
            document and reads the year of birth there.
        work: arithmetic on the paths' values by number; empty: the only value is the answer.
    """

    level: int
    text: str
    kinds: tuple[str, ...]
    paths: tuple[str, ...]
    work: str = ""


FORMS = (
    Form(1, "How many inhabitants does {0} have?", ("town",), ("0.inhabitants",)),
    Form(1, "In which year was {0} founded?", ("town",), ("0.founded",)),
    Form(1, "What does the {0} cost, in crowns?", ("product",), ("0.price",)),
    Form(1, "Who invented the {0}?", ("product",), ("0.inventor",)),
    Form(1, "In which town was {0} born?", ("person",), ("0.birthplace",)),
    Form(
        2,
        "In which town was the inventor of the {0} born?",
        ("product",),
        ("0.inventor.birthplace",),
    ),
    Form(2, "In which year was the inventor of the {0} born?", ("product",), ("0.inventor.born",)),
    Form(
        2,
        "How many inhabitants does the town have in which the {0} is made?",
        ("product",),
        ("0.town.inhabitants",),
    ),
    Form(
        2, "On which river is the town in which {0} was born?", ("person",), ("0.birthplace.river",)
    ),
    Form(
        3,
        "How many more inhabitants does {0} have than {1}?",
        ("town", "town"),
        ("0.inhabitants", "1.inhabitants"),
        "{0} - {1}",
    ),
    Form(
        3,
        "How many crowns more does the {0} cost than the {1}?",
        ("product", "product"),
        ("0.price", "1.price"),
        "{0} - {1}",
    ),
    Form(
        3,
        "How many years before {1} was {0} founded?",
        ("town", "town"),
        ("0.founded", "1.founded"),
        "{1} - {0}",
    ),
    Form(
        4,
        "How many inhabitants do {0}, {1} and {2} have together?",
        ("town", "town", "town"),
        ("0.inhabitants", "1.inhabitants", "2.inhabitants"),
        "{0} + {1} + {2}",
    ),
    Form(
        4,
        "What do {a} of the {0} and {b} of the {1} cost together, in crowns?",
        ("product", "product"),
        ("0.price", "1.price"),
        "{a} * {0} + {b} * {1}",
    ),
    Form(
        4,
        "How old did the inventor of the {0} become in the year in which it was first sold?",
        ("product",),
        ("0.sold", "0.inventor.born"),
        "{0} - {1}",
    ),
    Form(
        5,
        "How many more inhabitants does the town have in which the inventor of the {0} was born "
        "than the town in which the {1} is made?",
        ("product", "product"),
        ("0.inventor.birthplace.inhabitants", "1.town.inhabitants"),
        "{0} - {1}",
    ),
    Form(
        5,
        "By how many years is the inventor of the {0} younger than the inventor of the {1}?",
        ("product", "product"),
        ("0.inventor.born", "1.inventor.born"),
        "{0} - {1}",
    ),
    Form(
        5,
        "What is the sum of the altitudes, in metres, of the towns in which {0} and {1} were born?",
        ("person", "person"),
        ("0.birthplace.altitude", "1.birthplace.altitude"),
        "{0} + {1}",
    ),
)


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Attributes:
        needed: minimum number of tool calls without guessing: a search and an opening per
            document, and one calculation if there is arithmetic.
    """

    level: int
    text: str
    answer: str
    needed: int


def ask(rng: random.Random, level: int, split: str) -> Question:
    """Draw a question of a level about the documents of one split."""
    corpus = Corpus.load()
    form = rng.choice([form for form in FORMS if form.level == level])
    while True:
        titles: list[str] = []
        for kind in form.kinds:
            known = corpus.titles(kind, split)
            titles.append(rng.choice([title for title in known if title not in titles]))
        numbers = {"a": rng.randint(2, 9), "b": rng.randint(2, 9)}
        values, documents = [], set[str]()
        for path in form.paths:
            start, *facts = path.split(".")
            value = titles[int(start)]
            for fact in facts:
                documents.add(value)
                value = str(corpus.by_title[value].facts[fact])
            values.append(value)
        answer = evaluate(form.work.format(*values, **numbers)) if form.work else values[0]
        if answer.startswith("-") or answer == "0":  # the question says "more"
            continue
        needed = 2 * len(documents) + bool(form.work)
        return Question(level, form.text.format(*titles, **numbers), answer, needed)


def same(answer: str, given: str) -> bool:
    """Whether a model's answer equals the right one, as a number or a case-insensitive name.

    Thousands separators, a unit and a full stop are ignored: `1,234 inhabitants.` is 1234. Two
    numbers are never right.
    """
    given = _THOUSANDS.sub("", given.strip())
    if _NUMBER.fullmatch(answer):
        numbers = _NUMBER.findall(given)
        return len(numbers) == 1 and float(numbers[0]) == float(answer)
    return " ".join(given.split()).strip(".!\"'").casefold() == answer.casefold()
