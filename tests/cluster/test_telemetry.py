"""A run's metrics among Ray's: what is exported, and that no error of it ends a run."""

from __future__ import annotations

import logging
import re
import time
import urllib.request
from typing import Any

import pytest
import ray

from rayrl.cluster import telemetry
from rayrl.cluster.session import open_session
from rayrl.cluster.telemetry import Telemetry
from rayrl.config import ClusterConfig

STEPS: list[dict[str, float]] = [
    {
        "reward": 0.25,
        "score/win": 0.5,
        "mismatch/mean": 0.001,
        "episodes": 64.0,
        "failures/env": 0.0,
        "time/collect": 3.5,
        "time/total": 5.0,
    },
    {
        "reward": 0.75,
        "größe (2)": 2.0,  # Ray takes ASCII only
        "score/win": 0.5,
        "kl": float("nan"),
        "mismatch/mean": 0.002,
        "episodes": 60.0,
        "failures/env": 4.0,
        "time/collect": 1.5,
        "time/total": 4.0,
    },
]
EXPECTED = {
    ("ray_rayrl_step", ""): 1,
    ("ray_rayrl_reward", ""): 0.75,
    ("ray_rayrl_gr_e_2_", ""): 2,
    ("ray_rayrl_score", "win"): 0.5,
    ("ray_rayrl_mismatch_mean", ""): 0.002,
    ("ray_rayrl_episodes_total", ""): 124,
    ("ray_rayrl_failures_total", "env"): 4,
    ("ray_rayrl_time_seconds", "collect"): 1.5,
    ("ray_rayrl_time_seconds", "total"): 4,
    ("ray_rayrl_alarm", "mismatch"): 1,
    ("ray_rayrl_alarm", "kl"): 0,
}


def exported(port: int) -> dict[tuple[str, str], float]:
    """Name and own tag -> value, of the run's metrics at a node's endpoint."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=600) as answer:
        text = answer.read().decode()
    found = {}
    for name, tags, value in re.findall(r"^(ray_rayrl_\w+)\{(.*)\} (\S+)$", text, re.M):
        own = dict(re.findall(r'(\w+)="([^"]*)"', tags))
        if own["run"] == "first":
            tag = next((own[key] for key in ("stage", "name", "kind") if key in own), "")
            found[name, tag] = float(value)
    return found


@pytest.mark.slow
def test_ray_exports_metrics_for_as_long_as_the_run_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")  # a gauge is dropped after two
    monkeypatch.setattr(telemetry, "REFRESH_S", 0.5)
    with open_session(ClusterConfig(object_store_gb=0.1)), Telemetry("first") as published:
        for step, metrics in enumerate(STEPS):
            published.publish(step, metrics, {"mismatch": step == 1, "kl": False})
        (node,) = ray.nodes()
        wait_for(EXPECTED, node["MetricsExportPort"])
        time.sleep(4)
        wait_for(EXPECTED, node["MetricsExportPort"])
        published.__exit__(None, None, None)  # then gauges go, and counters stay
        counted = {key: value for key, value in EXPECTED.items() if key[0].endswith("_total")}
        wait_for(counted, node["MetricsExportPort"])


def wait_for(expected: dict[tuple[str, str], float], port: int) -> None:
    found: dict[tuple[str, str], float] = {}
    end = time.monotonic() + 900
    while found != expected and time.monotonic() < end:
        time.sleep(0.5)
        try:
            found = exported(port)
        except OSError:  # it starts after the node
            continue
    assert found == expected


def test_without_ray_nothing_is_published() -> None:
    assert not ray.is_initialized()
    with Telemetry("first") as published:
        published.publish(0, STEPS[0], {})


def test_a_metric_that_ray_refuses_ends_no_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = []

    def refuse(*args: Any, **kwargs: Any) -> None:
        tries.append(args)
        raise ValueError("no such name")

    monkeypatch.setattr(telemetry.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(telemetry, "Gauge", refuse)
    with caplog.at_level(logging.WARNING), Telemetry("first") as published:
        published.publish(0, STEPS[0], {})
        published.publish(1, STEPS[1], {})
    assert len(tries) == 1, "publishing stops"
    assert "no such name" in caplog.text
