"""``suspend``, ``resume``, ``pause``, ``fork``, ``connect``, ``stop``, ``rm`` on real kernels, and the keeper."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from acceptance import KERNEL, START, Client, Product, kernel, until
from jupyter_client import BlockingKernelClient
from suspending import COUNTING, Running, lines

from sandbox_gateway.host.paths import Paths, discover
from sandbox_gateway.host.processes import ProcessRef
from sandbox_gateway.keeper import keeper_log, keeper_pid


def paths_of(product: Product) -> Paths:
    """Where the product keeps its things."""
    return discover({"SANDBOX_GATEWAY_HOME": str(product.home)})


def run(product: Product, *arguments: str) -> str:
    """A command that has to succeed; what it wrote."""
    done = product.command(*arguments)
    log = keeper_log(paths_of(product))
    assert done.returncode == 0, f"{arguments}: {done.stderr}{log.read_text()[-3000:] if log.exists() else ''}"
    return done.stdout


def row(product: Product, sandbox_id: str) -> dict[str, Any]:
    """What ``ps`` tells of one sandbox."""
    rows = json.loads(run(product, "ps", "--all", "--json"))
    return next(found for found in rows if found["id"] == sandbox_id)


@contextmanager
def connected(product: Product, sandbox_id: str) -> Iterator[BlockingKernelClient]:
    """A client that knows of the kernel only what ``connect`` prints."""
    client = BlockingKernelClient()
    client.load_connection_file(run(product, "connect", sandbox_id).strip())
    client.start_channels()
    try:
        client.wait_for_ready(timeout=START)
        yield client
    finally:
        client.stop_channels()


def value(client: BlockingKernelClient, expression: str) -> str:
    """What an expression gives in the kernel."""
    shown: list[str] = []

    def take(message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream":
            shown.append(message["content"]["text"])

    reply = client.execute_interactive(f"print({expression}, end='')", output_hook=take, timeout=60)
    assert reply["content"]["status"] == "ok", reply["content"]
    return "".join(shown)


def no_keeper(product: Product) -> None:
    """Wait until the keeper has ended by itself."""
    until(lambda: keeper_pid(paths_of(product)) is None)


@pytest.fixture
def left(product: Product) -> Iterator[list[str]]:
    """Ids of sandboxes that the test leaves to the keeper; they are removed, and it ends with them."""
    ids: list[str] = []
    yield ids
    if ids:
        product.command("rm", *ids)
    no_keeper(product)


SCRIPT = """
import sys
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel(kernel_name=sys.argv[1])
client.execute_interactive("x = 41", timeout=60)
if len(sys.argv) > 2:
    client.execute(sys.argv[2])
    while client.get_iopub_msg(timeout=60)["msg_type"] != "stream":
        pass
print(manager.provisioner.kernel_id, flush=True)
sys.stdin.read()
"""


@contextmanager
def application(*code: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process with a kernel of its own, in which ``x`` is 41; and the kernel's id."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, KERNEL, *code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        sandbox_id = process.stdout.readline().strip()
        assert sandbox_id
        yield process, sandbox_id
    finally:
        process.kill()
        process.stdin.close()
        process.stdout.close()
        process.wait()


def saved(product: Product) -> set[str]:
    """Ids of the snapshots there are, but for templates."""
    return {name for name in product.snapshots() if not name.startswith(".")}


def test_a_cell_is_suspended_and_resumed_by_the_command_line_and_loses_no_line(
    product: Product, client: Client
) -> None:
    cell = Running(client, COUNTING.format(count=60, pause=0.05))
    cell.until_line(5)
    assert run(product, "suspend", client.id[:13]) == f"{client.id} suspended\n"
    found = row(product, client.id)
    assert found["state"] == "suspended" and found["disk"] > 1 << 20 and found["snapshot"]
    assert found["owner_pid"] == os.getpid() and found["keeper"] is False
    assert client.alive()
    assert json.loads(run(product, "resume", client.id, "--json")) == [{"id": client.id, "state": "running"}]
    assert cell.finish()["status"] == "ok"
    assert cell.stdout == lines(60)
    found = row(product, client.id)
    assert found["state"] == "running" and found["disk"] is None and found["epoch"] > 1


def test_pause_by_the_command_line(product: Product, client: Client) -> None:
    cell = Running(client, COUNTING.format(count=30, pause=0.05))
    cell.until_line(3)
    assert run(product, "pause", client.id) == f"{client.id} paused\n"
    assert row(product, client.id)["state"] == "paused"
    assert run(product, "resume", client.id) == f"{client.id} running\n"
    assert cell.finish()["status"] == "ok" and cell.stdout == lines(30)


def test_several_at_once(product: Product) -> None:
    with kernel(KERNEL) as one, kernel(KERNEL) as two:
        ids = {one.id, two.id}
        for command, state in (("suspend", "suspended"), ("resume", "running"), ("pause", "paused")):
            done = json.loads(run(product, command, *ids, "--json"))
            assert {item["id"] for item in done} == ids and {item["state"] for item in done} == {state}
        assert one.value("print(1)") == two.value("print(1)") == 1, "what needs a paused kernel wakes it"


def test_fork_gives_children_that_a_client_reaches_and_that_are_different(
    product: Product, client: Client, left: list[str]
) -> None:
    client.run("import random; x = 41; random.random()")
    before = saved(product)
    children = json.loads(run(product, "fork", client.id, "-n", "3", "--name", "a try", "--json"))
    left += children
    assert len(set(children)) == 3 and all(isinstance(child, str) for child in children)
    assert saved(product) == before, "what was saved for the fork is gone"
    drawn = {client.value("import json; print(json.dumps(random.random()))")}
    for child in children:
        found = row(product, child)
        assert (found["state"], found["keeper"], found["parent"]) == ("running", True, f"sandbox:{client.id}")
        assert found["name"] == "a try" and found["on_owner_exit"] == "keep"
        with connected(product, child) as kernel_client:
            assert value(kernel_client, "x + 1") == "42"
            drawn.add(float(value(kernel_client, "random.random()")))
    assert len(drawn) == 4
    assert client.value("print(x)") == 41, "the parent goes on"


def test_a_fork_in_mid_cell_goes_on_with_the_cell(product: Product, client: Client, left: list[str]) -> None:
    cell = Running(client, "done = []\n" + COUNTING.format(count=200, pause=0.05) + "done.append(number)\n")
    cell.until_line(3)
    (child,) = json.loads(run(product, "fork", client.id, "--json"))
    left.append(child)
    assert cell.finish()["status"] == "ok" and cell.stdout == lines(200)
    first = BlockingKernelClient()
    first.load_connection_file(run(product, "connect", child).strip())
    first.start_channels()
    printed = ""
    while not printed.endswith("199\n"):
        message = first.get_iopub_msg(timeout=60)
        if message["msg_type"] == "stream":
            printed += message["content"]["text"]
    first.stop_channels()
    at = int(printed.split()[0])
    assert at > 3 and printed == lines(200)[len(lines(at)) :], "what came after the fork, every line once"
    with connected(product, child) as kernel_client:
        assert value(kernel_client, "done") == "[199]"


def test_fork_of_a_suspended_one_leaves_it_suspended(product: Product, client: Client, left: list[str]) -> None:
    client.run("x = 41")
    run(product, "suspend", client.id)
    (child,) = json.loads(run(product, "fork", client.id, "--json"))
    left.append(child)
    assert row(product, client.id)["state"] == "suspended"
    with connected(product, child) as kernel_client:
        assert value(kernel_client, "x") == "41"


def test_fork_of_a_named_snapshot(product: Product, client: Client, left: list[str]) -> None:
    client.run("x = 41")
    run(product, "snapshot", "create", client.id, "--name", "forked-by-name")
    client.run("x = 0")
    (child,) = json.loads(run(product, "fork", "forked-by-name", "--json"))
    left.append(child)
    with connected(product, child) as kernel_client:
        assert value(kernel_client, "x") == "41"
    run(product, "snapshot", "rm", "forked-by-name")


def test_what_a_script_suspended_is_found_again_after_its_end(product: Product, left: list[str]) -> None:
    before = saved(product)
    with application() as (process, sandbox_id):
        left.append(sandbox_id)
        run(product, "suspend", sandbox_id)
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)
    found = row(product, sandbox_id)
    assert (found["state"], found["owner_pid"]) == ("suspended", None)
    assert keeper_pid(paths_of(product)) is None
    run(product, "logs", sandbox_id)
    assert run(product, "resume", sandbox_id) == f"{sandbox_id} running\n"
    assert row(product, sandbox_id)["keeper"] is True
    with connected(product, sandbox_id) as kernel_client:
        assert value(kernel_client, "x") == "41"
    run(product, "suspend", sandbox_id)
    run(product, "rm", sandbox_id)
    no_keeper(product)
    assert saved(product) == before


def test_connect_adopts_what_a_killed_application_left(product: Product, left: list[str]) -> None:
    with application(COUNTING.format(count=40, pause=0.05) + "x = number") as (process, sandbox_id):
        left.append(sandbox_id)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with connected(product, sandbox_id) as kernel_client:
            assert row(product, sandbox_id)["keeper"] is True
            assert value(kernel_client, "x") == "39", "its cell went on"


def test_a_client_of_another_process_connects_as_jupyter_console_does(product: Product, left: list[str]) -> None:
    with application() as (process, sandbox_id):
        left.append(sandbox_id)
        process.send_signal(signal.SIGKILL)
        process.wait()
        path = run(product, "connect", sandbox_id).strip()
        assert Path(path).stat().st_mode & 0o777 == 0o600
        script = (
            "import sys; from jupyter_client import BlockingKernelClient as C; c = C(connection_file=sys.argv[1]); "
            "c.load_connection_file(); c.start_channels(); c.wait_for_ready(timeout=60); "
            "c.execute_interactive('print(x)', timeout=60); c.stop_channels()"
        )
        done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (0, "41\n"), done.stderr


def test_suspend_without_an_owner_needs_no_keeper(product: Product, left: list[str]) -> None:
    with application() as (process, sandbox_id):
        left.append(sandbox_id)
        process.send_signal(signal.SIGKILL)
        process.wait()
        run(product, "suspend", sandbox_id)
        found = row(product, sandbox_id)
        assert (found["state"], found["owner_pid"]) == ("suspended", None)
        assert keeper_pid(paths_of(product)) is None
        with connected(product, sandbox_id) as kernel_client:
            assert value(kernel_client, "x") == "41"


def test_a_suspended_one_that_the_keeper_has_is_woken_by_its_client(product: Product, left: list[str]) -> None:
    with application() as (process, sandbox_id):
        left.append(sandbox_id)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with connected(product, sandbox_id) as kernel_client:
            run(product, "suspend", sandbox_id)
            assert row(product, sandbox_id)["state"] == "suspended"
            assert value(kernel_client, "x") == "41"
            assert row(product, sandbox_id)["state"] == "running"


def test_a_killed_keeper_leaves_its_kernels_running_and_the_next_one_adopts_them(
    product: Product, client: Client, left: list[str]
) -> None:
    client.run("x = 41")
    children = json.loads(run(product, "fork", client.id, "-n", "3", "--json"))
    left += children
    paths = paths_of(product)
    first = keeper_pid(paths)
    assert first is not None
    with connected(product, children[0]) as kernel_client:
        waiting = kernel_client.execute(COUNTING.format(count=60, pause=0.05) + "x = number")
        printed: dict[str, str] = {}

        def take() -> None:
            try:
                message = kernel_client.get_iopub_msg(timeout=30)
            except ValueError as error:
                assert "Duplicate Signature" in str(error), "nothing but what came before the kill comes twice"
                return
            if message["parent_header"].get("msg_id") == waiting and message["msg_type"] == "stream":
                printed.update(dict.fromkeys(message["content"]["text"].split(), message["header"]["msg_id"]))

        while not printed:
            take()
        process = ProcessRef.of(first)
        os.kill(first, signal.SIGKILL)
        until(lambda: process is None or not process.alive())
        assert {row(product, child)["state"] for child in children} == {"running"}
        assert {row(product, child)["owner_pid"] for child in children} == {None}
        run(product, "resume", *children)
        assert {row(product, child)["owner_pid"] for child in children} == {keeper_pid(paths)}
        while "59" not in printed:
            take()
        assert list(printed) == lines(60).split(), "every line, in order"
        assert value(kernel_client, "x") == "59"
    for child in children[1:]:
        with connected(product, child) as kernel_client:
            assert value(kernel_client, "x") == "41"


def test_a_keeper_that_is_told_to_end_leaves_its_kernels_to_the_next(
    product: Product, client: Client, left: list[str]
) -> None:
    client.run("x = 41")
    children = json.loads(run(product, "fork", client.id, "-n", "2", "--json"))
    left += children
    run(product, "suspend", children[1])
    pid = keeper_pid(paths_of(product))
    assert pid is not None
    os.kill(pid, signal.SIGTERM)
    no_keeper(product)
    until(lambda: row(product, children[0])["owner_pid"] is None)
    assert [row(product, child)["state"] for child in children] == ["running", "suspended"]
    for child in children:
        with connected(product, child) as kernel_client:
            assert value(kernel_client, "x") == "41"


TAKER = """
import asyncio, sys
from sandbox_gateway.host.paths import discover
from sandbox_gateway.keeper import take_over
from sandbox_gateway.lifecycle import Lifecycle
async def main():
    lifecycle = Lifecycle(discover())
    await take_over(lifecycle, sys.argv[1])
    print("mine", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await lifecycle.close()
asyncio.run(main())
"""


@contextmanager
def taker(sandbox_id: str) -> Iterator[int]:
    """Another process that takes a sandbox over while the block runs, and lets it go at the end; its pid."""
    process = subprocess.Popen(
        [sys.executable, "-c", TAKER, sandbox_id], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == "mine\n"
        yield process.pid
        process.stdin.close()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_what_is_printed_while_it_goes_from_hand_to_hand_comes_once_and_in_order(
    product: Product, client: Client, left: list[str]
) -> None:
    (child,) = json.loads(run(product, "fork", client.id, "--json"))
    left.append(child)
    with connected(product, child) as kernel_client:
        waiting = kernel_client.execute(COUNTING.format(count=2000, pause=0.005))
        for _ in range(2):
            with taker(child) as pid:
                assert row(product, child)["owner_pid"] == pid
            assert row(product, child)["owner_pid"] is None
            run(product, "resume", child)
            assert row(product, child)["keeper"] is True
        printed = ""
        while not printed.endswith("\n1999\n"):
            message = kernel_client.get_iopub_msg(timeout=60)
            if message["parent_header"].get("msg_id") == waiting and message["msg_type"] == "stream":
                printed += message["content"]["text"]
        assert printed == lines(2000)
        reply = kernel_client.get_shell_msg(timeout=60)
        while reply["parent_header"].get("msg_id") != waiting:
            reply = kernel_client.get_shell_msg(timeout=60)
        assert reply["content"]["status"] == "ok", "the reply finds its client too"


def test_an_application_whose_kernel_was_taken_over_goes_on_with_it_and_takes_it_back(
    product: Product, client: Client
) -> None:
    client.run("x = 41")
    cell = Running(client, COUNTING.format(count=400, pause=0.01))
    cell.until_line(3)
    with taker(client.id) as pid:
        assert row(product, client.id)["owner_pid"] == pid
        cell.until_line(200)
        assert client.alive()
        client.manager.interrupt_kernel()
        assert row(product, client.id)["owner_pid"] == os.getpid()
    cell.finish()
    assert cell.stdout == lines(400)[: len(cell.stdout)] and len(cell.stdout) > len(lines(200))
    assert client.value("print(x)") == 41
    client.manager.restart_kernel()
    client.client.wait_for_ready(timeout=START)
    assert client.run("x").error.startswith("NameError")


def test_an_application_sees_the_end_of_a_kernel_that_another_one_took_and_can_start_it_anew(
    product: Product, client: Client
) -> None:
    with taker(client.id):
        assert client.alive()
        run(product, "rm", client.id)
        until(lambda: not client.alive())
    client.manager.restart_kernel(now=True)
    client.client.wait_for_ready(timeout=START)
    assert client.value("print(1)") == 1


def test_an_application_that_ends_leaves_what_was_taken_from_it(product: Product, left: list[str]) -> None:
    with application() as (process, sandbox_id):
        left.append(sandbox_id)
        with taker(sandbox_id) as pid:
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(60) == 0
            assert row(product, sandbox_id)["owner_pid"] == pid
            with connected(product, sandbox_id) as kernel_client:
                assert value(kernel_client, "x") == "41"


@pytest.mark.parametrize("command", ["stop", "rm"])
@pytest.mark.parametrize("state", ["running", "paused", "suspended"])
@pytest.mark.parametrize("owned", [True, False], ids=["owned", "unowned"])
def test_it_ends_in_each_state(product: Product, command: str, state: str, owned: bool) -> None:
    before = saved(product)
    with application() as (process, sandbox_id):
        if state != "running":
            run(product, {"paused": "pause", "suspended": "suspend"}[state], sandbox_id)
        if not owned:
            process.send_signal(signal.SIGKILL)
            process.wait()
        run(product, command, sandbox_id)
        assert saved(product) == before
        rows = json.loads(run(product, "ps", "-a", "--json"))
        states = [found["state"] for found in rows if found["id"] == sandbox_id]
        assert states == (["terminated"] if command == "stop" else [])
        if owned:
            assert process.stdin is not None and process.poll() is None, "the application itself goes on"
            process.stdin.close()
            process.wait(30)
        assert not (product.home / "run" / sandbox_id).exists()
    if command == "stop":
        run(product, "rm", sandbox_id)
    assert keeper_pid(paths_of(product)) is None, "nobody needed one"


def test_commands_at_once_all_end_well(product: Product, left: list[str]) -> None:
    with application() as (process, sandbox_id):
        left.append(sandbox_id)
        run(product, "suspend", sandbox_id)
        process.send_signal(signal.SIGKILL)
        process.wait()
    resuming = [
        subprocess.Popen(
            [sys.executable, "-m", "sandbox_gateway.cli", "resume", sandbox_id], stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for started in resuming:
        assert started.communicate(timeout=120)[0] == f"{sandbox_id} running\n"
        assert started.returncode == 0
    with connected(product, sandbox_id) as kernel_client:
        assert value(kernel_client, "x") == "41"


@pytest.mark.parametrize("how", ["shutdown", "crash"])
def test_a_kernel_that_ends_under_the_keeper_takes_its_sandbox_with_it(
    product: Product, client: Client, left: list[str], how: str
) -> None:
    """``exit`` in a console, or a crash: nobody there would start it again, and nothing hangs on it."""
    (child,) = left[:] = json.loads(run(product, "fork", client.id, "--json"))
    with connected(product, child) as kernel_client:
        if how == "shutdown":
            kernel_client.shutdown()
        else:
            kernel_client.execute("import os; os.abort()")
        until(lambda: row(product, child)["state"] == "terminated")
    death = row(product, child)["death"]
    assert death["kind"] == "exited"
    assert death["exit_code"] == 0 if how == "shutdown" else "SIGABRT" in death["reason"]
    no_keeper(product)


def test_a_keeper_leaves_no_file(product: Product, client: Client, left: list[str]) -> None:
    run_directory = Path(product.home, "run")
    before = {path.name for path in run_directory.iterdir()}
    (child,) = json.loads(run(product, "fork", client.id, "--json"))
    run(product, "rm", child)
    no_keeper(product)
    # A template may be on its way beside a start, and ends by itself.
    until(lambda: {path.name for path in run_directory.iterdir()} <= before | {"owners", "empty"})
    assert not (run_directory / "owners" / "keeper").exists()
