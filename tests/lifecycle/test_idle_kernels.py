"""Real kernels under an idle policy: they go to sleep by themselves, wake when somebody wants something, and expire."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from acceptance import KERNEL, Client, Product, kernel, profile_kernelspec, until

PROFILES = """
[profiles.drowsy]
idle = { pause = "2s", suspend = "12s" }
[profiles.short-lived]
idle = { suspend = "2s", expire = "6s" }
[profiles.impatient]
max_busy = "3s"
"""


@pytest.fixture(scope="module")
def profiles(product: Product) -> Iterator[None]:
    file = product.home / "profiles.toml"
    before = file.read_text()
    file.write_text(before + PROFILES)
    yield
    file.write_text(before)


@pytest.fixture
def drowsy(product: Product, profiles: None) -> Iterator[Client]:
    with profile_kernelspec(product, "drowsy") as name, kernel(name) as client:
        yield client


def record(product: Product, sandbox_id: str) -> dict[str, Any]:
    done = product.command("ps", "--all", "--json")
    found: dict[str, Any] = next(item for item in json.loads(done.stdout) if item["id"] == sandbox_id)
    return found


def events(product: Product, sandbox_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(product.command("events", sandbox_id, "--json").stdout)
    return found


def test_a_kernel_that_nobody_uses_is_paused_then_suspended_and_wakes_with_all_it_had(
    product: Product, drowsy: Client
) -> None:
    drowsy.run("x = 41")
    until(lambda: record(product, drowsy.id)["state"] == "suspended", 60)
    assert drowsy.alive()
    assert drowsy.run("print(x + 1)").stdout == "42\n"
    order = ["started", "paused", "suspended", "woke", "resumed"]
    kinds = [event["kind"] for event in events(product, drowsy.id) if event["kind"] in order]
    at = kinds.index("suspended")
    # On a slow machine it may have been paused and woken before that, too.
    assert kinds[0] == "started" and kinds[at - 1 : at + 3] == order[1:], kinds
    suspended = next(event for event in events(product, drowsy.id) if event["kind"] == "suspended")
    assert "idle for 12 s" in suspended["text"] and suspended["data"]["seconds"] > 0


def test_a_kernel_at_work_is_left_alone(product: Product, drowsy: Client) -> None:
    """A cell that only sleeps is at work, and so is a thread or a program that computes while no cell runs."""

    def pauses_after(moment: float) -> list[float]:
        told = [event["time"] for event in events(product, drowsy.id) if event["kind"] == "paused"]
        return [at for text in told if (at := datetime.fromisoformat(text).timestamp()) > moment]

    begun, ended = drowsy.value(
        "import json, time; begun = time.time(); time.sleep(7); print(json.dumps([begun, time.time()]))"
    )
    assert [moment for moment in pauses_after(begun) if moment < ended] == []
    begun = drowsy.value(
        "import threading, subprocess, sys\n"
        "burn = 'import time\\nend = time.time() + 4\\nwhile time.time() < end: pass'\n"
        "def work():\n"
        "    global ended\n"
        "    exec(burn)\n"
        "    subprocess.run([sys.executable, '-c', burn], check=True)\n"
        "    ended = time.time()\n"
        "thread = threading.Thread(target=work)\n"
        "print(time.time())\n"
        "thread.start()"
    )
    until(lambda: pauses_after(begun), 60)
    ended = drowsy.value("thread.join(); print(ended)")
    assert pauses_after(begun)[0] > ended


def test_an_expired_kernel_was_announced_and_says_why_it_is_gone(product: Product, profiles: None) -> None:
    with profile_kernelspec(product, "short-lived") as name, kernel(name) as client:
        before = product.snapshots()
        until(lambda: record(product, client.id)["state"] == "expired", 60)
        gone = record(product, client.id)
        assert gone["death"]["kind"] == "expired" and gone["death"]["reason"] == "not used for 6 s"
        told = events(product, client.id)
        kinds = [event["kind"] for event in told]
        assert [kind for kind in kinds if kind in {"warned", "expired"}] == ["warned", "expired"]
        announced, ended = (next(event for event in told if event["kind"] == kind) for kind in ("warned", "expired"))
        assert announced["time"] < ended["time"] and "unless it is used" in announced["text"]
        assert not client.alive()
        until(lambda: product.snapshots() <= before, found=lambda: product.snapshots() - before)
        said = ""
        while "has expired: not used for 6 s" not in said:
            message = client.client.get_iopub_msg(timeout=30)
            said += str(message["content"].get("text", ""))
        assert "[sandbox]" in said and "expires in" in said, "whoever has the notebook open is told before, too"
        refused = product.command("resume", client.id, "--json")
        error = json.loads(refused.stderr[refused.stderr.index("{") :])["error"]
        assert refused.returncode == 1 and error["code"] == "expired"
        with pytest.raises(Exception, match="has expired: not used for 6 s"):
            client.manager.restart_kernel(now=True)


def test_a_request_that_runs_too_long_is_interrupted(product: Product, profiles: None) -> None:
    with profile_kernelspec(product, "impatient") as name, kernel(name) as client:
        result = client.run("import time\nfor _ in range(600): time.sleep(0.1)")
        assert result.status == "error" and "KeyboardInterrupt" in result.error and 3 <= result.seconds < 30
        assert client.run("print('still here')").stdout == "still here\n"
        assert [event["kind"] for event in events(product, client.id)].count("interrupted") == 1


SHORT_OF_MEMORY = """
import asyncio, json, sys
from jupyter_client import KernelManager
from sandbox_gateway import policy
from sandbox_gateway.background import background_loop
from sandbox_gateway.embedded import lifecycle
from sandbox_gateway.idle import watch

policy.MIN_AWAKE = watch.RECENT = 0.0
managers = [KernelManager(kernel_name=sys.argv[1]) for _ in range(2)]
try:
    clients = []
    for manager in managers:
        manager.start_kernel()
        client = manager.blocking_client()
        client.start_channels()
        client.wait_for_ready(timeout=120)
        client.execute_interactive("x = 5", timeout=60)
        clients.append(client)
    clients[0].execute("import time; print('at work', flush=True); time.sleep(600)")
    while "at work" not in str(clients[0].get_iopub_msg(timeout=60)["content"]):
        pass

    async def relieve():
        return await lifecycle().idle.relieve(1 << 60)

    victims = background_loop().run(relieve()).result(100)
    states = [str(lifecycle().live[manager.provisioner.kernel_id].state) for manager in managers]
    told = []
    clients[1].execute_interactive("print(x)", timeout=60, output_hook=lambda m: told.append(m["content"].get("text")))
    print(json.dumps([victims == (managers[1].provisioner.kernel_id,), states, "5\\n" in told]))
finally:
    for manager in managers:
        manager.shutdown_kernel(now=True)
"""


def test_a_machine_that_is_short_of_memory_suspends_idle_kernels_and_never_busy_ones(product: Product) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, KERNEL], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, ["running", "suspended"], True]
