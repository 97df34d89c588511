"""Actions that a JSON schema describes, as replies in text.

An action with one field of text, a number or a choice is written as the value of that field; any
other one as a JSON object. A reply is the action as a whole, or what stands between `<action>` and
`</action>`.

Schemas come from a server and are not trusted: references are resolved within bounds and never
fetched, and regular expressions are left for the server to check.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jsonschema import Draft202012Validator, SchemaError
from jsonschema.exceptions import best_match

from rayrl.environment.signature import suggestion
from rayrl.errors import ConfigError, clip, safe_repr

__all__ = ["NoAction", "SchemaActions", "Tool"]

Schema = Mapping[str, Any]

_MAX_NODES = 20_000  # parts of a schema, once its references are resolved
_MAX_SAID = 500  # characters of what is wrong with a reply
_AS_IT_IS = ("enum", "const", "default", "examples", "required")  # there are no schemas in these
_LEFT_OUT = ("title", "pattern", "patternProperties", "format")  # besides what begins with $

_TAGGED = re.compile(r"<action>(.*?)</action>", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?(?!\w)")


class NoAction(Exception):
    """Why a reply is no action."""


@dataclass(frozen=True)
class Tool:
    """A tool that an action may call."""

    name: str
    description: str
    arguments: Schema

    @classmethod
    def of(cls, name: str, description: str, published: Any) -> Tool:
        """A tool whose arguments have a published schema.

        Raises:
            ValueError: it is no schema, or too large.
        """
        return cls(name, clip(" ".join(description.split()), 2_000), _resolved(published))


@dataclass(frozen=True)
class SchemaActions:
    """The actions of a schema.

    Attributes:
        schema: of an action, without references.
        tools: that actions call, if they call tools.
        field: whose value a reply is; empty: a reply is a JSON object.
    """

    schema: Schema
    tools: tuple[Tool, ...] = ()
    field: str = ""

    @classmethod
    def of(cls, published: Any) -> SchemaActions:
        """The actions of a published schema.

        Raises:
            ValueError: it is no schema, or too large.
        """
        return cls(_resolved(published)).with_field("")

    @property
    def calls_tools(self) -> bool:
        """Whether an action is the call of a tool, as OpenEnv has it for MCP."""
        fields = _properties(self.schema)
        return "tool_name" in fields and fields.get("type", {}).get("const") == "call_tool"

    def with_tools(self, tools: Sequence[Tool]) -> SchemaActions:
        """The same actions as calls of these tools."""
        return replace(self, tools=tuple(tools))

    def with_field(self, wanted: str) -> SchemaActions:
        """The same actions with replies that are the value of a field.

        Args:
            wanted: its name; empty: of the only field, if that has a text, else none.

        Raises:
            ConfigError: there is no such field, or its value alone is no action.
        """
        fields, known = _properties(self.schema), self._fields()
        if not wanted:
            only = known[0] if len(known) == 1 and not self.calls_tools else ""
            return replace(self, field=only if only and _kind(fields[only]) else "")
        key = f"env.args.field={wanted}"
        if wanted not in known:
            raise ConfigError(f"{key}: actions have no such field.{suggestion(wanted, known)}")
        others = [name for name in self._required() if name != wanted]
        if others or not _kind(fields[wanted]):
            why = (
                f"an action needs {', '.join(others)} too" if others else "it is not a plain value"
            )
            raise ConfigError(f"{key}: {why}; leave it empty, and replies are JSON objects")
        return replace(self, field=wanted)

    def _fields(self) -> list[str]:
        """Names of the fields that are not always the same."""
        fields = _properties(self.schema).items()
        return [name for name, one in fields if name != "metadata" and "const" not in one]

    def _required(self) -> list[str]:
        return [name for name in self._fields() if name in self.schema.get("required", ())]

    @property
    def instruction(self) -> str:
        """What a reply must be, in a sentence."""
        if self.tools:
            return (
                "Answer with the call of a tool, as a JSON object only: "
                '{"tool_name": …, "arguments": {…}}.'
            )
        if not self.field:
            if _properties(self.schema) and not self._fields():
                return "Any reply is a step."
            return "Answer with an action, as a JSON object only."
        schema = _properties(self.schema)[self.field]
        kind = _kind(schema)
        if kind == "choice":
            return f"Answer with one of these only: {', '.join(_choices(schema))}."
        if kind == "string":
            return f"Your whole reply is the {self.field}."
        low, high = _range(schema, math.inf)
        most = f" to {high}" if low > -math.inf else f" of at most {high}"
        ends = f" from {low}" if low > -math.inf else ""
        ends += most if high < math.inf else " up" if ends else ""
        return f"Answer with a {'whole ' if kind == 'integer' else ''}number{ends} only."

    @property
    def details(self) -> str:
        """What else is to be said about actions, once."""
        if self.tools:
            lines = [
                f"- {tool.name}: {tool.description} Arguments: "
                + json.dumps(_properties(tool.arguments), ensure_ascii=False)
                for tool in self.tools
            ]
            return "\n\nTools:\n" + "\n".join(lines)
        fields = {name: _properties(self.schema)[name] for name in self._fields()}
        if self.field:
            meaning = " ".join(str(fields[self.field].get("description", "")).split())
            return f" It is the {self.field}: {meaning.rstrip('.')}." if meaning else ""
        if not _properties(self.schema):
            return f" Its schema: {json.dumps(self.schema, ensure_ascii=False)}"
        if not fields:
            return ""
        needs = f" Required: {', '.join(self._required())}." if self._required() else ""
        return f" Its fields: {json.dumps(fields, ensure_ascii=False)}.{needs}"

    def parse(self, reply: str) -> dict[str, Any]:
        """The action that a reply is.

        Raises:
            NoAction: it is none.
        """
        tagged = _TAGGED.findall(reply)
        text = (tagged[-1] if tagged else reply).strip()
        fields = _properties(self.schema)
        action = {
            name: one["const"]
            for name, one in fields.items()
            if "const" in one and (self.tools or name in self.schema.get("required", ()))
        }
        if self.field:
            action[self.field] = _value(fields[self.field], text)
        elif self._fields() or not fields:
            action |= _json_object(text)
        _check(self.schema, action, "")
        if self.tools:
            known = {tool.name: tool for tool in self.tools}
            name = action.get("tool_name")
            if name not in known:
                near = suggestion(str(name), list(known))
                raise NoAction(f"There is no tool {clip(repr(name), 100)}.{clip(near, 300)}")
            _check(known[name].arguments, action.setdefault("arguments", {}), "arguments")
        return action

    def sample(self, rng: random.Random, seen: str) -> str:
        """A reply that is any action; text is a word of what was seen."""
        words = re.findall(r"\w+", seen)[-200:]
        if self.field:
            value = _sample(_properties(self.schema)[self.field], rng, words)
            return value if isinstance(value, str) else json.dumps(value)
        if self.tools:
            tool = rng.choice(self.tools)
            arguments = _sample({**tool.arguments, "type": "object"}, rng, words)
            return json.dumps({"tool_name": tool.name, "arguments": arguments})
        return json.dumps(_sample({"type": "object", **self.schema}, rng, words))


def _resolved(published: Any) -> dict[str, Any]:
    """A schema with its definitions in place, without what only the server should check.

    Raises:
        ValueError: it is no schema, or too large.
    """
    definitions = published.get("$defs") if isinstance(published, dict) else None
    left = _MAX_NODES

    def resolve(part: Any, within: tuple[str, ...]) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"the schema has more than {_MAX_NODES:,} parts")
        if isinstance(part, list):
            return [resolve(one, within) for one in part]
        if not isinstance(part, dict):
            return part
        plain: dict[str, Any] = {}
        for key, value in part.items():
            if key == "properties" and isinstance(value, dict):
                plain[key] = {name: resolve(one, within) for name, one in value.items()}
            elif key in _AS_IT_IS:
                plain[key] = value
            elif not key.startswith("$") and key not in _LEFT_OUT:
                plain[key] = resolve(value, within)
        name = str(part.get("$ref", "")).rpartition("/")[2]
        # within itself, and elsewhere, it may be anything: the server decides
        if isinstance(definitions, dict) and name in definitions and name not in within:
            return {**resolve(definitions[name], (*within, name)), **plain}
        return plain

    try:
        if not isinstance(published, dict):
            raise ValueError(f"{safe_repr(published, 200)} is no JSON schema")
        schema: dict[str, Any] = resolve(published, ())
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"the schema is none: {clip(error.message, _MAX_SAID)}") from error
    except (TypeError, RecursionError) as error:
        raise ValueError("the schema is none, or nested too deeply") from error
    return schema


def _properties(schema: Schema) -> dict[str, dict[str, Any]]:
    found = schema.get("properties", {})
    return {name: one for name, one in found.items() if isinstance(one, dict)}


def _sole(schema: Schema) -> Schema:
    """A schema without the alternative of being null."""
    options = schema.get("anyOf", schema.get("oneOf", ()))
    others = [one for one in options if isinstance(one, dict) and one.get("type") != "null"]
    return others[0] if len(others) == 1 else schema


def _kind(schema: Schema) -> str:
    """How a value is written: choice, string, integer or number; empty: not in plain text."""
    schema = _sole(schema)
    kind = schema.get("type", "")
    if schema.get("enum"):
        plain = all(isinstance(one, str | int | float | None) for one in schema["enum"])
        return "choice" if plain else ""
    if kind == "boolean":
        return "choice"
    return kind if kind in ("string", "integer", "number") else ""


def _choices(schema: Schema) -> dict[str, Any]:
    """Values of a choice by how they are written."""
    values = [one for one in _sole(schema).get("enum", (True, False)) if one is not None]
    return {one if isinstance(one, str) else json.dumps(one): one for one in values}


def _range(schema: Schema, widest: float) -> tuple[float, float]:
    """The least and the largest number; of integers, both are possible."""
    schema = _sole(schema)
    step = 1 if schema.get("type") == "integer" else 0
    low = schema.get("minimum", schema.get("exclusiveMinimum", -math.inf) + step)
    high = schema.get("maximum", schema.get("exclusiveMaximum", math.inf) - step)
    return max(low, -widest), min(high, widest)


def _value(schema: Schema, text: str) -> Any:
    """The plain value that a reply is."""
    kind = _kind(schema)
    if kind == "string":
        return text
    if kind == "choice":
        written = {name.lower(): value for name, value in _choices(schema).items()}
        named = {name for name in written if name == text.lower()} or {
            name for name in written if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text.lower())
        }
        if len(named) != 1:
            raise NoAction(f"{clip(repr(text), 100)} names {len(named)} of the choices.")
        return written[named.pop()]
    numbers = {float(found) for found in _NUMBER.findall(text)}
    if len(numbers) != 1 or not math.isfinite(*numbers):
        raise NoAction(f"{clip(repr(text), 100)} is not one number.")
    (number,) = numbers
    return int(number) if number.is_integer() else number


def _json_object(text: str) -> dict[str, Any]:
    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        found = json.loads(text[text.find("{") : text.rfind("}") + 1], parse_constant=no_constant)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise NoAction("It is not a JSON object.")
    return found


def _check(schema: Schema, value: Any, where: str) -> None:
    """Raise `NoAction` if a value does not fit a schema."""
    try:
        error = best_match(Draft202012Validator(schema).iter_errors(value))
    except (RecursionError, OverflowError, ValueError):  # the server decides
        return
    if error is not None:
        place = ".".join(map(str, [*([where] if where else []), *error.absolute_path]))
        message = clip(error.message, _MAX_SAID)
        raise NoAction(f"{place}: {message}." if place else f"{message}.")


def _sample(schema: Any, rng: random.Random, words: Sequence[str]) -> Any:
    """Any value of a schema, as far as that is easy."""
    if not isinstance(schema, dict):
        return None
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return rng.choice(schema["enum"])
    if options := schema.get("anyOf") or schema.get("oneOf"):
        others = [one for one in options if one != {"type": "null"}]
        return _sample(rng.choice(others or options), rng, words)
    kind = schema.get("type")
    match kind[0] if isinstance(kind, list) and kind else kind:
        case "integer":
            low, high = _range(schema, 1e9)
            least = math.ceil(low) if low > -1e9 else math.floor(min(0, high))
            return rng.randint(least, max(least, math.floor(min(high, least + 9))))
        case "number":
            low, high = _range(schema, 1e9)
            low = low if low > -1e9 else min(0.0, high)
            return round(rng.uniform(low, max(low, min(high, low + 10))), 3)
        case "boolean":
            return rng.random() < 0.5
        case "string":
            least, most = schema.get("minLength", 0), schema.get("maxLength", 1_000)
            if fitting := [word for word in words if least <= len(word) <= most]:
                return rng.choice(fitting)
            length = int(min(max(least, min(5, most)), 10_000))
            return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=length))
        case "array":
            first = [_sample(one, rng, words) for one in schema.get("prefixItems", ())]
            least = max(int(min(schema.get("minItems", 0), 1_000)), len(first))
            most = max(least, int(min(schema.get("maxItems", least + 3), least + 3)))
            more = range(len(first), rng.randint(least, most))
            return first + [_sample(schema.get("items", {}), rng, words) for _ in more]
        case "object":
            needed = schema.get("required", ())
            return {
                name: _sample(one, rng, words)
                for name, one in _properties(schema).items()
                if name in needed or (name != "metadata" and rng.random() < 0.5)
            }
    return None
