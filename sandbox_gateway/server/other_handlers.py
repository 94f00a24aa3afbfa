"""Operations, profiles, the description, and addresses that do not exist."""

from __future__ import annotations

import json

from jupyter_server.auth.decorator import authorized
from tornado import web

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.server import openapi, views
from sandbox_gateway.server.api_handler import RestHandler


class OperationsHandler(RestHandler):
    """What takes long."""

    path = "/api/operations"

    @web.authenticated
    @authorized
    async def get(self) -> None:
        """The caller's."""
        self.query()
        self.answer({"operations": [one.as_dict() for one in self.operations.list(self.caller)]})


class OperationHandler(RestHandler):
    """One of them."""

    path = "/api/operations/{operation}"

    @web.authenticated
    @authorized
    async def get(self, operation: str) -> None:
        """As it is, or as it has ended."""
        query = self.query()
        found = self.operations.get(self.caller, operation)
        self.answer((await self.operations.wait(found, query["wait"])).as_dict())


class ProfilesHandler(RestHandler):
    """What the administrator offers."""

    path = "/api/profiles"

    @web.authenticated
    @authorized
    async def get(self) -> None:
        """The list."""
        self.query()
        start = await self.gateway.starts()
        found = await self.gateway.profiles(self.caller)
        self.answer({"profiles": [views.profile(one, start(one)) for one in found]})


class ProfileHandler(RestHandler):
    """One of them."""

    path = "/api/profiles/{profile}"

    @web.authenticated
    @authorized
    async def get(self, profile: str) -> None:
        """Look at it."""
        self.query()
        for one in await self.gateway.profiles(self.caller):
            if one.name == profile:
                self.answer(views.profile(one, (await self.gateway.starts())(one)))
                return
        raise SandboxGatewayError(
            "unknown_profile", f"there is no profile {profile[:80]!r} here", "`GET /api/profiles` lists them."
        )


class QuotaHandler(RestHandler):
    """What the caller may have."""

    path = "/api/quota"

    @web.authenticated
    @authorized
    async def get(self) -> None:
        """What he has of it."""
        self.query()
        self.answer(views.quota(self.caller.name, *await self.gateway.quota(self.caller)))


class YamlHandler(RestHandler):
    """The description as it was written."""

    path = "/api/sandboxes/openapi.yaml"

    @web.authenticated
    @authorized
    async def get(self) -> None:
        """YAML."""
        self.finish(openapi.text(), set_content_type="application/yaml")


class JsonHandler(RestHandler):
    """The description for programs."""

    path = "/api/sandboxes/openapi.json"

    @web.authenticated
    @authorized
    async def get(self) -> None:
        """JSON."""
        self.finish(json.dumps(openapi.description()))


class NowhereHandler(RestHandler):
    """Any other address below ours."""

    @web.authenticated
    @authorized
    async def get(self, *_: str) -> None:
        """There is nothing."""
        raise SandboxGatewayError("not_found", f"there is nothing at {self.request.path[:200]}")

    post = put = patch = delete = get
