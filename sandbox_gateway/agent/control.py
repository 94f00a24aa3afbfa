"""The operations that the host may ask for, on the link's AGENT channel: strict JSON in, one answer each.

A request is ``{"id": n, "op": name, ...}``; the answer ``{"id": n, "ok": {...}}`` or ``{"id": n, "error": {"code",
"message"}}``. One that brings bytes has them in a second part. The host is trusted, but a wrong request must never end
the agent.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from sandbox_gateway.agent import process
from sandbox_gateway.agent.identify import parse_identity
from sandbox_gateway.agent.kernel import Kernel
from sandbox_gateway.agent.launch import Answer, KernelError, parse_launch
from sandbox_gateway.agent.owner import OwnerWatch

DEFAULT_GRACE: Final = 5.0
"""Seconds between SIGTERM and SIGKILL when the host does not say."""
DEFAULT_PING: Final = 10.0
"""Seconds for the kernel to answer when the host does not say."""
_MAX_SECONDS: Final = 30 * 24 * 3600.0
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_NO_FILES: Final = frozenset({"/dev", "/dev/shm", "/run"})


class Control:
    """Answers requests; ``reply`` sends one answer, ``shut_down`` ends the agent."""

    def __init__(
        self,
        kernel: Kernel,
        owner: OwnerWatch,
        reply: Callable[[dict[str, Any]], None],
        shut_down: Callable[[], None],
        link_stats: Callable[[], dict[str, Any]],
    ) -> None:
        self._kernel = kernel
        self._owner = owner
        self._reply = reply
        self._shut_down = shut_down
        self._link_stats = link_stats
        self._operations: dict[str, Callable[[dict[str, Any], Answer], None]] = {
            "ping": lambda _request, answer: answer({}),
            "add_modules": self._add_modules,
            "start_kernel": self._start,
            "restart_kernel": self._restart,
            "identify": self._identify,
            "stop_kernel": self._stop,
            "interrupt": self._interrupt,
            "signal": self._signal,
            "policy": self._policy,
            "stats": self._stats,
            "activity": self._activity,
            "ping_kernel": self._ping_kernel,
            "shutdown": self._shutdown,
        }

    def request(self, data: bytes | memoryview, attachment: bytes | memoryview = b"") -> None:
        """Handle one message of the AGENT channel. What has no usable ``id`` cannot be answered and is dropped."""
        try:
            request = json.loads(bytes(data))
        except ValueError:
            return
        number = request.get("id") if isinstance(request, dict) else None
        if type(number) is not int:
            return

        def answer(result: dict[str, Any] | KernelError) -> None:
            if isinstance(result, KernelError):
                self._reply({"id": number, "error": {"code": result.code, "message": str(result)}})
            else:
                self._reply({"id": number, "ok": result})

        operation = self._operations.get(str(request.get("op")))
        try:
            if operation is None:
                raise KernelError("invalid_request", f"the agent knows no operation {request.get('op')!r}")
            operation({**request, "attachment": attachment}, answer)
        except KernelError as error:
            answer(error)
        except OSError as error:
            answer(KernelError("kernel_failed", f"{request.get('op')}: {error.strerror}"))

    def _add_modules(self, request: dict[str, Any], answer: Answer) -> None:
        self._kernel.add_modules(request["attachment"])
        answer({})

    def _start(self, request: dict[str, Any], answer: Answer) -> None:
        self._kernel.start(parse_launch(request), answer)

    def _restart(self, request: dict[str, Any], answer: Answer) -> None:
        self._kernel.restart(parse_launch(request, self._kernel.launch), answer)

    def _identify(self, request: dict[str, Any], answer: Answer) -> None:
        self._kernel.identify(parse_identity(request), answer)

    def _stop(self, request: dict[str, Any], answer: Answer) -> None:
        self._kernel.stop(_seconds(request, "grace", DEFAULT_GRACE), answer)

    def _interrupt(self, _request: dict[str, Any], answer: Answer) -> None:
        self._kernel.interrupt()
        answer({})

    def _signal(self, request: dict[str, Any], answer: Answer) -> None:
        number = request.get("signum")
        if type(number) is not int or number not in {int(known) for known in signal.valid_signals()}:
            raise KernelError("invalid_request", "signum is not a signal's number")
        self._kernel.signal(number)
        answer({})

    def _policy(self, request: dict[str, Any], answer: Answer) -> None:
        what = request.get("on_owner_exit")
        if what not in ("terminate", "keep", "suspend"):
            raise KernelError("invalid_request", "on_owner_exit is terminate, keep or suspend")
        self._owner.set(what == "terminate", _seconds(request, "grace", 30.0))
        answer({})

    def _stats(self, request: dict[str, Any], answer: Answer) -> None:
        kernel = self._kernel
        answer(
            {
                # Asked for only where these file systems are the sandbox's own.
                **({"disk": disk()} if request.get("disk") is True else {}),
                "phase": kernel.phase.value,
                "pid": kernel.pid,
                "generation": kernel.generation,
                "log_bytes": kernel.log.end,
                "last_exit": kernel.last_exit,
                **usage(),
                "link": self._link_stats(),
            }
        )

    def _activity(self, _request: dict[str, Any], answer: Answer) -> None:
        answer({"phase": self._kernel.phase.value, **self._kernel.activity.facts(), **usage()})

    def _ping_kernel(self, request: dict[str, Any], answer: Answer) -> None:
        self._kernel.ping(_seconds(request, "seconds", DEFAULT_PING), answer)

    def _shutdown(self, _request: dict[str, Any], answer: Answer) -> None:
        answer({})
        self._shut_down()


def _seconds(request: Mapping[str, Any], name: str, default: float) -> float:
    value = request.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MAX_SECONDS:
        raise KernelError("invalid_request", f"{name} is not a time in seconds")
    return float(value)


def usage() -> dict[str, Any]:
    """Processes of the kernel's: how many, their resident bytes, and the seconds of processor time they used."""
    count = resident = ticks = 0
    for pid in process.descendants():
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            continue  # ended meanwhile
        fields = stat[stat.rfind(b")") + 2 :].split()
        if len(fields) > 21:
            count += 1
            # With what its children used that have ended: else a loop of short programs would look idle.
            ticks += sum(int(field) for field in fields[11:15])
            resident += int(fields[21]) * _PAGE
    return {"processes": count, "resident": resident, "cpu_seconds": ticks / _TICKS}


def disk(mounts: Path = Path("/proc/mounts")) -> int:
    """Bytes of the files that were written: all that the file systems in memory hold, overlays' included.

    Shared memory is no file of anybody's, and what lies in /run is the agent's.
    """
    total = 0
    for line in mounts.read_text().splitlines():
        _, place, kind, options, *_ = line.split(" ")
        place = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), place)
        if kind in ("overlay", "tmpfs") and "rw" in options.split(",") and place not in _NO_FILES:
            try:
                found = os.statvfs(place)
            except OSError:
                continue
            total += (found.f_blocks - found.f_bfree) * found.f_frsize
    return total
