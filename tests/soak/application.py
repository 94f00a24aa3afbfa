"""An application of its own that owns kernels: a process that the driver commands, and kills."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

SCRIPT = """
import json, sys
from jupyter_client import KernelManager

managers = {}

def start(name, kernel_id):
    manager = KernelManager(kernel_name=name)
    manager.start_kernel(kernel_id=kernel_id)
    managers[kernel_id] = manager
    return manager.connection_file

def restart(kernel_id):
    managers[kernel_id].restart_kernel(now=True)

def interrupt(kernel_id):
    managers[kernel_id].interrupt_kernel()

def alive(kernel_id):
    return managers[kernel_id].is_alive()

def shutdown(kernel_id, now):
    managers.pop(kernel_id).shutdown_kernel(now=now)

for line in sys.stdin:
    command, *arguments = json.loads(line)
    try:
        answer = {"ok": globals()[command](*arguments)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
"""


class Gone(Exception):
    """The application is not there any more."""


class Application:
    """One such process. :meth:`call` is for one thread at a time."""

    def __init__(self, log: Path) -> None:
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SCRIPT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                bufsize=1,
            )
        self._answers: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def call(self, *words: Any, timeout: float = 120.0) -> Any:
        """Have it do something; raises :class:`Gone`, or RuntimeError with what it failed of."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(words) + "\n")
            line = self._answers.get(timeout=timeout)
        except (OSError, ValueError) as error:
            raise Gone(str(error)) from error
        except queue.Empty:
            raise RuntimeError(f"{words[0]} took more than {timeout:.0f} s") from None
        if not line:
            raise Gone("it ended")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{words[0]}: {answer['error']}")
        return answer["ok"]

    def kill(self) -> None:
        """``kill -9``."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Let it end in order, and close its pipes."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.close()
        except OSError:
            pass
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(10)
        self.process.stdout.close()
