"""What an administrator has set for one server, as plain values: :mod:`sandbox_gateway.server.config` reads them."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandbox_gateway.model import OnOwnerExit, WorkspaceMode
from sandbox_gateway.profiles import DEFAULT_PROFILE, Profile
from sandbox_gateway.quotas import Quota


@dataclass(frozen=True, slots=True)
class Settings:
    """Checked values."""

    headless: bool = False
    """Whether nothing but kernels is served, to people who may not see this machine's files."""
    default_profile: str = DEFAULT_PROFILE
    """What ``python`` and ``python3``, or no name at all, mean."""
    profiles: tuple[str, ...] = ()
    """Names of the profiles that are offered; empty: all that can be."""
    environment: tuple[str, ...] = ("*",)
    """Names, or patterns, of variables that callers may choose for their kernels."""
    on_stop: OnOwnerExit | None = None
    """What becomes of kernels when the server ends; None: what their profile says."""
    workspaces: Path | None = None
    """Where each owner's folder is, for profiles with a workspace; None: the folder that Jupyter names."""
    autorestart: bool = True
    """Whether a kernel process that ends by itself is started again in its sandbox."""
    quota: Quota = field(default_factory=Quota)
    """What each owner may have, unless it is said otherwise for him."""
    private: tuple[Path, ...] = ()
    """Directories that never show inside, whatever is mounted."""
    hub: Mapping[str, Any] = field(default_factory=dict)
    """Bounds of the WebSocket sessions (:class:`sandbox_gateway.server.hub.HubSettings`)."""

    def offers(self, profile: Profile) -> bool:
        """Whether callers may start a profile here. A folder of this machine is opened to nobody from outside."""
        if self.profiles and profile.name not in self.profiles:
            return False
        return not self.headless or profile.workspace is WorkspaceMode.NONE or self.workspaces is not None

    def allows(self, variable: str) -> bool:
        """Whether callers may choose this variable."""
        return any(fnmatch.fnmatchcase(variable, pattern) for pattern in self.environment)
