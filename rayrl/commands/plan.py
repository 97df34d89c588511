"""What would run, what it comes to, and what will not fit: before anything starts."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from rayrl.cluster import cluster_address
from rayrl.cluster.memory import Share, shares
from rayrl.config import (
    ClusterConfig,
    Config,
    differences,
    leaves,
    stage_config,
    validate,
)
from rayrl.config.mix import components, eval_cells
from rayrl.config.sync import transport_of
from rayrl.errors import ConfigError, RunFailed
from rayrl.native import missing
from rayrl.run.sampling.mixture import component_shares
from rayrl.run.stage import template_notes
from rayrl.run.start_check import (
    LEARNING,
    Machine,
    all_problems,
    has_replicas,
    local_machine,
    reserved_resources,
    stages_of,
)
from rayrl.terminal import visible
from rayrl.weights.model_dir import is_pretrained, learning_rate, micro_batch_tokens, model_dir

__all__ = ["describe", "run"]

TOO_FAST = 10  # times the usual learning rate


def run(config: Config, *, every: bool = False) -> None:
    """Print the plan.

    Args:
        every: also settings that are left at their defaults.

    Raises:
        RunFailed: something will not fit; it is named in the plan.
    """
    validate(config, "plan")
    machine = local_machine()
    print(visible(describe(config, machine, every=every)))
    found = all_problems(config, machine, _verb(config))
    if found:
        print("\nWill not fit")
        print(visible("\n".join(f"  - {one}" for one in found)))
        raise RunFailed(f"{len(found)} thing{'s' * (len(found) > 1)} will not fit; see the list.")
    print("\nEverything fits.")


def describe(config: Config, machine: Machine, *, every: bool = False) -> str:
    """The plan as text: settings, resources, the batch, the stages.

    Args:
        every: also settings that are left at their defaults.
    """
    parts = [*_settings(config, every), *_resources(config, machine)]
    if config.recipe:
        parts.append(_recipe(config))
    parts += _templates(config)
    if warnings := [*_too_fast(config), *_too_large(config, machine)]:
        parts.append("\n".join(["Warnings", *(f"  - {one}" for one in warnings)]))
    for name, verb, stage in stages_of(config):
        if verb == "train":
            parts.append(f"A step of {name}\n{_batch(stage)}")
        elif verb == "sft" and stage.eval.every:
            parts.append(f"Of {name}\n{_evaluations(stage)}")
    return "\n\n".join(parts)


def _verb(config: Config) -> str:
    """What a plan is of: the recipe, or an evaluation if a server is to be played, or training."""
    if config.recipe:
        return "recipe"
    return "eval" if config.eval.player == "endpoint" else "train"


def _value(config: Config, key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = getattr(node, part)
    return node


def _settings(config: Config, every: bool) -> Iterator[str]:
    changed = differences(config)
    lines = [
        "Settings (* differs from the default)"
        if every
        else "Settings that differ from the defaults (--all: every setting)"
    ]
    section = ""
    for key, _ in leaves():
        if key == "recipe" or not (every or key in changed):
            continue
        head, name = key.split(".", 1)
        if head != section:
            lines.append(f"  {head}")
            section = head
        was = f"   (default {_short(changed[key][0])})" if key in changed else ""
        mark = "*" if every and was else " "
        lines.append(f"  {mark} {name}: {_short(_value(config, key))}{was}")
    if len(lines) > 1:
        yield "\n".join(lines)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 90 else text[:87] + "..."


def _resources(config: Config, machine: Machine) -> Iterator[str]:
    """What the stages have on Ray, those together that have the same."""
    address = cluster_address(config.cluster.address)
    here = f"{machine.cpus} cpus, {machine.gpus} gpus, {machine.memory_gb:.0f} GiB"
    where = f"the cluster at {address}" if address else f"this machine ({here})"
    alike: dict[str, list[str]] = {}
    for name, verb, stage in stages_of(config):
        alike.setdefault(_processes(stage, verb), []).append(name)
    for text, names in alike.items():
        yield f"Resources of {', '.join(names)} on {where}\n{text}"


def _processes(config: Config, verb: str) -> str:
    cluster, learner = config.cluster, config.learner
    rows = []
    if has_replicas(config, verb):
        rows += [
            (
                f"  env workers {_workers(cluster)} × {cluster.env_worker_cpus:g} cpu, "
                f"{cluster.concurrency} live episodes each"
            ),
            (
                f"  replicas    {cluster.replicas} × {cluster.replica_cpus:g} cpu, "
                f"{cluster.replica_gpus:g} gpu, {config.engine.kind}, {config.engine.threads} "
                f"threads, {config.engine.kv_cache_gb:g} GiB of cache"
            ),
            *_other_engine(config),
        ]
    if verb in LEARNING:
        rows.append(
            f"  learners    {learner.world_size} × {cluster.learner_cpus:g} cpu, "
            f"{cluster.learner_gpus:g} gpu, {learner.kind} ZeRO {learner.zero_stage}, "
            f"{learner.threads} threads"
        )
        rows.append(f"  learning    {_rate(config)}")
    if why := _without_compiler(config, verb):
        rows.append(f"  attention   {why}")
    if verb in LEARNING and has_replicas(config, verb):
        rows.append(f"  weights     {_way(config)}")
    if found := _shares(config, verb):
        rows.append(f"  memory      {_memory(found)}")
    cpus, gpus = reserved_resources(config, verb)
    return "\n".join([*rows, f"  reserved    {cpus:g} cpus, {gpus:g} gpus"])


def _other_engine(config: Config) -> Iterator[str]:
    """The engine that is recommended where another was chosen."""
    engine, gpus = config.engine, config.cluster.replica_gpus
    if engine.kind == "vllm" and not gpus and engine.speculative == "none":
        yield (
            "              engine=embedded needs no vLLM and less memory, starts in seconds and "
            f"is as fast with small models{' and short conversations' if missing() else ''}"
        )
    elif engine.kind == "embedded" and gpus:
        yield "              engine=vllm is recommended on GPUs (docs/vllm.md)"


def _without_compiler(config: Config, verb: str) -> str:
    """What a C++ compiler would do for processes on a CPU, if this machine has none."""
    cluster = config.cluster
    replicas = has_replicas(config, verb) and config.engine.kind == "embedded"
    on_cpu = (replicas and not cluster.replica_gpus) or (
        verb in LEARNING and not cluster.learner_gpus and config.learner.dtype == "float32"
    )
    why = missing() if on_cpu else None
    return (
        f"by torch, as {why}; in C++ a small model's steps take about a seventh less time"
        if why
        else ""
    )


def _shares(config: Config, verb: str) -> list[Share]:
    return shares(config, learns=verb in LEARNING, plays=has_replicas(config, verb))


def _memory(found: Sequence[Share]) -> str:
    """What the processes take at most."""
    parts = [
        f"{one.count} {one.name}s {one.gb:.1f}" if one.count > 1 else f"{one.name} {one.gb:.1f}"
        for one in found
    ]
    return f"up to about {sum(one.gb for one in found):.1f} GiB: {', '.join(parts)}"


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
    for name, verb, stage in stages_of(config):
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


def _too_large(config: Config, machine: Machine) -> Iterator[str]:
    """Stages that may need more memory than this machine has, if they run here."""
    if cluster_address(config.cluster.address):
        return
    for name, verb, stage in stages_of(config):
        needed = sum(one.gb for one in _shares(stage, verb))
        if needed > machine.memory_gb:
            yield (
                f"{name} may take {needed:.1f} GiB of memory, and this machine has "
                f"{machine.memory_gb:.1f}: lower learner.micro_batch_tokens, engine.kv_cache_gb or "
                "cluster.replicas."
            )


def _workers(cluster: ClusterConfig) -> str:
    least, most = cluster.env_workers, cluster.most_env_workers
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


def _at_most(config: Config) -> str:
    """The bound of a micro-batch, unless the model that decides it is missing."""
    with contextlib.suppress(ConfigError):  # `problems` says it
        folder, gpu = model_dir(config.model.path), config.cluster.learner_gpus > 0
        return f" of at most {micro_batch_tokens(config, folder, gpu=gpu)} tokens"
    return ""


def _batch(config: Config) -> str:
    train, algo = config.train, config.algo
    episodes = train.groups * train.group_size
    live = min(episodes, config.cluster.most_env_workers * config.cluster.concurrency)
    slots = config.cluster.replicas * config.engine.max_live
    rows = [
        f"  {train.groups} groups × {train.group_size} episodes = {episodes} episodes",
        *_mixture(config),
        *(
            [f"  up to {train.refill:g} times as many, to replace groups that teach nothing"]
            if train.refill > 1
            else []
        ),
        *(
            [f"  {train.uniform_share:.0%} of the tasks uniformly, the others by {by}"]
            if (by := train.task_sampling) != "uniform"
            else []
        ),
        f"  {live} live at once, {min(live, slots)} decoded at once",
        (
            f"  about {episodes / config.learner.world_size:g} episodes per rank, in micro-batches"
            f"{_at_most(config)}"
        ),
        (
            f"  {algo.epochs} × {algo.minibatches} optimizer steps (passes × minibatches) of about "
            f"{episodes / algo.minibatches:g} episodes"
        ),
        *(
            f"  replies of at most {own.sampling.max_tokens} tokens at temperature "
            f"{own.sampling.temperature:g}{f' in {name}' if name else ''}"
            for name, own in components(config).items()
        ),
        (
            f"  {train.steps} steps = {train.steps * episodes} episodes, at most {train.max_lag} "
            "versions behind"
        ),
    ]
    if config.eval.every:
        rows.append(_evaluations(config))
    return "\n".join(rows)


def _mixture(config: Config) -> Iterator[str]:
    """What each environment of a mixture has of a step."""
    unit = "groups" if config.env.mix_by == "episodes" else "groups at first, then by tokens"
    shares = component_shares(config) if config.env.mix else {}
    for name, share in shares.items():
        about = f"{float(share * config.train.groups):.3g} {unit}"
        yield f"    {name} ({config.env.mix[name]['name']}): {float(share):.1%}, {about}"


def _evaluations(config: Config) -> str:
    found, played = config.eval, components(config).items()
    each = found.episodes * sum(len(eval_cells(own, name)) for name, own in played)
    start = ", before the first" if found.at_start else ""
    return f"  evaluations of {each} episodes every {found.every} steps{start} and after the last"


def _templates(config: Config) -> Iterator[str]:
    """What the models' chat templates do of their own."""
    models = []
    for _, _, stage in stages_of(config):
        models.append(stage.model.path)
        for own in components(stage).values():
            seats = own.env.seats.values()
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
