"""The embedded engine against transformers, and against itself under other load."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from rayrl.cluster.serving.replica import replica_engine
from rayrl.config import ClusterConfig, Config, EngineConfig
from rayrl.engine.embedded import model as embedded_model
from rayrl.engine.embedded import sampler
from rayrl.engine.embedded.engine import EmbeddedEngine
from rayrl.engine.embedded.gpu import graph_size
from rayrl.engine.embedded.model import FlatModel
from rayrl.engine.embedded.prompts import flatten_prompts
from rayrl.engine.embedded.sampler import SamplingBatch, sample, uniform
from rayrl.engine.protocol import Engine
from rayrl.errors import ConfigError, DataError, InfraError, NumericsError, StaleWeights
from rayrl.types import Completion, Delta, Request, Sampling
from rayrl.weights.flat import checksum, flatten

VOCAB = 97
STOP = 5
LONG = 8192  # ids, for which an engine takes seconds at least
SHAPES = {  # name: heads, key heads, head width
    "mha": (4, 4, 16),
    "gqa": (4, 2, 16),
    "mqa": (8, 1, 16),
    "few": (3, 3, 16),
    "wide": (4, 4, 64),  # some CPUs use other kernels for few rows of this width
    "odd": (4, 2, 12),  # no whole vectors
}


def llama(shape: str = "mha", seed: int = 0, **options: Any) -> LlamaForCausalLM:
    heads, kv_heads, width = SHAPES[shape]
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=width * heads,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=96,
        vocab_size=VOCAB,
        max_position_embeddings=options.pop("max_position_embeddings", 512),
        initializer_range=0.2,  # so that what a token attends to matters
        **options,
    )
    return LlamaForCausalLM(config)


@asynccontextmanager
async def engine_of(
    model: Any = None,
    *,
    version: int = 0,
    tokenizer: Any = None,
    raw_logprobs: bool = False,
    **settings: Any,
) -> AsyncIterator[EmbeddedEngine]:
    engine = EmbeddedEngine(
        llama() if model is None else model,
        EngineConfig(**settings),
        version=version,
        tokenizer=tokenizer,
        raw_logprobs=raw_logprobs,
    )
    try:
        yield engine
    finally:
        await engine.close()


def ids_of(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(6, VOCAB) for _ in range(count))


def request(session: str, prompt: Sequence[int], seed: int = 0, **sampling: Any) -> Request:
    stop_ids = tuple(sampling.pop("stop_ids", ()))
    min_version = sampling.pop("min_version", 0)
    return Request(session, tuple(prompt), Sampling(**sampling), stop_ids, seed, min_version)


def reference_logprobs(
    model: LlamaForCausalLM, prompt: Sequence[int], completion: Sequence[int], temperature: float
) -> list[float]:
    """Logprobs of a plain transformers forward in float64 on the same ids."""
    plain = type(model)(model.config.__class__(**model.config.to_dict()))
    plain.load_state_dict(model.state_dict())
    plain.double().eval().set_attn_implementation("eager")
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    logprobs = (logits / temperature).log_softmax(-1)
    first = len(prompt) - 1
    return [float(logprobs[first + i, token]) for i, token in enumerate(completion)]


def close_to(left: Sequence[float], right: Sequence[float], tolerance: float = 1e-4) -> bool:
    return len(left) == len(right) and all(
        abs(a - b) <= tolerance for a, b in zip(left, right, strict=True)
    )


async def sampled(engine: EmbeddedEngine, tokens: int) -> None:
    """Wait until the engine has sampled this many tokens."""
    while engine.stats()["sampled_tokens"] < tokens:  # noqa: ASYNC110 - its thread sets no event
        await asyncio.sleep(0.001)


@asynccontextmanager
async def held(engine: EmbeddedEngine) -> AsyncIterator[None]:
    """What is asked for in the block is admitted after it, at once: it waits for a push.

    The model must have `LONG` positions.
    """
    weights = flatten(engine._model.model.state_dict())
    running = asyncio.create_task(engine.generate(request("held", (9,), max_tokens=LONG)))
    await sampled(engine, engine.stats()["sampled_tokens"] + 1)
    push = asyncio.create_task(engine.load_weights(engine.version + 1, *weights))
    for _ in range(3):
        await asyncio.sleep(0)
    yield
    for _ in range(3):
        await asyncio.sleep(0)
    assert not running.done(), "it was to be cancelled"
    running.cancel()
    await push


async def conversation(
    engine: EmbeddedEngine, name: str, seed: int, turns: int, **sampling: Any
) -> list[tuple[tuple[int, ...], Completion]]:
    """Play a conversation whose prompts and lengths depend on `seed` alone."""
    rng = random.Random(seed)
    context: tuple[int, ...] = ()
    played = []
    for turn in range(turns):
        context += ids_of(rng, rng.choice([1, 3, 17, 40]))
        options = {"max_tokens": rng.choice([1, 4, 9]), "temperature": 0.8, **sampling}
        answer = await engine.generate(
            request(name, context, seed * 100 + turn, stop_ids=(STOP,), **options)
        )
        played.append((context, answer))
        context += answer.ids
    return played


@pytest.mark.parametrize("shape", SHAPES)
async def test_logprobs_equal_a_plain_forward_in_ragged_conversations(shape: str) -> None:
    model = llama(shape)
    async with engine_of(model) as engine:
        games = await asyncio.gather(*(conversation(engine, f"s{i}", i, 4) for i in range(9)))
    for prompt, answer in (turn for game in games for turn in game):
        expected = reference_logprobs(model, prompt, answer.ids, 0.8)
        # the wide one's scores are in the hundreds, and so its rounding
        assert close_to(answer.rollout_logprobs, expected, 3e-4 if shape == "wide" else 1e-4)
        assert [(s.version, s.start, s.end) for s in answer.versions] == [(0, 0, len(answer.ids))]


@pytest.mark.parametrize("shape", SHAPES)
async def test_greedy_ids_equal_transformers_generate(shape: str) -> None:
    model = llama(shape)
    rng = random.Random(1)
    prompts = [ids_of(rng, length) for length in (1, 2, 9, 33, 150)]
    async with engine_of(model) as engine:
        answers = await asyncio.gather(
            *(
                engine.generate(request(f"s{i}", prompt, temperature=0, max_tokens=12))
                for i, prompt in enumerate(prompts)
            )
        )
    model.set_attn_implementation("eager")
    for prompt, answer in zip(prompts, answers, strict=True):
        generated = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert answer.ids == tuple(generated[0, len(prompt) :].tolist())
        assert answer.rollout_logprobs == (0.0,) * 12
        assert answer.finish == "length"


Played = list[tuple[tuple[int, ...], tuple[float, ...]]]


def outcome(games: Sequence[Sequence[tuple[tuple[int, ...], Completion]]]) -> list[Played]:
    return [[(answer.ids, answer.rollout_logprobs) for _, answer in game] for game in games]


async def staggered(
    engine: EmbeddedEngine, delay: float, name: str, seed: int
) -> list[tuple[tuple[int, ...], Completion]]:
    await asyncio.sleep(delay)
    return await conversation(engine, name, seed, 4)


@pytest.mark.parametrize(
    ("shape", "dtype", "compiler"),
    [
        *((shape, "float32", True) for shape in SHAPES),
        ("gqa", "bfloat16", True),
        ("gqa", "float32", False),
        ("gqa", "bfloat16", False),
    ],
)
async def test_results_have_the_same_bits_under_any_load(
    shape: str, dtype: str, compiler: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = list(range(14))
    if not compiler:
        monkeypatch.setattr(embedded_model, "missing", lambda: "no compiler")

    def engine_with(**settings: Any) -> AbstractAsyncContextManager[EmbeddedEngine]:
        return engine_of(llama(shape), dtype=dtype, **settings)

    async with engine_with() as engine:  # alone, one after the other
        alone = outcome([await conversation(engine, f"s{s}", s, 4) for s in seeds])
    async with engine_with() as engine:  # all at once
        at_once = outcome(
            await asyncio.gather(*(conversation(engine, f"s{s}", s, 4) for s in seeds))
        )
    async with engine_with(max_live=5) as engine:  # reversed, with others, queued
        others = [conversation(engine, f"x{s}", s, 5) for s in range(100, 109)]
        games = [conversation(engine, f"s{s}", s, 4) for s in reversed(seeds)]
        mixed = await asyncio.gather(*others, *games)
        reverse = outcome(mixed[len(others) :])[::-1]
    monkeypatch.setattr(embedded_model, "PASS_TOKENS", 30)
    monkeypatch.setattr(embedded_model, "PASS_ENTRIES", 400)
    async with engine_with() as engine:  # at different times, in passes of a few tokens
        late = outcome(
            await asyncio.gather(
                *(staggered(engine, 0.002 * (s * 9 % 14), f"s{s}", s) for s in seeds)
            )
        )
    assert any(len(ids) > 4 for game in alone for ids, _ in game)
    assert at_once == alone
    assert reverse == alone
    assert late == alone


async def sibling(
    engine: EmbeddedEngine, seed: int, wait: float = 0
) -> list[tuple[tuple[int, ...], Completion]]:
    """Play one of many like games, whose answers are few and decide what comes next."""
    rng = random.Random(seed)
    context, played = ids_of(random.Random(0), 20), []
    for turn in range(5):
        await asyncio.sleep(wait * rng.random())
        options = {"max_tokens": 4 + seed % 2, "temperature": 0.15, "stop_ids": (STOP, 9)}
        answer = await engine.generate(request(f"s{seed}", context, seed * 9 + turn, **options))
        played.append((context, answer))
        context += answer.ids + ids_of(random.Random(str(answer.ids)), 3)
    return played


@pytest.mark.parametrize("shape", SHAPES)
async def test_siblings_are_decoded_once_with_the_bits_of_each_alone(shape: str) -> None:
    model, seeds = llama(shape, max_position_embeddings=LONG), range(16)
    spent = ("decoded_tokens", "sampled_tokens", "completions")
    async with engine_of(model) as engine:
        expected = outcome([await sibling(engine, seed) for seed in seeds])
        decoded, ids, replies = (engine.stats()[name] for name in spent)
        assert decoded == ids - replies, "the first id of each is the prompt's last row's"
    assert len({str(game) for game in expected}) > 5, "they part"
    _, kv_heads, width = SHAPES[shape]
    six_slots = 6.5 * 3 * 2 * kv_heads * width * 4 * LONG / 1e9
    for options in ({}, {"max_live": 7}, {"kv_cache_gb": six_slots}):
        async with engine_of(model, **options) as engine:
            async with held(engine):
                games = [asyncio.create_task(sibling(engine, s)) for s in seeds]
            before = [engine.stats()[name] for name in spent]
            assert outcome(await asyncio.gather(*games)) == expected
            decoded, ids, replies = (
                engine.stats()[name] - old for name, old in zip(spent, before, strict=True)
            )
            assert decoded < ids - replies
            late = await asyncio.gather(*(sibling(engine, s, 0.02) for s in reversed(seeds)))
            assert outcome(late)[::-1] == expected


async def test_siblings_leave_each_other_alone() -> None:
    """One that is cancelled, one that is streamed, one that stops earlier, one that goes on."""
    prompt = ids_of(random.Random(0), 20)
    model = llama(max_position_embeddings=LONG)
    async with engine_of(model, tokenizer=Letters(), raw_logprobs=True) as engine:
        whole = await engine.generate(request("alone", prompt, temperature=0, max_tokens=60))
        stop = Letters().decode(whole.ids[3:5], skip_special_tokens=False)
        again = request("whole", prompt, temperature=0, max_tokens=60)
        other = request("stops", prompt, temperature=0, max_tokens=60, stop=(stop,))
        streamed = replace(again, session="streamed", top_logprobs=2)
        deltas: list[Delta] = []

        async def read() -> None:
            async for delta in engine.stream(streamed):
                deltas.append(delta)
                if len(deltas) == 8:
                    gone.cancel()

        async with held(engine):
            gone = asyncio.create_task(engine.generate(replace(again, session="gone")))
            tasks = [
                asyncio.create_task(work)
                for work in (engine.generate(again), engine.generate(other), read())
            ]
        before = engine.stats()["decoded_tokens"]
        same, stopped, _ = await asyncio.gather(*tasks)
        assert (same.ids, same.rollout_logprobs) == (whole.ids, whole.rollout_logprobs)
        assert (stopped.ids, stopped.finish) == (whole.ids[: len(stopped.ids)], "stop")
        assert len(stopped.ids) <= 5
        assert tuple(i for delta in deltas for i in delta.ids) == whole.ids
        assert all(len(one) == 2 for delta in deltas for one in delta.alternatives)
        assert gone.cancelled()
        assert engine.stats()["decoded_tokens"] <= before + 59


@pytest.mark.parametrize("shape", SHAPES)
async def test_cached_shared_and_recomputed_keys_give_the_same_bits(shape: str) -> None:
    model = llama(shape)
    rng = random.Random(3)
    context = ids_of(rng, 310)
    cached: list[tuple[tuple[int, ...], Completion]] = []
    async with engine_of(model) as engine:
        for turn in range(6):
            answer = await engine.generate(request("a", context, turn, max_tokens=9))
            cached.append((context, answer))
            context += answer.ids + ids_of(rng, 13)
        assert cached[-1][1].cached > 370
        shared = [
            await engine.generate(request("b", prompt, turn, max_tokens=9))
            for turn, (prompt, _) in enumerate(cached)
        ]
        assert shared[0].cached == 309  # all but the last, from the other conversation
    for turn, (prompt, answer) in enumerate(cached):
        async with engine_of(model) as engine:
            fresh = await engine.generate(request("c", prompt, turn, max_tokens=9))
        assert fresh.cached == 0
        assert (fresh.ids, fresh.rollout_logprobs) == (answer.ids, answer.rollout_logprobs)
        assert (shared[turn].ids, shared[turn].rollout_logprobs) == (
            answer.ids,
            answer.rollout_logprobs,
        )


async def test_eviction_costs_recomputation_but_changes_no_result() -> None:
    model = llama(max_position_embeddings=200)
    one = 3 * 2 * 4 * 16 * 4 * 200 / 1e9  # GB of the longest conversation there may be
    seeds = range(8)
    async with engine_of(model, kv_cache_gb=1.001 * one) as engine:
        little = await asyncio.gather(*(conversation(engine, f"s{s}", s, 5) for s in seeds))
        computed = engine.stats()["computed_tokens"]
    async with engine_of(model) as engine:
        much = await asyncio.gather(*(conversation(engine, f"s{s}", s, 5) for s in seeds))
        assert engine.stats()["computed_tokens"] < computed
    assert outcome(little) == outcome(much)


async def test_a_conversation_computes_only_its_new_tokens() -> None:
    rng = random.Random(4)
    first = ids_of(rng, 30)
    async with engine_of() as engine:
        answer = await engine.generate(request("a", first, max_tokens=6))
        assert (answer.cached, len(answer.ids)) == (0, 6)
        second = first + answer.ids + ids_of(rng, 10)
        again = await engine.generate(request("a", second, max_tokens=1))
        assert again.cached == 35  # the sixth sampled id was never run through the model
        stats = engine.stats()
        assert stats["computed_tokens"] == 30 + 11
        assert stats["reused_tokens"] == 35
        assert stats["sampled_tokens"] == 7
        other = first[:20] + ids_of(rng, 5)  # edited history: the common prefix stays cached
        assert (await engine.generate(request("a", other, max_tokens=1))).cached == 20


async def test_requests_that_arrive_together_compute_a_common_prompt_once() -> None:
    rng = random.Random(5)
    common = ids_of(rng, 50)
    prompts = [common for _ in range(8)] + [(*common, 50 + i, 7) for i in range(8)]
    async with engine_of() as engine:
        answers = await asyncio.gather(
            *(engine.generate(request(f"s{i}", p, i, max_tokens=3)) for i, p in enumerate(prompts))
        )
        assert engine.stats()["computed_tokens"] == 50 + 8 * 2
        late = await engine.generate(request("late", prompts[9], 9, max_tokens=3))
        assert late.cached == 51
        assert (late.ids, late.rollout_logprobs) == (answers[9].ids, answers[9].rollout_logprobs)
    async with engine_of() as engine:
        alone = [
            await engine.generate(request("alone", p, i, max_tokens=3))
            for i, p in enumerate(prompts)
        ]
    assert [(a.ids, a.rollout_logprobs) for a in alone] == [
        (a.ids, a.rollout_logprobs) for a in answers
    ]
    assert len({a.ids for a in answers[:8]}) > 1  # their seeds differ


async def test_new_weights_replace_the_old_ones_and_their_keys() -> None:
    model, newer = llama(seed=0), llama(seed=1)
    flat, manifest = flatten(newer.state_dict())
    prompt = ids_of(random.Random(6), 40)
    async with engine_of(model) as engine:
        assert isinstance(engine, Engine)
        await engine.check()
        old = await engine.generate(request("a", prompt, max_tokens=5))
        assert await engine.load_weights(3, flat, manifest) == checksum(flat)
        assert engine.version == 3
        new = await engine.generate(request("a", prompt, max_tokens=5))
        assert new.cached == 0
        assert [span.version for span in old.versions + new.versions] == [0, 3]
    with pytest.raises(InfraError, match="closed"):
        await engine.check()
    assert close_to(new.rollout_logprobs, reference_logprobs(newer, prompt, new.ids, 1.0))
    assert not close_to(
        new.rollout_logprobs, reference_logprobs(llama(seed=0), prompt, new.ids, 1.0)
    )


async def test_running_generations_finish_on_the_weights_they_started_with() -> None:
    flat, manifest = flatten(llama(seed=1).state_dict())
    prompt = ids_of(random.Random(7), 10)
    async with engine_of() as engine:
        running = asyncio.create_task(engine.generate(request("a", prompt, max_tokens=100)))
        await sampled(engine, 3)
        push = asyncio.create_task(engine.load_weights(1, flat, manifest))
        await asyncio.sleep(0)
        later = asyncio.create_task(
            engine.generate(request("b", prompt, max_tokens=4, min_version=1))
        )
        first = await running
        await push
        assert [(s.version, s.start, s.end) for s in first.versions] == [(0, 0, 100)]
        assert [s.version for s in (await later).versions] == [1]


async def test_tied_weights_and_their_checksum() -> None:
    model, newer = (llama(seed=s, tie_word_embeddings=True) for s in (0, 1))
    flat, manifest = flatten(newer.state_dict())
    assert "lm_head.weight" not in manifest.names() or "model.embed_tokens.weight" not in (
        manifest.names()
    )
    prompt = ids_of(random.Random(8), 12)
    async with engine_of(model) as engine:
        assert await engine.load_weights(1, flat, manifest) == checksum(flat)
        answer = await engine.generate(request("a", prompt, max_tokens=5))
    assert close_to(answer.rollout_logprobs, reference_logprobs(newer, prompt, answer.ids, 1.0))


@pytest.mark.parametrize(
    ("writeable", "dtype", "in_place"),
    [
        ([False, False], "float32", [True, True]),
        ([True, True], "float32", [False, False]),
        ([False, True, False], "float32", [True, False, True]),
        ([False, False], "bfloat16", [False, False]),
    ],
)
async def test_weights_that_nobody_can_change_are_used_where_they_lie(
    writeable: list[bool], dtype: str, in_place: list[bool]
) -> None:
    prompt = ids_of(random.Random(8), 12)
    async with engine_of(llama(tie_word_embeddings=True), dtype=dtype) as engine:
        for i in range(len(writeable)):
            version, model = i + 1, llama(seed=i + 1, tie_word_embeddings=True)
            flat, manifest = flatten(model.state_dict())
            flat.flags.writeable = writeable[i]
            assert await engine.load_weights(version, flat, manifest) == checksum(flat)
            held = engine._model.model.state_dict()
            inside = [
                flat.ctypes.data <= one.data_ptr() < flat.ctypes.data + flat.nbytes
                for one in held.values()
            ]
            assert inside == [in_place[i]] * len(held)
            assert held["lm_head.weight"].data_ptr() == held["model.embed_tokens.weight"].data_ptr()
            if writeable[i]:
                flat[:] = 0  # the pusher may use it again
            answer = await engine.generate(request("a", prompt, max_tokens=5))
            expected = reference_logprobs(model, prompt, answer.ids, 1.0)
            assert close_to(answer.rollout_logprobs, expected, 0.3 if dtype == "bfloat16" else 1e-4)
        refused, manifest = flatten(llama("gqa").state_dict())
        refused.flags.writeable = False
        with pytest.raises(DataError, match="other shape"):
            await engine.load_weights(9, refused, manifest)
        after = await engine.generate(request("b", prompt, max_tokens=5))
        assert after.rollout_logprobs == answer.rollout_logprobs


async def test_sleep_gives_the_cache_back_when_nothing_runs_and_changes_no_answer() -> None:
    prompt = ids_of(random.Random(6), 40)
    async with engine_of() as engine:
        pool = engine._batch._pool
        asked = request("a", prompt, max_tokens=60)
        running = asyncio.create_task(engine.generate(asked))
        await sampled(engine, 3)
        assert pool.keys.any()
        sleeping = asyncio.create_task(engine.sleep())
        before = await running
        await sleeping
        assert not pool.keys.any()
        assert not pool.values.any()
        await engine.wake("weights")
        await engine.wake("kv")
        after = await engine.generate(asked)
        assert (after.cached, after.ids) == (0, before.ids)
        assert after.rollout_logprobs == before.rollout_logprobs
    with pytest.raises(InfraError, match="closed"):
        await engine.sleep()


async def test_weights_of_another_model_are_refused_and_the_old_ones_stay() -> None:
    flat, manifest = flatten(llama("gqa").state_dict())
    partial = flatten(list(llama().state_dict().items())[:-2])
    prompt = ids_of(random.Random(8), 12)
    async with engine_of() as engine:
        before = await engine.generate(request("a", prompt, max_tokens=5))
        with pytest.raises(DataError, match="other shape"):
            await engine.load_weights(1, flat, manifest)
        with pytest.raises(DataError, match="missing"):
            await engine.load_weights(1, *partial)
        assert engine.version == 0
        after = await engine.generate(request("b", prompt, max_tokens=5))
        assert after.rollout_logprobs == before.rollout_logprobs


async def test_a_request_for_newer_weights_is_stale() -> None:
    async with engine_of(version=2) as engine:
        assert (await engine.generate(request("a", (9,), max_tokens=1, min_version=2))).ids
        with pytest.raises(StaleWeights, match="version 3 requested, version 2 loaded"):
            await engine.generate(request("a", (9,), min_version=3))


class Letters:
    """A tokenizer with one letter per id, enough for stop strings."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        assert not skip_special_tokens
        return "".join(chr(33 + i) for i in ids)


async def test_stop_ids_stop_strings_and_lengths() -> None:
    prompt = ids_of(random.Random(9), 10)
    async with engine_of(tokenizer=Letters(), max_len=32) as engine:
        unstopped = await engine.generate(request("a", prompt, 1, max_tokens=100))
        assert (len(unstopped.ids), unstopped.finish) == (22, "length")  # 32 ids in all
        by_id = await engine.generate(request("b", prompt, 1, stop_ids=(3, unstopped.ids[6])))
        end = unstopped.ids.index(unstopped.ids[6]) + 1
        assert (by_id.ids, by_id.finish) == (unstopped.ids[:end], "stop")
        text = Letters().decode(unstopped.ids[9:12], skip_special_tokens=False)
        by_text = await engine.generate(request("c", prompt, 1, stop=("never!", text)))
        assert (by_text.ids, by_text.finish) == (unstopped.ids[:12], "stop")
        full = await engine.generate(request("d", ids_of(random.Random(1), 32), 1))
        assert full == Completion((), (), (), "length")
        last = await engine.generate(request("e", ids_of(random.Random(1), 31), 1))
        assert (len(last.ids), last.finish) == (1, "length")
        many = await engine.generate(request("f", prompt, 1, stop_ids=(*range(70, 96), *range(60))))
        assert len(many.ids) < 22
        assert many.finish == "stop"


async def test_a_cancelled_request_frees_its_slot() -> None:
    prompt = ids_of(random.Random(10), 8)
    async with engine_of(max_live=1) as engine:
        running = asyncio.create_task(engine.generate(request("a", prompt, max_tokens=500)))
        waiting = asyncio.create_task(engine.generate(request("b", prompt, max_tokens=500)))
        await sampled(engine, 2)
        for task in (waiting, running):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        after = await asyncio.wait_for(
            engine.generate(request("c", prompt, max_tokens=3)), timeout=600
        )
        assert len(after.ids) == 3
        assert engine.stats()["sampled_tokens"] < 400
        assert engine.stats()["completions"] == 1


async def test_closing_fails_requests_in_flight_and_closing_twice_is_allowed() -> None:
    engine = EmbeddedEngine(llama(), EngineConfig())
    task = asyncio.create_task(engine.generate(request("a", (9, 9), max_tokens=500)))
    await asyncio.sleep(0.01)
    await engine.close()
    await engine.close()
    with pytest.raises(InfraError, match="closed"):
        await task
    with pytest.raises(InfraError, match="closed"):
        await engine.generate(request("a", (9, 9)))


async def test_a_failed_step_fails_its_requests_and_new_weights_repair_it() -> None:
    broken = llama()
    torch.nn.init.constant_(broken.model.norm.weight, float("nan"))
    async with engine_of() as engine:
        good = flatten(llama().state_dict())
        await engine.load_weights(1, *flatten(broken.state_dict()))
        with pytest.raises(NumericsError, match="not finite"):
            await asyncio.wait_for(engine.generate(request("a", (9, 8, 7))), timeout=600)
        await engine.load_weights(2, *good)
        assert (await engine.generate(request("a", (9, 8, 7), max_tokens=2))).finish == "length"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": ()}, "one or more ids"),
        ({"prompt": (1, VOCAB)}, "tokenizer of another model"),
        ({"prompt": (1,), "temperature": -1.0}, "temperature >= 0"),
        ({"prompt": (1,), "top_p": 0.0}, "top_p"),
        ({"prompt": (1,), "stop": ("x",)}, "no tokenizer"),
        ({"prompt": (1,), "stop_ids": (2.5,)}, "whole numbers"),
        ({"prompt": (1,), "seed": 0.5}, "whole numbers"),
    ],
)
async def test_an_invalid_request_is_refused(wrong: dict[str, Any], message: str) -> None:
    async with engine_of() as engine:
        with pytest.raises(ConfigError, match=message):
            await engine.generate(request("a", **wrong))


class FailingTokenizer(Letters):
    """A tokenizer that cannot decode one id."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        if UNDECODABLE in ids:
            raise ValueError("no such id")
        return super().decode(ids, skip_special_tokens=skip_special_tokens)


UNDECODABLE = 11
EXTREMES: list[dict[str, Any]] = [  # each may fail its own request, and no other
    {"stop": ("\ud83d",)},
    {"stop": ("a\udc00b", "x" * 10_000)},
    {"stop": ("",)},
    {"stop": (7,)},
    {"stop": ("never!",), "prompt": (UNDECODABLE,)},  # decoding fails wherever the id is sampled
    {"stop_ids": (2**70, -(2**70), -1)},
    {"stop_ids": ("x",)},
    {"stop_ids": (None,)},
    {"seed": 2**100},
    {"seed": -1},
    {"seed": 0.5},
    {"top_k": 2**80},
    {"top_k": 1.5},
    {"top_k": -1},
    {"top_p": float("nan")},
    {"top_p": 5e-324},
    {"temperature": float("nan")},
    {"temperature": float("inf")},
    {"temperature": 1e300},
    {"temperature": 1e-300},
    {"temperature": 1e-40},
    {"max_tokens": float("nan")},
    {"max_tokens": 2**80},
    {"top": 2**80},
    {"top": -1},
    {"prompt": (2**70,)},
]


async def test_a_request_fails_alone() -> None:
    prompt = ids_of(random.Random(3), 9)
    async with engine_of(tokenizer=FailingTokenizer(), raw_logprobs=True) as engine:
        alone = await engine.generate(request("alone", prompt, max_tokens=12))
        for number, extreme in enumerate(EXTREMES):
            options = {"prompt": (9, 8), "max_tokens": 3, **extreme}
            odd = request(f"odd{number}", **{k: v for k, v in options.items() if k != "top"})
            odd = replace(odd, top_logprobs=extreme.get("top", 0))
            beside = engine.generate(request(f"beside{number}", prompt, max_tokens=12))
            result, same = await asyncio.gather(
                engine.generate(odd), beside, return_exceptions=True
            )
            assert same == alone, extreme
            if isinstance(result, Completion):
                assert all(0 <= i < VOCAB for i in result.ids), extreme
            else:
                assert isinstance(result, (ConfigError, InfraError, OverflowError)), extreme


def test_unsupported_models_are_refused() -> None:
    sliding = MistralForCausalLM(
        MistralConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=32,
            vocab_size=VOCAB,
            sliding_window=8,
        )
    )
    with pytest.raises(ConfigError, match="sliding_window"):
        EmbeddedEngine(sliding, EngineConfig())
    with pytest.raises(ConfigError, match="float32"):
        EmbeddedEngine(llama().to(torch.bfloat16), EngineConfig())
    with pytest.raises(ConfigError, match="512 positions"):
        EmbeddedEngine(llama(), EngineConfig(max_len=513))
    with pytest.raises(ConfigError, match="kv_cache_gb"):
        EmbeddedEngine(llama(), EngineConfig(kv_cache_gb=1e-6))


def sampling_batch(count: int, **options: Any) -> SamplingBatch:
    return SamplingBatch(
        np.full(count, options.get("temperature", 1.0), np.float32),
        np.full(count, options.get("top_k", 0), np.int64),
        np.full(count, options.get("top_p", 1.0), np.float64),
        np.arange(count, dtype=np.uint64),
        np.zeros(count, dtype=np.int64),
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.1, 0.3, 0.2]),
        ({"temperature": 0.5}, [16 / 30, 1 / 30, 9 / 30, 4 / 30]),
        ({"top_k": 2}, [4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.75}, [4 / 9, 0, 3 / 9, 2 / 9]),
        ({"top_p": 0.69}, [4 / 7, 0, 3 / 7, 0]),
        ({"top_k": 3, "top_p": 0.5}, [4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
    ],
)
def test_samples_follow_the_distribution(options: dict[str, Any], expected: list[float]) -> None:
    count = 40_000
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log()
    ids, logprobs = sample(logits, sampling_batch(count, **options), np.zeros(count, dtype=int))
    share = np.bincount(ids, minlength=4) / count
    assert np.abs(share - expected).max() < 0.01
    for i in np.flatnonzero(expected):
        assert logprobs[ids == i] == pytest.approx(np.log(expected[i]), abs=1e-5)
    assert share[np.array(expected) == 0].sum() == 0


@pytest.mark.parametrize("vocabulary", [50, 64, 368, 5000])
def test_samples_invert_the_cumulative_distribution(vocabulary: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, vocabulary) * 4
    at = np.arange(3).repeat(300)
    batch = sampling_batch(900)
    ids, logprobs = sample(logits, batch, at)
    expected = logits.double().log_softmax(-1).numpy()
    u = uniform(batch.seeds, batch.positions)
    for i in range(900):
        cumulative = np.exp(expected[at[i]]).cumsum()
        before = cumulative[ids[i]] - np.exp(expected[at[i], ids[i]])
        assert before - 1e-6 <= u[i] <= cumulative[ids[i]] + 1e-6
    assert logprobs == pytest.approx(expected[at, ids], abs=1e-5)


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("in_cache", [1, 4000, 1 << 18])  # logits of a row, of three, of all
def test_a_sample_depends_on_its_own_row_only(
    in_cache: int, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "IN_CACHE", in_cache)
    torch.manual_seed(0)
    logits = torch.randn(20, 1300) * 3
    rng = np.random.default_rng(0)
    for options in itertools.product([0.0, 0.7], [0, 5], [1.0, 0.9]):
        batch = sampling_batch(64)
        for field, value in zip(("temperature", "top_k", "top_p"), options, strict=True):
            own = getattr(batch, field)
            own[:] = rng.choice([value, own[0]], 64) if mixed else value
        at = rng.integers(20, size=64)  # some share their logits, of some nobody samples
        ids, logprobs = sample(logits, batch, at)
        for i in range(64):
            row = SamplingBatch(*(getattr(batch, f)[i : i + 1] for f in SamplingBatch.__slots__))
            id_, logprob = sample(logits[at[i] : at[i] + 1], row, np.zeros(1, dtype=int))
            assert (id_[0], logprob[0]) == (ids[i], logprobs[i])


def test_uniform_is_in_range_and_evenly_distributed() -> None:
    seeds = np.repeat(np.arange(200, dtype=np.uint64), 50)
    u = uniform(seeds, np.tile(np.arange(50), 200))
    assert u.min() >= 0
    assert u.max() < 1
    assert len(np.unique(u)) == 10_000
    assert np.abs(np.histogram(u, 10, (0, 1))[0] - 1000).max() < 150
    by_seed = u.reshape(200, 50)
    assert abs(np.corrcoef(by_seed[:, :-1].ravel(), by_seed[:, 1:].ravel())[0, 1]) < 0.05


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attend as on a GPU, on the CPU: all but the graphs."""
    monkeypatch.setattr(FlatModel, "ragged", False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("padded")
async def test_the_attention_for_gpus_gives_a_plain_forwards_logprobs(shape: str) -> None:
    model = llama(shape)
    shared = ids_of(random.Random(3), 30)  # long enough to be looked for in other slots
    async with engine_of(model, max_live=5) as engine:
        games = await asyncio.gather(*(conversation(engine, f"s{i}", i, 4) for i in range(9)))
        for turn in range(3):
            answers = [
                engine.generate(request(f"c{i}", (*shared, i + 6, turn + 6), i)) for i in range(12)
            ]
            prompts = [(*shared, i + 6, turn + 6) for i in range(12)]
            games.append(list(zip(prompts, await asyncio.gather(*answers), strict=True)))
        stats = engine.stats()
    assert stats["reused_tokens"] > 12 * 30
    for played, temperature in [(game, 0.8) for game in games[:9]] + [(g, 1.0) for g in games[9:]]:
        for prompt, answer in played:
            expected = reference_logprobs(model, prompt, answer.ids, temperature)
            assert close_to(answer.rollout_logprobs, expected, 1e-3)


@pytest.mark.parametrize("attention", ["ragged", "padded"])
async def test_bf16_weights_are_confirmed_though_fp32_was_pushed(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FlatModel, "ragged", attention == "ragged")
    new = llama(seed=1)
    flat, manifest = flatten(new.state_dict())
    async with engine_of(llama(), dtype="bfloat16") as engine:
        assert await engine.load_weights(1, flat, manifest) == checksum(flat)
        answer = await engine.generate(request("s", (7, 8, 9), max_tokens=20))
    expected = reference_logprobs(new, (7, 8, 9), answer.ids, 1.0)
    assert close_to(answer.rollout_logprobs, expected, 0.3)


class Threads(TorchFunctionMode):
    """Notes how many threads each of torch's functions had; `fails` raises instead."""

    def __init__(self, fails: str = "") -> None:
        super().__init__()
        self.seen: dict[str, set[int]] = {}
        self.fails = fails

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.seen.setdefault(name, set()).add(torch.get_num_threads())
        if name == self.fails:
            raise RuntimeError(name)
        return func(*args, **(kwargs or {}))


def gpt2() -> GPT2LMHeadModel:
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    shape = {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **shape, **ends))


def experts() -> MixtralForCausalLM:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    shape = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, **heads}
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCAB, **shape))


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(embedded_model, "ONE_THREAD", 30 * 64)
    # ZeRO 3 replaces it for the whole process, in which a test may have had such a learner
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def prefilled(make: Callable[[], Any], tokens: int, threads: Threads) -> None:
    model = FlatModel(make())
    flat = flatten_prompts([(0, np.arange(tokens) % VOCAB, 0)])
    with threads:
        model.prefill(model.pool(tokens), np.arange(tokens, dtype=np.int32)[None], flat)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize(("tokens", "of_norms"), [(20, 1), (40, 3)])
@pytest.mark.parametrize(
    ("make", "products", "norm"),
    [
        (llama, ["linear"], "rsqrt"),
        (gpt2, ["linear", "addmm"], "layer_norm"),
        (experts, ["linear", "_grouped_mm"], "rsqrt"),
    ],
)
def test_the_threads_that_few_and_many_tokens_take(
    make: Callable[[], Any], products: list[str], norm: str, tokens: int, of_norms: int
) -> None:
    threads = Threads()
    prefilled(make, tokens, threads)
    assert [threads.seen[name] for name in products] == [{3}] * len(products)
    assert threads.seen[norm] == {of_norms}
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("fails", ["linear", "rsqrt"])
def test_a_step_that_fails_leaves_the_threads_as_they_were(fails: str) -> None:
    with pytest.raises(RuntimeError, match=fails):
        prefilled(llama, 20, Threads(fails))
    assert torch.get_num_threads() == 3


def test_graph_sizes_hold_what_they_are_for_and_are_few() -> None:
    sizes = {graph_size(n, 500) for n in range(1, 501)}
    assert all(n <= graph_size(n, 500) <= min(500, max(2 * n, n + 63)) for n in range(1, 501))
    assert len(sizes) == 14  # 1 to 64 by powers of two, then 128, 192, ..., 448, 500


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"device": "cuda"}, "cluster.replica_gpus"), ({"dtype": "float16"}, "float32 and bfloat16")],
)
def test_what_cannot_be_computed_is_refused(settings: dict[str, str], named: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    with pytest.raises(ConfigError, match=named):
        EmbeddedEngine.load("unread", EngineConfig(**settings))


@pytest.mark.parametrize(
    ("gpus", "device", "wanted"),
    [(0.0, "auto", "cpu"), (0.5, "auto", "auto"), (0.5, "cpu", "cpu"), (0.0, "cuda", "cuda")],
)
def test_a_replica_leaves_a_gpu_alone_that_it_has_not_reserved(
    gpus: float, device: str, wanted: str
) -> None:
    config = Config(cluster=ClusterConfig(replica_gpus=gpus), engine=EngineConfig(device=device))
    assert replica_engine(config).device == wanted
