"""A sandbox's specification as gVisor wants it: the OCI ``config.json`` and the global flags. Pure.

Sources: the OCI runtime specification 1.1; gVisor's ``runsc/boot/mount_hints.go`` (annotations of the root and of
mounts), ``runsc/container/container.go`` (which mount gets an overlay), ``reference/GVISOR.md`` (what was tried).

What decides the shape:

* The root is always an overlay in memory over its layer: gVisor makes missing mount points in it, and the layer itself
  is never written.
* ``--overlay2=all:memory`` would swallow what is written to a read-write bind mount. So with such a mount only the root
  has the global overlay, and a writable EROFS layer gets its own by a mount hint (``share: container``).
* Guest processes are no processes of the host: RLIMIT_NPROC, which gVisor counts per guest user, bounds them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from sandbox_gateway.model import Layer, SandboxSpec

HOME = "/home/jovyan"
AGENT_DESTINATION = "/opt/agent"

AGENT_CAPABILITIES = ("CAP_CHOWN", "CAP_KILL", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID")
"""What PID 1 needs to start the kernel under another uid, with empty sets, and to end it."""

HARDENING = (
    "--network=none",
    "--host-uds=none",
    "--host-fifo=none",
    "--net-raw=false",
    "--platform=systrap",
    # An empty network namespace per gofer: a shared one is a mount under --root, which outlives all sandboxes.
    "--gofer-network-namespace=new",
    # Our root is a tree of ours; no outsider changes it.
    "--file-access=exclusive",
)
"""Global flags of every sandbox (GVISOR.md, Hardening); ``--allow-flag-override`` is left off."""

RUN_SIZE = 16 << 20
"""Bytes in ``/run``: the kernel's connection files and ipc sockets."""

DEFAULT_SHM = 64 << 20
"""Bytes in ``/dev/shm`` where no memory limit says better (Docker's default)."""

OPEN_FILES = 1 << 16


def flags(spec: SandboxSpec, *, rootless: bool = False) -> list[str]:
    """The global flags of ``runsc create`` and ``start`` that depend on the specification.

    ``rootless``: runsc runs in a user namespace in which only one uid is mapped.
    """
    size = f",size={spec.limits.disk}" if spec.limits.disk is not None else ""
    scope = "root" if _has_writable_mount(spec) else "all"
    # Without files of the host the sentry needs no system calls to open any: a stricter filter, and a faster one.
    # It then runs as nobody, a uid that an ordinary user's namespace does not have.
    direct = [] if rootless or _has_host_files(spec) else ["--directfs=false"]
    return [*HARDENING, *direct, f"--overlay2={scope}:memory{size}"]


def config(
    spec: SandboxSpec, argv: tuple[str, ...], *, empty_root: str, cgroups_path: str | None = None
) -> dict[str, Any]:
    """The contents of ``config.json``.

    ``empty_root`` is an empty directory for ``root.path``, which an EROFS root needs; ``cgroups_path`` is the group
    that runsc joins, None to let it alone.
    """
    root = next((layer for layer in spec.image.layers if layer.destination == "/"), None)
    if root is None:
        raise ValueError("an image needs a layer at /")
    linux: dict[str, Any] = {
        "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")],
    }
    if cgroups_path is not None:
        linux["cgroupsPath"] = cgroups_path
    return {
        "ociVersion": "1.1.0",
        "process": _process(spec, argv),
        "root": {"path": empty_root if root.kind == "erofs" else root.source, "readonly": False},
        "hostname": spec.hostname,
        "mounts": mounts(spec),
        "annotations": _annotations(spec, root),
        "linux": linux,
    }


def shape(config: Mapping[str, Any]) -> dict[str, str]:
    """What must be the same in the configuration of a saved sandbox and in the one that its image is restored with, as
    a digest for each part (gVisor's ``specutils/restore.go``, which refuses other ones at length).

    Free are: id, hostname, environment, sources of mounts, control group and what it limits.
    """
    process = config["process"]
    parts = {
        "mounts": sorted([m["destination"], m["type"], sorted(m["options"])] for m in config["mounts"]),
        "root": [config["root"]["readonly"], {k: v for k, v in config["annotations"].items() if not _is_source(k)}],
        "command": [process["args"], process["cwd"]],
        "users": [process["user"], process["capabilities"]],
        "process limits": sorted([limit["type"], limit["soft"], limit["hard"]] for limit in process["rlimits"]),
    }
    return {name: hashlib.sha256(json.dumps(part).encode()).hexdigest()[:16] for name, part in parts.items()}


def _is_source(annotation: str) -> bool:
    return annotation.startswith("dev.gvisor.spec.mount.") and annotation.endswith(".source")


def _process(spec: SandboxSpec, argv: tuple[str, ...]) -> dict[str, Any]:
    limits = [{"type": "RLIMIT_NOFILE", "soft": OPEN_FILES, "hard": OPEN_FILES}, _rlimit("RLIMIT_CORE", 0)]
    if spec.limits.processes is not None:
        limits.append(_rlimit("RLIMIT_NPROC", spec.limits.processes))
    sets = ("bounding", "effective", "permitted", "inheritable", "ambient")
    return {
        "user": {"uid": spec.agent_uid, "gid": spec.agent_uid},
        "args": list(argv),
        "cwd": "/",
        "env": ["PATH=/usr/local/bin:/usr/bin:/bin", "LANG=C.UTF-8", f"SANDBOX_ID={spec.id}"],
        "capabilities": {name: list(AGENT_CAPABILITIES) for name in sets},
        "noNewPrivileges": True,
        "rlimits": limits,
    }


def _rlimit(name: str, value: int) -> dict[str, Any]:
    return {"type": name, "soft": value, "hard": value}


def mounts(spec: SandboxSpec) -> list[dict[str, Any]]:
    """All mounts, parents before children, the specification's own last among equals."""
    disk = [f"size={spec.limits.disk}"] if spec.limits.disk is not None else []
    shm = spec.limits.memory // 2 if spec.limits.memory is not None else DEFAULT_SHM
    if spec.limits.disk is not None:
        shm = min(shm, spec.limits.disk)
    kernel = [f"uid={spec.kernel_uid}", f"gid={spec.kernel_uid}"]
    agent = [f"uid={spec.agent_uid}", f"gid={spec.agent_uid}"]
    entries = [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        _tmpfs("/dev/shm", "mode=1777", f"size={shm}"),
        _tmpfs("/run", "mode=755", f"size={RUN_SIZE}", *agent),
        _tmpfs("/tmp", "mode=1777", *disk),
        _tmpfs(HOME, "mode=755", *kernel, *disk),
    ]
    layers = [layer for layer in spec.image.layers if layer.destination != "/"]
    if spec.image.agent is not None:
        layers.append(spec.image.agent)
    entries += [_layer(layer, spec) for layer in layers]
    for mount in spec.mounts:
        access = "ro" if mount.readonly else "rw"
        entries.append(_bind(mount.source, mount.destination, access))
    # sorted() is stable: a mount never comes before the one that it lies in.
    return sorted(entries, key=lambda entry: len([part for part in entry["destination"].split("/") if part]))


def _tmpfs(destination: str, *options: str) -> dict[str, Any]:
    return {
        "destination": destination,
        "type": "tmpfs",
        "source": "tmpfs",
        "options": ["nosuid", "nodev", *options],
    }


def _bind(source: str, destination: str, access: str) -> dict[str, Any]:
    return {
        "destination": destination,
        "type": "bind",
        "source": source,
        "options": ["rbind", access, "nosuid", "nodev"],
    }


def _layer(layer: Layer, spec: SandboxSpec) -> dict[str, Any]:
    if layer.kind == "erofs":
        options = ["nosuid", "nodev"] if _takes_writes(layer, spec) else ["ro", "nosuid", "nodev"]
        return {"destination": layer.destination, "type": "erofs", "source": layer.source, "options": options}
    # A live directory without the global overlay must stay read-only: a hint would put its store into the directory.
    writable = layer.writable and not _has_writable_mount(spec)
    return _bind(layer.source, layer.destination, "rw" if writable else "ro")


def _takes_writes(layer: Layer, spec: SandboxSpec) -> bool:
    """Beside a writable mount each writable layer needs a hint of its own, and gVisor takes one for a source only:
    of equal trees at two places (an environment and a link to it) the first one is writable."""
    if not layer.writable or not _has_writable_mount(spec):
        return layer.writable
    same = (other for other in spec.image.layers if other.source == layer.source and other.writable)
    return next(same).destination == layer.destination


def _annotations(spec: SandboxSpec, root: Layer) -> Mapping[str, str]:
    found: dict[str, str] = {}
    if root.kind == "erofs":
        found["dev.gvisor.spec.rootfs.source"] = root.source
        found["dev.gvisor.spec.rootfs.type"] = "erofs"
        found["dev.gvisor.spec.rootfs.overlay"] = "memory"
        if spec.limits.disk is not None:
            found["dev.gvisor.spec.rootfs.options"] = f"size={spec.limits.disk}"
    if _has_writable_mount(spec):
        for number, layer in enumerate(spec.image.layers):
            if layer.kind == "erofs" and layer.destination != "/" and _takes_writes(layer, spec):
                found[f"dev.gvisor.spec.mount.layer{number}.source"] = layer.source
                found[f"dev.gvisor.spec.mount.layer{number}.type"] = "bind"
                found[f"dev.gvisor.spec.mount.layer{number}.share"] = "container"
    return found


def _has_host_files(spec: SandboxSpec) -> bool:
    return bool(spec.mounts) or any(layer.kind != "erofs" for layer in spec.image.layers)


def _has_writable_mount(spec: SandboxSpec) -> bool:
    return any(not mount.readonly for mount in spec.mounts)
