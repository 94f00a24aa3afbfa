"""``jupyter sandbox serve``: a jupyter_server that serves kernels in sandboxes and nothing else.

No terminals, contents, files, conversions or foreign extensions, which would hand out the machine. All options of
jupyter_server hold (``jupyter sandbox serve --help-all``).
"""

from __future__ import annotations

from typing import Any, Final, NoReturn

from jupyter_server.serverapp import ServerApp, aliases, flags
from jupyter_server.services.contents.manager import AsyncContentsManager
from tornado import web
from traitlets import Dict, default

import sandbox_gateway
from sandbox_gateway.profiles import DEFAULT_PROFILE
from sandbox_gateway.server.authorizer import GatewayAuthorizer
from sandbox_gateway.server.config import SandboxGateway
from sandbox_gateway.server.kernelspecs import ProfileKernelSpecManager

MODULE: Final = "sandbox_gateway.server"
USERS: Final = "sandbox_gateway.server.identity.TokenFileIdentityProvider"
MAX_BODY: Final = 32 << 20
"""Bytes of the body of a request."""
NOT_SERVED: Final = "this server has kernels only"


class NoContents(AsyncContentsManager):
    """jupyter_server wants a contents manager; this one has nothing, and routes lead to none."""

    async def get_kernel_path(self, path: str, model: Any = None) -> str:
        """Where a kernel of a notebook starts: nowhere on this machine."""
        return ""

    def get_extra_handlers(self) -> list[Any]:
        """No files."""
        return []

    def info_string(self) -> str:
        """What the server says of its files at the start."""
        return "Serving sandboxed kernels only"

    def _none(self, *args: Any, **options: Any) -> NoReturn:
        raise web.HTTPError(404, NOT_SERVED)

    get = save = delete_file = rename_file = is_hidden = file_exists = dir_exists = _none


class GatewayApp(ServerApp):
    """The headless gateway."""

    name = "jupyter-sandbox-serve"
    description = __doc__ or ""
    version = sandbox_gateway.__version__
    examples = """
jupyter sandbox serve --port 8888
JUPYTER_TOKEN=... jupyter sandbox serve --ip 0.0.0.0 --certfile cert.pem --keyfile key.pem
jupyter sandbox serve --SandboxGateway.default_profile=analysis
"""
    flags = Dict(
        {
            **flags,
            "users": (
                {"ServerApp": {"identity_provider_class": USERS}},
                "Several users with tokens of their own: `jupyter sandbox token add NAME` makes them.",
            ),
        }
    )
    aliases = Dict({**aliases, "default-profile": "SandboxGateway.default_profile"})
    classes = [*ServerApp.classes, SandboxGateway]  # noqa: RUF012
    default_services = (  # type: ignore[assignment]
        "api",
        "auth",
        "kernels",
        "kernelspecs",
        "security",
        "sessions",
        "events",
    )
    load_other_extensions = False

    @default("default_url")
    def _default_default_url(self) -> str:
        return "/api/status"

    def initialize(self, argv: Any = None, *arguments: Any, **options: Any) -> None:
        """As jupyter_server, without whatever is installed beside us."""
        config = self.config
        config.SandboxGateway.headless = True
        config.ServerApp.open_browser = False
        config.ServerApp.terminals_enabled = False
        self.jpserver_extensions = {MODULE: True}
        self.contents_manager_class = NoContents
        self.kernel_spec_manager_class = ProfileKernelSpecManager
        options["find_extensions"] = False
        super().initialize(argv, *arguments, **options)

    def init_configurables(self) -> None:
        """What the command line did not say, as a gateway wants it."""
        self.open_browser = False
        self.config.SandboxGateway.headless = True
        if "authorizer_class" not in self.config.ServerApp:
            self.authorizer_class = GatewayAuthorizer
        if "max_body_size" not in self.config.ServerApp:
            # tornado takes a body in before it is known who sends it; what is larger goes over WebSockets.
            self.max_body_size = MAX_BODY
        self.config.SandboxGateway.setdefault("on_stop", "keep")
        self.config.MappingKernelManager.setdefault(
            "default_kernel_name", self.config.SandboxGateway.get("default_profile", DEFAULT_PROFILE)
        )
        super().init_configurables()


main = GatewayApp.launch_instance
