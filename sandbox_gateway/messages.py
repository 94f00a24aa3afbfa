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
from datetime import UTC, datetime
from typing import Any, Final

DELIMITER: Final = b"<IDS|MSG>"
PROTOCOL_VERSION: Final = "5.3"
EMPTY: Final = b"{}"

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
) -> list[Buffer]:
    """One signed message; ``parent`` is the raw JSON of the parent's header."""
    header = {
        "msg_id": uuid.uuid4().hex,
        "msg_type": msg_type,
        "username": "sandbox_gateway",
        "session": session,
        "date": datetime.now(UTC).isoformat(),
        "version": PROTOCOL_VERSION,
    }
    body: list[Buffer] = [_dumps(header), parent, EMPTY, _dumps(content)]
    return [topic, DELIMITER, sign(key, body), *body]


def stderr_notice(key: bytes, text: str, *, parent: Buffer = EMPTY) -> list[Buffer]:
    """A line for people, on the kernel's stderr stream."""
    return build(key, "stream", {"name": "stderr", "text": text}, topic=b"stream.stderr", parent=parent)


def delimiter_index(parts: Sequence[Buffer]) -> int | None:
    """Where ``<IDS|MSG>`` stands when at least signature, header, parent, metadata and content follow it."""
    for index, part in enumerate(parts):
        if part == DELIMITER:
            return index if len(parts) >= index + 6 else None
    return None


def _dumps(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
