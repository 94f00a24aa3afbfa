"""What works on this machine, what does not, and what to do (``jupyter sandbox doctor``).

Each check looks at one thing and answers with a :class:`Check`; it never raises and changes nothing. Checks take what
they judge as arguments, so that every answer can be tested; :func:`diagnose` gathers the facts.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host import cgroups
from sandbox_gateway.host.filesystems import filesystem_of, is_network_filesystem
from sandbox_gateway.host.namespaces import why_no_user_namespace
from sandbox_gateway.host.paths import RUNTIME_PATH_LIMIT, Paths, discover
from sandbox_gateway.host.runsc_sources import PIN
from sandbox_gateway.host.setup import find_runsc, installed, verify
from sandbox_gateway.images.editable import editable_installs
from sandbox_gateway.images.interpreter import probe
from sandbox_gateway.runtimes.base import RuntimeReport

Status = Literal["ok", "warn", "fail", "skip"]

PYTHON_MINIMUM = (3, 11)
KERNEL_MINIMUM = (4, 15)
"""gVisor's own minimum is 4.14.77."""
SPACE_NEEDED = 2 << 30
"""Bytes: a runsc, a base layer and an environment layer of ordinary size, with room for one more generation."""


@dataclass(frozen=True, slots=True)
class Check:
    """One answer. ``fail`` means that no kernel can run, ``warn`` that something is missing or weaker,
    ``skip`` that it does not matter here."""

    name: str
    status: Status
    detail: str
    hint: str = ""
    """What to do about it; empty when there is nothing to do."""

    def as_dict(self) -> dict[str, str]:
        """The check as JSON."""
        return {"name": self.name, "status": self.status, "detail": self.detail, "hint": self.hint}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All answers, in the order in which they are best read."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether a sandboxed kernel can run here."""
        return all(check.status != "fail" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """The diagnosis as JSON."""
        return {"ok": self.ok, "checks": [check.as_dict() for check in self.checks]}


async def diagnose(
    paths: Paths | None = None,
    environment: Mapping[str, str] | None = None,
    images: Iterable[tuple[str, bool]] = (("host", False),),
) -> Diagnosis:
    """Look at this machine, user and installation. Runs runsc once, in a sandbox that is thrown away.

    ``images``: what the profiles name, each with whether it takes editable installs in.
    """
    env = os.environ if environment is None else environment
    paths = discover(env) if paths is None else paths
    mounts = _read("/proc/self/mountinfo")
    checks = [
        check_python(sys.version_info[:3]),
        check_kernel(platform.system(), platform.release(), platform.machine()),
        check_data_directory(paths.home, mounts),
        check_runtime_directory(paths.runtime, mounts),
        check_runsc(paths, env),
        check_user(os.geteuid(), why_no_user_namespace),
        *check_cgroups(cgroups.discover()),
    ]
    if not any(check.status == "fail" for check in checks):
        checks += check_runtime(await _probe(paths, env))
    checks += [
        check_ipykernel(),
        check_editable(editable_left_out(images)),
        check_kernelspecs(_kernelspec_folders()),
        check_kvm(Path("/dev/kvm")),
        check_gpu(_read("/proc/driver/nvidia/version")),
    ]
    return Diagnosis(tuple(checks))


def check_python(version: Sequence[int]) -> Check:
    """The Python that the product runs in."""
    text = ".".join(map(str, version))
    if tuple(version[:2]) < PYTHON_MINIMUM:
        return Check("python", "fail", f"Python {text} is too old", "Use Python 3.11 or newer.")
    return Check("python", "ok", f"Python {text} in {sys.prefix}")


def check_kernel(system: str, release: str, machine: str) -> Check:
    """The machine's kernel and processor."""
    text = f"{system} {release} on {machine}"
    if system != "Linux":
        return Check("kernel", "fail", f"{text}: gVisor needs Linux", "Use Linux, or a virtual machine with it.")
    if machine not in {"x86_64", "aarch64", "arm64"}:
        return Check("kernel", "fail", f"{text}: gVisor runs on x86_64 and aarch64 only", "Use such a machine.")
    match = re.match(r"(\d+)\.(\d+)", release)
    if match and (int(match[1]), int(match[2])) < KERNEL_MINIMUM:
        return Check("kernel", "fail", f"{text}: too old for gVisor", "Use Linux 4.15 or newer.")
    return Check("kernel", "ok", text)


def check_data_directory(home: Path, mountinfo: str) -> Check:
    """Where layers, binaries and the store live: local, writable, with space. Creates nothing."""
    name = "data directory"
    hint = "Point SANDBOX_GATEWAY_HOME at a local, writable folder."
    kind = filesystem_of(home, mountinfo)
    if is_network_filesystem(kind):
        return Check(name, "fail", f"{home} is on a network filesystem ({kind}): locks do not hold there", hint)
    there = _nearest(home)
    if not os.access(there, os.W_OK | os.X_OK) or os.statvfs(there).f_flag & os.ST_RDONLY:
        return Check(name, "fail", f"{there} cannot be written", hint)
    if there == home and home.stat().st_uid != os.geteuid():
        return Check(name, "fail", f"{home} belongs to another user", hint)
    free = shutil.disk_usage(there).free
    detail = f"{home} ({kind or 'unknown filesystem'}, {_size(free)} free)"
    if free < SPACE_NEEDED:
        return Check(name, "warn", detail, f"{_size(SPACE_NEEDED)} are good to have: free some, or move it.")
    return Check(name, "ok", detail)


def check_runtime_directory(runtime: Path, mountinfo: str) -> Check:
    """Where locks, sockets and FIFOs live: a short local path."""
    name = "runtime directory"
    kind = filesystem_of(runtime, mountinfo)
    if is_network_filesystem(kind):
        return Check(
            name,
            "fail",
            f"{runtime} is on a network filesystem ({kind})",
            "Point SANDBOX_GATEWAY_HOME at a local folder.",
        )
    length = len(os.fsencode(runtime))
    if length > RUNTIME_PATH_LIMIT:
        return Check(
            name,
            "fail",
            f"{runtime} has {length} bytes, over {RUNTIME_PATH_LIMIT}: a socket's path ends at 107",
            "Point SANDBOX_GATEWAY_HOME at a shorter path.",
        )
    there = _nearest(runtime)
    if not os.access(there, os.W_OK | os.X_OK):
        return Check(name, "fail", f"{there} cannot be written", "Point SANDBOX_GATEWAY_HOME at a writable folder.")
    return Check(name, "ok", f"{runtime} ({kind or 'unknown filesystem'})")


def check_runsc(paths: Paths, environment: Mapping[str, str]) -> Check:
    """Whether there is a runsc, whose it is, and whether it is what was installed."""
    try:
        path = find_runsc(paths, environment)
    except SandboxGatewayError as error:
        return Check("runsc", "fail", error.message, error.hint)
    if path is None:
        return Check("runsc", "fail", "runsc is not installed", "Run `jupyter sandbox setup`.")
    install = installed(paths)
    if install is None or path != install.path:
        return Check("runsc", "ok", f"{path}, as SANDBOX_GATEWAY_RUNSC asks for")
    trouble = verify(install)
    if trouble:
        return Check("runsc", "fail", f"the installed runsc is damaged: {trouble}", "Run `jupyter sandbox setup`.")
    detail = f"{install.sha256[:12]}, {install.origin}"
    if install.pin != PIN:
        return Check(
            "runsc", "warn", f"{detail}, of another generation than this product's", "Run `jupyter sandbox setup`."
        )
    return Check("runsc", "ok", detail)


def check_user(uid: int, namespaces: Callable[[], tuple[str, str] | None]) -> Check:
    """Root, or an ordinary user who may make user namespaces; ``namespaces`` gives reason and hint when not."""
    if uid == 0:
        return Check("user", "ok", "root: sandboxes are made directly")
    refused = namespaces()
    if refused is not None:
        return Check("user", "fail", *refused)
    return Check("user", "ok", "an ordinary user: sandboxes are made inside a user namespace")


def check_cgroups(tree: cgroups.CgroupTree) -> list[Check]:
    """Which limits the kernel enforces for this user."""
    missing = [name for name in cgroups.WANTED if name not in tree.controllers]
    where = f"cgroup v{tree.version}" if tree.usable else "no control group of our own"
    if not missing:
        return [Check("limits", "ok", f"{where}: {', '.join(cgroups.WANTED)} are enforced by the kernel")]
    why = f" ({tree.reason})" if tree.reason else ""
    return [
        Check(
            "limits",
            "warn",
            f"{where}: {', '.join(missing)} not enforced by the kernel{why}",
            "Run as root with /sys/fs/cgroup writable, or in `systemd-run --user --scope -p Delegate=yes`.",
        )
    ]


def check_runtime(report: RuntimeReport | SandboxGatewayError) -> list[Check]:
    """What the runtime's own probe found, one check for each capability."""
    if isinstance(report, SandboxGatewayError):
        return [Check("gvisor", "fail", report.message, report.hint)]
    checks = []
    for capability in report.capabilities:
        status: Status
        if capability.available:
            status = "ok" if not capability.hint else "warn"
        elif capability.name == "run":
            status = "fail"
        else:
            status = "warn" if capability.name.startswith("limits.") else "skip"
        detail = capability.reason or ("works" if capability.available else "not available")
        checks.append(Check(f"{report.runtime} {capability.name}", status, detail, capability.hint))
    if not report.get("run").available and not any(check.status == "fail" for check in checks):
        checks.append(Check(report.runtime, "fail", report.get("run").reason))
    return checks


def check_ipykernel(version: Callable[[str], str] = importlib.metadata.version) -> Check:
    """ipykernel in the environment that sandboxes are made from."""
    try:
        return Check("ipykernel", "ok", f"ipykernel {version('ipykernel')}")
    except importlib.metadata.PackageNotFoundError:
        return Check("ipykernel", "fail", "ipykernel is not in this environment", "Run `pip install ipykernel`.")


def check_editable(names: Iterable[str]) -> Check:
    """Editable installs, whose code lives outside of the environment and is not taken into the image."""
    # The agent comes in a layer of its own: our own development checkout is not missing inside.
    found = sorted(name for name in names if name.replace("-", "_").split(" ")[0] != "sandbox_gateway")
    if not found:
        return Check("editable installs", "ok", "none that a kernel would miss")
    return Check(
        "editable installs",
        "warn",
        f"not inside a sandbox: {', '.join(found)}",
        "Install them properly, or set `editable = true` in the profile, which copies their folders in.",
    )


def check_kernelspecs(
    folders: Iterable[Path], names: Sequence[str] = ("python3-gvisor", "python3-gvisor-files")
) -> Check:
    """Whether the built-in profiles' kernelspecs can be found by Jupyter applications of this environment."""
    folders = list(folders)
    missing = [name for name in names if not any((folder / name / "kernel.json").is_file() for folder in folders)]
    if missing:
        return Check("kernelspecs", "warn", f"not installed: {', '.join(missing)}", "Run `jupyter sandbox install`.")
    return Check("kernelspecs", "ok", ", ".join(names))


def check_kvm(device: Path) -> Check:
    """Hardware virtualisation: not needed, and not used by default."""
    if not device.exists():
        return Check("kvm", "skip", "no /dev/kvm; not needed, sandboxes use gVisor's systrap platform")
    usable = "usable" if os.access(device, os.R_OK | os.W_OK) else "not accessible to this user"
    return Check("kvm", "skip", f"/dev/kvm is {usable}; not used, sandboxes use gVisor's systrap platform")


def check_gpu(driver: str) -> Check:
    """NVIDIA's driver, for the GPU support to come."""
    match = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", driver)
    if not match:
        return Check("gpu", "skip", "no NVIDIA driver")
    return Check("gpu", "skip", f"NVIDIA driver {match[1]}; sandboxes do not use GPUs yet")


def editable_left_out(images: Iterable[tuple[str, bool]]) -> list[str]:
    """Names of the editable installs of these images' environments that are not taken into them."""
    names: dict[str, None] = {}
    for source, taken_in in dict.fromkeys(images):
        kind, _, path = source.partition(":")
        if kind != "host" or taken_in:
            continue
        try:
            found = editable_installs(probe(path or None))
        except SandboxGatewayError:
            continue  # told when the image is built
        names.update(dict.fromkeys(f"{install.name} in {path}" if path else install.name for install in found))
    return sorted(names)


async def _probe(paths: Paths, environment: Mapping[str, str]) -> RuntimeReport | SandboxGatewayError:
    from sandbox_gateway.runtimes.gvisor import GvisorRuntime

    try:
        paths.ensure()
        return await GvisorRuntime(paths, find_runsc(paths, environment)).probe()
    except SandboxGatewayError as error:
        return error


def _kernelspec_folders() -> list[Path]:
    from jupyter_core.paths import jupyter_path

    return [Path(folder) for folder in jupyter_path("kernels")]


def _nearest(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
