"""What is installed is what we mean to ship: entry points, package data, declared dependencies."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import sandbox_gateway

ROOT = Path(__file__).parent.parent
PACKAGE = Path(sandbox_gateway.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

MODULES = {
    "ipykernel": "ipykernel",
    "jsonschema": "jsonschema",
    "jupyter_client": "jupyter-client",
    "jupyter_core": "jupyter-core",
    "jupyter_events": "jupyter-events",
    "jupyter_server": "jupyter-server",
    "nbformat": "nbformat",
    "prometheus_client": "prometheus-client",
    "tornado": "tornado",
    "traitlets": "traitlets",
    "yaml": "pyyaml",
    "zmq": "pyzmq",
    "docker": "docker",
    "pynvml": "nvidia-ml-py",
}
"""Import name -> distribution, for all that the package may import."""


IN_KERNELS = {"_sandbox_seeds", "cryptography"}
"""What the agent's parts in the kernel's process import, only where that is loaded there already."""


def declared() -> set[str]:
    """Distributions that pyproject.toml asks for, extras for users included."""
    extras = PROJECT["optional-dependencies"]
    texts = [*PROJECT["dependencies"], *extras["docker"], *extras["gpu"], *extras["lab"]]
    return {re.split(r"[<>=!~\[; ]", text)[0].lower() for text in texts}


def imported(file: Path) -> set[str]:
    """Top-level names that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"sandbox_gateway"}


def test_every_third_party_import_is_a_declared_dependency() -> None:
    # The public test helpers may use what the `test` extra brings.
    files = [file for file in PACKAGE.rglob("*.py") if "testing" not in file.relative_to(PACKAGE).parts]
    missing = {
        f"{file.relative_to(PACKAGE)}: {name}"
        for file in files
        for name in imported(file) - (IN_KERNELS if file.name.startswith("kernel_") else set())
        if MODULES.get(name) not in declared()
    }
    assert not missing


def test_the_provisioner_is_found_by_jupyter_client() -> None:
    (entry,) = (
        entry
        for entry in importlib.metadata.entry_points(group="jupyter_client.kernel_provisioners")
        if entry.name == "sandbox"
    )
    assert entry.load().__name__ == "SandboxProvisioner"


def test_jupyter_finds_the_sandbox_command() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="jupyter-sandbox")
    assert callable(script.load())


def test_the_version_is_said_in_one_place() -> None:
    assert importlib.metadata.version("sandbox_gateway") == sandbox_gateway.__version__


def test_the_package_is_typed_and_bsd() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert PROJECT["license"] == "BSD-3-Clause"
    assert "BSD 3-Clause" in (ROOT / "LICENSE").read_text()


def test_the_wheel_holds_the_package_data_and_nothing_of_the_checkout(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="building needs hatchling, which the `test` extra brings")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    data = {
        str(file.relative_to(ROOT))
        for file in PACKAGE.rglob("*")
        if file.is_file()
        and not any(part.startswith((".", "_lab", "__py")) for part in file.relative_to(PACKAGE).parts)
    }
    assert data <= names
    front_end = "sandbox_gateway-{0}.data/data/share/jupyter/labextensions/@sandbox-gateway/labextension/{1}"
    bundle = [file for file in (ROOT / "sandbox_gateway" / "_labextension").rglob("*") if file.is_file()]
    inside = [file.relative_to(ROOT / "sandbox_gateway" / "_labextension") for file in bundle]
    shipped = {front_end.format(sandbox_gateway.__version__, name) for name in (*inside, "install.json")}
    assert shipped == {name for name in names if "labextension" in name}, "the front end, once, where JupyterLab looks"
    assert "sandbox_gateway/py.typed" in names
    assert "sandbox_gateway/profiles.schema.json" in names
    assert all(name.startswith(("sandbox_gateway/", "sandbox_gateway-")) for name in names)


def test_neither_the_code_nor_the_docs_name_a_package_index() -> None:
    # A user's own configuration of pip and Go decides where packages come from.
    hosts = re.compile(r"pypi\.org|files\.pythonhosted|proxy\.golang|sum\.golang|registry\.npmjs")
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "Makefile", ROOT / "README.md"]
    files += [file for file in (ROOT / "labextension").glob("*") if file.is_file()]
    files += [file for file in (PACKAGE / "_labextension").rglob("*") if file.is_file()]
    assert not [str(file) for file in files if hosts.search(file.read_text())]
