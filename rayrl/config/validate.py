"""Whether a configuration makes sense. Every complaint names the key, its value and the remedy.

Nothing is ever rewritten: what was asked for is what runs, or the run does not start.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

from rayrl.config.load import check_types, settings, stage_config
from rayrl.config.mix import check_mix, component_of, components, named_keys
from rayrl.config.schema import Config, Stage
from rayrl.config.stop_rule import parse_stop_rule
from rayrl.config.sync import check_sync
from rayrl.errors import ConfigError, did_you_mean

__all__ = ["validate"]

_NOT_EXTRA = {
    "messages": "an episode's messages are the environment's; remove it.",
    "tools": "an episode's tools are the environment's; remove it.",
    "stream": "an answer is read whole; remove it.",
    "n": "a turn has one answer; remove it.",
    "model": "set endpoint.model.",
}

_WHOLE_RECIPE = ("cluster.address", "run.dir", "run.name")
"""Settings that would do nothing in one stage: Ray is open already, and folders have its name."""


def validate(config: Config, verb: str = "") -> None:
    """Raise ConfigError if `config` cannot do what `verb` needs of it.

    Args:
        config: what to check.
        verb: synth, sft, train, eval, recipe (checks every stage) or another; each has needs of its
            own besides those all share. A plan has those of the recipe, else of train.
    """
    check_types(config)
    _check(config, ("recipe" if config.recipe else "train") if verb == "plan" else verb)


def _check(config: Config, verb: str, *, chained: bool = False) -> None:
    """What `validate` checks of a Config with values of the right types.

    Args:
        chained: the stage follows others of a recipe, which give it its data and its model.
    """
    _check_ranges(config)
    check_mix(config)
    _check_environments(config, verb)
    _check_shared(config)
    if verb == "eval" or (verb in ("train", "sft") and config.eval.every):
        _check_samples(config, config.eval.player if verb == "eval" else "model")
    if verb == "train":
        _check_train(config)
    if verb == "sft":
        _check_sft(config, chained)
    if verb in ("train", "sft"):
        _check_evaluations(config, verb)
    if verb == "train" or (verb == "sft" and config.eval.every):
        _check_pushes(config)
    if verb == "serve":
        _check_serve(config)
    for asking in _asking(config, verb):
        _check_endpoint(config, asking)
        if verb != "play" and config.cluster.most_env_workers > config.endpoint.concurrency:
            grows = config.cluster.env_workers_max > config.cluster.env_workers
            key = "cluster.env_workers_max" if grows else "cluster.env_workers"
            raise _wrong(
                key,
                config.cluster.most_env_workers,
                f"{asking} shares endpoint.concurrency={config.endpoint.concurrency} among the "
                f"env workers, and each needs 1; lower {key} or raise it.",
            )
    if verb == "recipe" and not config.recipe:
        raise ConfigError(
            "recipe=[]: there are no stages. Choose some, as experiment=tictactoe has."
        )
    _check_stages(config)


def _at(config: Config, key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = getattr(node, part)
    return node


def _wrong(key: str, value: object, why: str) -> ConfigError:
    return ConfigError(f"{key}={value}: {why}")


def _check_ranges(config: Config) -> None:
    for key, setting in settings().items():
        value = _at(config, key)
        values = {key: value}
        if isinstance(value, dict):
            values = {f"{key}.{name}": one for name, one in value.items()}
        for name, one in values.items():
            if why := setting.complaint(one):
                raise _wrong(name, one, why)


def _check_environments(config: Config, verb: str) -> None:
    for name, own in components(config).items():
        with named_keys(name):
            if name:
                _check_ranges(own)
            if not own.env.name and (verb != "sft" or config.eval.every):  # chats need none
                raise _wrong(
                    "env.name", "", "no environment is chosen; try env=tictactoe or env.name=NAME."
                )
            _check_seats(own)
            if 0 < own.engine.max_len <= own.sampling.max_tokens:
                raise _wrong(
                    "engine.max_len",
                    own.engine.max_len,
                    "leaves no room for a prompt before sampling.max_tokens="
                    f"{own.sampling.max_tokens}; raise the one or lower the other.",
                )
    if verb == "play" and (config.env.mix or config.play.component):
        component_of(config, "play.component", config.play.component)


def _check_seats(config: Config) -> None:
    for seat, who in config.env.seats.items():
        before, _, name = who.partition(":")
        if who not in ("policy", "endpoint") and not (before and name):
            near = did_you_mean(who, ("policy", "endpoint", f"player:{who}")) if who else ""
            raise _wrong(
                f"env.seats.{seat}",
                who,
                "must be policy, endpoint, player:NAME, model:PATH, rllib:CHECKPOINT, "
                f"module:function or path/to/file.py:function.{near}",
            )


def _check_shared(config: Config) -> None:
    run, algo, learner = config.run, config.algo, config.learner
    if not run.name or "/" in run.name:
        raise _wrong("run.name", run.name, "must be a word without slashes: it names a folder.")
    if config.engine.kind == "embedded" and config.engine.speculative != "none":
        raise _wrong(
            "engine.speculative",
            config.engine.speculative,
            "the embedded engine guesses no tokens; choose engine=vllm, or none.",
        )
    if not config.model.path:
        raise _wrong("model.path", "", "name a Hugging Face directory, or model.path=embedded.")
    for verb in ("eval", "synth", "play"):
        who = getattr(config, verb).player
        if who.startswith("model:"):
            path = who.removeprefix("model:")
            raise _wrong(f"{verb}.player", who, f"set {verb}.player=model model.path={path}.")
    if algo.loss_args and ":" not in algo.loss:
        raise _wrong(
            "algo.loss_args",
            algo.loss_args,
            f"are keywords of a loss from outside, and algo.loss={algo.loss} takes none; remove "
            "them.",
        )
    if 0 < algo.tis_max < 1:
        raise _wrong(
            "algo.tis_max", algo.tis_max, "a bound under 1 shrinks every token; use 0 (off) or ≥ 1."
        )
    if len(learner.betas) != 2 or not all(0 <= beta < 1 for beta in learner.betas):
        raise _wrong(
            "learner.betas", learner.betas, "must be two numbers in [0, 1), as [0.9, 0.95]."
        )
    if learner.kind == "deepspeed" and learner.dtype == "bfloat16" and learner.zero_stage == 0:
        raise _wrong(
            "learner.dtype",
            "bfloat16",
            "DeepSpeed keeps the fp32 copy of the weights in ZeRO only; set learner.zero_stage=1.",
        )
    if learner.kind == "reference":
        for key, value, only in (
            ("learner.world_size", learner.world_size, 1),
            ("learner.zero_stage", learner.zero_stage, 0),
        ):
            if value != only:
                raise _wrong(
                    key,
                    value,
                    f"the reference learner is one plain process; set {key}={only} or "
                    "learner.kind=deepspeed.",
                )
    if 0 < config.cluster.env_workers_max < config.cluster.env_workers:
        raise _wrong(
            "cluster.env_workers_max",
            config.cluster.env_workers_max,
            f"is less than cluster.env_workers={config.cluster.env_workers}; raise it, or 0 for a "
            "fixed number.",
        )
    for key in ("env_worker_resources", "replica_resources", "learner_resources"):
        for name, amount in getattr(config.cluster, key).items():
            if name in ("CPU", "GPU", "memory"):
                kind = key.removesuffix("_resources")
                raise _wrong(
                    f"cluster.{key}.{name}", amount, f"is Ray's own; see cluster.{kind}_cpus."
                )


def _check_pushes(config: Config) -> None:
    """Whether replicas can take the learner's weights."""
    embedded = config.engine.kind == "embedded" and config.engine.dtype != "bfloat16"
    if config.learner.dtype == "bfloat16" and embedded:
        raise _wrong(
            "learner.dtype",
            "bfloat16",
            "the embedded engine would compute in fp32; set engine.dtype=bfloat16 too, or choose "
            "learner.dtype=float32 or engine=vllm.",
        )
    check_sync(config)


def _check_train(config: Config) -> None:
    sampling, train, algo = config.sampling, config.train, config.algo
    for name, own in components(config).items():
        with named_keys(name):
            if own.sampling.temperature == 0:
                raise _wrong(
                    "sampling.temperature", 0, "greedy play explores nothing; train with about 1.0."
                )
    if sampling.top_p < 1 or sampling.top_k > 0:
        key, value, off = ("sampling.top_p", sampling.top_p, "1.0")
        if sampling.top_k > 0:
            key, value, off = ("sampling.top_k", sampling.top_k, "0")
        raise _wrong(
            key,
            value,
            "the learner cannot reproduce the probabilities of a truncated distribution, so the "
            f"importance weights would be wrong; set {key}={off} for training.",
        )
    if train.group_size < 2:
        raise _wrong(
            "train.group_size",
            train.group_size,
            f"{algo.advantage} compares episodes of one task; use 2 or more (8 to 32 is usual).",
        )
    if train.task_sampling != "uniform" and train.uniform_share * train.groups < 1:
        raise _wrong(
            "train.uniform_share",
            train.uniform_share,
            f"of train.groups={train.groups} leaves steps without a uniform draw, which would "
            f"have no reward to report; use {math.ceil(100 / train.groups) / 100:g} or more.",
        )
    rows = train.groups * train.group_size
    if algo.minibatches > rows:
        raise _wrong(
            "algo.minibatches",
            algo.minibatches,
            f"a step has train.groups × train.group_size = {rows} episodes; use {rows} or fewer.",
        )
    if config.learner.world_size > rows:
        raise _wrong(
            "learner.world_size",
            config.learner.world_size,
            f"a step has {rows} episodes, so some ranks would never have work; use fewer.",
        )
    if 0 < train.steps < config.learner.warmup_steps:
        raise _wrong(
            "learner.warmup_steps",
            config.learner.warmup_steps,
            f"the warm-up would not end within train.steps={train.steps}; shorten it.",
        )


def _check_samples(config: Config, player: str) -> None:
    found = config.eval
    if found.episodes % found.samples:
        raise _wrong(
            "eval.samples",
            found.samples,
            f"eval.episodes={found.episodes} is no multiple of it; set eval.episodes="
            f"{max(found.episodes // found.samples, 1) * found.samples}.",
        )
    if found.samples > 1 and found.temperature == 0 and player == "model":
        raise _wrong(
            "eval.samples",
            found.samples,
            "a model that decodes greedily says the same in all of them; set eval.temperature=1.0, "
            "or eval.samples=1.",
        )


def _check_evaluations(config: Config, verb: str) -> None:
    """What follows from the evaluations of a run that learns: the best model, an early end."""
    best, stop_key = config.run.keep_best, f"{verb}.stop_when"
    rule = _at(config, stop_key)
    for key, value in (("run.keep_best", best), (stop_key, rule)):
        if value and not config.eval.every:
            raise _wrong(key, value, "without evaluations nothing is known of it; set eval.every.")
    if best and not best.startswith("eval/"):
        near = did_you_mean(best, [f"eval/{best.rpartition('/')[2]}"])
        raise _wrong(
            "run.keep_best", best, f"must be a metric of the evaluations, as eval/reward.{near}"
        )
    parse_stop_rule(stop_key, rule)


def _check_sft(config: Config, chained: bool) -> None:
    if not config.sft.data and not chained:
        raise _wrong(
            "sft.data",
            "",
            "name the JSONL that `rayrl synth` wrote, as sft.data=runs/x/episodes.jsonl, or data "
            "with a column of messages, as sft.data=chats.jsonl.",
        )
    if 0 < config.sft.steps < config.learner.warmup_steps:
        raise _wrong(
            "learner.warmup_steps",
            config.learner.warmup_steps,
            f"the warm-up would not end within sft.steps={config.sft.steps}; shorten it.",
        )


def _check_serve(config: Config) -> None:
    serve = config.serve
    if not serve.host:
        raise _wrong("serve.host", "", "name an address: 127.0.0.1 (this machine), or 0.0.0.0.")


def _asking(config: Config, verb: str) -> list[str]:
    """Settings by which `verb` asks the server of `endpoint.*`."""
    players = {"synth": config.synth.player, "eval": config.eval.player, "train": ""} | {
        "play": config.play.player
    }
    if verb not in players:
        return []
    played = components(config)
    if verb == "play":
        played = {config.play.component: played[config.play.component]}
    given = {
        f"env.mix.{name}.seats.{seat}" if name else f"env.seats.{seat}": who
        for name, own in played.items()
        for seat, who in own.env.seats.items()
        if verb != "play" or seat != config.play.seat  # a person sits there
    }
    given[f"{verb}.player"] = players[verb]
    return [f"{key}={who}" for key, who in given.items() if who == "endpoint"]


def _check_endpoint(config: Config, asking: str) -> None:
    endpoint = config.endpoint
    if not endpoint.url.startswith(("http://", "https://")):
        raise _wrong(
            "endpoint.url",
            endpoint.url,
            f"{asking} needs the address of a server, as https://host/v1.",
        )
    for key in endpoint.extra:
        if key in _NOT_EXTRA:
            raise _wrong(f"endpoint.extra.{key}", endpoint.extra[key], _NOT_EXTRA[key])
    if not endpoint.model:
        raise _wrong("endpoint.model", "", f"{asking} needs the name of a model.")


def _check_stages(config: Config) -> None:
    seen: set[str] = set()
    (verb,) = (one.metadata["setting"] for one in fields(Stage) if one.name == "verb")
    for stage in config.recipe:
        if not stage.name or not stage.name.replace("_", "").replace("-", "").isalnum():
            raise ConfigError(
                f"recipe stage {stage.name!r}: it names a folder; use letters, digits, - and _."
            )
        if stage.name in seen:
            raise ConfigError(f"recipe stage {stage.name!r} is there twice; rename one.")
        seen.add(stage.name)
        where = f"recipe stage {stage.name!r}"
        if why := verb.complaint(stage.verb):
            raise ConfigError(f"{where}: verb={stage.verb}: {why}")
        if any(key.split(".")[0] == "recipe" for key in stage.set):
            raise ConfigError(f"{where}: a stage cannot change the recipe; remove that key.")
        ready = replace(stage_config(config, stage), recipe=[])
        for key in _WHOLE_RECIPE:
            if _at(ready, key) != _at(config, key):
                raise ConfigError(
                    f"{where}: {key}={_at(ready, key)}: all stages share it; set it for the whole "
                    "recipe."
                )
        try:
            _check(ready, stage.verb, chained=True)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
