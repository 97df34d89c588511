"""What a step of training is told by: its figures, where its time went, what to warn of."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rayrl.types import Episode, Group

if TYPE_CHECKING:
    from rayrl.cluster.rollouts import CollectedGroups
    from rayrl.cluster.workers.scaling import Load
    from rayrl.learner.batch import Batch

__all__ = ["Clock", "headline", "step_metrics", "warnings"]


class Clock:
    """Seconds of a step by stage: `with clock("update"): ...`.

    Attributes:
        seconds: of each stage, in all.
        spans: stage, begin and end of each block, in wall-clock seconds.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._epoch = time.time() - self._began  # one clock, so that stages cannot seem to overlap
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
        """`time/STAGE`, and `time/total` since the clock was made."""
        stages = {f"time/{stage}": spent for stage, spent in self.seconds.items()}
        return {**stages, "time/total": time.perf_counter() - self._began}


def step_metrics(
    step: int,
    played: CollectedGroups,
    batch: Batch,
    learned: Mapping[str, float],
    clock: Clock,
) -> dict[str, float]:
    """All figures of a step.

    `reward`, `reward_std`, `score/NAME` (several seats: `score/SEAT/NAME`) and `turns` are over the
    episodes of complete groups; the learner's own figures follow. What was not measured at this
    step (the entropy, if no row was computed) has no entry.
    """
    episodes = [episode for group in played.groups for episode in group.episodes]
    trainable = played.groups[0].trainable
    rewards = [episode.rewards[seat] for episode in episodes for seat in trainable]
    turns = [len(e.turns_of(seat)) for e in episodes for seat in trainable]
    lengths = [
        len(turn.completion_ids)
        for e in episodes
        for seat in trainable
        for turn in e.turns_of(seat)
    ]
    own = {_RENAMED.get(name, name): value for name, value in learned.items()}
    groups = batch.stats["groups"]
    zero_variance = batch.stats["zero_variance_groups"]
    figures = {
        "reward": statistics.fmean(rewards),
        "reward_std": statistics.pstdev(rewards),
        **_scores(episodes),
        "turns": statistics.fmean(turns),
        **({"reply_tokens": statistics.fmean(lengths)} if lengths else {}),
        "episodes": float(len(episodes)),
        "tokens": batch.stats["loss_tokens"],
        **({"groups/zero_variance_share": zero_variance / groups} if groups else {}),
        "groups/dropped": float(len(played.dropped)),
        "failures/env": float(played.env_failures),
        "failures/infra": float(played.infra_failures),
        "failures/refused": float(played.refused),
        "failures/stale": float(played.stale),
        "turns/replayed": float(sum(episode.replayed for episode in episodes)),
        "turns/replay_mismatches": float(sum(episode.replay_mismatches for episode in episodes)),
        **_lag(step, episodes),
        "queue/waiting": float(played.waiting),
        "queue/live": float(played.live),
        **_workers(played.load),
        **_stopped(played.stopped, episodes),
        **({} if played.idle_s is None else {"time/idle": played.idle_s}),
        **clock.metrics(),
    }
    return {**figures, **own}


def _lag(step: int, episodes: Sequence[Episode]) -> dict[str, float]:
    """How many versions older than the learner's weights tokens were, on average and at most."""
    total, tokens, oldest = 0.0, 0, step
    for episode in episodes:
        for turn in episode.turns:
            for span in turn.versions:
                total += (step - span.version) * (span.end - span.start)
                tokens += span.end - span.start
                oldest = min(oldest, span.version)
    return {"lag/mean": total / tokens, "lag/max": float(step - oldest)} if tokens else {}


def _workers(load: Load | None) -> dict[str, float]:
    """How many workers there are, and what waits for room on one."""
    if load is None:
        return {}
    return {
        "workers/ready": float(load.workers),
        "workers/asked": float(load.asked),
        "workers/waiting_groups": float(load.waiting),
    }


def _stopped(groups: Sequence[Group], kept: Sequence[Episode]) -> dict[str, float]:
    """What was stopped for its age, and how it differs from what is trained on: the bias of it.

    Turns and rewards of the stopped are those they had: rewards only where an episode had ended.
    """
    episodes = [episode for group in groups for episode in group.episodes]
    if not episodes:
        return {"stopped/groups": 0.0}
    rewards = [reward for e in episodes for reward in e.rewards.values()]
    figures = {
        "stopped/groups": float(len(groups)),
        "stopped/turns": statistics.fmean(len(e.turns) for e in episodes),
        "stopped/kept_turns": statistics.fmean(len(e.turns) for e in kept),
    }
    if rewards:
        figures["stopped/reward"] = statistics.fmean(rewards)
    return figures


_RENAMED = {f"mismatch_{name}": f"mismatch/{name}" for name in ("mean", "max", "kl")}


def _scores(episodes: list[Episode]) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for episode in episodes:
        for seat, scores in episode.scores.items():
            prefix = f"score/{seat}/" if len(episode.scores) > 1 else "score/"
            for name, value in scores.items():
                values[prefix + name].append(value)
    return {name: statistics.fmean(of_name) for name, of_name in values.items()}


def headline(metrics: Mapping[str, float]) -> dict[str, str]:
    """The few figures that say how a run goes, for a progress bar; a dash is not measured."""

    def known(name: str, digits: int) -> str:
        return f"{metrics[name]:.{digits}f}" if name in metrics else "–"

    scores = [name for name in metrics if name.startswith("score/")][:4]
    after = {
        "entropy": known("entropy", 3),
        "grad": known("grad_norm", 2),
        "play": f"{metrics['time/collect']:.1f} s",
        "learn": f"{metrics['time/update']:.1f} s",
    }
    shown = {"reward": f"{metrics['reward']:z.3f} ±{metrics['reward_std']:.2f}"}
    for name in scores:
        short = name.removeprefix("score/")
        ours = short in shown or short in after or not short
        shown[name if ours else short] = f"{metrics[name]:z.2f}"
    return shown | after


def warnings(metrics: Mapping[str, float]) -> Iterator[str]:
    """What was lost at a step, for a person to know; what lies in its figures, `alarms.py` says."""
    if metrics.get("skipped"):
        yield f"{metrics['skipped']:.0f} updates skipped: loss or gradient was not finite"
    if metrics["groups/dropped"]:
        yield (
            f"{metrics['groups/dropped']:.0f} groups dropped: {metrics['failures/env']:.0f} "
            f"episodes failed by their environment, {metrics['failures/refused']:.0f} were refused "
            f"by a server, {metrics['failures/infra']:.0f} failed otherwise, "
            f"{metrics['failures/stale']:.0f} were too old"
        )
