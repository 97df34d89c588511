"""The driver's side of playing: who plays what, and what happens to what goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from rayrl.cluster.hosts import HostJob, start_host, trainable_seats
from rayrl.errors import InfraError, RayrlError, RunFailed
from rayrl.rollout import GroupPlan
from rayrl.types import Episode, Failure, Group

__all__ = ["Collection", "Rollouts", "sort_out"]

GRACE_S = 5.0  # a host may be silent this much longer than env.deadline_s before it counts as hung
PING_EVERY_S = 1.0
START_DEADLINE_S = 300.0
BLAMED_AFTER = 2  # host deaths, the last one alone on the host, after which a group is to blame


@dataclass(frozen=True, slots=True)
class Collection:
    """What came of a batch of plans.

    Attributes:
        groups: complete groups in the order of their plans.
        dropped: groups with an episode that failed or is too old; never trained on.
        env_failures: episodes whose environment failed.
        infra_failures: episodes that failed otherwise, after their retries.
        stale: episodes made with older weights than asked for.
    """

    groups: tuple[Group, ...]
    dropped: tuple[Group, ...] = ()
    env_failures: int = 0
    infra_failures: int = 0
    stale: int = 0


def sort_out(groups: Sequence[Group], min_version: int, budget: float, env: str) -> Collection:
    """Separate what can be trained on, and stop a run whose environment fails too often.

    Args:
        groups: in the order of their plans.
        min_version: tokens of older weights make an episode stale.
        budget: share of the episodes whose environment may fail.
        env: the environment's name, for the message.

    Raises:
        RunFailed: the budget is exceeded, or no group is left.
    """
    episodes = [episode for group in groups for episode in group.episodes]
    failed = [(e, e.failure) for e in episodes if e.failure is not None]
    by_env = [(e, f) for e, f in failed if f.kind == "env"]
    if len(by_env) > budget * len(episodes):
        raise RunFailed(
            f"environment {env!r} failed in {len(by_env)} of {len(episodes)} episodes, more than "
            f"env.failure_budget={budget:g} allows.\n{_details(*by_env[0])}"
        )
    kept = tuple(
        g for g in groups if g.complete and not any(_stale(e, min_version) for e in g.episodes)
    )
    if groups and not kept:
        what = _details(*failed[0]) if failed else f"all are older than version {min_version}"
        raise RunFailed(f"none of {len(groups)} groups is complete.\n{what}")
    return Collection(
        groups=kept,
        dropped=tuple(g for g in groups if g not in kept),
        env_failures=len(by_env),
        infra_failures=len(failed) - len(by_env),
        stale=sum(_stale(e, min_version) for e in episodes),
    )


def _stale(episode: Episode, min_version: int) -> bool:
    return episode.min_version is not None and episode.min_version < min_version


def _broken(group: Group) -> bool:
    """Whether an episode failed for no fault of its environment: worth playing once more."""
    return any(e.failure is not None and e.failure.kind == "infra" for e in group.episodes)


def _details(episode: Episode, failure: Failure) -> str:
    return "\n".join(
        part
        for part in (
            f"episode {episode.id}: {failure.message}",
            f"task: {episode.task}",
            failure.traceback.rstrip(),
        )
        if part
    )


class HostGone(Exception):
    """A host died, or its event loop is blocked."""


class Rollouts:
    """Plays plans on a set of hosts.

    A plan always goes to the same host, so that its order of events is as repeatable as can be;
    results do not depend on it. A host that dies or hangs is replaced, and what it had not finished
    is played again one group at a time: a group that takes its host down again, alone, is recorded
    as a failure of the environment.

    Attributes:
        job: what the hosts play.
        restarts: hosts replaced so far.
    """

    def __init__(self, job: HostJob, start: Callable[[HostJob], Any] = start_host) -> None:
        self.job = job
        self._start = start
        self._hosts = [start(job) for _ in range(job.config.cluster.env_hosts)]
        self.restarts = 0
        self._winding_down = False

    async def ready(self) -> None:
        """Wait until every host can play.

        Raises:
            ConfigError: a setting the hosts cannot work with.
        """
        await asyncio.gather(*(self._started(host) for host in self._hosts))

    async def collect(
        self,
        plans: Sequence[GroupPlan],
        min_version: int = 0,
        on_group: Callable[[Group], None] = lambda group: None,
        known: Mapping[str, Group] | None = None,
    ) -> Collection:
        """Play all plans.

        Args:
            plans: with ids that differ.
            min_version: no token may come from older weights.
            on_group: called as each group finishes, in any order.
            known: groups of these plans that were played before, by id.

        Returns:
            What was played and known; after `wind_down`, of some plans only.

        Raises:
            RunFailed: see `sort_out`.
        """
        done: dict[str, Group] = dict(known or {})
        self._winding_down = False

        def keep(group: Group) -> None:
            done[group.id] = group
            on_group(group)

        await self._share([p for p in plans if p.id not in done], min_version, keep)
        again = [plan for plan in plans if plan.id in done and _broken(done[plan.id])]
        await self._share(again, min_version, keep)
        env = self.job.config.env
        groups = [done[plan.id] for plan in plans if plan.id in done]
        return sort_out(groups, min_version, env.failure_budget, env.name)

    def wind_down(self) -> None:
        """Let `collect` play what is begun and begin nothing more."""
        self._winding_down = True
        for host in self._hosts:
            host.wind_down.remote()

    async def _share(
        self, plans: Sequence[GroupPlan], min_version: int, keep: Callable[[Group], None]
    ) -> None:
        n = len(self._hosts)
        slots = [
            asyncio.ensure_future(self._play(slot, plans[slot::n], min_version, keep))
            for slot in range(n)
        ]
        try:
            await asyncio.gather(*slots)
        finally:
            for slot in slots:
                slot.cancel()

    async def _play(
        self,
        slot: int,
        plans: Sequence[GroupPlan],
        min_version: int,
        keep: Callable[[Group], None],
    ) -> None:
        """Play a slot's share, through deaths of its host."""
        left = {plan.id: plan for plan in plans}
        deaths = dict.fromkeys(left, 0)
        one_by_one = False
        while left and not self._winding_down:
            now = list(left.values())[: 1 if one_by_one else None]
            try:
                async for group in self._stream(slot, now, min_version):
                    del left[group.id]
                    keep(group)
            except HostGone as gone:
                await self._replace(slot)
                one_by_one = True
                for plan in now:
                    deaths[plan.id] += plan.id in left
                if len(now) == 1 and deaths[now[0].id] >= BLAMED_AFTER:
                    keep(self._blamed(left.pop(now[0].id), str(gone)))

    async def _stream(
        self, slot: int, plans: Sequence[GroupPlan], min_version: int
    ) -> AsyncIterator[Group]:
        host = self._hosts[slot]
        watch = asyncio.create_task(self._watch(host))
        stream = aiter(host.collect.options(num_returns="streaming").remote(plans, min_version))
        try:
            while True:
                following = asyncio.ensure_future(_next(stream))
                await asyncio.wait({following, watch}, return_when=asyncio.FIRST_COMPLETED)
                if not following.done():
                    following.cancel()
                    raise HostGone(watch.result())
                group = following.result()
                if group is None:
                    return
                yield group
        finally:
            watch.cancel()

    async def _watch(self, host: Any) -> str:
        """Returns why, once the host is silent."""
        patience = self.job.config.env.deadline_s + GRACE_S
        while True:
            try:
                async with asyncio.timeout(patience):
                    await host.ping.remote()
            except TimeoutError:
                return f"its code blocked the event loop of its host for more than {patience:g} s"
            except RayActorError as error:
                return f"its host process died: {error}"
            await asyncio.sleep(PING_EVERY_S)

    async def _replace(self, slot: int) -> None:
        with suppress(Exception):  # it may be dead already
            ray.kill(self._hosts[slot])
        self._hosts[slot] = self._start(self.job)
        self.restarts += 1
        await self._started(self._hosts[slot])

    async def _started(self, host: Any) -> None:
        """Wait until a host has its imports and players: this time is not its environment's."""
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                await _result(host.ping.remote())
        except TimeoutError:
            raise InfraError(f"an env host did not start within {START_DEADLINE_S:g} s") from None
        except HostGone as gone:
            raise RunFailed(f"an env host cannot start: {gone}") from gone

    def _blamed(self, plan: GroupPlan, why: str) -> Group:
        name = self.job.config.env.name
        failure = Failure("env", f"environment {name!r}: {why}")
        episodes = tuple(
            Episode(f"{plan.id}/{index}", name, plan.task, index, (), failure=failure)
            for index in range(plan.size)
        )
        return Group(plan.id, plan.task, episodes, trainable_seats(self.job.seats))

    def close(self) -> None:
        """End the hosts."""
        for host in self._hosts:
            with suppress(Exception):
                ray.kill(host)


async def _next(stream: Any) -> Group | None:
    """The next group of a host's stream, None at its end."""
    try:
        group: Group = await _result(await anext(stream))
    except StopAsyncIteration:
        return None
    return group


async def _result(ref: Any) -> Any:
    """A host's answer, with its errors as ours."""
    try:
        return await ref
    except RayTaskError as error:
        if isinstance(error.cause, RayrlError):
            raise error.cause from None
        raise RunFailed(f"an env host failed: {error}") from error
    except RayActorError as error:
        raise HostGone(f"its host process died: {error}") from error
