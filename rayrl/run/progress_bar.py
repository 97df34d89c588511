"""How far a stage is, with the figures that matter: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from rayrl.terminal import visible

__all__ = ["ProgressBar", "figure"]

WIDE = 110  # columns of a terminal; narrower ones have no bar and no estimate of the time left


def figure(value: float | int | str) -> str:
    """A figure as people read it: three significant digits, whole numbers whole."""
    if isinstance(value, str | int):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


class ProgressBar:
    """Progress of one stage, to be used in a `with` block.

    In a terminal it is one line that redraws itself. Elsewhere (a log, `ray job logs`) it is a line
    every `every_s` seconds, and the first and the last, so that a log stays readable.

    Args:
        title: what is going on, as "rl1".
        total: steps (or episodes) until it is done.
        stream: where to write.
        every_s: least time between plain lines.
    """

    def __init__(
        self, title: str, total: int, *, stream: TextIO | None = None, every_s: float = 5.0
    ) -> None:
        self.title, self.total, self.done = title, total, 0
        self._stream = sys.stderr if stream is None else stream
        self._every_s = every_s
        self._began = time.monotonic()
        self._last_line = float("-inf")
        self._figures: dict[str, float | int | str] = {}
        self._written = -1
        self._room = sys.maxsize  # columns for figures
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

    def update(self, done: int, figures: Mapping[str, float | int | str] | None = None) -> None:
        """Say that `done` of `total` are done, and the newest figures (older ones stay shown).

        Args:
            figures: by name, which may be any text: an environment's author chose some of them.
        """
        self.done = done
        self._figures.update(figures or {})
        if self._bar is not None:
            self._bar.update(self._task, completed=done, figures=self._in_words())
            return
        if time.monotonic() - self._last_line >= self._every_s or done >= self.total:
            self._write_line()

    def note(self, text: str) -> None:
        """Write a line that stays, above the bar if there is one."""
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
            column("{task.fields[figures]}"),
            console=console,
        )
        title, longest = visible(self.title), max(console.width // 4, 8)
        if len(title) > longest:
            title = f"{title[: longest - 1]}…"
        self._task = self._bar.add_task(title, total=self.total, figures="")
        # what is left of a line beside title, bar, step and times
        taken = len(title) + 2 * len(f"{self.total}") + 12
        self._room = console.width - taken - (37 if wide else 0)
        self._bar.start()

    def _in_words(self) -> str:
        """The figures, of which a narrow terminal shows the first ones, whole."""
        text = ""
        for name, value in self._figures.items():
            longer = f"{text}  {visible(name)} {visible(figure(value))}".strip()
            if len(longer) > self._room:
                break
            text = longer
        return text

    def _write_line(self) -> None:
        self._last_line, self._written = time.monotonic(), self.done
        seconds = self._last_line - self._began
        line = (
            f"{visible(self.title)} {self.done}/{self.total}  {seconds:.0f} s  {self._in_words()}"
        )
        print(line.rstrip(), file=self._stream, flush=True)
