"""Errors as problem details (RFC 9457), with this project's ``code``, ``message`` and ``hint``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sandbox_gateway.errors import ERRORS, SandboxGatewayError

MEDIA_TYPE: Final = "application/problem+json"
_TYPE: Final = "urn:sandbox-gateway:error:"
_CODES: Mapping[int, str] = {
    401: "unauthenticated",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    415: "media_type",
}
"""What an HTTP status means that comes from below us: from tornado or jupyter_server."""


_HINTS: Mapping[str, str] = {
    "unknown_sandbox": "`GET /api/sandboxes` lists them.",
    "unknown_snapshot": "`GET /api/snapshots` lists them.",
    "unknown_profile": "`GET /api/profiles` lists them.",
    "illegal_transition": "`GET /api/sandboxes/{id}` tells its state.",
    "expired": "Make another one; `?state=expired` lists those that are over.",
    "kernel_died": "`POST /api/sandboxes/{id}/restart` starts it again; its `/logs` may say why.",
    "kernel_failed": "The sandbox's `/logs` may say why.",
    "snapshot_damaged": "It cannot be used any more; remove it.",
    "over_quota": "Delete or suspend some of your sandboxes.",
}
"""What to do next, for who has no command line here; only where an error has no better advice of its own."""


def problem(error: SandboxGatewayError, status: int | None = None) -> dict[str, Any]:
    """The body that tells of ``error``; ``status`` where the answer has another one than the error's."""
    return {
        "type": _TYPE + error.code,
        "title": ERRORS[error.code].title,
        "status": error.status if status is None else status,
        "detail": error.message,
        **error.as_dict(),
        "hint": hint_of(error),
    }


def hint_of(error: SandboxGatewayError) -> str | None:
    """What to do next, in the words of the REST routes."""
    own = error.hint and error.hint != ERRORS[error.code].hint
    return error.hint if own else _HINTS.get(error.code, error.hint)


def of_http(status: int, message: str) -> SandboxGatewayError:
    """The error that an HTTP status from below us is."""
    code = _CODES.get(status, "internal" if status >= 500 else "invalid_request")
    return SandboxGatewayError(code, message or ERRORS[code].title)
