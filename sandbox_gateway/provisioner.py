"""The jupyter_client adapter: a kernel provisioner whose kernels run in sandboxes.

The contract is ``jupyter_client.provisioning.KernelProvisionerBase``; each method names its caller there. All work
happens on the process's background loop (DESIGN 4.15), since a synchronous ``KernelManager`` turns an event loop only
during its calls; what is here only hands over.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning.provisioner_base import KernelProvisionerBase
from jupyter_core.paths import jupyter_runtime_dir
from traitlets import Unicode

from sandbox_gateway import guard
from sandbox_gateway.background import background_loop
from sandbox_gateway.embedded import SandboxedKernel
from sandbox_gateway.model import KernelSpec
from sandbox_gateway.profiles import DEFAULT_PROFILE
from sandbox_gateway.provisioning import check_encryption, signing_key

CONTROL_GRACE = 1.0
"""Seconds between SIGTERM and SIGKILL in :meth:`SandboxProvisioner.terminate`; the caller waits and kills itself."""


class SandboxProvisioner(KernelProvisionerBase):
    """Runs the kernel of a kernelspec in a sandbox of a profile.

    Kernelspecs name it in ``metadata.kernel_provisioner`` as ``sandbox``; ``config`` may hold the traits below.
    """

    profile = Unicode(DEFAULT_PROFILE, config=True, help="Name of the profile in the profiles file.")

    _kernel: SandboxedKernel | None = None
    _launched = False

    @property
    def has_process(self) -> bool:
        """Whether there is a kernel to manage; asked by ``KernelManager.has_kernel``."""
        return self._launched

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Called by ``KernelManager.pre_start_kernel``. The environment given is only a source for the allow-list."""
        check_encryption(self.parent)
        offered = dict(kwargs.pop("env", None) or os.environ)
        extra_arguments = list(kwargs.pop("extra_arguments", None) or [])
        kwargs.pop("kernel_id", None)
        spec = KernelSpec(
            argv=(*guard.unwrap(self.kernel_spec.argv), *extra_arguments),
            environment={str(name): str(value) for name, value in (self.kernel_spec.env or {}).items()},
            interrupt_mode=self.kernel_spec.interrupt_mode,
        )
        return await super().pre_launch(
            cmd=list(spec.argv),
            env={},
            sandbox_spec=spec,
            sandbox_key=signing_key(self.parent, self.connection_info),
            sandbox_environment=offered,
            **kwargs,
        )

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Called by ``KernelManager.launch_kernel``, for starts and restarts alike."""
        if self._kernel is None:
            self._kernel = SandboxedKernel(str(self.kernel_id), str(self.profile), key=kwargs["sandbox_key"])
        info = await background_loop().call(
            self._kernel.launch(
                kwargs["sandbox_spec"],
                private=(Path(jupyter_runtime_dir()),),
                directory=_folder(kwargs.get("cwd")),
                client_environment=kwargs["sandbox_environment"],
                name=str(kwargs["sandbox_environment"].get("JPY_SESSION_NAME", "")),
                progress=lambda text: self.log.info("%s", text),
            )
        )
        self.connection_info = info
        self._launched = True
        return self.connection_info

    async def poll(self) -> int | None:
        """Called every 3 s by the restarter: None while the kernel lives."""
        return self._kernel.poll() if self._kernel is not None and self._launched else 0

    async def wait(self) -> int | None:
        """Called by ``KernelManager.finish_shutdown`` and ``kill_kernel``."""
        if self._kernel is None or not self._launched:
            return 0
        code = await background_loop().call(self._kernel.wait())
        self._launched = False
        return code

    async def send_signal(self, signum: int) -> None:
        """Called by ``KernelManager.signal_kernel``; goes to the kernel's process group inside."""
        if self._kernel is not None and self._launched and signum != 0:
            await background_loop().call(self._kernel.signal(signum))

    async def kill(self, restart: bool = False) -> None:
        """Called by ``KernelManager.kill_kernel``."""
        if self._kernel is not None and self._launched:
            await background_loop().call(self._kernel.stop(0.0))

    async def terminate(self, restart: bool = False) -> None:
        """Called by ``KernelManager.finish_shutdown`` when the kernel ignores the shutdown message."""
        await self.send_signal(signal.SIGTERM)

    async def cleanup(self, restart: bool = False) -> None:
        """Called by ``KernelManager.cleanup_resources``. A restart keeps the sandbox and its files."""
        if self._kernel is not None and not restart:
            kernel, self._kernel = self._kernel, None
            self._launched = False
            await background_loop().call(kernel.close())

    async def shutdown_requested(self, restart: bool = False) -> None:
        """Called by ``KernelManager.request_shutdown``: the message itself goes over the control channel."""
        if self._kernel is not None:
            self._kernel.expect_exit()

    async def get_provisioner_info(self) -> dict[str, Any]:
        """What a persisted manager needs; called by ``KernelManager`` subclasses that save state."""
        info: dict[str, Any] = await super().get_provisioner_info()
        info["profile"] = self.profile
        return info


def _folder(cwd: str | None) -> Path:
    """The notebook's directory: what the application names, else its own working directory."""
    return Path(cwd).absolute() if cwd else Path.cwd()
