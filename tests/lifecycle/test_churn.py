"""Many kernels come and go, some of them killed by whatever can be killed, at any moment: nothing is left.

``SANDBOX_TEST_CHURN`` is the number of kernels (default 100), ``SANDBOX_TEST_CHURN_SEED`` repeats a run.
"""

from __future__ import annotations

import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from acceptance import FILES_KERNEL, KERNEL, Product, _runsc, kernel, until
from leaks import marked

from sandbox_gateway.host import processes
from sandbox_gateway.host.paths import discover

COUNT = int(os.environ.get("SANDBOX_TEST_CHURN", "100"))
AT_A_TIME = 4
PATIENCE = 90.0
"""Seconds within which a worker has to be done with one kernel, whatever happens to it."""
FATES = ("sandbox", "gofer", "holder", "agent", "owner")

WORKER = """
import os, sys
from jupyter_client import KernelManager

def live(kernel_id, name, folder):
    manager = KernelManager(kernel_name=name)
    manager.start_kernel(kernel_id=kernel_id, cwd=folder)
    print("started", flush=True)
    client = manager.blocking_client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=60)
        said = []
        def take(message):
            if message["msg_type"] == "stream":
                said.append(message["content"]["text"])
        client.execute_interactive("print(6 * 7)", timeout=30, output_hook=take)
        print("used", "".join(said).strip(), flush=True)
        client.execute("import time\\nfor i in range(100): print(i, flush=True); time.sleep(0.02)")
        if sys.stdin.readline().strip() == "wait":
            while manager.is_alive():
                try:
                    client.get_iopub_msg(timeout=0.2)
                except Exception:
                    pass
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)

for line in iter(sys.stdin.readline, ""):
    try:
        live(*line.split())
        outcome = "ended"
    except Exception as error:
        outcome = f"failed {type(error).__name__}: {error}"
    print(outcome.replace("\\n", " "), flush=True)
    print("open", len(os.listdir("/proc/self/fd")), flush=True)
"""
"""One application: kernels one after another, each started, used and shut down. It says how far it is."""


class Worker:
    """An application of its own that owns kernels."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
        )
        self.lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.open: list[int] = []

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line.strip())
        self.lines.put("gone")

    def say(self, text: str) -> None:
        """Give it a line; one that is gone takes none."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{text}\n")
        except OSError:
            pass

    def close(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.close()
        except OSError:
            pass
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(10)
        self.process.stdout.close()


@dataclass
class Report:
    """What happened, for the one who runs it by hand."""

    outcomes: Counter[str] = field(default_factory=Counter)
    struck: Counter[str] = field(default_factory=Counter)
    said: list[str] = field(default_factory=list)
    """What an application was told when its kernel was killed under its hands."""
    wrong: list[str] = field(default_factory=list)


def strike(product: Product, fate: str, kernel_id: str, worker: Worker) -> str:
    """Kill one process of a sandbox, of those there are now; what it hit."""
    if fate == "owner":
        worker.process.kill()
        return "owner"
    paths = discover({"SANDBOX_GATEWAY_HOME": str(product.home)})
    if fate == "agent":
        runsc = _runsc()
        assert runsc is not None
        done = subprocess.run(
            [str(runsc), f"--root={paths.runsc_root}", "kill", kernel_id, "KILL"], capture_output=True, check=False
        )
        return "agent" if done.returncode == 0 else "nothing"
    for ref in marked(str(paths.sandbox(kernel_id)), kernel_id):
        name = " ".join(processes.command_line(ref.pid)[:1])
        kind = "sandbox" if "runsc-sandbox" in name else "gofer" if "runsc-gofer" in name else "holder"
        if kind == fate and ref.kill():
            # Before it has become the holder it is the launcher, or runsc itself.
            return kind if kind != "holder" or name.endswith("tail") else "launcher"
    return "nothing"


def one_life(product: Product, worker: Worker, fate: str, delay: float, name: str, folder: Path) -> tuple[str, str]:
    """A kernel from its start to its end; returns (what was struck, how it ended)."""
    kernel_id = str(uuid.uuid4())
    worker.say(f"{kernel_id} {name} {folder}")
    begun = time.monotonic()
    struck, used, answered, started, early = "", False, False, False, False
    while True:
        now = time.monotonic()
        if fate and not struck and now - begun >= delay:
            struck, early = strike(product, fate, kernel_id, worker), not started
        try:
            line = worker.lines.get(timeout=max(0.01, delay - (now - begun)) if fate and not struck else 0.5)
        except queue.Empty:
            line = ""
        started = started or line.startswith("started")
        if line.startswith("used"):
            used = True
            # One that dies in its first cell answers that it died, and has printed nothing.
            if line != "used 42" and not (struck in ("sandbox", "agent") and line == "used"):
                return struck, f"wrong output {line!r}"
        if used and not answered and (struck or not fate):
            # One that was hit where it dies must notice by itself; the others are shut down in the middle of a cell,
            # and so is one that was hit while it started: that start is tried once more.
            answered = True
            worker.say("wait" if struck in ("sandbox", "agent") and not early else "go on")
        if line == "gone" or line.startswith(("ended", "failed")):
            if line != "gone":
                worker.open.append(int(worker.lines.get(timeout=10).split()[1]))
            return struck, line
        if now - begun > PATIENCE:
            return struck, "hangs"


def churn(product: Product, count: int, folder: Path, seed: int, report: Report) -> None:
    """``count`` lives, :data:`AT_A_TIME` at a time, about half of them cut short."""
    rng = random.Random(seed)
    plans: queue.Queue[tuple[str, float, str]] = queue.Queue()
    for number in range(count):
        fate = FATES[number // 2 % len(FATES)] if number % 2 else ""
        # A gofer there is only where a folder is opened.
        name = FILES_KERNEL if fate == "gofer" or rng.random() < 0.3 else KERNEL
        plans.put((fate, rng.uniform(0.0, 4.0), name))

    def work() -> None:
        worker = Worker()
        try:
            while True:
                try:
                    fate, delay, name = plans.get_nowait()
                except queue.Empty:
                    return
                struck, outcome = one_life(product, worker, fate, delay, name, folder)
                report.struck[struck or "-"] += 1
                report.outcomes[outcome.split()[0]] += 1
                if outcome.startswith("failed"):
                    report.said.append(f"{struck or '-'} after {delay:.2f} s: {outcome[7:200]}")
                unharmed = struck in ("", "nothing", "holder")
                expected = outcome == "ended" or (outcome == "gone" and struck == "owner")
                if not (expected or (outcome.startswith("failed") and not unharmed)):
                    report.wrong.append(f"{fate} after {delay:.2f} s struck {struck or '-'}: {outcome}")
                if outcome in ("gone", "hangs"):
                    worker.process.kill()
                    worker.close()
                    worker = Worker()
        finally:
            if len(worker.open) > 2 and worker.open[-1] > worker.open[0] + 4:
                report.wrong.append(f"open descriptors grow: {worker.open}")
            worker.close()

    threads = [threading.Thread(target=guarded(work, report)) for _ in range(AT_A_TIME)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def guarded(work: Callable[[], None], report: Report) -> Callable[[], None]:
    """``work`` for a thread: what it raises fails the test."""

    def run() -> None:
        try:
            work()
        except BaseException as error:
            report.wrong.append(f"{type(error).__name__}: {error}")

    return run


@pytest.mark.timeout(120 + 10 * COUNT)
def test_kernels_come_and_go_and_nothing_is_left(
    product: Product, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Processes, mounts, control groups and pipes are looked for by the check after every test; files here."""
    run = product.home / "run"
    for name in (KERNEL, FILES_KERNEL):  # their images are built once, and are no files that a kernel leaves
        with kernel(name, cwd=str(tmp_path)):
            # The socket of an owner that an earlier test killed goes with a start, and would be missed at the end.
            until(lambda: len(list((run / "owners").iterdir())) == 1)
    until(lambda: not list(run.glob("template-*")))  # one is built beside a start when the environment has changed
    before = _files(product.home)
    # Kernels that other tests of this session hold; one that was stopped keeps its endpoints until it is let go.
    others = {path.name for path in run.iterdir()} - {"owners", "runsc", "empty"}
    earlier = {row["id"] for row in json.loads(product.command("ps", "--all", "--json").stdout)}
    seed = int(os.environ.get("SANDBOX_TEST_CHURN_SEED", random.randrange(10**6)))
    report = Report()
    begun = time.monotonic()
    churn(product, COUNT, tmp_path, seed, report)
    seconds = time.monotonic() - begun
    with capsys.disabled():
        print(
            f"\nchurn: {COUNT} kernels in {seconds:.0f} s, seed {seed}; {dict(report.outcomes)}; {dict(report.struck)}"
        )
        print("\n".join(report.said))
    assert report.wrong == [], f"seed {seed}: {report.wrong}"
    # What killed owners left goes with the next start, theirs that still have a grace time by request.
    for row in product.ps():
        if row["id"] in others:
            continue
        assert product.command("rm", row["id"]).returncode == 0
    with kernel(KERNEL) as last:
        until(lambda: {path.name for path in run.iterdir()} <= {last.id, "owners", "runsc", "empty", *others})
        until(lambda: len(list((run / "owners").iterdir())) == 1)
    assert product.ids() <= others
    until(lambda: _files(product.home) == before, found=lambda: sorted(_files(product.home) ^ before))
    ended = json.loads(product.command("ps", "--all", "--json").stdout)
    ours = [row for row in ended if row["id"] not in earlier]
    assert [row for row in ours if row["state"] not in ("terminated", "failed")] == []
    assert ours, "what has ended is still told of"


def _files(home: Path) -> set[str]:
    """All files of an installation but finished layers and templates (caches, made beside a start when the environment
    has changed), kept logs and what SQLite has open."""
    found = {str(path.relative_to(home)) for path in home.rglob("*") if not path.name.startswith("store.sqlite-")}
    caches = ["logs/", "layers/", "templates/"]
    for manifest in (home / "snapshots").glob("*/manifest.json"):
        if json.loads(manifest.read_text())["kind"] == "template":
            caches.append(f"snapshots/{manifest.parent.name}")
    return {name for name in found if not name.startswith(tuple(caches)) or name.startswith("layers/tmp/")}


def test_a_worker_that_is_interrupted_while_it_waits_leaves_nothing(product: Product) -> None:
    """SIGTERM in the middle of a start is the end of many a script."""
    worker = Worker()
    kernel_id = str(uuid.uuid4())
    try:
        worker.say(f"{kernel_id} {KERNEL} /")
        until(lambda: (product.home / "run" / kernel_id).exists())
        worker.process.send_signal(signal.SIGTERM)
        worker.process.wait(30)
    finally:
        worker.process.kill()
        worker.close()
    assert product.command("rm", kernel_id).returncode in (0, 1)
    with kernel(KERNEL):
        until(lambda: not (product.home / "run" / kernel_id).exists())
