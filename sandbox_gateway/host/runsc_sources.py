"""The ways to a runsc binary: a given file, a gVisor release, a build (:mod:`~sandbox_gateway.host.runsc_build`).

Each way puts ``runsc`` (and, from a release, its ``gvisor-bin`` folder beside it) into an empty directory and says
where it came from. Nothing here knows the data directory; :mod:`sandbox_gateway.host.setup` decides and installs.
The user's own configuration of pip, Go and proxies is respected: no registry is named here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import os
import platform
import re
import shutil
import tarfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from sandbox_gateway.errors import SandboxGatewayError

PIN = "v0.0.0-20260905035102-160fafc42237"
"""The pinned generation of gVisor, as a Go module version (DESIGN 4.13)."""
RELEASE = "20260907.0"
"""gVisor's first release after :data:`PIN`."""
RELEASES = "https://storage.googleapis.com/gvisor/releases/release"
"""Where gVisor publishes its releases; ``SANDBOX_GATEWAY_RELEASES`` names a mirror, or ``none``."""
ARCHIVE = "gvisor.tar.bz2"
CONNECT_SECONDS = 5.0
"""A machine that cannot reach the releases is to go on with the next way soon."""
ARCHIVE_LIMIT = 1 << 30
"""Bytes of a release's archive, packed or unpacked; the real one is far below."""

_ARCHITECTURES = {"x86_64": ("x86_64", "amd64"), "aarch64": ("aarch64", "arm64"), "arm64": ("aarch64", "arm64")}
_MEMBER = re.compile(r"(?:\./)?(runsc|gvisor-bin/[A-Za-z0-9_][A-Za-z0-9_.-]*)")
_CREDENTIALS = re.compile(r"//[^/@\s]+@")

Report = Callable[[str], None]
"""Takes one line about what goes on."""


class WayClosed(Exception):
    """This way to a runsc is not open here; the text says why. The next way is tried."""


def architecture() -> tuple[str, str]:
    """This machine's name in gVisor's releases and in Go; ``setup_failed`` where gVisor does not run."""
    machine = platform.machine()
    if platform.system() != "Linux" or machine not in _ARCHITECTURES:
        raise SandboxGatewayError(
            "setup_failed",
            f"gVisor runs on Linux on x86_64 or aarch64; this is {platform.system()} on {machine}",
            "Use such a machine, or a virtual one.",
        )
    return _ARCHITECTURES[machine]


def from_file(source: Path, into: Path, report: Report) -> str:
    """Take the binary, or gVisor's release archive, that the user gives. Returns its origin."""
    if not source.is_file():
        raise SandboxGatewayError(
            "setup_failed", f"no such file: {source}", "Give the path of a runsc binary or of gVisor's archive."
        )
    if tarfile.is_tarfile(source):
        beside = source.with_name(source.name + ".sha512")
        if beside.is_file():
            _check_sha512(source, beside.read_text(errors="replace"))
        report(f"unpacking {source}")
        _unpack(source, into)
    else:
        report(f"copying {source}")
        shutil.copyfile(source, into / "runsc")
        (into / "runsc").chmod(0o755)
        sidecars = source.parent / "gvisor-bin"
        if sidecars.is_dir():
            shutil.copytree(sidecars, into / "gvisor-bin")
    return f"file {source}"


def from_release(into: Path, environment: Mapping[str, str], report: Report) -> str:
    """Download the pinned release and check it against the checksum published beside it. Returns its origin.

    Raises :class:`WayClosed` where it cannot be had; ``setup_failed`` when what came is not what was published.
    """
    base = environment.get("SANDBOX_GATEWAY_RELEASES") or RELEASES
    if base == "none":
        raise WayClosed("releases are switched off by SANDBOX_GATEWAY_RELEASES=none")
    if not base.startswith(("https://", "http://127.0.0.1", "http://localhost", "http://[::1]")):
        # Checksum and archive come from one server: what proves them is its certificate.
        raise SandboxGatewayError("setup_failed", f"{base} is no https address", "Name an https mirror, or `none`.")
    url = f"{base.rstrip('/')}/{RELEASE}/{architecture()[0]}/{ARCHIVE}"
    archive = into / ARCHIVE
    try:
        with urllib.request.urlopen(url + ".sha512", timeout=CONNECT_SECONDS) as answer:
            checksum = answer.read(4096).decode("ascii", "replace")
        with urllib.request.urlopen(url, timeout=30) as answer:
            _save(answer, archive, f"downloading gVisor {RELEASE}", report)
    except (OSError, http.client.HTTPException, ValueError) as error:
        archive.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}:
            raise  # our disk, not their server
        reason = getattr(error, "reason", error)
        raise WayClosed(f"the release cannot be downloaded ({clean(str(reason))})") from error
    _check_sha512(archive, checksum)
    _unpack(archive, into)
    archive.unlink()
    return f"release {RELEASE}"


def remove_tree(path: Path) -> None:
    """Remove a directory, read-only folders included; what is not there is no error."""
    for folder, _, _ in os.walk(path):
        with contextlib.suppress(OSError):
            os.chmod(folder, 0o700)
    shutil.rmtree(path, ignore_errors=True)


def _save(answer: http.client.HTTPResponse, archive: Path, what: str, report: Report) -> None:
    total = int(answer.headers.get("Content-Length") or 0)
    done, said = 0, time.monotonic()
    report(f"{what} ({total / 1e6:.0f} MB)" if total else what)
    with archive.open("wb") as file:
        while chunk := answer.read(1 << 20):
            done += len(chunk)
            if done > ARCHIVE_LIMIT:
                raise SandboxGatewayError("setup_failed", "the release's archive is larger than any gVisor release")
            file.write(chunk)
            if time.monotonic() - said >= 2:
                said = time.monotonic()
                report(f"{what}: {done / 1e6:.0f} of {total / 1e6:.0f} MB")
    if total and done != total:
        raise ConnectionError(f"the download ended after {done} of {total} bytes")


def _check_sha512(archive: Path, published: str) -> None:
    wanted = published.split()[0].lower() if published.split() else ""
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha512").hexdigest()
    if found != wanted:
        raise SandboxGatewayError(
            "setup_failed",
            f"the checksum of {archive.name} is not the published one ({found[:16]}..., not {wanted[:16]}...)",
            "Somebody or something changed the file on its way: try again, or give a file you trust with --file.",
        )


def _unpack(archive: Path, into: Path) -> None:
    """Take runsc and its sidecars out of a release's archive: regular files of these names, nothing else."""
    left = ARCHIVE_LIMIT
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                match = _MEMBER.fullmatch(member.name)
                if not match or not member.isfile():
                    continue
                left -= member.size
                data = tar.extractfile(member)
                if left < 0 or data is None:
                    raise SandboxGatewayError("setup_failed", f"{archive.name} is larger than any gVisor release")
                target = into / match[1]
                target.parent.mkdir(exist_ok=True)
                with data, target.open("wb") as file:
                    shutil.copyfileobj(data, file, 1 << 20)
                target.chmod(0o755)
    except (tarfile.TarError, EOFError) as error:
        raise SandboxGatewayError("setup_failed", f"{archive.name} is damaged: {error}") from error
    if not (into / "runsc").is_file():
        raise SandboxGatewayError("setup_failed", f"{archive.name} holds no runsc", "Give gVisor's release archive.")


def clean(text: str) -> str:
    """Text of another program without the credentials of its URLs, in one line of bounded length."""
    return _CREDENTIALS.sub("//***@", " ".join(text.split()))[-600:]
