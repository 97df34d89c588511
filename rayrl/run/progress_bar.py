"""Progress of a stage with its main metrics: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TextIO

from rayrl.terminal import visible

__all__ = ["ProgressBar"]

WIDE = 110  # columns; narrower terminals get no bar and no estimate of the remaining time

Metrics = Mapping[str, float | int | str]


class ProgressBar:
    """Progress of one stage; a context manager.

    In a terminal it redraws one line. Elsewhere (a log, `ray job logs`) it prints the first line,
    the last, and one every `every_s` seconds, so that logs stay readable.

    Args:
        title: name of the stage, as "rl1".
        total: number of steps or episodes.
        stream: output; by default stderr.
        every_s: minimum time between plain lines.
    """

    def __init__(
        self, title: str, total: int, *, stream: TextIO | None = None, every_s: float = 5.0
    ) -> None:
        self.title, self.total, self.done = title, total, 0
        self._stream = sys.stderr if stream is None else stream
        self._lines = _Lines(title, total, self._stream, every_s)
        self._bar: _Bar | None = None
        self._metrics: dict[str, float | int | str] = {}

    def __enter__(self) -> ProgressBar:
        if self._stream.isatty():
            self._bar = _Bar(self.title, self.total, self._stream)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._lines.written != self.done:
            self._lines.write(self.done, self._metrics)

    def update(self, done: int, metrics: Metrics | None = None) -> None:
        """Show that `done` of `total` are done, and the newest metrics; earlier ones stay shown.

        Args:
            metrics: value by name, which may be any text: environments choose some of them.
        """
        self.done = done
        self._metrics.update(metrics or {})
        if self._bar is not None:
            self._bar.update(done, self._metrics)
        elif self._lines.are_due or done >= self.total:
            self._lines.write(done, self._metrics)

    def note(self, text: str) -> None:
        """Print a permanent line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.note(text)
        else:
            print(visible(text), file=self._stream, flush=True)


class _Lines:
    """Progress in plain lines.

    Attributes:
        written: what the last line said is done.
    """

    def __init__(self, title: str, total: int, stream: TextIO, every_s: float) -> None:
        self._title, self._total, self._stream, self._every_s = title, total, stream, every_s
        self._began = time.monotonic()
        self._last = float("-inf")
        self.written = -1

    @property
    def are_due(self) -> bool:
        """Whether the last line is old enough for another one."""
        return time.monotonic() - self._last >= self._every_s

    def write(self, done: int, metrics: Metrics) -> None:
        """Print a line."""
        self._last, self.written = time.monotonic(), done
        progress = f"{visible(self._title)} {done}/{self._total}  {self._last - self._began:.0f} s"
        text = _metrics_text(metrics, sys.maxsize)
        print(f"{progress}  {text}".rstrip(), file=self._stream, flush=True)


class _Bar:
    """Progress in one line of a terminal, which is drawn again and again."""

    def __init__(self, title: str, total: int, stream: TextIO) -> None:
        from rich import progress
        from rich.console import Console
        from rich.table import Column

        def column(text: str) -> progress.TextColumn:
            whole = Column(no_wrap=True, overflow="ellipsis")
            return progress.TextColumn(text, markup=False, table_column=whole)

        console = Console(file=stream)
        wide = console.width >= WIDE
        self._progress = progress.Progress(
            column("{task.description}"),
            *([progress.BarColumn(bar_width=24)] if wide else []),
            progress.MofNCompleteColumn(table_column=Column(no_wrap=True)),
            progress.TimeElapsedColumn(table_column=Column(no_wrap=True)),
            *([progress.TimeRemainingColumn(table_column=Column(no_wrap=True))] if wide else []),
            column("{task.fields[metrics]}"),
            console=console,
        )
        title, longest = visible(title), max(console.width // 4, 8)
        if len(title) > longest:
            title = f"{title[: longest - 1]}…"
        self._task = self._progress.add_task(title, total=total, metrics="")
        # title, steps and elapsed time; in wide terminals also the bar and the remaining time
        taken = len(title) + 2 * len(f"{total}") + 12
        self._columns = console.width - taken - (37 if wide else 0)  # left for metrics
        self._progress.start()

    def update(self, done: int, metrics: Metrics) -> None:
        """Show what is done."""
        text = _metrics_text(metrics, self._columns)
        self._progress.update(self._task, completed=done, metrics=text)

    def note(self, text: str) -> None:
        """Print a permanent line above the bar."""
        self._progress.console.print(visible(text), highlight=False, markup=False)

    def stop(self) -> None:
        """Leave the line as it is."""
        self._progress.stop()


def _metrics_text(metrics: Metrics, columns: int) -> str:
    """Format as many of the first metrics as fit, none of them cut."""
    text = ""
    for name, value in metrics.items():
        if isinstance(value, float):
            value = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
        longer = f"{text}  {visible(name)} {visible(str(value))}".strip()
        if len(longer) > columns:
            break
        text = longer
    return text
