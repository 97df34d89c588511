"""Requests and results between a client and replicas, without Serve between them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.serve.exceptions import BackPressureError

from rayrl.cluster.serving import inference_client, replica, streams
from rayrl.cluster.serving.inference_client import BatchingClient, ReplicaLost, ServeReplicas
from rayrl.cluster.serving.replica import Replica
from rayrl.cluster.serving.streams import BatchingDelay, NoStream, Result
from rayrl.errors import InfraError
from rayrl.types import Completion, Request, Sampling


@pytest.fixture(autouse=True)
def streams_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "IDLE_S", 0.0)


def request(seed: int, session: str = "") -> Request:
    return Request(session or f"s{seed}", (1, 2, 3), Sampling(max_tokens=8), seed=seed)


def completion(seed: int) -> Completion:
    return Completion((seed,), (0.0,), (), "stop")


class Engine:
    """Answers a request once `finish(seed)` is called.

    Attributes:
        generated: seeds of all requests, in order.
        cancelled: seeds of those that were cancelled.
    """

    version = 0

    def __init__(self) -> None:
        self.generated: list[int] = []
        self.cancelled: list[int] = []
        self.released: list[str] = []
        self._may_finish: dict[int, asyncio.Event] = {}

    def finish(self, *seeds: int) -> None:
        for seed in seeds:
            self._may_finish.setdefault(seed, asyncio.Event()).set()

    async def generate(self, request: Request) -> Completion:
        self.generated.append(request.seed)
        try:
            await self._may_finish.setdefault(request.seed, asyncio.Event()).wait()
        except asyncio.CancelledError:
            self.cancelled.append(request.seed)
            raise
        return completion(request.seed)

    def release(self, sessions: Sequence[str]) -> None:
        self.released += sessions


def make_replica(name: str, engine: Engine) -> Replica:
    made = object.__new__(Replica)
    made._engine, made._id, made._streams = engine, name, {}  # type: ignore[assignment]
    return made


class InProcess:
    """`Replicas` whose calls are function calls.

    Attributes:
        live: replicas that can be reached, in order of their index.
        streams: what each stream of results has carried.
        batches: numbers of the requests in each batch.
        confirm: once cleared, batches are taken and not confirmed until it is set.
        broken: how many of the next streams of results break at once.
    """

    def __init__(self, **engines: Engine) -> None:
        self.live = {name: make_replica(name, engine) for name, engine in engines.items()}
        self.streams: list[list[Sequence[Result]]] = []
        self.batches: list[list[int]] = []
        self.broken = 0
        self.confirm = asyncio.Event()
        self.confirm.set()
        self._lost = {name: asyncio.Event() for name in engines}

    def lose(self, name: str) -> None:
        """As if the process had died."""
        del self.live[name]
        self._lost[name].set()

    async def submit(
        self, index: int, requests: Sequence[tuple[int, Request]], released: Sequence[str]
    ) -> str:
        self.batches.append([number for number, _ in requests])
        if not self.live:
            raise ReplicaLost
        name = list(self.live)[index % len(self.live)]
        submitted = await self.live[name].submit("client", requests, released)
        await self.confirm.wait()
        if name not in self.live:
            raise ReplicaLost
        return submitted

    async def results(self, replica: str) -> AsyncIterator[Sequence[Result]]:
        if self.broken:
            self.broken -= 1
            raise ReplicaLost
        if replica not in self.live:
            raise ReplicaLost
        carried: list[Sequence[Result]] = []
        self.streams.append(carried)
        lost = asyncio.create_task(self._lost[replica].wait())
        stream = self.live[replica].results("client", replica)
        while True:
            item = asyncio.ensure_future(anext(stream, None))
            await asyncio.wait([item, lost], return_when=asyncio.FIRST_COMPLETED)
            if not item.done():
                item.cancel()
                raise ReplicaLost
            if (results := item.result()) is None:
                lost.cancel()
                return
            carried.append(results)
            yield results

    def cancel(self, replica: str, numbers: Sequence[int]) -> None:
        if replica in self.live:
            self._cancelling = asyncio.ensure_future(self.live[replica].cancel("client", numbers))


def client_of(replicas: InProcess, deadline_s: float = 60.0) -> BatchingClient:
    return BatchingClient(replicas, count=len(replicas.live), deadline_s=deadline_s)


def start(client: BatchingClient, *seeds: int) -> list[asyncio.Task[Completion]]:
    return [asyncio.create_task(client.generate(request(seed))) for seed in seeds]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(600):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def answered(client: BatchingClient) -> bool:
    """Whether a client has nothing in flight, and reads no stream."""
    return not (client._dispatcher._unanswered or client._dispatcher._tasks)


async def test_results_of_all_batches_come_on_one_stream() -> None:
    engine = Engine()
    replicas = InProcess(a=engine)
    client = client_of(replicas)
    first = start(client, 0, 1)
    await until(lambda: len(replicas.streams) == 1)
    second = start(client, 2, 3)
    await until(lambda: len(engine.generated) == 4)
    engine.finish(3, 0)
    await until(lambda: first[0].done() and second[1].done())
    assert not first[1].done()
    assert not second[0].done()
    assert replicas.streams == [[[(3, completion(3)), (0, completion(0))]]], "in one list"
    engine.finish(1, 2)
    assert await asyncio.gather(*first, *second) == [completion(k) for k in range(4)]
    await until(lambda: answered(client))
    assert replicas.live["a"]._streams == {}, "a stream ends when every request has a result"
    engine.finish(4)
    assert await client.generate(request(4)) == completion(4)
    assert len(replicas.streams) == 2


async def test_a_request_is_submitted_while_the_stream_delivers_the_last_result() -> None:
    engine = Engine()
    engine.finish(*range(50))
    client = client_of(InProcess(a=engine))
    for seed in range(50):
        assert await client.generate(request(seed)) == completion(seed)
    assert engine.generated == list(range(50))


async def test_a_conversation_has_one_stream_for_all_its_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "IDLE_S", 60.0)
    engine = Engine()
    engine.finish(*range(5))
    replicas = InProcess(a=engine)
    client = client_of(replicas)
    for seed in range(5):
        assert await client.generate(request(seed)) == completion(seed)
        await asyncio.sleep(0.01)
    assert len(replicas.streams) == 1
    await client.close()


async def test_results_may_come_before_the_confirmation_of_their_batch() -> None:
    engine = Engine()
    replicas = InProcess(a=engine)
    client = client_of(replicas)
    (first,) = start(client, 0)
    await until(lambda: len(replicas.streams) == 1)
    replicas.confirm.clear()
    engine.finish(1)
    assert await client.generate(request(1)) == completion(1)
    replicas.confirm.set()
    engine.finish(0)
    assert await first == completion(0)
    await until(lambda: answered(client))


@pytest.mark.parametrize("confirmed", [True, False])
async def test_what_a_lost_replica_did_not_answer_is_generated_by_another_once(
    monkeypatch: pytest.MonkeyPatch, confirmed: bool
) -> None:
    monkeypatch.setattr(inference_client, "BACKOFF_S", 0.01)
    engines = {name: Engine() for name in "ab"}
    replicas = InProcess(**engines)
    client = client_of(replicas)
    if not confirmed:
        replicas.confirm.clear()
    tasks = start(client, *range(8))
    await until(lambda: len(engines["a"].generated + engines["b"].generated) == 8)
    again, before = list(engines["a"].generated), list(engines["b"].generated)
    assert sorted(again + before) == list(range(8))
    if confirmed:
        await until(lambda: len(replicas.streams) == 2)
        engines["a"].finish(seed := again.pop(0))
        await until(tasks[seed].done)
    replicas.lose("a")
    replicas.confirm.set()
    await until(lambda: len(engines["b"].generated) == 8 - confirmed)
    engines["b"].finish(*range(8))
    assert await asyncio.gather(*tasks) == [completion(k) for k in range(8)]
    assert engines["b"].generated == before + again
    await until(lambda: answered(client))


async def test_a_request_that_waits_for_its_retry_is_not_retried_by_another_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inference_client, "BACKOFF_S", 0.1)
    engine = Engine()
    replicas = InProcess(a=engine)
    client = client_of(replicas)
    replicas.broken = 2
    tasks = start(client, 0)
    await until(lambda: replicas.broken == 1)
    tasks += start(client, 1)
    await until(lambda: sum(map(len, replicas.batches)) == 4)
    engine.finish(0, 1)
    assert await asyncio.gather(*tasks) == [completion(0), completion(1)]
    await until(lambda: answered(client))
    assert sorted(itertools.chain(*replicas.batches)) == [0, 0, 1, 1]


async def test_a_retry_has_the_deadline_of_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_client, "BACKOFF_S", 0.001)
    replicas = InProcess(a=Engine())
    client = client_of(replicas, deadline_s=0.05)
    replicas.lose("a")
    with pytest.raises(InfraError, match=r"0\.05 s \(cluster.request_deadline_s\)"):
        await client.generate(request(0))
    await until(lambda: answered(client))


@pytest.mark.parametrize("confirmed", [True, False])
async def test_cancellation_reaches_the_engine(confirmed: bool) -> None:
    engine = Engine()
    replicas = InProcess(a=engine)
    client = client_of(replicas)
    if not confirmed:
        replicas.confirm.clear()
    cancelled, other = start(client, 0, 1)
    await until(lambda: len(replicas.streams if confirmed else engine.generated) > 0)
    cancelled.cancel()
    await asyncio.sleep(0.01)
    replicas.confirm.set()
    await until(lambda: engine.cancelled == [0])
    engine.finish(1)
    assert await other == completion(1)
    await until(lambda: answered(client))


async def test_a_deadline_cancels_at_the_engine_and_a_request_not_yet_sent_is_not_sent() -> None:
    engine = Engine()
    client = client_of(InProcess(a=engine), deadline_s=0.05)
    (unsent,) = start(client, 0)
    await asyncio.sleep(0)
    unsent.cancel()
    with pytest.raises(InfraError, match="no replica answered within"):
        await client.generate(request(1))
    await until(lambda: answered(client))
    assert (engine.generated, engine.cancelled) == ([1], [1])


class Handle:
    """A Serve handle whose calls all raise."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.stream = False

    def options(self, *, stream: bool = False, **_: Any) -> Handle:
        self.stream = stream
        return self

    def remote(self, *_: Any) -> Any:
        return self._stream() if self.stream else self._call()

    async def _call(self) -> None:
        raise self.error

    async def _stream(self) -> AsyncIterator[None]:
        raise self.error
        yield


@pytest.mark.parametrize(
    "error", [ActorDiedError(), OutOfMemoryError(""), BackPressureError(1, 1), NoStream("")]
)
async def test_a_replica_that_is_gone_or_full_is_tried_again(error: Exception) -> None:
    replicas = ServeReplicas("app")
    replicas.__dict__["_handle"] = Handle(error)
    with pytest.raises(ReplicaLost):
        await replicas.submit(0, [], [])
    with pytest.raises(ReplicaLost):
        await anext(replicas.results("a"))


async def test_generation_stops_when_the_client_goes_away() -> None:
    engine = Engine()
    here = make_replica("a", engine)
    await here.submit("client", [(0, request(0))], [])
    await here.submit("other", [(0, request(1))], [])
    reading = asyncio.ensure_future(anext(here.results("client", "a")))
    await until(lambda: engine.generated == [0, 1])
    reading.cancel()
    await until(lambda: engine.cancelled == [0])
    assert set(here._streams) == {"other"}


async def test_a_client_that_dies_before_it_reads_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replica, "OPEN_WITHIN_S", 0.01)
    engine = Engine()
    here = make_replica("a", engine)
    await here.submit("dies", [(0, request(0))], [])
    await here.submit("reads", [(0, request(1))], [])
    reading = asyncio.ensure_future(anext(here.results("reads", "a")))
    await until(lambda: set(here._streams) == {"reads"})
    await until(lambda: engine.cancelled == [0])
    engine.finish(1)
    assert await reading == [(0, completion(1))]


async def test_results_are_streamed_to_one_reader_of_the_replica_that_has_them() -> None:
    here = make_replica("a", Engine())
    await here.submit("client", [(0, request(0))], [])
    for client, name in (("other", "a"), ("client", "b")):
        with pytest.raises(NoStream):
            await anext(here.results(client, name))
    reading = asyncio.ensure_future(anext(here.results("client", "a")))
    await until(lambda: here._streams["client"].opened)
    with pytest.raises(NoStream):
        await anext(here.results("client", "a"))
    reading.cancel()


async def test_a_request_that_comes_to_an_idle_stream_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "IDLE_S", 1.0)
    engine = Engine()
    here = make_replica("a", engine)
    await here.submit("client", [(0, request(0))], [])
    results = here.results("client", "a")
    engine.finish(0)
    assert await anext(results) == [(0, completion(0))]
    reading = asyncio.ensure_future(anext(results))
    await asyncio.sleep(0.01)
    await here.submit("client", [(1, request(1))], [])
    await asyncio.sleep(1.2)
    engine.finish(1)
    assert await reading == [(1, completion(1))]
    await results.aclose()


async def test_a_number_that_is_submitted_again_is_generated_once() -> None:
    engine = Engine()
    here = make_replica("a", engine)
    for _ in range(2):
        await here.submit("client", [(7, request(0))], ["over"])
    engine.finish(0)
    assert [r async for r in here.results("client", "a")] == [[(7, completion(0))]]
    assert engine.generated == [0]
    assert engine.released == ["over", "over"]


def test_the_batching_delay_is_a_share_of_the_latency() -> None:
    delay = BatchingDelay(least_s=0.001, most_s=0.02)
    assert delay.seconds == 0.001
    for _ in range(200):
        delay.observe(0.5)
    assert delay.seconds == pytest.approx(0.005, rel=1e-3)  # a hundredth
    for _ in range(200):
        delay.observe(10.0)
    assert delay.seconds == 0.02
    for _ in range(200):
        delay.observe(0.0)
    assert delay.seconds == 0.001
