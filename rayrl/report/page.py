"""The report as one HTML page: no network, no build step, all text of models escaped.

Jinja escapes every value; charts are drawn by `assets/report.js` and `assets/timeline.js` from
JSON; a content security policy allows only these (one script, by its hash), so that nothing a model
wrote can ever run.
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
from rayrl.report.statistics import Split
from rayrl.report.table import Column, Result, columns, entry, losses, spending
from rayrl.run.timeline import shown
from rayrl.types import Episode

__all__ = ["Book", "Phase", "render"]

Metrics = Mapping[str, float]

TIME = "time/"
TOTAL = "time/total"
COLORS = 8  # --p0 … --p7 in report.css
TINTS = 7  # --t0 … --t6 there; the last is for "other"


@dataclass(frozen=True, slots=True)
class Phase:
    """One stage of a run.

    Attributes:
        metrics: one mapping a step, each with `step`.
        episodes: of the last batch that was written out.
        about: where those episodes are from, in words.
        timeline: lines of timeline.jsonl.
        alarms: lines of alarms.jsonl.
    """

    name: str
    verb: str
    config: Config
    metrics: Sequence[Metrics] = ()
    episodes: Sequence[Episode] = ()
    about: str = ""
    timeline: Sequence[Mapping[str, Any]] = ()
    alarms: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class Book:
    """All that is on the page.

    Attributes:
        results: rows of the table; the last one is what the run ended with.
        apart: rows for comparison only, such as the teacher.
        facts: label -> value of the tiles at the top.
        versions: of the libraries.
    """

    title: str
    source: str
    phases: Sequence[Phase]
    results: Sequence[Result] = ()
    apart: frozenset[str] = frozenset()
    facts: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    eyebrow: str = "rayrl report"
    lead: str = ""


@dataclass(frozen=True, slots=True)
class Known:
    """How a metric is shown: the first match wins; what matches none goes under "more"."""

    pattern: str
    title: str  # {} is what `*` matched
    about: str
    size: str = ""  # "wide": two columns
    main: bool = True
    unit: bool = False  # lies in [0, 1], so that axis is always shown whole


KNOWN = (
    Known("reward", "Reward", "mean over the batch", size="wide"),
    Known("score/*", "{}", "score, mean over the batch", unit=True),
    Known("loss", "Loss", "what the optimizer minimises"),
    Known("entropy", "Entropy", "of the policy, nats per token"),
    Known("reward_std", "Reward spread", "standard deviation over the batch"),
    Known("mismatch/mean", "Mismatch", "mean |log p(learner) − log p(engine)| of sampled tokens"),
    Known("grad_norm", "Gradient norm", "before clipping"),
    Known(
        "groups/zero_variance_share",
        "Zero-variance groups",
        "share of groups; they carry no signal",
        unit=True,
    ),
    Known("turns", "Turns", "per episode"),
    Known("clip_fraction", "Clipped", "share of tokens"),
    Known("reply_tokens", "Reply length", "tokens per turn"),
)


def render(book: Book) -> str:
    """The page."""
    assets = files("rayrl.report") / "assets"
    script = "".join((assets / name).read_text() for name in ("report.js", "timeline.js"))
    charts, payload = _charts(book.phases)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((assets / "report.html").read_text())
    return template.render(
        title=book.title,
        eyebrow=book.eyebrow,
        lead=book.lead,
        source=book.source,
        tiles=[{"label": label, "value": value} for label, value in book.facts.items()],
        table=_table(book.results, book.apart),
        alarms=[
            {"phase": phase.name, "step": alarm["step"], "text": alarm["text"]}
            for phase in book.phases
            for alarm in phase.alarms
        ],
        charts=charts,
        payload=payload,
        timings=_timings(book.phases),
        timelines=[
            {"name": phase.name, "steps": steps}
            for phase in book.phases
            if (steps := shown(phase.timeline))
        ],
        phases_with_episodes=_samples(book.phases),
        settings=_settings(book.phases),
        versions=list(book.versions.items()),
        style=Markup((assets / "report.css").read_text()),
        script=Markup(script),
        script_hash=_hash(script),
    )


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _table(results: Sequence[Result], apart: frozenset[str]) -> dict[str, Any]:
    shown = columns(results)
    groups: list[dict[str, Any]] = []
    for column in shown:
        if groups and groups[-1]["of"] == (column.group, column.is_check):
            groups[-1]["span"] += 1
        else:  # a check may be called as a cell is
            of = (column.group, column.is_check)
            groups.append({"name": column.group, "of": of, "span": 1})
    last = next((r.name for r in reversed(results) if r.name not in apart), None)
    rows = [
        {
            "name": result.name,
            "kind": "apart" if result.name in apart else "last" if result.name == last else "",
            "cells": [_table_cell(result, column) for column in shown],
        }
        for result in results
    ]
    sizes = [cell.episodes for result in results for cell in result.cells.values()]
    size = f"{min(sizes)}" if sizes and min(sizes) == max(sizes) else "the given number of"
    note = (
        f"{size} episodes per cell. The small figures are 95% intervals: Wilson's for shares, "
        "Student's t for means. Counts of exhaustive checks are exact."
    )
    note = " ".join([note, *losses(results), *spending(results)])
    names = [column.name for column in shown]
    return {"groups": groups, "names": names, "rows": rows, "note": note}


def _table_cell(result: Result, column: Column) -> dict[str, Any]:
    text, interval = entry(result, column)
    cell: dict[str, Any] = {
        "text": text,
        "small": [s for s in interval.split(" · ") if s],
        "label": f"{column.group} · {column.name}",
    }
    cell["bars"] = []
    found = result.cells.get(column.group)
    figure = found.figures.get(column.name) if found and not column.is_check else None
    if isinstance(figure, Split):
        last = len(figure.counts) - 1
        kinds = {0: "o-first", last: "o-last"}
        cell["bars"] = [
            {"kind": kinds.get(i, "o-mid"), "width": f"{100 * figure.share(name).value:.2f}"}
            for i, name in enumerate(figure.counts)
        ]
        cell["bar_title"] = ", ".join(f"{name} {n}" for name, n in figure.counts.items())
        intervals = {name: figure.share(name).interval_text() for name in figure.counts}
        cell["small"] = [f"{name} {shown}" for name, shown in intervals.items() if shown]
    return cell


def _charts(phases: Sequence[Phase]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Cards in the order of `KNOWN`, and the curves of each for the script."""
    names = {
        name: None
        for phase in phases
        for row in phase.metrics
        for name in row
        if name != "step" and not name.startswith(TIME)
    }
    ranked = sorted(
        names, key=lambda name: (_rank(name), name if _rank(name) == len(KNOWN) else "")
    )
    charts, payload = [], {}
    for number, name in enumerate(ranked):
        lines = [line for i, phase in enumerate(phases) if (line := _line(phase, name, i))]
        if not lines:
            continue
        rank = _rank(name)
        known = KNOWN[rank] if rank < len(KNOWN) else Known("*", "{}", "", main=False)
        title = known.title.format(name.removeprefix(known.pattern.removesuffix("*")) or name)
        key = f"m{number}"
        charts.append(
            {
                "key": key,
                "title": title,
                "about": known.about,
                "size": known.size,
                "main": known.main,
            }
        )
        payload[key] = {"title": title, "unit": known.unit, "lines": lines}
    return charts, payload


def _rank(name: str) -> int:
    ranks = (i for i, known in enumerate(KNOWN) if fnmatchcase(name, known.pattern))
    return next(ranks, len(KNOWN))


def _line(phase: Phase, name: str, color: int) -> dict[str, Any] | None:
    rows = [row for row in phase.metrics if name in row]
    values = [_finite(row[name]) for row in rows]
    if all(value is None for value in values):
        return None
    steps = [int(row["step"]) for row in rows]
    return {
        "name": phase.name,
        "color": color % COLORS,
        "steps": steps,
        "values": values,
        "alarms": sorted({alarm["step"] for alarm in phase.alarms}),
    }


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def _timings(phases: Sequence[Phase]) -> list[dict[str, Any]]:
    """A bar a phase; the same stage has the same colour in all of them."""
    rows = [row for phase in phases if (row := _timing(phase))]
    names = list(dict.fromkeys(part["name"] for row in rows for part in row["parts"]))
    named = [name for name in names if name != "other"]
    for row in rows:
        for part in row["parts"]:
            own = part["name"] in named
            part["color"] = named.index(part["name"]) % (TINTS - 1) if own else TINTS - 1
    return rows


def _timing(phase: Phase) -> dict[str, Any] | None:
    """Mean seconds of each `time/…` metric; what they leave of `time/total` is "other"."""
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
    shown = []
    for color, phase in enumerate(phases):
        if phase.episodes:
            chosen = [_episode(label, episode) for label, episode in choose(phase.episodes)]
            shown.append(
                {
                    "name": phase.name,
                    "about": phase.about,
                    "color": color % COLORS,
                    "episodes": chosen,
                }
            )
    return shown


def choose(episodes: Sequence[Episode]) -> list[tuple[str, Episode]]:
    """Best, median and worst by mean reward over the seats; a failed one, if any, in its place."""
    scored = sorted(
        (e for e in episodes if e.failure is None and e.rewards),
        key=lambda e: statistics.fmean(e.rewards.values()),
        reverse=True,
    )
    failed = [e for e in episodes if e.failure is not None]
    places = {0: "best", len(scored) // 2: "median", len(scored) - 1: "worst"}
    if len(scored) < 3:
        places = dict(enumerate(("best", "worst")[: len(scored)]))
    chosen = [(label, scored[place]) for place, label in sorted(places.items())]
    return chosen + [("failed", episode) for episode in failed[:1]]


def _episode(label: str, episode: Episode) -> dict[str, Any]:
    several = len(episode.scores) > 1
    chips = []
    for seat, scores in episode.scores.items():
        mark = f"{seat}: " if several else ""
        if seat in episode.rewards:
            chips.append({"kind": "reward", "text": f"{mark}reward {episode.rewards[seat]:.3g}"})
        chips += [{"kind": "", "text": f"{mark}{n} {v:.3g}"} for n, v in scores.items()]
    if episode.failure is not None:
        chips.append({"kind": "failure", "text": f"{episode.failure.kind} failure"})
    messages = []
    for turn in episode.turns:
        for message in turn.prompt:
            messages.append({"role": message.role, "who": "", "text": message.content})
        cut = "" if turn.finish == "stop" else f"cut off: {turn.finish}"
        who = " · ".join(part for part in (turn.seat if several else "", cut) if part)
        messages.append({"role": "assistant", "who": who, "text": turn.text})
    if episode.failure is not None:
        messages.append({"role": "tool", "who": "failure", "text": episode.failure.message})
    return {"label": label.capitalize(), "chips": chips, "messages": messages}


def _settings(phases: Sequence[Phase]) -> dict[str, Any]:
    """One row for each key some phase sets, one column a phase."""
    changed = [differences(phase.config) for phase in phases]
    hidden = ("recipe", "run.dir", "play.")  # of the machine or of a person, not of the run
    keys = sorted({k for change in changed for k in change if not k.startswith(hidden)})
    rows = []
    for key in keys:
        default = next(change[key][0] for change in changed if key in change)
        values = [
            {"text": _plain(change.get(key, (default, default))[1]), "same": key not in change}
            for change in changed
        ]
        rows.append({"key": key, "default": _plain(default), "cells": values})
    return {"names": [phase.name for phase in phases], "rows": rows}


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return "\n".join(f"{key}: {_plain(entry)}" for key, entry in value.items()) or "–"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "–"
    return "–" if value == "" else str(value)
