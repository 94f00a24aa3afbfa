"""A kernel is paused, or suspended to disk, whatever it is doing; it goes on as if nothing had happened."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest
from acceptance import FILES_KERNEL, KERNEL, START, Client, Product, kernel, profile_kernelspec, until
from jupyter_client import KernelManager
from leaks import marked
from suspending import COUNTING, Running, lines, state, tell

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import discover
from sandbox_gateway.owner import ask


def processes_of(product: Product, client: Client) -> int:
    directory = discover({"SANDBOX_GATEWAY_HOME": str(product.home)}).sandbox(client.id)
    return len(marked(str(directory), client.id))


def test_a_cell_goes_on_after_a_suspend_and_no_line_is_lost(product: Product, client: Client) -> None:
    client.run("x = 41")
    cell = Running(client, COUNTING.format(count=60, pause=0.03))
    for number in (5, 20, 35):
        cell.until_line(number)
        tell(product, client.id, "suspend")
        assert state(product, client.id) == "suspended"
        tell(product, client.id, "resume")
        assert state(product, client.id) == "running"
    reply = cell.finish()
    assert cell.stdout == lines(60)
    assert reply["status"] == "ok" and reply["execution_count"] == 2
    assert client.run("print(x + 1)").stdout == "42\n"


def test_a_suspended_kernel_has_no_process_and_counts_as_alive(product: Product, client: Client) -> None:
    tell(product, client.id, "suspend")
    assert processes_of(product, client) == 0
    assert client.manager.is_alive()
    assert client.client.is_alive()
    row = next(row for row in product.ps() if row["id"] == client.id)
    assert row["state"] == "suspended" and not row["memory"]


def test_an_execute_wakes_a_suspended_and_a_paused_kernel(product: Product, client: Client) -> None:
    client.run("x = 1")
    for op, asleep in (("suspend", "suspended"), ("pause", "paused")):
        tell(product, client.id, op)
        assert state(product, client.id) == asleep
        assert client.run("x += 1; print(x)").status == "ok"
        assert state(product, client.id) == "running"
    assert client.run("print(x)").stdout == "3\n"


def test_a_question_for_the_kernels_kind_wakes_nothing(product: Product, client: Client) -> None:
    """As the reload of a page with suspended notebooks does."""
    tell(product, client.id, "suspend")
    reply = client.client.kernel_info(reply=True, timeout=30)
    assert reply["content"]["language_info"]["name"] == "python"
    assert state(product, client.id) == "suspended"


def test_a_kernel_that_waits_for_input_is_answered_after_a_resume(product: Product, client: Client) -> None:
    client.client.allow_stdin = True
    message_id = client.client.execute("print('hello ' + input('who? '))", allow_stdin=True)
    assert client.client.get_stdin_msg(timeout=30)["content"]["prompt"] == "who? "
    tell(product, client.id, "suspend")
    client.client.input("world")
    reply = client.client.get_shell_msg(timeout=60)
    assert reply["parent_header"]["msg_id"] == message_id and reply["content"]["status"] == "ok"
    said = ""
    while "hello world\n" not in said:
        message = client.client.get_iopub_msg(timeout=30)
        said += message["content"].get("text", "")


def test_a_pause_stops_the_clock_of_a_cell_and_a_resume_goes_on(product: Product, client: Client) -> None:
    cell = Running(client, COUNTING.format(count=500, pause=0.02))
    cell.until_line(5)
    tell(product, client.id, "pause")
    before = len(cell.stdout)
    with pytest.raises(Exception):  # noqa: B017  (queue.Empty, whichever loop the client uses)
        while True:
            cell.take(timeout=1.0)
    assert len(cell.stdout) < len(lines(500)) and before <= len(cell.stdout)
    tell(product, client.id, "resume")
    assert cell.finish()["status"] == "ok"
    assert cell.stdout == lines(500)


def test_a_kernel_that_is_still_booting_can_be_suspended(product: Product) -> None:
    profiles = product.home / "profiles.toml"
    before = profiles.read_text()
    profiles.write_text(before + "\n[profiles.booted]\ntemplate = false\n")
    try:
        with profile_kernelspec(product, "booted") as name:
            manager = KernelManager(kernel_name=name)
            manager.start_kernel()  # returns when the process is there; it has said nothing yet
            client = Client(manager, manager.client())
            try:
                tell(product, client.id, "suspend")
                assert state(product, client.id) == "suspended" and processes_of(product, client) == 0
                client.client.start_channels()
                client.client.wait_for_ready(timeout=START)
                assert client.run("print(6 * 7)").stdout == "42\n"
            finally:
                client.client.stop_channels()
                manager.shutdown_kernel(now=True)
    finally:
        profiles.write_text(before)


def test_a_suspended_kernel_can_be_interrupted(product: Product, client: Client) -> None:
    cell = Running(client, COUNTING.format(count=2000, pause=0.02))
    cell.until_line(3)
    tell(product, client.id, "suspend")
    client.manager.interrupt_kernel()
    reply = cell.finish()
    assert reply["status"] == "error" and reply["ename"] == "KeyboardInterrupt"
    assert cell.stdout == lines(len(cell.stdout.splitlines()))


def test_a_suspended_kernel_can_be_restarted_and_keeps_its_files(product: Product, client: Client) -> None:
    client.run("x = 1; open('kept.txt', 'w').write('kept')")
    tell(product, client.id, "suspend")
    client.manager.restart_kernel(now=True)
    client.client.wait_for_ready(timeout=60)
    assert client.run("print('x' in globals(), open('kept.txt').read())").stdout == "False kept\n"


@pytest.mark.parametrize("op", ["pause", "suspend"])
def test_a_sleeping_kernel_can_be_shut_down(product: Product, op: str) -> None:
    before = product.snapshots()
    with kernel(KERNEL) as client:
        tell(product, client.id, op)
    assert client.id not in product.ids()
    until(lambda: product.snapshots() <= before, found=lambda: product.snapshots() - before)


@pytest.mark.parametrize("op", ["pause", "suspend"])
def test_a_sleeping_kernel_can_be_removed_by_the_command_line(product: Product, client: Client, op: str) -> None:
    tell(product, client.id, op)
    done = product.command("rm", client.id)
    assert done.returncode == 0, done.stderr
    assert client.id not in product.ids()


async def test_many_wishes_at_once_are_served_one_after_the_other(product: Product, client: Client) -> None:
    paths = discover({"SANDBOX_GATEWAY_HOME": str(product.home)})
    wishes = ["suspend", "resume", "pause", "suspend", "resume", "suspend", "pause", "resume"]
    results = await asyncio.gather(
        *(ask(paths, client.id, wish, timeout=60.0) for wish in wishes), return_exceptions=True
    )
    for wish, result in zip(wishes, results, strict=True):
        if isinstance(result, BaseException):
            # A suspended kernel cannot be paused; nothing else may fail.
            assert isinstance(result, SandboxGatewayError) and result.code == "illegal_transition" and wish == "pause"
    await ask(paths, client.id, "resume", timeout=60.0)
    assert (await asyncio.to_thread(client.run, "print(1)")).stdout == "1\n"


def test_threads_subprocesses_and_an_event_loop_go_on(product: Product, client: Client) -> None:
    client.run(
        "import asyncio, subprocess, threading, time\n"
        "ticks = []\n"
        "def tick():\n"
        "    while True:\n"
        "        ticks.append(1); time.sleep(0.01)\n"
        "threading.Thread(target=tick, daemon=True).start()\n"
        "child = subprocess.Popen(['sh', '-c', 'while read line; do echo \"got $line\"; done'],"
        " stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)\n"
        "beats = []\n"
        "async def beat():\n"
        "    while True:\n"
        "        beats.append(1); await asyncio.sleep(0.01)\n"
        "task = asyncio.get_event_loop().create_task(beat())"
    )
    tell(product, client.id, "suspend")
    tell(product, client.id, "resume")
    said = client.run(
        "before, beaten = len(ticks), len(beats)\n"
        "end = time.monotonic() + 10\n"
        "while not (len(ticks) > before and len(beats) > beaten) and time.monotonic() < end:\n"
        "    await asyncio.sleep(0.02)\n"
        "child.stdin.write('word\\n'); child.stdin.flush()\n"
        "print(child.stdout.readline().strip(), len(ticks) > before, len(beats) > beaten)\n"
        "child.stdin.close(); child.wait(); task.cancel()"
    )
    assert said.stdout == "got word True True\n", said.text


def test_the_clock_is_right_after_a_resume(product: Product, client: Client) -> None:
    client.run("import time; before = time.time()")
    tell(product, client.id, "suspend")
    slept = time.time()
    until(lambda: time.time() > slept + 1.5)
    tell(product, client.id, "resume")
    said = client.run("print(time.time(), time.time() - before)").stdout.split()
    assert abs(float(said[0]) - time.time()) < 5.0
    assert float(said[1]) > 1.5


@pytest.mark.parametrize(("op", "asleep"), [("suspend", "suspended"), ("pause", "paused")])
def test_time_goes_on_while_it_sleeps_and_what_is_due_comes_at_once(
    product: Product, client: Client, op: str, asleep: str
) -> None:
    """``sleep``, timers of threads, of the system and of an event loop count the time of the world."""
    client.run(
        "import asyncio, signal, threading, time\n"
        "fired, begun, ticks = {}, time.time(), time.monotonic()\n"
        "def note(name): fired[name] = time.time() - begun\n"
        "timer = threading.Timer(5.0, note, ['thread']); timer.start()\n"
        "signal.signal(signal.SIGALRM, lambda *_: note('alarm')); _ = signal.setitimer(signal.ITIMER_REAL, 5.0)\n"
        "async def later():\n"
        "    await asyncio.sleep(5.0); note('loop')\n"
        "task = asyncio.get_event_loop().create_task(later())"
    )
    cell = Running(client, "print('sleeping', flush=True); time.sleep(5.0); note('sleep')")
    while "sleeping" not in cell.stdout:
        assert cell.take()
    tell(product, client.id, op)
    assert state(product, client.id) == asleep
    slept = time.time()
    until(lambda: time.time() > slept + 7.0)
    tell(product, client.id, "resume")
    woken = time.time()
    assert cell.finish()["status"] == "ok"
    client.run("await task; timer.join()")
    told = json.loads(
        client.run(
            "import json; print(json.dumps([fired, begun, time.monotonic() - ticks, time.time() - begun]))"
        ).stdout
    )
    fired, begun, monotonic, elapsed = told
    assert fired.keys() == {"thread", "alarm", "sleep", "loop"}
    for name, seconds in fired.items():
        assert slept + 7.0 - begun - 0.1 < seconds < woken - begun + 10.0, (name, seconds)
    assert abs(monotonic - elapsed) < 3.5, "the monotonic clock goes on as well"


def test_a_file_that_the_kernel_has_open_must_not_have_changed(product: Product, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    (tmp_path / "data.txt").write_text("first\nsecond\n")
    (tmp_path / "other.txt").write_text("free")
    with kernel(FILES_KERNEL, cwd=str(tmp_path)) as client:
        assert client.run("data = open('data.txt'); print(data.readline().strip())").stdout == "first\n"
        assert client.run("print(open('other.txt').read())").stdout == "free\n"  # and closed again
        tell(product, client.id, "suspend")
        (tmp_path / "data.txt").write_text("something else altogether\n")
        (tmp_path / "other.txt").write_text("changed freely")
        with pytest.raises(SandboxGatewayError) as caught:
            tell(product, client.id, "resume")
        assert caught.value.code == "workspace_changed" and "data.txt" in caught.value.message
        assert "other.txt" not in caught.value.message
        assert state(product, client.id) == "suspended"
        (tmp_path / "data.txt").write_text("first\nsecond\n")
        tell(product, client.id, "resume")
        assert (
            client.run("print(data.readline().strip(), open('other.txt').read())").stdout == "second changed freely\n"
        )


def test_a_restart_of_a_kernel_that_cannot_be_woken_gives_a_new_one_and_says_so(
    product: Product, tmp_path: Path
) -> None:
    tmp_path.chmod(0o777)
    (tmp_path / "data.txt").write_text("first\nsecond\n")
    with kernel(FILES_KERNEL, cwd=str(tmp_path)) as client:
        client.run("data = open('data.txt'); x = 1; open('/tmp/inside', 'w').write('x')")
        before = client.id
        tell(product, client.id, "suspend")
        (tmp_path / "data.txt").write_text("something else altogether\n")
        client.manager.restart_kernel(now=True)
        client.client.wait_for_ready(timeout=60)
        found = client.run("import os; print('x' in globals(), os.path.exists('/tmp/inside'))")
        assert found.stdout == "False False\n"
        assert client.id == before and state(product, before) == "running"
