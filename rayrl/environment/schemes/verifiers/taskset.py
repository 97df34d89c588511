"""Tasksets of verifiers' v1 interface: its agents are the seats, its rewards the scores.

Everything of verifiers, its harnesses and their programs included, is played by a process of the
interpreter where it is installed (`process.py`). Its agents ask the model through the endpoints of
the episode's seats.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rayrl.environment.environment import Environment
from rayrl.environment.schemes.verifiers.held_out import HELD_OUT, part
from rayrl.environment.schemes.verifiers.ids import interpreter, module_name, source_file
from rayrl.environment.schemes.verifiers.process import Taskset
from rayrl.environment.signature import declare_keywords, plain_default
from rayrl.errors import ConfigError
from rayrl.types import Result, Task

__all__ = ["TasksetEnvironment", "TasksetTask"]

_TAKEN = ("seed", "u", "held_out", "num_tasks", "slots")  # settings and parameters of rayrl's
_HINTS: dict[str, Any] = {"any": Any, "dict": dict[str, Any]} | {
    kind.__name__: kind for kind in (bool, int, float, str)
}
_SLOTS = 16


@dataclass(frozen=True, kw_only=True)
class TasksetTask(Task):
    """A task of a taskset.

    Attributes:
        id: of the environment, as in `env.name`.
        python: the interpreter that has verifiers, as in `env.name`.
        args: fields of verifiers' configuration that are not its defaults, as plain data.
        data: the task's data that is not its defaults, as plain data.
    """

    id: str
    python: str
    args: Mapping[str, Any]
    data: Mapping[str, Any]


class TasksetEnvironment(Environment):
    """A taskset with its environment. Its `args` are the fields of verifiers' configuration.

    Args:
        name: as in `env.name=verifiers:NAME`.
        python: a virtual environment or an interpreter.
        taskset: the taskset's part of the name.

    Raises:
        ConfigError: there is no such interpreter or taskset, or it cannot be loaded.
    """

    def __init__(self, name: str, python: str, taskset: str) -> None:
        self.id, self._python, self._taskset = name, python, taskset
        about = self._about({})
        self._keywords: dict[str, tuple[str, Any, Any]] = {}  # field, hint, default by setting
        for field, (kind, default) in about["settings"].items():
            setting = f"env_{field}" if field in _TAKEN else field
            self._keywords[setting] = field, _HINTS[kind], default
        super().__init__(
            _play,
            name=module_name(taskset),
            source=self._source(evaluates=False),
            eval_source=self._source(evaluates=True),
            rewards={"reward": 1.0},
            seats=about["seats"],
            slots=_SLOTS,
            ref=f"verifiers:{name}",
        )
        self._take(about)

    def configure(
        self, args: Mapping[str, Any] | None = None, rewards: Mapping[str, float] | None = None
    ) -> Environment:
        """See `Environment.configure`; seats and scores are those with these arguments.

        Raises:
            ConfigError: also if verifiers does not take them, or needs more.
        """
        new = super().configure(_nested(args or {}))
        assert isinstance(new, TasksetEnvironment)
        about = new._about(new._given(new.args))
        if about["problem"]:
            raise ConfigError(f"env.name=verifiers:{self.id}: {about['problem']}")
        new._take(about)
        return super(TasksetEnvironment, new).configure(None, rewards)

    def _about(self, args: Mapping[str, Any]) -> dict[str, Any]:
        return _hosted(self.id, self._python).ask("about", args)

    def _take(self, about: Mapping[str, Any]) -> None:
        _, chosen = self.configured
        names = dict.fromkeys(["reward", *about["scores"]])
        self.seats = tuple(about["seats"])
        self.rewards = {name: chosen.get(name, float(name == "reward")) for name in names}
        self.slots = self.args["slots"]

    def _given(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of the configuration that differ from their defaults, as plain data."""
        given = {}
        for key, value in settings.items():
            if key in self._keywords and value != self._keywords[key][2]:
                try:
                    given[self._keywords[key][0]] = plain_default(value)
                except (TypeError, ValueError) as error:
                    raise ConfigError(f"env.args.{key} of verifiers:{self.id}: {error}") from None
        return given

    def _source(self, *, evaluates: bool) -> Callable[..., Task]:
        """The function that makes tasks, for training or for evaluation."""

        def tasks(
            seed: int,
            u: float,
            *,
            held_out: float = HELD_OUT,
            num_tasks: int = 0,
            slots: int = _SLOTS,
            **settings: Any,
        ) -> TasksetTask:
            if not 0 < held_out < 1:
                raise ConfigError(f"env.args.held_out={held_out}: must lie between 0 and 1")
            for key, value, least in (("num_tasks", num_tasks, 0), ("slots", slots, 1)):
                if value < least:
                    raise ConfigError(f"env.args.{key}={value}: at least {least}")
            given = self._given(settings)
            taskset = _hosted(self.id, self._python)
            count = taskset.ask("count", given, limit=num_tasks)["tasks"]
            members = part(count, held_out, evaluates)
            data = taskset.ask("task", given, index=members[int(u * len(members))])["task"]
            return TasksetTask(seed=seed, id=self.id, python=self._python, args=given, data=data)

        declare_keywords(tasks, {k: (hint, d) for k, (_, hint, d) in self._keywords.items()})
        return tasks


def _nested(args: Mapping[str, Any]) -> dict[str, Any]:
    """Settings whose names have dots as mappings: `agent.max_turns` is one of `agent`."""
    nested: dict[str, Any] = {}
    for key, value in args.items():
        *outer, last = key.split(".")
        inner = nested
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return nested


def _hosted(name: str, python: str) -> Taskset:
    """The taskset that an ID names.

    Raises:
        ConfigError: its file does not exist.
    """
    environment, plus, seed = name.rpartition(":")[2].rpartition("+")
    file = source_file(seed) if seed.endswith(".py") or "/" in seed else None
    if seed.endswith(".py") and not (file and file.is_file()):
        raise ConfigError(f"env.name=verifiers:{name}: there is no file {seed}")
    folder = ""
    if file is not None:  # what its module is imported from
        folder = str(file.parents[1] if file.name == "__init__.py" else file.parent)
        seed = module_name(seed)
    where = f"env.name=verifiers:{name}"
    return Taskset(where, interpreter(python), f"{environment}{plus}{seed}", folder)


async def _play(task: TasksetTask, *agents: Any) -> Result:
    taskset = _hosted(task.id, task.python)
    async with contextlib.AsyncExitStack() as stack:
        at = {}
        for agent in agents:
            endpoint = await stack.enter_async_context(agent.endpoint())
            at[agent.seat] = {"url": endpoint.url, "key": endpoint.key}
        done = await taskset.play(task.args, task=dict(task.data), seed=task.seed, at=at)
    return Result(done["scores"], {"traces": done["traces"]})
