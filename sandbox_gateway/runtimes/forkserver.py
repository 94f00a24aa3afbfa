"""The process that forks launchers for us (:mod:`sandbox_gateway.host.launch`), begun with the first one."""

from __future__ import annotations

import asyncio
import os
import socket
import weakref
from collections.abc import Callable

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.namespaces import launch_code, launch_program
from sandbox_gateway.runtimes import runsc

_ATTEMPTS = 3
_ROOM = 4400
"""Bytes of environment that a launcher has for its marker: the longest path and a name."""


class Forkserver:
    """One for whoever makes sandboxes. It is nobody's child, and ends with this object or with our process."""

    def __init__(self) -> None:
        self._control: socket.socket | None = None
        self._end: Callable[[], object] = lambda: None
        self._starting = asyncio.Lock()

    async def launcher(self, marker: str) -> socket.socket:
        """The connection of a new launcher, which bears the marker; to be closed by the caller.

        Raises ``runtime_missing`` where there is no Python and ``runtime_failed`` with the reason where it fails.
        """
        ours, theirs = _pair(socket.SOCK_STREAM)
        try:
            with theirs:
                for _ in range(_ATTEMPTS):
                    if self._hand(marker, theirs):
                        break
                    async with self._starting:
                        if self._control is None:  # else somebody else has begun it meanwhile
                            await self._begin()
                else:
                    raise SandboxGatewayError("runtime_failed", "what forks the launchers does not stay")
        except BaseException:
            ours.close()
            raise
        return ours

    def _hand(self, marker: str, connection: socket.socket) -> bool:
        if self._control is None:
            return False
        try:
            socket.send_fds(self._control, [os.fsencode(marker)], [connection.fileno()])
        except OSError:  # it was killed, or does not listen any more
            self.close()
            return False
        return True

    async def _begin(self) -> None:
        ours, theirs = _pair(socket.SOCK_SEQPACKET)
        environment = {**runsc.environment(), "SANDBOX_GATEWAY_ROOM": "." * _ROOM}
        try:
            with theirs:
                outcome = await runsc.run(
                    launch_program(theirs.fileno()),
                    env=environment,
                    stdin=launch_code(),
                    pass_fds=[theirs.fileno()],
                )
            if outcome.code != 0:
                raise SandboxGatewayError("runtime_failed", f"the launcher failed: {outcome.reason}")
        except BaseException:
            ours.close()
            raise
        self._control = ours
        self._end = weakref.finalize(self, ours.close)

    def close(self) -> None:
        """End it; the launchers that it has forked go on. Another one begins when it is needed. Idempotent."""
        self._end()
        self._control = None


def _pair(kind: socket.SocketKind) -> tuple[socket.socket, socket.socket]:
    """Our end, which never blocks, and theirs."""
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    except OSError as error:
        raise SandboxGatewayError("runtime_failed", f"no socket for a launcher: {error.strerror}") from error
    ours.setblocking(False)
    return ours, theirs
