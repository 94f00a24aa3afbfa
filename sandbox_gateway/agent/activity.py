"""What the idle policy wants to know, from the messages that pass by: cheap, and never a reason to fail."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

from sandbox_gateway.agent import relay

WAKING: Final = frozenset(
    b"execute_request complete_request inspect_request comm_open comm_msg comm_close input_reply "
    b"interrupt_request".split()
)
"""Messages of clients that count as use of the kernel (DESIGN 4.10)."""
_TYPE: Final = re.compile(rb'"msg_type"\s*:\s*"([a-z_]+)"')
_MOST: Final = 1024
_LONGEST: Final = 65536


class Activity:
    """One kernel's: which requests it works on, when it was last used, and whether it waits for a person.

    What the kernel says of itself is user code's to forge; it then deceives the policy about nothing but itself.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._used = clock()
        self._requests: dict[str, float] = {}
        self._asking: str | None = None

    def began(self) -> None:
        """A kernel was started: nothing is asked of it yet."""
        self._requests.clear()
        self._asking = None
        self.used()

    def used(self) -> None:
        """Somebody wants something of the kernel now."""
        self._used = self._clock()

    def sent(self, channel: str, parts: Sequence[bytes | memoryview]) -> None:
        """A client's message is on its way to the kernel."""
        found = _TYPE.search(relay.header_of(parts))
        if found is not None and found[1] in WAKING:
            self.used()
        if channel == "stdin":
            self._asking = None

    def asked(self, parts: Sequence[bytes | memoryview]) -> None:
        """The kernel asks for input."""
        self._asking = _parent(parts)[0]

    def status(self, parts: Sequence[bytes | memoryview]) -> None:
        """The kernel has published what it is doing."""
        request, state = _parent(parts)
        if state == "busy" and request and len(self._requests) < _MOST:
            self._requests.setdefault(request, self._clock())
        elif state == "idle" and request in self._requests:
            del self._requests[request]
            self.used()
            if self._asking == request:
                self._asking = None

    def facts(self) -> dict[str, Any]:
        """``busy``, and ``busy_for``: seconds that the oldest request has been running; ``input``: it waits for a
        person; ``since_use``: seconds since the last waking message or the end of what that had begun."""
        busy = bool(self._requests)
        return {
            "busy": busy,
            "busy_for": max(self._clock() - min(self._requests.values()), 0.0) if busy else None,
            "input": busy and self._asking is not None,
            "since_use": 0.0 if busy else max(self._clock() - self._used, 0.0),
        }


def _parent(parts: Sequence[bytes | memoryview]) -> tuple[str, str]:
    """The id of the waking request that a message belongs to, and the message's ``execution_state``; or empty."""
    for index, part in enumerate(parts[:16]):
        if part == relay.DELIMITER and len(parts) > index + 5:
            if len(parts[index + 3]) > _LONGEST or len(parts[index + 5]) > _LONGEST:
                break
            try:
                parent, content = json.loads(bytes(parts[index + 3])), json.loads(bytes(parts[index + 5]))
                if str(parent.get("msg_type")).encode() in WAKING:
                    return str(parent.get("msg_id"))[:200], str(content.get("execution_state"))
            except (ValueError, AttributeError, RecursionError):
                pass
            break
    return "", ""
