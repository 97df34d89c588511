"""Loggers of metrics besides RUN/metrics.jsonl; their libraries are imported on use."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO, runtime_checkable

from rayrl.config import Config, to_dict
from rayrl.config.registry import Registry
from rayrl.errors import ConfigError

__all__ = ["LOGGERS", "Jsonl", "LogFunction", "Logger", "TensorBoard", "Wandb", "make_loggers"]

LogFunction = Callable[[int, Mapping[str, float]], object]
"""Called with the step and its metrics."""


@runtime_checkable
class Logger(Protocol):
    """Receives the metrics of every step."""

    def open(self, folder: Path, config: Config, first_step: int) -> None:
        """Called once, when the run begins.

        Args:
            folder: the run's folder.
            first_step: metrics that earlier processes logged from this step on are obsolete.
        """

    def log(self, step: int, metrics: Mapping[str, float], /) -> None:
        """Called with the metrics that were measured at a step."""

    def close(self) -> None:
        """Called when the run ends or fails."""


LOGGERS: Registry[Callable[..., Any]] = Registry("run.loggers")


@LOGGERS.register("tensorboard")
class TensorBoard:
    """Write scalars to RUN/tensorboard without importing torch."""

    def open(self, folder: Path, config: Config, first_step: int) -> None:
        """Open an event file; see `Logger.open`."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event = Event
        self._writer = EventFileWriter(str(folder / "tensorboard"))
        start = SessionLog(status=SessionLog.START)  # hides later steps of earlier files
        self._writer.add_event(Event(wall_time=time.time(), step=first_step, session_log=start))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step and flush them to the file."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        summary = Summary(value=values)
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


@LOGGERS.register("wandb")
class Wandb:
    """Log to Weights & Biases.

    Args:
        project: W&B project; by default `run.wandb_project`.
    """

    def __init__(self, project: str = "") -> None:
        self.project = project

    def open(self, folder: Path, config: Config, first_step: int) -> None:
        """Start the W&B run; see `Logger.open`.

        Raises:
            ConfigError: wandb is not installed, or no project is set.
        """
        project = self.project or config.run.wandb_project
        if not project:
            raise ConfigError("run.loggers has wandb, but run.wandb_project is empty; name one.")
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"run.wandb_project={project}: wandb is not installed; "
                "pip install 'rayrl[wandb]', or leave the setting empty."
            ) from error
        self._run = wandb.init(
            project=project, name=config.run.name, dir=str(folder), config=to_dict(config)
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Upload the remaining metrics and end the W&B run."""
        self._run.finish()


class Jsonl:
    """Append `{"step": …, NAME: VALUE, …}` to another file than RUN/metrics.jsonl, a line per step.

    Unlike RUN/metrics.jsonl it is not truncated when a run resumes.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self._out: TextIO | None = None

    def open(self, folder: Path, config: Config, first_step: int) -> None:
        """Open the file to append; see `Logger.open`."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._out = self.file.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the line of a step."""
        assert self._out is not None
        self._out.write(json.dumps({"step": step, **metrics}) + "\n")
        self._out.flush()

    def close(self) -> None:
        """Close the file."""
        if self._out is not None:
            self._out.close()


class _Function:
    """A function as a logger."""

    def __init__(self, function: LogFunction) -> None:
        self._function = function

    def open(self, folder: Path, config: Config, first_step: int) -> None:
        """Nothing to open."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._function(step, metrics)

    def close(self) -> None:
        """Nothing to close."""


def make_loggers(config: Config, more: Sequence[str | Logger | LogFunction] = ()) -> list[Logger]:
    """Make the loggers of `run.loggers`, W&B if `run.wandb_project` is set, and `more`.

    Args:
        more: names as in `run.loggers`, loggers, or functions `(step, metrics)`.

    Raises:
        ConfigError: a name is unknown, or a value is neither a logger nor a function.
    """
    if isinstance(more, str) or not isinstance(more, Sequence):
        raise ConfigError(f"loggers={more!r}: give a list, as [{more!r}].")
    names = [*config.run.loggers, *(value for value in more if isinstance(value, str))]
    others = [value for value in more if not isinstance(value, str)]
    if config.run.wandb_project and not any(isinstance(value, Wandb) for value in others):
        names.append("wandb")
    return [_logger(value) for value in (*dict.fromkeys(names), *others)]


def _logger(value: str | Logger | LogFunction) -> Logger:
    logger: Any = LOGGERS.resolve(value) if isinstance(value, str) else value
    if isinstance(logger, type):
        try:
            logger = logger()
        except TypeError as error:
            raise ConfigError(
                f"loggers: {value!r} needs arguments ({error}); pass an object of it."
            ) from error
    if isinstance(logger, Logger):
        return logger
    if not callable(logger) or inspect.iscoroutinefunction(logger):
        raise ConfigError(
            f"loggers: {value!r} is neither a name, nor a rayrl.Logger, nor a plain "
            "function (step, metrics)."
        )
    return _Function(logger)
