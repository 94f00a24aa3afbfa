"""An interpreter for a language model: Python in a sandbox of a gateway, with nothing but the standard library.

Its argument is the gateway's address; the token is in ``SANDBOX_GATEWAY_TOKEN``.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from typing import Any

MOST = 20_000
"""Characters of a cell's output that go back to the model."""


class GatewayError(Exception):
    """What the gateway refused or could not do: ``code`` is for programs, the text says what to do."""

    def __init__(self, problem: dict[str, Any]) -> None:
        super().__init__(f"{problem['message']}. {problem['hint']}")
        self.code: str = problem["code"]


@dataclass
class Outcome:
    """What a cell gave, in the order in which it came."""

    status: str = "failed"
    """``ok``, ``error`` (an exception), ``timeout``, ``aborted`` or ``failed`` (the kernel died, or was lost)."""
    text: str = ""
    images: list[bytes] = field(default_factory=list)
    """PNG files."""

    def take(self, event: dict[str, Any]) -> None:
        """Add one line of the answer."""
        match event["type"]:
            case "stdout" | "stderr":
                self.text += event["text"]
            case "result" | "display" | "update_display":
                if "image/png" in event["data"]:
                    self.images.append(base64.b64decode(event["data"]["image/png"]))
                else:
                    self.text += event["data"].get("text/plain", "") + "\n"
            case "error":
                self.text += re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(event["traceback"])) + "\n"
            case "end":
                self.status = event["status"]
                self.text += f"{event['message']}\n" if "message" in event else ""

    def for_the_model(self) -> str:
        """The text, its middle left out where it is long."""
        text = self.text
        if len(text) > MOST:
            text = f"{text[: MOST // 2]}\n... {len(text) - MOST} characters left out ...\n{text[-MOST // 2 :]}"
        return f"{text}[{self.status}, {len(self.images)} images]"


@dataclass
class Gateway:
    """A gateway and who asks it."""

    url: str
    token: str

    def open(self, method: str, path: str, body: Any = None, timeout: float = 330) -> HTTPResponse:
        """Send a request; raises GatewayError for every answer that is none."""
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            answer: HTTPResponse = urllib.request.urlopen(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            with error:
                raise GatewayError(_problem(error.code, error.read())) from None
        return answer

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """A request whose answer is JSON, or nothing."""
        with self.open(method, path, body) as answer:
            return json.loads(answer.read() or "null")

    def create(self, **wanted: Any) -> Interpreter:
        """A new sandbox."""
        return Interpreter(self, self.ask("POST", "/api/sandboxes", wanted)["id"])


def _problem(status: int, body: bytes) -> dict[str, Any]:
    """What went wrong; a proxy between answers in words of its own."""
    try:
        return dict(json.loads(body))
    except ValueError:
        return {"code": f"http_{status}", "message": f"HTTP {status}", "hint": ""}


@dataclass
class Interpreter:
    """One sandbox: variables and files stay from cell to cell."""

    gateway: Gateway
    id: str

    def events(self, code: str, timeout: float) -> Iterator[dict[str, Any]]:
        """Run a cell and give its events as they come."""
        body = {"code": code, "timeout": timeout}
        # The gateway interrupts the cell; ours is for a gateway that does not answer any more.
        path = f"/api/sandboxes/{self.id}/execute"
        with self.gateway.open("POST", path, body, timeout=timeout + 60) as answer:
            for line in answer:
                yield json.loads(line)

    def run(self, code: str, timeout: float = 60) -> Outcome:
        """Run a cell to its end."""
        outcome = Outcome()
        try:
            for event in self.events(code, timeout):
                outcome.take(event)
        except (OSError, HTTPException) as error:
            # No end has come, so it stays a failure: the gateway is gone, or the way to it.
            outcome.text += f"The connection was lost: {error}\n"
        return outcome

    def state(self) -> str:
        """``running``, ``suspended``..."""
        return str(self.gateway.ask("GET", f"/api/sandboxes/{self.id}")["state"])

    def suspend(self) -> None:
        """Save it to disk and free its memory, until somebody runs something."""
        self.gateway.ask("POST", f"/api/sandboxes/{self.id}/suspend?wait=60")

    def resume(self) -> None:
        """Bring it back before it is needed; running a cell does that, too."""
        self.gateway.ask("POST", f"/api/sandboxes/{self.id}/resume?wait=60")

    def fork(self, count: int) -> list[Interpreter]:
        """Copies that go on from here; those that could not be made are missing."""
        made = self.gateway.ask("POST", f"/api/sandboxes/{self.id}/fork?wait=120", {"count": count})
        return [Interpreter(self.gateway, child["id"]) for child in made["children"] if child["error"] is None]

    def delete(self) -> None:
        """End it, whatever it does, and forget it."""
        self.gateway.ask("DELETE", f"/api/sandboxes/{self.id}?forget=true")


def main(url: str) -> None:
    """What a backend does with it."""
    gateway = Gateway(url.rstrip("/"), os.environ["SANDBOX_GATEWAY_TOKEN"])
    first = gateway.create(
        name="conversation 17",
        env={"TZ": "Europe/Berlin"},
        resources={"memory": "1GiB", "idle": {"suspend": "10m", "expire": "7d"}},
    )
    mine = [first]
    try:
        print(first.run("numbers = [3, 1, 2]\nprint('sorting')\nsorted(numbers)").for_the_model())
        print(first.run("numbers.index(7)").for_the_model())

        plot = first.run("import matplotlib.pyplot as plt\nplt.plot(numbers)\nplt.show()", timeout=120)
        print(plot.status, [image[1:4] for image in plot.images])

        print(first.run("while True: pass", timeout=5).for_the_model())
        print("still there:", first.run("len(numbers)").text.strip())

        first.suspend()
        print(first.state())
        first.resume()
        print(first.state())
        first.suspend()
        print("woken by a cell:", first.run("numbers[0]").text.strip())

        mine += first.fork(2)
        for attempt, code in zip(mine[1:], ["numbers.sort()", "numbers.reverse()"], strict=True):
            print(code, "->", attempt.run(f"{code}\nnumbers").text.strip())
        print("the first one:", first.run("numbers").text.strip())
    finally:
        for each in mine:
            each.delete()


if __name__ == "__main__":
    main(sys.argv[1])
