"""The vocabulary crosses processes whole."""

from __future__ import annotations

import pickle
from dataclasses import fields, is_dataclass
from typing import Any

import rayrl.types as types
from rayrl.types import (
    Completion,
    Delta,
    Episode,
    Failure,
    Group,
    Message,
    Origin,
    Request,
    Result,
    Sampling,
    Task,
    ToolCall,
    Turn,
    Usage,
    VersionSpan,
)


def test_every_kind_pickles_with_every_field() -> None:
    call = ToolCall("call_0", "add", {"x": 1})
    said = Message("assistant", "hm", (call,), "call_0")
    span, usage = VersionSpan(3, 0, 2), Usage(2, 1, 30, 4, 5, 6)
    origin = Origin("/0", 2, empty=True)
    turn = Turn(
        "agent", (said,), "x", "length", 5, (1,), (2, 3), (-0.5, 0.0), (span,), "s", ({},), usage,
        1.5, 0.25, "/1", origin,
    )  # fmt: skip
    failure = Failure("infra", "gone", "Traceback")
    episode = Episode(
        "g/0", "env", Task(seed=7), 2, (turn,), {"agent": {"w": 1.0}}, {"agent": 1.0}, failure,
        usage, 3, 1, 2.5, 0.75, 9, {"answer": [1]},
    )  # fmt: skip
    sampling = Sampling(0.5, 0.9, 3, 7, ("x",))
    things: list[Any] = [
        *(call, said, span, usage, origin, turn, failure, episode, sampling),
        Request("g/0", (1, 2), sampling, (3,), 4, 5, 6),
        Completion((2,), (-0.5,), (span,), "abort", 4, (((2, -0.5),),)),
        Delta((2,), (-0.5,), "stop", 3, (((2, -0.5),),)),
        Group("g", Task(seed=7), (episode,), ("agent", "other")),
        Result({"w": 1.0}, {"answer": [1]}),
    ]
    for thing in things:
        again = pickle.loads(pickle.dumps(thing))
        assert type(again) is type(thing)
        for field in fields(thing):  # those that == does not look at as well
            assert getattr(again, field.name) == getattr(thing, field.name), field.name
    kinds = {kind for kind in vars(types).values() if is_dataclass(kind)}
    assert kinds == {type(thing) for thing in things} | {Task}


def test_what_an_earlier_version_pickled_is_read() -> None:
    """As logs of groups have it: the state of a frozen dataclass, a list of its fields."""
    whole = Request("g/0", (1, 2), Sampling(), (3,), 4, 5, 6)
    empty = object.__new__(Request)
    empty.__setstate__([getattr(whole, field.name) for field in fields(whole)])  # type: ignore[attr-defined]
    assert empty == whole
