"""What a snapshot says of itself: ``manifest.json``, read strictly.

A manifest is written last, so a directory that has one under its final name is whole. Whatever is not exactly as we
write it is refused with the reason, as ``snapshot_damaged``: nothing is guessed.
"""

from __future__ import annotations

import enum
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.model import Launch

FORMAT: Final = 1
"""Version of the manifest; a reader refuses newer ones."""
MANIFEST: Final = "manifest.json"
MANIFEST_LIMIT: Final = 16 * 2**20
"""Bytes of the largest manifest that is read."""
NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
ID: Final = re.compile(r"[0-9a-f]{32}")
_TEXT_LIMIT = 4096
_COUNT_LIMIT = 10_000
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_HASH = re.compile(r"[0-9a-f]{64}")
_BIG = 2**63


class NewerFormat(SandboxGatewayError):
    """A snapshot of a newer version of this program: not for us to use, and not to be thrown away as damaged."""


class Kind(enum.StrEnum):
    """Why a snapshot was made."""

    SUSPENDED = "suspended"
    """A suspended sandbox lives in it; it goes when the sandbox is resumed or removed."""
    SAVED = "saved"
    """Somebody asked for it."""
    FORK = "fork"
    """Made for the moment of a fork."""
    TEMPLATE = "template"
    """A ready kernel without an identity."""


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What changes when somebody writes to a file: as long as all of it is the same, nobody did.

    The device's number is left out: it may be another one after a restart of the machine.
    """

    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One file of the saved image."""

    path: str
    """Relative to the image's directory, parts separated by ``/``."""
    size: int
    """Bytes."""
    identity: FileIdentity
    sha256: str | None = None
    """Hexadecimal; None until the snapshot is sealed."""


@dataclass(frozen=True, slots=True)
class WorkspaceFile:
    """A file on the host that the sandbox had open or mapped."""

    path: str
    """Absolute path on the host."""
    identity: FileIdentity
    sha256: str | None = None
    """Hexadecimal; None for a file that was too large to be hashed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the maker of a snapshot knows about it."""

    kind: Kind
    sandbox: str
    """Id of the sandbox that was saved."""
    profile: str
    runtime: str
    name: str = ""
    """A unique name for people; empty: none."""
    parent: str | None = None
    """What the saved sandbox was made from, as :attr:`SandboxRecord.parent` says it."""
    layers: tuple[str, ...] = ()
    """Digests of the layers below it, the agent's included."""
    requirements: Mapping[str, str] = field(default_factory=dict)
    """The runtime's, from ``Snapshots.requirements``."""
    link_version: int
    epoch: int = 1
    """The epoch that the saved agent counts in."""
    cursors: Mapping[str, int] = field(default_factory=dict)
    """Per channel, the last number that the host had received."""
    launch: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """``Launch.as_dict()``: what drives the sandbox again. Private: it holds the kernel's environment and key."""
    workspace: tuple[WorkspaceFile, ...] = ()
    template_key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(Facts):
    """All that ``manifest.json`` holds."""

    id: str
    owner: int
    """Uid of the user who made it."""
    created: float
    """Seconds since the epoch."""
    files: tuple[ImageFile, ...]

    @property
    def size(self) -> int:
        """Bytes of the image."""
        return sum(file.size for file in self.files)

    @property
    def sealed(self) -> bool:
        """Whether every file has its checksum."""
        return all(file.sha256 is not None for file in self.files)

    def saved_launch(self) -> Launch:
        """:attr:`launch` as a value; raises ``snapshot_damaged`` when it is none."""
        try:
            return Launch.from_dict(self.launch)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise damaged(self.id, "its manifest does not say how the sandbox was launched") from error

    def as_dict(self) -> dict[str, Any]:
        """JSON form, all of it: :func:`read_manifest` reads it back. Private, like :attr:`launch`."""
        return {
            "format": FORMAT,
            **{item.name: getattr(self, item.name) for item in fields(self)},
            "layers": list(self.layers),
            "requirements": dict(self.requirements),
            "cursors": dict(self.cursors),
            "launch": dict(self.launch),
            "files": [_file_json(file) for file in self.files],
            "workspace": [_file_json(file) for file in self.workspace],
        }

    def public_dict(self) -> dict[str, Any]:
        """JSON form for people and programs: without what is private, with the sizes added up."""
        shown = {key: value for key, value in self.as_dict().items() if key not in {"launch", "format"}}
        return {**shown, "size": self.size, "sealed": self.sealed}


def manifest_bytes(manifest: Manifest) -> bytes:
    """The content of ``manifest.json``."""
    content = json.dumps(manifest.as_dict(), indent=1, allow_nan=False).encode()
    if len(content) > MANIFEST_LIMIT:
        raise SandboxGatewayError("snapshot_failed", "the manifest would be too large to be read again")
    return content


def as_it_reads(manifest: Manifest) -> Manifest:
    """``manifest`` as a reader will find it; raises ``snapshot_failed`` when none could."""
    try:
        return read_manifest(manifest_bytes(manifest), manifest.id)
    except SandboxGatewayError as error:
        raise SandboxGatewayError("snapshot_failed", error.message) from error
    except (TypeError, ValueError) as error:
        raise SandboxGatewayError("snapshot_failed", f"the manifest cannot be written: {error}") from error


def read_manifest(content: bytes, snapshot_id: str) -> Manifest:
    """Read what :func:`manifest_bytes` made for the snapshot in the directory ``snapshot_id``.

    Raises ``snapshot_damaged`` with the first thing that is not as it must be.
    """
    try:
        data = json.loads(content, parse_constant=_no_constant)
        return _manifest(data, snapshot_id)
    except _Bad as error:
        raise damaged(snapshot_id, f"its manifest is wrong: {error}") from error
    except (ValueError, RecursionError) as error:
        raise damaged(snapshot_id, f"its manifest is not JSON ({type(error).__name__})") from error


def references_in(content: bytes) -> tuple[frozenset[str], frozenset[str]]:
    """Layers and runsc hashes that a manifest of any version names, as far as they can be made out.

    For garbage collection, which must not take away what a newer program's snapshot needs.
    """
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        return frozenset(), frozenset()
    if not isinstance(data, dict):
        return frozenset(), frozenset()
    layers, needed = data.get("layers"), data.get("requirements")
    digests = frozenset(x for x in layers if isinstance(x, str)) if isinstance(layers, list) else frozenset()
    runsc = needed.get("runsc") if isinstance(needed, dict) else None
    return digests, frozenset({runsc} if isinstance(runsc, str) else ())


def checked_name(name: str) -> str:
    """``name``, if a snapshot can have it (empty: none); raises ``invalid_request``."""
    if name and not NAME.fullmatch(name):
        raise SandboxGatewayError(
            "invalid_request",
            f"{name[:80]!r} cannot be a snapshot's name",
            "1 to 64 letters, digits, dots, underscores and hyphens.",
        )
    if (name.strip(".") == "" and name) or ID.fullmatch(name):
        raise SandboxGatewayError(
            "invalid_request", f"{name!r} cannot be a snapshot's name", "It would be taken for something else."
        )
    return name


def damaged(snapshot_id: str, reason: str, hint: str | None = None) -> SandboxGatewayError:
    """The refusal of a snapshot."""
    return SandboxGatewayError("snapshot_damaged", f"snapshot {snapshot_id[:12]}: {reason}", hint)


class _Bad(Exception):
    """What is wrong with a manifest, in a few words that hold no value of it."""


def _no_constant(name: str) -> Any:
    raise _Bad(f"{name} is no number")


def _file_json(file: ImageFile | WorkspaceFile) -> dict[str, Any]:
    identity = {item.name: getattr(file.identity, item.name) for item in fields(FileIdentity)}
    return {"path": file.path, **identity, "sha256": file.sha256}


def _manifest(data: Any, snapshot_id: str) -> Manifest:
    if not isinstance(data, dict):
        raise _Bad("it is no object")
    version = data.get("format")
    if type(version) is not int or version < 1:
        raise _Bad("it has no format version")
    if version > FORMAT:
        text = f"it was made by a newer version of this program (format {version}, this one reads up to {FORMAT})"
        message = damaged(snapshot_id, text).message
        raise NewerFormat("snapshot_damaged", message, "Upgrade sandbox_gateway to use it.")
    names = {item.name for item in fields(Manifest)} | {"format"}
    if data.keys() != names:
        raise _Bad(f"{', '.join(sorted(data.keys() ^ names))[:200]} missing or unknown")
    found = Manifest(**{name: _READERS[name](name, data[name]) for name in names - {"format"}})
    if found.id != snapshot_id:
        raise _Bad("it belongs to another snapshot")
    return found


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > _TEXT_LIMIT:
        raise _Bad(f"{name} is no text, or too long")
    return value


def _word(name: str, value: Any) -> str:
    if not _text(name, value):
        raise _Bad(f"{name} is empty")
    return str(value)


def _maybe(read: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else read(name, value)


def _matching(pattern: re.Pattern[str]) -> Callable[[str, Any], str]:
    def read(name: str, value: Any) -> str:
        if not pattern.fullmatch(_text(name, value)):
            raise _Bad(f"{name} is malformed")
        return str(value)

    return read


def _name(name: str, value: Any) -> str:
    if value != "" and not NAME.fullmatch(_text(name, value)):
        raise _Bad(f"{name} is malformed")
    return str(value)


def _count(name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value < _BIG:
        raise _Bad(f"{name} is no count")
    return value


def _whole(name: str, value: Any) -> int:
    # Times before 1970 are odd, but a file may have one.
    if type(value) is not int or not -_BIG <= value < _BIG:
        raise _Bad(f"{name} is no whole number")
    return value


def _time(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 <= value < 1e12:
        raise _Bad(f"{name} is no time")
    return float(value)


def _kind(name: str, value: Any) -> Kind:
    try:
        return Kind(_text(name, value))
    except ValueError:
        raise _Bad(f"{name} is unknown") from None


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Bad(f"{name} is no object")
    return value


def _mapping(read: Callable[[str, Any], Any], limit: int = 256) -> Callable[[str, Any], dict[str, Any]]:
    def of(name: str, value: Any) -> dict[str, Any]:
        if len(_object(name, value)) > limit:
            raise _Bad(f"{name} has too many entries")
        return {_text(name, key): read(name, item) for key, item in value.items()}

    return of


def _long_text(name: str, value: Any) -> str:
    # The list of a processor's features is long.
    if not isinstance(value, str) or len(value) > 64 * 1024:
        raise _Bad(f"{name} is no text, or too long")
    return value


def _tuple(read: Callable[[str, Any], Any]) -> Callable[[str, Any], tuple[Any, ...]]:
    def of(name: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) > _COUNT_LIMIT:
            raise _Bad(f"{name} is no list, or too long")
        return tuple(read(name, item) for item in value)

    return of


_FILE_FIELDS = {"path", "ino", "size", "mtime_ns", "ctime_ns", "sha256"}


def _identity(name: str, value: Any) -> FileIdentity:
    if _object(name, value).keys() != _FILE_FIELDS:
        raise _Bad(f"an entry of {name} is malformed")
    return FileIdentity(
        _count(name, value["ino"]),
        _count(name, value["size"]),
        _whole(name, value["mtime_ns"]),
        _whole(name, value["ctime_ns"]),
    )


def _image_file(name: str, value: Any) -> ImageFile:
    identity = _identity(name, value)
    path = _word(name, value["path"])
    if "\0" in path or path.startswith("/") or any(part in ("", ".", "..") for part in path.split("/")):
        raise _Bad(f"a path in {name} leads elsewhere")
    return ImageFile(path, identity.size, identity, _maybe(_matching(_HASH))(name, value["sha256"]))


def _image_files(name: str, value: Any) -> tuple[ImageFile, ...]:
    files = _tuple(_image_file)(name, value)
    if not files or len({file.path for file in files}) != len(files):
        raise _Bad(f"{name} is empty, or names a file twice")
    return files


def _workspace_file(name: str, value: Any) -> WorkspaceFile:
    identity = _identity(name, value)
    path = _word(name, value["path"])
    if "\0" in path or not path.startswith("/"):
        raise _Bad(f"a path in {name} is not absolute")
    return WorkspaceFile(path, identity, _maybe(_matching(_HASH))(name, value["sha256"]))


_READERS: Mapping[str, Callable[[str, Any], Any]] = {
    "id": _matching(ID),
    "kind": _kind,
    "sandbox": _word,
    "profile": _text,
    "runtime": _word,
    "name": _name,
    "parent": _maybe(_text),
    "owner": _count,
    "created": _time,
    "layers": _tuple(_matching(_DIGEST)),
    "requirements": _mapping(_long_text),
    "link_version": _count,
    "epoch": _count,
    "cursors": _mapping(_whole),
    "launch": _object,
    "files": _image_files,
    "workspace": _tuple(_workspace_file),
    "template_key": _maybe(_text),
}
