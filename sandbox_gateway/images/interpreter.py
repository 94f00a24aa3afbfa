"""What a host interpreter says of itself, and the symbolic links that lead to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

from sandbox_gateway.errors import SandboxGatewayError

_PROBE = """
import importlib.util, json, os, site, sys, sysconfig
paths = sysconfig.get_paths()
try:
    sites = list(site.getsitepackages())
except AttributeError:
    sites = []
print(json.dumps({
    "executable": sys.executable, "base_executable": getattr(sys, "_base_executable", None) or sys.executable,
    "prefix": sys.prefix, "base_prefix": sys.base_prefix, "version": list(sys.version_info[:3]),
    "stdlib": os.path.dirname(os.__file__), "platstdlib": paths["platstdlib"],
    "sites": list(dict.fromkeys(p for p in [paths["purelib"], paths["platlib"], *sites] if os.path.isdir(p))),
    "cache_tag": sys.implementation.cache_tag or "",
    "has_ipykernel": importlib.util.find_spec("ipykernel") is not None,
}))
"""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """One Python of the host. All paths are absolute; symbolic links in them are as the interpreter reports them."""

    executable: str
    """As it is called (for a venv: the path in the venv)."""
    base_executable: str
    prefix: str
    base_prefix: str
    version: tuple[int, ...]
    stdlib: str
    platstdlib: str
    sites: tuple[str, ...]
    """Existing site-packages and dist-packages folders, the environment's and those it also sees."""
    has_ipykernel: bool
    cache_tag: str = ""
    """``cpython-312``: the middle of its ``.pyc`` files' names; empty when it keeps none."""

    @property
    def is_venv(self) -> bool:
        """Whether it is a virtual environment on top of another interpreter."""
        return self.prefix != self.base_prefix

    @property
    def directory_name(self) -> str:
        """``python3.12``."""
        return f"python{self.version[0]}.{self.version[1]}"


def probe(path: str | None = None) -> Interpreter:
    """Ask the interpreter at ``path`` (default: the one that runs us) about itself.

    Runs it isolated (``-I``). Raises ``image_source`` when it is missing or no Python.
    """
    executable = os.path.abspath(os.path.expanduser(path)) if path else sys.executable
    if path and os.path.isdir(executable):
        inside = [os.path.join(executable, "bin", name) for name in ("python3", "python")]
        found = next((candidate for candidate in inside if os.path.isfile(candidate)), None)
        if found is None:
            raise SandboxGatewayError("image_source", f"there is no Python in the directory {executable}")
        executable = found
    if not os.path.exists(executable):
        raise SandboxGatewayError("image_source", f"there is no interpreter {executable}")
    if not os.path.isfile(executable) or not os.access(executable, os.X_OK):
        raise SandboxGatewayError("image_source", f"{executable} is not a program that can be run")
    try:
        answer = subprocess.run(
            [executable, "-I", "-c", _PROBE], capture_output=True, timeout=60, stdin=subprocess.DEVNULL, check=False
        )
        facts = json.loads(answer.stdout) if answer.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        facts = None
    if not isinstance(facts, dict):
        raise SandboxGatewayError("image_source", f"{executable} does not behave like a Python interpreter")
    return Interpreter(
        executable=executable,
        base_executable=str(facts["base_executable"]),
        prefix=str(facts["prefix"]),
        base_prefix=str(facts["base_prefix"]),
        version=tuple(facts["version"]),
        stdlib=str(facts["stdlib"]),
        platstdlib=str(facts["platstdlib"]),
        sites=tuple(facts["sites"]),
        has_ipykernel=bool(facts["has_ipykernel"]),
        cache_tag=str(facts["cache_tag"]),
    )


def require_ipykernel(interpreter: Interpreter) -> None:
    """Raise ``image_source`` with the command that helps when the environment has no ipykernel."""
    if not interpreter.has_ipykernel:
        raise SandboxGatewayError(
            "image_source",
            f"the environment of {interpreter.executable} has no ipykernel",
            f"{interpreter.executable} -m pip install ipykernel",
        )


def link_trail(path: str) -> dict[str, str]:
    """Every symbolic link met on the way to ``path``'s real file: link's path -> its target as stored."""
    trail: dict[str, str] = {}
    todo = [part for part in os.path.abspath(path).split("/") if part]
    done = "/"
    for _ in range(400):
        if not todo:
            break
        part = todo.pop(0)
        if part == "..":
            done = os.path.dirname(done)
            continue
        here = os.path.join(done, part)
        try:
            target = os.readlink(here)
        except OSError:
            done = here
            continue
        trail[here] = target
        todo[:0] = [piece for piece in target.split("/") if piece not in ("", ".")]
        if target.startswith("/"):
            done = "/"
    return trail


def state_key(path: str) -> tuple[object, ...]:
    """Changes when asking :func:`probe` again could give another answer (ipykernel is looked at elsewhere)."""
    facts: list[object] = []
    for name in (path, os.path.join(os.path.dirname(os.path.dirname(path)), "pyvenv.cfg")):
        try:
            found = os.stat(name)
            facts.append((found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size))
        except OSError:
            facts.append(None)
    return tuple(facts)
