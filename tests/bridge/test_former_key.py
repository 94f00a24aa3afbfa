"""What a clone's kernel signed with its parent's key reaches the clone's clients with its own."""

from __future__ import annotations

from sandbox_gateway import messages
from sandbox_gateway.channels import KernelChannels
from sandbox_gateway.former_key import LASTS, FormerKey
from sandbox_gateway.wire.frames import Channel

OLD, NEW = b"0" * 64, b"1" * 64


def signed_with(key: bytes, parts: object) -> bool:
    found = list(parts)  # type: ignore[call-overload]
    at = messages.delimiter_index(found)
    return at is not None and found[at + 1] == messages.sign(key, found[at + 2 : at + 6])


def test_only_what_bears_the_former_signature_is_signed_anew() -> None:
    former = FormerKey(OLD, NEW)
    old = messages.build(OLD, "stream", {"name": "stdout", "text": "6\\n"}, topic=b"stream.stdout")
    renewed = former.renew(old)
    assert signed_with(NEW, renewed) and [*renewed[:2], *renewed[3:]] == [*old[:2], *old[3:]]
    new = messages.build(NEW, "stream", {"name": "stdout", "text": "7\\n"})
    assert former.renew(new) is new
    forged = messages.build(b"2" * 64, "stream", {"name": "stdout", "text": "8\\n"})
    assert former.renew(forged) is forged
    assert former.renew([b"garbage"]) == [b"garbage"]


def test_it_is_looked_for_in_the_beginning_only() -> None:
    clock = [0.0]
    former = FormerKey(OLD, NEW, now=lambda: clock[0])
    clock[0] = 1000.0
    assert not former.over, "nothing has come yet"
    former.renew([b"x"])
    assert not former.over
    clock[0] += LASTS + 1
    assert former.over


def test_channels_of_a_clone_give_its_clients_what_they_can_verify() -> None:
    channels = KernelChannels(NEW)
    got: list[list[messages.Buffer]] = []
    channels.subscribe(lambda channel, parts: got.append(list(parts)))
    channels.renew(OLD)
    channels.received(Channel.IOPUB, messages.build(OLD, "stream", {"name": "stdout", "text": "x"}, topic=b"stream"))
    assert signed_with(NEW, got[0])
