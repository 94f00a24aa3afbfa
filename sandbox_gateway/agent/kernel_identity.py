"""What a restored kernel is given so that it is nobody else's copy; runs in the kernel's own process.

Loaded by :mod:`sandbox_gateway.agent.ipykernel_app` from this folder, in the kernel's interpreter: standard library
only. A restore makes clones that share everything in memory, random number generators and keys included. The agent
sends a private message on the control channel, which is served while a cell runs, and :meth:`Identity.apply` changes
all of it before the reply leaves.

The environment is changed by difference: names and values that the kernel was started with give way to the new ones,
what the program has changed since (ipykernel's ``PAGER``, a cell's ``os.environ[...] = ...``) stays, unless the new
environment gives that very name another value than the old one did.
"""

from __future__ import annotations

import base64
import os
import posix
import sys
import time
import uuid
from collections.abc import Mapping, MutableMapping
from typing import Any

from _sandbox_seeds import Seeds  # type: ignore[import-not-found]

IDENTITY = "sandbox_identity_request"
PING = "sandbox_ping_request"
_PRIVATE = b'"sandbox_'
_DELIMITER = b"<IDS|MSG>"
_AGENT = b"agent"
_CLOCK_TOLERANCE = 30.0
_TEMPORARY = ("TMPDIR", "TEMP", "TMP")


class Identity:
    """Knows what the kernel was started with; made before ipykernel changes anything of that."""

    def __init__(self) -> None:
        self._environ = os.environ  # user code may put something else there
        self._given = dict(os.environ)
        self._cwd = _where()
        self._forced: frozenset[str] = frozenset()
        self._kernel: Any = None

    def started(self, kernel: Any) -> None:
        """The application is initialized: what it has set in the environment would override anything given."""
        self._kernel = kernel
        changed = {name for name, value in self._environ.items() if self._given.get(name) != value}
        self._forced = frozenset(changed - {"MPLBACKEND"})  # that one is a default

    def serve(self, kernel: Any) -> None:
        """Let ``kernel`` answer the agent's private requests on its control channel, even beside one in progress."""
        dispatch = kernel.dispatch_control

        async def dispatch_control(message: Any) -> None:
            idents, frames = _split(message)
            if idents == [_AGENT] and len(frames) > 1 and _PRIVATE in bytes(frames[1]):
                self._answer(kernel, idents, message)
            else:
                result = dispatch(message)
                if result is not None:  # ipykernel 6 returns nothing to wait for
                    await result

        kernel.dispatch_control = dispatch_control

    def _answer(self, kernel: Any, idents: list[bytes], message: Any) -> None:
        session = kernel.session
        try:
            _, frames = session.feed_identities(message, copy=False)
            request = session.deserialize(frames, content=True, copy=False)
            kind = str(request["header"]["msg_type"])
        except Exception:  # not signed with the key: the agent would have done it right
            return
        content: dict[str, Any] = {"status": "ok"}
        try:
            if kind == IDENTITY:
                content.update(self.apply(request["content"]))
            elif kind != PING:
                raise ValueError(f"this kernel knows no {kind!r}")
        except Exception as error:  # whatever it is, the agent must hear of it
            content = {"status": "error", "evalue": f"{type(error).__name__}: {error}"[:1000]}
        reply = kind.replace("_request", "_reply")
        session.send(kernel.control_stream, reply, content, parent=request, ident=idents)

    def apply(self, given: Mapping[str, Any]) -> dict[str, list[str]]:
        """Become what ``given`` says (see the agent's operation ``identify``); what was seeded, what could not be."""
        environment, missing = dict(given["env"]), []
        before = self._given
        self._set_environment(environment)
        if before.get("TZ") != environment.get("TZ"):
            time.tzset()
        if not self._enter(str(given["cwd"])):
            missing.append("cwd")
        self._refresh(before, environment)
        if abs(time.time() - float(given["time"])) > _CLOCK_TOLERANCE:
            missing.append("clock")
        seeds = Seeds(base64.b64decode(given["entropy"]))
        seeds.sow()
        self._take_names(str(given["session"]), given.get("key"))
        self._given = environment
        return {"seeded": seeds.seeded, "missing": missing + seeds.missing}

    def rehearse(self) -> None:
        """Do once what every clone will do first: what it needs is then in memory."""
        Seeds(os.urandom(64)).sow()

    # -- environment and working directory

    def _set_environment(self, new: Mapping[str, str]) -> None:
        given, current = self._given, dict(self._environ)
        wanted = dict(new)
        for name, value in current.items():
            if given.get(name) != value and (name in self._forced or new.get(name) == given.get(name)):
                wanted[name] = value
        for name, value in given.items():
            if name not in current and new.get(name) == value:
                wanted.pop(name, None)
        _replace(self._environ, wanted)
        if os.environ is not self._environ and isinstance(os.environ, MutableMapping):
            _replace(os.environ, wanted)
        # Where os.environ came from; a reload of os would bring the old values back.
        started: Any = posix.environ
        started.clear()
        started.update({os.fsencode(name): os.fsencode(value) for name, value in wanted.items()})

    def _enter(self, directory: str) -> bool:
        """Change to ``directory``, unless the program went elsewhere by itself; False if it cannot be entered."""
        here = _where()
        before, self._cwd = self._cwd, directory
        if here is not None and here != before:
            return True
        try:
            os.chdir(directory)
        except OSError:
            os.chdir("/")  # as at a start of the kernel
            self._cwd = "/"
        shell = getattr(self._kernel, "shell", None)
        if shell is not None:
            visited = shell.user_ns.get("_dh")
            if isinstance(visited, list) and [str(place) for place in visited] == [before]:
                visited[0] = type(visited[0])(self._cwd)
            if getattr(shell, "starting_dir", None) == before:
                shell.starting_dir = self._cwd
        return self._cwd == directory

    def _refresh(self, before: Mapping[str, str], after: Mapping[str, str]) -> None:
        """Drop what was computed from the old environment and host name and is kept by modules."""
        temporary = sys.modules.get("tempfile")
        if temporary is not None and any(before.get(name) != after.get(name) for name in _TEMPORARY):
            temporary.tempdir = None  # type: ignore[attr-defined]
        platform: Any = sys.modules.get("platform")
        if hasattr(platform, "_uname_cache"):
            platform._uname_cache = None  # it holds the host's name
        shell = getattr(self._kernel, "shell", None)
        if shell is None:
            return
        if before.get("HOME") != after.get("HOME") and "HOME" in after and hasattr(shell, "home_dir"):
            shell.home_dir = after["HOME"]
        name = "JPY_SESSION_NAME"
        if before.get(name) != after.get(name) and after.get(name):
            shell.user_ns["__session__"] = after[name]  # as ipykernel does when it starts

    # -- names and keys

    def _take_names(self, session_id: str, key: Any) -> None:
        kernel = self._kernel
        session = kernel.session
        if session.username == self._given.get("USER", "username"):
            session.username = self._environ.get("USER", "username")
        session.digest_history.clear()
        session.session = session_id
        if isinstance(key, str):
            session.key = key.encode()  # makes the digest that signs anew, too
        kernel.ident = str(uuid.uuid4())
        shell = getattr(kernel, "shell", None)
        for part, topic in (("displayhook", "execute_result"), ("display_pub", "display_data")):
            publisher: Any = getattr(shell, part, None)
            if getattr(publisher, "topic", None) is not None:
                publisher.topic = kernel._topic(topic)


def _replace(environ: MutableMapping[str, str], wanted: Mapping[str, str]) -> None:
    """Additions first, so that no other thread finds a moment without ``PATH``."""
    for name, value in wanted.items():
        if environ.get(name) != value:
            environ[name] = value
    for name in list(environ):
        if name not in wanted:
            del environ[name]


def _where() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # removed, or below a mount that is gone
        return None


def _split(message: Any) -> tuple[list[bytes], list[Any]]:
    """Identities, and the frames from the signature on, of a message of ZMQ frames or bytes."""
    parts = [getattr(part, "buffer", part) for part in message]
    for index, part in enumerate(parts[:16]):
        if len(part) == len(_DELIMITER) and bytes(part) == _DELIMITER:
            return [bytes(ident) for ident in parts[:index]], parts[index + 1 :]
    return [], []
