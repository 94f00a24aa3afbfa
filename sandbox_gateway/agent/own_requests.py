"""The Jupyter messages that the agent makes itself; imported only where they are needed, for a short start."""

from __future__ import annotations

import hashlib
import hmac
import json
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from sandbox_gateway.agent.relay import DELIMITER

_MAX_REPLY: Final = 1024 * 1024


def signed_request(key: str, msg_type: str, content: Mapping[str, Any]) -> tuple[str, list[bytes]]:
    """The id and the parts of a signed request (Jupyter's messaging protocol 5.3) without identities in front."""
    msg_id = uuid.uuid4().hex
    header = {
        "msg_id": msg_id,
        "msg_type": msg_type,
        "username": "sandbox",
        "session": "agent",
        "date": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
        "version": "5.3",
    }
    frames = [json.dumps(header).encode(), b"{}", b"{}", json.dumps(content).encode()]
    digest = hmac.new(key.encode(), b"".join(frames), hashlib.sha256).hexdigest() if key else ""
    return msg_id, [DELIMITER, digest.encode(), *frames]


def answered(parts: list[bytes]) -> tuple[str, dict[str, Any]]:
    """Whose request a reply of the kernel's answers, and its content; empty if it makes no sense."""
    if sum(map(len, parts)) > _MAX_REPLY:
        return "", {}
    try:
        parent, content = json.loads(parts[3]), json.loads(parts[5])
        msg_id = parent["msg_id"]
    except (IndexError, KeyError, TypeError, ValueError, RecursionError):
        return "", {}
    return (msg_id, content) if isinstance(msg_id, str) and isinstance(content, dict) else ("", {})
