"""Rollouts in this process instead of on Ray: the same loop, without workers."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

from rayrl.cluster.rollouts import CollectedGroups, sort_out
from rayrl.config import Config
from rayrl.environment.registry import load_env
from rayrl.rollout.agent import Player
from rayrl.rollout.endpoint import EndpointPlayer
from rayrl.rollout.players import ScriptedPlayer
from rayrl.rollout.rollout import GroupPlan, play_groups
from rayrl.types import Group, Sampling

__all__ = ["Here", "killing"]


class Here:
    """What `open_rollouts` gives; models play like the environment's optimal player.

    Attributes:
        played: ids of the plans that were played, over all instances.
    """

    played: list[str]

    def __init__(self, cfg: Config, seats: Mapping[str, str], kill_after: int = 0) -> None:
        self.cfg = cfg
        self.env = load_env(cfg.env.name).configure(cfg.env.args, cfg.env.rewards)
        self.players: dict[str, Player] = {seat: self._player(who) for seat, who in seats.items()}
        self.kill_after = kill_after
        self.played = []
        self.winding_down = False

    def _player(self, who: str) -> Player:
        if who == "endpoint":
            return EndpointPlayer(self.cfg.endpoint, backoff_s=0.01)
        return ScriptedPlayer(self.env.players[who.partition(":")[2] or "optimal"])

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
        async for group in play_groups(self.env, opened, self.players, concurrency=4, retries=0):
            groups[group.id] = group
            self.played.append(group.id)
            on_group(group)
            if len(self.played) == self.kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
        done = [groups[plan.id] for plan in plans if plan.id in groups]
        return sort_out(done, 0, self.cfg.env.failure_budget, self.env.name)

    def wind_down(self) -> None:
        """As `Rollouts.wind_down`."""
        self.winding_down = True

    async def close(self) -> None:
        """End connections."""
        for player in self.players.values():
            if isinstance(player, EndpointPlayer):
                await player.close()


def killing(after: int) -> Callable[..., object]:
    """An `open_rollouts` whose process is killed when `after` episodes have ended; 0: never."""

    @asynccontextmanager
    async def open_here(
        cfg: Config,
        *,
        seats: Mapping[str, str],
        sampling: Sampling | None = None,
        setting: str = "",
    ) -> AsyncIterator[Here]:
        here = Here(cfg, seats, after)
        try:
            yield here
        finally:
            await here.close()

    return open_here
