"""Loggers of metrics: TensorBoard and Weights & Biases, each imported when it is used."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping
from pathlib import Path

from rayrl.config import Config, to_dict
from rayrl.errors import ConfigError

__all__ = ["TensorBoard", "Wandb"]


class TensorBoard:
    """Write scalars in TensorBoard's format without importing torch.

    Args:
        folder: folder of the event file.
        purge_step: first step whose values in earlier processes' files TensorBoard discards.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event = Event
        self._writer = EventFileWriter(str(folder))
        self.close = weakref.finalize(self, self._writer.close)
        start = SessionLog(status=SessionLog.START)  # discards earlier values from this step on
        self._writer.add_event(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step and flush them to the file."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        summary = Summary(value=values)
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()


class Wandb:
    """Log to Weights & Biases.

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

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Upload the remaining metrics and end the W&B run."""
        self._run.finish()
