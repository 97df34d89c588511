"""Convert values to match type hints, and type hints to JSON schemas.

Used to pass a person's or a model's data to a typed Python function: keywords of a task source,
arguments of a tool.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from typing import Any, Literal, NotRequired, Union

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from rayrl.errors import did_you_mean

__all__ = [
    "declare_keywords",
    "fit",
    "hint_name",
    "keyword_hints",
    "plain_default",
    "schema",
    "suggestion",
]

_SCALARS: dict[Any, str] = {int: "integer", float: "number", str: "string", bool: "boolean"}
_ARRAYS = (list, tuple, set, frozenset)


def hint_name(hint: Any) -> str:
    """Format a hint as it is written in code: `float`, `list[int]`, `Literal['a', 'b']`."""
    if hint is None or hint is type(None):
        return "None"
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    if _is_union(typing.get_origin(hint)):
        return " | ".join(map(hint_name, typing.get_args(hint)))
    return str(hint).replace("typing.", "").replace("collections.abc.", "")


def keyword_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the hint of every parameter; `Any` if it has none or it cannot be resolved."""
    parameters = inspect.signature(function).parameters
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError):  # some of them exist only for the type checker
        hints = {name: _resolve(p.annotation, function) for name, p in parameters.items()}
    return {name: hints.get(name, Any) for name in parameters}


def declare_keywords(function: Callable[..., Any], keywords: Mapping[str, tuple[Any, Any]]) -> None:
    """Let `**keywords` of a function be known one by one: hint and default by name."""
    signature = inspect.signature(function)
    kinds = inspect.Parameter
    named = [p for p in signature.parameters.values() if p.kind is not kinds.VAR_KEYWORD]
    named += [
        kinds(name, kinds.KEYWORD_ONLY, default=default, annotation=hint)
        for name, (hint, default) in keywords.items()
    ]
    function.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    function.__annotations__ |= {name: hint for name, (hint, _) in keywords.items()}


def _resolve(hint: Any, function: Any) -> Any:
    """Resolve a string hint with the globals and closure of the function."""
    if not isinstance(hint, str):
        return hint
    inner = inspect.unwrap(function)
    inner = getattr(inner, "__func__", inner)
    cells = getattr(inner, "__closure__", None) or ()
    closure = dict(zip(inner.__code__.co_freevars, cells, strict=True)) if cells else {}
    try:
        values = {name: cell.cell_contents for name, cell in closure.items()}
        return eval(hint, getattr(inner, "__globals__", {}), values)
    except (NameError, TypeError, SyntaxError, ValueError):
        return Any


def suggestion(name: str, known: Sequence[str]) -> str:
    """Suggest the nearest known name for an unknown one, or list all known names."""
    if near := did_you_mean(name, known):
        return near
    return f" Known: {', '.join(sorted(known))}." if known else " There are none."


def _is_union(origin: Any) -> bool:
    return origin is Union or origin is types.UnionType


def fit(value: Any, hint: Any) -> Any:
    """Convert `value` to match `hint`, e.g. a list to a tuple or a whole number to a float.

    Raises:
        TypeError: the value does not fit; the message names the expected type and the value.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is inspect.Parameter.empty or isinstance(hint, typing.TypeVar):
        return value
    if origin is typing.Annotated:
        return fit(value, args[0])
    if _is_union(origin):
        return _fit_union(value, hint, args)
    if origin is Literal:
        if any(value == arg and type(value) is type(arg) for arg in args):
            return value
        if any(isinstance(arg, Enum | bytes) for arg in args):
            return _parse(value, hint)
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
            return {_fit_key(k, of_key): fit(v, of_value) for k, v in value.items()}
    elif typing.is_typeddict(base):
        if isinstance(value, Mapping):
            return _fit_fields(value, base)
    elif isinstance(base, type) and isinstance(value, base):
        return value
    elif dataclasses.is_dataclass(base):
        if isinstance(value, Mapping):
            return base(**_fit_fields(value, base))  # type: ignore[operator]
    else:
        return _parse(value, hint)
    raise _misfit(value, hint)


def _misfit(value: Any, hint: Any) -> TypeError:
    """Explain that a value does not fit; a single one where there should be a list is usual."""
    remedy = ""
    if value is not None and not isinstance(value, list):
        with suppress(TypeError):
            fit([value], hint)
            remedy = f"; write {[value]!r}"
    return TypeError(f"expected {hint_name(hint)}, got {value!r}{remedy}")


def _fit_key(key: Any, hint: Any) -> Any:
    """Fit the key of a mapping, which is always a string in JSON."""
    try:
        return fit(key, hint)
    except TypeError:
        if not isinstance(key, str):
            raise
    (parsed,) = _parse({key: None}, dict[hint, None])
    return parsed


def _parse(value: Any, hint: Any) -> Any:
    """Parse an `Enum`, a date, a `Path` etc. with pydantic, from JSON data or an instance."""
    adapter = _adapter(hint)
    if adapter is None:  # a type unknown to pydantic: only instances fit
        if not isinstance(hint, type) or isinstance(value, hint):
            return value
        raise _misfit(value, hint)
    try:
        return adapter.validate_python(value, strict=True)
    except ValidationError:
        pass  # try it as JSON
    try:
        return adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = first["msg"].replace("Input should be ", "expected ")
        where = ".".join(str(part) for part in first["loc"] if part != "[key]")
        raise TypeError(f"{where}: {message}" if where else f"{message}, got {value!r}") from None
    except (TypeError, ValueError):
        raise _misfit(value, hint) from None


@functools.lru_cache(256)
def _adapter(hint: Any) -> TypeAdapter[Any] | None:
    try:
        return TypeAdapter(hint)
    except (PydanticUserError, NameError):
        return None


def _fit_union(value: Any, hint: Any, args: tuple[Any, ...]) -> Any:
    for exact in (True, False):  # so that 1 stays an int for int | float
        for arg in args:
            if exact and isinstance(arg, type) and type(value) is not arg:
                continue
            try:
                return fit(value, arg)
            except TypeError:
                continue
    kinds = [arg for arg in args if dataclasses.is_dataclass(arg)]
    if isinstance(value, Mapping) and len(kinds) == 1:
        return fit(value, kinds[0])  # raises the specific error
    raise _misfit(value, hint)


def _fit_scalar(value: Any, kind: Any) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and is_number and abs(value) <= sys.float_info.max:
        return float(value)
    if kind is float and isinstance(value, float):  # infinite or NaN
        return value
    if kind is int and is_number and value % 1 == 0:
        return int(value)
    if kind in (str, bool) and isinstance(value, kind):
        return value
    raise TypeError(f"expected {kind.__name__}, got {value!r}")


def _fit_array(value: Any, hint: Any, base: Any, args: tuple[Any, ...]) -> Any:
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, set, frozenset)):
        raise _misfit(value, hint)
    items = list(value)
    fixed = base is tuple and args and not (len(args) == 2 and args[1] is Ellipsis)
    if fixed:
        if len(items) != len(args):
            raise TypeError(f"expected {len(args)} values ({hint_name(hint)}), got {value!r}")
        return tuple(fit(item, arg) for item, arg in zip(items, args, strict=True))
    of_item = args[0] if args else Any
    make = list if base is Sequence else base
    return make(fit(item, of_item) for item in items)


def _fit_fields(value: Mapping[str, Any], base: Any) -> dict[str, Any]:
    hints, required = _fields(base)
    known = [*hints]
    for key in value:
        if key not in known:
            raise TypeError(f"{base.__name__} has no field {key!r}.{suggestion(key, known)}")
    fitted = {}
    for key, part in value.items():
        try:
            fitted[key] = fit(part, hints[key])
        except TypeError as error:
            raise TypeError(f"field {key!r}: {error}") from None
    for key in known:
        if key in required and key not in fitted:
            raise TypeError(f"{base.__name__} needs the field {key!r}")
    return fitted


def _fields(base: Any) -> tuple[dict[str, Any], list[str]]:
    """Return hints by field of a dataclass or a `TypedDict`, and the required fields."""
    if typing.is_typeddict(base):
        # __required_keys__ misses NotRequired in string annotations
        marked = typing.get_type_hints(base, include_extras=True)
        optional = [name for name, hint in marked.items() if typing.get_origin(hint) is NotRequired]
        return typing.get_type_hints(base), [
            name for name in marked if name in base.__required_keys__ and name not in optional
        ]
    fields = [field for field in dataclasses.fields(base) if field.init]
    missing = dataclasses.MISSING
    required = [item.name for item in fields if item.default is item.default_factory is missing]
    hints = keyword_hints(base)
    return {field.name: hints[field.name] for field in fields}, required


def schema(hint: Any, within: tuple[type, ...] = ()) -> dict[str, Any]:
    """Convert a hint to a JSON schema; `{}` (anything) if it has no equivalent.

    Args:
        within: enclosing dataclasses; a recursive reference to one becomes a plain object.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return schema(args[0], within)
    if _is_union(origin):
        options = [schema(arg, within) for arg in args if arg is not type(None)]
        if len(options) == 1:  # Optional[X] only makes the parameter optional
            return options[0]
        return {"anyOf": options}
    if origin is Literal and all(isinstance(arg, str | int | None) for arg in args):
        kinds = {type(arg) for arg in args}
        kind = _SCALARS.get(kinds.pop()) if len(kinds) == 1 else None
        if not any(isinstance(arg, Enum) for arg in args):
            return ({"type": kind} if kind else {}) | {"enum": list(args)}
    base = origin or hint
    if base in _SCALARS:
        return {"type": _SCALARS[base]}
    if base in _ARRAYS or base is Sequence:
        fixed = base is tuple and args and args[-1] is not Ellipsis
        if fixed:
            return {
                "type": "array",
                "prefixItems": [schema(arg, within) for arg in args],
                "minItems": len(args),
                "maxItems": len(args),
            }
        return {"type": "array"} | ({"items": schema(args[0], within)} if args else {})
    if typing.is_typeddict(base) or (isinstance(base, type) and dataclasses.is_dataclass(base)):
        return {"type": "object"} if base in within else _fields_schema(base, (*within, base))
    if base is dict or base is Mapping:
        values = schema(args[1], within) if args else {}
        return {"type": "object"} | ({"additionalProperties": values} if args else {})
    return _pydantic_schema(hint)


def _fields_schema(base: Any, within: tuple[type, ...]) -> dict[str, Any]:
    hints, required = _fields(base)
    properties = {name: schema(hint, within) for name, hint in hints.items()}
    return {"type": "object", "properties": properties, "required": required}


def _pydantic_schema(hint: Any) -> dict[str, Any]:
    """Let pydantic convert a hint such as an `Enum` or a date."""
    adapter = None if hint in (Any, inspect.Parameter.empty) else _adapter(hint)
    if adapter is None:
        return {}
    try:
        full = adapter.json_schema()
    except PydanticUserError:
        return {}
    inlined: dict[str, Any] = _inline(full, full.pop("$defs", {}))
    return inlined


def _inline(part: Any, definitions: Mapping[str, Any]) -> Any:
    """Inline references, which models rarely follow, and drop titles and descriptions."""
    if isinstance(part, list):
        return [_inline(item, definitions) for item in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        name = part["$ref"].rpartition("/")[2]
        others = {key: value for key, value in definitions.items() if key != name}
        return _inline(definitions[name], others) if name in definitions else {"type": "object"}
    return {
        key: _inline(value, definitions)
        for key, value in part.items()
        if not (key in ("title", "description") and isinstance(value, str))
    }


def plain_default(value: Any) -> Any:
    """Convert a default value to JSON data.

    Raises:
        TypeError, ValueError: JSON cannot represent it.
    """
    config = ConfigDict(ser_json_inf_nan="constants")
    plain = TypeAdapter(Any, config=config).dump_python(value, mode="json")
    json.dumps(plain, allow_nan=False)
    return plain
