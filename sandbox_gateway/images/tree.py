"""A file tree that is to become an image: paths and metadata in memory, contents still on the host.

What a user's directory says about owners and permissions is normalised here, for two reasons: the same sources give
the same image for whoever builds it, and the kernel's uid, which is not known when the image is built, can read all
of it. Files belong to 0:0, lose set-uid, set-gid and foreign write bits, and become readable by everybody.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

FIXED_TIME_NS = 315_532_800 * 10**9
"""1980-01-01: the time of everything generated and of all directories (zip files know no earlier one)."""

Keep = Callable[[str, bool], bool]
"""Called with a path relative to the copied directory and whether it is a directory; False leaves it out."""


@dataclass(slots=True, eq=False)
class Node:
    """One inode. The same object under two names is a hard link."""

    mode: int
    """Type and permission bits, as in ``st_mode``."""
    mtime_ns: int = FIXED_TIME_NS
    uid: int = 0
    gid: int = 0
    size: int = 0
    source: str | None = None
    """Host path that the content of a regular file comes from."""
    data: bytes = b""
    """Content of a generated file, or the target of a symbolic link."""
    children: dict[str, Node] = field(default_factory=dict)

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)


def directory_node(mode: int = 0o755, uid: int = 0, gid: int = 0) -> Node:
    """An empty directory."""
    return Node(stat.S_IFDIR | mode, uid=uid, gid=gid)


class Tree:
    """A root directory to which host files, host trees and generated files are added.

    Paths are absolute paths inside the image. Parents are made as needed, mode 0755. Later additions win.
    """

    def __init__(self, root_mode: int = 0o755) -> None:
        self.root = directory_node(root_mode)
        self.skipped: list[str] = []
        """Host paths that could not be read."""
        self._links: dict[tuple[int, int], Node] = {}

    def directory(self, path: str, mode: int = 0o755, uid: int = 0, gid: int = 0) -> Node:
        """Make (or change) a directory."""
        node = self._dir(path)
        node.mode, node.uid, node.gid = stat.S_IFDIR | mode, uid, gid
        return node

    def file(self, path: str, content: bytes | str, mode: int = 0o644) -> None:
        """Add a generated file."""
        data = content.encode() if isinstance(content, str) else content
        self._put(path, Node(stat.S_IFREG | mode, data=data, size=len(data)))

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        data = os.fsencode(target)
        self._put(path, Node(stat.S_IFLNK | 0o777, data=data, size=len(data)))

    def host_file(self, path: str, source: str) -> bool:
        """Add the regular file or symbolic link ``source`` of the host; False when it cannot be read."""
        try:
            found = os.lstat(source)
        except OSError:
            self.skipped.append(source)
            return False
        node = self._host_node(source, found)
        if node is not None:
            self._put(path, node)
        return node is not None

    def host_tree(self, path: str, source: str, keep: Keep | None = None, directory_mode: int = 0o755) -> None:
        """Add the directory ``source`` of the host with all below it that ``keep`` accepts."""
        self._walk(self.directory(path, directory_mode), os.fspath(source), "", keep, directory_mode)

    def get(self, path: str) -> Node | None:
        """The node at ``path`` (symbolic links are not followed), or None."""
        node: Node | None = self.root
        for part in _parts(path):
            node = node.children.get(part) if node is not None else None
        return node

    def remove(self, path: str) -> None:
        """Take out what is at ``path``, if anything."""
        *parents, name = _parts(path)
        node = self.get("/" + "/".join(parents))
        if node is not None:
            node.children.pop(name, None)

    def __iter__(self) -> Iterator[tuple[str, Node]]:
        """All paths with their nodes, parents first, in byte order."""
        stack = [("", self.root)]
        while stack:
            path, node = stack.pop()
            yield path or "/", node
            for name in sorted(node.children, key=os.fsencode, reverse=True):
                stack.append((f"{path}/{name}", node.children[name]))

    def total_bytes(self) -> int:
        """Bytes of file contents, hard links counted once."""
        unique = {id(node): node.size for _, node in self if stat.S_ISREG(node.mode)}
        return sum(unique.values())

    def _walk(self, target: Node, source: str, relative: str, keep: Keep | None, directory_mode: int) -> None:
        try:
            with os.scandir(source) as entries:
                found = list(entries)
        except OSError:
            self.skipped.append(source)
            return
        for entry in found:
            path = f"{relative}/{entry.name}" if relative else entry.name
            is_dir = entry.is_dir(follow_symlinks=False)
            if keep is not None and not keep(path, is_dir):
                continue
            if is_dir:
                child = target.children.get(entry.name)
                if child is None or not child.is_dir:
                    child = target.children[entry.name] = directory_node(directory_mode)
                self._walk(child, entry.path, path, keep, directory_mode)
                continue
            try:
                node = self._host_node(entry.path, entry.stat(follow_symlinks=False))
            except OSError:
                self.skipped.append(entry.path)
                continue
            if node is not None:
                target.children[entry.name] = node

    def _host_node(self, source: str, found: os.stat_result) -> Node | None:
        if stat.S_ISLNK(found.st_mode):
            data = os.fsencode(os.readlink(source))
            return Node(stat.S_IFLNK | 0o777, found.st_mtime_ns, data=data, size=len(data))
        if not stat.S_ISREG(found.st_mode):
            return None  # sockets, FIFOs and devices mean nothing in an image
        if found.st_nlink > 1:
            known = self._links.get((found.st_dev, found.st_ino))
            if known is not None:
                return known
        if not os.access(source, os.R_OK):
            self.skipped.append(source)
            return None
        node = Node(stat.S_IFREG | plain_mode(found.st_mode), found.st_mtime_ns, size=found.st_size, source=source)
        if found.st_nlink > 1:
            self._links[found.st_dev, found.st_ino] = node
        return node

    def _dir(self, path: str) -> Node:
        node = self.root
        for part in _parts(path):
            child = node.children.get(part)
            if child is None:
                child = node.children[part] = directory_node()
            elif not child.is_dir:
                raise ValueError(f"{path}: {part} is not a directory in the image")
            node = child
        return node

    def _put(self, path: str, node: Node) -> None:
        *parents, name = _parts(path)
        self._dir("/".join(parents)).children[name] = node


def plain_mode(mode: int) -> int:
    """Permission bits of a regular file in an image: readable by all, writable by its owner only, no set-uid."""
    return 0o755 if mode & 0o111 else 0o644


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]
