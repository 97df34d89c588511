"""Evaluation results: one as data (`eval.json`), several as a table.

Rows are players (teacher, base, after SFT, …); columns are the statistics of each cell and the
counts of each exhaustive check, in the order of their first appearance. A dash is a missing value.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Group as RichGroup
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from rayrl.errors import DataError
from rayrl.report.statistics import Statistic, statistic_from_dict
from rayrl.run.files import parse, verify_checksum, with_checksum, write_atomic
from rayrl.types import Usage, sum_usage

__all__ = [
    "Cell",
    "Column",
    "Result",
    "columns",
    "entry",
    "failure_notes",
    "markdown",
    "rich_table",
    "usage_notes",
]

MISSING = "–"
PADDING = 3  # of a column: spaces on both sides, and a place for the line between two


@dataclass(frozen=True, slots=True)
class Cell:
    """Episodes of an evaluation with the same arguments of the environment.

    Attributes:
        args: the environment's keyword arguments.
        episodes: number that ended with a score.
        failed: number that did not.
        statistics: over the episodes that ended with a score, by name.
        usage: tokens billed by a model server, failed episodes included; None without a server.
        unplayed: failed episodes that a rerun plays again.
        refused: failed episodes whose conversation the server refused.
        tasks: number of distinct tasks of the episodes that ended; 0: as many as episodes, or
            unknown.
    """

    args: Mapping[str, Any]
    episodes: int
    failed: int
    statistics: Mapping[str, Statistic]
    usage: Usage | None = None
    unplayed: int = 0
    refused: int = 0
    tasks: int = 0

    @property
    def size(self) -> str:
        """Number of episodes, and of tasks if some were played several times."""
        of = f" of {self.tasks:,} task{'s' if self.tasks > 1 else ''}" if self.tasks else ""
        return f"{self.episodes:,} episode{'' if self.episodes == 1 else 's'}{of}"


@dataclass(frozen=True, slots=True)
class Result:
    """One evaluation of one player.

    Attributes:
        name: the row's label.
        cells: by name.
        checks: exhaustive checks by name, each with its counts by name.
        settings: what else it takes to repeat the evaluation.
        prices: per million prompt and completion tokens; 0 if unknown.
    """

    name: str
    cells: Mapping[str, Cell]
    checks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    prices: tuple[float, float] = (0.0, 0.0)

    @property
    def usage(self) -> Usage | None:
        """Token usage of all cells."""
        return sum_usage(cell.usage for cell in self.cells.values())

    @property
    def unplayed(self) -> int:
        """Failed episodes of all cells that a rerun plays again."""
        return sum(cell.unplayed for cell in self.cells.values())

    def cost(self, usage: Usage) -> float | None:
        """Cost of `usage` at this result's prices; None without prices."""
        if not any(self.prices):
            return None
        return (usage.prompt * self.prices[0] + usage.completion * self.prices[1]) / 1e6

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `eval.json`."""
        return {
            "name": self.name,
            "settings": dict(self.settings),
            "cells": {
                name: {
                    "args": dict(cell.args),
                    "episodes": cell.episodes,
                    "failed": cell.failed,
                    "figures": {key: value.to_dict() for key, value in cell.statistics.items()},
                    **({"unplayed": cell.unplayed} if cell.unplayed else {}),
                    **({"tasks": cell.tasks} if cell.tasks else {}),
                    **({"refused": cell.refused} if cell.refused else {}),
                    **self._usage_to_dict(cell.usage),
                }
                for name, cell in self.cells.items()
            },
            "checks": {name: dict(counts) for name, counts in self.checks.items()},
            **self._usage_to_dict(self.usage),
            **({"prices": list(self.prices)} if any(self.prices) else {}),
        }

    def _usage_to_dict(self, usage: Usage | None) -> dict[str, Any]:
        if usage is None:
            return {}
        cost = self.cost(usage)
        return {"usage": asdict(usage), **({} if cost is None else {"cost": cost})}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """Restore a result from its `to_dict`.

        Raises:
            DataError: `data` is not a result.
        """
        try:
            data = verify_checksum(data)
            cells = {
                name: Cell(
                    dict(cell["args"]),
                    int(cell["episodes"]),
                    int(cell["failed"]),
                    {key: statistic_from_dict(value) for key, value in cell["figures"].items()},
                    Usage(**cell["usage"]) if "usage" in cell else None,
                    int(cell.get("unplayed", 0)),
                    int(cell.get("refused", 0)),
                    int(cell.get("tasks", 0)),
                )
                for name, cell in data["cells"].items()
            }
            checks = {
                name: {key: float(value) for key, value in counts.items()}
                for name, counts in data["checks"].items()
            }
            price_in, price_out = data.get("prices", (0.0, 0.0))
            prices = (float(price_in), float(price_out))
            return cls(str(data["name"]), cells, checks, dict(data["settings"]), prices)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"not an evaluation's result: {error!r}") from error

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read `eval.json`.

        Raises:
            DataError: the file is missing or malformed; the message names it.
        """
        try:
            return cls.from_dict(parse(path.read_bytes()))
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such file; `rayrl eval` writes it") from error
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    def save(self, path: Path) -> None:
        """Write `eval.json` atomically."""
        data = json.dumps(with_checksum(self.to_dict()), indent=1, ensure_ascii=False) + "\n"
        write_atomic(path, data.encode())


@dataclass(frozen=True, slots=True)
class Column:
    """One column: statistic `name` of cell `group`, or count `name` of check `group`."""

    group: str
    name: str
    is_check: bool = False


def columns(results: Sequence[Result]) -> list[Column]:
    """Return all columns that occur in some row, cells before checks."""
    found: dict[Column, None] = {}
    for group in dict.fromkeys(group for result in results for group in result.cells):
        for result in results:
            if group in result.cells:
                found.update({Column(group, name): None for name in result.cells[group].statistics})
    for group in dict.fromkeys(group for result in results for group in result.checks):
        for result in results:
            found.update({Column(group, name, True): None for name in result.checks.get(group, {})})
    return list(found)


def entry(result: Result, column: Column) -> tuple[str, str]:
    """Format a row's value in a column and its interval, empty for a count, which is exact."""
    if column.is_check:
        count = result.checks.get(column.group, {}).get(column.name)
        return (MISSING if count is None else f"{count:,.10g}", "")
    cell = result.cells.get(column.group)
    if cell is None or column.name not in cell.statistics:
        return (MISSING, "")
    statistic = cell.statistics[column.name]
    return (statistic.text(), statistic.interval_text())


def rich_table(results: Sequence[Result]) -> RenderableType:
    """Render a table per cell and check for a terminal, or several where one would be too wide."""
    shown = columns(results)
    parts: list[RenderableType] = []
    for group in dict.fromkeys((column.group, column.is_check) for column in shown):
        own = [column for column in shown if (column.group, column.is_check) == group]
        parts += [_part(results, those) for those in _that_fit(results, own)]
    lines = [
        "Below each value: its 95% interval.",
        *task_source_notes(results),
        *repeated_task_notes(results),
        *failure_notes(results),
        *usage_notes(results),
    ]
    return RichGroup(*parts, Text("\n".join(lines), style="dim"))


def _that_fit(results: Sequence[Result], shown: Sequence[Column]) -> Iterator[list[Column]]:
    """Divide columns so that none is cut off at the terminal's width."""
    first = max(cell_len(result.name) for result in results) + PADDING
    taken, fit = first, list[Column]()
    for column in shown:
        texts = [column.name, *(text for one in results for text in entry(one, column))]
        width = max(map(cell_len, texts)) + PADDING
        if fit and taken + width > shutil.get_terminal_size().columns:
            yield fit
            taken, fit = first, []
        taken += width
        fit.append(column)
    yield fit


def _part(results: Sequence[Result], shown: Sequence[Column]) -> Table:
    title = shown[0].group
    cells = [result.cells[title] for result in results if title in result.cells]
    if cells and not shown[0].is_check:
        settings = ", ".join(f"{key}={value}" for key, value in cells[0].args.items())
        title += f" ({settings})" if settings else ""
    table = Table(title=Text(title, style="bold"), title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", style="bold")
    for column in shown:
        table.add_column(Text(column.name), justify="right")
    for result in results:
        entries = [entry(result, column) for column in shown]
        if all(value == MISSING for value, _ in entries):
            continue
        texts = []
        for value, interval in entries:
            text = Text(value, style="bold")
            texts.append(text.append(f"\n{interval}", style="not bold dim") if interval else text)
        table.add_row(Text(result.name), *texts)
    return table


def markdown(results: Sequence[Result]) -> str:
    """Render the table as Markdown, followed by its notes."""
    shown = columns(results)
    head = ["", *(f"{column.group}: {column.name}" for column in shown)]
    lines = [_row(head), _row(["---", *("---:" for _ in shown)])]
    for result in results:
        entries = (entry(result, column) for column in shown)
        cells = [value + (f" ({interval})" if interval else "") for value, interval in entries]
        lines.append(_row([result.name, *cells]))
    lines += ["", *notes(results)]
    return "\n".join(lines) + "\n"


def notes(results: Sequence[Result]) -> list[str]:
    """Notes beneath the Markdown table: settings and episodes of each cell, failures, intervals."""
    lines = []
    for group in dict.fromkeys(group for result in results for group in result.cells):
        cells = [result.cells[group] for result in results if group in result.cells]
        settings = ", ".join(f"{key}={value}" for key, value in cells[0].args.items())
        counts = sorted({cell.episodes for cell in cells})
        sizes = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        failed, refused = (sum(getattr(c, key) for c in cells) for key in ("failed", "refused"))
        lost = f"; {failed} failed and are not counted" if failed else ""
        lost += f" ({refused} refused by the server)" if refused else ""
        lines.append(
            f"- {group}: {settings or 'default settings'}; {sizes} episodes per row{lost}."
        )
    lines += [f"- {line}" for line in task_source_notes(results)]
    lines += [f"- {line}" for line in (*repeated_task_notes(results), *usage_notes(results))]
    lines.append("- In brackets: 95% intervals (Wilson's for shares, Student's t for means).")
    return lines


def task_source_notes(results: Sequence[Result]) -> list[str]:
    """Which tasks were played, where they come from a sequence or are the environment's own."""
    said = [str(result.settings.get("tasks", "")) for result in results]
    return [f"Tasks: {note}." for note in dict.fromkeys(filter(None, said))]


def repeated_task_notes(results: Sequence[Result]) -> list[str]:
    """One sentence per cell whose tasks were played several times."""
    return [
        f"{result.name}, {name}: {cell.size}; intervals allow for tasks that were played several "
        "times."
        for result in results
        for name, cell in result.cells.items()
        if cell.tasks
    ]


def failure_notes(results: Sequence[Result]) -> list[str]:
    """One sentence per cell with failed episodes, which no statistic counts."""
    lines = []
    for result in results:
        for name, cell in result.cells.items():
            if cell.failed:
                refused = f", {cell.refused} of them refused by the server" if cell.refused else ""
                whole = cell.episodes + cell.failed
                lines.append(
                    f"{result.name}, {name}: {cell.failed} of {whole} episodes failed and are not "
                    f"counted{refused}."
                )
    return lines


def usage_notes(results: Sequence[Result]) -> list[str]:
    """Token usage and cost at a model server: one sentence per cell and one for all cells."""
    lines = []
    for result in results:
        costs = [(name, cell.usage) for name, cell in result.cells.items() if cell.usage]
        if len(costs) > 1 and result.usage:
            costs.append(("all cells", result.usage))
        for name, usage in costs:
            cached = "" if usage.cached is None else f" ({usage.cached:,} cached)"
            reasoning = "" if usage.reasoning is None else f" ({usage.reasoning:,} reasoning)"
            cost = result.cost(usage)
            least = "at least " if usage.unknown else ""
            money = "" if cost is None else f", cost {least}{cost:,.4g}"
            unknown = f"; usage of {usage.unknown:,} calls is unknown" if usage.unknown else ""
            lines.append(
                f"{result.name}, {name}: {usage.calls:,} server calls, {usage.prompt:,} prompt "
                f"tokens{cached}, {usage.completion:,} completion tokens{reasoning}{money}"
                f"{unknown}."
            )
    return lines


def _row(cells: Sequence[str]) -> str:
    escaped = (" ".join(cell.splitlines()).replace("|", "\\|") for cell in cells)
    return "| " + " | ".join(escaped) + " |"
