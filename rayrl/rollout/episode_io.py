"""Episodes as JSON lines: first what a person reads, then the ids a learner needs."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO, get_args

from rayrl.environment.signature import fit
from rayrl.environment.tasks import LoggedTask, as_kind, task_from_json, task_to_json
from rayrl.errors import DataError
from rayrl.types import (
    Episode,
    Failure,
    Finish,
    Message,
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
    "episode_line",
    "episode_to_json",
    "message_from_json",
    "message_to_json",
    "read_episodes",
    "read_kept",
    "revive",
    "write_episodes",
]

_SUM = "checksum"  # of a line that only programs write
_CHANGED = (
    f"it is not what was written: its checksum is another. If you changed the line on purpose, "
    f"remove the key {_SUM!r} from it"
)


def message_to_json(message: Message) -> dict[str, Any]:
    """A message as plain data; keys that say nothing are left out."""
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
    """The message `message_to_json` wrote."""
    calls = tuple(
        ToolCall(call["id"], call["name"], call["arguments"]) for call in data.get("tool_calls", ())
    )
    content = _typed(data["content"], str, "content")
    return Message(data["role"], content, calls, data.get("tool_call_id"))


def episode_to_json(episode: Episode) -> dict[str, Any]:
    """An episode as plain data, in the order a person wants to read it.

    Raises:
        EnvError: its task holds something that cannot be written; names the field.
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
    if episode.failure is not None:
        data["failure"] = {
            "kind": episode.failure.kind,
            "message": episode.failure.message,
            "traceback": episode.failure.traceback,
        }
    if episode.wasted is not None:
        data["wasted"] = _usage_to_json(episode.wasted)
    for key in ("replayed", "diverged"):
        if count := getattr(episode, key):
            data[key] = count
    if episode.seed:
        data["seed"] = episode.seed
    data["began"] = round(episode.began, 4)
    data["seconds"] = round(episode.seconds, 4)
    return data


def episode_from_json(data: Mapping[str, Any]) -> Episode:
    """The episode `episode_to_json` wrote, equal to the original (but for `began` and `seconds`).

    The task gets its own class if that is loaded (load the environment first), else `LoggedTask`.

    Raises:
        DataError: a key is missing or a value cannot be; says which.
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
            wasted=_usage_from_json(data.get("wasted")),
            replayed=_typed(data.get("replayed", 0), int, "replayed"),
            diverged=_typed(data.get("diverged", 0), int, "diverged"),
            began=float(data.get("began", 0.0)),
            seconds=float(data.get("seconds", 0.0)),
            seed=_typed(data.get("seed", 0), int, "seed"),
        )
    except KeyError as error:
        raise DataError(f"an episode needs the key {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"not an episode: {error}") from None


def write_episodes(path: str | Path, episodes: Iterable[Episode], append: bool = False) -> int:
    """Write one episode a line; returns how many."""
    count = 0
    with Path(path).open("a" if append else "w", encoding="utf-8") as file:
        for episode in episodes:
            json.dump(episode_to_json(episode), file, ensure_ascii=False)
            file.write("\n")
            count += 1
    return count


def episode_line(episode: Episode) -> str:
    """An episode as a line of a file that only programs write: with a checksum at its end."""
    text = json.dumps(episode_to_json(episode), ensure_ascii=False)
    return f'{text[:-1]}, "{_SUM}": {_sum(text)}}}\n'


def read_episodes(path: str | Path) -> Iterator[Episode]:
    """The episodes of a file, one after the other; empty lines are skipped.

    Raises:
        DataError: there is no such file, or a line is malformed; names the file and the line.
    """
    return (episode for episode, _ in read_kept(path))


def read_kept(path: str | Path) -> Iterator[tuple[Episode, str]]:
    """The episodes of a file, each with what its checksum says, in words; nothing if it is right.

    Raises:
        DataError: as `read_episodes`.
    """
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    episode, whole = _episode_of(line.decode())
                except UnicodeDecodeError:
                    raise DataError(f"{path}:{number}: not UTF-8") from None
                except DataError as error:
                    raise DataError(f"{path}:{number}: {error}") from None
                yield episode, "" if whole else f"{path}:{number}: {_CHANGED}"


def revive(episode: Episode, kinds: Iterable[type[Task]]) -> Episode:
    """The episode with its task in one of these classes, if it had none when it was read.

    A class is found by its name, wherever it is defined now: that of a file has the file's path in
    its module's name.

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
            f"episode {episode.id} is of a task {name}, and there are {', '.join(known)} only"
        )
    try:
        return replace(episode, task=as_kind(task.fields, known[name]))
    except TypeError as error:
        raise DataError(f"episode {episode.id}: its task is no {name}: {error}") from None


def _opened(path: str | Path) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot read episodes: {error.strerror}") from error


def _episode_of(line: str) -> tuple[Episode, bool]:
    """An episode, and whether its line is as it was written."""
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(data, dict):
        raise DataError(f"expected an object, got {line.strip()[:40]!r}")
    own = data.pop(_SUM, None)
    whole = own in (None, _sum(json.dumps(data, ensure_ascii=False)))
    return episode_from_json(data), whole


def _sum(text: str) -> int:
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
    if turn.prompt_ids or turn.completion_ids:
        data["offset"] = turn.offset
        data["prompt_ids"] = list(turn.prompt_ids)
        data["completion_ids"] = list(turn.completion_ids)
        data["rollout_logprobs"] = list(turn.rollout_logprobs)
        data["versions"] = [[span.version, span.start, span.end] for span in turn.versions]
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
    )


def _usage_to_json(usage: Usage) -> dict[str, int]:
    return {key: value for key, value in asdict(usage).items() if value is not None}


def _usage_from_json(data: Mapping[str, Any] | None) -> Usage | None:
    return None if data is None else Usage(**fit(data, dict[str, int]))


def _typed(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        raise DataError(f"{where} must be {kind.__name__}, got {value!r}")
    return value
