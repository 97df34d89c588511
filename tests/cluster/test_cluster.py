"""The cluster's parts: those without Ray first, then workers and replicas on a real local one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rayrl.cluster.learner_group import LearnerGroup, LearnerRank
from rayrl.cluster.open import make_environment, open_rollouts, seat_players
from rayrl.cluster.rollouts import sort_out
from rayrl.cluster.serving.inference_client import BatchingClient, ReplicaLost, ServeReplicas
from rayrl.cluster.serving.replica import deploy, undeploy
from rayrl.cluster.serving.router import IndexRouter
from rayrl.cluster.serving.streams import Result
from rayrl.cluster.session import Session, run_name
from rayrl.cluster.weight_sync.push import WeightSync, confirmations, open_store
from rayrl.cluster.weight_sync.transports import ObjectStore
from rayrl.cluster.weight_sync.weight_store import NAMESPACE, Published, store_name
from rayrl.config import Config, from_dict
from rayrl.engine import open_engine
from rayrl.errors import ConfigError, InfraError, RunFailed, StaleWeights
from rayrl.learner.batch import batch_of
from rayrl.learner.loss import LossInputs, LossOutputs
from rayrl.rollout.rollout import GroupPlan
from rayrl.types import (
    Completion,
    Episode,
    Failure,
    Group,
    Request,
    Sampling,
    Task,
    Turn,
    VersionSpan,
)
from rayrl.weights.flat import Manifest, checksum, flatten
from rayrl.weights.model_dir import EMBEDDED
from tests.learner_rows import make_model, make_rows
from tests.rollout import test_endpoint as server_of

HERE = Path(__file__).parents[1]


def request(session: str = "s", seed: int = 0, **more: Any) -> Request:
    return Request(session, (1, 2, 3), Sampling(max_tokens=8), seed=seed, **more)


def completion(*ids: int, version: int = 0) -> Completion:
    return Completion(ids, (-0.5,) * len(ids), (VersionSpan(version, 0, len(ids)),), "stop")


class Replicas:
    """`inference_client.Replicas` that answer with the request's seed, in lists of two.

    Args:
        die_after: results of each stream, after which its replica is lost.
        fail: raised by `submit`.
        fail_results: raised by `results`.

    Attributes:
        batches: index, requests and released conversations of each.
    """

    def __init__(
        self,
        die_after: Sequence[int] = (),
        fail: Exception | None = None,
        fail_results: Exception | None = None,
    ) -> None:
        self.batches: list[tuple[int, list[Request], list[str]]] = []
        self.die_after = list(die_after)
        self.fail, self.fail_results = fail, fail_results
        self.waiting: dict[str, list[tuple[int, Request]]] = {}

    async def submit(
        self, index: int, requests: Sequence[tuple[int, Request]], released: Sequence[str]
    ) -> str:
        self.batches.append((index, [request for _, request in requests], list(released)))
        if self.fail:
            raise self.fail
        self.waiting[str(index)] = list(requests)
        return str(index)

    async def results(self, replica: str) -> AsyncIterator[Sequence[Result]]:
        if self.fail_results:
            raise self.fail_results
        requests = self.waiting.pop(replica)
        dies = self.die_after.pop(0) if self.die_after else len(requests)
        for first in range(0, dies, 2):
            await asyncio.sleep(0)
            last = min(first + 2, dies)
            yield [(number, completion(r.seed)) for number, r in requests[first:last]]
        if dies < len(requests):
            raise ReplicaLost

    def cancel(self, replica: str, numbers: Sequence[int]) -> None: ...


def client(replicas: Any, count: int = 1, deadline_s: float = 600) -> BatchingClient:
    return BatchingClient(replicas, count=count, deadline_s=deadline_s)


async def test_requests_of_one_tick_are_one_batch_per_replica() -> None:
    replicas = Replicas()
    of_two = client(replicas, count=2)
    done = await asyncio.gather(*(of_two.generate(request(f"s{k}", k)) for k in range(20)))
    assert [answer.ids for answer in done] == [(k,) for k in range(20)]
    assert sorted(index for index, *_ in replicas.batches) == [0, 1]
    index_of = {r.session: index for index, requests, _ in replicas.batches for r in requests}
    await asyncio.gather(*(of_two.generate(request(f"s{k}", k)) for k in range(20)))
    for index, requests, _ in replicas.batches[2:]:
        assert all(index_of[r.session] == index for r in requests), "a conversation has moved"


async def test_what_a_dead_replica_did_not_answer_is_submitted_again() -> None:
    replicas = Replicas(die_after=[3, 0])
    one = client(replicas)
    done = await asyncio.gather(*(one.generate(request(f"s{k}", k)) for k in range(5)))
    assert [answer.ids for answer in done] == [(k,) for k in range(5)]
    submitted = [[r.seed for r in requests] for _, requests, _ in replicas.batches]
    assert submitted == [[0, 1, 2, 3, 4], [3, 4], [3, 4]]


async def test_no_request_hangs() -> None:
    with pytest.raises(InfraError, match="cannot pickle"):
        await client(Replicas(fail=TypeError("cannot pickle"))).generate(request())
    with pytest.raises(InfraError, match="cannot unpickle"):
        await client(Replicas(fail_results=TypeError("cannot unpickle"))).generate(request())
    with pytest.raises(StaleWeights):
        await client(Replicas(fail=StaleWeights("old"))).generate(request())
    with pytest.raises(InfraError, match=r"0\.05 s \(cluster.request_deadline_s\)"):
        await client(Replicas(die_after=[0] * 99), deadline_s=0.05).generate(request())


async def test_version_and_releases_go_along() -> None:
    replicas = Replicas()
    one = client(replicas)
    one.min_version = 4
    await one.generate(request("over"))
    one.release(["over", "never seen"])
    await one.generate(request(min_version=2))
    await one.generate(request(min_version=9))
    assert [(r.min_version, released) for _, (r,), released in replicas.batches] == [
        (4, []),
        (4, ["over"]),
        (9, []),
    ]


async def test_indexes_are_spread_over_the_live_replicas_and_ids_name_one() -> None:
    router = object.__new__(IndexRouter)

    async def first(session_id: str, live: str) -> str:
        replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in live]
        pending = SimpleNamespace(
            metadata=SimpleNamespace(session_id=session_id),
            routing_context=SimpleNamespace(should_backoff=False),
        )
        ranks = await router.choose_replicas(replicas, pending)
        assert sorted(r.replica_id.unique_id for (r,) in ranks) == sorted(live)
        return str(ranks[0][0].replica_id.unique_id)

    assert [await first(index, "ab") for index in "0101"] == ["a", "b", "a", "b"]
    assert [await first(index, "ba") for index in "01"] == ["a", "b"]
    assert [await first(index, "b") for index in "01"] == ["b", "b"]
    assert [await first(name, "cab") for name in "abc"] == ["a", "b", "c"]
    assert await first("x", "ab") == "a", "it has left; any other refuses the call"
    assert await first("", "ab") == "a"
    assert await router.choose_replicas([], None) == []


def group(name: str, *failures: Failure | None, version: int = 1) -> Group:
    turn = Turn("agent", (), "x", "stop", versions=(VersionSpan(version, 0, 1),))
    episodes = tuple(
        Episode(f"{name}/{k}", "talk", Task(seed=7), k, (turn,), failure=failure)
        for k, failure in enumerate(failures)
    )
    return Group(name, Task(seed=7), episodes)


def test_groups_that_ended_short_or_are_old_are_dropped_and_counted() -> None:
    env, infra = Failure("env", "it raised"), Failure("infra", "it died")
    groups = [
        group("a", None, None),
        group("b", None, env),
        group("c", infra, None),
        group("d", None, None, version=0),
        group("e", None, None),
    ]
    found = sort_out(groups, min_version=1, budget=0.1)
    assert [g.id for g in found.groups] == ["a", "e"]
    assert [g.id for g in found.dropped] == ["b", "c", "d"]
    assert (found.env_failures, found.infra_failures, found.stale) == (1, 1, 2)


def test_an_environment_that_fails_too_often_stops_the_run() -> None:
    env = Failure("env", "it raised", "Traceback: line 3")
    groups = [group("a", None, env), group("b", None, None)]
    assert sort_out(groups, 0, budget=0.25).env_failures == 1
    with pytest.raises(RunFailed) as stopped:
        sort_out(groups, 0, budget=0.2)
    for part in ("'talk'", "1 of 4", "env.failure_budget=0.2", "a/1", "seed=7", "line 3"):
        assert part in str(stopped.value)
    with pytest.raises(RunFailed, match="it died"):
        sort_out([group("a", Failure("infra", "it died"))], 0, budget=1)


def test_what_a_server_refuses_is_neither_the_environments_nor_to_be_played_again() -> None:
    refused, infra = Failure("refused", "hate"), Failure("infra", "it died")
    found = sort_out([group("a", refused), group("b", None)], 0, budget=0)
    assert (found.env_failures, found.infra_failures, found.refused) == (0, 0, 1)
    found = sort_out([group("a", refused)], 0, budget=0)
    assert (found.groups, len(found.dropped)) == ((), 1)  # an evaluation's result
    with pytest.raises(RunFailed, match="hate"):
        sort_out([group("a", refused), group("b", infra)], 0, budget=0)


def test_a_push_counts_only_what_was_confirmed_exactly() -> None:
    published = Published(3, (), Manifest((), 0), "abc")
    results = [("r1", 3, "abc"), ("r2", 2, "abc"), ("r3", 3, "xyz"), RuntimeError("gone")]
    confirmed, wrong = confirmations(results, published)
    assert confirmed == {"r1": "abc"}
    assert [text.split(" holds")[0] for text in wrong] == [
        "replica r2",
        "replica r3",
        "RuntimeError: gone",
    ]


def test_a_run_folder_always_has_the_same_name_and_no_folder_a_new_one(tmp_path: Path) -> None:
    assert run_name(str(tmp_path)) == run_name(str(tmp_path / "x" / ".."))
    assert run_name(str(tmp_path)) != run_name(str(tmp_path / "x"))
    assert run_name() != run_name()


class Rank:
    """An actor of `LearnerRank` as the driver sees it; writes into `into`, or where it is told."""

    def __init__(self, into: Path | None = None) -> None:
        self.into = into
        self.told: list[str] = []
        self.save = self.export = self.load = SimpleNamespace(remote=self._write)

    async def _write(self, folder: str) -> None:
        self.told.append(folder)
        for name in ("learner.json", "config.json"):
            ((self.into or Path(folder)) / name).touch()


def learners_of(*ranks: Rank) -> LearnerGroup:
    learners = LearnerGroup(from_dict({}))
    learners._ranks = list(ranks)
    return learners


async def test_ranks_are_told_where_the_drivers_folders_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    learners = learners_of(rank := Rank())
    await learners.save(".")
    await learners.load(".")
    await learners.export(Path("."))
    assert rank.told == [str(tmp_path)] * 3


async def test_ranks_republish_nothing_while_they_start(session: Session, tmp_path: Path) -> None:
    """Whoever asks for a late replica asks at any time, also while lost ranks are restarted."""
    learners = LearnerGroup(from_dict({"learner": {"kind": "reference"}}))
    starting = asyncio.create_task(learners.start(str(make_model(tmp_path / "model")), 4))
    try:
        while not starting.done():
            assert await learners.republish(0) is None
            await asyncio.sleep(0.01)
        await starting
        assert await learners.republish(0) is None
        await learners.broadcast(0, 60, None)
        assert (republished := await learners.republish(0)) is not None
        assert republished.version == 0
    finally:
        learners.close()
    assert await learners.republish(0) is None


async def test_a_checkpoint_the_driver_cannot_see_is_refused(tmp_path: Path) -> None:
    """Or it would be sealed without its weights, and could not be resumed from."""
    learners = learners_of(Rank(into=tmp_path))
    with pytest.raises(RunFailed, match=r"run\.dir.*learner\.json.*storage that all nodes share"):
        await learners.save(tmp_path / "run")
    with pytest.raises(RunFailed, match=r"config\.json"):
        await learners.export(tmp_path / "run")


@pytest.mark.parametrize("kind", ["reference", "deepspeed"])
def test_a_learner_computes_on_the_gpu_it_reserves(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def learner(*_: object, device: str, **__: object) -> None:
        made.append(device)

    monkeypatch.setattr("rayrl.learner.reference.ReferenceLearner", learner)
    monkeypatch.setattr("rayrl.learner.deepspeed.DeepSpeedLearner", learner)
    monkeypatch.setattr("rayrl.cluster.learner_group.prepare_process", lambda _: None)
    for gpus in (0, 1):
        settings = from_dict({"learner": {"kind": kind}, "cluster": {"learner_gpus": gpus}})
        LearnerRank(0, 1).start(settings, EMBEDDED, 1, 1, ("", 0), "cispo")
    assert made == ["cpu", "cuda"]


# --- on Ray ------------------------------------------------------------------------------------


def config(tiny: Path, **sections: dict[str, Any]) -> Config:
    plain: dict[str, Any] = {
        "env": {"name": f"{HERE / 'cluster_envs.py'}:talk"},
        "model": {"path": str(tiny)},
        "engine": {"max_len": 256},
        "sampling": {"max_tokens": 8},
    }
    for name, section in sections.items():
        plain[name] = {**plain.get(name, {}), **section}
    return from_dict(plain)


def plans(config: Config, n: int = 8, size: int = 2) -> list[GroupPlan]:
    tasks = make_environment(config).tasks(0, n)
    return [GroupPlan(f"g{k}", task, size, seed=k) for k, task in enumerate(tasks)]


def test_seats_are_checked(tiny: Path) -> None:
    environment = make_environment(config(tiny))
    assert seat_players(environment, {}) == {"agent": "policy"}
    with pytest.raises(ConfigError, match="Did you mean 'agent'"):
        seat_players(environment, {"agnt": "policy"})


@pytest.fixture(scope="module")
def weights_of(tiny: Path) -> Any:
    """Version k: the model with its embedding scaled by 1 + k/10."""
    from transformers import AutoModelForCausalLM

    def make(version: int) -> Any:
        state = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
        for tensor in {t.data_ptr(): t for t in state.values()}.values():
            tensor.mul_(1 + version / 10)
        return flatten(state)

    return make


def replicas_of(app: str) -> list[str]:
    import ray

    actors = ray.util.list_named_actors(all_namespaces=True)
    return sorted(a["name"] for a in actors if a["name"].startswith(f"SERVE_REPLICA::{app}#"))


async def test_replicas_admit_weights_by_version(
    session: Session, tiny: Path, weights_of: Any
) -> None:
    import ray
    from ray import serve

    async def publish(version: int) -> Published:
        flat, manifest = weights_of(version)
        return Published(version, (ray.put(flat),), manifest, checksum(flat))

    settings = config(tiny, cluster={"replicas": 2})
    store = open_store(session)
    assert ray.get_actor(store_name(session.name), namespace=NAMESPACE)
    engine = partial(open_engine, tiny, settings.engine)
    app = "test-weights"
    with ExitStack() as stack:
        stack.callback(ray.kill, store)
        stack.callback(undeploy, app)
        handle = await deploy(session, settings, engine, app=app, store=True)
        weights = WeightSync(ObjectStore(publish, store, handle), store, handle, deadline_s=600)
        one = client(ServeReplicas(app), count=2, deadline_s=600)
        requests = [request(f"s{k}", k) for k in range(16)]

        async def answers() -> list[Completion]:
            return await asyncio.gather(*(one.generate(r) for r in requests))

        first = await answers()
        assert {span.version for answer in first for span in answer.versions} == {0}
        with pytest.raises(StaleWeights, match="version 1"):
            await one.generate(request(min_version=1))
        confirmed = await weights.push(1)
        assert len(confirmed) == 2
        one.min_version = 1
        second = await answers()
        assert {span.version for answer in second for span in answer.versions} == {1}
        assert second != first

        # One dies with requests in flight; its replacement must not answer with version 0.
        dead, _ = before = replicas_of(app)
        flying = asyncio.ensure_future(answers())
        await asyncio.sleep(0.003)
        ray.kill(ray.get_actor(dead, namespace="serve"))
        assert await flying == second, "the same seeds on the same weights, from whoever is left"
        for _ in range(3000):
            status = serve.status().applications[app].status
            if status == "RUNNING" and len(set(replicas_of(app)) - {dead}) == 2:
                break
            await asyncio.sleep(0.1)
        assert replicas_of(app) != before
        assert await answers() == second
        assert len(await weights.push(2)) == 2

        ray.kill(store)
        one.min_version = 2
        assert await answers(), "who has the weights needs no store"
        with pytest.raises(RunFailed, match=r"(?s)weights store.*the same command again"):
            await weights.push(3)


OUTSIDE = """
from rayrl.learner.loss import LossOutputs

def imitation(inputs, *, upper):
    ratio, cut = truncated(inputs, upper)
    loss = -ratio * inputs.advantages * inputs.logprobs
    metrics = {"clip_fraction": cut, "good": inputs.advantages > 0}
    if len(inputs.row) > 1:  # what not every micro-batch measures
        metrics["several"] = cut
    return LossOutputs(loss, metrics)

def truncated(inputs, upper):
    ratio = (inputs.logprobs.detach() - inputs.old_logprobs).exp()
    return ratio.clamp(max=upper), ratio > upper
"""


async def test_a_loss_from_outside_trains_as_the_one_it_imitates(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks have neither its module, which only the driver's path has, nor this test's."""
    folder = tmp_path / "where the driver looks"
    folder.mkdir()
    (folder / "zz_outside.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(str(folder))
    model = str(make_model(tmp_path / "model"))
    learner = {"world_size": 2, "zero_stage": 1, "micro_batch_tokens": 96, "lr": 0.003}
    algo = {"loss": "zz_outside:imitation", "loss_args": {"upper": 5.0}}
    learners = LearnerGroup(from_dict({"learner": learner, "algo": algo}))
    bound, batch = 5.0, batch_of(make_rows(0))

    def of_a_cell(inputs: LossInputs) -> LossOutputs:
        ratio = (inputs.logprobs.detach() - inputs.old_logprobs).exp()
        loss = -ratio.clamp(max=bound) * inputs.advantages * inputs.logprobs
        return LossOutputs(loss, {"clip_fraction": ratio > bound, "row_tokens": loss.detach()})

    try:
        await learners.start(model, 4)
        start = await learners.publish(0)
        await learners.save(tmp_path / "start")
        found: list[tuple[str, dict[str, float]]] = []
        for loss in (None, "cispo", of_a_cell):
            await learners.load(tmp_path / "start")
            metrics = dict(await learners.step(batch, loss))
            found.append(((await learners.publish(1)).checksum, metrics))
        (by_module, measured), (built_in, plain), (by_value, cell) = found
        assert start.checksum != built_in == by_module == by_value
        tokens = np.concatenate([row.advantages[row.loss_mask] for row in batch.rows])
        assert measured.pop("loss/good") == pytest.approx((tokens > 0).mean())
        assert measured.pop("loss/several") == 0.0
        assert cell.pop("loss/row_tokens") != cell["row_tokens"], "a name of the learner's own"
        assert measured == plain == cell
        one = batch_of(batch.rows[:1])  # for one of the ranks
        assert 0 <= (await learners.step(one))["loss/good"] <= 1
        with pytest.raises(ConfigError, match=r"<lambda> returned a loss without gradient"):
            await learners.step(batch, lambda inputs: LossOutputs(inputs.advantages))
        with pytest.raises(ConfigError, match=r"algo\.loss='cipso'.*Did you mean 'cispo'"):
            await learners.step(batch, "cipso")
    finally:
        learners.close()


class Endless:
    """An engine that never answers; files say what it generates and what was cancelled."""

    version = 0

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def generate(self, request: Request) -> Completion:
        (self.folder / f"generating-{request.seed}").touch()
        try:
            await asyncio.Event().wait()
        finally:
            (self.folder / f"cancelled-{request.seed}").touch()
        raise AssertionError

    def release(self, sessions: Sequence[str]) -> None: ...

    async def check(self) -> None: ...


class Waiting:
    """What an env worker does, as an actor: waits for a completion."""

    async def wait(self, app: str, seed: int) -> None:
        await client(ServeReplicas(app)).generate(request(f"s{seed}", seed))


async def file_of(path: Path) -> None:
    async with asyncio.timeout(600):
        while not path.exists():  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0.02)


async def test_what_nobody_waits_for_ends_at_the_engine(
    session: Session, tiny: Path, tmp_path: Path
) -> None:
    import ray

    app = "test-endless"
    with ExitStack() as stack:
        stack.callback(undeploy, app)
        engine: Any = partial(Endless, tmp_path)
        await deploy(session, config(tiny), engine, app=app, store=False)
        here = client(ServeReplicas(app))
        waiting = [asyncio.create_task(here.generate(request(f"s{k}", k))) for k in range(2)]
        for k in range(2):
            await file_of(tmp_path / f"generating-{k}")
        waiting[0].cancel()
        await file_of(tmp_path / "cancelled-0")

        there = ray.remote(num_cpus=0)(Waiting).remote()
        there.wait.remote(app, 2)
        await file_of(tmp_path / "generating-2")
        ray.kill(there)
        await file_of(tmp_path / "cancelled-2")
        assert not (tmp_path / "cancelled-1").exists(), "another client's"
        waiting[1].cancel()
        await here.close()


async def test_replicas_that_the_cluster_lacks_resources_for_are_refused(
    session: Session, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayrl.cluster.serving.replica.START_DEADLINE_S", 1.0)
    settings = config(tiny, cluster={"replica_cpus": 64})
    engine = partial(open_engine, tiny, settings.engine)
    with ExitStack() as stack:
        stack.callback(undeploy, "test-no-resources")
        with pytest.raises(InfraError) as stopped:
            await deploy(session, settings, engine, app="test-no-resources", store=False)
    for part in ("cluster.replicas=1", "within 1 s", "replica_cpus=64", "GPUs (0 free)", "Lower"):
        assert part in str(stopped.value)


@pytest.mark.parametrize("fault", ["hang", "exit"])
async def test_a_task_that_takes_its_env_worker_down_is_the_environments_failure(
    session: Session, tiny: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config(
        tiny,
        env={"args": {"fault": fault}, "deadline_s": 6.0, "failure_budget": 0.5},
        cluster={"env_workers": 2},
    )
    async with open_rollouts(settings, seats={"": {"agent": "player:parrot"}}) as rollouts:
        found = await rollouts.collect(plans(settings))
        assert [g.id for g in found.groups] == [f"g{k}" for k in range(8) if k != 3]
        (blamed,) = found.dropped
        assert (blamed.id, found.env_failures) == ("g3", 2)
        message = blamed.episodes[0].failure.message  # type: ignore[union-attr]
        assert ("blocked" if fault == "hang" else "died") in message
        assert "k=3" in repr(blamed.task)
        assert rollouts.restarts == 3, "with four groups, with two, with one"
    assert caplog.text.count("was lost with") == 3
    if fault == "hang":
        said = next(message for message in caplog.messages if "has blocked" in message)
        for part in (
            "cluster_envs.py:talk'",
            "in episode g3/",
            "k=3",
            "env.isolated=true",
            "time.sleep(600)",
        ):
            assert part in said


async def test_episodes_of_a_dead_env_worker_are_resumed(
    session: Session, tiny: Path, tmp_path: Path
) -> None:
    found = []
    for flag in (tmp_path / "lives", tmp_path / "dies"):
        if flag.name == "lives":
            flag.touch()
        env = {"name": f"{HERE / 'cluster_envs.py'}:mortal", "args": {"flag": str(flag)}}
        async with open_rollouts(config(tiny, env=env)) as rollouts:
            playing = asyncio.ensure_future(rollouts.collect(plans(config(tiny, env=env))))
            while flag.name == "dies" and not flag.exists():
                begun = await rollouts._recorder.partial_episodes.remote(["g3"])
                if [len(episode.turns) for episode in begun.values()] == [2, 2]:
                    Path(f"{flag}-recorded").touch()  # noqa: ASYNC240
                await asyncio.sleep(0.02)
            played = await playing
            found.append([e for group in played.groups for e in group.episodes])
            assert rollouts.restarts == (flag.name == "dies")
    calm, died = found
    assert [e.turns for e in died] == [e.turns for e in calm], "as if nothing had been"
    assert [e.scores for e in died] == [e.scores for e in calm]
    assert not any(e.replayed or e.replay_mismatches for e in calm)
    assert [e.replayed for e in died if e.task.k == 3] == [2, 2]  # type: ignore[attr-defined]
    assert not any(e.replay_mismatches for e in died)


@pytest.mark.parametrize("fault", ["raise", "nan"])
async def test_a_budget_stops_a_run_with_env_task_and_traceback(
    session: Session, tiny: Path, fault: str
) -> None:
    settings = config(tiny, env={"args": {"fault": fault}})
    async with open_rollouts(settings, seats={"": {"agent": "player:parrot"}}) as rollouts:
        with pytest.raises(RunFailed) as stopped:
            await rollouts.collect(plans(settings))
    for part in ("talk", "k=3", "Traceback", "fault of number 3" if fault == "raise" else "nan"):
        assert part in str(stopped.value)


async def test_wrong_players_are_named_before_anything_is_played(
    session: Session, tiny: Path
) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'player:parrot'"):
        async with open_rollouts(config(tiny), seats={"": {"agent": "player:parot"}}):
            pass


async def test_what_is_known_is_not_played_and_winding_down_begins_nothing_new(
    session: Session, tiny: Path
) -> None:
    """The limits of an endpoint are shared by the workers: two requests at once, one a worker."""

    async def slow() -> Any:
        while server.most < 2:  # noqa: ASYNC110 - both workers have asked; more must not come
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        return server_of.said("yes")

    async with server_of.serving(slow) as server:
        asked = {"url": server.url, "model": "m", "concurrency": 2}
        settings = config(tiny, endpoint=asked, cluster={"env_workers": 2})
        async with open_rollouts(settings, seats={"": {"agent": "endpoint"}}) as rollouts:
            some = await rollouts.collect(plans(settings), on_group=lambda _: rollouts.wind_down())
            episodes = sum(len(group.episodes) for group in some.groups)
            assert 1 <= len(some.groups) < 8
            assert len(server.seen) == 2 * episodes  # what was begun has ended
            known = {group.id: group for group in some.groups}
            whole = await rollouts.collect(plans(settings), known=known)
        assert [group.id for group in whole.groups] == [f"g{k}" for k in range(8)]
        assert len(server.seen) == 2 * sum(len(group.episodes) for group in whole.groups)
        assert server.most == 2
    with pytest.raises(ConfigError, match="no server answers there"):
        async with open_rollouts(settings, seats={"": {"agent": "endpoint"}}):
            pass


async def test_results_do_not_depend_on_workers_or_replicas(session: Session, tiny: Path) -> None:
    found = []
    for workers, replicas in ((1, 1), (2, 2)):
        settings = config(tiny, cluster={"env_workers": workers, "replicas": replicas})
        async with open_rollouts(settings) as rollouts:
            found.append(await rollouts.collect(plans(settings)))
            app = rollouts.job.apps["policy"]
        assert app == f"{run_name(settings.run.dir)}-0", "the same run replaces what it left"
    assert found[0] == found[1]
    assert found[0].groups[0].trainable == ("agent",)
    replies = {turn.text for g in found[0].groups for e in g.episodes for turn in e.turns}
    assert len(replies) > 8


def test_an_environment_of_a_mixture_that_always_fails_stops_the_run() -> None:
    """Four episodes in a hundred are within the budget, but they are all that games has."""

    def of(env: str, n: int, failure: Failure | None) -> Group:
        episodes = [Episode(f"{env}/{k}", env, Task(), k, (), failure=failure) for k in range(n)]
        return Group(env, Task(), tuple(episodes))

    broke = Failure("env", "it broke")
    groups = [of("words", 96, None), of("games", 4, broke)]
    with pytest.raises(RunFailed, match=r"'games' of the mixture failed in all of its 4 episodes"):
        sort_out(groups, 0, 0.05, ("words", "games"))
    assert sort_out(groups, 0, 0.05).env_failures == 4
    spared = [*groups, of("games", 1, None)]
    assert sort_out(spared, 0, 0.05, ("words", "games")).env_failures == 4
