"""What the image tests share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_environments import add_distribution, site_of

from sandbox_gateway.host.paths import Paths
from sandbox_gateway.images.erofs import Written, write_image
from sandbox_gateway.images.tree import Tree
from sandbox_gateway.model import Image


@pytest.fixture(scope="session")
def image_home(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """A data directory that the slow tests share, so that the base layers are built once."""
    home = tmp_path_factory.mktemp("images")
    return Paths(home=home, runtime=home / "run").ensure()


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Tree], tuple[Path, Written]]:
    """Writes a tree to a file."""
    counter = iter(range(1000))

    def write(tree: Tree) -> tuple[Path, Written]:
        path = tmp_path / f"image{next(counter)}.erofs"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            return path, write_image(fd, tree)
        finally:
            os.close(fd)

    return write


@pytest.fixture
def small_venv(tmp_path: Path) -> Path:
    """A virtual environment on this interpreter's base with an ipykernel that is only a name."""
    place = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True, timeout=60)
    add_distribution(site_of(place), "ipykernel", "7.9")
    return place


@pytest.fixture
def sandboxed(
    runsc_binary: Path, tmp_path: Path
) -> Iterator[Callable[[Image, list[str]], subprocess.CompletedProcess[str]]]:
    """Runs a command in an image by runsc, without the rest of the product."""
    counter = iter(range(1000))

    def run(image: Image, argv: list[str], uid: int = 1000) -> subprocess.CompletedProcess[str]:
        bundle = tmp_path / f"bundle{next(counter)}"
        (bundle / "root").mkdir(parents=True)
        root, *others = image.layers
        agent = [image.agent] if image.agent else []
        mounts = [{"destination": "/proc", "type": "proc", "source": "proc"}]
        mounts += [{"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]}]
        mounts += [
            {
                "destination": layer.destination,
                "type": "erofs",
                "source": layer.source,
                "options": [] if layer.writable else ["ro"],
            }
            for layer in (*others, *agent)
        ]
        config = {
            "ociVersion": "1.1.0",
            "process": {
                "user": {"uid": uid, "gid": uid},
                "args": argv,
                "env": [f"{key}={value}" for key, value in image.environment.items()],
                "cwd": "/",
                "noNewPrivileges": True,
                "capabilities": {},
            },
            "root": {"path": str(bundle / "root")},
            "mounts": mounts,
            "annotations": {
                "dev.gvisor.spec.rootfs.source": root.source,
                "dev.gvisor.spec.rootfs.type": "erofs",
                "dev.gvisor.spec.rootfs.overlay": "memory",
            },
            "linux": {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]},
        }
        (bundle / "config.json").write_text(json.dumps(config))
        prefix = [] if os.geteuid() == 0 else ["unshare", "-Ur", "-m"]
        flags = ["--root", str(bundle / "state"), "--network=none", "--ignore-cgroups", "--overlay2=all:memory"]
        return subprocess.run(
            [*prefix, str(runsc_binary), *flags, "run", "--bundle", str(bundle), f"images-{os.getpid()}-{bundle.name}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    yield run
