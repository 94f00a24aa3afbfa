"""Fingerprints that are remembered while inotify tells of no change: always what a look would find."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_environments import add_distribution

from sandbox_gateway.host import folder_watch
from sandbox_gateway.images import fingerprints, host_env
from sandbox_gateway.images.fingerprints import Fingerprints
from sandbox_gateway.images.host_env import EnvironmentLayer

SITE = "lib/python3.11/site-packages"


def environment(place: Path) -> EnvironmentLayer:
    """A small environment: two packages, a script, a linked library folder."""
    site = place / SITE
    site.mkdir(parents=True)
    (place / "bin").mkdir()
    (place / "bin" / "python").symlink_to("/usr/bin/python3")
    (place / "bin" / "tool").write_text("#!/bin/sh\n")
    (place / "lib64").symlink_to("lib")
    (place / "pyvenv.cfg").write_text("home = /usr\n")
    add_distribution(site, "ipykernel", "7.9")
    add_distribution(site, "other", "1.0")
    (site / "single.py").write_text("x = 1\n")
    (site / "other" / "deep").mkdir()
    return EnvironmentLayer("environment", str(place), sites=(SITE,))


@pytest.fixture
def layer(tmp_path: Path) -> EnvironmentLayer:
    return environment(tmp_path / "venv")


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers that were really looked at, in order."""
    seen: list[str] = []

    def fingerprint(layer: EnvironmentLayer, *rest: Any) -> str:
        seen.append(layer.path)
        return host_env.fingerprint(layer, *rest)

    monkeypatch.setattr(fingerprints, "fingerprint", fingerprint)
    return seen


@pytest.fixture
def watched(layer: EnvironmentLayer, looks: list[str]) -> Iterator[Fingerprints]:
    """Asked twice, so that it watches."""
    asked = Fingerprints()
    assert asked.of(layer) == asked.of(layer) == host_env.fingerprint(layer)
    looks.clear()
    yield asked
    for known in asked._known.values():
        if not isinstance(known, float):
            known.watch.close()


def test_what_has_not_changed_is_not_looked_at_again(
    watched: Fingerprints, layer: EnvironmentLayer, looks: list[str]
) -> None:
    assert watched.of(layer) == host_env.fingerprint(layer)
    assert looks == []


def test_a_program_that_asks_once_takes_no_watch(layer: EnvironmentLayer) -> None:
    asked = Fingerprints()
    asked.of(layer)
    assert all(isinstance(known, float) for known in asked._known.values())


def test_importing_is_no_change(watched: Fingerprints, layer: EnvironmentLayer, looks: list[str]) -> None:
    cache = Path(layer.path, SITE, "other", "__pycache__")
    cache.mkdir()
    (cache / "deep.pyc").write_bytes(b"code")
    Path(layer.path, SITE, "__pycache__").mkdir()
    assert watched.of(layer) == host_env.fingerprint(layer)
    assert looks == []


def _replace_all(place: Path) -> None:
    shutil.copytree(place, place.with_name("copy"), symlinks=True)
    (place.with_name("copy") / SITE / "single.py").write_text("other = 2\n")
    place.rename(place.with_name("old"))
    place.with_name("copy").rename(place)


def _move_parent(place: Path) -> None:
    # What the path named is where it was, under another name; what it names now was never watched.
    parent = place.parent
    aside = parent.with_name(f"{parent.name}-aside")
    parent.rename(aside)
    shutil.copytree(aside / place.name, place, symlinks=True)
    (place / SITE / "single.py").write_text("something = 'else'\n")


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file is written": lambda v: (v / SITE / "single.py").write_text("changed = True\n"),
    "a file is appended to": lambda v: _append(v / SITE / "other" / "__init__.py"),
    "a file is truncated": lambda v: os.truncate(v / SITE / "single.py", 0),
    "a file gets another time": lambda v: os.utime(v / SITE / "single.py", (1, 1)),
    "a file comes": lambda v: (v / SITE / "other" / "more.py").write_text(""),
    "a file goes": lambda v: (v / SITE / "other" / "__init__.py").unlink(),
    "a file is moved away": lambda v: (v / "bin" / "tool").rename(v.parent / "tool"),
    "a file is replaced": lambda v: os.replace(_beside(v), v / SITE / "single.py"),
    "a package comes": lambda v: add_distribution(v / SITE, "third", "1.0"),
    "a package goes": lambda v: shutil.rmtree(v / SITE / "other"),
    "a record is rewritten": lambda v: (v / SITE / "other-1.0.dist-info" / "RECORD").write_text(
        "longer than before,,\n"
    ),
    "a record goes": lambda v: (v / SITE / "other-1.0.dist-info" / "RECORD").unlink(),
    "a folder in a package comes": lambda v: (v / SITE / "other" / "deeper").mkdir(),
    "a link leads elsewhere": lambda v: _relink(v / "bin" / "python"),
    "a folder that was missing comes": lambda v: (v / "share").mkdir(),
    "the site's folder goes": lambda v: shutil.rmtree(v / SITE),
    "all of it goes": lambda v: shutil.rmtree(v),
    "another takes its place": _replace_all,
    "the folder above is renamed": _move_parent,
}


def _beside(place: Path) -> Path:
    new = place.parent / "new.py"
    new.write_text("from elsewhere\n")
    return new


def _append(path: Path) -> None:
    with path.open("a") as file:
        file.write("y = 2\n")


def _relink(link: Path) -> None:
    link.unlink()
    link.symlink_to("/usr/local/bin/python3")


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_each_change_is_noticed_at_the_next_question(change: Callable[[Path], object], looks: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "parent" / "venv"
        layer = environment(place)
        asked = Fingerprints()
        before = [asked.of(layer) for _ in range(3)][-1]
        change(place)
        after = asked.of(layer)
        assert after == host_env.fingerprint(layer)
        assert after != before
        looks.clear()
        assert asked.of(layer) == after
        assert looks == [] or change is CHANGES["all of it goes"], "what it found last is remembered"


def test_what_cannot_be_watched_is_not_tried_again_at_once(
    layer: EnvironmentLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    class Refused:
        def __init__(self, **_: Any) -> None:
            tried.append(1)
            raise OSError(errno.EMFILE, "no more of them")

    monkeypatch.setattr(fingerprints, "FolderWatch", Refused)
    asked = Fingerprints()
    for _ in range(5):
        asked.of(layer)
    assert len(tried) == 1
    monkeypatch.setattr(fingerprints, "_PAUSE", 0.0)
    asked._known[layer] = 0.0
    asked.of(layer)
    assert len(tried) == 2


def test_a_folder_behind_a_link_is_looked_at_each_time(layer: EnvironmentLayer, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "file").write_text("x")
    (tmp_path / "way").symlink_to("one")
    Path(layer.path, "share").symlink_to(tmp_path / "way")
    asked = Fingerprints()
    before = [asked.of(layer) for _ in range(3)][-1]
    (tmp_path / "way").unlink()
    (tmp_path / "way").symlink_to("two")
    assert asked.of(layer) == host_env.fingerprint(layer) != before


def test_a_record_behind_a_link_is_watched_where_it_is(
    layer: EnvironmentLayer, looks: list[str], tmp_path: Path
) -> None:
    """As uv makes them with ``--link-mode symlink``."""
    (tmp_path / "cache").mkdir()
    record = Path(layer.path, SITE, "other-1.0.dist-info", "RECORD")
    record.rename(tmp_path / "cache" / "RECORD")
    record.symlink_to(tmp_path / "cache" / "RECORD")
    asked = Fingerprints()
    before = [asked.of(layer) for _ in range(2)][-1]
    looks.clear()
    assert asked.of(layer) == before
    assert looks == []
    (tmp_path / "cache" / "RECORD").write_text("something longer than before,,\n")
    assert asked.of(layer) == host_env.fingerprint(layer) != before


def test_many_threads_that_ask_while_it_changes_end_with_what_a_look_finds(layer: EnvironmentLayer) -> None:
    asked = Fingerprints()
    file = Path(layer.path, SITE, "single.py")
    with ThreadPoolExecutor(4) as threads:
        for number in range(30):
            pending = [threads.submit(asked.of, layer) for _ in range(8)]
            file.write_text("#" * number)
            for one in pending:
                one.result()
            now = host_env.fingerprint(layer)
            assert set(threads.map(lambda _: asked.of(layer), range(8))) == {now}


_FILES = ["bin/tool", "lib/one.py", f"{SITE}/single.py", f"{SITE}/other/__init__.py", f"{SITE}/other/deep/x.py"]
_FOLDERS = ["share", "etc", f"{SITE}/new", f"{SITE}/other/deep", f"{SITE}/other-1.0.dist-info", "lib/python3.12"]
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.sampled_from(_FILES), st.integers(0, 20)),
        st.tuples(st.just("drop"), st.sampled_from(_FILES), st.just(0)),
        st.tuples(st.just("make"), st.sampled_from(_FOLDERS), st.just(0)),
        st.tuples(st.just("clear"), st.sampled_from(_FOLDERS), st.just(0)),
        st.tuples(st.just("ask"), st.just(""), st.just(0)),
    ),
    max_size=12,
)


def _step(place: Path, what: str, where: str, size: int) -> None:
    path = place / where
    if what == "write" and path.parent.is_dir():
        path.write_text("#" * size)
    elif what == "drop":
        path.unlink(missing_ok=True)
    elif what == "make":
        path.mkdir(parents=True, exist_ok=True)
    elif what == "clear":
        shutil.rmtree(path, ignore_errors=True)


@given(_STEPS)
def test_whatever_happens_it_answers_what_a_look_would_find(steps: list[tuple[str, str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "venv"
        layer = environment(place)
        asked = Fingerprints()
        asked.of(layer)
        for what, where, size in steps:
            _step(place, what, where, size)
            if what == "ask":
                assert asked.of(layer) == host_env.fingerprint(layer)
        assert asked.of(layer) == host_env.fingerprint(layer)


def test_a_big_package_is_watched_with_its_record(tmp_path: Path, looks: list[str]) -> None:
    package = add_distribution(tmp_path, "big", "2.0")
    layer = EnvironmentLayer("package", str(package), split_big=False)
    asked = Fingerprints()
    before = [asked.of(layer) for _ in range(2)][-1]
    looks.clear()
    assert asked.of(layer) == before
    assert looks == []
    (tmp_path / "big-2.0.dist-info" / "RECORD").write_text("big/__init__.py,,\nbig/more.py,,\n")
    assert asked.of(layer) == host_env.fingerprint(layer) != before


@pytest.mark.parametrize("call", ["inotify_init1", "inotify_add_watch", "statfs"])
def test_without_a_watch_it_looks_each_time(
    call: str, layer: EnvironmentLayer, looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Exhausted:
        def __init__(self, libc: Any) -> None:
            self._libc = libc

        def __getattr__(self, name: str) -> Any:
            return refused if name == call else getattr(self._libc, name)

    def refused(*_: Any) -> int:
        folder_watch.ctypes.set_errno(errno.ENOSPC)
        return -1

    real = folder_watch.ctypes.CDLL
    monkeypatch.setattr(folder_watch.ctypes, "CDLL", lambda *args, **kwargs: Exhausted(real(*args, **kwargs)))
    asked = Fingerprints()
    for _ in range(3):
        looks.clear()
        assert asked.of(layer) == host_env.fingerprint(layer)
        assert looks
    Path(layer.path, SITE, "single.py").write_text("changed = True\n")
    assert asked.of(layer) == host_env.fingerprint(layer)


def test_a_file_system_whose_changes_may_come_from_elsewhere_is_not_trusted(
    layer: EnvironmentLayer, looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_watch, "_TOLD", frozenset())
    asked = Fingerprints()
    for _ in range(3):
        looks.clear()
        asked.of(layer)
        assert looks


def test_more_events_than_the_kernel_keeps_count_as_a_change(
    watched: Fingerprints, layer: EnvironmentLayer, looks: list[str]
) -> None:
    kept = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if kept > 100_000:
        pytest.skip(f"this machine keeps {kept} events")
    place = Path(layer.path, SITE, "other")
    for _ in range(kept // 2 + 10):  # in pairs of two kinds, which are not merged
        (place / "__pycache__").mkdir()
        (place / "__pycache__").rmdir()
    watched.of(layer)
    assert looks, "an event may have been lost"


def test_only_so_many_layers_are_remembered(tmp_path: Path) -> None:
    asked = Fingerprints()
    layers = [environment(tmp_path / f"venv{number}") for number in range(fingerprints._REMEMBERED + 3)]
    for layer in layers:
        asked.of(layer)
        asked.of(layer)
    assert len(asked._known) == fingerprints._REMEMBERED
    assert all(asked.of(layer) == host_env.fingerprint(layer) for layer in layers)


def test_what_nobody_needs_any_more_is_closed(layer: EnvironmentLayer) -> None:
    def watches() -> int:
        return sum(os.readlink(entry) == "anon_inode:inotify" for entry in _descriptors())

    before = watches()
    asked = Fingerprints()
    asked.of(layer)
    asked.of(layer)
    assert watches() == before + 1
    del asked
    assert watches() == before


def _descriptors() -> Iterator[str]:
    for number in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{number}"
        if os.path.islink(path):
            yield path
