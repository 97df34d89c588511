"""Core data types: tasks, turns, episodes, groups, and the requests and replies of an engine.

Standard library only. Every type is frozen and pickles to plain data, so it can cross processes
and be written to a file. Ragged shapes are tuples; nothing is padded before the learner.

Text consists of Unicode scalar values, which is all that encodings, tokenizers and files can hold.
Python strings and JSON (`"\\ud83d"`) may also contain lone surrogates; these types replace them.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeVar

from rayrl.errors import MAX_TRACEBACK, clip

__all__ = [
    "Alternatives",
    "Completion",
    "Delta",
    "Episode",
    "Failure",
    "Finish",
    "Group",
    "Message",
    "Origin",
    "Reply",
    "Request",
    "Result",
    "Sampling",
    "Scores",
    "Task",
    "ToolCall",
    "Turn",
    "Usage",
    "VersionSpan",
    "assistant",
    "derive_seed",
    "field_values",
    "replace_surrogates",
    "sum_usage",
    "system",
    "tool",
    "user",
]


T = TypeVar("T")


def replace_surrogates(value: T) -> T:
    """Replace every lone surrogate in text, or in JSON data, by U+FFFD.

    A pair of surrogates becomes the character it encodes.
    """
    fixed: Any = value
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                fixed = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    elif isinstance(value, Mapping):
        fixed = {replace_surrogates(k): replace_surrogates(v) for k, v in value.items()}
    elif isinstance(value, list | tuple):
        fixed = [replace_surrogates(item) for item in value]
        fixed = fixed if isinstance(value, list) else tuple(fixed)
    return fixed  # type: ignore[no-any-return]


@functools.cache
def _values_getter(kind: Any) -> Callable[[Any], tuple[Any, ...]]:
    return operator.attrgetter(*[item.name for item in fields(kind)])


def field_values(value: _Compact) -> tuple[Any, ...]:
    """Return the field values of a `_Compact` dataclass in declaration order."""
    kind: Any = type(value)
    return _values_getter(kind)(value)


class _Compact:
    """A dataclass base that pickles as a call of its class.

    This is three to five times as fast as pickling a frozen dataclass, and every turn is pickled
    several times. Subclasses need at least two fields.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), field_values(self)


def _fix_fields(instance: Any, *names: str) -> None:
    """Replace lone surrogates in the named fields of a new instance."""
    for name in names:
        value = getattr(instance, name)
        if value and not (isinstance(value, str) and value.isascii()):
            object.__setattr__(instance, name, replace_surrogates(value))


Role = Literal["system", "user", "assistant", "tool"]
Finish = Literal["stop", "length", "abort"]
Scores = Mapping[str, float] | Mapping[str, Mapping[str, float]]
"""An environment's result: scores by name, or by seat and name if it has several seats."""


@dataclass(frozen=True, slots=True)
class Result:
    """What an environment may return instead of its scores alone.

    Attributes:
        scores: by name, or by seat and name.
        facts: what else is to be known of the episode, as plain JSON data: an answer that was
            extracted, the end of a game. Group rewards and statistics read them from
            `Episode.facts`, and they are stored with the episode. Models never see them.
    """

    scores: Scores
    facts: Mapping[str, Any] = field(default_factory=dict)


Alternatives = tuple[tuple[int, float], ...]
"""The most probable ids at one position with their logprobs, most probable first."""


def derive_seed(*parts: object) -> int:
    """Derive a 63-bit seed from parts with a stable `str`; the same on any machine and Python."""
    text = "\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True, kw_only=True)
class Task:
    """The starting point of an episode. Subclass it as a frozen dataclass with your own fields.

    Attributes:
        seed: source of all the task's randomness; shared by every episode of a group.
    """

    seed: int = 0

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {  # serialization to files, see tasks.py
        "arbitrary_types_allowed": True,
        "extra": "forbid",
        "ser_json_bytes": "base64",
        "val_json_bytes": "base64",
        "ser_json_inf_nan": "constants",
    }
    __names__: ClassVar[Mapping[str, Any]] = {}  # classes that its type hints may name

    def __init_subclass__(cls, **more: Any) -> None:
        """Record the classes local to the defining function, to resolve string annotations."""
        super().__init_subclass__(**more)
        frame = sys._getframe(1)
        # only inside a function, and only once: a dataclass with slots is created twice
        if frame.f_locals is not frame.f_globals and "__names__" not in vars(cls):
            cls.__names__ = {k: v for k, v in frame.f_locals.items() if isinstance(v, type)}

    def rng(self, *state: object) -> random.Random:
        """Return the task's random generator *at this state*: equal states get equal draws.

        Episodes of a group therefore see different random events only where their play differed.
        """
        return random.Random(derive_seed(self.seed, *state))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, for the episode log."""
        return replace_surrogates(asdict(self))


@dataclass(frozen=True, slots=True)
class ToolCall(_Compact):
    """A tool call made by a model; `arguments` is parsed JSON."""

    id: str
    name: str
    arguments: Mapping[str, Any]

    def __post_init__(self) -> None:
        _fix_fields(self, "id", "name", "arguments")


@dataclass(frozen=True, slots=True)
class Message(_Compact):
    """One message of a conversation."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    def __post_init__(self) -> None:
        content = self.content  # fast path for most messages
        if self.tool_call_id is not None or not (isinstance(content, str) and content.isascii()):
            _fix_fields(self, "content", "tool_call_id")


def system(content: str) -> Message:
    """Create a system message."""
    return Message("system", content)


def user(content: str) -> Message:
    """Create a user message."""
    return Message("user", content)


def assistant(content: str) -> Message:
    """Create an assistant message."""
    return Message("assistant", content)


def tool(content: str, call_id: str) -> Message:
    """Create a message with the result of tool call `call_id`."""
    return Message("tool", content, tool_call_id=call_id)


@dataclass(frozen=True, slots=True)
class Sampling(_Compact):
    """Sampling settings. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 64
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.stop:
            _fix_fields(self, "stop")


@dataclass(frozen=True, slots=True)
class VersionSpan(_Compact):
    """Completion ids `[start, end)` were sampled from weights `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Request(_Compact):
    """A generation request to an engine.

    Attributes:
        session: conversation the request belongs to; an engine may cache its KV between turns.
        prompt_ids: the *whole* context so far, so that any replica can answer.
        stop_ids: ids that end the completion (and are part of it), e.g. the end-of-turn token.
        seed: the same request, seed and weights give the same completion.
        min_version: oldest weights version that may answer.
        top_logprobs: number of most probable ids to return per position; only supported by an
            engine opened with `raw_logprobs`.
    """

    session: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    stop_ids: tuple[int, ...] = ()
    seed: int = 0
    min_version: int = 0
    top_logprobs: int = 0


@dataclass(frozen=True, slots=True)
class Completion(_Compact):
    """An engine's answer to a request.

    Attributes:
        ids: sampled ids, the stop id included when one ended it.
        rollout_logprobs: natural-log probability of each id under the distribution it was *sampled*
            from (after temperature, top-k and top-p), one per id. All 0.0 when greedy. An engine
            opened with `raw_logprobs` gives those of the model itself instead, greedy or not.
        versions: spans that cover `ids` exactly.
        finish: "stop" (stop id or stop string), "length", or "abort".
        cached: number of prompt ids whose KV was reused instead of computed.
        alternatives: one entry per id if the request has `top_logprobs`.
    """

    ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    versions: tuple[VersionSpan, ...]
    finish: Finish
    cached: int = field(default=0, compare=False)
    alternatives: tuple[Alternatives, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta(_Compact):
    """A piece of a streamed `Completion`: the ids since the previous piece.

    Attributes:
        finish: None except in the last piece.
    """

    ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    finish: Finish | None = None
    cached: int = 0
    alternatives: tuple[Alternatives, ...] = ()


class Reply(str):
    """An agent's reply: a plain string with the finish reason and the tool calls made."""

    finish: Finish
    tool_calls: tuple[ToolCall, ...]

    def __new__(
        cls, text: str, finish: Finish = "stop", tool_calls: tuple[ToolCall, ...] = ()
    ) -> Reply:
        """Create a string with `finish` and `tool_calls`."""
        self = super().__new__(cls, text)
        self.finish = finish
        self.tool_calls = tool_calls
        return self


@dataclass(frozen=True, slots=True)
class Usage(_Compact):
    """Token usage of calls to a server, as the server reports it; nothing is estimated.

    Attributes:
        calls: number of calls.
        unknown: number of calls for which the server reported no usage.
        prompt: prompt tokens.
        completion: completion tokens, including `reasoning`.
        cached: part of `prompt` served from the server's cache; None if it is never reported.
        reasoning: part of `completion` spent on reasoning; None if it is never reported.
    """

    calls: int = 1
    unknown: int = 0
    prompt: int = 0
    completion: int = 0
    cached: int | None = None
    reasoning: int | None = None

    @property
    def total(self) -> int:
        """Prompt and completion tokens."""
        return self.prompt + self.completion

    def __add__(self, other: Usage) -> Usage:
        """Return the sum of both usages."""
        return Usage(
            self.calls + other.calls,
            self.unknown + other.unknown,
            self.prompt + other.prompt,
            self.completion + other.completion,
            _add_optional(self.cached, other.cached),
            _add_optional(self.reasoning, other.reasoning),
        )


def sum_usage(usages: Iterable[Usage | None]) -> Usage | None:
    """Return the sum of all usages that are not None; None if there are none."""
    total = None
    for usage in usages:
        if usage is not None:
            total = usage if total is None else total + usage
    return total


def _add_optional(first: int | None, second: int | None) -> int | None:
    return second if first is None else first + (second or 0)


@dataclass(frozen=True, slots=True)
class Origin(_Compact):
    """Where a conversation began that is not its seat's first.

    Attributes:
        conversation: the conversation before it.
        turns: number of turns before it, those before `conversation` began included.
        empty: whether it began without their messages.
    """

    conversation: str
    turns: int
    empty: bool = False


@dataclass(frozen=True, slots=True)
class Turn(_Compact):
    """One model call by one seat.

    The turns of a seat form a tree (`rayrl.conversations`): a conversation goes on, branches or
    restarts. Its ids are the concatenation, in order, of each turn's `prompt_ids` and
    `completion_ids`, beginning with those it shares with the conversation it branched from;
    `offset` is the number of ids that precede this turn's. Turns by players without tokens
    (scripts, people, remote endpoints) have empty ids and are never trained on.

    Attributes:
        seat: the seat that acted.
        prompt: messages added before this call, for people to read.
        text: the reply as text.
        prompt_ids: ids *appended* for this call.
        completion_ids: ids the model sampled.
        rollout_logprobs: one per completion id, under the sampling distribution, as the engine
            recorded it.
        versions: weight versions, as spans over `completion_ids`.
        state: key of the state the model acted in; equal keys inside a group mark the same
            decision, which is where GiGPO compares.
        tools: JSON schemas of the tools offered.
        usage: tokens the call used at a server; None without a server.
        began: wall-clock time of the request to the engine, in seconds; 0 without an engine. Like
            `seconds`, it is for the timeline only and not written to files.
        seconds: time until the engine had answered.
        conversation: name of the turn's conversation, unique in its seat; "" is the first.
        origin: where that conversation began; None for the first.
        temperature: at which the completion ids were sampled, where that is not the run's
            `sampling.temperature`. At 0, nothing is trained on them.
    """

    seat: str
    prompt: tuple[Message, ...]
    text: str
    finish: Finish
    offset: int = 0
    prompt_ids: tuple[int, ...] = ()
    completion_ids: tuple[int, ...] = ()
    rollout_logprobs: tuple[float, ...] = ()
    versions: tuple[VersionSpan, ...] = ()
    state: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    usage: Usage | None = None
    began: float = field(default=0.0, compare=False)
    seconds: float = field(default=0.0, compare=False)
    conversation: str = ""
    origin: Origin | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        _fix_fields(self, "text", "state")


@dataclass(frozen=True, slots=True)
class Failure(_Compact):
    """The reason an episode has no reward.

    `kind` is "env" (the environment's code failed), "infra" (infrastructure failed; the episode is
    retried), "refused" (a server refuses this conversation, so a retry is pointless) or "stopped"
    (the episode was cancelled). Message and traceback are clipped: an environment may raise 50 MB.
    """

    kind: Literal["env", "infra", "refused", "stopped"]
    message: str
    traceback: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", clip(self.message))
        object.__setattr__(self, "traceback", clip(self.traceback, MAX_TRACEBACK))
        _fix_fields(self, "message", "traceback")


@dataclass(frozen=True, slots=True)
class Episode(_Compact):
    """One task played to its end.

    Attributes:
        id: unique in a run and the same whenever the run is repeated.
        env: name of the environment.
        task: the task played.
        index: position inside its group.
        turns: turns of all seats in chronological order.
        scores: by seat, then name.
        rewards: weighted sum of the scores, by seat. Empty if the episode failed.
        failure: None, or why the episode has no reward. A failed episode is never trained on.
        retried_usage: tokens that discarded turns of earlier attempts used at a server.
        replayed: number of turns replayed from an earlier attempt without a new model call.
        replay_mismatches: times the episode started over because its environment did not repeat
            what it had done.
        began: wall-clock time of the last attempt's start, in seconds, on the env worker's clock.
        seconds: wall time since `began`; both are for the timing report only.
        seed: for its players and for the module-level generators its environment may draw from.
        facts: what its environment says of it besides the scores (see `Result`).
    """

    id: str
    env: str
    task: Task
    index: int
    turns: tuple[Turn, ...]
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    rewards: Mapping[str, float] = field(default_factory=dict)
    failure: Failure | None = None
    retried_usage: Usage | None = None
    replayed: int = field(default=0, compare=False)
    replay_mismatches: int = field(default=0, compare=False)
    began: float = field(default=0.0, compare=False)
    seconds: float = field(default=0.0, compare=False)
    seed: int = field(default=0, compare=False)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def turns_of(self, seat: str) -> tuple[Turn, ...]:
        """Return the turns of one seat."""
        return tuple(turn for turn in self.turns if turn.seat == seat)

    @property
    def usage(self) -> Usage | None:
        """Tokens used at a server, including earlier attempts; None without a server."""
        return sum_usage([*(turn.usage for turn in self.turns), self.retried_usage])

    @property
    def min_version(self) -> int | None:
        """Oldest weights version of its sampled tokens; None if there are none."""
        versions = [span.version for turn in self.turns for span in turn.versions]
        return min(versions) if versions else None


@dataclass(frozen=True, slots=True)
class Group(_Compact):
    """Episodes of one task, in index order. Rewards are compared only inside a group.

    Attributes:
        id: unique in a run and the same whenever the run is repeated.
        trainable: seats whose tokens are trained on.
    """

    id: str
    task: Task
    episodes: tuple[Episode, ...]
    trainable: tuple[str, ...] = ("agent",)

    @property
    def complete(self) -> bool:
        """Whether every episode has a reward."""
        return all(episode.failure is None for episode in self.episodes)
