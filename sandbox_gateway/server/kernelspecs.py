"""The kernelspecs of a headless gateway: the profiles that it offers, and nothing that is installed on the machine."""

from __future__ import annotations

from typing import Any

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager, NoSuchKernel
from traitlets import Instance

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths, discover
from sandbox_gateway.kernelspecs import LOGO_DIRECTORY, kernel_json
from sandbox_gateway.profiles import Profile, load_profiles
from sandbox_gateway.server.config import SandboxGateway
from sandbox_gateway.server.gateway import ALIASES
from sandbox_gateway.server.settings import Settings


class ProfileKernelSpecManager(KernelSpecManager):
    """Reads the profile file at each question, so that an offer may change while the server runs."""

    settings = Instance(Settings)
    paths = Instance(Paths)

    def _settings_default(self) -> Settings:
        return SandboxGateway(parent=self.parent).settings()

    def _paths_default(self) -> Paths:
        return discover()

    def _offers(self) -> dict[str, Profile]:
        try:
            loaded = load_profiles(self.paths)
        except SandboxGatewayError as error:
            self.log.error("%s", error)
            return {}
        return {name: profile for name, profile in loaded.items() if self.settings.offers(profile)}

    def find_kernel_specs(self) -> dict[str, str]:
        """Names, and where their logos are."""
        return dict.fromkeys(self._offers(), str(LOGO_DIRECTORY))

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """The kernelspec of a profile, also by the names that mean the default one."""
        offers = self._offers()
        name = self.settings.default_profile if kernel_name in ALIASES and kernel_name not in offers else kernel_name
        profile = offers.get(name)
        if profile is None:
            raise NoSuchKernel(kernel_name)
        return KernelSpec(resource_dir=str(LOGO_DIRECTORY), **_public(profile))

    def get_all_specs(self) -> dict[str, Any]:
        """Every offer, as ``/api/kernelspecs`` lists it."""
        return {
            name: {"resource_dir": str(LOGO_DIRECTORY), "spec": _public(profile)}
            for name, profile in self._offers().items()
        }


def _public(profile: Profile) -> dict[str, Any]:
    """A kernelspec for people who may not know where things are on this machine: the command is said in general."""
    command = profile.argv or ("python3", "-m", "ipykernel_launcher", "-f", "{connection_file}")
    return {**kernel_json(profile), "argv": list(command)}
