"""Thousands of random steps on several kernels at once, each watched by a client that knows what it must see.

Each kernel has a thread of its own here (:class:`Rig`), a client, and an application process that starts it and is
killed now and then; a kernel that lost its application is taken over by the keeper. Lives are bounded: after some
dozens of steps a kernel is removed, what it could have left is looked for, and the next one begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import threading
import time
import traceback
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from acceptance import START, Product
from application import Application, Gone
from leaks import marked
from model import KernelModel, Request
from watcher import Broken, Stuck, Watcher

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import discover
from sandbox_gateway.keeper import drive
from sandbox_gateway.owner_lock import holder
from sandbox_gateway.store import Store

CLI_SHARE = 0.08
"""Part of the operations that go through the command line; the others ask the owner directly, which is faster."""
OPERATION = 120.0
"""Seconds that one operation may take on a busy machine."""
ENDED = frozenset({"terminated", "failed", "expired"})


class Refused(Exception):
    """An operation failed, with what was said."""


@dataclass
class Plan:
    """What to do."""

    cycles: int
    """Suspend and resume cycles, of all kernels together, after which the run ends."""
    seed: int
    kernels: int = 4
    specs: tuple[str, ...] = ("python3-gvisor",)
    """Kernelspecs, taken in turn."""
    seconds: float | None = None
    """Ends the run earlier."""
    stop_at: int = 20
    """Failures at which it is given up."""
    features: frozenset[str] = frozenset({"suspend", "pause", "fork", "connect"})
    """Commands that this version has; steps that need others are left out."""


@dataclass
class Report:
    """What was done, and what was wrong."""

    steps: Counter[str] = field(default_factory=Counter)
    cycles: int = 0
    lives: int = 0
    lines: int = 0
    messages: int = 0
    repeats: int = 0
    lost_requests: int = 0
    seconds: float = 0.0
    latencies: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    growth: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Several lines for people."""
        lines = [
            f"{sum(self.steps.values())} steps, {self.cycles} suspend/resume cycles, {self.steps['fork']} forks,"
            f" {self.steps['kill']} kills of an owner, {self.lives} kernels in {self.seconds:.0f} s:"
            f" {len(self.failures)} failures",
            f"{self.lines} lines in {self.messages} messages; after kills {self.repeats} repeated messages,"
            f" {self.lost_requests} requests that went down with an owner",
            "steps: " + ", ".join(f"{name} {count}" for name, count in sorted(self.steps.items())),
        ]
        for name, values in sorted(self.latencies.items()):
            quantiles = sorted(values)
            p50, p95 = statistics.median(quantiles), quantiles[int(len(quantiles) * 0.95)]
            lines.append(f"{name}: p50 {p50:.3f} s, p95 {p95:.3f} s, max {quantiles[-1]:.3f} s, n {len(quantiles)}")
        lines += [f"{what}: at most {amount}" for what, amount in sorted(self.growth.items())]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        return {**self.__dict__, "steps": dict(self.steps), "latencies": dict(self.latencies)}


class World:
    """What all kernels of a run share."""

    def __init__(self, product: Product, plan: Plan, logs: Path) -> None:
        self.product = product
        self.plan = plan
        self.logs = logs
        self.paths = discover({"SANDBOX_GATEWAY_HOME": str(product.home)})
        self.store = Store(self.paths.database)
        self.report = Report()
        self.killed: set[int] = set()
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(max_workers=4 * plan.kernels, thread_name_prefix="soak-operation")
        self._begun = time.monotonic()
        self._loop = asyncio.new_event_loop()
        self._turning = threading.Thread(target=self._loop.run_forever, name="soak-loop", daemon=True)
        self._turning.start()

    @property
    def over(self) -> bool:
        """Whether the run is to end."""
        late = self.plan.seconds is not None and time.monotonic() - self._begun > self.plan.seconds
        report = self.report
        return late or report.cycles >= self.plan.cycles or len(report.failures) >= self.plan.stop_at

    def run(self) -> Report:
        """All of it."""
        rigs = [Rig(self, number) for number in range(self.plan.kernels)]
        threads = [threading.Thread(target=rig.work, name=f"soak-{rig.number}") for rig in rigs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.report.seconds = time.monotonic() - self._begun
        return self.report

    def close(self) -> None:
        """End the helpers."""
        self.pool.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._turning.join(10)
        self._loop.close()
        self.store.close()

    # Operations on sandboxes; these block

    def command(self, *words: str) -> str:
        """``jupyter sandbox <words>``; what it printed, or :class:`Refused`."""
        try:
            done = self.product.command(*words, timeout=OPERATION)
        except subprocess.TimeoutExpired:
            raise Refused(f"`{' '.join(words)}` took more than {OPERATION:.0f} s") from None
        if done.returncode != 0:
            raise Refused(f"`{' '.join(words)}`: {done.returncode} {done.stderr.strip()}")
        return done.stdout

    def operate(self, op: str, sandbox_id: str, through_cli: bool) -> str:
        """Suspend, resume, pause or connect, as the command does or by the command; raises :class:`Refused`.

        Returns what the command printed, or the answer's ``connection_file``.
        """
        if through_cli:
            return self.command(op, sandbox_id).strip()
        asking = asyncio.run_coroutine_threadsafe(drive(self.paths, sandbox_id, op), self._loop)
        try:
            return str(asking.result(OPERATION + 10).get("connection_file", ""))
        except SandboxGatewayError as error:
            raise Refused(f"{op}: {error.code}: {error}") from error

    def state(self, sandbox_id: str) -> str:
        """The recorded state."""
        try:
            return str(self.store.get(sandbox_id).state)
        except SandboxGatewayError:
            return "unknown"

    def owner(self, sandbox_id: str) -> int | None:
        """The pid that owns it now."""
        return holder(self.paths.sandbox(sandbox_id))

    def kill_owner(self, pid: int) -> None:
        """``kill -9``: all kernels that it owned notice by :attr:`killed`."""
        with self.lock:
            self.killed.add(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def note(self, name: str, seconds: float) -> None:
        """A latency."""
        with self.lock:
            self.report.latencies[name].append(seconds)

    def measure_owner(self, pid: int, first: dict[int, tuple[int, int]]) -> None:
        """How much more memory and descriptors an owner has than when it was first seen."""
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            rss = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
            fds = len(os.listdir(f"/proc/{pid}/fd"))
        except (OSError, StopIteration):
            return
        before = first.setdefault(pid, (rss, fds))
        with self.lock:
            for what, amount in (("owner's memory grew, KiB", rss - before[0]), ("its open files", fds - before[1])):
                self.report.growth[what] = max(self.report.growth.get(what, 0), amount)

    def left_of(self, sandbox_id: str) -> list[str]:
        """What is left of a removed sandbox; what is half removed when its owner is killed goes with the next sweep."""
        directory = self.paths.sandbox(sandbox_id)
        left = [f"process {ref.pid}" for ref in marked(str(directory), sandbox_id)]
        if directory.exists():
            left += [str(path) for path in (directory, *directory.iterdir())]
        for folder in (self.paths.home / "snapshots", self.paths.runsc_root, self.paths.logs):
            if folder.is_dir():
                left += [str(path) for path in folder.iterdir() if sandbox_id in path.name]
        for manifest in (self.paths.home / "snapshots").glob("[!.]*/manifest.json"):
            with contextlib.suppress(OSError):
                if sandbox_id in manifest.read_text():
                    left.append(f"snapshot {manifest.parent.name}")
        return left


class Lodging:
    """Takes a fork's child over when the keeper that had it is killed by one of the others."""

    def __init__(self, world: World, sandbox_id: str, watcher: Watcher) -> None:
        self._world = world
        self._id = sandbox_id
        self._watcher = watcher
        self._owner = world.owner(sandbox_id)
        self._busy = False
        watcher.on_tick = self._tick
        watcher.model.unnoticed = self._killed

    def _killed(self) -> bool:
        return self._owner in self._world.killed

    def operate(self, op: str) -> None:
        """Suspend or resume it."""
        try:
            self._world.operate(op, self._id, False)
        except Refused:
            if not self._killed():
                raise

    def _tick(self) -> None:
        while self._killed() and not self._busy:
            self._busy = True
            try:
                self._take_over()
            finally:
                self._busy = False

    def _take_over(self) -> None:
        watcher, model = self._watcher, self._watcher.model
        model.crash()
        deadline = time.monotonic() + OPERATION
        while self._killed():
            future = self._world.pool.submit(self._world.operate, "connect", self._id, False)
            while not future.done():
                watcher.pump(0.01)
            owner = self._world.owner(self._id)
            if future.exception() is None and owner is not None:
                self._owner = owner
            elif time.monotonic() > deadline:
                raise Broken(f"the child {self._id} was not taken over: {future.exception()}")
        watcher.idle(0.1)
        model.recovered()
        if any(not request.seen for request in model.open()):
            probe = watcher.execute("pass")
            watcher.wait(lambda: probe.seen or self._killed() or model.failures, "the first sign of an adopted child")
            if probe.seen:
                model.settle(probe)


class Rig:
    """One kernel after another, on one thread."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.rng = random.Random(f"{world.plan.seed}-{number}")
        self.history: deque[str] = deque(maxlen=60)
        self._first: dict[int, tuple[int, int]] = {}

    def work(self) -> None:
        """Lives until the run is over."""
        while not self.world.over:
            try:
                self.life()
            except Exception as error:
                self._failed(error)
            finally:
                self._clear()
            with self.world.lock:
                self.world.report.lives += 1

    # One life

    def life(self) -> None:
        """Start a kernel, take random steps with it, remove it, look for what is left."""
        rng = self.rng
        self.id = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        self.history.clear()
        self.application: Application | None = None
        self.watcher: Watcher | None = None
        self.children: list[str] = []
        self.state = "running"
        self.counter = 0
        self.counters: list[Request] = []
        self.owner: int | None = None
        self.files = 0
        self.comms = 0
        self.recovering = False
        self._noticed: set[int] = set()
        self._begin(self.world.plan.specs[self.number % len(self.world.plan.specs)])
        for _ in range(rng.randint(20, 120)):
            if self.world.over:
                break
            name, step = self._choose()
            self._log(name)
            with self.world.lock:
                self.world.report.steps[name] += 1
            step()
            self._look()
        self._log("end")
        self._settle()
        assert self.watcher is not None
        self.watcher.model.check_end()
        self.watcher.check()
        self._remove()

    def _begin(self, spec: str) -> None:
        world = self.world
        begun = time.monotonic()
        self.application = Application(world.logs / f"application-{self.number}.log")
        file = Path(self.application.call("start", spec, self.id, timeout=START))
        self.owner = self.application.process.pid
        self._log(f"start {spec} {self.id} by {self.owner}")
        self.watcher = Watcher(file, KernelModel(), self.rng)
        self.watcher.on_tick = self._tick
        self.watcher.model.unnoticed = self._unnoticed
        self.watcher.setup()
        world.note("start to the end of the first cell", time.monotonic() - begun)

    @property
    def w(self) -> Watcher:
        """The client."""
        assert self.watcher is not None
        return self.watcher

    def _choose(self) -> tuple[str, Callable[[], None]]:
        features = self.world.plan.features
        busy = self.w.model.open()
        asked = any(request.waits_for_input for request in busy)
        choices: list[tuple[float, str, Callable[[], None]]] = [
            (0.5, "wait", lambda: self.w.idle(self.rng.uniform(0, 0.4))),
        ]
        asleep = self.state != "running"
        if asleep:
            choices += [(6, "resume", self._resume), (2, "wake", self._wake), (0.5, "resume twice", self._race)]
            if len(busy) == 1 and self.state == "suspended" and not asked and not busy[0].threaded:
                choices += [(0.3, "interrupt", self._interrupt)]
        else:
            if len(busy) < 3 and not asked:
                choices += [
                    (2, "lines", self._lines),
                    (3, "long lines", self._long_lines),
                    (1.5, "count", self._count),
                    (0.7, "show", self._show),
                    (0.6, "clock", self._clock),
                ]
            if not busy:
                choices += [(1.0, "input", self._ask), (0.7, "comm", self._comm), (0.4, "file", self._file)]
                if self._owned():
                    choices += [(0.2, "restart", self._restart)]
            if len(busy) == 1 and not asked and busy[0].lines > 50 and not busy[0].threaded:
                choices += [(0.6, "interrupt", self._interrupt)]
        if asked:
            choices += [(3, "answer", self._answer)]
        if "suspend" in features:
            choices += [(6 if not asleep else 0.3, "suspend", self._suspend), (0.4, "race", self._race)]
            choices += [(1.5, "burst", self._burst)]
        if "pause" in features and self.state != "suspended":
            choices += [(1, "pause", self._pause)]
        if "fork" in features and len(busy) <= 1 and not asked and all(request.busy for request in busy):
            choices += [(0.35, "fork", self._fork)]
        if "connect" in features:
            choices += [(0.2, "kill", self._kill), (0.2, "connect", self._connect)]
            if "suspend" in features:
                choices += [(0.15, "kill in suspend", self._kill_in_operation)]
        weights = [weight for weight, _, _ in choices]
        _, name, step = self.rng.choices(choices, weights)[0]
        return name, step

    # Steps: what a client does

    def _lines(self) -> None:
        request = self.w.lines(self.rng.randint(1, 40), self.rng.choice((0, 0, 0.002)))
        if self.rng.random() < 0.5:
            self.w.finish(request)

    def _long_lines(self) -> None:
        self.w.lines(self.rng.randint(60, 400), self.rng.choice((0.003, 0.01, 0.02)))

    def _count(self) -> None:
        self.counters.append(self.w.execute("counter += 1\nprint('counter', counter)", free=True))

    def _show(self) -> None:
        self.w.show(self.rng.randint(1, 4))

    def _clock(self) -> None:
        """The kernel's clock is the host's, also right after a resume."""
        request = self.w.execute("print(repr(time.time()))", free=True)
        begun = time.time()
        self.w.finish_all()
        if not request.ended and not begun - 1.0 <= float(request.said[0]) <= time.time() + 1.0:
            raise Broken(f"the kernel's clock said {request.said[0]} between {begun} and {time.time()}")

    def _ask(self) -> None:
        request = self.w.ask()
        self.w.wait(lambda: request.asked or request.ended or self.w.model.failures, "the question")
        if self.rng.random() < 0.3:
            self._answer()

    def _answer(self) -> None:
        for request in self.w.model.open():
            if request.waits_for_input:
                self.w.answer(request)
                self.state = "running"
                self.w.finish(request)

    def _comm(self) -> None:
        self._settle()
        self.comms += 1
        self._echo(self.w.comm(self.comms))

    def _echo(self, request: Request) -> None:
        self.w.finish_all()
        wanted = [{"echo": {"number": self.comms}, "counter": self.counter}]
        if not request.ended and request.echoes != wanted:
            raise Broken(f"the comm echoed {request.echoes} in the place of {wanted}")

    def _file(self) -> None:
        """Files last as long as the sandbox, restarts included."""
        code = (
            "import pathlib; path = pathlib.Path('/tmp/soak'); seen = path.read_text() if path.exists() else ''\n"
            "path.write_text(seen + 'x'); print(len(seen))"
        )
        request = self.w.execute(code, free=True)
        self.w.finish_all()
        if not request.ended:
            if request.said != [str(self.files)]:
                raise Broken(f"the file holds {request.said}, not {self.files}")
            self.files += 1

    def _interrupt(self) -> None:
        for request in self.w.model.open():
            request.cut = True
        self.w.idle(self.rng.uniform(0, 0.1))
        owned = self._owned()
        if owned and self.rng.random() < 0.5:
            self._application("interrupt", self.id)
        else:
            sent = self.w.control("interrupt_request")
            crashes = len(self.w.model.crashes)
            self.w.wait(
                lambda: sent in self.w.control_replies or len(self.w.model.crashes) > crashes,
                "the reply to an interrupt",
            )
        self.state = "running"
        # A kernel that gets it only when the cell has ended ignores it.
        self.w.finish_all()

    def _restart(self) -> None:
        self._settle()
        if not self._owned():
            return
        if self.rng.random() < 0.4:
            running = self.w.lines(500, 0.02)
            self.w.wait(lambda: running.next_line > 3 or running.done, "the first lines")
            if not self._owned():
                return
        if "suspend" in self.world.plan.features and self.rng.random() < 0.3:
            self._operate("suspend")
        if not self._application("restart", self.id):
            return
        self.state = "running"
        self.w.model.restarted()
        self.w.forget_comm()
        self.counter, self.counters = 0, []
        gone = self.w.execute("print('counter' in globals())", free=True)
        self.w.finish(gone)
        if not gone.ended and gone.said != ["False"]:
            raise Broken(f"the restarted kernel still has its variables: {gone.said}")
        self.w.setup()

    # Steps: what is done to the sandbox

    def _suspend(self) -> None:
        if self.rng.random() < 0.6:
            self.w.idle(self.rng.uniform(0, 0.25))
        self._operate("suspend")

    def _burst(self) -> None:
        """One after the other, in the middle of whatever runs."""
        for _ in range(self.rng.randint(3, 10)):
            if self.rng.random() < 0.7:
                self.w.idle(self.rng.uniform(0, 0.15))
            if not (self._operate("suspend") and self._operate("resume")):
                return
            self.w.check()

    def _pause(self) -> None:
        # What wakes it may still be under way, and what is suspended cannot be paused.
        self.w.wait(lambda: self.world.state(self.id) in {"running", "paused"} or self._unnoticed(), "the wake")
        self._operate("pause")

    def _resume(self) -> None:
        if self.rng.random() < 0.5:
            self.w.idle(self.rng.uniform(0, 0.3))
        before = self.state
        running = [request for request in self.w.model.open() if request.lines and request.busy]
        lines = self.w.model.lines
        begun = time.monotonic()
        if self._operate("resume") and before == "suspended" and running and not running[0].waits_for_input:
            self.w.wait(lambda: self.w.model.lines > lines or running[0].done, "output after a resume")
            self.world.note("resume to the next line", time.monotonic() - begun)

    def _wake(self) -> None:
        """A request wakes it."""
        before, begun = self.state, time.monotonic()
        if any(request.waits_for_input for request in self.w.model.open()):
            self._answer()
        elif not self.w.model.open():
            if self.rng.random() < 0.3 and not self.counters:
                self.comms += 1
                request = self.w.comm(self.comms)
                self.state = "running"
                self._echo(request)
            else:
                self._count()
                self.state = "running"
                self.w.finish(self.counters[-1])
                self.world.note(f"execute that wakes from {before}", time.monotonic() - begun)
        else:
            self._count()
            self.state = "running"
        if before == "suspended":
            self._cycle()

    def _race(self) -> None:
        """Concurrent calls on one sandbox are serialised: all succeed, in some order."""
        owner = self.owner
        ops = [self.rng.choice(("suspend", "resume")) for _ in range(self.rng.randint(2, 4))]
        self._log(f"race {ops}")
        futures = [self.world.pool.submit(self.world.operate, op, self.id, False) for op in ops]
        outcomes = [self._outcome(future, owner) for future in futures]
        self._log(f"race gave {outcomes}")
        self.state = "unknown"
        self._operate("resume")

    def _fork(self) -> None:
        model = self.w.model
        running = [request for request in model.open() if request.busy]
        count = self.rng.randint(1, 2)
        self._counted()
        parent, executed, state = self.counter, model.count, self.state
        if self.counters:
            return
        begun = time.monotonic()
        found = self._outcome_of(lambda: self.world.command("fork", self.id, "-n", str(count), "--json"))
        if found is None:
            return
        self.world.note(f"fork of {count} by the command", time.monotonic() - begun)
        # A cell that has ended by now may have ended before the fork: then its children have nothing of it.
        ended = {request.msg_id for request in running if request.done}
        children = json.loads(found)
        children = [child["id"] if isinstance(child, dict) else child for child in children]
        self.children += children
        self._log(f"children {children}")
        if len(children) != count or len({*children, self.id}) != count + 1:
            raise Broken(f"a fork of {count} gave {children}")
        # Beside printing, the parent is what it was.
        if self.world.state(self.id) != state and self.owner not in self.world.killed:
            raise Broken(f"the fork left its parent {self.world.state(self.id)}, it was {state}")
        randoms = [self._child(child, parent, executed, running, ended) for child in children]
        if state == "running":
            self._settle()
            randoms.append(self._free(self.w, RANDOM))
        for numbers in zip(*randoms, strict=True):
            if len(set(numbers)) != len(numbers):
                raise Broken(f"clones drew the same: {randoms}")

    def _child(self, child: str, counter: int, count: int, running: list[Request], ended: set[str]) -> list[str]:
        """Use a fork's child as a client, and remove it."""
        file = Path(self.world.operate("connect", child, self.rng.random() < CLI_SHARE))
        model = KernelModel(count)
        watcher = Watcher(file, model, self.rng)
        lodging = Lodging(self.world, child, watcher)
        try:
            rest = []
            for request in running:
                inherited = Request(
                    request.msg_id,
                    request.tag,
                    lines=request.lines,
                    first=None,
                    displays=request.displays,
                    inherited=True,
                    free=bool(request.displays),
                )
                inherited.busy, inherited.count = 1, request.count
                rest.append(model.sent(inherited))
            watcher.wait(lambda: watcher.welcomed, "the welcome")
            numbers = self._free(watcher, RANDOM)
            for request in rest:
                if not request.idle and request.msg_id in ended and request.first is None:
                    request.ended = True
                elif not request.idle:
                    raise Broken(f"the child {child} never ended the cell of its parent: {request.describe()}")
            found = self._free(watcher, "counter += 1; print(counter)")
            if found != [str(counter + 1)]:
                raise Broken(f"the child {child} counts {found} where its parent had {counter}")
            if "suspend" in self.world.plan.features and self.rng.random() < 0.5:
                request = watcher.lines(100, 0.01)
                watcher.wait(lambda: request.next_line > 0 or request.done, "a line")
                lodging.operate("suspend")
                lodging.operate("resume")
                self._cycle()
                watcher.finish(request)
            model.check_end()
            watcher.check()
            return numbers
        except (Broken, Stuck) as error:
            raise Broken(f"child {child}: {error}; its last messages: {list(model.recent)[-15:]}") from error
        finally:
            watcher.close()
            self._add_up(model)
            self.world.command("rm", child)
            self.children.remove(child)
            self._nothing_left(child)

    def _free(self, watcher: Watcher, code: str) -> list[str]:
        """What a cell printed; sent again when it went down with an owner."""
        while True:
            request = watcher.execute(code, free=True)
            watcher.finish(request)
            if not request.ended:
                return request.said

    def _connect(self) -> None:
        """The command names a connection file of the same endpoints, whoever owns the kernel."""
        found = self._outcome_of(lambda: self.world.command("connect", self.id))
        if found is not None:
            self._same_endpoints(Path(found.strip()))

    def _kill(self) -> None:
        """``kill -9`` of the process that owns it: the kernel runs on, and the keeper takes it."""
        if self.owner is not None:
            self._log(f"kill {self.owner}")
            self.world.kill_owner(self.owner)
            if self.rng.random() < 0.5:
                time.sleep(self.rng.uniform(0, 0.5))
        self._tick()

    def _kill_in_operation(self) -> None:
        owner = self.owner
        op = "resume" if self.state == "suspended" else "suspend"
        future = self.world.pool.submit(self.world.operate, op, self.id, False)
        self._pump_until(lambda: future.done(), self.rng.uniform(0, 0.35))
        if owner is not None:
            self._log(f"kill {owner} in {op}")
            self.world.kill_owner(owner)
            with self.world.lock:
                self.world.report.steps["kill"] += 1
        self._pump_until(future.done, OPERATION + 20)
        self._log(f"{op} gave {future.exception() if future.done() else 'nothing'}")
        self._tick()

    # The owner

    def _owned(self) -> bool:
        """Whether the application that started the kernel still owns it."""
        application = self.application
        return application is not None and self.owner == application.process.pid and self.owner not in self.world.killed

    def _application(self, *words: Any) -> bool:
        """Have the application do something; False when it was killed meanwhile."""
        application = self.application
        assert application is not None
        future = self.world.pool.submit(application.call, *words)
        self._pump_until(future.done, OPERATION + 20)
        try:
            future.result(0)
            return True
        except Gone:
            if self._owned():
                raise
            self._tick()
            return False

    def _tick(self) -> None:
        """Called all the time: when the owner was killed, the kernel is taken over."""
        if self.owner is None or self.owner not in self.world.killed or self.recovering:
            return
        self.recovering = True
        try:
            self._recover()
        finally:
            self.recovering = False

    def _recover(self) -> None:
        begun = time.monotonic()
        self._notice()
        while True:
            cli = self.rng.random() < CLI_SHARE
            future = self.world.pool.submit(self.world.operate, "connect", self.id, cli)
            self._pump_until(future.done, OPERATION + 20)
            try:
                found = future.result(0)
            except (Refused, OSError) as error:
                # The keeper may be killed over it by another rig.
                if time.monotonic() - begun > OPERATION or "illegal_transition" in str(error):
                    raise Broken(f"not taken over after the kill of {self.owner}: {error}") from error
                self._log(f"connect: {error}")
                time.sleep(0.2)
                continue
            owner = self.world.owner(self.id)
            if owner is not None and owner not in self.world.killed:
                break
        self.world.note("kill to adopted", time.monotonic() - begun)
        self.owner = owner
        # What the dead owner had sent may still wait to be read.
        self._pump_until(lambda: False, 0.1)
        self.w.model.recovered()
        self._same_endpoints(Path(found.strip()))
        self.state = self._steady_state()
        self._log(f"adopted by {owner}, {self.state}")
        for request in self.w.model.open():
            if request.waits_for_input and request.answered is not None:
                self.w.answer(request)
                self.state = "running"
        unknown = [request for request in self.w.model.open() if not request.seen]
        if unknown:
            # Requests come in order: once the kernel begins this one, it does not have those before.
            probe = self.w.execute("pass")
            self.state = "running"
            owner = self.owner
            self.w.wait(
                lambda: probe.seen or owner in self.world.killed or self.w.model.failures or self._asks(),
                "the first sign of the adopted kernel",
            )
            if probe.seen:
                lost = self.w.model.settle(probe)
                self._log(f"lost with the owner: {[request.tag for request in lost]}")

    def _notice(self) -> None:
        """Once for each kill."""
        if self.owner is not None and self.owner in self.world.killed and self.owner not in self._noticed:
            self._noticed.add(self.owner)
            self.w.model.crash()

    def _unnoticed(self) -> bool:
        return self.owner in self.world.killed and self.owner not in self._noticed

    def _asks(self) -> bool:
        return any(request.waits_for_input for request in self.w.model.open())

    def _steady_state(self) -> str:
        deadline = time.monotonic() + OPERATION
        while (state := self.world.state(self.id)) not in {"running", "paused", "suspended"}:
            if state in ENDED or state == "unknown" or time.monotonic() > deadline:
                raise Broken(f"the adopted kernel is {state}")
            self.w.pump(0.05)
        return state

    def _same_endpoints(self, file: Path) -> None:
        mine = self.w._client.get_connection_info()
        found = json.loads(file.read_text())
        key = mine["key"].decode() if isinstance(mine["key"], bytes) else mine["key"]
        if found["key"] != key or any(found[name] != mine[name] for name in ("ip", "transport", "shell_port")):
            raise Broken(f"{file} names other endpoints than before")

    # Operations, while messages go on being read

    def _operate(self, op: str) -> bool:
        before, begun, owner = self.state, time.monotonic(), self.owner
        cli = self.rng.random() < CLI_SHARE
        future = self.world.pool.submit(self.world.operate, op, self.id, cli)
        self._log(f"{op} by {'the command' if cli else 'request'}")
        if self._outcome(future, owner) is not None:
            return False
        state = {"suspend": "suspended", "resume": "running", "pause": "paused"}[op]
        seconds = time.monotonic() - begun
        if before != state and before in {"running", "suspended", "paused"}:
            self.world.note(f"{op} of a {before} kernel by {'the command' if cli else 'request'}", seconds)
        if op == "suspend" and before != "suspended":
            found = self.world.state(self.id)
            # A request that was under way may have woken it already.
            woken = any(not request.seen for request in self.w.model.open())
            if found != "suspended" and owner not in self.world.killed and not woken:
                raise Broken(f"suspend returned, and the state is {found}")
            if not woken and self.rng.random() < 0.1:
                self._asleep()
        if op == "resume" and before == "suspended":
            self._cycle()
        self.state = state
        return True

    def _asleep(self) -> None:
        """A suspended kernel has no process and no memory."""
        left = [ref.pid for ref in marked(str(self.world.paths.sandbox(self.id)), self.id)]
        if left:
            raise Broken(f"the suspended kernel still has processes: {left}")

    def _outcome(self, future: Future[None], owner: int | None) -> str | None:
        """Wait for an operation, reading messages: None when it succeeded, its error when the owner was killed."""
        self._pump_until(future.done, OPERATION + 20)
        try:
            future.result(0)
            return None
        except (Refused, OSError) as error:
            if owner in self.world.killed:
                self._tick()
                return str(error)
            raise Broken(str(error)) from error

    def _outcome_of(self, act: Callable[[], str]) -> str | None:
        """Of a command; None when it failed and an owner (perhaps the keeper that had to help) was killed meanwhile."""
        kills = len(self.world.killed)
        future = self.world.pool.submit(act)
        self._pump_until(future.done, OPERATION + 20)
        try:
            return future.result(0)
        except Refused as error:
            if len(self.world.killed) > kills:
                self._tick()
                return None
            raise Broken(str(error)) from error

    def _pump_until(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            self.w.pump(0.01)

    def _cycle(self) -> None:
        with self.world.lock:
            self.world.report.cycles += 1

    # Looking

    def _look(self) -> None:
        self.w.pump()
        self._counted()
        self.w.check()
        if self.owner is not None:
            self.world.measure_owner(self.owner, self._first)

    def _counted(self) -> None:
        """Compare the counters that came, in order."""
        while self.counters and (self.counters[0].done or self.counters[0].idle):
            request = self.counters.pop(0)
            if request.ended:
                continue
            self.counter += 1
            if request.said != [f"counter {self.counter}"]:
                raise Broken(f"it counts {request.said}, not {self.counter}")

    def _settle(self) -> None:
        """Awake, with nothing under way."""
        if self.state != "running":
            self._operate("resume")
        self._answer()
        self.w.finish_all()
        self._counted()

    # The end

    def _remove(self) -> None:
        way = self.rng.choice(("rm", "rm", "application"))
        if self._owned() and way == "application":
            self._log("shutdown by its application")
            self._application("shutdown", self.id, bool(self.rng.random() < 0.5))
            if not self._owned():
                self.world.command("rm", self.id)
        else:
            if "suspend" in self.world.plan.features and self.rng.random() < 0.5:
                self._operate("suspend")
            self._log("rm")
            self.world.command("rm", self.id)
        if self.application is not None:
            self.application.close()
            self.application = None
        self._nothing_left(self.id)

    def _nothing_left(self, sandbox_id: str) -> None:
        deadline = time.monotonic() + 20.0
        while left := [path for path in self.world.left_of(sandbox_id) if "/logs/" not in path]:
            if time.monotonic() > deadline:
                raise Broken(f"left of {sandbox_id}: {left}")
            time.sleep(0.05)

    def _clear(self) -> None:
        """After a life, good or bad: close what is here, remove what is there."""
        if self.watcher is not None:
            self._add_up(self.watcher.model)
            self.watcher.close()
            self.watcher = None
        for sandbox_id in (*self.children, self.id):
            with contextlib.suppress(Exception):
                if self.world.state(sandbox_id) != "unknown":
                    self.world.command("rm", sandbox_id)
        if self.application is not None:
            self.application.close()
            self.application = None

    def _add_up(self, model: KernelModel) -> None:
        with self.world.lock:
            report = self.world.report
            report.lines += model.lines
            report.messages += model.messages
            report.repeats += model.repeats
            report.lost_requests += model.lost_requests

    def _log(self, text: str) -> None:
        self.history.append(f"{time.strftime('%H:%M:%S')} {text}")

    def _failed(self, error: Exception) -> None:
        """All that helps to understand it."""
        text = [f"kernel {self.number}, seed {self.world.plan.seed}: {type(error).__name__}: {error}"]
        if not isinstance(error, (Broken, Stuck, Refused)):
            text += traceback.format_exception(error)
        text += ["steps:", *(f"  {line}" for line in self.history)]
        if self.watcher is not None:
            model = self.watcher.model
            text += ["failures of the model:", *(f"  {failure}" for failure in model.failures)]
            text += ["last messages:", *(f"  {line}" for line in list(model.recent)[-25:])]
            text += ["notices:", *(f"  {notice!r}" for notice in model.notices[-10:])]
        with contextlib.suppress(Exception):
            rows = json.loads(self.world.command("ps", "--all", "--json"))
            text += ["ps:", *(f"  {row}" for row in rows if row["id"] in {self.id, *self.children})]
        with contextlib.suppress(Exception):
            events = [event for event in self.world.store.events() if event.sandbox in {self.id, *self.children}]
            text += ["events:", *(f"  {event.as_dict()}" for event in events[-20:])]
        text += ["logs:", *(f"  {line}" for line in self._tails())]
        with self.world.lock:
            self.world.report.failures.append("\n".join(text))
        print("\n".join(text), flush=True)

    def _tails(self) -> Iterator[str]:
        for path in (self.world.logs / f"application-{self.number}.log", *self.world.paths.logs.glob("_keeper*")):
            with contextlib.suppress(OSError):
                for line in path.read_text(errors="replace").splitlines()[-15:]:
                    yield f"{path.name}: {line[:400]}"


RANDOM = """
import secrets, ssl
print(random.random()); print(uuid.uuid4()); print(secrets.token_hex(8)); print(ssl.RAND_bytes(8).hex())
"""
