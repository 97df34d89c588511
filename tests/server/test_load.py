"""One client's requests cannot block a server: limits come first, long work runs in a thread."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrl.chat.renderer import Chat
from rayrl.chat.tokenizer import byte_level_alphabet, fold, max_token_chars
from rayrl.chat.tools import as_user_messages
from rayrl.server import app as apps
from rayrl.server.app import Service, make_app
from rayrl.server.messages import _prompt
from rayrl.types import Message, Role
from rayrl.weights.model_dir import EMBEDDED
from tests.act import HERMES, build_tokenizer
from tests.server.test_app import HELLO, Scripted, until

MAX_LEN = 2000


def nested(depth: int, what: str = "[") -> str:
    return {"[": "[" * depth + "]" * depth, "{": '{"a":' * depth + "1" + "}" * depth}[what]


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(build_tokenizer())


@asynccontextmanager
async def asking(chat: Chat) -> AsyncIterator[httpx.AsyncClient]:
    service = Service(Scripted(chat, "x", max_len=MAX_LEN), chat, "m")
    transport = httpx.ASGITransport(app=make_app(service))
    async with (
        asyncio.timeout(600),
        httpx.AsyncClient(transport=transport, base_url="http://m/v1/") as client,
    ):
        client.service = service  # type: ignore[attr-defined]
        yield client


def said(**more: Any) -> bytes:
    return json.dumps({"model": "m", "messages": HELLO, **more}).encode()


def one_letter(n: int) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[k % 2], "content": "a"} for k in range(n)]


def call(arguments: str) -> list[dict[str, Any]]:
    function = {"name": "f", "arguments": arguments}
    calls = [{"id": "1", "type": "function", "function": function}]
    return [*HELLO, {"role": "assistant", "content": None, "tool_calls": calls}]


def tool(parameters: str) -> bytes:
    function = '{"name": "f", "parameters": {"x": ' + parameters + "}}"
    return said(tools=["TOOL"]).replace(
        b'"TOOL"', b'{"type": "function", "function": ' + function.encode() + b"}"
    )


TOO_LONG, BAD_JSON, BAD = "context_length_exceeded", "invalid_json", "invalid_value"
# what is posted, the code of the 400, and whether anything may be tokenized before it
LARGE: list[tuple[str, bytes, str]] = [
    ("chat/completions", said(messages=one_letter(100_000)), TOO_LONG),
    ("chat/completions", said(messages=one_letter(MAX_LEN)), TOO_LONG),
    ("chat/completions", said(messages=[{"role": "user", "content": "a b " * 10**6}]), TOO_LONG),
    (
        "chat/completions",
        said(messages=[{"role": "user", "content": [{"type": "text", "text": "ab"}] * 50_000}]),
        TOO_LONG,
    ),
    ("chat/completions", tool('"' + "y" * 10**6 + '"'), TOO_LONG),
    ("completions", said(prompt="a b " * 10**6), TOO_LONG),
    ("completions", said(prompt=["a"] * 1000), BAD),
    ("completions", said(prompt=[1] * 100_000), TOO_LONG),
    ("chat/completions", b"[" * 100_000, BAD_JSON),
    ("chat/completions", nested(100_000).encode(), BAD_JSON),
    ("chat/completions", nested(500).encode(), BAD_JSON),
    ("chat/completions", nested(500, "{").encode(), BAD_JSON),
    ("chat/completions", said(metadata="X").replace(b'"X"', nested(500).encode()), BAD_JSON),
    ("chat/completions", tool(nested(500, "{")), BAD_JSON),
    ("chat/completions", tool(nested(100_000)), BAD_JSON),
    ("chat/completions", said(messages=call(nested(100_000, "{"))), BAD_JSON),
    ("chat/completions", said(messages=call(nested(500, "{"))), BAD_JSON),
    ("chat/completions", said(seed=10**30), BAD),
    ("chat/completions", said(seed="X").replace(b'"X"', b"1" * 10_000), BAD_JSON),
    ("chat/completions", said(tool_choice={"type": "x" * 10**6}), BAD),
    ("chat/completions", said(temperature="x" * 10**6), BAD),
    ("chat/completions", said(logit_bias={"x" * 10**6: 1}), "unsupported_parameter"),
    ("chat/completions", said(**{"y" * 10**6: 1}), "unknown_parameter"),
]


@pytest.mark.parametrize(("route", "body", "code"), LARGE, ids=[str(k) for k in range(len(LARGE))])
async def test_oversized_requests_are_rejected_before_any_work(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, route: str, body: bytes, code: str
) -> None:
    if route == "completions":
        body = body.replace(b'"messages": [{"role": "user", "content": "Hello!"}], ', b"")

    def work(*_: object) -> Any:
        raise AssertionError("it was tokenized or rendered")

    monkeypatch.setattr(chat, "_join", work)
    monkeypatch.setattr(chat, "_template", work)
    monkeypatch.setattr(chat, "encode", work)
    async with asking(chat) as client:
        answer = await client.post(route, content=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, code)
    assert error["type"] == "invalid_request_error"
    assert len(answer.content) < 5_000


async def test_long_names_are_clipped(chat: Chat) -> None:
    async with asking(chat) as client:
        answer = await client.post("chat/completions", content=said(model="z" * 10**6))
    assert answer.status_code == 404
    assert len(answer.content) < 5_000


async def test_a_request_that_just_fits_is_answered(chat: Chat) -> None:
    """The bounds reject no request that fits."""
    async with asking(chat) as client:
        for content in ("a" * 1900, " the quick brown fox" * 450):
            message = {"role": "user", "content": content}
            assert chat.min_ids([content]) < len(chat.encode(content)) < MAX_LEN - 20
            answer = await client.post("chat/completions", content=said(messages=[message]))
            assert answer.status_code == 200
        answer = await client.post("chat/completions", content=said(stop="x" * 10_000))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stop")
        metadata = {"metadata": {"role": ["x" * 10_000]}}
        answer = await client.post("chat/completions", content=said(**metadata))
        assert answer.status_code == 200


async def test_others_are_answered_while_a_large_request_is_parsed(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, over = threading.Event(), threading.Event()
    readers: set[str] = set()
    tokenize = chat._text.encode

    def slowly(text: str) -> Any:
        if len(text) > 10_000:
            readers.add(threading.current_thread().name)
            begun.set()
            over.wait()
        return tokenize(text)

    monkeypatch.setattr(chat._text, "encode", slowly)
    monkeypatch.setattr(apps, "MAX_LARGE", 2)
    large = said(messages=[{"role": "user", "content": "a " * 9_000}])
    async with asking(chat) as client:
        first, second = (
            asyncio.create_task(client.post("chat/completions", content=large)) for _ in range(2)
        )
        await until(lambda: client.service._large == 2)  # type: ignore[attr-defined]
        assert await asyncio.to_thread(begun.wait, 60)
        assert (await client.get("http://m/health")).status_code == 200
        assert (await client.post("chat/completions", content=said())).status_code == 200
        many = await client.post("chat/completions", content=large)
        assert (many.status_code, many.json()["error"]["code"]) == (503, "overloaded")
        assert not first.done()
        over.set()
        for one in (first, second):
            assert (await one).json()["error"]["code"] == TOO_LONG
    assert len(readers) == 1


# ---- bounds are sound


TEXTS = st.text(max_size=200) | st.text(alphabet=" \n\taé漢", max_size=200)


@pytest.mark.parametrize("which", ["built", EMBEDDED])
def test_no_text_has_fewer_ids_than_its_bound(which: str, chat: Chat) -> None:
    one = chat if which == "built" else Chat.load(which)
    assert one.min_ids(["x" * 10**6]) > 10_000

    @settings(max_examples=50)
    @given(TEXTS)
    def check(text: str) -> None:
        assert len(one.encode(text)) >= one.min_ids([text])

    check()


BYTES = {character: k for k, character in enumerate(byte_level_alphabet())}
HEX = {f"<0x{byte:02X}>": byte for byte in range(256)}
LEVEL = {"type": "ByteLevel"}
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


@pytest.mark.parametrize(
    ("state", "longest"),
    [
        ({"model": {"vocab": BYTES | {"hello": 256}}, "pre_tokenizer": LEVEL}, 5),
        ({"model": {"vocab": [[c, 0.0] for c in BYTES]}, "pre_tokenizer": LEVEL}, 1),
        ({"model": {"vocab": BYTES}, "pre_tokenizer": None}, 0),  # what is unknown is one id
        ({"model": {"vocab": {"a": 0}}, "pre_tokenizer": LEVEL}, 0),
        ({"model": {"vocab": HEX | {"hello": 1}, "byte_fallback": True}}, 6),
        ({"model": {"vocab": HEX}}, 0),
        ({"model": {"vocab": HEX, "byte_fallback": True}, "normalizer": SPACES}, 6),
        ({"model": {"vocab": BYTES}, "pre_tokenizer": LEVEL, "normalizer": {"type": "NFC"}}, 4),
        ({"model": {"vocab": BYTES}, "pre_tokenizer": LEVEL, "normalizer": {"type": "Strip"}}, 0),
        (
            {
                "model": {"vocab": HEX, "byte_fallback": True},
                "normalizer": {"type": "Sequence", "normalizers": [SPACES, {"type": "NFKC"}]},
            },
            0,
        ),
        (
            {
                "model": {"vocab": BYTES},
                "pre_tokenizer": LEVEL,
                "added_tokens": [{"content": "<|endoftext|>", "rstrip": False}],
            },
            13,
        ),
        (
            {
                "model": {"vocab": BYTES},
                "pre_tokenizer": LEVEL,
                "added_tokens": [{"content": "<x>", "rstrip": True}],
            },
            0,
        ),
    ],
)
def test_how_long_a_token_can_be(state: dict[str, Any], longest: int) -> None:
    assert max_token_chars(state) == longest


# ---- linear


ROLES = st.lists(st.sampled_from(["system", "user", "assistant", "tool"]), max_size=12)


def messages_of(roles: Sequence[Role]) -> list[Message]:
    return [Message(role, f"m{k}", tool_call_id=str(k)) for k, role in enumerate(roles)]


class Written:
    """A chat that records its calls."""

    def start(self, messages: Sequence[Message], tools: object) -> Any:
        return ("start", *[m.content for m in messages])

    def reply(self, text: str) -> Any:
        return ("reply", text)

    def extend(self, messages: Sequence[Message], last_ids_finished: bool) -> Any:
        return ("extend", *[m.content for m in messages])


@settings(max_examples=60)
@given(ROLES)
def test_turns_are_found(roles: list[Role]) -> None:
    messages = messages_of(roles)
    found = _prompt(Written(), messages, [])  # type: ignore[arg-type]
    if roles[:1] == ["assistant"]:
        assert found == ("start", *[m.content for m in messages])
        return
    expected: list[str] = ["start"]
    for message in messages:
        is_reply = message.role == "assistant"
        expected += ["reply", message.content, "extend"] if is_reply else [message.content]
    assert found == tuple(expected)


@settings(max_examples=60)
@given(ROLES)
def test_neighbours_are_joined(roles: list[Role]) -> None:
    messages = messages_of(roles)
    folded = fold(messages)
    assert "\n\n".join(m.content for m in folded) == "\n\n".join(m.content for m in messages)
    neighbours = itertools.pairwise(folded)
    assert all(a.role != b.role or a.role == "tool" for a, b in neighbours)
    given_ = as_user_messages(messages)
    assert all(m.role != "tool" for m in given_)
    assert sum(m.content.count("<tool_response>") for m in given_) == roles.count("tool")


def test_time_per_message_is_constant() -> None:
    """Anything quadratic in the number of messages would take minutes here."""
    n = 10_000
    same = [Message("user", "a" * 100)] * n
    assert len(fold(same)[0].content) == 102 * n - 2
    results = [Message("tool", "a" * 100, tool_call_id="x")] * n
    assert len(as_user_messages(results)) == 1
    turns = [Message(("user", "assistant")[k % 2], "a") for k in range(n)]  # type: ignore[arg-type]
    assert len(_prompt(Written(), turns, [])) == 2 * n + 1  # type: ignore[arg-type]
    for template in (HERMES, None):
        one = Chat(build_tokenizer(template)) if template else Chat(build_tokenizer())
        assert len(one.start(same)) > n
        assert all(len(key) < 3000 for key in one._accepted)  # and are not kept
