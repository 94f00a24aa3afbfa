"""What a gVisor sandbox has on the host before runsc is called: named pipes, the bundle, the cores it may use."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sandbox_gateway.errors import SandboxGatewayError, storage_error
from sandbox_gateway.model import SandboxSpec
from sandbox_gateway.runtimes import gvisor_bundle, launcher

BUNDLE = "bundle"
"""Directory in a sandbox's runtime directory: the OCI bundle."""


def make(runsc_root: Path, spec: SandboxSpec, directory: Path, argv: tuple[str, ...], group: str | None) -> None:
    """Make the pipes and the bundle; ``argv`` is what PID 1 runs, ``group`` the control group that runsc joins.

    Raises ``disk_full`` or ``data_directory``; ``image_failed`` or ``invalid_request`` for a missing source.
    """
    bundle = directory / BUNDLE
    _check_sources(spec)
    try:
        runsc_root.mkdir(mode=0o700, parents=True, exist_ok=True)
        (bundle / "rootfs").mkdir(mode=0o755, parents=True)
        launcher.Fifos.inside(directory).make()
        config = gvisor_bundle.config(spec, argv, empty_root=str(bundle / "rootfs"), cgroups_path=group)
        with open(os.open(bundle / "config.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(config, file)
    except OSError as error:
        raise storage_error(error, f"cannot write in {directory}") from error


def configuration(directory: Path) -> Mapping[str, Any]:
    """The ``config.json`` that :func:`make` wrote. Raises ``runtime_failed`` when it cannot be read."""
    try:
        found = json.loads((directory / BUNDLE / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise SandboxGatewayError("runtime_failed", f"{directory / BUNDLE} cannot be read") from error
    if not isinstance(found, dict):
        raise SandboxGatewayError("runtime_failed", f"{directory / BUNDLE} is damaged")
    return found


def _check_sources(spec: SandboxSpec) -> None:
    """runsc says no more than "EOF" of a source that is missing."""
    layers = (*spec.image.layers, *((spec.image.agent,) if spec.image.agent is not None else ()))
    for layer in layers:
        if not os.path.exists(layer.source):
            raise SandboxGatewayError("image_failed", f"{layer.source}, the layer at {layer.destination}, is not there")
    for mount in spec.mounts:
        if not os.path.exists(mount.source):
            hint = "Make it, or correct the mount in the profile."
            raise SandboxGatewayError(
                "invalid_request", f"{mount.source}, to be seen at {mount.destination}, is not there", hint
            )


def cores(spec: SandboxSpec) -> list[int] | None:
    """Cores to bind to where processor time cannot be limited otherwise, spread over the machine by the id."""
    if spec.limits.cpu is None:
        return None
    available = sorted(os.sched_getaffinity(0))
    count = min(max(math.ceil(spec.limits.cpu), 1), len(available))
    first = zlib.crc32(spec.id.encode()) % len(available)
    return sorted((available * 2)[first : first + count])
