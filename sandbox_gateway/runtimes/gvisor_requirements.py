"""What an image of gVisor's needs where it is restored: the very runsc that made it, and the processor's features.

Both are told by what they are, never by a version: the SHA-256 of the binary, and the names that ``runsc cpu-features``
gives (gVisor refuses a restore on a processor that lacks one, late and in the middle of it).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import string
from collections.abc import Mapping
from pathlib import Path

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.machine import boot_id
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.runtimes import runsc
from sandbox_gateway.runtimes.gvisor_probe import Cache

RUNSC = "runsc"
"""Key of the binary's SHA-256 in hexadecimal."""
CPU = "cpu"
"""Key of the processor's features, comma-separated."""


class Requirements:
    """The requirements of images that one binary makes here, and whether others' can be met.

    Raises ``runtime_missing`` where the binary cannot be read or run.
    """

    def __init__(self, paths: Paths, binary: Path) -> None:
        self.paths = paths
        self.binary = binary
        self._digest: str | None = None
        self._features: str | None = None

    async def current(self) -> Mapping[str, str]:
        """What an image that is made now will need."""
        return {RUNSC: await self._sha256(), CPU: await self._cpu()}

    async def unfit(self, requirements: Mapping[str, str], *, only_own: bool = False) -> str:
        """Why an image with ``requirements`` cannot be restored here, in one line; empty when it can.

        ``only_own``: by this binary, not by another that is kept.
        """
        found = await self.binary_for(requirements)
        if found is None or (only_own and found != self.binary):
            wanted = requirements.get(RUNSC, "")
            return f"it needs the runsc that made it ({wanted[:12] or 'not named'}), which is not installed here"
        here = set((await self._cpu()).split(","))
        lacking = [name for name in requirements.get(CPU, "").split(",") if name and name not in here]
        return f"this processor lacks {', '.join(lacking)}" if lacking else ""

    async def binary_for(self, requirements: Mapping[str, str]) -> Path | None:
        """The runsc that made an image: ours, or one that is kept under its hash; None where there is none."""
        wanted = requirements.get(RUNSC, "")
        if wanted and wanted == await self._sha256():
            return self.binary
        if len(wanted) != 64 or not set(wanted) <= set(string.hexdigits):
            return None
        kept = self.paths.bin / wanted / "runsc"
        return kept if os.access(kept, os.X_OK) else None

    async def _sha256(self) -> str:
        if self._digest is None:
            self._digest = await asyncio.to_thread(_digest, self.paths, self.binary)
        return self._digest

    async def _cpu(self) -> str:
        if self._features is None:
            cache = Cache(self.paths, self.binary, f"cpu-{boot_id()}")
            known = await asyncio.to_thread(cache.read)
            if not isinstance(known, str):
                outcome = await runsc.run([self.binary, "cpu-features"])
                if outcome.code != 0:
                    raise SandboxGatewayError("runtime_failed", f"runsc cpu-features: {outcome.reason}")
                known = outcome.output.strip()
                await asyncio.to_thread(cache.write, known)
            self._features = known
        return self._features


def _digest(paths: Paths, binary: Path) -> str:
    """The file's SHA-256, taken once per file: 80 MB need a twentieth of a second."""
    try:
        cache = Cache(paths, binary, "sha256")
        known = cache.read()
        if isinstance(known, str) and len(known) == 64:
            return known
        with binary.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SandboxGatewayError("runtime_missing", f"{binary} cannot be read: {error.strerror}") from error
    cache.write(found)
    return found
