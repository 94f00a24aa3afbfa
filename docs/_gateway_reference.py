"""Reference pages of the gateway: its REST routes by openapi.yaml, its events, its options and its metrics."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import yaml
from prometheus_client import Counter, Histogram

from sandbox_gateway.server import openapi
from sandbox_gateway.server.config import SandboxGateway
from sandbox_gateway.server.events import SCHEMAS
from sandbox_gateway.server.identity import TokenFileIdentityProvider
from sandbox_gateway.server.metrics import Metrics

API = openapi.description()
METHODS = ("get", "post", "patch", "delete")
TOLD = frozenset({"Nothing", "Label", "Problem", "ExecuteEvent"})
"""Schemas that are told in a way of their own."""
REQUESTS = frozenset(
    "CreateSandbox Resources RenameSandbox Suspend Multiply MakeSnapshot Publish Execute Input".split()
)
"""Schemas of bodies, which are told with their routes."""


def rest_routes() -> str:
    """Every route with its parameters, its body and its answers, by subject; then the errors and the objects."""
    return "\n".join(_routes())


def _routes() -> Iterator[str]:
    yield API["info"]["description"]
    for tag in API["tags"]:
        yield f"## {tag['name'].capitalize()}\n\n{tag['description']}.\n"
        for path, route in API["paths"].items():
            for method in METHODS:
                if method in route and route[method]["tags"] == [tag["name"]]:
                    yield from _route(f"{method.upper()} {path}", route, route[method])
    yield from _errors()
    yield "## Objects\n\nA field that is *optional* may be missing; all others are there, `null` where it says so.\n"
    for name, schema in API["components"]["schemas"].items():
        if "properties" in schema and name not in TOLD | REQUESTS:
            yield from _object(name, schema)
    yield "\n## Events of a cell\n"
    yield from _cell_events()


def _route(title: str, route: Mapping[str, Any], operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"### `{title}`\n\n{operation['summary']}. {operation.get('description', '')}\n"
    found = [_resolved(each) for each in (*route.get("parameters", ()), *operation.get("parameters", ()))]
    queries = [each for each in found if each["in"] == "query"]
    if queries:
        yield from ("| query parameter | values | meaning |", "|---|---|---|")
        for each in queries:
            yield f"| `{each['name']}` | {_cell(_values(each['schema']))} | {_cell(each['description'])} |"
        yield ""
    yield from _body(operation)
    yield from ("| answer | body | meaning |", "|---|---|---|")
    errors = []
    for status, answer in operation["responses"].items():
        found = _resolved(answer)
        if status.startswith("2"):
            yield f"| {status} | {_media(found)} | {_cell(found['description'])} |"
        elif status != "default":
            errors.append(status)
    yield f"\n[Errors](#rest-errors): {', '.join(errors)}.\n"


def _body(operation: Mapping[str, Any]) -> Iterator[str]:
    body = _resolved(operation.get("requestBody", {}))
    content = body.get("content", {}).get("application/json")
    if content is None:
        return
    schema = _resolved(content["schema"])
    if schema.get("properties"):
        kind = "The body" if body.get("required") else "The body, which may be missing"
        yield f"{kind}:\n"
        yield from _fields(schema, optional=False)
    given = content.get("examples", {}).values()
    examples = [each["value"] for each in given if each["value"]] or (
        [content["example"]] if "example" in content else []
    )
    for example in examples:
        yield f"```json\n{json.dumps(example)}\n```\n"


def _media(answer: Mapping[str, Any]) -> str:
    for kind, content in answer.get("content", {}).items():
        if kind == "application/x-ndjson":
            return "[events](#events-of-a-cell), one a line"
        return _type(content["schema"]) if kind == "application/json" else f"`{kind}`"
    return ""


def _errors() -> Iterator[str]:
    yield "(rest-errors)=\n## Errors\n"
    yield from ("| status | what | ", "|---|---|")
    told: dict[str, str] = {}
    for route in API["paths"].values():
        for method in METHODS:
            for status, answer in route.get(method, {}).get("responses", {}).items():
                if status[0] in "45":
                    told.setdefault(status, _resolved(answer)["description"])
    for status, text in sorted(told.items()):
        yield f"| {status} | {_cell(text)} |"
    yield "\nThe body is a problem detail (`application/problem+json`):\n"
    yield from _fields(API["components"]["schemas"]["Problem"])
    yield f"```json\n{json.dumps(API['components']['schemas']['Problem']['examples'][0], indent=2)}\n```\n"


def _object(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield f"(rest-{name.lower()})=\n### {name}\n"
    if "description" in schema:
        yield schema["description"] + "\n"
    yield from _fields(schema)
    for example in schema.get("examples", ()):
        yield f"```json\n{json.dumps(example, indent=2)}\n```\n"


def _fields(schema: Mapping[str, Any], *, optional: bool = True) -> Iterator[str]:
    """A table of the fields, those of objects in it dotted."""
    yield from ("| field | values | meaning |", "|---|---|---|")
    yield from _rows(schema, "", optional)
    yield ""


def _rows(schema: Mapping[str, Any], prefix: str, optional: bool) -> Iterator[str]:
    required = schema.get("required", ())
    for name, rule in schema["properties"].items():
        note = "*optional* " if optional and name not in required else ""
        note = "*required* " if not optional and name in required else note
        full = _resolved(rule)
        text = rule.get("description", full.get("description", ""))
        yield f"| `{prefix}{name}` | {_cell(_values(rule))} | {note}{_cell(text)} |"
        inner = full if "properties" in full else full.get("items", {})
        if "properties" in inner and (not _named(rule) or _named(rule) in REQUESTS):
            dots = "[]." if "items" in full else "."
            yield from _rows(inner, f"{prefix}{name}{dots}", optional)


def _cell_events() -> Iterator[str]:
    yield from ("| `type` | further fields | meaning |", "|---|---|---|")
    for each in API["components"]["schemas"]["ExecuteEvent"]["oneOf"]:
        rule = each["properties"]["type"]
        kinds = " or ".join(f"`{kind}`" for kind in rule.get("enum", [rule.get("const")]))
        fields = ", ".join(f"`{name}`" for name in each["properties"] if name != "type")
        text = each.get("description", "")
        inner = [part["description"] for part in each["properties"].values() if "description" in part]
        yield f"| {kinds} | {fields} | {_cell(' '.join([text, *inner]).strip())} |"
    yield ""


# Values


def _named(rule: Mapping[str, Any]) -> str:
    """The name of the schema that a rule refers to; empty: it stands for itself."""
    return str(rule["$ref"]).rsplit("/", 1)[1] if "$ref" in rule else ""


def _values(rule: Mapping[str, Any]) -> str:
    """What a field may be, for people."""
    full = _resolved(rule)
    if "enum" in full and not _named(rule):
        return ", ".join(f"`{value}`" for value in full["enum"])
    bounds = []
    if "minimum" in full or "exclusiveMinimum" in full:
        bounds.append(f"at least {full['minimum']}" if "minimum" in full else f"more than {full['exclusiveMinimum']}")
    bounds += [f"at most {full['maximum']}"] if full.get("maximum", 1 << 53) < 1 << 53 else []
    bounds += [f"default `{json.dumps(full['default'])}`"] if "default" in full else []
    return "; ".join([_type(rule), *bounds])


def _type(rule: Mapping[str, Any]) -> str:
    name, full = _named(rule), _resolved(rule)
    if name and name not in REQUESTS and "properties" in full:
        return f"[{name}](#rest-{name.lower()})"
    if "oneOf" in full:
        return " or ".join(_type(each) for each in full["oneOf"])
    if "enum" in full:
        return ", ".join(f"`{value}`" for value in full["enum"])
    kinds = full.get("type", "any")
    if kinds == "array":
        return f"array of {_type(full['items'])}"
    if kinds == "null":
        return "`null`"
    return kinds if isinstance(kinds, str) else " or ".join(f"`{kind}`" if kind == "null" else kind for kind in kinds)


def _resolved(node: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" not in node:
        return node
    found: Any = API
    for part in node["$ref"].removeprefix("#/").split("/"):
        found = found[part]
    return {**found, **{key: value for key, value in node.items() if key != "$ref"}}


# The other pages


def gateway_events() -> str:
    """The schemas of the event bus."""
    lines: list[str] = []
    for path in sorted(SCHEMAS.glob("*.yaml"), reverse=True):
        schema = yaml.safe_load(path.read_text())
        lines += [f"## {schema['title']}\n", f"`schema_id`: `{schema['$id']}`\n", schema["description"]]
        lines += ["| field | values | meaning |", "|---|---|---|", *_event_rows(schema, ""), ""]
    return "\n".join(lines) + "\n"


def _event_rows(schema: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, rule in schema["properties"].items():
        values = ", ".join(f"`{value}`" for value in rule["enum"]) if "enum" in rule else _type(rule)
        note = "" if name in schema.get("required", ()) else "*optional* "
        yield f"| `{prefix}{name}` | {values} | {note}{_cell(rule.get('description', ''))} |"
        if "properties" in rule:
            yield from _event_rows(rule, f"{prefix}{name}.")


def gateway_options() -> str:
    """The traits that an administrator may set."""
    lines = ["| option | kind | default | meaning |", "|---|---|---|---|"]
    for owner, names in (
        (SandboxGateway, sorted(SandboxGateway.class_own_traits(config=True))),
        (TokenFileIdentityProvider, ["token_file"]),
    ):
        for name in names:
            trait = owner.class_traits()[name]
            kind = " or ".join(f"`{value}`" for value in getattr(trait, "values", ())) or trait.info().removeprefix(
                "a "
            )
            default = json.dumps(trait.default() if name != "token_file" else "")
            lines.append(f"| `{owner.__name__}.{name}` | {_cell(kind)} | `{default}` | {_cell(trait.help)} |")
    return "\n".join(lines) + "\n"


def metrics() -> str:
    """What `/metrics` tells besides jupyter_server's own figures."""
    nobody: Any = SimpleNamespace(on_event=[], on_operation=[], on_kernel=lambda listener: None)
    lines = ["| name | kind | labels | meaning |", "|---|---|---|---|"]
    for each in vars(Metrics(nobody, nobody)).values():
        if not hasattr(each, "_documentation"):
            continue
        name = each._name + ("_total" if isinstance(each, Counter) else "")
        kind = "histogram" if isinstance(each, Histogram) else "counter" if isinstance(each, Counter) else "gauge"
        labels = ", ".join(f"`{label}`" for label in each._labelnames)
        lines.append(f"| `{name}` | {kind} | {labels} | {_cell(each._documentation)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").replace("*", "\\*").split())


PAGES: Iterable[tuple[str, Any]] = (
    ("rest-api.md", rest_routes),
    ("gateway-events.md", gateway_events),
    ("gateway-configuration.md", gateway_options),
    ("metrics.md", metrics),
)
