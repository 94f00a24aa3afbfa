"""A template's kernel that imports from one file what another has imported: nothing is different but the files."""

from __future__ import annotations

import contextlib
import csv
import importlib
import json
import marshal
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import LazyLoader, find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from agent_host import AgentError, Host, ipykernel_fields

from sandbox_gateway.agent import kernel_modules
from sandbox_gateway.agent.kernel_modules import Shelf, collect
from sandbox_gateway.agent.relay import KernelDirectory

TELL = "get_ipython().kernel.parent.tell_modules()"

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
    before = json.loads(host.run(FACTS))
    file = told(host)
    again(host, tmp_path, file, preload=preload)
    after = json.loads(host.run(FACTS))
    assert len(after["modules"]) > 300
    assert after["modules"] == before["modules"]
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
        wild({"csv": (csv.__file__, False)}),
        wild({"csv": (csv.__file__, False, 0, 14)}),
        wild({"csv": (csv.__file__, False, 10**9, 14)}),
        wild({"csv": (csv.__file__, False, "x", 14)}),
    ],
    ids=[
        "empty",
        "short",
        "no-table",
        "cut",
        "no-dict",
        "no-entry",
        "half-an-entry",
        "no-code",
        "beyond-the-end",
        "no-number",
    ],
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


def test_a_generations_folder_goes_with_what_a_kernel_has_put_there(tmp_path: Path) -> None:
    """Mostly its sockets; a deep tree, too, and nothing behind a link."""
    directory = KernelDirectory(tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    for generation in (1, 2):
        directory.prepare(generation, "key", os.geteuid(), os.getegid())
        (directory.top / str(generation) / "k-1").write_text("")
    (directory.top / "2" / "a" / "b").mkdir(parents=True)
    (directory.top / "2" / "link").symlink_to(elsewhere)
    (directory.top / "4").symlink_to(elsewhere)
    for generation in (1, 2, 3, 4):
        directory.forget(generation)
    (directory.top / "4").unlink()
    assert [path.name for path in directory.top.iterdir()] == ["connection.json"]
    (directory.top / "connection.new").mkdir()
    directory.remove()
    assert not directory.top.exists() and (elsewhere / "mine").exists()


def test_the_end_of_a_kernel_loads_nothing(tmp_path: Path) -> None:
    """Each restored sandbox would load it for itself."""
    code = f"""if True:
        import sys
        from pathlib import Path
        from sandbox_gateway.agent import main, relay
        directory = relay.KernelDirectory(Path({str(tmp_path / "run")!r}))
        directory.prepare(1, "key", {os.geteuid()}, {os.getegid()})
        before = set(sys.modules)
        assert "shutil" not in before
        directory.forget(1)
        directory.remove()
        assert not directory.top.exists()
        print(sorted(set(sys.modules) - before))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def written(path: Path, text: str = "value = 1\n") -> None:
    """A file that has been there for long."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    os.utime(path, (1e9, 1e9))


def made(folder: Path, name: str, text: str = "value = 1\n") -> ModuleType:
    """A module that Python has found as a file."""
    written(folder / f"{name}.py", text)
    return importlib.import_module(name)


def collected(*modules: object, **named: object) -> bytes:
    """The file for these modules, by their names or others."""
    found = {**{module.__name__: module for module in modules}, **named}  # type: ignore[attr-defined]
    return collect(found, time.time())  # type: ignore[arg-type]


def kept(file: bytes) -> list[str]:
    """Names of the modules in a file."""
    return list(marshal.loads(file[8 : 8 + int.from_bytes(file[:8], "little")]))


@contextlib.contextmanager
def shelved(folder: Path, file: bytes) -> Iterator[Shelf]:
    """Modules come from this file, none of which are there yet."""
    for name in kept(file):
        del sys.modules[name]
    (folder / "file").write_bytes(file)
    shelf = Shelf.open(str(folder / "file"))
    assert shelf is not None
    try:
        yield shelf
    finally:
        shelf.close()


@pytest.fixture
def importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder from which modules are found, and forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_only_what_would_come_of_itself_is_collected(importing: Path) -> None:
    names = ("plain", "moved", "renamed", "own", "gone", "reloading")
    plain, moved, renamed, own, gone, reloading = (made(importing, f"kept_{name}") for name in names)
    moved.__file__ = "/elsewhere.py"
    (importing / "kept_gone.py").unlink()
    reloading.__class__ = type("Reloading", (ModuleType,), {})
    otherwise = ModuleType("kept_otherwise")
    otherwise.__spec__ = ModuleSpec("kept_otherwise", None, origin="somewhere")
    file = collected(plain, moved, gone, reloading, otherwise, sys, kept_alias=renamed, _sandbox_x=own, kept_none=None)
    assert kept(file) == ["kept_plain"]


def test_what_somebody_else_found_is_not_collected(importing: Path) -> None:
    """A file that was loaded under a name by hand, and a package with more folders than its own."""
    private = importing / "private"
    written(private / "kept_private.py")
    spec = spec_from_file_location("kept_private", private / "kept_private.py")
    assert spec is not None and spec.loader is not None
    sys.modules["kept_private"] = by_hand = module_from_spec(spec)
    spec.loader.exec_module(by_hand)
    written(importing / "kept_wide" / "__init__.py")
    wide = importlib.import_module("kept_wide")
    assert wide.__spec__ is not None
    wide.__spec__.submodule_search_locations = [str(importing / "kept_wide"), str(private)]
    assert kept(collected(by_hand)) == []
    assert kept(collected(wide)) == ["kept_wide"], "what is kept is the package as it is found"
    with shelved(importing, collected(wide)):
        assert list(importlib.import_module("kept_wide").__path__) == [str(importing / "kept_wide")]


def test_what_was_made_since_the_kernel_started_is_not_collected(importing: Path) -> None:
    """The next one makes it anew, and perhaps otherwise."""
    module = made(importing, "kept_generated")
    os.utime(importing / "kept_generated.py")
    assert kept(collect({"kept_generated": module}, time.time() - 60)) == []


def test_odd_things_among_the_modules_cost_nobody_else_his_place(importing: Path) -> None:
    class Angry(ModuleType):
        def __getattribute__(self, name: str) -> object:
            raise RuntimeError(name)

    missing = "kept_missing_dependency"
    written(importing / "kept_lazy.py", f"import {missing}\n")
    spec = find_spec("kept_lazy")
    assert spec is not None and spec.loader is not None
    spec.loader = LazyLoader(spec.loader)
    lazy = module_from_spec(spec)
    spec.loader.exec_module(lazy)
    plain = made(importing, "kept_plain")
    odd = {"kept_angry": Angry("kept_angry"), "kept_lazy": lazy, 7: plain, "kept_number": 7}
    file = collect({**odd, "kept_plain": plain}, time.time())  # type: ignore[dict-item]
    assert kept(file) == ["kept_plain"]
    assert type(lazy) is not ModuleType, "still lazy"


def test_what_is_too_much_is_left_out_and_what_is_smaller_has_its_place(
    importing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, smaller = (made(importing, name) for name in ("kept_a", "kept_b"))
    big = made(importing, "kept_big", "".join(f"value_{n} = '{os.urandom(20).hex()}'\n" for n in range(500)))
    monkeypatch.setattr(kernel_modules, "LIMIT", 2 * len(collected(small)))
    assert kept(collected(small, big, smaller)) == ["kept_a", "kept_b"]


def test_a_module_is_given_only_where_python_would_find_it(importing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that asks for it before its folder is on the path goes without, as it did before."""
    vendor = importing / "vendor"
    written(vendor / "kept_extra.py")
    monkeypatch.syspath_prepend(vendor)
    file = collected(importlib.import_module("kept_extra"))
    assert kept(file) == ["kept_extra"]
    with shelved(importing, file):
        sys.path.remove(str(vendor))
        with pytest.raises(ImportError):
            importlib.import_module("kept_extra")
        sys.path.append(str(vendor))
        assert importlib.import_module("kept_extra").value == 1


def test_the_loader_is_pythons_own_when_the_modules_code_runs(importing: Path) -> None:
    text = "kind = type(__loader__), type(__spec__.loader), sorted(vars(__loader__))\n"
    module = made(importing, "kept_looking", text)
    with shelved(importing, collected(module)) as shelf:
        found = importlib.import_module("kept_looking")
    assert found is not module
    assert found.kind == (SourceFileLoader, SourceFileLoader, ["name", "path"]) == module.kind
    assert shelf not in sys.meta_path


def test_what_is_loaded_only_after_the_end_comes_from_its_files(importing: Path) -> None:
    module = made(importing, "kept_later")
    with shelved(importing, collected(module)):
        spec = find_spec("kept_later")
    assert spec is not None and isinstance(spec.loader, SourceFileLoader)
    assert (type(spec.loader), sorted(vars(spec.loader))) == (SourceFileLoader, ["name", "path"])
    later = module_from_spec(spec)
    spec.loader.exec_module(later)
    assert later.value == 1


def test_a_descriptor_that_somebody_closed_is_no_harm(importing: Path) -> None:
    module = made(importing, "kept_robbed")
    with shelved(importing, collected(module)) as shelf:
        assert shelf._fd >= 100, "where nobody closes all that he sees"
        os.close(shelf._fd)
        assert importlib.import_module("kept_robbed").value == 1
