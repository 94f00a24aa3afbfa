"""Kernels in applications of every kind: several managers of both sorts in one process, forks, terminals."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from acceptance import KERNEL, Client, Product, until
from jupyter_client import AsyncKernelManager, KernelManager
from leaks import marked

from sandbox_gateway.host.paths import discover

CTRL_C = b"\x03"

BLOCKING = """
import sys
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel(kernel_name=sys.argv[1])
print("id", manager.provisioner.kernel_id, flush=True)
client.execute_interactive("x = 41", timeout=30)
client.execute("import time; print('busy', flush=True); time.sleep(100)")
while client.get_iopub_msg(timeout=30)["msg_type"] != "stream":
    pass
try:
    print("running", flush=True)
    client.get_shell_msg(timeout=100)
except KeyboardInterrupt:
    print("interrupted", manager.is_alive(), flush=True)
    manager.interrupt_kernel()
    assert client.get_shell_msg(timeout=30)["content"]["ename"] == "KeyboardInterrupt"
said = []
client.execute_interactive("print(x + 1)", timeout=30, output_hook=lambda m: said.append(m["content"].get("text", "")))
print("after", "".join(said).strip(), flush=True)
client.stop_channels()
manager.shutdown_kernel()
print("done", flush=True)
"""
"""A script at a terminal that waits for a cell, and is told Ctrl-C."""

FORKING = """
import os, sys
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel(kernel_name=sys.argv[1])
def say(code):
    said = []
    client.execute_interactive(code, timeout=30, output_hook=lambda m: said.append(m["content"].get("text", "")))
    return "".join(said).strip()
assert say("x = 1; print(x)") == "1"
for how in ("exit", "_exit", "exec"):
    child = os.fork()
    if child == 0:
        if how == "exec":
            os.execv(sys.executable, [sys.executable, "-c", "pass"])
        sys.exit(0) if how == "exit" else os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, how
    assert say("x += 1; print(x)") in "234", how
assert manager.is_alive()
client.stop_channels()
manager.shutdown_kernel()
print("done")
"""
"""The children end in every way: at exit nothing of the parent's may be ended by them."""


@contextlib.contextmanager
def managed(manager: KernelManager) -> Iterator[Client]:
    """A kernel of this very manager."""
    manager.start_kernel()
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        yield Client(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


async def _say(client: object, code: str) -> str:
    said: list[str] = []

    def take(message: dict[str, object]) -> None:
        content = message["content"]
        assert isinstance(content, dict)
        said.append(content.get("text", ""))

    reply = await client.execute_interactive(code, timeout=60, output_hook=take)  # type: ignore[attr-defined]
    assert reply["content"]["status"] == "ok", reply
    return "".join(said)


async def test_managers_of_both_sorts_share_a_process(product: Product) -> None:
    """Two asynchronous managers on this loop, a synchronous one on a thread of its own, all at work at once."""
    heard: dict[str, object] = {}

    def elsewhere() -> None:
        with managed(KernelManager(kernel_name=KERNEL)) as client:
            heard["sync"] = client.run("import time; time.sleep(0.5); print('sync')").stdout
            client.manager.restart_kernel(now=True)
            client.client.wait_for_ready(timeout=60)
            heard["again"] = client.run("print('again')").stdout

    thread = threading.Thread(target=elsewhere)
    thread.start()
    managers = [AsyncKernelManager(kernel_name=KERNEL) for _ in range(2)]
    await asyncio.gather(*(manager.start_kernel() for manager in managers))
    clients = [manager.client() for manager in managers]
    try:
        for client in clients:
            client.start_channels()
        await asyncio.gather(*(client.wait_for_ready(timeout=60) for client in clients))
        said = await asyncio.gather(*(_say(client, f"x = {n}; print('async', x)") for n, client in enumerate(clients)))
        assert said == ["async 0\n", "async 1\n"]
        await managers[0].restart_kernel(now=True)
        await clients[0].wait_for_ready(timeout=60)
        assert await _say(clients[1], "print(x)") == "1\n"
        assert await _say(clients[0], "print('x' in globals())") == "False\n"
    finally:
        for client in clients:
            client.stop_channels()
        await asyncio.gather(*(manager.shutdown_kernel(now=True) for manager in managers))
        await asyncio.to_thread(thread.join)
    assert heard == {"sync": "sync\n", "again": "again\n"}


async def test_a_synchronous_manager_is_used_within_a_running_loop(product: Product) -> None:
    """As a notebook does that starts kernels itself: the manager's calls block the loop that they are made in."""
    with managed(KernelManager(kernel_name=KERNEL)) as client:
        assert client.run("print(6 * 7)").stdout == "42\n"


def test_an_asynchronous_manager_survives_the_end_of_its_loop(product: Product) -> None:
    """Each call has a loop of its own, as in programs that call `asyncio.run` now and then."""
    others = product.ids()
    manager = AsyncKernelManager(kernel_name=KERNEL)
    asyncio.run(manager.start_kernel())
    try:
        assert asyncio.run(manager.is_alive())
        info = manager.get_connection_info()
        client = KernelManager(kernel_name=KERNEL).client_factory()
        client.load_connection_info(info)
        client.start_channels()
        try:
            client.wait_for_ready(timeout=60)
        finally:
            client.stop_channels()
    finally:
        asyncio.run(manager.shutdown_kernel(now=True))
    assert product.ids() == others


def test_a_shutdown_by_the_application_is_no_news(product: Product, caplog: pytest.LogCaptureFixture) -> None:
    """A kernel that ends because it was asked to is not reported as one that died."""
    manager = KernelManager(kernel_name=KERNEL)
    manager.start_kernel()
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
    finally:
        client.stop_channels()
        manager.shutdown_kernel()
    assert [record.message for record in caplog.records if "exited" in record.message] == []


def test_an_application_that_forks_keeps_its_kernel(product: Product) -> None:
    others = product.ids()
    done = subprocess.run(
        [sys.executable, "-c", FORKING, KERNEL], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr
    assert product.ids() == others


def test_ctrl_c_at_a_terminal_reaches_the_script_and_no_process_of_the_sandbox(product: Product) -> None:
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKING, KERNEL],
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_controlling_terminal,
    )
    os.close(terminal)
    assert process.stdout is not None and process.stderr is not None
    try:
        kernel_id = process.stdout.readline().split()[1]
        assert process.stdout.readline() == "running\n"
        directory = discover({"SANDBOX_GATEWAY_HOME": str(product.home)}).sandbox(kernel_id)
        before = {ref.pid for ref in marked(str(directory), kernel_id)}
        assert len(before) >= 2
        group = os.getpgid(process.pid)
        assert group == process.pid
        assert not [pid for pid in before if os.getpgid(pid) == group or os.getsid(pid) == os.getsid(process.pid)]
        os.write(master, CTRL_C)
        assert process.stdout.readline() == "interrupted True\n", process.stderr.read()
        assert {ref.pid for ref in marked(str(directory), kernel_id)} == before
        assert process.stdout.readline() == "after 42\n"
        assert process.stdout.readline() == "done\n"
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
        os.close(master)
    until(lambda: not directory.exists())


def test_a_closed_terminal_ends_a_script_and_its_sandbox(product: Product) -> None:
    """SIGHUP kills the script without a word; the sandbox is nobody's then, and goes by request."""
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKING, KERNEL],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        # Who runs the tests under nohup ignores it, and so would the script.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    assert process.stdout is not None
    try:
        kernel_id = process.stdout.readline().split()[1]
        os.killpg(process.pid, signal.SIGHUP)
        process.wait(30)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    done = product.command("rm", kernel_id)
    assert done.returncode == 0, done.stderr
    assert not (product.home / "run" / kernel_id).exists()


def _controlling_terminal() -> None:
    """In the child, a session leader: its standard input becomes its terminal, which sends it Ctrl-C."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a suite that runs in the background ignores
