"""Who asks: the user of a request, as the gateway sees him."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_OWNER = "default"
"""The one owner of a gateway with a single shared token, or of a local JupyterLab."""


@dataclass(frozen=True, slots=True)
class Caller:
    """A user who was authenticated."""

    name: str
    """The owner of what he makes."""
    admin: bool = False
    """Whether everybody's sandboxes are his to see and to end."""
    groups: tuple[str, ...] = ()

    def may_use(self, owner: str) -> bool:
        """Whether a sandbox or snapshot of ``owner`` is his to see and to change."""
        return self.admin or self.name == owner


EVERYBODY = Caller(DEFAULT_OWNER, admin=True)
"""Who asks where there is no request, as at the start and the end of the server."""
