"""The process's own loop: calls from anywhere, cancellation, forks, the end of the process."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading

import pytest

from sandbox_gateway.background import Background, background_loop


@pytest.fixture
def background():
    made = Background()
    yield made
    made.stop()
    assert not made.running


async def where() -> threading.Thread:
    return threading.current_thread()


def test_a_plain_thread_runs_a_coroutine_and_gets_its_result(background: Background):
    thread = background.run(where()).result(10)
    assert thread is not threading.current_thread()
    assert thread.daemon


async def test_another_loop_awaits_it(background: Background):
    assert await background.call(where()) is not threading.current_thread()

    async def nested() -> bool:
        return await background.call(where()) is threading.current_thread()

    assert await background.call(nested()), "on the loop itself it is a plain await"


async def test_errors_come_through(background: Background):
    async def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await background.call(fail())
    with pytest.raises(KeyError):
        background.run(fail()).result(10)


async def test_cancelling_the_caller_cancels_the_coroutine(background: Background):
    begun, cancelled = threading.Event(), threading.Event()

    async def forever() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    task = asyncio.ensure_future(background.call(forever()))
    while not begun.is_set():
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(cancelled.wait, 10)


def test_shutdown_callbacks_run_last_first_and_what_fails_stops_nobody(background: Background):
    order: list[str] = []

    def callback(name: str, fail: bool = False):
        async def run() -> None:
            order.append(name)
            if fail:
                raise ValueError(name)

        return run

    background.on_shutdown(callback("first"))
    remove = background.on_shutdown(callback("removed"))
    background.on_shutdown(callback("failing", fail=True))
    background.on_shutdown(callback("last"))
    remove()
    remove()
    background.stop()
    assert order == ["last", "failing", "first"]


def test_a_callback_that_hangs_is_given_up(background: Background):
    ran: list[int] = []

    async def hang() -> None:
        await asyncio.Event().wait()

    async def quick() -> None:
        ran.append(1)

    background.on_shutdown(quick)
    background.on_shutdown(hang)
    background.shut_down(timeout=0.1)
    assert background.running


def test_one_that_needs_longer_says_so(background: Background):
    done = []

    async def long() -> None:
        await asyncio.sleep(0.5)
        done.append(True)

    def wrong() -> float:
        raise RuntimeError("it cannot tell")

    async def quick() -> None:
        done.append(False)

    background.on_shutdown(quick, wrong)
    background.on_shutdown(long, lambda: 20.0)
    background.shut_down(0.1)
    assert done == [True, False]


def test_stop_cancels_what_is_left_and_run_refuses_then():
    background = Background()
    cancelled: list[int] = []

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(1)

    future = background.run(forever())
    background.run(where()).result(10)
    background.stop()
    assert cancelled == [1] and future.cancelled()
    with pytest.raises(RuntimeError):
        background.run(where())


def test_there_is_one_per_process_and_a_new_one_after_stop():
    first = background_loop()
    assert background_loop() is first
    first.stop()
    second = background_loop()
    assert second is not first and second.running
    second.stop()


def run_program(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    return done.stdout


def test_a_forked_child_has_its_own_and_the_parents_goes_on():
    out = run_program(
        "import os, sys, threading; from sandbox_gateway.background import background_loop\n"
        "async def name(): return threading.current_thread().name\n"
        "parent = background_loop(); parent.run(name()).result(10); child = os.fork()\n"
        "if child == 0:\n"
        "    mine = background_loop(); assert mine is not parent\n"
        "    print(mine.run(name()).result(10), flush=True); mine.stop(); os._exit(0)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
        "assert background_loop() is parent; print(parent.run(name()).result(10))\n"
    )
    assert out == "sandbox-gateway\nsandbox-gateway\n"


def test_the_end_of_the_process_runs_the_callbacks_while_threads_can_still_be_used():
    out = run_program(
        "import asyncio, atexit, time\n"
        "from sandbox_gateway.background import background_loop\n"
        "b = background_loop()\n"
        "async def last_words():\n"
        "    await asyncio.sleep(0.05); await asyncio.to_thread(print, 'callback', flush=True)\n"
        "b.on_shutdown(last_words)\n"
        "async def late(): return await asyncio.to_thread(lambda: 'late')\n"
        "atexit.register(lambda: print(b.run(late()).result(5), flush=True))\n"
        "print('main', flush=True)\n"
    )
    assert out == "main\ncallback\nlate\n", "and atexit handlers that come after may still call in"


def test_signal_handling_of_the_process_is_untouched():
    out = run_program(
        "import os, signal; from sandbox_gateway.background import background_loop\n"
        "before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]\n"
        "b = background_loop()\n"
        "async def child():\n"
        "    import asyncio; p = await asyncio.create_subprocess_exec('true'); return await p.wait()\n"
        "assert b.run(child()).result(10) == 0\n"
        "assert before == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]\n"
        "assert signal.set_wakeup_fd(-1) == -1; b.stop(); print('ok')\n"
    )
    assert out == "ok\n"


def test_it_leaves_no_descriptor():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        Background().stop()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_forked_child_on_its_parents_loop_gets_its_answers():
    """What wakes a loop goes with the fork: one child takes the call that was meant for another (jupyter_core's
    ``run_sync`` keeps one loop for a thread, and so for the children of a process pool)."""
    out = run_program(
        "import asyncio, os, signal; from sandbox_gateway.background import background_loop\n"
        "async def answer(): await asyncio.sleep(0.001); return os.getpid()\n"
        "async def ask(): return await background_loop().call(answer())\n"
        "async def turn():\n"
        "    while True: await asyncio.sleep(0)\n"
        "loop = asyncio.new_event_loop(); loop.run_until_complete(ask()); children = []\n"
        "def fork(work):\n"
        "    child = os.fork()\n"
        "    if child == 0: signal.alarm(20); loop.run_until_complete(work()); os._exit(7)\n"
        "    return child\n"
        "async def asks():\n"
        "    for _ in range(200): assert await ask() == os.getpid()\n"
        "greedy, asking = fork(turn), fork(asks)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(asking, 0)[1]))\n"
        "os.kill(greedy, signal.SIGKILL); os.waitpid(greedy, 0); loop.close()\n"
    )
    assert out == "7\n"
