"""Checking the arguments of tool calls against JSON schemas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rayrl.errors import ConfigError, clip

__all__ = ["validated", "validator_of"]


def validator_of(name: str, parameters: Mapping[str, Any]) -> Any:
    """Return the validator of a tool's parameters.

    Raises:
        ConfigError: the schema is invalid, is not that of an object, or refers to others.
    """
    from jsonschema.exceptions import SchemaError  # takes its time
    from jsonschema.validators import Draft202012Validator, validator_for

    if parameters.get("type", "object") != "object":
        raise ConfigError(f"tool {name!r}: its parameters must be an object's JSON schema")
    for reference in _references(parameters):
        if not str(reference).startswith("#"):  # it would be fetched
            raise ConfigError(f"tool {name!r}: its schema refers to another, {reference!r}")
    kind = validator_for(parameters, default=Draft202012Validator)
    try:
        kind.check_schema(parameters)
    except SchemaError as error:
        raise ConfigError(
            f"tool {name!r}: its parameters are not a JSON schema: {clip(error.message, 500)}"
        ) from None
    return kind(parameters)


def _references(schema: Any) -> Iterator[Any]:
    """Yield the value of every `$ref` and the like in a schema."""
    for key, value in schema.items() if isinstance(schema, Mapping) else enumerate(schema):
        if key in ("$ref", "$dynamicRef", "$recursiveRef") and not isinstance(value, Mapping):
            yield value
        elif isinstance(value, Mapping | list):
            yield from _references(value)


def validated(validator: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's arguments if they fit.

    Raises:
        TypeError: they do not; worded for the model.
    """
    from jsonschema.exceptions import best_match

    try:
        error = best_match(validator.iter_errors(dict(given)))
    except RecursionError:
        raise TypeError("the arguments are nested too deeply") from None
    if error is None:
        return dict(given)
    where = ".".join(map(str, error.absolute_path))
    message = clip(error.message, 500)
    raise TypeError(f"argument {where!r}: {message}" if where else message)
