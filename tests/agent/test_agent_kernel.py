"""The agent with a real ipykernel, natively: start, relay, interrupt, restart, end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agent_host import AgentError, AgentProcess, Host


def test_a_cell_runs_and_its_outputs_come_before_the_reply(kernel: Host) -> None:
    """busy, the code, the text and the result arrive, in order, and the reply goes to the client's identity."""
    msg_id = kernel.execute("print('hello'); 6 * 7", ident=b"client-1")
    kinds = [message["msg_type"] for message in kernel.parsed("iopub", msg_id)]
    assert kinds == ["status", "execute_input", "stream", "execute_result", "status"]
    reply = kernel.reply(msg_id)
    assert reply["idents"] == [b"client-1"]
    assert reply["content"]["status"] == "ok"
    order = [name for name, parts in kernel.messages if any(msg_id.encode() in part for part in parts)]
    assert order.index("shell") > 3


def test_two_clients_get_their_own_replies(kernel: Host) -> None:
    """Nested identities come back as they went in."""
    first = kernel.execute("1", ident=b"a")
    second = kernel.execute("2", ident=b"b")
    assert kernel.reply(first)["idents"] == [b"a"]
    assert kernel.reply(second)["idents"] == [b"b"]


def test_input_reaches_the_client_that_asked(kernel: Host) -> None:
    """An input request carries the identity of the execute request, and its answer ends input()."""
    msg_id = kernel.execute("name = input('who? '); print('hi', name)", ident=b"asker", wait=False)
    request = kernel.until(lambda: kernel.parsed("stdin", msg_id))[0]
    assert request["content"]["prompt"] == "who? "
    assert request["idents"] == [b"asker"]
    kernel.ask("input_reply", {"value": "Ada"}, channel="stdin", ident=b"asker")
    kernel.done(msg_id)
    assert kernel.text(msg_id) == "hi Ada\n"


def test_subshells_run_beside_a_busy_cell(kernel: Host) -> None:
    """A subshell answers while the main shell is occupied."""
    kernel.run("pass")
    created = kernel.reply(kernel.ask("create_subshell_request", {}, channel="control"), "control")
    kernel.run("import threading; gate = threading.Event()")
    busy = kernel.execute("print('main', flush=True); print(gate.wait(20))", wait=False)
    kernel.until(lambda: kernel.text(busy))
    request = {"code": "print('sub'); gate.set()", "silent": False}
    beside = kernel.ask("execute_request", request, subshell_id=created["content"]["subshell_id"])
    assert kernel.reply(beside)["content"]["status"] == "ok"
    kernel.done(busy)
    assert (kernel.text(beside), kernel.text(busy)) == ("sub\n", "main\nTrue\n")


def test_an_interrupt_ends_a_cell(kernel: Host) -> None:
    """SIGINT becomes KeyboardInterrupt in the running cell, and the kernel goes on."""
    msg_id = kernel.execute("import time; print('in', flush=True); time.sleep(60)", wait=False, stop_on_error=False)
    kernel.until(lambda: kernel.text(msg_id))
    kernel.call("interrupt")
    assert kernel.reply(msg_id)["content"]["ename"] == "KeyboardInterrupt"
    assert kernel.run("print('alive')") == "alive\n"


def test_an_interrupt_by_message(start: Callable[..., Any], host: Host) -> None:
    """In message mode the agent sends a signed request on control and keeps the reply to itself."""
    start(interrupt_mode="message")
    msg_id = host.execute("import time; print('in', flush=True); time.sleep(60)", wait=False, stop_on_error=False)
    host.until(lambda: host.text(msg_id))
    host.call("interrupt")
    assert host.reply(msg_id)["content"]["ename"] == "KeyboardInterrupt"
    assert host.run("print('alive')") == "alive\n"
    assert not host.parsed("control")


def test_a_restart_keeps_files_and_ends_every_process(kernel: Host, agent: AgentProcess, tmp_path: Path) -> None:
    """Also those that left the session and forked twice; memory is fresh, the endpoints are the same."""
    kernel.run(
        "import os, sys, subprocess\n"
        "x = 1\n"
        "open('kept', 'w').write('yes')\n"
        "hidden = 'import os, time\\nos.setsid()\\nif os.fork() == 0: time.sleep(600)'\n"
        "subprocess.run([sys.executable, '-c', hidden])\n"
        "children = [subprocess.Popen(['sleep', '600'], start_new_session=True) for _ in range(3)]\n"
    )
    before = set(agent.kernel_pids())
    assert len(before) >= 5
    answer = kernel.call("restart_kernel")
    assert answer["generation"] == 2
    exit_event = kernel.event("kernel_exit", generation=1)
    assert exit_event["expected"] is True
    kernel.event("kernel_ready", generation=2)
    assert kernel.run("import os; print('x' in globals(), os.path.exists('kept'))") == "False True\n"
    assert not before & set(agent.kernel_pids())


def test_requests_sent_during_a_restart_reach_the_new_kernel(kernel: Host) -> None:
    """Nothing is lost between the restart's request and the new kernel's readiness."""
    number = kernel.request("restart_kernel")
    msg_id = kernel.execute("print('new')", wait=False)
    kernel.answer(number)
    kernel.done(msg_id)
    assert kernel.text(msg_id) == "new\n"


def test_stop_sends_sigterm_then_sigkill(kernel: Host) -> None:
    """A kernel that ignores SIGTERM is killed after the grace time, and the answer says how it ended."""
    kernel.run("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('ok')")
    began = time.monotonic()
    answer = kernel.call("stop_kernel", grace=0.3)
    assert 0.3 <= time.monotonic() - began < 5
    assert answer["exit"]["signal"] == signal.SIGKILL
    assert kernel.event("kernel_exit")["expected"] is True


def test_a_death_is_reported_with_the_end_of_stderr(kernel: Host) -> None:
    """Exit code, last lines of stderr, and that nobody had asked for it; the last outputs come first."""
    msg_id = kernel.execute("import os; print('last words', flush=True); os.write(2, b'reason\\n')", wait=False)
    kernel.done(msg_id)
    kernel.until(lambda: b"reason" in kernel.log())  # a thread of the kernel's brings it there
    dying = "os.write(get_ipython().kernel and 2, b'')\nimport sys\nsys.__stderr__.flush()\nos._exit(7)"
    kernel.execute(dying, wait=False)
    event = kernel.event("kernel_exit")
    assert (event["code"], event["signal"], event["expected"]) == (7, None, False)
    assert "reason" in event["stderr_tail"]
    assert b"reason" in kernel.log()
    assert kernel.text(msg_id) == "last words\n"


def test_a_signal_to_a_kernel_that_has_just_ended_is_no_error(kernel: Host) -> None:
    """Who restarts a kernel interrupts it first, and may not have heard of its end."""
    kernel.call("signal", signum=signal.SIGKILL)
    assert kernel.event("kernel_exit")["signal"] == signal.SIGKILL
    kernel.call("signal", signum=signal.SIGINT)


def test_a_crash_reports_the_signal(kernel: Host) -> None:
    """SIGSEGV in the kernel is reported as such."""
    kernel.execute("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", wait=False)
    assert kernel.event("kernel_exit")["signal"] == signal.SIGSEGV


def test_after_a_death_the_same_agent_starts_another(kernel: Host) -> None:
    """A dead kernel can be restarted with nothing but the request."""
    kernel.execute("import os; os._exit(1)", wait=False)
    kernel.event("kernel_exit", generation=1)
    kernel.call("restart_kernel")
    kernel.event("kernel_ready", generation=2)
    assert kernel.run("print(1)") == "1\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["/nonexistent/python", "-m", "ipykernel_launcher"], "No such file"),
        (["/etc/passwd"], "Permission denied"),
        (["no-such-program-anywhere"], "No such file"),
    ],
)
def test_a_program_that_cannot_run_is_an_error_of_the_start(
    start: Callable[..., Any], host: Host, argv: list[str], words: str
) -> None:
    """At once, by name and reason, and the agent can start another kernel afterwards."""
    with pytest.raises(AgentError) as caught:
        start(argv=argv)
    assert caught.value.code == "kernel_failed"
    assert argv[0] in str(caught.value)
    assert words in str(caught.value)
    start()
    assert host.run("print(1)") == "1\n"


def test_a_kernel_that_dies_at_once_says_why(start: Callable[..., Any], host: Host) -> None:
    """Its traceback is in the exit report."""
    import sys

    with pytest.raises(AssertionError):
        start_fields = {"argv": [sys.executable, "-c", "raise SystemExit('no kernel here')"]}
        host_patience = host.until

        def short(condition: Callable[[], Any], patience: float = 2.0) -> Any:
            return host_patience(condition, min(patience, 2.0))

        host.until = short  # type: ignore[method-assign]
        try:
            start(**start_fields)
        finally:
            host.until = host_patience  # type: ignore[method-assign]
    event = host.event("kernel_exit")
    assert event["code"] == 1
    assert "no kernel here" in event["stderr_tail"]


def test_another_kernel_than_ipykernel(start: Callable[..., Any], host: Host) -> None:
    """bash_kernel works by its argv alone."""
    import sys

    pytest.importorskip("bash_kernel")
    start(argv=[sys.executable, "-m", "bash_kernel", "-f", "{connection_file}"], fast_iopub=True)
    assert host.run("echo $((6 * 7))").strip() == "42"
    host.call("restart_kernel")
    host.event("kernel_ready", generation=2)
    assert host.run("echo again").strip() == "again"


def test_wrong_requests_are_refused_and_harm_nothing(kernel: Host) -> None:
    """Each answers an error that names what is wrong."""
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("nonsense", {}),
        ("start_kernel", {"argv": ["x"], "key": "k"}),
        ("signal", {"signum": 4711}),
        ("policy", {"on_owner_exit": "dance"}),
        ("stop_kernel", {"grace": -1}),
        ("restart_kernel", {"env": {"A=B": "c"}}),
        ("restart_kernel", {"argv": "python"}),
        ("restart_kernel", {"rlimits": {"nonsense": 1}}),
        ("restart_kernel", {"uid": "root"}),
    ]
    for op, fields in wrong:
        with pytest.raises(AgentError) as caught:
            kernel.call(op, **fields)
        assert caught.value.code == "invalid_request"
    assert kernel.run("print('unharmed')") == "unharmed\n"


def test_the_kernel_holds_no_descriptor_of_the_link(kernel: Host, agent: AgentProcess) -> None:
    """None of the agent's pipes is open in the kernel, and its environment is the given one."""
    link = {os.readlink(f"/proc/{os.getpid()}/fd/{fd}") for fd in (agent.up, agent.down)}
    listed = kernel.run(
        "import os\nfor f in os.listdir('/proc/self/fd'):\n  print(os.path.realpath('/proc/self/fd/' + f))"
    )
    assert not [line for line in listed.splitlines() if any(pipe.split(":")[1] in line for pipe in link)]
    names = set(kernel.run("import os; print(*os.environ)").split())
    assert "VIRTUAL_ENV" not in names
    assert "SANDBOX_IOPUB_FD" not in names


def test_stats_count_the_kernels_processes(kernel: Host) -> None:
    """Processes, memory and processor time of everything the kernel started."""
    kernel.run("import subprocess; p = subprocess.Popen(['sleep', '60'])")
    stats = kernel.call("stats")
    assert stats["processes"] >= 2
    assert stats["resident"] > 1_000_000
    assert stats["cpu_seconds"] > 0
    assert stats["phase"] == "ready"
