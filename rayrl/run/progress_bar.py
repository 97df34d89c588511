"""Progress of a stage with its main metrics: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from rayrl.terminal import visible

__all__ = ["ProgressBar"]

WIDE = 110  # columns; narrower terminals get no bar and no estimate of the remaining time


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
        self._every_s = every_s
        self._began = time.monotonic()
        self._last_line = float("-inf")
        self._metrics: dict[str, float | int | str] = {}
        self._written = -1
        self._columns = sys.maxsize  # available for metrics
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> ProgressBar:
        self._began = time.monotonic()
        if self._stream.isatty():
            self._start_bar()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._written != self.done:
            self._write_line()

    def update(self, done: int, metrics: Mapping[str, float | int | str] | None = None) -> None:
        """Show that `done` of `total` are done, and the newest metrics; earlier ones stay shown.

        Args:
            metrics: value by name, which may be any text: environments choose some of them.
        """
        self.done = done
        self._metrics.update(metrics or {})
        if self._bar is not None:
            self._bar.update(self._task, completed=done, metrics=self._metrics_text())
            return
        if time.monotonic() - self._last_line >= self._every_s or done >= self.total:
            self._write_line()

    def note(self, text: str) -> None:
        """Print a permanent line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(visible(text), highlight=False, markup=False)
        else:
            print(visible(text), file=self._stream, flush=True)

    def _start_bar(self) -> None:
        from rich import progress
        from rich.console import Console
        from rich.table import Column

        def column(text: str) -> progress.TextColumn:
            whole = Column(no_wrap=True, overflow="ellipsis")
            return progress.TextColumn(text, markup=False, table_column=whole)

        console = Console(file=self._stream)
        wide = console.width >= WIDE
        self._bar = progress.Progress(
            column("{task.description}"),
            *([progress.BarColumn(bar_width=24)] if wide else []),
            progress.MofNCompleteColumn(table_column=Column(no_wrap=True)),
            progress.TimeElapsedColumn(table_column=Column(no_wrap=True)),
            *([progress.TimeRemainingColumn(table_column=Column(no_wrap=True))] if wide else []),
            column("{task.fields[metrics]}"),
            console=console,
        )
        title, longest = visible(self.title), max(console.width // 4, 8)
        if len(title) > longest:
            title = f"{title[: longest - 1]}…"
        self._task = self._bar.add_task(title, total=self.total, metrics="")
        # title, steps and elapsed time; in wide terminals also the bar and the remaining time
        taken = len(title) + 2 * len(f"{self.total}") + 12
        self._columns = console.width - taken - (37 if wide else 0)
        self._bar.start()

    def _metrics_text(self) -> str:
        """Format as many of the first metrics as fit, none of them cut."""
        text = ""
        for name, value in self._metrics.items():
            if isinstance(value, float):
                value = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
            longer = f"{text}  {visible(name)} {visible(str(value))}".strip()
            if len(longer) > self._columns:
                break
            text = longer
        return text

    def _write_line(self) -> None:
        self._last_line, self._written = time.monotonic(), self.done
        seconds = self._last_line - self._began
        progress = f"{visible(self.title)} {self.done}/{self.total}  {seconds:.0f} s"
        print(f"{progress}  {self._metrics_text()}".rstrip(), file=self._stream, flush=True)
