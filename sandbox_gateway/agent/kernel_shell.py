"""Requests and replies on shell, with fewer threads between; runs in the kernel's process.

Beside :mod:`sandbox_gateway.agent.ipykernel_app`; standard library, and ZMQ's frames. Since ipykernel 7 requests and
replies pass the shell channel's thread, over pairs of ZMQ sockets. Inside gVisor a system call after a pause costs some
0.1 ms, and each of these hops takes a dozen of them. Here the thread wakes the main shell's loop by one call, and each
shell writes its replies to the agent's pipe itself, behind what it has published.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
from collections.abc import Callable
from typing import Any

_AGENT = b"agent"
"""The identity of the agent's sockets (:data:`sandbox_gateway.agent.sockets.IDENTITY`)."""


class _Instead:
    """Stands for a socket, and is one but for what a subclass does itself."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


class ReplySocket(_Instead):
    """A shell's way to the shell channel's thread; replies to others than the agent go by the socket."""

    def __init__(self, socket: Any, pipe: Any, write_out: Callable[[Any], None]) -> None:
        super().__init__(socket)
        self._pipe = pipe
        self._write_out = write_out

    def send_multipart(self, parts: list[Any], *args: Any, **kwargs: Any) -> Any:
        """Write the reply to the pipe before returning, from whatever shell's thread."""
        pipe = self._pipe
        if pipe.usable and len(parts) > 1 and parts[0] == _AGENT:
            known = sys.modules["_sandbox_writer"]
            entry = pipe.writer.entry(parts[1:], known.SHELL)
            pipe.writer.put(entry, [])
            self._write_out(pipe)
            if known.whole(entry) or not pipe.writer.broken:
                return None
        return self._socket.send_multipart(parts, *args, **kwargs)


class RequestSocket(_Instead):
    """The shell channel thread's way to the main shell.

    A graphical event loop looks at the socket and not at asyncio's loop: from the first request that comes while the
    kernel has one, all go by the socket, so that none overtakes another.
    """

    def __init__(self, socket: Any, kernel: Any) -> None:
        super().__init__(socket)
        self._kernel = kernel
        self._loop = kernel.io_loop.asyncio_loop
        self._context = contextvars.copy_context()
        self._by_socket = False
        self._tasks: set[Any] = set()

    def send_multipart(self, parts: list[Any], *args: Any, **kwargs: Any) -> Any:
        """Hand a request to the main shell."""
        if self._by_socket or self._kernel.eventloop is not None:
            self._by_socket = True
            return self._socket.send_multipart(parts, *args, **kwargs)
        self._loop.call_soon_threadsafe(self._begin, parts)
        return None

    def send(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Hand over a message of one part, as ipykernel's own to itself are."""
        from zmq import Frame

        return self.send_multipart([Frame(data)], *args, **kwargs)

    def _begin(self, parts: list[Any]) -> None:
        # One context for all of them: what a cell sets in its context variables is there in the next.
        task = self._loop.create_task(self._kernel.shell_main(None, parts), context=self._context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def shorten(kernel: Any, pipe: Any, write_out: Callable[[Any], None]) -> None:
    """Take the short ways in a kernel that has not started yet, where its ipykernel has a thread between.

    ``write_out`` writes what is queued for the pipe.
    """
    thread = getattr(kernel, "shell_channel_thread", None)
    manager: Any = getattr(thread, "manager", None)
    names = ("get_subshell_to_shell_channel_socket", "get_shell_channel_to_subshell_socket", "set_on_recv_callback")
    if not all(hasattr(manager, name) for name in names):
        return
    reply_socket, request_socket, listen = (getattr(manager, name) for name in names)
    main: list[RequestSocket] = []

    def reply_to(subshell_id: str | None) -> ReplySocket:
        return ReplySocket(reply_socket(subshell_id), pipe, write_out)

    def request_to(subshell_id: str | None) -> Any:
        return main[0] if subshell_id is None and main else request_socket(subshell_id)

    def listening(callback: Any) -> None:
        listen(callback)
        if hasattr(asyncio, "TaskGroup"):  # Python 3.11, since which a task may have a context
            main.append(RequestSocket(request_socket(None), kernel))

    manager.get_subshell_to_shell_channel_socket = reply_to
    manager.get_shell_channel_to_subshell_socket = request_to
    manager.set_on_recv_callback = listening
