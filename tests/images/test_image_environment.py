"""Host environments: which layers, what is left out, when they are built anew."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_environments import add_distribution, site_of

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.images import host_env
from sandbox_gateway.images.editable import editable_installs
from sandbox_gateway.images.interpreter import Interpreter, link_trail, probe, require_ipykernel
from sandbox_gateway.images.tree import Tree


def python(venv: Path) -> str:
    return str(venv / "bin/python")


def environment(venv: Path, **options: object) -> host_env.EnvironmentLayer:
    """The layer of the virtual environment itself."""
    plan = host_env.plan(probe(python(venv)), **options)  # type: ignore[arg-type]
    return next(layer for layer in plan.layers if layer.path == str(venv.resolve()))


def files(tree: Tree) -> set[str]:
    return {path for path, _ in tree}


def test_a_virtual_environment_and_its_base_are_layers_at_their_own_paths(small_venv: Path) -> None:
    interpreter = probe(python(small_venv))
    paths = [layer.path for layer in host_env.plan(interpreter).layers]
    assert str(small_venv.resolve()) in paths
    assert interpreter.is_venv
    base = os.path.realpath(interpreter.base_prefix)
    assert any(path == base or path.startswith(f"{base}/lib") for path in paths)
    assert paths == sorted(paths), "parents before children"


def test_packages_of_the_base_are_left_out_unless_the_environment_sees_them(small_venv: Path) -> None:
    interpreter = probe(python(small_venv))
    base = os.path.realpath(interpreter.base_prefix)
    if base in host_env.SYSTEM_PREFIXES:
        pytest.skip("the base is the system's Python, whose packages lie beside its library")
    layer = next(layer for layer in host_env.plan(interpreter).layers if layer.path == base)
    assert f"lib/{interpreter.directory_name}/site-packages" in layer.omit
    assert f"lib/{interpreter.directory_name}/test" in layer.omit
    config = small_venv / "pyvenv.cfg"
    config.write_text(config.read_text().replace("packages = false", "packages = true"))
    kinds = {layer.path: layer.what for layer in host_env.plan(probe(python(small_venv))).layers}
    assert kinds.get(f"{base}/lib/{interpreter.directory_name}/site-packages") == "packages"


def test_secrets_and_configuration_stay_outside(small_venv: Path) -> None:
    site = site_of(small_venv)
    names = ["pip.conf", "etc/jupyter/token.json", ".netrc", "netrc", ".env", "lib/pkg/.git/config", ".condarc"]
    # `conda env config vars set` writes plain values into the second of these.
    names += ["condarc.d/x.yml", "conda-meta/state", "etc/conda/activate.d/env_vars.sh", ".npmrc", ".envrc"]
    for name in names:
        (small_venv / name).parent.mkdir(parents=True, exist_ok=True)
        (small_venv / name).write_text("secret")
    (site / "ipykernel/__pycache__").mkdir()
    (site / "ipykernel/__pycache__/x.pyc").write_bytes(b"kept")
    found = files(host_env.build(environment(small_venv)).tree)
    secret = ("pip.conf", "token.json", "netrc", ".env", ".git", "condarc")
    assert not [path for path in found if path.endswith(secret) or "/.git/" in path]
    assert not {f"/{name}" for name in names} & set(found)
    assert [path for path in found if path.endswith("__pycache__/x.pyc")]
    assert "/pyvenv.cfg" in found


def test_our_own_data_never_becomes_part_of_an_image(small_venv: Path) -> None:
    (small_venv / "data/layers").mkdir(parents=True)
    (small_venv / "data/layers/secret").touch()
    found = files(host_env.build(environment(small_venv, private=[str(small_venv / "data")])).tree)
    assert "/data" in found
    assert "/data/layers" not in found


def test_condas_caches_and_other_environments_are_left_out(tmp_path: Path) -> None:
    root = tmp_path / "conda"
    for name in ("conda-meta", "pkgs/numpy", "envs/other/bin", "lib/python3.12/site-packages/ipykernel", "bin"):
        (root / name).mkdir(parents=True)
    (root / "bin/python3.12").touch()
    site = str(root / "lib/python3.12/site-packages")
    interpreter = Interpreter(
        executable=str(root / "bin/python3.12"),
        base_executable=str(root / "bin/python3.12"),
        prefix=str(root),
        base_prefix=str(root),
        version=(3, 12, 1),
        stdlib=str(root / "lib/python3.12"),
        platstdlib=str(root / "lib/python3.12"),
        sites=(site,),
        has_ipykernel=True,
    )
    layers = {layer.path: layer for layer in host_env.plan(interpreter).layers}
    assert set(layers) == {str(root), site}, "packages apart from the interpreter: pip install rewrites only them"
    found = files(host_env.build(layers[str(root)]).tree)
    assert "/pkgs" in found
    assert not {path for path in found if path.startswith(("/pkgs/", "/envs/"))}
    assert "/lib/python3.12/site-packages" in found
    assert "/lib/python3.12/site-packages/ipykernel" not in found


def test_links_that_lead_to_the_interpreter_are_found(tmp_path: Path) -> None:
    real = tmp_path / "python-3.12.4"
    (real / "bin").mkdir(parents=True)
    (real / "bin/python3.12").touch()
    (tmp_path / "python-3.12").symlink_to("python-3.12.4")
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").symlink_to(tmp_path / "python-3.12/bin/python3.12")
    trail = link_trail(str(tmp_path / "venv/bin/python"))
    assert trail[str(tmp_path / "python-3.12")] == "python-3.12.4"
    assert str(tmp_path / "venv/bin/python") in trail
    (tmp_path / "loop").symlink_to("loop")
    link_trail(str(tmp_path / "loop"))


def test_an_install_changes_the_fingerprint_and_an_import_does_not(small_venv: Path) -> None:
    layer = environment(small_venv)
    site = site_of(small_venv)
    before = host_env.fingerprint(layer)
    (site / "ipykernel/__pycache__").mkdir()
    (site / "ipykernel/__pycache__/x.pyc").touch()
    (site / "__pycache__").mkdir()
    assert host_env.fingerprint(layer) == before
    package = add_distribution(site, "new", "1.0")
    after = host_env.fingerprint(layer)
    assert after != before
    (package / "__init__.py").write_text("changed by hand\n")
    assert host_env.fingerprint(layer) != after
    (site / "some.pth").write_text("/nowhere\n")
    again = host_env.fingerprint(layer)
    (small_venv / "bin/tool").touch()
    assert host_env.fingerprint(layer) != again


def test_the_fingerprint_of_this_environment_takes_less_than_50_ms() -> None:
    plan = host_env.plan(probe())
    best = 1.0
    for _ in range(50):
        start = time.perf_counter()
        for layer in plan.layers:
            host_env.fingerprint(layer)
        best = min(best, time.perf_counter() - start)
        if best < 0.05:
            break
    print(f"fingerprint of {len(plan.layers)} layers: {best * 1000:.1f} ms")
    assert best < 0.05


def test_very_big_packages_are_layers_of_their_own(small_venv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_env, "BIG_PACKAGE", 100_000)
    site = site_of(small_venv)
    package = add_distribution(site, "torch", "2.9")
    (package / "libtorch.so").write_bytes(b"x" * 200_000)
    recipe = host_env.build(environment(small_venv))
    relative = str(package.relative_to(small_venv))
    assert recipe.facts["big"] == [relative]
    assert f"/{relative}" in files(recipe.tree), "the mount point"
    assert f"/{relative}/libtorch.so" not in files(recipe.tree)
    own = host_env.EnvironmentLayer("package", str(package), split_big=False)
    assert "/libtorch.so" in files(host_env.build(own).tree)
    before = host_env.fingerprint(own)
    add_distribution(site, "other", "1.0")
    assert host_env.fingerprint(own) == before, "another install does not touch it"
    (site / "torch-2.9.dist-info/RECORD").write_text("changed")
    assert host_env.fingerprint(own) != before


def test_directories_of_an_environment_are_open_to_any_uid_of_a_kernel(small_venv: Path) -> None:
    tree = host_env.build(environment(small_venv)).tree
    assert {node.mode & 0o777 for _, node in tree if node.is_dir} == {0o777}


def test_libraries_that_an_environment_lacks_are_listed(small_venv: Path) -> None:
    recipe = host_env.build(host_env.plan(probe(python(small_venv))).layers[0])
    needs = recipe.facts["needs"]
    assert isinstance(needs, list)
    assert any(name.startswith("libc.so") for name in needs)


def _setuptools(site: Path, source: Path) -> None:
    add_distribution(site, "mine", "1.0", direct_url_json=_url(source.parent))
    (site / "__editable___mine_1_0_finder.py").write_text(
        f"from x import y\nMAPPING: dict[str, str] = {{'mine': {str(source / 'mine')!r}}}\nNAMESPACES = {{}}\n"
    )
    (site / "__editable__.mine-1.0.pth").write_text("import __editable___mine_1_0_finder\n")


def _hatch(site: Path, source: Path) -> None:
    add_distribution(site, "mine", "1.0", direct_url_json=_url(source.parent))
    (site / "_mine.pth").write_text(f"{source}\n")


def _develop(site: Path, source: Path) -> None:
    (site / "mine.egg-link").write_text(f"{source}\n.\n")
    (site / "easy-install.pth").write_text(f"{source}\n")


def _url(project: Path) -> str:
    return json.dumps({"url": project.as_uri(), "dir_info": {"editable": True}})


@pytest.mark.parametrize("install", [_setuptools, _hatch, _develop])
def test_editable_installs_are_found_and_taken_in_only_when_asked(
    small_venv: Path, tmp_path: Path, install: Callable[[Path, Path], None]
) -> None:
    source = tmp_path / "project dir/src"
    for name in ("mine/.git/config", "mine/node_modules/x.js", "mine/.env", "mine/__init__.py"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    install(site_of(small_venv), source)
    interpreter = probe(python(small_venv))
    found = {entry.name: entry for entry in editable_installs(interpreter)}
    name = "mine" if install is not _develop else "easy-install"
    assert found[name].sources in ((str(source),), (str(source / "mine"),))
    assert not [layer for layer in host_env.plan(interpreter).layers if layer.what == "editable source"]
    layers = [layer for layer in host_env.plan(interpreter, editable=True).layers if layer.what == "editable source"]
    assert [layer.path for layer in layers] == list(found[name].sources)
    inside = files(host_env.build(layers[0]).tree)
    assert any(path.endswith("__init__.py") for path in inside)
    assert not [path for path in inside if ".git" in path or "node_modules" in path or ".env" in path]
    before = host_env.fingerprint(layers[0])
    (source / "mine/__init__.py").write_text("x = 1\n")
    assert host_env.fingerprint(layers[0]) != before


def test_an_editable_install_of_a_whole_home_is_refused(
    small_venv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _hatch(site_of(small_venv), tmp_path)
    with pytest.raises(SandboxGatewayError) as raised:
        host_env.plan(probe(python(small_venv)), editable=True)
    assert raised.value.code == "image_source"
    assert "mine" in raised.value.message


def test_a_home_that_is_a_prefix_is_not_copied_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    own = probe()
    (tmp_path / "lib" / own.directory_name).mkdir(parents=True)
    library = str(tmp_path / "lib" / own.directory_name)
    interpreter = Interpreter(
        sys.executable, sys.executable, str(tmp_path), str(tmp_path), own.version, library, library, (), True
    )
    assert [layer.path for layer in host_env.plan(interpreter).layers] == [library]


def test_an_environment_without_ipykernel_is_refused_with_the_command_that_helps(small_venv: Path) -> None:
    (site_of(small_venv) / "ipykernel/__init__.py").unlink()
    (site_of(small_venv) / "ipykernel").rmdir()
    with pytest.raises(SandboxGatewayError) as raised:
        require_ipykernel(probe(python(small_venv)))
    assert raised.value.code == "image_source"
    assert raised.value.hint.endswith("pip install ipykernel")


def test_what_is_no_interpreter_is_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no program")
    (tmp_path / "odd").write_text("#!/bin/sh\necho hello\n")
    (tmp_path / "odd").chmod(0o755)
    expected = {
        "/no/such/python": "no interpreter",
        str(tmp_path): "no Python in the directory",
        str(tmp_path / "text"): "not a program",
        str(tmp_path / "odd"): "does not behave like",
    }
    for path, text in expected.items():
        with pytest.raises(SandboxGatewayError, match=text) as raised:
            probe(path)
        assert raised.value.code == "image_source"


def test_a_directory_with_a_python_in_it_names_that_environment(small_venv: Path) -> None:
    assert probe(str(small_venv)).prefix == str(small_venv)
