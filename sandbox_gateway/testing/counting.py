"""What the contract of saving is tested with: a sandbox whose kernel prints numbered lines for ever, and its host.

A number that is missing, double or out of order is what the tests look for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.link.host import Link
from sandbox_gateway.model import SandboxSpec
from sandbox_gateway.runtimes.base import Handle, Pausable, Runtime, Snapshots
from sandbox_gateway.testing.contract import TIMEOUT, Subject, created
from sandbox_gateway.wire.frames import Channel

KERNEL = """
import json, sys, time, zmq
names = json.load(open(sys.argv[1]))
context = zmq.Context()
def bind(kind, name):
    socket = context.socket(kind)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.bind(f"ipc://{names['ip']}-{names[name + '_port']}")
    return socket
shell, stdin, control = (bind(zmq.ROUTER, name) for name in ("shell", "stdin", "control"))
heart, iopub = bind(zmq.REP, "hb"), bind(zmq.XPUB, "iopub")
poller = zmq.Poller()
for socket in (shell, control, heart):
    poller.register(socket, zmq.POLLIN)
iopub.recv()  # somebody listens: from here on nothing may be lost
count, printing = 0, False
while True:
    for socket, _ in poller.poll(2 if printing else None):
        parts = socket.recv_multipart()
        printing = printing or socket is shell
        socket.send_multipart(parts)
    if printing:
        iopub.send_multipart([b"line", b"<IDS|MSG>", b"", b"{}", b"{}", b"{}", str(count).encode()])
        count += 1
"""
"""A kernel that echoes its requests and prints from the first one on."""


class Saving(Runtime, Pausable, Snapshots, Protocol):
    """A runtime that can pause and save."""


def saving(subject: Subject) -> Saving:
    """The runtime under test."""
    return cast(Saving, subject.make(subject.paths))


@dataclass
class Printer:
    """The host's side of one counting kernel over all its links."""

    numbers: list[int] = field(default_factory=list)
    echoes: list[bytes] = field(default_factory=list)
    received: Mapping[int, int] | None = None
    epoch: int = 0
    _more: asyncio.Event = field(default_factory=asyncio.Event)

    def copy(self) -> Printer:
        """Another host that knows the same so far, for another sandbox made from the same image."""
        return Printer(list(self.numbers), list(self.echoes), self.received, self.epoch)

    def _take(self, channel: int, parts: list[bytes | memoryview]) -> None:
        if channel == Channel.IOPUB:
            self.numbers.append(int(bytes(parts[-1])))
        elif channel == Channel.SHELL:
            self.echoes.append(bytes(parts[-1]))
        self._more.set()

    @contextlib.asynccontextmanager
    async def link(self, runtime: Runtime, handle: Handle, *, new_epoch: bool = True) -> AsyncIterator[Link]:
        """Attached, in the next epoch unless it is the same life of the sandbox; silent at the end."""
        self.epoch += new_epoch
        fds = await runtime.attach(handle)
        link = Link(
            fds.read_fd,
            fds.write_fd,
            epoch=self.epoch,
            on_message=self._take,
            on_gap=lambda channel, count, size: self.numbers.append(-count),  # which check() then finds
            on_event=lambda event: None,
            on_lost=lambda error: None,
        )
        try:
            await link.attach(self.received, owner="contract", timeout=TIMEOUT)
            yield link
        finally:
            await link.close()
            self.received = link.received()

    async def until(self, count: int) -> None:
        """Wait until so many lines are there."""
        async with asyncio.timeout(TIMEOUT):
            while len(self.numbers) < count:
                self._more.clear()
                await self._more.wait()

    async def echo(self, link: Link, text: bytes) -> None:
        """Ask the kernel something and wait for the answer."""
        link.send(Channel.SHELL, [b"client", b"<IDS|MSG>", b"", b"{}", b"{}", b"{}", text])
        async with asyncio.timeout(TIMEOUT):
            while text not in self.echoes:
                self._more.clear()
                await self._more.wait()

    def check(self) -> None:
        """Every line once, in order."""
        assert self.numbers == list(range(len(self.numbers)))


async def boot(subject: Subject, link: Link) -> None:
    """Start the counting kernel."""
    environment = {"PATH": os.environ.get("PATH", os.defpath)}
    await link.call(
        "start_kernel",
        argv=[*subject.python, "-u", "-c", KERNEL, "{connection_file}"],
        env=environment,
        cwd="/",
        key="",
        welcome=False,
    )


async def restored(runtime: Saving, spec: SandboxSpec, directory: Path, image: Path) -> Handle:
    """Take all steps of a restore; return the last handle. A restore that fails leaves nothing."""
    last = Handle(spec.id, runtime.name, directory)
    try:
        async for handle in runtime.restore(spec, directory, image):
            last = handle
    except BaseException:
        await runtime.destroy(last)
        assert os.listdir(directory) == []
        raise
    return last


@contextlib.asynccontextmanager
async def printing(subject: Subject) -> AsyncIterator[tuple[Saving, SandboxSpec, Handle, Printer]]:
    """A sandbox whose kernel prints, with its host; destroyed at the end, with its images."""
    runtime = saving(subject)
    sandbox_id = str(uuid.uuid4())
    directory = subject.directory(sandbox_id)
    spec = subject.spec(sandbox_id)
    handle = Handle(sandbox_id, runtime.name, directory)
    printer = Printer()
    try:
        handle = await created(runtime, spec, directory)
        handle = await runtime.start(handle)
        async with printer.link(runtime, handle) as link:
            await boot(subject, link)
            await printer.echo(link, b"go")
            await printer.until(5)
        yield runtime, spec, handle, printer
    finally:
        await runtime.destroy(handle)
        shutil.rmtree(subject.paths.home / "images", ignore_errors=True)
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def refused(code: str) -> Iterator[None]:
    """What is inside raises an error of the product with this code."""
    try:
        yield
    except SandboxGatewayError as error:
        assert error.code == code, error
    else:
        raise AssertionError(f"it was not refused ({code})")


def new_image(subject: Subject) -> Path:
    """Where an image is to be made."""
    folder = subject.paths.home / "images"
    folder.mkdir(exist_ok=True)
    return folder / uuid.uuid4().hex


async def saved(subject: Subject, runtime: Saving, handle: Handle) -> Path:
    """Pause and save; the sandbox stays paused."""
    image = new_image(subject)
    await runtime.pause(handle)
    await runtime.snapshot(handle, image)
    return image
