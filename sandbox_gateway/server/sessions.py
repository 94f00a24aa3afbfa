"""jupyter_server's sessions, each visible to the owner of its kernel only.

Two users may have a notebook of the same path: a session is found by its path among the caller's own.
"""

from __future__ import annotations

from typing import Any

from jupyter_client.multikernelmanager import DuplicateKernelError
from jupyter_server.services.sessions.sessionmanager import SessionManager
from tornado import web


class SandboxSessionManager(SessionManager):
    """Asks the kernel manager whose a kernel is."""

    async def _mine(self, row: Any) -> dict[str, Any] | None:
        try:
            model: dict[str, Any] | None = await self.row_to_model(row, tolerate_culled=True)
        except web.HTTPError:
            return None  # another owner's
        return model

    async def _find(self, condition: str, value: str) -> dict[str, Any] | None:
        rows = self.cursor.execute(f"SELECT * FROM session WHERE {condition}=?", (value,)).fetchall()
        for row in rows:
            model = await self._mine(row)
            if model is not None:
                return model
        return None

    async def session_exists(self, path: str) -> bool:
        """Whether the caller has a session of this path."""
        return await self._find("path", path) is not None

    async def get_session(self, **wanted: Any) -> dict[str, Any]:
        """A session of the caller's, by one column; raises 404."""
        if len(wanted) != 1:
            model: dict[str, Any] = await super().get_session(**wanted)
            return model
        ((column, value),) = wanted.items()
        if column not in self._columns:
            raise TypeError(f"No such column: {column}")
        found = await self._find(column, value)
        if found is None:
            raise web.HTTPError(404, f"Session not found: {column}={value!r}")
        return found

    async def list_sessions(self) -> list[dict[str, Any]]:
        """The caller's."""
        rows = self.cursor.execute("SELECT * FROM session").fetchall()
        found = [await self._mine(row) for row in rows]
        return [model for model in found if model is not None]

    async def create_session(
        self,
        path: str | None = None,
        name: Any = None,
        type: str | None = None,
        kernel_name: Any = None,
        kernel_id: str | None = None,
    ) -> dict[str, Any]:
        """A session of a kernel of the caller's, or of a new one; raises DuplicateKernelError for another's id, as for
        that of a kernel which has ended."""
        if kernel_id is not None and kernel_id in self.kernel_manager and not self._mine_to_use(kernel_id):
            raise DuplicateKernelError(f"Kernel already exists: {kernel_id}")
        created: dict[str, Any] = await super().create_session(path, name, type, kernel_name, kernel_id)
        return created

    async def save_session(
        self,
        session_id: str,
        path: str | None = None,
        name: str | None = None,
        type: str | None = None,
        kernel_id: str | None = None,
    ) -> dict[str, Any]:
        """Write a session of a kernel of the caller's; raises 400 for another's, as for one that does not exist."""
        self._check(kernel_id)
        saved: dict[str, Any] = await super().save_session(session_id, path, name, type, kernel_id)
        return saved

    async def update_session(self, session_id: str, **changes: Any) -> None:
        """Change a session of the caller's, to a kernel of his."""
        if "kernel_id" in changes:
            self._check(changes["kernel_id"])
        await super().update_session(session_id, **changes)

    def _check(self, kernel_id: str | None) -> None:
        if kernel_id is not None and kernel_id in self.kernel_manager and not self._mine_to_use(kernel_id):
            raise web.HTTPError(400, f"No such kernel: {kernel_id}")

    def _mine_to_use(self, kernel_id: str) -> bool:
        try:
            self.kernel_manager._check_kernel_id(kernel_id)
        except web.HTTPError:
            return False
        return True
