"""A gateway's certificate is checked, always; one of its own is trusted when it is named."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_gateway import PROFILE, FakeGateway
from jupyter_client.manager import KernelManager

from sandbox_gateway.cli.main import main
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.remote.address import parse
from sandbox_gateway.remote.client import GatewayClient, Unreachable

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with"),
]


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Key and certificate of 127.0.0.1, signed by itself."""
    key, made = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", made, *subject]
    subprocess.run(command, check=True, capture_output=True)
    made.write_text(made.read_text() + key.read_text())
    return made


@pytest.fixture
def gateway(certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGateway]:
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))
    made = FakeGateway("secret", certificate)
    made.start()
    yield made
    made.stop()


def test_a_certificate_of_its_own_is_not_trusted_unasked(gateway: FakeGateway) -> None:
    async def ask() -> None:
        async with GatewayClient(parse(gateway.url), "secret") as client:
            await client.profiles()

    with pytest.raises(Unreachable, match="certificate"):
        asyncio.run(ask())


def test_a_named_certificate_is_trusted_for_rest_and_websocket(
    gateway: FakeGateway, certificate: Path, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    options = ["--gateway", gateway.url, "--prefix", str(tmp_path), "--token-file", str(token)]
    assert main(["install", *options]) == 1
    assert main(["install", *options, "--ca-file", str(certificate)]) == 0
    assert main(["ps", "--gateway", gateway.url]) == 0
    assert main(["install", "--gateway", gateway.url, "--list"]) == 0, "the certificate is kept"
    manager = KernelManager(kernel_name=f"{PROFILE['name']}-at-127.0.0.1-{gateway.port}")
    manager.start_kernel()
    client = manager.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    assert client.execute_interactive("1", timeout=60)["content"]["status"] == "ok"
    client.stop_channels()
    manager.shutdown_kernel()
    manager.context.destroy(linger=0)


def test_a_file_that_holds_no_certificates_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("none")
    for name in ("ca.pem", "missing.pem"):
        with pytest.raises(SandboxGatewayError, match="no file of certificates"):
            GatewayClient(parse("https://127.0.0.1:1", str(tmp_path / name))).tls  # noqa: B018
