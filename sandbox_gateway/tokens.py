"""The users of a gateway: a file of hashed tokens, and changing it.

One line of JSON for each token, lines that begin with ``#`` aside::

    {"id": "9f2c41d07ab3", "name": "ann", "hash": "sha256:...", "groups": ["lab"], "admin": false,
     "quota": {"live": 4}, "created": 1767225600, "expires": null, "label": "laptop"}

A user is a name; he may have several tokens (one for each of his machines), each with its own groups, rights and end.
His quota is that of the last of his lines that has one.

A token is 256 random bits, of which the file has the SHA-256. A slow hash (argon2, bcrypt) protects what people choose,
because that can be guessed; nobody can try 2**256 tokens however fast the hash is, and a slow one would
cost each request (a token comes with every one of them) tens of milliseconds of processor time.

The file is private to its user (mode 0600), and whoever finds it otherwise refuses it: who can write it is everybody.
Changes are made under a lock and replace the file as a whole, so that a reader never sees half of one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from sandbox_gateway.errors import SandboxGatewayError, storage_error
from sandbox_gateway.quotas import Quota

log = logging.getLogger(__name__)

FILE_NAME: Final = "tokens.jsonl"
"""In the installation's data directory, unless another place is configured."""
PREFIX: Final = "sgt_"
"""The beginning of each token: scanners for leaked secrets find it, and it is never taken for an option."""
MAX_FILE: Final = 16 << 20
"""Bytes; a longer file is refused."""
_BITS = 256
_ID = 12
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,99}")
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_HEADER = "# The users of this gateway: see `jupyter sandbox token --help`. Tokens are here as hashes only.\n"


@dataclass(frozen=True, slots=True)
class Token:
    """One line of the file."""

    id: str
    """Names the token where the secret itself must not appear: in lists, logs and login cookies."""
    name: str
    """The user."""
    hash: str
    """``sha256:`` and the hash in hexadecimal."""
    groups: tuple[str, ...] = ()
    admin: bool = False
    quota: Quota | None = None
    """None: the gateway's default holds."""
    created: float = 0.0
    """Seconds since the epoch."""
    expires: float | None = None
    """Seconds since the epoch; None: never."""
    label: str = ""
    """For people."""

    def expired(self, now: float) -> bool:
        """Whether it counts no more at ``now`` (seconds since the epoch)."""
        return self.expires is not None and now >= self.expires

    def as_dict(self) -> dict[str, Any]:
        """JSON form as in the file."""
        return {**self.public_dict(), "hash": self.hash}

    def public_dict(self) -> dict[str, Any]:
        """JSON form without the hash, for lists."""
        return {
            "id": self.id,
            "name": self.name,
            "groups": list(self.groups),
            "admin": self.admin,
            "quota": None if self.quota is None else self.quota.as_dict(),
            "created": self.created,
            "expires": self.expires,
            "label": self.label,
        }


def hashed(secret: str) -> str:
    """What the file has of a token."""
    return "sha256:" + hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class TokenList:
    """What a file said at one moment."""

    tokens: tuple[Token, ...] = ()
    _by_hash: Mapping[str, Token] = field(default_factory=dict, repr=False)
    _by_id: Mapping[str, Token] = field(default_factory=dict, repr=False)
    _quotas: Mapping[str, Quota] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, tokens: Sequence[Token]) -> TokenList:
        """An indexed list."""
        quotas = {it.name: it.quota for it in tokens if it.quota is not None}
        return cls(
            tuple(tokens),
            MappingProxyType({it.hash: it for it in tokens}),
            MappingProxyType({it.id: it for it in tokens}),
            MappingProxyType(quotas),
        )

    def find(self, secret: str, now: float) -> Token | None:
        """The token that ``secret`` is, if it counts at ``now``.

        How long this takes says nothing about the tokens: what is looked up is the hash of what came, and nobody can
        choose a text by its hash's beginning and learn anything of a secret from it.
        """
        digest = hashed(secret)
        found = self._by_hash.get(digest)
        if found is None or not hmac.compare_digest(found.hash, digest) or found.expired(now):
            return None
        return found

    def get(self, token_id: str, now: float) -> Token | None:
        """The token of this id, if it counts at ``now``."""
        found = self._by_id.get(token_id)
        return None if found is None or found.expired(now) else found

    def quota(self, name: str) -> Quota | None:
        """The quota of a user, None where no line has one."""
        return self._quotas.get(name)


Signature = tuple[int, ...]
"""Of a file at one moment: differs when the file was changed."""


class TokenFile:
    """The file at ``path``. Any process may read and change it at the same time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def signature(self) -> Signature | None:
        """Changes when the file does; None where there is none, or it cannot be looked at."""
        try:
            return _signature(os.stat(self.path))
        except OSError:
            return None

    def read(self) -> tuple[TokenList, Signature | None]:
        """What it says; an empty list where there is no file.

        Raises ``data_directory`` when it cannot be read or is not private, ``store_failed`` when a line is wrong: half
        of the users would be worse than none, for the missing half might be what was revoked.
        """
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return TokenList(), None
        except OSError as error:
            raise storage_error(error, f"{self.path} cannot be read") from error
        try:
            found = os.fstat(fd)
            self._private(found)
            with open(fd, "rb", closefd=False) as stream:
                content = stream.read(MAX_FILE + 1)
        except OSError as error:
            raise storage_error(error, f"{self.path} cannot be read") from error
        finally:
            os.close(fd)
        return TokenList.of(self._parse(content)), _signature(found)

    def add(
        self,
        name: str,
        now: float,
        *,
        groups: Sequence[str] = (),
        admin: bool = False,
        quota: Quota | None = None,
        expires: float | None = None,
        label: str = "",
    ) -> tuple[Token, str]:
        """Make a token for user ``name`` at ``now`` (seconds since the epoch); returns it and the secret.

        The secret is nowhere else. Raises ``invalid_request`` for a name that cannot be one, and as :meth:`read`.
        """
        for what, given in (("user's", name), *(("group's", group) for group in groups)):
            if not _NAME.fullmatch(given):
                hint = "Use up to 100 letters, digits and . _ @ + -, beginning with a letter or a digit."
                raise SandboxGatewayError("invalid_request", f"not a {what} name: {given!r}", hint)
        secret = PREFIX + secrets.token_urlsafe(_BITS // 8)
        digest = hashed(secret)
        label = "".join(each if each.isprintable() else " " for each in label)[:200].strip()
        token = Token(
            digest.removeprefix("sha256:")[:_ID],
            name,
            digest,
            tuple(dict.fromkeys(groups)),
            admin,
            quota,
            round(now, 3),
            None if expires is None else round(expires, 3),
            label,
        )
        self._change(lambda tokens: [*tokens, token])
        return token, secret

    def remove(self, which: str) -> tuple[Token, ...]:
        """Remove the token of the id ``which``, or all tokens of the user of that name; returns them."""
        removed: list[Token] = []

        def without(tokens: Sequence[Token]) -> list[Token]:
            removed[:] = [it for it in tokens if it.id == which] or [it for it in tokens if it.name == which]
            return [it for it in tokens if it not in removed]

        self._change(without)
        return tuple(removed)

    def _change(self, change: Callable[[Sequence[Token]], Sequence[Token]]) -> None:
        try:
            with self._locked():
                before = self.read()[0].tokens
                after = change(before)
                if list(after) != list(before):
                    self._write(after)
        except OSError as error:
            raise storage_error(error, f"{self.path} cannot be written") from error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Not on the file itself: that is another one after each change."""
        path = self.path.with_name(self.path.name + ".lock")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _write(self, tokens: Sequence[Token]) -> None:
        lines = [json.dumps(it.as_dict(), separators=(", ", ": ")) + "\n" for it in tokens]
        target = Path(os.path.realpath(self.path))
        fresh = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "w", encoding="ascii") as stream:
                stream.writelines([_HEADER, *lines])
                stream.flush()
                os.fsync(fd)
            os.replace(fresh, target)
        except BaseException:
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)  # a user who was told that a token is gone must not see it again after a power cut
        finally:
            os.close(directory)

    def _private(self, found: os.stat_result) -> None:
        if not stat.S_ISREG(found.st_mode):
            raise SandboxGatewayError("data_directory", f"{self.path} is not a file", "Remove it.")
        if found.st_uid not in (os.geteuid(), 0):
            hint = f"`chown` it to the gateway's user after you have made sure of what is in it: {self.path}."
            raise SandboxGatewayError("data_directory", f"{self.path} belongs to another user", hint)
        if stat.S_IMODE(found.st_mode) & 0o077:
            hint = f"Run `chmod 600 {self.path}` after you have made sure that nobody has changed it."
            raise SandboxGatewayError("data_directory", f"{self.path} is open to other users", hint)

    def _parse(self, content: bytes) -> list[Token]:
        if len(content) > MAX_FILE:
            raise SandboxGatewayError("store_failed", f"{self.path} is longer than {MAX_FILE} bytes")
        tokens: list[Token] = []
        seen: set[str] = set()
        for number, line in enumerate(content.split(b"\n"), 1):
            if not line.strip() or line.lstrip().startswith(b"#"):
                continue
            try:
                token = _token(json.loads(line, parse_constant=_no_constant))
                if not seen.isdisjoint((token.id, token.hash)):
                    raise ValueError("a second token of this id or hash")
            except (ValueError, RecursionError, SandboxGatewayError) as error:
                reason = error.message if isinstance(error, SandboxGatewayError) else str(error) or "not JSON"
                hint = "Correct or remove that line; until then nobody gets in. `jupyter sandbox token ls` checks it."
                raise SandboxGatewayError("store_failed", f"{self.path}:{number}: {reason}", hint) from error
            seen |= {token.id, token.hash}
            tokens.append(token)
        return tokens


def _signature(found: os.stat_result) -> Signature:
    # The time of the last change of the inode too: it is not set by hand, and changes with the mode.
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


_KINDS: Final[Mapping[str, tuple[type, ...]]] = {
    "id": (str,),
    "name": (str,),
    "hash": (str,),
    "groups": (list,),
    "admin": (bool,),
    "quota": (dict, type(None)),
    "created": (int, float),
    "expires": (int, float, type(None)),
    "label": (str,),
}


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")  # an end that is not a number would never come


def _token(data: Any) -> Token:
    """A checked line; raises ValueError or ``invalid_request``. No reason shows what a line says: it could be a secret
    that somebody wrote into the wrong place."""
    if not isinstance(data, dict):
        raise ValueError("not a JSON object")
    unknown = [key for key in data if key not in _KINDS]
    if unknown:
        raise ValueError(f"{len(unknown)} unknown keys; known are {', '.join(_KINDS)}")
    for key, value in data.items():
        if not isinstance(value, _KINDS[key]) or (isinstance(value, bool) and key != "admin"):
            raise ValueError(f"{key} has a wrong type")
        if isinstance(value, int | float) and not abs(value) < 1e15:
            raise ValueError(f"{key} is no time in seconds since the epoch")
    groups = data.get("groups", [])
    if not all(isinstance(group, str) and _NAME.fullmatch(group) for group in groups):
        raise ValueError("groups are names of letters, digits and . _ @ + -")
    for key, form in (("name", _NAME), ("hash", _HASH), ("id", _NAME)):
        if not form.fullmatch(data.get(key, "")):
            raise ValueError(f"{key} is missing or not well-formed")
    quota = data.get("quota")
    return Token(**{**data, "groups": tuple(groups), "quota": None if quota is None else Quota.read(quota)})


class TokenWatch:
    """The users as the file says now: it is read again whenever it has changed. Use it on one thread."""

    def __init__(self, file: TokenFile) -> None:
        self.file = file
        self._read: tuple[Signature, TokenList] | None = None
        self._told = ""

    def current(self) -> TokenList:
        """What the file says now; nobody, and one error in the log, where it cannot be used."""
        signature = self.file.signature()
        if self._read is not None and signature == self._read[0]:
            return self._read[1]
        try:
            tokens, signature = self.file.read()
        except SandboxGatewayError as error:
            self._tell(f"nobody can log in: {error.message}. {error.hint}")
            # A line stays wrong until the file changes; whatever else it was may be over at the next look.
            self._read = (signature, TokenList()) if signature is not None and error.code == "store_failed" else None
            return TokenList()
        if signature is None:
            self._read = None
            self._tell(
                f"nobody can log in: there is no {self.file.path}. Make a user with `jupyter sandbox token add NAME`"
                " (and --file, if the file is to be there)."
            )
            return tokens
        self._read = (signature, tokens)
        if self._told:
            log.info("%s can be used again: %d tokens", self.file.path, len(tokens.tokens))
            self._told = ""
        return tokens

    def _tell(self, text: str) -> None:
        if text != self._told:
            log.error("%s", text)
            self._told = text
