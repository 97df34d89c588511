from __future__ import annotations

import asyncio
import math
import pickle
from dataclasses import FrozenInstanceError, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rayrl.config import (
    Config,
    EnvConfig,
    LearnerConfig,
    RunConfig,
    Stage,
    TrainConfig,
    differences,
    from_dict,
    stage_config,
    to_dict,
    validate,
)
from rayrl.config.load import nest, with_settings
from rayrl.config.registry import bind, bound
from rayrl.errors import ConfigError


def config_of(**dotted: Any) -> Config:
    """A Config that passes every check, but for what is given (`train__steps=3`)."""
    settings = {key.replace("__", "."): value for key, value in dotted.items()}
    return from_dict(nest({"env.name": "tictactoe", **settings}))


def test_defaults_come_from_the_dataclasses() -> None:
    assert from_dict({}) == Config()
    with pytest.raises(FrozenInstanceError):
        from_dict({}).train.steps = 3  # type: ignore[misc]


def test_folder_follows_the_name() -> None:
    assert from_dict({"run": {"name": "first"}}).run.dir == "runs/first"
    assert from_dict({"run": {"name": "first", "dir": ""}}).run.dir == "runs/first"
    assert RunConfig(name="first").dir == "runs/first"
    assert (Config().run.dir, RunConfig(dir="else").dir) == ("runs/run", "else")


@pytest.mark.parametrize(
    ("run", "then"),
    [
        (RunConfig(name="a"), "runs/b"),
        (RunConfig("runs/a", name="a"), "runs/b"),  # the default, whoever wrote it
        (from_dict({"run": {"name": "a"}}).run, "runs/b"),
        (from_dict(to_dict(Config(run=RunConfig(name="a")))).run, "runs/b"),
        (pickle.loads(pickle.dumps(RunConfig(name="a"))), "runs/b"),
        (RunConfig("else", name="a"), "else"),
        (replace(RunConfig(name="a"), dir="else"), "else"),
        (replace(RunConfig(name="b"), dir="runs/a"), "runs/a"),
    ],
)
def test_a_run_with_another_name_has_another_folder(run: RunConfig, then: str) -> None:
    assert replace(run, name="b").dir == then
    assert replace(run, seed=1).dir == run.dir
    assert replace(run, dir="third").dir == "third"
    assert replace(run, name="b", dir=str(RunConfig(name="c").dir)).dir == "runs/c"


def test_settings_may_name_the_folder() -> None:
    for run in ({"name": "first"}, {"name": "first", "dir": ""}):
        config = from_dict({"run": run, "sft": {"data": "${run.dir}/x.jsonl"}})
        assert config.sft.data == "runs/first/x.jsonl"
    named = with_settings(config, {"sft.data": "${run.dir}/y.jsonl", "run.dir": "else"})
    assert named.sft.data == "else/y.jsonl"
    same = from_dict({"run": {"name": "second", "dir": config.run.dir}})
    assert same.run.dir == "runs/first"


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


def test_what_settings_contain_is_not_looked_up_when_others_lie_over_them() -> None:
    config = config_of(run__name="first", env__args={"a": r"\${run.name}", "b": {"c": 1, "d": 2}})
    assert config.env.args["a"] == "${run.name}"
    over = with_settings(config, {"env.args.b": {"c": [1]}, "env.args.e": "${run.name}"})
    assert over.env.args == {"a": "${run.name}", "b": {"c": [1], "d": 2}, "e": "first"}
    again = with_settings(over, {"env.args.b": 3, "env.args.e": [1], "env.args.f": {}})
    assert again.env.args == {"a": "${run.name}", "b": 3, "e": [1], "f": {}}
    other = with_settings(again, {"env.args.b": {"c": 1}, "env.args.e": {"d": 2}, "env.args.f": 3})
    assert other.env.args == {"a": "${run.name}", "b": {"c": 1}, "e": {"d": 2}, "f": 3}
    assert with_settings(again, {}) == again


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
        ("train", {"env__seats": {"x": "polcy"}}, r"env\.seats\.x=polcy: .* Did you mean 'policy'"),
        ("train", {"env__seats": {"x": "optimal"}}, r"x=optimal: .* mean 'player:optimal'"),
        ("train", {"env__seats": {"x": "mine.py:"}}, r"env\.seats\.x=mine\.py:: must be policy"),
        ("eval", {"eval__player": "model:a"}, r"eval\.player=model:a: set .*=model model\.path=a"),
        ("train", {"engine__speculative": "ngram"}, r"speculative=ngram: .*choose engine=vllm"),
        ("train", {"engine__max_len": 40, "sampling__max_tokens": 40}, "no room for a prompt"),
        ("train", {"env__name": ""}, "no environment is chosen"),
        (
            "train",
            {"cluster__replica_resources": {"a": 1, "b": 0}},
            r"cluster\.replica_resources\.b=0\.0: must be more than 0\.",
        ),
        ("serve", {"serve__port": 65536}, r"serve\.port=65536: must be from 0 to 65535\."),
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": TrainConfig(steps="5")}, "train.steps='5': expected a whole number."),  # type: ignore[arg-type]
        ({"train": TrainConfig(steps=None)}, "train.steps=None: expected a whole number."),  # type: ignore[arg-type]
        (
            {"learner": LearnerConfig(betas=(0.9, 0.95))},  # type: ignore[arg-type]
            "learner.betas=(0.9, 0.95): expected a list of numbers.",
        ),
        (
            {"run": RunConfig(dir=Path("runs"))},  # type: ignore[arg-type]
            f"run.dir={Path('runs')!r}: expected text.",
        ),
        (
            {"env": EnvConfig("tictactoe", args={"a": {1}})},
            "env.args.a={1}: expected plain data (text, numbers, lists, mappings).",
        ),
        ({"learner": LearnerConfig(lr=math.nan)}, "learner.lr=nan: must be more than 0."),
    ],
)
def test_values_of_a_script_are_checked_too(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(replace(config_of(), **changes), "train")
    assert str(caught.value) == message


def test_whole_numbers_are_numbers() -> None:
    validate(replace(config_of(), learner=LearnerConfig(lr=1, eps=1)), "train")


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


async def test_calls_at_once_have_objects_of_their_own() -> None:
    """Two runs in one process pass losses of one name."""

    async def call(number: int) -> object:
        reference = bind("algo.loss", partial(print, number), "same")
        await asyncio.sleep(0)
        return bound("algo.loss", reference).args[0]

    assert await asyncio.gather(call(1), call(2)) == [1, 2]
    assert bound("algo.loss", "object:same").args[0] == 2, "elsewhere the last"
