"""The report as one self-contained HTML page, without network access or a build step.

Jinja escapes every value. `assets/report.js` draws charts from JSON with uPlot, which lies in
`assets/uplot` as it was published, and `assets/timeline.js` draws timelines. A content security
policy allows only that script, by its hash, so nothing a model wrote can run.
"""

from __future__ import annotations

import base64
import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from rayrl.config import Config, differences
from rayrl.conversations import beginning, seat_name
from rayrl.errors import clip
from rayrl.report.statistics import Split
from rayrl.report.table import Column, Result, columns, entry, failure_notes, usage_notes
from rayrl.run.metrics import latest_steps
from rayrl.types import Episode

__all__ = ["Phase", "Report", "render"]

Metrics = Mapping[str, float]

TIME = "time/"
TOTAL = "time/total"
COLORS = 8  # of phases: --p0 … --p7 in report.css
TINTS = 7  # of stages in a step: --t0 … --t6; the last is for "other"


@dataclass(frozen=True, slots=True)
class Phase:
    """One stage of a run.

    Attributes:
        metrics: one mapping per step, each with `step`.
        episodes: of the last batch that was written.
        episodes_from: which episodes these are, in words.
        timeline: rows of timeline.jsonl.
        alarms: rows of alarms.jsonl.
    """

    name: str
    verb: str
    config: Config
    metrics: Sequence[Metrics] = ()
    episodes: Sequence[Episode] = ()
    episodes_from: str = ""
    timeline: Sequence[Mapping[str, Any]] = ()
    alarms: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """Contents of the page.

    Attributes:
        results: rows of the table; the last row that is no reference is the run's final model.
        references: names of rows for comparison only, such as the teacher.
        facts: label -> value of the tiles at the top.
        versions: version by library.
        eyebrow: small line above the title.
        lead: sentence below it.
    """

    title: str
    source: str
    phases: Sequence[Phase]
    results: Sequence[Result] = ()
    references: frozenset[str] = frozenset()
    facts: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    eyebrow: str = "rayrl report"
    lead: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """How to show the metrics that match `pattern`; the first match wins."""

    pattern: str
    title: str  # {} is what `*` matched
    about: str
    size: str = ""  # "wide": two columns
    main: bool = True  # otherwise under "more"
    unit: bool = False  # the axis is [0, 1]
    smooth: bool = True  # with a running mean; otherwise each value counts by itself


CHARTS = (
    Chart("reward", "Reward", "mean over the batch", size="wide"),
    Chart("reward/*", "Reward: {}", "mean over this environment's episodes of the batch"),
    Chart("reward_std/*", "Reward spread: {}", "standard deviation over the batch", main=False),
    Chart(
        "groups/*/zero_variance_share",
        "Zero-variance groups: {}",
        "share of groups; they carry no signal",
        unit=True,
    ),
    Chart("eval/version", "Evaluated version", "of the weights", main=False),
    Chart("eval/failed", "Failed episodes", "of an evaluation", main=False),
    *(
        Chart(f"eval/*/{end}", f"{title}: {{}}", about, main=False, smooth=False)
        for end, title, about in (
            ("low", "Evaluation, low", "lower 95% bound of an evaluation"),
            ("high", "Evaluation, high", "upper 95% bound of an evaluation"),
            ("gain", "Gain", "paired difference from the first evaluation"),
            ("gain_low", "Gain, low", "its lower 95% bound"),
            ("gain_high", "Gain, high", "its upper 95% bound"),
        )
    ),
    Chart(
        "eval/*", "Evaluation: {}", "mean over evaluation tasks, or count of a check", smooth=False
    ),
    Chart("score/*", "{}", "score, mean over the batch", unit=True),
    Chart("loss", "Loss", "minimized by the optimizer"),
    Chart("entropy", "Entropy", "of the policy, nats per token"),
    Chart("reward_std", "Reward spread", "standard deviation over the batch"),
    Chart("mismatch/mean", "Mismatch", "mean |log p(learner) − log p(engine)| of sampled tokens"),
    Chart("grad_norm", "Gradient norm", "before clipping"),
    Chart(
        "groups/zero_variance_share",
        "Zero-variance groups",
        "share of groups; they carry no signal",
        unit=True,
    ),
    Chart("turns", "Turns", "per episode"),
    Chart("clip_fraction", "Clipped", "share of tokens"),
    Chart("reply_tokens", "Reply length", "tokens per turn"),
)


def render(report: Report) -> str:
    """Render the HTML page."""
    assets = files("rayrl.report") / "assets"
    licence = f"/*\nuPlot's licence:\n\n{(assets / 'uplot/LICENSE').read_text()}*/\n"
    script = licence + _joined("uplot/uPlot.iife.min.js", "report.js", "timeline.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    charts, payload = _charts(report.phases)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((assets / "report.html").read_text())
    return template.render(
        title=report.title,
        eyebrow=report.eyebrow,
        lead=report.lead,
        source=report.source,
        tiles=[{"label": label, "value": value} for label, value in report.facts.items()],
        table=_table(report.results, report.references),
        alarms=[
            {"phase": phase.name, "step": alarm["step"], "text": alarm["text"]}
            for phase in report.phases
            for alarm in phase.alarms
        ],
        charts=charts,
        payload=payload,
        timings=_timings(report.phases),
        timelines=[
            {"name": phase.name, "steps": steps}
            for phase in report.phases
            if (steps := latest_steps(phase.timeline))
        ],
        phases_with_episodes=_samples(report.phases),
        settings=_settings(report.phases),
        versions=list(report.versions.items()),
        style=Markup(_joined("uplot/uPlot.min.css", "report.css")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
    )


def _joined(*names: str) -> str:
    """Contents of files of `assets/`, each from a line of its own."""
    return "\n".join((files("rayrl.report") / "assets" / name).read_text() for name in names)


def _table(results: Sequence[Result], references: frozenset[str]) -> dict[str, Any]:
    shown = columns(results)
    groups: list[dict[str, Any]] = []
    for column in shown:
        if groups and groups[-1]["key"] == (column.group, column.is_check):
            groups[-1]["span"] += 1
        else:  # a check and a cell may have the same name
            key = (column.group, column.is_check)
            groups.append({"name": column.group, "key": key, "span": 1})
    last = next((r.name for r in reversed(results) if r.name not in references), None)
    rows = [
        {
            "name": result.name,
            "kind": "reference" if result.name in references else "last" * (result.name == last),
            "cells": [_table_cell(result, column) for column in shown],
        }
        for result in results
    ]
    sizes = [cell.episodes for result in results for cell in result.cells.values()]
    size = f"{min(sizes)}" if sizes and min(sizes) == max(sizes) else "the given number of"
    note = (
        f"{size} episodes per cell. The small numbers are 95% intervals: Wilson's for shares, "
        "Student's t for means. Counts of exhaustive checks are exact."
    )
    note = " ".join([note, *failure_notes(results), *usage_notes(results)])
    names = [column.name for column in shown]
    return {"groups": groups, "names": names, "rows": rows, "note": note}


def _table_cell(result: Result, column: Column) -> dict[str, Any]:
    text, interval = entry(result, column)
    cell: dict[str, Any] = {
        "text": text,
        "small": [s for s in interval.split(" · ") if s],
        "label": f"{column.group} · {column.name}",
        "bars": [],
    }
    played = result.cells.get(column.group)
    split = played.statistics.get(column.name) if played and not column.is_check else None
    if isinstance(split, Split):
        last = len(split.counts) - 1
        kinds = {0: "o-first", last: "o-last"}
        cell["bars"] = [
            {"kind": kinds.get(i, "o-mid"), "width": f"{100 * split.share(name).value:.2f}"}
            for i, name in enumerate(split.counts)
        ]
        cell["bar_title"] = ", ".join(f"{name} {n}" for name, n in split.counts.items())
        intervals = {name: split.share(name).interval_text() for name in split.counts}
        cell["small"] = [f"{name} {text}" for name, text in intervals.items() if text]
    return cell


def _charts(phases: Sequence[Phase]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the charts' cards in the order of `CHARTS`, and the curves of each for the script."""
    names = {
        name: None
        for phase in phases
        for row in phase.metrics
        for name in row
        if name != "step" and not name.startswith(TIME)
    }
    ranked = sorted(
        names, key=lambda name: (_rank(name), name if _rank(name) == len(CHARTS) else "")
    )
    charts, payload = [], {}
    for number, name in enumerate(ranked):
        lines = [line for i, phase in enumerate(phases) if (line := _curve(phase, name, i))]
        if not lines:
            continue
        rank = _rank(name)
        chart = CHARTS[rank] if rank < len(CHARTS) else Chart("*", "{}", "", main=False)
        before, _, after = chart.pattern.partition("*")
        title = chart.title.format(name.removeprefix(before).removesuffix(after))
        key = f"m{number}"
        charts.append(
            {
                "key": key,
                "title": title,
                "about": chart.about,
                "size": chart.size,
                "main": chart.main,
            }
        )
        curves = {"title": title, "unit": chart.unit, "smooth": chart.smooth, "lines": lines}
        payload[key] = curves
    return charts, payload


def _rank(name: str) -> int:
    ranks = (i for i, chart in enumerate(CHARTS) if fnmatchcase(name, chart.pattern))
    return next(ranks, len(CHARTS))


def _curve(phase: Phase, name: str, number: int) -> dict[str, Any] | None:
    rows = [row for row in phase.metrics if name in row]
    values = [_finite(row[name]) for row in rows]
    if all(value is None for value in values):
        return None
    steps = [int(row["step"]) for row in rows]
    return {
        "name": phase.name,
        "phase": number,
        "steps": steps,
        "values": values,
        "alarms": sorted({alarm["step"] for alarm in phase.alarms}),
    }


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def _timings(phases: Sequence[Phase]) -> list[dict[str, Any]]:
    """One bar per phase; a stage of the step has the same colour in all bars."""
    rows = [row for phase in phases if (row := _timing(phase))]
    names = list(dict.fromkeys(part["name"] for row in rows for part in row["parts"]))
    named = [name for name in names if name != "other"]
    for row in rows:
        for part in row["parts"]:
            is_named = part["name"] in named
            part["color"] = named.index(part["name"]) % (TINTS - 1) if is_named else TINTS - 1
    return rows


def _timing(phase: Phase) -> dict[str, Any] | None:
    """Mean seconds of each `time/…` metric; the rest of `time/total` is "other"."""
    rows = [row for row in phase.metrics if any(name.startswith(TIME) for name in row)]
    names = {name: None for row in rows for name in row if name.startswith(TIME) and name != TOTAL}
    if not names:
        return None
    means = {
        name.removeprefix(TIME): statistics.fmean(row.get(name, 0.0) for row in rows)
        for name in names
    }
    total = sum(means.values())
    if totals := [row[TOTAL] for row in rows if TOTAL in row]:
        whole = statistics.fmean(totals)
        if whole > total * 1.001:
            means["other"] = whole - total
            total = whole
    if total <= 0:
        return None
    parts = [
        {
            "name": name.replace("_", " "),
            "width": f"{100 * seconds / total:.2f}",
            "share": f"{100 * seconds / total:.0f}",
            "seconds": f"{seconds:.3g}",
        }
        for name, seconds in means.items()
        if seconds > 0
    ]
    return {"name": phase.name, "step": f"{total:.3g}", "steps": len(rows), "parts": parts}


def _samples(phases: Sequence[Phase]) -> list[dict[str, Any]]:
    return [
        {
            "name": phase.name,
            "episodes_from": phase.episodes_from,
            "color": color % COLORS,
            "episodes": [_episode(label, e) for label, e in choose_samples(phase.episodes)],
        }
        for color, phase in enumerate(phases)
        if phase.episodes
    ]


def choose_samples(episodes: Sequence[Episode]) -> list[tuple[str, Episode]]:
    """Choose the best, median and worst episode by mean reward over seats, and a failed one."""
    scored = sorted(
        (e for e in episodes if e.failure is None and e.rewards),
        key=lambda e: statistics.fmean(e.rewards.values()),
        reverse=True,
    )
    failed = [e for e in episodes if e.failure is not None]
    ranks = {0: "best", len(scored) // 2: "median", len(scored) - 1: "worst"}
    if len(scored) < 3:
        ranks = dict(enumerate(("best", "worst")[: len(scored)]))
    chosen = [(label, scored[rank]) for rank, label in sorted(ranks.items())]
    return chosen + [("failed", episode) for episode in failed[:1]]


def _episode(label: str, episode: Episode) -> dict[str, Any]:
    several = len(episode.scores) > 1
    chips = []
    for seat, scores in episode.scores.items():
        prefix = f"{seat}: " if several else ""
        if seat in episode.rewards:
            chips.append({"kind": "reward", "text": f"{prefix}reward {episode.rewards[seat]:.3g}"})
        chips += [{"kind": "", "text": f"{prefix}{n} {v:.3g}"} for n, v in scores.items()]
    if episode.failure is not None:
        chips.append({"kind": "failure", "text": f"{episode.failure.kind} failure"})
    messages = []
    begun = set()
    for turn in episode.turns:
        if turn.conversation and seat_name(turn) not in begun:
            begun.add(seat_name(turn))
            messages.append({"role": "tool", "speaker": "", "text": beginning(turn)})
        for message in turn.prompt:
            messages.append({"role": message.role, "speaker": "", "text": message.content})
        cut = "" if turn.finish == "stop" else f"cut off: {turn.finish}"
        speaker = " · ".join(
            part for part in (seat_name(turn) if several or turn.conversation else "", cut) if part
        )
        messages.append({"role": "assistant", "speaker": speaker, "text": turn.text})
    if episode.facts:
        facts = "\n".join(f"{name}: {clip(str(value))}" for name, value in episode.facts.items())
        messages.append({"role": "tool", "speaker": "facts", "text": facts})
    if episode.failure is not None:
        messages.append({"role": "tool", "speaker": "failure", "text": episode.failure.message})
    return {"label": label.capitalize(), "chips": chips, "messages": messages}


def _settings(phases: Sequence[Phase]) -> dict[str, Any]:
    """Settings that some phase changes: one row per key, one column per phase."""
    changed = [differences(phase.config) for phase in phases]
    hidden = ("recipe", "run.dir", "play.")  # they do not affect results
    keys = sorted({k for change in changed for k in change if not k.startswith(hidden)})
    rows = []
    for key in keys:
        default = next(change[key][0] for change in changed if key in change)
        values = [
            {"text": _format(change.get(key, (default, default))[1]), "same": key not in change}
            for change in changed
        ]
        rows.append({"key": key, "default": _format(default), "cells": values})
    return {"names": [phase.name for phase in phases], "rows": rows}


def _format(value: object) -> str:
    if isinstance(value, Mapping):
        return "\n".join(f"{key}: {_format(entry)}" for key, entry in value.items()) or "–"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "–"
    return "–" if value == "" else str(value)
