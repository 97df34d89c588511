"""Collect the files of a run into a `Report` and write it to RUN/report.html."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayrl.config import Config
from rayrl.config.mix import env_label
from rayrl.errors import DataError
from rayrl.report.page import Phase, Report, render
from rayrl.report.table import MISSING, Result, columns, entry
from rayrl.rollout.episode_io import read_checked
from rayrl.run.alarms import ALARMS
from rayrl.run.files import parse, read_jsonl, verify_checksum, write_atomic
from rayrl.run.folder import check_finished, read_config
from rayrl.run.metrics import TIMELINE
from rayrl.run.stage import EPISODES

__all__ = ["collect_report", "run", "write_report"]

PAGE = "report.html"


def run(config: Config) -> None:
    """`rayrl report RUN`: write the report of a run, finished or not, and print its path."""
    print(f"Report in {write_report(config.run.dir)}")


def write_report(folder: str | Path) -> Path:
    """Write the HTML report of the run in `folder` and return its path.

    Raises:
        DataError: `folder` holds no run, or one of its files is malformed.
    """
    page = Path(folder) / PAGE
    write_atomic(page, render(collect_report(Path(folder))).encode())
    return page


def collect_report(folder: Path) -> Report:
    """Read everything the report shows from a recipe's folder or from a stage's.

    Raises:
        DataError: as `write_report`.
    """
    config = read_config(folder)
    stages = [(stage.name, stage.verb, folder / stage.name) for stage in config.recipe]
    stages = [stage for stage in stages if (stage[2] / "config.yaml").is_file()]
    if not stages:
        stages = [(config.run.name, _detect_verb(folder), folder)]
    phases = [_read_phase(name, verb, path) for name, verb, path in stages if verb != "eval"]
    results = _read_results(folder, stages)
    references = frozenset(
        result.name for result in results if result.settings.get("player", "model") != "model"
    )
    record = _read_json(folder / "recipe.json", dict) or {}
    return Report(
        title=f"{env_label(config)}: {config.run.name}",
        source=str(folder),
        phases=phases,
        results=results,
        references=references,
        facts=_facts(config, phases, record),
        versions={name: str(value) for name, value in record.get("versions", {}).items()},
        eyebrow=" → ".join(name for name, verb, _ in stages if verb != "eval") or "evaluation",
        lead=_lead([result for result in results if result.name not in references]),
    )


def _detect_verb(folder: Path) -> str:
    """Tell the verb of a folder without stages from its files."""
    if (folder / "eval.json").is_file():
        return "eval"
    if (folder / EPISODES).is_file():
        return "synth"
    first = next(iter(_read_rows(folder / "metrics.jsonl")), {})
    return "train" if "reward" in first or not first else "sft"


def _read_phase(name: str, verb: str, folder: Path) -> Phase:
    files = sorted((folder / "episodes").glob("step_*.jsonl"))
    source = ""
    if verb == "synth" and (folder / EPISODES).is_file():
        files, source = [folder / EPISODES], "kept by synth"
    elif files:
        source = f"step {int(files[-1].stem.removeprefix('step_'))}"
    episodes = []
    for episode, problem in read_checked(files[-1]) if files else ():
        if problem:
            raise DataError(problem)
        episodes.append(episode)
    if episodes:
        source = f"{len(episodes)} episodes, {source}"
    check_finished(folder)
    metrics, timeline, alarms = (
        _read_rows(folder / name) for name in ("metrics.jsonl", TIMELINE, ALARMS)
    )
    return Phase(name, verb, read_config(folder), metrics, episodes, source, timeline, alarms)


def _read_rows(file: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file, without nulls and without a last line still being written."""
    if not file.is_file():
        return []
    rows = read_jsonl(file, growing=True)
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


def _read_results(folder: Path, stages: Sequence[tuple[str, str, Path]]) -> list[Result]:
    """Read the rows of the table from table.json, or from each evaluation where there is none."""
    table = _read_json(folder / "table.json", list)
    if table is None:
        files = [path / "eval.json" for _, verb, path in stages if verb == "eval"]
        return [Result.load(file) for file in files if file.is_file()]
    try:
        return [Result.from_dict(row) for row in table]
    except (DataError, TypeError) as error:
        raise DataError(f"{folder / 'table.json'}: {error}; remove the file.") from error


def _read_json(file: Path, kind: type[Any]) -> Any:
    if not file.is_file():
        return None
    try:
        data = parse(file.read_bytes())
        if not isinstance(data, kind):
            raise ValueError(f"expected a {kind.__name__}, got {type(data).__name__}")
        return verify_checksum(data) if kind is dict else data
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: not JSON: {error.msg}") from error
    except ValueError as error:
        raise DataError(f"{file}: {error}; remove the file.") from error


def _lead(results: Sequence[Result]) -> str:
    """Summarize the last row: one statistic per cell and every count of each check."""
    if not results:
        return ""
    last = results[-1]
    by_group: dict[tuple[str, bool], list[str]] = {}
    for column in columns([last]):
        text, _ = entry(last, column)
        group = (column.group, column.is_check)
        if text != MISSING and (column.is_check or group not in by_group):
            by_group.setdefault(group, []).append(f"{column.name} {text}")
    parts = "; ".join(f"{name}: {', '.join(texts)}" for (name, _), texts in by_group.items())
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
    """Format seconds for people: 4.2 s, 17 min 32 s, 3 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def compact(number: float) -> str:
    """Format a count in three significant digits: 812, 12.3 k, 3.9 M."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
