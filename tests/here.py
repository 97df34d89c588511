"""Rollouts in this process instead of on Ray: the same loop, without workers."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

from rayrl.cluster.open import make_environment
from rayrl.cluster.rollouts import CollectedGroups, sort_out
from rayrl.config import Config
from rayrl.config.mix import components
from rayrl.rollout.agent import Player
from rayrl.rollout.endpoint import EndpointPlayer
from rayrl.rollout.players import ScriptedPlayer
from rayrl.rollout.rollout import GroupPlan, play_groups
from rayrl.types import Group

__all__ = ["Here", "killing"]


class Here:
    """What `open_rollouts` gives; models play like the environment's optimal player.

    Attributes:
        played: ids of the plans that were played, over all instances.
    """

    played: list[str]

    def __init__(
        self, cfg: Config, seats: Mapping[str, Mapping[str, str]], kill_after: int = 0
    ) -> None:
        self.cfg = cfg
        self.envs = {name: make_environment(own, name) for name, own in components(cfg).items()}
        self.players: dict[str, dict[str, Player]] = {
            name: {seat: self._player(name, who) for seat, who in seats[name].items()}
            for name in self.envs
        }
        self.kill_after = kill_after
        self.played = []
        self.winding_down = False

    @property
    def job(self) -> Mapping[str, Mapping[str, Player]]:
        """Its players, of which tests make those of exhaustive checks."""
        return self.players

    def _player(self, component: str, who: str) -> Player:
        if who == "endpoint":
            return EndpointPlayer(self.cfg.endpoint, backoff_s=0.01)
        return ScriptedPlayer(self.envs[component].players[who.partition(":")[2] or "optimal"])

    async def collect(
        self,
        plans: Sequence[GroupPlan],
        on_group: Callable[[Group], None],
        known: Mapping[str, Group],
    ) -> CollectedGroups:
        """As `Rollouts.collect`, but nothing that failed is played once more."""
        groups = dict(known)
        missing = [plan for plan in plans if plan.id not in known]
        opened = itertools.takewhile(lambda _: not self.winding_down, missing)
        for name, run in itertools.groupby(opened, lambda plan: plan.component):
            async for group in play_groups(
                self.envs[name], run, self.players[name], concurrency=4, retries=0
            ):
                groups[group.id] = group
                self.played.append(group.id)
                on_group(group)
                if len(self.played) == self.kill_after:
                    os.kill(os.getpid(), signal.SIGKILL)
        done = [groups[plan.id] for plan in plans if plan.id in groups]
        return sort_out(done, 0, self.cfg.env.failure_budget, self.cfg.env.mix)

    def wind_down(self) -> None:
        """As `Rollouts.wind_down`."""
        self.winding_down = True

    async def close(self) -> None:
        """End connections."""
        for players in self.players.values():
            for player in players.values():
                if isinstance(player, EndpointPlayer):
                    await player.close()


def killing(after: int) -> Callable[..., object]:
    """An `open_rollouts` whose process is killed when `after` episodes have ended; 0: never."""

    @asynccontextmanager
    async def open_here(
        cfg: Config,
        *,
        seats: Mapping[str, Mapping[str, str]],
        temperature: float | None = None,
        setting: str = "",
    ) -> AsyncIterator[Here]:
        here = Here(cfg, seats, after)
        try:
            yield here
        finally:
            await here.close()

    return open_here
