"""Requests that carry all messages so far, as turns of one seat.

A request goes on where its messages, up to some reply of the model, are those of a conversation:
the new ones are appended to its ids. If somebody else went on from there meanwhile, it is a branch;
if nothing matches, it begins a conversation, whose earlier replies are tokenized from text like a
prompt and not trained on.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Self

from rayrl.chat.requests import invalid, read_messages, read_tool
from rayrl.chat.tools import parse_calls, without_calls
from rayrl.errors import clip
from rayrl.rollout.conversation import Point
from rayrl.terminal import visible
from rayrl.types import Message, Turn

__all__ = ["Answer", "Dialogue", "Seat"]

_encode = json.JSONEncoder(sort_keys=True).encode


class Answer(dict[str, Any]):
    """An assistant's message in OpenAI's format.

    Attributes:
        turn: the turn that it is.
        agent: the one that gave it.
        point: where that agent was then.
        dialogue: what it is part of.
    """

    def __init__(
        self, message: Mapping[str, Any], turn: Turn, agent: Seat, dialogue: Dialogue
    ) -> None:
        super().__init__(message)
        self.turn, self.agent, self.point, self.dialogue = turn, agent, agent.point, dialogue
        self.digest = b""  # of all messages up to it, once it is computed


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
        temperature: float | None,
        tools: tuple[Mapping[str, Any], ...],
    ) -> Turn:
        """Ask the model once."""


class _Read(NamedTuple):
    """A message of a request: as it was given, as it is read, and a digest up to it."""

    given: Mapping[str, Any]
    message: Message
    digest: bytes


class _Given(NamedTuple):
    """What an answer was given to: the digest of all messages, or those after an answer."""

    whole: bytes | None
    after: Answer | None = None
    messages: Sequence[Mapping[str, Any]] = ()

    def digest(self) -> bytes:
        """The digest of all messages; that of the answer before must be there."""
        digest = self.after.digest if self.after is not None else b""
        if self.whole is not None:
            return self.whole
        for message in self.messages:
            digest = _digest(digest, message)
        return digest


class Dialogue:
    """The conversations that requests make of a seat.

    Attributes:
        warned: whether this process has said what a request repeats otherwise.

    Args:
        agent: of the seat. Its own conversation is left alone: all are branches of it, which are
            named after what they begin with, so that their order does not matter when an episode is
            resumed.
    """

    warned: ClassVar[bool] = False

    def __init__(self, agent: Seat) -> None:
        self._agent = agent
        self._known: dict[bytes, Answer] = {}  # by digest of all messages
        self._answered: set[bytes] = set()  # digests of what they were given to
        self._unsettled: list[tuple[_Given, Answer]] = []  # not yet in `_known`
        self._asking: set[int] = set()  # ids of agents that wait for an answer
        self._last: list[_Read] = []  # the messages of the last request, most of which come again

    async def respond(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        after: Answer | None = None,
    ) -> Answer:
        """Answer a request in OpenAI's format.

        Args:
            messages: all of them, or with `after` those that follow an earlier answer.
            tools: likewise.
            max_tokens: of the answer; None: the run's.
            temperature: likewise.
            after: the earlier answer.

        Raises:
            ApiError: 400, the messages or tools are invalid.
            EnvError: the episode is over.
        """
        if after is None:
            self._settle()
            read = self._read(messages)
            found = [k for k, one in enumerate(read, 1) if one.digest in self._known]
            same = found[-1] if found else 0
            new = tuple(one.message for one in read[same:])
            self._warn(read, same)
            if found:
                after = self._known[read[same - 1].digest]
            given = _Given(read[-1].digest if read else b"")
        elif after.dialogue is not self:
            raise invalid("after", "must be an answer of this agent.")
        else:
            ids = [call["id"] for call in after.get("tool_calls") or ()]
            new = tuple(read_messages(messages, call_ids=ids))
            given = _Given(None, after, [dict(one) for one in messages])
        if not new or new[-1].role == "assistant":
            raise invalid("messages", "must end with a message that can be answered.")
        schemas = tuple(_schema(tool, f"tools[{k}]") for k, tool in enumerate(tools))
        agent = None if after is None else after.agent
        if after is None or after.point != after.agent.point or id(agent) in self._asking:
            self._settle()
            name = "c" + hashlib.blake2b(given.digest() + repr(schemas).encode()).hexdigest()[:6]
            if after is None:
                agent = self._agent.branch(name, empty=True)
            else:
                agent = self._agent.branch(name, at=after.point)
        assert agent is not None
        self._asking.add(id(agent))
        try:
            turn = await agent.turn(new, None, max_tokens, temperature, schemas)
        finally:
            self._asking.discard(id(agent))
        message = _answer(turn, agent.messages[-1], schemas, thinking=agent.opens_thought)
        answer = Answer(message, turn, agent, self)
        self._unsettled.append((given, answer))
        return answer

    def _settle(self) -> None:
        """Compute the digests of answers. If each goes on from the last, nobody needs them."""
        for given, answer in self._unsettled:
            before = given.digest()
            self._answered.add(before)
            answer.digest = _digest(before, answer)
            self._known[answer.digest] = answer
        self._unsettled.clear()

    def _read(self, messages: Sequence[Mapping[str, Any]]) -> list[_Read]:
        """The messages as they are read, of which those of the last request are known."""
        last, same = self._last, 0
        for given, one in zip(messages, last, strict=False):
            if given != one.given:
                break
            same += 1
        read, rest = last[:same], messages[same:]
        known = [call["id"] for one in read for call in one.given.get("tool_calls") or ()]
        for given, message in zip(rest, read_messages(rest, same, known), strict=True):
            before = read[-1].digest if read else b""
            # a copy, because a caller in this process may change its own
            plain = isinstance(given.get("content"), str) and not given.get("tool_calls")
            own = dict(given) if plain else copy.deepcopy(given)
            read.append(_Read(own, message, _digest(before, given)))
        self._last = read
        return read

    def _warn(self, read: Sequence[_Read], same: int) -> None:
        """Say once that a request repeats a reply otherwise. Examples of a program are its own."""
        for k in range(max(same, 1), len(read)):
            if read[k].message.role != "assistant" or read[k - 1].digest not in self._answered:
                continue
            if not Dialogue.warned:
                Dialogue.warned = True
                said = clip(json.dumps(read[k].given), 300)
                print(
                    visible(
                        f"agent endpoint: a request repeats messages[{k}] otherwise than the model "
                        f"wrote it, {said}, so that it is read from there on as new text."
                    ),
                    file=sys.stderr,
                    flush=True,
                )
            return


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
