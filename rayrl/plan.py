"""What would run, what it comes to, and what will not fit: before anything starts."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rayrl.cluster import cluster_address
from rayrl.cluster.topology import transport_of
from rayrl.config import ClusterConfig, Config, differences, leaves, stage_config
from rayrl.errors import ConfigError, RunFailed
from rayrl.models import is_pretrained, learning_rate, model_dir
from rayrl.stage import check_trained, template_notes

__all__ = ["Machine", "describe", "problems", "run", "this_machine"]

LEARNING = ("sft", "train")  # verbs with learners
TOO_FAST = 10  # times the usual learning rate
STORED = 2.5  # versions of the weights in the object store at a push, and room to move
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Machine:
    """What there is to run on. Memory in GiB."""

    cpus: int
    gpus: int
    memory_gb: float


def run(config: Config) -> None:
    """Print the plan.

    Raises:
        RunFailed: something will not fit; it is named in the plan.
    """
    machine = this_machine()
    print(describe(config, machine))
    found = [one for _, verb, stage in _stages(config) for one in problems(stage, machine, verb)]
    found = list(dict.fromkeys(found))
    if found:
        print("\nWill not fit")
        print("\n".join(f"  - {one}" for one in found))
        raise RunFailed(f"{len(found)} thing{'s' * (len(found) > 1)} will not fit; see the list.")
    print("\nEverything fits.")


def this_machine() -> Machine:
    """The machine this process runs on, within its container's limits."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text))
    gpus = len([one for one in Path("/dev").glob("nvidia[0-9]*") if one.name[6:].isdigit()])
    return Machine(len(os.sched_getaffinity(0)), gpus, memory / 2**30)


def describe(config: Config, machine: Machine) -> str:
    """The plan as text: settings, resources, the batch, the stages."""
    parts = [_settings(config), *_resources(config, machine)]
    if config.recipe:
        parts.append(_recipe(config))
    parts += _templates(config)
    if fast := list(_too_fast(config)):
        parts.append("\n".join(["Warnings", *(f"  - {one}" for one in fast)]))
    for name, verb, stage in _stages(config):
        if verb == "train":
            parts.append(f"A step of {name}\n{_batch(stage)}")
    return "\n\n".join(parts)


def _stages(config: Config) -> Iterator[tuple[str, str, Config]]:
    """Name, verb and settings of what runs: the recipe's stages, or else the training loop."""
    if not config.recipe:
        yield "training", "train", config
    for stage in config.recipe:
        yield stage.name, stage.verb, stage_config(config, stage)


def _value(config: Config, key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = getattr(node, part)
    return node


def _settings(config: Config) -> str:
    changed = differences(config)
    lines = ["Settings (* differs from the default, which stands behind it)"]
    section = ""
    for key, _ in leaves():
        if key == "recipe":
            continue
        head, name = key.split(".", 1)
        if head != section:
            lines.append(f"  {head}")
            section = head
        mark, was = " ", ""
        if key in changed:
            mark, was = "*", f"   (default {_short(changed[key][0])})"
        lines.append(f"  {mark} {name}: {_short(_value(config, key))}{was}")
    return "\n".join(lines)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 90 else text[:87] + "..."


def _asked(config: Config, verb: str) -> tuple[float, float]:
    """CPUs and GPUs that the actors of `verb` reserve."""
    cluster = config.cluster
    hosts, replicas = (0, 0) if verb == "sft" else (cluster.env_hosts, cluster.replicas)
    ranks = config.learner.world_size if verb in LEARNING else 0
    cpus = (
        hosts * cluster.env_host_cpus
        + replicas * cluster.replica_cpus
        + ranks * cluster.learner_cpus
    )
    return cpus, replicas * cluster.replica_gpus + ranks * cluster.learner_gpus


def _resources(config: Config, machine: Machine) -> Iterator[str]:
    """What the stages have on Ray, those together that have the same."""
    address = cluster_address(config.cluster.address)
    here = f"{machine.cpus} cpus, {machine.gpus} gpus, {machine.memory_gb:.0f} GiB"
    where = f"the cluster at {address}" if address else f"this machine ({here})"
    alike: dict[str, list[str]] = {}
    for name, verb, stage in _stages(config):
        alike.setdefault(_processes(stage, verb), []).append(name)
    for text, names in alike.items():
        yield f"Resources of {', '.join(names)} on {where}\n{text}"


def _processes(config: Config, verb: str) -> str:
    cluster, learner = config.cluster, config.learner
    rows = []
    if verb != "sft":
        rows += [
            (
                f"  env hosts {_hosts(cluster)} × {cluster.env_host_cpus:g} cpu, "
                f"{cluster.concurrency} live episodes each"
            ),
            (
                f"  replicas  {cluster.replicas} × {cluster.replica_cpus:g} cpu, "
                f"{cluster.replica_gpus:g} gpu, {config.engine.kind}, {config.engine.threads} "
                f"threads, {config.engine.kv_cache_gb:g} GiB of cache"
            ),
        ]
    if verb in LEARNING:
        rows.append(
            f"  learners  {learner.world_size} × {cluster.learner_cpus:g} cpu, "
            f"{cluster.learner_gpus:g} gpu, {learner.kind} ZeRO {learner.zero_stage}, "
            f"{learner.threads} threads"
        )
        rows.append(f"  learning  {_rate(config)}")
    if verb == "train":
        rows.append(f"  weights   {_way(config)}")
    cpus, gpus = _asked(config, verb)
    return "\n".join([*rows, f"  reserved  {cpus:g} cpus, {gpus:g} gpus"])


def _rate(config: Config) -> str:
    """The learning rate, and why where nobody has chosen it."""
    if config.learner.lr is not None:
        return f"at {config.learner.lr:g}"
    try:
        folder = model_dir(config.model.path)
    except ConfigError:  # `problems` says it
        return "by the kind of model"
    kind = "for a pretrained model" if is_pretrained(folder) else "for a model of this size"
    of = ", with adapters" if config.lora.rank and is_pretrained(folder) else ""
    return f"at {learning_rate(config, folder):g} (learner.lr=null: {kind}{of})"


def _too_fast(config: Config) -> Iterator[str]:
    """Learning rates that a person has chosen and that pretrained models do not survive."""
    for name, verb, stage in _stages(config):
        given = stage.learner.lr
        if verb not in LEARNING or given is None:
            continue
        with contextlib.suppress(ConfigError):  # `problems` says it
            folder = model_dir(stage.model.path)
            usual = learning_rate(replace(stage, learner=replace(stage.learner, lr=None)), folder)
            if is_pretrained(folder) and given > TOO_FAST * usual:
                kind = "adapters on a pretrained model" if stage.lora.rank else "a pretrained model"
                yield (
                    f"learner.lr={given:g} of {name} is {given / usual:.0f} times the usual "
                    f"{usual:g} for {kind}: a few steps may ruin what it knows. Lower it, or leave "
                    "it out."
                )


def _hosts(cluster: ClusterConfig) -> str:
    least, most = cluster.env_hosts, cluster.most_env_hosts
    return f"{least}" if most == least else f"{least} (to {most} while groups wait)"


def _way(config: Config) -> str:
    """How weights reach the replicas."""
    cluster, kind = config.cluster, transport_of(config)
    text = "adapters alone, by object_store" if kind == "adapters" else f"by {kind}"
    if kind in ("nccl", "gloo"):
        text += f", in buckets of {cluster.bucket_mb} MiB"
    if cluster.colocate:
        text += "; replicas sleep while learners work"
    return text


def _batch(config: Config) -> str:
    train, algo = config.train, config.algo
    episodes = train.groups * train.group_size
    live = min(episodes, config.cluster.most_env_hosts * config.cluster.concurrency)
    slots = config.cluster.replicas * config.engine.max_live
    rows = [
        f"  {train.groups} groups × {train.group_size} episodes = {episodes} episodes",
        f"  {live} live at once, {min(live, slots)} decoded at once",
        (
            f"  about {episodes / config.learner.world_size:g} episodes a rank, in micro-batches "
            f"of at most {config.learner.micro_batch_tokens} tokens"
        ),
        (
            f"  {algo.epochs} × {algo.minibatches} optimizer steps (passes × minibatches) of about "
            f"{episodes / algo.minibatches:g} episodes"
        ),
        (
            f"  replies of at most {config.sampling.max_tokens} tokens at temperature "
            f"{config.sampling.temperature:g}"
        ),
        (
            f"  {train.steps} steps = {train.steps * episodes} episodes, at most {train.max_lag} "
            "versions behind"
        ),
    ]
    return "\n".join(rows)


def _templates(config: Config) -> Iterator[str]:
    """What the models' chat templates do of their own."""
    models = []
    for _, _, stage in _stages(config):
        models.append(stage.model.path)
        seats = stage.env.seats.values()
        models += [who.removeprefix("model:") for who in seats if who.startswith("model:")]
    with contextlib.suppress(ConfigError):  # `problems` says it
        notes = template_notes(models)
        if notes:
            yield "\n".join(["Chat templates", *(f"  - {note}" for note in notes)])


def _recipe(config: Config) -> str:
    lines = ["Recipe (each stage with what it changes)"]
    for number, stage in enumerate(config.recipe, 1):
        lines.append(f"  {number}. {stage.name} ({stage.verb})")
        ready = stage_config(config, stage)
        for key, (_, now) in differences(ready, config).items():
            lines.append(f"       {key}: {_short(now)}")
    return "\n".join(lines)


def problems(config: Config, machine: Machine | None = None, verb: str = "train") -> list[str]:
    """What `verb` would ask for by `config` that is not there, a sentence each with the remedy."""
    machine = machine or this_machine()
    return [*_too_much(config, machine, verb), *_missing(config, verb)]


def _too_much(config: Config, machine: Machine, verb: str) -> Iterator[str]:
    cluster, engine = config.cluster, config.engine
    if not cluster_address(cluster.address):
        cpus, gpus = _asked(config, verb)
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
        cache = cluster.replicas * engine.kv_cache_gb
        if cache > 0.8 * machine.memory_gb and not cluster.replica_gpus:
            yield (
                f"engine.kv_cache_gb={engine.kv_cache_gb:g} × {cluster.replicas} replicas is more "
                f"than 80% of {machine.memory_gb:.0f} GiB: lower it."
            )
    if config.engine.kind == "vllm" and importlib.util.find_spec("vllm") is None:
        yield "engine.kind=vllm: vLLM is not installed; docs/vllm.md says how."
    room = shutil.disk_usage(_existing(Path(config.run.dir))).free / 2**30
    if room < 1:
        yield f"run.dir={config.run.dir}: {room:.1f} GiB left on that disk; make room for 1 GiB."
    longest = _positions(config.model.path)
    if longest and engine.max_len > longest:
        yield (
            f"engine.max_len={engine.max_len}: the model at {config.model.path} has positions for "
            f"{longest}; lower it, or 0 for what the model allows."
        )
    if longest and config.sampling.max_tokens >= longest:
        yield (
            f"sampling.max_tokens={config.sampling.max_tokens}: the model at {config.model.path} "
            f"has positions for {longest}, prompt included; lower it."
        )


def _missing(config: Config, verb: str) -> Iterator[str]:
    if config.sft.data and not Path(config.sft.data).is_file():
        yield f"sft.data={config.sft.data}: there is no such file; rayrl synth writes one."
    players = (config.synth.player, config.eval.player, *config.env.seats.values())
    key = config.endpoint.api_key_env
    if "endpoint" in players and key and not os.environ.get(key):
        yield (
            f"endpoint.api_key_env={key}: that variable is not set; export it, or set "
            "endpoint.api_key_env='' for a server that wants no key."
        )
    for check in (partial(_usable, config.model.path), partial(_configured, config, verb)):
        try:
            check()
        except ConfigError as error:
            yield str(error)


def _usable(model: str) -> None:
    model_dir(model)
    template_notes([model])


def _configured(config: Config, verb: str) -> None:
    from rayrl.registry import load_env

    environment = load_env(config.env.name)
    environment.configure(config.env.args, config.env.rewards)
    if verb == "train":
        check_trained(environment, config)
    for args in config.eval.cells.values():
        environment.configure({**config.env.args, **args}, config.env.rewards)


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


def _positions(model: str) -> int:
    """How many ids the model at `model` has positions for; 0 where that cannot be told."""
    try:
        text = (model_dir(model) / "config.json").read_text("utf-8")
        return int(json.loads(text).get("max_position_embeddings", 0))
    except (ConfigError, ValueError, AttributeError, TypeError):
        return 0
