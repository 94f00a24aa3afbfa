"""Unmodified clients of jupyter_client with kernels on a gateway."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from remote_harness import Remote

pytestmark = pytest.mark.timeout(180)


def notebook(*cells: str) -> Any:
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])


def texts(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def test_nbclient_runs_a_notebook_there(remote: Remote, kernel_name: str) -> None:
    done = NotebookClient(
        notebook("x = 6", "print(x * 7)", "x", "from IPython.display import HTML; HTML('<b>hi</b>')"),
        kernel_name=kernel_name,
        timeout=120,
    ).execute()
    assert texts(done.cells[1]) == "42\n"
    assert done.cells[2].outputs[0].data["text/plain"] == "6"
    assert done.cells[3].outputs[0].data["text/html"] == "<b>hi</b>"


def test_an_error_in_a_cell_is_the_cells_own(remote: Remote, kernel_name: str) -> None:
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        NotebookClient(notebook("1/0"), kernel_name=kernel_name, timeout=120).execute()


def test_nbclient_is_told_of_a_death(remote: Remote, kernel_name: str) -> None:
    with pytest.raises(DeadKernelError):
        NotebookClient(
            notebook("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"), kernel_name=kernel_name, timeout=120
        ).execute()


def test_papermill_runs_a_notebook_with_parameters_there(remote: Remote, kernel_name: str, tmp_path: Path) -> None:
    made = notebook("n = 1", "print(n + 1)")
    made.cells[0].metadata["tags"] = ["parameters"]
    made.metadata["kernelspec"] = {"name": kernel_name, "display_name": "there", "language": "python"}
    nbformat.write(made, tmp_path / "in.ipynb")
    papermill.execute_notebook(
        str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb"), {"n": 41}, progress_bar=False, kernel_name=kernel_name
    )
    done = nbformat.read(tmp_path / "out.ipynb", 4)
    assert [texts(cell) for cell in done.cells][-1] == "42\n"


def test_an_application_that_just_ends_leaves_nothing_there(remote: Remote, kernel_name: str) -> None:
    code = (
        "import sys; from jupyter_client.manager import start_new_kernel\n"
        f"manager, client = start_new_kernel(kernel_name={kernel_name!r}, startup_timeout=120)\n"
        "client.execute_interactive('print(1 + 1)', timeout=60)\n"
        "client.stop_channels(); manager.context.destroy(linger=0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, env=dict(os.environ)
    )
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
    assert remote.sandboxes == []


def test_an_asynchronous_manager_runs_many_kernels_there(remote: Remote, kernel_name: str) -> None:
    import asyncio

    from jupyter_client.manager import AsyncKernelManager

    async def one(number: int) -> str:
        manager = AsyncKernelManager(kernel_name=kernel_name)
        await manager.start_kernel()
        client = manager.client()
        client.start_channels()
        try:
            await client.wait_for_ready(timeout=120)
            told: list[str] = []
            await client.execute_interactive(
                f"print({number} * 2)", timeout=60, output_hook=lambda m: told.append(m["content"].get("text", ""))
            )
            return "".join(told)
        finally:
            client.stop_channels()
            await manager.shutdown_kernel()
            manager.context.destroy(linger=0)

    async def three() -> list[str]:
        return list(await asyncio.gather(*(one(number) for number in range(3))))

    assert asyncio.run(three()) == ["0\n", "2\n", "4\n"]


def test_only_what_is_allowed_of_this_machines_environment_goes_there(
    remote: Remote, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("KERNEL_USERNAME", "ada")
    if remote.fake is not None:
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")  # the fake's kernels inherit this very process's environment
    _, client = start(env={**os.environ, "AWS_SECRET_ACCESS_KEY": "hidden"})
    lines: list[str] = []
    client.execute_interactive(
        "import os; print([os.environ.get(n) for n in ('TZ', 'KERNEL_USERNAME', 'AWS_SECRET_ACCESS_KEY')])",
        timeout=60,
        output_hook=lambda message: lines.append(message["content"].get("text", "")),
    )
    assert "".join(lines) == "['Asia/Tokyo', 'ada', None]\n"
