"""Prometheus metrics of a server, and their aggregation over several servers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from rayrl.server.generation import Usage

__all__ = ["CONTENT_TYPE", "Metrics", "metrics_page"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Metrics of one server.

    Attributes:
        live: number of requests being generated.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.live = 0
        self._requests = Counter(
            "rayrl_requests",
            "Requests by route and HTTP status; 499 if the client disconnected.",
            ("route", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "rayrl_request_seconds",
            "Seconds from a request to the last byte of its response.",
            ("route",),
            buckets=SECONDS,
            registry=self._registry,
        )
        live = Gauge("rayrl_in_flight", "Requests being generated.", registry=self._registry)
        live.set_function(lambda: self.live)
        self._tokens = {
            name: Counter(f"rayrl_{name}_tokens", what, registry=self._registry)
            for name, what in (
                ("prompt", "Prompt tokens."),
                ("completion", "Completion tokens."),
                ("cached", "Prompt tokens that were not recomputed."),
            )
        }

    def record_request(self, route: str, status: int, seconds: float) -> None:
        """Record a finished request."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def record_usage(self, usage: Usage) -> None:
        """Record the usage of a request, including one that was disconnected."""
        self._tokens["prompt"].inc(usage.prompt)
        self._tokens["completion"].inc(usage.completion)
        self._tokens["cached"].inc(usage.cached)

    def families(self, **labels: str) -> list[Metric]:
        """Return all metrics, picklable, with the given labels on every sample."""
        families: list[Metric] = []
        for family in self._registry.collect():
            copy = Metric(family.name, family.documentation, family.type, family.unit)
            for sample in family.samples:
                if not sample.name.endswith("_created"):  # a series per metric that nobody needs
                    copy.add_sample(sample.name, {**sample.labels, **labels}, sample.value)
            families.append(copy)
        return families


def metrics_page(parts: Iterable[Sequence[Metric]]) -> bytes:
    """Format the families of several servers as one page of Prometheus' text format."""
    families: dict[str, Metric] = {}
    for part in parts:
        for family in part:
            if family.name in families:
                families[family.name].samples += family.samples
            else:
                families[family.name] = family
    return generate_latest(_Families(families.values()))


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Any]:
        return iter(self._families)
