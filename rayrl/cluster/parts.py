"""Parts of what `actors` opens, by themselves: the players of some seats, in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager

from rayrl.cluster.code_bundle import played_code
from rayrl.cluster.open import (
    check_endpoint,
    deploy_models,
    is_model,
    make_environment,
    model_of,
    worker_imports,
)
from rayrl.cluster.session import open_session
from rayrl.cluster.workers.env_worker import EnvWorker, PlayedEnv, WorkerJob
from rayrl.config import Config
from rayrl.rollout.agent import Player
from rayrl.rollout.players import PolicyPlayer
from rayrl.types import Sampling

__all__ = ["greedy_player", "open_players"]


@asynccontextmanager
async def open_players(
    config: Config, seats: Mapping[str, str], sampling: Sampling
) -> AsyncIterator[Mapping[str, Player]]:
    """Players in this process for some seats of `config.env`; the models behind them on replicas.

    Args:
        seats: who plays them; without a model among these, Ray is not started at all.
    """
    await check_endpoint(config, seats)
    envs = {"": PlayedEnv(make_environment(config).spec, dict(seats), sampling)}
    models = {who: model_of(who, config) for who in seats.values() if is_model(who)}
    with ExitStack() as stack:
        job = WorkerJob(envs, config)
        if models:
            session = stack.enter_context(
                open_session(
                    config.cluster,
                    None,
                    played_code(config),
                    imports=worker_imports(config, engine=True),
                )
            )
            apps = {who: f"{session.name}-{number}" for number, who in enumerate(models)}
            job = WorkerJob(envs, config, models, apps)
            await deploy_models(job, session, stack, pushed=False)
        yield EnvWorker(job).players[""]


@asynccontextmanager
async def greedy_player(
    job: WorkerJob, component: str = "", *, min_version: int = 0
) -> AsyncIterator[Player]:
    """Who plays an environment's only seat, in this process; a model decodes greedily.

    For exhaustive checks, whose tree grows by the answers. Models answer from the replicas that the
    workers ask.

    Args:
        min_version: weights older than this must not answer.
    """
    worker = EnvWorker(job)
    try:
        (player,) = worker.players[component].values()
        if isinstance(player, PolicyPlayer):
            player = player.at_temperature(0.0)
            player.min_version = min_version
        yield player
    finally:
        await worker.close()
