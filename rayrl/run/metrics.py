"""Metrics of a training step, its timeline, and warnings.

A line of RUN/timeline.jsonl is one step; all times are wall-clock seconds, so that overlapping
steps share one axis:

    {"step": 3, "stages": [["collect", began, ended], …],
     "episodes": {"began": …, "width": …, "mean": […]}, "requests": {…}}

`episodes` is the mean number of live episodes in intervals of `width` seconds starting at `began`,
and `requests` the mean number of requests in flight to an engine. Both count the episodes that the
step was trained on or dropped, whenever they were played. Episode times come from the clock of
their env worker, so across nodes they are as exact as the nodes' clocks agree.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rayrl.conversations import transcripts
from rayrl.learner.advantage import has_spread
from rayrl.types import Episode, Group, Message, Turn

if TYPE_CHECKING:
    from rayrl.cluster.rollouts import CollectedGroups
    from rayrl.cluster.workers.worker_pool import Load
    from rayrl.learner.batch import Batch

__all__ = [
    "TIMELINE",
    "Clock",
    "active_counts",
    "headline",
    "latest_steps",
    "reward_metrics",
    "step_metrics",
    "summary",
    "timeline_row",
    "warnings",
]

Span = tuple[float, float]

TIMELINE = "timeline.jsonl"
BINS = 80
LATEST_STEPS = 50


class Clock:
    """Seconds of a step by stage: `with clock("update"): ...`.

    Attributes:
        seconds: total by stage.
        spans: stage, begin and end of each block, in wall-clock seconds.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._epoch = time.time() - self._began  # one clock, so that stages never overlap
        self.seconds: dict[str, float] = {}
        self.spans: list[tuple[str, float, float]] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time of the block to `stage`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            ended = time.perf_counter()
            self.seconds[stage] = self.seconds.get(stage, 0.0) + ended - began
            self.spans.append((stage, self._epoch + began, self._epoch + ended))

    def metrics(self) -> dict[str, float]:
        """`time/STAGE`, and `time/total` since the clock was created."""
        stages = {f"time/{stage}": spent for stage, spent in self.seconds.items()}
        return {**stages, "time/total": time.perf_counter() - self._began}


def step_metrics(
    step: int,
    played: CollectedGroups,
    batch: Batch,
    learned: Mapping[str, float],
    clock: Clock,
    components: Sequence[str] = (),
) -> dict[str, float]:
    """Compute the metrics of a step.

    `reward`, `reward_std`, `score/NAME` (several seats: `score/SEAT/NAME`) and `turns` are over the
    episodes of complete groups. Where groups were chosen (`train.refill`, `train.task_sampling`),
    they are over `CollectedGroups.sample`, which the choice does not bias, and `trained/reward` is
    over the batch. Metrics that were not measured at this step, such as the entropy if no row was
    computed, have no entry.

    Args:
        learned: the learner's metrics.
        components: of a mixture; each has metrics of its own, see `_component_metrics`, and scores
            only there.
    """
    trained = [episode for group in played.groups for episode in group.episodes]
    rejected = [episode for group in played.rejected for episode in group.episodes]
    episodes = trained + rejected
    sample = played.groups if played.sample is None else played.sample
    learner = {_RENAMED.get(name, name): value for name, value in learned.items()}
    groups = batch.stats["groups"] + len(played.rejected)
    tokens, distinct = batch.stats["loss_tokens"], batch.stats["distinct_loss_tokens"]
    zero_variance = batch.stats["zero_variance_groups"] + len(played.rejected)
    is_chosen = bool(rejected) or sample != played.groups
    chosen = {"trained/reward": reward_metrics(played)["reward"]} if is_chosen else {}
    metrics = {
        **reward_metrics(sample),
        **chosen,
        **_turn_metrics(sample),
        "episodes": float(len(episodes)),
        "tokens": tokens,
        **({"shared_token_share": 1 - distinct / tokens} if tokens else {}),
        **({"groups/zero_variance_share": zero_variance / groups} if groups else {}),
        "groups/dropped": float(len(played.dropped)),
        "groups/rejected": float(len(played.rejected)),
        **played.sampling,
        "failures/env": float(played.env_failures),
        "failures/infra": float(played.infra_failures),
        "failures/refused": float(played.refused),
        "failures/stale": float(played.stale),
        "turns/replayed": float(sum(episode.replayed for episode in episodes)),
        "turns/replay_mismatches": float(sum(episode.replay_mismatches for episode in episodes)),
        **_lag(step, trained),
        "queue/waiting": float(played.waiting),
        "queue/live": float(played.live),
        **_worker_metrics(played.load),
        **_stale_metrics(played.stale_groups, trained),
        **({} if played.idle_s is None else {"time/idle": played.idle_s}),
        **clock.metrics(),
    }
    if components:
        metrics = {name: v for name, v in metrics.items() if not name.startswith("score/")}
    for component in components:
        metrics |= _component_metrics(component, played)
    return {**metrics, **learner}


def _component_metrics(component: str, played: CollectedGroups) -> dict[str, float]:
    """Metrics of one environment of a mixture; only counts, if it has no complete group.

    Their names are those of the whole step with the component's after the first part: `reward/sums`
    as `reward`, `score/sums/right` as `score/right`, `groups/sums/dropped` as `groups/dropped`.
    `tokens/sums` are those that the policy wrote in the groups that are trained on.
    """

    def own(groups: Iterable[Group]) -> list[Group]:
        return [g for g in groups if g.episodes and g.episodes[0].env == component]

    trained, rejected = own(played.groups), own(played.rejected)
    sample = trained if played.sample is None else own(played.sample)
    complete = [*trained, *rejected]
    metrics = {**reward_metrics(sample, component), **_turn_metrics(sample, f"/{component}")}
    if complete:
        flat = sum(not has_spread(group) for group in complete)
        metrics[f"groups/{component}/zero_variance_share"] = flat / len(complete)
    return {
        **metrics,
        f"episodes/{component}": float(sum(len(group.episodes) for group in complete)),
        f"tokens/{component}": float(sum(_lengths(trained))),
        f"groups/{component}/dropped": float(len(own(played.dropped))),
    }


def _turn_metrics(groups: Sequence[Group], suffix: str = "") -> dict[str, float]:
    """Mean turns and branches of an episode, mean tokens of a turn, of the trainable seats."""
    of_seat = [e.turns_of(seat) for g in groups for e in g.episodes for seat in g.trainable]
    lengths = _lengths(groups)
    found = {f"turns{suffix}": statistics.fmean(map(len, of_seat))} if of_seat else {}
    if any(turn.conversation for own in of_seat for turn in own):
        found[f"branches{suffix}"] = statistics.fmean([len(transcripts(own)) for own in of_seat])
        found[f"reprompted_tokens{suffix}"] = statistics.fmean(map(_reprompted_tokens, of_seat))
    return found | ({f"reply_tokens{suffix}": statistics.fmean(lengths)} if lengths else {})


def _reprompted_tokens(turns: Sequence[Turn]) -> int:
    """Ids of the prompts that repeat a reply otherwise than the policy gave it."""
    before: dict[int, list[Message | int]] = {}  # messages and turns before each turn's prompt
    for path in transcripts(turns):
        said: list[Message | int] = []
        for k in path:
            before[k] = [*said]
            said += [*turns[k].prompt, k]
    answered = [[*before[k], *turns[k].prompt] for k in before]
    return sum(
        len(turns[k].prompt_ids)
        for k, said in before.items()
        if any(
            message.role == "assistant" and [*said, *turns[k].prompt[:j]] in answered
            for j, message in enumerate(turns[k].prompt)
        )
    )


def _lengths(groups: Sequence[Group]) -> list[int]:
    """Tokens of each of the policy's replies."""
    return [
        len(turn.completion_ids)
        for group in groups
        for episode in group.episodes
        for seat in group.trainable
        for turn in episode.turns_of(seat)
    ]


def _lag(step: int, episodes: Sequence[Episode]) -> dict[str, float]:
    """Mean and maximum number of versions that tokens are older than the learner's weights."""
    total, tokens, oldest = 0.0, 0, step
    for episode in episodes:
        for turn in episode.turns:
            for span in turn.versions:
                total += (step - span.version) * (span.end - span.start)
                tokens += span.end - span.start
                oldest = min(oldest, span.version)
    return {"lag/mean": total / tokens, "lag/max": float(step - oldest)} if tokens else {}


def _worker_metrics(load: Load | None) -> dict[str, float]:
    """Number of env workers, and of groups that wait for one."""
    if load is None:
        return {}
    return {
        "workers/ready": float(load.workers),
        "workers/asked": float(load.asked),
        "workers/waiting_groups": float(load.waiting),
    }


def _stale_metrics(groups: Sequence[Group], kept: Sequence[Episode]) -> dict[str, float]:
    """Metrics of groups that became stale; their difference from the `kept` ones is a bias.

    Turns count up to the cancellation; rewards are those of episodes that had ended by then.
    """
    episodes = [episode for group in groups for episode in group.episodes]
    if not episodes:
        return {"stale/groups": 0.0}
    rewards = [reward for e in episodes for reward in e.rewards.values()]
    metrics = {
        "stale/groups": float(len(groups)),
        "stale/turns": statistics.fmean(len(e.turns) for e in episodes),
        "stale/kept_turns": statistics.fmean(len(e.turns) for e in kept),
    }
    if rewards:
        metrics["stale/reward"] = statistics.fmean(rewards)
    return metrics


_RENAMED = {f"mismatch_{name}": f"mismatch/{name}" for name in ("mean", "max", "kl")}


def reward_metrics(groups: Sequence[Group], component: str = "") -> dict[str, float]:
    """`reward`, `reward_std` and `score/NAME` of complete groups; empty without any.

    Rewards are of the trainable seats, scores of all; with several seats `score/SEAT/NAME`.

    Args:
        component: the groups' environment in a mixture: `reward/COMPONENT` and so on.
    """
    if not groups:
        return {}
    episodes = [episode for group in groups for episode in group.episodes]
    rewards = [e.rewards[seat] for g in groups for e in g.episodes for seat in g.trainable]
    of = f"/{component}" if component else ""
    values: dict[str, list[float]] = defaultdict(list)
    for episode in episodes:
        for seat, scores in episode.scores.items():
            prefix = f"score{of}/{seat}/" if len(episode.scores) > 1 else f"score{of}/"
            for name, value in scores.items():
                values[prefix + name].append(value)
    return {
        f"reward{of}": statistics.fmean(rewards),
        f"reward_std{of}": statistics.pstdev(rewards),
        **{name: statistics.fmean(scores) for name, scores in values.items()},
    }


def headline(metrics: Mapping[str, float]) -> dict[str, str]:
    """Format the main metrics for a progress bar; a dash means not measured."""

    def number(name: str, digits: int, unit: str = "") -> str:
        return f"{metrics[name]:z.{digits}f}{unit}" if name in metrics else "–"

    scores = [name for name in metrics if name.startswith("score/")][:4]
    rest = {
        "entropy": number("entropy", 3),
        "grad": number("grad_norm", 2),
        "play": number("time/collect", 1, " s"),
        "learn": number("time/update", 1, " s"),  # a loop of one's own may not measure it
    }
    shown = {"reward": f"{number('reward', 3)} ±{number('reward_std', 2)}"}
    shown |= {name: number(name, 3) for name in _evaluated_rewards(metrics)[:2]}
    for name in scores:
        short = name.removeprefix("score/")
        taken = short in shown or short in rest or not short
        shown[name if taken else short] = f"{metrics[name]:z.2f}"
    return shown | rest


def summary(metrics: Mapping[str, float], checks: Mapping[str, float]) -> str:
    """An evaluation in a line: rewards of its cells with intervals, and what they have gained.

    Args:
        checks: those of the metrics that come from exhaustive checks.
    """
    parts = []
    for name in _evaluated_rewards(metrics):
        part = f"{name} {metrics[name]:z.3f}{_interval(metrics, name, 'low', 'high')}"
        if f"{name}/gain" in metrics:
            between = _interval(metrics, name, "gain_low", "gain_high")
            part += f", gain {metrics[f'{name}/gain']:+z.3f}{between}"
        parts.append(part)
    parts += [f"{name} {value:g}" for name, value in checks.items()]
    if failed := metrics["eval/failed"]:
        parts.append(f"{failed:.0f} episodes failed")
    return f"evaluation of version {metrics['eval/version']:.0f}: {'; '.join(parts)}"


def _evaluated_rewards(metrics: Mapping[str, float]) -> list[str]:
    """`eval/reward`, or that of every cell."""
    return [n for n in metrics if n.startswith("eval/") and n.endswith("/reward")]


def _interval(metrics: Mapping[str, float], name: str, low: str, high: str) -> str:
    """` (0.1 to 0.3)`; empty without an interval."""
    bounds = [metrics.get(f"{name}/{bound}") for bound in (low, high)]
    shown = [f"{bound:z.3f}" for bound in bounds if bound is not None]
    return f" ({' to '.join(shown)})" if len(shown) == 2 else ""


def warnings(metrics: Mapping[str, float]) -> Iterator[str]:
    """Describe what a step lost; `alarms.py` judges its metrics."""
    if metrics.get("skipped"):
        yield f"{metrics['skipped']:.0f} updates skipped: loss or gradient was not finite"
    if metrics["groups/dropped"]:
        yield (
            f"{metrics['groups/dropped']:.0f} groups dropped: {metrics['failures/env']:.0f} "
            f"episodes failed by their environment, {metrics['failures/refused']:.0f} were refused "
            f"by a server, {metrics['failures/infra']:.0f} failed otherwise, "
            f"{metrics['failures/stale']:.0f} were too old"
        )


def timeline_row(
    step: int, stages: Sequence[tuple[str, float, float]], groups: Iterable[Group]
) -> dict[str, Any]:
    """Return a step's line of timeline.jsonl.

    Args:
        stages: name, begin and end of each; a stage may occur several times.
        groups: groups played for the step, dropped ones included.
    """
    episodes = [episode for group in groups for episode in group.episodes]
    live = [(e.began, e.began + e.seconds) for e in episodes if e.began]
    requests = [(t.began, t.began + t.seconds) for e in episodes for t in e.turns if t.began]
    return {
        "step": step,
        "stages": [[name, round(began, 4), round(ended, 4)] for name, began, ended in stages],
        "episodes": active_counts(live),
        "requests": active_counts(requests),
    }


def active_counts(spans: Sequence[Span], bins: int = BINS) -> dict[str, Any]:
    """Count the spans active at once, as the mean over each of `bins` intervals.

    Returns:
        `began` and the `width` of an interval in seconds, and `mean`, (bins,); empty without spans.
    """
    if not spans:
        return {}
    first = min(began for began, _ in spans)
    width = max(max(ended for _, ended in spans) - first, 1e-3) / bins
    covered = [0.0] * bins  # sum over spans of the share of each interval
    for began, ended in spans:
        low, high = (began - first) / width, (ended - first) / width
        i, j = min(int(low), bins - 1), min(int(high), bins - 1)
        if i == j:
            covered[i] += high - low
            continue
        covered[i] += i + 1 - low
        for k in range(i + 1, j):
            covered[k] += 1
        covered[j] += high - j
    return {
        "began": round(first, 4),
        "width": round(width, 6),
        "mean": [round(value, 2) for value in covered],
    }


def latest_steps(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the latest steps for the report, in seconds since the first stage among them."""
    latest = [row for row in rows if row.get("stages")][-LATEST_STEPS:]
    if not latest:
        return []
    zero = min(began for row in latest for _, began, _ in row["stages"])

    def shift(counts: Mapping[str, Any]) -> dict[str, Any]:
        return {**counts, "began": round(counts["began"] - zero, 3)} if counts else {}

    return [
        {
            "step": row["step"],
            "stages": [
                [name, round(b - zero, 3), round(e - zero, 3)] for name, b, e in row["stages"]
            ],
            **{key: shift(row.get(key) or {}) for key in ("episodes", "requests")},
        }
        for row in latest
    ]
