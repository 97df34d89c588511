"""A run's figures where Ray's metrics are collected: its dashboard, and Prometheus.

Every node of a Ray cluster has an endpoint that Prometheus can scrape; there all names begin with
`ray_`. docs/training.md lists them.
"""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge

__all__ = ["Telemetry"]

TAGGED = {
    "time": ("rayrl_time_seconds", "stage"),
    "score": ("rayrl_score", "name"),
    "failures": ("rayrl_failures", "kind"),
}
COUNTED = ("episodes", "tokens", "updates", "skipped", "groups/dropped")
REFRESH_S = 5.0


class Telemetry:
    """The newest figures of a run, as gauges; what is counted in steps, as counters.

    To be used in a `with` block. Ray collects the numbers of this process every 10 s and forgets a
    gauge that was not set for 20; steps may take longer, so a thread sets them again. Publishing
    never fails: what Ray does not take is given up, with a line in the log.

    Args:
        run: the run's name, a tag of all of them.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._known: dict[str, Any] = {}
        self._gauges: list[tuple[Any, float, dict[str, str]]] = []  # as of the last step
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="telemetry", daemon=True)

    def __enter__(self) -> Telemetry:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def publish(self, step: int, metrics: Mapping[str, float], alarms: Mapping[str, bool]) -> None:
        """Publish a step.

        Args:
            metrics: as they are logged; what is not finite is left out.
            alarms: name -> whether it is on.
        """
        if self._over.is_set() or not ray.is_initialized():
            return
        try:
            gauges = [self._gauge("rayrl_step", step)]
            for name, value in metrics.items():
                if math.isfinite(value):
                    to, tags = _place(name)
                    if name in COUNTED or to == "rayrl_failures":
                        self._count(to, value, tags)
                    else:
                        gauges.append(self._gauge(to, value, tags))
            for name, on in alarms.items():
                gauges.append(self._gauge("rayrl_alarm", on, {"name": name}))
            self._gauges = gauges
            self._set()
        except Exception as error:
            self._give_up(error)

    def _gauge(
        self, name: str, value: float, tags: Mapping[str, str] | None = None
    ) -> tuple[Any, float, dict[str, str]]:
        tags = {"run": self._run, **(tags or {})}
        return self._metric(Gauge, name, tags), float(value), tags

    def _count(self, name: str, value: float, tags: Mapping[str, str]) -> None:
        tags = {"run": self._run, **tags}
        metric = self._metric(Counter, name, tags)
        if value > 0:  # Ray's counters refuse to be raised by nothing
            metric.inc(value, tags=tags)

    def _metric(self, kind: type[Any], name: str, tags: Mapping[str, str]) -> Any:
        if name not in self._known:
            about = "See docs/training.md of rayrl."
            self._known[name] = kind(name, about, tag_keys=tuple(tags))
        return self._known[name]

    def _set(self) -> None:
        for gauge, value, tags in self._gauges:
            gauge.set(value, tags=tags)

    def _refresh(self) -> None:
        while not self._over.wait(REFRESH_S):
            try:
                self._set()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._over.set()
        logging.getLogger(__name__).warning("Ray's metrics do not take a run's: %s", error)


def _place(name: str) -> tuple[str, dict[str, str]]:
    """What a figure is called among Ray's metrics, and the tag it has there."""
    group, _, rest = name.partition("/")
    if group in TAGGED and rest:
        to, tag = TAGGED[group]
        return to, {tag: rest}
    return "rayrl_" + re.sub(r"[^a-zA-Z0-9]+", "_", name), {}
