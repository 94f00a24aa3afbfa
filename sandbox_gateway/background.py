"""The core's own event loop, on a thread of its own, one per process (DESIGN 4.15).

A synchronous ``KernelManager`` turns an event loop only during its calls, so in a foreign process the link, the bridge
and the owner's socket run here. The thread is a daemon, touches no signal and nothing else that is global.

At the end of the process the registered shutdown callbacks run, the last registered first, in bounded time. That
happens when the main thread ends, before the interpreter closes its thread pools, so that callbacks may still use
``asyncio.to_thread``; the loop itself goes on turning, since other libraries' ``atexit`` handlers may still call in.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

SHUTDOWN_TIMEOUT: Final = 10.0
"""Seconds that all shutdown callbacks together may take at the end of the process."""

_LOOK: Final = 0.05
"""Seconds between two looks of a forked child for an answer whose news another process may have taken."""


class Background:
    """One event loop on one daemon thread. Get the process's own by :func:`background_loop`."""

    def __init__(self) -> None:
        self._callbacks: list[_Callback] = []
        self._ready = threading.Event()
        self._loop = _new_loop()
        self._loop.set_default_executor(_Executor(thread_name_prefix="sandbox-gateway"))
        self._thread = threading.Thread(target=self._turn, name="sandbox-gateway", daemon=True)
        self._thread.start()
        self._ready.wait()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop; from other threads use it only by its ``*_threadsafe`` methods."""
        return self._loop

    @property
    def running(self) -> bool:
        """False after :meth:`stop`."""
        return self._thread.is_alive() and not self._loop.is_closed()

    def run(self, coro: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start ``coro`` on the loop, from any thread. Cancelling the future cancels the coroutine.

        Waiting for the result on the loop's own thread would never end: ``await`` :meth:`call` there.
        Raises RuntimeError after :meth:`stop`.
        """
        try:
            return asyncio.run_coroutine_threadsafe(coro, self._loop)
        except RuntimeError:
            coro.close()
            raise

    async def call(self, coro: Coroutine[Any, Any, T]) -> T:
        """Run ``coro`` on the loop and wait for it, from whatever loop the caller is on.

        A cancelled caller cancels the coroutine and leaves at once; the coroutine's own clean-up ends by itself.
        """
        if asyncio.get_running_loop() is self._loop:
            return await coro
        answer = asyncio.wrap_future(self.run(coro))
        return await (_looked_for(answer) if _forked else answer)

    def on_shutdown(
        self, callback: Callable[[], Awaitable[None]], more: Callable[[], float] | None = None
    ) -> Callable[[], None]:
        """Await ``callback()`` on the loop when the process ends; the returned function takes that back.

        ``more`` says at the end how many seconds beyond the usual this one may take (writing memory to disk is long).
        """
        registered = _Callback(callback, more)
        self._callbacks.append(registered)

        def remove() -> None:
            with contextlib.suppress(ValueError):
                self._callbacks.remove(registered)

        return remove

    def shut_down(self, timeout: float = SHUTDOWN_TIMEOUT) -> None:
        """Run the shutdown callbacks once, the last registered first; what fails or takes too long is logged."""
        if not self._callbacks or not self.running:
            return
        timeout += sum(callback.seconds() for callback in tuple(self._callbacks))
        future = self.run(self._run_callbacks(timeout))
        try:
            future.result(timeout + 1.0)
        except concurrent.futures.TimeoutError:
            log.error("the event loop is blocked: the shutdown was given up")

    def stop(self, timeout: float = SHUTDOWN_TIMEOUT) -> None:
        """Run the shutdown callbacks, cancel what is left, end the thread. Not from the loop's own thread."""
        if not self.running:
            return
        self.shut_down(timeout)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout)

    async def _run_callbacks(self, timeout: float) -> None:
        deadline = self._loop.time() + timeout
        while self._callbacks:
            callback = self._callbacks.pop()
            try:
                async with asyncio.timeout_at(deadline):
                    await callback.run()
            except TimeoutError:
                log.error("%r took too long at the end of the process", callback.run)
            except Exception:
                log.exception("%r failed at the end of the process", callback.run)

    def _turn(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.call_soon(self._ready.set)
        try:
            self._loop.run_forever()
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            asyncio.set_event_loop(None)
            self._loop.close()


async def _looked_for(answer: asyncio.Future[T]) -> T:
    """``answer``, in a forked child, on a loop that may be its parent's.

    What such a loop is woken by came with the fork and is read by the parent and by each other child (jupyter_core's
    ``run_sync`` keeps one loop per thread, so the workers of a process pool go on with it): the call that brings the
    answer is in the loop's queue, and a timer has it seen.
    """
    try:
        while not answer.done():
            await asyncio.wait({answer}, timeout=_LOOK)
    except asyncio.CancelledError:
        answer.cancel()
        raise
    return answer.result()


def _new_loop() -> asyncio.AbstractEventLoop:
    if sys.platform == "win32":
        # What an application gets there by default cannot watch the bridge's sockets.
        return asyncio.SelectorEventLoop()
    return asyncio.new_event_loop()


@dataclass(eq=False, slots=True)
class _Callback:
    run: Callable[[], Awaitable[None]]
    more: Callable[[], float] | None

    def seconds(self) -> float:
        try:
            return max(0.0, self.more()) if self.more is not None else 0.0
        except Exception:
            log.exception("%r cannot tell how long it takes", self.run)
            return 0.0


class _Executor(concurrent.futures.ThreadPoolExecutor):
    """A pool that, when the interpreter has closed all pools, does the work in place: late clean-up must not fail."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        try:
            return super().submit(fn, *args, **kwargs)
        except RuntimeError:
            done: concurrent.futures.Future[Any] = concurrent.futures.Future()
            try:
                done.set_result(fn(*args, **kwargs))
            except Exception as error:
                done.set_exception(error)
            return done


_lock = threading.Lock()
_current: Background | None = None
_forgotten: list[Background] = []
_forked = False


def background_loop() -> Background:
    """The process's background loop, started on first use (and again after it was stopped, or in a forked child)."""
    global _current
    with _lock:
        if _current is None or not _current.running:
            _current = Background()
        return _current


def _at_exit() -> None:
    if _current is not None:
        _current.shut_down()


def _forget() -> None:
    """In a forked child the thread does not exist.

    The object is kept: closing its loop here would take the parent's descriptors out of the epoll set they share.
    """
    global _current, _lock, _forked
    _lock, _forked = threading.Lock(), True
    if _current is not None:
        _forgotten.append(_current)
        _current = None


# Python's own hook for "the main thread has ended, the pools are still open"; concurrent.futures uses it for its end,
# and hooks run in reverse order. Plain atexit, which comes later, is the fallback should it ever go away.
_register: Callable[[Callable[[], None]], Any] = getattr(threading, "_register_atexit", atexit.register)
_register(_at_exit)
if hasattr(os, "register_at_fork"):  # not on Windows, where no process forks
    os.register_at_fork(after_in_child=_forget)
