"""Compiles the modules of a layer that have no ``.pyc`` yet.

``pip`` compiles what it installs, ``uv`` and others do not. On the host the first import would write the missing
files; in a read-only layer every kernel would compile them again at each start. Compiling executes nothing.
"""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
from collections.abc import Sequence

from sandbox_gateway.images.interpreter import Interpreter
from sandbox_gateway.images.tree import FIXED_TIME_NS, Node, Tree

_SCRIPT = """
import py_compile, sys
for line in sys.stdin.buffer.read().split(b"\\0"):
    if line:
        source, target = (part.decode("utf-8", "surrogateescape") for part in line.split(b"\\t"))
        try:
            py_compile.compile(source, cfile=target, dfile=source, doraise=True, optimize=0)
        except Exception:
            pass
"""
_LEAST = 20
"""Fewer missing files than these are not worth starting an interpreter."""
_TIMEOUT = 600.0


def missing(tree: Tree, cache_tag: str) -> list[tuple[str, str]]:
    """Modules without a ``.pyc`` for ``cache_tag``: path of the ``.pyc`` in the tree, source on the host."""
    found: list[tuple[str, str]] = []
    stack: list[tuple[str, Node]] = [("", tree.root)]
    while stack:
        path, folder = stack.pop()
        cached = folder.children.get("__pycache__")
        names = cached.children if cached is not None else {}
        for name, node in folder.children.items():
            if node.is_dir and name not in ("__pycache__", "tests", "test", "bin"):
                stack.append((f"{path}/{name}", node))
            elif name.endswith(".py") and node.source is not None and stat.S_ISREG(node.mode):
                target = f"{name[:-3]}.{cache_tag}.pyc"
                if target not in names and "\t" not in node.source:
                    found.append((f"{path}/__pycache__/{target}", node.source))
    return sorted(found)


def compile_missing(tree: Tree, interpreter: Interpreter) -> tempfile.TemporaryDirectory[str] | None:
    """Add the missing ``.pyc`` files to ``tree``.

    Returns the directory in which they lie until the image is written, to be cleaned up by the caller; None when there
    was nothing to do. A module that does not compile is left as it is.
    """
    wanted = missing(tree, interpreter.cache_tag) if interpreter.cache_tag else []
    if len(wanted) < _LEAST:
        return None
    scratch = tempfile.TemporaryDirectory(prefix="sandbox-gateway-pyc-")
    try:
        targets = [os.path.join(scratch.name, str(number)) for number in range(len(wanted))]
        _compile(interpreter, [(source, target) for (_, source), target in zip(wanted, targets, strict=True)])
        for (path, _), target in zip(wanted, targets, strict=True):
            if os.path.isfile(target) and tree.host_file(path, target):
                node = tree.get(path)
                if node is not None:
                    os.utime(target, ns=(FIXED_TIME_NS, FIXED_TIME_NS))
                    node.mtime_ns = FIXED_TIME_NS
                    folder = tree.get(os.path.dirname(path))
                    parent = tree.get(os.path.dirname(os.path.dirname(path)))
                    if folder is not None and parent is not None:
                        folder.mode = parent.mode
    except BaseException:
        scratch.cleanup()
        raise
    return scratch


def _compile(interpreter: Interpreter, jobs: Sequence[tuple[str, str]]) -> None:
    workers = max(1, min(len(os.sched_getaffinity(0)), 8))
    running: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(workers):
            part = b"\0".join(os.fsencode(f"{source}\t{target}") for source, target in jobs[number::workers])
            process = subprocess.Popen(
                [interpreter.executable, "-I", "-S", "-c", _SCRIPT],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            running.append(process)
            # The list is read whole before the first module is compiled: no writer waits long.
            assert process.stdin is not None
            process.stdin.write(part)
            process.stdin.close()
        for process in running:
            process.wait(timeout=_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdin is not None and not process.stdin.closed:
                process.stdin.close()
