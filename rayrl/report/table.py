"""Results: one evaluation as data (`eval.json`), and several of them as one table.

Rows are players (teacher, base, after SFT, …); columns are the figures of each cell and of each
exhaustive check, in the order they first appear. A figure a row lacks is shown as a dash.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group as RichGroup
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from rayrl.errors import DataError
from rayrl.report.statistics import Figure, figure_from_dict
from rayrl.run.files import opened, parse, sealed
from rayrl.types import Usage, sum_usage

__all__ = [
    "Cell",
    "Column",
    "Result",
    "columns",
    "entry",
    "losses",
    "markdown",
    "rich_table",
    "spending",
]

MISSING = "–"


@dataclass(frozen=True, slots=True)
class Cell:
    """One setting of the environment that was played.

    Attributes:
        args: the environment's keywords in this cell.
        episodes: how many ended with a score; the figures are of these.
        failed: how many did not.
        usage: tokens that a server's model cost, failed episodes included; None without one.
        unplayed: of the failed ones, those that are to be played again.
        refused: of the failed ones, those whose conversation a server refuses.
        tasks: how many different ones those that ended were of; 0: as many as episodes, or a file
            that does not say.
    """

    args: Mapping[str, Any]
    episodes: int
    failed: int
    figures: Mapping[str, Figure]
    usage: Usage | None = None
    unplayed: int = 0
    refused: int = 0
    tasks: int = 0

    @property
    def size(self) -> str:
        """How many episodes, and of how many tasks where some were played several times."""
        of = f" of {self.tasks:,} task{'s' if self.tasks > 1 else ''}" if self.tasks else ""
        return f"{self.episodes:,} episode{'' if self.episodes == 1 else 's'}{of}"


@dataclass(frozen=True, slots=True)
class Result:
    """One evaluation of one player.

    Attributes:
        name: the row's label.
        cells: by name.
        checks: exhaustive checks by name, each with its counts by name.
        settings: what else is needed to run the same evaluation again.
        prices: of a million tokens read and written; 0 where nobody said.
    """

    name: str
    cells: Mapping[str, Cell]
    checks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    prices: tuple[float, float] = (0.0, 0.0)

    @property
    def usage(self) -> Usage | None:
        """Tokens of all cells."""
        return sum_usage(cell.usage for cell in self.cells.values())

    @property
    def unplayed(self) -> int:
        """Episodes of all cells that are to be played again."""
        return sum(cell.unplayed for cell in self.cells.values())

    def cost(self, usage: Usage) -> float | None:
        """What tokens cost at this result's prices; None without prices."""
        if not any(self.prices):
            return None
        return (usage.prompt * self.prices[0] + usage.completion * self.prices[1]) / 1e6

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "settings": dict(self.settings),
            "cells": {
                name: {
                    "args": dict(cell.args),
                    "episodes": cell.episodes,
                    "failed": cell.failed,
                    "figures": {key: figure.to_dict() for key, figure in cell.figures.items()},
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
        """The inverse of `to_dict`.

        Raises:
            DataError: if `data` is not a result.
        """
        try:
            data = opened(data)
            cells = {
                name: Cell(
                    dict(cell["args"]),
                    int(cell["episodes"]),
                    int(cell["failed"]),
                    {key: figure_from_dict(value) for key, value in cell["figures"].items()},
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
            DataError: naming the file, if it is missing or malformed.
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
        """Write `eval.json`, whole or not at all."""
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(sealed(self.to_dict()), indent=1, ensure_ascii=False) + "\n")
        part.replace(path)


@dataclass(frozen=True, slots=True)
class Column:
    """One column: `group` is a cell or check, `name` a figure or count of it."""

    group: str
    name: str
    is_check: bool = False


def columns(results: Sequence[Result]) -> list[Column]:
    """Every column that some row fills, cells before checks."""
    found: dict[Column, None] = {}
    for group in dict.fromkeys(group for result in results for group in result.cells):
        for result in results:
            if group in result.cells:
                found.update({Column(group, name): None for name in result.cells[group].figures})
    for group in dict.fromkeys(group for result in results for group in result.checks):
        for result in results:
            found.update({Column(group, name, True): None for name in result.checks.get(group, {})})
    return list(found)


def entry(result: Result, column: Column) -> tuple[str, str]:
    """What stands in a row's column, and its interval (empty for a count: it is exact)."""
    if column.is_check:
        count = result.checks.get(column.group, {}).get(column.name)
        return (MISSING if count is None else f"{count:,.10g}", "")
    cell = result.cells.get(column.group)
    if cell is None or column.name not in cell.figures:
        return (MISSING, "")
    figure = cell.figures[column.name]
    return (figure.text(), figure.interval_text())


def rich_table(results: Sequence[Result]) -> RenderableType:
    """The table for a terminal: a part for each cell and check, so that 80 columns are enough."""
    shown = columns(results)
    parts: list[RenderableType] = []
    for group in dict.fromkeys((column.group, column.is_check) for column in shown):
        own = [column for column in shown if (column.group, column.is_check) == group]
        parts.append(_part(results, own))
    lines = [
        "Below each figure: its 95% interval.",
        *repeats(results),
        *losses(results),
        *spending(results),
    ]
    return RichGroup(*parts, Text("\n".join(lines), style="dim"))


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
    """The table as Markdown, with what was played and how intervals were made beneath it."""
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
    """What a reader of the table must know: what each cell is, how many episodes, failures."""
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
    lines += [f"- {line}" for line in (*repeats(results), *spending(results))]
    lines.append("- In brackets: 95% intervals (Wilson's for shares, Student's t for means).")
    return lines


def repeats(results: Sequence[Result]) -> list[str]:
    """Where tasks were played several times, a sentence per cell."""
    return [
        f"{result.name}, {name}: {cell.size}; intervals allow for tasks that were played several "
        "times."
        for result in results
        for name, cell in result.cells.items()
        if cell.tasks
    ]


def losses(results: Sequence[Result]) -> list[str]:
    """The episodes of each row that failed and are in no figure, a sentence per cell."""
    lines = []
    for result in results:
        for name, cell in result.cells.items():
            if cell.failed:
                refused = f", {cell.refused} of them refused by the server" if cell.refused else ""
                whole = cell.episodes + cell.failed
                lines.append(
                    f"{result.name}, {name}: {cell.failed} of {whole} episodes failed and are in "
                    f"no figure{refused}."
                )
    return lines


def spending(results: Sequence[Result]) -> list[str]:
    """What each row cost at a server, a sentence per cell and one for all of them."""
    lines = []
    for result in results:
        costs = [(name, cell.usage) for name, cell in result.cells.items() if cell.usage]
        if len(costs) > 1 and result.usage:
            costs.append(("all cells", result.usage))
        for name, usage in costs:
            cached = "" if usage.cached is None else f" ({usage.cached:,} cached)"
            thought = "" if usage.reasoning is None else f" ({usage.reasoning:,} reasoning)"
            cost = result.cost(usage)
            least = "at least " if usage.unknown else ""
            money = "" if cost is None else f", cost {least}{cost:,.4g}"
            silent = f"; of {usage.unknown:,} calls nothing is known" if usage.unknown else ""
            lines.append(
                f"{result.name}, {name}: {usage.calls:,} calls of a server, {usage.prompt:,} "
                f"tokens read{cached}, {usage.completion:,} written{thought}{money}{silent}."
            )
    return lines


def _row(cells: Sequence[str]) -> str:
    escaped = (" ".join(cell.splitlines()).replace("|", "\\|") for cell in cells)
    return "| " + " | ".join(escaped) + " |"
