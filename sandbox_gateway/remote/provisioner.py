"""The jupyter_client adapter of the remote runtime: a kernel provisioner whose kernels run on a gateway.

The contract is ``jupyter_client.provisioning.KernelProvisionerBase``; each method names its caller there. All work
happens on the process's background loop (DESIGN 4.15); what is here only hands over.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterable, Mapping
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning.provisioner_base import KernelProvisionerBase
from traitlets import Enum, Float, List, Unicode

from sandbox_gateway.background import background_loop
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.provisioning import check_encryption, signing_key
from sandbox_gateway.remote.address import parse
from sandbox_gateway.remote.kernel import RemoteKernel
from sandbox_gateway.remote.session import PATIENCE

_RESERVED = frozenset({"JPY_PARENT_PID", "SANDBOX_ID"})


class RemoteSandboxProvisioner(KernelProvisionerBase):
    """Runs the kernel of a kernelspec on a gateway.

    Kernelspecs name it in ``metadata.kernel_provisioner`` as ``sandbox-remote``; ``config`` holds ``gateway`` and
    ``profile``, and may hold the other traits. The token is kept elsewhere
    (:mod:`sandbox_gateway.remote.credentials`).
    """

    gateway = Unicode("", config=True, help="The gateway's address, https://host:port/path.")
    profile = Unicode("", config=True, help="Name of a profile there; empty: the gateway's default.")
    ca_file = Unicode("", config=True, help="Certificates (PEM) to trust in place of the system's.")
    variables = List(
        Unicode(), config=True, help="Names of variables of this application that the kernel gets, if they are set."
    )
    transport = Enum(
        ("", "ipc", "tcp"), "", config=True, help="How local clients connect; empty: ipc where there is any, else tcp."
    )
    patience = Float(
        PATIENCE, config=True, help="Seconds that the gateway may be out of reach before a kernel is dead."
    )

    _kernel: RemoteKernel | None = None
    _launched = False

    @property
    def has_process(self) -> bool:
        """Whether there is a kernel to manage; asked by ``KernelManager.has_kernel``."""
        return self._launched

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Called by ``KernelManager.pre_start_kernel``. The environment given is only a source for the allow-list."""
        check_encryption(self.parent)
        offered = dict(kwargs.pop("env", None) or os.environ)
        kwargs.pop("extra_arguments", None)
        kwargs.pop("kernel_id", None)
        environment = chosen(offered, self.variables, self.kernel_spec.env or {})
        return await super().pre_launch(
            cmd=["sandbox-remote"],
            env={},
            sandbox_key=signing_key(self.parent, self.connection_info),
            sandbox_environment=environment,
            sandbox_name=re.split(r"[/\\]", str(offered.get("JPY_SESSION_NAME", "")))[-1],
            **kwargs,
        )

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Called by ``KernelManager.launch_kernel``, for starts and restarts alike."""
        if not self.gateway:
            text = "this kernelspec names no gateway"
            raise SandboxGatewayError(
                "invalid_request", text, "`jupyter sandbox install --gateway URL` writes it anew."
            )
        self.connection_info = await background_loop().call(self._launch(kwargs))
        self._launched = True
        return self.connection_info

    async def _launch(self, kwargs: Mapping[str, Any]) -> Any:
        if self._kernel is None:
            self._kernel = RemoteKernel(
                str(self.kernel_id),
                parse(self.gateway, self.ca_file),
                self.profile,
                key=kwargs["sandbox_key"],
                transport=self.transport or "",
                patience=self.patience,
            )
        return await self._kernel.launch(
            kwargs["sandbox_environment"], kwargs["sandbox_name"], lambda text: self.log.info("%s", text)
        )

    async def poll(self) -> int | None:
        """Called every 3 s by the restarter: None while the kernel lives, suspended or not."""
        return self._kernel.poll() if self._kernel is not None and self._launched else 0

    async def wait(self) -> int | None:
        """Called by ``KernelManager.finish_shutdown`` and ``kill_kernel``."""
        if self._kernel is None or not self._launched:
            return 0
        code = await background_loop().call(self._kernel.wait())
        self._launched = False
        return code

    async def send_signal(self, signum: int) -> None:
        """Called by ``KernelManager.signal_kernel``, which every shutdown does too: that needs no interrupt there."""
        if self._kernel is None or not self._launched or signum == 0:
            return
        if signum == signal.SIGINT and getattr(self.parent, "shutting_down", False):
            return
        await background_loop().call(self._kernel.signal(signum))

    async def kill(self, restart: bool = False) -> None:
        """Called by ``KernelManager.kill_kernel``; what ends the remote kernel is the restart or cleanup after it."""
        if self._kernel is not None and self._launched:
            self._on_loop(self._kernel.stop)

    async def terminate(self, restart: bool = False) -> None:
        """Called by ``KernelManager.finish_shutdown`` when the kernel ignores the shutdown message."""
        await self.send_signal(signal.SIGTERM)

    async def cleanup(self, restart: bool = False) -> None:
        """Called by ``KernelManager.cleanup_resources``. A restart keeps the sandbox and its files."""
        if self._kernel is not None and not restart:
            kernel, self._kernel = self._kernel, None
            self._launched = False
            await background_loop().call(kernel.close())

    async def get_provisioner_info(self) -> dict[str, Any]:
        """What a persisted manager needs; called by ``KernelManager`` subclasses that save state."""
        info: dict[str, Any] = await super().get_provisioner_info()
        sandbox = self._kernel.sandbox_id if self._kernel is not None else ""
        return {**info, "gateway": self.gateway, "profile": self.profile, "sandbox": sandbox}

    @staticmethod
    def _on_loop(call: Any) -> None:
        background_loop().loop.call_soon_threadsafe(call)


def chosen(offered: Mapping[str, str], names: Iterable[str], own: Mapping[str, str]) -> dict[str, str]:
    """The variables that go to a gateway: what the kernelspec sets, what it names, and ``KERNEL_*``; nothing else of
    this machine."""
    wanted = frozenset(names)
    found = {name: value for name, value in offered.items() if name in wanted or name.startswith("KERNEL_")}
    found |= {str(name): str(value) for name, value in own.items()}
    return {name: value for name, value in found.items() if name not in _RESERVED}
