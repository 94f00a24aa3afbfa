"""The one error family and its table: code -> HTTP status -> text.

Every error a user can meet carries a stable ``code`` (machine readable), a ``message`` (what happened, one line)
and a ``hint`` (what to do next). The table is the contract: a code that is not in it cannot be raised.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """One row of the error table."""

    status: int
    """HTTP status the gateway answers with (RFC 9110)."""
    title: str
    """What the code means, in a few words; never changes for a code."""
    hint: str
    """The default advice; an error may carry a better one."""


ERRORS: Mapping[str, ErrorRow] = MappingProxyType(
    {
        "internal": ErrorRow(500, "Internal error", "This is a bug: please report it with the log."),
        "invalid_profile": ErrorRow(400, "Invalid profile", "Correct the profile file; the schema is in the docs."),
        "unknown_profile": ErrorRow(404, "Unknown profile", "`jupyter sandbox install --list` shows the profiles."),
        "invalid_request": ErrorRow(400, "Invalid request", "Correct the named value and try again."),
        "unknown_sandbox": ErrorRow(404, "Unknown sandbox", "`jupyter sandbox ps` lists the sandboxes."),
        "ambiguous_id": ErrorRow(409, "Ambiguous id", "Give more characters of the id."),
        "id_taken": ErrorRow(409, "Id is taken", "Choose another id, or leave it out."),
        "illegal_transition": ErrorRow(409, "Not possible in this state", "`jupyter sandbox ps` shows the state."),
        "runtime_missing": ErrorRow(503, "Runtime missing", "Run `jupyter sandbox setup`."),
        "runtime_too_old": ErrorRow(503, "Runtime too old", "Run `jupyter sandbox setup` to get the pinned one."),
        "runtime_failed": ErrorRow(500, "Runtime failed", "`jupyter sandbox doctor` tells what works on this machine."),
        "unsupported": ErrorRow(501, "Not supported here", "`jupyter sandbox doctor` tells what works and why not."),
        "limit_unsupported": ErrorRow(
            501, "Limit cannot be enforced here", "Run as root, get a delegated cgroup, or leave the limit out."
        ),
        "image_failed": ErrorRow(500, "Image could not be built", "`jupyter sandbox image build` shows the details."),
        "image_source": ErrorRow(400, "Unusable image source", "Name a Python interpreter or a root directory."),
        "store_failed": ErrorRow(500, "Store failed", "Check that the data directory can be written."),
        "store_too_new": ErrorRow(500, "Store is newer than this program", "Upgrade sandbox_gateway."),
        "data_directory": ErrorRow(500, "Unusable data directory", "Point SANDBOX_GATEWAY_HOME at a local folder."),
        "disk_full": ErrorRow(507, "Disk full", "Free some space (`jupyter sandbox prune`)."),
        "owned_elsewhere": ErrorRow(409, "Owned by another process", "Ask that process, or stop it first."),
        "owner_unreachable": ErrorRow(503, "The owner does not answer", "Try again, or end the process `ps` names."),
        "setup_failed": ErrorRow(500, "Set-up failed", "`jupyter sandbox doctor` tells what is missing."),
        "link_failed": ErrorRow(502, "The sandbox does not speak", "Look at `jupyter sandbox logs`; then remove it."),
        "kernel_failed": ErrorRow(502, "The kernel could not start", "Look at `jupyter sandbox logs`."),
        "kernel_died": ErrorRow(502, "The kernel died", "`jupyter sandbox logs` may say more; start it again."),
        "unknown_snapshot": ErrorRow(404, "Unknown snapshot", "`jupyter sandbox snapshot ls` lists the snapshots."),
        "snapshot_damaged": ErrorRow(
            422, "Snapshot is damaged", "It cannot be used any more; `jupyter sandbox snapshot rm` removes it."
        ),
        "snapshot_unfit": ErrorRow(409, "Snapshot does not fit this machine", "Restore it where it was made."),
        "snapshot_in_use": ErrorRow(409, "Snapshot is in use", "Remove what is suspended in it first."),
        "snapshot_failed": ErrorRow(500, "Snapshot could not be made", "The kernel runs on; try again."),
        "restore_failed": ErrorRow(500, "Restore failed", "The snapshot is kept; try again."),
        "workspace_changed": ErrorRow(
            409,
            "A file that the kernel has open was changed",
            "Put the file back as it was, or restart the kernel: its variables and files are lost then.",
        ),
        "identity_failed": ErrorRow(500, "A clone could not be given its identity", "Try again; see the logs."),
        "template_failed": ErrorRow(500, "Template could not be built", "`jupyter sandbox template build` says why."),
        "expired": ErrorRow(410, "Expired", "Its idle time was over; `jupyter sandbox ps --all` shows when."),
        "unauthenticated": ErrorRow(401, "Not authenticated", "Send a token: `Authorization: Bearer <token>`."),
        "forbidden": ErrorRow(403, "Not allowed", "Ask an administrator of this gateway."),
        "over_quota": ErrorRow(403, "Over quota", "Suspend or delete some of your sandboxes, or ask for more."),
        "rate_limited": ErrorRow(429, "Too many at once", "Wait a minute and try again."),
        "not_found": ErrorRow(404, "No such address", "The description of the API is at /api/sandboxes/openapi.yaml."),
        "unknown_operation": ErrorRow(404, "Unknown operation", "Operations are kept for 10 minutes after their end."),
        "method_not_allowed": ErrorRow(405, "Method not allowed here", "The answer's Allow header names what is."),
        "too_large": ErrorRow(413, "Request too large", "Send less."),
        "media_type": ErrorRow(415, "Not JSON", "Send JSON, with `Content-Type: application/json`."),
        "gateway_unreachable": ErrorRow(
            502, "The gateway cannot be reached", "Check its address, and that it runs: GET /api/status answers then."
        ),
        "gateway_refused": ErrorRow(
            502,
            "The gateway refuses this server",
            "Give JupyterLab a valid token of the gateway (JUPYTER_GATEWAY_AUTH_TOKEN), and start it again.",
        ),
        "timeout": ErrorRow(504, "Timed out", "The machine may be busy: try again."),
    }
)


class SandboxGatewayError(Exception):
    """Base of all errors that users see.

    ``code`` is a key of :data:`ERRORS`; ``hint`` defaults to the row's own.
    """

    def __init__(self, code: str, message: str, hint: str | None = None) -> None:
        if code not in ERRORS:
            raise ValueError(f"unknown error code {code!r}")
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint if hint is not None else ERRORS[code].hint

    @property
    def status(self) -> int:
        """The HTTP status of this error's row."""
        return ERRORS[self.code].status

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def as_dict(self) -> dict[str, Any]:
        """The error as JSON: ``code``, ``message``, ``hint``."""
        return {"code": self.code, "message": self.message, "hint": self.hint}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SandboxGatewayError:
        """Rebuild an error that crossed a process boundary; an unknown code becomes ``internal``."""
        code = data.get("code")
        known = code if isinstance(code, str) and code in ERRORS else "internal"
        hint = data.get("hint")
        return cls(known, str(data.get("message", "unknown error")), hint if isinstance(hint, str) else None)


class InvalidField(SandboxGatewayError):
    """``invalid_request`` for one named value."""

    def __init__(self, field: str, message: str, hint: str | None = None) -> None:
        """``field`` is dotted, as in ``resources.memory``."""
        super().__init__("invalid_request", f"{field}: {message}" if field else message, hint)
        self.field = field

    def as_dict(self) -> dict[str, Any]:
        """The error as JSON, with ``field``."""
        return {**super().as_dict(), "field": self.field}


_FULL = (errno.ENOSPC, errno.EDQUOT)


def storage_error(error: OSError, what: str) -> SandboxGatewayError:
    """The error of a file operation of ours: ``disk_full``, else ``data_directory``; ``what`` says what failed."""
    if error.errno in _FULL:
        return SandboxGatewayError("disk_full", f"no space left: {what}")
    return SandboxGatewayError("data_directory", f"{what}: {error.strerror or error}")


def program_error(code: str, message: str) -> SandboxGatewayError:
    """The error of another program that failed with ``message``: ``disk_full`` where that is its reason."""
    full = any(os.strerror(number).lower() in message.lower() for number in _FULL)
    return SandboxGatewayError("disk_full" if full else code, message)
