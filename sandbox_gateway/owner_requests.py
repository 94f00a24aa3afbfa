"""What other processes ask the owner of a sandbox for, over its socket (DESIGN 4.8)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.live import LiveSandbox
from sandbox_gateway.model import Death, DeathKind
from sandbox_gateway.snapshots import Kind


async def carry_out(
    op: str, sandbox: LiveSandbox, params: Mapping[str, Any], hand_over: Callable[[str], Awaitable[None]]
) -> dict[str, Any] | None:
    """Do what was asked; returns what it was asked for, None for what only changes the sandbox's state.

    Raises ``invalid_request`` for an unknown ``op``, and as the methods of the sandbox do.
    """
    reason = str(params.get("reason") or "")
    match op:
        case "stop":
            await sandbox.destroy(Death(DeathKind.STOPPED, reason or "stopped by `jupyter sandbox stop`"))
            if sandbox.left:
                raise SandboxGatewayError("unknown_sandbox", f"sandbox {sandbox.id} was handed over at this moment")
        case "suspend":
            await sandbox.suspend(reason or "by `jupyter sandbox suspend`")
        case "resume":
            await sandbox.resume()
        case "pause":
            await sandbox.pause()
        case "hand_over":
            await hand_over(sandbox.id)
        case "save":
            kind = Kind.FORK if params.get("kind") == "fork" else Kind.SAVED
            return {"snapshot": (await sandbox.save(kind, str(params.get("name") or ""))).id}
        case "connect":
            return {"connection_file": str(sandbox.seat.bridge().connection_file)}
        case "log":
            return {"log": (await sandbox.log()).decode(errors="replace")}
        case "stats":
            stats = await sandbox.stats()
            return {"memory": stats.memory, "cpu_seconds": stats.cpu_seconds, "processes": stats.processes}
        case _:
            raise SandboxGatewayError("invalid_request", f"unknown request {op!r}")
    return None
