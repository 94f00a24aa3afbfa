"""How many kernels one machine holds: idle ones, and suspended ones. Not in the default run: it takes the machine."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from jupyter_client.manager import KernelManager

from bench import processes
from bench.kernels import PATIENCE, BenchError
from bench.measures import Measure, Plan
from bench.sleeping import do
from sandbox_gateway import messages
from sandbox_gateway.embedded import lifecycle
from sandbox_gateway.live import LiveSandbox
from sandbox_gateway.model import Death, DeathKind, State
from sandbox_gateway.wire.frames import Channel

FULL_MACHINE = 0.85
"""Share of the machine's memory at which no further kernel is started."""
SECONDS = 600.0
"""Seconds after which no further kernel is made, for each of the two parts."""
DISK_LEFT = 8 << 30
"""Bytes that stay free on the disk."""
AT_A_TIME = 2
SAMPLE = 10
"""Kernels whose processes are looked at one by one."""
WOKEN = 5


def density(names: dict[str, str], plan: Plan, say: Callable[[str], None]) -> list[Measure]:
    """Idle kernels from the template; all of them suspended; more suspended ones; some woken; all removed."""
    crowd = _Crowd(names["sandboxed"], say)
    try:
        return [*crowd.fill(plan.dense_idle), *crowd.suspend(plan.dense_suspended), *crowd.wake()]
    finally:
        crowd.remove()


class _Crowd:
    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self._name = name
        self._say = say
        self._managers: list[KernelManager] = []
        self._values: dict[str, int] = {}
        """What each kernel's ``x`` has to be."""

    def _live(self) -> list[LiveSandbox]:
        return [lifecycle().live[found] for found in self._values]

    def fill(self, wanted: int) -> list[Measure]:
        """Start kernels until there are as many, the memory is used up to a bound, or the time is over."""
        held = _measure("idle kernels held", "kernels", "higher")
        begun, before, own = time.perf_counter(), _available(), _own_memory()
        took: list[float] = []
        while len(self._values) < wanted and time.perf_counter() - begun < SECONDS and _used() < FULL_MACHINE:
            started = time.perf_counter()
            manager = KernelManager(kernel_name=self._name)
            manager.start_kernel(stderr=subprocess.DEVNULL)
            self._managers.append(manager)
            provisioner: Any = manager.provisioner
            self._set(str(provisioner.kernel_id))
            took.append(time.perf_counter() - started)
            if len(self._values) % 20 == 0:
                self._say(f"{len(self._values)} idle kernels, the last 10 in {statistics.mean(took[-10:]):.2f} s each")
        count = len(self._values)
        held.samples["sandboxed"] = [float(count)]
        held.note = f"of {wanted}; {_used():.0%} of the memory used"
        first = _measure("start with few others", "s", "lower", took[:SAMPLE])
        last = _measure(f"start with {count} others", "s", "lower", took[-SAMPLE:])
        settled = _measure("machine's memory per idle kernel", "MB", "lower", [(before - _available()) / 1e6 / count])
        ours = _measure(
            "memory of the owner's process per kernel", "MB", "lower", [(_own_memory() - own) / 1e6 / count]
        )
        pss = _measure("PSS of an idle kernel among many", "MB", "lower")
        for sandbox in random.sample(self._live(), min(SAMPLE, count)):
            pss.samples["sandboxed"].append(processes.memory(processes.of_sandbox(sandbox.id)).pss / 1e6)
        cpu = _measure("CPU of an idle kernel among many", "% of a core", "lower")
        time.sleep(5)
        used, since = self._cpu(), time.perf_counter()
        time.sleep(10)
        cpu.samples["sandboxed"] = [(self._cpu() - used) / (time.perf_counter() - since) / count * 100]
        return [held, first, last, pss, settled, ours, cpu]

    def _cpu(self) -> float:
        return sum(do(sandbox.stats()).cpu_seconds or 0.0 for sandbox in self._live())

    def _set(self, sandbox_id: str) -> None:
        value = self._values[sandbox_id] = random.randrange(1 << 30)
        do(evaluate(lifecycle().live[sandbox_id], f"x = {value}", "x"))

    def suspend(self, wanted: int) -> list[Measure]:
        """Suspend all, then make more of them from one snapshot, each with a value of its own."""
        began, own = time.perf_counter(), _own_memory()
        one_by_one = do(_at_a_time(sandbox.suspend() for sandbox in self._live()))
        taken = _measure(
            "suspend, two at a time", "s", "lower", one_by_one, f"all in {time.perf_counter() - began:.0f} s"
        )
        self._say(f"{len(self._values)} suspended")
        source = self._live()[0].record.snapshot
        begun = time.perf_counter()
        while len(self._values) < wanted and time.perf_counter() - begun < SECONDS and _disk_free() > DISK_LEFT:
            for outcome in do(lifecycle().spawn(str(source), min(AT_A_TIME, wanted - len(self._values)))):
                if outcome.error is not None:
                    raise outcome.error
                self._set(outcome.id)
                do(lifecycle().live[outcome.id].suspend())
            if len(self._values) % 50 == 0:
                self._say(f"{len(self._values)} suspended")
        count = len(self._values)
        running = sum(str(lifecycle().paths.runtime) in line for line in _command_lines())
        sizes = [lifecycle().snapshots.get(str(sandbox.record.snapshot)).size for sandbox in self._live()]
        return [
            taken,
            _measure("suspended kernels held", "kernels", "higher", [float(count)], f"of {wanted}"),
            _measure("processes of all suspended kernels", "processes", "lower", [float(running)]),
            _measure("disk of a suspended kernel", "MB", "lower", [size / 1e6 for size in sizes]),
            _measure("owner's memory per suspended kernel", "MB", "lower", [(_own_memory() - own) / 1e6 / count]),
        ]

    def wake(self) -> list[Measure]:
        """Some of them are woken by a request, and know what they knew."""
        measure = _measure("a suspended one among many to its answer", "s", "lower")
        for sandbox in random.sample(self._live(), min(WOKEN, len(self._values))):
            begun = time.perf_counter()
            found = do(evaluate(sandbox, "", "x"))
            measure.samples["sandboxed"].append(time.perf_counter() - begun)
            if found != str(self._values[sandbox.id]):
                raise BenchError(f"a kernel woke with {found!r} instead of {self._values[sandbox.id]}")
            if sandbox.state is not State.RUNNING:
                raise BenchError(f"a kernel that answers is {sandbox.state}")
        return [measure]

    def remove(self) -> None:
        """End all."""
        begun, count = time.perf_counter(), len(self._values)
        for manager in self._managers:
            manager.shutdown_kernel(now=True)
        left = [lifecycle().live[found] for found in self._values if found in lifecycle().live]
        do(_at_a_time(sandbox.destroy(Death(DeathKind.STOPPED)) for sandbox in left))
        self._say(f"{count} removed in {time.perf_counter() - begun:.0f} s")


async def evaluate(sandbox: LiveSandbox, code: str, name: str) -> str:
    """Run code and tell what a variable then is, as a client of the kernel would (which wakes it)."""
    answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def take(channel: int, parts: Any) -> None:
        if channel == Channel.SHELL and not answered.done():
            answered.set_result(bytes(parts[-1]))

    subscription = sandbox.seat.channels.subscribe(take)
    content = {"code": code, "silent": True, "user_expressions": {name: name}, "allow_stdin": False}
    request = messages.build(sandbox.launch.key, "execute_request", content)
    sandbox.seat.channels.request(int(Channel.SHELL), [b"bench", *request])
    try:
        async with asyncio.timeout(PATIENCE):
            reply = json.loads(await answered)
    finally:
        subscription.close()
    return str(reply["user_expressions"][name]["data"]["text/plain"])


async def _at_a_time(work: Iterable[Awaitable[object]]) -> list[float]:
    """Seconds of each, so many beside each other."""
    room = asyncio.Semaphore(AT_A_TIME)

    async def one(item: Awaitable[object]) -> float:
        async with room:
            begun = time.perf_counter()
            await item
            return time.perf_counter() - begun

    return list(await asyncio.gather(*(one(item) for item in work)))


def _measure(name: str, unit: str, better: str, samples: Iterable[float] = (), note: str = "") -> Measure:
    measure = Measure(name, unit, better, note=note)
    measure.samples["sandboxed"].extend(samples)
    return measure


def _memory_info() -> dict[str, int]:
    with open("/proc/meminfo") as file:
        return {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in file}


def _available() -> int:
    return _memory_info()["MemAvailable"]


def _used() -> float:
    info = _memory_info()
    return 1 - info["MemAvailable"] / info["MemTotal"]


def _own_memory() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _disk_free() -> int:
    return shutil.disk_usage(lifecycle().paths.home).free


def _command_lines() -> list[str]:
    lines = []
    for pid in os.listdir("/proc"):
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                lines.append(file.read())
        except OSError:
            continue
    return lines
