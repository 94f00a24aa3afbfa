"""The agent's own layer: an interpreter, its libc, pyzmq and our ``wire`` and ``agent`` packages, at ``/opt/agent``.

It works in any root, because nothing in it looks outside: the loader is called directly with our library path
(GVISOR.md has the trial), and the interpreter runs isolated (``-I``). User code cannot change what PID 1 imports.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import py_compile
import sys
import sysconfig
import tempfile
from pathlib import Path

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.images.elf import closure, read_elf
from sandbox_gateway.images.store import Recipe
from sandbox_gateway.images.tree import Tree

DESTINATION = "/opt/agent"
RECIPE = "agent-3"
_STDLIB_OUT = frozenset(
    {"test", "tests", "idlelib", "tkinter", "turtledemo", "turtle.py", "ensurepip", "lib2to3", "site-packages",
     "dist-packages", "pydoc_data", "__pycache__", "distutils", "LICENSE.txt", "EXTERNALLY-MANAGED"}
)  # fmt: skip
_VERSION = f"python{sys.version_info[0]}.{sys.version_info[1]}"


def _executable() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _loader_name() -> str:
    elf = read_elf(_executable())
    return os.path.basename(elf.interpreter) if elf is not None and elf.interpreter else "ld-linux-x86-64.so.2"


AGENT_PYTHON: tuple[str, ...] = (
    f"{DESTINATION}/so/{_loader_name()}",
    "--argv0",
    f"{DESTINATION}/bin/python3",
    "--library-path",
    f"{DESTINATION}/so",
    f"{DESTINATION}/bin/python3",
    "-I",
)
"""The agent's interpreter inside; append ``-c ...`` or ``-m ...``."""

AGENT_ARGV: tuple[str, ...] = (*AGENT_PYTHON, "-m", "sandbox_gateway.agent")
"""What PID 1 is called with."""


AGENT_PACKAGE = f"{DESTINATION}/lib/sandbox_gateway"
"""Our package inside, whatever the Python version: ``AGENT_PACKAGE/agent/...``."""


def _zmq_directories() -> list[Path]:
    spec = importlib.util.find_spec("zmq")
    if spec is None or not spec.origin:
        raise SandboxGatewayError("image_failed", "pyzmq is not installed beside sandbox_gateway", "pip install pyzmq")
    package = Path(spec.origin).parent
    bundled = package.parent / "pyzmq.libs"
    return [package, bundled] if bundled.is_dir() else [package]


def _own_sources() -> list[Path]:
    here = Path(__file__).resolve().parent.parent
    return [here / "wire", here / "agent"]


@functools.cache
def _stdlib() -> str:
    return sysconfig.get_paths()["stdlib"]  # in a virtual environment, made anew at each question: 4 ms


def fingerprint() -> str:
    """Changes when the interpreter, pyzmq or our own sources do; a few milliseconds."""
    found = hashlib.sha256(f"{RECIPE} {sys.version} {_executable()} {_loader_name()}".encode())
    places = [Path(_executable()), Path(_stdlib()), *_zmq_directories()]
    for path in places:
        state = path.stat()
        found.update(f"{path} {state.st_mtime_ns} {state.st_size}\n".encode())
    for folder in _own_sources():
        for path in sorted(folder.rglob("*.py")):
            state = path.stat()
            found.update(f"{path} {state.st_mtime_ns} {state.st_size}\n".encode())
    return found.hexdigest()


def build() -> Recipe:
    """The layer's tree. Raises ``image_failed`` when the interpreter has no pyzmq."""
    tree = Tree()
    executable = _executable()
    stdlib = _stdlib()
    target = f"/lib/{_VERSION}"
    tree.host_file("/bin/python3", executable)
    _python_tree(tree, target, Path(stdlib), _keep_stdlib)
    platform = sysconfig.get_path("platstdlib", vars={"platbase": sys.base_exec_prefix})
    dynload = Path(sysconfig.get_config_var("DESTSHARED") or os.path.join(platform, "lib-dynload"))
    if not dynload.is_dir():
        dynload = Path(stdlib) / "lib-dynload"
    native = [executable]
    if dynload.is_dir():
        tree.host_tree(f"{target}/lib-dynload", str(dynload), _keep_dynload)
        native += [str(path) for path in dynload.glob("*.so") if _keep_dynload(path.name, False)]
    # Beside the standard library: Debian's interpreter looks into no site-packages of its prefix.
    site = target
    for package in _zmq_directories():
        _python_tree(tree, f"{site}/{package.name}", package, _keep_zmq)
        native += [str(path) for path in package.rglob("*.so*")]
    for package in _own_sources():
        if package.is_dir():
            _python_tree(tree, f"{site}/sandbox_gateway/{package.name}", package, _keep_sources, sources=True)
    tree.file(f"{site}/sandbox_gateway/__init__.py", "")
    tree.symlink("/lib/sandbox_gateway", f"{_VERSION}/sandbox_gateway")
    libraries = closure(native)
    bundled = {path.name for package in _zmq_directories() for path in package.rglob("*.so*")}
    for name, path in libraries.files.items():
        if name not in bundled:
            tree.host_file(f"/so/{name}", os.path.realpath(path))
    elf = read_elf(executable)
    if elf is None or not elf.interpreter:
        raise SandboxGatewayError("image_failed", f"{executable} is not a dynamically linked program")
    tree.host_file(f"/so/{_loader_name()}", os.path.realpath(elf.interpreter))
    return Recipe(tree, {"python": sys.version.split()[0], "missing": sorted(libraries.missing)})


def _keep_stdlib(path: str, is_dir: bool) -> bool:
    name = os.path.basename(path)
    if path.startswith("config-") or (is_dir and name in ("tests", "test", "__pycache__", "lib-dynload")):
        return False
    return path.split("/")[0] not in _STDLIB_OUT and (is_dir or not name.endswith((".a", ".exe")))


def _keep_dynload(path: str, is_dir: bool) -> bool:
    # 3.11's test modules and Tk want libraries that an agent never needs.
    return not is_dir and not os.path.basename(path).startswith(("_test", "_tkinter", "_xxtest", "_ctypes_test", "xx"))


def _keep_zmq(path: str, is_dir: bool) -> bool:
    return os.path.basename(path) not in ("tests", "__pycache__", "green", "include") and not path.endswith(
        (".pyx", ".pxd", ".h", ".pyi")
    )


def _keep_sources(path: str, is_dir: bool) -> bool:
    # Nothing but modules: tools leave their caches in source folders.
    name = os.path.basename(path)
    return not name.startswith((".", "__pycache__")) if is_dir else name.endswith(".py")


def _python_tree(tree: Tree, destination: str, source: Path, keep: object, *, sources: bool = False) -> None:
    """Copy a package with its ``.pyc`` files (unchecked-hash: none goes stale).

    Without ``sources`` they stand in the place of the sources. That saves a look at each of those, and the page cache
    that PID 1 maps in every sandbox is not spread over twice as many bytes.
    """
    assert callable(keep)
    tree.host_tree(destination, str(source), keep)
    with tempfile.TemporaryDirectory(prefix="sandbox-gateway-") as scratch:
        target = os.path.join(scratch, "out.pyc")
        for path, node in list(tree):
            if not path.startswith(f"{destination}/") or node.source is None or not path.endswith(".py"):
                continue
            try:
                py_compile.compile(
                    node.source,
                    cfile=target,
                    dfile=f"{DESTINATION}{path}",
                    doraise=True,
                    optimize=0,
                    invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
                )
            except (py_compile.PyCompileError, OSError):
                continue
            folder, name = os.path.split(path)
            with open(target, "rb") as compiled:
                code = compiled.read()
            if sources:
                tree.file(f"{folder}/__pycache__/{name[:-3]}.{sys.implementation.cache_tag}.pyc", code)
            else:
                tree.remove(path)
                tree.file(f"{path}c", code)


__all__ = ["AGENT_ARGV", "AGENT_PACKAGE", "AGENT_PYTHON", "DESTINATION", "build", "fingerprint"]
