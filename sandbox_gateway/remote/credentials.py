"""Tokens of gateways: kept in one private file by address, never in a kernelspec, an argument or a log."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from sandbox_gateway.errors import storage_error
from sandbox_gateway.remote.address import Address

log = logging.getLogger(__name__)

VARIABLE: Final = "SANDBOX_GATEWAY_TOKEN"
"""Names a token for the gateways that have none in the file."""
FILE: Final = "sandbox_gateway_tokens.json"


def file() -> Path:
    """The file, in this user's Jupyter configuration directory."""
    from jupyter_core.paths import jupyter_config_dir

    return Path(jupyter_config_dir()) / FILE


def token(address: Address, environment: Mapping[str, str] | None = None) -> str:
    """The token for a gateway; empty when there is none.

    What is kept for this very gateway comes first: the variable may be meant for another one, which is not this one's
    to know.
    """
    env = os.environ if environment is None else environment
    return _read().get(address.url) or env.get(VARIABLE, "").strip()


def keep(address: Address, secret: str) -> Path:
    """Keep a gateway's token; returns the file. Raises ``data_directory``."""
    return _write({**_read(), address.url: secret})


def forget(address: Address) -> bool:
    """Forget a gateway's token; returns whether there was one. Raises ``data_directory``."""
    known = _read()
    if known.pop(address.url, None) is None:
        return False
    _write(known)
    return True


def _read() -> dict[str, str]:
    path = file()
    try:
        if os.name == "posix" and path.stat().st_mode & 0o077:
            log.warning("%s could be read by others; it is private again now", path)
            path.chmod(0o600)
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read: %s", path, error)
        return {}
    if not isinstance(found, dict):
        return {}
    return {url: secret for url, secret in found.items() if isinstance(secret, str)}


def _write(known: Mapping[str, str]) -> Path:
    path = file()
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
            json.dump(dict(known), stream, indent=1)
        os.replace(fresh, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise storage_error(error, f"cannot write {path}") from error
    return path
