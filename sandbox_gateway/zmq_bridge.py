"""A kernel's ZMQ endpoints on the host, for any jupyter_client: they outlive whatever happens to the sandbox.

They speak ZMTP themselves (:mod:`sandbox_gateway.zmtp`) on unix sockets instead of using libzmq's ROUTER and XPUB, for
what those cannot do: an XPUB knows nothing of its subscribers, so it either drops silently at its high-water mark, or
grows without bound, or lets one slow subscriber stop all of them. Here each client has a queue of its own, bounded in
bytes; at the bound its oldest streams and displays go, replaced by a notice that tells how much is missing, and never
anything else; before that, small stream messages that wait are joined (:mod:`sandbox_gateway.stream_runs`). There is
no thread, no socket limit per context, and one hop less.

Everything runs on the event loop on which the bridge was made; nothing here blocks or raises into the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from sandbox_gateway import messages, stream_runs, zmtp
from sandbox_gateway.bridge_queue import OVERHEAD, Message, Notice
from sandbox_gateway.errors import storage_error
from sandbox_gateway.messages import Buffer
from sandbox_gateway.stream_runs import StreamRun
from sandbox_gateway.wire.frames import Channel

log = logging.getLogger(__name__)

OnRequest = Callable[[int, list[bytes]], None]
"""Takes a channel number and a client's message, its identity first."""

QUEUE_LIMIT: Final = 128 << 20
"""Bytes that may wait for one slow client on one channel before output is left out."""
JOIN_ABOVE: Final = 4 << 20
"""Bytes that wait for one client from where on adjacent stream messages are joined."""
LINGER: Final = 1.0
"""Seconds that a closed bridge goes on writing what clients have not yet taken."""

HEARTBEAT: Final = 5
"""Number of the heartbeat endpoint, beside those of :class:`~sandbox_gateway.wire.frames.Channel`."""
_PORTS = {
    "shell_port": int(Channel.SHELL),
    "control_port": int(Channel.CONTROL),
    "stdin_port": int(Channel.STDIN),
    "iopub_port": int(Channel.IOPUB),
    "hb_port": HEARTBEAT,
}
_SOCKET_TYPES = {int(Channel.IOPUB): b"XPUB", HEARTBEAT: b"REP"}
_READ_SIZE = 256 << 10
_MAX_BUFFERS = 256


class ZmqBridge:
    """Five endpoints, ``ipc://<directory>/owner.z-<n>``, private to this user.

    ``on_request`` gets the clients' messages of the shell, control and stdin channels; :meth:`deliver` takes the
    kernel's. Made on a running event loop. Raises ``data_directory`` when the sockets cannot be made.
    """

    def __init__(self, directory: Path, key: bytes, on_request: OnRequest, *, queue_limit: int = QUEUE_LIMIT) -> None:
        self.directory = directory
        self._prefix = directory / "owner.z"
        self._key = key
        self._endpoints = {
            number: _Endpoint(Path(f"{self._prefix}-{number}"), number, key, on_request, queue_limit)
            for number in _PORTS.values()
        }
        self.publish_endpoints()

    @property
    def connection_info(self) -> dict[str, Any]:
        """What jupyter_client connects by; ``key`` is bytes, as a provisioner returns it."""
        return {
            "transport": "ipc",
            "ip": str(self._prefix),
            **_PORTS,
            "key": self._key,
            "signature_scheme": "hmac-sha256",
        }

    @property
    def connection_file(self) -> Path:
        """The same as a file in Jupyter's format, private to this user; written on first use."""
        path = self.directory / "owner.connection.json"
        info = {**self.connection_info, "key": self._key.decode("ascii"), "kernel_name": ""}
        fresh = path.with_suffix(".new")
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as file:
            json.dump(info, file)
        os.rename(fresh, path)
        return path

    @property
    def backlog(self) -> int:
        """Bytes that wait for the slowest client."""
        return max((peer.pending for endpoint in self._endpoints.values() for peer in endpoint.peers), default=0)

    def publish_endpoints(self) -> None:
        """Listen where we do not (or no longer: somebody removed the file). Connections that exist are not touched."""
        try:
            for endpoint in self._endpoints.values():
                endpoint.listen()
        except OSError as error:
            self.close()
            raise storage_error(error, f"cannot make sockets in {self.directory}") from error

    def deliver(self, channel: int, parts: Sequence[Buffer]) -> None:
        """Pass a message of the kernel on: on iopub to all who subscribed, else to the client it is addressed to.

        An identity that is not connected here belongs to another front end's client and is passed over.
        """
        endpoint = self._endpoints.get(channel)
        if endpoint is None or not parts:
            # It comes from inside, as often as that likes: nothing for the log.
            log.debug("a message for channel %d was dropped", channel)
        elif channel == Channel.IOPUB:
            endpoint.publish(parts)
        else:
            endpoint.route(parts)

    def close(self) -> None:
        """Remove the endpoints. What clients have not yet taken is written for up to :data:`LINGER` seconds more."""
        for endpoint in self._endpoints.values():
            endpoint.close()


class _Endpoint:
    """One listening socket and its clients."""

    def __init__(self, path: Path, number: int, key: bytes, on_request: OnRequest, queue_limit: int) -> None:
        self.number = number
        self.key = key
        self.queue_limit = queue_limit
        self.socket_type = _SOCKET_TYPES.get(number, b"ROUTER")
        self.peers: set[_Peer] = set()
        self.loop = asyncio.get_running_loop()
        self._path = path
        self._on_request = on_request
        self._routes: dict[bytes, _Peer] = {}
        self._listening: socket.socket | None = None
        self._inode: tuple[int, int] | None = None
        self._cut_off = False

    def listen(self) -> None:
        if self._listening is not None:
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(self._path, follow_symlinks=False)
                if (found.st_dev, found.st_ino) == self._inode:
                    return
            self._stop_listening()
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        fresh = f"{self._path}~"
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(fresh)
            listening.bind(fresh)
            os.chmod(fresh, 0o600)
            listening.listen(128)
            found = os.stat(fresh)
            # In one step over what a killed owner may have left under this name.
            os.rename(fresh, self._path)
        except OSError:
            listening.close()
            with contextlib.suppress(OSError):
                os.unlink(fresh)
            raise
        self._listening = listening
        self._inode = (found.st_dev, found.st_ino)
        self.loop.add_reader(listening.fileno(), self._accept)

    def close(self) -> None:
        if self._listening is not None:
            self._stop_listening()
            with contextlib.suppress(OSError):
                os.unlink(self._path)
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
        peer = self._routes.get(bytes(parts[0]))
        if peer is not None and len(parts) > 1:
            peer.send(Message(zmtp.encode(parts[1:])))

    def ready(self, peer: _Peer, identity: bytes) -> None:
        """A client said who it is. One that comes again under its name takes over, as with ROUTER_HANDOVER."""
        peer.identity = identity or b"\0" + os.urandom(8)
        before = self._routes.get(peer.identity)
        self._routes[peer.identity] = peer
        if before is not None and before is not peer:
            before.drop("another connection took its identity")

    def received(self, peer: _Peer, frames: list[bytes]) -> None:
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

    def subscription(self, peer: _Peer, begins: bool, topic: bytes) -> None:
        """A client begins or ends to listen to a topic; it is welcomed as ipykernel 7.2 does (JEP 65)."""
        if not begins:
            with contextlib.suppress(ValueError):
                peer.topics.remove(topic)
            return
        peer.topics.append(topic)
        with contextlib.suppress(UnicodeDecodeError):
            welcome = messages.build(self.key, "iopub_welcome", {"subscription": topic.decode()}, topic=topic)
            peer.send(Message(zmtp.encode(welcome if topic else welcome[1:])))
        if self._cut_off:
            self._cut_off = False
            peer.send(Message(zmtp.encode(messages.stderr_notice(self.key, _CUT_OFF))))

    def gone(self, peer: _Peer, *, cut_off: bool) -> None:
        self.peers.discard(peer)
        self._cut_off = self._cut_off or cut_off
        if self._routes.get(peer.identity) is peer:
            del self._routes[peer.identity]

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
            log.error("cannot accept a client on %s: %s", self._path, error)
            self.loop.remove_reader(self._listening.fileno())
            self.loop.call_later(1.0, self._accept_again)
            return
        connected.setblocking(False)
        peer = _Peer(self, connected)
        self.peers.add(peer)
        peer.start()

    def _accept_again(self) -> None:
        if self._listening is not None:
            self.loop.add_reader(self._listening.fileno(), self._accept)


_CUT_OFF = "[sandbox] A client that did not read was disconnected; output may be missing from here back\n"


class _Peer:
    """One client's connection."""

    def __init__(self, endpoint: _Endpoint, connected: socket.socket) -> None:
        self.identity = b""
        self.topics: list[bytes] = []
        self.pending = 0
        self._endpoint = endpoint
        self._socket = connected
        self._fd = connected.fileno()
        self._loop = endpoint.loop
        self._decoder = zmtp.Decoder()
        self._queue: deque[Message | Notice | StreamRun] = deque()
        self._writing = [memoryview(zmtp.GREETING + zmtp.ready(endpoint.socket_type))]
        self._trim_at = endpoint.queue_limit
        self._scheduled = False
        self._blocked = False
        self._finishing = False
        self._closed = False

    def start(self) -> None:
        """Greet the client and listen to it."""
        self._loop.add_reader(self._fd, self._readable)
        self._flush()

    def wants(self, topic: Buffer) -> bool:
        """Whether the client subscribed to a prefix of ``topic``."""
        topics = self.topics
        return topics == _EVERYTHING or any(topic[: len(prefix)] == prefix for prefix in topics)

    def send(self, message: Message, parts: Sequence[Buffer] | None = None) -> None:
        """Queue a message. It is written when the loop has run what is ready now, together with others.

        With ``parts``, which are its own, it may be joined with others when many wait.
        """
        if self._closed or self._finishing:
            return
        if parts is None or self.pending <= JOIN_ABOVE or not self._join(parts):
            self._queue.append(message)
            self.pending += message.size + OVERHEAD
        if self.pending > self._trim_at and len(self._queue) > 1:
            self._trim()
        if not self._scheduled and not self._blocked:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def _join(self, parts: Sequence[Buffer]) -> bool:
        """Add a stream message to the one that waits last, or begin a new run with it; False: it is something else."""
        found = stream_runs.read(parts)
        if found is None:
            return False
        last = self._queue[-1] if self._queue else None
        if isinstance(last, StreamRun) and last.takes(found):
            last.add(found)
            self.pending += found.size
        else:
            run = StreamRun(found)
            self._queue.append(run)
            self.pending += run.size + OVERHEAD
        return True

    def drop(self, reason: str, *, cut_off: bool = False) -> None:
        """End the connection at once."""
        if self._closed:
            return
        self._closed = True
        log.debug("a client of channel %d is gone: %s", self._endpoint.number, reason)
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._socket.close()
        self._queue.clear()
        self._writing.clear()
        self._endpoint.gone(self, cut_off=cut_off)

    def finish(self) -> None:
        """End the connection when all is written, or after :data:`LINGER` seconds."""
        self._flush()
        if not self._closed and (self._writing or self._queue):
            self._finishing = True
            self._loop.call_later(LINGER, self.drop, "it did not take the last messages")
        else:
            self.drop("the bridge was closed")

    def _trim(self) -> None:
        """Leave out the oldest output until three quarters of the limit are used, and say so in its place."""
        limit = self._endpoint.queue_limit
        goal = limit * 3 // 4
        kept: deque[Message | Notice | StreamRun] = deque()
        notice: Notice | None = None
        for entry in self._queue:
            if isinstance(entry, Notice):
                if notice is not None and notice.parent == entry.parent:
                    notice.count += entry.count
                    notice.size += entry.size
                    self.pending -= entry.cost
                else:
                    notice = entry
                    kept.append(entry)
                continue
            droppable, parent = entry.head if self.pending > goal else (False, b"")
            if not droppable:
                kept.append(entry)
                continue
            if notice is None or notice.parent != parent:
                notice = Notice(parent)
                kept.append(notice)
                self.pending += notice.cost
            notice.count += entry.count
            notice.size += entry.size
            self.pending -= entry.size + OVERHEAD
        self._queue = kept
        # What may not be left out is not looked at again with each message.
        self._trim_at = max(limit, self.pending + limit // 4)
        if self.pending > 2 * limit:
            log.error("a client that does not read %d MB of replies was disconnected", self.pending >> 20)
            self.drop("it does not read", cut_off=True)

    def _flush(self) -> None:
        self._scheduled = False
        while not self._closed:
            if not self._writing:
                self._take()
                if not self._writing:
                    break
            try:
                sent = self._socket.sendmsg(self._writing[:_MAX_BUFFERS])
            except (BlockingIOError, InterruptedError):
                if not self._blocked:
                    self._blocked = True
                    self._loop.add_writer(self._fd, self._flush)
                return
            except OSError as error:
                self.drop(str(error))
                return
            self._advance(sent)
        if self._closed:
            return
        if self._blocked:
            self._blocked = False
            self._loop.remove_writer(self._fd)
        if self._finishing:
            self.drop("the bridge was closed")

    def _take(self) -> None:
        """Move messages from the queue, where they may still be left out, to what is being written."""
        writing = self._writing
        taken = 0
        while self._queue and taken < _READ_SIZE and len(writing) < _MAX_BUFFERS:
            entry = self._queue.popleft()
            if isinstance(entry, Notice):
                self.pending -= entry.cost
                entry = entry.message(self._endpoint.key)
            else:
                self.pending -= entry.size + OVERHEAD
                if isinstance(entry, StreamRun):
                    entry = Message(zmtp.encode(entry.parts(self._endpoint.key)))
            writing.extend(map(memoryview, entry.buffers))
            taken += entry.size

    def _advance(self, sent: int) -> None:
        writing = self._writing
        done = 0
        for buffer in writing:
            if sent < len(buffer):
                break
            sent -= len(buffer)
            done += 1
        del writing[:done]
        if sent:
            writing[0] = writing[0][sent:]

    def _readable(self) -> None:
        try:
            data = self._socket.recv(_READ_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.drop(str(error))
            return
        if not data:
            self.drop("it hung up")
            return
        if self._finishing:
            return
        try:
            for found in self._decoder.feed(data):
                if isinstance(found, zmtp.Command):
                    self._command(found)
                elif not self.identity:
                    raise zmtp.ZmtpError("a message before READY")
                else:
                    self._endpoint.received(self, found)
                if self._closed:
                    return
        except zmtp.ZmtpError as error:
            log.warning("a client of channel %d was disconnected: %s", self._endpoint.number, error)
            self.drop(str(error))

    def _command(self, command: zmtp.Command) -> None:
        if command.name == b"READY":
            self._endpoint.ready(self, zmtp.properties(command.body).get("identity", b""))
        elif command.name == b"PING":
            self.send(Message([zmtp.command(b"PONG", command.body[2:18])]))
        elif command.name in (b"SUBSCRIBE", b"CANCEL") and self._endpoint.number == Channel.IOPUB:
            self._endpoint.subscription(self, command.name == b"SUBSCRIBE", command.body)
        elif command.name == b"ERROR":
            raise zmtp.ZmtpError("the client refused us")


_EVERYTHING = [b""]
