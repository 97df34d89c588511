"""Training, evaluation and data from Python: what the command line's verbs do, as functions.

`train`, `sft`, `synth` and `evaluate` each have an async twin. The plain ones also work inside a
running event loop (Jupyter): they run in their own thread and block the caller until they are done.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from rayrl.config import Config
from rayrl.config.load import with_settings
from rayrl.config.registry import bind
from rayrl.environment.environment import Environment, PlayerFunction
from rayrl.environment.registry import reference_of
from rayrl.errors import ConfigError
from rayrl.types import Episode

if TYPE_CHECKING:
    from rayrl.learner.advantage import Advantage
    from rayrl.learner.loss import Loss
    from rayrl.report.statistics import Statistic
    from rayrl.report.table import Result
    from rayrl.run.loggers import LogFunction, Logger
    from rayrl.run.training import StepControl, Training

__all__ = [
    "Evaluation",
    "Run",
    "SynthRun",
    "evaluate",
    "evaluate_async",
    "load_config",
    "open_training",
    "sft",
    "sft_async",
    "synth",
    "synth_async",
    "train",
    "train_async",
]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: its folder.
        config: its settings.
    """

    path: Path
    config: Config

    @functools.cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The metrics of every step, oldest first, each with its `step`; null is None."""
        from rayrl.run.files import read_jsonl

        file = self.path / "metrics.jsonl"
        return read_jsonl(file) if file.is_file() else []

    def best(self, metric: str = "reward", *, lowest: bool = False) -> dict[str, Any]:
        """The metrics of the step where `metric` was highest, or lowest.

        Raises:
            ConfigError: no step has it.
        """
        rows = [row for row in self.metrics if row.get(metric) is not None]
        if not rows:
            known = sorted({name for row in self.metrics for name in row})
            raise ConfigError(f"{metric!r} is no metric of {self.path}; it has {', '.join(known)}.")
        return (min if lowest else max)(rows, key=lambda row: row[metric])

    @property
    def model_path(self) -> Path:
        """The trained model: a Hugging Face directory."""
        return self.path / "model"

    @property
    def best_model_path(self) -> Path:
        """The best model by `run.keep_best`: a Hugging Face directory."""
        return self.path / "model_best"

    def episodes(self, step: int | None = None) -> Iterator[Episode]:
        """Episodes that were written (`run.episodes_every`): of one step, or all in order.

        Raises:
            DataError: those of this step were not written, or a file is damaged.
        """
        from rayrl.rollout.episode_io import read_episodes

        folder = self.path / "episodes"
        pattern = "*.jsonl" if step is None else f"step_{step:06d}.jsonl"
        for file in sorted(folder.glob(pattern)) or [folder / pattern]:
            yield from read_episodes(file)


@dataclass(frozen=True)
class SynthRun(Run):
    """A finished `synth`.

    Attributes:
        file: episodes that were kept, as `sft` reads them.
    """

    file: Path

    def episodes(self, step: int | None = None) -> Iterator[Episode]:
        """Episodes that were kept; they have no steps."""
        from rayrl.rollout.episode_io import read_episodes

        yield from read_episodes(self.file)


@dataclass(frozen=True)
class Evaluation(Run):
    """A finished evaluation; `print` shows its table.

    Attributes:
        result: statistics with intervals by cell, and what exhaustive checks counted.
    """

    result: Result

    def __str__(self) -> str:
        from rayrl.report.table import markdown

        return markdown([self.result])

    @property
    def statistics(self) -> Mapping[str, Statistic]:
        """Statistics of the only cell by name, each with its `value` and `interval`.

        Raises:
            ConfigError: there are several cells; see `result.cells`.
        """
        if len(self.result.cells) > 1:
            names = [*self.result.cells]
            raise ConfigError(
                f"this evaluation has several cells ({', '.join(names)}); choose one, as "
                f"result.cells[{names[0]!r}].statistics."
            )
        (cell,) = self.result.cells.values()
        return cell.statistics


def load_config(*settings: str, config_dir: str | Path | None = None) -> Config:
    """A configuration as the command line composes it: `load_config("experiment=tictactoe")`.

    Args:
        settings: `key=value`, in Hydra's grammar.
        config_dir: folder with groups of your own.

    Raises:
        ConfigError: naming what is unknown or wrong, and the nearest that is right.
    """
    from rayrl.cli import compose

    return compose(settings, Path(config_dir) if config_dir else None)


async def train_async(
    config: Config | None = None,
    *,
    env: Environment | str | None = None,
    mix: Mapping[str, Environment | str | Mapping[str, Any]] | None = None,
    model: str | Path | None = None,
    steps: int | None = None,
    name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    seats: Mapping[str, str | PlayerFunction] | None = None,
    loss: Loss | str | None = None,
    advantage: Advantage | str | None = None,
    loggers: Sequence[str | Logger | LogFunction] = (),
    on_step: Callable[[StepControl], object] | None = None,
) -> Run:
    """Train a model on an environment by reinforcement; resumes a run of the same name.

    Args:
        config: settings to begin with; the others here are set over it, `settings` last. None: the
            defaults.
        env: an environment, or as `env.name`. One that is defined in a script or a notebook cell
            travels to env workers by value.
        mix: several environments instead, as `env.mix`: by name, each an environment as `env`, or a
            mapping of its settings, as `{"name": addition, "weight": 2}`. Players in its `seats`
            may be functions too.
        model: `model.path`: a Hugging Face directory, or "embedded".
        steps: `train.steps`.
        name: `run.name`; by default ENV-train. The run's folder is runs/NAME, unless `run.dir`
            says otherwise.
        settings: any others by dotted key, as `{"train.groups": 8, "learner.lr": 1e-4}`.
        seats: who plays each, as `env.seats`, or a function `(messages, rng) -> str`, which travels
            to env workers by value.
        loss: a function `(LossInputs) -> LossOutputs`, or as `algo.loss`.
        advantage: a function `(AdvantageInputs) -> (G, turns)`, or as `algo.advantage`.
        loggers: besides `run.loggers`: names, `rayrl.Logger` objects, or functions
            `(step, metrics)`.
        on_step: called after every step, before it is logged, and again for steps that are made
            again because the learner was lost; see `StepControl`. May be a coroutine function.

    Raises:
        ConfigError: a setting is unknown, wrong or cannot work here.
        RunFailed: the environment, the cluster or the numerics failed.
    """
    from rayrl import loop

    more = {
        "model.path": model,
        "train.steps": steps,
        "algo.loss": _reference("algo.loss", loss),
        "algo.advantage": _reference("algo.advantage", advantage),
    }
    more |= _players(seats)
    built = configure("train", config, env, name, {**(settings or {}), **_given(more)}, mix)
    await loop.train(built, loggers=loggers, on_step=on_step)
    return Run(Path(built.run.dir), built)


async def sft_async(
    config: Config | None = None,
    *,
    data: str | Path | None = None,
    model: str | Path | None = None,
    steps: int | None = None,
    env: Environment | str | None = None,
    mix: Mapping[str, Environment | str | Mapping[str, Any]] | None = None,
    name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    loggers: Sequence[str | Logger | LogFunction] = (),
) -> Run:
    """Fine-tune a model on episodes or chats, supervised; resumes a run of the same name.

    Args:
        data: `sft.data`: episodes in a JSONL file, as `synth` writes them, or data with a column
            of messages; that needs no `env`.
        steps: `sft.steps`.

    The other arguments and what is raised: see `train`.
    """
    from rayrl.commands import sft as verb

    more = _given({"sft.data": data, "model.path": model, "sft.steps": steps})
    built = configure("sft", config, env, name, {**(settings or {}), **more}, mix)
    await verb.sft(built, loggers=loggers)
    return Run(Path(built.run.dir), built)


async def evaluate_async(
    config: Config | None = None,
    *,
    env: Environment | str | None = None,
    mix: Mapping[str, Environment | str | Mapping[str, Any]] | None = None,
    model: str | Path | None = None,
    player: str | PlayerFunction | None = None,
    episodes: int | None = None,
    name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    seats: Mapping[str, str | PlayerFunction] | None = None,
) -> Evaluation:
    """Play an environment without learning, on tasks that training does not see.

    Args:
        player: `eval.player`: "model", "endpoint" (a server, see `endpoint.url`), a player of the
            environment, or a function as one of `seats`.
        episodes: `eval.episodes`, per cell.

    The other arguments and what is raised: see `train`.
    """
    from rayrl.commands import evaluate as verb

    more = {"model.path": model, "eval.episodes": episodes} | _players(seats)
    more["eval.player"] = _reference("eval.player", player)
    built = configure("eval", config, env, name, {**(settings or {}), **_given(more)}, mix)
    result = await verb.evaluate(built)
    return Evaluation(Path(built.run.dir), built, result)


async def synth_async(
    config: Config | None = None,
    *,
    env: Environment | str | None = None,
    mix: Mapping[str, Environment | str | Mapping[str, Any]] | None = None,
    player: str | PlayerFunction | None = None,
    episodes: int | None = None,
    keep: Mapping[str, float] | None = None,
    name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    seats: Mapping[str, str | PlayerFunction] | None = None,
) -> SynthRun:
    """Play a teacher and keep its good episodes, for `sft`.

    Args:
        player: `synth.player`: a player of the environment, "model", "endpoint", or a function as
            one of `seats`.
        episodes: `synth.episodes`: how many to play.
        keep: `synth.keep`: by name of a score, the least value an episode must have.

    The other arguments and what is raised: see `train`.
    """
    from rayrl.commands import synth as verb

    more = {"synth.episodes": episodes, "synth.keep": keep} | _players(seats)
    more["synth.player"] = _reference("synth.player", player)
    built = configure("synth", config, env, name, {**(settings or {}), **_given(more)}, mix)
    made = await verb.synth(built)
    return SynthRun(Path(built.run.dir), built, made.file)


@asynccontextmanager
async def open_training(
    config: Config | None = None,
    *,
    env: Environment | str | None = None,
    mix: Mapping[str, Environment | str | Mapping[str, Any]] | None = None,
    model: str | Path | None = None,
    steps: int | None = None,
    name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    seats: Mapping[str, str | PlayerFunction] | None = None,
    loggers: Sequence[str | Logger | LogFunction] = (),
) -> AsyncIterator[Training]:
    """A training run for a loop of one's own: env workers, replicas and a learner, all started.

        async with rayrl.open_training(env=addition) as t:
            for step in range(t.start, t.steps):
                groups = await t.collect(step)
                batch = rayrl.make_batch(groups, my_advantages(groups))
                learned = await t.learner.step(batch, loss=my_loss)
                await t.push(step + 1)
                await t.end_step(step, batch, learned)
            await t.finish()

    The arguments and what is raised: see `train`.
    """
    from rayrl.config import validate
    from rayrl.run import training as run_training
    from rayrl.run.folder import RunDir
    from rayrl.run.start_check import check_start

    more = _given({"model.path": model, "train.steps": steps} | _players(seats))
    built = configure("train", config, env, name, {**(settings or {}), **more}, mix)
    validate(built, "train")
    check_start(built, "train")
    with RunDir(built.run.dir, built, begin=False, loggers=loggers, verb="train") as folder:
        async with (
            run_training.open_training(built, folder) as training,
            aclosing(training.attempts()) as attempts,
        ):
            await anext(attempts)  # the replicas have the learner's weights, and play
            yield training


def configure(
    verb: str,
    config: Config | None,
    env: Environment | str | None,
    name: str | None,
    settings: Mapping[str, Any],
    mix: Mapping[str, Environment | str | Mapping[str, Any]] | None = None,
) -> Config:
    """The checked configuration of a call."""
    from rayrl.commands.folder_names import named

    if config is not None and not isinstance(config, Config):
        raise ConfigError(
            f"{config!r} is no Config, as rayrl.load_config gives one; pass an environment as env=."
        )
    if mix is not None and not isinstance(mix, Mapping):
        raise ConfigError(f"mix={mix!r} is no mapping of names to environments")
    changes = _environment("env", env) if env is not None else {}
    if mix is not None and env is None:
        changes["env.name"] = ""
    for component, given in (mix or {}).items():
        changes |= _component(component, given)
    changes |= settings
    if name is not None:
        changes["run.name"] = name
    return named(with_settings(config or Config(), changes), changes, verb)


def _environment(key: str, env: Environment | str) -> dict[str, Any]:
    """Settings that stand for an environment, in the section `key`."""
    if isinstance(env, str):
        return {f"{key}.name": env}
    if not isinstance(env, Environment):
        raise ConfigError(f"{key}={env!r}: decorate its coroutine with @rayrl.env.")
    args, rewards = env.configured
    return {
        f"{key}.name": reference_of(env, "" if key == "env" else key.rpartition(".")[2]),
        **{f"{key}.args.{name}": value for name, value in args.items()},
        **{f"{key}.rewards.{name}": value for name, value in rewards.items()},
    }


def _component(name: str, given: Environment | str | Mapping[str, Any]) -> dict[str, Any]:
    """Settings that stand for one environment of a mixture."""
    key = f"env.mix.{name}"
    if not isinstance(given, Mapping):
        return _environment(key, given)
    rest = {one: value for one, value in given.items() if one not in ("name", "seats")}
    seats = {
        seat: bind(f"env.seats.{seat}", who, f"{name}_{getattr(who, '__name__', 'player')}")
        if callable(who)
        else who
        for seat, who in given.get("seats", {}).items()
    }
    return {
        **_environment(key, given.get("name", "")),
        **{f"{key}.{one}": value for one, value in rest.items()},
        **({f"{key}.seats": seats} if seats else {}),
    }


def _given(changes: Mapping[str, Any]) -> dict[str, Any]:
    plain = {
        key: str(value) if isinstance(value, Path) else value for key, value in changes.items()
    }
    return {key: value for key, value in plain.items() if value is not None}


def _players(seats: Mapping[str, str | PlayerFunction] | None) -> dict[str, Any]:
    keys = {f"env.seats.{seat}": who for seat, who in (seats or {}).items()}
    return {key: _reference(key, who) for key, who in keys.items()}


def _reference(key: str, given: str | Callable[..., Any] | None) -> str | None:
    return bind(key, given) if callable(given) else given


def _blocking(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """The function as one that blocks until it is done, also inside a running event loop."""

    @functools.wraps(function)
    def call(*args: P.args, **keywords: P.kwargs) -> T:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(function(*args, **keywords))
        return _in_thread(function(*args, **keywords))

    call.__name__ = call.__qualname__ = function.__name__.removesuffix("_async")
    return call


def _in_thread(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on an event loop of its own, while the caller's waits for it."""
    outcome: Future[T] = Future()
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[T]]] = Future()

    async def watched() -> T:
        task = asyncio.ensure_future(work)
        started.set_result((asyncio.get_running_loop(), task))
        return await task

    def run() -> None:
        try:
            outcome.set_result(asyncio.run(watched()))
        except asyncio.CancelledError:
            outcome.set_exception(KeyboardInterrupt())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,))
    thread.start()
    try:
        return outcome.result()
    except KeyboardInterrupt:  # the cell was interrupted: end what it started, in order
        loop, task = started.result()
        with suppress(RuntimeError):  # it has ended meanwhile
            loop.call_soon_threadsafe(task.cancel)
        thread.join()
        raise


train = _blocking(train_async)
sft = _blocking(sft_async)
evaluate = _blocking(evaluate_async)
synth = _blocking(synth_async)
