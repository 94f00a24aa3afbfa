"""What the tests of suspend and resume share: asking the owner, and a client's numbered lines."""

from __future__ import annotations

import asyncio
from typing import Any

from acceptance import Client, Product

from sandbox_gateway.host.paths import discover
from sandbox_gateway.owner import ask

COUNTING = """
import time
for number in range({count}):
    print(number, flush=True)
    time.sleep({pause})
"""


def tell(product: Product, sandbox_id: str, op: str, **params: Any) -> dict[str, Any]:
    """Ask the owner of a sandbox, here a loop of this very process, over its socket."""
    paths = discover({"SANDBOX_GATEWAY_HOME": str(product.home)})
    return asyncio.run(ask(paths, sandbox_id, op, timeout=60.0, **params))


def state(product: Product, sandbox_id: str) -> str:
    """The state that ``ps`` shows."""
    return next(str(row["state"]) for row in product.ps() if row["id"] == sandbox_id)


def lines(count: int) -> str:
    """What :data:`COUNTING` prints."""
    return "".join(f"{number}\n" for number in range(count))


class Running:
    """A cell that runs while the test goes on."""

    def __init__(self, client: Client, code: str) -> None:
        self._client = client.client
        self.id = self._client.execute(code)
        self.stdout = ""
        self.status: str | None = None

    def take(self, timeout: float = 30.0) -> bool:
        """Take the next message of this cell; False when it has become idle."""
        while True:
            message = self._client.get_iopub_msg(timeout=timeout)
            if message["parent_header"].get("msg_id") != self.id:
                continue
            if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
                self.stdout += message["content"]["text"]
            return not (message["msg_type"] == "status" and message["content"]["execution_state"] == "idle")

    def until_line(self, number: int) -> None:
        """Wait for a line of :data:`COUNTING`."""
        while f"{number}\n" not in self.stdout.splitlines(keepends=True):
            assert self.take(), self.stdout

    def finish(self, timeout: float = 60.0) -> dict[str, Any]:
        """Wait for the end; the reply's content."""
        while self.take(timeout):
            pass
        while True:
            reply = self._client.get_shell_msg(timeout=timeout)
            if reply["parent_header"].get("msg_id") == self.id:
                content: dict[str, Any] = reply["content"]
                return content
