"""Small snapshots for tests: an image of a few files, and the facts of an imagined sandbox."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sandbox_gateway.host.paths import Paths
from sandbox_gateway.model import Image, KernelSpec, Launch, Layer, SandboxSpec
from sandbox_gateway.snapshots import Facts, Kind, Snapshot, SnapshotStore

LAYER = f"sha256:{'a' * 64}"
RUNSC = "b" * 64
SECRET = "a-value-of-the-environment"
KEY = b"a-kernels-key"


def launch() -> Launch:
    """What drives an imagined sandbox."""
    image = Image("host", (Layer("/layers/a.erofs", "/", digest=LAYER),), agent=Layer("/layers/b.erofs", "/opt/agent"))
    spec = SandboxSpec("a-kernel", "python3-gvisor", "fake", image)
    return Launch(spec, KernelSpec(("python3",), {"TOKEN": SECRET}), KEY, 1000, 1000)


def facts(kind: Kind = Kind.SAVED, **changes: Any) -> Facts:
    """Facts as a lifecycle gathers them."""
    values: dict[str, Any] = {
        "kind": kind,
        "sandbox": "a-kernel",
        "profile": "python3-gvisor",
        "runtime": "fake",
        "link_version": 1,
        "requirements": {"runsc": RUNSC, "cpu": "sse2,avx"},
        "cursors": {"iopub": 12, "shell": 3},
        "launch": launch().as_dict(),
        **changes,
    }
    return Facts(**values)


def save_image(image: Path, size: int = 4096, mode: int = 0o644) -> None:
    """What a runtime would write."""
    image.mkdir(mode=0o700)
    for name, content in (("checkpoint.img", b"state"), ("pages.img", bytes(range(256)) * (size // 256))):
        (image / name).write_bytes(content)
        (image / name).chmod(mode)


async def make(store: SnapshotStore, kind: Kind = Kind.SAVED, *, size: int = 4096, **changes: Any) -> Snapshot:
    """A whole snapshot."""
    sealed = changes.pop("sealed", True)
    async with await store.begin() as draft:
        save_image(draft.image, size)
        return await draft.commit(facts(kind, **changes), sealed=sealed)


def make_layer(paths: Paths, digest: str = LAYER) -> Path:
    """A layer in the form that the layer store documents."""
    paths.layers.mkdir(exist_ok=True)
    path = paths.layers / f"{digest.removeprefix('sha256:')}.erofs"
    path.write_bytes(b"x" * 2048)
    path.with_suffix(".json").write_text(json.dumps({"size": 2048, "created": 1.0, "what": "base", "sources": []}))
    return path


def tree(directory: Path) -> set[str]:
    """Names in the store, the lock of the store itself aside."""
    return {path.name for path in directory.iterdir()} - {".lock"} if directory.exists() else set()
