"""A start from a template returns when the restored sandbox runs; what is left of it goes on beside the application."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from acceptance import KERNEL, START, Product, let_go, until
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

from sandbox_gateway.attachment import Attachment
from sandbox_gateway.background import background_loop
from sandbox_gateway.errors import ERRORS, SandboxGatewayError
from sandbox_gateway.incarnation import Incarnation
from sandbox_gateway.live import LiveSandbox


class Held:
    """Keeps kernels from getting their identity until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = threading.Event()
        self._gate = asyncio.Event()
        self._failing = False
        identify = Incarnation._identify

        async def held(incarnation: Incarnation, identity: Any) -> None:
            self.reached.set()
            await self._gate.wait()
            if self._failing:
                raise SandboxGatewayError("identity_failed", "the clone is not what it should be")
            await identify(incarnation, identity)

        monkeypatch.setattr(Incarnation, "_identify", held)

    def go_on(self, *, failing: bool = False) -> None:
        """Let them have it, or fail in it."""

        async def opened() -> None:
            self._failing = failing
            self._gate.set()

        background_loop().run(opened()).result(START)


@contextmanager
def started() -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    """A kernel that was just started, and a client that nobody has waited for."""
    manager = KernelManager(kernel_name=KERNEL)
    manager.start_kernel()
    client = manager.blocking_client()
    client.start_channels()
    try:
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.fixture
def held(product: Product, monkeypatch: pytest.MonkeyPatch) -> Held:
    """An installation whose template is there."""
    assert product.command("template", "build", KERNEL, timeout=300).returncode == 0
    return Held(monkeypatch)


def answer(client: BlockingKernelClient, sent: str) -> dict[str, Any]:
    """The reply to a request."""
    while True:
        reply: dict[str, Any] = client.get_shell_msg(timeout=START)
        if reply["parent_header"].get("msg_id") == sent:
            return reply


def last_words(client: BlockingKernelClient) -> str:
    """What is printed until the kernel is dead."""
    said = ""
    while (content := client.get_iopub_msg(timeout=START)["content"]).get("execution_state") != "dead":
        said += content.get("text", "")
    return said


def test_what_an_application_asks_before_the_kernel_is_its_own_is_answered_by_its_own(held: Held) -> None:
    with started() as (manager, client):
        assert held.reached.wait(START)
        assert manager.is_alive()
        sent = client.execute("import os", user_expressions={"id": "os.environ['SANDBOX_ID']"})
        held.go_on()
        told = answer(client, sent)["content"]["user_expressions"]["id"]["data"]["text/plain"]
        assert told == repr(str(manager.provisioner.kernel_id))  # type: ignore[union-attr]


def test_a_clone_that_fails_after_the_return_gives_way_to_a_cold_start(held: Held) -> None:
    with started() as (manager, client):
        sent = client.execute("", user_expressions={"answer": "6 * 7"})
        held.go_on(failing=True)
        assert answer(client, sent)["content"]["user_expressions"]["answer"]["data"]["text/plain"] == "42"
        assert manager.is_alive()


def test_a_kernel_that_cannot_start_at_all_after_the_return_has_died_and_says_why(
    product: Product, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(*_: Any) -> None:
        raise SandboxGatewayError("runtime_failed", "there is no other way today")

    with started() as (manager, client):
        sandbox = str(manager.provisioner.kernel_id)  # type: ignore[union-attr]
        monkeypatch.setattr(LiveSandbox, "create", refused)
        held.go_on(failing=True)
        until(lambda: not manager.is_alive())
        assert "no other way today" in last_words(client)
        assert sandbox not in product.ids()
        monkeypatch.undo()
        # Somebody restarts it, as a notebook's user would.
        manager.restart_kernel(now=True)
        assert answer(client, client.execute(""))["content"]["status"] == "ok"


def test_the_agent_is_asked_before_it_runs(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    assert product.command("template", "build", KERNEL, timeout=300).returncode == 0
    running: list[bool] = []
    reach = Attachment.reach

    async def watched(attachment: Attachment, **how: Any) -> None:
        running.append("sandbox" in attachment.handle.data)
        await reach(attachment, **how)

    monkeypatch.setattr(Attachment, "reach", watched)
    with started() as (_, client):
        assert answer(client, client.execute(""))["content"]["status"] == "ok"
    assert running == [False]


def test_an_error_of_the_system_after_the_return_is_told_with_what_to_do(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with started() as (manager, client):
        monkeypatch.setattr(LiveSandbox, "create", full)
        held.go_on(failing=True)
        until(lambda: not manager.is_alive())
        said = last_words(client)
        assert "could not be started in" in said and ERRORS["disk_full"].hint in said
        monkeypatch.undo()


def test_a_program_that_ends_while_its_kernel_gets_its_identity_leaves_nothing(product: Product, held: Held) -> None:
    before = product.ids()
    with started() as (manager, _):
        assert held.reached.wait(START)
        let_go()
        assert product.ids() == before
        assert not manager.is_alive()


def test_a_program_that_ends_right_after_the_start_leaves_nothing(product: Product) -> None:
    before = product.ids()
    code = f"from jupyter_client.manager import KernelManager\nKernelManager(kernel_name={KERNEL!r}).start_kernel()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=START, check=False)
    assert done.returncode == 0, done.stderr
    assert "could not be started" not in done.stderr
    assert product.ids() == before


def test_a_kernel_that_is_ended_before_it_is_its_own_leaves_nothing(product: Product, held: Held) -> None:
    before = product.ids()
    with started() as (manager, _):
        assert held.reached.wait(START)
        manager.shutdown_kernel(now=True)
        assert not manager.is_alive()
    assert product.ids() == before
