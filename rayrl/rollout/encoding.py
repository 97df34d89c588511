"""Encode turns and groups as bytes, for the logs from which a run is resumed.

The encoding is data, not a pickle, so that resuming an untrusted run folder executes no code. A
value of `rayrl.types` is the list of its fields in order; a task is JSON with the name of its
class, which is looked up among the loaded classes.
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
    field_values,
)

__all__ = ["group_from_bytes", "group_to_bytes", "turn_from_bytes", "turn_to_bytes"]


_KINDS = frozenset((Turn, Message, VersionSpan, Usage, Failure))


def turn_to_bytes(turn: Turn) -> bytes:
    """Encode a turn."""
    return pack(turn, _plain)


def turn_from_bytes(data: bytes) -> Turn:
    """Decode a turn from `turn_to_bytes`."""
    return _turn(unpack(data))


def group_to_bytes(group: Group) -> bytes:
    """Encode a group; a task shared by its episodes is written once."""
    task = json.dumps(task_to_json(group.task))
    episodes = [
        [
            None if values[2] is group.task else json.dumps(task_to_json(values[2])),
            *values[:2],
            *values[3:],
        ]
        for values in map(field_values, group.episodes)
    ]
    return pack((group.id, task, group.trainable, episodes), _plain)


def group_from_bytes(data: bytes) -> Group:
    """Decode a group from `group_to_bytes`.

    Raises:
        DataError: the data is not a group, or its task no longer fits the class of that name.
    """
    try:
        name, text, trainable, episodes = unpack(data)
        task = task_from_json(json.loads(text))
        return Group(name, task, tuple(_episode(item, task) for item in episodes), tuple(trainable))
    except (TypeError, ValueError, IndexError) as error:
        raise DataError(f"not an encoded group: {error}") from error


def _plain(value: Any) -> Any:
    """Convert a value that MessagePack does not support."""
    if type(value) in _KINDS:
        return field_values(value)
    if isinstance(value, ToolCall):  # as JSON, because a model may write integers of any length
        return value.id, value.name, json.dumps(dict(value.arguments))
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    return value.item()  # a numpy or torch scalar


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
    text, name, env, index, turns, scores, rewards, failure, retried_usage, *numbers = data
    return Episode(
        name,
        env,
        group_task if text is None else task_from_json(json.loads(text)),
        index,
        tuple(map(_turn, turns)),
        scores,
        rewards,
        None if failure is None else Failure(*failure),
        _usage(retried_usage),
        *numbers,
    )
