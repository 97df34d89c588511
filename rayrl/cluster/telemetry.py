"""Export a run's metrics through Ray, to its dashboard and to Prometheus.

Every node of a Ray cluster has an endpoint that Prometheus can scrape; all names there begin with
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
    """Publishes a run's metrics: the newest values as gauges, counts per step as counters.

    A context manager. Ray collects the values of this process every 10 s and drops a gauge that has
    not been set for 20 s; steps may take longer, so a thread sets all gauges again. Publishing
    never fails: if Ray refuses a metric, publishing stops with a warning in the log.

    Args:
        run: the run's name, a tag on every metric.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._metrics: dict[str, Any] = {}  # Ray's, by name
        self._gauges: list[tuple[Any, float, dict[str, str]]] = []  # as of the last step
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="telemetry", daemon=True)

    def __enter__(self) -> Telemetry:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join()

    def publish(self, step: int, metrics: Mapping[str, float], alarms: Mapping[str, bool]) -> None:
        """Publish the metrics of a step.

        Args:
            metrics: as they are logged; values that are not finite are left out.
            alarms: by name, whether the alarm is on.
        """
        if self._stopped.is_set() or not ray.is_initialized():
            return
        try:
            gauges = [self._gauge("rayrl_step", step)]
            for name, value in metrics.items():
                if math.isfinite(value):
                    exported, tags = _exported_name(name)
                    if name in COUNTED or exported == "rayrl_failures":
                        tags = {"run": self._run, **tags}
                        counter = self._metric(Counter, exported, tags)
                        if value > 0:  # Ray's counters refuse an increment of 0
                            counter.inc(value, tags=tags)
                    else:
                        gauges.append(self._gauge(exported, value, tags))
            for name, on in alarms.items():
                gauges.append(self._gauge("rayrl_alarm", on, {"name": name}))
            self._gauges = gauges
            self._set_gauges()
        except Exception as error:
            self._stop(error)

    def _gauge(
        self, name: str, value: float, tags: Mapping[str, str] | None = None
    ) -> tuple[Any, float, dict[str, str]]:
        tags = {"run": self._run, **(tags or {})}
        return self._metric(Gauge, name, tags), float(value), tags

    def _metric(self, kind: type[Any], name: str, tags: Mapping[str, str]) -> Any:
        if name not in self._metrics:
            description = "See docs/training.md of rayrl."
            self._metrics[name] = kind(name, description, tag_keys=tuple(tags))
        return self._metrics[name]

    def _set_gauges(self) -> None:
        for gauge, value, tags in self._gauges:
            gauge.set(value, tags=tags)

    def _refresh(self) -> None:
        while not self._stopped.wait(REFRESH_S):
            try:
                self._set_gauges()
            except Exception as error:
                self._stop(error)

    def _stop(self, error: Exception) -> None:
        self._stopped.set()
        logging.getLogger(__name__).warning("Ray refused the run's metrics: %s", error)


def _exported_name(name: str) -> tuple[str, dict[str, str]]:
    """The name and the tag of a metric among Ray's."""
    group, _, rest = name.partition("/")
    if group in TAGGED and rest:
        exported, tag = TAGGED[group]
        return exported, {tag: rest}
    return "rayrl_" + re.sub(r"[^a-zA-Z0-9]+", "_", name), {}
