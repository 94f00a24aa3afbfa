"""What the acceptance tests share: the installed product, kernels by name, and a client that runs code.

The tests of ``jobs``, ``kernel_suites`` and ``isolation`` drive the product only by its public doors: kernelspecs
through jupyter_client and the ``jupyter sandbox`` command. ``SANDBOX_TEST_KERNEL`` names another kernel to put in the
place of ``python3-gvisor``; with ``python3`` the comparisons compare the plain kernel with itself, which proves
the tests where no sandbox can run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
from jupyter_client import BlockingKernelClient, KernelManager
from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

PLAIN = "python3"
"""The plain ipykernel of this environment: the reference of every comparison."""

KERNEL = os.environ.get("SANDBOX_TEST_KERNEL", "python3-gvisor")
"""The kernel under test."""

FILES_KERNEL = os.environ.get("SANDBOX_TEST_FILES_KERNEL", "python3-gvisor-files" if KERNEL != PLAIN else PLAIN)
"""The kernel under test that sees the notebook's directory."""

START = 120.0
"""Seconds within which a kernel has to start here, the first build of its image included."""

_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Product:
    """One installation of the product: its home and where its kernelspecs are."""

    home: Path
    prefix: Path

    def command(self, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run ``jupyter sandbox <arguments>`` in this installation."""
        return subprocess.run(
            [sys.executable, "-m", "sandbox_gateway.cli", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def ps(self) -> list[dict[str, Any]]:
        """The sandboxes that the product knows."""
        done = self.command("ps", "--json")
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    def ids(self) -> set[str]:
        """Ids of the sandboxes that have not ended."""
        return {entry["id"] for entry in self.ps()}

    def snapshots(self) -> set[str]:
        """Names in the snapshots' directory, without its lock and without templates: one may be built beside a start
        when the environment has changed, and is a draft, of no known kind, for a moment."""
        found = set()
        for path in (self.home / "snapshots").glob("*"):
            with suppress(OSError):  # a draft has no manifest yet
                if json.loads((path / "manifest.json").read_text())["kind"] == "template":
                    continue
            found.add(path.name)
        return found - {".lock"}


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set variables of this process for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _runsc() -> Path | None:
    """A runsc that this machine already has: named, set up in the user's own installation, or on ``PATH``."""
    named = os.environ.get("SANDBOX_TEST_RUNSC") or shutil.which("runsc")
    if named:
        return Path(named)
    from sandbox_gateway.host.paths import discover
    from sandbox_gateway.host.setup import installed

    found = installed(discover())
    return found.path if found else None


def _take_layers(target: Path) -> None:
    """Link the image layers of the user's own installation into a new one's ``target``: no byte of a layer is ever
    changed, and each would take a gigabyte or more otherwise. What cannot be linked is built at the first start.
    """
    from sandbox_gateway.host.paths import discover

    source = discover().layers
    own = f"environment:{sys.prefix}:"
    target.mkdir(mode=0o700)
    (target / "index").mkdir(mode=0o700)
    for path in sorted((source / "index").glob("*.json")):
        entry = json.loads(path.read_text())
        name = str(entry["digest"]).removeprefix("sha256:")
        if str(entry["slot"]).startswith("environment:") and not str(entry["slot"]).startswith(own):
            continue
        with suppress(OSError):  # another file system, or a layer that was removed
            if not (target / f"{name}.erofs").exists():
                os.link(source / f"{name}.erofs", target / f"{name}.erofs")
                shutil.copy(source / f"{name}.json", target)
            shutil.copy(path, target / "index")


PROFILES = """
[profiles.tight]
display_name = "Tight limits"
memory = "512MiB"
disk = "128MiB"
processes = 100
cpu = 1.0
"""
"""The profile that the exhaustion tests use: small limits, so that an attack ends soon."""


@contextmanager
def installed(base: Path) -> Iterator[Product]:
    """An installation of its own under ``base`` with runsc and the kernelspecs; skips where no sandbox can run."""
    product = Product(home=base / "home", prefix=base / "prefix")
    kernels = product.prefix / "share" / "jupyter"
    search = os.pathsep.join(filter(None, [str(kernels), os.environ.get("JUPYTER_PATH", "")]))
    runsc = _runsc() if KERNEL != PLAIN else None
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    product.home.mkdir(mode=0o700)
    _take_layers(product.home / "layers")
    with environment(
        SANDBOX_GATEWAY_HOME=str(product.home),
        JUPYTER_PATH=search,
        IPYTHONDIR=str(base / "ipython"),
        JUPYTER_PLATFORM_DIRS="1",
    ):
        if KERNEL != PLAIN:
            if runsc is None:
                pytest.skip("no runsc here: run `jupyter sandbox setup`, or name one by SANDBOX_TEST_RUNSC")
            (product.home / "profiles.toml").write_text(PROFILES)
            for arguments in (("setup", "--from", str(runsc)), ("install", "--prefix", str(product.prefix))):
                done = product.command(*arguments, timeout=600)
                assert done.returncode == 0, f"jupyter sandbox {' '.join(arguments)}: {done.stdout}{done.stderr}"
        yield product


@dataclass
class Result:
    """What one cell gave."""

    status: str
    """``ok``, ``error``, ``aborted``; ``dead`` when the kernel died; ``timeout``."""
    stdout: str = ""
    stderr: str = ""
    value: str | None = None
    """``text/plain`` of the cell's last expression."""
    error: str = ""
    """``ename: evalue`` of an exception."""
    outputs: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def text(self) -> str:
        """All that a reader would see, colours taken out."""
        return _ANSI.sub("", "".join(filter(None, [self.stdout, self.stderr, self.value, self.error])))


class Client:
    """A running kernel and one client of it."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self.manager = manager
        self.client = client
        self.refused: list[str] = []
        """Why jupyter_client refused messages of this kernel."""

    @property
    def id(self) -> str:
        """The kernel's id, which is the sandbox's."""
        return str(self.manager.provisioner.kernel_id)  # type: ignore[union-attr]

    def alive(self) -> bool:
        """Whether the manager still counts the kernel among the living."""
        return bool(self.manager.is_alive())

    def run(self, code: str, timeout: float = 60.0, answer: Callable[[str], str] | None = None) -> Result:
        """Run one cell to its idle status; notices a kernel that dies meanwhile."""
        client = self.client
        begun = time.monotonic()
        message = client.execute(code, allow_stdin=answer is not None, stop_on_error=False)
        result = Result("timeout")
        idle = replied = False
        checked = begun
        while not (idle and replied):
            now = time.monotonic()
            if now - begun > timeout:
                break
            if now - checked > 1.0:
                checked = now
                if not self.alive():
                    result.status = "dead"
                    self._last_words(message, result)
                    break
            if answer is not None and client.stdin_channel.is_alive():
                try:
                    asked = client.get_stdin_msg(timeout=0)
                    client.input(answer(asked["content"]["prompt"]))
                except Empty:
                    pass
            try:
                found = client.get_iopub_msg(timeout=0.1 if not idle else 0)
                if found["parent_header"].get("msg_id") == message:
                    idle |= _take(found, result)
            except Empty:
                pass
            except ValueError as error:  # jupyter_client refuses what is badly signed or not JSON
                self.refused.append(str(error))
            if not replied:
                try:
                    reply = client.get_shell_msg(timeout=0 if not idle else 0.1)
                except Empty:
                    continue
                if reply["parent_header"].get("msg_id") == message:
                    replied = True
                    result.status = reply["content"]["status"]
        result.seconds = time.monotonic() - begun
        return result

    def _last_words(self, message: str, result: Result) -> None:
        """Take in what was said around the kernel's death: its last output and the reason."""
        while True:
            try:
                found = self.client.get_iopub_msg(timeout=1.0)
            except Empty:
                return
            if found["parent_header"].get("msg_id") in (message, None):
                _take(found, result)

    def value(self, code: str, timeout: float = 60.0) -> Any:
        """Run ``code``, which has to print one JSON value, and return that value."""
        result = self.run(code, timeout)
        assert result.status == "ok", f"{result.status}: {result.text[-3000:]}"
        return json.loads(result.stdout)


def _take(message: Mapping[str, Any], result: Result) -> bool:
    """Add one iopub message to a result; True when it says idle."""
    kind, content = message["msg_type"], message["content"]
    if kind == "stream":
        if content["name"] == "stdout":
            result.stdout += content["text"]
        else:
            result.stderr += content["text"]
    elif kind == "execute_result":
        result.value = content["data"].get("text/plain")
    elif kind == "error":
        result.error = f"{content['ename']}: {content['evalue']}"
    if kind in ("stream", "execute_result", "error", "display_data", "update_display_data", "clear_output"):
        result.outputs.append(dict(message))
    return bool(kind == "status" and content["execution_state"] == "idle")


@contextmanager
def kernel(name: str, **options: Any) -> Iterator[Client]:
    """A kernel called ``name``, shut down (and killed if need be) at the end."""
    try:
        KernelSpecManager().get_kernel_spec(name)
    except NoSuchKernel:
        pytest.skip(f"the kernelspec {name!r} is not installed")
    manager = KernelManager(kernel_name=name)
    manager.start_kernel(**options)
    client = manager.blocking_client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=START)
        yield Client(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@contextmanager
def profile_kernelspec(product: Product, profile: str) -> Iterator[str]:
    """A kernelspec of any profile while the block runs; gives its name."""
    root = product.home.parent / "own"
    folder = root / "kernels" / f"own-{profile}"
    folder.mkdir(parents=True, exist_ok=True)
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": profile,
        "language": "python",
        "metadata": {"kernel_provisioner": {"provisioner_name": "sandbox", "config": {"profile": profile}}},
    }
    (folder / "kernel.json").write_text(json.dumps(spec))
    with environment(JUPYTER_PATH=os.pathsep.join([str(root), os.environ.get("JUPYTER_PATH", "")])):
        yield folder.name


class Bystander:
    """Another kernel that goes on counting while something is done to its neighbour.

    A thread runs a small cell over and over; :meth:`check` says whether every one of them was answered, and in time.
    """

    def __init__(self, client: Client, patience: float = 20.0) -> None:
        self.client = client
        self.patience = patience
        self.rounds = 0
        self.slowest = 0.0
        self.failures: list[str] = []
        self._stop = threading.Event()
        client.run("count = 0")
        self._thread = threading.Thread(target=self._work, name="bystander", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._stop.is_set():
            result = self.client.run("count += 1\nprint(count)", timeout=self.patience)
            self.rounds += 1
            self.slowest = max(self.slowest, result.seconds)
            if result.status != "ok" or result.stdout != f"{self.rounds}\n":
                self.failures.append(f"round {self.rounds}: {result.status} {result.text!r}")
                return
            self._stop.wait(0.25)

    def check(self) -> None:
        """Fail unless the bystander is well and counted on by at least one more round."""
        before = self.rounds
        deadline = time.monotonic() + self.patience + 5
        while not self.failures and self.rounds <= before + 1 and time.monotonic() < deadline:
            self._stop.wait(0.05)
        assert not self.failures, self.failures
        assert self.rounds > before, "the other kernel stopped answering"

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join(self.patience + 5)


def until(condition: Callable[[], object], seconds: float = 20.0, found: Callable[[], object] = str) -> None:
    """Wait for ``condition()`` to be true: for what offers no event to wait for; a failure tells what was ``found``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not come true in time: {found()}"
        threading.Event().wait(0.02)


def short_directory() -> Path:
    """A fresh directory with a short path: unix sockets below it must fit 107 bytes."""
    return Path(tempfile.mkdtemp(prefix="sg-", dir="/tmp"))


def let_go() -> None:
    """End what this process owns: its socket would be made again where an installation is removed under it."""
    if (background := sys.modules.get("sandbox_gateway.background")) is not None:
        background.background_loop().shut_down()


_shared: list[Product] = []


@pytest.fixture(scope="session")
def product() -> Iterator[Product]:
    """The product, installed once for the whole session into a temporary home, with nothing left at the end.

    Several ``conftest.py`` take this fixture over, and pytest counts each as a fixture of its own: the first one
    makes the installation, the others join it (session fixtures end in the reverse order).
    """
    if _shared:
        yield _shared[0]
        return
    base = short_directory()
    try:
        with installed(base) as found:
            _shared.append(found)
            yield found
    finally:
        _shared.clear()
        let_go()
        shutil.rmtree(base, ignore_errors=True)
