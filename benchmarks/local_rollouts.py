"""Rollouts on a local Ray whose replica has an engine that computes nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fake_engine import FakeEngine  # in this folder

import rayrl
from rayrl import Sampling
from rayrl.cluster.rollouts import Rollouts
from rayrl.cluster.serving.replica import deploy
from rayrl.cluster.session import open_session
from rayrl.cluster.workers.env_worker import PlayedEnv, WorkerJob
from rayrl.config import from_dict
from rayrl.engine.protocol import Engine
from rayrl.weights.model_dir import model_dir

__all__ = ["open_rollouts"]


@asynccontextmanager
async def open_rollouts(
    env: str,
    reply: tuple[int, ...],
    *,
    model: str = "embedded",
    latency: float = 0.0,
    **cluster: Any,
) -> AsyncIterator[tuple[Rollouts, Any]]:
    """Open rollouts of the environment `env`, ready to play, and the Serve handle of its replica.

    Args:
        reply: ids of every answer.
        model: whose tokenizer is used.
        latency: mean seconds until an answer.
        cluster: settings, as `concurrency` and `env_workers`.
    """
    settings: Mapping[str, Any] = {"name": env}
    config = from_dict({"env": settings, "cluster": cluster, "model": {"path": model}})

    def engine() -> Engine:
        return FakeEngine(reply, latency)  # type: ignore[return-value]  # has all that rollouts use

    with open_session(config.cluster) as session:
        app = f"{session.name}-fake"
        handle = await deploy(session, config, engine, app=app, store=False)
        models, apps = {"policy": str(model_dir(model))}, {"policy": app}
        played = PlayedEnv(rayrl.load_env(env).spec, {"agent": "policy"}, Sampling())
        rollouts = Rollouts(WorkerJob({"": played}, config, models, apps))
        try:
            await rollouts.ready()
            yield rollouts, handle
        finally:
            rollouts.close()
