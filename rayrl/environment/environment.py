"""An environment: a coroutine that plays one task with an agent and returns named scores.

@rayrl.env(tasks=games, rewards={"win": 1.0, "format": 0.2})
async def tictactoe(task: Game, agent: Agent) -> Scores:
    ...
    return {"win": 1.0, "format": 0.5}
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayrl.environment.group_reward import MAX_SCORE, GroupReward, score_of
from rayrl.environment.numeric import LegalFunction, NumericView, ObserveFunction
from rayrl.environment.rows import Rows, disjoint
from rayrl.environment.signature import fit, keyword_hints, suggestion
from rayrl.errors import ConfigError, EnvError, describe_error, safe_repr
from rayrl.types import Episode, Result, Scores, Task, derive_seed, replace_surrogates

__all__ = [
    "EnvSpec",
    "Environment",
    "PlayerFunction",
    "TaskSource",
    "env",
    "stratified",
]

Play = Callable[..., Awaitable[Scores | Result]]
"""`async def play(task, agent)`, with an additional parameter per additional seat."""
Seats = Sequence[str] | Callable[..., Sequence[str]]
"""Names of the seats, or a function of the environment's settings that returns them."""
PlayerFunction = Callable[..., str | Awaitable[str]]
"""`def player(messages, rng)`: answers a conversation, drawing from the random generator; may be
async, and may take the `task`, as one that knows the right answer does."""
CheckFunction = Callable[..., Awaitable[dict[str, float]]]
"""`async def check(new_agent, args)`: statistics by name (see `Environment.check`)."""
StatisticsFunction = Callable[[Episode], Mapping[str, bool | float | str]]
"""Statistics of one episode by name; `report/statistics.py` explains the types."""
EndingFunction = Callable[[Episode, str], str]
"""Text to show to the person in a seat when an episode has ended."""
TaskSource = Callable[..., Task] | Sequence[Task]

MAX_FACTS = 1_000_000  # characters of JSON
_BELOW_ONE = math.nextafter(1.0, 0.0)


@dataclass(frozen=True)
class EnvSpec:
    """What another process needs to make the same environment.

    Attributes:
        ref: what `rayrl.load_env` finds it by.
        value: the environment itself, where nothing finds it.
        label: its name in this run, if that is not its own.
    """

    ref: str
    args: Mapping[str, Any]
    rewards: Mapping[str, float]
    value: Environment | None = None
    label: str = ""


class Environment:
    """A coroutine with its tasks, rewards, scripted players and checks. Created by `env`.

    Attributes:
        name: its name in configs and logs.
        play: the coroutine function.
        seats: their names: those that were given, else of the parameters after the task.
        source: function `(seed, u, **keywords) -> Task`, or a sequence of tasks.
        eval_source: likewise, for evaluation only; None: see `evaluation`.
        args: keywords of the source: its defaults, and what `configure` set.
        rewards: weight of every score the coroutine returns; a weight of 0 only logs.
        group_rewards: rewards computed over a whole group, by name.
        players: scripted players by name.
        checks: exhaustive checks by name.
        statistics_function: computes what to report per episode; None: scores (see `statistics`).
        ending_function: text shown to a person when an episode has ended, or None (see `ending`).
        numeric: how policies over numbers see it, or None (see `observation`).
        form: the reply that is sent for what a person types in a seat, which stands for `{}`.
        slots: most episodes it can play at once, in all env workers together; None: any number.
        ref: what `load_env` finds it by; empty if nothing does, and then it travels by value.
    """

    def __init__(
        self,
        play: Play,
        *,
        name: str,
        source: TaskSource,
        rewards: Mapping[str, float | GroupReward],
        eval_source: TaskSource | None = None,
        form: str = "{}",
        ref: str | None = None,
        seats: Seats | None = None,
        slots: int | None = None,
    ) -> None:
        if "{}" not in form:
            raise ConfigError(
                f"form={form!r} of environment {name!r}: put {{}} where the line goes"
            )
        self.name = name
        self.play = play
        if slots is not None and slots < 1:
            raise ConfigError(f"slots={slots} of environment {name!r}: at least one episode")
        self.source, self.eval_source = source, eval_source
        if eval_source is not None:
            _defaults(name, eval_source)
        self.rewards: dict[str, float] = {}
        self.group_rewards: dict[str, GroupReward] = {}
        for key, weight in rewards.items():
            if isinstance(weight, GroupReward):
                self.group_rewards[key] = weight
            else:
                self.rewards[key] = _weight(key, weight)
        self.args = _defaults(name, source)
        self._seats = seats
        self.seats = _seats_of(name, play, seats, self.args)
        self.players: dict[str, PlayerFunction] = {}
        self.checks: dict[str, CheckFunction] = {}
        self.statistics_function: StatisticsFunction | None = None
        self.ending_function: EndingFunction | None = None
        self.numeric: NumericView | None = None
        self.form = form
        self.slots = slots
        self.ref = _reference(play) if ref is None else ref
        self._configured: tuple[dict[str, Any], dict[str, float]] = ({}, {})
        self._label = ""

    def __repr__(self) -> str:
        return f"Environment({self.name!r}, seats={self.seats}, rewards={self.rewards})"

    def __call__(self, task: Task, *agents: Any) -> Awaitable[Scores | Result]:
        """Call the coroutine itself, for tests of an environment."""
        return self.play(task, *agents)

    @property
    def spec(self) -> EnvSpec:
        """How to make this environment again in another process."""
        return EnvSpec(self.ref, *self._configured, None if self.ref else self, self._label)

    @property
    def configured(self) -> tuple[Mapping[str, Any], Mapping[str, float]]:
        """Task-source keywords and reward weights that `configure` has set."""
        return self._configured

    def configure(
        self, args: Mapping[str, Any] | None = None, rewards: Mapping[str, float] | None = None
    ) -> Environment:
        """Create an environment with other keywords for the task source and other reward weights.

        Args:
            args: value by keyword; with `keyword.key`, of a keyword that is a mapping, that alone
                of it is changed.

        Raises:
            ConfigError: an unknown name (with the nearest known one) or a value of the wrong type.
        """
        args, rewards = self._whole(args or {}), dict(rewards or {})
        new = self._copy()
        hints = self._hints()
        for key, value in args.items():
            if key not in self.args and key in self._eval_only():
                continue
            if key not in self.args:
                raise ConfigError(
                    f"env.args.{key}: environment {self.name!r} has no such setting."
                    + suggestion(key, list(self.args))
                )
            try:
                new.args[key] = fit(value, hints.get(key, Any))
            except TypeError as error:
                raise ConfigError(f"env.args.{key} of environment {self.name!r}: {error}") from None
        for key, weight in rewards.items():
            if key in new.group_rewards:
                old = new.group_rewards[key]
                new.group_rewards[key] = GroupReward(old.function, _weight(key, weight), old.seat)
            elif key in new.rewards:
                new.rewards[key] = _weight(key, weight)
            else:
                known = [*self.rewards, *self.group_rewards]
                raise ConfigError(
                    f"env.rewards.{key}: environment {self.name!r} has no such reward."
                    + suggestion(key, known)
                )
        if callable(self._seats):
            new.seats = _seats_of(self.name, self.play, self._seats, new.args)
        old_args, old_rewards = self._configured
        new._configured = ({**old_args, **args}, {**old_rewards, **rewards})
        return new

    def _whole(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """`args` with whole mappings for those of which a key was given."""
        known, whole = self.args | self._eval_only(), dict[str, Any]()
        for key, value in args.items():
            name, *path = [key] if key in known else key.split(".")
            if name not in known:
                name, path = key, []
            for at in reversed(range(len(path))):
                old = functools.reduce(_inner, path[:at], whole.get(name, known[name]))
                value = {**(old if isinstance(old, Mapping) else {}), path[at]: value}
            whole[name] = value
        return whole

    def _hints(self) -> dict[str, Any]:
        """Type hints of the settings in `args`."""
        return {} if isinstance(self.source, Sequence) else keyword_hints(self.source)

    def _eval_only(self) -> dict[str, Any]:
        """Keywords that only the source of evaluation tasks has."""
        known = {} if self.eval_source is None else _defaults(self.name, self.eval_source)
        return {key: value for key, value in known.items() if key not in self.args}

    def training(self, held_out: float, duplicates: str = "refuse") -> Environment:
        """The same environment without the tasks that evaluation plays.

        Args:
            held_out: see `evaluation`.
            duplicates: what becomes of rows of a data file that evaluation has too: "refuse" or
                "drop".

        Raises:
            DataError: rows of a data file cannot be read, or evaluation has some of them too.
        """
        new = self._copy()
        if self.eval_source is None and isinstance(self.source, Sequence):
            new.source, _ = _split(self.source, held_out, duplicates)
        elif isinstance(self.source, Rows) and isinstance(self.eval_source, Rows):
            new.source = disjoint(self.source, self.eval_source, duplicates)
        return new

    def without(self, evaluated: Environment, duplicates: str = "refuse") -> Environment:
        """The same environment without rows of a data file that another one's evaluation plays.

        Args:
            evaluated: the other, as `evaluation` gives it.
            duplicates: see `training`.

        Raises:
            DataError: see `training`.
        """
        new = self._copy()
        if isinstance(self.source, Rows) and isinstance(evaluated.source, Rows):
            new.source = disjoint(self.source, evaluated.source, duplicates)
        return new

    def evaluation(self, held_out: float, duplicates: str = "refuse") -> Environment:
        """The same environment with the tasks that training does not see.

        These are its `eval_tasks`; else, of a sequence of tasks, the share that is held out; else
        those that the task function makes of other seeds, some of which may be equal where it can
        make few.

        Args:
            held_out: share of a sequence of tasks, at least one where there are two; always the
                same ones. With 0, training and evaluation have the same tasks.
            duplicates: see `training`; evaluation keeps them.

        Raises:
            DataError: see `training`.
        """
        new = self._copy()
        if self.eval_source is not None:
            new.source = self.eval_source
            if isinstance(self.source, Rows) and isinstance(self.eval_source, Rows):
                disjoint(self.source, self.eval_source, duplicates)
            new.args = _defaults(self.name, self.eval_source)
            given, _ = self._configured
            new.args |= {key: value for key, value in given.items() if key in new.args}
        elif isinstance(self.source, Sequence):
            _, new.source = _split(self.source, held_out, duplicates)
        return new

    def labelled(self, label: str) -> Environment:
        """Create a copy with another name: that of a mixture's component. Empty: its own."""
        new = self._copy()
        if label:
            new.name = new._label = label
        return new

    def with_play(self, play: Play, slots: int | None = None) -> Environment:
        """Create a copy whose episodes are played by `play`, e.g. in another process."""
        new = self._copy()
        new.play, new.slots = play, slots
        return new

    def _copy(self) -> Environment:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)  # players and checks stay shared
        new.args, new.rewards = dict(self.args), dict(self.rewards)
        new.group_rewards = dict(self.group_rewards)
        return new

    def tasks(self, seed: int, n: int, start: int = 0) -> list[Task]:
        """Sample `n` tasks that cover the range of the source evenly (stratified sampling).

        Task k gets u = (k + jitter) / n with jitter in [0, 1) drawn from `derive_seed(seed, start +
        k)`, and the seed `derive_seed(seed, "task", start + k)`. A batch at step s passes
        `start=s * n`, so that no two batches get the same seeds. Tasks of a sequence keep their
        own seeds and are repeated. Rows of a data file are drawn in epochs instead, see `Rows`.

        Raises:
            ConfigError: a setting has no value, or the source rejects one.
            EnvError: the source raised anything else, or returned something other than a Task.
        """
        if isinstance(self.source, Rows):
            return [self.source.drawn(seed, start + k) for k in range(n)]
        return [
            self.task(derive_seed(seed, "task", start + k), stratified(seed, start + k, k, n))
            for k in range(n)
        ]

    def task(self, seed: int, u: float) -> Task:
        """The task of the source at `u` in [0, 1), of a sequence the one at that share of it.

        Args:
            seed: of the task; those of a sequence have their own.

        Raises:
            ConfigError, EnvError: as `tasks`.
        """
        if isinstance(self.source, Sequence):
            task: object = self.source[int(u * len(self.source))]
        else:
            missing = [key for key, value in self.args.items() if value is inspect.Parameter.empty]
            if missing:
                raise ConfigError(
                    f"environment {self.name!r} needs env.args.{missing[0]}, which has no default"
                )
            try:
                task = self.source(seed=seed, u=u, **self.args)
            except ConfigError:  # the source rejects a setting
                raise
            except (Exception, SystemExit) as error:
                raise EnvError(
                    f"the task source of {self.name!r} raised {describe_error(error)} "
                    f"(seed={seed}, u={u}, args={safe_repr(self.args)})"
                ) from error
        if not isinstance(task, Task):
            raise EnvError(
                f"the task source of {self.name!r} returned {safe_repr(task)}: it must return a "
                f"rayrl.Task (a frozen dataclass that inherits it).{_missing_await(task)}"
            )
        return task

    def result(self, returned: object) -> tuple[dict[str, dict[str, float]], Mapping[str, Any]]:
        """Check the coroutine's result; return scores by seat, then name, and facts.

        Raises:
            EnvError: see `scores`; or the facts are not JSON, or longer than `MAX_FACTS`.
        """
        if not isinstance(returned, Result):
            return self.scores(returned), {}
        scores = self.scores(returned.scores)
        wrong = ""
        try:
            facts = dict(returned.facts)
            text = json.dumps(facts, allow_nan=False)
            if json.loads(text) != facts:
                wrong = "JSON reads them otherwise; use strings as keys, and lists"
            elif len(text) > MAX_FACTS:
                wrong = f"{len(text):,} characters, more than {MAX_FACTS:,}"
        except (TypeError, ValueError, RecursionError) as error:
            wrong = f"they are not JSON: {error}; use a mapping of plain data"
        if wrong:
            said = safe_repr(returned.facts)
            raise EnvError(f"environment {self.name!r} returned the facts {said}: {wrong}")
        return scores, replace_surrogates(facts)

    def scores(self, returned: object) -> dict[str, dict[str, float]]:
        """Check the coroutine's result; return finite floats by seat, then name.

        Raises:
            EnvError: a seat or score is undeclared, missing, not a number, not finite or beyond
                `group_reward.MAX_SCORE`.
        """
        if not isinstance(returned, Mapping):
            raise EnvError(
                f"environment {self.name!r} returned {safe_repr(returned)}: it must return its "
                f"scores, e.g. {dict.fromkeys(self.rewards, 0.0)}.{_missing_await(returned)}"
            )
        # a score may have the name of the only seat
        by_seat = set(returned) == set(self.seats) and all(
            isinstance(of_seat, Mapping) for of_seat in returned.values()
        )
        if len(self.seats) == 1 and not by_seat:
            returned = {self.seats[0]: returned}
        _check_names(self.name, "seat", returned, self.seats, "")
        checked: dict[str, dict[str, float]] = {}
        for seat in self.seats:
            of_seat = returned[seat]
            where = f" for seat {seat!r}" if len(self.seats) > 1 else ""
            if not isinstance(of_seat, Mapping):
                raise EnvError(
                    f"environment {self.name!r} returned {safe_repr(of_seat)}{where}: with several "
                    f"seats it must return scores by seat, then name.{_missing_await(of_seat)}"
                )
            for name in self.group_rewards:
                if name in of_seat:
                    raise EnvError(
                        f"environment {self.name!r} returned {name!r}{where}, which is a reward "
                        "over the group: its function computes that score, so leave it out"
                    )
            _check_names(self.name, "score", of_seat, tuple(self.rewards), where)
            checked[seat] = {}
            for name in self.rewards:
                value = of_seat[name]
                try:
                    checked[seat][name] = score_of(value)
                except ValueError as error:
                    what = f"environment {self.name!r} returned {safe_repr(value)}"
                    raise EnvError(
                        f"{what} as score {name!r}{where}: {error}.{_missing_await(value)}"
                    ) from error
        return checked

    def reward(self, scores: Mapping[str, float]) -> float:
        """Return the weighted sum of one seat's scores, including group rewards already computed.

        Raises:
            EnvError: the sum is beyond `group_reward.MAX_SCORE` because the weights are too large.
        """
        total = sum(weight * scores[name] for name, weight in self.rewards.items())
        for name, group in self.group_rewards.items():
            total += group.weight * scores.get(name, 0.0)
        if not abs(total) <= MAX_SCORE:
            raise EnvError(
                f"environment {self.name!r}: scores {safe_repr(dict(scores))} with the weights "
                f"{self.rewards} give the reward {total:g}, which is too large to learn from"
            )
        return total

    def player(self, name: str) -> Callable[[PlayerFunction], PlayerFunction]:
        """Register a scripted player: `def teacher(messages, rng) -> str`, or `async def`."""
        return functools.partial(_register, self.name, "player", self.players, name)

    def check(self, name: str) -> Callable[[CheckFunction], CheckFunction]:
        """Register an exhaustive check: `async def check(new_agent, args) -> dict[str, float]`.

        `new_agent()` creates an agent; `args` are the keywords of the task source.
        """
        return functools.partial(_register, self.name, "check", self.checks, name)

    def statistics(self, function: StatisticsFunction) -> StatisticsFunction:
        """Register what evaluations report per episode: `def statistics(episode) -> dict`.

        The type of a value determines how it is aggregated over episodes: a bool becomes a share, a
        number a mean, and for `{"win/draw/loss": "draw"}` each outcome is counted. By default,
        evaluations report the mean of every score.
        """
        self.statistics_function = function
        return function

    def ending(self, function: EndingFunction) -> EndingFunction:
        """Register a text to show to a person when an episode has ended, such as the final board.

        `def ending(episode, seat) -> str` computes it from the episode's task and turns. Models
        never see it.
        """
        self.ending_function = function
        return function

    def observation(
        self,
        *,
        shape: Sequence[int],
        actions: Sequence[str],
        low: float = -math.inf,
        high: float = math.inf,
        legal: LegalFunction | None = None,
    ) -> Callable[[ObserveFunction], ObserveFunction]:
        """Register how a policy over numbers sees a seat: `def observe(messages) -> array`.

        It makes the environment one of numbers in `rayrl.to_gymnasium`, and a policy that RLlib
        has trained there a player of any seat, `rllib:CHECKPOINT`.

        Args:
            shape: of the array.
            actions: the reply that each action stands for.
            low: least number in the array.
            high: largest one.
            legal: `def legal(messages) -> indices`, the actions that are legal now; by default all.
        """

        def register(function: ObserveFunction) -> ObserveFunction:
            self.numeric = NumericView(function, tuple(shape), low, high, tuple(actions), legal)
            return function

        return register


def _inner(value: object, key: str) -> object:
    """What a mapping has under a key; None where there is none."""
    return value.get(key) if isinstance(value, Mapping) else None


def stratified(seed: int, index: int, k: int, n: int) -> float:
    """A number in [k / n, (k + 1) / n), drawn from `derive_seed(seed, index)`."""
    jitter = random.Random(derive_seed(seed, index)).random()
    return min((k + jitter) / n, _BELOW_ONE)  # the division may round up to 1


def env(
    *,
    tasks: TaskSource,
    rewards: Mapping[str, float | GroupReward],
    eval_tasks: TaskSource | None = None,
    name: str | None = None,
    form: str = "{}",
    seats: Seats | None = None,
    slots: int | None = None,
) -> Callable[[Play], Environment]:
    """Turn a coroutine function `(task, agent, ...) -> Scores` into an `Environment`.

    Args:
        tasks: a function `(seed: int, u: float, **keywords with defaults) -> Task`, whose keywords
            are the environment's settings and whose `u` in [0, 1) says which part of the range (of
            difficulty, say) to draw from; or a sequence of tasks.
        rewards: weight of every score; a `group_reward` for those over a whole group.
        eval_tasks: tasks for evaluation only, a function or a sequence as well. Without them, a
            share of a sequence of tasks is held out from training (`env.held_out`).
        name: by default the function's.
        form: the reply that is sent for what a person types in a seat, which stands for `{}`, e.g.
            `"<move>{}</move>"`.
        seats: names of the seats, for a coroutine function `(task, *agents)`; or a function of the
            environment's settings that returns them. By default the names of its parameters.
        slots: most episodes that can be played at once, in all env workers together.

    Raises:
        ConfigError: not a coroutine function, no seats, a source without `seed` and `u`, or a form
            without `{}`.
    """

    def decorate(play: Play) -> Environment:
        label = name or str(getattr(play, "__name__", type(play).__name__))
        return Environment(
            play,
            name=label,
            source=tasks,
            eval_source=eval_tasks,
            rewards=rewards,
            form=form,
            seats=seats,
            slots=slots,
        )

    return decorate


def _seats_of(
    name: str, play: Play, seats: Seats | None, args: Mapping[str, Any]
) -> tuple[str, ...]:
    parameters = list(inspect.signature(play).parameters.values())
    if not inspect.iscoroutinefunction(play):
        raise ConfigError(f"environment {name!r} must be a coroutine function: write `async def`")
    if callable(seats):
        if inspect.Parameter.empty in args.values():
            return ()  # until it is configured
        seats = seats(**args)
    if seats is not None:
        if not seats or len(set(seats)) < len(seats) or not all(s.isidentifier() for s in seats):
            raise ConfigError(
                f"environment {name!r}: seats={list(seats)}: give one or more different names of "
                "letters, digits and underscores"
            )
        return tuple(seats)
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if len(parameters) < 2 or any(p.kind not in plain for p in parameters):
        raise ConfigError(
            f"environment {name!r} must take a task and an agent for each seat, "
            "e.g. `async def play(task, agent)`"
        )
    return tuple(p.name for p in parameters[1:])


def _split(
    tasks: Sequence[Task], held_out: float, duplicates: str
) -> tuple[Sequence[Task], Sequence[Task]]:
    """Tasks for training and for evaluation, each in the order of the sequence.

    Which are held out depends on their place only, so that every run of an environment agrees.
    """
    if len(tasks) < 2 or not held_out:
        return tasks, tasks
    n = min(max(round(held_out * len(tasks)), 1), len(tasks) - 1)
    order = sorted(range(len(tasks)), key=lambda place: derive_seed("held out", place))
    ours = set(order[:n])
    if isinstance(tasks, Rows):
        training = tasks.select([place for place in range(len(tasks)) if place not in ours])
        evaluation = tasks.select(sorted(ours))
        return disjoint(training, evaluation, duplicates), evaluation
    return (
        [task for place, task in enumerate(tasks) if place not in ours],
        [task for place, task in enumerate(tasks) if place in ours],
    )


def _defaults(name: str, source: TaskSource) -> dict[str, Any]:
    if isinstance(source, Sequence):
        if not isinstance(source, Rows) and not source:  # rows are read when they are needed
            raise ConfigError(f"environment {name!r} has no tasks: `tasks` is empty")
        return {}
    parameters = inspect.signature(source).parameters
    if not {"seed", "u"} <= set(parameters):
        raise ConfigError(
            f"the task source of {name!r} must take `seed` and `u`: "
            "`def tasks(seed: int, u: float, ...) -> Task`"
        )
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {
        key: parameter.default
        for key, parameter in parameters.items()
        if key not in ("seed", "u") and parameter.kind not in variable
    }


def _reference(play: Play) -> str:
    """What another process finds the environment by: not a script, whose other lines it would run,
    nor what a function has defined."""
    module, name = getattr(play, "__module__", ""), getattr(play, "__qualname__", "<")
    return "" if module == "__main__" or "<" in name else f"{module}:{name}"


def _register(env_name: str, kind: str, table: dict[str, Any], name: str, function: Any) -> Any:
    old = table.get(name)
    if old is not None and old is not function and not _is_rerun(old, function):
        raise ConfigError(f"environment {env_name!r} has two {kind}s called {name!r}")
    table[name] = function
    return function


def _is_rerun(old: Any, new: Any) -> bool:
    """Whether a notebook cell that defines a function was run again."""
    names = [getattr(one, "__qualname__", "<") for one in (old, new)]
    return names[0] == names[1] and "<lambda>" not in names[0] and old.__module__ == new.__module__


def _weight(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"env.rewards.{name}: a weight must be a finite number, got {value!r}")
    return float(value)


def _check_names(
    env_name: str, kind: str, returned: Mapping[str, Any], declared: tuple[str, ...], where: str
) -> None:
    for name in returned:
        if name not in declared:
            remedy = " Declare it in `rewards` (weight 0 only logs)." if kind == "score" else ""
            raise EnvError(
                f"environment {env_name!r} returned an undeclared {kind} {name!r}{where}."
                + suggestion(str(name), declared)
                + remedy
            )
    for name in declared:
        if name not in returned:
            raise EnvError(f"environment {env_name!r} returned no {kind} {name!r}{where}")


def _missing_await(value: object) -> str:
    """Suggest `await`, if `value` is the result of a call without it; empty otherwise."""
    if not inspect.iscoroutine(value):
        return ""
    value.close()  # otherwise Python warns too
    return f" Write `await` before the call of {value.__qualname__}."
