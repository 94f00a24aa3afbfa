"""The Jupyter messages that the agent makes itself; imported only where they are needed, for a short start.

SHA-256 comes from the interpreter where that can be: ``hashlib`` would load OpenSSL into each sandbox's PID 1.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final

from sandbox_gateway.agent.relay import DELIMITER

_MAX_REPLY: Final = 1024 * 1024
_BLOCK: Final = 64
_INNER: Final = bytes(value ^ 0x36 for value in range(256))
_OUTER: Final = bytes(value ^ 0x5C for value in range(256))


def _sha256() -> Any:
    for name in ("_sha2", "_sha256", "hashlib"):
        try:
            return import_module(name).sha256
        except (ImportError, AttributeError):
            continue
    raise ImportError("this interpreter has no SHA-256")


sha256: Final = _sha256()


def hmac_sha256(key: bytes, data: bytes) -> str:
    """RFC 2104, in hexadecimal."""
    block = (sha256(key).digest() if len(key) > _BLOCK else key).ljust(_BLOCK, b"\0")
    inner = sha256(block.translate(_INNER) + data).digest()
    digest: str = sha256(block.translate(_OUTER) + inner).hexdigest()
    return digest


def signed_request(key: str, msg_type: str, content: Mapping[str, Any]) -> tuple[str, list[bytes]]:
    """The id and the parts of a signed request (Jupyter's messaging protocol 5.3) without identities in front."""
    msg_id = os.urandom(16).hex()
    header = {
        "msg_id": msg_id,
        "msg_type": msg_type,
        "username": "sandbox",
        "session": "agent",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "version": "5.3",
    }
    frames = [json.dumps(header).encode(), b"{}", b"{}", json.dumps(content).encode()]
    digest = hmac_sha256(key.encode(), b"".join(frames)) if key else ""
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
