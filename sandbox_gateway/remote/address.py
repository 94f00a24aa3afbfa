"""Where a gateway is, checked once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlencode, urlsplit, urlunsplit

from sandbox_gateway.errors import SandboxGatewayError

_LOCAL = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|::1)\Z")
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Address:
    """A gateway's base URL, in the one form by which tokens are kept. Make it by :func:`parse`."""

    url: str
    """``https://host[:port][/path]``, without a slash at the end."""
    ca_file: str = ""
    """A file of certificates (PEM) to trust in place of the system's; empty: the system's."""

    @property
    def place(self) -> str:
        """Host and port, for people and for names."""
        return urlsplit(self.url).netloc

    @property
    def private(self) -> bool:
        """Whether nobody on the way can read along."""
        parts = urlsplit(self.url)
        return parts.scheme == "https" or _LOCAL.match(parts.hostname or "") is not None

    def http(self, path: str, query: Mapping[str, str] | None = None) -> str:
        """The URL of ``path``, which begins with a slash."""
        return self.url + path + (f"?{urlencode(query)}" if query else "")

    def websocket(self, path: str, query: Mapping[str, str] | None = None) -> str:
        """As :meth:`http`, for a WebSocket."""
        return "ws" + self.http(path, query).removeprefix("http")


def segment(text: str) -> str:
    """``text`` as one segment of a path."""
    return quote(text, safe="")


def parse(url: str, ca_file: str = "") -> Address:
    """Read a gateway's URL as people write it. Raises ``invalid_request``."""
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError as error:
        raise _bad(url, str(error)) from None
    scheme, host = parts.scheme.lower(), (parts.hostname or "").lower()
    if scheme not in _PORTS or not host:
        raise _bad(url, "it begins with https:// or http:// and names a host")
    if parts.username is not None or parts.query or parts.fragment:
        # What is written here ends up in kernelspecs, which are no place for a secret.
        raise _bad(
            url.partition("?")[0].rpartition("@")[2], "give the token by --token-file or --token, not in the URL"
        )
    if re.search(r"[\s%\"'<>\\^`{|}]", host):
        raise _bad(url, "that is no host's name")
    place = f"[{host}]" if ":" in host else host
    if port is not None and port != _PORTS[scheme]:
        place += f":{port}"
    return Address(urlunsplit((scheme, place, parts.path.rstrip("/"), "", "")), ca_file)


def _bad(url: str, why: str) -> SandboxGatewayError:
    text = f"{url!r} is not a gateway's address: {why}"
    return SandboxGatewayError("invalid_request", text, "For example: https://gateway.example.org:8888")
