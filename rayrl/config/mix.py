"""Mixtures: several environments in one run, each with settings of its own (`env.mix`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

from rayrl.config.load import with_settings
from rayrl.config.schema import Config, EnvConfig
from rayrl.config.setting import setting
from rayrl.errors import ConfigError, did_you_mean

__all__ = [
    "Component",
    "check_mix",
    "component_of",
    "components",
    "env_label",
    "eval_cells",
    "named_keys",
]

RESERVED = ("replayed", "replay_mismatches")  # turns/NAME is another metric


@dataclass(frozen=True)
class Component:
    """An environment of a mixture. What it leaves out is as in `env` and `sampling`."""

    name: str = setting("", "environment, as env.name")
    weight: float = setting(1.0, "share of env.mix_by, relative to the others' weights", above=0)
    args: dict[str, Any] = setting({}, "as env.args")
    rewards: dict[str, float] = setting({}, "as env.rewards")
    seats: dict[str, str] = setting({}, "as env.seats")
    held_out: float | None = setting(None, "as env.held_out")
    duplicates: str | None = setting(None, "as env.duplicates")
    max_tokens: int | None = setting(None, "as sampling.max_tokens")
    temperature: float | None = setting(None, "as sampling.temperature")
    stop: list[str] | None = setting(None, "as sampling.stop")
    cells: dict[str, dict[str, Any]] = setting({}, "as eval.cells")


_KEYS = {
    "name": "env.name",
    "args": "env.args",
    "rewards": "env.rewards",
    "seats": "env.seats",
    "held_out": "env.held_out",
    "duplicates": "env.duplicates",
    "max_tokens": "sampling.max_tokens",
    "temperature": "sampling.temperature",
    "stop": "sampling.stop",
    "cells": "eval.cells",
}
"""Key of a component -> the setting that it stands for."""
_KEY_OF = {key: name for name, key in _KEYS.items()}
_ANY_KEY = re.compile(rf"\b({'|'.join(map(re.escape, _KEY_OF))})\b")


def components(config: Config) -> dict[str, Config]:
    """What each environment of the run is played with, by its name in the mixture.

    Each is a Config without a mixture: its `env.name`, `env.args`, `eval.cells` and so on are the
    component's. Without a mixture it is `config` itself, under an empty name.
    """
    if not config.env.mix:
        return {"": config}
    return {name: _own(config, Component(**given)) for name, given in config.env.mix.items()}


def _own(config: Config, one: Component) -> Config:
    env, sampling = config.env, config.sampling
    held_out = env.held_out if one.held_out is None else one.held_out
    duplicates = env.duplicates if one.duplicates is None else one.duplicates
    max_tokens = sampling.max_tokens if one.max_tokens is None else one.max_tokens
    temperature = sampling.temperature if one.temperature is None else one.temperature
    stop = sampling.stop if one.stop is None else one.stop
    return replace(
        config,
        env=replace(
            env,
            name=one.name,
            args=one.args,
            rewards=one.rewards,
            seats=one.seats,
            held_out=held_out,
            duplicates=duplicates,
            mix={},
        ),
        sampling=replace(sampling, max_tokens=max_tokens, temperature=temperature, stop=stop),
        eval=replace(config.eval, cells=one.cells),
    )


def component_of(config: Config, key: str, name: str) -> Config:
    """What the component that setting `key` names is played with.

    Raises:
        ConfigError: there is no such component.
    """
    known = components(config)
    if name not in known:
        if not config.env.mix:
            raise ConfigError(f"{key}={name}: there is no mixture (env.mix); leave it out.")
        near = did_you_mean(name, known) if name else ""
        raise ConfigError(
            f"{key}={name}: name a component of the mixture.{near} There are: {', '.join(known)}."
        )
    return known[name]


def env_label(config: Config) -> str:
    """The environment's name, or those of a mixture's components: `sums + tictactoe`."""
    return config.env.name or " + ".join(config.env.mix)


@contextmanager
def named_keys(component: str) -> Iterator[None]:
    """Have errors of the block name the component's own keys: env.args.k is env.mix.sums.args.k."""
    try:
        yield
    except ConfigError as error:
        if not component:
            raise
        text = _ANY_KEY.sub(lambda key: f"env.mix.{component}.{_KEY_OF[key[0]]}", str(error))
        raise type(error)(text) from error


def check_mix(config: Config) -> None:
    """Raise ConfigError if `env.mix` is no mixture: of what is wrong, key, value and remedy."""
    env = config.env
    if not env.mix:
        if env.mix_by != EnvConfig().mix_by:
            raise ConfigError(
                f"env.mix_by={env.mix_by}: there is no mixture; name its environments in env.mix, "
                "or leave this out."
            )
        return
    if env.name:
        raise ConfigError(
            f"env.name={env.name}: env.mix names the environments of this run; leave out "
            "env=…, env.name or the experiment that sets it, or else env.mix."
        )
    for key, value in (
        ("args", env.args),
        ("rewards", env.rewards),
        ("seats", env.seats),
        ("cells", config.eval.cells),
    ):
        if value:
            raise ConfigError(
                f"{_KEYS[key]}={value}: each environment of a mixture has its own; set "
                f"env.mix.{next(iter(env.mix))}.{key}."
            )
    if len(env.mix) < 2:
        (name,) = env.mix
        raise ConfigError(
            f"env.mix has one environment, {name!r}: add another, or set env.name instead."
        )
    for name, given in env.mix.items():
        _check_component(config, name, given)


def _check_component(config: Config, name: str, given: Mapping[str, Any]) -> None:
    where = f"env.mix.{name}"
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in RESERVED:
        raise ConfigError(
            f"{where}: the name is part of metrics' names; use letters, digits, - and _"
            f"{f', and not {name!r}' if name in RESERVED else ''}."
        )
    known = [one.name for one in fields(Component)]
    for key in given:
        if key not in known:
            near = did_you_mean(str(key), known) or f" A component has: {', '.join(known)}."
            raise ConfigError(f"{where}.{key}: there is no such setting.{near}")
    if not given.get("name"):
        raise ConfigError(
            f"{where}.name: no environment is chosen; set {where}.name as you would env.name."
        )
    weight = given.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e9:
        raise ConfigError(f"{where}.weight={weight}: expected a number above 0.")
    rest = {key: value for key, value in given.items() if key != "weight" and value is not None}
    with named_keys(name):  # for the types; the ranges follow
        bare = replace(config, env=replace(config.env, mix={}))
        with_settings(bare, {_KEYS[key]: value for key, value in rest.items()})


def eval_cells(config: Config, component: str = "") -> dict[str, dict[str, Any]]:
    """What an evaluation plays: arguments of the environment by the cell's name.

    Args:
        component: of a mixture, whose cells are called after it: `sums`, or `sums/easy`.
    """
    if not component:
        return dict(config.eval.cells) or {"tasks": {}}
    cells = {f"{component}/{cell}": args for cell, args in config.eval.cells.items()}
    return cells or {component: {}}
