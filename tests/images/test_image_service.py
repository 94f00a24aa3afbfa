"""Whole images: resolved, reused, made anew after an install, and run by gVisor."""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from erofs_reader import read
from small_environments import add_distribution, site_of

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.images import agent_layer, base_layer
from sandbox_gateway.images.service import ImageService, writable
from sandbox_gateway.model import Image

Sandboxed = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
async def image(small_venv: Path, image_home: Paths) -> Image:
    """A host image of a small virtual environment; the layers below it are shared by the tests."""
    return await ImageService(image_home).resolve(f"host:{small_venv}/bin/python")


def test_the_image_is_a_root_and_layers_at_their_paths_parents_first(image: Image, small_venv: Path) -> None:
    destinations = [layer.destination for layer in image.layers]
    assert destinations[:2] == ["/", "/usr"]
    assert destinations[2:] == sorted(destinations[2:])
    assert str(small_venv) in destinations
    assert image.interpreter == f"{small_venv}/bin/python"
    assert image.agent is not None
    assert image.agent.destination == "/opt/agent"
    assert image.environment["HOME"] == "/home/jovyan"
    assert image.environment["PATH"].startswith(f"{small_venv}/bin:")
    for layer in (*image.layers, image.agent):
        assert layer.digest is not None
        assert Path(layer.source).name == f"{layer.digest[7:]}.erofs"


async def test_an_install_makes_only_the_environments_layer_anew(
    image: Image, small_venv: Path, image_home: Paths
) -> None:
    service = ImageService(image_home)
    start = time.perf_counter()
    assert await service.resolve(image.name) == image
    print(f"resolved again in {(time.perf_counter() - start) * 1000:.0f} ms")
    built: list[str] = []
    add_distribution(site_of(small_venv), "new", "1.0")
    after = await service.resolve(image.name, progress=lambda step: built.append(step.what))
    assert set(built) == {f"environment {small_venv}"}
    changed = [a.destination for a, b in zip(after.layers, image.layers, strict=True) if a != b]
    assert changed == [str(small_venv)]
    assert all(read(layer.source) for layer in image.layers), "running kernels keep what they had"


def test_nothing_private_of_the_host_is_in_the_base(image: Image) -> None:
    root, usr = (read(layer.source) for layer in image.layers[:2])
    assert not {path for path in root if "shadow" in path or path.startswith(("/home/jovyan/", "/root/.ssh"))}
    assert not {path for path in usr if path.startswith(("/local/bin/", "/sbin/sshd", "/share/doc"))}
    assert not {path for path, entry in usr.items() if entry.mode & 0o6000}
    assert root["/etc/machine-id"].content == root["/etc/resolv.conf"].content == b""
    assert root["/bin"].content == b"usr/bin"
    hostname = os.uname().nodename.encode()
    assert not [path for path, entry in root.items() if hostname in entry.content]


def test_the_base_is_small_enough(image: Image) -> None:
    sizes = {layer.destination: os.path.getsize(layer.source) for layer in image.layers[:2]}
    print({path: f"{size >> 20} MB" for path, size in sizes.items()})
    assert sum(sizes.values()) < 400 << 20


@pytest.mark.parametrize(("uid", "name"), [(0, "root"), (1000, "jovyan"), (4321, "jovyan")])
def test_the_kernels_user_has_a_name_whatever_its_uid(uid: int, name: str) -> None:
    users = {line.split(":")[2]: line.split(":") for line in base_layer.etc_files(uid)["/etc/passwd"].splitlines()}
    assert users[str(uid)][0] == name
    assert users[str(uid)][5] == "/home/jovyan"
    numbers = [line.split(":")[2] for line in base_layer.etc_files(uid)["/etc/passwd"].splitlines()]
    assert len(numbers) == len(set(numbers))


async def test_unknown_sources_are_refused(paths: Paths) -> None:
    for source in ("", "host:", "directory:", "docker:x", "nonsense"):
        with pytest.raises(SandboxGatewayError) as raised:
            await ImageService(paths).resolve(source)
        assert raised.value.code == "image_source"


def test_the_agent_runs_in_a_root_that_has_nothing(image: Image, sandboxed: Sandboxed) -> None:
    root = image.layers[0]
    bare = Image(name="bare", layers=(root,), agent=image.agent)
    code = "import sys, zmq, ssl, ctypes, sandbox_gateway.wire, sandbox_gateway.agent; print(sys.prefix, zmq.__file__)"
    done = sandboxed(bare, [*agent_layer.AGENT_PYTHON, "-c", code], uid=64999)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[0] == "/opt/agent"
    assert done.stdout.split()[1].startswith("/opt/agent/lib/")


@pytest.mark.parametrize("uid", [0, 1000, 4321])
async def test_the_environments_python_runs_at_its_own_path(
    small_venv: Path, image_home: Paths, sandboxed: Sandboxed, uid: int
) -> None:
    image = await ImageService(image_home).resolve(f"host:{small_venv}/bin/python", kernel_uid=uid)
    code = """if True:
        import sys, os, getpass, pwd, ssl, sqlite3, ctypes.util, zoneinfo, ipykernel, subprocess, locale
        assert sys.prefix == os.environ["VIRTUAL_ENV"], sys.prefix
        assert pwd.getpwuid(os.getuid()).pw_dir == os.path.expanduser("~") == "/home/jovyan"
        assert ssl.create_default_context().get_ca_certs()
        assert ctypes.util.find_library("c")
        zoneinfo.ZoneInfo("Europe/Berlin")
        open(os.path.expanduser("~/file"), "w").write("x")
        assert locale.getpreferredencoding() == "UTF-8"
        assert not os.path.exists("/etc/shadow")
        print(subprocess.run("whoami; echo a b | awk '{print $2}'; git --version | cut -d' ' -f1; seq 3 | wc -l",
                             shell=True, capture_output=True, text=True, check=True).stdout.split())
    """
    done = sandboxed(image, [str(image.interpreter), "-c", code], uid=uid)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == str(["root" if uid == 0 else "jovyan", "b", "git", "3"])


@pytest.mark.parametrize("uid", [1000, 4321])
def test_a_writable_environment_takes_an_install_in_memory(
    image: Image, small_venv: Path, sandboxed: Sandboxed, uid: int
) -> None:
    site = site_of(small_venv)
    code = f"""if True:
        import os
        open({str(site)!r} + "/new.py", "w").write("x = 1")
        os.rename({str(site)!r} + "/ipykernel", {str(site)!r} + "/moved")
        import new, moved
    """
    done = sandboxed(writable(image), [str(image.interpreter), "-c", code], uid=uid)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (site / "new.py").exists()
    refused = sandboxed(image, [str(image.interpreter), "-c", code], uid=uid)
    assert "Read-only file system" in refused.stderr


async def test_links_on_the_way_to_the_interpreter_work_inside(
    small_venv: Path, tmp_path: Path, image_home: Paths, sandboxed: Sandboxed
) -> None:
    (tmp_path / "alias").symlink_to("venv")
    image = await ImageService(image_home).resolve(f"host:{tmp_path}/alias/bin/python")
    done = sandboxed(image, [str(image.interpreter), "-c", "import sys; print(sys.prefix)"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == str(tmp_path / "alias")


async def test_an_editable_install_works_inside_only_when_it_is_asked_for(
    small_venv: Path, tmp_path: Path, image_home: Paths, sandboxed: Sandboxed
) -> None:
    (tmp_path / "project/src").mkdir(parents=True)
    (tmp_path / "project/src/mine.py").write_text("answer = 42\n")
    (tmp_path / "project/private").write_text("not asked for")
    (site_of(small_venv) / "mine.pth").write_text(f"{tmp_path}/project/src\n")
    service = ImageService(image_home)
    code = f"import mine, os; print(mine.answer, os.listdir({str(tmp_path / 'project')!r}))"
    without = await service.resolve(f"host:{small_venv}/bin/python")
    done = sandboxed(without, [str(without.interpreter), "-c", code])
    assert "No module named 'mine'" in done.stderr
    image = await service.resolve(f"host:{small_venv}/bin/python", editable=True)
    done = sandboxed(image, [str(image.interpreter), "-c", code])
    assert done.stdout.strip() == "42 ['src']", done.stderr


async def test_an_environment_on_the_systems_python_works(
    tmp_path: Path, image_home: Paths, sandboxed: Sandboxed
) -> None:
    system = "/usr/bin/python3"
    place = tmp_path / "system"
    command = [system, "-m", "venv", "--without-pip", str(place)]
    try:
        made = await asyncio.to_thread(subprocess.run, command, capture_output=True, timeout=60, check=False)
    except OSError:
        pytest.skip(f"no {system}")
    if made.returncode != 0:
        pytest.skip(f"{system} makes no virtual environments: {made.stderr.decode().strip()[:200]}")
    add_distribution(site_of(place), "ipykernel", "7.9")
    image = await ImageService(image_home).resolve(f"host:{place}/bin/python")
    code = "import sys, ssl, sqlite3, lzma, ctypes, readline, curses, ipykernel; print(sys.prefix, sys.base_prefix)"
    done = sandboxed(image, [str(image.interpreter), "-c", code])
    assert done.stdout.split() == [str(place), "/usr"], done.stderr


def _suite() -> str:
    """The distribution's release that this machine has package sources for."""
    try:
        return platform.freedesktop_os_release().get("VERSION_CODENAME", "stable")
    except OSError:
        return "stable"


async def test_a_tree_made_by_mmdebstrap_runs_python(tmp_path: Path, image_home: Paths, sandboxed: Sandboxed) -> None:
    tool = shutil.which("mmdebstrap")
    if tool is None or os.geteuid() != 0:
        pytest.skip("no mmdebstrap, or not root")
    tree = tmp_path / "debian"
    made = await asyncio.to_thread(
        subprocess.run,
        [tool, "--variant=extract", "--include=python3,dash,libc-bin,coreutils", _suite(), str(tree)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if made.returncode != 0:
        reason = (made.stderr.strip().splitlines() or ["no output"])[-1]
        pytest.skip(f"mmdebstrap could not make a tree: {reason}")
    package = next(tree.glob("usr/lib/python3")) / "dist-packages/ipykernel"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    image = await ImageService(image_home).resolve(f"directory:{tree}")
    assert image.interpreter == "/usr/bin/python3"
    code = "import ipykernel, json, getpass, os, pwd; print(pwd.getpwuid(os.getuid()).pw_name, os.listdir('/home'))"
    done = sandboxed(image, [image.interpreter, "-c", code])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == "jovyan ['jovyan']"
    done = sandboxed(image, [*agent_layer.AGENT_PYTHON, "-c", "import zmq, ssl"], uid=64999)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_agents_interpreter_is_the_one_that_runs_us(image: Image) -> None:
    assert image.agent is not None
    entries = read(image.agent.source)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    assert f"/lib/{version}/sandbox_gateway/wire/__init__.py" in entries
    assert entries[f"/lib/{version}/sandbox_gateway/__init__.py"].content == b""
    assert entries["/lib/sandbox_gateway"].content.decode() == f"{version}/sandbox_gateway"
    assert not [path for path in entries if "/tkinter" in path or "/idlelib" in path or path.endswith("/test")]


async def test_many_who_ask_at_once_share_a_look_that_began_after_they_asked(
    image_home: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = ImageService(image_home)
    begun: list[float] = []
    first_began, go_on = threading.Event(), threading.Event()

    def look(source: str, *options: Any) -> Any:
        begun.append(time.monotonic())
        first_began.set()
        go_on.wait(20)
        if len(begun) == 2:
            raise SandboxGatewayError("image_failed", "the second look")
        return source

    monkeypatch.setattr(service, "resolve_sync", look)
    first = asyncio.create_task(service.resolve("host"))
    await asyncio.to_thread(first_began.wait, 20)
    asked = time.monotonic()
    others = [asyncio.create_task(service.resolve("host")) for _ in range(10)]
    await asyncio.sleep(0)
    others.pop().cancel()
    go_on.set()
    assert await first == "host"
    outcomes = await asyncio.gather(*others, return_exceptions=True)
    assert {getattr(outcome, "message", "") for outcome in outcomes} == {"the second look"} and len(outcomes) == 9
    assert len(begun) == 2 and begun[1] > asked
    assert await service.resolve("host") == "host" and len(begun) == 3
