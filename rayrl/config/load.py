"""How plain data becomes a `Config`: what is unknown or of the wrong type is named, with a remedy.

Files, the command line and the stages of a recipe are plain data, laid over each other by `merged`
and typed by `from_dict`. Nothing here knows files or the command line: `cli.py` composes those.
"""

from __future__ import annotations

import functools
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from difflib import SequenceMatcher
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from rayrl.config.schema import Config, RunConfig, Stage
from rayrl.config.setting import Setting
from rayrl.errors import ConfigError, did_you_mean

__all__ = [
    "check_keys",
    "check_types",
    "differences",
    "from_dict",
    "leaves",
    "merged",
    "nest",
    "schema",
    "settings",
    "stage_config",
    "to_dict",
    "unknown_key",
    "with_settings",
    "wrong_type",
]


def leaves() -> Iterator[tuple[str, Any]]:
    """Dotted key and type of every setting: `("train.steps", int)`, …

    A free-form mapping (`env.args`) and a list (`recipe`) are one setting each.
    """
    return ((key, hint) for key, hint, _ in _walk(Config))


@functools.cache
def settings() -> Mapping[str, Setting]:
    """Dotted key of every setting -> its meaning and range."""
    return {key: setting for key, _, setting in _walk(Config)}


def _walk(node: Any, prefix: str = "", about: str = "") -> Iterator[tuple[str, Any, Setting]]:
    """Key, type and `Setting` of every leaf below the dataclass `node`.

    Args:
        about: what `node` itself means, where its field says so; the meaning of each leaf follows.
    """
    hints = typing.get_type_hints(node)
    for one in fields(node):
        key, hint = prefix + one.name, hints[one.name]
        setting: Setting | None = one.metadata.get("setting")
        if is_dataclass(hint):
            yield from _walk(hint, f"{key}.", f"{setting.meaning}; " if setting else "")
            continue
        assert setting is not None, f"{key} has no meaning: write its default as setting(...)"
        yield key, hint, replace(setting, meaning=about + setting.meaning)


_DEFAULT_DIR = "runs/${run.name}"  # as RunConfig has it; the name may yet be set
_INTERPOLATION = re.compile(r"(\\*)\$\{")
_LEAVES = dict(leaves())
ELSEWHERE = {
    # TRL, verl, prime-rl, SkyRL and OpenRLHF call it -> we do
    "num_generations": "train.group_size",
    "rollouts_per_example": "train.group_size",
    "n_samples_per_prompt": "train.group_size",
    "rollout.n": "train.group_size",
    "generator.n_samples_per_prompt": "train.group_size",
    "per_device_train_batch_size": "train.groups",
    "train_batch_size": "train.groups",
    "rollout_batch_size": "train.groups",
    "ppo_mini_batch_size": "algo.minibatches",
    "policy_mini_batch_size": "algo.minibatches",
    "ppo_micro_batch_size_per_gpu": "learner.micro_batch_tokens",
    "micro_batch_size": "learner.micro_batch_tokens",
    "ppo_max_token_len_per_gpu": "learner.micro_batch_tokens",
    "num_iterations": "algo.epochs",
    "ppo_epochs": "algo.epochs",
    "update_epochs_per_batch": "algo.epochs",
    "max_steps": "train.steps",
    "num_train_epochs": "train.steps",
    "total_epochs": "train.steps",
    "total_training_steps": "train.steps",
    "learning_rate": "learner.lr",
    "optim.lr": "learner.lr",
    "lr_scheduler_type": "learner.schedule",
    "warmup_ratio": "learner.warmup_steps",
    "lr_warmup_steps": "learner.warmup_steps",
    "clip_grad": "learner.max_grad_norm",
    "grad_clip": "learner.max_grad_norm",
    "bf16": "learner.dtype",
    "torch_dtype": "learner.dtype",
    "gradient_checkpointing_enable": "learner.gradient_checkpointing",
    "max_completion_length": "sampling.max_tokens",
    "max_new_tokens": "sampling.max_tokens",
    "max_response_length": "sampling.max_tokens",
    "max_generate_length": "sampling.max_tokens",
    "max_prompt_length": "engine.max_len",
    "max_model_len": "engine.max_len",
    "gpu_memory_utilization": "engine.gpu_memory",
    "vllm_gpu_memory_utilization": "engine.gpu_memory",
    "speculative_config": "engine.speculative",
    "num_speculative_tokens": "engine.draft_tokens",
    "beta": "algo.kl_coef",
    "kl_coeff": "algo.kl_coef",
    "kl_loss_coef": "algo.kl_coef",
    "init_kl_coef": "algo.kl_coef",
    "entropy_coeff": "algo.entropy_coef",
    "adv_estimator": "algo.advantage",
    "advantage_estimator": "algo.advantage",
    "scale_rewards": "algo.normalize",
    "loss_type": "algo.loss",
    "epsilon": "algo.clip_low",
    "clip_ratio": "algo.clip_low",
    "clip_ratio_low": "algo.clip_low",
    "epsilon_high": "algo.clip_high",
    "clip_ratio_high": "algo.clip_high",
    "eps_clip_low": "algo.clip_low",
    "eps_clip_high": "algo.clip_high",
    "vllm_importance_sampling_cap": "algo.tis_max",
    "tis_imp_ratio_cap": "algo.tis_max",
    "max_async_level": "train.max_lag",
    "max_off_policy_steps": "train.max_lag",
    "max_staleness_steps": "train.max_lag",
    "model_name_or_path": "model.path",
    "pretrain": "model.path",
    "output_dir": "run.dir",
    "default_local_dir": "run.dir",
    "ckpt_path": "run.dir",
    "run_name": "run.name",
    "experiment_name": "run.name",
    "save_steps": "run.checkpoint_every",
    "save_freq": "run.checkpoint_every",
    "ckpt_interval": "run.checkpoint_every",
    "save_total_limit": "run.keep_checkpoints",
    "project_name": "run.wandb_project",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_target_modules": "lora.targets",
    "target_modules": "lora.targets",
    "num_inference_engines": "cluster.replicas",
    "colocate_all": "cluster.colocate",
}
"""Other libraries' names of settings -> ours."""
_SECTIONS = tuple(one.name for one in fields(Config))


def unknown_key(key: str) -> ConfigError:
    """The error for a key that does not exist, with the nearest ones that do."""
    known = list(_LEAVES) if "." in key else [*_LEAVES, *_SECTIONS]
    leaf = key.rsplit(".", 1)[-1]
    same = [one for one in known if one.rsplit(".", 1)[-1] == leaf]
    likeness = {one: SequenceMatcher(None, key, one).ratio() for one in known}
    best = max(known, key=lambda one: _likeness_by_part(key, one))
    close = [best] if likeness[best] >= 0.65 else []
    parts = key.split(".")
    others = (ELSEWHERE.get(".".join(parts[-n:])) for n in (2, 1))
    if not same and (other := next(filter(None, others), None)):
        near = [other]
    elif close and best in same and "." in key:
        near = close
    elif "." in key:
        near = [*close, *same][:3]
    else:
        near = same[:3] or close
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    if not hint:
        section = key.split(".", 1)[0]
        here = [known for known in _LEAVES if known.startswith(section + ".")]
        hint = f" There are: {', '.join(here or _SECTIONS)}."
    return ConfigError(f"{key}: there is no such setting.{hint}")


def _likeness_by_part(key: str, other: str) -> float:
    """Likeness of two keys; of `a.b.c` the mean over parts, so that long equal parts count less."""
    parts, others = key.split("."), other.split(".")
    if len(parts) != len(others) or len(parts) < 3:
        return SequenceMatcher(None, key, other).ratio()
    pairs = zip(parts, others, strict=True)
    return sum(SequenceMatcher(None, *pair).ratio() for pair in pairs) / len(parts)


def _holder(key: str) -> str | None:
    """The free-form mapping that `key` lies in, if any: `env.rewards` for `env.rewards.win`."""
    parts = key.split(".")
    for end in range(1, len(parts)):
        hint = _LEAVES.get(".".join(parts[:end]))
        if typing.get_origin(hint) is dict:
            return ".".join(parts[:end])
    return None


def check_keys(data: Mapping[str, Any], prefix: str = "") -> None:
    """Raise ConfigError for the first key of nested `data` that is not a setting."""
    for name, value in data.items():
        key = f"{prefix}{name}"
        if key == "recipe" and isinstance(value, list):
            _check_stage_keys(value)
        if key in _LEAVES or _holder(key):
            continue
        if not any(known.startswith(key + ".") for known in _LEAVES):
            while isinstance(value, Mapping) and value:  # to the first that was set
                inner, value = next(iter(value.items()))
                key = f"{key}.{inner}"
            raise unknown_key(key)
        if not isinstance(value, Mapping):
            names = ", ".join(known for known in _LEAVES if known.startswith(key + "."))
            raise ConfigError(f"{key}={value!r}: {key} is a section; set one of {names}.")
        check_keys(value, key + ".")


def _check_stage_keys(stages: list[Any]) -> None:
    known = [one.name for one in fields(Stage)]
    for place, stage in enumerate(stages):
        for name in stage if isinstance(stage, Mapping) else ():
            if name not in known:
                near = did_you_mean(str(name), known) or f" A stage has: {', '.join(known)}."
                raise ConfigError(f"recipe[{place}].{name}: there is no such setting.{near}")


def nest(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """`{"train.steps": 5}` as `{"train": {"steps": 5}}`; keys of a free mapping may hold dots.

    Of a mapping of mappings the first two parts do not: `env.mix.sums.args.digits`.
    """
    nested: dict[str, Any] = {}
    for key, value in dotted.items():
        parts = key.split(".")
        if holder := _holder(key):
            inner = key[len(holder) + 1 :]
            deep = typing.get_origin(typing.get_args(_LEAVES[holder])[1]) is dict
            parts = [*holder.split("."), *(inner.split(".", 2) if deep else [inner])]
        node = nested
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key}: part of it is set to {node!r} as well; set one of them.")
        old = node.get(parts[-1])
        both = isinstance(old, dict) and isinstance(value, Mapping)
        node[parts[-1]] = {**old, **value} if both and old else value
    return nested


@functools.cache
def schema() -> DictConfig:
    """The defaults as a typed OmegaConf node that takes values (frozen dataclasses do not).

    It is shared; `OmegaConf.merge` copies it.
    """
    node = OmegaConf.structured(Config)
    assert isinstance(node, DictConfig)
    _thaw(node)
    node.run.dir = _DEFAULT_DIR
    return node


def _thaw(node: DictConfig | ListConfig) -> None:
    OmegaConf.set_readonly(node, None)
    for key in node if isinstance(node, DictConfig) else range(len(node)):
        child = node._get_node(key)  # type: ignore[arg-type]
        if isinstance(child, DictConfig | ListConfig):
            _thaw(child)


def merged(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested plain `data` with `changes` over it: mappings key by key, everything else replaced."""
    result = dict(data)
    for key, value in changes.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = merged(old, value)
        result[key] = value
    return result


def wrong_type(error: OmegaConfBaseException, data: Mapping[str, Any] | None = None) -> ConfigError:
    """OmegaConf's complaint as one that names the key, the value and what was expected."""
    key = str(error.full_key or "").split("[")[0]
    if key not in _LEAVES and _holder(key) is None:
        return ConfigError(f"{key or 'config'}: {str(error).splitlines()[0]}")
    leaf = key if key in _LEAVES else str(_holder(key))
    value: Any = data
    for part in (*leaf.split("."), *([key[len(leaf) + 1 :]] if key != leaf else [])):
        value = value.get(part) if isinstance(value, Mapping) else None
    shown = "" if value is None and data is None else f"={value!r}"
    hint = _LEAVES[leaf] if key == leaf else typing.get_args(_LEAVES[leaf])[1]
    return ConfigError(f"{key}{shown}: expected {_in_words(hint)}.")


def _in_words(hint: Any) -> str:
    plain = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        Any: "plain data (text, numbers, lists, mappings)",
    }
    if hint in plain:
        return plain[hint]
    plural = {int: "whole numbers", float: "numbers", str: "texts", Stage: "stages"}
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if one is types.NoneType else _in_words(one) for one in args)
    if origin is list:
        return f"a list of {plural.get(args[0], 'values')}"
    if isinstance(hint, types.GenericAlias) and origin is dict:
        inner = plural.get(args[1], "values" if args[1] is Any else "mappings")
        return f"a mapping of names to {inner}"
    return str(hint)


def from_dict(data: Mapping[str, Any]) -> Config:
    """A Config of nested plain data; what is left out has its default.

    Raises:
        ConfigError: an unknown key, or a value of another type than the setting's.
    """
    check_keys(data)
    try:
        node = OmegaConf.merge(schema(), _with_texts(data, str))
    except OmegaConfBaseException as error:
        raise wrong_type(error, data) from error
    try:
        if not node.run.dir:  # other settings may look `${run.dir}` up
            node.run.dir = _DEFAULT_DIR
        config = OmegaConf.to_object(node)
    except MissingMandatoryValue as error:
        key = error.full_key or error.key
        raise ConfigError(f"{key}: has no default; set it.") from error
    except OmegaConfBaseException as error:
        raise wrong_type(error) from error
    assert isinstance(config, Config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain data that `from_dict` turns back into the same Config."""
    data: dict[str, Any] = _with_texts(asdict(config), _literal)
    return data


def _literal(text: str) -> str:
    """The same with `${` escaped: OmegaConf is not to look up what a setting's value contains."""
    return _INTERPOLATION.sub(r"\1\1\\${", text)


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Plain data with every text changed, and each a `str`: OmegaConf knows no subclasses."""
    if isinstance(value, str):
        return change(str(value))
    if isinstance(value, dict):
        return {key: _with_texts(one, change) for key, one in value.items()}
    return [_with_texts(one, change) for one in value] if isinstance(value, list) else value


def interpolation(value: Any) -> str:
    """The first text in plain data in which OmegaConf would look something up; empty if none is."""
    if isinstance(value, str):
        live = any(len(found[1]) % 2 == 0 for found in _INTERPOLATION.finditer(value))
        return value if live else ""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, map(interpolation, parts)), "")


def differences(config: Config, base: Config | None = None) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value in `base`, value in `config`) where they differ; base: the defaults."""
    base = base or Config()

    def value(of: Config, key: str) -> Any:
        node: Any = of
        for part in key.split("."):
            node = getattr(node, part)
        return node

    pairs = {key: (value(base, key), value(config, key)) for key in _LEAVES}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def check_types(config: Config) -> None:
    """Raise ConfigError if a value is not of its setting's type, as in `TrainConfig(steps="5")`."""
    for key, (_, given) in differences(config, from_dict(to_dict(config))).items():
        if given == given:  # a NaN differs from itself
            raise ConfigError(f"{key}={given!r}: expected {_in_words(_LEAVES[key])}.")


def with_settings(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with dotted settings changed: mappings are merged, lists and values replaced.

    A run folder that is the default one follows the run's name.

    Raises:
        ConfigError: an unknown key, or a value of another type than the setting's.
    """
    data = to_dict(config)
    if config.run.dir == RunConfig(name=config.run.name).dir:
        data["run"]["dir"] = ""
    return from_dict(merged(data, nest(changes)))


def stage_config(config: Config, stage: Stage) -> Config:
    """The Config that `stage` of a recipe runs with: `config` with the stage's settings over it.

    Raises:
        ConfigError: naming the stage, for an unknown key or a value of the wrong type.
    """
    try:
        own = with_settings(replace(config, recipe=[]), stage.set)
    except ConfigError as error:
        raise ConfigError(f"recipe stage {stage.name!r}: {error}") from error
    return replace(own, recipe=config.recipe)
