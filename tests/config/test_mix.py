"""Mixtures in the configuration: what each environment is played with, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from rayrl.config import Config, from_dict, validate
from rayrl.config.load import nest
from rayrl.config.mix import component_of, components, env_label, named_keys
from rayrl.errors import ConfigError

MIX: dict[str, Any] = {
    "env.mix.words.name": "copyword",
    "env.mix.games": {"name": "tictactoe", "weight": 2, "rewards": {"win": 2.0}},
}


def config_of(**dotted: Any) -> Config:
    settings = {key.replace("__", "."): value for key, value in dotted.items()}
    return from_dict(nest({**MIX, **settings}))


def test_a_component_has_what_it_sets_and_else_what_all_have() -> None:
    config = config_of(
        env__mix__words__args__longest=3,
        env__mix__words__max_tokens=9,
        env__mix__games__held_out=0.5,
        env__mix__games__duplicates="drop",
        env__mix__games__cells={"second": {"first": "opponent"}},
        sampling__max_tokens=20,
        env__retries=7,
    )
    words, games = components(config).values()
    assert (words.env.name, words.env.args, words.env.rewards) == ("copyword", {"longest": 3}, {})
    assert (games.env.name, games.env.args, games.env.rewards) == ("tictactoe", {}, {"win": 2.0})
    assert (words.sampling.max_tokens, games.sampling.max_tokens) == (9, 20)
    assert (words.env.held_out, games.env.held_out) == (0.1, 0.5)
    assert (words.env.duplicates, games.env.duplicates) == ("refuse", "drop")
    assert (words.eval.cells, games.eval.cells) == ({}, {"second": {"first": "opponent"}})
    assert words.env.retries == games.env.retries == 7
    assert words.env.mix == games.env.mix == {}
    assert env_label(config) == "words + games"
    validate(config, "train")


def test_without_a_mixture_there_is_one_without_a_name() -> None:
    config = from_dict({"env": {"name": "tictactoe"}})
    assert components(config) == {"": config}
    assert component_of(config, "play.component", "") is config
    with pytest.raises(ConfigError, match=r"play\.component=x: there is no mixture"):
        component_of(config, "play.component", "x")


@pytest.mark.parametrize(
    ("dotted", "why"),
    [
        ({"env.name": "tools"}, r"env\.name=tools: env\.mix names .*leave out env="),
        ({"env.args.k": 1}, r"env\.args=\{'k': 1\}: .*set env\.mix\.words\.args"),
        ({"env.seats.agent": "policy"}, r"set env\.mix\.words\.seats"),
        ({"eval.cells.one.k": 1}, r"set env\.mix\.words\.cells"),
        ({"env.mix.words.wieght": 2}, r"env\.mix\.words\.wieght: .*Did you mean 'weight'"),
        ({"env.mix.words.temperature": 0}, r"words\.temperature=0: greedy play explores nothing"),
        ({"env.mix.words.temperature": -1}, r"words\.temperature=-1: must be 0 or more"),
        ({"env.mix.words.name": ""}, r"env\.mix\.words\.name: no environment is chosen"),
        ({"env.mix.words.weight": 0}, r"env\.mix\.words\.weight=0: expected a number above 0"),
        ({"env.mix.words.weight": "a"}, r"env\.mix\.words\.weight=a: expected a number above 0"),
        ({"env.mix.words.weight": float("nan")}, r"weight=nan: expected a number above 0"),
        ({"env.mix.words.held_out": 3}, r"env\.mix\.words\.held_out=3.*from 0 to 1"),
        ({"env.mix.words.duplicates": "dorp"}, r"words\.duplicates=dorp: .*Did you mean 'drop'"),
        ({"env.mix.words.max_tokens": "a"}, r"words\.max_tokens='a': expected a whole number"),
        ({"env.mix.words.args": 3}, r"env\.mix\.words\.args=3: expected a mapping"),
        ({"env.mix.words.rewards.copied": "a"}, r"env\.mix\.words\.rewards\.copied='a'"),
        ({"env.mix.words.seats.agent": "polcy"}, r"env\.mix\.words\.seats\.agent=polcy: .*policy"),
        ({"env.mix.a/b": {"name": "tools"}}, r"env\.mix\.a/b: .*use letters, digits"),
        ({"env.mix.replayed.name": "tools"}, r"env\.mix\.replayed: .*not 'replayed'"),
        ({"env.mix_by": "token"}, r"env\.mix_by=token: .*Did you mean 'tokens'"),
    ],
)
def test_what_is_wrong_is_named(dotted: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        validate(from_dict(nest({**MIX, **dotted})), "train")


def test_a_mixture_of_one_and_a_share_of_none() -> None:
    with pytest.raises(ConfigError, match=r"env\.mix has one environment, 'a': .*env\.name"):
        validate(from_dict(nest({"env.mix.a.name": "tools"})), "train")
    alone = from_dict({"env": {"name": "tools", "mix_by": "tokens"}})
    with pytest.raises(ConfigError, match=r"env\.mix_by=tokens: there is no mixture"):
        validate(alone, "train")


def test_play_must_be_told_which() -> None:
    with pytest.raises(ConfigError, match=r"play\.component=: name .*There are: words, games"):
        validate(config_of(), "play")
    with pytest.raises(ConfigError, match=r"play\.component=word: .*Did you mean 'words'"):
        validate(config_of(play__component="word"), "play")
    validate(config_of(play__component="words"), "play")


def test_a_server_that_one_of_them_asks_must_be_named() -> None:
    asks = config_of(env__mix__words__seats={"agent": "endpoint"})
    with pytest.raises(ConfigError, match=r"env\.mix\.words\.seats\.agent=endpoint needs"):
        validate(asks, "train")


def test_errors_of_a_component_name_its_own_keys() -> None:
    with (
        pytest.raises(ConfigError, match=r"^env\.mix\.words\.args\.k: bad, as sampling\.top_p is$"),
        named_keys("words"),
    ):
        raise ConfigError("env.args.k: bad, as sampling.top_p is")
    with pytest.raises(ConfigError, match=r"^env\.args\.k$"), named_keys(""):
        raise ConfigError("env.args.k")
