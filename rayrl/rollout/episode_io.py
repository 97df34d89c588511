"""Read and write episodes as JSON lines: human-readable fields first, then ids for the learner."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO, get_args

from rayrl.environment.signature import fit
from rayrl.environment.tasks import LoggedTask, task_from_fields, task_from_json, task_to_json
from rayrl.errors import DataError
from rayrl.types import (
    Episode,
    Failure,
    Finish,
    Message,
    Origin,
    Task,
    ToolCall,
    Turn,
    Usage,
    VersionSpan,
    replace_surrogates,
)

__all__ = [
    "LoggedTask",
    "episode_from_json",
    "episode_to_json",
    "episode_to_line",
    "message_from_json",
    "message_to_json",
    "read_checked",
    "read_episodes",
    "restore_task",
    "write_episodes",
]

_CHECKSUM = "checksum"  # key in lines that only programs write
_CHANGED = (
    f"the line was changed after it was written: its checksum does not match. If you changed it on "
    f"purpose, remove the key {_CHECKSUM!r}"
)


def message_to_json(message: Message) -> dict[str, Any]:
    """Convert a message to plain data; empty fields are omitted."""
    data: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        data["tool_calls"] = [
            {"id": call.id, "name": call.name, "arguments": dict(call.arguments)}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        data["tool_call_id"] = message.tool_call_id
    return data


def message_from_json(data: Mapping[str, Any]) -> Message:
    """Restore a message from `message_to_json`."""
    calls = tuple(
        ToolCall(call["id"], call["name"], call["arguments"]) for call in data.get("tool_calls", ())
    )
    content = _typed(data["content"], str, "content")
    return Message(data["role"], content, calls, data.get("tool_call_id"))


def episode_to_json(episode: Episode) -> dict[str, Any]:
    """Convert an episode to plain data, in reading order.

    Raises:
        TypeError: JSON cannot represent a field of its task; names the field.
    """
    data: dict[str, Any] = {
        "id": episode.id,
        "env": episode.env,
        "index": episode.index,
        "rewards": replace_surrogates(dict(episode.rewards)),
        "scores": replace_surrogates({s: dict(scores) for s, scores in episode.scores.items()}),
        "task": replace_surrogates(task_to_json(episode.task)),
        "turns": [_turn_to_json(turn) for turn in episode.turns],
    }
    if episode.facts:
        data["facts"] = dict(episode.facts)
    if episode.failure is not None:
        data["failure"] = {
            "kind": episode.failure.kind,
            "message": episode.failure.message,
            "traceback": episode.failure.traceback,
        }
    if episode.retried_usage is not None:
        data["retried_usage"] = _usage_to_json(episode.retried_usage)
    for key in ("replayed", "replay_mismatches"):
        if count := getattr(episode, key):
            data[key] = count
    if episode.seed:
        data["seed"] = episode.seed
    data["began"] = round(episode.began, 4)
    data["seconds"] = round(episode.seconds, 4)
    return data


def episode_from_json(data: Mapping[str, Any]) -> Episode:
    """Restore an episode from `episode_to_json`; `began` and `seconds` are rounded.

    The task gets its own class if that is loaded (load the environment first), else `LoggedTask`.

    Raises:
        DataError: a key is missing or a value is invalid; names it.
    """
    try:
        failed = data.get("failure")
        return Episode(
            id=_typed(data["id"], str, "id"),
            env=_typed(data["env"], str, "env"),
            task=task_from_json(data["task"]),
            index=_typed(data["index"], int, "index"),
            turns=tuple(
                _turn_from_json(turn, f"turn {k}")
                for k, turn in enumerate(_typed(data["turns"], list, "turns"))
            ),
            scores=fit(data["scores"], dict[str, dict[str, float]]),
            rewards=fit(data["rewards"], dict[str, float]),
            failure=None if failed is None else Failure(**failed),
            facts=_typed(data.get("facts", {}), dict, "facts"),
            retried_usage=_usage_from_json(data.get("retried_usage")),
            replayed=_typed(data.get("replayed", 0), int, "replayed"),
            replay_mismatches=_typed(data.get("replay_mismatches", 0), int, "replay_mismatches"),
            began=float(data.get("began", 0.0)),
            seconds=float(data.get("seconds", 0.0)),
            seed=_typed(data.get("seed", 0), int, "seed"),
        )
    except KeyError as error:
        raise DataError(f"an episode needs the key {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"not an episode: {error}") from None


def write_episodes(path: str | Path, episodes: Iterable[Episode], append: bool = False) -> int:
    """Write one episode per line; return the number of episodes.

    A file that is replaced may be the one that `episodes` are read from; it stays as it was if one
    of them cannot be written.
    """
    count, file = 0, Path(path)
    partial = file if append else file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with partial.open("a" if append else "w", encoding="utf-8") as out:
            for episode in episodes:
                out.write(json.dumps(episode_to_json(episode), ensure_ascii=False) + "\n")
                count += 1
        if not append:
            partial.replace(file)
    finally:
        if not append:
            partial.unlink(missing_ok=True)
    return count


def episode_to_line(episode: Episode) -> str:
    """Convert an episode to a line with a checksum, for files that only programs write."""
    text = json.dumps(episode_to_json(episode), ensure_ascii=False)
    return f'{text[:-1]}, "{_CHECKSUM}": {_checksum(text)}}}\n'


def read_episodes(path: str | Path) -> Iterator[Episode]:
    """Iterate over the episodes of a file; empty lines are skipped.

    Raises:
        DataError: there is no such file, or a line is malformed; names the file and the line.
    """
    return (episode for episode, _ in read_checked(path))


def read_checked(path: str | Path) -> Iterator[tuple[Episode, str]]:
    """Iterate over the episodes of a file, each with a message if its checksum does not match.

    Raises:
        DataError: as `read_episodes`.
    """
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    episode, intact = _parse_line(line.decode())
                except UnicodeDecodeError:
                    raise DataError(f"{path}:{number}: not UTF-8") from None
                except DataError as error:
                    raise DataError(f"{path}:{number}: {error}") from None
                yield episode, "" if intact else f"{path}:{number}: {_CHANGED}"


def restore_task(episode: Episode, kinds: Iterable[type[Task]]) -> Episode:
    """Replace a `LoggedTask` in an episode by an instance of one of the given task classes.

    The class is looked up by its name regardless of its module: the module name of a class from a
    file contains the file's path.

    Raises:
        DataError: there is no class of that name, or the stored fields do not fit it.
    """
    task = episode.task
    if not isinstance(task, LoggedTask):
        return episode
    name = task.type.rpartition(":")[2]
    known = {kind.__qualname__: kind for kind in kinds}
    if name not in known:
        raise DataError(
            f"episode {episode.id} has a task of class {name}; the environment has only "
            f"{', '.join(known)}"
        )
    try:
        return replace(episode, task=task_from_fields(task.fields, known[name]))
    except TypeError as error:
        raise DataError(f"episode {episode.id}: its task is not a {name}: {error}") from None


def _open(path: str | Path) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot read episodes: {error.strerror}") from error


def _parse_line(line: str) -> tuple[Episode, bool]:
    """Parse an episode; also return whether the line matches its checksum."""
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        raise DataError(f"not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise DataError(f"expected an object, got {line.strip()[:40]!r}")
    checksum = data.pop(_CHECKSUM, None)
    intact = checksum in (None, _checksum(json.dumps(data, ensure_ascii=False)))
    return episode_from_json(data), intact


def _checksum(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


def _default_state(prompt: Iterable[Message]) -> str:
    return "\n".join([message.content for message in prompt])


def _turn_to_json(turn: Turn) -> dict[str, Any]:
    data: dict[str, Any] = {
        "seat": turn.seat,
        "prompt": [message_to_json(message) for message in turn.prompt],
        "text": turn.text,
        "finish": turn.finish,
    }
    if turn.tools:
        data["tools"] = [dict(schema) for schema in turn.tools]
    if turn.state != _default_state(turn.prompt):
        data["state"] = turn.state
    if turn.usage is not None:
        data["usage"] = _usage_to_json(turn.usage)
    if turn.conversation:
        data["conversation"] = turn.conversation
    if turn.origin is not None:
        data["origin"] = asdict(turn.origin)
    if turn.prompt_ids or turn.completion_ids:
        data["offset"] = turn.offset
        data["prompt_ids"] = list(turn.prompt_ids)
        data["completion_ids"] = list(turn.completion_ids)
        data["rollout_logprobs"] = list(turn.rollout_logprobs)
        data["versions"] = [[span.version, span.start, span.end] for span in turn.versions]
    if turn.temperature is not None:
        data["temperature"] = turn.temperature
    return data


def _turn_from_json(data: Mapping[str, Any], where: str) -> Turn:
    finish = data["finish"]
    if finish not in get_args(Finish):
        raise DataError(f"{where}: finish must be one of {get_args(Finish)}, got {finish!r}")
    prompt = tuple(message_from_json(message) for message in data["prompt"])
    completion_ids = fit(data.get("completion_ids", ()), tuple[int, ...])
    rollout_logprobs = fit(data.get("rollout_logprobs", ()), tuple[float, ...])
    if len(completion_ids) != len(rollout_logprobs):
        raise DataError(
            f"{where}: {len(completion_ids)} completion_ids but "
            f"{len(rollout_logprobs)} rollout_logprobs"
        )
    return Turn(
        seat=_typed(data["seat"], str, f"{where}: seat"),
        prompt=prompt,
        text=_typed(data["text"], str, f"{where}: text"),
        finish=finish,
        offset=_typed(data.get("offset", 0), int, f"{where}: offset"),
        prompt_ids=fit(data.get("prompt_ids", ()), tuple[int, ...]),
        completion_ids=completion_ids,
        rollout_logprobs=rollout_logprobs,
        versions=tuple(VersionSpan(*span) for span in data.get("versions", ())),
        state=data.get("state", _default_state(prompt)),
        tools=fit(data.get("tools", ()), tuple[dict[str, Any], ...]),
        usage=_usage_from_json(data.get("usage")),
        conversation=_typed(data.get("conversation", ""), str, f"{where}: conversation"),
        origin=_origin_from_json(data.get("origin"), where),
        temperature=fit(data.get("temperature"), float | None),
    )


def _origin_from_json(data: Any, where: str) -> Origin | None:
    try:
        return None if data is None else fit(data, Origin)
    except DataError as error:
        raise DataError(f"{where}: origin: {error}") from None


def _usage_to_json(usage: Usage) -> dict[str, int]:
    return {key: value for key, value in asdict(usage).items() if value is not None}


def _usage_from_json(data: Mapping[str, Any] | None) -> Usage | None:
    return None if data is None else Usage(**fit(data, dict[str, int]))


def _typed(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        raise DataError(f"{where} must be {kind.__name__}, got {value!r}")
    return value
