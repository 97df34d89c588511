"""Figures of a server for Prometheus, and the figures of several put together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from rayrl.server.generation import Usage

__all__ = ["CONTENT_TYPE", "Metrics", "merged"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """What one server counts.

    Attributes:
        live: generating requests at the moment.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.live = 0
        self._requests = Counter(
            "rayrl_requests",
            "Requests by route and HTTP status; 499 where the client hung up.",
            ("route", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "rayrl_request_seconds",
            "Seconds from a request to the last byte of its answer.",
            ("route",),
            buckets=SECONDS,
            registry=self._registry,
        )
        live = Gauge("rayrl_in_flight", "Requests being generated.", registry=self._registry)
        live.set_function(lambda: self.live)
        self._tokens = {
            name: Counter(f"rayrl_{name}_tokens", what, registry=self._registry)
            for name, what in (
                ("prompt", "Ids of prompts."),
                ("completion", "Ids sampled."),
                ("cached", "Ids of prompts that were not computed again."),
            )
        }

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request is over."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def used(self, usage: Usage) -> None:
        """What a request took, also one that was not read to its end."""
        self._tokens["prompt"].inc(usage.prompt)
        self._tokens["completion"].inc(usage.completion)
        self._tokens["cached"].inc(usage.cached)

    def families(self, **labels: str) -> list[Metric]:
        """Everything, with these labels on every sample; it pickles."""
        found: list[Metric] = []
        for family in self._registry.collect():
            copy = Metric(family.name, family.documentation, family.type, family.unit)
            for sample in family.samples:
                if not sample.name.endswith("_created"):  # no figure of ours, and a series each
                    copy.add_sample(sample.name, {**sample.labels, **labels}, sample.value)
            found.append(copy)
        return found


def merged(parts: Iterable[Sequence[Metric]]) -> bytes:
    """Families of several servers as one page of Prometheus' text format."""
    families: dict[str, Metric] = {}
    for part in parts:
        for family in part:
            if family.name in families:
                families[family.name].samples += family.samples
            else:
                families[family.name] = family
    return generate_latest(_Fixed(families.values()))


class _Fixed(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Any]:
        return iter(self._families)
