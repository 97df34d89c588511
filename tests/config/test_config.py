from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from rayrl.config import (
    Config,
    Stage,
    differences,
    from_dict,
    leaves,
    stage_config,
    to_dict,
    validate,
)
from rayrl.config.load import nest
from rayrl.config.validate import _ABOVE_ZERO, _AT_LEAST, _CHOICES, _SHARES
from rayrl.errors import ConfigError


def config_of(**dotted: Any) -> Config:
    """A Config that passes every check, but for what is given (`train__steps=3`)."""
    settings = {key.replace("__", "."): value for key, value in dotted.items()}
    return from_dict(nest({"env.name": "tictactoe", **settings}))


def test_defaults_come_from_the_dataclasses() -> None:
    assert from_dict({}) == replace(Config(), run=replace(Config().run, dir="runs/run"))
    with pytest.raises(FrozenInstanceError):
        from_dict({}).train.steps = 3  # type: ignore[misc]


def test_folder_follows_the_name() -> None:
    assert from_dict({"run": {"name": "first"}}).run.dir == "runs/first"


def test_plain_data_and_back() -> None:
    config = config_of(
        train__steps=7,
        learner__betas=[0.8, 0.99],
        env__rewards={"win": 1.0, "a.b": 0.5},
        eval__cells={"random": {"random_min": 1.0}},
        recipe=[{"name": "rl", "verb": "train", "set": {"train.steps": 4}}],
    )
    assert from_dict(to_dict(config)) == config
    assert config.recipe == [Stage("rl", "train", {"train.steps": 4})]


@pytest.mark.parametrize(
    ("data", "nearest"),
    [
        ({"train": {"step": 5}}, "'train.steps'"),
        ({"trian": {"steps": 5}}, "'train.steps'"),
        ({"trian": 5}, "'train'"),
        ({"lr": 1.0}, "'learner.lr'"),
        ({"algo": {"lr": 1.0}}, "'algo.loss' or 'learner.lr'"),
        ({"steps": 3}, "'train.steps' or 'sft.steps'"),
        ({"model": {"paht": "x"}}, "'model.path'"),
        ({"recipe": [{"name": "a", "vreb": "sft"}]}, "'verb'"),
    ],
)
def test_unknown_key_suggests_the_nearest(data: dict[str, Any], nearest: str) -> None:
    with pytest.raises(ConfigError, match="no such setting") as caught:
        from_dict(data)
    assert f"Did you mean {nearest}?" in str(caught.value)


def test_unknown_key_without_a_near_one_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"train\.zzz.*train\.groups"):
        from_dict({"train": {"zzz": 1}})
    with pytest.raises(ConfigError, match=r"qqqq.*run, env, model"):
        from_dict({"qqqq": 1})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": {"steps": "many"}}, "train.steps='many': expected a whole number."),
        ({"train": {"steps": 1.5}}, "train.steps=1.5: expected a whole number."),
        ({"train": {"steps": None}}, "train.steps=None: expected a whole number."),
        ({"learner": {"lr": "fast"}}, "learner.lr='fast': expected a number or null."),
        ({"env": {"isolated": "perhaps"}}, "env.isolated='perhaps': expected true or false."),
        ({"env": {"rewards": {"win": "x"}}}, "env.rewards.win='x': expected a number."),
        ({"learner": {"betas": [1, "d"]}}, "learner.betas=[1, 'd']: expected a list of numbers."),
        ({"env": {"args": 3}}, "env.args=3: expected a mapping of names to values."),
    ],
)
def test_wrong_type_names_key_value_and_what_was_expected(
    data: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(data)
    assert str(caught.value) == message


def test_section_is_not_a_value() -> None:
    with pytest.raises(ConfigError, match=r"train=3: train is a section; set one of train\.steps"):
        from_dict({"train": 3})


def test_differences() -> None:
    config = config_of(train__steps=7)
    assert differences(config) == {"env.name": ("", "tictactoe"), "train.steps": (100, 7)}
    assert differences(config, config) == {}


def test_stage_settings_lie_over_the_recipe() -> None:
    config = config_of(train__steps=7, env__args={"a": 1, "b": [1, 2]})
    stage = Stage("rl", "train", {"env.args": {"b": [3]}, "learner.lr": 1e-5, "env.rewards.x.y": 2})
    ready = stage_config(config, stage)
    assert ready.env.args == {"a": 1, "b": [3]}  # mappings are merged, lists replaced
    assert (ready.learner.lr, ready.train.steps) == (1e-5, 7)
    assert ready.env.rewards == {"x.y": 2.0}
    assert config.env.args == {"a": 1, "b": [1, 2]}


def test_stage_errors_name_the_stage() -> None:
    with pytest.raises(ConfigError, match=r"stage 'rl': train\.step: .*'train\.steps'"):
        stage_config(config_of(), Stage("rl", "train", {"train.step": 3}))
    with pytest.raises(ConfigError, match=r"stage 'rl': train\.steps='x': expected"):
        stage_config(config_of(), Stage("rl", "train", {"train.steps": "x"}))


@pytest.mark.parametrize("verb", ["synth", "train", "eval", "plan", "play"])
def test_defaults_are_valid(verb: str) -> None:
    validate(config_of(), verb)


def test_a_replica_that_does_not_answer_is_found_out_before_the_episode_is_late() -> None:
    config = config_of()
    assert config.cluster.request_deadline_s < config.env.deadline_s


def test_every_rule_is_about_a_setting() -> None:
    keys = {key for key, _ in leaves()}
    assert {*_CHOICES, *_AT_LEAST, *_ABOVE_ZERO, *_SHARES} <= keys


def test_every_number_has_a_rule() -> None:
    ruled = {*_CHOICES, *_AT_LEAST, *_ABOVE_ZERO, *_SHARES, "run.seed"}
    numbers = {key for key, hint in leaves() if hint in (int, float)}
    assert numbers <= ruled


@pytest.mark.parametrize(
    ("verb", "settings", "message"),
    [
        ("train", {"sampling__top_p": 0.9}, r"sampling\.top_p=0\.9: .*truncated.*top_p=1\.0"),
        ("train", {"sampling__top_k": 5}, r"sampling\.top_k=5: .*truncated.*top_k=0"),
        ("train", {"sampling__temperature": 0}, r"sampling\.temperature=0: .*greedy"),
        ("train", {"train__groups": 0}, r"train\.groups=0: must be 1 or more"),
        ("train", {"train__group_size": 1}, r"train\.group_size=1: .*2 or more"),
        ("train", {"learner__zero_stage": 4}, r"learner\.zero_stage=4: must be one of 0, 1, 2, 3"),
        ("train", {"engine__kind": "vlm"}, r"engine\.kind=vlm: must be one of embedded, vllm"),
        ("train", {"algo__loss": "cipso"}, r"algo\.loss=cipso: .*Did you mean 'cispo'"),
        ("train", {"algo__loss": "x.py"}, r"algo\.loss=x\.py: .*or path/to/file\.py:function"),
        ("train", {"algo__loss_args": {"beta": 1}}, r"algo\.loss_args=.*algo\.loss=cispo takes"),
        ("train", {"algo__clip_low": 1.5}, r"algo\.clip_low=1\.5: must be from 0 to 1"),
        ("train", {"algo__clip_high": -0.1}, r"algo\.clip_high=-0\.1: must be 0 or more"),
        ("train", {"algo__tis_max": 0.5}, r"algo\.tis_max=0\.5: .*0 \(off\)"),
        ("train", {"learner__lr": 0.0}, r"learner\.lr=0\.0: must be more than 0"),
        ("train", {"learner__lr": float("nan")}, r"learner\.lr=nan"),
        ("train", {"learner__betas": [0.9]}, r"learner\.betas=\[0\.9\]: must be two numbers"),
        ("train", {"train__groups": 2, "train__group_size": 4, "algo__minibatches": 9}, "= 8 epis"),
        ("train", {"train__groups": 1, "train__group_size": 2, "learner__world_size": 3}, "fewer"),
        ("train", {"learner__warmup_steps": 101}, r"warmup_steps=101: .*train\.steps=100"),
        ("train", {"learner__kind": "reference", "learner__world_size": 2}, "one plain process"),
        ("train", {"learner__kind": "reference", "learner__zero_stage": 1}, "one plain process"),
        ("train", {"env__seats": {"x": "plyer:a"}}, r"env\.seats\.x=plyer:a: must be policy"),
        ("train", {"engine__max_len": 40, "sampling__max_tokens": 40}, "no room for a prompt"),
        ("train", {"env__name": ""}, "no environment is chosen"),
        ("train", {"run__name": "a/b"}, r"run\.name=a/b: must be a word"),
        ("sft", {}, r"sft\.data=: name the JSONL"),
        ("synth", {"synth__player": "endpoint"}, r"endpoint\.url=: synth\.player=endpoint needs"),
        ("eval", {"eval__player": "endpoint", "endpoint__url": "http://x"}, r"endpoint\.model"),
        (
            "eval",
            {
                "eval__player": "endpoint",
                "endpoint__url": "http://x",
                "endpoint__model": "m",
                "endpoint__concurrency": 3,
                "cluster__env_workers": 4,
            },
            r"cluster\.env_workers=4: eval\.player=endpoint shares endpoint\.concurrency=3.*lower",
        ),
        (
            "eval",
            {
                "eval__player": "endpoint",
                "endpoint__url": "http://x",
                "endpoint__model": "m",
                "endpoint__concurrency": 3,
                "cluster__env_workers_max": 4,
            },
            r"cluster\.env_workers_max=4: .*lower cluster\.env_workers_max",
        ),
        (
            "train",
            {"cluster__env_workers": 3, "cluster__env_workers_max": 2},
            r"cluster\.env_workers_max=2: is less than cluster\.env_workers=3",
        ),
        ("train", {"env__seats": {"x": "endpoint"}}, r"url=: env\.seats\.x=endpoint needs"),
        ("play", {"env__seats": {"x": "endpoint"}}, r"url=: env\.seats\.x=endpoint needs"),
        ("recipe", {}, "there are no stages"),
        ("recipe", {"recipe": [{"name": "a", "verb": "tarin"}]}, "Did you mean 'train'"),
        ("recipe", {"recipe": [{"name": "a", "verb": "synth"}] * 2}, "there twice"),
        ("recipe", {"recipe": [{"name": "a/b", "verb": "synth"}]}, "names a folder"),
        (
            "recipe",
            {"recipe": [{"name": "a", "verb": "train", "set": {"train.groups": 0}}]},
            r"stage 'a': train\.groups=0",
        ),
        (
            "recipe",
            {"recipe": [{"name": "a", "verb": "synth", "set": {"cluster.address": "b:1"}}]},
            r"stage 'a': cluster\.address=b:1: all stages share it; set it for the whole recipe",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_remedy(
    verb: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(config_of(**settings), verb)


def test_a_seat_that_is_not_named_is_the_policys() -> None:
    validate(config_of(env__name="tictactoe_versus", env__seats={"x": "player:optimal"}), "train")


def test_a_server_is_needed_only_by_what_asks_it() -> None:
    seats = {"x": "endpoint"}
    validate(config_of(env__seats=seats, sft__data="a"), "sft")
    validate(config_of(env__seats=seats, play__seat="x"), "play")
    server = {"endpoint__url": "http://x", "endpoint__model": "m"}
    validate(config_of(env__seats=seats, **server), "eval")


def test_truncated_sampling_is_fine_without_learning() -> None:
    validate(config_of(sampling__top_p=0.9, sampling__temperature=0), "eval")


def test_chained_stage_gets_its_data_from_the_one_before() -> None:
    config = config_of(recipe=[{"name": "a", "verb": "synth"}, {"name": "b", "verb": "sft"}])
    validate(config, "recipe")
