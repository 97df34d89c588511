"""Arithmetic that is safe to let a model write: numbers, operators, a few functions, limits."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable

__all__ = ["CalculatorError", "evaluate"]

Number = int | float

_LONGEST = 200  # characters of an expression
_LARGEST = 1e15  # above it floats no longer tell whole numbers apart
_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_DIGITS = 15  # that can be rounded to; more takes Python ever longer, and changes nothing


class CalculatorError(ValueError):
    """What is wrong with an expression, in words for whoever wrote it."""


def _round(value: Number, digits: Number | None = None) -> Number:
    if digits is not None and abs(digits) > _DIGITS:
        raise ValueError(f"at most {_DIGITS} digits")
    return round(value, digits)  # type: ignore[arg-type]  # a digits of 0.5 is said to be wrong


_FUNCTIONS: dict[str, Callable[..., Number]] = {"abs": abs, "max": max, "min": min, "round": _round}


def evaluate(expression: str) -> str:
    """The value of an expression such as `(17 + 4) * 3`, at most ten significant decimals.

    Raises:
        CalculatorError: it is no arithmetic, too long, or its value is too large or undefined.
    """
    if len(expression) > _LONGEST:
        raise CalculatorError(f"the expression is longer than {_LONGEST} characters")
    plain = expression.replace("×", "*").replace("÷", "/").replace("−", "-").strip()
    try:
        tree = ast.parse(plain, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise CalculatorError(f"not an arithmetic expression: {expression!r}") from None
    value = _value(tree.body)
    if isinstance(value, int) or value.is_integer():
        return str(int(value))
    return f"{value:.10g}"


def _value(node: ast.expr) -> Number:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return _checked(node.value)  # True is a number to Python, and does no harm
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        return _checked(_binary(node.op, _value(node.left), _value(node.right)))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return _checked(_called(node.func.id, [_value(argument) for argument in node.args]))
    if isinstance(node, ast.Tuple):
        raise CalculatorError("write numbers without commas: 1234, not 1,234")
    raise CalculatorError(
        f"cannot work out {ast.unparse(node)!r}: only numbers, + - * / // % **, brackets and "
        f"{', '.join(_FUNCTIONS)}"
    )


def _binary(kind: ast.operator, left: Number, right: Number) -> Number:
    if isinstance(kind, ast.Pow):
        return _power(left, right)
    if type(kind) not in _BINARY:
        raise CalculatorError("only + - * / // % ** are operators; for powers write **")
    try:
        return _BINARY[type(kind)](left, right)
    except ZeroDivisionError:
        raise CalculatorError("division by zero") from None


def _power(base: Number, exponent: Number) -> Number:
    # asked of logarithms first: 9 ** 9 ** 9 would take the machine's memory
    if base and exponent * math.log10(abs(base)) > math.log10(_LARGEST) + 1:
        raise CalculatorError("the result is too large")
    try:
        result: Number | complex = base**exponent
    except (ZeroDivisionError, OverflowError):
        raise CalculatorError(f"{base} ** {exponent} is undefined") from None
    if isinstance(result, complex):
        raise CalculatorError(f"{base} ** {exponent} is undefined")
    return result


def _called(name: str, values: list[Number]) -> Number:
    if name not in _FUNCTIONS:
        raise CalculatorError(f"no function {name!r}: there are {', '.join(_FUNCTIONS)}")
    try:
        return _FUNCTIONS[name](*values)
    except (TypeError, ValueError, OverflowError) as error:
        raise CalculatorError(f"{name}: {error}") from None


def _checked(value: Number) -> Number:
    if not abs(value) <= _LARGEST:  # also when it is no number
        raise CalculatorError("the result is too large")
    return value
