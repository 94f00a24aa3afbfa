"""From what is asked for to what a runtime is given: pure composition of a :class:`SandboxSpec`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.model import BLANK, STANDBY, Image, KernelSpec, Launch, Limits, Mount, SandboxSpec, WorkspaceMode
from sandbox_gateway.profiles import HOME, WORKSPACE, Profile
from sandbox_gateway.runtimes.base import RuntimeReport

DEFAULT_UID = 1000
AGENT_UID = 64999
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z")
BASE_ENVIRONMENT = {"HOME": HOME, "USER": "jovyan", "LANG": "C.UTF-8", "TERM": "xterm-color", "SHELL": "/bin/bash"}
_NO_WORKSPACE = ("/boot", "/dev", "/etc", "/proc", "/sys")
"""Who may write there owns the machine; a server started from ``/`` or ``/etc`` makes no workspace of it."""
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class CreateRequest:
    """What a caller wants: one kernel under one id."""

    id: str
    profile: Profile
    kernel: KernelSpec
    key: bytes
    """The HMAC key that clients and kernel sign messages with."""
    directory: Path | None = None
    """The notebook's directory on the host; mounted only when the profile says so."""
    client_environment: Mapping[str, str] = field(default_factory=dict)
    """What the caller's environment offers; filtered by the profile's allow-list."""
    name: str = ""
    """A label for people."""
    private: tuple[Path, ...] = ()
    """Directories of the application's that never show inside (its servers' tokens and other kernels' keys)."""
    owner: str = ""
    """The user of a gateway that it is for."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the kernel is inside."""

    uid: int
    gid: int
    agent_uid: int


def checked_id(value: str) -> str:
    """``value`` when it can name a sandbox; it becomes part of paths, cgroup names and container ids."""
    if not _ID.match(value):
        raise SandboxGatewayError(
            "invalid_request", f"{value!r} cannot be a sandbox's id", "Use letters, digits, '-' and '_', at most 64."
        )
    return value


def chosen_id(value: str) -> str:
    """As :func:`checked_id`, for one that a caller chooses: nothing that would be taken for nobody's."""
    if value.startswith((BLANK, STANDBY)):
        text = f"{value!r} cannot be a kernel's id: what begins with {BLANK!r} or {STANDBY!r} is nobody's"
        raise SandboxGatewayError("invalid_request", text, "Choose another, or none: jupyter_client then makes one.")
    return checked_id(value)


def identity(request: CreateRequest, *, root: bool) -> Identity:
    """The kernel's uid and gid inside: those that own the workspace there (GVISOR.md, Hardening).

    As root the workspace shows its real owner inside; as an ordinary user it shows as owned by guest uid 0, since
    only that one is mapped. PID 1 gets another uid in any case.
    """
    uid = gid = DEFAULT_UID
    if _workspace(request) is not None:
        if root:
            found = _workspace_stat(request)
            uid, gid = found.st_uid, found.st_gid
        else:
            uid = gid = 0
    return Identity(uid, gid, AGENT_UID if uid != AGENT_UID else AGENT_UID - 1)


def compose(
    request: CreateRequest, image: Image, who: Identity, limits: Limits, *, private: tuple[Path, ...], empty: Path
) -> SandboxSpec:
    """The specification for ``request``.

    ``private`` are host directories that must never show inside, even when a mounted directory contains them: the
    directory ``empty`` is laid over them.
    """
    profile = request.profile
    mounts = list(profile.mounts)
    workspace = _workspace(request)
    if workspace is not None:
        readonly = profile.workspace is WorkspaceMode.RO
        mounts.append(Mount(str(workspace), WORKSPACE, readonly))
    for mount in profile.mounts:
        if not os.path.exists(mount.source):
            raise SandboxGatewayError(
                "invalid_profile",
                f"profile {profile.name}: {mount.source} does not exist",
                "Create it, or leave the mount out.",
            )
    # By their real paths, so that what was checked is what is mounted, whoever moves a link meanwhile.
    mounts = [replace(mount, source=os.path.realpath(mount.source)) for mount in mounts]
    for mount in tuple(mounts):
        mounts.extend(_masks(mount, (*private, *request.private), empty))
    layers = image.layers
    if profile.packages_writable:
        layers = tuple(replace(layer, writable=layer.kind == "erofs") for layer in layers)
    return SandboxSpec(
        id=checked_id(request.id),
        profile=profile.name,
        runtime=profile.runtime,
        image=replace(image, layers=layers),
        limits=limits,
        mounts=tuple(mounts),
        hostname=hostname(request.id),
        kernel_uid=who.uid,
        agent_uid=who.agent_uid,
    )


def hostname(sandbox_id: str) -> str:
    """What a sandbox calls itself inside: no two that run are likely to share it."""
    return f"sandbox-{sandbox_id.removeprefix(STANDBY)[:12].replace('_', '-').strip('-')}".lower()


def kernel(request: CreateRequest, image: Image) -> KernelSpec:
    """The kernel to run inside: the command in the image's terms, and an environment made from nothing."""
    profile = request.profile
    environment = {**BASE_ENVIRONMENT, **image.environment}
    if profile.limits.cpu is not None:
        threads = str(max(1, int(profile.limits.cpu)))
        environment.update(dict.fromkeys(_THREAD_VARIABLES, threads))
    environment.update(request.kernel.environment)
    environment.update(profile.environment)
    environment.update({k: v for k, v in request.client_environment.items() if profile.allows(k)})
    environment["SANDBOX_ID"] = request.id
    argv = list(profile.argv or request.kernel.argv)
    if image.interpreter is not None and argv and _is_bare_python(argv[0]):
        argv[0] = image.interpreter
    cwd = WORKSPACE if _workspace(request) is not None else HOME
    return replace(request.kernel, argv=tuple(argv), environment=environment, cwd=cwd)


def clone(launch: Launch, sandbox_id: str, key: bytes) -> Launch:
    """``launch`` for another sandbox made from the same memory: its id and key are its own."""
    environment = {**launch.kernel.environment, "SANDBOX_ID": sandbox_id}
    return replace(
        launch,
        spec=replace(launch.spec, id=checked_id(sandbox_id), hostname=hostname(sandbox_id)),
        kernel=replace(launch.kernel, environment=environment),
        key=key,
    )


def missing_file_hint(request: CreateRequest) -> str:
    """What to say once when a file is missing in a kernel without a workspace; empty when there is one."""
    if request.profile.workspace is not WorkspaceMode.NONE:
        return ""
    return (
        "[sandbox] This kernel does not see the notebook's folder: it starts in an empty home. "
        "Pick 'Python 3 (gVisor, this folder)' to open the folder to it.\n"
    )


def enforceable(report: RuntimeReport, profile: Profile) -> tuple[tuple[str, ...], Limits]:
    """The limits that hold here and notes on those that do not, or only softly.

    A limit that the profile file asks for and that cannot be enforced is an error (DESIGN 4.14).
    """
    notes: list[str] = []
    absent: dict[str, None] = {}
    for name in ("cpu", "memory", "disk", "processes"):
        if getattr(profile.limits, name) is None:
            continue
        capability = report.get(f"limits.{name}")
        if not capability.available:
            if name in profile.required_limits:
                raise SandboxGatewayError(
                    "limit_unsupported",
                    f"profile {profile.name}: the {name} limit cannot be enforced here: {capability.reason}",
                    capability.hint or None,
                )
            absent[name] = None
        if capability.reason:
            notes.append(f"{name} limit: {capability.reason}")
    return tuple(notes), replace(profile.limits, **absent)


def _workspace(request: CreateRequest) -> Path | None:
    if request.profile.workspace is WorkspaceMode.NONE:
        return None
    if request.directory is None:
        raise SandboxGatewayError("invalid_request", "this profile opens the notebook's folder, and none was named")
    real = os.path.realpath(request.directory)
    if real == "/" or any(real == place or real.startswith(place + os.sep) for place in _NO_WORKSPACE):
        raise SandboxGatewayError(
            "invalid_request",
            f"{real} would open the machine itself to the kernel",
            "Move the notebook into a folder of its own, or start the server from another one.",
        )
    return request.directory


def _workspace_stat(request: CreateRequest) -> os.stat_result:
    assert request.directory is not None
    try:
        return request.directory.stat()
    except OSError as error:
        raise SandboxGatewayError(
            "invalid_request", f"the folder {request.directory} cannot be opened: {error.strerror}"
        ) from error


def _masks(mount: Mount, private: tuple[Path, ...], empty: Path) -> list[Mount]:
    found = []
    source = mount.source
    for inside in _outermost(private):
        if os.path.commonpath([inside, source]) == inside:
            raise SandboxGatewayError(
                "invalid_request",
                f"{mount.source} lies in {inside}, whose contents are never opened to a kernel",
                "Move the notebook to another folder.",
            )
        if os.path.commonpath([inside, source]) == source and os.path.isdir(inside):
            found.append(Mount(str(empty), os.path.join(mount.destination, os.path.relpath(inside, source)), True))
    return found


def _outermost(paths: tuple[Path, ...]) -> list[str]:
    """The real paths of those that lie in none of the others: one mask covers what is below it."""
    real = sorted({os.path.realpath(path) for path in paths})
    return [path for path in real if not any(path.startswith(other + os.sep) for other in real)]


def _is_bare_python(command: str) -> bool:
    return re.fullmatch(r"python(3(\.\d+)?)?", command) is not None
