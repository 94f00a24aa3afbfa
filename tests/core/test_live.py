"""What the host makes of an agent's events: they come from inside and may say anything, as often as they like."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sandbox_gateway.channels import KernelChannels
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.gate import Sender
from sandbox_gateway.live import LiveSandbox
from sandbox_gateway.messages import Buffer
from sandbox_gateway.model import KernelSpec, Launch, SandboxRecord, SandboxSpec, State
from sandbox_gateway.raw_log import LOG_LIMIT

EXIT = {"event": "kernel_exit", "code": 3, "signal": None, "stderr_tail": "last words", "expected": False}


def live(channels: KernelChannels) -> LiveSandbox:
    record = SandboxRecord("id", State.RUNNING, "p", "fake", 0.0, 0.0, "boot")
    nothing: Any = None
    seat: Any = SimpleNamespace(channels=channels, cursors=None)
    return LiveSandbox(
        record,
        Launch(cast("SandboxSpec", None), KernelSpec(("python",)), b"key", 1, 1),
        seat,
        runtime=nothing,
        store=nothing,
        suspension=nothing,
        events=nothing,
        on_end=print,
        log_file=Path("/nowhere"),
    )


def test_a_kernel_ends_once_however_often_the_agent_says_so(caplog: pytest.LogCaptureFixture) -> None:
    channels = KernelChannels(b"key")
    seen: list[Sequence[Buffer]] = []
    channels.subscribe(lambda channel, parts: seen.append(parts))
    sandbox = live(channels)
    for code in range(200):
        sandbox.kernel.event({**EXIT, "code": code})
    assert len(seen) == len(caplog.records) == 1
    assert sandbox.poll() == 0, "the first report counts"


def sender(sent: list[str]) -> Any:
    return SimpleNamespace(send=lambda channel, parts: sent.append(bytes(parts[0]).decode()))


def test_what_is_asked_when_a_kernel_has_ended_is_for_the_next_one() -> None:
    channels = KernelChannels(b"key")
    sandbox = live(channels)
    first: list[str] = []
    channels.connect(sender(first))
    channels.request(1, [b"before"])
    sandbox.kernel.event(EXIT)
    channels.request(1, [b"after"])
    following: list[str] = []
    channels.connect(sender(following))
    assert (first, following) == (["before"], ["after"])


@pytest.mark.parametrize("disk", ["room", "full"])
async def test_who_is_told_of_a_restart_may_ask_at_once_and_the_new_kernel_answers(disk: str) -> None:
    channels = KernelChannels(b"key")
    sandbox = live(channels)
    happened: list[str] = []

    async def call(name: str, **parameters: Any) -> None:
        happened.append(name)

    def put(record: SandboxRecord) -> None:
        if disk == "full" and record.state is State.RESTARTING:
            raise SandboxGatewayError("disk_full", "no room")

    link = SimpleNamespace(send=lambda channel, parts: happened.append(bytes(parts[0]).decode()), call=call)
    kernel = KernelSpec(("python",))
    sandbox.launch = Launch(cast("SandboxSpec", None), kernel, b"key", 1, 1)
    sandbox._incarnation.attachment = SimpleNamespace(link=link)  # type: ignore[assignment]
    sandbox._ledger._store = SimpleNamespace(put=put, put_launch=lambda *what: None)  # type: ignore[assignment]
    sandbox._ledger._events = SimpleNamespace(moved=lambda *what: None)  # type: ignore[assignment]
    channels.connect(cast("Sender", link))
    rebooting = sandbox.reboot(kernel, lambda: channels.request(1, [b"asked"]))
    if disk == "full":
        with pytest.raises(SandboxGatewayError, match="no room"):
            await rebooting
        assert happened == ["asked"], "it goes to the kernel that runs on"
    else:
        await rebooting
        assert happened == ["restart_kernel", "asked"]


@pytest.mark.parametrize(
    "change",
    [
        {"code": 10**30},
        {"code": -1},
        {"code": True},
        {"signal": 10**30},
        {"code": "0"},
        {"stderr_tail": None},
        {"code": 1.5},
    ],
)
def test_an_exit_that_no_process_can_have_is_dropped(change: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    sandbox = live(KernelChannels(b"key"))
    for _ in range(100):
        sandbox.kernel.event({**EXIT, **change})
    assert sandbox.poll() is None
    assert not caplog.records, "what can be sent for ever is not logged each time"


async def test_a_log_without_end_is_cut() -> None:
    class Endless:
        async def read(self) -> bytes:
            return bytes(1 << 20)

        async def close(self) -> None:
            pass

    class Link:
        async def open_stream(self, kind: str, params: dict[str, Any]) -> Endless:
            return Endless()

    sandbox = live(KernelChannels(b"key"))
    sandbox._incarnation.attachment = SimpleNamespace(link=Link())  # type: ignore[assignment]
    assert len(await sandbox.log()) == LOG_LIMIT


async def test_what_a_resumed_kernel_says_is_for_nobody_before_it_is_on_record_that_it_runs() -> None:
    # Else a kill of the owner in between takes the kernel back to its snapshot, behind what its clients have seen.
    order: list[str] = []
    channels = KernelChannels(b"key")
    sandbox = live(channels)
    saved: Any = SimpleNamespace(snapshot=SimpleNamespace(id="snap"))

    async def fit(found: Any) -> None:
        pass

    async def restore(found: Any) -> None:
        link = SimpleNamespace(send=lambda channel, parts: order.append("request"), received=dict)
        sandbox._incarnation.attachment = SimpleNamespace(link=link, release=lambda: order.append("released"))  # type: ignore[assignment]
        sandbox._incarnation.handle = SimpleNamespace()  # type: ignore[assignment]

    sandbox._saved = saved
    sandbox._incarnation.restore = restore  # type: ignore[method-assign, assignment]
    sandbox.seat.directory = Path("/nowhere")
    sandbox._suspension = SimpleNamespace(  # type: ignore[assignment]
        fit=fit, expecting=lambda directory: contextlib.nullcontext(), done_with=lambda found, handle: None
    )
    sandbox._ledger._store = SimpleNamespace(put=lambda record: order.append(str(record.state)))  # type: ignore[assignment]
    sandbox._ledger._events = SimpleNamespace(moved=lambda *what: None)  # type: ignore[assignment]
    sandbox._ledger.record = replace(sandbox.record, state=State.SUSPENDED, snapshot="snap")
    channels.sleep(lambda: None)
    await sandbox.resume()
    assert order == ["resuming", "running", "released"]
