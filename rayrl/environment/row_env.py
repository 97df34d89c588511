"""A data file as an environment: `env.name=rows.jsonl`, one question and one reply for each row."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import random
import re
import string
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrl.config.registry import absolute
from rayrl.environment.chat_data import chat_messages, short
from rayrl.environment.data_files import HUB, DataRow
from rayrl.environment.environment import Environment, Play, TaskSource
from rayrl.environment.row_rewards import REWARDS, AnswerOptions, AnswerReward, answer_text
from rayrl.environment.rows import Row, Rows, missing_column, rows
from rayrl.environment.signature import keyword_hints
from rayrl.errors import ConfigError, DataError, EnvError
from rayrl.types import Message, Scores, Task, system, user

__all__ = ["RowEnvironment", "RowSettings", "SettingsEnvironment", "Template"]


class SettingsEnvironment(Environment):
    """An environment that is made of its `args`, the fields of a dataclass.

    They decide how it is played, and not its tasks alone as in others, so that each cell of an
    evaluation is an environment of its own (`PlayedEnv`).

    Args:
        settings: that dataclass.
        files: those of its fields that name the data files of tasks.
    """

    def __init__(
        self, settings: type[Any], files: Sequence[str], source: TaskSource, **more: Any
    ) -> None:
        async def unconfigured(task: Task, agent: Any) -> Scores:
            raise AssertionError("replaced by set_up")

        super().__init__(unconfigured, source=source, **more)
        self._settings, self._files = settings, files
        self.args = dataclasses.asdict(settings())
        self.set_up()

    def set_up(self) -> None:
        """Make of `args` what plays, judges and draws tasks. No file is read.

        Raises:
            ConfigError: one of them is not what it has to be.
        """
        raise NotImplementedError

    def configure(
        self, args: Mapping[str, Any] | None = None, rewards: Mapping[str, float] | None = None
    ) -> Environment:
        """See `Environment.configure`; settings may change which rewards there are.

        Raises:
            ConfigError: also as `set_up`.
        """
        new = super().configure(args)
        assert isinstance(new, SettingsEnvironment)
        new.set_up()
        return super(SettingsEnvironment, new).configure(None, rewards)

    def evaluation(self, held_out: float, duplicates: str = "refuse") -> Environment:
        """See `Environment.evaluation`; of data, the files can no longer be chosen."""
        new = super().evaluation(held_out, duplicates)
        files = self._files if isinstance(new.source, Rows) else ()
        new.args = {key: value for key, value in self.args.items() if key not in files}
        return new

    def _hints(self) -> dict[str, Any]:
        return keyword_hints(self._settings)


class RowEnvironment(SettingsEnvironment):
    """The environment of a data file. Its `args` are the fields of `RowSettings`.

    Its player `gold` replies with the right answer.
    """

    def __init__(self, path: str) -> None:
        place = Path(path)
        ending = "/" if path.endswith("/") else ""
        of_hub = path.startswith(HUB)
        super().__init__(
            RowSettings,
            ["eval_rows"],
            rows(path),
            name=place.name if ending or of_hub else place.stem,
            rewards={},
            ref=path if of_hub else f"{absolute(path)}{ending}",
        )

    def set_up(self) -> None:
        """See `SettingsEnvironment`."""
        settings = RowSettings(**self.args)
        self.play = _play(settings)
        self.players = {**self.players, "gold": settings.gold_reply}
        self.rewards = {name: self.rewards.get(name, 1.0) for name in settings.rewards}
        assert isinstance(self.source, Rows)
        self.source = self.source.remade(settings.task, settings.key)
        if settings.eval_rows:
            self.eval_source = rows(settings.eval_rows)
        if isinstance(self.eval_source, Rows):
            self.eval_source = self.eval_source.remade(settings.task, settings.key)


def _play(settings: RowSettings) -> Play:
    async def play(task: Row, agent: Any) -> Scores:
        return await settings.scores(str(await agent(settings.messages(task))), task)

    return play


@dataclass(frozen=True)
class RowSettings:
    """What a row's question and its right answer are. `env.args` of a data file.

    Attributes:
        prompt: the column of the prompt, text or a list of messages; or a text with `{columns}`.
        system: system message, which may have `{columns}`; empty: none.
        answer: the column of the right answer.
        reward: one or more of exact, number, math, choice, regex, json, or a function of the reply
            and the row, `module:function` or `path/to/file.py:function`. See docs/data.md.
        extract: regular expression; what its first group last finds in a reply is judged instead of
            the whole reply, and a reply without it has no score. Functions get the whole reply.
        choices: for `choice`: what can be chosen.
        schema: for `json`: the schema of every reply, instead of one in each row's answer.
        gold: what player:gold replies, a text with `{columns}`; empty: the answer.
        eval_rows: data file of the tasks for evaluation; empty: a share of the rows is held out
            (`env.held_out`).
    """

    prompt: str = "prompt"
    system: str = ""
    answer: str = "answer"
    reward: str | list[str] = "exact"
    extract: str = ""
    choices: tuple[str | bool | int | float, ...] = ("A", "B", "C", "D", "E")
    schema: dict[str, Any] | None = None
    gold: str = ""
    eval_rows: str = ""

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ConfigError("env.args.reward=[]: name at least one reward")
        for reward in self.rewards.values():
            if isinstance(reward, AnswerReward):
                reward.check()
        if not self.choices:
            raise ConfigError("env.args.choices=[]: list what can be chosen")
        _ = self._prompt, self._system, self._gold, self._extract

    # --- what the settings name ------------------------------------------------------------------

    @functools.cached_property
    def rewards(self) -> dict[str, Callable[..., Any]]:
        """Rewards by the names of their scores: that of the reward, or of its function."""
        references = [self.reward] if isinstance(self.reward, str) else self.reward
        found: dict[str, Callable[..., Any]] = {}
        for reference in references:
            name = re.split(r"[:.]", reference)[-1]
            if name in found:
                raise ConfigError(
                    f"env.args.reward={list(references)}: two of them are called {name!r}"
                )
            found[name] = REWARDS.resolve(reference)
        return found

    @functools.cached_property
    def _prompt(self) -> Template | None:
        """The template, or None if the prompt is a column."""
        template = Template("env.args.prompt", self.prompt)
        return template if template.columns else None

    @functools.cached_property
    def _system(self) -> Template:
        return Template("env.args.system", self.system)

    @functools.cached_property
    def _gold(self) -> Template:
        return Template("env.args.gold", self.gold)

    @functools.cached_property
    def _extract(self) -> re.Pattern[str] | None:
        try:
            return re.compile(self.extract, re.DOTALL) if self.extract else None
        except re.error as error:
            raise ConfigError(
                f"env.args.extract={self.extract!r} is not a regular expression: {error}"
            ) from None

    @functools.cached_property
    def _options(self) -> AnswerOptions:
        return AnswerOptions(tuple(map(answer_text, self.choices)), self.schema)

    # --- tasks -----------------------------------------------------------------------------------

    def task(self, row: DataRow, number: int) -> Row:
        """The task of a row that can be asked and judged.

        Raises:
            DataError: it lacks a column, or has something wrong in one; names file and line.
        """
        task = Row(seed=number, place=row.place, columns=row.columns)
        self.messages(task)
        if self.gold:
            self._gold.fill(task)
        for name, reward in self.rewards.items():
            if isinstance(reward, AnswerReward):
                try:
                    reward.answers(self._answer(task, name), self._options)
                except ValueError as error:
                    answer = "" if self._shared_schema(name) else short(task.columns[self.answer])
                    raise DataError(
                        f"{task.place}: {answer} is no answer for env.args.reward={name}: {error}"
                    ) from None
        return task

    def key(self, row: Row) -> Hashable:
        """Equal for rows that ask the same."""
        return repr(self.messages(row))

    def messages(self, row: Row) -> list[Message]:
        """What the model is asked."""
        if self._prompt is None:
            value = _value(row, self.prompt, "env.args.prompt")
            if isinstance(value, list):
                asked = chat_messages(value, f"{row.place}: column {self.prompt!r}")
                if asked[-1].role == "assistant":
                    raise DataError(
                        f"{row.place}: column {self.prompt!r} ends with a reply: leave it out"
                    )
            else:
                asked = [user(answer_text(value))]
        else:
            asked = [user(self._prompt.fill(row))]
        if not any(message.content.strip() for message in asked):
            raise DataError(f"{row.place}: the prompt is empty")
        if not self.system:
            return asked
        if asked[0].role == "system":
            raise DataError(
                f"{row.place}: the row has a system message of its own; leave env.args.system empty"
            )
        return [system(self._system.fill(row)), *asked]

    def _answer(self, row: Row, reward: str) -> Any:
        if self._shared_schema(reward):
            return None
        return _value(row, self.answer, "env.args.answer")

    def _shared_schema(self, reward: str) -> bool:
        return self.schema is not None and self.rewards[reward] is REWARDS.resolve("json")

    # --- replies ---------------------------------------------------------------------------------

    async def scores(self, reply: str, row: Row) -> dict[str, float]:
        """Judge a reply by every reward."""
        found: dict[str, float] = {}
        judged = self._extracted(reply)
        for name, reward in self.rewards.items():
            if not isinstance(reward, AnswerReward):
                score = reward(reply, row)
                found[name] = await score if inspect.isawaitable(score) else score
            elif judged is None:
                found[name] = 0.0
            else:
                found[name] = reward(judged, self._answer(row, name), self._options)
        return found

    def _extracted(self, reply: str) -> str | None:
        if self._extract is None:
            return reply
        group = min(self._extract.groups, 1)
        found = [match[group] for match in self._extract.finditer(reply) if match[group]]
        return str(found[-1]) if found else None

    def gold_reply(self, messages: Sequence[Message], rng: random.Random, task: Row) -> str:
        """The right reply: the player `gold`."""
        if self.gold:
            return self._gold.fill(task)
        for name, reward in self.rewards.items():
            if isinstance(reward, AnswerReward) and not reward.has_reply:
                raise EnvError(
                    f"an answer for env.args.reward={name} is no reply: set env.args.gold to what "
                    "player:gold is to say, as '{column}'"
                )
        answer = _value(task, self.answer, "env.args.answer")
        return answer_text(answer[0] if isinstance(answer, list) and answer else answer)


class Template:
    """A text with `{columns}`, as for `str.format`.

    Args:
        key: the setting it is the value of, for messages.

    Raises:
        ConfigError: the text is not a template.
    """

    def __init__(self, key: str, text: str) -> None:
        self.key, self.text = key, text
        try:
            fields = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
        except ValueError as error:
            raise ConfigError(f"{key}={text!r}: {error}; write {{{{ for a brace") from None
        self.columns = [re.split(r"[.\[]", name)[0] for name in fields]
        if any(not column or column.isdigit() for column in self.columns):
            raise ConfigError(f"{key}={text!r}: name a column between the braces; {{{{ is a brace")

    def fill(self, row: Row) -> str:
        """The text for a row.

        Raises:
            DataError: it lacks a column, or what is there has another form; names file and line.
        """
        for column in self.columns:
            _value(row, column, self.key)
        try:
            return _Formatter().vformat(self.text, (), row.columns)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(f"{row.place}: {self.key} does not fit: {error}") from None


class _Formatter(string.Formatter):
    """Writes what a template names as data has it, where Python would write it otherwise."""

    def format_field(self, value: Any, format_spec: str) -> str:
        """Text for a value."""
        if not format_spec and isinstance(value, bool | float):
            return answer_text(value)
        return str(super().format_field(value, format_spec))


def _value(row: Row, column: str, key: str) -> Any:
    """What a row has in a column that a setting names."""
    if column not in row.columns:
        missing = missing_column(row.place, column, row.columns)
        raise DataError(f"{missing} {key} names it.")
    value = row.columns[column]
    if value is None:
        raise DataError(f"{row.place}: column {column!r} is empty (null), and {key} names it")
    return value
