"""Env hosts: Ray actors that each play hundreds of episodes on one event loop."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import ray

from rayrl.agent import Player
from rayrl.chat import Chat
from rayrl.cluster.client import BatchingClient, ServeCall
from rayrl.cluster.session import set_threads
from rayrl.config import Config
from rayrl.endpoint import EndpointPlayer, share
from rayrl.env import Environment, EnvSpec
from rayrl.errors import ConfigError, did_you_mean
from rayrl.isolation import Isolated
from rayrl.players import PolicyPlayer, ScriptedPlayer
from rayrl.registry import load_env
from rayrl.rollout import GroupPlan, play_groups
from rayrl.types import Group, Sampling

__all__ = ["POLICY", "EnvHost", "HostJob", "start_host", "trainable_seats"]

POLICY = "policy"
ISOLATED_SLOTS = 16  # child processes a host, where env.isolated asks for them


@dataclass(frozen=True)
class HostJob:
    """What a host needs to play.

    Attributes:
        env: how to make the environment.
        seats: who plays each seat: policy, endpoint, player:NAME or model:PATH.
        sampling: how models draw.
        models: directory of each model (its tokenizer), by what a seat calls it.
        apps: name of the Serve app of each model, likewise.
    """

    env: EnvSpec
    seats: Mapping[str, str]
    sampling: Sampling
    config: Config
    models: Mapping[str, str] = field(default_factory=dict)
    apps: Mapping[str, str] = field(default_factory=dict)


def trainable_seats(seats: Mapping[str, str]) -> tuple[str, ...]:
    """Seats the policy plays: those whose tokens are trained on."""
    return tuple(seat for seat, who in seats.items() if who == POLICY)


class EnvHost:
    """Plays groups. Methods are thin: `rayrl.rollout` has the one loop."""

    def __init__(self, job: HostJob) -> None:
        set_threads(1)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self._job = job
        self._clients: dict[str, BatchingClient] = {}
        self._winding_down = False

    # Made at the first call and not before: its caller gets what is wrong, whole.

    @cached_property
    def environment(self) -> Environment:
        """What is played."""
        spec = self._job.env
        environment = load_env(spec.ref).configure(spec.args, spec.rewards)
        if not self._job.config.env.isolated:
            return environment
        slots = min(ISOLATED_SLOTS, self._job.config.cluster.concurrency)
        self._isolated = Isolated(environment, slots)
        return self._isolated.environment

    @cached_property
    def players(self) -> Mapping[str, Player]:
        """Who plays each seat."""
        return {seat: self._player(who) for seat, who in self._job.seats.items()}

    def _player(self, who: str) -> Player:
        job, config = self._job, self._job.config
        kind, _, name = who.partition(":")
        if kind == "endpoint":
            endpoint = share(config.endpoint, config.cluster.env_hosts)
            return EndpointPlayer(endpoint, sampling=job.sampling)
        if kind == "player":
            known = self.environment.players
            if name not in known:
                near = did_you_mean(name, known) or f" It has: {', '.join(known) or 'none'}."
                raise ConfigError(
                    f"player:{name}: {self.environment.name!r} has no such player.{near}"
                )
            return ScriptedPlayer(known[name])
        client = BatchingClient(
            ServeCall(job.apps[who], config.cluster.replicas),
            lanes=config.cluster.replicas,
            deadline_s=config.cluster.request_deadline_s,
        )
        self._clients[who] = client
        chat = Chat.load(job.models[who])
        return PolicyPlayer(chat, client, job.sampling, trainable=who == POLICY)

    @property
    def _live(self) -> int:
        """Episodes at once: what a server is asked for is asked by episodes that soon end."""
        job, config = self._job, self._job.config
        most = config.cluster.concurrency
        if "endpoint" in job.seats.values():
            most = min(most, share(config.endpoint, config.cluster.env_hosts).concurrency)
        return most

    def wind_down(self) -> None:
        """Begin no more of the groups of `collect`."""
        self._winding_down = True

    async def ping(self) -> int:
        """Answers only while the event loop runs: env code that blocks it is found by this."""
        assert self.environment.seats  # now: the plans to come hold tasks of its classes
        assert self.players
        return os.getpid()

    async def collect(
        self, plans: Sequence[GroupPlan], min_version: int = 0
    ) -> AsyncIterator[Group]:
        """Play groups and yield them as they finish, in any order."""
        players, env = self.players, self._job.config.env
        if POLICY in self._clients:
            self._clients[POLICY].min_version = min_version
        self._winding_down = False
        async for group in play_groups(
            self.environment,
            itertools.takewhile(lambda _: not self._winding_down, plans),
            players,
            concurrency=self._live,
            retries=env.retries,
            deadline_s=env.deadline_s,
        ):
            yield group


def start_host(job: HostJob) -> Any:
    """Start a host's actor."""
    actor = ray.remote(
        num_cpus=job.config.cluster.env_host_cpus,
        max_concurrency=1000,
    )(EnvHost)
    return actor.remote(job)
