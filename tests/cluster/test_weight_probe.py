"""What confirms a push besides its checksum: that replicas compute the learner's model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import RayActorError, RayTaskError
from transformers import AutoModelForCausalLM

from rayrl.cluster.serving.replica import Replica
from rayrl.cluster.weight_sync.probe import (
    EXACT,
    ROUNDED,
    Probe,
    mean_difference,
    probe_requests,
    tolerance,
)
from rayrl.cluster.weight_sync.push import WeightSync
from rayrl.cluster.weight_sync.weight_store import Published
from rayrl.config import Config, EngineConfig, from_dict, validate
from rayrl.engine.embedded.engine import EmbeddedEngine
from rayrl.errors import ConfigError, InfraError, NumericsError, RunFailed, StaleWeights
from rayrl.learner.batch import Trajectory
from rayrl.learner.reference import ReferenceLearner
from rayrl.types import Completion
from rayrl.weights.flat import Manifest, checksum
from tests.learner_rows import make_model

Fault = Callable[[torch.nn.Module], None]


def config(model: Path, engine: str = "embedded", **cluster: Any) -> Config:
    learner = {"kind": "reference", "lr": 0.01}
    one: Config = from_dict(
        {
            "env": {"name": "copyword"},
            "model": {"path": str(model)},
            "engine": {"kind": engine},
            "learner": learner,
            "cluster": cluster,
        }
    )
    return one


def open_engine(path: Path, version: int = 0, max_len: int = 64) -> EmbeddedEngine:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return EmbeddedEngine(model, EngineConfig(max_len=max_len), version=version)


class Here:
    """A learner, and what stands for replicas of it, in this process: a transport and a handle.

    Args:
        names: of the replicas.

    Attributes:
        faults: by replica, what goes wrong whenever it has loaded weights.
        broken: by replica, what it raises instead of answering.
        asked: replicas that completed prompts, in order.
    """

    def __init__(self, cfg: Config, *names: str) -> None:
        self.learner = ReferenceLearner(cfg, cfg.model.path)
        self.cfg = cfg
        self.engines: dict[str, EmbeddedEngine] = {}
        self.faults: dict[str, Fault] = {}
        self.broken: dict[str, Exception] = {}
        self.asked: list[str] = []
        for name in names:
            self.start(name)
        handle: Any = self
        self.probe = Probe(cfg, self, handle)
        self.weights = WeightSync(self, None, handle, 60.0, probe=self.probe)
        self.weights._restoring = SimpleNamespace(cancel=lambda: None)  # type: ignore[assignment]

    def start(self, name: str) -> None:
        self.engines[name] = open_engine(Path(self.cfg.model.path))

    # the learner

    async def describe(self) -> tuple[str, int]:
        return self.learner.describe()

    async def logprobs(self, rows: Sequence[Trajectory]) -> Any:
        return self.learner.logprobs(rows, temperature=1.0)

    def drift(self) -> None:
        """As if it had learned something."""
        rng = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in self.learner.module.parameters():
                weight.add_(0.5 * weight.std() * torch.randn(weight.shape, generator=rng))

    # the transport

    async def deliver(self, version: int) -> tuple[Published, list[Any]]:
        flat, manifest = self.learner.flat_weights()
        digest = checksum(flat)
        confirmed = []
        for name, engine in self.engines.items():
            assert await engine.load_weights(version, flat, manifest) == digest
            if name in self.faults:
                with torch.no_grad():
                    self.faults[name](engine._model.model)
            confirmed.append((name, version, digest))
        return Published(version, (), Manifest((), 0), digest), confirmed

    # the handle

    def broadcast(self, method: str, requests: Any) -> Any:
        assert method == "probe"

        async def one(name: str) -> Any:
            if name in self.broken:
                raise self.broken[name]
            self.asked.append(name)
            replica: Any = SimpleNamespace(_engine=self.engines[name], _id=name)
            return await Replica.probe(replica, requests)

        async def results_async(*, return_exceptions: bool) -> Any:
            return await asyncio.gather(
                *map(one, self.engines), return_exceptions=return_exceptions
            )

        return SimpleNamespace(results_async=results_async)

    async def close(self) -> None:
        for engine in self.engines.values():
            await engine.close()


def flipped_layer(model: Any) -> None:
    """One layer's outputs in another order, as where it is packed in another way than is read."""
    model.model.layers[0].mlp.down_proj.weight.copy_(
        model.model.layers[0].mlp.down_proj.weight.flip(0)
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose distribution is far from uniform."""
    return make_model(tmp_path_factory.mktemp("probe") / "model")


async def test_replicas_that_compute_the_same_confirm_and_keep_nothing(model: Path) -> None:
    here = Here(config(model), "a", "b")
    assert set(await here.weights.push(0)) == {"a", "b"}
    assert here.asked == ["a", "b"]
    here.drift()
    await here.weights.push(1)
    await here.weights.push(2)
    assert here.asked == ["a", "b"], "once is enough"
    for engine in here.engines.values():
        await engine.generate(probe_requests(30, 2)[0])  # so that what was released has been
        assert engine.stats()["reused_tokens"] == 0
    await here.close()


async def test_one_that_computes_another_model_is_refused_at_the_first_push(model: Path) -> None:
    here = Here(config(model), "a", "b")
    here.faults = {"a": flipped_layer, "b": flipped_layer}
    with pytest.raises(ConfigError) as stopped:
        await here.weights.push(0)
    for part in ("engine.kind=embedded: 2 of 2 replicas", "replica ", "LlamaForCausalLM", "vllm."):
        assert part in str(stopped.value)
    await here.close()


async def test_a_learner_that_has_diverged_is_not_the_replicas_fault(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Here(config(model), "a")
    nothing = [np.full(9, np.nan, np.float32)] * 4
    monkeypatch.setattr(here.learner, "logprobs", lambda rows, temperature: nothing)
    with pytest.raises(NumericsError, match="learner"):
        await here.weights.push(0)
    await here.close()


async def test_one_of_several_is_named(model: Path) -> None:
    here = Here(config(model), "a", "b", "c")
    here.faults["b"] = flipped_layer
    with pytest.raises(RunFailed, match=r"(?s)1 of 3 replicas.*replica b .* nats.*same command"):
        await here.weights.push(0)
    await here.close()


@pytest.mark.parametrize(("every", "seen_at"), [(0, None), (1, 1), (2, 2), (3, 3)])
async def test_a_later_push_is_compared_as_often_as_asked(
    model: Path, every: int, seen_at: int | None
) -> None:
    here = Here(config(model, check_pushes=every), "a")
    await here.weights.push(0)
    here.faults["a"] = flipped_layer
    for version in range(1, 4):
        here.drift()
        if version == seen_at:
            with pytest.raises(RunFailed, match=f"version {version} .*replica a .*differ"):
                await here.weights.push(version)
            break
        await here.weights.push(version)
    assert len(here.asked) == (1 if seen_at is None else 2)
    await here.close()


async def test_a_replica_that_was_started_anew_is_compared(model: Path) -> None:
    here = Here(config(model), "a", "b")
    await here.weights.push(0)
    await here.engines.pop("b").close()
    here.start("c")
    here.faults["c"] = flipped_layer
    with pytest.raises(RunFailed, match=r"1 of 2 replicas.*replica c"):
        await here.weights.push(1)
    await here.close()


async def test_who_cannot_answer_now_is_compared_next_time(model: Path) -> None:
    here = Here(config(model), "a", "b")
    late = RayTaskError("probe", "a traceback", StaleWeights("fetching")).as_instanceof_cause()
    for error in (RayActorError(), late, InfraError("closed")):
        here.broken = {"a": error, "b": error}
        with pytest.raises(InfraError, match=r"no replica.*push_deadline_s.*"):
            await here.weights.push(0)
    here.broken = {"b": RayActorError()}
    await here.weights.push(0)
    await here.weights.push(1)
    assert here.asked == ["a", "a"]
    here.broken = {}
    await here.weights.push(2)
    await here.weights.push(3)
    assert here.asked == ["a", "a", "a", "b"]
    here.start("c")
    fault = RayTaskError("probe", "a traceback", TypeError("a fault of ours"))
    here.broken = {"c": fault.as_instanceof_cause()}
    with pytest.raises(TypeError, match="ours"):
        await here.weights.push(4)
    await here.close()


async def test_what_a_probe_asks_for_fits_every_model_and_engine(model: Path) -> None:
    for vocabulary in (1, 2, 30, 151_936):
        asked = probe_requests(vocabulary, 7)
        assert asked == probe_requests(vocabulary, 7)
        ids = {i for request in asked for i in request.prompt_ids}
        assert vocabulary // 4 <= min(ids)
        assert max(ids) < max(1, vocabulary)
        assert {request.min_version for request in asked} == {7}
        assert len({request.session for request in asked}) == len(asked)
    short = open_engine(model, version=7, max_len=12)  # some have no room for all ids, or for any
    answers = [await short.generate(request) for request in probe_requests(30, 7)]
    assert [len(answer.ids) for answer in answers] == [8, 1, 0, 0]
    await short.close()


def test_the_difference_is_of_the_ids_that_were_drawn() -> None:
    answers = [
        Completion((5, 6), (-1.0, -2.0), (), "length"),
        Completion((), (), (), "length"),
        Completion((7,), (-3.0,), (), "length"),
    ]
    rows = [[0, 0, -1.5, -2.0], [0, 0], [0, -2.5]]
    scored = [np.array(row, np.float32) for row in rows]
    assert mean_difference(answers, scored) == (pytest.approx((0.5 + 0 + 0.5) / 3), 3)
    scored[0][2] = np.nan
    assert math.isnan(mean_difference(answers, scored)[0])


@pytest.mark.parametrize(
    ("kind", "engine", "learner", "wanted"),
    [
        ("embedded", "auto", "float32", EXACT),
        ("embedded", "auto", "bfloat16", ROUNDED),
        ("vllm", "float32", "float32", EXACT),
        ("vllm", "float32", "bfloat16", ROUNDED),
        ("vllm", "auto", "float32", ROUNDED),
        ("vllm", "bfloat16", "bfloat16", ROUNDED),
        ("vllm", "float16", "float32", ROUNDED),
    ],
)
def test_what_precision_explains(kind: str, engine: str, learner: str, wanted: float) -> None:
    settings = {"engine": {"kind": kind, "dtype": engine}, "learner": {"dtype": learner}}
    assert tolerance(from_dict(settings)) == wanted


async def test_what_to_do_goes_by_what_was_chosen(model: Path) -> None:
    said = {
        ("vllm", "auto"): "choose engine=embedded, or engine.dtype=float32",
        (
            "vllm",
            "adapters",
        ): "choose cluster.sync=object_store, which pushes whole weights, or eng",
    }
    for (kind, sync), wanted in said.items():
        here = Here(config(model), "a")
        here.probe._config = config(model, kind, sync=sync)
        here.faults["a"] = flipped_layer
        with pytest.raises(ConfigError, match=wanted):
            await here.weights.push(0)
        await here.close()


def test_a_negative_period_is_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.check_pushes"):
        validate(config(model, check_pushes=-1), "train")
