"""Sandboxes that stand ready: they become anybody's at once, are never left over, and never shared."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
from acceptance import KERNEL, Product, until
from templating import Driver

from sandbox_gateway import introduction, standby
from sandbox_gateway.channels import KernelChannels
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.events import Event, EventKind
from sandbox_gateway.host.paths import discover
from sandbox_gateway.incarnation import Incarnation
from sandbox_gateway.model import STANDBY, Death, DeathKind, Image, State
from sandbox_gateway.profiles import Profile
from sandbox_gateway.profiles.profile import Pool as Wanted
from sandbox_gateway.runtimes.base import Handle
from sandbox_gateway.store import Store
from sandbox_gateway.templates import pool

DRAW = "import os, random, ssl; print((random.random(), ssl.RAND_bytes(8), os.environ['SANDBOX_ID'], len(In)))"


async def filled(driver: Driver, profile: Profile, count: int) -> None:
    """Wait until so many stand ready."""
    async with asyncio.timeout(60):
        while driver.lifecycle.pool.sizes.get(profile.name, 0) != count:
            await asyncio.sleep(0.02)  # filling is no event for anybody


async def looked_at(driver: Driver, folder: Path, ready: int) -> Profile:
    """A profile whose image an earlier start has seen, by which the next one goes; so many stand ready."""
    driver.lifecycle.pool._delay = 0.0
    profile = driver.profile(KERNEL, pool=Wanted(ready=ready))
    await driver.end(await driver.warm(profile, folder))
    await filled(driver, profile, ready)
    return profile


async def killed(driver: Driver) -> None:
    """End the only one that is being made for the pool."""
    (sandbox,) = [one for id, one in driver.lifecycle.live.items() if id.startswith(STANDBY)]
    handle = Handle.of(sandbox.record.handle)
    assert handle is not None
    os.kill(int(handle.data["sandbox"][0]), signal.SIGKILL)
    async with asyncio.timeout(30):
        while not sandbox.link.closed:
            await asyncio.sleep(0.02)  # the end of what is nobody's is no event


@pytest.fixture(params=["ready", "created"])
def pooled(request: pytest.FixtureRequest, driver: Driver) -> Profile:
    """A profile that wants two of a kind."""
    driver.lifecycle.pool._delay = 0.0
    size = Wanted(ready=2) if request.param == "ready" else Wanted(created=2)
    return driver.profile(KERNEL, pool=size)


def standing(driver: Driver) -> set[str]:
    """Ids of what is recorded as standing ready."""
    return {record.id for record in driver.lifecycle.store.list() if record.id.startswith(STANDBY)}


async def test_kernels_that_stood_ready_are_ones_own(driver: Driver, tmp_path: Path, pooled: Profile) -> None:
    first = await driver.warm(pooled, tmp_path)
    drawn = [await first.value(DRAW)]
    await filled(driver, pooled, 2)
    for _ in range(3):
        before = standing(driver)
        kernel = await driver.start(pooled, tmp_path, {"TZ": "Asia/Tokyo"})
        handle = Handle.of(kernel.sandbox.record.handle)
        assert handle is not None and handle.id in before, "it was not taken from the pool"
        assert handle.id not in standing(driver)
        values = await kernel.value(DRAW)
        assert values[2] == kernel.sandbox.id and values[3] == 2
        assert await kernel.value("import time; print(repr(time.tzname[0]))") == "JST"
        drawn.append(values)
        await filled(driver, pooled, 2)
    assert len({str(values[:2]) for values in drawn}) == len(drawn)
    assert len({kernel.sandbox.id for kernel in driver.kernels}) == 4


async def test_one_that_stood_ready_is_suspended_resumed_and_removed_like_any_other(
    driver: Driver, tmp_path: Path, pooled: Profile
) -> None:
    await driver.end(await driver.warm(pooled, tmp_path))
    await filled(driver, pooled, 2)
    kernel = await driver.start(pooled, tmp_path)
    await kernel.execute("kept = 'of before'")
    place = Path(str(kernel.sandbox.record.handle["directory"]))
    assert place.name.startswith(STANDBY) and place.is_dir()
    await kernel.sandbox.suspend()
    await gone(place)
    assert kernel.sandbox.state is State.SUSPENDED
    await kernel.sandbox.resume()
    assert await kernel.value("print(repr(kept))") == "of before"
    await driver.end(kernel)
    # A sweep takes what goes on under another name for nobody's leftover.
    other = await driver.start(pooled, tmp_path)
    await driver.lifecycle.sweep()
    assert await other.value("print(6 * 7)") == 42
    place = Path(str(other.sandbox.record.handle["directory"]))
    await driver.end(other)
    await gone(place)


async def gone(place: Path) -> None:
    """A sweep that saw it a moment ago may hold its lock, and with it the directory, for another moment."""
    async with asyncio.timeout(10):
        while place.exists():
            await asyncio.sleep(0.02)


async def test_of_the_cell_that_one_ran_while_it_stood_ready_nobody_hears(driver: Driver, tmp_path: Path) -> None:
    profile = await looked_at(driver, tmp_path, 1)
    stood = driver.lifecycle.pool._members[0]
    assert stood.sandbox.seat.channels.running is None
    kernel = await driver.start(profile, tmp_path)
    assert kernel.sandbox.record.handle["id"] == stood.sandbox.id
    code = "ip = get_ipython(); print((In, Out, _, __, _i))"
    reply = await kernel.execute(code)
    assert reply["execution_count"] == 1
    assert reply["text"] == f"{(['', code], {}, '', '', '')}\n"
    assert await kernel.value("print([line for _, _, line in ip.history_manager.get_range()][:1])") == [code]
    asked = {parent for _, _, parent in kernel.said}
    assert len(asked) == 2, f"somebody else's messages came: {kernel.said}"


@pytest.mark.parametrize("end", ["unanswered", "killed"])
async def test_one_that_cannot_run_a_cell_does_not_stand_ready(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Its late answer would be heard by who got it, and a first cell would wait behind it."""
    monkeypatch.setattr(pool, "BACK_OFF", 0.1)
    rehearsed: list[bool] = []

    async def rehearse(channels: KernelChannels, key: bytes) -> bool:
        if rehearsed:
            rehearsed.append(await introduction.rehearse(channels, key))
            return rehearsed[-1]
        rehearsed.append(False)
        if end == "killed":
            await killed(driver)
            return True
        return False

    monkeypatch.setattr(standby, "rehearse", rehearse)
    profile = await looked_at(driver, tmp_path, 1)
    assert rehearsed == [False, True]
    assert len(standing(driver)) == 1, "the one that could not is gone"
    kernel = await driver.start(profile, tmp_path)
    assert await kernel.value("print(6 * 7)") == 42


async def test_the_pool_closes_at_once_while_one_that_died_is_rehearsed(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = asyncio.Event()

    async def rehearse(channels: KernelChannels, key: bytes) -> bool:
        begun.set()
        await asyncio.sleep(60)
        return True

    monkeypatch.setattr(standby, "rehearse", rehearse)
    driver.lifecycle.pool._delay = 0.0
    profile = driver.profile(KERNEL, pool=Wanted(ready=1))
    await driver.end(await driver.warm(profile, tmp_path))
    async with asyncio.timeout(60):
        await begun.wait()
    await killed(driver)
    async with asyncio.timeout(pool.BACK_OFF / 2):
        await driver.lifecycle.pool.close()
    assert not standing(driver)


async def test_one_that_died_while_it_stood_ready_is_not_given_away(driver: Driver, tmp_path: Path) -> None:
    driver.lifecycle.pool._delay = 0.0
    profile = driver.profile(KERNEL, pool=Wanted(ready=1))
    await driver.end(await driver.warm(profile, tmp_path))
    await filled(driver, profile, 1)
    member = driver.lifecycle.pool._members[0]
    handle = Handle.of(member.sandbox.record.handle)
    assert handle is not None
    os.kill(int(handle.data["sandbox"][0]), signal.SIGKILL)
    async with asyncio.timeout(30):
        while member.sandbox.stands:
            await asyncio.sleep(0.02)  # the end of what is nobody's is no event
    kernel = await driver.start(profile, tmp_path)
    assert kernel.sandbox.record.handle["id"] == kernel.sandbox.id
    assert await kernel.value("print(6 * 7)") == 42
    await filled(driver, profile, 1)
    assert member.sandbox.id not in standing(driver)


async def test_one_whose_record_cannot_be_removed_is_not_left_behind(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = await looked_at(driver, tmp_path, 1)
    stood = driver.lifecycle.pool._members[0].sandbox
    refused: list[str] = []
    delete = driver.lifecycle.store.delete

    def refuse(sandbox_id: str) -> None:
        if sandbox_id == stood.id and not refused:
            refused.append(sandbox_id)
            raise SandboxGatewayError("disk_full", "no space left on device")
        delete(sandbox_id)

    monkeypatch.setattr(driver.lifecycle.store, "delete", refuse)
    kernel = await driver.start(profile, tmp_path)
    assert refused and await kernel.value("print(6 * 7)") == 42
    assert stood.death is not None and stood.id not in driver.lifecycle.live


@pytest.mark.parametrize("ready", [0, 1], ids=["template", "pool"])
async def test_a_start_gets_what_the_image_is_now_not_what_the_last_one_got(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ready: int
) -> None:
    """A start goes by the image of the last one while it looks, which is more than anybody may get to see."""
    lifecycle, profile = driver.lifecycle, await looked_at(driver, tmp_path, ready)
    resolve = lifecycle.images.resolve

    async def renewed(*arguments: Any, **options: Any) -> Image:
        image = await resolve(*arguments, **options)
        return replace(image, environment={**image.environment, "RENEWED": "yes"})

    told: list[Event] = []
    lifecycle.events.listen(told.append)
    monkeypatch.setattr(lifecycle.images, "resolve", renewed)
    kernel = await driver.start(profile, tmp_path)
    assert kernel.warm
    assert await kernel.value("import os; print(repr(os.environ.get('RENEWED')))") == "yes"
    again = await driver.start(profile, tmp_path)
    assert await again.value("import os; print(repr(os.environ.get('RENEWED')))") == "yes"
    await filled(driver, profile, ready)
    made = set(await (await lifecycle.runtime(profile.runtime))[0].list())
    mine = {kernel.sandbox.record.handle["id"], again.sandbox.record.handle["id"]}
    assert made == mine | standing(driver), "what was made from the former image is gone"
    assert set(lifecycle.live) == {kernel.sandbox.id, again.sandbox.id} | standing(driver)
    kinds = [event.kind for event in told if event.sandbox == kernel.sandbox.id]
    assert kinds == [EventKind.CREATED, EventKind.CREATED, EventKind.STARTED], "what nobody saw has not ended either"


async def test_a_sandbox_that_dies_before_its_image_is_confirmed_is_nobodys_kernel(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lifecycle = driver.lifecycle
    profile = driver.profile(KERNEL)
    await driver.end(await driver.warm(profile, tmp_path))
    resolve, killed = lifecycle.images.resolve, asyncio.Event()

    async def deadly(*arguments: Any, **options: Any) -> Image:
        image = await resolve(*arguments, **options)
        (sandbox,) = lifecycle.live.values()
        incarnation, identified = sandbox._incarnation, asyncio.Event()
        identify = incarnation._identify

        async def heard(identity: Any) -> None:
            await identify(identity)
            identified.set()

        monkeypatch.setattr(incarnation, "_identify", heard)
        async with asyncio.timeout(30):
            await identified.wait()
            attachment = incarnation.attachment
            assert attachment is not None
            os.kill(int(attachment.handle.data["sandbox"][0]), signal.SIGKILL)
            while not attachment.link.closed:
                await asyncio.sleep(0.005)  # nobody is told of that
        killed.set()
        return image

    monkeypatch.setattr(lifecycle.images, "resolve", deadly)
    kernel = await driver.start(profile, tmp_path)
    assert killed.is_set()
    assert await kernel.value("print(6 * 7)") == 42


@pytest.mark.parametrize("ready", [0, 1])
async def test_a_stop_while_a_first_attempt_is_undone_ends_the_start(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ready: int
) -> None:
    """The image was another one: the start would begin again, for somebody who has given up."""
    lifecycle, profile = driver.lifecycle, await looked_at(driver, tmp_path, ready)
    resolve, remove = lifecycle.images.resolve, Incarnation.remove
    stops: list[asyncio.Task[None]] = []

    async def another(*arguments: Any, **options: Any) -> Image:
        return replace(await resolve(*arguments, **options), name="another")

    async def stopped(incarnation: Incarnation) -> None:
        (sandbox,) = [live for live in lifecycle.live.values() if live._incarnation is incarnation]
        stops.append(asyncio.create_task(sandbox.destroy(Death(DeathKind.STOPPED))))
        await asyncio.sleep(0)
        await remove(incarnation)

    with monkeypatch.context() as patched:
        patched.setattr(lifecycle.images, "resolve", another)
        patched.setattr(Incarnation, "remove", stopped)
        with pytest.raises(SandboxGatewayError, match="ended while it started"):
            await driver.start(profile, tmp_path)
    assert len(await asyncio.gather(*stops)) == 1
    assert driver.kernels == []


async def test_a_lost_layer_is_made_anew_and_costs_no_template(driver: Driver, tmp_path: Path) -> None:
    """It is missed before the look at the image, which brings it back, is over."""
    profile = driver.profile(KERNEL)
    first = await driver.warm(profile, tmp_path)
    template = await driver.template(profile, tmp_path)
    root = next(layer for layer in first.sandbox.launch.spec.image.layers if layer.destination == "/")
    await driver.end(first)
    os.unlink(root.source)
    kernel = await driver.start(profile, tmp_path)
    assert kernel.warm
    assert await kernel.value("print(6 * 7)") == 42
    assert driver.lifecycle.snapshots.get(template.id)


async def test_a_start_without_an_image_fails_and_is_nobodys_fault(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason is told, nothing is left, and neither the template nor the request's own id is spoilt by it."""
    lifecycle = driver.lifecycle
    profile = driver.profile(KERNEL)
    await driver.end(await driver.warm(profile, tmp_path))

    async def gone(*arguments: Any, **options: Any) -> Image:
        raise SandboxGatewayError("image_source", "ipykernel was removed")

    with monkeypatch.context() as patched:
        patched.setattr(lifecycle.images, "resolve", gone)
        for _ in range(3):
            with pytest.raises(SandboxGatewayError, match="ipykernel was removed"):
                await driver.start(profile, tmp_path)
    assert await (await lifecycle.runtime(profile.runtime))[0].list() == []
    assert not lifecycle.live
    kernel = await driver.start(profile, tmp_path)
    assert kernel.warm
    assert await kernel.value("print(6 * 7)") == 42


async def test_there_are_never_more_than_wanted_and_old_ones_are_replaced(driver: Driver, tmp_path: Path) -> None:
    driver.lifecycle.pool._delay = 0.0
    profile = driver.profile(KERNEL, pool=Wanted(ready=1, max_age=1.5))
    await driver.warm(profile, tmp_path)
    await filled(driver, profile, 1)
    first = standing(driver)
    assert len(first) == 1
    async with asyncio.timeout(30):
        while standing(driver) & first or not standing(driver):
            assert len(standing(driver)) <= 1
            await asyncio.sleep(0.02)  # ageing is no event
    none = driver.profile(KERNEL)
    await driver.start(none, tmp_path)
    await filled(driver, profile, 0)
    async with asyncio.timeout(30):
        while standing(driver):
            await asyncio.sleep(0.02)


async def test_zero_stand_ready_by_default(driver: Driver, tmp_path: Path) -> None:
    profile = driver.profile(KERNEL)
    await driver.warm(profile, tmp_path)
    assert driver.lifecycle.pool._tender is None and standing(driver) == set()


OWNER = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from acceptance import KERNEL
from templating import Driver
from sandbox_gateway.profiles.profile import Pool as Wanted

async def main():
    driver = Driver(Path(sys.argv[1]))
    driver.lifecycle.pool._delay = 0.0
    profile = driver.profile(KERNEL, pool=Wanted(ready=1, created=1))
    await driver.template(profile, Path("/tmp"))
    while True:
        kernel = await driver.start(profile, Path("/tmp"))
        if sys.argv[3] == "kept" and (stood := kernel.sandbox.record.handle["id"]) != kernel.sandbox.id:
            print(kernel.sandbox.id, stood, flush=True)
            await asyncio.sleep(60)
        await driver.end(kernel)
        print("round", driver.lifecycle.pool.sizes, flush=True)

asyncio.run(main())
"""


@contextlib.contextmanager
def owner(product: Product, what: str) -> Iterator[IO[str]]:
    """A process that starts kernels from a pool, and what it says; killed at the end."""
    here = str(Path(__file__).parent)
    search = os.pathsep.join([here, str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(product.home), here, what],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": search},
    )
    assert process.stdout is not None
    try:
        yield process.stdout
    finally:
        process.kill()
        process.communicate()


def nothing_stands(product: Product) -> None:
    """Neither on record nor as a directory."""
    paths = discover({"SANDBOX_GATEWAY_HOME": str(product.home)})
    with Store(paths.database) as store:
        until(lambda: not [record for record in store.list() if record.blank])
    until(lambda: not [path for path in paths.runtime.iterdir() if path.name.startswith(STANDBY)])


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_killed_at_any_moment_it_leaves_nothing(product: Product, rounds: int) -> None:
    """The check after each test looks for processes, groups and pipes."""
    others = product.ids()
    with owner(product, "ended") as said:
        for _ in range(rounds):
            assert said.readline().startswith("round")
    assert product.command("prune").returncode == 0
    for entry in product.ps():
        if entry["id"] not in others:  # somebody had it by then: it goes on for its time of grace
            product.command("rm", entry["id"])
    nothing_stands(product)


def test_one_that_stood_ready_and_lost_its_owner_is_removed_with_the_place_where_it_stood(product: Product) -> None:
    with owner(product, "kept") as said:
        while (words := said.readline().split())[0] == "round":
            pass  # it was not taken from the pool
    kernel_id, stood = words
    place = discover({"SANDBOX_GATEWAY_HOME": str(product.home)}).sandbox(stood)
    assert place.is_dir()
    assert product.command("rm", kernel_id).returncode == 0
    assert not place.exists()
    assert product.command("prune").returncode == 0
    nothing_stands(product)
