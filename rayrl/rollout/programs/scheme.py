"""A program as an environment, `env.name=program:agent.py`: it is run, and its output is scored."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rayrl.config.registry import Registry, local_copy
from rayrl.environment.data_files import DataRow
from rayrl.environment.environment import Environment
from rayrl.environment.row_env import SettingsEnvironment, Template
from rayrl.environment.rows import Row, Rows, rows
from rayrl.errors import ConfigError, DataError, EnvError, safe_repr
from rayrl.types import Scores

__all__ = ["ProgramSettings", "load"]

Score = Callable[..., Any]


@dataclass(frozen=True)
class ProgramSettings:
    """How a program is run and scored. `env.args` of `program:`.

    Attributes:
        score: function of its output, and of its task as a dict if it takes two arguments.
        rows: data file whose rows are the tasks; empty: a task is `seed`, and `u`, evenly spread
            over [0, 1).
        eval_rows: data file of the tasks for evaluation; empty: a share of `rows` is held out
            (`env.held_out`).
        stdin: what it reads, a text with `{columns}` of its task; empty: all of the task, as JSON.
        arguments: its command line's, likewise.
        timeout_s: for its run; 0: the episode's deadline.
        own_limits, own_temperature: see `Agent.endpoint`.
        preload: see `rayrl.program`.
    """

    score: str = ""
    rows: str = ""
    eval_rows: str = ""
    stdin: str = ""
    arguments: tuple[str, ...] = ()
    timeout_s: float = 0.0
    own_limits: bool = False
    own_temperature: bool = False
    preload: tuple[str, ...] = ()

    @cached_property
    def function(self) -> Score:
        """What `score` names."""
        if not self.score:
            raise ConfigError(
                "a program needs env.args.score, the function that scores its output, as "
                "grade.py:grade"
            )
        functions: Registry[Score] = Registry("env.args.score")
        return functions.resolve(self.score)

    @cached_property
    def _templates(self) -> tuple[Template, list[Template]]:
        return Template("env.args.stdin", self.stdin), [
            Template("env.args.arguments", text) for text in self.arguments
        ]

    def tasks(self, chosen: Rows[Any]) -> Rows[Row]:
        """Rows of a data file as tasks; those that give the program the same are duplicates."""
        return chosen.remade(self._task, self.given)

    def draw(self, seed: int, u: float, **_: Any) -> Row:
        """The task of a seed, without a data file.

        Raises:
            ConfigError: the program is to be given a column of one; there is no function `score`.
        """
        try:
            return self._task(DataRow(f"seed {seed}", {"seed": seed, "u": u}), seed)
        except DataError as error:
            raise ConfigError(f"{error} Set env.args.rows to a data file that has it.") from None

    def _task(self, row: DataRow, number: int) -> Row:
        _ = self.function  # one that does not exist is reported before anything is played
        task = Row(seed=number, place=row.place, columns=row.columns)
        self.given(task)
        return task

    def given(self, task: Row) -> tuple[str, tuple[str, ...]]:
        """What the program reads, and its arguments.

        Raises:
            DataError: the task lacks a column of these; names file and line.
        """
        stdin, arguments = self._templates
        text = stdin.fill(task) if self.stdin else json.dumps(task.columns)
        return text, tuple(argument.fill(task) for argument in arguments)

    async def scores(self, words: Sequence[str], task: Row, agent: Any) -> Scores:
        """Run the program and score its output."""
        stdin, arguments = self.given(task)
        done = await agent.program(
            [*words, *arguments],
            own_limits=self.own_limits,
            own_temperature=self.own_temperature,
            preload=self.preload,
            stdin=stdin,
            timeout_s=self.timeout_s or None,
            check=False,
        )
        takes = len(inspect.signature(self.function).parameters)
        value = self.function(*(done.stdout, dict(task.columns))[:takes])
        if inspect.isawaitable(value):
            value = await value
        if not isinstance(value, int | float):
            raise EnvError(f"env.args.score={self.score}: returned {safe_repr(value)}, no number")
        return {"score": float(value), "failed": float(done.code != 0)}


class ProgramEnvironment(SettingsEnvironment):
    """The environment of a program. Its `args` are the fields of `ProgramSettings`.

    Its scores are `score`, and `failed`, 1 for an exit status other than 0, which has a score too.
    """

    def __init__(self, path: Path) -> None:
        self._words = [sys.executable, str(path)] if path.suffix == ".py" else [str(path)]
        super().__init__(
            ProgramSettings,
            ["rows", "eval_rows"],
            ProgramSettings().draw,
            name=path.stem,
            rewards={"score": 1.0, "failed": 0.0},
        )

    def set_up(self) -> None:
        """See `SettingsEnvironment`."""
        settings, words = ProgramSettings(**self.args), self._words

        async def play(task: Row, agent: Any) -> Scores:
            return await settings.scores(words, task, agent)

        self.play = play
        chosen = self.source if isinstance(self.source, Rows) else None  # maybe a part of the file
        if settings.rows and (chosen is None or chosen.path != settings.rows):
            chosen = rows(settings.rows)
        self.source = settings.draw if chosen is None else settings.tasks(chosen)
        if settings.eval_rows:
            self.eval_source = rows(settings.eval_rows)
        if isinstance(self.eval_source, Rows):
            self.eval_source = settings.tasks(self.eval_source)


def load(name: str) -> Environment:
    """The environment of a program: a Python file, or one that can be executed.

    Raises:
        ConfigError: there is no such file.
    """
    path = local_copy(name)
    if not path.is_file():
        raise ConfigError(f"env.name=program:{name}: there is no file {path}")
    return ProgramEnvironment(path)
