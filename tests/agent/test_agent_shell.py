"""The short ways of requests and replies in the kernel, beside the stock ones: the same is seen from outside."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent_host import Host

GRAPHICAL = """
import select, zmq
from ipykernel.eventloops import get_shell_stream, register_integration

rounds = []

@register_integration("turning")
def turn(kernel):
    stream = get_shell_stream(kernel)
    rounds.append(1)
    if not stream.flush(limit=1):
        select.select([stream.getsockopt(zmq.FD)], [], [], 0.2)

get_ipython().enable_gui("turning")
"""
"""A graphical event loop as ipykernel's own are: it holds the main thread, and looks at the socket of requests."""

CLIENT = """
import json, threading
from jupyter_client.blocking.client import BlockingKernelClient
from ipykernel.connect import get_connection_file

answers = []

def ask():
    client = BlockingKernelClient(connection_file=get_connection_file())
    client.load_connection_file()
    client.start_channels()
    client.kernel_info()
    answers.append(client.get_shell_msg(timeout=30)["msg_type"])
    client.stop_channels()

asking = threading.Thread(target=ask)
asking.start()
"""

COUNTED = """
stock = manager._main_to_shell_channel.from_socket

class Counted:
    sent = 0

    def __getattr__(self, name):
        return getattr(stock, name)

    def send_multipart(self, *args, **kwargs):
        Counted.sent += 1
        return stock.send_multipart(*args, **kwargs)

manager._main_to_shell_channel.from_socket = Counted()
"""
"""Counts the replies that go the stock way."""

FORKED = """
import os
from IPython.display import display

child = os.fork()
if not child:
    display("from the child")
    os._exit(0)
display(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_reply_comes_behind_all_that_its_cell_has_published(kernel: Host) -> None:
    """Whoever stops listening at the reply has the output."""
    for number in range(20):
        msg_id = kernel.execute(f"print({number})\n{number}")
        order = [
            name
            for name, parts in kernel.messages
            if msg_id.encode() in b"".join(parts) and b'"busy"' not in parts[-1] and b'"idle"' not in parts[-1]
        ]
        # The text may come in two pieces, when the kernel's timer falls between a print and its end of line.
        assert order in (["iopub"] * 3 + ["shell"], ["iopub"] * 4 + ["shell"])
        kernel.messages.clear()


def test_requests_are_answered_while_the_kernel_has_a_graphical_event_loop(kernel: Host) -> None:
    """The loop wakes for them, and afterwards all is as it was."""
    kernel.run(GRAPHICAL)
    assert kernel.run("import time\ntime.sleep(0.2)\nprint(6 * 7)") == "42\n"
    assert int(kernel.run("print(len(rounds))")) > 0
    kernel.run("get_ipython().enable_gui(None)")
    assert kernel.run("print('after')") == "after\n"


def test_another_client_inside_gets_its_own_replies(kernel: Host) -> None:
    """Only what the agent asked for goes to the agent."""
    kernel.run(CLIENT)
    # Not in one cell: the kernel answers the client between cells.
    kernel.until(lambda: kernel.run("print(answers)") == "['kernel_info_reply']\n", 60)
    assert all(message["idents"] == [b"client"] for message in kernel.parsed("shell"))


def test_cells_share_their_context_variables(kernel: Host) -> None:
    """What one sets is there in the next."""
    kernel.run("from contextvars import ContextVar\nseen = ContextVar('seen')\ntoken = seen.set('yes')")
    assert kernel.run("print(seen.get())") == "yes\n"


def test_after_an_error_what_waits_is_aborted_and_what_comes_later_runs(kernel: Host) -> None:
    """The kernel's own note to itself that ends an abort keeps its place among the requests."""
    kernel.run("import threading; gate = threading.Event()")
    created = kernel.reply(kernel.ask("create_subshell_request", {}, channel="control"), "control")
    failing = kernel.execute("gate.wait(20)\nraise ValueError('no')", wait=False)
    waiting = [kernel.execute("1", wait=False) for _ in range(3)]
    # It comes the same way, behind those that wait: by then they have reached the main shell.
    opening = {"code": "gate.set()", "silent": False}
    kernel.ask("execute_request", opening, subshell_id=created["content"]["subshell_id"])
    kernel.done(failing)
    for msg_id in waiting:
        kernel.done(msg_id)
        assert kernel.reply(msg_id)["content"]["status"] == "aborted"
    kernel.until(lambda: kernel.reply(kernel.execute("1"))["content"]["status"] == "ok")


def test_a_forked_process_sends_no_messages_in_its_parents_name(kernel: Host) -> None:
    """Stock finds that by asking for its id at each message."""
    msg_id = kernel.execute(FORKED)
    kernel.run("import time\ntime.sleep(0.3)")  # a message of the child's would have to pass its parent's IOPub thread
    shown = [
        m["content"]["data"]["text/plain"] for m in kernel.parsed("iopub", msg_id) if m["msg_type"] == "display_data"
    ]
    assert shown == ["0"]


def test_history_is_written_a_moment_later(start: Callable[..., Any], host: Host, tmp_path: Path) -> None:
    """Not for each cell, but before long, and at once for who asks for it."""
    start(fast_iopub=True)
    host.run("kept = 'in history'")
    asked = host.reply(host.ask("history_request", {"hist_access_type": "tail", "n": 5, "output": False, "raw": True}))
    assert "kept = 'in history'" in [entry[2] for entry in asked["content"]["history"]]
    host.run("later = 'in history too'")
    (database,) = tmp_path.glob("ipython/**/history.sqlite")

    def written() -> bool:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
            return ("later = 'in history too'",) in connection.execute("select source_raw from history").fetchall()

    end = time.monotonic() + 30
    while not written():
        assert time.monotonic() < end, "the line was never written"
        host.pump(0.1)


def test_the_short_ways_are_taken(start: Callable[..., Any], host: Host) -> None:
    """Or nothing of the above says anything of them."""
    start(fast_iopub=True)
    found = host.run(
        "k = get_ipython().kernel\nmanager = k.shell_channel_thread.manager\n"
        "print(type(manager.get_subshell_to_shell_channel_socket(None)).__name__,\n"
        "      type(manager.get_shell_channel_to_subshell_socket(None)).__name__, type(k.session).__name__,\n"
        "      k._execute_sleep, k.log.level >= 30)"
    )
    assert found == "ReplySocket RequestSocket FrugalSession 0.0 True\n"
    host.run(COUNTED)
    host.run("1")  # whose reply would count
    assert host.run("print(Counted.sent, manager.get_shell_channel_to_subshell_socket(None)._by_socket)") == "0 False\n"
