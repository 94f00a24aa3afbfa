"""Images of the real runtimes in the store: saved, sealed while the sandbox is removed, verified, restored, removed."""

from __future__ import annotations

import asyncio
import functools
import os
from dataclasses import replace
from pathlib import Path

import pytest
from bundles import make_fake, make_gvisor
from snapshot_helpers import facts, tree

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.images.agent_layer import AGENT_PYTHON
from sandbox_gateway.model import Image, Limits
from sandbox_gateway.snapshots import Kind, SnapshotStore
from sandbox_gateway.testing.contract import TIMEOUT, Subject
from sandbox_gateway.testing.contract_snapshots import printing, restored


async def _there_and_back(subject: Subject) -> None:
    store = SnapshotStore(subject.paths)
    async with printing(subject) as (runtime, spec, handle, printer):
        await runtime.pause(handle)
        async with await store.begin() as draft:
            await runtime.snapshot(handle, draft.image)
            wanted = facts(Kind.SUSPENDED, requirements=await runtime.requirements())
            snapshot = await draft.commit(wanted, sealed=False, keep_lease=True)
            _, sealed = await asyncio.gather(runtime.destroy(handle), store.seal(snapshot))
        assert sealed.manifest.sealed
        assert await store.verify(sealed, deep=True) == sealed
        assert await runtime.unfit(sealed.manifest.requirements) == ""

        with store.hold(sealed):
            again = await restored(runtime, spec, handle.directory, sealed.image)
            try:
                await runtime.loaded(again)
                assert await store.verify(sealed, deep=True) == sealed, "a restore changes nothing in the image"
                with pytest.raises(SandboxGatewayError):
                    store.remove(sealed.id)
                async with printer.link(runtime, again) as link:
                    await link.ping(TIMEOUT)
                    await printer.until(len(printer.numbers) + 5)
                printer.check()
            finally:
                await runtime.destroy(again)

        biggest = max(sealed.manifest.files, key=lambda file: file.size)
        os.truncate(sealed.image / biggest.path, biggest.size // 2)
        with pytest.raises(SandboxGatewayError) as error:
            await store.verify(sealed)
        assert error.value.code == "snapshot_damaged" and "truncated" in error.value.message
        unknown = replace(sealed.manifest, requirements={"runsc": "0" * 64})
        assert await runtime.unfit(unknown.requirements) or runtime.name == "fake"
        store.remove(sealed.id)
        assert tree(store.directory) == set()


async def test_an_image_of_gvisors_goes_through_the_store(paths: Paths, runsc_binary: Path, agent_image: Image) -> None:
    limits = Limits(memory=256 << 20, disk=16 << 20)
    make = functools.partial(make_gvisor, runsc_binary)
    await _there_and_back(Subject(paths, make, agent_image, limits, AGENT_PYTHON))


async def test_an_image_of_the_fake_runtimes_goes_through_the_store(paths: Paths) -> None:
    await _there_and_back(Subject(paths, make_fake, Image("none", ()), copies=False))
