"""A kernel of the gateway in the shape that jupyter_server and its extensions know: a kernel manager.

No ZMQ is opened for it. Who asks for a client, or for its connection information, gets the bridge's endpoints, which
are opened then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from datetime import datetime
from typing import Any, cast

from jupyter_client.connect import KernelConnectionInfo
from jupyter_events import EventLogger
from jupyter_server.services.kernels.kernelmanager import ServerKernelManager, emit_kernel_action_event
from traitlets import default

from sandbox_gateway.server.events import KERNEL_ACTIONS
from sandbox_gateway.server.hub import Hub
from sandbox_gateway.server.kernel import ServedKernel
from sandbox_gateway.zmq_bridge import ZmqBridge


class SandboxKernelManager(ServerKernelManager):
    """What ``MappingKernelManager.get_kernel`` gives for a kernel in a sandbox."""

    def __init__(self, kernel: ServedKernel, **options: Any) -> None:
        # The connection file and the endpoints are the seat's.
        super().__init__(owns_kernel=False, **options)
        self.served = kernel
        self.kernel_id = kernel.id
        self.session.key = kernel.seat.key
        self._ready = asyncio.get_running_loop().create_future()
        self._ready.set_result(None)

    def _context_default(self) -> Any:
        """The server's: one of this manager's own would be ended, and waited for, by whichever thread collects it."""
        assert self.parent is not None
        return self.parent.context

    @default("event_logger")
    def _default_event_logger(self) -> EventLogger:
        """The server's; its schema is read from disk and checked once, and not for each kernel."""
        logger = getattr(getattr(self.parent, "parent", None), "event_logger", None)
        if isinstance(logger, EventLogger) and KERNEL_ACTIONS in logger.schemas:
            return logger
        found: EventLogger = super()._default_event_logger()
        return found

    @property
    def hub(self) -> Hub:
        """Its WebSocket sessions."""
        return self.served.hub

    async def here(self) -> None:
        """Have the sandbox in this process; raises where that cannot be."""
        if self.served.live.left:
            await self.served.ours()

    # What the REST models show

    @property
    def execution_state(self) -> str:
        """``idle`` also while it sleeps (DESIGN 4.10)."""
        return self.hub.execution_state if self.served.alive else "dead"

    @execution_state.setter
    def execution_state(self, value: Any) -> None:
        """Jupyter's own bookkeeping; the hub knows better."""

    @property
    def last_activity(self) -> datetime:
        """When it was used last."""
        found: datetime = self.hub.last_activity
        return found

    @last_activity.setter
    def last_activity(self, value: datetime) -> None:
        """As above."""

    @property
    def reason(self) -> str:
        """Why it is dead."""
        return self.served.reason

    @reason.setter
    def reason(self, value: str) -> None:
        """As above."""

    # What jupyter_server does to it

    def tell(self, action: str, message: str) -> None:
        """Tell the event bus of what was done to it by another way than this object's own methods."""
        data = {"kernel_name": self.kernel_name, "kernel_id": self.kernel_id, "action": action}
        self.emit(schema_id=KERNEL_ACTIONS, data={**data, "status": "success", "msg": message})

    @property
    def has_kernel(self) -> bool:
        """Whether there is one to manage."""
        return True

    async def is_alive(self) -> bool:  # type: ignore[override]
        """Whether the kernel lives; one that sleeps does."""
        return self.served.alive

    @emit_kernel_action_event(success_msg="Kernel {kernel_id} was restarted.")
    async def restart_kernel(self, now: bool = False, newports: bool = False, **options: Any) -> None:
        """Start it anew in its sandbox; extensions wait for the next ``ready`` then."""
        self._ready = asyncio.get_running_loop().create_future()
        try:
            await self.served.restart()
        finally:
            self._ready.set_result(None)

    @emit_kernel_action_event(success_msg="Kernel {kernel_id} was interrupted.")
    async def interrupt_kernel(self) -> None:
        """Interrupt what runs; wakes it."""
        live = await self.served.ours()
        await live.interrupt()

    async def signal_kernel(self, signum: int) -> None:  # type: ignore[override]
        """Send a signal to the kernel's process group inside; wakes it."""
        live = await self.served.ours()
        await live.signal(signum)

    @emit_kernel_action_event(success_msg="Kernel {kernel_id} was shutdown.")
    async def shutdown_kernel(self, now: bool = False, restart: bool = False) -> None:
        """End it for good, or start it anew with ``restart``."""
        if restart:
            await self.served.restart()
        else:
            await self.served.shutdown("shut down by its owner")

    # ZMQ, on demand

    def _open(self) -> ZmqBridge:
        bridge = self.served.seat.bridge()
        if self.connection_file != str(bridge.connection_file):
            self.connection_file = str(bridge.connection_file)
            self.load_connection_info(cast(KernelConnectionInfo, bridge.connection_info))
        return bridge

    def get_connection_info(self, session: bool = False) -> Any:
        """Of the endpoints, which are open from now on."""
        self._open()
        return super().get_connection_info(session=session)

    def client(self, **options: Any) -> Any:
        """A client over ZMQ."""
        self._open()
        return super().client(**options)

    def connect_iopub(self, identity: bytes | None = None) -> Any:
        """A stream of the output, over ZMQ."""
        self._open()
        return super().connect_iopub(identity)

    def connect_shell(self, identity: bytes | None = None) -> Any:
        """A stream of the shell channel, over ZMQ."""
        self._open()
        return super().connect_shell(identity)

    def connect_control(self, identity: bytes | None = None) -> Any:
        """A stream of the control channel, over ZMQ."""
        self._open()
        return super().connect_control(identity)

    def connect_stdin(self, identity: bytes | None = None) -> Any:
        """A stream of the stdin channel, over ZMQ."""
        self._open()
        return super().connect_stdin(identity)

    def connect_hb(self, identity: bytes | None = None) -> Any:
        """A stream of the heartbeat, over ZMQ."""
        self._open()
        return super().connect_hb(identity)

    # There is no restarter: the gateway sees to that.

    def start_restarter(self) -> None:
        """Nothing to do."""

    def stop_restarter(self) -> None:
        """Nothing to do."""

    def resolve_path(self, path: str) -> str | None:
        """Nothing of a sandbox's files is on this machine for the server to find."""
        return None

    def update_env(self, *, env: dict[str, str]) -> None:
        """A session was renamed; the kernel's environment is its own."""

    def _async_is_alive(self) -> Awaitable[bool]:  # type: ignore[override]
        return self.is_alive()
