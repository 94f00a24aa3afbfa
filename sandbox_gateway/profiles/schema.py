"""What ``profiles.schema.json`` says about a profile file.

The schema is the contract; this module interprets the part of JSON Schema (draft 2020-12) that it uses. The
``jsonschema`` package is not called: importing it costs about a second where its format extras are installed, on
the way of every kernel's start. A test holds both to the same verdicts.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sandbox_gateway.profiles.lines import Key


@cache
def schema() -> Mapping[str, Any]:
    """The JSON Schema of the profile file."""
    text = Path(__file__).parent.with_name("profiles.schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def show(value: Any) -> str:
    """A value as TOML would write it, shortened to one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return shorten("{ " + ", ".join(f"{key} = {show(item)}" for key, item in list(value.items())[:5]) + " }")
    if isinstance(value, list):
        return shorten("[" + ", ".join(show(item) for item in value[:8]) + "]")
    if isinstance(value, str):
        return shorten(json.dumps(value, ensure_ascii=False))
    return shorten(str(value))


def shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


@dataclass(frozen=True, slots=True)
class Fault:
    """One violation of the schema."""

    key: Key
    text: str
    value: Any = None
    valued: bool = True
    """False where there is no value to show (a key is missing or unknown)."""


def faults(data: Any) -> list[Fault]:
    """All violations of the profile schema in ``data``, in the order of the file."""
    return list(_check(schema(), data, ()))


_KEYWORDS = frozenset(
    {"$schema", "$defs", "$ref", "title", "description", "type", "enum", "const", "anyOf"}
    | {"pattern", "minLength", "minimum", "exclusiveMinimum", "maximum", "minItems", "maxItems", "items"}
    | {"properties", "additionalProperties", "propertyNames", "required"}
)
"""What is interpreted; another keyword in the schema is a mistake of ours and raises."""


def _resolve(node: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = node.get("$ref")
    if reference is None:
        return node
    target: Mapping[str, Any] = schema()["$defs"][reference.removeprefix("#/$defs/")]
    return {**target, **{word: value for word, value in node.items() if word != "$ref"}}


def _check(node: Mapping[str, Any], value: Any, key: Key) -> Iterator[Fault]:
    node = _resolve(node)
    unknown = node.keys() - _KEYWORDS
    if unknown:
        raise ValueError(f"the profile schema uses keywords that are not interpreted: {sorted(unknown)}")
    if not _scalar_holds(node, value):
        yield Fault(key, f"{show(value)} is not allowed; give {_allowed(node)}", value)
    elif isinstance(value, dict):
        yield from _check_table(node, value, key)
    elif isinstance(value, list) and "items" in node:
        for index, item in enumerate(value):
            yield from _check(node["items"], item, (*key, index))


def _check_table(node: Mapping[str, Any], value: Mapping[str, Any], key: Key) -> Iterator[Fault]:
    properties: Mapping[str, Any] = node.get("properties", {})
    for name in node.get("required", ()):
        if name not in value:
            yield Fault((*key, name), f"is missing; give {_allowed(_resolve(properties[name]))}", valued=False)
    names = _resolve(node["propertyNames"]) if "propertyNames" in node else None
    others: Any = node.get("additionalProperties", True)
    for name, item in value.items():
        here = (*key, name)
        if names is not None and not _scalar_holds(names, name):
            yield Fault(here, f"{show(name)} is not allowed as a name; give {_allowed(names)}", valued=False)
        elif name in properties:
            yield from _check(properties[name], item, here)
        elif others is False:
            near = difflib.get_close_matches(name, properties, n=1)
            advice = f"did you mean {near[0]!r}? " if near else ""
            yield Fault(here, f"unknown key; {advice}allowed: {', '.join(properties)}", valued=False)
        elif isinstance(others, Mapping):
            yield from _check(others, item, here)


_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "number": (int, float),
    "integer": (int, float),
}


def _is(kind: str, value: Any) -> bool:
    if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return False
    if isinstance(value, float):
        # JSON has neither NaN nor infinity, but TOML has; 3.0 is an integer to JSON Schema.
        return math.isfinite(value) and (kind == "number" or value.is_integer())
    return True


def _scalar_holds(node: Mapping[str, Any], value: Any) -> bool:
    """Whether ``value`` itself (not what it contains) satisfies ``node``."""
    if "anyOf" in node and not any(_scalar_holds(_resolve(choice), value) for choice in node["anyOf"]):
        return False
    if "type" in node and not _is(node["type"], value):
        return False
    if "enum" in node and not any(type(value) is type(choice) and value == choice for choice in node["enum"]):
        return False
    if "const" in node and not (type(value) is type(node["const"]) and value == node["const"]):
        return False
    if isinstance(value, str):
        shortest: int = node.get("minLength", 0)
        return len(value) >= shortest and _matches(node.get("pattern"), value)
    if isinstance(value, list):
        fewest: int = node.get("minItems", 0)
        most_items: float = node.get("maxItems", math.inf)
        return fewest <= len(value) <= most_items
    if isinstance(value, int | float) and not isinstance(value, bool):
        least: float = node.get("minimum", -math.inf)
        most: float = node.get("maximum", math.inf)
        above: float = node.get("exclusiveMinimum", -math.inf)
        return least <= value <= most and value > above
    return True


def _matches(pattern: str | None, value: str) -> bool:
    # A pattern's "$" is the very end, as in ECMA 262; Python's would let a newline through.
    return pattern is None or re.search(re.sub(r"\$$", r"\\Z", pattern), value) is not None


def _allowed(node: Mapping[str, Any]) -> str:
    if "enum" in node:
        return "one of " + ", ".join(show(choice) for choice in node["enum"])
    return str(node.get("description", node.get("type", "another value")))
