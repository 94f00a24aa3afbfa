"""Files on the host that a saved kernel had open: what counts as a change, and what does not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.snapshots import changed_files, check_files, describe_files, workspace


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data.csv"
    path.write_text("a,b\n1,2\n")
    return path


def _touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def _equal_copy(path: Path) -> None:
    shutil.copy(path, path.with_name("copy"))
    os.rename(path.with_name("copy"), path)


def _written_again(path: Path) -> None:
    path.write_bytes(path.read_bytes())


def _kept_times(path: Path) -> None:
    was = path.stat()
    path.write_text("a,b\n1,3\n")
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _symlink(path: Path) -> None:
    os.rename(path, path.with_name("other"))
    path.symlink_to("other")


def _unreadable(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("change", [_touch, _equal_copy, _written_again, lambda path: path.chmod(0o600)])
def test_the_same_content_is_no_change(file: Path, change: Callable[[Path], None]) -> None:
    described = describe_files([str(file)])
    change(file)
    assert changed_files(described) == []
    check_files(described)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: path.write_text("a,b\n1,3\n"), "has other content"),
        (_kept_times, "has other content"),
        (lambda path: path.write_text("a,b\n"), "has 4 bytes instead of 8"),
        (Path.unlink, "is gone"),
        (_pipe, "is no regular file"),
        (_unreadable, "is no regular file"),
        (_symlink, "cannot be read"),
    ],
)
def test_anything_else_is_named_with_what_changed(file: Path, change: Callable[[Path], None], reason: str) -> None:
    described = describe_files([str(file)])
    change(file)
    assert [line.split(":")[0] for line in changed_files(described)] == [str(file)]
    assert reason in changed_files(described)[0]
    file.unlink() if file.is_fifo() else None


@pytest.mark.parametrize(("change", "expected"), [(_touch, 1), (_equal_copy, 1), (lambda path: path.chmod(0o600), 0)])
def test_a_file_too_large_to_be_hashed_is_judged_by_its_times(
    file: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], expected: int
) -> None:
    monkeypatch.setattr(workspace, "HASH_LIMIT", 4)
    described = describe_files([str(file)])
    assert described[0].sha256 is None
    change(file)
    assert len(changed_files(described)) == expected


def test_what_is_hashed_at_one_suspend_is_bounded_and_the_small_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "HASH_BUDGET", 100)
    for name, size in (("a", 80), ("b", 10), ("c", 30)):
        (tmp_path / name).write_bytes(b"x" * size)
    described = describe_files(str(tmp_path / name) for name in "abc")
    assert [(Path(item.path).name, item.sha256 is not None) for item in described] == [
        ("a", False),
        ("b", True),
        ("c", True),
    ]


def test_what_is_no_file_or_gone_is_left_out_and_links_are_followed_once(file: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(file)
    paths = [tmp_path / "gone", tmp_path / "pipe", tmp_path, tmp_path / "link", file]
    assert [item.path for item in describe_files(map(str, paths))] == [str(file)]
    (tmp_path / "pipe").unlink()


def test_a_file_that_another_program_writes_to_all_the_time_is_not_saved_wrongly(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written_meanwhile(fd: int) -> str:
        with open(file, "a") as other:
            other.write("x")
        return "0" * 64

    monkeypatch.setattr(workspace, "sha256_of", written_meanwhile)
    with pytest.raises(SandboxGatewayError) as error:
        describe_files([str(file)])
    assert error.value.code == "snapshot_failed" and str(file) in error.value.message


def test_all_changed_files_are_named_up_to_a_bound(tmp_path: Path) -> None:
    for number in range(25):
        (tmp_path / f"{number:02}").write_text("x")
    described = describe_files(str(path) for path in tmp_path.iterdir())
    (tmp_path / "03").unlink()
    with pytest.raises(SandboxGatewayError) as one:
        check_files(described)
    assert one.value.code == "workspace_changed" and f"{tmp_path}/03: is gone" in one.value.message
    shutil.rmtree(tmp_path)
    with pytest.raises(SandboxGatewayError) as many:
        check_files(described)
    assert "25 files" in many.value.message and many.value.message.endswith("and 5 more") and many.value.hint
