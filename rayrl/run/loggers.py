"""Where people watch a run: TensorBoard and Weights & Biases, each imported when it is used."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping
from pathlib import Path

from rayrl.config import Config, to_dict
from rayrl.errors import ConfigError

__all__ = ["TensorBoard", "Wandb"]


class TensorBoard:
    """Scalars in TensorBoard's own format, without importing torch.

    Args:
        folder: where its file goes.
        forget_from: first step that an earlier process's file no longer counts for.
    """

    def __init__(self, folder: Path, forget_from: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event = Event
        self._writer = EventFileWriter(str(folder))
        self.close = weakref.finalize(self, self._writer.close)
        start = SessionLog(status=SessionLog.START)  # what an earlier process wrote from here on
        self._writer.add_event(Event(wall_time=time.time(), step=forget_from, session_log=start))

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add the numbers of a step; they are on the disk when this returns."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        summary = Summary(value=values)
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()


class Wandb:
    """A run at Weights & Biases.

    Raises:
        ConfigError: wandb is not installed.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"run.wandb_project={config.run.wandb_project}: wandb is not installed; "
                "pip install 'rayrl[wandb]', or leave the setting empty."
            ) from error
        self._run = wandb.init(
            project=config.run.wandb_project,
            name=config.run.name,
            dir=str(folder),
            config=to_dict(config),
        )

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add the numbers of a step."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()
