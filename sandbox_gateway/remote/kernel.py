"""One kernel of a gateway for an application that speaks ZMQ: sandbox, session and local endpoints under one id.

Everything here runs on the background loop (:mod:`sandbox_gateway.background`). The endpoints stay the same across
restarts, and across the death of the remote sandbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Final

from sandbox_gateway.background import Background, background_loop
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.remote import credentials
from sandbox_gateway.remote.address import Address
from sandbox_gateway.remote.client import GatewayClient, RemoteSandbox, Unreachable
from sandbox_gateway.remote.local import LocalEndpoints
from sandbox_gateway.remote.session import PATIENCE, RemoteSession, ended

log = logging.getLogger(__name__)

LEAVING: Final = 8.0
"""Seconds that the end of a kernel, or of the process, waits for the gateway to delete a sandbox."""
ECHO: Final = 3.0
"""Seconds after a restart of ours in which the gateway's word of it is no news."""
KILLED: Final = -9
"""The return code of a kernel that ended without one of its own."""
_GONE: Final = frozenset({"unknown_sandbox", "not_found"})
_open: set[RemoteKernel] = set()
_registered: list[Background] = []


class RemoteKernel:
    """A kernel under one id: launch, restart, signal, stop, close."""

    def __init__(
        self,
        kernel_id: str,
        address: Address,
        profile: str,
        *,
        key: bytes,
        transport: str = "",
        patience: float = PATIENCE,
    ) -> None:
        self.id = kernel_id
        self.address = address
        self._profile = profile
        self._key = key
        self._transport = transport
        self._patience = patience
        self._client = GatewayClient(address)
        self._local: LocalEndpoints | None = None
        self._session: RemoteSession | None = None
        self._sandbox = ""
        self._exit: int | None = 0
        self._ended = asyncio.Event()
        self._restarted = 0.0
        self._restarting = False
        self._deleting: asyncio.Task[None] | None = None
        self._explaining: asyncio.Task[None] | None = None

    @property
    def sandbox_id(self) -> str:
        """The sandbox's id on the gateway; empty before there is one."""
        return self._sandbox

    async def launch(self, environment: Mapping[str, str], name: str, say: Callable[[str], None]) -> dict[str, Any]:
        """Start the kernel, or start it anew where it is; returns jupyter_client's connection info."""
        _open.add(self)
        _register()
        first = not self._sandbox
        try:
            if self._local is None:
                self._local = LocalEndpoints(self._key, self._request, self._transport)
            await self._forgotten()
            # It may have been renewed since.
            self._client.token = credentials.token(self.address)
            if not (self._sandbox and await self._again(say)):
                await self._create(environment, name, say)
            if self._session is None or self._session.over:
                self._session = RemoteSession(
                    self._client, self._sandbox, self._key, self._local.bridge, self, patience=self._patience
                )
                await self._session.start()
            self._local.listen()
        except BaseException:
            if first:
                await self.close()
            raise
        self._exit = None
        self._ended.clear()
        return self._local.connection_info

    async def _create(self, environment: Mapping[str, str], name: str, say: Callable[[str], None]) -> None:
        say(f"starting a kernel of {self._profile} on {self.address.url}")
        await self._drop_session()
        # Chosen here, so that it can be deleted even if its creation is never answered.
        self._sandbox = _own_id(self.id)
        made = await self._client.create(self._profile, environment=environment, name=name, sandbox_id=self._sandbox)
        self._sandbox = made.id
        if made.ended:
            raise ended(made)
        say(f"sandbox {made.id} runs on {self.address.url}")

    async def _again(self, say: Callable[[str], None]) -> bool:
        """Start the kernel anew in its sandbox; False when the gateway has it no more."""
        say(f"restarting kernel {self._sandbox} on {self.address.url}")
        self._restarting = True
        try:
            found = await self._client.restart(self._sandbox)
        except SandboxGatewayError as error:
            if error.code not in _GONE:
                raise
            return False
        finally:
            self._restarting = False
            self._restarted = time.monotonic()
        if self._session is not None:
            self._session.restarted()
        return not found.ended

    # What the session tells

    def _request(self, channel: int, parts: list[bytes]) -> None:
        if self._session is not None:
            self._session.request(channel, parts)

    def shutdown_asked(self, restart: bool) -> None:
        """As :meth:`~sandbox_gateway.remote.session.Listener.shutdown_asked`."""
        self._over(0)
        if not restart:
            self._delete()

    def kernel_state(self, state: str) -> None:
        """As :meth:`~sandbox_gateway.remote.session.Listener.kernel_state`.

        A kernel that the gateway started anew by itself has died for us: whoever waits for a reply waits in vain.
        """
        fresh = self._restarting or time.monotonic() - self._restarted < ECHO
        if self._exit is None and (state == "dead" or (state == "restarting" and not fresh)):
            self._over(KILLED)
            self._explaining = asyncio.create_task(self._explain())

    async def _explain(self) -> None:
        with contextlib.suppress(SandboxGatewayError):
            found: RemoteSandbox = await self._client.get(self._sandbox)
            if found.exit_code is not None:
                self._exit = found.exit_code
            why = found.reason or ("" if found.ended else "the gateway started its kernel anew")
            log.warning("kernel %s on %s has ended: %s", self._sandbox, self.address.url, why or found.state)

    def given_up(self, error: SandboxGatewayError) -> None:
        """As :meth:`~sandbox_gateway.remote.session.Listener.given_up`."""
        log.error("kernel %s on %s is given up: %s", self._sandbox, self.address.url, error)
        self._over(KILLED)

    def _over(self, code: int) -> None:
        if self._exit is None:
            self._exit = code
        self._ended.set()

    # What the application wants

    def poll(self) -> int | None:
        """None while the kernel lives, suspended or not, else its return code. Thread-safe: it only reads."""
        return self._exit

    async def wait(self) -> int:
        """Return when the kernel has ended."""
        if self._exit is None:
            await self._ended.wait()
        return self._exit if self._exit is not None else 0

    async def signal(self, number: int) -> None:
        """Interrupt the kernel, or end it; other signals do not reach a gateway."""
        if number == signal.SIGINT:
            await self._client.interrupt(self._sandbox)
        elif number in (signal.SIGTERM, -KILLED):
            self.stop(-number)
        else:
            log.warning("signal %d cannot be sent to a remote kernel", number)

    def stop(self, code: int = KILLED) -> None:
        """The kernel counts as ended; the sandbox stays for a restart, or for :meth:`close`."""
        self._over(code)

    async def close(self) -> None:
        """Delete the sandbox and remove the endpoints; nothing of this kernel is left."""
        self._over(0)
        self._delete()
        await self._drop_session()
        await self._forgotten()
        local, self._local = self._local, None
        if local is not None:
            local.close()
        if self._explaining is not None:
            self._explaining.cancel()
        self._client.close()
        _open.discard(self)

    async def _drop_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _delete(self) -> None:
        if self._sandbox and self._deleting is None:
            self._deleting = asyncio.create_task(self._deleted(self._sandbox))

    async def _forgotten(self) -> None:
        """Wait for a deletion that was begun."""
        if self._deleting is not None:
            await asyncio.shield(self._deleting)
            self._deleting = None
            self._sandbox = ""

    async def _deleted(self, sandbox_id: str) -> None:
        await self._drop_session()
        try:
            async with asyncio.timeout(LEAVING):
                while True:
                    try:
                        await self._client.delete(sandbox_id)
                        return
                    except Unreachable:
                        await asyncio.sleep(0.5)
        except (SandboxGatewayError, TimeoutError) as error:
            why = str(error) or "no answer"
            log.warning("sandbox %s is left on %s: %s", sandbox_id, self.address.url, why)


def _own_id(kernel_id: str) -> str:
    """The kernel's own id where it is a UUID that may be free, so that it is the same everywhere."""
    with contextlib.suppress(ValueError):
        if str(uuid.UUID(kernel_id)) == kernel_id and kernel_id not in _used:
            _used.add(kernel_id)
            return kernel_id
    return str(uuid.uuid4())


_used: set[str] = set()
"""Ids that were given once; a gateway keeps those of sandboxes that have ended."""


def _register() -> None:
    """At the end of the process the sandboxes that are still there are deleted."""
    current = background_loop()
    if current not in _registered:
        _registered[:] = [current]
        current.on_shutdown(_close_all, lambda: LEAVING if _open else 0.0)


async def _close_all() -> None:
    await asyncio.gather(*(kernel.close() for kernel in tuple(_open)), return_exceptions=True)


def _after_fork() -> None:
    """A forked child owns nothing of its parent's."""
    _of_parent.extend(_open)
    _open.clear()
    _registered.clear()


_of_parent: list[RemoteKernel] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
