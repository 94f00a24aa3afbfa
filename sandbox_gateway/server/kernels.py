"""jupyter_server's kernel manager: sandboxed kernels by the gateway, all others as stock.

Which user asks is read from the request that is being served (jupyter_server's ``CallContext``): another owner's kernel
is answered as one that does not exist. Values are passed on; nothing that is shared is changed for one request.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, NoSuchKernel
from jupyter_client.multikernelmanager import DuplicateKernelError
from jupyter_core.utils import ensure_async
from jupyter_server.base.call_context import CallContext
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from jupyter_server.utils import ApiPath
from tornado import web
from traitlets import Instance, default

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import discover
from sandbox_gateway.images.service import Progress
from sandbox_gateway.kernelspecs import PROVISIONER
from sandbox_gateway.model import timestamp
from sandbox_gateway.server.callers import EVERYBODY, Caller
from sandbox_gateway.server.config import SandboxGateway
from sandbox_gateway.server.events import EventBridge
from sandbox_gateway.server.gateway import Gateway, Wanted
from sandbox_gateway.server.identity import caller_of
from sandbox_gateway.server.kernel import ServedKernel
from sandbox_gateway.server.kernel_manager import SandboxKernelManager
from sandbox_gateway.server.starts import telling


def current_caller() -> Caller:
    """Who asks: the user of the request being served; outside of any, the server itself."""
    handler = CallContext.get(CallContext.JUPYTER_HANDLER)
    if handler is None:
        return EVERYBODY
    user = handler.current_user
    if user is None:
        raise web.HTTPError(403)
    return caller_of(user)


class SandboxMappingKernelManager(AsyncMappingKernelManager):
    """Takes the place of jupyter_server's own."""

    gateway = Instance(Gateway)
    config_of_gateway = Instance(SandboxGateway)
    bridge: EventBridge | None = None
    """Tells of starts; there is none until the routes are."""

    @default("config_of_gateway")
    def _default_config_of_gateway(self) -> SandboxGateway:
        return SandboxGateway(parent=self.parent)

    @default("gateway")
    def _default_gateway(self) -> Gateway:
        config = self.config_of_gateway
        hidden = None if self.allow_tracebacks else self.traceback_replacement_message
        stock = {"untracked": frozenset(self.untracked_message_types), "hide_tracebacks": hidden}
        settings = config.settings()
        settings = replace(settings, hub={**settings.hub, **stock})
        return Gateway(discover(), settings, quota_of=config.quota_of)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gateway.on_kernel(self._came_or_went)

    def __bool__(self) -> bool:
        """True without a kernel too: a server that ends passes over a kernel manager that is false, pool and all."""
        return True

    def _came_or_went(self, kernel: ServedKernel, here: bool) -> None:
        if here:
            self._kernels[kernel.id] = SandboxKernelManager(
                kernel,
                parent=self,
                log=self.log,
                kernel_name=kernel.live.record.profile,
                kernel_spec_manager=self.kernel_spec_manager,
            )
            self._kernel_connections.setdefault(kernel.id, 0)
        else:
            self._kernels.pop(kernel.id, None)
            self._kernel_connections.pop(kernel.id, None)

    def _ours(self, kernel_id: str) -> SandboxKernelManager | None:
        found = self._kernels.get(kernel_id)
        return found if isinstance(found, SandboxKernelManager) else None

    # Looking

    def _check_kernel_id(self, kernel_id: str) -> None:
        super()._check_kernel_id(kernel_id)
        ours = self._ours(kernel_id)
        if ours is not None and not current_caller().may_use(ours.served.owner):
            raise web.HTTPError(404, f"Kernel does not exist: {kernel_id}")

    def get_kernel(self, kernel_id: str) -> Any:
        """A kernel of the caller's; raises 404 for others, in a request."""
        self._check_kernel_id(kernel_id)
        return super().get_kernel(kernel_id)

    def kernel_model(self, kernel_id: str) -> dict[str, Any]:
        """What ``/api/kernels`` shows of it."""
        self._check_kernel_id(kernel_id)
        ours = self._ours(kernel_id)
        if ours is None:
            model: dict[str, Any] = super().kernel_model(kernel_id)
            return model
        model = {
            "id": kernel_id,
            "name": ours.kernel_name,
            "last_activity": timestamp(ours.last_activity.timestamp()),
            "execution_state": ours.execution_state,
            "connections": self._kernel_connections.get(kernel_id, 0),
        }
        if ours.reason:
            model["reason"] = ours.reason
        return model

    # Making

    def _profile_of(self, kernel_name: str | None) -> str | None:
        """The profile that a kernelspec starts in a sandbox; None for a kernel that is none of ours."""
        name = kernel_name or self.default_kernel_name
        assert self.kernel_spec_manager is not None
        try:
            spec = self.kernel_spec_manager.get_kernel_spec(name)
        except NoSuchKernel:
            if name != "python":
                raise
            # As jupyter_client's own kernel managers take it.
            spec = self.kernel_spec_manager.get_kernel_spec(name := NATIVE_KERNEL_NAME)
        stanza = spec.metadata.get("kernel_provisioner", {})
        if not isinstance(stanza, Mapping) or stanza.get("provisioner_name") != PROVISIONER:
            return None
        return str(stanza.get("config", {}).get("profile", name))

    async def start_kernel(  # type: ignore[override]
        self, *, kernel_id: str | None = None, path: str | None = None, **options: Any
    ) -> str:
        """Start a kernel and return its id; called by ``/api/kernels`` and for sessions.

        ``chosen_env`` are variables that the caller asked for, ``env`` is an application's environment of which the
        profile lets some through.
        """
        chosen = dict(options.pop("chosen_env", None) or {})
        name = options.get("kernel_name")
        profile = self._profile_of(name)
        if profile is None:
            if chosen:
                options["env"] = {**(options.get("env") or {}), **chosen}
            place = ApiPath(path) if path is not None else None
            started: str = await super().start_kernel(kernel_id=kernel_id, path=place, **options)
            return started
        if kernel_id is not None and kernel_id in self:
            raise DuplicateKernelError(f"Kernel already exists: {kernel_id}")
        kernel_id, caller = kernel_id or str(uuid.uuid4()), current_caller()
        offered = {str(key): str(value) for key, value in (options.get("env") or {}).items()}
        wanted = Wanted(
            profile=profile,
            environment=chosen,
            offered=offered,
            name=str(offered.get("JPY_SESSION_NAME", "")),
            id=kernel_id,
            directory=self.folder(path),
        )
        try:
            with telling(self.bridge, caller.name, kernel_id, wanted.name) as tell:

                def progress(step: Progress) -> None:
                    if step.message:
                        self.log.info("%s", step.message)
                    tell(step)

                record = await self.gateway.create(caller, wanted, progress)
        except SandboxGatewayError as error:
            if error.code == "id_taken":
                # Of one that has ended, or is being made: in the same words, for whoever asks.
                raise DuplicateKernelError(f"Kernel already exists: {kernel_id}") from error
            raise http_error(error) from error
        made = self._ours(record.id)
        if made is not None:  # not ended meanwhile
            self.last_kernel_activity = made.last_activity
            made.tell("start", f"Kernel {record.id} was started.")
        return record.id

    def folder(self, path: str | None) -> Path | None:
        """Where a kernel of the notebook of this path starts; nowhere on a gateway, which has no notebooks."""
        if self.gateway.settings.headless:
            return None
        return Path(self.cwd_for_path(path) if path is not None else self.root_dir)

    # Doing

    async def restart_kernel(self, kernel_id: str, now: bool = False) -> Any:  # type: ignore[override]
        """Start a kernel anew."""
        self._check_kernel_id(kernel_id)
        ours = self._ours(kernel_id)
        if ours is None:
            return await super().restart_kernel(kernel_id, now=now)
        try:
            await ours.restart_kernel(now=now)
        except SandboxGatewayError as error:
            raise http_error(error) from error
        return None

    async def interrupt_kernel(self, kernel_id: str) -> None:  # type: ignore[override]
        """Interrupt what a kernel runs."""
        self._check_kernel_id(kernel_id)
        ours = self._ours(kernel_id)
        if ours is None:
            await ensure_async(super().interrupt_kernel(kernel_id))
            return
        try:
            await ours.interrupt_kernel()
        except SandboxGatewayError as error:
            raise http_error(error) from error

    async def shutdown_kernel(self, kernel_id: str, now: bool = False, restart: bool = False) -> None:  # type: ignore[override]
        """End a kernel."""
        self._check_kernel_id(kernel_id)
        ours = self._ours(kernel_id)
        if ours is None:
            await super().shutdown_kernel(kernel_id, now=now, restart=restart)
            return
        try:
            if restart:
                await ours.restart_kernel()
            else:
                await self.gateway.delete(current_caller(), kernel_id)
                ours.tell("shutdown", f"Kernel {kernel_id} was shutdown.")
        except SandboxGatewayError as error:
            raise http_error(error) from error

    async def shutdown_all(self, now: bool = False) -> None:  # type: ignore[override]
        """The server ends: sandboxes are left as they are to be left, other kernels end."""
        connections = getattr(self.parent, "kernel_websocket_connection_class", None)
        if connections is not None and hasattr(connections, "close_all"):
            await connections.close_all()
        await self.gateway.close()
        for kernel_id in [found for found in self._kernels if self._ours(found) is not None]:
            del self._kernels[kernel_id]
        if self._kernels:
            # With none a stock server does not ask for it either, and it fails at kernels that never started.
            await super()._async_shutdown_all(now=now)

    async def cull_kernel_if_idle(self, kernel_id: str) -> None:
        """Sandboxes have an idle policy of their own (DESIGN 4.11), which ends nothing silently."""
        if self._ours(kernel_id) is None:
            await super().cull_kernel_if_idle(kernel_id)

    def start_watching_activity(self, kernel_id: str) -> None:
        """Only for kernels that are not ours: the hub sees every message anyway."""
        if self._ours(kernel_id) is None:
            super().start_watching_activity(kernel_id)

    def stop_watching_activity(self, kernel_id: str) -> None:
        """As above."""
        if self._ours(kernel_id) is None:
            super().stop_watching_activity(kernel_id)


def http_error(error: SandboxGatewayError) -> web.HTTPError:
    """An error of ours as jupyter_server's own handlers answer it: status, reason and advice."""
    answer = web.HTTPError(error.status, str(error), reason=error.message.splitlines()[0][:200])
    answer.__cause__ = error
    return answer


__all__ = ["NoSuchKernel", "SandboxMappingKernelManager", "current_caller", "http_error"]
