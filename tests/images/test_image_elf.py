"""What programs need is read from their files, and no file can upset the reader."""

from __future__ import annotations

import ctypes.util
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandbox_gateway.images.elf import closure, read_elf
from sandbox_gateway.images.ldcache import ld_so_cache

SHELL = os.path.realpath("/bin/sh")


def test_a_program_tells_its_loader_and_libraries() -> None:
    elf = read_elf(SHELL)
    assert elf is not None
    assert elf.interpreter is not None
    assert os.path.exists(elf.interpreter)
    assert any(name.startswith("libc.") for name in elf.needed)


@pytest.mark.skipif(shutil.which("ldd") is None, reason="no ldd to compare with")
def test_the_closure_is_what_ldd_says() -> None:
    program = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    said = subprocess.run(["ldd", program], capture_output=True, text=True, check=True, timeout=30).stdout
    expected = {line.split()[0] for line in said.splitlines() if "=>" in line}
    found = closure([program])
    assert expected <= set(found.files)
    assert found.missing == set()


def test_a_library_that_is_nowhere_is_named() -> None:
    assert closure([], ["libdoesnotexist.so.9"]).missing == {"libdoesnotexist.so.9"}


def dynamic_section_at(data: bytearray) -> int:
    """Where the program header of the dynamic section begins."""
    (table,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    return int(next(at for at in range(table, table + count * size, size) if data[at : at + 4] == b"\2\0\0\0"))


@pytest.mark.skipif(Path(SHELL).read_bytes()[4:6] != b"\2\1", reason="the program is of another class or order")
@pytest.mark.parametrize("damage", ["beyond what a file can have", "in no segment"])
def test_a_dynamic_section_that_leads_nowhere_is_no_program(tmp_path: Path, damage: str) -> None:
    data = bytearray(Path(SHELL).read_bytes())
    header = dynamic_section_at(data)
    if damage == "in no segment":
        (section, _, _, size) = struct.unpack_from("<QQQQ", data, header + 8)
        for at in range(section, section + size, 16):
            if data[at : at + 8] == b"\5" + b"\0" * 7:  # where the strings are
                data[at + 15] = 0xFF
    else:
        data[header + 15] = 0xFF
    (tmp_path / "damaged").write_bytes(data)
    assert read_elf(str(tmp_path / "damaged")) is None


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 4000), st.integers(0, 255), st.integers(64, 100_000))
def test_damaged_programs_are_no_programs_or_are_read(tmp_path: Path, at: int, value: int, length: int) -> None:
    data = bytearray(Path(SHELL).read_bytes()[:length])
    data[min(at, len(data) - 1)] = value
    damaged = tmp_path / "damaged"
    damaged.write_bytes(data)
    read_elf(str(damaged))


def test_what_is_no_program_gives_nothing(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("#!/bin/sh\n")
    assert read_elf(str(tmp_path / "text")) is None
    assert read_elf(str(tmp_path)) is None
    assert read_elf(str(tmp_path / "absent")) is None


@pytest.mark.skipif(shutil.which("ldconfig", path="/sbin:/usr/sbin") is None, reason="no ldconfig to read it with")
def test_the_loaders_cache_is_read_by_ldconfig(tmp_path: Path) -> None:
    elf = read_elf(SHELL)
    libraries = {
        f"lib{name}.so.{n}": f"/usr/lib/x/lib{name}.so.{n}" for name in ("a", "b10", "b9", "c") for n in (1, 10)
    }
    content = ld_so_cache(libraries, elf.machine if elf else None)
    if content is None:
        pytest.skip("this processor's cache flags are not known")
    (tmp_path / "cache").write_bytes(content)
    program = shutil.which("ldconfig", path="/sbin:/usr/sbin") or ""
    said = subprocess.run([program, "-C", str(tmp_path / "cache"), "-p"], capture_output=True, text=True, check=True)
    listed = {line.split()[0]: line.split()[-1] for line in said.stdout.splitlines() if "=>" in line}
    assert listed == libraries
    assert ctypes.util.find_library("c"), "the host's own cache is untouched"
