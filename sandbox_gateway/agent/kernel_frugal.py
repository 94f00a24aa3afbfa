"""What ipykernel does for each cell and need not do in a sandbox; runs in the kernel's process.

Beside :mod:`sandbox_gateway.agent.ipykernel_app`; standard library and what ipykernel brings. Inside gVisor a system
call after a pause costs some 0.1 ms, where a plain kernel pays less than 0.001: it was 30 of them for a cell that the
process's id was asked for, and 40 for its line of history. Memory that is touched for the first time costs more, too,
and a large image was made three times over on its way into a message.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any
from uuid import uuid4

_session: Any = import_module("jupyter_client.session")

LONG = 1 << 16
"""Characters from which on a text is looked at whether it can go into its message as it is."""
_BLOCK = 1 << 16
_ESCAPED = bytes(byte < 0x20 or byte in b'"\\' for byte in range(256))
"""For each byte of a text in ASCII: 1 where JSON writes something else for it (RFC 8259 section 7)."""

HISTORY_LINES = 64
HISTORY_SECONDS = 2.0
"""Lines of history that may be unwritten, and for how long: a kernel that is killed loses those."""


class FrugalSession(_session.Session):  # type: ignore[misc]
    """A session that does not ask for the process's id at each message, and sends nothing from forks, as stock.

    Its messages are those that stock makes, byte by byte.
    """

    check_pid: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.check_pid:
            self.check_pid = False
            os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        self.check_pid = True

    @property
    def msg_id(self) -> str:
        """As stock: the session, the process that it was made in, and a number."""
        number = self.message_count
        self.message_count += 1
        return f"{self.session}_{self.pid}_{number}"

    def serialize(self, msg: dict[str, Any], ident: Any = None) -> list[bytes]:
        """As stock; what a display carries goes in as it is where JSON would not change it, as of an image."""
        content = msg.get("content")
        if isinstance(content, dict) and self.pack is _session.json_packer:
            packed = with_plain_texts(content, self.pack)
            if packed is not None:
                msg = {**msg, "content": packed}
        serialized: list[bytes] = super().serialize(msg, ident)
        return serialized


def with_plain_texts(content: dict[str, Any], pack: Callable[[Any], bytes]) -> bytes | None:
    """A message's content as ``pack`` makes it, without its passing over each character of the long texts that its
    data hold; None: there are none that could go in as they are."""
    data = content.get("data")
    if type(data) is not dict:
        return None
    texts = {mime: octets for mime, text in data.items() if (octets := _plain(text)) is not None}
    if not texts:
        return None
    places = {mime: uuid4().hex for mime in texts}
    left = pack({**content, "data": {**data, **places}})
    parts = []
    for mime, place in places.items():
        before, _, left = left.partition(place.encode())
        parts += [before, texts[mime]]
    return b"".join([*parts, left])


def _plain(text: Any) -> bytes | None:
    """The octets of a long text that JSON writes as they are; None of any other value."""
    if type(text) is not str or len(text) < LONG or not text.isascii():
        return None
    octets = text.encode("ascii")
    for start in range(0, len(octets), _BLOCK):
        if 1 in octets[start : start + _BLOCK].translate(_ESCAPED):
            return None
    return octets


def spare(app: Any) -> None:
    """Spare an application's kernel what it need not do."""
    kernel = app.kernel
    # Text is in the pipe when a flush returns: there is nothing to wait for before the reply.
    kernel._execute_sleep = 0
    # The logger lets everything pass, so that each handler may choose: records are made that nobody takes.
    levels = [handler.level for handler in app.log.handlers]
    if levels:
        app.log.setLevel(max(app.log.level, min(levels)))
    history = getattr(getattr(kernel, "shell", None), "history_manager", None)
    if getattr(history, "db_cache_size", None) == 0 and getattr(history, "save_flag", None) is not None:
        _Lines(kernel, history)


class _Lines:
    """Has the history's thread write a moment after a cell, once for several."""

    def __init__(self, kernel: Any, history: Any) -> None:
        self._kernel = kernel
        self._history = history
        self._due = False
        history.db_cache_size = HISTORY_LINES
        kernel.shell.events.register("post_run_cell", self.ran)

    def ran(self, *_: Any) -> None:
        """A cell has ended."""
        if not self._due:
            with contextlib.suppress(AttributeError, RuntimeError):  # no loop: the lines are written when enough
                self._kernel.io_loop.call_later(HISTORY_SECONDS, self._write)
                self._due = True

    def _write(self) -> None:
        self._due = False
        if self._history.save_flag is not None:
            self._history.save_flag.set()
