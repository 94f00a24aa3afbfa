"""``/api/kernels`` of the gateway: as Jupyter defines it, with ``env`` as gateways take it, and errors that say why.

``POST /api/kernels`` takes ``{"name": ..., "env": {...}, "kernel_id": ...}``; the body may be missing. Other handlers
of ``/api/kernels`` are jupyter_server's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from jupyter_client.jsonutil import json_default
from jupyter_client.kernelspec import NoSuchKernel
from jupyter_client.multikernelmanager import DuplicateKernelError
from jupyter_core.utils import ensure_async
from jupyter_server.auth.decorator import authorized
from jupyter_server.services.kernels.handlers import KernelsAPIHandler
from jupyter_server.utils import url_escape, url_path_join
from tornado import web

from sandbox_gateway.errors import InvalidField
from sandbox_gateway.server import openapi
from sandbox_gateway.server.kernels import http_error

_TEXTS = ("name", "path", "kernel_id")


class GatewayKernelsHandler(KernelsAPIHandler):
    """The kernels of who asks, and a new one."""

    @web.authenticated
    @authorized
    async def get(self) -> None:
        """List them."""
        kernels = await ensure_async(self.kernel_manager.list_kernels())
        self.finish(json.dumps(kernels, default=json_default))

    @web.authenticated
    @authorized
    async def post(self) -> None:
        """Start one."""
        body = self._body()
        manager = self.kernel_manager
        name = body.get("name") or manager.default_kernel_name
        try:
            kernel_id = await manager.start_kernel(
                kernel_name=name,
                path=body.get("path"),
                kernel_id=body.get("kernel_id"),
                chosen_env=body.get("env") or {},
            )
        except NoSuchKernel as error:
            raise web.HTTPError(404, f"there is no kernelspec {name!r}", reason="No such kernelspec") from error
        except DuplicateKernelError as error:
            raise web.HTTPError(409, str(error), reason="The kernel exists already") from error
        model = await ensure_async(manager.kernel_model(kernel_id))
        self.set_header("Location", url_path_join(self.base_url, "api", "kernels", url_escape(kernel_id)))
        self.set_status(201)
        self.finish(json.dumps(model, default=json_default))

    def _body(self) -> dict[str, Any]:
        body = json_object(self.get_json_body)
        if body is None:
            return {}
        for key in _TEXTS:
            if body.get(key) is not None and not isinstance(body[key], str):
                raise web.HTTPError(400, f"{key} is no text")
        try:
            openapi.check({"env": body.get("env") or {}}, "CreateSandbox")
        except InvalidField as error:
            raise http_error(error) from None
        return {key: value for key, value in body.items() if value is not None}


def json_object(read: Callable[[], Any]) -> dict[str, Any] | None:
    """What ``read`` (a handler's ``get_json_body``) finds: an object, or None without a body; raises 400."""
    try:
        body = read()
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise web.HTTPError(400, "the body is not UTF-8") from None
    except UnicodeEncodeError:
        raise web.HTTPError(400, "half of a surrogate pair in a text") from None
    except RecursionError:
        raise web.HTTPError(400, "the body is nested too deep") from None
    if body is not None and not isinstance(body, dict):
        raise web.HTTPError(400, "the body is no JSON object")
    return body


def kernel_handlers() -> list[tuple[str, type[web.RequestHandler]]]:
    """What takes the place of jupyter_server's own."""
    return [(r"/api/kernels", GatewayKernelsHandler)]
