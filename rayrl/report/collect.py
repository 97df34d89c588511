"""`rayrl report RUN`: read what a run left on the disk and write RUN/report.html.

Works on a recipe's folder or on that of one stage, finished or not.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayrl.config import Config
from rayrl.errors import DataError
from rayrl.report.page import Book, Phase, render
from rayrl.report.table import MISSING, Result, columns, entry
from rayrl.rollout.episode_io import read_checked
from rayrl.run.alarms import ALARMS
from rayrl.run.files import opened, parse, read_lines, write_atomic
from rayrl.run.folder import check_finished, read_config
from rayrl.run.stage import EPISODES
from rayrl.run.timeline import TIMELINE

__all__ = ["gather", "run", "write"]

PAGE = "report.html"


def run(config: Config) -> None:
    """Write the report of the run in `config.run.dir` and say where it is."""
    print(f"Report in {write(config.run.dir)}")


def write(folder: str | Path) -> Path:
    """Write the page; returns its path.

    Raises:
        DataError: there is no run in that folder, or one of its files is malformed.
    """
    page = Path(folder) / PAGE
    write_atomic(page, render(gather(Path(folder))).encode())
    return page


def gather(folder: Path) -> Book:
    """Everything the page shows."""
    config = read_config(folder)
    stages = [(stage.name, stage.verb, folder / stage.name) for stage in config.recipe]
    stages = [stage for stage in stages if (stage[2] / "config.yaml").is_file()]
    if not stages:
        stages = [(config.run.name, _verb_of(folder), folder)]
    phases = [_phase(name, verb, where) for name, verb, where in stages if verb != "eval"]
    results, apart = _results(folder, stages)
    record = _read(folder / "recipe.json", dict) or {}
    return Book(
        title=f"{config.env.name}: {config.run.name}",
        source=str(folder),
        phases=phases,
        results=results,
        apart=apart,
        facts=_facts(config, phases, record),
        versions={name: str(value) for name, value in record.get("versions", {}).items()},
        eyebrow=" → ".join(name for name, verb, _ in stages if verb != "eval") or "evaluation",
        lead=_lead([result for result in results if result.name not in apart]),
    )


def _verb_of(folder: Path) -> str:
    """What kind of run a folder without stages holds."""
    if (folder / "eval.json").is_file():
        return "eval"
    if (folder / EPISODES).is_file():
        return "synth"
    first = next(iter(_lines(folder / "metrics.jsonl")), {})
    return "train" if "reward" in first or not first else "sft"


def _phase(name: str, verb: str, folder: Path) -> Phase:
    files = sorted((folder / "episodes").glob("step_*.jsonl"))
    about = ""
    if verb == "synth" and (folder / EPISODES).is_file():
        files, about = [folder / EPISODES], "kept by synth"
    elif files:
        about = f"step {int(files[-1].stem.removeprefix('step_'))}"
    episodes = []
    for episode, problem in read_checked(files[-1]) if files else ():
        if problem:
            raise DataError(problem)
        episodes.append(episode)
    if episodes:
        about = f"{len(episodes)} episodes, {about}"
    check_finished(folder)
    rows, times, alarms = (_lines(folder / name) for name in ("metrics.jsonl", TIMELINE, ALARMS))
    return Phase(name, verb, read_config(folder), rows, episodes, about, times, alarms)


def _lines(file: Path) -> list[dict[str, Any]]:
    """Lines of metrics or of the timeline; a last one that is still being written is left out."""
    if not file.is_file():
        return []
    rows = read_lines(file, growing=True)
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


def _results(
    folder: Path, stages: Sequence[tuple[str, str, Path]]
) -> tuple[list[Result], frozenset[str]]:
    """Rows of the table, and which of them are not stages of this run's model."""
    table = _read(folder / "table.json", list)
    if table is not None:
        try:
            found = [Result.from_dict(row) for row in table]
        except (DataError, TypeError) as error:
            raise DataError(f"{folder / 'table.json'}: {error}; remove the file.") from error
    else:
        files = [where / "eval.json" for _, verb, where in stages if verb == "eval"]
        found = [Result.load(file) for file in files if file.is_file()]
    apart = {result.name for result in found if result.settings.get("player", "model") != "model"}
    return found, frozenset(apart)


def _read(file: Path, kind: type[Any]) -> Any:
    if not file.is_file():
        return None
    try:
        data = parse(file.read_bytes())
        if not isinstance(data, kind):
            raise ValueError(f"expected a {kind.__name__}, got {type(data).__name__}")
        return opened(data) if kind is dict else data
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: not JSON: {error.msg}") from error
    except ValueError as error:
        raise DataError(f"{file}: {error}; remove the file.") from error


def _lead(results: Sequence[Result]) -> str:
    """The last row in words, a figure per cell and every count of the checks."""
    if not results:
        return ""
    last = results[-1]
    said: dict[tuple[str, bool], list[str]] = {}
    for column in columns([last]):
        text, _ = entry(last, column)
        of = (column.group, column.is_check)
        if text != MISSING and (column.is_check or of not in said):
            said.setdefault(of, []).append(f"{column.name} {text}")
    parts = "; ".join(f"{group}: {', '.join(some)}" for (group, _), some in said.items())
    return f"{last.name}. {parts}"


def _facts(config: Config, phases: Sequence[Phase], record: dict[str, Any]) -> dict[str, str]:
    facts: dict[str, str] = {}
    if record.get("seconds"):
        facts["all stages"] = duration(sum(record["seconds"].values()))
    rows = [row for phase in phases for row in phase.metrics]
    trained = [row for phase in phases if phase.verb == "train" for row in phase.metrics]
    if rows:
        facts["steps"] = f"{len(rows):,}"
        if updates := sum(row.get("updates", 0) for row in rows):
            facts["updates"] = f"{updates:,.0f}"
    if alarms := sum(len(phase.alarms) for phase in phases):
        facts["alarms"] = str(alarms)
    if trained:
        facts["training episodes"] = f"{sum(row.get('episodes', 0) for row in trained):,.0f}"
        facts["tokens generated"] = compact(sum(row.get("tokens", 0) for row in trained))
        if times := [row["time/total"] for row in trained if "time/total" in row]:
            facts["per training step"] = duration(statistics.fmean(times))
    if record.get("peak_memory"):
        facts["peak memory"] = f"{record['peak_memory'] / 2**30:.1f} GiB"
    facts["seed"] = str(config.run.seed)
    return facts


def duration(seconds: float) -> str:
    """Time as people say it: 4.2 s, 17 min 32 s, 3 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def compact(number: float) -> str:
    """A count in three digits: 812, 12.3 k, 3.90 M."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
