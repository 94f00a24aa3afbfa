"""nbclient's own test suite passes with our provisioner as the default one, as it does with the local one.

The suite is not copied into this repository: it is taken from nbclient's source package by pip when the test runs, in
the version that is installed here. It runs in a process of its own; what does not pass runs once more with the local
provisioner.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from acceptance import KERNEL, PLAIN, Product
from suite_report import outcomes, short

DIFFERENCES: dict[str, str] = {
    "test_client::test_run_all_notebooks[Inline Image.ipynb-opts5]": (
        "reads `python.png` beside the notebook, and the default profile does not see the notebook's folder"
    ),
    "test_client::test_run_all_notebooks[Skip Exceptions with Cell Tags.ipynb-opts8]": (
        "sets `IPYKERNEL_CELL_NAME` in its own environment, which is not handed to the kernel"
    ),
    "test_client::test_async_parallel_notebooks": (
        "two kernels meet in a temporary directory of the host that an environment variable names; neither is inside"
    ),
}
"""Tests that pass with the local provisioner only, each with its reason; ``compatibility.md`` lists the same."""

SUITE_NEEDS = ("flaky", "testpath", "xmltodict", "ipywidgets")
"""What the suite imports beyond our own test requirements."""

PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")

COMPATIBILITY = Path(__file__).resolve().parents[2] / "docs" / "reference" / "compatibility.md"


def _pip(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"pip cannot get nbclient's test suite: {last}")


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source of nbclient, with what its tests need in ``needs``."""
    folder = tmp_path_factory.mktemp("nbclient")
    version = importlib.metadata.version("nbclient")
    _pip("download", "--no-deps", "--no-binary", "nbclient", "-d", str(folder), f"nbclient=={version}")
    _pip("install", "--no-deps", "--target", str(folder / "needs"), *SUITE_NEEDS)
    with tarfile.open(folder / f"nbclient-{version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"nbclient-{version}"


def _run(suite: Path, report: Path, *tests: str, **variables: str) -> dict[str, str]:
    """Run the suite, or some of its tests."""
    needs = str(suite.parent / "needs")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    options = ["-o", "addopts=", "-o", "filterwarnings=", "-o", "asyncio_default_fixture_loop_scope=function"]
    done = subprocess.run(
        [*PYTEST, *options, f"--junitxml={report}", *(tests or ["tests"])],
        cwd=suite,
        env={**os.environ, "PATH": path, "PYTHONPATH": needs, "IPYTHONDIR": str(suite.parent / "ipython"), **variables},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    return outcomes(report)


def _remove_what_is_left(product: Product, others: set[str]) -> None:
    """End what the suite left to the end of its process: some of its tests never shut their kernels down.

    Our own start, or the agent's watch over its owner, would do the same a little later.
    """
    for entry in product.ps():
        if entry["id"] in others:
            continue
        if entry["state"] != "terminated":
            print(f"left by nbclient's suite: {entry['id']} {entry['state']}")
        done = product.command("rm", entry["id"])
        assert done.returncode == 0, done.stderr


PROFILE = """
[profiles.python3-gvisor]
environment = {{ PYTHONPATH = "{needs}" }}
mounts = [{{ source = "{needs}", destination = "{needs}", mode = "ro" }}]
"""
"""The default profile with what the suite's notebooks import (ipywidgets), and nothing more."""


@pytest.mark.timeout(1800)
def test_the_same_tests_pass_as_with_the_local_provisioner(suite: Path, product: Product, tmp_path: Path) -> None:
    variables = {}
    if KERNEL != PLAIN:
        profiles = product.home / "profiles.toml"
        before = profiles.read_text()
        others = product.ids()
        profiles.write_text(before + PROFILE.format(needs=suite.parent / "needs"))
        variables["JUPYTER_DEFAULT_PROVISIONER_NAME"] = "sandbox"
    try:
        tested = _run(suite, tmp_path / "tested.xml", **variables)
    finally:
        if KERNEL != PLAIN:
            profiles.write_text(before)
            _remove_what_is_left(product, others)
    failed = [test for test, text in tested.items() if text != "passed"]
    plain = _run(suite, tmp_path / "plain.xml", *failed) if failed else {}
    worse = {short(test): tested[test] for test in failed if plain.get(test, "not run") in ("passed", "not run")}
    assert len(tested) - len(failed) + len(worse) > 100, {test: tested[test] for test in failed}
    unexpected = {name: text for name, text in worse.items() if name not in DIFFERENCES}
    assert not unexpected, "pass with the local provisioner only:\n" + "\n\n".join(
        f"{name}:\n{text}" for name, text in unexpected.items()
    )
    if KERNEL != PLAIN:
        assert set(DIFFERENCES) <= set(worse), f"no difference any more: {set(DIFFERENCES) - set(worse)}"


def test_each_difference_is_documented_with_its_reason() -> None:
    text = COMPATIBILITY.read_text()
    for name, reason in DIFFERENCES.items():
        assert name in text
        assert reason in text
