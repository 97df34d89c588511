"""The tools of one episode, and what came of each call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from rayrl import Task

from .calculator import evaluate
from .corpus import Corpus

__all__ = ["Desk", "NoSuchDocument", "ServiceDown"]

_HITS = 3
_IN_A_ROW = 2  # times the same call fails at most, so that whoever tries again gets there


class NoSuchDocument(Exception):
    """There is no document of that id."""


class ServiceDown(Exception):
    """A tool did not work this time, through no fault of the caller."""


class Desk:
    """Tools that remember how they were used.

    Args:
        task: its seed decides which calls fail. The same call, made for the same time in the
            episode, has the same luck in every sibling of a group.
        failure_rate: probability that a search or an opening fails.

    Attributes:
        valid: calls that were as they should be, those that failed by bad luck included.
        unlucky: calls that failed by bad luck.
    """

    def __init__(self, task: Task, failure_rate: float) -> None:
        self.task = task
        self.failure_rate = failure_rate
        self.valid = 0
        self.unlucky = 0
        self._made: Counter[tuple[str, str]] = Counter()
        self._failed: Counter[tuple[str, str]] = Counter()  # in a row

    @property
    def tools(self) -> tuple[Callable[..., Any], ...]:
        """The functions offered."""
        return (self.search, self.open_document, self.calculator)

    def search(self, query: str) -> str:
        """Find documents. Gives ids and titles, the best first.

        Args:
            query: a name or a few words.
        """
        found = Corpus.load().search(query, _HITS)
        self._work("search", query)
        if not found:
            return "No document has any of these words."
        return "\n".join(f"[{one.id}] {one.title} ({one.kind})" for one in found)

    def open_document(self, document: str) -> str:
        """Read a document.

        Args:
            document: its id, such as d001.
        """
        one = Corpus.load().by_id.get(document.strip(" []").lower())
        if one is None:
            raise NoSuchDocument(f"there is no document {document!r}: search gives the ids")
        self._work("open_document", one.id)
        return f"{one.title} ({one.kind}): {one.text}"

    def calculator(self, expression: str) -> str:
        """Work out an arithmetic expression.

        Args:
            expression: such as (17 + 4) * 3.

        Raises:
            CalculatorError: in words for the model.
        """
        value = evaluate(expression)
        self.valid += 1
        return value

    def _work(self, name: str, argument: str) -> None:
        """Count a call that is as it should be, and let it fail if its luck is bad."""
        self.valid += 1
        call = (name, argument)
        self._made[call] += 1
        draw = self.task.rng("failure", *call, self._made[call]).random()
        if draw < self.failure_rate and self._failed[call] < _IN_A_ROW:
            self.unlucky += 1
            self._failed[call] += 1
            raise ServiceDown("it did not answer this time, try again")
        self._failed[call] = 0
