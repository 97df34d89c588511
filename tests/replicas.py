"""Replicas that answer evaluations without Ray and without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rayrl.cluster.rollouts import CollectedGroups
from rayrl.errors import InfraError
from rayrl.rollout.rollout import GroupPlan
from rayrl.types import Episode, Group, Turn, VersionSpan


class Replicas:
    """Plays the plans of evaluations at once.

    Args:
        made_by: version of the weights that replies come from; None: the one that is asked for.
        stop_after: episodes after which it fails.
        score: of an episode, by the version and the number of its plan; by default its task's seed
            modulo 2.
    """

    def __init__(
        self,
        made_by: int | None = None,
        stop_after: int = 1000,
        score: Callable[[int, int], float] | None = None,
    ) -> None:
        self.made_by, self.stop_after, self.score = made_by, stop_after, score
        self.played: list[GroupPlan] = []

    async def collect(
        self,
        plans: Sequence[GroupPlan],
        min_version: int,
        on_group: Callable[[Group], None],
        known: Mapping[str, Group],
    ) -> CollectedGroups:
        done = dict(known)
        version = min_version if self.made_by is None else self.made_by
        for plan in plans:
            if plan.id in known:
                continue
            if len(self.played) == self.stop_after:
                raise InfraError("cut off")
            self.played.append(plan)
            win = float(plan.task.seed % 2)
            if self.score is not None:
                win = self.score(min_version, int(plan.id.rpartition("-")[2]))
            turn = Turn(
                seat="agent",
                prompt=(),
                text="a",
                finish="stop",
                prompt_ids=(1,),
                completion_ids=(2,),
                rollout_logprobs=(-1.0,),
                versions=(VersionSpan(version, 0, 1),),
            )
            episode = Episode(
                id=f"{plan.id}/0",
                env="copyword",
                task=plan.task,
                index=0,
                turns=(turn,),
                scores={"agent": {"win": win}},
                rewards={"agent": win},
            )
            done[plan.id] = Group(plan.id, plan.task, (episode,))
            on_group(done[plan.id])
        return CollectedGroups(tuple(done[plan.id] for plan in plans))
