"""``image ls``, ``build``, ``rm`` and ``prune`` on a store with small layers."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from cli_harness import Run, record

from sandbox_gateway.host.paths import Paths
from sandbox_gateway.images.service import ImageService, Progress
from sandbox_gateway.model import Image, Layer, State
from sandbox_gateway.store import Store

OLD = time.time() - 90 * 86400


@pytest.fixture
def layers(paths: Paths) -> dict[str, str]:
    """Two layers in the form that the layer store documents: name -> digest."""
    paths.layers.mkdir(parents=True)
    found = {}
    for index, what in enumerate(("base", "environment /opt/env")):
        name = f"{index + 10:x}" * 64
        (paths.layers / f"{name}.erofs").write_bytes(b"x" * 2048)
        meta = paths.layers / f"{name}.json"
        meta.write_text(json.dumps({"size": 2048, "created": OLD + index, "what": what, "sources": []}))
        os.utime(meta, (OLD, OLD))
        found[what] = f"sha256:{name}"
    return found


def test_ls_tells_what_there_is_and_what_is_in_use(run: Run, store: Store, layers: dict[str, str]) -> None:
    store.put(record("a", State.SUSPENDED, layers=(layers["base"],)))
    base, environment = run("image", "ls", "--json").json
    assert (base["what"], base["digest"], base["size"], base["in_use"]) == ("base", layers["base"], 2048, True)
    assert environment["in_use"] is False and environment["created"].endswith("Z")
    lines = run("image", "ls").stdout.splitlines()
    assert lines[0].split() == ["DIGEST", "SIZE", "AGE", "STATE", "WHAT"]
    assert "in use" in lines[1] and "2.0 KiB" in lines[1] and "unused" in lines[2]


def test_ls_of_a_fresh_installation_is_empty_and_makes_nothing(run: Run, paths: Paths) -> None:
    assert run("image", "ls", "--json").json == []
    assert list(paths.home.iterdir()) == []


def test_rm_takes_a_digest_by_its_beginning(run: Run, paths: Paths, layers: dict[str, str]) -> None:
    done = run("image", "rm", "aaaa")
    assert done.status == 0 and done.stdout == "removed aaaa (2.0 KiB)\n"
    assert not (paths.layers / f"{'a' * 64}.erofs").exists()


def test_rm_refuses_what_a_sandbox_uses_and_does_the_rest(run: Run, store: Store, layers: dict[str, str]) -> None:
    store.put(record("a", layers=(layers["base"],)))
    done = run("image", "rm", layers["base"], "nothing", "bbbb", "--json")
    assert done.status == 1 and done.json == [{"digest": "bbbb", "bytes": 2048}]
    assert "in use by a sandbox" in done.stderr and "no layer nothing" in done.stderr


def test_prune_keeps_what_is_used(run: Run, paths: Paths, store: Store, layers: dict[str, str]) -> None:
    store.put(record("a", layers=(layers["base"],)))
    assert run("image", "prune").stdout.splitlines()[-1] == "2.0 KiB freed"
    assert [path.stem for path in paths.layers.glob("*.erofs")] == ["a" * 64]
    assert run("image", "prune", "--json").json == []


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Replaces the building of images, which has tests of its own, by a note of what was asked for."""
    asked: list[tuple[str, bool]] = []

    def resolve(
        self: ImageService, source: str, editable: bool = False, kernel_uid: int = 1000, progress: object = None
    ) -> Image:
        asked.append((source, editable))
        assert callable(progress)
        progress(Progress("environment", 50, 100))
        return Image(source, (Layer("/x.erofs", "/", digest="sha256:00"),), "/usr/bin/python3")

    monkeypatch.setattr(ImageService, "resolve_sync", resolve)
    return asked


def test_build_takes_each_image_of_the_profiles_once(run: Run, paths: Paths, built: list[tuple[str, bool]]) -> None:
    paths.profiles.write_text('[profiles.x]\nimage = "directory:/srv"\n[profiles.y]\neditable = true\n')
    done = run("image", "build")
    assert done.status == 0 and built == [("host", False), ("directory:/srv", False), ("host", True)]
    assert done.stdout.splitlines()[0] == "host: 1 layers"


def test_build_takes_the_named_profile_or_an_image_only(run: Run, paths: Paths, built: list[tuple[str, bool]]) -> None:
    paths.profiles.write_text('[profiles.x]\nimage = "directory:/srv"\n')
    (image,) = run("image", "build", "x", "--json").json
    assert image["name"] == "directory:/srv" and image["layers"][0]["digest"] == "sha256:00"
    run("image", "build", "--image", "host:/opt/python", "--editable")
    assert built == [("directory:/srv", False), ("host:/opt/python", True)]


def test_an_image_that_cannot_be_is_one_line(program: Run, tmp_path: Path) -> None:
    done = program("image", "build", "--image", f"host:{tmp_path}/no/python")
    assert done.status == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-2].startswith("error: ") and done.stderr.splitlines()[-1].startswith("hint: ")
