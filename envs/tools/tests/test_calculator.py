"""Arithmetic, and everything a model may write instead."""

import pytest
from rayrl_tools.calculator import CalculatorError, evaluate


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2+2", "4"),
        (" (17 + 4) * 3 ", "63"),
        ("-3 - -5", "2"),
        ("7 / 2", "3.5"),
        ("6 / 2", "3"),
        ("7 // 2 + 7 % 4", "6"),
        ("0.1 + 0.2", "0.3"),
        ("1 / 3", "0.3333333333"),
        ("2 ** 10", "1024"),
        ("2 ** -1", "0.5"),
        ("0 ** 0", "1"),
        ("(-2) ** 3", "-8"),
        ("3 × 4 ÷ 2 − 1", "5"),
        ("round(2.567, 1)", "2.6"),
        ("max(3, 9) - abs(-4) + min(1, 2)", "6"),
        ("1e3", "1000"),
    ],
)
def test_values_by_hand(expression: str, value: str) -> None:
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("", "not an arithmetic expression"),
        ("two plus two", "not an arithmetic expression"),
        ("2 +", "not an arithmetic expression"),
        ("2 + 2 = 4", "not an arithmetic expression"),
        ("\0", "not an arithmetic expression"),
        ("1,234 + 1", "without commas"),
        ("x + 1", "cannot work out 'x'"),
        ("'a' * 3", "cannot work out"),
        ("[1] * 3", "cannot work out"),
        ("2j", "cannot work out"),
        ("1 < 2", "cannot work out"),
        ("__import__('os').getcwd()", "cannot work out"),
        ("open('/etc/passwd')", "cannot work out"),
        ("open(1)", "no function 'open'"),
        ("abs(1, 2)", "abs"),
        ("max()", "max"),
        ("round(2.5, 0.5)", "round"),
        ("round(7, -1000000000)", "at most 15 digits"),
        ("2 ^ 3", "for powers write"),
        ("1 / 0", "division by zero"),
        ("1 % 0", "division by zero"),
        ("0 ** -1", "undefined"),
        ("(-8) ** 0.5", "undefined"),
        ("9 ** 9 ** 9", "too large"),
        ("1e15 * 10", "too large"),
        ("1e999", "too large"),
        ("1e999 - 1e999", "too large"),
        ("1" * 201, "longer than 200"),
        ("(" * 100 + "1" + ")" * 99, "not an arithmetic expression"),
    ],
)
def test_errors_say_why(expression: str, said: str) -> None:
    with pytest.raises(CalculatorError) as refused:
        evaluate(expression)
    assert said in str(refused.value)
