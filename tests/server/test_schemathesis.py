"""The running gateway against its own description, by requests that are made from it: allowed ones and wrong ones.

What is asked for really happens: the user's quota keeps it to two sandboxes.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import requests
import schemathesis
from acceptance import Product
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from people import gateway_for_users, token
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from served import Served

pytestmark = pytest.mark.timeout(600)
EXAMPLES = 20
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
PATIENCE = 30.0
"""Seconds for an answer; nothing may hang."""


@pytest.fixture(scope="module")
def fuzzed(product: Product, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, str]]:
    with gateway_for_users(product, tmp_path_factory.mktemp("fuzz") / "gateway.log") as served:
        yield served, token(product, "fuzz", "--quota", "live=2,suspended=1,creates_per_minute=30")


class Asking:
    """The user's requests, over one connection."""

    def __init__(self, served: Served, secret: str) -> None:
        self.url = served.url
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {secret}"
        self.count = 0

    def things(self) -> dict[str, list[str]]:
        """Ids that exist now, by the parameter that takes them; there is always a sandbox."""
        found = self.session.get(f"{self.url}/api/sandboxes?state=all&limit=1000", timeout=PATIENCE).json()["sandboxes"]
        if not any(one["state"] == "running" for one in found):
            for one in found:
                self.session.delete(f"{self.url}/api/sandboxes/{one['id']}", timeout=PATIENCE)
            answer = self.session.post(f"{self.url}/api/sandboxes", timeout=PATIENCE)
            if answer.status_code != 429:
                found.append(answer.json())
        snapshots = self.session.get(f"{self.url}/api/snapshots", timeout=PATIENCE).json()["snapshots"]
        operations = self.session.get(f"{self.url}/api/operations", timeout=PATIENCE).json()["operations"]
        return {
            "id": [one["id"] for one in found if "id" in one],
            "snapshot": [one["id"] for one in snapshots],
            "operation": [one["id"] for one in operations],
            "profile": ["python3-gvisor"],
        }


def bounded(case: Any) -> None:
    """What the description allows and a test has no time for: waiting for hours, cells that run or ask for ever."""
    query, body = case.query or {}, case.body
    if isinstance(query.get("wait"), int | float) and not isinstance(query["wait"], bool) and query["wait"] > 5:
        query["wait"] = 5
    if case.operation.path.endswith("/execute") and isinstance(body, dict) and isinstance(body.get("code"), str):
        body["timeout"] = body["timeout"] if isinstance(body.get("timeout"), str | list | dict | bool) else 1
    if isinstance(body, dict) and isinstance(body.get("count"), int) and body["count"] > 0:
        body["count"] = min(body["count"], 3) if body["count"] <= 64 else body["count"]


@pytest.fixture
async def asking(fuzzed: tuple[Served, str]) -> AsyncIterator[Asking]:
    made = Asking(*fuzzed)
    yield made
    made.session.close()
    await fuzzed[0].clear()


def fuzz(asking: Asking, operation: Any, mode: GenerationMode, checks: list[Any]) -> None:
    """Some requests of one kind."""
    things = asking.things()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), aimed=st.sampled_from([True, True, False]))
    def ask(case: Any, aimed: bool) -> None:
        bounded(case)
        if aimed and mode is GenerationMode.POSITIVE:
            for name in case.path_parameters or {}:
                if things.get(name):
                    case.path_parameters[name] = things[name][0]
        asking.count += 1
        answer = case.call(base_url=asking.url, session=asking.session, timeout=PATIENCE)
        case.validate_response(answer, checks=checks)

    ask()


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_every_answer_is_as_described_and_none_is_a_servers_error(asking: Asking, mode: GenerationMode) -> None:
    description = asking.session.get(f"{asking.url}/api/sandboxes/openapi.json", timeout=PATIENCE).json()
    schema = schemathesis.openapi.from_dict(description)
    checks = [*CHECKS, negative_data_rejection] if mode is GenerationMode.NEGATIVE else CHECKS
    began = time.monotonic()
    for result in schema.get_all_operations():
        operation = result.ok()
        try:
            fuzz(asking, operation, mode, checks)
        except Exception as error:
            error.add_note(f"{operation.method.upper()} {operation.path}")
            raise
    took = time.monotonic() - began
    print(f"\n{mode.value}: {asking.count} requests in {took:.0f} s")
    assert asking.session.get(f"{asking.url}/api/status", timeout=PATIENCE).status_code == 200
