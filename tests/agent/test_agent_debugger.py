"""Our application loads debugpy when somebody debugs; then everything is as with the stock one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from agent_host import Host

LOADED = "import sys; print('debugpy' in sys.modules, '_pydevd_bundle' in sys.modules)"
CODE = "def double(x):\n    y = x * 2\n    return y\nprint(double(21))\n"


class Session:
    """A client that debugs."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.numbers = 0

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        self.numbers += 1
        content = {"type": "request", "seq": self.numbers, "command": command, "arguments": arguments}
        answer = self.host.reply(self.host.ask("debug_request", content, channel="control"), "control")
        return dict(answer["content"])

    def event(self, name: str) -> dict[str, Any]:
        def found() -> dict[str, Any] | None:
            for message in self.host.parsed("iopub"):
                if message["msg_type"] == "debug_event" and message["content"]["event"] == name:
                    return dict(message["content"])
            return None

        return dict(self.host.until(found, 60))


@pytest.fixture(params=[False, True], ids=["stock", "ours"])
def debugging(request: pytest.FixtureRequest, start: Callable[..., Any], host: Host) -> Session:
    """With the stock application, which shows that the test asks the right things, and with ours."""
    pytest.importorskip("debugpy")
    start(fast_iopub=request.param)
    return Session(host)


def test_it_is_not_loaded_before_it_is_needed(start: Callable[..., Any], host: Host) -> None:
    """The kernel offers debugging all the same, and tells a page that asks how it stands."""
    pytest.importorskip("debugpy")
    start(fast_iopub=True)
    assert host.run(LOADED) == "False False\n"
    info = host.reply(host.ask("kernel_info_request", {}))["content"]
    assert "debugger" in info.get("supported_features", []) or info.get("debugger") is True
    body = Session(host).ask("debugInfo")["body"]
    assert (body["isStarted"], body["breakpoints"]) == (False, [])
    assert host.run(LOADED) == "False False\n"


def test_a_breakpoint_is_hit(debugging: Session) -> None:
    """Source, breakpoint, stop, variables, and on."""
    host = debugging.host
    host.run("before = 1")
    initialized = debugging.ask(
        "initialize",
        clientID="test",
        adapterID="test",
        pathFormat="path",
        linesStartAt1=True,
        columnsStartAt1=True,
        supportsVariableType=True,
    )
    assert initialized["success"], initialized.get("message")
    debugging.ask("attach")
    path = debugging.ask("dumpCell", code=CODE)["body"]["sourcePath"]
    points = debugging.ask("setBreakpoints", breakpoints=[{"line": 2}], source={"path": path}, sourceModified=False)
    assert points["body"]["breakpoints"][0]["verified"], points
    debugging.ask("configurationDone")
    cell = host.execute(CODE, wait=False)
    thread = debugging.event("stopped")["body"]["threadId"]
    frame = debugging.ask("stackTrace", threadId=thread)["body"]["stackFrames"][0]
    assert (frame["name"], frame["line"]) == ("double", 2)
    scope = debugging.ask("scopes", frameId=frame["id"])["body"]["scopes"][0]["variablesReference"]
    variables = debugging.ask("variables", variablesReference=scope)["body"]["variables"]
    assert {"name": "x", "value": "21"} in [{key: v[key] for key in ("name", "value")} for v in variables]
    debugging.ask("continue", threadId=thread)
    host.done(cell)
    assert "42" in host.text(cell)
    assert debugging.ask("disconnect", restart=False, terminateDebuggee=True)["success"]
    assert host.run("print('goes on')") == "goes on\n"


def test_variables_without_a_session(debugging: Session) -> None:
    """What JupyterLab's panel shows of a kernel that nobody debugs."""
    debugging.host.run("answer = 42")
    variables = debugging.ask("inspectVariables")["body"]["variables"]
    assert "42" in [variable["value"] for variable in variables if variable["name"] == "answer"], json.dumps(variables)
