"""What the files inside take: counted over the file systems that hold them in memory."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from sandbox_gateway.agent import control

MOUNTS = r"""none / overlay rw,size=6171024k 0 0
none /sys sysfs rw,dentry_cache_limit=1000 0 0
none /run tmpfs rw,nosuid,size=16384k,mode=755 0 0
none /tmp tmpfs rw,nosuid,mode=1777 0 0
none /usr overlay ro,nosuid 0 0
none /dev/shm tmpfs rw,nosuid,mode=1777 0 0
none /my\040files overlay rw 0 0
none /gone tmpfs rw 0 0
none /home/jovyan 9p rw 0 0
"""


def test_what_was_written_is_counted_and_neither_shared_memory_nor_what_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = {"/": 3, "/tmp": 10, "/usr": 100, "/dev/shm": 1000, "/run": 10_000, "/my files": 20, "/home/jovyan": 100_000}

    def statvfs(place: str) -> SimpleNamespace:
        if place not in used:
            raise FileNotFoundError(place)
        return SimpleNamespace(f_blocks=1 << 20, f_bfree=(1 << 20) - used[place], f_frsize=4096)

    monkeypatch.setattr(os, "statvfs", statvfs)
    mounts = tmp_path / "mounts"
    mounts.write_text(MOUNTS)
    assert control.disk(mounts) == (3 + 10 + 20) * 4096
