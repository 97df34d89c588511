"""The model of a cluster, against numbers worked out by hand."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "simulate.py"


@pytest.fixture(scope="module")
def model() -> Any:
    spec = importlib.util.spec_from_file_location("simulate", FILE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["simulate"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


NOTHING: dict[str, Any] = {
    "hop env worker": {"request": 0.001, "message": 0.0, "second": 0.0},
    "hop replica": {"request": 0.0005, "message": 0.0, "second": 0.0},
    "recorder call": 0.0,
    "recorder": {"turn": 0.0},
    "wire": {"id": 0.0},
    "driver": {"batch": {"episode": 0.0, "turn": 0.0001, "id": 0.0}},
    "driver message": 0.0,
    "put per MB": {"MB": 0.0},
    "push": {"copy per MB": 0.0, "checksum per MB": 0.0},
    "ask per replica": 0.0,
    "idle per second": {},
}


def test_one_server(model: Any) -> None:
    one = [model.Station("s", 0.01)]

    def rate(live: float, wait_s: float) -> float:
        return float(model.solve(one, live, wait_s)[0])

    assert rate(1, 0.09) == pytest.approx(10)  # 0.1 s a round
    assert rate(2, 0.0) == pytest.approx(100)  # always busy
    assert model.solve(one, 2, 0.0)[1] == {"s": pytest.approx(2)}
    assert rate(10_000, 0.09) == pytest.approx(100, rel=1e-3)
    # two customers, exactly: one in service and one waiting or thinking. States by how many are at
    # the server, birth rates 2/Z and 1/Z, death rate 1/D: p ~ 1, 2a, 2a² with a = D/Z = 1/9
    a = 1 / 9
    exact = 100 * (1 - 1 / (1 + 2 * a + 2 * a * a))
    assert rate(2, 0.09) == pytest.approx(exact, rel=0.02)  # an approximation


def test_servers_share(model: Any) -> None:
    stations = [model.Station("workers", 0.01, 4), model.Station("driver", 0.001)]
    assert model.solve(stations, 10_000, 1.0)[0] == pytest.approx(400, rel=1e-2)
    stations[0] = model.Station("workers", 0.01, 40)
    assert model.solve(stations, 10_000, 1.0)[0] == pytest.approx(1000, rel=1e-2)


def test_messages_travel_together(model: Any) -> None:
    assert model.pace(0.0) == 0.001
    assert model.pace(1.0) == 0.01
    assert model.pace(30.0) == 0.02
    # 900 a second, each message waits 10 ms: the one that began it and nine that came meanwhile
    assert model.messages(900, 0.01, 900, 1.0) == pytest.approx(0.1)
    assert model.messages(0, 0.01, 1, 1.0) == 1
    # 64 that are answered at once stay together; spread over 20 ms they are three messages a round
    assert model.messages(900, 0.01, 64, 0.0) == pytest.approx(1 / 64)
    assert model.messages(900, 0.01, 64, 0.02) == pytest.approx(3 / 64)


def test_a_busy_loop_is_late_and_therefore_cheaper(model: Any) -> None:
    """A call costs worker and replica 5 ms, the requests in it nothing: 2 cores carry 400 calls/s.

    1,000 episodes with answers of 1 s could make nearly 1,000 turns a second. One worker's messages
    wait 10 ms, so that 1 / (1 + 1000 * 0.01) of 1,000 requests, 91, are calls: no need to be late.
    With answers at once they wait 1 ms: at a rate x, x / (1 + x / 1000) < 400 is full at x = 667,
    were messages not late.
    """
    free = {"request": 0.0, "message": 0.0025, "second": 0.0}
    costs = NOTHING | {"hop env worker": free, "hop replica": free}
    costs["driver"] = {"batch": {"episode": 0.0, "turn": 0.0, "id": 0.0}}
    place = model.Cluster(1, workers=1, replicas=1, cores=2.0)
    slow = work(model, turns=1000, step_s=0.01)
    assert model.rate_of(costs, slow, place, 1000) == pytest.approx(1000 / 1.02, rel=0.01)
    at_once = work(model, turns=1000, step_s=0.0)
    assert model.rate_of(costs, at_once, place, 1000) > 2000


def work(model: Any, **more: Any) -> Any:
    settings = {"turns": 10, "ids": 100, "prompt": 0, "engine_ids_s": 0.0, "step_s": 0.01}
    settings |= {"episodes": 100, "update_s": 3.0, "model_gb": 0.0, "spread": 0.0, "lag": 0}
    return model.Workload("test", **(settings | more))


def test_a_step(model: Any) -> None:
    place = model.Cluster(1, workers=10, replicas=10)
    # ten turns of 1 s and the pace of both ways, 20 ms; worker, replica, driver: 1.6 ms; then 3 s
    one = model.outcome(NOTHING, work(model), place)
    assert one.play_s == pytest.approx(10 * (1.02 + 0.0016), rel=2e-3)
    assert one.step_s == pytest.approx(one.play_s + 3, rel=1e-6)
    assert one.busy["learner"] == pytest.approx(3 / one.step_s)
    # played ahead, learning is hidden: the time of an episode, then half of it, then learning
    assert model.outcome(NOTHING, work(model, lag=1), place).step_s == pytest.approx(one.play_s)
    halves = model.outcome(NOTHING, work(model, lag=2), place)
    assert halves.step_s == pytest.approx(one.play_s / 2)
    assert model.outcome(NOTHING, work(model, lag=4), place).step_s == pytest.approx(3)


def test_the_driver_is_full_where_it_should_be(model: Any) -> None:
    """0.1 ms a turn of the driver: 10,000 turns a second, or 50 nodes that make 200."""
    busy = work(model, episodes=200, turns=5, update_s=5.0, lag=4)
    place = model.Cluster(1, workers=10, replicas=10)
    one = model.outcome(NOTHING, busy, place)
    assert one.turns_s == pytest.approx(200)
    assert one.busy["driver"] == pytest.approx(0.02)
    at = {n: model.outcome(NOTHING, busy, replace(place, nodes=n)) for n in (40, 50, 100)}
    assert at[40].busy["driver"] == pytest.approx(0.8)
    assert at[40].turns_s == pytest.approx(40 * 200)
    assert at[100].turns_s == pytest.approx(10_000, rel=0.01)
    assert at[100].busy["driver"] == pytest.approx(1, rel=0.01)
    assert at[100].fullest == "driver"


def test_what_every_node_fetches_is_a_nodes_network(model: Any) -> None:
    heavy = work(model, model_gb=5.0, lag=4)
    nodes = model.Cluster(11, workers=10, replicas=10, network_gb_s=10)
    # ten others fetch 5 GB each from one node at 10 GB/s
    assert model.push_of(NOTHING, heavy, nodes) == pytest.approx(5.0)
    assert model.push_of(NOTHING, heavy, replace(nodes, sync="nccl")) == pytest.approx(0.5)
    assert model.push_of(NOTHING, heavy, replace(nodes, nodes=1)) == 0
    assert math.isclose(model.outcome(NOTHING, heavy, nodes).step_s, 8.0)


def test_the_pace_is_that_of_the_cluster(model: Any) -> None:
    from rayrl.cluster.serving import streams

    for name in ("LEAST_S", "MOST_S", "SHARE", "PAUSE_S"):
        assert getattr(model, name) == getattr(streams, name)


def test_what_is_known_of_playing_while_learning(model: Any) -> None:
    """`overlap.py` as RESULTS.md has it: 128 episodes of eight turns of 0.5 s, 4 s of learning."""
    place = model.Cluster(1, workers=2, replicas=1)
    for lag, seconds in ((0, 9.47), (1, 5.01), (2, 4.01)):
        step = model.fake(8, 0.5, 128, size=8, update_s=4.0, lag=lag)
        assert model.outcome(NOTHING, step, place).step_s == pytest.approx(seconds, rel=0.1)
