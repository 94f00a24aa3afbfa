"""ipykernel, publishing and replying through a pipe of the agent's instead of threads and sockets.

This file is run as a script *in the kernel's interpreter*, in the place of ``python -m ipykernel_launcher``: it may
import the standard library, ipykernel and what that brings, nothing of ours. The agent names the write end of the
pipe in ``SANDBOX_IOPUB_FD``; without it, or with an ipykernel that we do not know, this is the stock application.

Why: a flushed line costs ipykernel a wake-up of its IOPub thread, one of ZMQ's thread and one of the reader's
process. Here the calling thread writes the frame itself. What must hold all the same:

- messages leave in the order in which they were made, from whatever thread;
- a KeyboardInterrupt may be raised between any two bytecodes of the main thread, and neither tears a frame nor loses
  or doubles text: what was written is recorded by C code in the same call that writes it (``list.extend(map(...))``);
- a signal's handler may print between any two of them, and inside a write that waits: what it flushes there is in the
  pipe when the code that it has interrupted goes on;
- forked children use ipykernel's own way (they never touch the pipe, nor a lock that another thread held);
- a full pipe makes the writer wait, not the agent;
- whoever else subscribes to the kernel's IOPub socket inside the sandbox gets everything too.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # this folder; its modules must not hide the user's

import contextlib
import fcntl
import os
import stat
import threading
import time
import traceback
import types
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from io import StringIO
from json.encoder import encode_basestring
from typing import Any


def _sibling(name: str) -> Any:
    """A module of this folder, which is on nobody's path, under a name that is in nobody's way."""
    known = f"_sandbox_{name}"
    spec = spec_from_file_location(known, os.path.join(os.path.dirname(os.path.abspath(__file__)), f"kernel_{name}.py"))
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} is missing beside {__file__}")
    sys.modules[known] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_PIECE = 16 * 1024 * 1024
"""Characters of a text that one message carries: they fit into a frame whatever they are (at most 7 bytes each)."""
_STARTED = time.time()
_shelf: Any = None
if "SANDBOX_MODULES" in os.environ:  # for a template: what is imported from here on comes from one file
    _shelf = _sibling("modules").Shelf.open(os.environ.pop("SANDBOX_MODULES"))
if "SANDBOX_IOPUB_FD" in os.environ:
    _sibling("debugger").defer()  # before ipykernel looks for it

# Untyped on purpose: this file meets whatever ipykernel the user has.
iostream: Any = import_module("ipykernel.iostream")
kernelapp: Any = import_module("ipykernel.kernelapp")
writer: Any = _sibling("writer")
shell: Any = _sibling("shell")
frugal: Any = _sibling("frugal")

_pipe: Any = None
_identity: Any = None
_preloads: list[str] | None = None
"""Modules to import before the kernel is ready; None: this is no template."""


class PipeIOPubThread(iostream.IOPubThread):  # type: ignore[misc]
    """The IOPub thread stays, for timers, subscriptions and forked children; messages do not pass it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._topics: set[bytes] = set()
        super().__init__(*args, **kwargs)

    def _handle_subscription(self, frames: list[bytes]) -> None:
        for frame in frames:
            if frame[:1] == b"\x01":
                self._topics.add(frame[1:])
            else:
                self._topics.discard(frame[1:])
        super()._handle_subscription(frames)

    def send_multipart(self, msg: list[Any], *args: Any, **kwargs: Any) -> None:
        """Write the message to the pipe before returning, from whatever thread."""
        pipe = _pipe
        if pipe is None or not pipe.usable:
            super().send_multipart(msg, *args, **kwargs)
            return
        pipe.writer.put(pipe.writer.entry(msg), [])
        self.after_put(pipe, msg)

    def after_put(self, pipe: Any, msg: list[Any]) -> None:
        """Write what is queued; serve other subscribers."""
        self.write_out(pipe)
        if self._topics and not pipe.writer.broken:
            super().send_multipart(msg)

    def write_out(self, pipe: Any) -> None:
        """Write what is queued, or publish it as usual where the pipe is gone."""
        try:
            left = pipe.writer.drain()
        except BaseException:
            # A signal's handler has raised something inside a write: what it has printed before, or the rest of a
            # frame, does not wait for the next output.
            if threading.current_thread() is not self.thread:
                self.schedule(lambda: self.write_out(pipe))
            raise
        for lost in left:
            super().send_multipart(lost)
        if pipe.writer.broken:
            pipe.writer.close()


class PipeOutStream(iostream.OutStream):  # type: ignore[misc]
    """stdout and stderr: flushing writes from the calling thread, and does not wake another."""

    _buffers: Any
    _parent_key: tuple[Any, Any] = (None, frozenset())
    _armed_at = -1e9
    _cached: tuple[Any, bytes] = (None, b"{}")
    _head: tuple[Any, str, str] = (None, "", "")

    muted = False

    @classmethod
    def mute(cls, wanted: bool) -> None:
        """Throw away what is written (nobody has asked for it), or no longer."""
        cls.muted = wanted

    def write(self, string: str) -> int | None:
        """Buffer text under the calling code's parent header. Stock asks for the process's id at each call, which
        inside gVisor costs more than all the rest."""
        pipe = _pipe
        if pipe is None or pipe.child or pipe.writer.broken or self.echo is not None or self.pub_thread is None:
            return super().write(string)  # type: ignore[no-any-return]
        if not isinstance(string, str):
            raise TypeError(f"write() argument must be str, not {type(string)}")
        if self.muted:
            return len(string)
        parent = self.parent_header
        seen, key = self._parent_key
        if parent is not seen:
            key = frozenset(parent.items())
            self._parent_key = (parent, key)
        with self._buffer_lock:
            self._buffers[key].write(string)
        self._schedule_flush()
        return len(string)

    def flush(self) -> None:
        """Publish what was written so far; when this returns it is in the pipe."""
        pipe = _pipe
        if pipe is not None and pipe.usable and self.pub_thread is not None:
            self._flush()
        else:
            super().flush()

    def _schedule_flush(self) -> None:
        # One timer serves all writes until it fires; flushing in between leaves it alone. Should an interrupt have
        # kept it from being set, the next write after its time sets it again.
        now = time.monotonic()
        if now - self._armed_at < 2 * self.flush_interval:
            return
        self._armed_at = now
        self.pub_thread.schedule(self._arm)

    def _arm(self) -> None:
        self._io_loop.call_later(self.flush_interval, self._timer)

    def _timer(self) -> None:
        self._armed_at = -1e9
        self._flush()

    def _flush(self) -> None:
        pipe = _pipe
        if pipe is None or not pipe.usable or not self._is_plain():
            lock = pipe.flush_lock if pipe is not None else contextlib.nullcontext()
            with lock:
                try:
                    super()._flush()
                except (ValueError, MemoryError):  # stock raises it in the IOPub thread, where it ends nobody's cell
                    traceback.print_exc(file=sys.__stderr__)
            return
        # Both streams share the lock, and it is held until the text is in the queue: lines keep their order.
        with pipe.flush_lock:
            self._flush_pending = self._subprocess_flush_pending = False
            self._publish(pipe)

    def _flush_buffers(self) -> Iterator[tuple[Any, str]]:
        """What stock makes its messages of, in pieces."""
        for parent, text in super()._flush_buffers():
            for start in range(0, len(text), _PIECE):
                yield parent, text[start : start + _PIECE]

    def _publish(self, pipe: Any) -> None:
        taken: Any = None
        begun: dict[Any, tuple[str, list[Any]]] = {}
        try:
            with self._buffer_lock:
                fresh: Any = defaultdict(StringIO)
                # No call in between, hence no signal's handler, which might publish the same text.
                taken, self._buffers = self._buffers, fresh
            for parent, buffer in taken.items():
                text = _text(buffer)
                done: list[Any] = []
                begun[parent] = (text, done)
                for start in range(0, len(text), _PIECE):
                    message, entry = self._made(pipe, parent, text, start)
                    pipe.writer.put(entry, done)
                    self.pub_thread.after_put(pipe, message)
        except BaseException:
            self._give_back(taken, begun)
            raise

    def _give_back(self, taken: Any, begun: dict[Any, tuple[str, list[Any]]]) -> None:
        """An interrupt came while text was on its way: the pieces not queued yet go to the front of the buffers.

        So they do when a signal's handler has raised an error of its own. What fails by itself never comes here.
        """
        with self._buffer_lock:
            if taken is None or taken is self._buffers:
                return
            fresh: Any = defaultdict(StringIO)
            newer, self._buffers = self._buffers, fresh
            for parent, buffer in taken.items():
                if parent in begun:
                    text, done = begun[parent]
                    self._buffers[parent].write(text[len(done) * _PIECE :])
                else:
                    self._buffers[parent].write(buffer.getvalue())
            for parent, buffer in newer.items():
                self._buffers[parent].write(buffer.getvalue())

    def _made(self, pipe: Any, parent: Any, text: str, start: int) -> tuple[list[bytes], Any]:
        """The message of a piece of text and its entry; in the place of one that cannot be made, one that says so."""
        try:
            return self._make(pipe, parent, text, start)
        except Exception:
            try:
                self._make(pipe, parent, text, start)
            except Exception as error:
                # Given back, it would fail at each flush from now on, and with it all that flushes: cells, replies.
                traceback.print_exc(file=sys.__stderr__)
                note = _left_out(min(len(text) - start, _PIECE), error)
            else:
                raise  # it can be made: a signal's handler has raised that
        try:
            return self._make(pipe, parent, note, 0)
        except Exception:  # nor can the note; then it is what the text belongs to
            return self._make(pipe, frozenset(), note, 0)

    def _make(self, pipe: Any, parent: Any, text: str, start: int) -> tuple[list[bytes], Any]:
        message = self._encode(parent, text[start : start + _PIECE])
        return message, pipe.writer.entry(message)

    def _is_plain(self) -> bool:
        """Whether nobody changed how stream messages are made, so that we may make them the short way."""
        session = self.session
        return (
            not self._hooks
            and self.echo is None
            and not session.debug
            and not session.adapt_version
            and not session.metadata
            and session.packer in ("json", "orjson")
        )

    def _encode(self, parent: Any, text: str) -> list[bytes]:
        """The message that ``Session.msg`` and ``Session.serialize`` would make, without their detours."""
        session = self.session
        if self._cached[0] != parent:
            self._cached = (parent, session.pack(dict(parent)))
        known = (session.session, session.username)
        if self._head[0] != known:
            version = _protocol_version()
            self._head = (
                known,
                f'", "msg_type": "stream", "username": {encode_basestring(session.username)}, '
                f'"session": {encode_basestring(session.session)}, "date": "',
                f'", "version": "{version}"}}',
            )
        now = datetime.now(timezone.utc).isoformat()[:-6]  # noqa: UP017  (ipykernel runs on Python 3.10 too)
        header = f'{{"msg_id": "{session.msg_id}{self._head[1]}{now}Z{self._head[2]}'.encode()
        try:
            content = f'{{"name": "{self.name}", "text": {encode_basestring(text)}}}'.encode()
        except UnicodeEncodeError:  # lone surrogates, over which ipykernel's packer fails: show them as escapes
            text = text.encode("utf-8", "backslashreplace").decode()
            content = f'{{"name": "{self.name}", "text": {encode_basestring(text)}}}'.encode()
        parts = [header, self._cached[1], b"{}", content]
        return [self.topic, b"<IDS|MSG>", session.sign(parts), *parts]


def _text(buffer: StringIO) -> str:
    size = buffer.tell()
    try:
        return buffer.getvalue()
    except MemoryError as error:  # the buffer is not to be used again
        return _left_out(size, error)


def _left_out(size: int, error: Exception) -> str:
    return f"[sandbox] {size} characters of output were left out: they cannot be sent ({type(error).__name__})\n"


def _clear_shelf() -> None:
    """Import as everybody does from here on, and leave nothing of the file in memory."""
    global _shelf
    if _shelf is not None:
        with contextlib.suppress(Exception):  # it is out of the way; a template must not fail for what else is wrong
            _shelf.close()
        _shelf = None
    sys.modules.pop("_sandbox_modules", None)


def _protocol_version() -> str:
    from jupyter_client._version import protocol_version

    return str(protocol_version)


class PipeKernelApp(kernelapp.IPKernelApp):  # type: ignore[misc]
    """ipykernel's application with the classes above in their places."""

    outstream_class: Any = kernelapp.IPKernelApp.outstream_class

    def _session_default(self) -> Any:
        return frugal.FrugalSession(parent=self)

    def init_iopub(self, context: Any) -> None:
        """Make the IOPub socket as usual, with our thread around it."""
        kernelapp.IOPubThread = PipeIOPubThread
        super().init_iopub(context)

    def init_io(self) -> None:
        """Redirect the standard streams as usual, to our kind of stream unless the user configured another."""
        if self.outstream_class == "ipykernel.iostream.OutStream":
            module = types.ModuleType("_sandbox_iopub")
            module.OutStream = PipeOutStream  # type: ignore[attr-defined]
            sys.modules[module.__name__] = module
            self.outstream_class = "_sandbox_iopub.OutStream"
        super().init_io()

    def init_kernel(self) -> None:
        """Make the kernel, and tell the agent that messages will come through the pipe from now on."""
        super().init_kernel()
        shell.shorten(self.kernel, _pipe, self.iopub_thread.write_out)
        frugal.spare(self)
        _identity.serve(self.kernel)
        if _preloads is None:
            self._greet({})

    def initialize(self, argv: Any = None) -> None:
        """Initialize as usual, noting what that changes of the environment given."""
        super().initialize(argv)
        _identity.started(self.kernel)

    def start(self) -> None:
        """Run the kernel; for a template, import what was asked for and settle down before it is ready."""
        if _preloads is not None:
            loop = import_module("tornado.ioloop").IOLoop.current()
            loop.add_callback(self._become_template, _sibling("preload"))  # once the kernel listens
        super().start()

    async def _become_template(self, preload: Any) -> None:
        loaded, failed = preload.preload(_preloads, PipeOutStream.mute)
        await preload.rehearse(self.kernel, _identity.rehearse)
        _clear_shelf()
        preload.settle()
        self._greet({"preloaded": loaded, "preload_failed": failed})

    def tell_modules(self) -> None:
        """Publish the code of all modules that were imported, for another kernel (:mod:`.kernel_modules`)."""
        _sibling("modules").tell(self.kernel, _STARTED)

    def _greet(self, facts: dict[str, Any]) -> None:
        session = self.session
        message = session.msg("iopub_welcome", {"subscription": "", "identity": True, **facts})
        session.send(self.iopub_thread, message, ident=b"iopub_welcome")


def _take_pipe() -> Any:
    """The pipe that the agent named, unless this ipykernel lacks what the classes above build on."""
    text = os.environ.pop("SANDBOX_IOPUB_FD", "")
    if not text.isdigit():
        return None
    fd = int(text)
    try:
        if not stat.S_ISFIFO(os.fstat(fd).st_mode):
            return None
        # Out of the way, and not for programs that are run from here.
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, writer.HIGH_FD)
        os.close(fd)
    except OSError:
        return None
    known = ("_rotate_buffers", "_schedule_flush", "_flush", "_hooks", "flush")
    if all(hasattr(iostream.OutStream, name) for name in known):
        return writer.Pipe(moved)
    os.close(moved)  # the agent sees that, and listens to the socket
    return None


def _disguise() -> None:
    """Look like the stock classes to those who ask by name (``type(sys.stdout)``) and to ``sys.argv[0]``."""
    for ours, stock in ((PipeOutStream, iostream.OutStream), (PipeIOPubThread, iostream.IOPubThread)):
        ours.__module__, ours.__name__, ours.__qualname__ = (stock.__module__, stock.__name__, stock.__qualname__)
    spec = find_spec("ipykernel_launcher")
    if spec is not None and spec.origin:
        sys.argv[0] = spec.origin


def main() -> None:
    """Run the kernel until it is told to end."""
    global _pipe, _identity, _preloads
    _pipe = _take_pipe()
    names = os.environ.pop("SANDBOX_PRELOAD", None)
    if _pipe is not None:
        _preloads = None if names is None else names.split()
        _sibling("seeds")
        _identity = _sibling("identity").Identity()
    _disguise()
    (PipeKernelApp if _pipe is not None else kernelapp.IPKernelApp).launch_instance()


if __name__ == "__main__":
    main()
