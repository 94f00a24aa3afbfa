"""The messages of one remote kernel between local applications and its gateway, whatever becomes of the connection.

The gateway knows this session by its id and gives it what it missed. Applications' requests are checked against the
local key (the gateway's protocol carries no signatures), spliced into WebSocket frames and kept until the kernel is
known to have them; what comes is signed with the local key and led to the application that asked. Messages that the
gateway sends twice are passed on once.

Memory: above a bound of waiting requests no more are read from applications; output that they do not take is
bounded by the bridge.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import secrets
import time
import uuid
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, Protocol

from sandbox_gateway import host_replies, messages, waking
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.messages import Buffer
from sandbox_gateway.remote import frames
from sandbox_gateway.remote.address import segment
from sandbox_gateway.remote.client import GatewayClient, RemoteSandbox, Unreachable
from sandbox_gateway.remote.connection import Connection, ConnectionLost, connect
from sandbox_gateway.remote.in_flight import InFlight, Pending
from sandbox_gateway.remote.waiting import Waiting
from sandbox_gateway.wire.frames import Channel

log = logging.getLogger(__name__)

PATIENCE: Final = 600.0
"""Seconds without a connection after which a kernel is given up: as long as a gateway keeps a session."""
FORGOTTEN: Final = 540.0
"""Seconds away (on the wall's clock) after which the gateway may have forgotten what it kept for us."""
STABLE: Final = 10.0
"""Seconds that a connection has to live to count as one: a gateway that hangs up at once is not asked for ever."""
FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 10.0
"""Seconds between two tries to connect."""
SETTLING: Final = 15.0
"""Seconds that a gateway which has just started may not know its kernels."""
LOOK: Final = 15.0
"""Seconds between two looks at a kernel that does not answer the barrier, or sleeps in the middle of a cell."""
A_MOMENT: Final = 0.5
"""Seconds until the next look at a kernel that is just falling asleep or waking up."""
SEEN: Final = 20_000
"""Ids of messages that are remembered, to pass none on twice: more than a gateway repeats after a break."""
SESSION_HEADER: Final = "Sandbox-Session"
"""What the gateway's handshake may say of the session: ``new`` when it does not know it any more, else ``resumed``."""
LOST: Final = "RemoteKernelUnreachable"
"""``ename`` of a request whose reply was lost, or that cannot be brought to the kernel."""


class Applications(Protocol):
    """The local side: :class:`sandbox_gateway.zmq_bridge.Bridge`."""

    def deliver(self, channel: int, parts: Sequence[Buffer]) -> None:
        """Pass a message on."""
        ...

    def hold(self, held: bool) -> None:
        """Take no more requests, or go on."""
        ...


class Listener(Protocol):
    """Who is told what becomes of the kernel."""

    def shutdown_asked(self, restart: bool) -> None:
        """An application asks the kernel to end; the message goes no further."""
        ...

    def kernel_state(self, state: str) -> None:
        """The kernel's status as its clients see it."""
        ...

    def given_up(self, error: SandboxGatewayError) -> None:
        """The kernel cannot be reached any more."""
        ...


class RemoteSession:
    """Use it on one event loop: :meth:`start`, then :meth:`request` for what applications say, :meth:`close`."""

    def __init__(
        self,
        client: GatewayClient,
        sandbox_id: str,
        key: bytes,
        applications: Applications,
        listener: Listener,
        *,
        patience: float = PATIENCE,
    ) -> None:
        self.id = str(uuid.uuid4())
        self._client = client
        self._sandbox_id = sandbox_id
        self._key = key
        self._applications = applications
        self._listener = listener
        self._patience = patience
        self._in_flight = InFlight()
        self._waiting = Waiting(applications.hold)
        self._barrier: asyncio.Future[str] | None = None
        self._own: deque[str] = deque(maxlen=16)
        self._asked: set[str] = set()
        """Of our own questions those since the last reconnect: older ones were asked before what was sent since."""
        self._seen: dict[str, int] = {}
        self._running: asyncio.Task[None] | None = None
        self._error: SandboxGatewayError | None = None
        self._malformed = 0
        self._attempt = 0
        self._alone_since = time.monotonic()
        self._finding: asyncio.Task[None] | None = None

    @property
    def over(self) -> bool:
        """Whether it was given up, or closed."""
        return self._running is None or self._running.done()

    async def start(self) -> None:
        """Connect, and stay connected. Raises what the gateway refuses the first connection with."""
        for pause in (FIRST_PAUSE, 1.0, None):
            try:
                connection = await connect(self._client, *self._address, self._received)
            except Unreachable:
                if pause is None:
                    raise
                await asyncio.sleep(pause)
            else:
                self._running = asyncio.create_task(self._run(connection))
                return

    async def close(self) -> None:
        """End it; what waits is dropped."""
        running, self._running = self._running, None
        if running is not None:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    def restarted(self) -> None:
        """The kernel that had the requests is gone: nobody waits for their replies."""
        self._in_flight.clear()
        if self._finding is not None:
            self._finding.cancel()
        self._waiting.unbar()

    # What applications say

    def request(self, channel: int, parts: list[bytes]) -> None:
        """Take a message of an application's, its identity first."""
        request = messages.read_request(self._key, parts)
        if request is None:
            # Whoever may connect to a port of this machine is not yet somebody who may run code.
            log.warning("a message that is malformed or not signed was dropped")
            return
        if request.msg_type == "shutdown_request":
            self._shutdown(channel, request)
            return
        if self._error is not None:
            self._answer(host_replies.failure(self._key, channel, request, LOST, self._error.message))
            return
        at = len(request.identities) + 2
        header = json.loads(request.header)
        self._waiting.add(
            Pending(
                channel,
                str(header.get("msg_id", "")),
                messages.Request(request.msg_type, request.identities, request.header, messages.EMPTY),
                frames.encode(channel, parts[at:]),
                apart=bool(header.get("subshell_id")),
                wakes=waking.effect(channel, request.msg_type, request.content) is waking.Effect.WAKE,
            )
        )

    def _shutdown(self, channel: int, request: messages.Request) -> None:
        # The kernel is ended or started anew by the gateway, which would take its own end for a crash.
        try:
            restart = bool(json.loads(bytes(request.content)).get("restart"))
        except (ValueError, AttributeError, RecursionError):
            restart = False
        content = json.dumps({"status": "ok", "restart": restart}).encode()
        self._answer(host_replies.answer(self._key, channel, request, content))
        self._listener.shutdown_asked(restart)

    def _answer(self, outgoing: host_replies.Outgoing) -> None:
        for channel, parts in outgoing:
            self._applications.deliver(channel, parts)

    # What the kernel says

    def _received(self, frame: bytes) -> None:
        try:
            channel, body = frames.decode(frame)
            header, parent = _object(body[0]), _object(body[1])
        except ValueError as error:
            self._malformed += 1
            if self._malformed <= 20:
                log.warning("a malformed message of the gateway's was dropped: %s", error)
            return
        if self._twice(header.get("msg_id"), len(body[3])):
            return
        request, kind = str(parent.get("msg_id", "")), str(header.get("msg_type", ""))[: messages.MAX_TYPE]
        if request in self._own:
            barrier = self._barrier if channel == Channel.SHELL and request in self._asked else None
            if barrier is not None and not barrier.done():
                barrier.set_result("" if _refused(body[3]) else kind)
            return
        identities = self._in_flight.heard(channel, request)
        signed: list[Buffer] = [messages.DELIMITER, messages.sign(self._key, body[:4]), *body]
        if channel == Channel.IOPUB:
            topic = f"kernel.{self._sandbox_id}.{kind}".encode(errors="replace")
            self._applications.deliver(channel, [topic, *signed])
            if kind in ("status", "shutdown_reply"):
                self._state(body[3])
        elif identities is not None:
            self._applications.deliver(channel, [*identities, *signed])

    def _state(self, content: memoryview) -> None:
        with contextlib.suppress(ValueError):
            said = _object(content)
            # What is published of a shutdown is a restart that somebody asked for; of the end nothing is said.
            restart = "restarting" if said.get("restart") is True else ""
            self._listener.kernel_state(str(said.get("execution_state", restart)))

    def _twice(self, msg_id: Any, size: int) -> bool:
        """Whether a message came before; ``size`` is its content's: lines that were joined since have the id of the
        first of them, and are more."""
        if not isinstance(msg_id, str) or not 0 < len(msg_id) <= 128:
            return False
        if self._seen.get(msg_id) == size:
            return True
        self._seen[msg_id] = size
        if len(self._seen) > SEEN:
            del self._seen[next(iter(self._seen))]
        return False

    # The connection

    @property
    def _address(self) -> tuple[str, dict[str, str]]:
        return f"/api/kernels/{segment(self._sandbox_id)}/channels", {"session_id": self.id}

    async def _run(self, connection: Connection) -> None:
        try:
            while True:
                reason = await self._serve(connection)
                log.warning("kernel %s on %s: %s; connecting again", self._sandbox_id, self._client.address.url, reason)
                gone_since = connection.last_sign
                connection = await self._again(connection)
                self._recover(connection, gone_since)
        except SandboxGatewayError as error:
            self._give_up(error)
        except Exception as error:
            log.exception("the session of kernel %s failed", self._sandbox_id)
            self._give_up(SandboxGatewayError("internal", str(error)))

    async def _serve(self, connection: Connection) -> str:
        """Carry messages until the connection breaks; returns why it did."""
        pump = asyncio.create_task(self._pump(connection))
        try:
            return await connection.watch()
        finally:
            work = [task for task in (pump, self._finding) if task is not None]
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            await connection.close()

    async def _again(self, before: Connection) -> Connection:
        """The next connection. Raises when there will be none."""
        now = time.monotonic()
        if now - before.opened >= STABLE:
            self._attempt, self._alone_since = 0, now
        unknown_since = 0.0
        while True:
            await asyncio.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2**self._attempt) * (0.5 + random.random()))
            self._attempt += 1
            try:
                return await connect(self._client, *self._address, self._received)
            except Unreachable as error:
                if time.monotonic() - self._alone_since > self._patience:
                    text = f"{error.message}; it was tried for {self._patience:.0f} s"
                    raise SandboxGatewayError("gateway_unreachable", text, error.hint) from error
            except SandboxGatewayError as error:
                if error.code not in {"unknown_sandbox", "not_found", "internal"}:
                    raise
                unknown_since = unknown_since or time.monotonic()
                sandbox = await self._sandbox()
                if sandbox is not None and sandbox.ended:
                    raise ended(sandbox) from error
                if sandbox is None and time.monotonic() - unknown_since > SETTLING:
                    raise

    async def _sandbox(self) -> RemoteSandbox | None:
        """The sandbox as the gateway tells; None when that cannot be known now."""
        try:
            return await self._client.get(self._sandbox_id)
        except SandboxGatewayError:
            return None
        except Exception:
            # A kernel that may be well is not given up, and its requests are not held back, for what is wrong here.
            log.exception("sandbox %s could not be asked for", self._sandbox_id)
            return None

    async def _pump(self, connection: Connection) -> None:
        while True:
            item = await self._waiting.next()
            frame = item.frame  # which is let go of when anything is heard of it
            self._in_flight.sent(item)
            try:
                await connection.write(frame)
            except ConnectionLost:
                return  # it is among what is in flight, and is judged after the reconnect

    def _give_up(self, error: SandboxGatewayError) -> None:
        self._error = error
        for item in (*self._in_flight.everything(), *self._waiting.clear()):
            self._fail(item, error.message)
        self._listener.given_up(error)

    def _fail(self, item: Pending, why: str, ename: str = LOST) -> None:
        self._answer(host_replies.failure(self._key, item.channel, item.request, ename, why))

    # After a break

    def _recover(self, connection: Connection, gone_since: float) -> None:
        said = connection.header(SESSION_HEADER)
        forgotten = said == "new" if said else time.time() - gone_since > FORGOTTEN
        sent = self._in_flight.shell()
        # Until it is known what is to be sent again, nothing may overtake that.
        self._waiting.bar(self._in_flight.unheard, self._in_flight.repeatable())
        self._asked.clear()
        if sent and (forgotten or self._waiting.barred):
            self._finding = asyncio.create_task(self._find_out(connection, sent, forgotten))

    async def _find_out(self, connection: Connection, sent: Sequence[str], forgotten: bool) -> None:
        while True:
            try:
                settled = await self._barrier_passed(connection, sent, forgotten)
                break
            except ConnectionLost:
                return  # all of this begins anew
            except Exception:
                # Without a verdict every request would wait for ever.
                log.exception("what kernel %s has is not known yet; it is asked again", self._sandbox_id)
                await asyncio.sleep(LOOK)
        verdict = self._in_flight.judge(sent, settled=settled, forgotten=forgotten)
        self._waiting.unbar(verdict.again)
        for item in verdict.lost:
            self._fail(item, "the connection to the gateway broke, and the reply with it; the kernel may have run it")

    async def _barrier_passed(self, connection: Connection, sent: Sequence[str], forgotten: bool) -> bool:
        """True: the kernel has answered all that it had. False: it fell asleep with nothing to do, and all that it said
        before has come.

        One that was put to sleep in a cell has what was sent behind that in its queue, perhaps: it is waited for. Where
        the gateway has ``forgotten`` the session, one that sleeps with nothing to do will say nothing more either.
        """
        asked, answered = "", asyncio.get_running_loop().create_future()
        while True:
            sandbox = await self._sandbox()
            if sandbox is not None and sandbox.falling_asleep:
                await asyncio.sleep(A_MOMENT)
                continue
            asleep = sandbox if sandbox is not None and sandbox.asleep else None
            if sandbox is not None and sandbox.state == "running":
                # Somebody who puts it to sleep from now on does so in spite of what was asked for before.
                self._waiting.wanted.clear()
            # The gateway answers the second one by itself, behind what it still has for us, and wakes nobody.
            question = "comm_info_request" if asleep is None else "kernel_info_request"
            if question != asked:
                asked, answered = question, await self._ask(connection, question)
            await asyncio.wait((answered,), timeout=LOOK)
            if not answered.done():
                continue
            if answered.result() == "comm_info_reply":
                return True
            asked = ""
            if asleep is None:
                # It could not be woken for somebody: who waits here has to be told, or tried for, as well.
                self._waiting.want_again()
                await asyncio.sleep(A_MOMENT)
            elif asleep.busy or (not forgotten and self._in_flight.begun(sent)):
                await self._awake()
            else:
                return forgotten

    async def _awake(self) -> None:
        """Return when the kernel does not sleep any more. It is woken for a request that is new, by the same rule as at
        the gateway, which does not get to see it before the bar is gone; never for what the kernel may have."""
        while (sandbox := await self._sandbox()) is None or sandbox.asleep:
            if self._waiting.wanted.is_set():
                # Once for each: somebody may put it to sleep again.
                self._waiting.wanted.clear()
                await self._resume()
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK):
                    await self._waiting.wanted.wait()

    async def _resume(self) -> None:
        try:
            await self._client.resume(self._sandbox_id)
        except Unreachable:
            await asyncio.sleep(A_MOMENT)
            self._waiting.wanted.set()
        except SandboxGatewayError as error:
            log.warning("kernel %s could not be woken: %s", self._sandbox_id, error)
            # Who waits gets the reason, as from the gateway.
            for item in self._waiting.unanswerable():
                self._fail(item, error.message, host_replies.ASLEEP)

    async def _ask(self, connection: Connection, question: str) -> asyncio.Future[str]:
        """Ask the kernel something of our own; the future gets the type of the first answer to anything of ours, or
        nothing where it could not be brought to the kernel."""
        msg_id = secrets.token_hex(16)
        self._own.append(msg_id)
        self._asked.add(msg_id)
        if self._barrier is None or self._barrier.done():
            self._barrier = asyncio.get_running_loop().create_future()
        message = messages.build(b"", question, {}, session=self.id, msg_id=msg_id)
        await connection.write(frames.encode(int(Channel.SHELL), message[3:]))
        return self._barrier


def ended(sandbox: RemoteSandbox) -> SandboxGatewayError:
    """The error for a kernel that its gateway says is dead."""
    code = "expired" if sandbox.state == "expired" else "kernel_died"
    return SandboxGatewayError(code, sandbox.reason or f"its sandbox is {sandbox.state}")


def _refused(content: Buffer) -> bool:
    """Whether a reply is the gateway's word that the kernel could not take the request."""
    try:
        return _object(content).get("ename") in (host_replies.ASLEEP, host_replies.UNAVAILABLE)
    except ValueError:
        return False


def _object(raw: Buffer) -> dict[str, Any]:
    """A small JSON object. Raises ValueError."""
    if len(raw) > messages.MAX_HEADER:
        raise ValueError(f"a header of {len(raw)} bytes")
    try:
        found = json.loads(bytes(raw))
    except RecursionError:
        raise ValueError("a header that is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("a header that is no JSON object")
    return found
