"""The Python API: kernels in sandboxes for a program, without a server.

::

    async with Sandbox.create() as sandbox:
        async for message in sandbox.execute("print('hello')"):
            print(message)

Everything is done on the process's background loop (DESIGN 4.15), so a sandbox can be used from any event loop, from a
second ``asyncio.run``, and where a loop runs already; and a program that is busy does not keep its kernels waiting. No
method blocks the caller's loop. Every method raises :class:`~sandbox_gateway.errors.SandboxGatewayError` with a code,
a message and a hint.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar, overload

from sandbox_gateway import request as requests
from sandbox_gateway.background import background_loop
from sandbox_gateway.clones import ForkOutcome
from sandbox_gateway.embedded import lifecycle
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.events import Event, EventKind
from sandbox_gateway.execution import Execution
from sandbox_gateway.keeper import ask_keeper, take_over
from sandbox_gateway.kernel_client import KernelClient, client_of, left
from sandbox_gateway.kernelspecs import kernel_argv
from sandbox_gateway.lifecycle import Lifecycle
from sandbox_gateway.live import LiveSandbox
from sandbox_gateway.model import Death, DeathKind, KernelSpec, OnOwnerExit, State
from sandbox_gateway.profiles import DEFAULT_PROFILE, load_profiles
from sandbox_gateway.request import CreateRequest
from sandbox_gateway.results import Collector, Done, InputRequest, Result
from sandbox_gateway.runtimes.base import Stats
from sandbox_gateway.seat import Seat
from sandbox_gateway.snapshots import Kind, Snapshot

T = TypeVar("T")

Answer = Callable[[InputRequest], str]
"""Gives a cell the line that it asks for."""

_LAST = frozenset({EventKind.STOPPED, EventKind.DIED, EventKind.EXPIRED, EventKind.HANDED_OVER})
_MAX_EVENTS: Final = 10_000


class Opening(Awaitable["Sandbox"]):
    """A sandbox to be: ``sandbox = await opening``, or ``async with opening as sandbox``."""

    def __init__(self, make: Callable[[], Coroutine[Any, Any, Sandbox]], *, ours: bool) -> None:
        self._make = make
        self._ours = ours
        self._sandbox: Sandbox | None = None

    def __await__(self) -> Generator[Any, None, Sandbox]:
        return self._make().__await__()

    async def __aenter__(self) -> Sandbox:
        self._sandbox = await self._make()
        return self._sandbox

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sandbox is not None:
            await self._sandbox._left_behind(self._ours)


class _Resume:
    """``Sandbox.resume(id)`` of the class, ``await sandbox.resume()`` of one."""

    @overload
    def __get__(self, instance: None, owner: type[Sandbox]) -> Callable[[str], Opening]: ...

    @overload
    def __get__(self, instance: Sandbox, owner: type[Sandbox]) -> Callable[[], Awaitable[None]]: ...

    def __get__(self, instance: Sandbox | None, owner: type[Sandbox]) -> Callable[..., Any]:
        return owner._resumed if instance is None else instance._resume


class Sandbox:
    """One kernel in its sandbox; made by :meth:`create`, :meth:`resume`, :meth:`connect`, :meth:`from_snapshot` and
    :meth:`fork`.

    As a context manager it is closed at the end of the block, unless it was suspended: that was done to keep it.
    Objects of one sandbox in one process share it.
    """

    resume: Final = _Resume()
    """Let a paused or suspended sandbox go on: ``await sandbox.resume()``, harmless where it runs; or, by its id, one
    that another process left: ``sandbox = await Sandbox.resume(id)``, as :meth:`connect`.

    Raises ``restore_failed``, ``snapshot_damaged``, ``snapshot_unfit``, ``workspace_changed``; it then stays suspended.
    """

    def __init__(self, live: LiveSandbox, owner: Lifecycle, client: KernelClient) -> None:
        self._live = live
        self._lifecycle = owner
        self._client = client
        self._wanted: CreateRequest | None = None

    # Ways to one

    @classmethod
    def create(
        cls,
        *,
        profile: str = DEFAULT_PROFILE,
        environment: Mapping[str, str] | None = None,
        directory: str | os.PathLike[str] | None = None,
        name: str = "",
        on_owner_exit: OnOwnerExit | str | None = None,
    ) -> Opening:
        """Start a kernel: ``async with Sandbox.create() as sandbox``, or ``sandbox = await Sandbox.create()``.

        ``profile`` is a name of the profile file. ``environment`` are variables for the kernel; of this process's own
        it gets those that the profile lets through (``client_environment``), and what the profile itself sets counts
        more than both. ``directory`` is the folder that a profile with a workspace opens, the current one by default.
        ``name`` is a label for people, ``on_owner_exit`` what becomes of it at the end of this process, where not what
        the profile says. Raises ``unknown_profile``, ``invalid_request``, ``runtime_missing``, or what failed;
        nothing is left then.
        """
        here = Path(directory if directory is not None else os.curdir).absolute()
        variables = dict(environment or {})

        async def make() -> Sandbox:
            policy = None if on_owner_exit is None else _policy(on_owner_exit)
            sandbox = await _safely(cls._create(profile, _checked(variables), here, name), _discard)
            if policy is not None:
                await sandbox._do(sandbox._live.amend(on_owner_exit=policy))
            return sandbox

        return Opening(make, ours=True)

    @classmethod
    def connect(cls, id: str) -> Opening:
        """Take over a sandbox from the keeper, from another process of yours, or from nobody: it goes on as it is,
        suspended if it is that. Leaving ``async with`` gives it back (:meth:`detach`).

        ``id`` may be an unambiguous beginning. Raises ``unknown_sandbox``, ``ambiguous_id``, ``owned_elsewhere`` when
        the owner does not give it up, ``illegal_transition`` or ``expired`` where it has ended.
        """
        return Opening(lambda: _safely(cls._connect(id), _give_back), ours=False)

    @classmethod
    def from_snapshot(cls, snapshot: str) -> Opening:
        """A new sandbox from a saved one, by the snapshot's name or id; it has an identity of its own.

        Raises ``unknown_snapshot``, ``snapshot_damaged``, ``snapshot_unfit``, ``workspace_changed``.
        """

        async def make() -> Sandbox:
            return (await _safely(cls._spawn(snapshot, 1), _discard_all))[0]

        return Opening(make, ours=True)

    @classmethod
    def _resumed(cls, id: str) -> Opening:
        async def make() -> Sandbox:
            sandbox = await cls.connect(id)
            try:
                await sandbox._resume()
            except BaseException:
                await asyncio.shield(sandbox.detach())
                raise
            return sandbox

        return Opening(make, ours=False)

    async def __aenter__(self) -> Sandbox:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._left_behind(True)

    async def _left_behind(self, ours: bool) -> None:
        if self._client.gone is None and self._live.death is None and not (ours and self.state is not State.SUSPENDED):
            await self.detach()
        else:
            await self.close()

    # What it is

    @property
    def id(self) -> str:
        """The sandbox's id, which is the kernel's."""
        return self._live.id

    @property
    def state(self) -> State:
        """Its state now, as far as this process knows it."""
        return self._live.state

    @property
    def name(self) -> str:
        """The label for people."""
        return self._live.record.name

    @property
    def profile(self) -> str:
        """The profile's name."""
        return self._live.record.profile

    def __repr__(self) -> str:
        return f"<Sandbox {self.id} {self.state}>"

    # Cells

    def execute(
        self, code: str, *, stdin: bool = False, silent: bool = False, timeout: float | None = None
    ) -> Execution:
        """Run a cell, and iterate over what it gives: ``async for message in sandbox.execute(code)``.

        It is sent at once, whether or not somebody iterates; cells run in the order of these calls, and one wakes a
        sandbox that is paused or suspended. ``stdin``: the cell may ask for input, which comes as an
        :class:`~sandbox_gateway.results.InputRequest` and waits for :meth:`answer`; else ``input()`` raises inside.
        ``silent``: no number, no history. ``timeout``: seconds of running after which it is interrupted, and the
        iteration raises ``timeout``; the time in which the sandbox sleeps does not count.

        The iteration ends with a :class:`~sandbox_gateway.results.Done`, or raises ``kernel_died`` with the reason,
        ``owned_elsewhere`` when another process took the sandbox over. An exception in the cell is no exception here:
        it is a message. Output of which nobody takes any waits up to 16 MiB for each cell; then the oldest streams
        and displays are left out, and a line on ``stderr`` says how much. See
        :class:`~sandbox_gateway.execution.Execution` for leaving the loop.
        """
        execution = Execution(code, self._live.seat.key, stdin=stdin, silent=silent, timeout=timeout)

        self._tell(execution, self._client.submit)
        return execution

    async def run(self, code: str, *, answer: Answer | None = None, timeout: float | None = None) -> Result:
        """Run a cell and return all that it gave, output beyond 64 Mi characters left out (and counted).

        ``answer`` is called for each line that the cell asks for. A caller that is cancelled interrupts the cell, or
        takes it back if it has not begun. Raises as the iteration over :meth:`execute` does.
        """
        execution = self.execute(code, stdin=answer is not None, timeout=timeout)
        collector = Collector()
        try:
            async for message in execution:
                if isinstance(message, Done):
                    return collector.result(message)
                collector.add(message)
                if isinstance(message, InputRequest) and answer is not None:
                    await self.answer(answer(message))
        except BaseException:
            if not execution.done:
                background_loop().run(self._give_up(execution))
            raise
        raise SandboxGatewayError("internal", "a cell ended without an end")

    async def answer(self, text: str) -> None:
        """Give the cell that waits for input its line, without a newline; wakes a sandbox that sleeps.

        Raises ``illegal_transition`` when no cell waits.
        """

        async def give() -> None:
            self._client.answer(text)

        await self._do(give())

    def follow(self, id: str = "") -> Execution:
        """What a cell that another process (or, in a fork, the parent) began gives from here on.

        ``id`` is its :attr:`Execution.id <sandbox_gateway.execution.Execution.id>`; without it, the first one whose
        output arrived. To know its end where the kernel's reply went elsewhere, an empty cell is run behind it, which
        wakes a sandbox that sleeps.
        """
        execution = Execution("", self._live.seat.key, id=id)
        self._tell(execution, self._client.follow)
        return execution

    async def interrupt(self) -> None:
        """Interrupt the cell that runs, if any, as Ctrl-C does; wakes a sandbox that sleeps."""
        await self._do(self._live.interrupt())

    # Its life

    async def restart(self) -> None:
        """Start the kernel anew: same sandbox, same files, no variables. Cells that run or wait end with an error.

        Where the sandbox is gone too (out of memory), a new one is made under the same id, without the files; only
        for a sandbox that was made by :meth:`create` here, else ``illegal_transition`` is raised.
        """
        await self._do(self._restart(), dead=True)

    async def pause(self) -> None:
        """Freeze it where it is; its memory stays. Any cell wakes it."""
        await self._do(self._live.pause())

    async def suspend(self, reason: str = "") -> None:
        """Save it to disk, in mid-cell or not, and release its memory. Any cell wakes it; so does :meth:`resume`.

        Raises ``snapshot_failed``, ``disk_full``, ``unsupported``; it then runs on.
        """
        await self._do(self._live.suspend(reason))

    async def _resume(self) -> None:
        await self._do(self._live.resume())

    async def snapshot(self, name: str = "") -> Snapshot:
        """Save it under a name and let it run on; :meth:`from_snapshot` starts others from it.

        Raises as :meth:`suspend`, and ``invalid_request`` for a name that is taken or none.
        """
        return await self._do(self._live.save(Kind.SAVED, name))

    async def fork(self, count: int = 1) -> list[Sandbox]:
        """``count`` children that go on from where this one is, each with an identity and a life of its own.

        This one runs on (a suspended one stays so). All are made or none: what fails ends the others and is raised.
        In mid-cell each child finishes the cell too: :meth:`follow` gives what it prints.
        """
        return await _safely(self._checked(self._fork(count)), _discard_all)

    async def close(self) -> None:
        """End it: kernel, memory, files. Harmless when it has ended, or is another process's by now."""
        await background_loop().call(self._close())

    async def detach(self) -> None:
        """Leave it to the keeper, to run on without this process; a suspended one needs nobody.

        ``jupyter sandbox ps`` lists it, :meth:`connect` gets it back. This object is of no use any more.
        """
        await self._do(self._detach())

    # Looking at it

    async def logs(self) -> str:
        """What the kernel wrote past Jupyter, to its raw stdout and stderr, up to a bound."""
        return (await self._do(self._live.log())).decode(errors="replace")

    async def stats(self) -> Stats:
        """Memory, processor time and processes now; all None for a suspended one."""
        return await self._do(self._live.stats())

    async def events(self, *, follow: bool = False) -> AsyncIterator[Event]:
        """What happened to it, oldest first; with ``follow`` also what happens, until it ends or goes to another
        process."""
        loop, waiting = asyncio.get_running_loop(), asyncio.Queue[Event](_MAX_EVENTS)
        last, log = 0, self._lifecycle.events

        def put(event: Event) -> None:
            if not waiting.full():
                waiting.put_nowait(event)

        def told(event: Event) -> None:
            if event.sandbox == self.id:
                with contextlib.suppress(RuntimeError):  # the caller's loop is closed
                    loop.call_soon_threadsafe(put, event)

        async def begin() -> tuple[tuple[Event, ...], Callable[[], None]]:
            await log.flush()
            unlisten = log.listen(told)
            return await asyncio.to_thread(self._lifecycle.store.events, self.id), unlisten

        background = background_loop()
        past, unlisten = await background.call(begin())
        try:
            for event in past:
                last = event.id
                yield event
            over = self._client.gone is not None or (bool(past) and past[-1].kind in _LAST)
            while follow and not over:
                event = await waiting.get()
                if not event.id or event.id > last:
                    over = event.kind in _LAST
                    yield event
        finally:
            background.loop.call_soon_threadsafe(unlisten)

    async def connection_file(self) -> Path:
        """A connection file for this kernel, for ``jupyter console --existing`` and any other client."""
        return await self._do(self._lifecycle.connect(self.id))

    # On the background loop

    @classmethod
    async def _create(cls, profile: str, environment: Mapping[str, str], directory: Path, name: str) -> Sandbox:
        owner = lifecycle()
        found = load_profiles(owner.paths).get(profile)
        wanted = CreateRequest(
            str(uuid.uuid4()),
            found,
            KernelSpec(kernel_argv(found), environment, interrupt_mode=found.interrupt_mode),
            secrets.token_hex(32).encode(),
            directory,
            dict(os.environ),
            name,
        )
        return await cls._start(owner, wanted)

    @classmethod
    async def _start(cls, owner: Lifecycle, wanted: CreateRequest) -> Sandbox:
        seat = Seat(await owner.claim(wanted.id), wanted.key, missing_file_hint=requests.missing_file_hint(wanted))
        try:
            live = await owner.create(wanted, seat)
        except BaseException:
            seat.release()
            raise
        client = client_of(live)
        client.has_seat = True
        sandbox = cls(live, owner, client)
        sandbox._wanted = wanted
        return sandbox

    @classmethod
    async def _connect(cls, id: str) -> Sandbox:
        owner = lifecycle()
        record = await asyncio.to_thread(owner.store.find, id)
        live = await take_over(owner, record.id)
        return cls(live, owner, client_of(live))

    @classmethod
    async def _spawn(cls, snapshot: str, count: int) -> list[Sandbox]:
        owner = lifecycle()
        return await cls._children(owner, owner.spawn(snapshot, count))

    async def _fork(self, count: int) -> list[Sandbox]:
        saved, owner = self._live.record.snapshot, self._lifecycle
        if self.state is State.SUSPENDED and saved is not None:
            children = await self._children(owner, owner.spawn(saved, count))
            owner.events.note(self.id, EventKind.FORKED, children=[child.id for child in children])
            return children
        return await self._children(owner, owner.fork(self.id, count))

    @classmethod
    async def _children(cls, owner: Lifecycle, making: Coroutine[Any, Any, list[ForkOutcome]]) -> list[Sandbox]:
        # To its end, whatever becomes of the caller: only then is known what there is to remove.
        task = asyncio.ensure_future(making)
        try:
            outcomes = await asyncio.shield(task)
        except asyncio.CancelledError:
            with contextlib.suppress(SandboxGatewayError):
                await cls._unwanted(owner, await task)
            raise
        failed = [outcome.error for outcome in outcomes if outcome.error is not None]
        lives = [owner.live.get(outcome.id) for outcome in outcomes]
        if failed or None in lives:
            await cls._unwanted(owner, outcomes)
            first = failed[0] if failed else SandboxGatewayError("kernel_died", "a clone ended at once")
            text = f"{len(failed) or 1} of {len(outcomes)} clones could not be made: {first.message}"
            raise SandboxGatewayError(first.code, text, first.hint)
        return [cls(live, owner, client_of(live)) for live in lives if live is not None]

    @staticmethod
    async def _unwanted(owner: Lifecycle, outcomes: list[ForkOutcome]) -> None:
        lives = [owner.live.get(outcome.id) for outcome in outcomes]
        death = Death(DeathKind.STOPPED, "nobody wants it")
        await asyncio.gather(*(live.destroy(death) for live in lives if live is not None))

    async def _restart(self) -> None:
        if self._live.death is None:
            self._client.restarting()
            try:
                await self._live.reboot(self._live.launch.kernel)
            finally:
                self._client.restarted()
            return
        if self._wanted is None or self._live.death.kind is not DeathKind.OUT_OF_MEMORY:
            raise self._live.record.over()
        await self._live.ended.wait()
        self._client.leave(SandboxGatewayError("kernel_died", "the kernel was restarted"))
        new = await self._start(self._lifecycle, self._wanted)
        self._live, self._client = new._live, new._client

    async def _give_up(self, execution: Execution) -> None:
        if not self._client.withdraw(execution) and self._client.runs(execution):
            with contextlib.suppress(SandboxGatewayError):  # it ended meanwhile
                await self._live.interrupt()

    async def _close(self) -> None:
        if self._client.gone is None or self._live.death is not None:
            await self._live.destroy(Death(DeathKind.STOPPED, "closed by its application"))
            self._client.leave(SandboxGatewayError("illegal_transition", f"sandbox {self.id} was closed"))
            await self._lifecycle.events.flush()

    async def _detach(self) -> None:
        asleep = self.state is State.SUSPENDED
        if not asleep and self._live.record.on_owner_exit is OnOwnerExit.TERMINATE:
            await self._live.amend(on_owner_exit=OnOwnerExit.KEEP)
        await self._lifecycle.hand_over(self.id)
        self._client.has_seat = self._client.has_seat and not self._live.left
        self._client.leave(left(self.id))
        if not asleep:
            await ask_keeper(self._lifecycle.paths, "adopt", self.id)

    # Between the loops

    async def _checked(self, work: Coroutine[Any, Any, T], *, dead: bool = False) -> T:
        gone = self._client.gone
        if gone is not None and not (dead and self._live.death is not None):
            work.close()
            raise SandboxGatewayError(gone.code, gone.message, gone.hint)
        return await work

    def _tell(self, execution: Execution, what: Callable[[Execution], None]) -> None:
        def tell() -> None:
            try:
                what(execution)
            except SandboxGatewayError as error:
                execution.end(error)

        background_loop().loop.call_soon_threadsafe(tell)

    async def _do(self, work: Coroutine[Any, Any, T], *, dead: bool = False) -> T:
        return await background_loop().call(self._checked(work, dead=dead))


async def _safely(work: Coroutine[Any, Any, T], undo: Callable[[T], Awaitable[object]]) -> T:
    """Run ``work`` on the background loop; what it makes for a caller that is cancelled meanwhile is undone."""
    begun: list[asyncio.Task[T]] = []

    async def begin() -> T:
        task = asyncio.ensure_future(work)
        begun.append(task)
        return await asyncio.shield(task)

    async def take_back() -> None:
        if not begun:
            work.close()
            return
        begun[0].cancel()
        try:
            made = await begun[0]
        except (asyncio.CancelledError, SandboxGatewayError):
            return
        await undo(made)

    background = background_loop()
    try:
        return await background.call(begin())
    except asyncio.CancelledError:
        background.run(take_back())
        raise


async def _discard(sandbox: Sandbox) -> None:
    await sandbox.close()


async def _discard_all(sandboxes: list[Sandbox]) -> None:
    await asyncio.gather(*(sandbox.close() for sandbox in sandboxes))


async def _give_back(sandbox: Sandbox) -> None:
    await sandbox.detach()


def _policy(value: OnOwnerExit | str) -> OnOwnerExit:
    try:
        return OnOwnerExit(value)
    except ValueError:
        known = ", ".join(OnOwnerExit)
        raise SandboxGatewayError("invalid_request", f"on_owner_exit is one of {known}, not {value!r}") from None


def _checked(environment: Mapping[str, str]) -> Mapping[str, str]:
    for name, value in environment.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise SandboxGatewayError("invalid_request", "the environment's names and values are texts")
        if not name or "=" in name or "\0" in name or "\0" in value:
            raise SandboxGatewayError("invalid_request", f"{name!r} cannot be a variable of the environment")
    return environment
