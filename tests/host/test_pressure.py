"""Free memory, read from a made-up machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox_gateway.host.pressure import MemoryPressure, memory_pressure

GIB = 1024**3
PSI = "some avg10=30.00 avg60=1.00 avg300=0.00 total=5\nfull avg10=12.50 avg60=0.00 avg300=0.00 total=1\n"


def machine(root: Path, cgroup: str = "0::/\n", **files: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable:    8388608 kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_machines_own_figures(tmp_path: Path) -> None:
    root = machine(tmp_path, **{"proc/pressure/memory": PSI})
    assert memory_pressure(root) == MemoryPressure(8 * GIB, 12.5)


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {}, 8 * GIB),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/b/memory.current": "5\n"}, 8 * GIB),
        ("0::/a/b\n", {"a/memory.max": f"{3 * GIB}\n", "a/memory.current": f"{GIB}\n"}, 2 * GIB),
        (
            "0::/a\n",
            {
                "a/memory.max": f"{3 * GIB}\n",
                "a/memory.current": f"{3 * GIB}\n",
                "a/memory.stat": f"anon 5\ninactive_file {GIB}\n",
            },
            GIB,
        ),
        ("0::/a\n", {"a/memory.max": "100\n", "a/memory.current": "200\n"}, 0),
        (
            "5:cpu:/\n4:memory:/x\n",
            {
                "memory/x/memory.limit_in_bytes": f"{GIB}\n",
                "memory/x/memory.usage_in_bytes": "24\n",
                "memory/x/memory.stat": "inactive_file 7\ntotal_inactive_file 4\n",
            },
            GIB - 20,
        ),
        ("0::/../../etc\n", {"memory.max": "nonsense"}, 8 * GIB),
    ],
)
def test_the_own_cgroup_may_leave_less(tmp_path: Path, cgroup: str, files: dict[str, str], expected: int) -> None:
    root = machine(tmp_path, cgroup, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert memory_pressure(root) == MemoryPressure(expected, None)


def test_what_cannot_be_read_is_not_made_up(tmp_path: Path) -> None:
    assert memory_pressure(tmp_path) == MemoryPressure(None, None)
    root = machine(tmp_path, **{"proc/pressure/memory": "full avg10=much\n"})
    assert memory_pressure(root).stalled is None


def test_this_machine_has_some_memory() -> None:
    assert (memory_pressure().available or 0) > 0
