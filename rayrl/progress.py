"""What a step of training is told by: its figures, where its time went, what to warn of."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rayrl.config import AlgoConfig
from rayrl.types import Episode

if TYPE_CHECKING:
    from rayrl.batch import Batch
    from rayrl.cluster.rollouts import Collection

__all__ = ["Clock", "headline", "step_metrics", "warnings"]


class Clock:
    """Seconds of a step by stage: `with clock("update"): ...`."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time of the block to `stage`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent

    def metrics(self) -> dict[str, float]:
        """`time/STAGE`, and `time/total` since the clock was made."""
        stages = {f"time/{stage}": spent for stage, spent in self.seconds.items()}
        return {**stages, "time/total": time.perf_counter() - self._began}


def step_metrics(
    played: Collection,
    batch: Batch,
    learned: Mapping[str, float],
    clock: Clock,
    algo: AlgoConfig,
) -> dict[str, float]:
    """All figures of a step.

    `reward`, `reward_std`, `score/NAME` (several seats: `score/SEAT/NAME`) and `turns` are over the
    episodes of complete groups; the learner's own figures follow. `mismatch/alarm` is 1 where the
    engine's and the learner's log-probabilities differ by more than `algo.mismatch_alarm`.
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
    return {
        "reward": statistics.fmean(rewards),
        "reward_std": statistics.pstdev(rewards),
        **_scores(episodes),
        "turns": statistics.fmean(turns),
        "reply_tokens": statistics.fmean(lengths) if lengths else 0.0,
        "episodes": float(len(episodes)),
        "tokens": batch.stats["loss_tokens"],
        "groups/dead_share": batch.stats["dead_groups"] / groups if groups else 0.0,
        "groups/dropped": float(len(played.dropped)),
        "failures/env": float(played.env_failures),
        "failures/infra": float(played.infra_failures),
        "failures/stale": float(played.stale),
        **own,
        "mismatch/alarm": float(own.get("mismatch/mean", 0.0) > algo.mismatch_alarm),
        **clock.metrics(),
    }


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
    """The few figures that say how a run goes, for a progress bar."""
    scores = [name for name in metrics if name.startswith("score/")][:4]
    return {
        "reward": f"{metrics['reward']:.3f} ±{metrics['reward_std']:.2f}",
        **{name.removeprefix("score/"): f"{metrics[name]:.2f}" for name in scores},
        "entropy": f"{metrics.get('entropy', 0.0):.3f}",
        "grad": f"{metrics.get('grad_norm', 0.0):.2f}",
        "play": f"{metrics['time/collect']:.1f} s",
        "learn": f"{metrics['time/update']:.1f} s",
    }


def warnings(metrics: Mapping[str, float], algo: AlgoConfig) -> Iterator[str]:
    """What a person should know of a step."""
    if metrics["mismatch/alarm"]:
        yield (
            f"log-probabilities of engine and learner differ by {metrics['mismatch/mean']:.3f} on "
            f"average (algo.mismatch_alarm={algo.mismatch_alarm:g}): the engine may hold other "
            "weights, precision or sampling than the learner assumes"
        )
    if metrics.get("skipped"):
        yield f"{metrics['skipped']:.0f} updates skipped: loss or gradient was not finite"
    if metrics["groups/dropped"]:
        yield (
            f"{metrics['groups/dropped']:.0f} groups dropped: {metrics['failures/env']:.0f} "
            f"episodes failed by their environment, {metrics['failures/infra']:.0f} otherwise, "
            f"{metrics['failures/stale']:.0f} were too old"
        )
