"""What a template's kernel is launched with: as the kernels that will start from it, but nobody's.

No client's environment and no secret of a profile is in it, and nothing of the host is mounted: each mount is an empty
place holder, which the restore replaces.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sandbox_gateway.errors import storage_error
from sandbox_gateway.identity import startup_part
from sandbox_gateway.model import Launch, Mount
from sandbox_gateway.profiles import HOME
from sandbox_gateway.request import BASE_ENVIRONMENT, clone


def blank(launch: Launch, sandbox_id: str, holders: Path) -> Launch:
    """``launch`` without an identity, under another id, a key that nobody else has, and in the home directory.

    ``holders`` is a directory in which the place holders are, see :func:`make_holders`.
    """
    kernel = launch.kernel
    environment = {**BASE_ENVIRONMENT, **launch.spec.image.environment, **startup_part(kernel.environment)}
    mounts = tuple(replace(mount, source=str(path)) for mount, path in _placed(launch.spec.mounts, holders))
    anonymous = replace(
        launch,
        spec=replace(launch.spec, mounts=mounts),
        kernel=replace(kernel, environment=environment, cwd=HOME),
    )
    return clone(anonymous, sandbox_id, secrets.token_hex(32).encode())


def make_holders(launch: Launch, holders: Path, *, root: bool) -> None:
    """Make the place holders of ``launch``'s mounts, owned as their real sources will be; ``root`` when we may.

    Raises ``disk_full`` or ``data_directory``.
    """
    try:
        holders.mkdir(mode=0o711, exist_ok=True)
        for mount, path in _placed(launch.spec.mounts, holders):
            if os.path.isdir(mount.source):
                path.mkdir(mode=0o755, parents=True, exist_ok=True)
            else:
                path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                path.touch(mode=0o644)
            if root:
                os.chown(path, launch.uid, launch.gid)
    except OSError as error:
        raise storage_error(error, f"cannot write in {holders}") from error
    # What is mounted inside another mount needs a place there: runsc would make it under the wrong owner.
    for outer, path in _placed(launch.spec.mounts, holders):
        for inner in launch.spec.mounts:
            if inner is not outer and inner.destination.startswith(outer.destination.rstrip("/") + "/"):
                place = path / os.path.relpath(inner.destination, outer.destination)
                if os.path.isdir(inner.source):
                    place.mkdir(mode=0o755, parents=True, exist_ok=True)
                else:
                    place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                    place.touch(mode=0o644)


def _placed(mounts: Sequence[Mount], holders: Path) -> list[tuple[Mount, Path]]:
    return [(mount, holders / str(number)) for number, mount in enumerate(mounts)]
