"""The description of the REST routes, ``openapi.yaml``, as a value, and validators of what it describes.

It is the one place where a request's shape is written down: bodies and query parameters are checked against it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from jsonschema.exceptions import ValidationError  # type: ignore[import-untyped]
from jsonschema.validators import extend  # type: ignore[import-untyped]

from sandbox_gateway.errors import InvalidField

FILE = Path(__file__).with_name("openapi.yaml")
_ARTICLES = {"integer": "a whole number", "number": "a number", "null": "null"}


@cache
def text() -> bytes:
    """The file."""
    return FILE.read_bytes()


@cache
def description() -> Mapping[str, Any]:
    """What it says; not to be changed."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found: Mapping[str, Any] = yaml.load(text(), Loader=loader)
    return found


@dataclass(frozen=True, slots=True)
class Parameter:
    """One query parameter of a route."""

    name: str
    schema: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """``string``, ``integer``, ``number``, ``boolean`` or ``array`` (of strings, comma separated)."""
        return str(self.schema["type"])


@cache
def parameters(path: str, method: str) -> Mapping[str, Parameter]:
    """The query parameters of a route, by name."""
    route = description()["paths"][path]
    found = (_resolved(one) for one in (*route.get("parameters", ()), *route[method].get("parameters", ())))
    return {one["name"]: Parameter(one["name"], one["schema"]) for one in found if one["in"] == "query"}


@cache
def validator(schema: str) -> Any:
    """A validator of the schema called so."""
    return checker({"$ref": f"#/components/schemas/{schema}"})


def checker(schema: Mapping[str, Any]) -> Any:
    """A validator of a schema that may refer to others of the description."""
    return _Validator({**schema, "components": description()["components"]})


def check(value: Any, schema: str) -> None:
    """Raise :class:`~sandbox_gateway.errors.InvalidField` for the first thing in ``value`` that ``schema`` forbids."""
    raise_first(validator(schema), value, ())


def raise_first(found: Any, value: Any, where: tuple[str, ...]) -> None:
    """As :func:`check`, with a validator and the place of ``value``."""
    for error in found.iter_errors(value):
        raise _explained(error, where)


def _resolved(node: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = node.get("$ref")
    if reference is None:
        return node
    target: Any = description()
    for part in reference.removeprefix("#/").split("/"):
        target = target[part]
    resolved: Mapping[str, Any] = target
    return resolved


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    # The "$" of ECMA 262 is the very end; Python's lets a newline through.
    if validator.is_type(instance, "string") and not re.search(re.sub(r"\$$", r"\\Z", pattern), instance):
        yield ValidationError("does not match")


_Validator = extend(Draft202012Validator, {"pattern": _pattern})


def _explained(error: ValidationError, where: tuple[str, ...]) -> InvalidField:
    """Which field is wrong, and how, without repeating what was sent."""
    path = [*where, *(str(part) for part in error.absolute_path)]
    rule: Any = error.validator_value
    instance, schema = error.instance, error.schema
    about = schema.get("description", "") if isinstance(schema, Mapping) else ""
    match str(error.validator):
        case "required":
            missing = next((name for name in rule if name not in instance), "")
            return InvalidField(_dotted([*path, missing]), "is missing")
        case "additionalProperties" if rule is False:
            known = schema.get("properties", {})
            extra = next((name for name in instance if name not in known), "")
            return InvalidField(_dotted([*path, extra]), "is unknown", f"There are: {', '.join(known) or 'none'}.")
        case "type":
            kinds = [rule] if isinstance(rule, str) else rule
            text = "is not " + " or ".join(_ARTICLES.get(kind, f"{_article(kind)} {kind}") for kind in kinds)
        case "enum":
            text = f"is none of {', '.join(str(choice) for choice in rule)}"
        case "minimum" | "exclusiveMinimum":
            text = f"is too small; {'at least' if error.validator == 'minimum' else 'more than'} {rule}"
        case "maximum":
            text = f"is too large; at most {rule}"
        case "maxLength":
            text = f"is too long; at most {rule} characters"
        case "maxItems" | "maxProperties":
            text = f"has too many entries; at most {rule}"
        case "pattern":
            if "propertyNames" in error.absolute_schema_path:
                path.append(str(instance))  # it is the name that is wrong
            text = f"does not have the form {rule}"
        case _:
            text = "is not allowed"
    return InvalidField(_dotted(path) or "body", text, about or None)


def _article(kind: str) -> str:
    return "an" if kind[0] in "aeiou" else "a"


def _dotted(path: list[str]) -> str:
    return ".".join(part[:60] for part in path)
