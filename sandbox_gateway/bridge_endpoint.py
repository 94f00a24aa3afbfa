"""One listening socket of a bridge and its clients: who is who, who listens to what, and who is away.

Part of :mod:`sandbox_gateway.zmq_bridge`. Nothing here blocks or raises into its caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import Final

from sandbox_gateway import mailbox, messages, zmtp
from sandbox_gateway.bridge_listener import Listener
from sandbox_gateway.bridge_peer import Peer, matches
from sandbox_gateway.bridge_queue import Message
from sandbox_gateway.channels import Deliver
from sandbox_gateway.mailbox import Mailbox
from sandbox_gateway.messages import Buffer
from sandbox_gateway.wire.frames import Channel

log = logging.getLogger(__name__)

OnRequest = Callable[[int, list[bytes]], None]
"""Takes a channel number and a client's message, its identity first."""

HEARTBEAT: Final = 5
"""Number of the heartbeat endpoint, beside those of :class:`~sandbox_gateway.wire.frames.Channel`."""
_SOCKET_TYPES = {int(Channel.IOPUB): b"XPUB", HEARTBEAT: b"REP"}


class Endpoint:
    """One listening socket and its clients."""

    def __init__(self, listener: Listener, number: int, key: bytes, on_request: OnRequest, queue_limit: int) -> None:
        self.number = number
        self.key = key
        self.queue_limit = queue_limit
        self.socket_type = _SOCKET_TYPES.get(number, b"ROUTER")
        self.peers: set[Peer] = set()
        self.loop = asyncio.get_running_loop()
        self.on_listener: Callable[[Deliver], None] | None = None
        self._listener = listener
        self._on_request = on_request
        self._routes: dict[bytes, Peer] = {}
        self._mailbox = Mailbox()
        self._awaited_until = 0.0
        self._departed: dict[bytes, None] = {}
        self._expiry: asyncio.TimerHandle | None = None
        self._listening: socket.socket | None = None
        self._held = False
        self._cut_off = False

    def listen(self) -> None:
        if self._listening is not None:
            if self._listener.stands:
                return
            self._stop_listening()
        self._listening = self._listener.open()
        self.loop.add_reader(self._listening.fileno(), self._accept)

    def hold(self, held: bool) -> None:
        """Read nothing more from the clients, or go on: they wait as for a kernel that does not read."""
        if held is not self._held:
            self._held = held
            for peer in self.peers:
                peer.hold(held)

    def close(self) -> None:
        if self._listening is not None:
            self._stop_listening()
            self._listener.remove()
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        for peer in tuple(self.peers):
            peer.finish()

    def publish(self, parts: Sequence[Buffer]) -> None:
        if self.peers:
            message = Message(zmtp.encode(parts))
            topic = parts[0]
            for peer in tuple(self.peers):
                if peer.wants(topic):
                    peer.send(message, parts)

    def route(self, parts: Sequence[Buffer]) -> None:
        if len(parts) < 2:
            return
        identity = bytes(parts[0])
        message = Message(zmtp.encode(parts[1:]))
        peer = self._routes.get(identity)
        if peer is not None:
            peer.send(message)
        elif self._listening is not None:
            now = self.loop.time()
            self._mailbox.put(identity, message, now)
            if identity not in self._departed:
                # Not known here yet: the client of an earlier owner, most likely, that is about to connect again.
                self._awaited_until = now + mailbox.SECONDS
            self._expire_later()

    @property
    def settled(self) -> bool:
        awaited = self._mailbox.due is not None and self.loop.time() < self._awaited_until
        return not awaited and all(peer.settled for peer in self.peers)

    def _expire_later(self) -> None:
        if self._expiry is None and (due := self._mailbox.due) is not None:
            self._expiry = self.loop.call_at(due, self._expire)

    def _expire(self) -> None:
        self._expiry = None
        self._mailbox.expire(self.loop.time())
        self._expire_later()

    def ready(self, peer: Peer, identity: bytes) -> None:
        """A client said who it is. One that comes again under its name takes over, as with ROUTER_HANDOVER."""
        peer.identity = identity or b"\0" + os.urandom(8)
        self._departed.pop(peer.identity, None)
        before = self._routes.get(peer.identity)
        self._routes[peer.identity] = peer
        if before is not None and before is not peer:
            before.drop("another connection took its identity")
        for message in self._mailbox.take(peer.identity, self.loop.time()):
            peer.send(message)

    def received(self, peer: Peer, frames: list[bytes]) -> None:
        """A client sent a message."""
        if self.number == HEARTBEAT:
            peer.send(Message(zmtp.encode(frames)))
        elif self.number == Channel.IOPUB:
            if len(frames) == 1 and frames[0][:1] in (b"\0", b"\1"):
                self.subscription(peer, frames[0][:1] == b"\1", frames[0][1:])
        elif messages.delimiter_index(frames) is None:
            log.warning("a malformed request of %d frames was dropped", len(frames))
        else:
            try:
                self._on_request(self.number, [peer.identity, *frames])
            except Exception:
                log.exception("a request failed; the client goes on")

    def subscription(self, peer: Peer, begins: bool, topic: bytes) -> None:
        """A client begins or ends to listen to a topic; it is welcomed as ipykernel 7.2 does (JEP 65)."""
        if not begins:
            with contextlib.suppress(ValueError):
                peer.topics.remove(topic)
            return
        before = tuple(peer.topics)
        peer.topics.append(topic)
        with contextlib.suppress(UnicodeDecodeError):
            welcome = messages.build(self.key, "iopub_welcome", {"subscription": topic.decode()}, topic=topic)
            peer.send(Message(zmtp.encode(welcome if topic else welcome[1:])))
        if self._cut_off:
            self._cut_off = False
            peer.send(Message(zmtp.encode(messages.stderr_notice(self.key, _CUT_OFF))))
        if self.on_listener is not None and not matches(topic, before):

            def catch_up(channel: int, parts: Sequence[Buffer]) -> None:
                if matches(parts[0], (topic,)) and not matches(parts[0], before):
                    peer.send(Message(zmtp.encode(parts)), parts)

            self.on_listener(catch_up)

    def gone(self, peer: Peer, *, cut_off: bool) -> None:
        self.peers.discard(peer)
        self._cut_off = self._cut_off or cut_off
        if self._routes.get(peer.identity) is peer:
            del self._routes[peer.identity]
            self._departed[peer.identity] = None
            if len(self._departed) > _MAX_DEPARTED:
                del self._departed[next(iter(self._departed))]

    def _stop_listening(self) -> None:
        listening, self._listening = self._listening, None
        assert listening is not None
        self.loop.remove_reader(listening.fileno())
        listening.close()

    def _accept(self) -> None:
        assert self._listening is not None
        try:
            connected, _ = self._listening.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # No descriptors left: the client waits in the queue until there are some. Not in a busy loop.
            log.error("cannot accept a client on %s: %s", self._listener, error)
            self.loop.remove_reader(self._listening.fileno())
            self.loop.call_later(1.0, self._accept_again)
            return
        connected.setblocking(False)
        if connected.family == socket.AF_INET:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer = Peer(self, connected)
        self.peers.add(peer)
        peer.start()
        if self._held:
            peer.hold(True)

    def _accept_again(self) -> None:
        if self._listening is not None:
            self.loop.add_reader(self._listening.fileno(), self._accept)


_MAX_DEPARTED = 256
_CUT_OFF = "[sandbox] A client that did not read was disconnected; output may be missing from here back\n"
