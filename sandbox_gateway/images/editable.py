"""Editable installs: distributions whose code lies outside of the environment that names them."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from sandbox_gateway.images.interpreter import Interpreter


@dataclass(frozen=True, slots=True)
class EditableInstall:
    """One distribution that is installed by reference."""

    name: str
    """As its metadata spells it, or the ``.pth`` file's name where there is none."""
    paths: tuple[str, ...]
    """Directories that its code is imported from (real paths); may be empty for unusual build backends."""
    project: str | None = None
    """The project's directory, where the installer recorded it (PEP 610)."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The directories a sandbox needs: those imported from, else the whole project."""
        if self.paths:
            return self.paths
        return (self.project,) if self.project else ()


def editable_installs(interpreter: Interpreter) -> list[EditableInstall]:
    """All editable installs that ``interpreter`` sees, by name. Reads files only."""
    sites = [os.path.realpath(site) for site in interpreter.sites]
    inside = [*sites, os.path.realpath(interpreter.prefix), os.path.realpath(interpreter.base_prefix)]
    found: dict[str, EditableInstall] = {}
    for site in sites:
        names = _names(site)
        loose = {name: _pth_paths(os.path.join(site, name), site) for name in names if name.endswith(".pth")}
        finders = {name: _finder_paths(os.path.join(site, name)) for name in names if _is_finder(name)}
        used: set[str] = set()
        for name in names:
            project = _editable_project(os.path.join(site, name)) if name.endswith(".dist-info") else None
            if project is None:
                continue
            title = name.removesuffix(".dist-info").rpartition("-")[0] or name
            paths: list[str] = []
            for table in (loose, finders):
                for file, targets in table.items():
                    if _belongs(file, title):
                        used.add(file)
                        paths += targets
            if not paths:
                # Hatch and older backends name their .pth freely: it points into the project.
                for file, targets in loose.items():
                    if targets and all(_inside(t, project) for t in targets):
                        used.add(file)
                        paths += targets
            found[title] = EditableInstall(title, _outermost(paths), project)
        for file, targets in loose.items():
            outside = [t for t in targets if not any(_inside(t, place) for place in inside)]
            if file not in used and outside:
                title = file.removesuffix(".pth")
                found.setdefault(title, EditableInstall(title, _outermost(outside)))
        for name in names:
            if name.endswith(".egg-link"):
                target = _first_line(os.path.join(site, name))
                if target and os.path.isdir(target):
                    title = name.removesuffix(".egg-link")
                    found.setdefault(title, EditableInstall(title, (os.path.realpath(target),)))
    return sorted(found.values(), key=lambda install: install.name.lower())


def _editable_project(folder: str) -> str | None:
    try:
        with open(os.path.join(folder, "direct_url.json"), encoding="utf-8") as file:
            facts = json.load(file)
        if facts["dir_info"].get("editable") is not True:
            return None
        return os.path.realpath(unquote(urlsplit(facts["url"]).path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _pth_paths(path: str, site: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read(1 << 20).splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        line = line.strip()
        if line and not line.startswith(("#", "import ", "import\t")):
            target = os.path.realpath(os.path.join(site, line))
            if os.path.isdir(target) and target != site:
                found.append(target)
    return found


def _finder_paths(path: str) -> list[str]:
    """The values of ``MAPPING`` in a setuptools finder: read, never run."""
    try:
        with open(path, encoding="utf-8") as file:
            module = ast.parse(file.read(1 << 20))
    except (OSError, SyntaxError, ValueError):
        return []
    found = []
    for statement in module.body:
        target: ast.expr | None = statement.target if isinstance(statement, ast.AnnAssign) else None
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target = statement.targets[0]
        value = getattr(statement, "value", None)
        if not isinstance(target, ast.Name) or target.id not in ("MAPPING", "NAMESPACES") or value is None:
            continue
        try:
            mapping = ast.literal_eval(value)
        except ValueError:
            continue
        for entry in mapping.values() if isinstance(mapping, dict) else ():
            for item in entry if isinstance(entry, list) else [entry]:
                if isinstance(item, str) and os.path.isabs(item):
                    found.append(os.path.realpath(item if os.path.isdir(item) else os.path.dirname(item)))
    return [item for item in found if os.path.isdir(item)]


def _is_finder(name: str) -> bool:
    return name.startswith("__editable__") and name.endswith("_finder.py")


def _belongs(file: str, title: str) -> bool:
    def plain(text: str) -> str:
        return re.sub(r"[-_.]+", "_", text).lower().strip("_")

    stem = plain(file.rpartition(".")[0])
    wanted = plain(title)
    return stem in (wanted, f"editable_{wanted}") or stem.startswith((f"editable_{wanted}_", f"{wanted}_editable"))


def _outermost(paths: Iterable[str]) -> tuple[str, ...]:
    kept: list[str] = []
    for path in sorted(set(paths)):
        if not any(_inside(path, other) for other in kept):
            kept.append(path)
    return tuple(kept)


def _first_line(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline().strip()
    except (OSError, ValueError):
        return ""


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _inside(path: str, parent: str) -> bool:
    return path == parent or path.startswith(parent.rstrip("/") + "/")
