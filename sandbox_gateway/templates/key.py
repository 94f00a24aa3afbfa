"""Which template fits which request: a frozen value made of everything that a restored kernel cannot change. Pure.

What the host enforces (memory and processor limits, open times) may differ from clone to clone and is no part of it.
Sources: ``Snapshots.shape`` for what the runtime compares or bakes in, :mod:`sandbox_gateway.identity` for the
variables that act when the interpreter starts.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sandbox_gateway.identity import startup_part
from sandbox_gateway.model import Launch, Layer, Limits

FORMAT: Final = 1
"""Version of what a template is made of: another one makes every template anew."""
SHORT: Final = 12
"""Digits that people see."""


@dataclass(frozen=True, slots=True)
class TemplateKey:
    """Two requests with the same digest can start from the same template."""

    digest: str
    """64 hexadecimal digits."""
    slot: str
    """64 hexadecimal digits of what does not change when a machine is updated: a template whose slot has got a newer
    one is of no use any more."""

    @property
    def short(self) -> str:
        """The beginning of the digest, for people."""
        return self.digest[:SHORT]


def key_of(
    launch: Launch,
    *,
    preload: Sequence[str],
    shape: Mapping[str, str],
    cores: int,
    requirements: Mapping[str, str],
    link_version: int,
) -> TemplateKey:
    """The key for kernels like ``launch``, the client's part of whose environment is left out.

    ``shape`` and ``requirements`` are the runtime's, ``cores`` as of :func:`cores`. Every layer has a digest.
    """
    spec, kernel = launch.spec, launch.kernel
    layers = (*spec.image.layers, *((spec.image.agent,) if spec.image.agent is not None else ()))
    who = {"uid": launch.uid, "gid": launch.gid, "agent": spec.agent_uid}
    run = {"argv": list(kernel.argv), "interrupt": kernel.interrupt_mode}
    mounts = [[mount.destination, mount.readonly] for mount in spec.mounts]
    whole = {
        "format": FORMAT,
        "runtime": spec.runtime,
        "layers": [_layer(layer) for layer in layers],
        "shape": dict(shape),
        "cores": cores,
        "requirements": dict(requirements),
        "link": link_version,
        "who": who,
        "run": run,
        "mounts": mounts,
        "environment": startup_part(kernel.environment),
        "preload": list(preload),
    }
    place = {"runtime": spec.runtime, "profile": spec.profile, "who": who, "run": run, "mounts": mounts}
    return TemplateKey(_digest(whole), _digest(place))


def cores(limits: Limits, available: int) -> int:
    """How many processors a kernel may see, of those ``available`` to this process; it asks once, at its start."""
    return available if limits.cpu is None else min(max(math.ceil(limits.cpu), 1), available)


def _layer(layer: Layer) -> list[Any]:
    return [layer.destination, layer.kind, layer.digest, layer.writable]


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
