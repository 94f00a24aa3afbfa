"""Where the runtime directory is put."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host import filesystems
from sandbox_gateway.host.paths import Paths, discover

LONG = "/" + "x" * 60


@pytest.fixture
def user_run() -> Iterator[Path]:
    """A short directory as XDG_RUNTIME_DIR is one."""
    made = Path(tempfile.mkdtemp(prefix="sg-"))
    yield made
    shutil.rmtree(made)


def test_a_long_home_puts_it_under_the_users_run_directory(user_run: Path) -> None:
    paths = discover({"SANDBOX_GATEWAY_HOME": LONG, "XDG_RUNTIME_DIR": str(user_run)})
    assert paths.runtime.parent == user_run


@pytest.mark.parametrize("whose", ["another user's", "everybody's", "missing"])
def test_a_run_directory_that_others_can_change_is_not_used(user_run: Path, whose: str) -> None:
    """Under sudo the variable may name the directory of the user who called it, who could swap what root puts there."""
    named = str(user_run)
    if whose == "another user's":
        if os.geteuid() != 0:
            pytest.skip("only root can make a directory of another user")
        os.chown(user_run, 12345, 12345)
    elif whose == "everybody's":
        user_run.chmod(0o1777)
    else:
        named += "-not"
    paths = discover({"SANDBOX_GATEWAY_HOME": LONG, "XDG_RUNTIME_DIR": named})
    assert paths.runtime.parent == Path("/tmp")


@pytest.mark.parametrize("which", ["home", "runtime"])
def test_a_network_filesystem_is_refused_before_anything_is_made(
    tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite and locks would corrupt or block there: no kernel starts, with the reason and what to do."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"1 0 8:1 / / rw - ext4 /dev/vda rw\n2 1 0:40 / {tmp_path}/{which} rw - nfs4 server:/x rw\n")
    monkeypatch.setattr(filesystems, "MOUNTS", str(mounts))
    with pytest.raises(SandboxGatewayError, match=r"network filesystem \(nfs4\)") as raised:
        Paths(tmp_path / "home", tmp_path / "runtime").ensure()
    assert raised.value.code == "data_directory"
    assert "SANDBOX_GATEWAY_HOME at a local folder" in raised.value.hint
    assert not (tmp_path / which).exists()
