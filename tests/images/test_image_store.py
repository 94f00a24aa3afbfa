"""The layer store: built once, found by content, nothing left behind, nothing in use removed."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from erofs_reader import read

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.images.store import LayerStore, Progress, Recipe
from sandbox_gateway.images.tree import Tree


def content(text: str) -> Callable[[], Recipe]:
    """A build whose layer holds ``text``."""

    def build() -> Recipe:
        tree = Tree()
        tree.file("/text", text)
        return Recipe(tree, {"length": len(text)})

    return build


def never() -> Recipe:
    raise AssertionError("built although there is a current layer")


def leftovers(paths: Paths) -> list[Path]:
    return list((paths.layers / "tmp").iterdir())


def test_a_layer_is_built_once_and_named_by_its_content(paths: Paths) -> None:
    store = LayerStore(paths)
    layer = store.ensure("slot", "1", content("a"), what="test", sources=("/x",))
    assert layer.digest == "sha256:" + hashlib.sha256(layer.path.read_bytes()).hexdigest()
    assert layer.path.name == f"{layer.digest[7:]}.erofs"
    assert layer.path.stat().st_mode & 0o777 == 0o600
    assert read(layer.path)["/text"].content == b"a"
    assert layer.facts == {"length": 1}
    assert LayerStore(paths).ensure("slot", "1", never, what="test") == layer
    assert leftovers(paths) == []


def test_a_new_key_builds_anew_and_the_old_layer_stays_until_collected(paths: Paths) -> None:
    store = LayerStore(paths)
    old = store.ensure("slot", "1", content("a"), what="test")
    new = store.ensure("slot", "2", content("b"), what="test")
    assert old.digest != new.digest
    assert old.path.exists()
    assert store.collect([], handed_out_for=60) == [], "just handed out: its user may not have recorded it yet"
    assert store.collect([old.digest], handed_out_for=0) == [], "referenced"
    assert [layer.digest for layer in store.collect([], handed_out_for=0)] == [old.digest]
    assert [layer.digest for layer in store.list()] == [new.digest]
    assert store.list()[0].current


def test_two_slots_with_the_same_content_share_one_file(paths: Paths) -> None:
    store = LayerStore(paths)
    assert store.ensure("a", "1", content("x"), what="a").path == store.ensure("b", "1", content("x"), what="b").path
    assert len(list(paths.layers.glob("*.erofs"))) == 1


def test_a_layer_whose_file_was_deleted_is_built_again(paths: Paths) -> None:
    store = LayerStore(paths)
    store.ensure("slot", "1", content("a"), what="test").path.unlink()
    assert store.ensure("slot", "1", content("a"), what="test").path.exists()


def test_a_layer_that_lost_bytes_is_built_again(paths: Paths) -> None:
    store = LayerStore(paths)
    layer = store.ensure("slot", "1", content("a"), what="test")
    os.truncate(layer.path, layer.size - 1)
    assert store.get(layer.digest) is None
    assert store.ensure("slot", "1", content("a"), what="test").digest == layer.digest
    assert read(layer.path)["/text"].content == b"a"


def test_a_slot_that_nobody_asked_for_in_a_month_keeps_nothing(paths: Paths) -> None:
    store = LayerStore(paths)
    layer = store.ensure("slot", "1", content("a"), what="test")
    for path in [*(paths.layers / "index").iterdir(), layer.path.with_suffix(".json")]:
        os.utime(path, (1, 1))
    assert [x.digest for x in store.collect([])] == [layer.digest]
    assert list((paths.layers / "index").iterdir()) == []


_BUILDER = """
import sys
from pathlib import Path
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.images.store import LayerStore, Recipe
from sandbox_gateway.images.tree import Tree

home = Path(sys.argv[1])
def build():
    print("building", flush=True)
    if sys.argv[2] == "wait":
        sys.stdin.readline()
    tree = Tree()
    tree.file("/big", b"z" * 20_000_000)
    return Recipe(tree)
def progress(step):
    if "another process" in step.message:
        print("waiting", flush=True)
    if sys.argv[2] == "hang" and step.done_bytes > 5_000_000:
        print("half-way", flush=True)
        sys.stdin.readline()
layer = LayerStore(Paths(home=home, runtime=home / "run")).ensure("slot", "1", build, what="test", progress=progress)
print(layer.digest, flush=True)
"""


def builder(paths: Paths, mode: str) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_BUILDER), str(paths.home), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )


def test_of_several_processes_one_builds_and_the_others_wait_and_reuse(paths: Paths) -> None:
    first = builder(paths, "wait")
    assert first.stdout is not None and first.stdin is not None
    assert first.stdout.readline() == "building\n"
    others = [builder(paths, "no") for _ in range(2)]
    for other in others:
        assert other.stdout is not None
        assert other.stdout.readline() == "waiting\n", "progress is shown while another process builds"
    answers = {first.communicate("go\n", timeout=60)[0].splitlines()[-1]}
    for other in others:
        lines = other.communicate(timeout=60)[0].splitlines()
        assert "building" not in lines
        answers.add(lines[-1])
    assert len(answers) == 1


def test_a_builder_killed_half_way_leaves_only_a_temporary_file_that_is_swept(paths: Paths) -> None:
    process = builder(paths, "hang")
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    assert process.stdout.readline() == "half-way\n"
    store = LayerStore(paths)
    assert store.sweep() == 0, "a build that goes on is not touched"
    process.kill()
    process.communicate(timeout=30)
    assert store.list() == []
    assert len(leftovers(paths)) == 1
    assert store.sweep() == 1
    assert leftovers(paths) == []


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "disk_full"),
        (errno.EDQUOT, "disk_full"),
        (errno.EROFS, "data_directory"),
        (errno.EIO, "image_failed"),
    ],
)
def test_errors_of_the_disk_have_their_code_and_leave_nothing(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    def fail(fd: int, data: object) -> int:
        raise OSError(number, os.strerror(number))

    store = LayerStore(paths)
    with monkeypatch.context() as patched:
        patched.setattr("sandbox_gateway.images.erofs.os.write", fail)
        with pytest.raises(SandboxGatewayError) as raised:
            store.ensure("slot", "1", content("a"), what="test")
    assert raised.value.code == code
    assert store.list() == []
    assert leftovers(paths) == []
    assert store.ensure("slot", "1", content("a"), what="test").path.exists()


def test_a_source_that_keeps_changing_ends_in_an_error(paths: Paths, tmp_path: Path) -> None:
    source = tmp_path / "moving"
    source.write_text("a")

    def build() -> Recipe:
        tree = Tree()
        tree.host_file("/moving", str(source))
        source.write_text(source.read_text() + "a")
        return Recipe(tree)

    with pytest.raises(SandboxGatewayError) as raised:
        LayerStore(paths).ensure("slot", "1", build, what="test")
    assert raised.value.code == "image_failed"
    assert "changed" in raised.value.message


def test_a_source_that_changes_once_is_read_again(paths: Paths, tmp_path: Path) -> None:
    source = tmp_path / "moving"
    source.write_text("a")
    attempts = []

    def build() -> Recipe:
        tree = Tree()
        tree.host_file("/moving", str(source))
        if not attempts:
            source.write_text("bb")
            os.utime(source, ns=(5, 5))
        attempts.append(1)
        return Recipe(tree)

    layer = LayerStore(paths).ensure("slot", "1", build, what="test")
    assert read(layer.path)["/moving"].content == b"bb"
    assert len(attempts) == 2


def test_layers_are_removed_by_a_unique_prefix_unless_in_use(paths: Paths) -> None:
    store = LayerStore(paths)
    layer = store.ensure("slot", "1", content("a"), what="test")
    for digest, used, code in [(layer.digest, [layer.digest], "invalid_request"), ("ffff" * 16, [], "invalid_request")]:
        with pytest.raises(SandboxGatewayError) as raised:
            store.remove(digest, used)
        assert raised.value.code == code
    for number in range(20):
        store.ensure(f"s{number}", "1", content(str(number)), what="test")
    with pytest.raises(SandboxGatewayError) as raised:
        store.remove("")
    assert raised.value.code == "invalid_request"
    first = [x.digest[7] for x in store.list()]
    shared = next(digit for digit in first if first.count(digit) > 1)
    with pytest.raises(SandboxGatewayError) as raised:
        store.remove(shared)
    assert raised.value.code == "ambiguous_id"
    size = layer.size
    assert store.remove(layer.digest[7:30]) == size
    assert store.get(layer.digest) is None


def test_progress_tells_what_is_built_and_how_far(paths: Paths) -> None:
    seen: list[Progress] = []
    LayerStore(paths).ensure("slot", "1", content("a" * 9_000_000), what="test", progress=seen.append)
    assert seen[0].message == "reading test"
    assert {step.what for step in seen} == {"test"}
    assert seen[-1].message == "built test"
    assert seen[-1].done_bytes == seen[-1].total_bytes > 9_000_000
