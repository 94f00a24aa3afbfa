"""The link seen from the agent: hosts that come, go and come back; owners that are gone; bounds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from agent_host import AgentProcess, Host

from sandbox_gateway.agent import link
from sandbox_gateway.agent.logring import LogRing, tail
from sandbox_gateway.agent.loop import Loop
from sandbox_gateway.agent.outpipe import PipeError, PipeReader
from sandbox_gateway.agent.owner import OwnerWatch
from sandbox_gateway.agent.process import with_fast_iopub
from sandbox_gateway.agent.sources import Pace
from sandbox_gateway.wire.endpoint import HostEndpoint
from sandbox_gateway.wire.events import Event, Message
from sandbox_gateway.wire.frames import Channel
from sandbox_gateway.wire.reliable import Outbox
from sandbox_gateway.wire.sizes import LARGE, SMALL


def second_host(agent: AgentProcess, received: dict[int, int], epoch: int = 1) -> Host:
    """Another process's view of the same two pipes."""
    return Host(os.dup(agent.up), os.dup(agent.down), epoch=epoch)


def test_a_second_host_gets_what_the_first_did_not_acknowledge(
    start: Callable[..., Any], agent: AgentProcess, fast_iopub: bool
) -> None:
    """The first host dies in a flood with half a frame read; the second misses nothing, doubles nothing."""
    first = agent.host
    start(fast_iopub=fast_iopub)
    msg_id = first.execute("for i in range(900): print(i, flush=True)", wait=False)
    first.until(lambda: len(first.text(msg_id).splitlines()) > 100)
    received = first.endpoint.inbox.received()
    printed = first.text(msg_id)
    os.read(agent.up, 1001) if select_readable(agent.up) else None  # lost with the first host, torn
    os.write(agent.down, b"SG\x03\x03")  # half a frame, as a killed writer leaves it
    second = second_host(agent, received)
    second.attach(received)
    second.until(lambda: "idle" in second.heard.get(msg_id, ()))
    assert printed + second.text(msg_id) == "".join(f"{i}\n" for i in range(900))
    second.close()


def select_readable(fd: int, timeout: float = 5) -> bool:
    import select

    return bool(select.select([fd], [], [], timeout)[0])


def test_messages_of_a_time_without_a_host_wait_for_the_next(kernel: Host, agent: AgentProcess, tmp_path: Path) -> None:
    """After a detach the kernel goes on; its output, reply and exit are there for the next host."""
    waiting = "import os, time\nwhile not os.path.exists('gate'): time.sleep(0.01)\n"
    msg_id = kernel.execute(waiting + "print('meanwhile')\n7", wait=False)
    kernel.until(lambda: kernel.parsed("iopub", msg_id))
    kernel.endpoint.detach()
    kernel.until(lambda: not kernel.endpoint.wants_write)
    received = kernel.endpoint.inbox.received()
    (tmp_path / "gate").touch()
    second = second_host(agent, received)
    second.attach(received)
    second.done(msg_id)
    assert second.text(msg_id) == "meanwhile\n"
    second.close()


def test_an_output_larger_than_all_that_is_kept_arrives_with_what_was_printed_behind_it(kernel: Host) -> None:
    """A host that reads loses nothing, however much comes at once."""
    for _ in range(3):
        msg_id = kernel.execute(
            "from IPython.display import display\n"
            "display({'text/plain': 'x' * 100_000_000}, raw=True)\nprint('and')\ndisplay('more')\nprint('end')"
        )
        kinds = [message["msg_type"] for message in kernel.parsed("iopub", msg_id)]
        assert kinds == ["status", "execute_input", "display_data", "stream", "display_data", "stream", "status"]


def test_garbage_on_the_link_is_survived(kernel: Host, agent: AgentProcess) -> None:
    """The agent searches for the next ATTACH and serves it."""
    os.write(agent.down, os.urandom(100_000))
    received = kernel.endpoint.inbox.received()
    kernel.other.clear()
    kernel.attach(received)
    assert kernel.run("print('fine')") == "fine\n"


def test_the_kernel_ends_when_its_owner_is_gone(kernel: Host, agent: AgentProcess) -> None:
    """With the policy `terminate`, after the grace time without a sign of life, the agent ends everything."""
    kernel.call("policy", on_owner_exit="terminate", grace=0.5)
    event = kernel.event("kernel_exit")
    assert event["expected"] is True
    assert "owned" in event["reason"]
    agent.process.wait(10)
    assert agent.process.returncode == 0


def test_a_living_owner_keeps_the_kernel(host: Host, agent: AgentProcess) -> None:
    """Whatever it sends counts: with nothing but pings, the agent lives for longer than the grace time."""
    host.call("policy", on_owner_exit="terminate", grace=4.0)
    for _ in range(24):
        host.endpoint.ping(b"alive")
        with pytest.raises(AssertionError):
            host.until(lambda: agent.process.poll() is not None, 0.25)
    host.call("policy", on_owner_exit="keep")


def test_each_sign_of_life_counts_and_keep_ends_the_watch() -> None:
    """The grace time begins anew with each of them, and runs no more once it is called off."""
    now = 0.0
    expired: list[bool] = []
    watch = OwnerWatch(Loop(), lambda: expired.append(True), lambda: now)
    watch.set(True, 1.0)

    def wait(steps: int) -> None:
        nonlocal now
        for _ in range(steps):
            now += 0.25
            watch.check()

    for _ in range(8):
        wait(3)
        watch.alive()
    watch.set(False, 1.0)
    wait(100)
    assert not expired
    watch.set(True, 1.0)
    wait(4)
    assert expired == [True]


def test_the_owners_watch_counts_no_jump_of_the_clock() -> None:
    """A restore makes the clock jump by days: the owner gets its whole grace time afterwards."""
    now = 0.0
    expired: list[bool] = []
    watch = OwnerWatch(Loop(), lambda: expired.append(True), lambda: now)
    watch.set(True, 30.0)
    now += 100_000.0
    watch.check()
    assert not expired
    for _ in range(6):
        now += 5.0
        watch.check()
    assert expired


def test_shutdown_ends_kernel_and_agent(kernel: Host, agent: AgentProcess) -> None:
    """Answered first; then nothing is left and the status is 0."""
    kernel.call("shutdown")
    kernel.event("kernel_exit")
    agent.process.wait(10)
    assert agent.process.returncode == 0
    assert not agent.kernel_pids()


def test_the_end_of_the_link_ends_everything(agent: AgentProcess, start: Callable[..., Any]) -> None:
    """With a plain pipe nobody can come back: kernel, agent and its directory go."""
    answer = start()
    agent.host.run("import subprocess; p = subprocess.Popen(['sleep', '600'], start_new_session=True)")
    os.set_blocking(agent.down, True)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, agent.down)
    os.close(null)
    agent.process.wait(10)
    assert not os.path.exists(f"/proc/{answer['pid']}")


def test_the_log_can_be_followed(kernel: Host) -> None:
    """A following stream gets what the kernel writes to its descriptors as it comes; other kinds are refused."""
    endpoint = kernel.endpoint
    number = endpoint.open_stream("log", {"follow": True})
    kernel.streams[number] = bytearray()
    kernel.run(
        "import os, sys; os.write(sys.__stdout__.fileno(), b'')\nimport subprocess; subprocess.run(['echo', 'raw'])"
    )
    kernel.until(lambda: b"raw" in kernel.streams[number])
    other = endpoint.open_stream("exec", {})
    kernel.streams[other] = bytearray()
    kernel.until(lambda: other in kernel.closed_streams)
    assert number not in kernel.closed_streams


class Pair:
    """The agent's end of a link and the pipes to it, in this process."""

    def __init__(self) -> None:
        self.passed = 0.0  # seconds that the agent's clock is ahead
        self.down, self.up = os.pipe(), os.pipe()
        os.set_blocking(self.down[1], False)
        self.loop = Loop()
        now = self.loop.now
        self.loop.now = lambda: now() + self.passed  # type: ignore[method-assign]
        self.agent = link.Link(self.loop, self.down[0], self.up[1], {}, lambda _event: None, lambda: None)

    def attached(self, epoch: int) -> HostEndpoint:
        """A new host."""
        host = HostEndpoint(Outbox(), epoch=epoch)
        host.attach(f"nonce{epoch:08}", None, owner="test")
        self.spoken(host)
        return host

    def spoken(self, host: HostEndpoint) -> list[Event]:
        """Let both say what they have to say; what the host has heard."""
        heard: list[Event] = []
        while host.wants_write or self.agent.busy:
            if host.wants_write:
                host.wrote(os.writev(self.down[1], host.output()))
            self.loop.soon(self.agent.flush)
            self.loop.turn()
            while select_readable(self.up[0], 0):
                heard += host.feed(os.read(self.up[0], 1 << 16))
        return heard

    def close(self) -> None:
        """Give the descriptors back."""
        self.loop.close()
        for fd in (*self.down, *self.up):
            os.close(fd)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def test_after_much_has_come_the_next_host_is_read_with_a_small_buffer(
    monkeypatch: pytest.MonkeyPatch, pair: Pair
) -> None:
    """A large one is mapped and unmapped for each read, and a template's would be that of all its clones."""
    asked: list[int] = []

    def read(fd: int, size: int) -> bytes:
        asked.append(size)
        return os.read(fd, size)

    monkeypatch.setattr(link, "os", SimpleNamespace(**{**vars(os), "read": read}))
    host = pair.attached(1)
    host.send(Channel.AGENT, [b"x" * (3 * SMALL)])
    pair.spoken(host)
    assert asked[-1] == LARGE
    host.detach()
    pair.spoken(host)
    asked.clear()
    pair.attached(2)
    assert set(asked) == {SMALL}


def of_kind(kind: str, text: bytes) -> list[bytes]:
    return [b"topic", b"<IDS|MSG>", b"", b'{"msg_type": "%s"}' % kind.encode(), b"{}", b"{}", text]


def test_an_output_larger_than_the_bound_after_a_long_silence_is_no_sign_of_a_host_that_stands_still(
    pair: Pair,
) -> None:
    """What comes behind it waits in the kernel's pipe until it is on its way, else it would be dropped for that."""
    host = pair.attached(1)
    pair.passed += 100
    large = b"x" * (link.LIMIT + 1)
    pair.agent.send(Channel.IOPUB, of_kind("display_data", large))
    assert not pair.agent.hungry()
    heard = pair.spoken(host)
    pair.agent.send(Channel.IOPUB, of_kind("status", b"{}"))
    heard += pair.spoken(host)
    assert [event.parts[-1] for event in heard if isinstance(event, Message)] == [large, b"{}"]


def test_a_host_that_stands_still_holds_the_kernel_up_for_some_seconds(pair: Pair) -> None:
    """From the moment at which there was something to read, or it came back."""
    pair.attached(1)
    pair.passed += 100
    while pair.agent.hungry():
        pair.agent.send(Channel.IOPUB, of_kind("stream", b"x" * 1_000_000))
        pair.agent.flush()
    pair.passed += 4
    assert not pair.agent.hungry()
    pair.passed += 2
    assert pair.agent.hungry()
    again = HostEndpoint(Outbox(), epoch=2)
    again.attach("nonce00000002", {}, owner="test")
    os.writev(pair.down[1], again.output())
    pair.loop.turn()
    assert not pair.agent.hungry()


def test_only_streams_and_displays_may_be_dropped() -> None:
    """Whatever the JSON's spacing; never what another channel carries."""

    def message(kind: bytes) -> list[bytes]:
        return [b"topic", b"<IDS|MSG>", b"", b'{"msg_id": "1", "msg_type":' + kind + b"}", b"{}", b"{}", b"{}"]

    for kind in (b'"stream"', b' "display_data"', b'  "update_display_data"'):
        assert link.droppable(4, message(kind))
        assert not link.droppable(1, message(kind))
    for kind in (b'"status"', b'"error"', b'"execute_result"', b'"clear_output"', b'"comm_msg"'):
        assert not link.droppable(4, message(kind))
    assert not link.droppable(4, [])


def test_the_log_ring_is_bounded_and_reads_by_offset() -> None:
    """Old bytes go, offsets count on, a reader that is too late begins at the oldest byte."""
    ring = LogRing(10_000)
    for number in range(5000):
        ring.write(b"%04d\n" % number)
    assert (ring.start, ring.end) == (15_000, 25_000)
    position, data = ring.read(0, 7)
    assert (position, data) == (15_007, b"3000\n30")
    assert ring.read(24_995, 100) == (25_000, b"4999\n")
    assert ring.read(25_000, 100) == (25_000, b"")
    ring.write(b"x" * 50_000)
    assert ring.end - ring.start == 10_000
    assert tail(b"a\nb\nc\n", 2) == "b\nc"


def test_the_pipe_reader_takes_any_cut() -> None:
    """Messages come out whole however the bytes are cut; nonsense raises its one error."""
    from struct import pack

    frame = pack("!4sIIII", b"SGio", 4 + 8 + 5, 2, 2, 3) + b"abcde"
    for size in (1, 3, 7, 100):
        reader = PipeReader()
        stream = frame * 3
        found = [m for at in range(0, len(stream), size) for m in reader.feed(stream[at : at + size])]
        assert found == [("iopub", [b"ab", b"cde"])] * 3
        assert not reader.waiting
    reply = frame.replace(b"SGio", b"SGsh")
    assert [channel for channel, _ in PipeReader().feed(frame + reply + frame)] == ["iopub", "shell", "iopub"]
    wrong = [
        b"XXXX" + bytes(20),
        pack("!4sII", b"SGio", 2, 0),
        pack("!4sII", b"SGio", 4, 5000),
        pack("!4sIII", b"SGio", 8, 1, 9),
        pack("!4sI", b"SGio", 2**31) + bytes(10),
    ]
    for bad in wrong:
        with pytest.raises(PipeError):
            PipeReader().feed(bad)


@pytest.mark.parametrize("cut", [11, 300_000, 1 << 20])
def test_the_pipe_reader_reads_a_long_message_where_it_stays(cut: int) -> None:
    """Its long part is no copy, and what comes before and behind it comes out whole."""
    from struct import pack

    long = bytes(range(256)) * 4096
    short = pack("!4sIIII", b"SGio", 4 + 8 + 5, 2, 2, 3) + b"abcde"
    frame = pack("!4sIIII", b"SGsh", 4 + 8 + 2 + len(long), 2, 2, len(long)) + b"ab" + long
    stream = memoryview(short + frame + short)
    reader = PipeReader()
    found = []
    placed = 0
    while stream:
        room = reader.room()
        size = min(cut if room is None or cut > 11 else 99_999, len(stream), len(stream) if room is None else len(room))
        if room is None:
            found += reader.feed(bytes(stream[:size]))
        else:
            room[:size] = stream[:size]
            found += reader.filled(size)
            placed += size
        stream = stream[size:]
    assert [(channel, [bytes(part) for part in parts]) for channel, parts in found] == [
        ("iopub", [b"ab", b"cde"]),
        ("shell", [b"ab", long]),
        ("iopub", [b"ab", b"cde"]),
    ]
    assert not reader.waiting
    assert placed > 0


def test_the_lengths_of_a_long_message_are_checked() -> None:
    """Its table is checked as a short one's is."""
    from struct import pack

    reader = PipeReader()
    assert reader.feed(pack("!4sIII", b"SGio", 1 << 20, 1, 5)) == []
    room = reader.room()
    assert room is not None and reader.waiting
    with pytest.raises(PipeError):
        reader.filled(len(room))


def test_pacing_begins_when_messages_come_fast_and_ends_with_a_request() -> None:
    """A burst turns to looking by the clock, silence or a waiting client turns back."""
    pace = Pace()
    assert not any(pace.looked(at * 0.1, 1) for at in range(20))
    assert any(pace.looked(10 + at * 0.0005, 1) for at in range(20))
    assert pace.looked(10.02, 3)
    pace.relax()
    assert not pace.looked(10.021, 1)
    while not pace.looked(10.03, 1):
        pass
    assert not [pace.looked(11, 0) for _ in range(5)][-1]


@pytest.mark.parametrize(
    ("argv", "rest"),
    [
        (["python", "-m", "ipykernel_launcher", "-f", "x"], ["-f", "x"]),
        (["python", "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", "x"], ["-f", "x"]),
        (["python", "-X", "frozen_modules=off", "-m", "ipykernel", "-f", "x", "--debug"], ["-f", "x", "--debug"]),
    ],
)
def test_ipykernel_is_recognised_with_its_options(argv: list[str], rest: list[str]) -> None:
    """The interpreter's options stay in front of our script, ipykernel's arguments behind it."""
    changed = with_fast_iopub(argv)
    assert changed is not None
    script = changed[len(changed) - len(rest) - 1]
    assert script.endswith("ipykernel_app.py")
    assert list(changed) == [*argv[: argv.index("-m")], script, *rest]


@pytest.mark.parametrize(
    "argv", [["bash"], ["R", "--slave", "-e", "x"], ["python", "-m", "bash_kernel"], ["python", "s"]]
)
def test_other_commands_are_left_alone(argv: list[str]) -> None:
    """They run as their kernelspec says."""
    assert with_fast_iopub(argv) is None


def test_the_application_is_ipykernel_without_a_pipe() -> None:
    """Run by hand it is the stock application, and needs nothing of ours."""
    from sandbox_gateway.agent import process

    script = os.path.join(os.path.dirname(process.__file__), "ipykernel_app.py")
    done = subprocess.run([sys.executable, "-I", script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip()
