"""What both provisioners, for sandboxes here and for those on a gateway, take from their kernel manager."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from sandbox_gateway.errors import SandboxGatewayError


def signing_key(manager: Any, connection_info: Mapping[str, Any]) -> bytes:
    """The key that messages are signed with: that of a kernel started before, else the manager's, else a new one."""
    if manager is not None and not connection_info:
        key = getattr(getattr(manager, "session", None), "key", b"")
    else:
        key = connection_info.get("key", b"")
    return key or secrets.token_hex(32).encode()


def check_encryption(manager: Any) -> None:
    """Raise ``unsupported`` where the application requires encrypted sockets (jupyter_client's
    ``KernelManager.transport_encryption``): a kernel that is said to need them must not start without."""
    if str(getattr(manager, "transport_encryption", "disabled")).lower() == "required":
        raise SandboxGatewayError(
            "unsupported",
            "transport_encryption is 'required', and a sandboxed kernel's sockets are not encrypted",
            "These sockets do not leave this machine. Set transport_encryption to 'auto' or 'disabled'.",
        )
