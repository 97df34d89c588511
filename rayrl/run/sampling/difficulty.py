"""Draw tasks where groups recently differed in their rewards, with a floor of uniform draws.

The task source falls into *pools*: strata of u of a task function, the single tasks of a sequence.
A pool keeps the recent mean of the standard deviation of rewards inside its groups, which is 0
where every episode succeeds and where every one fails. `train.uniform_share` of the groups are
drawn as if nothing had been played, so that each pool is seen again and again and what has changed
is noticed; the others are drawn with a probability in proportion to that mean.
"""

from __future__ import annotations

import bisect
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from rayrl.config import Config
from rayrl.environment.environment import Environment
from rayrl.learner.advantage import has_spread
from rayrl.rollout.rollout import GroupPlan
from rayrl.run.sampling.task_sampler import UniformShare, group_plan
from rayrl.types import Group, derive_seed

__all__ = ["DifficultySampler", "Pools", "reward_spread"]

DECAY = 0.75  # what a pool's groups weigh after another one: at most four are remembered
PRIOR = 0.25  # groups that the mean over all pools stands for in the estimate of each
BANDS = ("hard", "medium", "easy")  # thirds of the range of rewards


def reward_spread(group: Group) -> float:
    """Standard deviation of the episodes' rewards, the mean over trainable seats."""
    if not has_spread(group):
        return 0.0
    return statistics.fmean(
        statistics.pstdev(episode.rewards[seat] for episode in group.episodes)
        for seat in group.trainable
    )


@dataclass(slots=True)
class _Recent:
    """Means over a pool's recent groups.

    Attributes:
        weight: of all of them; the latest has 1.
        spread: mean of `reward_spread`.
        reward: mean of the reward.
    """

    weight: float = 0.0
    spread: float = 0.0
    reward: float = 0.0

    def add(self, spread: float, reward: float) -> None:
        """Take note of another group."""
        self.weight = 1.0 + DECAY * self.weight
        self.spread += (spread - self.spread) / self.weight
        self.reward += (reward - self.reward) / self.weight


class Pools:
    """What recent groups of each pool were like, and where to draw the next ones.

    Args:
        n: pools; number k has the tasks with u in [k / n, (k + 1) / n).
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self._seen: dict[int, _Recent] = {}
        self._low, self._high = math.inf, -math.inf  # rewards of single episodes
        self._sums: list[float] = []  # (n,) of the expected spreads; empty: not computed

    def pool_of(self, u: float) -> int:
        """The pool that a task belongs to."""
        return min(int(u * self.n), self.n - 1)

    def observe(self, pool: int, group: Group) -> float:
        """Take note of a complete group; returns its spread."""
        rewards = [e.rewards[seat] for e in group.episodes for seat in group.trainable]
        self._low, self._high = min(self._low, *rewards), max(self._high, *rewards)
        recent = self._seen.setdefault(pool, _Recent())
        spread = reward_spread(group)
        recent.add(spread, statistics.fmean(rewards))
        self._sums = []
        return spread

    def expected_spreads(self) -> list[float]:
        """(n,) the spread to expect of a group: the less a pool is known, the nearer to the mean.

        The mean is that of the pools that were seen.
        """
        seen = self._seen
        mean = statistics.fmean(recent.spread for recent in seen.values()) if seen else 0.0
        expected = [mean] * self.n
        for pool, recent in seen.items():
            total = PRIOR * mean + recent.weight * recent.spread
            expected[pool] = total / (PRIOR + recent.weight)
        return expected

    def shares(self) -> list[float]:
        """(n,) share of the draws by difficulty; all alike where no group had spread."""
        expected = self.expected_spreads()
        total = math.fsum(expected)
        return [spread / total for spread in expected] if total else [1 / self.n] * self.n

    def u_at(self, x: float) -> float:
        """The u below which the share x of the draws by difficulty lies."""
        if not self._sums:
            self._sums = [*itertools.accumulate(self.shares())]
        at = x * self._sums[-1]
        pool = min(bisect.bisect_right(self._sums, at), self.n - 1)
        before = self._sums[pool - 1] if pool else 0.0
        within = (at - before) / (self._sums[pool] - before)
        return min((pool + within) / self.n, math.nextafter((pool + 1) / self.n, 0.0))

    def bands(self) -> dict[str, list[int]]:
        """Pools by the third of the range of rewards seen that their recent mean reward is in."""
        bands: dict[str, list[int]] = {band: [] for band in BANDS}
        width = self._high - self._low
        for pool, recent in sorted(self._seen.items()):
            at = (recent.reward - self._low) / width if width > 0 else 0.5
            bands[BANDS[min(int(3 * at), 2)]].append(pool)
        return bands

    def save(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        seen = {str(pool): astuple(recent) for pool, recent in sorted(self._seen.items())}
        return {"seen": seen, "range": [self._low, self._high]} if seen else {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from what `save` gave; empty where nothing was saved."""
        self._seen = {int(pool): _Recent(*data) for pool, data in state.get("seen", {}).items()}
        self._low, self._high = state.get("range", (math.inf, -math.inf))
        self._sums = []


class DifficultySampler:
    """The `TaskSampler` of train.task_sampling=difficulty."""

    def __init__(self, environment: Environment, config: Config) -> None:
        self._environment, self._train = environment, config.train
        self._seed = derive_seed(config.run.seed, config.run.name, "train")
        self._uniform = UniformShare(environment, config.train, self._seed)
        source = environment.source
        self._pools = Pools(len(source) if isinstance(source, Sequence) else config.train.pools)
        self._drawn: dict[int, float] = {}  # u of groups that were not observed yet

    def plan(self, index: int) -> GroupPlan:
        """The plan of the index-th group."""
        if index not in self._drawn:
            uniform = self._uniform
            self._drawn[index] = (
                uniform.u(index) if uniform.has(index) else self._pools.u_at(uniform.other(index))
            )
        task = self._environment.task(derive_seed(self._seed, "task", index), self._drawn[index])
        return group_plan(self._environment, self._train, self._seed, index, task)

    def is_uniform(self, index: int) -> bool:
        """Whether the group is one of the uniform draws."""
        return self._uniform.has(index)

    def draws(self) -> dict[int, float]:
        """The u of groups that were planned and not observed yet."""
        return dict(self._drawn)

    def observe(self, groups: Mapping[int, Group]) -> dict[str, float]:
        """Take note of a batch's groups; returns what the pools are like then."""
        spreads: dict[bool, list[float]] = {True: [], False: []}
        for index, group in sorted(groups.items()):
            pool = self._pools.pool_of(self._drawn.pop(index))
            if group.complete:
                spreads[self.is_uniform(index)].append(self._pools.observe(pool, group))
        return self._metrics(spreads[True], spreads[False])

    def save(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        drawn = {str(index): u for index, u in sorted(self._drawn.items())}
        return {"pools": self._pools.save(), "drawn": drawn}

    def load(self, state: Mapping[str, Any], draws: Mapping[int, float]) -> None:
        """Continue from what `save` gave, and from draws that were logged since."""
        self._pools.load(state.get("pools", {}))
        self._drawn = {int(index): u for index, u in state.get("drawn", {}).items()} | dict(draws)

    def _metrics(
        self, uniform: Sequence[float], by_difficulty: Sequence[float]
    ) -> dict[str, float]:
        floor, shares = self._train.uniform_share, self._pools.shares()
        metrics = {"pools/unseen": 1.0}
        for band, pools in self._pools.bands().items():
            share = len(pools) / self._pools.n
            metrics[f"pools/{band}"] = share
            chosen = math.fsum(shares[pool] for pool in pools)
            metrics[f"draws/{band}"] = floor * share + (1 - floor) * chosen
            metrics["pools/unseen"] -= share
        means = {"draws/spread_uniform": uniform, "draws/spread_by_difficulty": by_difficulty}
        return metrics | {name: statistics.fmean(of) for name, of in means.items() if of}
