"""``install`` and ``uninstall``, and what Jupyter makes of it."""

from __future__ import annotations

import json
import struct
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from cli_harness import Run
from jupyter_client.kernelspec import KernelSpecManager

from sandbox_gateway import guard, kernelspecs
from sandbox_gateway.host.paths import Paths

BUILT_IN = ["python3-gvisor", "python3-gvisor-files"]


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty prefix, the only place where Jupyter looks besides its own."""
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))
    return tmp_path


def kernels(prefix: Path) -> Path:
    return prefix / "share" / "jupyter" / "kernels"


def spec(prefix: Path, name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((kernels(prefix) / name / "kernel.json").read_text())
    return found


def test_without_names_the_built_in_profiles_and_all_of_the_file_are_installed(
    run: Run, paths: Paths, prefix: Path
) -> None:
    paths.profiles.write_text('[profiles.big]\ndisplay_name = "Big"\n')
    done = run("install", "--prefix", prefix)
    assert done.status == 0
    told = [line for line in done.stderr.splitlines() if not line.startswith(("reading ", "building "))]
    assert told == [], "nothing but how far it is, where the environment has changed meanwhile"
    assert done.stdout.splitlines() == [f"installed {name} in {kernels(prefix)}" for name in [*BUILT_IN, "big"]]
    assert sorted(path.name for path in kernels(prefix).iterdir()) == ["big", *BUILT_IN]


def test_jupyter_reads_what_was_installed(run: Run, prefix: Path) -> None:
    run("install", "--prefix", prefix)
    manager = KernelSpecManager(kernel_dirs=[str(kernels(prefix))], ensure_native_kernel=False)
    assert sorted(manager.find_kernel_specs()) == BUILT_IN
    found = manager.get_kernel_spec("python3-gvisor-files")
    assert found.display_name == "Python 3 (gVisor, this folder)" and found.language == "python"
    assert guard.unwrap(found.argv) == (
        sys.executable,
        "-Xfrozen_modules=off",
        "-m",
        "ipykernel_launcher",
        "-f",
        "{connection_file}",
    )
    assert found.interrupt_mode == "signal" and found.metadata["debugger"] is True
    assert found.metadata["kernel_provisioner"] == {
        "provisioner_name": "sandbox",
        "config": {"profile": "python3-gvisor-files"},
    }
    assert "delete the files" in found.metadata["description"]


def test_the_pictures_are_pictures_of_their_size(run: Run, prefix: Path) -> None:
    run("install", "--prefix", prefix, "python3-gvisor")
    directory = kernels(prefix) / "python3-gvisor"
    for side in (32, 64):
        data = (directory / f"logo-{side}x{side}.png").read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack("!2I", data[16:24]) == (side, side)
    assert ElementTree.parse(directory / "logo-svg.svg").getroot().tag.endswith("svg")


def test_the_command_follows_the_image_and_the_profiles_own(
    run: Run, paths: Paths, prefix: Path, tmp_path: Path
) -> None:
    (tmp_path / "environment/bin").mkdir(parents=True)
    paths.profiles.write_text(
        '[profiles.other]\nimage = "host:/opt/conda/bin/python"\n'
        f'[profiles.folder]\nimage = "host:{tmp_path}/environment"\n'
        '[profiles.tree]\nimage = "directory:/srv/root"\n'
        '[profiles.bash]\nlanguage = "bash"\ninterrupt_mode = "message"\n'
        'argv = ["python3", "-m", "bash_kernel", "-f", "{connection_file}"]\n'
    )
    run("install", "--prefix", prefix)
    tail = ["-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    assert guard.unwrap(spec(prefix, "other")["argv"]) == ("/opt/conda/bin/python", *tail)
    assert guard.unwrap(spec(prefix, "folder")["argv"]) == ("python3", *tail), "the image says which that is"
    assert guard.unwrap(spec(prefix, "tree")["argv"]) == ("python3", *tail)
    bash = spec(prefix, "bash")
    assert guard.unwrap(bash["argv"]) == ("python3", "-m", "bash_kernel", "-f", "{connection_file}")
    assert (bash["language"], bash["interrupt_mode"]) == ("bash", "message")
    assert "debugger" not in bash["metadata"]  # type: ignore[operator]


def test_a_profile_that_isolates_nothing_says_so_in_its_name(run: Run, paths: Paths, prefix: Path) -> None:
    paths.profiles.write_text('[profiles.test]\nruntime = "fake"\n')
    run("install", "--prefix", prefix, "--no-templates", "test")
    assert spec(prefix, "test")["display_name"] == "test (not isolated)"
    assert "NOT ISOLATED" in run("install", "--list").stdout


def test_installing_again_changes_nothing(run: Run, prefix: Path) -> None:
    run("install", "--prefix", prefix)
    before = {path: path.stat().st_mtime_ns for path in kernels(prefix).rglob("*")}
    done = run("install", "--prefix", prefix, "--json")
    assert [change["action"] for change in done.json] == ["unchanged", "unchanged"]
    assert {path: path.stat().st_mtime_ns for path in kernels(prefix).rglob("*")} == before


def test_a_changed_profile_updates_its_kernelspec_and_leaves_nothing_beside(
    run: Run, paths: Paths, prefix: Path
) -> None:
    run("install", "--prefix", prefix)
    (kernels(prefix) / "python3-gvisor" / "stale.js").write_text("old")
    paths.profiles.write_text('[profiles.python3-gvisor]\ndisplay_name = "Mine"\n')
    done = run("install", "--prefix", prefix, "--json")
    assert [change["action"] for change in done.json] == ["updated", "unchanged"]
    assert spec(prefix, "python3-gvisor")["display_name"] == "Mine"
    assert sorted(path.name for path in kernels(prefix).iterdir()) == BUILT_IN
    assert not (kernels(prefix) / "python3-gvisor" / "stale.js").exists()


def test_a_damaged_kernelspec_of_ours_is_repaired(run: Run, prefix: Path) -> None:
    run("install", "--prefix", prefix)
    (kernels(prefix) / "python3-gvisor" / "logo-svg.svg").unlink()
    assert run("install", "--prefix", prefix, "--json").json[0]["action"] == "updated"
    assert (kernels(prefix) / "python3-gvisor" / "logo-svg.svg").exists()


@pytest.mark.parametrize(
    "text",
    ["{}", "not json", "[]", '{"metadata": {"kernel_provisioner": {"provisioner_name": "local-provisioner"}}}'],
)
def test_a_kernelspec_of_somebody_elses_is_neither_overwritten_nor_removed(run: Run, prefix: Path, text: str) -> None:
    theirs = kernels(prefix) / "python3-gvisor" / "kernel.json"
    theirs.parent.mkdir(parents=True)
    theirs.write_text(text)
    done = run("install", "--prefix", prefix)
    assert done.status == 1 and "somebody else's" in done.stderr
    assert run("uninstall", "python3-gvisor", "--prefix", prefix).status == 1
    assert run("uninstall", "--prefix", prefix).stdout == "nothing to do\n"
    assert theirs.read_text() == text


def test_uninstall_removes_the_named_or_all_of_ours(run: Run, prefix: Path) -> None:
    run("install", "--prefix", prefix)
    assert (
        run("uninstall", "--prefix", prefix, "python3-gvisor").stdout
        == f"removed python3-gvisor in {kernels(prefix)}\n"
    )
    assert [change["name"] for change in run("uninstall", "--prefix", prefix, "--json").json] == [
        "python3-gvisor-files"
    ]
    assert list(kernels(prefix).iterdir()) == []


def test_uninstall_finds_what_jupyter_finds(run: Run, paths: Paths, prefix: Path) -> None:
    # A name of this test's own: the search goes through the developer's kernelspecs too, and they must stay.
    name = "only-in-this-test"
    paths.profiles.write_text(f"[profiles.{name}]\n")
    run("install", "--prefix", prefix, name)
    done = run("uninstall", name)
    assert f"removed {name} in {kernels(prefix)}" in done.stdout
    assert not (kernels(prefix) / name).exists()


def test_uninstall_takes_a_kernelspec_whose_profile_is_gone(run: Run, paths: Paths, prefix: Path) -> None:
    paths.profiles.write_text("[profiles.gone]\n")
    run("install", "--prefix", prefix, "gone")
    paths.profiles.unlink()
    assert "'gone', which does not exist" in run("install", "--list").stdout
    assert run("uninstall", "--prefix", prefix, "gone").status == 0


def test_the_list_tells_what_is_installed_where(run: Run, prefix: Path) -> None:
    run("install", "--prefix", prefix, "python3-gvisor")
    plain, files = run("install", "--list", "--json", "--prefix", prefix).json
    assert (plain["name"], plain["installed"]) == ("python3-gvisor", [str(kernels(prefix) / "python3-gvisor")])
    assert (files["name"], files["installed"], files["workspace"]) == ("python3-gvisor-files", [], "rw")
    text = run("install", "--list", "--prefix", prefix).stdout
    assert "reads and writes the notebook's folder" in text and "not installed" in text


def test_a_place_that_cannot_be_written_is_an_error_and_nothing_is_left(run: Run, tmp_path: Path) -> None:
    (tmp_path / "share").write_text("a file")
    done = run("install", "--prefix", tmp_path)
    assert (
        done.status == 1
        and done.stderr.startswith("error: cannot write ")
        and "hint: Choose another place" in done.stderr
    )


def test_the_default_place_is_this_environment_only_when_it_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "base_prefix", "/another")
    assert kernelspecs.default_directory({}) == kernelspecs.sys_prefix_directory()
    monkeypatch.setattr(sys, "base_prefix", sys.prefix)
    assert kernelspecs.default_directory({"CONDA_PREFIX": "/not/this"}) == kernelspecs.user_directory()


def test_user_and_sys_prefix_name_their_places(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "env"))
    assert run("install", "--user", "--json").json[0]["path"] == str(tmp_path / "data/kernels/python3-gvisor")
    assert run("install", "--sys-prefix", "--json").json[0]["path"] == str(
        tmp_path / "env/share/jupyter/kernels/python3-gvisor"
    )
