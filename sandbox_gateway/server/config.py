"""The one configurable of the product: what an administrator sets for a server, by command line or Jupyter's config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jupyter_core.paths import jupyter_runtime_dir
from traitlets import Bool, CaselessStrEnum, Dict, Integer, List, TraitError, Unicode, validate
from traitlets.config import LoggingConfigurable

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.model import OnOwnerExit
from sandbox_gateway.profiles import DEFAULT_PROFILE
from sandbox_gateway.quotas import Quota
from sandbox_gateway.server.settings import Settings


class SandboxGateway(LoggingConfigurable):
    """Sandboxed kernels in a Jupyter server. ``--SandboxGateway.<name>=<value>`` sets one of these."""

    headless = Bool(False, help="Nothing but kernels is served; `jupyter sandbox serve` sets it.", config=True)

    default_profile = Unicode(
        DEFAULT_PROFILE, config=True, help="The profile of who names none, `python` or `python3`."
    )

    profiles = List(Unicode(), config=True, help="Names of the profiles that are offered; all, if none is named.")

    environment = List(
        Unicode(),
        ["*"],
        config=True,
        help="Names, or patterns, of variables that callers may choose for their kernels.",
    )

    on_stop = CaselessStrEnum(
        ["profile", *map(str, OnOwnerExit)],
        "profile",
        config=True,
        help="What becomes of kernels when the server ends: `keep` (they run on), `suspend`, `terminate`, or what "
        "their profile says. `jupyter sandbox serve` keeps them.",
    )

    workspaces = Unicode(
        "",
        config=True,
        help="A folder in which each owner has one of his own, opened to kernels whose profile has a workspace. "
        "Without it a headless gateway offers no such profile.",
    )

    autorestart = Bool(True, config=True, help="Start a kernel process that ended by itself again, in its sandbox.")

    quota = Dict(
        config=True,
        help="What each owner may have at most: live, suspended, gpus and creates_per_minute (numbers), memory and "
        "disk (bytes, or as '4GiB').",
    )

    queue_limit = Integer(256 << 20, config=True, help="Bytes of output that wait for one WebSocket client at most.")

    replay_limit = Integer(8 << 20, config=True, help="Bytes of output that are kept for clients who come later.")

    session_timeout = Integer(600, config=True, help="Seconds that a client which lost its connection is waited for.")

    log_json = Bool(
        False, help="Write the server's log as JSON lines, with the sandbox's id where it is known.", config=True
    )

    @validate("workspaces")
    def _absolute(self, proposal: Any) -> str:
        value = str(proposal["value"])
        if value and not Path(value).expanduser().is_absolute():
            raise TraitError(f"SandboxGateway.workspaces has to be an absolute path, not {value!r}")
        return value

    def settings(self) -> Settings:
        """As plain values. Raises TraitError with what is wrong."""
        try:
            quota = Quota.read(self.quota)
        except SandboxGatewayError as error:
            raise TraitError(f"SandboxGateway.quota: {error.message}") from error
        return Settings(
            headless=self.headless,
            default_profile=self.default_profile,
            profiles=tuple(self.profiles),
            environment=tuple(self.environment),
            on_stop=None if self.on_stop == "profile" else OnOwnerExit(self.on_stop),
            workspaces=Path(self.workspaces).expanduser() if self.workspaces else None,
            autorestart=self.autorestart,
            quota=quota,
            private=(Path(jupyter_runtime_dir()),),
            hub={
                "queue_limit": self.queue_limit,
                "replay_limit": self.replay_limit,
                "session_timeout": self.session_timeout,
            },
        )

    def quota_of(self, owner: str) -> Quota | None:
        """What is said for one owner, by the identity provider that knows users; None: nothing."""
        provider = getattr(self.parent, "identity_provider", None)
        found = provider.quota_of(owner) if provider is not None and hasattr(provider, "quota_of") else None
        return found if isinstance(found, Quota) else None
