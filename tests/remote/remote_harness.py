"""What the tests of the remote runtime know of the gateway that they run against."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass
from typing import Any

from cut_proxy import CutProxy
from fake_gateway import FakeGateway
from served import Served

TOKEN = "the-token-of-these-tests"


@dataclass
class Remote:
    """A gateway, as the tests see it."""

    url: str
    profile: str
    proxy: CutProxy
    kind: str
    fake: FakeGateway | None = None
    real: Served | None = None

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """A request past the proxy."""
        base = self.fake.url if self.fake is not None else self.real.url if self.real is not None else ""
        request = urllib.request.Request(
            base + path,
            method=method,
            headers={"Authorization": f"token {TOKEN}", "Content-Type": "application/json"},
            data=None if body is None else json.dumps(body).encode(),
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            data = answer.read()
        return json.loads(data) if data else None

    @property
    def sandboxes(self) -> list[dict[str, Any]]:
        """Those that have not ended."""
        found: list[dict[str, Any]] = self.ask("GET", "/api/sandboxes")["sandboxes"]
        return found
