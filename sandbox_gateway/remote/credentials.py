"""Tokens of gateways: kept in one private file by address, never in a kernelspec, an argument or a log.

Beside each token stands the file of certificates that the gateway is to be checked with, if it has its own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from sandbox_gateway.errors import storage_error
from sandbox_gateway.remote.address import Address, parse

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
    return _read().get(address.url, {}).get("token") or env.get(VARIABLE, "").strip()


def known(url: str) -> Address:
    """The gateway at ``url``, with the certificates that are kept for it. Raises ``invalid_request``."""
    address = parse(url)
    return replace(address, ca_file=_read().get(address.url, {}).get("ca_file", ""))


def keep(address: Address, secret: str) -> Path:
    """Keep a gateway's token and file of certificates; returns our file. Raises ``data_directory``."""
    entry = {"token": secret} | ({"ca_file": address.ca_file} if address.ca_file else {})
    return _write({**_read(), address.url: entry})


def forget(url: str) -> bool:
    """Forget what is kept for a gateway; returns whether that was anything. Raises ``data_directory``."""
    entries = _read()
    if entries.pop(url, None) is None:
        return False
    _write(entries)
    return True


def _read() -> dict[str, dict[str, str]]:
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
    entries = found.items() if isinstance(found, dict) else ()
    return {
        url: {name: value for name, value in entry.items() if isinstance(value, str)}
        for url, entry in entries
        if isinstance(entry, dict)
    }


def _write(entries: Mapping[str, Mapping[str, str]]) -> Path:
    path = file()
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
            json.dump(entries, stream, indent=1)
        os.replace(fresh, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise storage_error(error, f"cannot write {path}") from error
    return path
