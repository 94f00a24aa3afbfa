"""What a kernel said about itself, for answering while it sleeps: its last ``kernel_info_reply``, and what it runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sandbox_gateway import messages
from sandbox_gateway.messages import Buffer

MAX_INFO: Final = 64 << 10
"""Bytes of a kernel_info_reply's content that are kept; real ones have one or two thousand."""
MAX_RUNNING: Final = 64
"""Requests that count as running at once; a kernel with subshells has a few."""
_MAX_PARENT = 16 << 10
_MAX_STATUS = 4 << 10


class KernelCache:
    """Fed with the kernel's messages; what it says is as hostile as they are, and no more than bytes to pass on."""

    def __init__(self) -> None:
        self._info: bytes | None = None
        self._running: dict[bytes, None] = {}

    @property
    def info(self) -> bytes | None:
        """The content of the last ``kernel_info_reply``: the raw JSON of an object."""
        return self._info

    @property
    def running(self) -> bytes | None:
        """The raw header of the request that runs (the last one that began); None: the kernel is idle."""
        return next(reversed(self._running), None)

    def saw_reply(self, parts: Sequence[Buffer]) -> None:
        """Take a message of the shell or control channel."""
        at = messages.delimiter_index(parts)
        if at is None or len(parts[at + 2]) > _MAX_PARENT or b'"kernel_info_reply"' not in bytes(parts[at + 2]):
            return
        content = bytes(parts[at + 5][: MAX_INFO + 1])
        if content == self._info:
            return
        found = _object(content, MAX_INFO)
        # Kernels of protocol 5.0 send no status here.
        if found is not None and found.get("status", "ok") == "ok":
            self._info = content

    def saw_status(self, parent: Buffer, content: Buffer) -> None:
        """Take a status of the iopub channel: the raw parent header and content."""
        found = _object(content, _MAX_STATUS)
        state = found.get("execution_state") if found is not None else None
        if state == "busy":
            if len(parent) <= _MAX_PARENT and len(self._running) < MAX_RUNNING:
                self._running[bytes(parent)] = None
        elif state == "idle":
            self._running.pop(bytes(parent[:_MAX_PARENT]), None)
        elif state in ("starting", "restarting", "dead"):
            self._running.clear()

    def restarted(self) -> None:
        """The kernel process is gone: nothing of its requests runs any more."""
        self._running.clear()

    def facts(self) -> dict[str, Any]:
        """As JSON, for the next owner of a kernel that sleeps."""
        return {
            "kernel_info": self._info.decode() if self._info is not None else None,
            "running": [parent.decode(errors="replace") for parent in self._running],
        }

    def recall(self, facts: Mapping[str, Any]) -> None:
        """Take over what :meth:`facts` told another owner. What is malformed is passed over."""
        info = facts.get("kernel_info")
        if isinstance(info, str) and _object(info.encode(errors="replace"), MAX_INFO) is not None:
            self._info = info.encode()
        running = facts.get("running")
        for parent in running[:MAX_RUNNING] if isinstance(running, list) else ():
            if isinstance(parent, str) and _object(parent.encode(errors="replace"), _MAX_PARENT) is not None:
                self._running[parent.encode()] = None


def _object(raw: Buffer, limit: int) -> dict[str, Any] | None:
    """``raw`` as a JSON object in UTF-8; None when it is none, or longer than ``limit`` bytes."""
    if len(raw) > limit:
        return None
    try:
        found = json.loads(bytes(raw).decode())
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
