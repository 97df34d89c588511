"""Every setting has a meaning and a range, and the check takes exactly what is in the range."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from rayrl.config import Config, EnvConfig, Setting, leaves, settings, validate
from rayrl.config.load import nest, with_settings
from rayrl.config.setting import setting
from rayrl.errors import ConfigError
from tests.config.test_config import config_of

HINTS = dict(leaves())
BOUNDED = [key for key, one in settings().items() if {one.least, one.above, one.most} != {None}]
VALID = config_of()
CHOSEN = [key for key, one in settings().items() if one.choices]


def default(key: str) -> Any:
    node: Any = Config()
    for part in key.split("."):
        node = getattr(node, part)
    return node


def changed(node: Any, path: list[str], value: object) -> Any:
    """A copy of a section in which one value, which may be wrong, is another."""
    name, *rest = path
    if isinstance(node, dict):
        return {**node, name: value}
    return replace(node, **{name: changed(getattr(node, name), rest, value) if rest else value})


def complaint(key: str, value: object) -> str:
    """What the check of a whole Config says about one value."""
    if HINTS[key] == dict[str, float]:
        key += ".some"
    try:
        validate(changed(VALID, key.split("."), value))
    except ConfigError as error:
        name, _, said = str(error).partition("=")
        assert name == key or "must be" not in said  # another check, of how settings fit together
        return said.partition(": ")[2] if name == key and "must be" in said else ""
    return ""


@pytest.mark.parametrize("key", settings())
def test_every_setting_has_a_meaning(key: str) -> None:
    meaning = settings()[key].meaning
    assert len(meaning.split()) > 1
    assert not meaning.endswith((".", " "))
    assert "  " not in meaning


def test_meanings_of_an_alarm_say_what_it_watches() -> None:
    found = settings()["alarms.starvation.patience"].meaning
    assert found.startswith("upper bound on the share of the step that the learner waited")
    assert found.endswith("; steps in a row out of bounds that raise the alarm")


@pytest.mark.parametrize("key", settings())
def test_every_default_is_in_its_range(key: str) -> None:
    value = default(key)
    for one in value.values() if isinstance(value, dict) else [value]:
        assert not settings()[key].complaint(one)


def test_every_number_has_a_range() -> None:
    numbers = {key for key, hint in HINTS.items() if hint in (int, float, int | None, float | None)}
    assert numbers - {*BOUNDED, *CHOSEN} == {"run.seed"}


@pytest.mark.parametrize("key", BOUNDED)
def test_bounds_take_what_is_just_inside(key: str) -> None:
    one, whole = settings()[key], HINTS[key] in (int, int | None)

    def next_to(value: float, towards: float) -> float:
        return value + math.copysign(1, towards) if whole else math.nextafter(value, towards)

    inside = [one.least, one.most, *([] if one.above is None else [next_to(one.above, math.inf)])]
    outside = [
        *([] if one.least is None else [next_to(one.least, -math.inf)]),
        *([] if one.most is None else [next_to(one.most, math.inf)]),
        one.above,
        None if whole else math.nan,
    ]
    cast = int if whole else float
    assert not any(complaint(key, cast(value)) for value in inside if value is not None)
    for value in (cast(value) for value in outside if value is not None):
        assert complaint(key, value).startswith("must be "), value


@pytest.mark.parametrize("key", CHOSEN)
def test_choices_are_taken_and_others_are_not(key: str) -> None:
    choices = settings()[key].choices
    assert not any(complaint(key, choice) for choice in choices)
    other = max(choices) + 1 if isinstance(choices[0], int) else f"{choices[-1]}x"
    said = complaint(key, other)
    also = ", or module:function or path/to/file.py:function" if settings()[key].open else ""
    assert said.startswith(f"must be one of {', '.join(map(str, choices))}{also}.")
    assert isinstance(other, int) or f"Did you mean {choices[-1]!r}?" in said


@pytest.mark.parametrize(
    ("rule", "wrong", "said"),
    [
        (Setting("", least=0), -1, "must be 0 or more."),
        (Setting("", above=0), 0, "must be more than 0."),
        (Setting("", most=1), 2, "must be at most 1."),
        (Setting("", least=0, most=1), 2, "must be from 0 to 1."),
        (Setting("", above=0, most=1), 0, "must be more than 0 and at most 1."),
        (Setting("", choices=("a", "b")), "c", "must be one of a, b."),
        (Setting("", choices=(0, 1)), 2, "must be one of 0, 1."),
    ],
)
def test_what_is_said_about_a_value_out_of_range(rule: Setting, wrong: Any, said: str) -> None:
    assert rule.complaint(wrong) == said
    assert not rule.complaint(None)


def test_open_choices_take_a_module_and_function() -> None:
    rule = Setting("", choices=("grpo", "cispo"), open=True)
    assert not rule.complaint("grpo")
    assert not rule.complaint("mine.losses:loss")
    assert rule.complaint("gpro") == (
        "must be one of grpo, cispo, or module:function or path/to/file.py:function. "
        "Did you mean 'grpo'?"
    )
    assert {key for key in CHOSEN if settings()[key].open} == {"algo.advantage", "algo.loss"}
    closed = Setting("", choices=("grpo", "cispo"))
    assert closed.complaint("mine:loss").startswith("must be one of grpo, cispo.")


def test_each_instance_has_its_own_copy_of_a_mutable_default() -> None:
    first, second = EnvConfig(), EnvConfig()
    first.args["a"] = 1
    assert second.args == EnvConfig().args == {}
    given = {"a": [1]}
    made: Any = setting(given, "")
    made.default_factory()["a"].append(2)
    assert given == made.default_factory() == {"a": [1]}


def test_any_value_goes_where_no_range_is_said() -> None:
    for value in ("", "x:y", 0, -1, math.nan, [], {"a": 1}):
        assert not Setting("anything").complaint(value)


def test_a_free_mapping_names_the_entry() -> None:
    config = with_settings(VALID, nest({"cluster.learner_resources.big": -1}))
    with pytest.raises(ConfigError, match=r"^cluster\.learner_resources\.big=-1\.0: must be more"):
        validate(config)
