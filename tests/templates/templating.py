"""Kernels through a lifecycle, without any application: what a template test needs to look closely."""

from __future__ import annotations

import ast
import asyncio
import json
import mmap
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sandbox_gateway import kernelspecs, messages
from sandbox_gateway.host.paths import discover
from sandbox_gateway.lifecycle import Lifecycle
from sandbox_gateway.live import LiveSandbox
from sandbox_gateway.model import Death, DeathKind, KernelSpec
from sandbox_gateway.profiles import Profile, load_profiles
from sandbox_gateway.request import CreateRequest
from sandbox_gateway.seat import Seat
from sandbox_gateway.snapshots import Snapshot
from sandbox_gateway.templates import Plan
from sandbox_gateway.wire.frames import Channel

PATIENCE = 60.0


@dataclass
class Kernel:
    """One kernel and what it said."""

    sandbox: LiveSandbox
    seat: Seat
    said: list[tuple[str, dict[str, Any], str]] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def warm(self) -> bool:
        """Whether it was started from a template."""
        return (self.sandbox.record.parent or "").startswith("template:")

    def deliver(self, channel: int, parts: Sequence[Any]) -> None:
        """Take a message: type, content, id of what it answers."""
        at = messages.delimiter_index(parts)
        assert at is not None
        header, parent, content = (json.loads(bytes(parts[at + n])) for n in (2, 3, 5))
        self.said.append((header["msg_type"], content, str(parent.get("msg_id"))))
        self.news.set()

    async def execute(self, code: str) -> dict[str, Any]:
        """Run code; the reply's content, and with ``"text"`` what it printed."""
        content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
        message = messages.build(self.seat.key, "execute_request", content)
        asked = json.loads(message[3] if message[0] != b"<IDS|MSG>" else message[2])["msg_id"]
        self.seat.channels.request(int(Channel.SHELL), [b"test", *message[list(message).index(b"<IDS|MSG>") :]])
        async with asyncio.timeout(PATIENCE):
            while True:
                mine = [(kind, content) for kind, content, parent in self.said if parent == asked]
                kinds = {kind for kind, _ in mine}
                idle = any(content.get("execution_state") == "idle" for kind, content in mine if kind == "status")
                if "execute_reply" in kinds and idle:
                    break
                self.news.clear()
                await self.news.wait()
        reply = next(content for kind, content in mine if kind == "execute_reply")
        return {**reply, "text": "".join(content["text"] for kind, content in mine if kind == "stream")}

    async def value(self, code: str) -> Any:
        """What the code prints, as a Python literal."""
        reply = await self.execute(code)
        assert reply["status"] == "ok", reply
        return ast.literal_eval(reply["text"])


class Driver:
    """A lifecycle and its kernels."""

    def __init__(self, home: Path) -> None:
        self.lifecycle = Lifecycle(discover({"SANDBOX_GATEWAY_HOME": str(home)}))
        self.kernels: list[Kernel] = []

    def profile(self, name: str, **changes: Any) -> Profile:
        """A profile of the installation, changed."""
        return replace(load_profiles(self.lifecycle.paths).get(name), **changes)

    def request(self, profile: Profile, folder: Path, environment: Mapping[str, str] | None = None) -> CreateRequest:
        """What an application asks for."""
        kernel = KernelSpec(kernelspecs.kernel_argv(profile), interrupt_mode=profile.interrupt_mode)
        key = uuid.uuid4().hex.encode()
        return CreateRequest(str(uuid.uuid4()), profile, kernel, key, folder, environment or {})

    async def plan(self, profile: Profile, folder: Path) -> Plan:
        """The template of a profile."""
        wanted = self.request(profile, folder)
        launch, _ = await self.lifecycle.launch(wanted)
        found = await self.lifecycle.templates.plan(wanted, launch, *await self.lifecycle.runtime(profile.runtime))
        assert isinstance(found, Plan), found
        return found

    async def template(self, profile: Profile, folder: Path) -> Snapshot:
        """The template of a profile, built unless it is there."""
        return await self.lifecycle.templates.build(await self.plan(profile, folder))

    async def start(self, profile: Profile, folder: Path, environment: Mapping[str, str] | None = None) -> Kernel:
        """A kernel, however it starts."""
        wanted = self.request(profile, folder, environment)
        seat = Seat(await self.lifecycle.claim(wanted.id), wanted.key)
        try:
            sandbox = await self.lifecycle.create(wanted, seat)
        except BaseException:
            seat.release()
            raise
        kernel = Kernel(sandbox, seat)
        seat.channels.subscribe(kernel.deliver)
        self.kernels.append(kernel)
        return kernel

    async def warm(self, profile: Profile, folder: Path, environment: Mapping[str, str] | None = None) -> Kernel:
        """A kernel from the template of a profile, built unless it is there; both once more where the profile has
        another template by now, as it has when something writes into the environment meanwhile."""
        template = await self.template(profile, folder)
        kernel = await self.start(profile, folder, environment)
        if not kernel.warm and (await self.plan(profile, folder)).key.digest != template.manifest.template_key:
            await self.end(kernel)
            await self.template(profile, folder)
            kernel = await self.start(profile, folder, environment)
        assert kernel.warm, kernel.sandbox.record.notes
        return kernel

    async def end(self, kernel: Kernel) -> None:
        """End a kernel."""
        self.kernels.remove(kernel)
        await kernel.sandbox.destroy(Death(DeathKind.STOPPED))
        kernel.seat.release()

    async def close(self) -> None:
        """End all of them."""
        for kernel in tuple(self.kernels):
            await self.end(kernel)
        await self.lifecycle.close()


def holds(snapshot: Snapshot, text: bytes) -> list[str]:
    """Names of the files of a snapshot in which ``text`` is."""
    found = []
    for path in snapshot.directory.rglob("*"):
        if path.is_file() and path.stat().st_size:
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if content.find(text) >= 0:
                    found.append(os.fspath(path.relative_to(snapshot.directory)))
    return found
