"""A training run watches itself: what it raises alarms for, where its time went, and who may know.

`look` after each step, `go_on` before each:

    RUN/alarms.jsonl     one line an alarm that was raised
    RUN/timeline.jsonl   one line per step, see `timeline.py`
    RUN/PAUSED           there while the run is paused; who removes it lets the run go on
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayrl.cluster.telemetry import Telemetry
from rayrl.config import Config
from rayrl.errors import RunFailed
from rayrl.run.alarms import ALARMS, Alarm, Row, needed, rules
from rayrl.run.files import read_lines, write_atomic
from rayrl.run.timeline import TIMELINE, timeline_row

if TYPE_CHECKING:
    from rayrl.cluster.rollouts import CollectedGroups
    from rayrl.run.folder import RunDir
    from rayrl.run.metrics import Clock

__all__ = ["ALARMS", "PAUSED", "Monitor"]

PAUSED = "PAUSED"
LOOK_EVERY_S = 1.0  # whether the file is still there


class Monitor:
    """What a run watches in itself, to be used in a `with` block.

    An alarm is raised when it has been out of bounds for its patience, and again only after it was
    within them. Steps at which its figure was not measured count neither way. A run that is resumed
    knows its earlier steps, but counts anew: what it was stopped for has to last again.

    Args:
        config: `alarms`, and what some of them depend on.
        folder: the run's; opened, so that its metrics are cut back to its checkpoint.
        say: called with a line for people.
    """

    def __init__(self, config: Config, folder: RunDir, say: Callable[[str], None]) -> None:
        cfg = config.alarms
        self._cfg, self._say, self._folder, self._path = cfg, say, folder, folder.path
        self._rules = rules(cfg, kl_coef=config.algo.kl_coef, max_lag=config.train.max_lag)
        self._telemetry = Telemetry(config.run.name)
        self.rewind()

    def rewind(self) -> None:
        """Know the steps that the folder's metrics know, and no others."""
        self._rows: list[Row] = needed(list(self._folder.metrics()), self._cfg)
        self._out = {rule.name: 0 for rule in self._rules}  # steps in a row
        self._halting: list[Alarm] = []
        start = int(self._rows[-1]["step"] or 0) + 1 if self._rows else 0
        for name in (ALARMS, TIMELINE):
            _cut(self._path / name, start)

    def __enter__(self) -> Monitor:
        self._telemetry.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._telemetry.__exit__(*error)

    def look(
        self, step: int, metrics: Mapping[str, float], clock: Clock, played: CollectedGroups
    ) -> list[Alarm]:
        """Look at a finished step; returns what is raised at it."""
        self._rows = needed([*self._rows, metrics], self._cfg)
        raised = []
        for rule in self._rules:
            value = rule.measure(self._rows)
            if value is None:
                continue
            self._out[rule.name] = self._out[rule.name] + 1 if rule.is_out(value) else 0
            if self._out[rule.name] == rule.setting.patience:
                raised.append(Alarm(rule, step, value))
        for alarm in raised:
            _append(self._path / ALARMS, alarm.to_json())
            self._say(f"step {step + 1}: {alarm}")
        self._halting = [a for a in raised if a.rule.setting.action in ("pause", "stop")]
        _append(
            self._path / TIMELINE,
            timeline_row(step, clock.spans, (*played.groups, *played.dropped)),
        )
        self._telemetry.publish(step, metrics, self.alarms())
        return raised

    def alarms(self) -> dict[str, bool]:
        """Which alarms are on: out of bounds for as long as their patience, or longer."""
        return {rule.name: self._out[rule.name] >= rule.setting.patience for rule in self._rules}

    @property
    def halting(self) -> bool:
        """Whether `go_on` will not go on: now is the time for a checkpoint."""
        return bool(self._halting) or self._paused.exists()

    async def go_on(self) -> None:
        """Return when the next step may begin: at once, or when nobody pauses the run any more.

        A person may create RUN/PAUSED too: the run pauses after the step it is at.

        Raises:
            RunFailed: an alarm stops the run.
        """
        stops = [a for a in self._halting if a.rule.setting.action == "stop"]
        pauses = [a for a in self._halting if a.rule.setting.action == "pause"]
        self._halting = []
        if stops:
            raise RunFailed(_about_stop(stops))
        if pauses:
            text = "".join(f"step {alarm.step + 1}: {alarm}\n" for alarm in pauses)
            write_atomic(self._paused, f"{text}Remove this file to go on.\n".encode())
        if pauses or self._paused.exists():  # it may have been removed by now
            self._say(f"paused; remove {self._paused} to go on")
            while self._paused.exists():  # noqa: ASYNC110  # a file tells nobody that it is gone
                await asyncio.sleep(LOOK_EVERY_S)
            self._say("going on")

    @property
    def _paused(self) -> Path:
        return self._path / PAUSED


def _about_stop(stops: Sequence[Alarm]) -> str:
    text = "\n".join(str(alarm) for alarm in stops)
    key = f"alarms.{stops[0].rule.name}"
    return (
        f"stopped after step {stops[0].step + 1} by {key}.action=stop.\n{text}\nThe same command "
        f"goes on from there. All of {key} may be changed for that, as {key}.action=log."
    )


def _append(file: Path, row: Mapping[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(row, allow_nan=False) + "\n")


def _cut(file: Path, step: int) -> None:
    """Leave out the lines from `step` on, which will be made again, and one that is not whole."""
    if not file.is_file():
        return
    text = file.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    steps = [int(row.get("step", 0)) for row in read_lines(file, whole)]
    lines = whole.splitlines(keepends=True)
    kept = b"".join(line for line, at in zip(lines, steps, strict=True) if at < step)
    if kept != text:
        write_atomic(file, kept)
