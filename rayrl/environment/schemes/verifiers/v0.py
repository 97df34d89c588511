"""Environments of verifiers' v0 interface: its own classes play and score.

They are modules with a `load_environment`. The client that such an
environment asks for the model's replies is a rayrl agent, so that each request is a turn; the
functions of its rubric are the scores, and their weights the rewards' weights. Functions that score
a whole group become group rewards: what they need of the siblings' states is kept as facts of the
episodes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.metadata
import inspect
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import verifiers as vf

from rayrl.config.registry import absolute, load_module
from rayrl.environment.environment import Environment
from rayrl.environment.group_reward import GroupReward
from rayrl.environment.randomness import EpisodeRandom
from rayrl.environment.schemes.verifiers.client import AgentClient
from rayrl.environment.schemes.verifiers.held_out import HELD_OUT, part
from rayrl.environment.schemes.verifiers.ids import module_name
from rayrl.environment.schemes.verifiers.rubric import (
    StopConditions,
    awaited,
    failed_functions,
    leaves,
    left_out,
    noting_failures,
    score_name,
    state_facts,
    state_of,
)
from rayrl.environment.signature import declare_keywords, fit, keyword_hints, plain_default
from rayrl.errors import ConfigError, EnvError, InfraError, describe_error, did_you_mean
from rayrl.types import Episode, Result, Task

__all__ = ["Example", "VerifiersEnvironment"]

_logger = logging.getLogger("verifiers")
if "VF_LOG_LEVEL" not in os.environ:  # at its INFO, each process says several lines per load
    _logger.setLevel(logging.WARNING)

_TAKEN = ("seed", "u", "held_out")  # settings and parameters of rayrl's
_loading = threading.RLock()


@dataclass(frozen=True, kw_only=True)
class Example(Task):
    """A row of an environment's dataset.

    Attributes:
        id: of the environment, as in `env.name`.
        args: arguments of its `load_environment` that are not its defaults, as plain data.
        row: the example, with its prompt, as plain data.
    """

    id: str
    args: Mapping[str, Any]
    row: Mapping[str, Any]


class VerifiersEnvironment(Environment):
    """An environment of verifiers. Its `args` are the arguments of `load_environment`.

    Args:
        name: as in `env.name=verifiers:NAME`.

    Raises:
        ConfigError: there is none, or it cannot be loaded with its default arguments.
    """

    def __init__(self, name: str) -> None:
        self.id = name
        self._function = _load_function(name)
        self._keywords = _keywords(self._function)
        super().__init__(
            _play,
            name=module_name(name),
            source=self._source(evaluates=False),
            eval_source=self._source(evaluates=True),
            rewards={},
            ref=f"verifiers:{name}",
        )
        self._set_up()

    def configure(
        self, args: Mapping[str, Any] | None = None, rewards: Mapping[str, float] | None = None
    ) -> Environment:
        """See `Environment.configure`; the rewards are those of the rubric with these arguments.

        Raises:
            ConfigError: also if the environment cannot be loaded with them.
        """
        new = super().configure(args)
        assert isinstance(new, VerifiersEnvironment)
        new._set_up()
        return super(VerifiersEnvironment, new).configure(None, rewards)

    def _set_up(self) -> None:
        """Take over the rubric's functions and weights, once no argument is missing."""
        settings = {key: value for key, value in self.args.items() if key in self._keywords}
        if inspect.Parameter.empty in settings.values():
            return
        loaded = _loaded(self.id, json.dumps(self._given(settings), sort_keys=True))
        _, chosen = self.configured
        self.rewards = {key: chosen.get(key, weight) for key, weight in loaded.rewards.items()}
        self.group_rewards = {
            key: GroupReward(group.function, chosen.get(key, group.weight))
            for key, group in loaded.group_rewards.items()
        }

    def _source(self, *, evaluates: bool) -> Callable[..., Task]:
        """The function that makes tasks, for training or for evaluation."""

        def examples(
            seed: int, u: float, *, held_out: float | None = None, **settings: Any
        ) -> Example:
            given = self._given(settings)
            loaded = _loaded(self.id, json.dumps(given, sort_keys=True))
            rows, members = loaded.rows(held_out, evaluates)
            row = _row(self.id, rows, members[int(u * len(members))])
            return Example(seed=seed, id=self.id, args=given, row=row)

        keywords = {key: (hint, default) for key, (_, hint, default) in self._keywords.items()}
        declare_keywords(examples, keywords)
        return examples

    def _given(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of `load_environment` that differ from its defaults, as plain data.

        Raises:
            ConfigError: one of them is not plain data.
        """
        given = {}
        for key, value in settings.items():
            name, _, default = self._keywords[key]
            if value is default or (type(value) is type(default) and bool(value == default)):
                continue
            try:
                given[name] = plain_default(value)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"env.args.{key} of verifiers:{self.id}: {error}") from None
        return given


# --- loading -------------------------------------------------------------------------------------


def _module(name: str) -> ModuleType:
    module, key = module_name(name), f"env.name=verifiers:{name}"
    file = Path(absolute(name))
    if not name.endswith(".py"):
        file = file / f"{module}.py"
    if name.endswith(".py") or file.is_file():
        return load_module("env.name", str(file))
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        if error.name != module:
            raise ConfigError(f"{key}: {module!r} could not be imported: {error}") from error
        raise ConfigError(
            f"{key}: there is no module {module!r}.{did_you_mean(module, _installed())} Install "
            "the environment's package, or give its file: verifiers:path/to/file.py"
        ) from None
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{key}: {module!r} could not be imported: {describe_error(error)}"
        ) from error
    wanted = name.partition("@")[2]
    have = _installed().get(module) if wanted else None
    if have and wanted != have:
        raise ConfigError(f"{key}: version {have} is installed. Install the other, or leave out @")
    return found


def _installed() -> dict[str, str]:
    """Versions of the packages that depend on verifiers, by their modules' usual names."""
    return {
        one.metadata["Name"].replace("-", "_"): one.version
        for one in importlib.metadata.distributions()
        if any(re.match(r"verifiers\b(?!-)", wanted) for wanted in one.requires or ())
    }


def _load_function(name: str) -> Callable[..., Any]:
    with _quiet():
        module = _module(name)
    function: Any = getattr(module, "load_environment", None)
    if not callable(function):
        raise ConfigError(
            f"env.name=verifiers:{name}: {module_name(name)!r} has no function load_environment. "
            "Tasksets of verifiers' v1 interface are played in a virtual environment of their own: "
            f"verifiers:VENV:{name}"
        )
    found: Callable[..., Any] = function
    return found


def _keywords(function: Callable[..., Any]) -> dict[str, tuple[str, Any, Any]]:
    """Name in `load_environment`, hint and default by the setting's name."""
    hints = keyword_hints(function)
    found: dict[str, tuple[str, Any, Any]] = {}
    for key, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            found[key] = key, dict[str, Any], {}
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            setting = f"env_{key}" if key in _TAKEN else key
            found[setting] = key, hints[key], parameter.default
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let environments be made without their signal handlers and progress bars.

    Each environment of verifiers takes over SIGINT and SIGTERM when it is made. Only a process's
    main thread may do so, and there rayrl's and Ray's own would be lost.
    """
    module: Any = sys.modules[vf.Environment.__module__]
    handled = SimpleNamespace(**{**vars(signal), "signal": lambda *_: None})
    with _loading:
        own, module.signal = module.signal, handled
        bars = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            module.signal = own
            if bars:
                datasets.enable_progress_bars()


@functools.lru_cache(64)
def _loaded(name: str, args: str) -> _Loaded:
    return _Loaded(name, json.loads(args))


class _Loaded:
    """An environment of verifiers, and what rayrl makes of its rubric.

    Args:
        name: of the environment.
        args: of `load_environment`, plain data.

    Attributes:
        rewards: weights of the scores by name.
        group_rewards: rewards over a group by name.
    """

    def __init__(self, name: str, args: Mapping[str, Any]) -> None:
        self.id = name
        function = _load_function(name)
        where = f"env.name=verifiers:{name}" + (f" with {dict(args)}" if args else "")
        # some make their data with the global generators: the same in every process
        with _quiet(), EpisodeRandom("verifiers", name, json.dumps(args, sort_keys=True)):
            try:
                self.environment = function(**_arguments(function, args))
            except ConfigError:
                raise
            except (Exception, SystemExit) as error:
                raise ConfigError(
                    f"{where} could not be loaded: {describe_error(error)}"
                ) from error
        self._check(where)
        self.environment._stop_conditions = [StopConditions(self.environment._stop_conditions)]
        self.environment.env_id = self.environment.env_id or module_name(name)
        self.environment.env_args = self.environment.env_args or dict(args)
        self._names: dict[str, str] = {}  # of scores, by those of functions
        self._scorers: list[Any] = []  # rubrics without functions over a group
        self._makes_reward = False
        self.rewards: dict[str, float] = {}
        self.group_rewards: dict[str, GroupReward] = {}
        self._take_rubric()
        self._members: dict[tuple[int, float, bool], Sequence[int]] = {}

    def _check(self, where: str) -> None:
        environment = self.environment
        if not isinstance(environment, vf.Environment):
            raise ConfigError(
                f"{where}: load_environment returned {type(environment).__name__}, which is no "
                "environment of verifiers' v0 interface"
            )
        if any(kind.__module__.startswith("verifiers.v1") for kind in type(environment).__mro__):
            raise ConfigError(
                f"{where}: load_environment returned one of verifiers' v1 interface. Name its "
                f"taskset in a virtual environment that has it: verifiers:VENV:{self.id}"
            )
        if not environment.score_rollouts:
            raise ConfigError(f"{where}: it does not score (score_rollouts=False)")
        members = getattr(environment, "env_map", {})
        if any(member.rubric.has_group_rewards for member in members.values()):
            raise ConfigError(
                f"{where}: members of it have functions over a group; train on these through a "
                "mixture, env.mix"
            )

    def _take_rubric(self) -> None:
        rubrics = list(leaves(self.environment.rubric))
        names = [name for leaf in rubrics for name in leaf._get_reward_func_names()]
        self._makes_reward = len(set(names)) < len(names) or any(
            type(leaf).score_rollout is not vf.Rubric.score_rollout for leaf in rubrics
        )
        if self._makes_reward:
            self.rewards["reward"] = 1.0
        for leaf in rubrics:
            weights = [*leaf._get_reward_weights()]
            functions = [*leaf._get_reward_funcs()]
            scorer = copy.copy(leaf)
            scorer.funcs, scorer.weights = [], []
            for function, weight in zip(functions, weights, strict=True):
                name = score_name(function.__name__)
                if leaf._is_group_func(function):
                    scores = functools.partial(self._group_scores, leaf, function)
                    self.group_rewards[name] = GroupReward(scores, float(weight))
                    continue
                scorer.funcs.append(noting_failures(function))
                scorer.weights.append(weight)
            names = scorer._get_reward_func_names()
            for k, name in enumerate(names):
                self._names.setdefault(name, score_name(name))
                weight = 0.0 if self._makes_reward else float(scorer.weights[k])
                self.rewards.setdefault(self._names[name], weight)
            if names or type(leaf).score_rollout is not vf.Rubric.score_rollout:
                self._scorers.append(scorer)
        self.rewards.setdefault("failed_functions", 0.0)
        for name in self.group_rewards:
            self.rewards.pop(name, None)

    # --- tasks -----------------------------------------------------------------------------------

    def rows(self, held_out: float | None, evaluates: bool) -> tuple[Any, Sequence[int]]:
        """A dataset, and the numbers of its rows that training or evaluation plays.

        Raises:
            ConfigError: there are none.
        """
        has_own = self.environment.eval_dataset_source is not None
        has_training = self.environment.dataset_source is not None
        where = f"verifiers:{self.id}"
        if held_out is not None and not 0 < held_out < 1:
            raise ConfigError(f"env.args.held_out={held_out}: must lie between 0 and 1")
        if held_out is not None and has_own and has_training:
            raise ConfigError(
                f"env.args.held_out={held_out}: {where} has a dataset for evaluation; leave it out"
            )
        if held_out is None and has_own and not has_training and not evaluates:
            raise ConfigError(
                f"{where} has a dataset for evaluation only. env.args.held_out=0.2, say, keeps "
                "that share of it for evaluation and gives the rest to training."
            )
        try:
            with _quiet(), EpisodeRandom("verifiers", self.id, "rows", evaluates and has_own):
                own = has_own and (evaluates or not has_training)
                environment = self.environment
                dataset = environment.get_eval_dataset() if own else environment.get_dataset()
        except (Exception, SystemExit) as error:
            raise ConfigError(f"{where}: its dataset: {describe_error(error)}") from error
        share = HELD_OUT if held_out is None else held_out
        if held_out is None and has_own:
            share = 0.0
        key = len(dataset), share, evaluates
        if key not in self._members:
            self._members[key] = part(len(dataset), share, evaluates)
        if not self._members[key]:
            raise ConfigError(f"{where}: its dataset is empty")
        return dataset, self._members[key]

    # --- scores ----------------------------------------------------------------------------------

    async def scores(self, state: Any) -> dict[str, float]:
        """What the functions of the rubric say of an episode, apart from those over a group."""
        reward, metrics = 0.0, dict.fromkeys(self._names.values(), 0.0)
        failed: list[str] = []
        token = failed_functions.set(failed)
        try:
            for scorer in self._scorers:
                await scorer.score_rollout(state)
                reward += state["reward"] or 0.0
                for name, value in (state["metrics"] or {}).items():
                    if name in self._names:
                        metrics[self._names[name]] += value
        finally:
            failed_functions.reset(token)
        state["reward"], state["metrics"] = reward, metrics
        scores = {**metrics, "failed_functions": float(len(failed))}
        if self._makes_reward:
            scores["reward"] = reward
        return {name: scores[name] for name in self.rewards}

    def facts(self, state: Any) -> dict[str, Any]:
        """What is to be known of an episode, for functions over a group its state as plain data."""
        facts = {key: state.get(key) for key in ("stop_condition", "is_truncated")}
        return {**facts, "state": state_facts(state)} if self.group_rewards else facts

    def _group_scores(
        self, rubric: Any, function: Callable[..., Any], episodes: Sequence[Episode]
    ) -> list[float]:
        states = [state_of(episode) for episode in episodes]
        objects = rubric.group_score_objects(states)
        parameters = inspect.signature(function).parameters
        if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
            objects = {key: value for key, value in objects.items() if key in parameters}
        try:
            return list(awaited(function(**objects)))
        except Exception as error:
            missing = sorted({name for episode in episodes for name in left_out(episode)})
            if not missing:
                raise
            raise EnvError(
                f"{describe_error(error)}. Of the states, {', '.join(missing)} are no plain data "
                "and are not known to functions over a group."
            ) from error


def _arguments(function: Callable[..., Any], args: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data as what `load_environment` takes."""
    hints = keyword_hints(function)
    arguments: dict[str, Any] = {}
    for key, parameter in inspect.signature(function).parameters.items():
        if key in args and parameter.kind is parameter.VAR_KEYWORD:
            arguments |= args[key]
        elif key in args:
            arguments[key] = fit(args[key], hints[key])
    return arguments


def _row(name: str, rows: Any, number: int) -> dict[str, Any]:
    row = dict(rows[number])
    for column, value in row.items():
        try:
            same = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError):
            same = False
        if not same:
            raise ConfigError(
                f"verifiers:{name}: column {column!r} of its dataset holds {value!r:.200}, which "
                "is no plain data, and a task must travel as JSON"
            )
    return row


# --- playing -----------------------------------------------------------------------------------


async def _play(task: Example, agent: Any) -> Result:
    loaded = _loaded(task.id, json.dumps(task.args, sort_keys=True))
    environment = loaded.environment
    with EpisodeRandom("verifiers", task.seed):  # siblings meet the same luck
        state = await environment.rollout(dict(task.row), AgentClient(agent), "rayrl", {})
        try:
            if state.get("error") is not None:
                raise _error(state["error"])
            scores = await loaded.scores(state)
            return Result(scores, loaded.facts(state))
        finally:
            await environment.rubric.cleanup(state)


def _error(error: BaseException) -> Exception:
    """An episode's error as rayrl's, with its causes."""
    kind = InfraError if isinstance(error, vf.InfraError) else EnvError
    said: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(said) < 5:
        said.append(describe_error(cause))
        cause = cause.__cause__ or cause.__context__
    new = kind(", caused by ".join(said))
    new.__cause__ = error
    return new
