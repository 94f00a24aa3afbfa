"""Loaded into a pytest that runs others' server tests: what makes their servers ours.

``UPSTREAM_SERVER`` says how. ``extension`` puts our extension, and our default kernel under the name ``python3``,
into the directories of each test. ``headless`` gives headless gateways to Kernel Gateway's tests, which run without
their own ``conftest.py`` then.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.kernelspec import KernelSpecManager
from traitlets.config import Config

from sandbox_gateway.host.paths import discover
from sandbox_gateway.model import LIVE
from sandbox_gateway.server.app import GatewayApp
from sandbox_gateway.server.sessions import SandboxSessionManager
from sandbox_gateway.store import Store

SERVER = os.environ["UPSTREAM_SERVER"]
KERNEL = os.environ["UPSTREAM_KERNEL"]
ENABLED = Path(__file__).resolve().parents[2] / "jupyter-config"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Generator[None, None, None]:
    """Several tests choose the same ids, and an installation of ours remembers those that have ended.

    Those of other files run at the same time: what lives may be theirs.
    """
    yield
    with Store(discover().database) as store:
        for record in store.list():
            if record.state not in LIVE and not record.blank:
                store.delete(record.id)


if SERVER == "extension":

    @pytest.fixture(autouse=True)
    def _our_extension(
        jp_environ: None, jp_config_dir: Path, jp_data_dir: Path, request: pytest.FixtureRequest
    ) -> Iterator[None]:
        """As installing the product enables it; tests of the session manager's class get ours."""
        shutil.copytree(ENABLED, jp_config_dir / "jupyter_server_config.d")
        folder = jp_data_dir / "kernels" / "python3"
        folder.mkdir(parents=True)
        (folder / "kernel.json").write_text(json.dumps(KernelSpecManager().get_kernel_spec(KERNEL).to_dict()))
        with pytest.MonkeyPatch.context() as patch:
            if hasattr(request.module, "SessionManager"):
                patch.setattr(request.module, "SessionManager", SandboxSessionManager)
            yield


if SERVER == "headless":

    @pytest.fixture
    def jp_configurable_serverapp(
        jp_environ: None,
        jp_server_config: Any,
        jp_argv: list[str],
        jp_http_port: int,
        jp_base_url: str,
        jp_asyncio_loop: Any,
    ) -> Callable[..., GatewayApp]:
        """A headless gateway instead of a Kernel Gateway, with the test's own options."""
        GatewayApp.clear_instance()

        def make(config: Any = jp_server_config, argv: list[str] = jp_argv, base_url: str = jp_base_url) -> GatewayApp:
            options = Config(config)
            options.IdentityProvider.token = options.KernelGatewayApp.get("auth_token") or "a-token-of-this-test"
            options.SandboxGateway.on_stop = "terminate"
            app = GatewayApp.instance(
                port=jp_http_port, port_retries=0, base_url=base_url, config=options, allow_root=True
            )
            app.init_signal = lambda: None

            async def initialize() -> None:
                app.initialize(argv=argv, new_httpserver=False)

            jp_asyncio_loop.run_until_complete(initialize())
            app.log.propagate = True
            app.log.handlers = [found for found in app.log.handlers if not isinstance(found, logging.StreamHandler)]
            app.start_app()
            return app

        return make

    @pytest.fixture(autouse=True)
    def jp_server_cleanup(jp_asyncio_loop: Any) -> Iterator[None]:
        """End the gateway."""
        yield
        if GatewayApp.initialized():
            jp_asyncio_loop.run_until_complete(GatewayApp.instance()._cleanup())
        GatewayApp.clear_instance()
