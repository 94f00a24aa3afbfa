"""Joining the stream messages that wait for a client which reads more slowly than the kernel prints.

A flushed line is a message of some 700 bytes around a few characters. Those that would wait in a queue anyway are made
one, as if the kernel had flushed less often: nothing is lost, a client catches up in a fraction of the time, and a
queue's bound is reached a hundred times later. Front ends join adjacent stream messages in the same way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from sandbox_gateway import messages
from sandbox_gateway.messages import Buffer

MAX_RUN: Final = 256 << 10
"""Bytes of text in one message that was made of several."""
_PIECES: Final = 256
_MAX_PIECE: Final = 64 << 10
_MAX_HEADER: Final = 16 << 10
_STREAM = re.compile(rb'"msg_type"\s*:\s*"stream"')


@dataclass(frozen=True, slots=True)
class StreamText:
    """One stream message, read."""

    topic: bytes
    header: bytes
    parent: bytes
    metadata: bytes
    name: str
    text: str
    size: int
    """Bytes of the text in UTF-8."""


def read(parts: Sequence[Buffer]) -> StreamText | None:
    """``parts`` as a stream message that may be joined with its neighbours; None for anything else."""
    if len(parts) != 7 or parts[1] != messages.DELIMITER:
        return None
    topic, _, _, header, parent, metadata, content = parts
    if len(content) > _MAX_PIECE or len(header) + len(parent) + len(metadata) > _MAX_HEADER:
        return None
    if _STREAM.search(header) is None:
        return None
    try:
        found = json.loads(bytes(content))
        if not isinstance(found, dict) or found.keys() != {"name", "text"}:
            return None
        name, text = found["name"], found["text"]
        if not isinstance(name, str) or not isinstance(text, str):
            return None
        # Half a surrogate pair is no text: such a message is not joined with anything.
        size = len(text.encode())
    except (ValueError, RecursionError):
        return None
    return StreamText(bytes(topic), bytes(header), bytes(parent), bytes(metadata), name, text, size)


@dataclass(slots=True)
class StreamRun:
    """Adjacent stream messages of one request and one stream, under the header of the first."""

    first: StreamText
    count: int = 1
    """Messages that were joined."""
    size: int = 0
    """Bytes, about, of the message that this becomes."""
    _texts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        first = self.first
        self._texts.append(first.text)
        self.size = first.size + len(first.topic) + len(first.header) + len(first.parent) + len(first.metadata)

    @property
    def head(self) -> tuple[bool, bytes]:
        """Whether it may be left out, and the raw header of the request it belongs to."""
        return True, self.first.parent

    def takes(self, other: StreamText) -> bool:
        """Whether ``other``, which comes right after, can be joined."""
        first = self.first
        return (
            self.size + other.size <= MAX_RUN
            and other.parent == first.parent
            and other.name == first.name
            and other.topic == first.topic
            and other.metadata == first.metadata
        )

    def add(self, other: StreamText) -> None:
        """Join ``other``."""
        self._texts.append(other.text)
        if len(self._texts) > _PIECES:
            # A string of a few characters takes ten times its length.
            self._texts = ["".join(self._texts)]
        self.size += other.size
        self.count += 1

    def parts(self, key: bytes) -> list[Buffer]:
        """The message, signed."""
        first = self.first
        content = json.dumps({"name": first.name, "text": "".join(self._texts)}, ensure_ascii=False).encode()
        body: list[Buffer] = [first.header, first.parent, first.metadata, content]
        return [first.topic, messages.DELIMITER, messages.sign(key, body), *body]
