"""Folders that the kernel watches for us."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandbox_gateway.host import folder_watch
from sandbox_gateway.host.folder_watch import FolderWatch


def test_it_has_changed_from_the_first_change_on(tmp_path: Path) -> None:
    watch = FolderWatch()
    watch.add(str(tmp_path))
    assert not watch.changed
    assert not watch.changed
    (tmp_path / "file").write_text("x")
    assert watch.changed
    assert watch.changed


def test_what_lies_deeper_is_not_told(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    watch = FolderWatch()
    watch.add(str(tmp_path))
    (tmp_path / "inner" / "file").write_text("x")
    assert not watch.changed
    watch.close()


def test_a_folder_that_is_missing_is_noticed_when_it_comes(tmp_path: Path) -> None:
    watch = FolderWatch()
    watch.add(str(tmp_path / "not" / "yet"))
    assert not watch.changed
    (tmp_path / "not").mkdir()
    assert watch.changed


def test_unheeded_names_may_come_and_go(tmp_path: Path) -> None:
    watch = FolderWatch(unheeded=("cache",))
    watch.add(str(tmp_path))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").rmdir()
    assert not watch.changed
    tmp_path.chmod(0o700)
    assert watch.changed, "an event of the folder itself has no name"


def test_a_closed_watch_counts_as_changed(tmp_path: Path) -> None:
    watch = FolderWatch()
    watch.add(str(tmp_path))
    watch.close()
    assert watch.changed


def test_a_file_system_that_is_not_this_machines_alone_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_watch, "_TOLD", frozenset())
    watch = FolderWatch()
    with pytest.raises(OSError, match="may come from elsewhere"):
        watch.add(str(tmp_path))
    watch.close()


def test_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    watch = FolderWatch()
    with pytest.raises(OSError, match="leads elsewhere"):
        watch.add(str(tmp_path / "link"))
    watch.close()


def test_one_whose_descriptor_somebody_closed_counts_as_changed(tmp_path: Path) -> None:
    watch = FolderWatch()
    watch.add(str(tmp_path))
    spare = os.dup(watch._fd)
    os.close(watch._fd)
    changed = watch._events()
    assert list(changed) == [b""]
    os.dup2(spare, watch._fd)  # so that it closes what is its own
    os.close(spare)
    watch.close()


def test_a_fork_leaves_the_events_to_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = FolderWatch()
    watch.add(str(tmp_path))
    monkeypatch.setattr(watch, "_process", os.getpid() + 1)
    assert watch.changed, "in another process it knows nothing"
    monkeypatch.undo()
    assert not watch.changed, "nor has it taken anything"
    watch.close()
