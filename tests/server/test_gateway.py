"""The headless gateway, for real: kernels over REST and WebSocket, their life, and what a crash of it leaves."""

from __future__ import annotations

import asyncio
import time
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from acceptance import Product, until
from served import Cell, Served, Socket

from sandbox_gateway.host.paths import discover
from sandbox_gateway.server.websocket import CLOSING

pytestmark = pytest.mark.timeout(300)
KERNEL = "python3-gvisor"


@pytest.mark.parametrize("protocol", ["v1.kernel.websocket.jupyter.org", None])
async def test_a_cell_runs_in_a_sandbox_and_its_output_comes_over_the_websocket(
    gateway: Served, protocol: str | None
) -> None:
    kernel_id = (await gateway.ok("POST", "/api/kernels", {"name": KERNEL}))["id"]
    socket = await gateway.open(kernel_id, protocol=protocol)
    cell = await socket.run("import platform; print(40 + 2, platform.release())")
    assert cell.stdout.startswith("42 ")
    assert "gvisor" in cell.stdout
    assert cell.reply is not None
    assert cell.reply["content"]["execution_count"] == 1
    socket.close()


async def test_python_and_python3_and_no_name_mean_the_default_profile(gateway: Served) -> None:
    for body in ({"name": "python"}, {"name": "python3"}, {}, None):
        made = await gateway.ok("POST", "/api/kernels", body)
        assert made["execution_state"] in ("starting", "idle", "busy")
        record = await gateway.ok("GET", f"/api/sandboxes/{made['id']}")
        assert record["profile"] == KERNEL
        assert record["owner"] == "default"


async def test_only_our_profiles_are_listed_and_started(gateway: Served) -> None:
    specs = await gateway.ok("GET", "/api/kernelspecs")
    assert specs["default"] == KERNEL
    assert KERNEL in specs["kernelspecs"]
    assert "python3" not in specs["kernelspecs"]
    # A folder of this machine is opened to nobody from outside.
    assert "python3-gvisor-files" not in specs["kernelspecs"]
    assert "logo-svg" in specs["kernelspecs"][KERNEL]["resources"]
    answer = await gateway.ask("POST", "/api/kernels", {"name": "bash"})
    assert answer.status == 404
    answer = await gateway.ask("POST", "/api/kernels", {"name": "python3-gvisor-files"})
    assert answer.status == 404


async def test_interrupt_restart_and_delete(gateway: Served) -> None:
    kernel_id = await gateway.create()
    socket = await gateway.open(kernel_id)
    cell = socket.execute("print('go', flush=True)\nimport time\nwhile True: time.sleep(0.1)")
    while not cell.stdout:
        message = await socket.next()
        assert message is not None
        cell.messages.append(message)
    await gateway.ok("POST", f"/api/kernels/{kernel_id}/interrupt")
    await socket.finish(cell)
    assert cell.reply is not None
    assert cell.reply["content"]["ename"] == "KeyboardInterrupt"
    await socket.run("x = 1; open('file.txt', 'w').write('kept')")
    model = await gateway.ok("POST", f"/api/kernels/{kernel_id}/restart")
    assert model["id"] == kernel_id
    cell = await socket.run("print('x' in globals(), open('file.txt').read())")
    assert cell.stdout == "False kept\n"
    await gateway.ok("DELETE", f"/api/kernels/{kernel_id}")
    assert (await gateway.ask("GET", f"/api/kernels/{kernel_id}")).status == 404


async def test_environments_of_overlapping_creates_never_mix(gateway: Served) -> None:
    async def one(number: int) -> None:
        kernel_id = await gateway.create(env={"WHO": f"caller-{number}", f"ONLY_{number}": "1"})
        socket = await gateway.open(kernel_id)
        cell = await socket.run(
            "import os; print(os.environ['WHO'], sorted(n for n in os.environ if n.startswith('ONLY_')))"
        )
        assert cell.stdout == f"caller-{number} ['ONLY_{number}']\n"
        socket.close()

    await asyncio.gather(*(one(number) for number in range(6)))


async def test_input_is_asked_for_and_answered(gateway: Served) -> None:
    socket = await gateway.open(await gateway.create())
    cell = await socket.run("print('hello', input('name? '))", answer=lambda prompt: f"<{prompt}>")
    assert cell.stdout == "hello <name? >\n"


async def test_a_suspended_kernel_stays_listed_as_idle_and_a_cell_wakes_it(gateway: Served) -> None:
    kernel_id = await gateway.create()
    socket = await gateway.open(kernel_id)
    await socket.run("x = 41")
    socket.send("kernel_info_request", {})  # as every front end does when it comes
    while (await socket.next() or {})["msg_type"] != "kernel_info_reply":
        pass
    suspended = await gateway.ok("POST", f"/api/sandboxes/{kernel_id}/suspend?wait=60")
    assert suspended["state"] == "suspended"
    assert (await gateway.ok("GET", f"/api/sandboxes/{kernel_id}"))["state"] == "suspended"
    models = {model["id"]: model for model in await gateway.ok("GET", "/api/kernels")}
    assert models[kernel_id]["execution_state"] == "idle"
    assert models[kernel_id]["connections"] == 1
    # What a page asks when it is loaded does not wake it.
    socket.send("kernel_info_request", {})
    while (await socket.next() or {})["msg_type"] != "kernel_info_reply":
        pass
    assert (await gateway.ok("GET", f"/api/sandboxes/{kernel_id}"))["state"] == "suspended"
    cell = await socket.run("print(x + 1)")
    assert cell.stdout == "42\n"
    assert (await gateway.ok("GET", f"/api/sandboxes/{kernel_id}"))["state"] == "running"


async def test_a_clone_that_is_suspended_before_anybody_asked_what_it_is_is_not_woken_by_that(
    gateway: Served, product: Product
) -> None:
    assert product.command("template", "build", KERNEL).returncode == 0
    parent = await gateway.create()
    fork = (await gateway.ok("POST", f"/api/sandboxes/{parent}/fork?wait=60", {}))["children"][0]["id"]
    for kernel_id in (parent, fork):
        await gateway.ok("POST", f"/api/sandboxes/{kernel_id}/suspend?wait=60")
        socket = await gateway.open(kernel_id)
        socket.send("kernel_info_request", {})
        told = await socket.next()
        while told is not None and told["msg_type"] != "kernel_info_reply":
            told = await socket.next()
        assert told is not None and told["content"]["language_info"]["name"] == "python"
        assert (await gateway.ok("GET", f"/api/sandboxes/{kernel_id}"))["state"] == "suspended"
        assert (await socket.run("print(42)")).stdout == "42\n"


async def test_a_gateway_that_is_killed_in_mid_cell_goes_on_with_everything(gateway: Served) -> None:
    kernel_id = await gateway.create()
    asleep = await gateway.create()
    await gateway.ok("POST", f"/api/sandboxes/{asleep}/suspend?wait=60")
    session = uuid.uuid4().hex
    socket = await gateway.open(kernel_id, session)
    cell = socket.execute("import time\nfor n in range(300):\n    print(n, flush=True)\n    time.sleep(0.02)")
    await socket.follow(cell, 50)
    gateway.kill()
    await socket.follow(cell)
    # The cell prints on without a gateway.
    await gateway.start()
    models = await gateway.ok("GET", "/api/kernels")
    assert {model["id"] for model in models} == {kernel_id, asleep}
    for model in models:
        # The one format that jupyter_server reads of a gateway's kernels; another one fails the whole list.
        datetime.strptime(model["last_activity"], "%Y-%m-%dT%H:%M:%S.%fZ")
    again = await gateway.open(kernel_id, session)
    await again.finish(cell)
    cell.once()
    assert cell.stdout == "".join(f"{n}\n" for n in range(300))


async def test_a_planned_stop_in_mid_cell_repeats_nothing(gateway: Served) -> None:
    kernel_id = await gateway.create()
    session = uuid.uuid4().hex
    socket = await gateway.open(kernel_id, session)
    cell = socket.execute("import time\nfor n in range(2000):\n    print(n, flush=True)\n    time.sleep(0.002)")
    await socket.follow(cell, 300)
    begun = time.monotonic()
    stopping = asyncio.create_task(asyncio.to_thread(gateway.stop))
    await socket.follow(cell)
    await stopping
    stalled = time.monotonic() - begun > CLOSING  # so long the gateway waits to hear what this client has
    assert not cell.done
    await gateway.start()
    again = await gateway.open(kernel_id, session)
    await again.finish(cell)
    assert cell.once() == 0 or stalled
    assert cell.stdout == "".join(f"{n}\n" for n in range(2000))


async def test_a_planned_stop_closes_websockets_so_that_jupyterlab_reconnects(gateway: Served) -> None:
    kernel_id = await gateway.create()
    socket = await gateway.open(kernel_id)
    await socket.run("x = 7")
    await asyncio.to_thread(gateway.stop)
    while await socket.next() is not None:
        pass
    assert socket.connected.close_code == 1012
    await gateway.start()
    again = await gateway.open(kernel_id)
    assert (await again.run("print(x)")).stdout == "7\n"


async def test_a_kernel_that_ends_by_itself_is_started_again_in_its_sandbox(gateway: Served) -> None:
    kernel_id = await gateway.create()
    socket = await gateway.open(kernel_id)
    await socket.run("open('f', 'w').write('x')")
    socket.execute("import os; os._exit(3)")
    states = []
    while "restarting" not in states:
        message = await socket.next()
        assert message is not None
        if message["msg_type"] == "status":
            states.append(message["content"]["execution_state"])
    assert (await socket.run("print(open('f').read())")).stdout == "x\n"


async def test_clients_hear_of_a_restart_also_where_the_old_kernel_cannot_be_woken_for_it(
    gateway: Served, product: Product
) -> None:
    kernel_id = await gateway.create()
    socket = await gateway.open(kernel_id)
    await socket.run("x = 1")
    saved = (await gateway.ok("POST", f"/api/sandboxes/{kernel_id}/suspend?wait=60"))["snapshot"]
    for path in (product.home / "snapshots" / saved / "image").iterdir():
        path.write_bytes(b"")
    await gateway.ok("POST", f"/api/kernels/{kernel_id}/restart")
    told = await socket.next()
    while told is not None and (told["msg_type"], told["channel"]) != ("shutdown_reply", "iopub"):
        told = await socket.next()
    assert told is not None and told["content"]["restart"] is True
    assert (await socket.run("print('x' in dir())")).stdout == "False\n"


@pytest.mark.parametrize("on_stop", ["terminate", "keep"])
async def test_what_stands_ready_goes_with_a_gateway_that_ends_without_a_kernel(
    product: Product, tmp_path: Path, on_stop: str
) -> None:
    file = product.home / "profiles.toml"
    before = file.read_text() if file.exists() else ""
    runtime = discover({"SANDBOX_GATEWAY_HOME": str(product.home)}).runtime
    file.write_text(f"{before}\n[profiles.pooled]\npool = {{ ready = 1, created = 1 }}\n")
    served = Served(tmp_path / "gateway.log", f"--SandboxGateway.on_stop={on_stop}")

    def standing() -> list[str]:
        return [path.name for path in runtime.glob("standby-*")]

    try:
        product.command("template", "build", "pooled")
        await served.start()
        kernel_id = await served.create(profile="pooled")
        await served.ok("DELETE", f"/api/sandboxes/{kernel_id}")
        await asyncio.to_thread(until, lambda: len(standing()) == 2, 30, standing)
        served.stop()
        assert standing() == []
    finally:
        served.stop()
        file.write_text(before)


async def test_a_client_that_comes_back_gets_what_it_missed_and_only_what_no_ping_stood_behind_twice(
    gateway: Served,
) -> None:
    kernel_id = await gateway.create()
    session = uuid.uuid4().hex
    socket = await gateway.open(kernel_id, session)
    watcher = await gateway.open(kernel_id)
    unconfirmed = counted_between_pings(socket)
    cell = socket.execute("import time\nfor n in range(200):\n    print(n, flush=True)\n    time.sleep(0.02)")
    await socket.follow(cell, 20)
    socket.close()
    socket.connected.on_ping = lambda data: None  # type: ignore[method-assign]  # no pong goes after the goodbye
    await socket.follow(cell)
    # It prints on while its client is away.
    await watcher.follow(Cell(cell.id), min(200, cell.stdout.count("\n") + 30))
    again = await gateway.open(kernel_id, session)
    await again.finish(cell)
    assert cell.once() <= len(unconfirmed)
    assert cell.stdout == "".join(f"{n}\n" for n in range(200))


def counted_between_pings(socket: Socket) -> list[object]:
    """What has come since the gateway's last ping, kept up to date: a pong confirms all that was before its ping."""
    came: list[object] = []
    take = socket.connected.on_message

    def on_message(message: str | bytes) -> Any:
        came.append(message)
        return take(message)

    def on_ping(data: bytes) -> None:
        if data.startswith(b"sg"):
            came.clear()

    socket.connected.on_message, socket.connected.on_ping = on_message, on_ping  # type: ignore[method-assign]
    return came


async def test_binary_buffers_pass_both_ways(gateway: Served) -> None:
    socket = await gateway.open(await gateway.create())
    await socket.run(
        "from ipykernel.comm import Comm\n"
        "import comm\n"
        "def opened(c, msg):\n"
        "    @c.on_msg\n"
        "    def _(m):\n"
        "        c.send({'n': len(m['buffers'])}, buffers=[bytes(b)[::-1] for b in m['buffers']])\n"
        "comm.get_comm_manager().register_target('echo', opened)"
    )
    comm_id = uuid.uuid4().hex
    socket.send("comm_open", {"comm_id": comm_id, "target_name": "echo", "data": {}})
    large = bytes(range(256)) * 4096 * 8
    socket.send("comm_msg", {"comm_id": comm_id, "data": {}}, buffers=[b"\x00\x01\x02", large])
    while True:
        message = await socket.next()
        assert message is not None
        if message["msg_type"] == "comm_msg":
            break
    assert message["content"]["data"] == {"n": 2}
    assert [bytes(buffer) for buffer in message["buffers"]] == [b"\x02\x01\x00", large[::-1]]


@pytest.mark.parametrize("protocol", ["v1.kernel.websocket.jupyter.org", None])
async def test_messages_of_a_hundred_megabytes_pass_both_ways(gateway: Served, protocol: str | None) -> None:
    socket = await gateway.open(await gateway.create(), protocol=protocol)
    cell = await socket.run("from IPython.display import display\ndisplay({'text/plain': 'x' * 100_000_000}, raw=True)")
    sizes = [len(m["content"]["data"]["text/plain"]) for m in cell.messages if m["msg_type"] == "display_data"]
    assert sizes == [100_000_000]
    # Not as a cell's code, on which IPython would spend most of a minute.
    cell = await socket.run("print(len(input()))", answer=lambda _: "y" * 100_000_000)
    assert cell.stdout == "100000000\n"


async def test_fifty_clients_of_one_kernel_get_everything_though_one_of_them_stalls(gateway: Served) -> None:
    kernel_id = await gateway.create()
    sockets = [await gateway.open(kernel_id) for _ in range(50)]
    stalled, *others = sockets
    stalled.connected.stream.set_nodelay(True)
    cell = others[0].execute("for n in range(2000): print(n, 'x' * 200)")

    async def follow(socket):  # type: ignore[no-untyped-def]
        text = ""
        while True:
            message = await socket.next()
            assert message is not None
            if message["parent_header"].get("msg_id") != cell.id:
                continue
            if message["msg_type"] == "stream":
                text += message["content"]["text"]
            elif message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                return text

    wanted = "".join(f"{n} {'x' * 200}\n" for n in range(2000))
    assert all(text == wanted for text in await asyncio.gather(*map(follow, others)))
