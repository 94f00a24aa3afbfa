"""Jupyter messages that the host itself writes: notices and the like.

Everything else on a kernel's channels passes through unparsed. The format is the Jupyter messaging protocol 5.3 as
``jupyter_client.session.Session`` serialises it: ``[topic, <IDS|MSG>, signature, header, parent, metadata, content]``.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

DELIMITER: Final = b"<IDS|MSG>"
PROTOCOL_VERSION: Final = "5.3"
EMPTY: Final = b"{}"
MAX_HEADER: Final = 64 << 10
"""Bytes of a request's header that are parsed at most; real ones have some hundred."""
MAX_TYPE: Final = 128
"""Characters of a message type that the host looks at at most."""

Buffer = bytes | memoryview


def sign(key: bytes, parts: Sequence[Buffer]) -> bytes:
    """The HMAC-SHA256 signature of header, parent, metadata and content; empty for an empty key."""
    if not key:
        return b""
    digest = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        digest.update(part)
    return digest.hexdigest().encode()


def build(
    key: bytes,
    msg_type: str,
    content: Mapping[str, Any],
    *,
    topic: bytes = b"",
    parent: Buffer = EMPTY,
    session: str = "",
    msg_id: str = "",
) -> list[Buffer]:
    """One signed message; ``parent`` is the raw JSON of the parent's header, ``msg_id`` a new one unless given."""
    return compose(key, [topic], msg_type, _dumps(content), parent=parent, session=session, msg_id=msg_id)


def compose(
    key: bytes,
    prefix: Sequence[Buffer],
    msg_type: str,
    content: Buffer,
    *,
    parent: Buffer = EMPTY,
    session: str = "",
    msg_id: str = "",
) -> list[Buffer]:
    """As :func:`build`, with the frames in front of the delimiter and the raw JSON of the content."""
    header = {
        "msg_id": msg_id or uuid.uuid4().hex,
        "msg_type": msg_type,
        "username": "sandbox_gateway",
        "session": session,
        "date": datetime.now(UTC).isoformat(),
        "version": PROTOCOL_VERSION,
    }
    body: list[Buffer] = [_dumps(header), parent, EMPTY, content]
    return [*prefix, DELIMITER, sign(key, body), *body]


def stderr_notice(key: bytes, text: str, *, parent: Buffer = EMPTY) -> list[Buffer]:
    """A line for people, on the kernel's stderr stream."""
    return build(key, "stream", {"name": "stderr", "text": text}, topic=b"stream.stderr", parent=parent)


def delimiter_index(parts: Sequence[Buffer]) -> int | None:
    """Where ``<IDS|MSG>`` stands when at least signature, header, parent, metadata and content follow it."""
    for index, part in enumerate(parts):
        if part == DELIMITER:
            return index if len(parts) >= index + 6 else None
    return None


@dataclass(frozen=True, slots=True)
class Request:
    """A client's message as far as the host reads it."""

    msg_type: str
    identities: tuple[Buffer, ...]
    """The frames that lead an answer back to the client."""
    header: bytes
    content: Buffer

    @property
    def reply_type(self) -> str | None:
        """The type of its reply; None for a message that has none."""
        stem = self.msg_type.removesuffix("_request")
        return f"{stem}_reply" if stem != self.msg_type else None


def read_request(key: bytes, parts: Sequence[Buffer]) -> Request | None:
    """``parts`` as a request; None when a kernel would not take it either: malformed, or not signed with ``key``.

    Only the header is parsed, and only up to :data:`MAX_HEADER` bytes.
    """
    at = delimiter_index(parts)
    if at is None or len(parts[at + 2]) > MAX_HEADER:
        return None
    if key and not hmac.compare_digest(bytes(parts[at + 1]), sign(key, parts[at + 2 : at + 6])):
        return None
    header = bytes(parts[at + 2])
    try:
        found = json.loads(header)
    except (ValueError, RecursionError):
        return None
    msg_type = found.get("msg_type") if isinstance(found, dict) else None
    if not isinstance(msg_type, str) or len(msg_type) > MAX_TYPE:
        return None
    return Request(msg_type, tuple(parts[:at]), header, parts[at + 5])


def _dumps(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
