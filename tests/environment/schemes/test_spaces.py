"""Spaces as text: how observations read, and that whatever is drawn is an action."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from rayrl.environment.schemes.spaces import (
    any_action,
    check_actions,
    check_observations,
    choices,
    instruction,
    listed,
    parse,
    readable,
)
from rayrl.errors import ConfigError

BOARD = np.array([[[1, 0], [0, 0]], [[0, 1], [1, 0]]], np.int8)  # (rows, columns, planes)


@pytest.mark.parametrize(
    ("observation", "text"),
    [
        (np.int64(3), "3"),
        (np.float32(0.5), "0.5"),
        ((14, 10, False), "(14, 10, 0)"),
        ("a b", "a b"),
        (np.array([0.123456, -2.0]), "0.1235, -2"),
        (np.array([True, False]), "1, 0"),
        (np.eye(40)[7], "40 numbers, all 0 but 1 at 7"),
        (np.eye(40)[3:7].sum(0), "40 numbers, all 0 but 1 at 3 to 6"),
        (np.eye(40)[7] * 2.5 + np.eye(40)[9], "40 numbers, all 0 but 2.5 at 7, 1 at 9"),
        (np.zeros(40), "40 numbers, all 0"),
        (np.ones(17), ", ".join("1" * 17)),
        (np.arange(4.0).reshape(2, 2), "0 1\n2 3"),
        (BOARD, "0 .\n1 0"),
        (BOARD * 2, "plane 0:\n2 0\n0 2\nplane 1:\n0 0\n2 0"),
        (
            np.dstack([BOARD, BOARD[..., :1]]),
            "plane 0:\n1 0\n0 1\nplane 1:\n0 0\n1 0\nplane 2:\n1 0\n0 1",
        ),
        (np.dstack([BOARD, np.ones((2, 2, 2))]), None),
        ({"a": 1, "b": BOARD}, "a: 1\nb:\n0 .\n1 0"),
        ({"only": 1}, "1"),
        ((BOARD, 1), "0 .\n1 0\n1"),
    ],
)
def test_how_an_observation_reads(observation: Any, text: str | None) -> None:
    read = readable(observation)
    if text is None:
        assert read.endswith("plane 2: all 1\nplane 3: all 1")
    else:
        assert read == text


def test_only_the_planes_that_are_wanted() -> None:
    deep = np.dstack([BOARD, np.ones((2, 2, 5))])
    assert readable(deep, (0, 1)) == "0 .\n1 0"
    assert readable(deep, (1,)) == ". .\n1 ."
    assert readable({"observation": deep}, (4, 1)) == "plane 4: all 1\nplane 1:\n0 0\n1 0"


def test_numbers_that_follow_each_other_are_a_range() -> None:
    assert listed(["0", "1", "2", "4", "5", "9"]) == "0 to 2, 4, 5, 9"
    assert listed(["-2", "-1", "0"]) == "-2 to 0"
    assert listed(["call", "raise"]) == "call, raise"


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(5, start=-2),
        spaces.MultiDiscrete([2, 3, 4], start=[1, 0, -1]),
        spaces.MultiDiscrete([[2, 3], [4, 5]]),
        spaces.MultiBinary(4),
        spaces.Box(-1, 1, (2, 2), np.float32),
        spaces.Box(-np.inf, np.inf, (3,), np.float64),
        spaces.Box(0, 255, (3,), np.uint8),
        spaces.Text(5, charset="xyz"),
    ],
    ids=str,
)
def test_what_is_drawn_is_an_action(space: spaces.Space[Any]) -> None:
    check_actions("it", space, ())
    offered = choices(space, ())
    rng = random.Random(1)
    drawn = {any_action(space, offered, rng) for _ in range(40)}
    assert len(drawn) > 4
    for text in drawn:
        assert space.contains(parse(text, space, offered)), text
    assert parse("a move", space, offered) is None
    assert instruction(space)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a"], "has 1 names, and it has 2 actions"),
        (["a", "A"], "two names are the same"),
        (["a", "b, c"], "'b, c' is no name"),
        (["a", ""], "'' is no name"),
    ],
)
def test_names_that_cannot_be(names: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check_actions("it", spaces.Discrete(2), names)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(0, 255, (80, 60, 3), np.uint8),
        spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Box(0, 255, (8, 8), np.uint8)}),
        spaces.Tuple([spaces.Box(0, 1, (2, 2, 2, 2))]),
    ],
)
def test_images_have_no_text(space: spaces.Space[Any]) -> None:
    with pytest.raises(ConfigError, match="no text"):
        check_observations("it", space)


def test_numbers_are_no_image() -> None:
    check_observations("it", spaces.Box(0, 255, (128,), np.uint8))
    check_observations("it", spaces.Box(0, 1, (8, 8, 20), np.uint8))
