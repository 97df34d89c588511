"""Open the parts of a run: env workers, replicas of the models that play, and learners."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.serve.handle import DeploymentHandle

from rayrl.cluster import by_value
from rayrl.cluster.code_bundle import played_code
from rayrl.cluster.learner_group import LearnerGroup
from rayrl.cluster.rollouts import Rollouts
from rayrl.cluster.serving.replica import deploy, replica_engine, undeploy
from rayrl.cluster.session import Session, open_session
from rayrl.cluster.weight_sync.probe import Probe
from rayrl.cluster.weight_sync.push import WeightSync, open_store
from rayrl.cluster.weight_sync.transports import open_transport
from rayrl.cluster.workers.env_worker import POLICY, PlayedEnv, WorkerJob
from rayrl.config import Config
from rayrl.config.mix import components, eval_cells, named_keys
from rayrl.config.registry import is_object
from rayrl.config.sync import transport_of
from rayrl.engine import open_engine
from rayrl.environment.environment import Environment
from rayrl.environment.registry import load_env
from rayrl.environment.row_env import SettingsEnvironment
from rayrl.errors import ConfigError, did_you_mean
from rayrl.rollout.endpoint import check_reachable
from rayrl.types import Sampling
from rayrl.weights.model_dir import model_name

__all__ = [
    "check_endpoint",
    "deploy_models",
    "is_model",
    "make_environment",
    "model_of",
    "open_cluster",
    "open_learners",
    "open_rollouts",
    "seat_players",
    "worker_imports",
]


def make_environment(config: Config, component: str = "") -> Environment:
    """Load the environment of `config` with its arguments and reward weights.

    Args:
        component: its name in the mixture that `config` was taken from, see `components`.
    """
    with named_keys(component):
        env = load_env(config.env.name).configure(config.env.args, config.env.rewards)
        return env.labelled(component)


def seat_players(environment: Environment, seats: Mapping[str, str]) -> dict[str, str]:
    """Return the player of each seat; the policy plays seats without one.

    Raises:
        ConfigError: the environment has no such seat.
    """
    for seat in seats:
        if seat not in environment.seats:
            near = did_you_mean(seat, environment.seats) or f" It has: {environment.seats}."
            raise ConfigError(f"env.seats.{seat}: {environment.name!r} has no such seat.{near}")
    return {seat: seats.get(seat, POLICY) for seat in environment.seats}


@asynccontextmanager
async def open_rollouts(
    config: Config,
    *,
    seats: Mapping[str, Mapping[str, str]] | None = None,
    temperature: float | None = None,
    setting: str = "eval.player",
) -> AsyncIterator[Rollouts]:
    """Open env workers of `config.env` and replicas of the models that play, without learners.

    Args:
        config: `model.path` is the policy.
        seats: players by component of the mixture (empty without one) and seat, instead of those
            of `config`, e.g. `{"": {"agent": "player:teacher"}}`; if no seat is a model's, no
            engine starts.
        temperature: used instead of `sampling.temperature`.
        setting: names the player of those of `seats` that `config` does not name.
    """
    envs = _played(config, seats, temperature, setting)
    await check_endpoint(config, *(one.seats for one in envs.values()))
    engine = any(is_model(who) for one in envs.values() for who in one.seats.values())
    with ExitStack() as stack:
        session = stack.enter_context(_session(config, worker_imports(config, engine=engine)))
        job = _job(config, session, envs)
        rollouts = Rollouts(job)
        stack.callback(rollouts.close)
        await _run_all(rollouts.ready(), deploy_models(job, session, stack, pushed=False))
        yield rollouts


@asynccontextmanager
async def open_learners(config: Config, total_steps: int) -> AsyncIterator[LearnerGroup]:
    """Open learners on `config.model`, without rollouts."""
    with ExitStack() as stack:
        stack.enter_context(_session(config, worker_imports(config, learner=True)))
        learners = LearnerGroup(config)
        stack.callback(learners.close)
        await learners.start(model_name(config.model.path), total_steps)
        yield learners


@asynccontextmanager
async def open_cluster(
    config: Config, total_steps: int, turns: Path | None = None
) -> AsyncIterator[tuple[Rollouts, LearnerGroup, WeightSync]]:
    """Open env workers, replicas and learners on `config.model`; pushes update the replicas.

    Args:
        turns: file of the turn log of live episodes, see `Rollouts`.
    """
    envs = _played(config)
    await check_endpoint(config, *(one.seats for one in envs.values()))
    with ExitStack() as stack:
        imports = worker_imports(config, engine=True, learner=True)
        session = stack.enter_context(_session(config, imports))
        job = _job(config, session, envs)
        learners = LearnerGroup(config)
        stack.callback(learners.close)
        rollouts = Rollouts(job, turns=turns)
        stack.callback(rollouts.close)
        store = open_store(session)
        stack.callback(ray.kill, store)
        model = model_name(config.model.path)
        deploying = deploy_models(job, session, stack, pushed=True)
        if config.cluster.colocate:  # first a replica on each GPU, then a rank next to each
            handles, _ = await _run_all(deploying, rollouts.ready())
            await learners.start(model, total_steps)
        else:
            starting = learners.start(model, total_steps)
            handles, *_ = await _run_all(deploying, rollouts.ready(), starting)
        weights = WeightSync(
            open_transport(config, learners, store, handles[POLICY]),
            store,
            handles[POLICY],
            config.cluster.push_deadline_s,
            colocate=config.cluster.colocate,
            probe=Probe(config, learners, handles[POLICY]),
        )
        stack.callback(weights.close)
        yield rollouts, learners, weights


def worker_imports(config: Config, *, engine: bool = False, learner: bool = False) -> list[str]:
    """Modules to fork the workers of a local Ray with (`cluster.fork_workers`, `fork_server.py`).

    Torch is not among them on a machine with a GPU, where that was not tried.
    """
    if not config.cluster.fork_workers:
        return []
    modules = ["ray._private.workers.default_worker", "rayrl.cluster.learner_group"]
    if engine:
        modules += ["ray.serve._private.controller", "ray.serve._private.proxy"]
        modules.append("rayrl.cluster.serving.replica")
    if Path("/dev/nvidiactl").exists():
        return modules
    if engine:
        embedded = config.engine.kind == "embedded"
        modules += ["rayrl.engine.embedded.engine"] if embedded else ["torch", "transformers"]
    if learner:
        modules.append("rayrl.learner.deepspeed")
        if config.learner.kind == "deepspeed":
            modules.append("deepspeed")
    return modules


def _session(config: Config, imports: Sequence[str]) -> AbstractContextManager[Session]:
    return open_session(config.cluster, config.run.dir, played_code(config), imports=imports)


async def check_endpoint(config: Config, *seats: Mapping[str, str]) -> None:
    """If the endpoint plays a seat, check that it answers before anything starts.

    Args:
        seats: of each environment.

    Raises:
        ConfigError: the endpoint does not answer, or refuses the key.
    """
    if any("endpoint" in own.values() for own in seats):
        await check_reachable(config.endpoint)


def _played(
    config: Config,
    seats: Mapping[str, Mapping[str, str]] | None = None,
    temperature: float | None = None,
    setting: str = "",
) -> dict[str, PlayedEnv]:
    """The environments of `config` with their players; the arguments are `open_rollouts`'."""
    played = {}
    for name, own in components(config).items():
        environment = make_environment(own, name)
        with named_keys(name):
            given = own.env.seats if seats is None else seats[name]
            players = seat_players(environment, given)
        passed = {}
        for seat, who in players.items():
            if is_object(who):
                key = f"env.seats.{seat}" if own.env.seats.get(seat) == who else setting
                passed[seat] = by_value.dumps(key, who)
        s = own.sampling
        at = s.temperature if temperature is None else temperature
        sampling = Sampling(at, s.top_p, s.top_k, s.max_tokens, tuple(s.stop))
        keys: dict[str, dict[str, Any]] = {name: {}}
        if isinstance(environment, SettingsEnvironment) and own.eval.cells:
            keys |= eval_cells(own, name)
        for key, args in keys.items():
            spec = environment.configure(args).spec
            played[key] = PlayedEnv(spec, players, sampling, passed)
    return played


def _job(config: Config, session: Session, envs: Mapping[str, PlayedEnv]) -> WorkerJob:
    """Build the env workers' job, with a Serve app per model."""
    players = dict.fromkeys(who for one in envs.values() for who in one.seats.values())
    models = {player: model_of(player, config) for player in players if is_model(player)}
    apps = {player: f"{session.name}-{number}" for number, player in enumerate(models)}
    return WorkerJob(envs, config, models, apps)


async def deploy_models(
    job: WorkerJob, session: Session, stack: ExitStack, *, pushed: bool
) -> dict[str, DeploymentHandle]:
    """Start the replicas of every model; pushes update the policy's if `pushed`."""
    handles = {}
    for player, app in job.apps.items():
        if not session.local:  # the cluster outlives this program
            stack.callback(undeploy, app)
        store = pushed and player == POLICY
        sleeps = store and job.config.cluster.colocate
        lora = job.config.lora if store and transport_of(job.config) == "adapters" else None
        factory = partial(
            open_engine, job.models[player], replica_engine(job.config), sleeps=sleeps, lora=lora
        )
        handles[player] = await deploy(session, job.config, factory, app=app, store=store)
    return handles


async def _run_all(*parts: Coroutine[Any, Any, Any]) -> list[Any]:
    """Run coroutines concurrently; the first error cancels the others."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def is_model(player: str) -> bool:
    """Tell whether `player`, a value of `env.seats`, is a model: the policy or `model:PATH`."""
    return player == POLICY or player.startswith("model:")


def model_of(player: str, config: Config) -> str:
    """Return the name, valid on every node, of the model that plays a seat."""
    return model_name(config.model.path if player == POLICY else player.removeprefix("model:"))
