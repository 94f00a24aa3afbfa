"""A gateway (a fake one, and the real one where a sandbox can run), a breakable way to it, and kernelspecs for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import KernelManager

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "server"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from acceptance import Product, product
from cut_proxy import CutProxy
from fake_gateway import PROFILE, FakeGateway
from remote_harness import TOKEN, Remote
from served import Served

from sandbox_gateway.remote import credentials
from sandbox_gateway.remote.address import parse

__all__ = ["product"]


@pytest.fixture(scope="session", autouse=True)
def entry_point(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What an installation has: the provisioner's entry point."""
    place = tmp_path_factory.mktemp("installed")
    info = place / "sandbox_remote_for_tests-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sandbox-remote-for-tests\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[jupyter_client.kernel_provisioners]\n"
        "sandbox-remote = sandbox_gateway.remote.provisioner:RemoteSandboxProvisioner\n"
    )
    sys.path.append(str(place))
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (before, str(place))))
    yield
    os.environ["PYTHONPATH"] = before
    sys.path.remove(str(place))


@contextlib.contextmanager
def _fake() -> Iterator[FakeGateway]:
    made = FakeGateway(TOKEN)
    made.start()
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def _fake_gateway() -> Iterator[FakeGateway]:
    with _fake() as made:
        yield made


@pytest.fixture(scope="module")
def _real_gateway(product: Product, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("gateway") / "gateway.log", token=TOKEN)
    asyncio.run(served.start())
    try:
        yield served
    finally:
        served.stop()


@pytest.fixture(params=["fake", "real"])
def remote(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Remote]:
    """A running gateway behind a proxy, with its token kept; what a test makes there has to be gone after it."""
    if request.param == "fake":
        fake: FakeGateway = request.getfixturevalue("_fake_gateway")
        proxy = CutProxy(fake.port)
        made = Remote(proxy.url, PROFILE["name"], proxy, "fake", fake=fake)
    else:
        real: Served = request.getfixturevalue("_real_gateway")
        proxy = CutProxy(real.port)
        made = Remote(proxy.url, "python3-gvisor", proxy, "real", real=real)
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))
    credentials.keep(parse(made.url), TOKEN)
    try:
        yield made
        left = made.sandboxes
        assert not left, f"sandboxes are left on the gateway: {left}"
    finally:
        if made.fake is not None:
            made.fake.confirming, made.fake.forgetting, made.fake.in_its_place = True, False, 0
            made.fake.clear()
        elif made.sandboxes:
            for sandbox in made.sandboxes:
                made.ask("DELETE", f"/api/sandboxes/{sandbox['id']}")
        proxy.close()


@pytest.fixture
def gateway_url(remote: Remote) -> str:
    """The gateway's address."""
    return remote.url


@pytest.fixture
def kernel_name(remote: Remote, tmp_path: Path) -> str:
    """An installed kernelspec for the gateway's profile."""
    from sandbox_gateway import kernelspecs
    from sandbox_gateway.remote.client import RemoteProfile
    from sandbox_gateway.remote.kernelspecs import kernel_json, name_of

    profile, address = RemoteProfile(remote.profile, "Python there", variables=("TZ",)), parse(remote.url)
    directory = tmp_path / "share" / "jupyter" / "kernels"
    return kernelspecs.put(name_of(profile, address), kernel_json(profile, address), directory).name


@pytest.fixture
def start(kernel_name: str) -> Iterator[Callable[..., tuple[KernelManager, Any]]]:
    """Starts kernels of the kernelspec, each with a client; all are shut down at the end."""
    managers: list[tuple[KernelManager, Any]] = []

    def go(**options: Any) -> tuple[KernelManager, Any]:
        manager = KernelManager(kernel_name=kernel_name)
        manager.start_kernel(**options)
        client = manager.blocking_client()
        managers.append((manager, client))
        client.start_channels()
        client.wait_for_ready(timeout=120)
        return manager, client

    yield go
    for manager, client in managers:
        client.stop_channels()
        if manager.has_kernel:
            manager.shutdown_kernel()
        elif manager.provisioner is not None:
            manager.cleanup_resources()
        manager.context.destroy(linger=0)
