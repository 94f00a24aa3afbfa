"""A Jupyter server of a measurement, asked over plain HTTP."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from typing import Any

from bench.kernels import PATIENCE, BenchError


class Rest:
    """A server on this machine. Who makes one sets the attributes, then waits by :meth:`until_it_answers`."""

    port: int
    token: str
    process: subprocess.Popen[bytes]

    def until_it_answers(self, what: str) -> None:
        """Raises :class:`BenchError`, with ``what`` it is, where it ends or does not answer in time."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                self.ask("GET", "/api/status")
                return
            except OSError as error:
                if self.process.poll() is not None or time.monotonic() > end:
                    raise BenchError(f"{what} does not answer: {error}") from error
                time.sleep(0.05)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """One REST request."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"token {self.token}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            text = answer.read()
        return json.loads(text) if text else None
