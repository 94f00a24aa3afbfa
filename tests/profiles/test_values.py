"""The machine's memory, read from a made-up machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox_gateway.profiles.values import machine_memory

GIB = 1024**3


def machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal:       16777216 kB\nMemFree: 1 kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {}, 16 * GIB),
        ("0::/user/a\n", {"user/a/memory.max": "max\n", "user/memory.max": f"{2 * GIB}\n"}, 2 * GIB),
        ("0::/user/a\n", {"user/a/memory.max": f"{3 * GIB}\n"}, 3 * GIB),
        ("5:cpu:/\n4:memory:/x\n", {"memory/x/memory.limit_in_bytes": f"{GIB}\n"}, GIB),
        ("4:memory:/x\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 16 * GIB),
        ("0::/../../etc\n", {"memory.max": "nonsense"}, 16 * GIB),
    ],
)
def test_memory_is_the_machines_or_what_the_own_cgroup_leaves(
    tmp_path: Path, cgroup: str, files: dict[str, str], expected: int
) -> None:
    assert machine_memory(machine(tmp_path, cgroup, files)) == expected


def test_an_unreadable_machine_is_taken_for_a_small_one(tmp_path: Path) -> None:
    assert machine_memory(tmp_path) == 4 * GIB
