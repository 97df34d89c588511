"""Plays tasksets of verifiers' v1 interface, in a process of the interpreter that has verifiers.

`process.py` starts it. Requests and answers are lines of JSON on a socket; an answer has its
request's `number`, and instead of a result `config`, what is wrong with the settings, or `failed`.
Of rayrl it imports what needs nothing but the standard library, and numpy.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import itertools
import json
import logging
import os
import random
import re
import select
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from rayrl.environment.randomness import EpisodeRandom
from rayrl.errors import describe_error

__all__ = ["serve"]

MAX_LINE = 64 << 20  # bytes of a request: a task is one
INFINITE = 1000  # tasks that are taken of a taskset without an end
EXIT_S = 10.0  # to stop what is going on once the parent is gone
_INFRA = ("InterceptionError", "ProviderError", "SandboxError", "TunnelError")
_PLAIN = (bool, int, float, str)


def serve(descriptor: int, folder: str) -> None:
    """Answer requests until the socket is closed.

    Args:
        descriptor: of the socket.
        folder: where the tasksets' files are; empty: their packages are installed.
    """
    threading.Thread(target=_exit_after_parent, args=(descriptor,), daemon=True).start()
    os.dup2(sys.stderr.fileno(), 1)  # what is printed there is not for anybody's output
    logging.basicConfig(level=os.environ.get("VF_LOG_LEVEL", "WARNING"))
    if folder:  # their tool servers find them there too
        sys.path.insert(0, folder)
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{before}" if before else folder
    asyncio.run(_Worker().serve(socket.socket(fileno=descriptor)))


def _exit_after_parent(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLHUP | getattr(select, "POLLRDHUP", 0))
    poll.poll()
    time.sleep(EXIT_S)
    os._exit(0)  # even if code of a taskset blocks


class SettingError(Exception):
    """A setting is wrong, or something is not there."""


class _Worker:
    def __init__(self) -> None:
        self._tasksets: dict[tuple[str, str], _Taskset] = {}  # by name and settings
        self._running: dict[int, asyncio.Task[None]] = {}

    async def serve(self, sock: socket.socket) -> None:
        reader, self._writer = await asyncio.open_connection(sock=sock, limit=MAX_LINE)
        while line := await reader.readline():
            request = json.loads(line)
            number = request["number"]
            if request["do"] == "cancel":
                if number in self._running:
                    self._running[number].cancel()
                continue
            self._running[number] = asyncio.create_task(self._answer(request))
            await asyncio.sleep(0)  # it begins, so that it answers even if it is cancelled next
        tasks = [*self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for taskset in self._tasksets.values():
            await taskset.close()

    async def _answer(self, request: Mapping[str, Any]) -> None:
        try:
            taskset = self._taskset(request["name"], request["args"])
            given = dict(request["with"])
            if request["do"] == "play":
                given["number"] = request["number"]
            answer = await getattr(taskset, request["do"])(**given)
        except SettingError as error:
            answer = {"config": str(error)}
        except asyncio.CancelledError:
            answer = {"failed": "cancelled", "infra": True}
        except (Exception, SystemExit) as error:
            answer = {"failed": describe_error(error), "infra": False}
        del self._running[request["number"]]
        line = json.dumps({**answer, "number": request["number"]}, default=str)
        self._writer.write(line.encode() + b"\n")

    def _taskset(self, name: str, args: Mapping[str, Any]) -> _Taskset:
        key = name, json.dumps(args, sort_keys=True)
        if key not in self._tasksets:
            self._tasksets[key] = _Taskset(name, args)
        return self._tasksets[key]


class _Taskset:
    """A taskset with its environment and agents.

    Args:
        name: of the taskset, as verifiers knows it; `ENV+NAME` with an environment.
        args: fields of verifiers' configuration of the environment.
    """

    def __init__(self, name: str, args: Mapping[str, Any]) -> None:
        environment, _, taskset = name.rpartition("+")
        try:
            import verifiers.v1 as vf
            from verifiers.v1.utils import loaders
        except ImportError as error:
            raise SettingError(
                f"{sys.executable} has no verifiers with its v1 interface ({error}): "
                f"{sys.executable} -m pip install 'verifiers>=0.3.1' uv"
            ) from error
        self._vf, self._loaders = vf, loaders
        # some make their tasks with the global generators: the same in every process
        random.seed(name)
        with EpisodeRandom("verifiers", name, json.dumps(args, sort_keys=True)):
            try:
                kind = loaders.env_config_type(taskset, environment)
                self._roles = {
                    name: field.default
                    for name, field in kind.model_fields.items()
                    if isinstance(field.default, vf.AgentConfig)
                }
                config = self._configured(kind, environment, taskset, args)
                # it warns of a machine that only stands in for one that is not chosen yet
                logging.getLogger("verifiers.v1.env").disabled = bool(self._unplaced)
                self.env = loaders.load_environment(config)
                self._finite = getattr(self.env.taskset, "bounded", not self.env.taskset.INFINITE)
                self._source = iter(self.env.taskset)
                self._tasks = list(itertools.islice(self._source, 1))
            except SettingError:
                raise
            except (Exception, SystemExit) as error:
                raise SettingError(_in_words(error)) from error
        if not self._tasks:
            raise SettingError(f"the taskset {taskset!r} has no tasks")
        task = self._tasks[0]
        names = [one.__name__ for kind in ("reward", "metric") for one in task.hooks(kind)]
        names += [judge.reward_name for judge in task.plugged_judges()]
        self._scores = {name: re.sub(r"\W", "_", name) for name in names}  # by those of functions
        self._serving: contextlib.AsyncExitStack | None = None
        self._lock = asyncio.Lock()

    def _configured(
        self, kind: Any, environment: str, taskset: str, args: Mapping[str, Any]
    ) -> Any:
        """The configuration of the environment.

        An agent whose harness executes nothing that the model writes needs no machine of its own;
        verifiers' default is one of Prime's. For the others, somebody must say where.
        """
        data = {**args, "id": environment, "taskset": {**args.get("taskset", {}), "id": taskset}}
        self._unplaced = []
        for role, default in self._roles.items():
            given = dict(args.get(role, {}))
            harness = dict(given.get("harness", {}))
            if "id" in harness:  # null in YAML
                given["harness"] = harness = {**harness, "id": harness["id"] or "null"}
            pinned = default.harness.id if default.harness is not None else ""
            chosen = harness.get("id") or pinned or self._loaders.default_harness_id(taskset)
            if not {"runtime"} & {*given, *default.model_fields_set}:
                if self._loaders.harness_class(chosen).EXECUTES_CODE:
                    self._unplaced.append((role, chosen))
                given["runtime"] = {"type": "subprocess"}
            data[role] = given
        return kind.model_validate(data)

    async def about(self) -> dict[str, Any]:
        """What is to be known before anything is played."""
        config = self.env.config
        seats = [name for name in self._roles if getattr(config, name).client is None]
        if not seats:
            raise SettingError("each of its agents has a client of its own; none is to be trained")
        settings = {}
        for name, field in type(config).model_fields.items():
            default = field.get_default(call_default_factory=True)
            if name == "id":
                continue
            if field.annotation in _PLAIN:
                settings[name] = [field.annotation.__name__, default]
            elif hasattr(default, "model_fields"):
                settings[name] = ["dict", {}]
            else:
                settings[name] = ["any", default]
        problems = [
            f"the harness {harness!r} of the agent {role!r} executes what the model writes. Say "
            f"where: env.args.{role}.runtime.type=docker, or subprocess for this machine as it is; "
            f"or let it only talk and use the taskset's tools: env.args.{role}.harness.id=null"
            for role, harness in self._unplaced
            if role in seats
        ]
        return {
            "seats": seats,
            "scores": [*self._scores.values()],
            "settings": settings,
            "problem": problems[0] if problems else "",
            "version": importlib.metadata.version("verifiers"),
        }

    async def count(self, limit: int) -> dict[str, Any]:
        """How many tasks there are, at most `limit` unless that is 0."""
        most = limit or (None if self._finite else INFINITE)
        self._read(most)
        return {"tasks": len(self._tasks) if most is None else min(most, len(self._tasks))}

    async def task(self, index: int) -> dict[str, Any]:
        """A task's data."""
        self._read(index + 1)
        data = self._tasks[index].data
        plain = json.loads(data.model_dump_json(exclude_defaults=True))
        if type(data).model_validate(plain) != data:
            raise SettingError(
                f"task {index} is not the same once it was JSON, as which it must travel: "
                f"{plain!r:.300}"
            )
        return {"task": plain}

    def _read(self, most: int | None) -> None:
        missing = None if most is None else max(most - len(self._tasks), 0)
        with EpisodeRandom("verifiers", "tasks", len(self._tasks)):
            self._tasks += itertools.islice(self._source, missing)

    async def play(
        self, number: int, task: Mapping[str, Any], seed: int, at: Mapping[str, Mapping[str, str]]
    ) -> dict[str, Any]:
        """Play an episode.

        Args:
            number: a name for it, among those that are played at the same time.
            task: a task's data.
            seed: for the global generators of `random` and NumPy.
            at: `url` and `key` of each seat's endpoint.
        """
        vf, env = self._vf, self.env
        await self._open()
        kind = type(env.taskset).task_type()
        one = kind(kind.data_type().model_validate(task), env.config.taskset.task)
        # A key is read from a variable; harnesses do not get those that are called so.
        keys = {f"RAYRL_{seat}_{number}_API_KEY": where["key"] for seat, where in at.items()}
        clients = {
            seat: vf.EvalClientConfig(base_url=where["url"], api_key_var=key)
            for key, (seat, where) in zip(keys, at.items(), strict=True)
        }
        episodes_own: Any = _copy_with(env, clients)
        context = vf.ModelContext(model="policy", client=next(iter(clients.values())))
        os.environ.update(keys)
        try:
            with EpisodeRandom("verifiers", seed):  # siblings meet the same luck
                (slot,) = env.slots(one)
                episode = await episodes_own.run_slot(slot, context)
        finally:
            for key in keys:
                del os.environ[key]
        if not episodes_own.complete(episode):
            return _failure(episode)
        traces = [_summary(trace) for trace in episode.traces]
        return {"traces": traces, "scores": {seat: self._scores_of(seat, traces) for seat in at}}

    def _scores_of(self, seat: str, traces: list[dict[str, Any]]) -> dict[str, float]:
        """Means over what an agent did in an episode; 0 if it had nothing to do."""
        own = [one for one in traces if one["agent"] == seat]
        scores = {
            score: sum(one["scores"].get(name, 0.0) for one in own) / max(len(own), 1)
            for name, score in self._scores.items()
        }
        return {**scores, "reward": sum(one["reward"] for one in own) / max(len(own), 1)}

    async def _open(self) -> None:
        """Start what episodes share."""
        async with self._lock:
            if self._serving is None:
                stack = contextlib.AsyncExitStack()
                await stack.enter_async_context(self.env.serving())
                self._serving = stack

    async def close(self) -> None:
        """Stop what episodes share."""
        if self._serving is not None:
            await self._serving.aclose()


def _copy_with(env: Any, clients: Mapping[str, Any]) -> Any:
    """An environment's copy for one episode, whose agents ask these clients.

    Each agent has an interception server of its own, as without `serving`: a shared one keeps a
    client for each configuration that it has ever seen.
    """
    new = object.__new__(type(env))
    new.__dict__.update(env.__dict__)
    agents = {
        seat: getattr(env.config, seat).model_copy(update={"client": client})
        for seat, client in clients.items()
    }
    new.config = env.config.model_copy(update=agents)
    new._interception = None
    return new


def _summary(trace: Any) -> dict[str, Any]:
    rewards = {name: one.score for name, one in trace.rewards.items() if one is not None}
    metrics = {name: one for name, one in trace.metrics.items() if one is not None}
    return {
        "agent": trace.agent.name,
        "reward": trace.reward,
        "scores": {**metrics, **rewards},
        "stop_condition": trace.stop_condition,
        "is_truncated": trace.is_truncated,
    }


def _failure(episode: Any) -> dict[str, Any]:
    """The first error of the agent or hook that failed last, by what failed."""
    errors = [(one, "") for one in episode.errors]
    for trace in episode.traces:
        if not trace.ok:
            errors += [(one, f"agent {trace.agent.name!r}: ") for one in trace.errors]
    if not errors:
        return {"failed": "the environment did not accept the episode", "infra": False}
    infra = [one for one, _ in errors if one.type in _INFRA]
    error, where = errors[-1]
    return {
        "failed": f"{where}{error.type}: {error.message}",
        "traceback": error.traceback or "",
        "infra": bool(infra) and infra[-1] is error,
    }


def _in_words(error: BaseException) -> str:
    """What is wrong; of an error of pydantic, the setting."""
    problems = getattr(error, "errors", None)
    if not callable(problems):
        return describe_error(error)
    first = problems()[0]
    where = "env.args." + ".".join(map(str, first["loc"]))
    return f"{where}={first['input']!r:.200}: {first['msg']}"
