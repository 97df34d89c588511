"""Which environment of a mixture the index-th group of a run plays.

Shares are of what has begun, and each group goes where the mixture lags behind: among the
components that have had no more than their share, the one that would first have its share again
with one more group. This is worst-case fair weighted fair queueing (WF²Q; J. Bennett and H. Zhang,
INFOCOM 1996): with weights by episodes, after n groups each component has had its share of n up to
less than one group, whatever n.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from rayrl.config import Config
from rayrl.config.mix import components
from rayrl.environment.environment import Environment
from rayrl.rollout.rollout import GroupPlan
from rayrl.run.sampling.difficulty import DifficultySampler
from rayrl.run.sampling.replay import ReplaySampler
from rayrl.run.sampling.task_sampler import TaskSampler, UniformSampler
from rayrl.types import Group

__all__ = ["MixtureSampler", "component_shares", "run_sampler"]

SAMPLERS: dict[str, Callable[[Environment, Config], TaskSampler]] = {  # by train.task_sampling
    "uniform": UniformSampler,
    "difficulty": DifficultySampler,
    "replay": ReplaySampler,
}


def run_sampler(environments: Mapping[str, Environment], config: Config) -> TaskSampler:
    """What a run draws its tasks from.

    Args:
        environments: by component of the mixture; without one, under an empty name.
    """
    sampler = SAMPLERS[config.train.task_sampling]
    if not config.env.mix:
        return sampler(environments[""], config)
    shares, groups = component_shares(config), config.train.groups
    samplers: dict[str, TaskSampler] = {}
    for name, own in components(config).items():
        # seeds of its own, and about as many strata as it has groups in a step
        run = replace(own.run, name=f"{config.run.name}/{name}")
        train = replace(own.train, groups=max(1, round(shares[name] * groups)))
        samplers[name] = sampler(environments[name], replace(own, run=run, train=train))
    return MixtureSampler(samplers, shares, groups, by_tokens=config.env.mix_by == "tokens")


def component_shares(config: Config) -> dict[str, Fraction]:
    """Share of each component, all together 1."""
    weights = {name: Fraction(one.get("weight", 1)) for name, one in config.env.mix.items()}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


@dataclass(slots=True)
class _Account:
    """What a component has had.

    Attributes:
        begun: groups that were planned.
        open: those of them that were not observed yet.
        measured: complete groups that were observed.
        tokens: that the policy wrote in these.
    """

    begun: int = 0
    open: int = 0
    measured: int = 0
    tokens: int = 0


class MixtureSampler:
    """Samplers by component, taken by weight.

    By tokens, a group counts with the tokens that the policy wrote in it, and before it was
    observed with the mean of its component's, so the plan depends on batches that have closed only.

    Args:
        samplers: of each component, which number their groups from 0.
        shares: of each component, all together 1.
        groups: of a step, which a group's id names.
        by_tokens: shares are of tokens, else of groups, and so of episodes.
    """

    def __init__(
        self,
        samplers: Mapping[str, TaskSampler],
        shares: Mapping[str, Fraction],
        groups: int,
        *,
        by_tokens: bool = False,
    ) -> None:
        self._samplers, self._shares, self._groups = samplers, shares, groups
        self._by_tokens = by_tokens
        self._accounts = {name: _Account() for name in samplers}
        self._next = 0  # the first index that was never asked for
        self._open: dict[int, tuple[str, int]] = {}  # component, and the index there

    def plan(self, index: int) -> GroupPlan:
        """The plan of the index-th group."""
        name, own = self._place(index)
        step, k = divmod(index, self._groups)
        return replace(self._samplers[name].plan(own), id=f"{step}-{k}", component=name)

    def is_uniform(self, index: int) -> bool:
        """See `TaskSampler`; by tokens, only the component depends on what had been played."""
        name, own = self._place(index)
        return self._samplers[name].is_uniform(own)

    def draws(self) -> dict[int, Any]:
        """Number of each open group's component, which by tokens depends on what had closed, and
        what the component's sampler drew, or None."""
        numbers = {name: number for number, name in enumerate(self._samplers)}
        drawn = {name: sampler.draws() for name, sampler in self._samplers.items()}
        found = {index: [numbers[c], drawn[c].get(own)] for index, (c, own) in self._open.items()}
        return {i: one for i, one in found.items() if self._by_tokens or one[1] is not None}

    def observe(self, groups: Mapping[int, Group]) -> dict[str, float]:
        """Count what was written, and pass each group to its component's sampler."""
        for index in groups:  # before any counts
            self._place(index)
        passed: dict[str, dict[int, Group]] = {name: {} for name in self._samplers}
        for index, group in sorted(groups.items()):
            name, own = self._place(index)
            del self._open[index]
            passed[name][own] = group
            account = self._accounts[name]
            account.open -= 1
            if group.complete:
                account.measured += 1
                account.tokens += _written(group)
        metrics = {}
        for name, of_component in passed.items():
            for metric, value in self._samplers[name].observe(of_component).items():
                first, _, rest = metric.partition("/")
                metrics[f"{first}/{name}/{rest}"] = value
        return metrics

    def save(self) -> dict[str, Any]:
        """What has begun, and what the components' samplers save."""
        return {
            "next": self._next,
            "open": {str(index): list(place) for index, place in self._open.items()},
            "accounts": {
                name: [one.begun, one.open, one.measured, one.tokens]
                for name, one in self._accounts.items()
            },
            "samplers": {name: sampler.save() for name, sampler in self._samplers.items()},
        }

    def load(self, state: Mapping[str, Any], draws: Mapping[int, Any]) -> None:
        """Continue from what `save` gave, and from the draws that were logged since."""
        self._next = state.get("next", 0)
        places = state.get("open", {})
        self._open = {int(index): (name, own) for index, (name, own) in places.items()}
        for name in self._samplers:
            self._accounts[name] = _Account(*state.get("accounts", {}).get(name, ()))
        names = [*self._samplers]
        drawn: dict[str, dict[int, Any]] = {name: {} for name in names}
        for index, (number, of_component) in sorted(draws.items()):
            if index == self._next:
                self._begin(names[number])
            name, own = self._place(index)
            if of_component is not None:
                drawn[name][own] = of_component
        for name, sampler in self._samplers.items():
            sampler.load(state.get("samplers", {}).get(name, {}), drawn[name])

    def _place(self, index: int) -> tuple[str, int]:
        """Component of a group and its index there; those before it begin too."""
        while self._next <= index:
            self._begin(self._choose())
        return self._open[index]

    def _begin(self, name: str) -> None:
        """The next group is of this component."""
        account = self._accounts[name]
        self._open[self._next] = (name, account.begun)
        account.begun += 1
        account.open += 1
        self._next += 1

    def _choose(self) -> str:
        sizes = self._sizes()
        had = {
            name: one.tokens + one.open * sizes[name] if self._by_tokens else Fraction(one.begun)
            for name, one in self._accounts.items()
        }
        total = sum(had.values())
        behind = [name for name in had if had[name] <= self._shares[name] * total]
        return min(behind, key=lambda name: (had[name] + sizes[name]) / self._shares[name])

    def _sizes(self) -> dict[str, Fraction]:
        """What a group of each component is expected to count."""
        if not self._by_tokens:
            return dict.fromkeys(self._accounts, Fraction(1))
        measured = [one for one in self._accounts.values() if one.measured]
        groups, tokens = sum(o.measured for o in measured), sum(o.tokens for o in measured)
        usual = max(Fraction(tokens, groups), Fraction(1)) if groups else Fraction(1)
        return {
            name: max(Fraction(one.tokens, one.measured), Fraction(1)) if one.measured else usual
            for name, one in self._accounts.items()
        }


def _written(group: Group) -> int:
    """Tokens that the policy wrote."""
    return sum(
        len(turn.completion_ids)
        for episode in group.episodes
        for turn in episode.turns
        if turn.seat in group.trainable
    )
