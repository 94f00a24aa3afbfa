"""Reads an EROFS image back, written from the kernel's documentation and independently of the writer."""

from __future__ import annotations

import stat
import struct
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """One inode, as the image says."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    links: int
    nid: int
    content: bytes
    """Of a file; of a link its target; empty for a directory."""


class Image:
    def __init__(self, path: Path) -> None:
        self.raw = path.read_bytes()
        magic, _, _, bits, _, root = struct.unpack_from("<IIIBBH", self.raw, 1024)
        blocks, self.meta, _ = struct.unpack_from("<III", self.raw, 1024 + 36)
        assert magic == 0xE0F5E1E2 and bits == 12
        assert blocks * 4096 == len(self.raw)
        self.root = root

    def entries(self) -> dict[str, Entry]:
        """All paths ("/" is the root) with what is there."""
        found: dict[str, Entry] = {}
        self._walk(self.root, "", found)
        return found

    def _walk(self, nid: int, path: str, found: dict[str, Entry]) -> None:
        entry, data = self._inode(nid)
        found[path or "/"] = entry
        if not stat.S_ISDIR(entry.mode):
            return
        names: list[bytes] = []
        for at in range(0, len(data), 4096):
            block = data[at : at + 4096]
            count = struct.unpack_from("<H", block, 8)[0] // 12
            items = [struct.unpack_from("<QHB", block, i * 12) for i in range(count)]
            ends = [item[1] for item in items[1:]] + [len(block)]
            for (child, offset, kind), end in zip(items, ends, strict=True):
                name = block[offset:end].rstrip(b"\0")
                names.append(name)
                mode = self._inode(child)[0].mode
                assert kind == {stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFLNK: 7}[stat.S_IFMT(mode)]
                if name not in (b".", b".."):
                    self._walk(child, f"{path}/{name.decode(errors='surrogateescape')}", found)
        assert names == sorted(names), "entries are looked up by binary search"
        assert {b".", b".."} <= set(names)

    def _inode(self, nid: int) -> tuple[Entry, bytes]:
        at = self.meta * 4096 + nid * 32
        form, _, mode, _, size, block, _, uid, gid, seconds, nanoseconds, links = struct.unpack_from(
            "<HHHHQIIIIQII", self.raw, at
        )
        assert form & 1 == 1, "extended inodes only"
        start = at + 64 if form >> 1 == 2 else block * 4096
        if form >> 1 == 2:
            assert at // 4096 == (at + 63 + size) // 4096, "inline data stays in its block"
        data = self.raw[start : start + size]
        assert len(data) == size
        content = b"" if stat.S_ISDIR(mode) else data
        return Entry(mode, uid, gid, seconds * 10**9 + nanoseconds, links, nid, content), data


def read(path: Path | str) -> dict[str, Entry]:
    """All entries of the image at ``path``."""
    return Image(Path(path)).entries()
