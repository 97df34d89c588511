"""Check before a start that everything a verb needs exists and fits, one sentence per problem."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from rayrl.cluster import by_value, cluster_address
from rayrl.cluster.memory import DTYPE_BYTES
from rayrl.config import Config, EndpointConfig, stage_config
from rayrl.config.mix import components, named_keys
from rayrl.config.registry import before_colon, from_outside, is_object, load_function
from rayrl.config.sync import transport_of
from rayrl.environment.data_files import HUB
from rayrl.environment.environment import Environment
from rayrl.environment.registry import load_env
from rayrl.environment.rows import Rows
from rayrl.errors import ConfigError, DataError, did_you_mean
from rayrl.rollout.players import player_function
from rayrl.run.stage import POLICY, check_trained, is_finished, seats_of, template_notes
from rayrl.weights.model_dir import model_dir, parameter_count

__all__ = [
    "LEARNING",
    "Machine",
    "all_problems",
    "check_start",
    "has_replicas",
    "local_machine",
    "reserved_resources",
    "stage_problems",
    "stages_of",
]

LEARNING = ("sft", "train")  # verbs with learners
WRITING = ("synth", "sft", "train", "eval")  # verbs with a run folder
LOOPBACK = ("127.0.0.1", "localhost", "::1")
VERSIONS_STORED = 2.5  # versions of the weights in the object store during a push, with slack


@dataclass(frozen=True)
class Machine:
    """Resources of a machine; memory in GiB."""

    cpus: int
    gpus: int
    memory_gb: float


def local_machine() -> Machine:
    """Measure this machine within the limits of the container."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text))
    gpus = sum(device.name[6:].isdigit() for device in Path("/dev").glob("nvidia[0-9]*"))
    return Machine(len(os.sched_getaffinity(0)), gpus, memory / 2**30)


def check_start(config: Config, verb: str, done: Collection[str] = ()) -> None:
    """Refuse to start what `rayrl plan` says will not fit; every verb calls this first.

    A finished run needs nothing.

    Args:
        done: finished stages of a recipe.

    Raises:
        ConfigError: there are problems; the message lists them.
    """
    if verb in WRITING and _is_done(config, verb):
        return
    problems = all_problems(config, local_machine(), verb, done)
    if problems:
        listing = "".join(f"\n  - {problem}" for problem in problems)
        raise ConfigError(problems[0] if len(problems) == 1 else f"this cannot run:{listing}")


def _is_done(config: Config, verb: str) -> bool:
    """Tell whether the run is finished; its number of learning steps may have been raised."""
    file = Path(config.run.dir) / "result.json"
    if not is_finished(config.run.dir) or verb not in LEARNING:
        return is_finished(config.run.dir)
    steps = json.loads(file.read_text("utf-8")).get("steps", 0)
    return bool(steps >= (config.train if verb == "train" else config.sft).steps)


def all_problems(
    config: Config, machine: Machine, verb: str, done: Collection[str] = ()
) -> list[str]:
    """List the problems of `verb`; of a recipe, those of its unfinished stages without repeats."""
    stages = [(verb, config)]
    if verb == "recipe":
        stages = [(verb, stage) for name, verb, stage in _check_stages(config) if name not in done]
    return list(
        dict.fromkeys(
            problem for verb, stage in stages for problem in stage_problems(stage, machine, verb)
        )
    )


def _check_stages(config: Config) -> Iterator[tuple[str, str, Config]]:
    """Yield name, verb and settings of the stages, without files that earlier stages produce."""
    folder, made = Path(config.run.dir).absolute(), set()
    for name, verb, stage in stages_of(config):
        data, model = Path(stage.sft.data).absolute(), Path(stage.model.path).absolute()
        if data in made or data.is_relative_to(folder):
            stage = replace(stage, sft=replace(stage.sft, data=""))
        if model.is_relative_to(folder):
            stage = replace(stage, model=config.model)
        yield name, verb, stage
        if stage.synth.out:
            made.add(Path(stage.synth.out).absolute())


def stage_problems(config: Config, machine: Machine, verb: str) -> list[str]:
    """List what `verb` needs with `config` and lacks, one sentence with a remedy per problem."""
    problems, players = [], [POLICY]
    try:
        players = _players(config, verb)
    except (ConfigError, DataError) as error:
        problems.append(str(error))
    models = {player for player in players if player == POLICY or player.startswith("model:")}
    return [
        *problems,
        *_too_much(config, machine, verb, len(models)),
        *_missing(config, verb, players),
        *_unusable_models(config, verb, models),
    ]


def _players(config: Config, verb: str) -> list[str]:
    """List the players of all seats in the environment of `verb`.

    Raises:
        ConfigError: the environment, its settings or a player do not exist, or no seat is trained.
        DataError: the rows of a data file cannot be used.
    """
    if verb == "serve":
        return [POLICY]
    if not has_replicas(config, verb):
        return []
    played: list[str] = []
    for name, own in components(config).items():
        if verb != "play" or name == config.play.component:
            with named_keys(name):
                played += _players_of(own, verb, name)
    return played


def _players_of(config: Config, verb: str, component: str) -> list[str]:
    environment = load_env(config.env.name).configure(config.env.args, config.env.rewards)
    environment = environment.labelled(component)
    if verb in LEARNING:
        check_trained(environment, config)
    if verb in ("eval", "sft") or (verb == "train" and config.eval.every):
        evaluated = environment.evaluation(config.env.held_out, config.env.duplicates)
        for cell, args in config.eval.cells.items():
            try:
                evaluated.configure(args)
            except ConfigError as error:
                raise ConfigError(f"eval.cells.{cell}: {error}") from error
    if isinstance(environment.source, Rows):
        part = environment.evaluation if verb in ("eval", "sft") else environment.training
        part(config.env.held_out, config.env.duplicates).tasks(seed=0, n=1)
    default = {"synth": config.synth.player, "eval": config.eval.player, "play": config.play.player}
    player = default.get(verb, "model")
    seats = seats_of(environment, config, player)
    if verb == "play":
        seats.pop(config.play.seat, None)  # the user's
    for seat, who in seats.items():
        if who in (POLICY, "endpoint") or who.startswith("model:"):
            continue
        if config.env.seats.get(seat, POLICY) == POLICY:
            _check_player(environment, f"{verb}.player", player)
        else:
            _check_player(environment, f"env.seats.{seat}", who)
    return list(seats.values())


def _check_player(environment: Environment, key: str, who: str) -> None:
    """Raise ConfigError if there is no such scripted player, or it cannot be sent to workers."""
    if is_object(who):
        by_value.dumps(key, who)
        return
    try:
        player_function(environment, key, who)
    except ConfigError as error:
        near = did_you_mean(who.partition(":")[0], before_colon()) if from_outside(who) else ""
        raise ConfigError(f"{error}{near}") from error


def _too_much(config: Config, machine: Machine, verb: str, models: int) -> Iterator[str]:
    cluster, engine = config.cluster, config.engine
    if _is_local(config):
        cpus, gpus = reserved_resources(config, verb, models)
        if cpus > machine.cpus:
            yield (
                f"{cpus:g} cpus are reserved and this machine has {machine.cpus}: lower "
                "cluster.*_cpus, cluster.replicas or learner.world_size."
            )
        if gpus > machine.gpus:
            yield (
                f"{gpus:g} gpus are reserved and this machine has {machine.gpus}: lower "
                "cluster.replica_gpus or cluster.learner_gpus."
            )
        pushes = verb in LEARNING and models
        needs = VERSIONS_STORED * _weights_gb(config) if pushes else 0.0
        needs *= transport_of(config) == "object_store"
        if needs > cluster.object_store_gb:
            yield (
                f"cluster.object_store_gb={cluster.object_store_gb:g}: two versions of the weights "
                f"take {needs:.1f} GiB; raise it to {math.ceil(2 * needs) / 2 + 0.5:g}."
            )
        cache = models * cluster.replicas * engine.kv_cache_gb
        if cache > 0.8 * machine.memory_gb and not cluster.replica_gpus:
            yield (
                f"engine.kv_cache_gb={engine.kv_cache_gb:g} × {models * cluster.replicas} replicas "
                f"is more than 80% of {machine.memory_gb:.0f} GiB: lower it."
            )
    free = shutil.disk_usage(_existing(Path(config.run.dir))).free / 2**30
    if verb in LEARNING and free < (needs := _stored_gb(config)):
        yield (
            f"run.dir={config.run.dir}: {free:.1f} GiB left on that disk, and checkpoints and the "
            f"model take about {needs:.1f} GiB; free some space, or lower run.keep_checkpoints."
        )


def _missing(config: Config, verb: str, players: Sequence[str]) -> Iterator[str]:
    data, key, url = config.sft.data, config.endpoint.api_key_env, config.endpoint.url
    if verb == "sft" and data and not data.startswith(HUB) and not Path(data).exists():
        yield f"sft.data={data}: there is no such file; rayrl synth writes one."
    # local servers rarely need a key; a variable other than the default must be set
    optional = key == EndpointConfig().api_key_env and urlsplit(url).hostname in LOOPBACK
    if "endpoint" in players and key and not os.environ.get(key) and not optional:
        yield (
            f"endpoint.api_key_env={key}: that variable is not set; export it, or set "
            "endpoint.api_key_env='' for a server without keys."
        )
    if verb not in LEARNING:
        return
    if config.run.wandb_project and not _installed("wandb"):
        yield (
            f"run.wandb_project={config.run.wandb_project}: wandb is not installed; "
            "pip install 'rayrl[wandb]', or leave the setting empty."
        )
    for key in ("loss", "advantage") if verb == "train" else ():
        if ":" in (reference := getattr(config.algo, key)):
            try:
                load_function(f"algo.{key}", reference)
            except ConfigError as error:
                yield str(error)
    if config.lora.rank and _is_local(config) and not _installed("peft"):
        yield f"lora.rank={config.lora.rank}: peft is not installed; pip install 'rayrl[lora]'."


def _unusable_models(config: Config, verb: str, models: Collection[str]) -> Iterator[str]:
    """Yield the problems of the models and of their engine."""
    if models and config.engine.kind == "vllm" and _is_local(config) and not _installed("vllm"):
        yield "engine.kind=vllm: vLLM is not installed; docs/vllm.md says how."
    suffix = config.engine.speculative == "suffix"
    if models and suffix and _is_local(config) and not _installed("arctic_inference"):
        yield (
            "engine.speculative=suffix: arctic-inference is not installed; pip install "
            "arctic-inference==0.1.1, or choose ngram."
        )
    longest = _positions(config.model.path) if POLICY in models else 0
    if longest and config.engine.max_len > longest:
        yield (
            f"engine.max_len={config.engine.max_len}: the model at {config.model.path} has "
            f"positions for {longest}; lower it, or 0 for what the model allows."
        )
    if longest and verb != "serve" and config.sampling.max_tokens >= longest:
        yield (
            f"sampling.max_tokens={config.sampling.max_tokens}: the model at {config.model.path} "
            f"has positions for {longest}, prompt included; lower it."
        )
    paths = {config.model.path} if POLICY in models or verb in LEARNING else set()
    for path in sorted(paths | {model.removeprefix("model:") for model in models} - {POLICY}):
        try:
            model_dir(path)
            template_notes([path])
        except ConfigError as error:
            yield str(error)


def _is_local(config: Config) -> bool:
    """Tell whether all processes run on this machine; other nodes may have what it lacks."""
    return not cluster_address(config.cluster.address)


def _installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a plain folder of that name has none


def _existing(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)


def _weights_gb(config: Config) -> float:
    """Size of a push of the model in GiB; 0 if unknown."""
    try:
        size = parameter_count(model_dir(config.model.path))
    except (ConfigError, OSError):
        return 0.0
    return size * DTYPE_BYTES[config.learner.dtype] / 2**30


def _stored_gb(config: Config) -> float:
    """Size of checkpoints and the exported model on the disk in GiB; 0 if unknown.

    A checkpoint holds the weights, AdamW's two fp32 moments per weight, and fp32 master weights if
    the weights are bf16. Checkpoints of adapters are neglected.
    """
    weights = _weights_gb(config)
    of_optimizer = 2.0 if config.learner.dtype == "float32" else 6.0
    checkpoint = 0.0 if config.lora.rank else weights * (1 + of_optimizer)
    return (config.run.keep_checkpoints + 1) * checkpoint + weights


def _positions(model: str) -> int:
    """Number of positions of the model at path `model`; 0 if unknown."""
    try:
        text = (model_dir(model) / "config.json").read_text("utf-8")
        return int(json.loads(text).get("max_position_embeddings", 0))
    except (ConfigError, ValueError, AttributeError, TypeError):
        return 0


def stages_of(config: Config) -> Iterator[tuple[str, str, Config]]:
    """Yield name, verb and settings of the recipe's stages; without a recipe, of the training."""
    if not config.recipe:
        yield "training", "train", config
    for stage in config.recipe:
        yield stage.name, stage.verb, stage_config(config, stage)


def has_replicas(config: Config, verb: str) -> bool:
    """Whether `verb` plays: fine-tuning does for its evaluations only."""
    return verb != "sft" or bool(config.eval.every)


def reserved_resources(config: Config, verb: str, models: int = 1) -> tuple[float, float]:
    """CPUs and GPUs reserved by the actors of `verb`, with replicas of `models` models."""
    cluster = config.cluster
    plays = has_replicas(config, verb)
    workers = cluster.env_workers if plays and verb not in ("serve", "play") else 0
    replicas = models * cluster.replicas if plays else 0
    ranks = config.learner.world_size if verb in LEARNING else 0
    cpus = (
        workers * cluster.env_worker_cpus
        + replicas * cluster.replica_cpus
        + ranks * cluster.learner_cpus
    )
    return cpus, replicas * cluster.replica_gpus + ranks * cluster.learner_gpus
