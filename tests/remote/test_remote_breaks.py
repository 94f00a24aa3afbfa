"""What breaks between a laptop and its gateway loses nothing and runs nothing twice."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import KernelManager
from remote_harness import Remote
from test_remote_life import run, until

from sandbox_gateway.remote import connection, session

pytestmark = pytest.mark.timeout(240)
Start = Callable[..., tuple[KernelManager, Any]]
COUNTING = "import time\nfor n in range(300):\n    print(n, flush=True)\n    time.sleep(0.01)"
NUMBERS = [str(n) for n in range(300)]


def test_a_break_in_the_middle_of_a_cell_loses_and_doubles_nothing(remote: Remote, start: Start) -> None:
    _, client = start()
    timers = [threading.Timer(0.5 + number * 0.8, remote.proxy.cut) for number in range(3)]
    for timer in timers:
        timer.start()
    reply, told = run(client, COUNTING)
    assert reply["status"] == "ok" and told.split() == NUMBERS
    for timer in timers:
        timer.join()


def test_what_the_gateway_sends_twice_comes_once(remote: Remote, start: Start) -> None:
    if remote.fake is None:
        pytest.skip("the real gateway does not do that on demand")
    _, client = start()
    remote.fake.confirming = False
    timer = threading.Timer(1.5, remote.proxy.cut)
    timer.start()
    _, told = run(client, COUNTING)
    timer.join()
    assert told.split() == NUMBERS
    assert run(client, "print('next')")[1] == "next\n"


def test_a_request_that_a_dead_network_swallowed_is_run_once_it_is_back(remote: Remote, start: Start) -> None:
    _, client = start()
    run(client, "ran = []")
    remote.proxy.swallow()
    first, second = client.execute("ran.append(1)"), client.execute("ran.append(2)")
    time.sleep(0.5)
    remote.proxy.cut()
    remote.proxy.swallow(False)
    for msg_id in (first, second):
        while client.get_shell_msg(timeout=30)["parent_header"].get("msg_id") != msg_id:
            pass
    assert run(client, "print(ran)")[1] == "[1, 2]\n"


def test_requests_while_the_gateway_is_out_of_reach_wait_for_it(remote: Remote, start: Start) -> None:
    manager, client = start()
    run(client, "ran = []")
    remote.proxy.refuse()
    time.sleep(0.3)
    timer = threading.Timer(2, remote.proxy.refuse, (False,))
    timer.start()
    assert run(client, "ran.append(1); print(ran)")[1] == "[1]\n"
    timer.join()
    assert manager.is_alive()


def test_a_tunnel_that_answers_in_the_gateways_place_for_a_while_ends_no_kernel(remote: Remote, start: Start) -> None:
    if remote.fake is None:
        pytest.skip("the real gateway's way has no tunnel")
    manager, client = start()
    run(client, "kept = 'still there'")
    remote.fake.in_its_place = 530
    before = remote.proxy.connections
    remote.proxy.cut()
    until(lambda: remote.proxy.connections >= before + 3)
    remote.fake.in_its_place = 0
    assert run(client, "print(kept)")[1] == "still there\n"
    assert manager.is_alive()


def test_nothing_runs_twice_or_never_whenever_it_breaks(
    remote: Remote, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks at random moments around many requests; the seed is printed."""
    monkeypatch.setattr(session, "LONGEST_PAUSE", 0.3)
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    _, client = start()
    run(client, "ran = []")
    stop = threading.Event()

    def vandal() -> None:
        while not stop.wait(chance.uniform(0.02, 0.4)):
            remote.proxy.swallow()
            stop.wait(chance.uniform(0, 0.02))
            remote.proxy.cut()
            remote.proxy.swallow(False)

    breaking = threading.Thread(target=vandal)
    breaking.start()
    try:
        for number in range(40):
            reply, told = run(client, f"ran.append({number}); print('told', {number})")
            assert reply["status"] == "ok" and told == f"told {number}\n"
    finally:
        stop.set()
        breaking.join()
        remote.proxy.swallow(False)
    assert json.loads(run(client, "print(ran)")[1]) == list(range(40))


def test_a_gateway_that_stays_away_is_given_up_with_its_reason_and_can_come_back(
    remote: Remote, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sandbox_gateway.remote.provisioner import RemoteSandboxProvisioner

    monkeypatch.setattr(RemoteSandboxProvisioner, "patience", 1.0)
    manager, client = start()
    # A connection that breaks at once does not count as one.
    remote.proxy.refuse()
    reply, told = run(client, "print('never')")
    assert reply["ename"] == "RemoteKernelUnreachable" and "cannot be reached" in reply["evalue"] and not told
    until(lambda: not manager.is_alive())
    remote.proxy.refuse(False)
    manager.restart_kernel()
    client.wait_for_ready(timeout=90)
    assert run(client, "print('again')")[1] == "again\n"


def test_a_request_lost_on_the_way_to_a_suspended_kernel_wakes_it_later(remote: Remote, start: Start) -> None:
    if remote.real is None:
        pytest.skip("the fake gateway's kernels do not wake")
    _, client = start()
    run(client, "ran = []")
    (sandbox,) = remote.sandboxes
    remote.ask("POST", f"/api/sandboxes/{sandbox['id']}/suspend?wait=60", {})
    remote.proxy.swallow()
    msg_id = client.execute("ran.append(1)")
    time.sleep(0.3)
    remote.proxy.cut()
    remote.proxy.swallow(False)
    while client.get_shell_msg(timeout=60)["parent_header"].get("msg_id") != msg_id:
        pass
    assert run(client, "print(ran)")[1] == "[1]\n"


@pytest.mark.parametrize("how", ["suspend?wait=60", "pause"])
def test_one_that_was_put_to_sleep_in_a_cell_sleeps_on_when_the_connection_comes_back(
    remote: Remote, start: Start, how: str
) -> None:
    if remote.real is None:
        pytest.skip("the fake gateway's kernels do not wake")
    _, client = start()
    run(client, "import time; ran = []")
    sent = [client.execute("print('go', flush=True); time.sleep(3); ran.append(1)"), client.execute("ran.append(2)")]
    while client.get_iopub_msg(timeout=30)["msg_type"] != "stream":
        pass
    (sandbox,) = remote.sandboxes
    remote.ask("POST", f"/api/sandboxes/{sandbox['id']}/{how}", {})
    before = remote.proxy.connections
    remote.proxy.cut()
    until(lambda: remote.proxy.connections > before)
    time.sleep(2)
    (sandbox,) = remote.sandboxes
    assert sandbox["state"] in ("suspended", "paused"), "nobody wants anything new of it"
    sent.append(client.execute("ran.append(3)"))
    for msg_id in sent:
        while client.get_shell_msg(timeout=60)["parent_header"].get("msg_id") != msg_id:
            pass
    assert run(client, "print(ran)")[1] == "[1, 2, 3]\n"


def test_a_gateway_that_is_killed_and_started_again_goes_on_with_the_cell(remote: Remote, start: Start) -> None:
    if remote.real is None:
        pytest.skip("the fake gateway dies with its kernels")
    manager, client = start()
    server = remote.real

    def crash() -> None:
        assert server.process is not None
        server.process.kill()
        server.process.wait()
        asyncio.run(server.start())

    timer = threading.Timer(1.0, crash)
    timer.start()
    reply, told = run(client, COUNTING)
    timer.join()
    assert reply["status"] == "ok" and told.split() == NUMBERS
    assert manager.is_alive()


def test_a_reply_that_was_lost_for_good_is_answered_with_an_error(remote: Remote, start: Start, tmp_path: Path) -> None:
    if remote.fake is None:
        pytest.skip("the real gateway forgets no session for 10 minutes")
    _, client = start()
    run(client, "ran = []")
    (kernel,) = remote.fake.kernels.values()
    remote.fake.forgetting = True
    gate = tmp_path / "gate"
    waiting = f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\n"
    msg_id = client.execute(f"print('go', flush=True)\n{waiting}ran.append(1)")
    while client.get_iopub_msg(timeout=30)["msg_type"] != "stream":
        pass
    remote.proxy.refuse()
    until(lambda: not kernel.peers)
    gate.touch()
    until(lambda: msg_id in kernel.dropped)
    remote.proxy.refuse(False)
    while (reply := client.get_shell_msg(timeout=30))["parent_header"].get("msg_id") != msg_id:
        pass
    assert reply["content"]["ename"] == "RemoteKernelUnreachable" and "may have run it" in reply["content"]["evalue"]
    remote.fake.forgetting = False
    assert run(client, "print(ran)")[1] == "[1]\n"


def test_a_machine_that_slept_connects_again_at_once(
    remote: Remote, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = [0.0]
    clock = types.SimpleNamespace(time=lambda: time.time() + ahead[0], monotonic=time.monotonic)
    monkeypatch.setattr(connection, "time", clock)
    monkeypatch.setattr(connection, "TICK", 0.2)
    _, client = start()
    before = remote.proxy.connections

    def sleep() -> None:
        ahead[0] = 60.0

    timer = threading.Timer(1.0, sleep)
    timer.start()
    reply, told = run(client, COUNTING)
    timer.join()
    assert reply["status"] == "ok" and told.split() == NUMBERS
    until(lambda: remote.proxy.connections > before)


def test_a_connection_on_which_nothing_comes_is_given_up(
    remote: Remote, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "TICK", 0.2)
    monkeypatch.setattr(connection, "SILENCE", 4.0)
    monkeypatch.setattr(connection, "HANDSHAKE", 3.0)
    _, client = start()
    run(client, "ran = []")
    time.sleep(4.5)
    before = remote.proxy.connections
    assert run(client, "ran.append(0)")[0]["status"] == "ok"
    assert remote.proxy.connections == before, "an idle connection that answers pings is none that broke"
    remote.proxy.swallow()
    msg_id = client.execute("ran.append(1)")
    until(lambda: remote.proxy.connections > before)
    remote.proxy.swallow(False)
    while client.get_shell_msg(timeout=60)["parent_header"].get("msg_id") != msg_id:
        pass
    assert run(client, "print(ran)")[1] == "[0, 1]\n"


def test_a_gateway_that_does_not_take_the_token_says_so(remote: Remote, kernel_name: str, tmp_path: Path) -> None:
    from sandbox_gateway.errors import SandboxGatewayError
    from sandbox_gateway.remote import credentials
    from sandbox_gateway.remote.address import parse

    credentials.keep(parse(remote.url), "wrong")
    manager = KernelManager(kernel_name=kernel_name)
    with pytest.raises(SandboxGatewayError) as caught:
        manager.start_kernel()
    assert caught.value.code == "unauthenticated" and "wrong" not in str(caught.value)
    manager.context.destroy(linger=0)
