"""Root filesystem trees as images."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from pathlib import Path

import pytest
from erofs_reader import read

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.images import directory
from sandbox_gateway.images.service import ImageService
from sandbox_gateway.images.store import LayerStore


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tree that looks like a distribution with a Python and an ipykernel."""
    tree = tmp_path / "tree"
    for name in ("usr/bin", "usr/lib/python3/dist-packages/ipykernel", "usr/lib/python3.11", "etc/ssh", "proc", "root"):
        (tree / name).mkdir(parents=True)
    shutil.copy(os.path.realpath(sys.executable), tree / "usr/bin/python3.11")
    (tree / "usr/bin/python3").symlink_to("python3.11")
    (tree / "bin").symlink_to("usr/bin")
    (tree / "usr/lib/python3/dist-packages/ipykernel/__init__.py").touch()
    (tree / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nbuild:x:1001:1001::/:/bin/sh\nme:x:1000:1000::/:/x\n")
    (tree / "etc/shadow").write_text("root:hash")
    (tree / "etc/ssh/ssh_host_rsa_key").write_text("key")
    (tree / "proc/leftover").touch()
    (tree / "root/.netrc").touch()
    (tree / "usr/bin/python3.11").chmod(0o4755)
    return tree


def layer(root: Path, paths: Paths) -> dict[str, object]:
    stored = LayerStore(paths).ensure("d", "1", lambda: directory.build(root, 1000), what="directory")
    return dict(read(stored.path))


def test_the_tree_becomes_one_root_layer_with_our_accounts(root: Path, paths: Paths) -> None:
    stored = LayerStore(paths).ensure("d", "1", lambda: directory.build(root, 1000), what="directory")
    entries = read(stored.path)
    users = entries["/etc/passwd"].content.decode()
    assert "jovyan:x:1000:" in users
    assert "build:x:1001" in users
    assert "me:x:1000" not in users, "a uid has one name"
    assert stat.S_IMODE(entries["/usr/bin/python3.11"].mode) == 0o755, "no set-uid"
    assert stat.S_IMODE(entries["/home/jovyan"].mode) == 0o777
    assert stat.S_IMODE(entries["/tmp"].mode) == 0o1777
    assert {"/opt/agent", "/dev", "/sys", "/run", "/proc"} <= set(entries)
    hidden = {"/etc/shadow", "/etc/ssh/ssh_host_rsa_key", "/proc/leftover", "/root/.netrc"}
    assert not hidden & set(entries)


def test_python_is_found_by_looking_at_files(root: Path) -> None:
    assert directory.find_python(root) == ("/usr/bin/python3", True)
    (root / "opt/env/bin").mkdir(parents=True)
    (root / "opt/env/bin/python3").symlink_to("/usr/bin/python3")
    assert directory.find_python(root) == ("/usr/bin/python3", True), "links are followed inside the tree"
    (root / "opt/env/lib/python3.11/site-packages/ipykernel").mkdir(parents=True)
    (root / "opt/env/lib/python3.11/site-packages/ipykernel/__init__.py").touch()
    shutil.rmtree(root / "usr/lib/python3/dist-packages/ipykernel")
    assert directory.find_python(root) == ("/opt/env/bin/python3", True)


def test_links_cannot_lead_out_of_the_tree(root: Path) -> None:
    (root / "usr/bin/python3").unlink()
    (root / "usr/bin/python3").symlink_to("../../../../../../../../" + sys.executable.lstrip("/"))
    assert directory.find_python(root) == (None, False)


@pytest.mark.parametrize("kind", ["absolute link", "relative link", "linked folder", "FIFO"])
def test_the_lists_of_accounts_are_read_inside_the_tree_only(root: Path, tmp_path: Path, kind: str) -> None:
    """A tree from anywhere must not make its builder, who may be root, copy the host's password hashes."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "passwd").write_text("stolen:$6$hash:19000:0:99999:7:::\n")
    passwd = root / "etc/passwd"
    passwd.unlink()
    if kind == "absolute link":
        passwd.symlink_to(outside / "passwd")
    elif kind == "relative link":
        passwd.symlink_to("../../outside/passwd")
    elif kind == "FIFO":
        os.mkfifo(passwd)
    else:
        (root / "usr/accounts").symlink_to(outside)
        passwd.symlink_to("../usr/accounts/passwd")
    recipe = directory.build(root, 1000)
    node = recipe.tree.get("/etc/passwd")
    assert node is not None
    assert b"jovyan" in node.data
    assert b"stolen" not in node.data


def test_a_tree_whose_etc_is_a_link_is_refused_with_a_reason(root: Path) -> None:
    shutil.rmtree(root / "etc")
    (root / "etc").symlink_to("/etc")
    with pytest.raises(SandboxGatewayError, match="etc is not a directory") as raised:
        directory.build(root, 1000)
    assert raised.value.code == "image_source"


@pytest.mark.parametrize(
    "path",
    [
        "etc/pip.conf",
        "etc/ssl/private/key.pem",
        "etc/krb5.keytab",
        "etc/sudoers.d/me",
        "home/me/.netrc",
        "home/me/.aws/credentials",
        "home/me/.config/pip/pip.conf",
        "home/me/project/.env",
    ],
)
def test_credentials_stay_outside(root: Path, path: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text("secret")
    assert directory.build(root, 1000).tree.get(f"/{path}") is None


def test_a_changed_file_changes_the_fingerprint(root: Path) -> None:
    before = directory.fingerprint(root, 1000)
    assert directory.fingerprint(root, 1000) == before
    (root / "proc/another").touch()
    assert directory.fingerprint(root, 1000) == before, "what is left out does not count"
    (root / "usr/lib/python3/dist-packages/ipykernel/__init__.py").write_text("x")
    assert directory.fingerprint(root, 1000) != before


@pytest.mark.parametrize("case", ["root", "relative", "absent", "data", "empty", "no python", "no ipykernel", "link"])
async def test_an_unusable_directory_is_refused_with_a_reason(
    root: Path, paths: Paths, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox_gateway.images.agent_layer.build", _no_agent)
    (tmp_path / "empty").mkdir()
    (tmp_path / "slash").symlink_to("/")
    source = {
        "root": "/",
        "relative": "some/tree",
        "absent": "/no/such/tree",
        "data": str(paths.home.parent),
        "empty": str(tmp_path / "empty"),
        "link": str(tmp_path / "slash"),
    }.get(case, str(root))
    if case == "no python":
        (root / "usr/bin/python3").unlink()
    if case == "no ipykernel":
        shutil.rmtree(root / "usr/lib/python3/dist-packages/ipykernel")
    with pytest.raises(SandboxGatewayError) as raised:
        await ImageService(paths).resolve(f"directory:{source}")
    assert raised.value.code == "image_source"
    assert raised.value.hint
    assert not list(paths.layers.glob("*.erofs")) if paths.layers.exists() else True


def _no_agent() -> object:
    raise AssertionError("nothing is built for a source that cannot be used")
