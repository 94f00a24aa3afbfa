"""Run as a program: the client half on a system without what Linux alone has. ``portable.py PLATFORM URL KERNEL``.

What belongs to others (asyncio, tornado, jupyter_client) is imported as the system is, since it really is another one;
then the system is made poorer, and everything of ours is imported and used.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import subprocess
import sys
from typing import Any, NoReturn

import jupyter_client.kernelspec
import jupyter_client.manager
import tornado.httpclient
import tornado.simple_httpclient
import tornado.websocket

REFUSED = {"fcntl", "termios", "resource", "pwd", "grp", "pty", "tty", "syslog", "posix", "spwd", "crypt"}
_USED = (asyncio, ssl, subprocess, jupyter_client.kernelspec, tornado.httpclient, tornado.simple_httpclient)


class Refusing:
    """An import system without the modules."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name in REFUSED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def make_poor(platform: str) -> None:
    """Take away what ``platform`` does not have."""
    for name in REFUSED - {"posix"}:
        sys.modules.pop(name, None)
    sys.modules.pop("posix", None)
    sys.meta_path.insert(0, Refusing())  # type: ignore[arg-type]
    sys.platform = platform
    for name in ("SOCK_NONBLOCK", "SOCK_CLOEXEC"):
        delattr(socket, name)
    for name in ("memfd_create", "pidfd_open", "setns", "unshare", "sched_getaffinity", "eventfd", "copy_file_range"):
        if hasattr(os, name):
            delattr(os, name)
    if platform == "win32":
        make_pair, family = socket.socketpair, socket.AF_UNIX
        # asyncio's own need; Windows makes one over TCP.
        socket.socketpair = lambda *given: make_pair(family)  # type: ignore[assignment]
        del socket.AF_UNIX
        # It is a method of the C class, which cannot be changed: ours are looked for by this name.
        socket.socket = NoSendmsg  # type: ignore[misc]
        for name in ("register_at_fork", "fork", "getuid", "geteuid", "getgid", "O_CLOEXEC", "mkfifo", "statvfs"):
            delattr(os, name)
        asyncio.new_event_loop = refuse  # type: ignore[assignment]


class NoSendmsg(socket.socket):
    """Without the method."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("sendmsg", "recvmsg"):
            raise AttributeError(name)
        return super().__getattribute__(name)


def refuse() -> NoReturn:
    raise AssertionError("the default loop of Windows cannot watch sockets")


def main(platform: str, url: str, kernel: str) -> None:
    make_poor(platform)
    import sandbox_gateway.remote.provisioner
    from sandbox_gateway import bridge_peer
    from sandbox_gateway.cli.main import main as command

    if platform == "win32":
        bridge_peer._GATHERS = False
        command_loop = asyncio.SelectorEventLoop
        asyncio.new_event_loop = command_loop  # type: ignore[assignment]
    assert command(["install", "--gateway", url, "--prefix", os.environ["PREFIX"]]) == 0
    assert command(["ps", "--gateway", url]) == 0
    assert sandbox_gateway.remote.provisioner.RemoteSandboxProvisioner
    manager = jupyter_client.manager.KernelManager(kernel_name=kernel)
    manager.start_kernel()
    client = manager.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    told: list[str] = []

    def take(message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream":
            told.append(message["content"]["text"])

    def run(code: str) -> str:
        told.clear()
        client.execute_interactive(code, timeout=60, output_hook=take)
        return "".join(told)

    assert run("print(6 * 7)") == "42\n"
    assert len(run("print('y' * 12_000_000)")) == 12_000_001
    manager.restart_kernel()
    client.wait_for_ready(timeout=60)
    assert run("print(1)") == "1\n"
    client.stop_channels()
    transport = manager.transport
    manager.shutdown_kernel()
    manager.context.destroy(linger=0)
    print("transport", transport)


if __name__ == "__main__":
    main(*sys.argv[1:])
