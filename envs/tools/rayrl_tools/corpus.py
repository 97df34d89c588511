"""The environment's documents and the search over them."""

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
        split: "train" or "test"; documents refer only to others of their split.
        facts: the text's facts by name, from which questions are generated; hidden from the tools.
    """

    id: str
    kind: str
    split: str
    title: str
    facts: Mapping[str, Any]
    text: str


class Corpus:
    """Documents by id and title, with Okapi BM25 search.

    Use `Corpus.load()`, which reads them once per process.
    """

    def __init__(self, documents: list[Document]) -> None:
        from rank_bm25 import BM25Okapi

        self.documents = documents
        self.by_id = {document.id: document for document in documents}
        self.by_title = {document.title: document for document in documents}
        self._titles: dict[tuple[str, str], list[str]] = {}
        for document in documents:
            self._titles.setdefault((document.kind, document.split), []).append(document.title)
        # repeats the title, to rank a town's own document above those that mention the town
        self._index = BM25Okapi([_words(f"{d.title} {d.text}") for d in documents])

    @classmethod
    @functools.cache
    def load(cls) -> Corpus:
        """Load the packaged documents."""
        lines = resources.files(__package__).joinpath("corpus.jsonl").read_text("utf-8")
        return cls([Document(**json.loads(line)) for line in lines.splitlines()])

    def titles(self, kind: str, split: str) -> list[str]:
        """Return the titles of one kind and split, in the order of the file."""
        return self._titles[kind, split]

    def search(self, query: str, limit: int) -> list[Document]:
        """Return up to `limit` documents that share a word with the query, best first."""
        scores = self._index.get_scores(_words(query))
        best = np.argsort(-scores, kind="stable")[:limit]
        return [self.documents[k] for k in best if scores[k] > 0]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
