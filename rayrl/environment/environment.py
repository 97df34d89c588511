"""An environment: a coroutine that plays one task with an agent and returns named scores.

@rayrl.env(tasks=games, rewards={"win": 1.0, "format": 0.2})
async def tictactoe(task: Game, agent: Agent) -> Scores:
    ...
    return {"win": 1.0, "format": 0.5}
"""

from __future__ import annotations

import functools
import inspect
import math
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayrl.environment.group_reward import MOST_SCORE, GroupReward, score_of
from rayrl.environment.signature import fit, keyword_hints, suggestion
from rayrl.errors import ConfigError, EnvError, described, shown
from rayrl.types import Episode, Message, Scores, Task, derive_seed

__all__ = [
    "EnvSpec",
    "Environment",
    "PlayerFunction",
    "TaskSource",
    "env",
]

Play = Callable[..., Awaitable[Scores]]
"""`async def play(task, agent)`, with one more parameter for each further seat."""
PlayerFunction = Callable[[Sequence[Message], random.Random], str | Awaitable[str]]
"""Answers a conversation, may be async; its randomness comes from the generator it is given."""
CheckFunction = Callable[..., Awaitable[dict[str, float]]]
"""`async def check(new_agent, args)`: figures by name (see `Environment.check`)."""
FiguresFunction = Callable[[Episode], Mapping[str, bool | float | str]]
"""What is worth reporting of one episode; `report/statistics.py` says what each type means."""
EndingFunction = Callable[[Episode, str], str]
"""What a person in a seat is shown when an episode has ended."""
TaskSource = Callable[..., Task] | Sequence[Task]

_BELOW_ONE = math.nextafter(1.0, 0.0)


@dataclass(frozen=True)
class EnvSpec:
    """What another process needs to make the same environment.

    Attributes:
        ref: what `rayrl.load_env` finds it by.
        value: the environment itself, where nothing finds it.
    """

    ref: str
    args: Mapping[str, Any]
    rewards: Mapping[str, float]
    value: Environment | None = None


class Environment:
    """A coroutine with its tasks, rewards, scripted players and checks. Made by `env`.

    Attributes:
        name: what configs and logs call it.
        play: the coroutine function.
        seats: names of its parameters after the task, one a player.
        source: function `(seed, u, **keywords) -> Task`, or a sequence of tasks.
        eval_source: likewise, for evaluation only; None: see `evaluation`.
        args: keywords of the source: its defaults, and what `configure` set.
        rewards: weight of every score the coroutine returns; a weight of 0 only logs.
        group_rewards: rewards computed over a whole group, by name.
        players: scripted players by name.
        checks: exhaustive checks by name.
        reported: what is reported of an episode instead of its scores, or None (see `figures`).
        ended: what a person is shown when an episode has ended, or None (see `ending`).
        form: the reply that is sent for what a person types in a seat, which stands for `{}`.
        slots: most episodes it can play at once, or None.
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
    ) -> None:
        if "{}" not in form:
            raise ConfigError(
                f"form={form!r} of environment {name!r}: put {{}} where the line goes"
            )
        self.name = name
        self.play = play
        self.seats = _seats(name, play)
        self.source, self.eval_source = source, eval_source
        if eval_source is not None:
            _defaults(name, eval_source)
        self.rewards = {k: _weight(k, w) for k, w in rewards.items() if not _is_group(w)}
        self.group_rewards = {k: w for k, w in rewards.items() if isinstance(w, GroupReward)}
        self.args = _defaults(name, source)
        self.players: dict[str, PlayerFunction] = {}
        self.checks: dict[str, CheckFunction] = {}
        self.reported: FiguresFunction | None = None
        self.ended: EndingFunction | None = None
        self.form = form
        self.slots: int | None = None
        self.ref = _reference(play) if ref is None else ref
        self._set: tuple[dict[str, Any], dict[str, float]] = ({}, {})

    def __repr__(self) -> str:
        return f"Environment({self.name!r}, seats={self.seats}, rewards={self.rewards})"

    def __call__(self, task: Task, *agents: Any) -> Awaitable[Scores]:
        """Call the coroutine itself, as a test of an environment does."""
        return self.play(task, *agents)

    @property
    def spec(self) -> EnvSpec:
        """How to make this environment again in another process."""
        return EnvSpec(self.ref, *self._set, value=None if self.ref else self)

    @property
    def configured(self) -> tuple[Mapping[str, Any], Mapping[str, float]]:
        """Task-source keywords and reward weights that `configure` has set."""
        return self._set

    def configure(
        self, args: Mapping[str, Any] | None = None, rewards: Mapping[str, float] | None = None
    ) -> Environment:
        """A new environment with other keywords for its task source and other reward weights.

        Raises:
            ConfigError: an unknown name (with the nearest known one) or a value of the wrong type.
        """
        args, rewards = dict(args or {}), dict(rewards or {})
        new = self._copy()
        hints = {} if isinstance(self.source, Sequence) else keyword_hints(self.source)
        for key, value in args.items():
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
        new._set = ({**self._set[0], **args}, {**self._set[1], **rewards})
        return new

    def training(self, held_out: float) -> Environment:
        """The same environment without the tasks that evaluation plays.

        Args:
            held_out: see `evaluation`.
        """
        new = self._copy()
        if self.eval_source is None and isinstance(self.source, Sequence):
            new.source, _ = _split(self.source, held_out)
        return new

    def evaluation(self, held_out: float) -> Environment:
        """The same environment with the tasks that training does not see.

        These are its `eval_tasks`; else, of a sequence of tasks, the share that is held out; else
        those that the task function makes of other seeds, some of which may be equal where it can
        make few.

        Args:
            held_out: share of a sequence of tasks, at least one where there are two; always the
                same ones. With 0, training and evaluation have the same tasks.
        """
        new = self._copy()
        if self.eval_source is not None:
            new.source = self.eval_source
            new.args = _defaults(self.name, self.eval_source)
            new.args |= {key: value for key, value in self._set[0].items() if key in new.args}
        elif isinstance(self.source, Sequence):
            _, new.source = _split(self.source, held_out)
        return new

    def with_play(self, play: Play, slots: int | None = None) -> Environment:
        """The same environment whose episodes are played by `play`, e.g. in another process."""
        new = self._copy()
        new.play, new.slots = play, slots
        return new

    def _copy(self) -> Environment:
        new = object.__new__(Environment)
        new.__dict__.update(self.__dict__)  # players and checks stay shared
        new.args, new.rewards = dict(self.args), dict(self.rewards)
        new.group_rewards = dict(self.group_rewards)
        return new

    def tasks(self, seed: int, n: int, start: int = 0) -> list[Task]:
        """`n` tasks that cover the range of the source evenly (stratified sampling).

        Task k gets u = (k + jitter) / n with jitter in [0, 1) drawn from `derive_seed(seed, start +
        k)`, and the seed `derive_seed(seed, "task", start + k)`. A batch at step s passes
        `start=s * n`, so that no two batches get the same seeds. A sequence of tasks has seeds of
        its own; its tasks come again.

        Raises:
            ConfigError: a setting has no value, or the source refuses one.
            EnvError: the source raised anything else, or returned something that is no Task.
        """
        return [self._task(seed, k, n, start) for k in range(n)]

    def _task(self, seed: int, k: int, n: int, start: int) -> Task:
        jitter = random.Random(derive_seed(seed, start + k)).random()
        u = min((k + jitter) / n, _BELOW_ONE)  # the division may round up to 1
        task_seed = derive_seed(seed, "task", start + k)
        if isinstance(self.source, Sequence):
            task: object = self.source[int(u * len(self.source))]
        else:
            missing = [key for key, value in self.args.items() if value is inspect.Parameter.empty]
            if missing:
                raise ConfigError(
                    f"environment {self.name!r} needs env.args.{missing[0]}, which has no default"
                )
            try:
                task = self.source(seed=task_seed, u=u, **self.args)
            except ConfigError:  # a setting it refuses, in words for whoever set it
                raise
            except (Exception, SystemExit) as error:
                raise EnvError(
                    f"the task source of {self.name!r} raised {described(error)} "
                    f"(seed={task_seed}, u={u}, args={shown(self.args)})"
                ) from error
        if not isinstance(task, Task):
            raise EnvError(
                f"the task source of {self.name!r} returned {shown(task)}: it must return a "
                f"rayrl.Task (a frozen dataclass that inherits it).{not_awaited(task)}"
            )
        return task

    def scores(self, returned: object) -> dict[str, dict[str, float]]:
        """What the coroutine returned, checked: by seat, then name, as finite floats.

        Raises:
            EnvError: a seat or score is undeclared, missing or not a number, or it is not finite or
                beyond `group_reward.MOST_SCORE`.
        """
        if not isinstance(returned, Mapping):
            raise EnvError(
                f"environment {self.name!r} returned {shown(returned)}: it must return its "
                f"scores, e.g. {dict.fromkeys(self.rewards, 0.0)}.{not_awaited(returned)}"
            )
        if len(self.seats) == 1 and not self._by_seat(returned):
            returned = {self.seats[0]: returned}
        _same_names(self.name, "seat", returned, self.seats, "")
        checked: dict[str, dict[str, float]] = {}
        for seat in self.seats:
            of_seat = returned[seat]
            where = f" for seat {seat!r}" if len(self.seats) > 1 else ""
            if not isinstance(of_seat, Mapping):
                raise EnvError(
                    f"environment {self.name!r} returned {shown(of_seat)}{where}: with several "
                    f"seats it must return scores by seat, then name.{not_awaited(of_seat)}"
                )
            for name in self.group_rewards:
                if name in of_seat:
                    raise EnvError(
                        f"environment {self.name!r} returned {name!r}{where}, which is a reward "
                        "over the group: its function gives that score, so leave it out"
                    )
            _same_names(self.name, "score", of_seat, tuple(self.rewards), where)
            checked[seat] = {
                name: _finite(self.name, name, of_seat[name], where) for name in self.rewards
            }
        return checked

    def _by_seat(self, returned: Mapping[str, Any]) -> bool:
        """Whether these are an only seat's scores by its name: a score may be called so as well."""
        return set(returned) == set(self.seats) and all(
            isinstance(of_seat, Mapping) for of_seat in returned.values()
        )

    def reward(self, scores: Mapping[str, float]) -> float:
        """Weighted sum of one seat's scores, group rewards included once they are there.

        Raises:
            EnvError: it is beyond `group_reward.MOST_SCORE`: its weights are too large.
        """
        total = sum(weight * scores[name] for name, weight in self.rewards.items())
        for name, group in self.group_rewards.items():
            total += group.weight * scores.get(name, 0.0)
        if not abs(total) <= MOST_SCORE:
            raise EnvError(
                f"environment {self.name!r}: scores {shown(dict(scores))} with the weights "
                f"{self.rewards} give the reward {total:g}, which is too large to learn from"
            )
        return total

    def player(self, name: str) -> Callable[[PlayerFunction], PlayerFunction]:
        """Register a scripted player: `def teacher(messages, rng) -> str`, or `async def`."""
        return functools.partial(_register, self.name, "player", self.players, name)

    def check(self, name: str) -> Callable[[CheckFunction], CheckFunction]:
        """Register an exhaustive check: `async def check(new_agent, args) -> dict[str, float]`.

        `new_agent()` gives a fresh agent, `args` are the keywords of the task source.
        """
        return functools.partial(_register, self.name, "check", self.checks, name)

    def figures(self, function: FiguresFunction) -> FiguresFunction:
        """Register what evaluations report of an episode: `def figures(episode) -> dict`.

        The type of a value says how episodes are put together: a bool becomes a share, a number a
        mean, and for `{"win/draw/loss": "draw"}` each outcome is counted. Without it, evaluations
        report the mean of every score.
        """
        self.reported = function
        return function

    def ending(self, function: EndingFunction) -> EndingFunction:
        """Register what a person is shown when an episode has ended, such as the final board.

        `def ending(episode, seat) -> str`, computed from the episode's task and turns. Models never
        see it.
        """
        self.ended = function
        return function


def env(
    *,
    tasks: TaskSource,
    rewards: Mapping[str, float | GroupReward],
    eval_tasks: TaskSource | None = None,
    name: str | None = None,
    form: str = "{}",
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

    Raises:
        ConfigError: not a coroutine function, no seats, a source without `seed` and `u`, or a form
            without `{}`.
    """

    def decorate(play: Play) -> Environment:
        label = name or str(getattr(play, "__name__", type(play).__name__))
        return Environment(
            play, name=label, source=tasks, eval_source=eval_tasks, rewards=rewards, form=form
        )

    return decorate


def _seats(name: str, play: Play) -> tuple[str, ...]:
    parameters = list(inspect.signature(play).parameters.values())
    if not inspect.iscoroutinefunction(play):
        raise ConfigError(f"environment {name!r} must be a coroutine function: write `async def`")
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if len(parameters) < 2 or any(p.kind not in plain for p in parameters):
        raise ConfigError(
            f"environment {name!r} must take a task and an agent for each seat, "
            "e.g. `async def play(task, agent)`"
        )
    return tuple(p.name for p in parameters[1:])


def _split(tasks: Sequence[Task], held_out: float) -> tuple[Sequence[Task], Sequence[Task]]:
    """Tasks for training and for evaluation, each in the order of the sequence.

    Which are held out depends on their place only, so that every run of an environment agrees.
    """
    if len(tasks) < 2 or not held_out:
        return tasks, tasks
    n = min(max(round(held_out * len(tasks)), 1), len(tasks) - 1)
    order = sorted(range(len(tasks)), key=lambda place: derive_seed("held out", place))
    ours = set(order[:n])
    return (
        [task for place, task in enumerate(tasks) if place not in ours],
        [task for place, task in enumerate(tasks) if place in ours],
    )


def _defaults(name: str, source: TaskSource) -> dict[str, Any]:
    if isinstance(source, Sequence):
        if not source:
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
    if name in table and table[name] is not function:
        raise ConfigError(f"environment {env_name!r} has two {kind}s called {name!r}")
    table[name] = function
    return function


def _is_group(weight: object) -> bool:
    return isinstance(weight, GroupReward)


def _weight(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"env.rewards.{name}: a weight must be a finite number, got {value!r}")
    return float(value)


def _same_names(
    env_name: str, kind: str, got: Mapping[str, Any], want: tuple[str, ...], where: str
) -> None:
    for name in got:
        if name not in want:
            remedy = " Declare it in `rewards` (weight 0 only logs)." if kind == "score" else ""
            raise EnvError(
                f"environment {env_name!r} returned an undeclared {kind} {name!r}{where}."
                + suggestion(str(name), want)
                + remedy
            )
    for name in want:
        if name not in got:
            raise EnvError(f"environment {env_name!r} returned no {kind} {name!r}{where}")


def _finite(env_name: str, name: str, value: Any, where: str) -> float:
    try:
        return score_of(value)
    except ValueError as error:
        what = f"environment {env_name!r} returned {shown(value)} as score {name!r}{where}"
        raise EnvError(f"{what}: {error}.{not_awaited(value)}") from error


def not_awaited(value: object) -> str:
    """What to say after naming `value` if it is what a call without `await` gives."""
    if not inspect.iscoroutine(value):
        return ""
    value.close()  # or Python says so once more
    return f" Write `await` before the call of {value.__qualname__}."
