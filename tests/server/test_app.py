"""The HTTP app without Ray: the embedded engine, and scripted answers."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from openai import AsyncOpenAI

from rayrl.chat.renderer import Chat
from rayrl.chat.requests import ApiError
from rayrl.chat.tools import ParsedCall, format_call
from rayrl.engine.embedded.engine import EmbeddedEngine
from rayrl.engine.protocol import Engine
from rayrl.errors import InfraError
from rayrl.server.app import Service, key_digest, make_app
from rayrl.server.choice import CallReader, Choice, Detokenizer, StopCutter
from rayrl.types import Completion, Delta, Request, Sampling, system, tool, user
from rayrl.weights.model_dir import EMBEDDED, model_dir
from tests.act import HERMES, build_tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
HELLO: list[Any] = [{"role": "user", "content": "Hello!"}]


class Scripted:
    """An engine that gives the same texts in order, `step` ids per part; records the requests."""

    def __init__(self, chat: Chat, *texts: str, step: int = 1, max_len: int = 2000) -> None:
        self.chat, self.texts, self.step, self.max_len = chat, itertools.cycle(texts), step, max_len
        self.requests: list[Request] = []
        self.failure: Exception | None = None

    def ids(self, request: Request) -> tuple[tuple[int, ...], str]:
        self.requests.append(request)
        whole = self.chat.reply(next(self.texts))
        kept = whole[: request.sampling.max_tokens]
        return kept, "stop" if kept == whole else "length"

    async def generate(self, request: Request) -> Completion:
        if self.failure:
            raise self.failure
        ids, finish = self.ids(request)
        return Completion(ids, (-0.5,) * len(ids), (), finish, 3)  # type: ignore[arg-type]

    async def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        ids, finish = self.ids(request)
        for at in range(0, len(ids), self.step):
            if self.failure and at:
                raise self.failure
            part = ids[at : at + self.step]
            last = at + self.step >= len(ids)
            yield Delta(part, (-0.5,) * len(part), finish if last else None, 3)  # type: ignore[arg-type]

    async def check(self) -> None:
        if self.failure:
            raise self.failure


async def until(true: Callable[[], Any]) -> None:
    while not true():  # noqa: ASYNC110 - other threads make it true, and set no event
        await asyncio.sleep(0.005)


@asynccontextmanager
async def listening(service: Service) -> AsyncIterator[str]:
    config = uvicorn.Config(make_app(service), port=0, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


@asynccontextmanager
async def client_of(engine: Any, chat: Chat, **options: Any) -> AsyncIterator[AsyncOpenAI]:
    service = Service(engine, chat, "m", **options)
    async with (
        listening(service) as url,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="sesame", max_retries=0) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def base() -> Chat:
    return Chat.load(EMBEDDED)


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(build_tokenizer())


@asynccontextmanager
async def embedded() -> AsyncIterator[EmbeddedEngine]:
    from rayrl.config import EngineConfig

    engine = EmbeddedEngine.load(
        model_dir(EMBEDDED), EngineConfig(max_live=8, kv_cache_gb=0.05), raw_logprobs=True
    )
    try:
        yield engine
    finally:
        await engine.close()


def words(chunks: Sequence[Any]) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


# ---- text


def test_the_detokenizer_returns_whole_characters(chat: Chat) -> None:
    text = "naïve 🙂🙂 ½ Ünïcödé 漢字 end"
    ids = chat.encode(text)
    assert len(ids) > len(text)  # characters are split over ids
    reader = Detokenizer(chat.decode)
    pieces = [reader.push(one) for one in ids]
    assert "".join(pieces) + reader.end() == text
    assert "\ufffd" not in "".join(pieces)
    cut = Detokenizer(chat.decode)
    half = [cut.push(one) for one in chat.encode("a🙂")[:-1]]
    assert "".join(half) == "a"  # waits for the rest of it
    assert cut.end() == "\ufffd"  # which never comes


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_strings_do_not_leak(size: int) -> None:
    for text, stops, wanted in (
        ("one two END three", ["END"], "one two "),
        ("a<|b", ["<|end|>"], "a<|b"),
        ("xabcd", ["abcd", "b"], "xa"),  # "b" is whole first
        ("aab", ["ab"], "a"),
    ):
        cutter = StopCutter(stops)
        found = [cutter.push(text[at : at + size]) for at in range(0, len(text), size)]
        assert "".join(found) + cutter.end() == wanted


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_calls_are_separated_from_text(size: int) -> None:
    call = format_call("weather", {"city": "Rome"})
    for text, wanted in (
        (f"I look. \n{call}\n", ["I look.", ParsedCall("weather", {"city": "Rome"})]),
        (f"{call}{call}", [ParsedCall("weather", {"city": "Rome"})] * 2),
        ("a <tool_call>{oops</tool_call> b ", ["a <tool_call>{oops</tool_call> b "]),
        ("1 <tool 2 ", ["1 <tool 2 "]),
        (f"{call[:-12]}", [ParsedCall("weather", {"city": "Rome"})]),  # cut off after its JSON
    ):
        reader, found = CallReader(), []
        for at in range(0, len(text), size):
            found += reader.push(text[at : at + size])
        found += reader.end()
        joined: list[Any] = []
        for one in found:
            if isinstance(one, str) and joined and isinstance(joined[-1], str):
                joined[-1] += one
            else:
                joined.append(one)
        assert joined == wanted


# ---- prompts


async def test_prompts_equal_those_of_training(chat: Chat) -> None:
    """A conversation with a call: the ids are those that an agent's turns put together."""
    engine = Scripted(chat, "It rains.")
    call = format_call("weather", {"city": "Rome"})
    told = {"role": "assistant", "content": "I look."}
    made = {"name": "weather", "arguments": '{"city": "Rome"}'}
    messages: list[Any] = [
        {"role": "developer", "content": "Be <|im_end|> brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Weather"}, {"type": "text", "text": "in Rome?"}],
        },
        told | {"tool_calls": [{"id": "c1", "type": "function", "function": made}]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    tools: list[Any] = [WEATHER]
    async with client_of(engine, chat) as client:
        await client.chat.completions.create(model="m", messages=messages, tools=tools)
    opening = [system("Be <|im_end|> brief."), user("Weather\nin Rome?")]
    wanted = chat.start(opening, [WEATHER]) + chat.encode(f"I look.\n{call}")
    wanted += chat.extend([tool("rain", "c1")], last_ids_finished=False)
    assert engine.requests[0].prompt_ids == wanted
    assert wanted.count(chat.stop_ids[0]) == 4  # one per message: what the developer typed is text
    assert "You can call these tools" in chat.decode(wanted)
    assert engine.requests[0].stop_ids == chat.stop_ids
    assert engine.requests[0].sampling == Sampling(temperature=1.0, max_tokens=2000 - len(wanted))


async def test_calls_have_the_same_ids_as_in_training() -> None:
    """Where a tokenizer has one id for a call's mark, only replies may have it."""
    chat = Chat(build_tokenizer(HERMES, words=("<tool_call>", "</tool_call>")))
    (mark,) = chat.reply("<tool_call>")[:-1]
    assert len(chat.encode("<tool_call>")) > 1
    engine = Scripted(chat, ' {"city": "Rome"}}</tool_call>')
    call = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    messages: list[Any] = [
        {"role": "user", "content": "Where is <tool_call>?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    async with client_of(engine, chat) as client:
        await client.chat.completions.create(
            model="m", messages=messages, tools=[WEATHER], tool_choice="required"
        )
    ids = engine.requests[0].prompt_ids
    told = chat.start([user("Where is <tool_call>?")], [WEATHER]).count(mark)  # the template's own
    assert ids.count(mark) == told + 2  # the past call, and the required one
    begun = chat.reply('<tool_call>\n{"name": "weather", "arguments":')[:-1]
    assert ids[-len(begun) :] == begun


# ---- answers


async def test_streamed_and_whole_answers_are_the_same(chat: Chat) -> None:
    call = format_call("weather", {"city": "Zürich 🙂"})
    odd = format_call("weather", {"city": "</tool_call><think>"})
    cases: list[tuple[str, dict[str, Any]]] = [
        ("Plain 🙂 words ", {}),
        ("Plain words", {"max_completion_tokens": 5}),
        ("one STOP two", {"stop": "STOP"}),
        (f"I look.\n{call}\n{call}", {"tools": [WEATHER]}),
        (f"{call}{call}", {"tools": [WEATHER], "parallel_tool_calls": False}),
        (f"{odd} x", {"tools": [WEATHER], "parallel_tool_calls": False}),
        (f"<think>{call}</think>no", {"tools": [WEATHER]}),
        (f"I say {call}", {"tools": [WEATHER], "tool_choice": "none"}),
        ("<tool_call>{nonsense</tool_call> x", {"tools": [WEATHER]}),
        (' {"city": "Rome"}}</tool_call>', {"tools": [WEATHER], "tool_choice": "required"}),
    ]
    wanted = [
        ("Plain 🙂 words ", 0, "stop"),
        (None, 0, "length"),
        ("one ", 0, "stop"),
        ("I look.", 2, "tool_calls"),
        (None, 1, "tool_calls"),
        (None, 1, "tool_calls"),
        (f"<think>{call}</think>no", 0, "stop"),
        (f"I say {call}", 0, "stop"),
        ("<tool_call>{nonsense</tool_call> x", 0, "stop"),
        (None, 1, "tool_calls"),
    ]
    for (text, more), (content, calls, finish) in zip(cases, wanted, strict=True):
        async with client_of(Scripted(chat, text), chat) as client:
            asked: dict[str, Any] = {"model": "m", "messages": HELLO, "logprobs": True, **more}
            whole = await client.chat.completions.create(**asked)
            usage = {"include_usage": True}
            stream = await client.chat.completions.create(
                **asked, stream=True, stream_options=usage
            )
            chunks = [chunk async for chunk in stream]
        message = whole.choices[0].message
        found = message.tool_calls or []
        assert whole.choices[0].finish_reason == finish
        assert len(found) == calls
        if content is not None:
            assert message.content == content
        elif calls:
            assert message.content is None
        assert words(chunks) == (message.content or "")
        deltas = [c.choices[0] for c in chunks if c.choices]
        assert [d.finish_reason for d in deltas if d.finish_reason] == [finish]
        assert deltas[0].delta.role == "assistant"
        streamed = [t for d in deltas for t in d.delta.tool_calls or []]
        assert [t.index for t in streamed] == list(range(calls))
        functions = [t.function for t in found]
        assert [t.function for t in streamed] == [
            type(streamed[0].function)(**f.model_dump()) for f in functions
        ]
        tokens = [t for d in deltas if d.logprobs for t in d.logprobs.content]
        assert tokens == whole.choices[0].logprobs.content
        assert chunks[-1].usage == whole.usage
        assert whole.usage.prompt_tokens_details.cached_tokens == 3
    assert json.loads(found[0].function.arguments) == {"city": "Rome"}


async def test_a_required_call_begins_the_answer_or_is_an_error(chat: Chat) -> None:
    engine = Scripted(chat, "no, I will not")
    named: Any = {"type": "function", "function": {"name": "weather"}}
    async with client_of(engine, chat) as client:
        asked: dict[str, Any] = {
            "model": "m",
            "messages": HELLO,
            "tools": [WEATHER],
            "tool_choice": named,
        }
        with pytest.raises(openai.InternalServerError) as failed:
            await client.chat.completions.create(**asked)
        assert failed.value.code == "tool_call_invalid"
        with pytest.raises(openai.APIError, match="did not complete"):
            async for _ in await client.chat.completions.create(**asked, stream=True):
                pass
    begun = '<tool_call>\n{"name": "weather", "arguments":'
    assert chat.decode(engine.requests[0].prompt_ids).endswith(f"assistant\n{begun}")


async def test_the_embedded_engine_behind_the_client(base: Chat) -> None:
    """Greedy ids are the engine's; logprobs are the model's own, at any temperature."""
    async with embedded() as engine, client_of(engine, base) as client:
        ids = base.start([user("Your turn.")])
        request = Request("x", ids, Sampling(temperature=0.0, max_tokens=12), base.stop_ids)
        done = await engine.generate(request)
        asked: dict[str, Any] = {
            "model": "m",
            "messages": [{"role": "user", "content": "Your turn."}],
            "max_tokens": 12,
            "logprobs": True,
            "top_logprobs": 3,
        }
        greedy = await client.chat.completions.create(**asked, temperature=0)
        assert greedy.choices[0].message.content == base.text(done.ids)
        assert greedy.usage.prompt_tokens == len(ids)
        assert greedy.usage.prompt_tokens_details.cached_tokens == len(ids) - 1
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model_dir(EMBEDDED), dtype=torch.float32)
        hot = await client.chat.completions.create(**asked, temperature=1.7, seed=5)
        again = await client.chat.completions.create(**asked, temperature=1.7, seed=5, n=2)
        assert hot.choices[0].message == again.choices[0].message
        assert again.choices[1].message != again.choices[0].message
        for answer in (greedy, hot):
            tokens = answer.choices[0].logprobs.content
            written = b"".join(bytes(t.bytes) for t in tokens)
            assert written.decode() == answer.choices[0].message.content
            so_far = list(ids)
            for token in tokens:
                with torch.no_grad():
                    row = model(torch.tensor([so_far])).logits[0, -1].log_softmax(-1)
                (one,) = base.encode(token.token)
                assert token.logprob == pytest.approx(float(row[one]), abs=1e-4)
                best = row.topk(3)
                assert [t.logprob for t in token.top_logprobs] == pytest.approx(
                    best.values.tolist(), abs=1e-4
                )
                so_far.append(one)


async def test_completions_accept_every_kind_of_prompt(base: Chat) -> None:
    async with embedded() as engine, client_of(engine, base) as client:
        one, two = "Your", "Choose a posi"
        prompts: list[Any] = [
            one,
            [one, two],
            list(base.encode(one)),
            [list(base.encode(p)) for p in (one, two)],
        ]
        texts = []
        for prompt in prompts:
            answer = await client.completions.create(
                model="m", prompt=prompt, temperature=0, logprobs=2, n=1
            )
            texts.append([choice.text for choice in answer.choices])
            logprobs = answer.choices[0].logprobs
            assert len(logprobs.tokens) == len(logprobs.token_logprobs) <= 16
            assert "".join(logprobs.tokens) == answer.choices[0].text
            assert max(logprobs.top_logprobs[0].values()) == logprobs.token_logprobs[0]
        assert texts == [texts[1][:1], texts[1], texts[1][:1], texts[1]]
        chunks = [
            chunk
            async for chunk in await client.completions.create(
                model="m", prompt=[one, two], temperature=0, stream=True
            )
        ]
        for index in (0, 1):
            told = "".join(c.choices[0].text for c in chunks if c.choices[0].index == index)
            assert told == texts[1][index]


# ---- errors


def calls(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "look", **fields}}


BAD: list[tuple[str, dict[str, Any], str | None]] = [
    ("messages", {"messages": []}, "invalid_value"),
    ("temperature", {"temperature": 3}, "invalid_value"),
    ("max_tokens", {"max_tokens": "many"}, "invalid_value"),
    ("temprature", {"temprature": 1}, "unknown_parameter"),
    ("top_k", {"top_k": 10**30}, "invalid_value"),
    ("response_format", {"response_format": {"type": "json_object"}}, "unsupported_parameter"),
    ("presence_penalty", {"presence_penalty": 0.5}, "unsupported_parameter"),
    ("stop", {"stop": ["", "x"]}, "invalid_value"),
    ("stream_options", {"stream_options": {"include_usage": True}}, "invalid_value"),
    ("stream_options.usage", {"stream": True, "stream_options": {"usage": True}}, "invalid_value"),
    ("top_logprobs", {"top_logprobs": 2}, "invalid_value"),
    ("tool_choice", {"tool_choice": "required"}, "invalid_value"),
    ("tools[0].function.name", {"tools": [{"type": "function", "function": {}}]}, "invalid_value"),
    ("tools[0].function.parameters", {"tools": [calls(parameters=[])]}, "invalid_value"),
    ("tools[0].function.description", {"tools": [calls(description=5)]}, "invalid_value"),
    ("messages[0].role", {"messages": [{"role": "robot", "content": ""}]}, "invalid_value"),
    (
        "messages[0].content[0].type",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "unsupported_content",
    ),
    (
        "messages[0].tool_call_id",
        {"messages": [{"role": "tool", "content": "x", "tool_call_id": "c9"}]},
        "invalid_value",
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": "x" * 4000}]},
        "context_length_exceeded",
    ),
    ("max_tokens", {"max_tokens": 2000}, "context_length_exceeded"),
]


async def test_invalid_requests_name_the_field(chat: Chat) -> None:
    async with client_of(Scripted(chat, "x"), chat) as client:
        url = str(client.base_url)
        async with httpx.AsyncClient(base_url=url) as http:
            for param, wrong, code in BAD:
                body = {"model": "m", "messages": HELLO, **wrong}
                answer = await http.post("chat/completions", json=body)
                error = answer.json()["error"]
                assert (answer.status_code, error["param"], error["code"]) == (400, param, code)
                assert error["type"] == "invalid_request_error"
            ignored = {"user": "u", "store": False, "frequency_penalty": 0, "top_k": 4}
            body = {"model": "m", "messages": HELLO, **ignored}
            assert (await http.post("chat/completions", json=body)).status_code == 200
            near = await http.post("chat/completions", json={**body, "temprature": 1})
            assert "Did you mean 'temperature'?" in near.json()["error"]["message"]
            missing = await http.post("chat/completions", json={"messages": HELLO})
            assert missing.json()["error"]["param"] == "model"
            broken = await http.post("chat/completions", content=b"{")
            assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_json")
            echo = await http.post("completions", json={"model": "m", "prompt": "x", "echo": True})
            assert (echo.status_code, echo.json()["error"]["param"]) == (400, "echo")
            for prompt in ("", [], [[]], [1, "x"], None, 7, [1, 999_999], [[1], [999_999]]):
                empty = await http.post("completions", json={"model": "m", "prompt": prompt})
                assert (empty.status_code, empty.json()["error"]["param"]) == (400, "prompt")
            lost = await http.get("nothing")
            assert (lost.status_code, lost.json()["error"]["code"]) == (404, "unknown_url")
            other = await http.get("chat/completions")
            assert (other.status_code, other.json()["error"]["code"]) == (405, "method_not_allowed")
        with pytest.raises(openai.NotFoundError, match="This server has 'm'") as no_model:
            await client.chat.completions.create(model="gpt-4o", messages=HELLO)
        assert no_model.value.code == "model_not_found"
        assert [model.id async for model in client.models.list()] == ["m"]
        assert (await client.models.retrieve("m")).id == "m"


async def test_keys(chat: Chat) -> None:
    digest = key_digest("sesame")
    async with client_of(Scripted(chat, "x"), chat, digest=digest) as client:
        assert (await client.models.list()).data
        wrong = client.with_options(api_key="pumpkin")
        for call in (wrong.models.list, lambda: wrong.completions.create(model="m", prompt="x")):
            with pytest.raises(openai.AuthenticationError) as refused:
                await call()
            assert refused.value.code == "invalid_api_key"
        async with httpx.AsyncClient() as http:
            root = str(client.base_url).removesuffix("v1/")
            assert (await http.get(f"{root}health")).json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("text", "stops", "starts"),
    [
        (b"bc\xf0l", ("l",), [0, 1, 2]),  # the byte is no character; what follows is the stop
        (b"bc\xf0d", ("l",), [0, 1, 2, 3]),
        ("é!".encode(), (), [0, 0, 1]),  # two bytes of one character
        ("a€b".encode(), (), [0, 1, 1, 1, 2]),
        (b"a\xe2\x82b", (), [0, 1, 1, 2]),
    ],
)
def test_where_a_token_begins_in_the_text(
    text: bytes, stops: tuple[str, ...], starts: list[int]
) -> None:
    """Tokens are bytes; those of a stop string are not listed."""
    chat: Any = SimpleNamespace(
        stop_ids=(), opens_thought=False, decode=lambda ids: bytes(ids).decode(errors="replace")
    )
    choice, found = Choice(chat, stops, logprobs=True), []
    for place, byte in enumerate(text):
        finish: Any = "length" if place + 1 == len(text) else None
        found += choice.read(Delta((byte,), (0.0,), finish)).tokens
    assert [token.start for token in found] == starts


async def test_a_key_may_have_any_letters(chat: Chat) -> None:
    service = Service(Scripted(chat, "x"), chat, "m", digest=key_digest("sésame"))
    service.check_key("Bearer sésame".encode().decode("latin-1"))
    with pytest.raises(ApiError):
        service.check_key("Bearer sesame")


async def test_failures_of_the_engine(chat: Chat) -> None:
    engine = Scripted(chat, "some words")
    async with client_of(engine, chat) as client:
        asked: dict[str, Any] = {"model": "m", "messages": HELLO}
        engine.failure = InfraError("vLLM's process died")
        for status, failure in ((503, engine.failure), (500, ZeroDivisionError("secret"))):
            engine.failure = failure
            with pytest.raises(openai.InternalServerError) as failed:
                await client.chat.completions.create(**asked)
            assert failed.value.status_code == status
            assert "secret" not in str(failed.value)
            with pytest.raises(openai.APIError) as midway:  # after its headers
                async for _ in await client.chat.completions.create(**asked, stream=True):
                    pass
            assert midway.value.type == "server_error"
        engine.failure = InfraError("dead")
        async with httpx.AsyncClient() as http:
            root = str(client.base_url).removesuffix("v1/")
            assert (await http.get(f"{root}health")).status_code == 503


# ---- leaving, and too many


async def idle(engine: EmbeddedEngine) -> None:
    await until(lambda: not engine._batch._table.running.any())


def endless(client: AsyncOpenAI, **more: Any) -> Any:
    return client.completions.create(model="m", prompt="Your", max_tokens=400, n=4, **more)


async def test_a_disconnect_stops_the_engine() -> None:
    async with embedded() as engine:
        chat = Chat.load(EMBEDDED)
        chat.stop_ids = ()  # so that only max_tokens ends an answer
        service = Service(engine, chat, "m", max_live=1)
        async with listening(service) as url:
            client = AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
            stream = await endless(client, stream=True)
            async for _ in stream:
                break
            with pytest.raises(openai.InternalServerError) as refused:  # the maximum is one
                await endless(client)
            assert (refused.value.status_code, refused.value.code) == (503, "overloaded")
            await stream.close()
            await idle(engine)
            waiting = asyncio.create_task(endless(client))
            await until(engine._batch._table.running.any)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await idle(engine)
            assert engine.stats()["completions"] == 0  # neither was completed
            await until(lambda: not service.metrics.live)
            assert (await client.models.list()).data
            async with httpx.AsyncClient() as http:
                page = (await http.get(f"{url}/metrics")).text
            await client.close()
    lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    route = 'rayrl_requests_total{route="/v1/completions",status='
    assert lines[route + '"499"}'] == "2.0"
    assert lines[route + '"503"}'] == "1.0"
    assert lines['rayrl_requests_total{route="/v1/models",status="200"}'] == "1.0"
    assert lines["rayrl_in_flight"] == "0.0"
    assert float(lines["rayrl_completion_tokens_total"]) > 0


async def test_streams_of_the_embedded_engine_equal_its_completions(base: Chat) -> None:
    async with embedded() as engine:
        assert isinstance(engine, Engine)
        prompt = base.start([user("Your turn.")])
        asked = Request("a", prompt, Sampling(2.0, max_tokens=20), (), 7, top_logprobs=2)
        done = await engine.generate(asked)
        parts = [part async for part in engine.stream(asked)]
        assert sum((p.ids for p in parts), ()) == done.ids
        assert sum((p.rollout_logprobs for p in parts), ()) == done.rollout_logprobs
        assert sum((p.alternatives for p in parts), ()) == done.alternatives
        assert [len(row) for row in done.alternatives] == [2] * 20
        assert [p.finish for p in parts] == [None] * 19 + ["length"]
        begun = engine.stream(asked)
        await anext(begun)
        await begun.aclose()
        await idle(engine)
        assert engine.stats()["completions"] == 2
