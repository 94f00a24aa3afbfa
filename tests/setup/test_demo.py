"""The demo notebook is honest: its first cell tells whether it runs in a sandbox, and why not."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

DEMO = Path(__file__).parents[2] / "binder" / "demo.ipynb"


def first_cell() -> str:
    notebook = nbformat.read(DEMO, as_version=4)
    nbformat.validate(notebook)
    return str(notebook.cells[0].source)


def output_of(source: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(source, "cell", "exec"), {})
    return said.getvalue()


def test_in_a_sandbox_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANDBOX_ID", "abc")
    assert output_of(first_cell()).startswith("Yes: this cell runs in the sandbox abc")


@pytest.mark.parametrize("ok", [True, False])
def test_outside_it_says_that_it_is_not_sandboxed_and_what_the_doctor_found(
    monkeypatch: pytest.MonkeyPatch, ok: bool
) -> None:
    monkeypatch.delenv("SANDBOX_ID", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/" + name)
    checks = [{"name": "runsc", "status": "ok" if ok else "fail", "detail": "gone", "hint": "Get it."}]
    answer = SimpleNamespace(stdout=json.dumps({"ok": ok, "checks": checks}))
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: answer)
    said = output_of(first_cell())
    assert "NOT sandboxed" in said
    assert ("choose the kernel" in said) is ok
    assert ("runsc: gone  Get it." in said) is not ok


def test_without_the_product_it_says_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SANDBOX_ID", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "not installed" in output_of(first_cell())


def test_it_holds_no_saved_outputs() -> None:
    notebook = nbformat.read(DEMO, as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
