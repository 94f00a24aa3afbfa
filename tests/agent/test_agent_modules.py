"""A template's kernel that imports from one file what another has imported: nothing is different but the files."""

from __future__ import annotations

import csv
import importlib
import json
import marshal
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from agent_host import AgentError, Host, ipykernel_fields

from sandbox_gateway.agent import kernel_modules
from sandbox_gateway.agent.kernel_modules import Shelf, collect
from sandbox_gateway.agent.relay import KernelDirectory

TELL = "import sys; sys.modules['_sandbox_modules'].tell(get_ipython().kernel)"

FACTS = """
import json, os, sys, inspect, traceback
def _facts(name, module):
    spec, loader = module.__spec__, module.__loader__
    own = [getattr(module, name, None) for name in ("__file__", "__cached__", "__package__")]
    return [type(loader).__name__, loader is spec.loader, sorted(getattr(loader, "__dict__", ())),
            spec.name, spec.origin, spec.cached, spec.has_location, spec.parent,
            list(spec.submodule_search_locations or ()), list(getattr(module, "__path__", ())), own]
_shown = {name: _facts(name, module) for name, module in sorted(sys.modules.items())
          if getattr(module, "__spec__", None) is not None and not name.startswith("_sandbox_")}
try:
    json.loads("{")
except ValueError:
    _lines = traceback.format_exc()
_open = [os.path.basename(os.path.realpath(f"/proc/self/fd/{fd}")) for fd in os.listdir("/proc/self/fd")]
print(json.dumps({
    "modules": _shown,
    "ours": sorted(name for name in sys.modules if name.startswith("_sandbox_")),
    "finders": [getattr(finder, "__name__", type(finder).__name__) for finder in sys.meta_path],
    "source": inspect.getsource(json.dumps),
    "trace": "return _default_decoder.decode(s)" in _lines,
    "open": "modules" in _open,
    "beside": "modules" in os.listdir(os.path.dirname(get_ipython().kernel.parent.abs_connection_file)),
    "environment": [name for name in os.environ if name.startswith("SANDBOX_")],
}))
"""


def boot(host: Host, home: Path, **changes: Any) -> None:
    """Start our application in ``home`` as for a template, and wait until it is ready."""
    fields = ipykernel_fields(home, **{"fast_iopub": True, **changes})
    answer = host.call("start_kernel", **{**fields, "env": {**fields["env"], "PYTHONPATH": str(home)}})
    host.event("kernel_ready", generation=answer["generation"])


def told(host: Host) -> bytes:
    """What the running kernel has imported."""
    assert host.reply(host.execute(TELL))["content"]["status"] == "ok"
    return next(parts[-1] for _, parts in host.messages if any(b'"sandbox_modules"' in part for part in parts[:-1]))


def again(host: Host, home: Path, file: bytes, **changes: Any) -> None:
    """End the kernel, and boot one that imports from ``file``."""
    host.call("stop_kernel", grace=1)
    for at in range(0, len(file), 100_000):
        host.call("add_modules", attachment=file[at : at + 100_000])
    boot(host, home, **changes)


def test_the_second_kernel_looks_at_none_of_the_files(host: Host, tmp_path: Path) -> None:
    """Which have another text by then."""
    package = tmp_path / "parcel"
    package.mkdir()
    for path in (package / "__init__.py", package / "inner.py", tmp_path / "single.py"):
        path.write_text("value = 'first'\n")
    preload = ["parcel.inner", "single"]
    boot(host, tmp_path, preload=preload)
    file = told(host)
    for path in (package / "__init__.py", package / "inner.py", tmp_path / "single.py"):
        path.write_text("value = 'another'\n")
    again(host, tmp_path, file, preload=preload)
    values = "import parcel.inner, single; print(parcel.value, parcel.inner.value, single.value)"
    assert host.run(values) == "first first first\n"
    again_all = "import importlib\nfor module in (parcel, parcel.inner, single): importlib.reload(module)\n"
    assert host.run(again_all + values) == "another another another\n", "from here on as everywhere"
    host.call("restart_kernel")
    host.event("kernel_ready", generation=3)
    assert host.run(values) == "another another another\n", "the file was for one kernel"


def test_a_program_sees_the_same_of_all_modules(host: Host, tmp_path: Path) -> None:
    preload = ["csv", "xml.dom.minidom", "unittest.mock"]
    boot(host, tmp_path, preload=preload)
    file = told(host)
    before = json.loads(host.run(FACTS))
    again(host, tmp_path, file, preload=preload)
    after = json.loads(host.run(FACTS))
    assert len(after["modules"]) > 300
    assert after["modules"] == before["modules"]
    assert before.pop("ours") == sorted([*after.pop("ours"), "_sandbox_modules"])
    assert after == before
    assert after["trace"] and not after["open"] and not after["environment"]
    assert "Shelf" not in after["finders"] and not after["beside"]


def wild(table: Any) -> bytes:
    head = marshal.dumps(table)
    return len(head).to_bytes(8, "little") + head + b"not compressed"


@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"garbage",
        b"\xff" * 100,
        wild({})[:-20],
        wild([]),
        wild({"csv": None}),
        wild({"csv": (csv.__file__, False, 0, 14)}),
        wild({"csv": (csv.__file__, False, 10**9, 14)}),
        wild({"csv": (csv.__file__, False, "x", 14)}),
    ],
    ids=["empty", "short", "no-table", "cut", "no-dict", "no-entry", "no-code", "beyond-the-end", "no-number"],
)
def test_what_is_no_such_file_costs_nothing_but_time(host: Host, tmp_path: Path, file: bytes) -> None:
    host.call("add_modules", attachment=file)
    boot(host, tmp_path, preload=["csv"])
    assert host.run("import csv; print(csv.__spec__.origin == csv.__file__, csv.excel.delimiter)") == "True ,\n"


def test_a_kernel_that_could_not_start_takes_its_file_with_it(host: Host, tmp_path: Path) -> None:
    host.call("add_modules", attachment=b"x")
    with pytest.raises(AgentError):
        host.call("start_kernel", **ipykernel_fields(tmp_path, argv=["/no/such/program"]))
    boot(host, tmp_path)
    assert not json.loads(host.run(FACTS))["beside"]


def test_a_file_that_cannot_be_written_is_none(tmp_path: Path) -> None:
    """Not even half of one."""
    directory = KernelDirectory(tmp_path / "run")
    directory.add_modules(b"begun")
    directory.modules.unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    directory.modules.symlink_to(elsewhere)
    with pytest.raises(OSError, match="symbolic"):
        directory.add_modules(b"on")
    assert elsewhere.read_text() == "mine" and not directory.modules.is_symlink()


def made(tmp_path: Path, name: str, text: str = "value = 1\n") -> ModuleType:
    """A module that Python has found as a file."""
    (tmp_path / f"{name}.py").write_text(text)
    return importlib.import_module(name)


@pytest.fixture
def importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder from which modules are found, and forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_only_what_would_come_of_itself_is_collected(importing: Path) -> None:
    plain, moved, renamed, own = (made(importing, f"kept_{n}") for n in ("plain", "moved", "renamed", "own"))
    moved.__file__ = "/elsewhere.py"
    loaded_otherwise = ModuleType("kept_otherwise")
    loaded_otherwise.__spec__ = ModuleSpec("kept_otherwise", None, origin="somewhere")
    gone = made(importing, "kept_gone")
    (importing / "kept_gone.py").unlink()
    modules = {"kept_plain": plain, "kept_moved": moved, "kept_alias": renamed, "_sandbox_x": own, "kept_gone": gone}
    file = collect({**modules, "kept_otherwise": loaded_otherwise, "kept_none": None, "sys": sys})  # type: ignore[dict-item]
    size = int.from_bytes(file[:8], "little")
    assert list(marshal.loads(file[8 : 8 + size])) == ["kept_plain"]


def test_what_is_too_much_is_left_out(importing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {name: made(importing, name) for name in ("kept_a", "kept_b")}
    one = len(collect({"kept_a": modules["kept_a"]}))
    monkeypatch.setattr(kernel_modules, "LIMIT", one)
    file = collect(modules)
    assert list(marshal.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])) == ["kept_a"]


def test_the_loader_is_pythons_own_when_the_modules_code_runs(importing: Path) -> None:
    text = "kind = type(__loader__), type(__spec__.loader), sorted(vars(__loader__))\n"
    module = made(importing, "kept_looking", text)
    file = importing / "file"
    file.write_bytes(collect({"kept_looking": module}))
    del sys.modules["kept_looking"]
    shelf = Shelf.open(str(file))
    assert shelf is not None
    try:
        found = importlib.import_module("kept_looking")
    finally:
        shelf.close()
    assert found is not module
    assert found.kind == (SourceFileLoader, SourceFileLoader, ["name", "path"]) == module.kind
    assert shelf not in sys.meta_path
