"""Writes EROFS images: uncompressed, deterministic, straight from a :class:`~sandbox_gateway.images.tree.Tree`.

Why not ``mkfs.erofs``: it wants a staged copy to change owners and modes, is absent from a machine that has only
Python, writes extended attributes that gVisor refuses, and differs between versions, so that the same tree has
another digest elsewhere. The uncompressed format is small. Source of the contract: the kernel's
``Documentation/filesystems/erofs.rst`` and ``fs/erofs/erofs_fs.h``, and gVisor's ``pkg/erofs``, which reads only plain
and tail-inline layouts and maps regular files, whose content must therefore begin at a block ("noinline_data").
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from sandbox_gateway.images.tree import FIXED_TIME_NS, Node, Tree

BLOCK = 4096
_MAGIC = 0xE0F5E1E2
_SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sIHHH38x")
_SUPER_OFFSET = 1024
_INODE = struct.Struct("<HHHHQIIIIQII16x")
_DIRENT = struct.Struct("<QHBx")
_FIRST_INODE = _SUPER_OFFSET + _SUPERBLOCK.size
_EXTENDED_PLAIN, _EXTENDED_INLINE = 1, 1 | 2 << 1
_COMPAT_MTIME = 2
_TYPES = {stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFLNK: 7}
_BUFFER = 4 << 20


class SourceChanged(Exception):
    """A host file changed or vanished between the walk and the copy; building again may succeed."""


@dataclass(frozen=True, slots=True)
class Written:
    """What :func:`write_image` made."""

    digest: str
    """``sha256:...`` of the file."""
    size: int
    """Bytes."""
    inodes: int


@dataclass(slots=True)
class _Placed:
    node: Node
    number: int
    nid: int
    inline: bool
    parent: int
    """Index of the parent directory (of the first name)."""
    block: int = 0
    size: int = 0
    links: int = 1
    body: bytes = b""


def write_image(fd: int, tree: Tree, progress: Callable[[int, int], None] | None = None) -> Written:
    """Write ``tree`` to the empty file ``fd`` and return its digest.

    ``progress`` is called with the bytes written so far and the total. Raises :class:`SourceChanged`, and OSError
    (``ENOSPC`` included) from the writes.
    """
    placed, meta_end = _place(tree)
    block = meta_end // BLOCK
    with_data = [item for item in placed if item.size and not item.inline]
    for item in with_data:
        item.block = block
        block += -(-item.size // BLOCK)
    out = _Output(fd, block * BLOCK, progress)
    try:
        out.add(_metadata(placed, meta_end, block))
        for item in with_data:
            if item.node.source is None:
                out.add(item.body)
            else:
                _copy(item, out)
            out.pad()
        out.flush()
    finally:
        out.close()
    return Written(f"sha256:{out.hash.hexdigest()}", block * BLOCK, len(placed))


def _place(tree: Tree) -> tuple[list[_Placed], int]:
    """Give every inode its place in the metadata area; directories and generated contents get their bodies."""
    order: list[_Placed] = []
    known: dict[int, _Placed] = {}
    offset = _FIRST_INODE
    stack: list[tuple[Node, int]] = [(tree.root, 0)]
    while stack:
        node, parent = stack.pop()
        if id(node) in known:
            known[id(node)].links += 1
            continue
        inline = stat.S_ISLNK(node.mode) and _INODE.size + len(node.data) <= BLOCK
        length = _INODE.size + (len(node.data) if inline else 0)
        if offset % BLOCK + length > BLOCK:
            offset = _round_up(offset, BLOCK)
        item = _Placed(node, len(order) + 1, offset // 32, inline, parent, size=node.size, body=node.data)
        known[id(node)] = item
        order.append(item)
        offset = _round_up(offset + length, _INODE.size)
        names = sorted(node.children, key=os.fsencode, reverse=True)
        stack.extend((node.children[name], item.number - 1) for name in names)
    for item in order:
        if item.node.is_dir:
            item.body = _directory(item, order[item.parent], known)
            item.size = len(item.body)
            item.links = 2 + sum(child.is_dir for child in item.node.children.values())
    # Directories come before file contents, so that what a walk touches lies together.
    order.sort(key=lambda item: item.node.source is not None)
    return order, _round_up(offset, BLOCK)


def _directory(item: _Placed, parent: _Placed, known: dict[int, _Placed]) -> bytes:
    """Encode a directory: per block the entries, then their names, sorted by bytes over the whole directory."""
    entries = [(b".", item.nid, 2), (b"..", parent.nid, 2)]
    for name, child in item.node.children.items():
        entries.append((os.fsencode(name), known[id(child)].nid, _TYPES[stat.S_IFMT(child.mode)]))
    entries.sort()
    blocks: list[bytes] = []
    group: list[tuple[bytes, int, int]] = []
    used = 0
    for entry in entries:
        need = _DIRENT.size + len(entry[0])
        if used + need > BLOCK:
            blocks.append(_directory_block(group).ljust(BLOCK, b"\0"))
            group, used = [], 0
        group.append(entry)
        used += need
    blocks.append(_directory_block(group))
    return b"".join(blocks)


def _directory_block(entries: list[tuple[bytes, int, int]]) -> bytes:
    offset = len(entries) * _DIRENT.size
    head = bytearray()
    for name, nid, kind in entries:
        head += _DIRENT.pack(nid, offset, kind)
        offset += len(name)
    return bytes(head) + b"".join(name for name, _, _ in entries)


def _metadata(placed: list[_Placed], meta_end: int, blocks: int) -> bytes:
    area = bytearray(meta_end)
    for item in placed:
        node, at = item.node, item.nid * 32
        seconds, nanoseconds = divmod(max(node.mtime_ns, 0), 10**9)
        layout = _EXTENDED_INLINE if item.inline else _EXTENDED_PLAIN
        area[at : at + _INODE.size] = _INODE.pack(
            layout,
            0,
            node.mode,
            0,
            item.size,
            item.block,
            item.number,
            node.uid,
            node.gid,
            seconds,
            nanoseconds,
            item.links,
        )
        if item.inline:
            area[at + _INODE.size : at + _INODE.size + item.size] = item.body
    uuid = hashlib.sha256(area).digest()[:16]
    root = placed[0].nid
    seconds = FIXED_TIME_NS // 10**9
    area[_SUPER_OFFSET:_FIRST_INODE] = _SUPERBLOCK.pack(
        _MAGIC, 0, _COMPAT_MTIME, 12, 0, root, len(placed), seconds, 0, blocks, 0, 0, uuid, b"", 0, 0, 0, 0
    )
    return bytes(area)


class _Output:
    """Gathers small pieces into large writes; a second thread hashes one buffer while the other is filled."""

    def __init__(self, fd: int, total: int, progress: Callable[[int, int], None] | None) -> None:
        self.hash = hashlib.sha256()
        self.position = 0
        self._fd, self._total, self._progress = fd, total, progress
        self._views = [memoryview(bytearray(_BUFFER)) for _ in range(2)]
        self._view = self._views[0]
        self._used = 0
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="image-hash")
        self._hashing: Future[None] | None = None

    def room(self) -> memoryview:
        """The free part of the buffer, never empty."""
        if self._used == _BUFFER:
            self.flush()
        return self._view[self._used :]

    def took(self, count: int) -> None:
        """``count`` bytes were put into :meth:`room`."""
        self._used += count
        self.position += count

    def add(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            room = self.room()
            part = view[: len(room)]
            room[: len(part)] = part
            self.took(len(part))
            view = view[len(part) :]

    def pad(self) -> None:
        """Zeros up to the next block."""
        if self.position % BLOCK:
            self.add(bytes(BLOCK - self.position % BLOCK))

    def flush(self) -> None:
        view = self._view[: self._used]
        if self._hashing is not None:
            self._hashing.result()  # the other buffer is free now
        self._hashing = self._hasher.submit(self.hash.update, view)
        while view:
            view = view[os.write(self._fd, view) :]
        self._views.reverse()
        self._view = self._views[0]
        self._used = 0
        if self._progress is not None:
            self._progress(self.position, self._total)

    def close(self) -> None:
        """Wait for the hash; must be called on every way out."""
        self._hasher.shutdown()


def _copy(item: _Placed, out: _Output) -> None:
    source = item.node.source
    assert source is not None
    try:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise SourceChanged(f"{source}: {error.strerror}") from error
    try:
        left = item.size
        while left:
            room = out.room()[:left]
            count = os.readv(fd, [room])
            if count == 0:
                raise SourceChanged(f"{source} became shorter while it was read")
            out.took(count)
            left -= count
        if os.fstat(fd).st_mtime_ns != item.node.mtime_ns:
            raise SourceChanged(f"{source} changed while it was read")
    finally:
        os.close(fd)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
