"""A kernel's ZMQ endpoints on the host, for any jupyter_client: they outlive whatever happens to the sandbox.

They speak ZMTP themselves (:mod:`sandbox_gateway.zmtp`) on unix sockets instead of using libzmq's ROUTER and XPUB, for
what those cannot do: an XPUB knows nothing of its subscribers, so it either drops silently at its high-water mark, or
grows without bound, or lets one slow subscriber stop all of them. Here each client has a queue of its own, bounded in
bytes; at the bound its oldest streams and displays go, replaced by a notice that tells how much is missing, and never
anything else; before that, small stream messages that wait are joined (:mod:`sandbox_gateway.bridge_queue`). There is
no thread, no socket limit per context, and one hop less.

A bridge stays open while its kernel is suspended. When its process is killed, the next owner opens one on the same
paths with the same key: clients reconnect by themselves, find the replies that were kept for them, and get the output
that :meth:`~sandbox_gateway.channels.KernelChannels.retain` kept.

Everything runs on the event loop on which the bridge was made; nothing here blocks or raises into the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from sandbox_gateway import mailbox, messages, zmtp
from sandbox_gateway.bridge_queue import Message, Notice, OutputQueue
from sandbox_gateway.channels import Deliver, KernelChannels
from sandbox_gateway.errors import storage_error
from sandbox_gateway.mailbox import Mailbox
from sandbox_gateway.messages import Buffer
from sandbox_gateway.stream_runs import StreamRun
from sandbox_gateway.wire.frames import Channel

log = logging.getLogger(__name__)

OnRequest = Callable[[int, list[bytes]], None]
"""Takes a channel number and a client's message, its identity first."""

QUEUE_LIMIT: Final = 128 << 20
"""Bytes that may wait for one slow client on one channel before output is left out."""
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


CONNECTION_FILE: Final = "owner.connection.json"


class ZmqBridge:
    """Five endpoints, ``ipc://<directory>/owner.z-<n>``, private to this user, and the file that names them.

    ``on_request`` gets the clients' messages of the shell, control and stdin channels; :meth:`deliver` takes the
    kernel's. ``kernel_name`` is the kernelspec's, for the connection file. Made on a running event loop. Raises
    ``data_directory`` when the sockets or the file cannot be made.
    """

    def __init__(
        self,
        directory: Path,
        key: bytes,
        on_request: OnRequest,
        *,
        queue_limit: int = QUEUE_LIMIT,
        kernel_name: str = "",
    ) -> None:
        self.directory = directory
        self._prefix = directory / "owner.z"
        self._key = key
        self._kernel_name = kernel_name
        self._file_inode: tuple[int, int] | None = None
        self._endpoints = {
            number: _Endpoint(Path(f"{self._prefix}-{number}"), number, key, on_request, queue_limit)
            for number in _PORTS.values()
        }
        self.publish_endpoints()

    def follow(self, channels: KernelChannels) -> None:
        """Carry this kernel's messages; clients that subscribe are its listeners."""
        output = self._endpoints[int(Channel.IOPUB)]
        subscription = channels.subscribe(
            self.deliver, listening=lambda: any(peer.topics for peer in output.peers), settled=lambda: self.settled
        )
        output.on_listener = subscription.listen

    @property
    def connection_file(self) -> Path:
        """The file that ``jupyter console --existing`` and ``BlockingKernelClient`` connect by."""
        return self.directory / CONNECTION_FILE

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
    def connected(self) -> bool:
        """Whether any client is connected."""
        return any(endpoint.peers for endpoint in self._endpoints.values())

    @property
    def backlog(self) -> int:
        """Bytes that wait for the slowest client."""
        return max((peer.pending for endpoint in self._endpoints.values() for peer in endpoint.peers), default=0)

    @property
    def settled(self) -> bool:
        """Whether everything was written to its clients' sockets, in whole messages.

        False for as long as some client does not read, or a reply waits for one that was not connected here yet. One
        that hung up is not waited for.
        """
        return all(endpoint.settled for endpoint in self._endpoints.values())

    def publish_endpoints(self) -> None:
        """Listen where we do not (or no longer: somebody removed the file). Connections that exist are not touched."""
        try:
            for endpoint in self._endpoints.values():
                endpoint.listen()
            if self._file_inode is None or _inode(self.connection_file) != self._file_inode:
                self._write_connection_file()
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
        if self._file_inode is not None:
            _unlink_own(self.connection_file, self._file_inode)
            self._file_inode = None

    def _write_connection_file(self) -> None:
        content = {**self.connection_info, "key": self._key.decode(), "kernel_name": self._kernel_name}
        fresh = self.directory / f"{CONNECTION_FILE}~"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh)
        try:
            with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
                json.dump(content, file, indent=1)
                found = os.fstat(file.fileno())
            os.rename(fresh, self.connection_file)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(fresh)
            raise
        self._file_inode = (found.st_dev, found.st_ino)


def _inode(path: Path) -> tuple[int, int] | None:
    """What stands under this name now."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _unlink_own(path: Path, own: tuple[int, int]) -> None:
    """Remove a file unless another owner has put its own under this name meanwhile."""
    with contextlib.suppress(OSError):
        if _inode(path) == own:
            os.unlink(path)


class _Endpoint:
    """One listening socket and its clients."""

    def __init__(self, path: Path, number: int, key: bytes, on_request: OnRequest, queue_limit: int) -> None:
        self.number = number
        self.key = key
        self.queue_limit = queue_limit
        self.socket_type = _SOCKET_TYPES.get(number, b"ROUTER")
        self.peers: set[_Peer] = set()
        self.loop = asyncio.get_running_loop()
        self.on_listener: Callable[[Deliver], None] | None = None
        self._path = path
        self._on_request = on_request
        self._routes: dict[bytes, _Peer] = {}
        self._mailbox = Mailbox()
        self._awaited_until = 0.0
        self._departed: dict[bytes, None] = {}
        self._expiry: asyncio.TimerHandle | None = None
        self._listening: socket.socket | None = None
        self._inode: tuple[int, int] | None = None
        self._cut_off = False

    def listen(self) -> None:
        if self._listening is not None:
            if _inode(self._path) == self._inode:
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
            if self._inode is not None:
                _unlink_own(self._path, self._inode)
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

    def ready(self, peer: _Peer, identity: bytes) -> None:
        """A client said who it is. One that comes again under its name takes over, as with ROUTER_HANDOVER."""
        peer.identity = identity or b"\0" + os.urandom(8)
        self._departed.pop(peer.identity, None)
        before = self._routes.get(peer.identity)
        self._routes[peer.identity] = peer
        if before is not None and before is not peer:
            before.drop("another connection took its identity")
        for message in self._mailbox.take(peer.identity, self.loop.time()):
            peer.send(message)

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
        before = tuple(peer.topics)
        peer.topics.append(topic)
        with contextlib.suppress(UnicodeDecodeError):
            welcome = messages.build(self.key, "iopub_welcome", {"subscription": topic.decode()}, topic=topic)
            peer.send(Message(zmtp.encode(welcome if topic else welcome[1:])))
        if self._cut_off:
            self._cut_off = False
            peer.send(Message(zmtp.encode(messages.stderr_notice(self.key, _CUT_OFF))))
        if self.on_listener is not None and not _matches(topic, before):

            def catch_up(channel: int, parts: Sequence[Buffer]) -> None:
                if _matches(parts[0], (topic,)) and not _matches(parts[0], before):
                    peer.send(Message(zmtp.encode(parts)), parts)

            self.on_listener(catch_up)

    def gone(self, peer: _Peer, *, cut_off: bool) -> None:
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


_MAX_DEPARTED = 256
_CUT_OFF = "[sandbox] A client that did not read was disconnected; output may be missing from here back\n"


def _matches(topic: Buffer, prefixes: Sequence[bytes]) -> bool:
    return any(topic[: len(prefix)] == prefix for prefix in prefixes)


class _Peer:
    """One client's connection."""

    def __init__(self, endpoint: _Endpoint, connected: socket.socket) -> None:
        self.identity = b""
        self.topics: list[bytes] = []
        self._endpoint = endpoint
        self._socket = connected
        self._fd = connected.fileno()
        self._loop = endpoint.loop
        self._decoder = zmtp.Decoder()
        self._queue = OutputQueue(endpoint.queue_limit)
        self._writing = [memoryview(zmtp.GREETING + zmtp.ready(endpoint.socket_type))]
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
        return topics == _EVERYTHING or _matches(topic, topics)

    @property
    def pending(self) -> int:
        """Bytes that wait for it."""
        return self._queue.pending

    @property
    def settled(self) -> bool:
        """Whether nothing waits, nor is half written."""
        return not self._writing and not self._queue.entries

    def send(self, message: Message, parts: Sequence[Buffer] | None = None) -> None:
        """Queue a message. It is written when the loop has run what is ready now, together with others.

        With ``parts``, which are its own, it may be joined with others when many wait.
        """
        if self._closed or self._finishing:
            return
        if self._queue.add(message, parts):
            log.error("a client that does not read %d MB of replies was disconnected", self.pending >> 20)
            self.drop("it does not read", cut_off=True)
        elif not self._scheduled and not self._blocked:
            self._scheduled = True
            self._loop.call_soon(self._flush)

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
        if not self._closed and not self.settled:
            self._finishing = True
            self._loop.call_later(LINGER, self.drop, "it did not take the last messages")
        else:
            self.drop("the bridge was closed")

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
        while self._queue.entries and taken < _READ_SIZE and len(writing) < _MAX_BUFFERS:
            entry = self._queue.take()
            if isinstance(entry, Notice):
                entry = Message(zmtp.encode(entry.parts(self._endpoint.key, _SLOW)))
            elif isinstance(entry, StreamRun):
                entry = Message(zmtp.encode(entry.parts(self._endpoint.key)))
            assert isinstance(entry, Message)
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


_SLOW = "this client reads more slowly than the kernel prints"
_EVERYTHING = [b""]
