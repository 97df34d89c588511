"""The documents that ship with the environment, and the search over them."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

__all__ = ["Corpus", "Document"]

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Document:
    """A short text about one invented thing.

    Attributes:
        kind: town, person or product.
        split: the world it belongs to, train or test; documents refer to their own only.
        facts: what the text says, by name; what the questions are made of. No tool shows them.
    """

    id: str
    kind: str
    split: str
    title: str
    facts: Mapping[str, Any]
    text: str


class Corpus:
    """Documents by id and title, ranked for a query by Okapi BM25.

    Use `Corpus.load()`, which reads them once a process.
    """

    def __init__(self, documents: list[Document]) -> None:
        from rank_bm25 import BM25Okapi

        self.documents = documents
        self.by_id = {one.id: one for one in documents}
        self.by_title = {one.title: one for one in documents}
        self._titles: dict[tuple[str, str], list[str]] = {}
        for one in documents:
            self._titles.setdefault((one.kind, one.split), []).append(one.title)
        # the title a second time: a town's own document before those that mention the town
        self._index = BM25Okapi([_words(f"{one.title} {one.text}") for one in documents])

    @classmethod
    @functools.cache
    def load(cls) -> Corpus:
        """The shipped documents."""
        lines = resources.files(__package__).joinpath("corpus.jsonl").read_text("utf-8")
        return cls([Document(**json.loads(line)) for line in lines.splitlines()])

    def titles(self, kind: str, split: str) -> list[str]:
        """Titles of a kind in one world, in the order of the file."""
        return self._titles[kind, split]

    def search(self, query: str, most: int) -> list[Document]:
        """The best documents for a query, best first; only those that share a word with it."""
        scores = self._index.get_scores(_words(query))
        best = np.argsort(-scores, kind="stable")[:most]
        return [self.documents[k] for k in best if scores[k] > 0]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
