"""From the name of an image to its layers: the one door of this package."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.images import agent_layer, base_layer, directory, host_env
from sandbox_gateway.images.fingerprints import Fingerprints
from sandbox_gateway.images.interpreter import Interpreter, probe, require_ipykernel, state_key
from sandbox_gateway.images.store import LayerStore, Progress, ProgressCallback, Recipe, StoredLayer, StoredLayers
from sandbox_gateway.model import Image, Layer

__all__ = ["ImageService", "Progress"]


class _Asked:
    """One look at what an image is made of, for all who asked before it began; ``before``: the look under way then."""

    def __init__(self, before: asyncio.Future[Image] | None) -> None:
        self.before = before
        self.looking = False
        self.listeners: list[ProgressCallback] = []
        self.answer: asyncio.Future[Image]

    def tell(self, how_far: Progress) -> None:
        """Pass progress on; called on another thread."""
        for listener in tuple(self.listeners):
            listener(how_far)


def _heard(answer: asyncio.Future[Image]) -> None:
    """Take the error: everybody who asked may have gone meanwhile."""
    if not answer.cancelled():
        answer.exception()


class ImageService:
    """Resolves image sources to layers, building what is missing. One per process; safe across processes."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self.store = LayerStore(paths)
        self._fingerprints = Fingerprints()
        self._probed: dict[str, tuple[tuple[object, ...], Interpreter]] = {}
        self._asked: dict[tuple[str, bool, int, bool], _Asked] = {}
        self._swept = False

    async def resolve(
        self,
        source: str,
        *,
        editable: bool = False,
        kernel_uid: int = 1000,
        require_python: bool = True,
        progress: ProgressCallback | None = None,
    ) -> Image:
        """The image called ``source``: ``host``, ``host:/path/to/python`` or ``directory:/path``.

        Builds layers that are missing or out of date; a few milliseconds when all are there. ``progress`` is called on
        another thread. ``kernel_uid`` only decides who ``jovyan`` is in ``/etc/passwd`` and owns the home directory.
        ``require_python=False`` takes a root directory without ipykernel, for profiles that name their own command.
        Raises ``image_source``, ``image_failed``, ``disk_full``, ``data_directory``.
        """
        key = (source, editable, kernel_uid, require_python)
        asked = self._asked.get(key)
        if asked is None or asked.looking:
            # Who asks while somebody looks may have changed something since: he waits for the next look, with others.
            asked = self._asked[key] = _Asked(asked.answer if asked is not None else None)
            asked.answer = asyncio.ensure_future(self._look(asked, key))
            asked.answer.add_done_callback(_heard)
        if progress is not None:
            asked.listeners.append(progress)
        return await asyncio.shield(asked.answer)

    async def _look(self, asked: _Asked, key: tuple[str, bool, int, bool]) -> Image:
        if asked.before is not None:
            await asyncio.wait({asked.before})
        asked.looking = True
        try:
            return await asyncio.to_thread(self.resolve_sync, *key, asked.tell)
        finally:
            if self._asked.get(key) is asked:
                del self._asked[key]

    def resolve_sync(
        self,
        source: str,
        editable: bool = False,
        kernel_uid: int = 1000,
        require_python: bool = True,
        progress: ProgressCallback | None = None,
    ) -> Image:
        """:meth:`resolve` for callers without a loop."""
        if not self._swept:
            self.store.sweep()
            self._swept = True
        kind, _, argument = source.partition(":")
        if kind == "directory" and argument:
            return self._directory(source, Path(argument), kernel_uid, require_python, progress)
        if kind == "host" and source != "host:":
            return self._host(source, argument or None, editable, kernel_uid, progress)
        raise SandboxGatewayError(
            "image_source", f"unknown image {source!r}", "Use host, host:/path/to/python or directory:/path."
        )

    def _agent(self, progress: ProgressCallback | None) -> Layer:
        stored = self.store.ensure(
            "agent", agent_layer.fingerprint(), agent_layer.build, what="agent", progress=progress
        )
        return _layer(stored, agent_layer.DESTINATION)

    def _host(
        self,
        name: str,
        path: str | None,
        editable: bool,
        kernel_uid: int,
        progress: ProgressCallback | None,
    ) -> Image:
        interpreter = self._interpreter(path)
        require_ipykernel(interpreter)
        plan = host_env.plan(interpreter, editable=editable, private=(str(self._paths.home), str(self._paths.runtime)))
        layers: list[Layer] = []
        needs: set[str] = set()
        provides: set[str] = set()
        pending = list(plan.layers)
        while pending:
            part = pending.pop(0)
            stored = self._environment(part, interpreter, progress)
            layers.append(_layer(stored, part.path))
            needs.update(stored.facts.get("needs", ()))
            provides.update(stored.facts.get("provides", ()))
            pending += [
                host_env.EnvironmentLayer("package", os.path.join(part.path, package), split_big=False)
                for package in stored.facts.get("big", ())
            ]
        directories = sorted(layer.destination for layer in layers)
        usr = self._usr(sorted(needs - provides), plan.programs, directories, progress)
        root = self._root(directories, dict(plan.links), kernel_uid, progress)
        layers += _aliases(dict(plan.links), layers)
        layers.sort(key=lambda layer: layer.destination)
        binary = os.path.dirname(interpreter.executable)
        environment = {**_ENVIRONMENT, "PATH": _path(binary)}
        if interpreter.is_venv:
            environment["VIRTUAL_ENV"] = interpreter.prefix
        return Image(
            name=name,
            layers=(_layer(root, "/"), _layer(usr, "/usr"), *layers),
            interpreter=interpreter.executable,
            environment=environment,
            agent=self._agent(progress),
        )

    def _directory(
        self,
        name: str,
        path: Path,
        kernel_uid: int,
        require_python: bool,
        progress: ProgressCallback | None,
    ) -> Image:
        root = directory.check(path, (self._paths.home, self._paths.runtime))
        interpreter = directory.interpreter(root) if require_python else directory.find_python(root)[0]
        stored = self.store.ensure(
            f"directory:{root}:{kernel_uid}",
            directory.fingerprint(root, kernel_uid),
            lambda: directory.build(root, kernel_uid),
            what=f"directory {root}",
            sources=(str(root),),
            progress=progress,
        )
        binary = os.path.dirname(interpreter) if interpreter else "/usr/bin"
        return Image(
            name=name,
            layers=(_layer(stored, "/"),),
            interpreter=interpreter,
            environment={**_ENVIRONMENT, "PATH": _path(binary)},
            agent=self._agent(progress),
        )

    def _interpreter(self, path: str | None) -> Interpreter:
        key = path or ""
        known = self._probed.get(key)
        if known is not None and known[1].has_ipykernel and state_key(known[1].executable) == known[0]:
            return known[1]
        found = probe(path)
        self._probed[key] = (state_key(found.executable), found)
        return found

    def _environment(
        self, part: host_env.EnvironmentLayer, interpreter: Interpreter, progress: ProgressCallback | None
    ) -> StoredLayer:
        return self.store.ensure(
            part.slot,
            self._fingerprints.of(part),
            lambda: host_env.build(part, interpreter),
            what=f"{part.what} {part.path}",
            sources=(part.path,),
            progress=progress,
        )

    def _usr(
        self, needs: list[str], programs: tuple[str, ...], directories: list[str], progress: ProgressCallback | None
    ) -> StoredLayer:
        inside = [path for path in directories if path.startswith("/usr/")]
        wanted = [name for name in needs if name not in base_layer.LIBRARIES]
        slot = _digest("usr", wanted, programs, inside)
        return self.store.ensure(
            slot,
            base_layer.usr_fingerprint(wanted, programs, inside),
            lambda: base_layer.build_usr(wanted, programs, inside),
            what="base",
            sources=("/usr",),
            progress=progress,
        )

    def _root(
        self, directories: list[str], links: dict[str, str], kernel_uid: int, progress: ProgressCallback | None
    ) -> StoredLayer:
        key = _digest("root", base_layer.RECIPE, directories, links, kernel_uid, base_layer.etc_files(kernel_uid))
        return self.store.ensure(
            key,
            key,
            lambda: Recipe(base_layer.build_root(directories, links, kernel_uid)),
            what="root",
            progress=progress,
        )

    def list(self) -> StoredLayers:
        """All layers of the store, oldest first."""
        return self.store.list()

    def remove(self, digest: str, referenced: Collection[str] = ()) -> int:
        """Remove one layer; see :meth:`LayerStore.remove`."""
        return self.store.remove(digest, referenced)

    def collect(self, referenced: Callable[[], Collection[str]]) -> StoredLayers:
        """Remove layers that nothing needs any more; see :meth:`LayerStore.collect`.

        ``referenced`` is asked only where a layer might go: it may have a thousand manifests to read.
        """
        return self.store.collect(referenced()) if self.store.unused(()) else []


_ENVIRONMENT = {
    "HOME": base_layer.HOME,
    "USER": "jovyan",
    "LOGNAME": "jovyan",
    "SHELL": "/bin/bash",
    "LANG": "C.UTF-8",
    "TERM": "xterm-256color",
}


def _aliases(links: Mapping[str, str], layers: Sequence[Layer]) -> list[Layer]:
    """Layers once more under the name of a link to them, where the link itself would be hidden.

    A runtime mounts memory over :data:`base_layer.VOLATILE`, so that links of the root layer are not seen there.
    """
    found: list[Layer] = []
    for link in links:
        if not any(link.startswith(f"{place}/") for place in base_layer.VOLATILE):
            continue
        real = os.path.realpath(link)
        below = [layer for layer in layers if f"{layer.destination}/".startswith(f"{real}/")]
        if not below:
            raise SandboxGatewayError(
                "image_source",
                f"the interpreter is reached through the link {link}, which a sandbox cannot have",
                f"Name it by its real path, {real}, or make the environment anew with that path.",
            )
        found += [dataclasses.replace(x, destination=link + x.destination.removeprefix(real)) for x in below]
    return found


def _path(binary: str) -> str:
    usual = ["/usr/local/bin", "/usr/bin", "/bin"]
    return ":".join(usual if binary in usual else [binary, *usual])


def _layer(stored: StoredLayer, destination: str) -> Layer:
    return Layer(source=str(stored.path), destination=destination, kind="erofs", digest=stored.digest)


def _digest(*parts: Any) -> str:
    return f"{parts[0]}:{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}"


def writable(image: Image) -> Image:
    """``image`` with the layers of its environment taking writes in memory, so that ``pip install`` works inside."""
    changed = tuple(
        dataclasses.replace(layer, writable=True) if layer.destination not in ("/", "/usr") else layer
        for layer in image.layers
    )
    return dataclasses.replace(image, layers=changed)
