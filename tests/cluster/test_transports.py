"""Transport by topology, refused topologies, and the error that ends a push."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from rayrl.cluster import learner_group
from rayrl.cluster.learner_group import _gather, _report_hang
from rayrl.cluster.serving.replica import Replica
from rayrl.cluster.weight_sync.push import WeightSync
from rayrl.cluster.weight_sync.transports import Broadcast
from rayrl.cluster.weight_sync.weight_store import Published, WeightStore
from rayrl.config import Config, from_dict, validate
from rayrl.config.sync import transport_of
from rayrl.errors import ConfigError, DataError, InfraError, LearnerLost
from rayrl.weights.flat import Manifest


def config(
    kind: str = "vllm",
    ranks: int = 1,
    lag: int = 0,
    rank: int = 0,
    on_update: str = "wait",
    **cluster: Any,
) -> Config:
    return from_dict(
        {
            "env": {"name": "copyword"},
            "engine": {"kind": kind, "on_update": on_update},
            "learner": {"world_size": ranks},
            "lora": {"rank": rank},
            "train": {"max_lag": lag},
            "cluster": cluster,
        }
    )


GPUS = {"learner_gpus": 1.0, "replica_gpus": 1.0}
HALVES = {"learner_gpus": 0.4, "replica_gpus": 0.6, "colocate": True}


@pytest.mark.parametrize(
    ("wanted", "settings"),
    [
        ("object_store", {}),
        ("object_store", GPUS),
        ("nccl", {**GPUS, "placement": "SPREAD"}),
        ("object_store", {**GPUS, "placement": "SPREAD", "kind": "embedded"}),
        ("object_store", {**HALVES, "placement": "SPREAD"}),
        ("gloo", {"sync": "gloo"}),
        ("object_store", {**GPUS, "placement": "SPREAD", "sync": "object_store"}),
        ("object_store", {"rank": 8}),
        ("adapters", {"rank": 8, "sync": "adapters"}),
    ],
)
def test_auto_goes_by_topology(wanted: str, settings: dict[str, Any]) -> None:
    one = config(**settings)
    validate(one, "train")
    assert transport_of(one) == wanted


@pytest.mark.parametrize(
    ("said", "settings"),
    [
        ("sync=nccl: engine.kind=embedded takes no stream", {"kind": "embedded", "sync": "nccl"}),
        ("sync=gloo: engine.kind=embedded", {"kind": "embedded", "sync": "gloo"}),
        ("sync=nccl: .* cluster.learner_gpus=0; set it to 1", {"sync": "nccl"}),
        ("cluster.replica_gpus=0.5", {"sync": "nccl", "learner_gpus": 1.0, "replica_gpus": 0.5}),
        ("sync=gloo: is for CPUs", {"sync": "gloo", **GPUS}),
        (
            "sync=adapters: engine.kind=embedded",
            {"kind": "embedded", "rank": 8, "sync": "adapters"},
        ),
        ("sync=adapters: lora.rank=0 trains all", {"sync": "adapters"}),
        ("sync=adapters: a replica that sleeps", {**HALVES, "rank": 8, "sync": "adapters"}),
        (
            "sync=adapters: engine.on_update=keep",
            {"rank": 8, "sync": "adapters", "on_update": "keep"},
        ),
        ("sync=shm: must be one of auto, object_store", {"sync": "shm"}),
        ("colocate=true: engine.kind=embedded", {**HALVES, "kind": "embedded"}),
        ("colocate=true: train.max_lag=1", {**HALVES, "lag": 1}),
        ("over half", {**HALVES, "replica_gpus": 0.5}),
        ("over half", {**HALVES, "learner_gpus": 0.5}),
        ("cluster.replicas=2 and learner.world_size=1", {**HALVES, "replicas": 2}),
        ("cluster.learner_gpus=0.4; set it", {**HALVES, "sync": "nccl"}),
    ],
)
def test_impossible_topologies_are_refused(said: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=said):
        validate(config(**settings), "train")


def failed(cause: Exception) -> RayTaskError:
    """As an actor's exception reaches the driver."""
    name = type(cause).__name__
    trace = f'Traceback (most recent call last):\n  File "x.py", line 1, in f\n{name}: {cause}'
    return RayTaskError("stream", trace, cause)


async def call(after: float, result: Any) -> Any:
    await asyncio.sleep(after)
    if isinstance(result, BaseException):
        raise result
    return result


async def test_the_error_is_that_of_the_rank_that_failed_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(learner_group, "GRACE_S", 600)
    lost = failed(InfraError("connection closed by peer"))
    assert await _gather([call(0, 1), call(0.01, 2)]) == [1, 2]
    with pytest.raises(DataError, match="b came where"):
        await _gather([call(0, lost), call(0.02, failed(DataError("b came where a")))])
    for gone in (RayActorError(), OutOfMemoryError("its node was low on memory")):
        with pytest.raises(LearnerLost, match=r"rank 1.*the same command again"):
            await _gather([call(0, lost), call(0.02, gone)])
    with pytest.raises(InfraError) as both:
        await _gather([call(0, lost), call(0.02, failed(ValueError("the cause")))])
    for part in ("learner rank 0", "learner rank 1", "line 1, in f", "ValueError: the cause"):
        assert part in str(both.value)
    monkeypatch.setattr(learner_group, "GRACE_S", 0.01)
    with pytest.raises(InfraError, match="connection closed"):  # the other never answers
        await _gather([call(0, lost), call(99, 0)])


def test_a_hanging_rank_reports_its_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    store, stuck, reported = WeightStore(), threading.Event(), threading.Event()

    class Deadline(threading.Timer):
        """Passes when the thread is stuck, however busy the machine."""

        def run(self) -> None:
            assert stuck.wait(600)
            self.function(*self.args, **self.kwargs)

    monkeypatch.setattr(threading, "Timer", Deadline)

    def report(name: str, stack: str) -> None:
        store.report_hang(name, stack)
        reported.set()

    def stuck_in_a_collective() -> None:
        stuck.set()
        assert reported.wait(600)

    handle = SimpleNamespace(report_hang=SimpleNamespace(remote=report))
    with _report_hang("learner rank 3", 600, handle):
        stuck_in_a_collective()
    text = store.stacks()
    assert text.startswith("learner rank 3 is at\n")
    assert "in stuck_in_a_collective" in text
    assert store.stacks() == "", "reported once"


class Scripted:
    """A transport with scripted attempts."""

    def __init__(self, *attempts: Any) -> None:
        self.attempts = list(attempts)

    async def deliver(self, version: int) -> Any:
        attempt = self.attempts.pop(0)
        if attempt == "hangs":
            await asyncio.sleep(60)
        if isinstance(attempt, Exception):
            raise attempt
        return Published(version, (), Manifest((), 0), "good"), attempt

    async def hanging_ranks(self) -> str:
        return "learner rank 1 is at\n  line 7"

    def close(self) -> None:
        pass


def push(*attempts: Any, deadline_s: float = 600) -> Any:
    handle: Any = None
    return asyncio.run(WeightSync(Scripted(*attempts), None, handle, deadline_s).push(5))


def test_a_push_is_retried_until_all_replicas_confirm() -> None:
    good = [("a", 5, "good"), ("b", 5, "good")]
    assert push(good) == {"a": "good", "b": "good"}
    assert push(InfraError("lost"), [("a", 5, "good"), ValueError("b died")], good)
    with pytest.raises(InfraError, match=r"(?s)within 0.3 s.*learner rank 1 is at\n  line 7"):
        push("hangs", deadline_s=0.3)
    with pytest.raises(InfraError, match=r"replica b holds version 5 \(bad\), not 5 \(good\)"):
        push(*[[("a", 5, "good"), ("b", 5, "bad")]] * 99, deadline_s=1)
    with pytest.raises(InfraError, match="lost"):
        push(*[InfraError("lost")] * 99, deadline_s=1)


@pytest.mark.parametrize("error", [ConfigError("names"), DataError("shapes")])
def test_weights_that_do_not_fit_are_not_retried(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)) as stopped:
        push([("a", 5, "good"), failed(error).as_instanceof_cause()])  # there is no other attempt
    assert stopped.value is error


class Replicas:
    """Records calls to all replicas."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def broadcast(self, *call: str) -> Any:
        async def results(**_: Any) -> list[Any]:
            self.calls.append(call)
            return []

        return SimpleNamespace(results_async=results)


@pytest.mark.parametrize("colocate", [True, False])
async def test_replicas_and_learner_alternate_on_a_shared_gpu(colocate: bool) -> None:
    replicas: Any = Replicas()
    weights = WeightSync(Scripted([("a", 5, "good")]), None, replicas, 20.0, colocate=colocate)
    await weights.sleep_replicas()
    replicas.calls.append("update")
    await weights.push(5)
    alternating = [("sleep",), "update", ("wake", "weights"), ("wake", "kv")]
    assert replicas.calls == (alternating if colocate else ["update"])


class RecordingEngine:
    """Takes part in broadcasts, of which nothing arrives."""

    workers, max_len = 2, 64
    version = 0
    generate = stream = release = load_weights = check = close = sleep = wake = print  # not called

    rank: int | None = None

    async def join(self, meeting: Any, first_rank: int) -> None:
        self.rank = first_rank

    async def receive(self, version: int, plan: Any) -> str:
        assert self.rank is not None, "it joined no group"
        self.version = version
        return "good"


class Started:
    """A deployment of which a replica starts just before a method is called."""

    def __init__(self, method: str) -> None:
        self.replicas = [self.replica("a")]
        self.method = method

    @staticmethod
    def replica(name: str) -> Replica:
        replica = object.__new__(Replica)  # its constructor is for a process of Serve's
        vars(replica).update(
            _id=name, _engine=RecordingEngine(), _loading=asyncio.Lock(), _loaded=(0, "")
        )
        return replica

    def broadcast(self, method: str, *args: Any) -> Any:
        async def results(return_exceptions: bool) -> list[Any]:
            if method == self.method and len(self.replicas) == 1:
                self.replicas.append(self.replica("b"))
            return [await getattr(replica, method)(*args) for replica in self.replicas]

        return SimpleNamespace(results_async=results)


class Learners:
    """Opens groups and sends nothing."""

    def __init__(self) -> None:
        self.worlds: list[int] = []

    async def open_rendezvous(self, backend: str, world: int, deadline_s: float) -> Any:
        self.worlds.append(world)
        return "meeting", ()

    async def connect(self, meeting: Any) -> None: ...

    async def broadcast(self, *_: Any) -> str:
        return "good"


@pytest.mark.parametrize("method", ["workers", "join", "receive"])
async def test_a_replica_that_starts_in_a_broadcast_gets_it_without_an_error(method: str) -> None:
    """Serve calls it like the others, although it is in no group: so it was in a run in CI."""
    handle: Any = Started(method)
    learners: Any = Learners()

    async def publish(published: Published) -> None: ...

    store = SimpleNamespace(publish=SimpleNamespace(remote=publish))
    transport = Broadcast("gloo", learners, store, handle, 600)
    try:
        assert await WeightSync(transport, None, handle, 600).push(1) == {"a": "good", "b": "good"}
    finally:
        transport.close()
    assert learners.worlds == ([5] if method == "workers" else [3, 5])
    assert [replica._engine.rank for replica in handle.replicas] == [1, 3]
