"""The EROFS writer: what goes in comes out, the same bytes for everybody, nothing dangerous kept."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from erofs_reader import read
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandbox_gateway.images.erofs import SourceChanged, Written, write_image
from sandbox_gateway.images.tree import Tree

Write = Callable[[Tree], tuple[Path, Written]]


@pytest.fixture
def host(tmp_path: Path) -> Path:
    source = tmp_path / "host"
    (source / "sub/deeper").mkdir(parents=True)
    (source / "empty").touch()
    (source / "block").write_bytes(b"x" * 4096)
    (source / "odd").write_bytes(os.urandom(3 * 4096 + 17))
    (source / "sub/näme with ünicode").write_text("hello")
    (source / "sub/deeper/tool").write_text("#!/bin/sh\n")
    (source / "sub/deeper/tool").chmod(0o700)
    (source / "link").symlink_to("sub/deeper/tool")
    os.link(source / "odd", source / "sub/same")
    os.utime(source / "odd", ns=(1, 1_700_000_000_123_456_789))
    return source


def test_everything_of_a_host_tree_is_read_back(host: Path, written: Write) -> None:
    tree = Tree()
    tree.host_tree("/", str(host))
    path, result = written(tree)
    entries = read(path)
    for name, entry in entries.items():
        original = host / name.lstrip("/")
        if stat.S_ISLNK(entry.mode):
            assert os.readlink(original) == entry.content.decode()
        elif stat.S_ISREG(entry.mode):
            assert original.read_bytes() == entry.content
            assert original.stat().st_mtime_ns == entry.mtime_ns
    assert len(entries) == 1 + sum(1 for _ in host.rglob("*"))
    assert entries["/odd"].nid == entries["/sub/same"].nid
    assert entries["/odd"].links == 2
    assert entries["/"].links == 3
    assert result.size == path.stat().st_size


def test_owners_modes_and_directory_times_do_not_depend_on_the_builder(host: Path, written: Write) -> None:
    (host / "odd").chmod(0o4711)
    (host / "empty").chmod(0o666)
    (host / "sub").chmod(0o700)
    tree = Tree()
    tree.host_tree("/", str(host))
    entries = read(written(tree)[0])
    assert {(e.uid, e.gid) for e in entries.values()} == {(0, 0)}
    assert stat.S_IMODE(entries["/odd"].mode) == 0o755
    assert stat.S_IMODE(entries["/empty"].mode) == 0o644
    assert stat.S_IMODE(entries["/sub"].mode) == 0o755
    assert stat.S_IMODE(entries["/sub/deeper/tool"].mode) == 0o755
    os.utime(host / "sub")
    again = Tree()
    again.host_tree("/", str(host))
    assert written(again)[1].digest == written(tree)[1].digest


def test_a_directory_larger_than_a_block_keeps_all_names_in_order(written: Write) -> None:
    tree = Tree()
    names = {f"/many/{'n' * (i % 200)}{i}" for i in range(3000)}
    for name in names:
        tree.file(name, name)
    entries = read(written(tree)[0])
    assert {name for name in entries if name.startswith("/many/")} == names
    assert all(entries[name].content == name.encode() for name in names)


def test_links_of_any_length_fit(written: Write) -> None:
    tree = Tree()
    for length in (1, 31, 32, 33, 3000, 4031, 4032, 4033, 4095):
        tree.symlink(f"/l{length}", "t" * length)
    entries = read(written(tree)[0])
    assert all(len(entry.content) == int(name[2:]) for name, entry in entries.items() if name != "/")


def test_sockets_fifos_and_unreadable_things_are_left_out(host: Path, written: Write) -> None:
    os.mkfifo(host / "fifo")
    tree = Tree()
    tree.host_tree("/", str(host))
    assert "/fifo" not in read(written(tree)[0])


def test_what_keep_refuses_is_left_out_with_all_below_it(host: Path, written: Write) -> None:
    tree = Tree()
    tree.host_tree("/opt/x", str(host), lambda path, is_dir: path != "sub/deeper")
    entries = read(written(tree)[0])
    assert "/opt/x/sub/same" in entries
    assert not [name for name in entries if "deeper" in name]


def test_a_file_that_changes_meanwhile_is_noticed(host: Path, written: Write) -> None:
    tree = Tree()
    tree.host_tree("/", str(host))
    (host / "block").write_bytes(b"short")
    with pytest.raises(SourceChanged, match="block"):
        written(tree)
    (host / "block").unlink()
    with pytest.raises(SourceChanged, match="block"):
        written(tree)


def test_a_full_disk_is_an_oserror_and_leaves_no_thread() -> None:
    tree = Tree()
    tree.file("/a", b"x" * 10_000_000)
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="No space left"):
            write_image(fd, tree)
    finally:
        os.close(fd)


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    tree = Tree()
    tree.file("/a", b"x" * 10_000_000)
    seen: list[tuple[int, int]] = []
    fd = os.open(tmp_path / "i", os.O_WRONLY | os.O_CREAT)
    write_image(fd, tree, lambda done, total: seen.append((done, total)))
    os.close(fd)
    assert len(seen) > 1
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == (tmp_path / "i").stat().st_size


@pytest.mark.skipif(shutil.which("fsck.erofs") is None, reason="no fsck.erofs (package erofs-utils)")
def test_fsck_accepts_the_image(host: Path, written: Write) -> None:
    tree = Tree()
    tree.host_tree("/", str(host))
    for number in range(500):
        tree.symlink(f"/links/{number}", "../" * (number % 60) + "x")
    path, _ = written(tree)
    subprocess.run(["fsck.erofs", str(path)], check=True, capture_output=True, timeout=60)


_NAMES = st.text(
    st.characters(blacklist_characters="/\0", blacklist_categories=("Cs",)), min_size=1, max_size=40
).filter(lambda name: name not in (".", ".."))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(_NAMES, st.one_of(st.binary(max_size=9000), st.dictionaries(_NAMES, st.binary(max_size=50)))))
def test_any_tree_comes_back(written: Write, content: dict[str, bytes | dict[str, bytes]]) -> None:
    tree = Tree()
    expected: dict[str, bytes] = {}
    for name, value in content.items():
        inner = value if isinstance(value, dict) else {None: value}
        tree.directory(f"/{name}") if isinstance(value, dict) else None
        for child, data in inner.items():
            path = f"/{name}/{child}" if child is not None else f"/{name}"
            expected[path] = data
            tree.file(path, data)
    path, _ = written(tree)
    entries = read(path)
    path.unlink()
    assert {name: e.content for name, e in entries.items() if stat.S_ISREG(e.mode)} == expected
