"""Requests that carry all messages so far, as turns of one seat.

A request goes on where its messages, up to some reply of the model, are those of a conversation:
the new ones are appended to its ids. If somebody else went on from there meanwhile, it is a branch;
if nothing matches, it begins a conversation, whose earlier replies are tokenized from text like a
prompt and not trained on.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

from rayrl.chat.requests import invalid, read_messages, read_tool
from rayrl.chat.tools import parse_calls, without_calls
from rayrl.errors import clip
from rayrl.rollout.conversation import Point
from rayrl.terminal import visible
from rayrl.types import Message, Turn

__all__ = ["Dialogue", "Seat"]

_encode = json.JSONEncoder(sort_keys=True).encode


class Seat(Protocol):
    """What is needed of an agent."""

    @property
    def point(self) -> Point:
        """Where its conversation is."""

    @property
    def messages(self) -> list[Message]:
        """Its messages so far."""

    @property
    def opens_thought(self) -> bool:
        """Whether replies begin inside a thought."""

    def branch(self, name: str = "", *, empty: bool = False, at: Point | None = None) -> Self:
        """Another one, which goes on from there."""

    async def turn(
        self,
        new: tuple[Message, ...],
        state: str | None,
        max_tokens: int | None,
        tools: tuple[Mapping[str, Any], ...],
    ) -> Turn:
        """Ask the model once."""


class Dialogue:
    """The conversations that requests make of a seat.

    Args:
        agent: of the seat. Its own conversation is left alone: all are branches of it, which are
            named after what they begin with, so that their order does not matter when an episode is
            resumed.
    """

    def __init__(self, agent: Seat) -> None:
        self._agent = agent
        self._known: dict[bytes, tuple[Seat, Point]] = {}  # by digest of all messages
        self._asking: set[int] = set()  # ids of agents that wait for an answer
        self._warned = False

    async def respond(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        max_tokens: int | None = None,
    ) -> tuple[dict[str, Any], Turn]:
        """Answer a request in OpenAI's format.

        Returns:
            The assistant's message, and the turn.

        Raises:
            ApiError: 400, the messages or tools are invalid.
            EnvError: the episode is over.
        """
        read = read_messages(messages)
        if not read or read[-1].role == "assistant":
            raise invalid("messages", "must end with a message that can be answered.")
        schemas = tuple(_schema(tool, f"tools[{k}]") for k, tool in enumerate(tools))
        digests = [b""]
        for message in messages:
            digests.append(_digest(digests[-1], message))
        known = [k for k, digest in enumerate(digests) if digest in self._known]
        shared = known[-1] if known else 0
        name = "c" + hashlib.blake2b(digests[-1] + repr(schemas).encode()).hexdigest()[:6]
        if not known:
            self._warn(messages)
            agent = self._agent.branch(name, empty=True)
        else:
            agent, point = self._known[digests[shared]]
            if agent.point != point or id(agent) in self._asking:
                agent = self._agent.branch(name, at=point)
        self._asking.add(id(agent))
        try:
            turn = await agent.turn(tuple(read[shared:]), None, max_tokens, schemas)
        finally:
            self._asking.discard(id(agent))
        answer = _answer(turn, agent.messages[-1], schemas, thinking=agent.opens_thought)
        self._known[_digest(digests[-1], answer)] = agent, agent.point
        return answer, turn

    def _warn(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Say once that a request repeats a reply that no conversation has."""
        replies = [k for k, message in enumerate(messages) if message.get("role") == "assistant"]
        if not replies or self._warned:
            return
        self._warned = True
        said = clip(json.dumps(messages[replies[0]]), 300)
        print(
            visible(
                f"agent endpoint: a request begins a new conversation although it has replies: the "
                f"model did not write messages[{replies[0]}], {said}, after the messages before it."
            ),
            file=sys.stderr,
            flush=True,
        )


def _schema(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A tool without `strict`, which frameworks set by themselves and nothing here can keep."""
    function = tool.get("function")
    if isinstance(function, Mapping):
        tool = {**tool, "function": {k: v for k, v in function.items() if k != "strict"}}
    return read_tool(tool, where)


def _digest(before: bytes, message: Mapping[str, Any]) -> bytes:
    """A digest of messages and one more, by what programs send back as they got it."""
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):
        content = "\n".join(part.get("text", "") for part in content)
    if role == "assistant":
        content = (content or "").strip()
    calls = []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        calls.append((function["name"], json.loads(function["arguments"] or "{}")))
    said = _encode(["system" if role == "developer" else role, content, calls])
    return hashlib.blake2b(before + said.encode(), digest_size=16).digest()


def _answer(
    turn: Turn, reply: Message, schemas: Sequence[object], *, thinking: bool
) -> dict[str, Any]:
    text, calls = turn.text, []
    if schemas:
        parsed = parse_calls(text, cut=turn.finish == "length", thinking=thinking)
        calls = [
            {
                "id": named.id,
                "type": "function",
                "function": {"name": named.name, "arguments": json.dumps(dict(named.arguments))},
            }
            for named, call in zip(reply.tool_calls, parsed, strict=False)
            if not call.error
        ]
        text = without_calls(text) if calls else text
    answer: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else "")}
    return answer | ({"tool_calls": calls} if calls else {})
