"""Values against type hints: what a hint accepts, and what it looks like as JSON schema.

Used where a person's or a model's data meets a typed Python function: the keywords of a task
source, the arguments of a tool.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union

from rayrl.errors import did_you_mean

__all__ = ["fit", "hint_name", "keyword_hints", "schema", "suggestion"]

_SCALARS: dict[Any, str] = {int: "integer", float: "number", str: "string", bool: "boolean"}
_ARRAYS = (list, tuple, set, frozenset)


def hint_name(hint: Any) -> str:
    """A hint as a person writes it: `float`, `list[int]`, `Literal['a', 'b']`."""
    if hint is None or hint is type(None):
        return "None"
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    return str(hint).replace("typing.", "").replace("collections.abc.", "")


def keyword_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The hint of every parameter of `function`; `Any` where it has none or cannot be resolved."""
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError):  # a hint that exists for the type checker only
        hints = {}
    return {name: hints.get(name, Any) for name in inspect.signature(function).parameters}


def suggestion(name: str, known: Sequence[str]) -> str:
    """What to say after an unknown name: the nearest known one, or all of them."""
    near = did_you_mean(name, known)
    if near:
        return near
    return f" Known: {', '.join(sorted(known))}." if known else " There are none."


def _is_union(origin: Any) -> bool:
    return origin is Union or origin is types.UnionType


def fit(value: Any, hint: Any) -> Any:
    """`value` as `hint` wants it: lists become tuples, whole numbers floats, nothing else changes.

    Raises:
        TypeError: the value does not fit; the message says what was expected and what came.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is inspect.Parameter.empty or isinstance(hint, typing.TypeVar):
        return value
    if origin is typing.Annotated:
        return fit(value, args[0])
    if _is_union(origin):
        return _fit_union(value, hint, args)
    if origin is Literal:
        if value in args and any(value == arg and type(value) is type(arg) for arg in args):
            return value
        raise TypeError(f"expected one of {', '.join(map(repr, args))}, got {value!r}")
    base = origin or hint
    if hint is None or hint is type(None):
        if value is None:
            return None
    elif base in _SCALARS:
        return _fit_scalar(value, base)
    elif base in _ARRAYS or base is Sequence:
        return _fit_array(value, hint, base, args)
    elif base is dict or base is Mapping:
        if isinstance(value, Mapping):
            of_key, of_value = args or (Any, Any)
            return {fit(k, of_key): fit(v, of_value) for k, v in value.items()}
    elif not isinstance(base, type) or isinstance(value, base):
        return value
    elif dataclasses.is_dataclass(base) and isinstance(value, Mapping):
        return _fit_dataclass(value, base)
    raise TypeError(f"expected {hint_name(hint)}, got {value!r}")


def _fit_union(value: Any, hint: Any, args: tuple[Any, ...]) -> Any:
    for exact in (True, False):  # 1 fits int | float as it is
        for arg in args:
            if exact and isinstance(arg, type) and type(value) is not arg:
                continue
            try:
                return fit(value, arg)
            except TypeError:
                continue
    raise TypeError(f"expected {hint_name(hint)}, got {value!r}")


def _fit_scalar(value: Any, kind: Any) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and is_number and abs(value) <= sys.float_info.max:
        return float(value)
    if kind is float and isinstance(value, float):  # infinite or not a number
        return value
    if kind is int and is_number and value % 1 == 0:
        return int(value)
    if kind in (str, bool) and isinstance(value, kind):
        return value
    raise TypeError(f"expected {kind.__name__}, got {value!r}")


def _fit_array(value: Any, hint: Any, base: Any, args: tuple[Any, ...]) -> Any:
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, set, frozenset)):
        raise TypeError(f"expected {hint_name(hint)}, got {value!r}")
    items = list(value)
    fixed = base is tuple and args and not (len(args) == 2 and args[1] is Ellipsis)
    if fixed:
        if len(items) != len(args):
            raise TypeError(f"expected {len(args)} values ({hint_name(hint)}), got {value!r}")
        return tuple(fit(item, arg) for item, arg in zip(items, args, strict=True))
    of_item = args[0] if args else Any
    make = list if base is Sequence else base
    return make(fit(item, of_item) for item in items)


def _fit_dataclass(value: Mapping[str, Any], base: Any) -> Any:
    hints = typing.get_type_hints(base)
    fields = [field.name for field in dataclasses.fields(base) if field.init]
    for key in value:
        if key not in fields:
            raise TypeError(f"{base.__name__} has no field {key!r}.{suggestion(key, fields)}")
    fitted = {}
    for key, part in value.items():
        try:
            fitted[key] = fit(part, hints[key])
        except TypeError as error:
            raise TypeError(f"field {key!r}: {error}") from None
    return base(**fitted)


def schema(hint: Any) -> dict[str, Any]:
    """The JSON schema of a hint; `{}` (anything) where JSON schema has no word for it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return schema(args[0])
    if _is_union(origin):
        options = [schema(arg) for arg in args if arg is not type(None)]
        if len(options) == 1:  # Optional[X]: the parameter is not required, X is what it takes
            return options[0]
        return {"anyOf": options}
    if origin is Literal:
        kinds = {type(arg) for arg in args}
        kind = _SCALARS.get(kinds.pop()) if len(kinds) == 1 else None
        return ({"type": kind} if kind else {}) | {"enum": list(args)}
    base = origin or hint
    if base in _SCALARS:
        return {"type": _SCALARS[base]}
    if base in _ARRAYS or base is Sequence:
        fixed = base is tuple and args and args[-1] is not Ellipsis
        if fixed:
            return {
                "type": "array",
                "prefixItems": [schema(arg) for arg in args],
                "minItems": len(args),
                "maxItems": len(args),
            }
        return {"type": "array"} | ({"items": schema(args[0])} if args else {})
    if isinstance(base, type) and dataclasses.is_dataclass(base):
        hints = typing.get_type_hints(base)
        fields = [field for field in dataclasses.fields(base) if field.init]
        missing = dataclasses.MISSING
        return {
            "type": "object",
            "properties": {field.name: schema(hints[field.name]) for field in fields},
            "required": [
                field.name
                for field in fields
                if field.default is missing and field.default_factory is missing
            ],
        }
    if base is dict or base is Mapping:
        return {"type": "object"} | ({"additionalProperties": schema(args[1])} if args else {})
    return {}
