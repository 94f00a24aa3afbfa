"""The ways in which people run a notebook from front to end: each takes one and gives it back with its outputs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

Runner = Callable[[nbformat.NotebookNode, str, Path], nbformat.NotebookNode]

TIMEOUT = 420
"""Seconds for one whole notebook."""


def tool(name: str) -> str:
    """The command ``name`` of the environment that runs the tests."""
    return str(Path(sys.executable).with_name(name))


def _finished(arguments: list[str], allowed: tuple[int, ...] = (0,)) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode in allowed, f"{arguments}: {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"


def jupyter_execute(notebook: nbformat.NotebookNode, kernel_name: str, directory: Path) -> nbformat.NotebookNode:
    """``jupyter execute --inplace --kernel_name=...``."""
    path = directory / "analysis.ipynb"
    nbformat.write(notebook, path)
    _finished([tool("jupyter"), "execute", "--inplace", f"--kernel_name={kernel_name}", str(path)])
    return nbformat.read(path, as_version=4)


def nbclient(notebook: nbformat.NotebookNode, kernel_name: str, directory: Path) -> nbformat.NotebookNode:
    """nbclient's Python interface."""
    client = NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name=kernel_name, resources={"metadata": {"path": str(directory)}}
    )
    return client.execute()


def papermill(notebook: nbformat.NotebookNode, kernel_name: str, directory: Path) -> nbformat.NotebookNode:
    """The ``papermill`` command.

    It runs cells tagged ``raises-exception`` like nbclient does, goes on, and at the end still counts the notebook as
    failed (exit status 1), whatever the kernel: the saved outputs are what counts.
    """
    path, saved = directory / "in.ipynb", directory / "out.ipynb"
    nbformat.write(notebook, path)
    arguments = [tool("papermill"), "-k", kernel_name, "--no-progress-bar", "--cwd", str(directory)]
    _finished([*arguments, str(path), str(saved)], allowed=(0, 1))
    return nbformat.read(saved, as_version=4)


class _Answering(NotebookClient):  # type: ignore[misc]
    """nbclient with somebody at the keyboard: answers every question of the kernel."""

    answer = "Ada"

    async def async_start_new_kernel_client(self, **options: Any) -> Any:
        client = await super().async_start_new_kernel_client(**options)
        client.allow_stdin = True
        self._answering = asyncio.create_task(self._answer(client))
        return client

    async def _answer(self, client: Any) -> None:
        while True:
            await client.get_stdin_msg(timeout=None)
            client.input(self.answer)

    async def _async_cleanup_kernel(self) -> None:
        self._answering.cancel()
        await super()._async_cleanup_kernel()


def answering(notebook: nbformat.NotebookNode, kernel_name: str, directory: Path) -> nbformat.NotebookNode:
    """A client that answers ``input()``, as a person in JupyterLab does."""
    client = _Answering(
        notebook, timeout=TIMEOUT, kernel_name=kernel_name, resources={"metadata": {"path": str(directory)}}
    )
    return asyncio.run(client.async_execute())


RUNNERS: dict[str, Runner] = {
    "jupyter-execute": jupyter_execute,
    "nbclient": nbclient,
    "papermill": papermill,
    "answering-client": answering,
}
