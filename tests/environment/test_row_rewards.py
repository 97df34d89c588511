from __future__ import annotations

import re
import sys
from typing import Any

import pytest

from rayrl.environment.row_rewards import REWARDS, AnswerOptions
from rayrl.errors import ConfigError

CHOICES = AnswerOptions(choices=("A", "B", "C", "yes", "no", "not sure"))
TREE = {"type": "array", "items": {"$ref": "#"}}
AGE = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


@pytest.mark.parametrize(
    ("reward", "reply", "answer", "score"),
    [
        ("exact", " the  cat\n", "the cat", 1),
        ("exact", "The cat", "the cat", 0),
        ("exact", "", "the cat", 0),
        ("exact", "3", 3, 1),
        ("exact", "true", True, 1),
        ("exact", "b", ["a", "b"], 1),  # any of several answers
        ("exact", "c", ["a", "b"], 0),
        ("number", "3 + 4 = 7", 7, 1),
        ("number", "It is 7, I think.", "so 3 + 4 = 7 #### 7", 1),  # as in GSM8K
        ("number", "7.0", "7", 1),
        ("number", "1,234", 1234, 1),
        ("number", "12,34", 1234, 0),  # no thousands: 12 and 34
        ("number", "$-2.50", -2.5, 1),
        ("number", "−3", -3, 1),  # a minus sign
        ("number", "5-3", 3, 1),  # a range or a difference, no sign
        ("number", "x2", 2, 0),
        ("number", ".5", 0.5, 1),
        ("number", "7.", 7, 1),
        ("number", "seven", 7, 0),
        ("number", "7 8", 7, 0),  # the last one counts
        ("number", "9" * 10_000, 7, 0),
        ("number", "0.1", 0.1, 1),
        ("number", "0.00001", 1e-05, 1),
        ("number", "1e-5", 1e-05, 1),
        ("number", "5", 1e-05, 0),
        ("number", "100000000000000000000", 1e20, 1),
        ("number", "20", 1e20, 0),
        ("number", "3 E5", 300000, 0),
        ("number", "3.5E+2", "350", 1),
        ("number", "-.5", -0.5, 1),
        ("number", "-.5", 0.5, 0),
        ("number", "3e", 3, 1),
        ("exact", "0.00001", 1e-05, 1),
        ("choice", "B", "B", 1),
        ("choice", "The answer is (B).", "B", 1),
        ("choice", "A or B? B", "B", 1),
        ("choice", "B, not A", "B", 0),  # the last one counts
        ("choice", "a boat", "A", 0),  # the article
        ("choice", "YES!", "yes", 1),
        ("choice", "yesterday", "yes", 0),
        ("choice", "I am not sure", "not sure", 1),
        ("choice", "", "B", 0),
        ("regex", "colour", "colou?r", 1),
        ("regex", "Color", "colou?r", 0),
        ("json", '{"age": 3}', AGE, 1),
        ("json", '```json\n{"age": 3}\n```', AGE, 1),
        ("json", '{"age": "3"}', AGE, 0),
        ("json", 'Here: {"age": 3}', AGE, 0),
        ("json", "[" * 100_000, AGE, 0),
        ("json", '{"age": 3', '{"type": "object"}', 0),  # a schema may be text
        ("json", "{}", '{"type": "object"}', 1),
        ("json", "NaN", {"type": "number"}, 0),
        ("json", '{"a": Infinity}', {"type": "object"}, 0),
        ("json", "1" * 400, {"type": "number", "multipleOf": 0.01}, 0),
        ("json", "1e400", {"type": "number", "multipleOf": 0.5}, 0),
        ("json", "[[]]", TREE, 1),
        ("json", "[" * 300 + "]" * 300, TREE, 0),
        ("json", "7", {"$ref": "#/$defs/n", "$defs": {"n": {"type": "number"}}}, 1),
    ],
)
def test_rewards(reward: str, reply: str, answer: Any, score: int) -> None:
    assert REWARDS.resolve(reward)(reply, answer, CHOICES) == score


def test_one_schema_for_all_rows() -> None:
    reward = REWARDS.resolve("json")
    assert reward('{"age": 3}', None, AnswerOptions(schema=AGE)) == 1
    assert reward("{}", None, AnswerOptions(schema=AGE)) == 0


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("So it is $\\frac{1}{2}$.", "0.5", 1),
        ("Thus \\boxed{\\frac{2}{4}}, not $3$", "\\frac{1}{2}", 1),  # a bare expression
        ("The answer is 42", "42", 1),
        ("x+1", "$1+x$", 1),
        ("Thus \\boxed{\\frac{2}{4}}, not $3$", "$\\frac{1}{2}$", 1),
        ("We get\n$2x + x^2$", "$x(x+2)$", 1),
        ("We get\n$2x + x^3$", "$x(x+2)$", 0),
        ("x\n42", "42", 1),
        ("x\n43", "42", 0),
        ("", "42", 0),
        ("\\boxed{", "42", 0),
        ("$\\{1, 2\\}$", "$\\{2, 1\\}$", 1),
        # what would take a computer algebra system long is no answer
        ("$9^{9^{9^9}}$", "42", 0),
        ("$9^9^9^9$", "42", 0),
        ("$9**9**9**9$", "42", 0),
        ("$100000000!$", "42", 0),
        ("$(x+y+z+1)^{99}$", "42", 0),
        ("$\\int_0^1 x dx$", "$\\frac{1}{2}$", 0),
        ("$" + "1+" * 200 + "1$", "201", 0),
    ],
)
def test_mathematics(reply: str, answer: str, score: int) -> None:
    assert REWARDS.resolve("math")(reply, answer, CHOICES) == score


def test_mathematics_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'rayrl[math]'")):
        REWARDS.resolve("math").check()


@pytest.mark.parametrize(
    ("reward", "answer", "complaint"),
    [
        ("exact", " ", "it is empty"),
        ("exact", [], "the list of answers is empty"),
        ("number", "none", "there is no number in it"),
        ("number", True, "there is no number in it"),
        ("number", ["3", "x"], "there is no number in it"),
        ("choice", "F", "it is none of env.args.choices (A, B, C, yes, no, not sure)"),
        ("choice", "a", "it is none of env.args.choices"),
        ("regex", "(", "it is not a regular expression: missing )"),
        ("regex", 3, "it is not a regular expression"),
        ("json", {"type": "objct"}, "it is not a JSON schema: 'objct' is not valid"),
        ("json", "{", "it is not a JSON schema"),
        ("json", 3, "it is not a JSON schema: expected an object"),
        ("json", {"$ref": "#/definitions/ag"}, "its $ref '#/definitions/ag' leads nowhere"),
        ("json", {"items": {"$ref": "x.json"}}, "its $ref 'x.json' leads nowhere"),
        ("json", {"$ref": "#"}, "its $ref '#' leads nowhere"),
        ("math", "$9^{9^9}$", "it cannot be read as mathematics"),
    ],
)
def test_answers_that_cannot_be_right(reward: str, answer: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        REWARDS.resolve(reward).answers(answer, CHOICES)
