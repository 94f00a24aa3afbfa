"""The Python API on real kernels: what each method does, and what becomes of a cell whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import textwrap
import time
from typing import Any

import pytest
from acceptance import Product
from jupyter_client import BlockingKernelClient

from sandbox_gateway import (
    DisplayData,
    Done,
    Error,
    ExecuteResult,
    InputRequest,
    Message,
    Sandbox,
    SandboxGatewayError,
    Stream,
    UpdateDisplayData,
)
from sandbox_gateway.execution import Execution
from sandbox_gateway.model import State

pytestmark = pytest.mark.usefixtures("installation")

COUNTING = "import time\nfor number in range({count}):\n    print(number, flush=True)\n    time.sleep({pause})"


def lines(count: int) -> str:
    return "".join(f"{number}\n" for number in range(count))


async def text_of(execution: Execution) -> str:
    found = ""
    async for message in execution:
        if isinstance(message, Stream):
            found += message.text
    return found


async def read_to(execution: Execution, text: str) -> str:
    """Read until ``text`` was printed; returns all that was."""
    found = ""
    async for message in execution:
        if isinstance(message, Stream):
            found += message.text
        if text in found:
            return found
    raise AssertionError(f"{text!r} did not come: {found!r}")


async def test_a_cell_gives_typed_messages_in_order_and_then_its_end() -> None:
    code = """
        import os, sys
        from IPython.display import display, HTML
        print("out", os.environ["GREETING"], flush=True)
        print("err", file=sys.stderr, flush=True)
        handle = display(HTML("<b>1</b>"), display_id="d")
        handle.update(HTML("<b>2</b>"))
        6 * 7
    """
    async with Sandbox.create(name="typed", environment={"GREETING": "hello"}) as sandbox:
        assert (sandbox.name, sandbox.state) == ("typed", State.RUNNING)
        found: list[Message] = [message async for message in sandbox.execute(textwrap.dedent(code))]
        assert found[0] == Stream("stdout", "out hello\n") and found[1] == Stream("stderr", "err\n")
        shown, changed, value, end = found[2:]
        assert isinstance(shown, DisplayData) and shown.data["text/html"] == "<b>1</b>" and shown.display_id == "d"
        assert isinstance(changed, UpdateDisplayData) and changed.data["text/html"] == "<b>2</b>"
        assert isinstance(value, ExecuteResult) and (value.data["text/plain"], value.count) == ("42", 1)
        assert end == Done("ok", 1)
        result = await sandbox.run("print('before'); 1 / 0")
        assert (result.ok, result.status, result.stdout, result.count) == (False, "error", "before\n", 2)
        assert isinstance(result.error, Error) and result.error.name == "ZeroDivisionError"
        assert (await sandbox.run("'the value'")).value == "'the value'"
    assert sandbox.state is State.TERMINATED


async def test_what_cannot_be_made_is_refused_and_leaves_nothing(installation: Product) -> None:
    before = installation.ids()
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"profile": "no-such-profile"}, "unknown_profile"),
        ({"environment": {"A=B": "c"}}, "invalid_request"),
        ({"on_owner_exit": "explode"}, "invalid_request"),
        ({"profile": "python3-gvisor-files", "directory": "/etc"}, "invalid_request"),
    )
    for options, code in refused:
        with pytest.raises(SandboxGatewayError) as caught:
            await Sandbox.create(**options)
        assert caught.value.code == code
    for opening, code in (
        (Sandbox.connect("nothing"), "unknown_sandbox"),
        (Sandbox.resume("nothing"), "unknown_sandbox"),
        (Sandbox.from_snapshot("nothing"), "unknown_snapshot"),
    ):
        with pytest.raises(SandboxGatewayError) as caught:
            await opening
        assert caught.value.code == code
    assert installation.ids() == before


async def test_cells_given_at_once_run_in_their_order_and_input_is_answered() -> None:
    async with Sandbox.create() as sandbox:
        results = await asyncio.gather(*(sandbox.run(f"print({number})") for number in range(5)))
        assert [(result.stdout, result.count) for result in results] == [(f"{n}\n", n + 1) for n in range(5)]
        asked: list[InputRequest] = []

        def answer(request: InputRequest) -> str:
            asked.append(request)
            return "it's me"

        code = "import getpass\nprint(input('who? '), getpass.getpass('secret? '))"
        assert (await sandbox.run(code, answer=answer)).stdout.strip() == "it's me it's me"
        assert asked == [InputRequest("who? "), InputRequest("secret? ", password=True)]
        refused = await sandbox.run("input()")
        assert refused.error is not None and refused.error.name == "StdinNotImplementedError"
        with pytest.raises(SandboxGatewayError, match="no cell waits") as caught:
            await sandbox.answer("to nobody")
        assert caught.value.code == "illegal_transition"


async def test_a_suspend_in_mid_cell_loses_no_line_and_the_next_cell_wakes(installation: Product) -> None:
    async with Sandbox.create() as sandbox:
        cell = sandbox.execute(COUNTING.format(count=40, pause=0.03))
        text = await read_to(cell, "5\n")
        await sandbox.suspend("to see it")
        assert sandbox.state is State.SUSPENDED and (await sandbox.stats()).memory is None
        await sandbox.resume()
        assert sandbox.state is State.RUNNING
        text += await read_to(cell, "20\n")
        await sandbox.pause()
        assert sandbox.state is State.PAUSED
        await sandbox.resume()
        assert text + await text_of(cell) == lines(40)
        await sandbox.suspend()
        assert (await sandbox.run("print(number)")).stdout == "39\n"
        kinds = [str(event.kind) async for event in sandbox.events()]
        assert kinds[:2] == ["created", "started"]
        assert kinds.count("suspended") == 2 and {"paused", "woke"} <= set(kinds)
        assert (await sandbox.stats()).memory


async def test_an_interrupt_a_timeout_and_a_cancelled_caller_end_the_cell_and_no_other() -> None:
    async with Sandbox.create() as sandbox:
        endless = "import time\nprint('begun', flush=True)\nwhile True:\n    time.sleep(0.01)"
        cell = sandbox.execute(endless)
        await read_to(cell, "begun")
        await sandbox.interrupt()
        rest = [message async for message in cell]
        assert isinstance(rest[-2], Error) and rest[-2].name == "KeyboardInterrupt" and rest[-1] == Done("error", 1)

        with pytest.raises(SandboxGatewayError) as caught:
            # A kernel heeds the interrupt only once it is in the cell: on a busy machine that takes its time.
            await sandbox.run(endless, timeout=5.0)
        assert caught.value.code == "timeout"

        begun = asyncio.Event()

        def answer(request: InputRequest) -> str:
            begun.set()
            return ""

        running = asyncio.create_task(sandbox.run(f"input()\n{endless}", answer=answer))
        waiting = asyncio.create_task(sandbox.run("print('never')"))
        last = asyncio.create_task(sandbox.run("print('last')"))
        await asyncio.wait_for(begun.wait(), 60)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert not running.done() and not last.done()
        running.cancel()
        assert (await asyncio.wait_for(last, 60)).stdout == "last\n"
        assert (await sandbox.run("print('x')")).count == 5, "the cell that was taken back never ran"


async def test_a_loop_that_was_left_is_entered_again_where_it_stopped() -> None:
    async with Sandbox.create() as sandbox:
        code = "for number in range(30):\n    print(number, flush=True)\n    if number == 3:\n        input()"
        cell = sandbox.execute(code, stdin=True)
        text, asked = "", False
        async for message in cell:
            text += message.text if isinstance(message, Stream) else ""
            asked = asked or isinstance(message, InputRequest)
            if asked and "3\n" in text:
                break

        async def reads() -> str:
            return await text_of(cell)

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await reads()
        await sandbox.answer("")
        assert text + await reads() == lines(30)
        assert [message async for message in cell] == []


async def test_a_kernel_that_dies_in_mid_cell_ends_all_cells_with_the_reason_and_can_be_restarted() -> None:
    async with Sandbox.create() as sandbox:
        cell = sandbox.execute("import os\nprint('last words', flush=True)\nos._exit(7)")
        behind = sandbox.execute("print('behind')")
        found: list[Message] = []
        with pytest.raises(SandboxGatewayError, match="code 7") as caught:
            async for message in cell:
                found.append(message)
        assert caught.value.code == "kernel_died" and found[0] == Stream("stdout", "last words\n")
        for late in (behind, sandbox.execute("1")):
            with pytest.raises(SandboxGatewayError, match="code 7"):
                await text_of(late)
        await sandbox.restart()
        assert (await sandbox.run("print('again', 'os' in globals())")).stdout == "again False\n"
        slow = sandbox.execute("import time; time.sleep(60)")
        await sandbox.restart()
        with pytest.raises(SandboxGatewayError, match="restarted"):
            await text_of(slow)
        assert (await sandbox.run("1 + 1")).value == "2"


async def test_a_sandbox_out_of_memory_says_so_and_is_made_anew_under_its_id() -> None:
    async with Sandbox.create(profile="tight") as sandbox:
        with pytest.raises(SandboxGatewayError, match="memory") as caught:
            await sandbox.run("keep = []\nwhile True:\n    keep.append(bytearray(b'x') * (8 << 20))", timeout=120)
        assert caught.value.code == "kernel_died"
        before = sandbox.id
        await sandbox.restart()
        assert sandbox.id == before and (await sandbox.run("print('new')")).stdout == "new\n"


async def test_a_closed_sandbox_refuses_everything_but_a_second_close() -> None:
    sandbox = await Sandbox.create()
    cell = sandbox.execute("import time; time.sleep(60)")
    await sandbox.close()
    await sandbox.close()
    with pytest.raises(SandboxGatewayError):
        await text_of(cell)
    for call in (sandbox.suspend, sandbox.resume, sandbox.interrupt, sandbox.logs, sandbox.fork, sandbox.detach):
        with pytest.raises(SandboxGatewayError) as caught:
            await call()
        assert caught.value.code in {"illegal_transition", "kernel_died"}
    with pytest.raises(SandboxGatewayError):
        await sandbox.run("1")


async def test_children_go_on_from_the_parents_variables_and_from_its_cell() -> None:
    async with Sandbox.create() as parent:
        await parent.run("import random, os\nx = 41")
        cell = parent.execute(COUNTING.format(count=100, pause=0.05))
        begun = await read_to(cell, "4\n")
        children = await parent.fork(2)
        try:
            assert len({parent.id, *(child.id for child in children)}) == 3
            for child in children:
                rest = await text_of(child.follow())
                assert rest.endswith("98\n99\n") and rest in lines(100), rest
            assert begun + await text_of(cell) == lines(100)
            told = [await s.run("x += 1; print(x, os.environ['SANDBOX_ID'])") for s in (parent, *children)]
            assert [r.stdout for r in told] == [f"42 {s.id}\n" for s in (parent, *children)]
            drawn = {(await s.run("print(random.random())")).stdout for s in (parent, *children)}
            assert len(drawn) == 3
        finally:
            await asyncio.gather(*(child.close() for child in children))


async def test_a_saved_sandbox_starts_others_by_its_name(installation: Product) -> None:
    async with Sandbox.create() as sandbox:
        await sandbox.run("x = 'saved'")
        snapshot = await sandbox.snapshot("for-the-api")
        assert snapshot.name == "for-the-api" and snapshot.size > 0
        with pytest.raises(SandboxGatewayError):
            await sandbox.snapshot("for-the-api")
    async with Sandbox.from_snapshot("for-the-api") as another:
        assert another.id != sandbox.id and (await another.run("print(x)")).stdout == "saved\n"
    assert installation.command("snapshot", "rm", "for-the-api").returncode == 0


async def test_a_block_keeps_what_was_suspended_and_it_is_resumed_by_its_id(installation: Product) -> None:
    async with Sandbox.create() as sandbox:
        await sandbox.run("x = 1")
        await sandbox.suspend()
    assert sandbox.state is State.SUSPENDED
    async with Sandbox.resume(sandbox.id[:8]) as again:
        assert again.id == sandbox.id and (await again.run("print(x)")).stdout == "1\n"
        await again.close()
    assert sandbox.id not in installation.ids()


async def test_a_detached_sandbox_is_the_keepers_until_somebody_connects() -> None:
    sandbox = await Sandbox.create()
    cell = sandbox.execute(COUNTING.format(count=170, pause=0.03))
    text = await read_to(cell, "5\n")
    await sandbox.detach()
    with pytest.raises(SandboxGatewayError) as caught:
        async for message in cell:  # what had arrived
            assert isinstance(message, Stream)
            text += message.text
    assert caught.value.code == "owned_elsewhere"
    with pytest.raises(SandboxGatewayError):
        await sandbox.run("1")
    again = await Sandbox.connect(sandbox.id)
    try:
        assert text + await text_of(again.follow(cell.id)) == lines(170)
        assert (await again.run("print(number)")).count == 2
    finally:
        await again.close()


async def test_any_client_of_jupyter_can_use_its_connection_file() -> None:
    async with Sandbox.create() as sandbox:
        await sandbox.run("x = 'shared'")
        client = BlockingKernelClient(connection_file=str(await sandbox.connection_file()))
        client.load_connection_file()

        def ask() -> str:
            client.start_channels()
            deadline = time.monotonic() + 60
            try:
                while time.monotonic() < deadline:
                    with contextlib.suppress(RuntimeError):  # a second without a heartbeat
                        client.wait_for_ready(timeout=60)
                        break
                found: list[str] = []
                client.execute_interactive(
                    "print(x)", timeout=60, output_hook=lambda m: found.append(str(m["content"]))
                )
                return "".join(found)
            finally:
                client.stop_channels()

        assert "shared" in await asyncio.to_thread(ask)
        assert "logs" not in await sandbox.logs()


async def test_events_are_followed_to_the_end() -> None:
    sandbox = await Sandbox.create()
    found: list[str] = []

    async def follow() -> None:
        async for event in sandbox.events(follow=True):
            found.append(str(event.kind))

    following = asyncio.create_task(follow())
    await sandbox.suspend()
    await sandbox.resume()
    await sandbox.close()
    await asyncio.wait_for(following, 30)
    assert found == ["created", "started", "suspended", "resumed", "stopped"]


def test_a_sandbox_is_used_from_one_event_loop_after_another() -> None:
    async def make() -> Sandbox:
        sandbox = await Sandbox.create()
        await sandbox.run("x = 1")
        return sandbox

    sandbox = asyncio.run(make())
    cell = sandbox.execute("print('between two loops')")
    assert asyncio.run(text_of(cell)) == "between two loops\n"
    assert asyncio.run(sandbox.run("print(x)")).stdout == "1\n"
    asyncio.run(sandbox.close())


async def test_a_cancelled_create_leaves_nothing(installation: Product) -> None:
    before = installation.ids()
    for patience in (0.0, 0.05, 0.15, 0.3):
        making = asyncio.ensure_future(_made())
        await asyncio.sleep(patience)
        if not making.cancel():
            await making.result().close()  # it was faster
        await asyncio.gather(making, return_exceptions=True)
    async with asyncio.timeout(60):
        while not await asyncio.to_thread(installation.ids) <= before:
            await asyncio.sleep(0.1)


async def _made() -> Sandbox:
    return await Sandbox.create()


def test_what_a_program_leaves_behind_ends_with_it(installation: Product) -> None:
    before = installation.ids()
    program = """
        import asyncio
        from sandbox_gateway import Sandbox

        async def main():
            sandbox = await Sandbox.create()
            print((await sandbox.run("print('in a program')")).stdout, end="")

        asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "in a program\n"), done.stderr
    assert installation.ids() == before
