"""Reading requests: JSON bodies and query strings, which are anybody's, made plain checked values.

Whatever is wrong is a 4xx with the field's name; nothing here can take long or grow without bound.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from sandbox_gateway.errors import InvalidField, SandboxGatewayError
from sandbox_gateway.server import openapi
from sandbox_gateway.server.openapi import Parameter

MAX_BODY: Final = 1 << 20
"""Bytes of a request's body."""
MAX_CODE: Final = 16 << 20
"""Bytes of the body of a request that runs code."""
MAX_DEPTH: Final = 32
"""Objects and arrays within each other in a body."""
_ALWAYS = frozenset({"token", "_xsrf", "no_track_activity"})
"""Query parameters of jupyter_server's own."""
_JSON = re.compile(r"application/(json|[a-z0-9.+-]{1,100}\+json)\s*(;.*)?\Z", re.IGNORECASE | re.DOTALL)
_BOOLEANS: Mapping[str, bool] = {"true": True, "1": True, "false": False, "0": False}


def read_body(body: bytes, content_type: str | None, schema: str, limit: int = MAX_BODY) -> dict[str, Any]:
    """The body as an object that ``schema`` (a name in the description) allows; no body is an empty object.

    Raises ``too_large``, ``media_type`` or :class:`~sandbox_gateway.errors.InvalidField`.
    """
    if len(body) > limit:
        raise SandboxGatewayError("too_large", f"the body has {len(body)} bytes; at most {limit} are taken")
    value: Any = {}
    if body.strip():
        if content_type is not None and not _JSON.match(content_type):
            raise SandboxGatewayError("media_type", "the body is not sent as JSON")
        value = parse(body)
    if not isinstance(value, dict):
        raise InvalidField("body", "is not an object")
    openapi.check(value, schema)
    return value


def parse(body: bytes) -> Any:
    """JSON as RFC 8259 and I-JSON have it: UTF-8, no name twice, no NaN, no number that is none, of bounded depth."""
    try:
        text = body.decode("utf-8-sig")
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
        _checked(value, MAX_DEPTH)
    except UnicodeDecodeError as error:
        raise InvalidField("body", f"is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise InvalidField("body", "is nested too deep") from None
    except json.JSONDecodeError as error:
        text = f"is not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        raise InvalidField("body", text) from None
    except ValueError as error:  # a number of thousands of digits too
        raise InvalidField("body", f"is not JSON: {str(error)[:200]}") from None
    return value


def read_query(arguments: Mapping[str, Sequence[bytes]], known: Mapping[str, Parameter]) -> dict[str, Any]:
    """The query parameters of a route, converted and checked; those with a default are always there.

    Raises :class:`~sandbox_gateway.errors.InvalidField`, also for a name that is not known.
    """
    found = {name: one.schema["default"] for name, one in known.items() if "default" in one.schema}
    for name, values in arguments.items():
        # Browsers' front ends add a number to an address so that nothing between answers it.
        if name in _ALWAYS or name.isdigit() or name == "_":
            continue
        parameter = known.get(name)
        if parameter is None:
            hint = f"There are: {', '.join(known) or 'none'}."
            raise InvalidField(name[:60], "is an unknown query parameter", hint)
        value = _converted(parameter, [_text(name, one) for one in values])
        openapi.raise_first(openapi.checker(parameter.schema), value, (name,))
        found[name] = value
    return found


def _converted(parameter: Parameter, values: list[str]) -> Any:
    name = parameter.name
    if parameter.kind == "array":
        return [part for value in values for part in value.split(",")]
    if len(values) != 1:
        raise InvalidField(name, "is given more than once")
    value = values[0]
    if parameter.kind == "string":
        return value
    convert, expected = _CONVERTERS[parameter.kind]
    found = convert(value.strip())
    if found is None:
        raise InvalidField(name, f"is not {expected}")
    return found


def _whole(value: str) -> int | None:
    return int(value) if re.fullmatch(r"-?[0-9]{1,18}", value, re.ASCII) else None


def _decimal(value: str) -> float | None:
    if not re.fullmatch(r"[-+]?([0-9]{1,18}(\.[0-9]{0,18})?|\.[0-9]{1,18})([eE][-+]?[0-9]{1,3})?", value, re.ASCII):
        return None
    found = float(value)
    return found if math.isfinite(found) else None


_CONVERTERS: Mapping[str, tuple[Callable[[str], Any], str]] = {
    "integer": (_whole, "a whole number"),
    "number": (_decimal, "a number"),
    "boolean": (lambda value: _BOOLEANS.get(value.lower()), "true or false"),
}


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise InvalidField(name, "is not UTF-8") from None


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise InvalidField(name[:60], "is given twice")
        found[name] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _checked(value: Any, depth: int) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair in a text") from None
    elif isinstance(value, (dict, list)):
        if depth == 0:
            raise RecursionError
        if isinstance(value, dict):
            for name in value:
                _checked(name, depth - 1)
        for item in value.values() if isinstance(value, dict) else value:
            _checked(item, depth - 1)
