"""A safe calculator for expressions written by a model, with limits on length and size."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable

__all__ = ["CalculatorError", "evaluate"]

Number = int | float

_MAX_LENGTH = 200  # characters of an expression
_MAX_VALUE = 1e15  # floats beyond it cannot represent every integer
_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_MAX_DIGITS = 15  # for rounding; more digits only take time


class CalculatorError(ValueError):
    """An invalid expression; the message is for its author, the model."""


def _round(value: Number, digits: Number | None = None) -> Number:
    if digits is not None and abs(digits) > _MAX_DIGITS:
        raise ValueError(f"at most {_MAX_DIGITS} digits")
    return round(value, digits)  # type: ignore[arg-type]  # raises TypeError for 0.5 digits


_FUNCTIONS: dict[str, Callable[..., Number]] = {"abs": abs, "max": max, "min": min, "round": _round}


def evaluate(expression: str) -> str:
    """Evaluate an expression such as `(17 + 4) * 3` to at most ten significant digits.

    Raises:
        CalculatorError: it is not arithmetic or too long, or its value is too large or undefined.
    """
    if len(expression) > _MAX_LENGTH:
        raise CalculatorError(f"the expression is longer than {_MAX_LENGTH} characters")
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
        return _checked(node.value)  # booleans are ints, which is harmless
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        return _checked(_binary(node.op, _value(node.left), _value(node.right)))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return _checked(_call(node.func.id, [_value(argument) for argument in node.args]))
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
    # checked with logarithms first, because 9 ** 9 ** 9 would exhaust memory
    if base and exponent * math.log10(abs(base)) > math.log10(_MAX_VALUE) + 1:
        raise CalculatorError("the result is too large")
    try:
        result: Number | complex = base**exponent
    except (ZeroDivisionError, OverflowError):
        raise CalculatorError(f"{base} ** {exponent} is undefined") from None
    if isinstance(result, complex):
        raise CalculatorError(f"{base} ** {exponent} is undefined")
    return result


def _call(name: str, values: list[Number]) -> Number:
    if name not in _FUNCTIONS:
        raise CalculatorError(f"no function {name!r}: there are {', '.join(_FUNCTIONS)}")
    try:
        return _FUNCTIONS[name](*values)
    except (TypeError, ValueError, OverflowError) as error:
        raise CalculatorError(f"{name}: {error}") from None


def _checked(value: Number) -> Number:
    if not abs(value) <= _MAX_VALUE:  # also true for NaN
        raise CalculatorError("the result is too large")
    return value
