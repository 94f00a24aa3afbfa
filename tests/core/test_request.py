"""What a request may open to a kernel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sandbox_gateway import request as requests
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.model import KernelSpec, WorkspaceMode
from sandbox_gateway.profiles import load_profiles
from sandbox_gateway.request import CreateRequest


def wanted(tmp_path: Path, folder: Path, mode: WorkspaceMode) -> CreateRequest:
    profile = load_profiles(Paths(tmp_path / "home", tmp_path / "run"))["python3-gvisor-files"]
    return CreateRequest("id", replace(profile, workspace=mode), KernelSpec(("python",)), b"key", folder)


@pytest.mark.parametrize("mode", [WorkspaceMode.RW, WorkspaceMode.RO])
@pytest.mark.parametrize("folder", ["/", "/etc", "/etc/ssl", "/proc/self/root", "/dev/shm", "link"])
def test_the_machine_itself_is_no_workspace(tmp_path: Path, folder: str, mode: WorkspaceMode) -> None:
    """As root such a kernel would own the machine: its uid is the folder's owner's."""
    (tmp_path / "link").symlink_to("/")
    request = wanted(tmp_path, tmp_path / folder, mode)
    with pytest.raises(SandboxGatewayError, match="machine itself") as raised:
        requests.identity(request, root=True)
    assert raised.value.code == "invalid_request"
    assert raised.value.hint


def test_a_folder_is_a_workspace(tmp_path: Path) -> None:
    assert requests.identity(wanted(tmp_path, tmp_path, WorkspaceMode.RW), root=True).uid == tmp_path.stat().st_uid


@pytest.mark.parametrize("chosen", ["template-mine", "standby-1", "../x", ""])
def test_an_id_that_would_count_as_nobodys_or_as_a_path_cannot_be_chosen(chosen: str) -> None:
    with pytest.raises(SandboxGatewayError, match="cannot be a"):
        requests.chosen_id(chosen)
    assert requests.chosen_id("my-template") == "my-template"
