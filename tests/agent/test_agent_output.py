"""Output under load, in both ways of publishing: nothing lost, doubled or torn; floods stay bounded."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from agent_host import AgentProcess, Host

from sandbox_gateway.agent.kernel_shell import ReplySocket
from sandbox_gateway.agent.kernel_writer import SHELL, Writer, whole
from sandbox_gateway.agent.outpipe import PipeReader

SMALL_LIMITS = """
import sys
names, frames = type(sys.stdout)._publish.__globals__, sys.modules["_sandbox_writer"]
names["_PIECE"], frames._MAX_MESSAGE = 10_000, 100_000
"""
"""In the kernel: what would take gigabytes otherwise."""

INTERRUPTED = """
import contextlib

class Meddling:
    def __init__(self, at, raised):
        self.left, self.raised, self.entry, self.put = at, raised, frames.Writer.entry, frames.Writer.put
        frames.Writer.entry = lambda *given: self.count(self.entry(*given))
        frames.Writer.put = lambda *given: self.count(self.put(*given))

    def count(self, value):
        self.left -= 1
        if not self.left:
            frames.Writer.entry, frames.Writer.put = self.entry, self.put
            raise self.raised
        return value

def meddle(at, raised):
    sys.stdout.flush()
    with names["_pipe"].flush_lock:
        sys.stdout.write("".join(f"{number}\\n" for number in range(10_000)))
        Meddling(at, raised)
        with contextlib.suppress(type(raised)):
            sys.stdout.flush()
            missed.append(at)
    sys.stdout.flush()

missed = []
"""
"""In the kernel: raise something when a piece has been made, or has just been queued."""


class BlockedPipe:
    """A full pipe; what stands behind what has filled it is read once the test says so."""

    def __init__(self) -> None:
        self.read_fd, write_fd = os.pipe()
        os.set_blocking(write_fd, False)
        self.filling = 0
        with pytest.raises(BlockingIOError):
            while True:
                self.filling += os.write(write_fd, b"x" * 65536)
        os.set_blocking(write_fd, True)
        self.writer = Writer(write_fd)
        self.data = b""
        self.open = threading.Event()
        self.reading = threading.Thread(target=self._read)
        self.reading.start()

    def _read(self) -> None:
        assert self.open.wait(20)
        while data := os.read(self.read_fd, 1 << 20):
            self.data += data

    def messages(self) -> list[tuple[str, list[bytes]]]:
        """All that was written, once; the pipe is then closed."""
        self.close()
        found = []
        for channel, parts in PipeReader().feed(self.data[self.filling :]):
            found.append((channel, [bytes(part) for part in parts]))
        return found

    def close(self) -> None:
        self.writer.close()
        self.open.set()
        self.reading.join()
        read_fd, self.read_fd = self.read_fd, -1
        with contextlib.suppress(OSError):
            os.close(read_fd)


@pytest.fixture
def blocked() -> Iterator[BlockedPipe]:
    pipe = BlockedPipe()
    yield pipe
    pipe.close()


@pytest.fixture
def alarm() -> Iterator[Callable[[Callable[[int], None]], None]]:
    """Calls what it is given from a signal's handler, with the number of the call, some times in a second."""
    before = signal.getsignal(signal.SIGALRM)

    def alarm(function: Callable[[int], None]) -> None:
        calls = iter(range(1, 1_000_000))
        signal.signal(signal.SIGALRM, lambda *_: function(next(calls)))
        signal.setitimer(signal.ITIMER_REAL, 0.2, 0.1)

    yield alarm
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def lines(count: int) -> str:
    return "".join(f"{number}\n" for number in range(count))


def test_two_hundred_thousand_lines_arrive_whole(kernel: Host) -> None:
    """Plain prints, in order, nothing missing."""
    msg_id = kernel.execute("for i in range(200_000): print(i)")
    assert kernel.text(msg_id) == lines(200_000)


def test_flushed_lines_arrive_whole(kernel: Host) -> None:
    """Each flushed line, in order."""
    # Fewer than the high-water mark of the stock kernel's own socket, 1000, at which it drops on a busy machine.
    msg_id = kernel.execute("for i in range(900): print(i, flush=True)")
    assert kernel.text(msg_id) == lines(900)


def test_no_flushed_line_is_lost_through_the_pipe(start: Callable[..., Any], host: Host) -> None:
    """The pipe has no high-water mark: a full one makes the cell wait."""
    start(fast_iopub=True)
    msg_id = host.execute("for i in range(50_000): print(i, flush=True)")
    assert host.text(msg_id) == lines(50_000)


def test_a_pipe_that_user_code_has_made_nonblocking_still_waits(start: Callable[..., Any], host: Host) -> None:
    """As programs do with every descriptor that they find."""
    start(fast_iopub=True)
    msg_id = host.execute(
        "import os\n"
        "for fd in map(int, os.listdir('/proc/self/fd')):\n"
        "    try:\n        os.set_blocking(fd, False)\n    except OSError:\n        pass\n"
        "for i in range(50_000): print(i, flush=True)\n"
        "for fd in map(int, os.listdir('/proc/self/fd')):\n"
        "    try:\n        os.set_blocking(fd, True)\n    except OSError:\n        pass"
    )
    assert host.text(msg_id) == lines(50_000)


def test_a_display_of_twelve_megabytes(kernel: Host) -> None:
    """One large message crosses every buffer on the way."""
    msg_id = kernel.execute(
        "from IPython.display import display\nfor c in 'ab': display({'text/plain': c * 12_000_000}, raw=True)"
    )
    shown = [
        m["content"]["data"]["text/plain"] for m in kernel.parsed("iopub", msg_id) if m["msg_type"] == "display_data"
    ]
    assert shown == ["a" * 12_000_000, "b" * 12_000_000]


def test_binary_buffers_of_a_comm_arrive_as_they_were(kernel: Host) -> None:
    """Comm messages with buffers, small and large, contiguous views of arrays included."""
    msg_id = kernel.execute(
        "import array\nfrom comm import create_comm\n"
        "c = create_comm(target_name='t', data={})\n"
        "c.send({'n': 1}, buffers=[b'small', memoryview(array.array('i', range(100_000)))])"
    )
    sent = next(m for m in kernel.parsed("iopub", msg_id) if m["msg_type"] == "comm_msg")
    assert bytes(sent["buffers"][0]) == b"small"
    assert len(sent["buffers"][1]) == 400_000


def test_threads_print_beside_a_cell(kernel: Host) -> None:
    """A thread's output comes in order and whole, flushed or not, while the cell prints too."""
    msg_id = kernel.execute(
        "import threading\n"
        "def work():\n  for i in range(500): print(f't {i}\\n', end='', flush=i % 2 == 0)\n"
        "t = threading.Thread(target=work); t.start()\n"
        "for i in range(500): print(f'm {i}\\n', end='', flush=True)\nt.join()\nprint('end')"
    )
    printed = kernel.text(msg_id).splitlines()
    assert [line for line in printed if line[0] == "t"] == [f"t {i}" for i in range(500)]
    assert [line for line in printed if line[0] == "m"] == [f"m {i}" for i in range(500)]
    assert printed[-1] == "end"


def test_unflushed_output_of_a_running_cell_comes_by_itself(kernel: Host) -> None:
    """A print without flush shows up while the cell goes on."""
    msg_id = kernel.execute("print('soon')\nimport threading\nthreading.Event().wait(30)", wait=False)
    kernel.until(lambda: kernel.text(msg_id) == "soon\n", 10)
    kernel.call("interrupt")
    kernel.done(msg_id)


def test_output_of_a_program_is_captured(kernel: Host) -> None:
    """What writes to the descriptors beneath Python."""
    msg_id = kernel.execute("import subprocess; subprocess.run('echo out; echo err >&2', shell=True)")
    kernel.until(lambda: kernel.text(msg_id) == "out\n" and kernel.text(msg_id, "stderr") == "err\n")


def test_output_of_forked_children_is_captured(kernel: Host) -> None:
    """What prints in a forked child, and in the workers of a pool, also while a thread of the parent prints."""
    code = (
        "import os, threading\n"
        "busy = threading.Thread(target=lambda: [print('b', flush=True) for _ in range(300)]); busy.start()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    print('child', flush=True)\n"
        "    os._exit(0)\n"
        "os.waitpid(pid, 0); busy.join()\n"
        "from multiprocessing import get_context\n"
        "with get_context('fork').Pool(2) as pool: pool.map(print, ['one', 'two'])\n"
    )
    msg_id = kernel.execute(code)
    kernel.until(lambda: all(word in kernel.text(msg_id) for word in ("child", "one", "two")))
    # A fork copies what is not flushed yet, as with any buffered file: never less than what was printed.
    assert kernel.text(msg_id).count("b\n") >= 300


def test_interrupts_lose_and_double_nothing(start: Callable[..., Any], host: Host) -> None:
    """A printing loop is interrupted many times at random moments; what arrives is what the loop counted."""
    # Through the pipe only: stock ipykernel may lose or double the line that an interrupt meets.
    start(fast_iopub=True)
    kernel = host
    kernel.run("n = 0")
    for round_number in range(12):
        msg_id = kernel.execute(
            "n = 0\ntry:\n  while True:\n    print(n, flush=True)\n    n += 1\nexcept KeyboardInterrupt: pass",
            wait=False,
        )
        kernel.until(lambda msg_id=msg_id: kernel.text(msg_id))
        deadline = time.monotonic() + 0.003 * round_number
        while time.monotonic() < deadline:
            kernel.pump(0.001)
        kernel.call("interrupt")
        kernel.done(msg_id)
        counted = int(kernel.run("print(n)"))
        got = kernel.text(msg_id)
        # The loop may have been interrupted between the print and its count, or within the print itself.
        whole = [lines(counted), lines(counted + 1), lines(counted) + str(counted)]
        assert got in whole, (counted, got[-40:])
        kernel.messages.clear()


def test_a_text_larger_than_a_frame_is_sent_in_pieces_and_the_kernel_goes_on(
    start: Callable[..., Any], host: Host
) -> None:
    """Each piece is a message of its own; and what stands in a piece, it fits into a frame."""
    start(fast_iopub=True)
    host.run(SMALL_LIMITS)
    msg_id = host.execute("sys.stdout.write(''.join(f'{number}\\n' for number in range(50_000)))")
    sent = [m["content"]["text"] for m in host.parsed("iopub", msg_id) if m["msg_type"] == "stream"]
    assert "".join(sent) == lines(50_000)
    assert {len(text) for text in sent[:-1]} == {10_000}
    assert host.run("print(1)") == "1\n"


def test_the_largest_piece_of_text_fits_into_a_frame(start: Callable[..., Any], host: Host) -> None:
    """Whatever its characters are: a lone surrogate takes seven bytes, the most of all."""
    start(fast_iopub=True)
    code = (
        "import sys\nnames = type(sys.stdout)._publish.__globals__\n"
        "piece = sys.stdout._encode(frozenset(), '\\ud800' * 1000)\n"
        "print(names['_PIECE'] // 1000 * len(piece[-1]) < sys.modules['_sandbox_writer']._MAX_MESSAGE)"
    )
    assert host.run(code) == "True\n"


def test_a_text_larger_than_a_frame_is_sent_in_pieces_through_hooks_too(start: Callable[..., Any], host: Host) -> None:
    """Where somebody changes how messages are made, and stock code makes them."""
    start(fast_iopub=True)
    host.run(SMALL_LIMITS + "sys.stdout.register_hook(lambda message: message)")
    msg_id = host.execute("sys.stdout.write(''.join(f'{number}\\n' for number in range(50_000))); sys.stdout.flush()")
    assert host.text(msg_id) == lines(50_000)
    assert host.run("print(1)") == "1\n"


@pytest.mark.parametrize("fault", ["ValueError('too much')", "MemoryError()"])
def test_a_hook_that_fails_ends_nobodys_cell(start: Callable[..., Any], host: Host, fault: str) -> None:
    """It does not in stock ipykernel, where a thread of its own calls it."""
    start(fast_iopub=True)
    host.run(
        f"import sys\ndef fail(message):\n    raise {fault}\nsys.stdout.register_hook(fail)\n"
        "print('to nobody', flush=True)\nsys.stdout.unregister_hook(fail)"
    )
    assert host.run("print(1)") == "1\n"


@pytest.mark.parametrize("fault", ["ValueError", "MemoryError"])
def test_text_that_cannot_be_sent_is_left_out_and_the_stream_says_so(
    start: Callable[..., Any], host: Host, fault: str
) -> None:
    """The rest arrives, and nothing is tried for ever."""
    start(fast_iopub=True)
    host.run(
        SMALL_LIMITS + "entry = frames.Writer.entry\n"
        "def failing(writer, parts, *magic):\n"
        f"    if parts[0] == b'stream.stdout' and b'bad' in parts[-1]: raise {fault}('no')\n"
        "    return entry(writer, parts, *magic)\n"
        "frames.Writer.entry = failing"
    )
    msg_id = host.execute("sys.stdout.write('a' * 10_000 + 'bad' * 2_000 + 'c' * 4_000 + 'end')")
    assert host.text(msg_id) == (
        "a" * 10_000 + f"[sandbox] 10000 characters of output were left out: they cannot be sent ({fault})\nend"
    )
    assert host.run("print(1)") == "1\n"


def test_text_of_which_nothing_can_be_said_harms_nothing_else(start: Callable[..., Any], host: Host) -> None:
    """As where the header of what it belongs to is none."""
    start(fast_iopub=True)
    assert (
        host.run(
            "import sys\nproper = sys.stdout.parent_header\nsys.stdout.parent_header = {'x': object()}\n"
            "print('to nobody', flush=True)\nsys.stdout.parent_header = proper\nprint('here', flush=True)"
        )
        == "here\n"
    )


@pytest.mark.parametrize("raised", ["KeyboardInterrupt()", "TimeoutError()", "ValueError()"])
def test_an_interrupt_between_the_pieces_of_a_text_loses_and_doubles_nothing(
    start: Callable[..., Any], host: Host, raised: str
) -> None:
    """Nor does a handler's error, which reaches the code that was interrupted."""
    start(fast_iopub=True)
    host.run(SMALL_LIMITS + INTERRUPTED)
    for at in range(1, 11):
        msg_id = host.execute(f"meddle({at}, {raised})")
        assert host.text(msg_id) == lines(10_000), at
    assert host.run("print(missed)") == "[]\n"


def test_a_handler_that_prints_while_text_is_taken_doubles_nothing(start: Callable[..., Any], host: Host) -> None:
    """It may come at any moment, and returns."""
    start(fast_iopub=True)
    printed = host.run(
        "import itertools, signal, sys\nticks = itertools.count()\nover = False\n"
        # Each tick orders the next one: however slow the machine is, none comes inside of another.
        "def order():\n    signal.setitimer(signal.ITIMER_REAL, 0 if over else .0002)\n"
        "def tick(*_):\n    sys.stdout.write(f't {next(ticks)}\\n'); sys.stdout.flush(); order()\n"
        "signal.signal(signal.SIGALRM, tick); order()\n"
        "for i in range(5_000):\n    sys.stdout.write(f'm {i}\\n'); sys.stdout.flush()\n"
        "over = True; order()\nprint(next(ticks))"
    )
    *lines_of_both, ticked = printed.splitlines()
    assert [line for line in lines_of_both if line[0] == "m"] == [f"m {i}" for i in range(5_000)]
    assert [line for line in lines_of_both if line[0] == "t"] == [f"t {i}" for i in range(int(ticked))]


@pytest.mark.parametrize("size", [100, 300_000])
def test_a_handler_that_writes_inside_a_blocked_write_comes_next_and_tears_nothing(
    blocked: BlockedPipe, alarm: Callable[[Callable[[int], None]], None], size: int
) -> None:
    """The interpreter calls a signal's handler in the midst of a write, and then goes on with the same bytes."""
    writer, answers = blocked.writer, []

    def handler(number: int) -> None:
        if number <= 3:
            writer.put(writer.entry([b"tick %d" % number]), [])
            if number == 3:
                blocked.open.set()
            answers.append(writer.drain())

    alarm(handler)
    writer.put(writer.entry([b"first", b"f" * size]), [])
    writer.put(writer.entry([b"second"]), [])
    assert writer.drain() == []
    assert answers == [[], [], []]
    sent = [parts[0] for _, parts in blocked.messages()]
    assert sent == [b"first", b"second", b"tick 1", b"tick 2", b"tick 3"]


@pytest.mark.parametrize("raised", [KeyboardInterrupt, TimeoutError, BlockingIOError])
@pytest.mark.parametrize("size", [100, 300_000])
def test_a_handler_that_writes_and_raises_inside_a_blocked_write_tears_nothing(
    blocked: BlockedPipe,
    alarm: Callable[[Callable[[int], None]], None],
    size: int,
    raised: type[BaseException],
) -> None:
    """What it raises reaches the caller, and is not taken for the pipe's own trouble; the next writes all the rest."""
    writer = blocked.writer

    def handler(number: int) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        writer.put(writer.entry([b"tick"]), [])
        writer.drain()
        raise raised

    alarm(handler)
    writer.put(writer.entry([b"first", b"f" * size]), [])
    threading.Timer(1, blocked.open.set).start()  # ends a version that waits inside the handler
    with pytest.raises(raised):
        writer.drain()
    assert not writer.broken
    assert writer.drain() == []
    assert [parts[0] for _, parts in blocked.messages()] == [b"first", b"tick"]


def test_a_mark_that_was_not_taken_back_holds_nobody_up(blocked: BlockedPipe) -> None:
    """As when a trace function raises an error at the one line that would take it back."""

    def ended() -> Any:
        return sys._getframe()

    writer = blocked.writer
    writer._writing = ended()
    blocked.open.set()
    writer.put(writer.entry([b"first"]), [])
    assert writer.drain() == []
    assert [parts[0] for _, parts in blocked.messages()] == [b"first"]


def test_a_reply_that_a_handler_sends_inside_a_blocked_write_goes_one_way(
    blocked: BlockedPipe, alarm: Callable[[Callable[[int], None]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not in the pipe yet when its sender looks, and is not lost either."""
    from sandbox_gateway.agent import kernel_writer

    monkeypatch.setitem(sys.modules, "_sandbox_writer", kernel_writer)
    writer = blocked.writer
    by_socket: list[Any] = []
    stock = SimpleNamespace(send_multipart=by_socket.append)
    pipe = SimpleNamespace(usable=True, writer=writer)

    def write_out(_: Any) -> None:
        assert writer.drain() == []

    reply = ReplySocket(stock, pipe, write_out)

    def handler(number: int) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply.send_multipart([b"agent", b"reply"])
        blocked.open.set()

    alarm(handler)
    threading.Timer(1, blocked.open.set).start()  # ends a version that waits inside the handler
    first = writer.entry([b"first"])
    writer.put(first, [])
    writer.drain()
    assert whole(first)
    assert by_socket == []
    assert blocked.messages() == [("iopub", [b"first"]), ("shell", [b"reply"])]


@pytest.mark.parametrize(
    "array",
    [
        "zeros((0, 3))",
        "zeros(0)",
        "arange(6).reshape(2, 3)",
        "arange(6).reshape(2, 3).T",
        "arange(60_000).reshape(200, 300).T",
        "array(7)",
        "arange(6, dtype='>i4')",
    ],
)
def test_any_array_that_zmq_would_send_leaves_the_same_way(array: str) -> None:
    """Arrays without elements and by columns too: what lies in memory, in its order."""
    numpy = pytest.importorskip("numpy")
    part = eval(f"numpy.{array}", {"numpy": numpy})
    read_fd, write_fd = os.pipe()
    fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, 1 << 20)
    writer = Writer(write_fd)
    writer.put(writer.entry([b"before", part, b"after"], SHELL), [])
    assert writer.drain() == []
    ((_, sent),) = PipeReader().feed(os.read(read_fd, 1 << 20))
    os.close(read_fd)
    writer.close()
    assert [bytes(item) for item in sent] == [b"before", zmq.Frame(part).bytes, b"after"]


def test_clear_output_and_updates_keep_their_place(kernel: Host) -> None:
    """Messages of different kinds leave in the order in which the cell made them."""
    msg_id = kernel.execute(
        "from IPython.display import display, clear_output\n"
        "print('1')\nh = display('2', display_id=True)\nprint('3')\nh.update('4')\nclear_output()\nprint('5')\n1/0"
    )
    kinds = [m["msg_type"] for m in kernel.parsed("iopub", msg_id)]
    assert kinds == [
        "status",
        "execute_input",
        "stream",
        "display_data",
        "stream",
        "update_display_data",
        "clear_output",
        "stream",
        "error",
        "status",
    ]


def test_messages_are_signed_and_well_formed(kernel: Host) -> None:
    """Awkward text survives: quotes, controls, unicode; dates and versions are there."""
    text = 'quote " back \\ tab \t é 漢 \U0001f600 nul \x00 '
    msg_id = kernel.execute(f"print({text!r}, flush=True)\nimport sys; sys.stderr.write('e'); sys.stderr.flush()")
    assert kernel.text(msg_id) == text + "\n"
    assert kernel.text(msg_id, "stderr") == "e"
    header = kernel.parsed("iopub", msg_id)[2]["header"]
    assert header["msg_type"] == "stream"
    assert header["version"].startswith("5.")


def test_lone_surrogates_are_shown_as_escapes(start: Callable[..., Any], host: Host) -> None:
    """Through the pipe they harm nothing (stock ipykernel loses the text)."""
    start(fast_iopub=True)
    msg_id = host.execute("print('before \\ud800 after', flush=True)")
    assert host.text(msg_id) == "before \\ud800 after\n"
    assert host.run("print(1)") == "1\n"


def test_another_subscriber_inside_gets_everything_too(kernel: Host) -> None:
    """`%connect_info` stays true: the IOPub socket serves whoever subscribes."""
    code = (
        "import zmq, json\nfrom ipykernel import get_connection_file\n"
        "info = json.load(open(get_connection_file()))\n"
        "s = zmq.Context.instance().socket(zmq.SUB)\n"
        "s.setsockopt(zmq.SUBSCRIBE, b'')\ns.connect(f\"ipc://{info['ip']}-{info['iopub_port']}\")\n"
        "seen = b''\n"
        "for _ in range(100):\n"  # a subscription takes effect some time after it was made
        "  print('seen?', flush=True)\n"
        "  if s.poll(50): seen = s.recv_multipart()[-1]\n"
        "  if b'seen?' in seen: break\n"
        "s.close()\n"
        "print(seen)"
    )
    assert "b'{" in kernel.run(code).splitlines()[-1]


def test_a_flood_on_the_kernels_descriptors_stays_in_its_ring(start: Callable[..., Any], host: Host) -> None:
    """A program that writes without end to the raw stdout fills a ring of one megabyte, and the agent answers."""
    flood = "import os\nwhile True: os.write(1, b'x' * 65536)"
    number = host.request("start_kernel", argv=[sys.executable, "-c", flood], key="k", env={}, cwd="/")
    host.answer(number)
    host.until(lambda: host.call("stats")["log_bytes"] > 20_000_000)
    assert len(host.log()) <= 1 << 20
    host.call("stop_kernel", grace=0)


def test_thousands_of_zombies_are_reaped(kernel: Host, agent: AgentProcess) -> None:
    """Orphans come to the agent, which takes them all."""
    kernel.run(
        "import os\n"
        "for _ in range(40):\n"
        "  if os.fork() == 0:\n"
        "    for _ in range(50):\n"
        "      if os.fork() == 0: os._exit(0)\n"
        "    os._exit(0)\n"
        "for _ in range(40): os.wait()\n"
    )
    kernel.until(lambda: kernel.call("stats")["processes"] == 1)


def test_output_waits_in_the_kernel_while_the_host_is_slow(start: Callable[..., Any], host: Host) -> None:
    """Through the pipe a host that reads slowly slows the cell down; nothing is dropped and the agent stays small."""
    start(fast_iopub=True)
    msg_id = host.execute("for i in range(500): print('x' * 100_000, flush=True)", wait=False)
    # Read a little now and then: 50 MB are on their way, of which the agent holds a part.
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        host.pump(0.05)
        time.sleep(0.05)  # the slowness under test, not a wait for something
    host.done(msg_id)
    assert (
        sum(m["content"]["text"].count("x") for m in host.parsed("iopub", msg_id) if m["msg_type"] == "stream")
        == 50_000_000
    )
    link = host.call("stats")["link"]
    assert (link["dropped_messages"], link["dropped_bytes"]) == (0, 0)


@pytest.mark.parametrize(
    "garbage", [b"garbage" * 10, b"SGio\xff\xff\xff\xff", b"SGio\x00\x00\x00\x08\x00\x00\x00\x01\x00\x00\x00\x09"]
)
def test_garbage_on_the_output_pipe_ends_the_kernel_with_a_reason(
    start: Callable[..., Any], host: Host, garbage: bytes
) -> None:
    """The agent believes nothing that comes out of the kernel; the death says what happened, and a restart works."""
    start(fast_iopub=True)
    host.execute(f"import os; os.write(120, {garbage!r})", wait=False)
    event = host.event("kernel_exit")
    assert event["signal"] == 9
    assert "output pipe" in event["reason"]
    host.call("restart_kernel")
    host.event("kernel_ready")
    assert host.run("print(1)") == "1\n"


def test_an_ipykernel_that_we_do_not_know_publishes_on_its_socket(
    start: Callable[..., Any], host: Host, tmp_path: Path
) -> None:
    """Where our streams cannot be built upon its own, ipykernel runs as it is, and the agent listens to its socket."""
    (tmp_path / "sitecustomize.py").write_text(
        "import ipykernel.iostream as i\n"
        "i.OutStream._rotate = i.OutStream._rotate_buffers\ndel i.OutStream._rotate_buffers\n"
        "i.OutStream._flush_buffers = lambda self: ((dict(k), b.getvalue()) for k, b in self._rotate().items())\n"
    )
    start(fast_iopub=True, env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(tmp_path)})
    assert host.run("import sys; print(type(sys.stdout).flush.__qualname__, flush=True)") == "OutStream.flush\n"
    assert host.run("import sys; print(type(sys.stdout).__dict__.get('_publish'))") == "None\n"


def test_raw_json_of_headers_is_what_jupyter_expects(kernel: Host) -> None:
    """Our hand-made stream header has the fields of the protocol, as valid JSON."""
    msg_id = kernel.execute("print(1, flush=True)")
    raw = [parts for name, parts in kernel.messages if name == "iopub" and parts[0] == b"stream.stdout"]
    header = json.loads(raw[-1][3])
    assert set(header) == {"msg_id", "msg_type", "username", "session", "date", "version"}
    assert json.loads(raw[-1][4])["msg_id"] == msg_id
