"""The description is whole, and handlers have exactly the routes and methods that it has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from rest_service import OPERATIONS, rest_service
from tornado import web

from sandbox_gateway.errors import ERRORS
from sandbox_gateway.events import EventKind
from sandbox_gateway.model import DeathKind, OnOwnerExit, State
from sandbox_gateway.server import openapi
from sandbox_gateway.server.api_handler import METHODS, RestHandler
from sandbox_gateway.server.rest import HANDLERS, ROOTS, rest_handlers

DESCRIPTION = openapi.description()


def test_handlers_and_description_have_the_same_routes_and_methods() -> None:
    served = {
        (handler.path, method)
        for handler in HANDLERS
        for method in METHODS
        if getattr(handler, method) is not getattr(web.RequestHandler, method)
    }
    assert served == set(OPERATIONS)
    assert len({handler.path for handler in HANDLERS}) == len(HANDLERS)


def test_every_method_asks_who_it_is_and_whether_he_may() -> None:
    for _, handler in rest_handlers():
        assert issubclass(handler, RestHandler) and handler.auth_resource == "sandboxes"
        for name in (*METHODS, "put", "head"):
            method = getattr(handler, name)
            if method is getattr(web.RequestHandler, name):
                continue
            # Each decorator leaves what it wraps; the innermost is the method itself.
            around = method.__wrapped__
            assert method.__code__.co_name == "wrapper" and method.__module__ == handler.__module__, (handler, name)
            assert around.__code__.co_filename.endswith("decorator.py") and around.__wrapped__, (handler, name)
            assert not getattr(method, "__allow_unauthenticated", False)


def test_every_operation_has_a_name_a_summary_and_its_errors() -> None:
    seen = set()
    for path, method in OPERATIONS:
        operation = DESCRIPTION["paths"][path][method]
        assert operation["operationId"] not in seen and operation["summary"] and operation["tags"], (path, method)
        seen.add(operation["operationId"])
        assert {"401", "403", "default"} <= operation["responses"].keys(), (path, method)
        if "{" in path:
            assert "404" in operation["responses"], (path, method)
        if "requestBody" in operation:
            assert {"400", "413", "415"} <= operation["responses"].keys(), (path, method)
        if "{" in path:
            assert {"name", "in"} <= openapi._resolved(DESCRIPTION["paths"][path]["parameters"][0]).keys()


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for item in node.values():
            yield from _nodes(item)
    elif isinstance(node, list):
        for item in node:
            yield from _nodes(item)


def test_every_reference_leads_somewhere_and_every_component_is_used() -> None:
    used = set()
    for node in _nodes(DESCRIPTION):
        reference = node.get("$ref")
        if reference is not None:
            assert openapi._resolved(node), reference
            used.add(reference)
    unused = {
        f"#/components/{kind}/{name}"
        for kind, components in DESCRIPTION["components"].items()
        if kind != "securitySchemes"
        for name in components
    } - used
    assert unused == {"#/components/schemas/ExecuteEvent"}, "its lines are told by a media type of their own"


def test_examples_follow_their_schemas() -> None:
    for schema in DESCRIPTION["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
        for example in schema.get("examples", ()):
            openapi.raise_first(openapi.checker(schema), example, ())
    for node in _nodes(DESCRIPTION["paths"]):
        given = [one["value"] for one in node.get("examples", {}).values()] if "schema" in node else []
        for example in [*given, *([node["example"]] if "example" in node else [])]:
            openapi.raise_first(openapi.checker(node["schema"]), example, ())
    lines = DESCRIPTION["paths"]["/api/sandboxes/{id}/execute"]["post"]["responses"]["200"]["content"]
    for line in lines["application/x-ndjson"]["examples"]["plain"]["value"].splitlines():
        openapi.check(json.loads(line), "ExecuteEvent")


def test_enumerations_are_those_of_the_program() -> None:
    schemas = DESCRIPTION["components"]["schemas"]
    assert schemas["State"]["enum"] == [str(state) for state in State]
    listed = openapi.parameters("/api/sandboxes", "get")["state"].schema["items"]["enum"]
    assert listed == [*schemas["State"]["enum"], "all"]
    assert schemas["Death"]["properties"]["kind"]["enum"] == [str(kind) for kind in DeathKind]
    assert schemas["Sandbox"]["properties"]["on_owner_exit"]["enum"] == [str(one) for one in OnOwnerExit]
    assert "created" in schemas["Event"]["properties"]["kind"]["description"] and EventKind.CREATED == "created"


def test_codes_that_the_description_names_exist() -> None:
    text = openapi.text().decode()
    named = set(re.findall(r"\(`([a-z_]+)`", text)) | set(re.findall(r"\d{3} `([a-z_]+)`", text))
    assert named and named <= ERRORS.keys()


def test_no_query_parameter_is_of_a_kind_that_is_not_read() -> None:
    for path, method in OPERATIONS:
        for parameter in openapi.parameters(path, method).values():
            assert parameter.kind in {"string", "integer", "number", "boolean", "array"}


async def test_it_is_served_as_it_was_written_and_as_json(tmp_path: Path) -> None:
    async with rest_service(tmp_path) as rest:
        as_yaml = await rest.ask("GET", "/api/sandboxes/openapi.yaml")
        as_json = await rest.ask("GET", "/api/sandboxes/openapi.json")
        assert as_yaml.body == openapi.FILE.read_bytes()
        assert yaml.safe_load(as_yaml.body) == as_json.json == DESCRIPTION
        # Every route wants to know who asks, the description too.
        for path, method in OPERATIONS:
            answer = await rest.ask(method.upper(), path.replace("{", "").replace("}", ""), token="", checked=False)
            assert answer.status == 401 and answer.headers["WWW-Authenticate"] == "Bearer", (path, method)
            assert answer.json["code"] == "unauthenticated"


@pytest.mark.parametrize("root", ROOTS)
async def test_an_address_that_does_not_exist_is_a_problem(tmp_path: Path, root: str) -> None:
    async with rest_service(tmp_path) as rest:
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
            for path in (f"/api/{root}/a/b/c/d", f"/api/{root}/x/", f"/api/{root}//"):
                told = await rest.problem(method, path, checked=False)
                assert (told["status"], told["code"]) == (404, "not_found"), (method, path)
