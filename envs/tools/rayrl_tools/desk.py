"""The tools of one episode, with counts of their use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from rayrl import Task

from .calculator import evaluate
from .corpus import Corpus

__all__ = ["Desk", "NoSuchDocument", "ServiceDown"]

_HITS = 3
_MAX_FAILURES = 2  # consecutive failures of the same call, so that retries succeed eventually


class NoSuchDocument(Exception):
    """There is no document with that id."""


class ServiceDown(Exception):
    """A simulated outage: the call was valid but failed this time."""


class Desk:
    """The tools of one episode; counts their use.

    Args:
        task: its seed decides which calls fail. The k-th repetition of a call has the same outcome
            in every episode of a group.
        failure_rate: probability that searching or opening a document fails.

    Attributes:
        valid: number of valid calls, including those that failed by a simulated outage.
        unlucky: number of calls that failed by a simulated outage.
    """

    def __init__(self, task: Task, failure_rate: float) -> None:
        self.task = task
        self.failure_rate = failure_rate
        self.valid = 0
        self.unlucky = 0
        self._made: Counter[tuple[str, str]] = Counter()
        self._failed: Counter[tuple[str, str]] = Counter()  # consecutively

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
        self._count("search", query)
        if not found:
            return "No document has any of these words."
        return "\n".join(f"[{hit.id}] {hit.title} ({hit.kind})" for hit in found)

    def open_document(self, document: str) -> str:
        """Read a document.

        Args:
            document: its id, such as d001.
        """
        found = Corpus.load().by_id.get(document.strip(" []").lower())
        if found is None:
            raise NoSuchDocument(f"there is no document {document!r}: search gives the ids")
        self._count("open_document", found.id)
        return f"{found.title} ({found.kind}): {found.text}"

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

    def _count(self, name: str, argument: str) -> None:
        """Count a valid call; raise ServiceDown if it is drawn to fail."""
        self.valid += 1
        call = (name, argument)
        self._made[call] += 1
        draw = self.task.rng("failure", *call, self._made[call]).random()
        if draw < self.failure_rate and self._failed[call] < _MAX_FAILURES:
            self.unlucky += 1
            self._failed[call] += 1
            raise ServiceDown("it did not answer this time, try again")
        self._failed[call] = 0
