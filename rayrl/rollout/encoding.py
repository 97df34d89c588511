"""Turns and groups as bytes and back: what is kept of a run that may be resumed.

The encoding is data, not a pickle, so that nothing runs when somebody else's folder is resumed. A
value of the vocabulary is the list of its fields in their order; a task is JSON with the name of
its class, which is looked up among those that are loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rayrl.environment.tasks import task_from_json, task_to_json
from rayrl.errors import DataError
from rayrl.rollout.records import pack, unpack
from rayrl.types import (
    Episode,
    Failure,
    Group,
    Message,
    Task,
    ToolCall,
    Turn,
    Usage,
    VersionSpan,
    values_of,
)

__all__ = ["bytes_of", "group_from_data", "group_to_data", "turn_from_bytes"]


_KINDS = frozenset((Turn, Message, VersionSpan, Usage, Failure))


def bytes_of(turn: Turn) -> bytes:
    """A turn as bytes."""
    return pack(turn, _plain)


def turn_from_bytes(data: bytes) -> Turn:
    """The turn `bytes_of` was given."""
    return _turn(unpack(data))


def group_to_data(group: Group) -> bytes:
    """A group as bytes; the task is written once."""
    task = json.dumps(task_to_json(group.task))
    episodes = [
        [
            None if values[2] is group.task else json.dumps(task_to_json(values[2])),
            *values[:2],
            *values[3:],
        ]
        for values in map(values_of, group.episodes)
    ]
    return pack((group.id, task, group.trainable, episodes), _plain)


def group_from_data(data: bytes) -> Group:
    """The group `group_to_data` was given.

    Raises:
        DataError: its task does not fit the class of that name any more.
    """
    try:
        name, text, trainable, episodes = unpack(data)
        task = task_from_json(json.loads(text))
        return Group(name, task, tuple(_episode(one, task) for one in episodes), tuple(trainable))
    except (TypeError, ValueError, IndexError) as error:
        raise DataError(f"not a group that was played: {error}") from error


def _plain(value: Any) -> Any:
    """What MessagePack has no word for."""
    if type(value) in _KINDS:
        return values_of(value)
    if isinstance(value, ToolCall):  # as JSON: what a model wrote may hold numbers of any length
        return value.id, value.name, json.dumps(dict(value.arguments))
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    return value.item()  # a number of numpy or torch


def _turn(data: Sequence[Any]) -> Turn:
    seat, prompt, text, finish, offset, told, sampled, rollout_logprobs, versions = data[:9]
    state, tools, usage, began, seconds = data[9:]
    return Turn(
        seat,
        tuple(map(_message, prompt)),
        text,
        finish,
        offset,
        tuple(told),
        tuple(sampled),
        tuple(rollout_logprobs),
        tuple(VersionSpan(*span) for span in versions),
        state,
        tuple(tools),
        _usage(usage),
        began,
        seconds,
    )


def _message(data: Sequence[Any]) -> Message:
    role, content, calls, call_id = data
    parsed = (ToolCall(key, name, json.loads(arguments)) for key, name, arguments in calls)
    return Message(role, content, tuple(parsed), call_id)


def _usage(data: Sequence[Any] | None) -> Usage | None:
    return None if data is None else Usage(*data)


def _episode(data: Sequence[Any], group_task: Task) -> Episode:
    text, name, env, index, turns, scores, rewards, failure, wasted, *figures = data
    return Episode(
        name,
        env,
        group_task if text is None else task_from_json(json.loads(text)),
        index,
        tuple(map(_turn, turns)),
        scores,
        rewards,
        None if failure is None else Failure(*failure),
        _usage(wasted),
        *figures,
    )
