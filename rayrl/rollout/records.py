"""Turns and groups as bytes, and append-only files of them that survive a killed process.

A record is plain data as MessagePack, preceded by a marker, its length and its CRC-32. It is
written immediately, so a process that is killed afterwards does not lose it. Anything after the
last intact record (a torn record, zeros from a power cut) is cut off; damage before an intact
record is an error.

The encoding is data, not a pickle, so that resuming an untrusted run folder executes no code. A
value of `rayrl.types` is the list of its fields in order; a task is JSON with the name of its
class, which is looked up among the loaded classes.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]

from rayrl.environment.tasks import task_from_json, task_to_json
from rayrl.errors import DataError
from rayrl.types import (
    Episode,
    Failure,
    Group,
    Message,
    Origin,
    Task,
    ToolCall,
    Turn,
    Usage,
    VersionSpan,
    field_values,
)

__all__ = [
    "Records",
    "group_from_bytes",
    "group_to_bytes",
    "pack",
    "turn_from_bytes",
    "turn_to_bytes",
    "unpack",
]

_MARK = b"rec\x01"
_HEAD = struct.Struct(">4sII")  # marker, length and checksum of the body
_PICKLE = b"\x80\x05"  # in earlier versions, follows four bytes of length
_REMEDY = "remove the file; the episodes in it are played again"
_KINDS = frozenset((Turn, Message, VersionSpan, Usage, Failure, Origin))


def pack(data: object, default: Callable[[Any], Any] | None = None) -> bytes:
    """Encode plain data as bytes; `default` converts other values to plain data."""
    packed: bytes = msgpack.packb(data, default=default, unicode_errors="surrogatepass")
    return packed


def unpack(data: bytes) -> Any:
    """Decode bytes from `pack`; tuples become lists.

    Raises:
        ValueError: the bytes are not from `pack`.
    """
    return msgpack.unpackb(data, unicode_errors="surrogatepass", strict_map_key=False)


class Records:
    """A record file, opened for appending.

    Attributes:
        file: its path.
        size: bytes of intact records.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        # unbuffered, so that closing the file does not retry a write that failed on a full disk
        self._out: FileIO = file.open("ab", buffering=0)
        self.size = os.fstat(self._out.fileno()).st_size

    def read(self) -> list[Any]:
        """Return all records, with lists for tuples; cut off anything after the last intact one.

        Raises:
            DataError: damage before an intact record, or a file of an earlier version.
        """
        data = self.file.read_bytes()
        records = []
        at = 0
        while (body := _body(data, at)) is not None:
            records.append(unpack(body))
            at += _HEAD.size + len(body)
        if at < len(data):
            self._check_tail(data, at)
            print(
                f"{self.file}: the last {len(data) - at} bytes are not a complete record; they "
                "were cut off, and the episodes in them are played again.",
                file=sys.stderr,
            )
            self.truncate(at)
        return records

    def _check_tail(self, data: bytes, at: int) -> None:
        """Raise DataError unless the data from byte `at` is merely a damaged tail."""
        if data[at + 4 : at + 6] == _PICKLE:
            raise DataError(
                f"{self.file}, byte {at}: a pickle, as written by earlier versions of rayrl. It is "
                f"not read, because reading a pickle can run code; {_REMEDY}."
            )
        if not at and not _MARK.startswith(data[:4]) and data.strip(b"\0"):
            raise DataError(f"{self.file}, byte 0: not a record file; {_REMEDY}.")
        later = data.find(_MARK, at + 1)
        while later >= 0 and _body(data, later) is None:
            later = data.find(_MARK, later + 1)
        if later >= 0:
            raise DataError(
                f"{self.file}, byte {at}: {later - at} damaged bytes before intact records; "
                f"{_REMEDY}."
            )

    def add(self, record: object) -> None:
        """Append a record of plain data; on an error nothing of it remains in the file."""
        body = pack(record)
        left = memoryview(_HEAD.pack(_MARK, len(body), zlib.crc32(body)) + body)
        size = self.size + len(left)
        try:
            while left:
                left = left[self._out.write(left) :]
        except OSError:
            self.truncate(self.size)
            raise
        self.size = size

    def truncate(self, size: int) -> None:
        """Truncate the file to `size` bytes."""
        os.truncate(self._out.fileno(), size)
        self.size = size

    def close(self) -> None:
        """Close the file."""
        self._out.close()


def _body(data: bytes, at: int) -> bytes | None:
    """Return the body of the record that begins at byte `at`; None if no intact one does."""
    if at + _HEAD.size > len(data):
        return None
    mark, size, checksum = _HEAD.unpack_from(data, at)
    body = data[at + _HEAD.size : at + _HEAD.size + size]
    intact = mark == _MARK and len(body) == size and zlib.crc32(body) == checksum
    return body if intact else None


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
            *values[3:-1],
            json.dumps(values[-1]),  # facts, with integers of any length
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
    state, tools, usage, began, seconds = data[9:14]
    conversation, origin, *temperature = data[14:] or ("", None)  # none in older logs
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
        conversation,
        None if origin is None else Origin(*origin),
        *temperature,
    )


def _message(data: Sequence[Any]) -> Message:
    role, content, calls, call_id = data
    parsed = (ToolCall(key, name, json.loads(arguments)) for key, name, arguments in calls)
    return Message(role, content, tuple(parsed), call_id)


def _usage(data: Sequence[Any] | None) -> Usage | None:
    return None if data is None else Usage(*data)


def _episode(data: Sequence[Any], group_task: Task) -> Episode:
    text, name, env, index, turns, scores, rewards, failure, retried_usage, *rest = data
    if rest[5:]:  # older logs have no facts
        rest[5] = json.loads(rest[5])
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
        *rest,
    )
