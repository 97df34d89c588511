"""Monitoring of a training run: alarms, timeline, telemetry and pauses.

`observe` after each step, `pause_or_stop` before each:

    RUN/alarms.jsonl     one line per raised alarm
    RUN/timeline.jsonl   one line per step, see `metrics.py`
    RUN/PAUSED           exists while the run is paused; removing it resumes the run
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayrl.cluster.telemetry import Telemetry
from rayrl.config import Config
from rayrl.errors import RunFailed
from rayrl.run.alarms import ALARMS, Alarm, Row, alarm_rules, relevant_rows
from rayrl.run.files import read_jsonl, write_atomic
from rayrl.run.metrics import TIMELINE, timeline_row

if TYPE_CHECKING:
    from rayrl.cluster.rollouts import CollectedGroups
    from rayrl.run.folder import RunDir
    from rayrl.run.metrics import Clock

__all__ = ["ALARMS", "PAUSED", "Monitor"]

PAUSED = "PAUSED"
POLL_S = 1.0  # between checks whether PAUSED still exists


class Monitor:
    """Watches the metrics of a run; a context manager.

    An alarm is raised when its metric has been out of bounds for as many steps as its patience, and
    again only after the metric was within bounds. Steps that did not measure the metric are
    skipped. A resumed run remembers the metrics of earlier steps, but counts patience from zero.

    Args:
        config: `alarms`, and the settings that some rules depend on.
        folder: the run's folder, after `RunDir.begin`.
        notify: called with each message for the user.
    """

    def __init__(self, config: Config, folder: RunDir, notify: Callable[[str], None]) -> None:
        cfg = config.alarms
        self._cfg, self._notify, self._folder, self._path = cfg, notify, folder, folder.path
        self._rules = alarm_rules(
            cfg,
            kl_coef=config.algo.kl_coef,
            max_lag=config.train.max_lag,
            components=tuple(config.env.mix),
        )
        self._telemetry = Telemetry(config.run.name)
        self.rewind()

    def rewind(self) -> None:
        """Restore the state after the last step in the folder's metrics; drop later alarms."""
        self._rows: list[Row] = relevant_rows(list(self._folder.metrics()), self._cfg)
        self._streaks = {rule.label: 0 for rule in self._rules}  # consecutive steps out of bounds
        self._halting: list[Alarm] = []
        start = int(self._rows[-1]["step"] or 0) + 1 if self._rows else 0
        for name in (ALARMS, TIMELINE):
            _drop_rows(self._path / name, start)

    def __enter__(self) -> Monitor:
        self._telemetry.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._telemetry.__exit__(*error)

    def observe(
        self, step: int, metrics: Mapping[str, float], clock: Clock, played: CollectedGroups
    ) -> list[Alarm]:
        """Record a finished step; return the alarms it raises."""
        self._rows = relevant_rows([*self._rows, metrics], self._cfg)
        raised = []
        for rule in self._rules:
            value = rule.measure(self._rows)
            if value is None:
                continue
            self._streaks[rule.label] = self._streaks[rule.label] + 1 if rule.is_out(value) else 0
            if self._streaks[rule.label] == rule.setting.patience:
                raised.append(Alarm(rule, step, value))
        for alarm in raised:
            _append(self._path / ALARMS, alarm.to_json())
            self._notify(f"step {step + 1}: {alarm}")
        self._halting = [a for a in raised if a.rule.setting.action in ("pause", "stop")]
        _append(
            self._path / TIMELINE,
            timeline_row(step, clock.spans, (*played.groups, *played.dropped, *played.rejected)),
        )
        self._telemetry.publish(step, metrics, self.alarms())
        return raised

    def alarms(self) -> dict[str, bool]:
        """Tell by alarm whether it has been out of bounds for its patience or longer."""
        return {
            rule.label: self._streaks[rule.label] >= rule.setting.patience for rule in self._rules
        }

    @property
    def will_halt(self) -> bool:
        """Whether `pause_or_stop` will halt the run, so that a checkpoint is due."""
        return bool(self._halting) or self._paused.exists()

    async def pause_or_stop(self) -> None:
        """Perform the actions of raised alarms; return when the next step may begin.

        Users may create RUN/PAUSED too: the run pauses after its current step.

        Raises:
            RunFailed: an alarm stops the run.
        """
        stops = [a for a in self._halting if a.rule.setting.action == "stop"]
        pauses = [a for a in self._halting if a.rule.setting.action == "pause"]
        self._halting = []
        if stops:
            text = "\n".join(map(str, stops))
            key = f"alarms.{stops[0].rule.name}"
            raise RunFailed(
                f"stopped after step {stops[0].step + 1} by {key}.action=stop.\n{text}\nThe same "
                f"command resumes from there. All of {key} may be changed for that, as "
                f"{key}.action=log."
            )
        if pauses:
            text = "".join(f"step {alarm.step + 1}: {alarm}\n" for alarm in pauses)
            write_atomic(self._paused, f"{text}Remove this file to resume.\n".encode())
        if pauses or self._paused.exists():  # it may have been removed by now
            self._notify(f"paused; remove {self._paused} to resume")
            while self._paused.exists():  # noqa: ASYNC110  # no event tells that a file is gone
                await asyncio.sleep(POLL_S)
            self._notify("resumed")

    @property
    def _paused(self) -> Path:
        return self._path / PAUSED


def _append(file: Path, row: Mapping[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(row, allow_nan=False) + "\n")


def _drop_rows(file: Path, step: int) -> None:
    """Drop the rows from `step` on, which will be written again, and a torn last line."""
    if not file.is_file():
        return
    text = file.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    steps = [int(row.get("step", 0)) for row in read_jsonl(file, whole)]
    lines = whole.splitlines(keepends=True)
    kept = b"".join(line for line, at in zip(lines, steps, strict=True) if at < step)
    if kept != text:
        write_atomic(file, kept)
