"""What a verb needs before it starts: what is not there or will not fit, a sentence each."""

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

from rayrl.cluster import cluster_address
from rayrl.cluster.weight_sync.topology import transport_of
from rayrl.config import Config, EndpointConfig, stage_config
from rayrl.config.registry import load_function
from rayrl.environment.registry import load_env
from rayrl.environment.signature import suggestion
from rayrl.errors import ConfigError
from rayrl.run.stage import POLICY, check_trained, is_finished, seats_of, template_notes
from rayrl.weights.model_dir import model_dir

__all__ = [
    "LEARNING",
    "Machine",
    "all_problems",
    "check_start",
    "problems",
    "reserved",
    "stages_of",
    "this_machine",
]

LEARNING = ("sft", "train")  # verbs with learners
WRITING = ("synth", "sft", "train", "eval")  # verbs with a run folder
LOOPBACK = ("127.0.0.1", "localhost", "::1")
STORED = 2.5  # versions of the weights in the object store at a push, and room to move
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Machine:
    """What there is to run on. Memory in GiB."""

    cpus: int
    gpus: int
    memory_gb: float


def this_machine() -> Machine:
    """The machine this process runs on, within its container's limits."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text))
    gpus = len([one for one in Path("/dev").glob("nvidia[0-9]*") if one.name[6:].isdigit()])
    return Machine(len(os.sched_getaffinity(0)), gpus, memory / 2**30)


def check_start(config: Config, verb: str, done: Collection[str] = ()) -> None:
    """What every verb does before it starts anything: refuse what `rayrl plan` says won't fit.

    A run that has nothing left to do needs nothing.

    Args:
        done: stages of a recipe that are finished.

    Raises:
        ConfigError: naming all of it.
    """
    if verb in WRITING and _is_done(config, verb):
        return
    found = all_problems(config, this_machine(), verb, done)
    if found:
        many = "".join(f"\n  - {one}" for one in found)
        raise ConfigError(found[0] if len(found) == 1 else f"this cannot run:{many}")


def _is_done(config: Config, verb: str) -> bool:
    """Whether the run has nothing left to do; learning may have got more steps."""
    file = Path(config.run.dir) / "result.json"
    if not is_finished(config.run.dir) or verb not in LEARNING:
        return is_finished(config.run.dir)
    steps = json.loads(file.read_text("utf-8")).get("steps", 0)
    return bool(steps >= (config.train if verb == "train" else config.sft).steps)


def all_problems(
    config: Config, machine: Machine, verb: str, done: Collection[str] = ()
) -> list[str]:
    """Those of `verb`; of a recipe, those of each stage that is not done, once."""
    parts = [(verb, config)]
    if verb == "recipe":
        parts = [(verb, part) for name, verb, part in _as_they_start(config) if name not in done]
    return list(dict.fromkeys(one for verb, part in parts for one in problems(part, machine, verb)))


def _as_they_start(config: Config) -> Iterator[tuple[str, str, Config]]:
    """Name, verb and settings of the stages, but for what earlier ones make."""
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


def problems(config: Config, machine: Machine | None = None, verb: str = "train") -> list[str]:
    """What `verb` would ask for by `config` that is not there, a sentence each with the remedy."""
    machine = machine or this_machine()
    found, seats = [], [POLICY]
    try:
        seats = _seats(config, verb)
    except ConfigError as error:
        found.append(str(error))
    models = {who for who in seats if who == POLICY or who.startswith("model:")}
    return [
        *found,
        *_too_much(config, machine, verb, len(models)),
        *_missing(config, verb, seats),
        *_unusable(config, verb, models),
    ]


def _seats(config: Config, verb: str) -> list[str]:
    """Who plays in the environment of `verb`, by seat; the environment and its settings are there.

    Raises:
        ConfigError: they are not, or nobody would be trained.
    """
    if verb == "serve":
        return [POLICY]
    if verb == "sft":
        return []
    environment = load_env(config.env.name).configure(config.env.args, config.env.rewards)
    if verb == "train":
        check_trained(environment, config)
    for args in config.eval.cells.values() if verb == "eval" else ():
        environment.configure(args)
    player = {"synth": config.synth.player, "eval": config.eval.player, "play": config.play.player}
    seats = seats_of(environment, config, player.get(verb, "model"))
    if verb == "play":
        seats.pop(config.play.seat, None)  # a person sits there
    for seat, who in seats.items():
        name = who.removeprefix("player:")
        if name != who and name not in environment.players:
            near = suggestion(name, list(environment.players))
            raise ConfigError(f"{environment.name!r} has no player {name!r} for {seat}.{near}")
    return list(seats.values())


def _too_much(config: Config, machine: Machine, verb: str, models: int) -> Iterator[str]:
    cluster, engine = config.cluster, config.engine
    if _here(config):
        cpus, gpus = reserved(config, verb, models)
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
        needs = STORED * _weights_gb(config) if verb == "train" else 0.0
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
    room = shutil.disk_usage(_existing(Path(config.run.dir))).free / 2**30
    if verb in LEARNING and room < (needs := _stored_gb(config)):
        yield (
            f"run.dir={config.run.dir}: {room:.1f} GiB left on that disk, and checkpoints and the "
            f"model take about {needs:.1f} GiB; make room, or lower run.keep_checkpoints."
        )


def _missing(config: Config, verb: str, seats: Sequence[str]) -> Iterator[str]:
    data, key, url = config.sft.data, config.endpoint.api_key_env, config.endpoint.url
    if verb == "sft" and data and not Path(data).is_file():
        yield f"sft.data={data}: there is no such file; rayrl synth writes one."
    # a server on this machine seldom wants one; a variable that somebody named should be there
    optional = key == EndpointConfig().api_key_env and urlsplit(url).hostname in LOOPBACK
    if "endpoint" in seats and key and not os.environ.get(key) and not optional:
        yield (
            f"endpoint.api_key_env={key}: that variable is not set; export it, or set "
            "endpoint.api_key_env='' for a server that wants no key."
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
    if config.lora.rank and _here(config) and not _installed("peft"):
        yield f"lora.rank={config.lora.rank}: peft is not installed; pip install 'rayrl[lora]'."


def _unusable(config: Config, verb: str, models: Collection[str]) -> Iterator[str]:
    """What is wrong with the models and with what generates from them."""
    if models and config.engine.kind == "vllm" and _here(config) and not _installed("vllm"):
        yield "engine.kind=vllm: vLLM is not installed; docs/vllm.md says how."
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
    for path in sorted(paths | {who.removeprefix("model:") for who in models} - {POLICY}):
        try:
            model_dir(path)
            template_notes([path])
        except ConfigError as error:
            yield str(error)


def _here(config: Config) -> bool:
    """Whether all processes will be on this machine; other nodes may have what this one lacks."""
    return not cluster_address(config.cluster.address)


def _installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a mere folder of that name has none


def _existing(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)


def _weights_gb(config: Config) -> float:
    """What a push of the model is, in GiB; 0 where that cannot be told."""
    try:
        folder = model_dir(config.model.path)
        settings = json.loads((folder / "config.json").read_text("utf-8"))
        here = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    except (ConfigError, ValueError, OSError):
        return 0.0
    stored = settings.get("dtype") or settings.get("torch_dtype") or "float32"
    return here / BYTES.get(stored, 4) * BYTES[config.learner.dtype] / 2**30


def _stored_gb(config: Config) -> float:
    """What checkpoints and the exported model take on the disk, in GiB; 0 where that is not known.

    A checkpoint has the weights, AdamW's two moments of each in fp32, and in bf16 fp32 masters.
    Adapters take far less.
    """
    weights = _weights_gb(config)
    of_optimizer = 2.0 if config.learner.dtype == "float32" else 6.0
    checkpoint = 0.0 if config.lora.rank else weights * (1 + of_optimizer)
    return (config.run.keep_checkpoints + 1) * checkpoint + weights


def _positions(model: str) -> int:
    """How many ids the model at `model` has positions for; 0 where that cannot be told."""
    try:
        text = (model_dir(model) / "config.json").read_text("utf-8")
        return int(json.loads(text).get("max_position_embeddings", 0))
    except (ConfigError, ValueError, AttributeError, TypeError):
        return 0


def stages_of(config: Config) -> Iterator[tuple[str, str, Config]]:
    """Name, verb and settings of what runs: the recipe's stages, or else the training loop."""
    if not config.recipe:
        yield "training", "train", config
    for stage in config.recipe:
        yield stage.name, stage.verb, stage_config(config, stage)


def reserved(config: Config, verb: str, models: int = 1) -> tuple[float, float]:
    """CPUs and GPUs that the actors of `verb` reserve, with replicas of so many models."""
    cluster = config.cluster
    workers = 0 if verb in ("sft", "serve", "play") else cluster.env_workers
    replicas = 0 if verb == "sft" else models * cluster.replicas
    ranks = config.learner.world_size if verb in LEARNING else 0
    cpus = (
        workers * cluster.env_worker_cpus
        + replicas * cluster.replica_cpus
        + ranks * cluster.learner_cpus
    )
    return cpus, replicas * cluster.replica_gpus + ranks * cluster.learner_gpus
