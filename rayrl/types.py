"""The vocabulary: task, turn, episode, group, and what passes between an agent and an engine.

Standard library only. Everything here is frozen and pickles to plain data, so that it can cross
processes and be written to a file. Ragged shapes are tuples; nothing is padded before the learner.

Text is Unicode scalar values, which is what encodings, tokenizers and files can hold. A string of
Python's may also have lone surrogates, and so may JSON (`"\\ud83d"`); here they are replaced.
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

from rayrl.errors import MOST_TRACEBACK, clip

__all__ = [
    "Alternatives",
    "Completion",
    "Delta",
    "Episode",
    "Failure",
    "Finish",
    "Group",
    "Message",
    "Reply",
    "Request",
    "Sampling",
    "Scores",
    "Task",
    "ToolCall",
    "Turn",
    "Usage",
    "VersionSpan",
    "assistant",
    "derive_seed",
    "replace_surrogates",
    "sum_usage",
    "system",
    "tool",
    "user",
    "values_of",
]


T = TypeVar("T")


def replace_surrogates(value: T) -> T:
    """Text, or JSON with text in it, in which every lone surrogate is U+FFFD.

    A pair of surrogates becomes the character that it stands for.
    """
    fixed: Any = value
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                fixed = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    elif isinstance(value, Mapping):
        fixed = {replace_surrogates(k): replace_surrogates(one) for k, one in value.items()}
    elif isinstance(value, list | tuple):
        fixed = [replace_surrogates(one) for one in value]
        fixed = fixed if isinstance(value, list) else tuple(fixed)
    return fixed  # type: ignore[no-any-return]


@functools.cache
def _values(kind: Any) -> Callable[[Any], tuple[Any, ...]]:
    return operator.attrgetter(*[one.name for one in fields(kind)])


def values_of(value: _Compact) -> tuple[Any, ...]:
    """The fields of one of the kinds below, in their order."""
    kind: Any = type(value)
    return _values(kind)(value)


class _Compact:
    """Pickles as the call of its class: three to five times as fast as a frozen dataclass does.

    Every turn goes through several pickles on its way. It needs two fields at least.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), values_of(self)


def _fix(one: Any, *names: str) -> None:
    """Replace the lone surrogates in a new object's fields."""
    for name in names:
        value = getattr(one, name)
        if value and not (isinstance(value, str) and value.isascii()):
            object.__setattr__(one, name, replace_surrogates(value))


Role = Literal["system", "user", "assistant", "tool"]
Finish = Literal["stop", "length", "abort"]
Scores = Mapping[str, float] | Mapping[str, Mapping[str, float]]
"""What an environment returns: scores by name, or with several seats, by seat and name."""


Alternatives = tuple[tuple[int, float], ...]
"""The most probable ids of one position with their logprobs, the most probable first."""


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any parts with a stable `str`: the same on every machine and Python."""
    text = "\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True, kw_only=True)
class Task:
    """What an episode starts from. Subclass it as a frozen dataclass with the task's own fields.

    Attributes:
        seed: all of the task's randomness comes from it; every episode of a group shares it.
    """

    seed: int = 0

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {  # how files hold tasks, see tasks.py
        "arbitrary_types_allowed": True,
        "extra": "forbid",
        "ser_json_bytes": "base64",
        "val_json_bytes": "base64",
        "ser_json_inf_nan": "constants",
    }
    __names__: ClassVar[Mapping[str, Any]] = {}  # classes that its type hints may name

    def __init_subclass__(cls, **more: Any) -> None:
        """Keep the classes of the function it is defined in: hints as text are looked up there."""
        super().__init_subclass__(**more)
        frame = sys._getframe(1)
        # in a function, and not again: a dataclass with slots is made twice
        if frame.f_locals is not frame.f_globals and "__names__" not in vars(cls):
            cls.__names__ = {k: v for k, v in frame.f_locals.items() if isinstance(v, type)}

    def rng(self, *state: object) -> random.Random:
        """Randomness of this task *at this state*: the same state always gets the same draws.

        So inside a group an episode's luck differs only where its play differed.
        """
        return random.Random(derive_seed(self.seed, *state))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data, for the episode log."""
        return replace_surrogates(asdict(self))


@dataclass(frozen=True, slots=True)
class ToolCall(_Compact):
    """One call a model asked for: `arguments` are parsed JSON."""

    id: str
    name: str
    arguments: Mapping[str, Any]

    def __post_init__(self) -> None:
        _fix(self, "id", "name", "arguments")


@dataclass(frozen=True, slots=True)
class Message(_Compact):
    """One message of a conversation."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    def __post_init__(self) -> None:
        content = self.content  # most messages are done with this
        if self.tool_call_id is not None or not (isinstance(content, str) and content.isascii()):
            _fix(self, "content", "tool_call_id")


def system(content: str) -> Message:
    """A system message."""
    return Message("system", content)


def user(content: str) -> Message:
    """A user message."""
    return Message("user", content)


def assistant(content: str) -> Message:
    """An assistant message."""
    return Message("assistant", content)


def tool(content: str, call_id: str) -> Message:
    """The result of the tool call `call_id`."""
    return Message("tool", content, tool_call_id=call_id)


@dataclass(frozen=True, slots=True)
class Sampling(_Compact):
    """How a completion is drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 64
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.stop:
            _fix(self, "stop")


@dataclass(frozen=True, slots=True)
class VersionSpan(_Compact):
    """Completion ids `[start, end)` were sampled from weights `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Request(_Compact):
    """One generation for an engine.

    Attributes:
        session: conversation this belongs to; an engine may keep its KV between turns.
        prompt_ids: the *whole* context so far, so that any replica can answer.
        stop_ids: ids that end the completion (they are part of it), e.g. the end-of-turn token.
        seed: the same request, seed and weights give the same completion.
        min_version: weights older than this must not answer.
        top_logprobs: how many of the most probable ids are told for each position; only by an
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
    """What an engine answers.

    Attributes:
        ids: sampled ids, the stop id included when one ended it.
        rollout_logprobs: natural-log probability of each id under the distribution it was *sampled*
            from (after temperature, top-k and top-p), one per id. All 0.0 when greedy. An engine
            opened with `raw_logprobs` gives those of the model itself instead, greedy or not.
        versions: spans that cover `ids` exactly.
        finish: "stop" (stop id or stop string), "length", or "abort".
        cached: prompt ids whose KV was reused instead of computed.
        alternatives: one per id if the request has `top_logprobs`.
    """

    ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    versions: tuple[VersionSpan, ...]
    finish: Finish
    cached: int = field(default=0, compare=False)
    alternatives: tuple[Alternatives, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta(_Compact):
    """What an engine streams: the ids since the one before; put together they are a `Completion`.

    Attributes:
        finish: None but for the last.
    """

    ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    finish: Finish | None = None
    cached: int = 0
    alternatives: tuple[Alternatives, ...] = ()


class Reply(str):
    """The text an agent answered with: a plain string that also knows how it ended."""

    finish: Finish
    tool_calls: tuple[ToolCall, ...]

    def __new__(
        cls, text: str, finish: Finish = "stop", tool_calls: tuple[ToolCall, ...] = ()
    ) -> Reply:
        """A string with `finish` and `tool_calls`."""
        self = super().__new__(cls, text)
        self.finish = finish
        self.tool_calls = tool_calls
        return self


@dataclass(frozen=True, slots=True)
class Usage(_Compact):
    """Tokens that calls of a server's model cost, as the server says; nothing is estimated.

    Attributes:
        calls: how many calls these are.
        unknown: those about which the server said nothing.
        prompt: tokens read.
        completion: tokens written, those of `reasoning` included.
        cached: of `prompt`, those the server had read before; None where it never says.
        reasoning: of `completion`, those it thought with; None where it never says.
    """

    calls: int = 1
    unknown: int = 0
    prompt: int = 0
    completion: int = 0
    cached: int | None = None
    reasoning: int | None = None

    @property
    def total(self) -> int:
        """Tokens read and written."""
        return self.prompt + self.completion

    def __add__(self, other: Usage) -> Usage:
        """Of both."""
        return Usage(
            self.calls + other.calls,
            self.unknown + other.unknown,
            self.prompt + other.prompt,
            self.completion + other.completion,
            _added(self.cached, other.cached),
            _added(self.reasoning, other.reasoning),
        )


def sum_usage(costs: Iterable[Usage | None]) -> Usage | None:
    """The sum of what there is; None if there is nothing."""
    total = None
    for cost in costs:
        if cost is not None:
            total = cost if total is None else total + cost
    return total


def _added(one: int | None, other: int | None) -> int | None:
    return other if one is None else one + (other or 0)


@dataclass(frozen=True, slots=True)
class Turn(_Compact):
    """One call of a model by one seat.

    A conversation's ids are the concatenation, in order, of each turn's `prompt_ids` and
    `completion_ids`; `offset` is how many ids of the conversation precede this turn's. A turn with
    offset 0 starts a new conversation. Turns by players without tokens (scripts, people, remote
    endpoints) have empty ids and are never trained on.

    Attributes:
        seat: who acted.
        prompt: messages added before this call, for people to read.
        text: the reply as text.
        prompt_ids: ids *appended* for this call.
        completion_ids: ids the model sampled.
        rollout_logprobs: one per completion id, under the sampling distribution, as the engine
            recorded it.
        versions: weight versions, as spans over `completion_ids`.
        state: key of the state the model acted in; equal keys inside a group are the same decision
            (GiGPO compares there).
        tools: JSON schemas of the tools that were offered.
        usage: tokens the call cost at a server; None where none was asked.
        began: wall-clock time at which an engine was asked, in seconds; 0 where none was. For the
            timeline only, as `seconds`: not written to files.
        seconds: until it had answered.
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

    def __post_init__(self) -> None:
        _fix(self, "text", "state")


@dataclass(frozen=True, slots=True)
class Failure(_Compact):
    """Why an episode has no reward.

    `kind` is "env" (its code), "infra" (around it, so that it is played again), "refused" (a server
    will not answer this conversation, however often it is asked) or "stopped" (it was to be used no
    more). Message and traceback are clipped: an environment may raise 50 MB.
    """

    kind: Literal["env", "infra", "refused", "stopped"]
    message: str
    traceback: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", clip(self.message))
        object.__setattr__(self, "traceback", clip(self.traceback, MOST_TRACEBACK))
        _fix(self, "message", "traceback")


@dataclass(frozen=True, slots=True)
class Episode(_Compact):
    """One task played to its end.

    Attributes:
        id: unique in a run and the same whenever the run is repeated.
        env: the environment's name.
        task: what it started from.
        index: place inside its group.
        turns: all seats' turns in the order they happened.
        scores: by seat, then name.
        rewards: by seat: weighted sum of its scores. Empty when the episode failed.
        failure: None, or why it ended without a reward. Such an episode is never trained on.
        wasted: tokens that were lost with earlier attempts at it, of those a server counts.
        replayed: turns that an earlier attempt had made, and that were not asked for again.
        diverged: times it started over because its environment did not do again what it had done.
        began: wall-clock time of its (last) start, in seconds, as its env worker's clock has it.
        seconds: wall time from there; both are for the timing report only.
        seed: of its players and of the module-level generators its environment may draw from.
    """

    id: str
    env: str
    task: Task
    index: int
    turns: tuple[Turn, ...]
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    rewards: Mapping[str, float] = field(default_factory=dict)
    failure: Failure | None = None
    wasted: Usage | None = None
    replayed: int = field(default=0, compare=False)
    diverged: int = field(default=0, compare=False)
    began: float = field(default=0.0, compare=False)
    seconds: float = field(default=0.0, compare=False)
    seed: int = field(default=0, compare=False)

    def turns_of(self, seat: str) -> tuple[Turn, ...]:
        """The turns `seat` played."""
        return tuple(turn for turn in self.turns if turn.seat == seat)

    @property
    def usage(self) -> Usage | None:
        """Tokens it cost at a server, earlier attempts included; None where none was asked."""
        costs = [turn.usage for turn in self.turns] + [self.wasted]
        return sum_usage(costs)

    @property
    def min_version(self) -> int | None:
        """The oldest weights any of its tokens came from; None without sampled tokens."""
        versions = [span.version for turn in self.turns for span in turn.versions]
        return min(versions) if versions else None


@dataclass(frozen=True, slots=True)
class Group(_Compact):
    """Episodes of the same task, in index order. Rewards are compared only inside a group.

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
