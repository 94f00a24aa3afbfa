"""Output under load, in both ways of publishing: nothing lost, doubled or torn; floods stay bounded."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agent_host import AgentProcess, Host


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
    import sys

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
