"""Write rayrl_tools/corpus.jsonl: invented towns, people and products that refer to each other.

The train and test splits never mention each other. Nothing in them exists, so no model can know the
answers.

    python envs/tools/make_corpus.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "rayrl_tools" / "corpus.jsonl"
SIZES = {"train": (34, 30, 32), "test": (12, 10, 12)}  # towns, people, products

TOWN = (
    """{title} is a town on the river {river}. It was founded in {founded} and has {inhabitants}
    inhabitants. It lies {altitude} metres above the sea.""",
    """Founded in {founded}, {title} has {inhabitants} inhabitants and lies {altitude} metres above
    the sea. The river {river} runs through the town.""",
    """The town of {title} stands on the banks of the river {river}, {altitude} metres above the
    sea. It has {inhabitants} inhabitants. It was founded in {founded}.""",
)
PERSON = (
    "{title} was born in {birthplace} in the year {born} and became a {trade}.",
    "{title} is a {trade} who was born in {birthplace} in the year {born}.",
    """The {trade} {title} was born in {birthplace} in the year {born}. Of the early years little
    is known.""",
)
PRODUCT = (
    """The {title} is a {thing} made in {town}. It was invented by {inventor} and first sold in the
    year {sold}. It costs {price} crowns and weighs {weight} grams.""",
    """First sold in the year {sold}, the {title} is a {thing} that costs {price} crowns and weighs
    {weight} grams. It was invented by {inventor}. It is made in {town}.""",
    """The {title}, a {thing}, weighs {weight} grams and costs {price} crowns. It is made in
    {town}; it was invented by {inventor} and first sold in the year {sold}.""",
)
THINGS = "lamp kettle clock bicycle stove camera violin telescope loom radio compass typewriter"
TRADES = "glazier botanist clockmaker surveyor printer chemist cooper weaver painter tuner"


def syllables(rng: random.Random, taken: set[str], parts: int) -> str:
    """Create a name such that neither it nor any taken name is a prefix of the other."""
    while True:
        word = "".join(
            rng.choice("bdfghklmnprstvz")
            + rng.choice("aeiou")
            + rng.choice(["", "", "l", "n", "r"])
            for _ in range(parts)
        ).capitalize()
        if not any(word.startswith(name) or name.startswith(word) for name in taken):
            taken.add(word)
            return word


def world(rng: random.Random, split: str, taken: set[str]) -> list[dict[str, Any]]:
    """Create the documents of one split, without ids."""
    towns, people, products = SIZES[split]
    rivers = [syllables(rng, taken, 2) for _ in range(6)]
    made: dict[str, list[dict[str, Any]]] = {"town": [], "person": [], "product": []}

    def add(kind: str, title: str, texts: tuple[str, ...], **facts: Any) -> None:
        text = " ".join(rng.choice(texts).format(title=title, **facts).split())
        document = {"kind": kind, "split": split, "title": title, "facts": facts, "text": text}
        made[kind].append(document)

    for _ in range(towns):
        add(
            "town",
            syllables(rng, taken, 3),
            TOWN,
            river=rng.choice(rivers),
            founded=rng.randint(1100, 1890),
            inhabitants=rng.randint(900, 98000),
            altitude=rng.randint(3, 1400),
        )
    for _ in range(people):
        add(
            "person",
            f"{syllables(rng, taken, 2)} {syllables(rng, taken, 3)}",
            PERSON,
            birthplace=rng.choice(made["town"])["title"],
            born=rng.randint(1895, 1950),
            trade=rng.choice(TRADES.split()),
        )
    for _ in range(products):
        inventor = rng.choice(made["person"])
        add(
            "product",
            f"{syllables(rng, taken, 2)} {rng.randint(2, 99)}",
            PRODUCT,
            thing=rng.choice(THINGS.split()),
            town=rng.choice(made["town"])["title"],
            inventor=inventor["title"],
            sold=inventor["facts"]["born"] + rng.randint(22, 58),
            price=rng.randint(12, 980),
            weight=rng.randint(40, 9500),
        )
    return [document for kind in made.values() for document in kind]


def corpus() -> list[dict[str, Any]]:
    """Create all documents, sorted by title, with neutral ids."""
    rng, taken = random.Random(20240), set[str]()
    documents = world(rng, "train", taken) + world(rng, "test", taken)
    documents.sort(key=lambda document: str(document["title"]))
    return [{"id": f"d{number:03d}", **item} for number, item in enumerate(documents, 1)]


def main() -> None:
    """Write the file."""
    with OUT.open("w", encoding="utf-8") as file:
        for document in corpus():
            file.write(json.dumps(document, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
