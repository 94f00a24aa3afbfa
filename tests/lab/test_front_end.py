"""The built front end is what its sources give, and its own linters and unit tests pass."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import build_front_end as front_end  # noqa: E402

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def tools() -> None:
    """The front end's tools; skips, with the reason, where they cannot be had."""
    if why := front_end.obstacle():
        pytest.skip(why)
    if not front_end.installed():
        pytest.skip("the front end's tools are not installed: make test does that where it can")


def test_the_bundle_was_built_from_these_sources() -> None:
    """Needs no Node: a source that was changed without a build is seen everywhere."""
    built_from = (front_end.BUNDLE / front_end.DIGEST).read_text().strip()
    assert built_from == front_end.digest(), "build it: make frontend"


def test_the_bundle_says_what_jupyterlab_has_to_load() -> None:
    described = json.loads((front_end.BUNDLE / "package.json").read_text())
    built = described["jupyterlab"]["_build"]
    assert described["name"] == "@sandbox-gateway/labextension"
    assert (front_end.BUNDLE / built["load"]).is_file()
    assert built["style"] == "./style"


def test_a_build_gives_this_bundle_byte_for_byte(tools: None) -> None:
    assert front_end.check() == [], "build it: make frontend"


@pytest.mark.parametrize("script", ["types:check", "lint", "test"])
def test_the_front_ends_own_checks_pass(tools: None, script: str) -> None:
    """``types:check``: the REST types are what openapi.yaml gives."""
    done = subprocess.run(
        ["npm", "run", "--silent", script], cwd=front_end.SOURCES, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
