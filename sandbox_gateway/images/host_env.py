"""A host Python environment as layers: which directories, what is left out, and how their state is told quickly.

Each layer is mounted at its own absolute path, so that nothing in the environment has to be rewritten:

- the base interpreter's prefix (for a system Python under ``/usr`` only its library folders);
- its site-packages apart, where the environment sees them;
- the virtual environment;
- very big packages (torch, nvidia...) each apart, so that another ``pip install`` does not rewrite them;
- sources of editable installs, when they are asked for.

``fingerprint`` of a layer is taken at kernel starts and must stay far below 50 ms (measured: 8-13 ms for 270
entries of site-packages and the base interpreter, 20 ms for all of ``resolve``): it looks at names, at the
``RECORD`` of each distribution and at the files at the top of each package, not at every file. A hand-made change
deeper in a package is not noticed until something else changes or the image is built anew.
:mod:`sandbox_gateway.images.fingerprints` spares most starts even that.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.images.bytecode import compile_missing
from sandbox_gateway.images.editable import editable_installs
from sandbox_gateway.images.elf import read_elf
from sandbox_gateway.images.interpreter import Interpreter, link_trail
from sandbox_gateway.images.store import Recipe
from sandbox_gateway.images.tree import Keep, Tree

RECIPE = "env-3"
BIG_PACKAGE = 300 << 20
"""Bytes from which a package's folder is a layer of its own."""
SYSTEM_PREFIXES = ("/", "/usr", "/usr/local")
_PACKAGES = ("site-packages", "dist-packages")
SECRET_NAMES = frozenset(
    {
        "pip.conf",
        "netrc",
        ".netrc",
        ".git",
        ".env",
        ".condarc",
        "condarc",
        ".pypirc",
        ".ssh",
        ".aws",
        ".git-credentials",
        ".hg",
        ".svn",
        ".envrc",
        ".npmrc",
        ".docker",
        ".kube",
        ".gnupg",
        "pip.ini",
        "condarc.d",
        ".condarc.d",
    }
)
"""Files and folders that hold credentials wherever they lie."""
_SECRET_PATHS = frozenset({"etc/jupyter", "conda-meta/state", "etc/conda/activate.d/env_vars.sh"})
"""Paths in a prefix that hold secrets: `conda env config vars` writes the second, and conda's guide shows the third."""
_SOURCE_LEFT_OUT = frozenset({"node_modules", ".venv", "venv", ".tox", ".nox", ".mypy_cache", ".ruff_cache"})
"""Folders of a project that are no source; only for editable installs."""
_UNWATCHED = _SOURCE_LEFT_OUT | {"__pycache__", ".git"}
_OPEN_DIRECTORY = 0o777
"""Directories of environments: the mount decides whether they can be written, and any kernel uid must be able to
``pip install`` where it does."""


@dataclass(frozen=True, slots=True)
class EnvironmentLayer:
    """One directory of the host that becomes a layer mounted at its own (real) path."""

    what: str
    """``environment``, ``interpreter``, ``packages``, ``package``, ``editable source``."""
    path: str
    omit: frozenset[str] = frozenset()
    """Relative paths of directories that stay empty (other layers, or nothing, belong there)."""
    sites: tuple[str, ...] = ()
    """Relative paths of site-packages folders in it ("" for itself)."""
    split_big: bool = True

    @property
    def slot(self) -> str:
        """Name of this source in the layer store."""
        return f"{self.what}:{self.path}:{','.join(sorted(self.omit))}"


@dataclass(frozen=True, slots=True)
class EnvironmentPlan:
    """What an environment consists of."""

    interpreter: Interpreter
    layers: tuple[EnvironmentLayer, ...]
    """Parents before children."""
    programs: tuple[str, ...]
    """Programs and libraries of a system Python that lie in ``/usr``."""
    links: tuple[tuple[str, str], ...]
    """Symbolic links outside of all layers that lead to the interpreter."""


def plan(interpreter: Interpreter, *, editable: bool = False, private: Iterable[str] = ()) -> EnvironmentPlan:
    """Which layers an environment needs. Looks at the disk, changes nothing.

    ``editable``: the sources of editable installs as well; ``private``: directories that never become part of an
    image (our data). Raises ``image_source`` for an editable install that would show a home directory.
    """
    layers: list[EnvironmentLayer] = []
    programs: list[str] = []
    prefix, base = os.path.realpath(interpreter.prefix), os.path.realpath(interpreter.base_prefix)
    sites = [os.path.realpath(site) for site in interpreter.sites]
    for root in dict.fromkeys((base, prefix)):
        if _is_system(root):
            found, extra = _system_pieces(root, interpreter, sites)
            layers += found
            programs += extra
        else:
            layers += _prefix_pieces(root, interpreter, sites)
    covered = [layer.path for layer in layers]
    for site in sites:
        if not any(_inside(site, path) for path in covered):
            layers.append(EnvironmentLayer("packages", site, sites=("",)))
            covered.append(site)
    for source in _editable_sources(interpreter) if editable else ():
        if not any(_inside(source, path) for path in covered):
            layers.append(EnvironmentLayer("editable source", source, split_big=False))
            covered.append(source)
    links: dict[str, str] = {}
    for path in (interpreter.executable, interpreter.base_executable, interpreter.prefix, interpreter.base_prefix):
        links.update(link_trail(path))
    outside = [(k, v) for k, v in sorted(links.items()) if not any(_inside(k, path) for path in covered)]
    real = os.path.realpath(interpreter.base_executable)
    if not any(_inside(real, path) for path in covered) and real not in programs:
        programs.append(real)
    hidden = [*(layer.path for layer in layers), *(os.path.realpath(path) for path in private)]
    ordered = sorted({layer.path: layer for layer in layers}.values(), key=lambda layer: layer.path)
    return EnvironmentPlan(
        interpreter, tuple(_without(layer, hidden) for layer in ordered), tuple(programs), tuple(outside)
    )


def build(layer: EnvironmentLayer, interpreter: Interpreter | None = None) -> Recipe:
    """The tree of a layer, with what later steps must know of it in its facts.

    ``big``: relative paths of the packages that are to be layers of their own; ``needs``: shared libraries that its
    files want and it does not have; ``provides``: those it has; ``compiled_bytes``: of the ``.pyc``
    files that were missing and that ``interpreter`` made.
    """
    tree = Tree(_OPEN_DIRECTORY)
    tree.host_tree("/", layer.path, _keep(layer), _OPEN_DIRECTORY)
    for omitted in layer.omit:
        node = tree.directory(omitted, _OPEN_DIRECTORY)
        node.children.clear()
    big: list[str] = []
    for site in layer.sites if layer.split_big else ():
        folder = tree.get(site)
        for name, node in sorted(folder.children.items()) if folder is not None else ():
            if node.is_dir and _size(node) >= BIG_PACKAGE:
                node.children.clear()
                big.append(os.path.join(site, name))
    needs: set[str] = set()
    provides: set[str] = set()
    for path, node in tree:
        name = os.path.basename(path)
        if node.source is None:
            continue
        if ".so" in name or node.mode & 0o111:
            elf = read_elf(node.source)
            if elf is not None:
                needs.update(elf.needed)
                provides.add(name)
    for path, node in tree:
        if node.source is None and node.data and ".so" in path:
            provides.add(os.path.basename(path))
    before = tree.total_bytes()
    scratch = compile_missing(tree, interpreter) if interpreter is not None else None
    facts = {
        "big": big,
        "needs": sorted(n for n in needs - provides if "/" not in n),
        "provides": sorted(p for p in provides if p.startswith("lib")),
        "compiled_bytes": tree.total_bytes() - before,
    }
    return Recipe(tree, facts, scratch.cleanup if scratch is not None else None)


def fingerprint(layer: EnvironmentLayer, looks_at: Callable[[str], None] = lambda folder: None) -> str:
    """A digest of the layer's state on the host, cheap enough for each kernel start.

    ``looks_at`` is told of each folder whose entries or files are part of the answer, right before it is looked at, by
    a path that may not exist.
    """
    found = hashlib.sha256(f"{RECIPE}\0{layer.slot}\n".encode())
    state = _State(looks_at)
    if layer.what in ("package", "editable source"):
        _tree_state(layer.path, state, 2 if layer.what == "package" else 64)
        if layer.what == "package":
            _records(os.path.dirname(layer.path), state, os.path.basename(layer.path))
    else:
        _shallow_state(layer.path, state)
        lib = os.path.join(layer.path, "lib")
        looks_at(lib)
        versions = [os.path.join("lib", name) for name in _names(lib) if name.startswith("python")]
        for name in ("bin", "share", "etc", "lib", *versions):
            if name not in layer.omit:
                _shallow_state(os.path.join(layer.path, name), state)
        for site in layer.sites:
            _site_state(os.path.join(layer.path, site), state)
    for line in state.lines:
        found.update(os.fsencode(line))
        found.update(b"\n")
    return found.hexdigest()


class _State:
    """What a look has found so far, and who is told where it looks."""

    def __init__(self, looks_at: Callable[[str], None]) -> None:
        self.lines: list[str] = []
        self.looks_at = looks_at


def _editable_sources(interpreter: Interpreter) -> list[str]:
    home = os.path.realpath(os.path.expanduser("~"))
    sources = []
    for install in editable_installs(interpreter):
        for path in install.sources:
            if _inside(home, path) or path in SYSTEM_PREFIXES:
                raise SandboxGatewayError(
                    "image_source",
                    f"the editable install {install.name} lies in {path}, which is too much to show",
                    "Install it properly, or move it into a folder of its own.",
                )
            if os.path.isdir(path):
                sources.append(path)
    return sorted(set(sources))


def _without(layer: EnvironmentLayer, hidden: Iterable[str]) -> EnvironmentLayer:
    """``layer`` with empty directories where other layers are mounted, or where nothing may be seen."""
    inside = {os.path.relpath(path, layer.path) for path in hidden if path != layer.path and _inside(path, layer.path)}
    return replace(layer, omit=layer.omit | inside)


def _is_system(path: str) -> bool:
    """Whether a prefix is shared with things that are no Python: only pieces of it are taken then."""
    home = os.path.realpath(os.path.expanduser("~"))
    return path in SYSTEM_PREFIXES or _inside(home, path) or path == os.path.join(home, ".local")


def _system_pieces(
    root: str, interpreter: Interpreter, sites: Iterable[str]
) -> tuple[list[EnvironmentLayer], list[str]]:
    layers = []
    name = interpreter.directory_name
    candidates = {os.path.realpath(p) for p in (interpreter.stdlib, interpreter.platstdlib)}
    candidates |= {os.path.join(root, lib, leaf) for lib in ("lib", "lib64") for leaf in (name, "python3")}
    chosen = sorted(p for p in candidates if os.path.isdir(p) and os.path.realpath(p) == p and _inside(p, root))
    for path in chosen:
        inside = tuple(os.path.relpath(s, path) for s in sites if _inside(s, path) and s != path)
        if not inside and os.path.basename(path) == "python3":
            continue  # Debian's packages, which a virtual environment mostly does not see
        unseen = {leaf for leaf in _PACKAGES if leaf not in inside and os.path.isdir(os.path.join(path, leaf))}
        layers.append(EnvironmentLayer("interpreter", path, _stdlib_omits(path, "") | unseen, inside))
    programs = []
    binary = os.path.join(root, "bin")
    if root == "/usr/local" and os.path.isdir(binary):
        layers.append(EnvironmentLayer("programs", binary))
    else:
        for entry in sorted(_names(binary)):
            if entry.startswith(("python3", "pip3")) or entry in ("python", "pip"):
                programs.append(os.path.join(binary, entry))
    return layers, programs


def _prefix_pieces(root: str, interpreter: Interpreter, sites: Iterable[str]) -> list[EnvironmentLayer]:
    inside = [os.path.relpath(site, root) for site in sites if _inside(site, root)]
    omit: set[str] = set()
    if os.path.isdir(os.path.join(root, "conda-meta")):
        omit |= {name for name in ("pkgs", "envs", "conda-bld") if os.path.isdir(os.path.join(root, name))}
    if os.path.isfile(os.path.join(root, "pyvenv.cfg")):
        return [EnvironmentLayer("environment", root, frozenset(omit), tuple(inside))]
    lib = os.path.join("lib", interpreter.directory_name)
    omit |= _stdlib_omits(os.path.join(root, lib), lib)
    # A base's packages change more often than its interpreter, and a virtual environment mostly does not see them.
    own = [os.path.join(lib, leaf) for leaf in _PACKAGES]
    omit |= {path for path in own if os.path.isdir(os.path.join(root, path))}
    layers = [EnvironmentLayer("interpreter", root, frozenset(omit))]
    layers += [EnvironmentLayer("packages", os.path.join(root, path), sites=("",)) for path in inside]
    return layers


def _stdlib_omits(stdlib: str, relative: str) -> frozenset[str]:
    """CPython's own test suite is a fifth of a standard library and of no use to a kernel."""
    return frozenset(os.path.join(relative, name) for name in ("test",) if os.path.isdir(os.path.join(stdlib, name)))


def _keep(layer: EnvironmentLayer) -> Keep:
    omitted = tuple(f"{path}/" for path in layer.omit)

    def keep(path: str, is_dir: bool) -> bool:
        name = os.path.basename(path)
        if name in SECRET_NAMES or name.startswith(".env."):
            return False
        if layer.what == "editable source" and is_dir and name in _SOURCE_LEFT_OUT:
            return False
        if path in _SECRET_PATHS or f"{path}/".startswith(omitted):
            return False
        return is_dir or not name.endswith(".a")

    return keep


def _size(node: object) -> int:
    total, stack = 0, [node]
    while stack:
        item = stack.pop()
        total += item.size  # type: ignore[attr-defined]
        stack.extend(item.children.values())  # type: ignore[attr-defined]
    return total


def _site_state(site: str, state: _State) -> None:
    state.looks_at(site)
    try:
        with os.scandir(site) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError:
        state.lines.append(f"{site} unreadable")
        return
    for entry in found:
        if entry.name == "__pycache__":
            continue
        if not entry.is_dir(follow_symlinks=False):
            file = entry.stat(follow_symlinks=False)
            state.lines.append(f"{entry.path} {file.st_mtime_ns} {file.st_size}")
        elif entry.name.endswith((".dist-info", ".egg-info")):
            _record(entry.path, state)
        else:
            _shallow_state(entry.path, state)


def _record(folder: str, state: _State) -> None:
    state.looks_at(folder)
    for name in ("RECORD", "direct_url.json", "METADATA"):
        path = os.path.join(folder, name)
        try:
            file = os.lstat(path)
            if stat.S_ISLNK(file.st_mode):
                state.looks_at(os.path.dirname(os.path.realpath(path)))
                file = os.stat(path)
        except OSError:
            continue
        state.lines.append(f"{folder} {name} {file.st_mtime_ns} {file.st_size}")
        if name == "RECORD":
            return
    state.lines.append(folder)


def _records(site: str, state: _State, package: str) -> None:
    wanted = package.replace("-", "_").lower()
    state.looks_at(site)
    for name in sorted(_names(site)):
        if name.endswith(".dist-info") and name.lower().replace("-", "_").startswith(wanted):
            _record(os.path.join(site, name), state)


def _shallow_state(folder: str, state: _State) -> None:
    """The files of a directory and the names of its directories. Not its own time: importing makes __pycache__."""
    state.looks_at(folder)
    try:
        with os.scandir(folder) as entries:
            names = []
            newest, size = 0, 0
            for entry in entries:
                if entry.name == "__pycache__":
                    continue
                names.append(entry.name)
                if not entry.is_dir(follow_symlinks=False):
                    file = entry.stat(follow_symlinks=False)
                    newest = max(newest, file.st_mtime_ns)
                    size += file.st_size
    except OSError:
        return
    state.lines.append(f"{folder} {newest} {size} {' '.join(sorted(names))}")


def _tree_state(folder: str, state: _State, depth: int) -> None:
    _shallow_state(folder, state)
    if depth <= 1:
        return
    try:
        with os.scandir(folder) as entries:
            inner = sorted(e.path for e in entries if e.is_dir(follow_symlinks=False) and e.name not in _UNWATCHED)
    except OSError:
        return
    for path in inner:
        _tree_state(path, state, depth - 1)


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _inside(path: str, parent: str) -> bool:
    return path == parent or path.startswith(parent.rstrip("/") + "/")
