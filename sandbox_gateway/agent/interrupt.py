"""The one Jupyter message that the agent makes itself; imported only where it is needed, for a short start."""

from __future__ import annotations

import hashlib
import hmac
import json
import uuid
from datetime import UTC, datetime

from sandbox_gateway.agent.relay import DELIMITER


def interrupt_request(key: str) -> list[bytes]:
    """A signed ``interrupt_request`` (Jupyter's messaging protocol 5.3) without identities in front."""
    header = {
        "msg_id": uuid.uuid4().hex,
        "msg_type": "interrupt_request",
        "username": "sandbox",
        "session": "agent",
        "date": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
        "version": "5.3",
    }
    frames = [json.dumps(header).encode(), b"{}", b"{}", b"{}"]
    digest = hmac.new(key.encode(), b"".join(frames), hashlib.sha256).hexdigest() if key else ""
    return [DELIMITER, digest.encode(), *frames]
