"""The handshake: ATTACH from the host, HELLO from the agent.

The host names itself, a fresh nonce, the versions it speaks, the epoch, and the last number that it has of each
channel. The agent answers with the nonce, the version it chose, the last numbers *it* has, the last ones it has given
out, and after which number each channel goes on. Both are small JSON objects; unknown keys are ignored, so that a
newer side can say more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sandbox_gateway.wire.frames import CHANNELS, MAX_HANDSHAKE, MAX_SEQ, Buffer, WireError

VERSION = 1
SUPPORTED: tuple[int, ...] = (1,)
"""The versions this code speaks: the newest, and the one before."""
MAX_EPOCH = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Attach:
    """What a host says first. A channel missing in ``received`` goes on after what was last acknowledged."""

    nonce: str
    versions: tuple[int, ...] = SUPPORTED
    epoch: int = 1
    received: Mapping[int, int] = field(default_factory=dict)
    owner: str = ""

    def to_payload(self) -> bytes:
        """The JSON payload of the ATTACH frame."""
        return _dump(
            {
                "nonce": self.nonce,
                "versions": list(self.versions),
                "epoch": self.epoch,
                "received": _numbers_out(self.received),
                "owner": self.owner,
            }
        )

    @classmethod
    def from_payload(cls, payload: Buffer) -> Attach:
        """Parse strictly; raises :class:`WireError`."""
        data = load_object(payload, MAX_HANDSHAKE)
        versions = data.get("versions")
        if not isinstance(versions, list) or not 0 < len(versions) <= 64:
            raise WireError("attach: bad versions")
        return cls(
            _text(data, "nonce", 8, 64),
            tuple(_integer(version, 0, MAX_EPOCH) for version in versions),
            _integer(data.get("epoch"), 0, MAX_EPOCH),
            _numbers_in(data, "received"),
            _text(data, "owner", 0, 256),
        )


@dataclass(frozen=True, slots=True)
class Hello:
    """The agent's answer."""

    nonce: str
    version: int = VERSION
    """0 when there is no version that both speak; the agent's own are then in ``agent["versions"]``."""
    epoch: int = 1
    received: Mapping[int, int] = field(default_factory=dict)
    """Last number the agent has of each channel; the host goes on after it."""
    sent: Mapping[int, int] = field(default_factory=dict)
    """Last number the agent has given out on each channel."""
    agent: Mapping[str, Any] = field(default_factory=dict)
    """What the agent tells about itself."""
    resumes: Mapping[int, int] = field(default_factory=dict)
    """What follows on each channel comes after this number."""

    def to_payload(self) -> bytes:
        """The JSON payload of the HELLO frame."""
        return _dump(
            {
                "nonce": self.nonce,
                "version": self.version,
                "epoch": self.epoch,
                "received": _numbers_out(self.received),
                "sent": _numbers_out(self.sent),
                "resumes": _numbers_out(self.resumes),
                "agent": dict(self.agent),
            }
        )

    @classmethod
    def from_payload(cls, payload: Buffer) -> Hello:
        """Parse strictly; raises :class:`WireError`."""
        data = load_object(payload, MAX_HANDSHAKE)
        agent = data.get("agent")
        if not isinstance(agent, dict):
            raise WireError("hello: bad agent")
        return cls(
            _text(data, "nonce", 8, 64),
            _integer(data.get("version"), 0, MAX_EPOCH),
            _integer(data.get("epoch"), 0, MAX_EPOCH),
            _numbers_in(data, "received"),
            _numbers_in(data, "sent"),
            agent,
            _numbers_in(data, "resumes"),
        )


def choose_version(theirs: Sequence[int], ours: Sequence[int] = SUPPORTED) -> int:
    """The newest version that both speak; raises :class:`WireError` naming both lists."""
    common = set(theirs) & set(ours)
    if not common:
        raise WireError(f"no common link version: this side speaks {_listed(ours)}, the other {_listed(theirs)}")
    return max(common)


def load_object(payload: Buffer, limit: int) -> dict[str, Any]:
    """Exactly one JSON object of at most ``limit`` bytes; :class:`WireError` for anything else, however nested."""
    if len(payload) > limit:
        raise WireError(f"an object of {len(payload)} bytes is longer than {limit}")
    try:
        value = json.loads(bytes(payload).decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise WireError(f"malformed JSON: {type(error).__name__}") from None
    if not isinstance(value, dict):
        raise WireError("JSON that is not an object")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _dump(value: dict[str, Any]) -> bytes:
    payload = json.dumps(value, separators=(",", ":")).encode()
    if len(payload) > MAX_HANDSHAKE:
        raise WireError(f"a handshake of {len(payload)} bytes is longer than {MAX_HANDSHAKE}")
    return payload


def _numbers_out(numbers: Mapping[int, int]) -> dict[str, int]:
    return {str(int(channel)): number for channel, number in numbers.items()}


def _numbers_in(data: dict[str, Any], key: str) -> dict[int, int]:
    value = data.get(key)
    if not isinstance(value, dict) or len(value) > CHANNELS:
        raise WireError(f"handshake: bad {key}")
    numbers = {}
    for name, number in value.items():
        if len(name) != 1 or not "0" <= name < str(CHANNELS):
            raise WireError(f"handshake: bad channel in {key}")
        numbers[int(name)] = _integer(number, 0, MAX_SEQ)
    return numbers


def _integer(value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise WireError("handshake: a number is missing or out of range")
    return value


def _text(data: dict[str, Any], key: str, shortest: int, longest: int) -> str:
    value = data.get(key)
    if not isinstance(value, str) or not shortest <= len(value) <= longest:
        raise WireError(f"handshake: bad {key}")
    return value


def _listed(versions: Sequence[int]) -> str:
    return ", ".join(map(str, versions)) or "none"
