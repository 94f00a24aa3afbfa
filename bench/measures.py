"""The measures. Each takes samples of both kernels in turn, so that a busy moment of the machine meets both."""

from __future__ import annotations

import gc
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from bench import processes
from bench.kernels import BenchError, Kernel, Unanswered, start

SIDES = ("plain", "sandboxed")
PLAIN_TRIES = 5


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    starts: int
    round_trips: int
    repeats: int
    plain_lines: int
    flushed_lines: int
    idle_kernels: int
    idle_seconds: float
    display_bytes: int = 10_000_000
    naps: int = 11
    large: int = 3
    states: tuple[int, ...] = (1 << 30) // 10, 1 << 30, 4 << 30
    bursts: tuple[int, ...] = 1, 4, 16
    together: tuple[int, ...] = 1, 10, 50
    """Kernels that print at once through one server."""
    pages: int = 11
    """Loads of JupyterLab's page."""
    dense_idle: int = 200
    dense_suspended: int = 1000


FULL = Plan(
    starts=11, round_trips=300, repeats=7, plain_lines=100_000, flushed_lines=5_000, idle_kernels=3, idle_seconds=10
)
QUICK = Plan(
    starts=3,
    round_trips=60,
    repeats=3,
    plain_lines=50_000,
    flushed_lines=2_000,
    idle_kernels=1,
    idle_seconds=4,
    naps=3,
    large=1,
    states=((1 << 30) // 10,),
    bursts=(1, 4),
    together=(1, 4),
    pages=3,
    dense_idle=40,
    dense_suspended=100,
)


@dataclass
class Measure:
    """One row: samples of both sides and what they are held to."""

    name: str
    unit: str
    better: str
    """``lower`` or ``higher``."""
    target_ratio: float | None = None
    """Sandboxed / plain: the most (``lower``) or the least (``higher``) it may be."""
    target_value: float | None = None
    """The same for the sandboxed side's own figure."""
    target_from: str = ""
    samples: dict[str, list[float]] = field(default_factory=lambda: {side: [] for side in SIDES})
    note: str = ""

    def median(self, side: str) -> float:
        """p50 of a side's samples; not a number where it has none (the plain kernel cannot be suspended)."""
        return statistics.median(self.samples[side]) if self.samples[side] else math.nan

    @property
    def ratio(self) -> float | None:
        """Sandboxed p50 over plain p50; None where the plain one is too small to divide by."""
        plain = self.median("plain")
        return self.median("sandboxed") / plain if plain > 0 else None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target_value is not None:
            return _holds(self.median("sandboxed"), self.target_value, self.better)
        if self.target_ratio is not None and self.ratio is not None:
            return _holds(self.ratio, self.target_ratio, self.better)
        return None


def _holds(value: float, target: float, better: str) -> bool:
    return value <= target if better == "lower" else value >= target


@contextmanager
def pair(names: dict[str, str]) -> Iterator[dict[str, Kernel]]:
    """One kernel of each side."""
    made: dict[str, Kernel] = {}
    try:
        for side in SIDES:
            made[side] = start(names[side])
        yield made
    finally:
        for kernel in made.values():
            kernel.stop()


IMPORTS = "import numpy, pandas, matplotlib.pyplot"


def starts(names: dict[str, str], plan: Plan, say: Callable[[str], None]) -> list[Measure]:
    """From the request to start until a first result, in the ways there are to start; and deletion."""
    template = Measure(
        "create to first result", "s", "lower", target_ratio=0.45, target_from="issue", note="from a template; aim 0.3"
    )
    preloaded = Measure("the same, pandas and matplotlib imported", "s", "lower", target_ratio=0.2, target_from="issue")
    pool = Measure("from the pool", "s", "lower", target_ratio=0.15, target_from="issue", note="aim 0.08")
    cold = Measure("cold start", "s", "lower", note="what builds a template, and the fallback")
    delete = Measure(
        "delete", "s", "lower", target_value=0.1, target_from="issue", note="shutdown(now) until no process is left"
    )
    plain = names["plain"]
    rows = [
        (template, names["sandboxed"], ""),
        (preloaded, "bench-preloaded", IMPORTS),
        (pool, "bench-pool", ""),
        (cold, "bench-cold", ""),
    ]
    for measure, name, _ in rows:
        start(name).stop()
        say(f"ready: {measure.name}")
    for number in range(plan.starts):
        for measure, name, code in rows:
            for side in _turn(number):
                kernel = start(plain if side == "plain" else name)
                seconds = kernel.first_result + (kernel.execute(code)[0] if code else 0.0)
                measure.samples[side].append(seconds)
                stopped = kernel.stop()
                if measure is template:
                    delete.samples[side].append(stopped)
                if measure is pool:
                    time.sleep(1.0)  # until the pool is full again
        say(f"start {number + 1} of {plan.starts}")
    return [template, preloaded, pool, cold, delete]


def _burst(name: str, wide: int, say: Callable[[str], None]) -> float:
    """Kernels per second. jupyter_client chooses a plain kernel's ports before that takes them: two of a burst may have
    chosen the same one, and one of them never answers. Then the burst does not count."""
    for _ in range(3):
        begun = time.perf_counter()
        with ThreadPoolExecutor(wide) as pool:
            starts = [pool.submit(start, name) for _ in range(max(wide, 4))]
            wait(starts)
        seconds = time.perf_counter() - begun
        failed = [error for error in (each.exception() for each in starts) if error is not None]
        for each in starts:
            if each.exception() is None:
                each.result().stop()
        if not failed:
            return len(starts) / seconds
        if not all(isinstance(error, Unanswered) for error in failed):
            break
        say(f"{failed[0]}: the burst is repeated")
    raise failed[0]


def bursts(names: dict[str, str], plan: Plan, say: Callable[[str], None]) -> list[Measure]:
    """Kernels per second when several are wanted at once, each to its first result."""
    measures = []
    for wide in plan.bursts:
        measure = Measure(f"creates per second, {wide} at a time", "1/s", "higher")
        if wide > 1:
            measure.target_ratio, measure.target_from = 1.5, "design"
        for side in SIDES:
            measure.samples[side].append(_burst(names[side], wide, say))
        say(f"a burst, {wide} at a time")
        measures.append(measure)
    return measures


def _turn(number: int) -> tuple[str, ...]:
    return SIDES if number % 2 == 0 else SIDES[::-1]


def throughput(names: dict[str, str], plan: Plan, say: Callable[[str], None]) -> list[Measure]:
    """Round trips, printed lines and a large display, between one pair of kernels."""
    trip = Measure("execute round trip (ZMQ)", "ms", "lower", target_ratio=2.5, target_from="issue")
    plain = Measure("printed lines", "lines/s", "higher", target_ratio=1.0, target_from="issue")
    flushed = Measure(
        "printed lines, flush=True", "lines/s", "higher", target_ratio=0.25, target_from="issue", note="aim 0.4"
    )
    display = Measure("10 MB display", "MB/s", "higher")
    with pair(names) as kernels:
        for kernel in kernels.values():
            for _ in range(5):
                kernel.execute("1")
        block = 20
        for number in range(plan.round_trips // block):
            for side in _turn(number):
                trip.samples[side] += [kernels[side].execute("1")[0] * 1000 for _ in range(block)]
        say("round trips")
        for number in range(plan.repeats):
            for side in _turn(number):
                kernel = kernels[side]
                plain.samples[side].append(_lines(kernel, side, plan.plain_lines, ""))
                flushed.samples[side].append(_lines(kernel, side, plan.flushed_lines, ", flush=True"))
                display.samples[side].append(_display(kernel, plan.display_bytes))
            say(f"output {number + 1} of {plan.repeats}")
    return [trip, plain, flushed, display]


def _lines(kernel: Kernel, side: str, count: int, options: str) -> float:
    """Lines per second of a printing loop; raises when one is lost or doubled.

    The plain kernel drops lines itself now and then: its IOPub socket has a high-water mark, and a client on a busy
    machine falls behind. It is then asked again; the sandboxed one is not.
    """
    for _ in range(PLAIN_TRIES if side == "plain" else 1):
        seconds, messages = kernel.execute(f"for number in range({count}):\n    print(number{options})")
        wrong = misprinted(messages, count)
        if not wrong:
            return count / seconds
    raise BenchError(f"{side}: {wrong}")


def misprinted(messages: list[dict[str, Any]], count: int) -> str:
    """What is wrong with the messages of a cell that printed so many numbers; empty: each came once and in order."""
    streams = [message["content"] for message in messages if message["msg_type"] == "stream"]
    others = [f"{kept['msg_type']} {str(kept['content'])[:300]}" for kept in messages if kept["msg_type"] != "stream"]
    text = "".join(stream["text"] for stream in streams)
    if text == "".join(f"{number}\n" for number in range(count)):
        return ""
    lines = text.splitlines()
    gaps = [f"{line!r} after {before!r}" for before, line in itertools.pairwise(lines) if not _follows(before, line)]
    return (
        f"printed lines were lost or doubled: {len(lines)} of {count} in {len(streams)} messages, from {lines[:1]} to "
        f"{lines[-1:]}; {len(gaps)} gaps: {gaps[:3]}; {others}"
    )


def _follows(before: str, line: str) -> bool:
    return before.isdigit() and line.isdigit() and int(line) == int(before) + 1


def _display(kernel: Kernel, size: int) -> float:
    """MB per second of one display of ``size`` characters that were made before."""
    kernel.execute(f"from IPython.display import display\ntext = 'x' * {size}")
    seconds, messages = kernel.execute("display({'text/plain': text}, raw=True)")
    sizes = [
        len(message["content"]["data"]["text/plain"]) for message in messages if message["msg_type"] == "display_data"
    ]
    if sizes != [size]:
        raise BenchError(f"the display arrived with {sizes} characters instead of {size}")
    return size / 1e6 / seconds


def idle(names: dict[str, str], plan: Plan, say: Callable[[str], None]) -> list[Measure]:
    """Memory and processor use of kernels that do nothing, with all their host processes.

    What the owning process (here: the benchmark) needs for each kernel is a row of its own, since one process may own
    many kernels.
    """
    memory = Measure("memory of an idle kernel (PSS)", "MB", "lower", target_ratio=1.3, target_from="design, later")
    cpu = Measure(
        "processor use of an idle kernel", "% of a core", "lower", target_value=0.2, target_from="design, later"
    )
    private = Measure("of it anonymous or shared memory", "MB", "lower", note="without page cache")
    owner_memory = Measure("memory in the owning process", "MB", "lower", note="growth for each kernel")
    owner_cpu = Measure(
        "processor use of the owning process", "% of a core", "lower", note="owner with all idle kernels / kernels"
    )
    me = [os.getpid()]
    for side in SIDES:
        start(names[side]).stop()  # what the owner loads once, it has loaded now
        gc.collect()
        before = processes.memory(me).pss
        kernels: list[Kernel] = []
        try:
            kernels.extend(start(names[side]) for _ in range(plan.idle_kernels))
            for kernel in kernels:
                kernel.execute("1")
                kernel.client.stop_channels()
            time.sleep(2)
            gc.collect()
            owner_memory.samples[side].append((processes.memory(me).pss - before) / 1e6 / len(kernels))
            groups = [kernel.pids() for kernel in kernels]
            if not all(groups):
                raise BenchError(f"no host process of a {side} kernel was found")
            found = [processes.memory(group) for group in groups]
            memory.samples[side] += [usage.pss / 1e6 for usage in found]
            private.samples[side] += [usage.private / 1e6 for usage in found]
            used = [processes.cpu_seconds(group) for group in groups]
            own = processes.cpu_seconds(me)
            begun = time.perf_counter()
            time.sleep(plan.idle_seconds)
            waited = time.perf_counter() - begun
            cpu.samples[side] += [
                100 * (processes.cpu_seconds(group) - earlier) / waited
                for group, earlier in zip(groups, used, strict=True)
            ]
            owner_cpu.samples[side].append(100 * (processes.cpu_seconds(me) - own) / waited / len(kernels))
            memory.note = cpu.note = f"{plan.idle_kernels} kernels, all host processes of each"
        finally:
            for kernel in kernels:
                kernel.stop()
        say(f"idle, {side}")
    return [memory, private, owner_memory, cpu, owner_cpu]


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import platform
    from importlib.metadata import version

    model = ""
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("ipykernel", "jupyter_client", "pyzmq")},
        "load_before": [round(value, 2) for value in os.getloadavg()],
        "user": "root" if os.geteuid() == 0 else "ordinary user",
    }
