"""A TCP proxy between a client and a gateway that can be cut, stopped and told to swallow what it is given."""

from __future__ import annotations

import contextlib
import socket
import threading


class CutProxy:
    """Listens on 127.0.0.1; each connection is passed on to ``port``."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._refusing = False
        self._swallowing = threading.Event()
        self._closed = False
        self.connections = 0
        self.swallowed = 0
        """Bytes that were taken and not passed on."""
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """What the client uses."""
        return f"http://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Break all connections."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def refuse(self, refusing: bool = True) -> None:
        """Break all connections, and take none until told otherwise."""
        self._refusing = refusing
        if refusing:
            self.cut()

    def swallow(self, swallowing: bool = True) -> None:
        """Take what clients send and pass nothing on, as a network that is gone does."""
        (self._swallowing.set if swallowing else self._swallowing.clear)()

    def close(self) -> None:
        """End."""
        self._closed = True
        self._listening.close()
        self.cut()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            if self._refusing:
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            self.connections += 1
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._pairs.append((client, server))
            threading.Thread(target=self._carry, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._carry, args=(server, client, False), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, upwards: bool) -> None:
        try:
            while data := source.recv(1 << 18):
                if upwards and self._swallowing.is_set():
                    self.swallowed += len(data)
                    continue
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            if upwards:
                source.close()
                sink.close()
