"""What the agent tells the idle policy, whether the kernel answers, and time in which the sandbox was away."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from agent_host import AgentError, AgentProcess, Host

from sandbox_gateway.agent.activity import Activity
from sandbox_gateway.agent.loop import Loop


def message(kind: str, parent: str, parent_kind: str, **content: Any) -> list[bytes]:
    """A message of the kernel's."""
    header, of = {"msg_type": kind}, {"msg_id": parent, "msg_type": parent_kind}
    return [b"topic", b"<IDS|MSG>", b"", *(json.dumps(part).encode() for part in (header, of, {}, content))]


def test_a_cell_is_activity_and_so_is_its_end(kernel: Host) -> None:
    """Busy while it runs; afterwards the time is counted from its end."""
    msg_id = kernel.execute(
        "import threading; gate = threading.Event(); print('in', flush=True); gate.wait(20)", wait=False
    )
    kernel.until(lambda: kernel.text(msg_id))
    facts = kernel.call("activity")
    assert (facts["busy"], facts["input"], facts["since_use"], facts["phase"]) == (True, False, 0.0, "ready")
    kernel.call("interrupt")
    kernel.done(msg_id)
    kernel.until(lambda: kernel.call("activity")["since_use"] >= 0.25)
    facts = kernel.call("activity")
    assert not facts["busy"]
    assert 0.25 <= facts["since_use"] < 10
    assert facts["processes"] >= 1
    assert facts["cpu_seconds"] > 0


def test_a_kernel_that_waits_for_a_person(kernel: Host) -> None:
    """input() is busy, and said to be that."""
    msg_id = kernel.execute("input('? ')", wait=False)
    kernel.until(lambda: kernel.parsed("stdin", msg_id))
    assert kernel.call("activity")["input"] is True
    kernel.ask("input_reply", {"value": "x"}, channel="stdin")
    kernel.done(msg_id)
    assert kernel.call("activity")["input"] is False


def test_what_does_not_wake_is_no_use(kernel: Host) -> None:
    """Asking for kernel_info, history or comms leaves the time since the last use alone; a completion does not."""
    kernel.run("1")
    kernel.until(lambda: kernel.call("activity")["since_use"] >= 0.5)
    for kind, content in (
        ("kernel_info_request", {}),
        ("comm_info_request", {}),
        ("history_request", {"hist_access_type": "tail", "n": 1, "output": False, "raw": True}),
    ):
        kernel.reply(kernel.ask(kind, content))
    before = time.monotonic()
    unused = kernel.call("activity")["since_use"]
    assert unused >= 0.5
    kernel.reply(kernel.ask("complete_request", {"code": "pri", "cursor_pos": 3}))
    assert kernel.call("activity")["since_use"] <= time.monotonic() - before


def test_activity_of_a_kernel_that_says_anything() -> None:
    """Forged, broken and endless status messages are bounded and raise nothing."""
    now = 0.0
    activity = Activity(lambda: now)
    for number in range(5000):
        activity.status(message("status", str(number), "execute_request", execution_state="busy"))
    assert activity.facts()["busy"]
    assert len(activity._requests) <= 1024
    for parts in ([], [b"<IDS|MSG>"], [b"<IDS|MSG>", *[b"["] * 5], [b"<IDS|MSG>", *[b"7"] * 5], [b"x"] * 40):
        activity.status(parts)
        activity.asked(parts)
        activity.sent("shell", parts)
    deep = [b"<IDS|MSG>", b"", b"{}", b"[" * 60000, b"{}", b"[" * 60000]
    activity.status(deep)
    activity.began()
    now = 5.0
    assert activity.facts() == {"busy": False, "busy_for": None, "input": False, "since_use": 5.0}


def test_a_request_is_as_old_as_its_beginning() -> None:
    """The oldest one counts, and each begins anew."""
    now = 10.0
    activity = Activity(lambda: now)
    activity.status(message("status", "1", "execute_request", execution_state="busy"))
    now = 12.0
    activity.status(message("status", "2", "complete_request", execution_state="busy"))
    activity.status(message("status", "2", "complete_request", execution_state="busy"))
    assert activity.facts()["busy_for"] == 2.0
    activity.status(message("status", "1", "execute_request", execution_state="idle"))
    now = 15.0
    assert activity.facts()["busy_for"] == 3.0


def test_programs_that_a_cell_ran_are_counted_after_their_end(kernel: Host) -> None:
    """Else a loop of short ones would look idle."""
    kernel.run("1")
    before = kernel.call("activity")["cpu_seconds"]
    burn = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
    kernel.run(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}], check=True)")
    assert kernel.call("activity")["cpu_seconds"] - before >= 0.45


def test_only_waking_requests_make_it_busy() -> None:
    """A kernel_info under way is none of the policy's business."""
    activity = Activity(lambda: 0.0)
    activity.status(message("status", "1", "kernel_info_request", execution_state="busy"))
    assert not activity.facts()["busy"]
    activity.status(message("status", "2", "execute_request", execution_state="busy"))
    activity.status(message("status", "1", "kernel_info_request", execution_state="idle"))
    assert activity.facts()["busy"]
    activity.status(message("status", "2", "execute_request", execution_state="idle"))
    assert not activity.facts()["busy"]


@pytest.mark.parametrize("work", ["pass", "import time; time.sleep(30)", "while True: pass"])
def test_a_kernel_answers_in_the_middle_of_a_cell(kernel: Host, work: str) -> None:
    """Its heart beats, and our application's control thread answers too."""
    msg_id = kernel.execute(f"print('in', flush=True)\n{work}", wait=False, stop_on_error=False)
    kernel.until(lambda: kernel.text(msg_id))
    seen = len(kernel.messages)
    answer = kernel.call("ping_kernel", seconds=10)
    assert answer["heartbeat"] is True
    assert not any(name == "control" for name, _ in kernel.messages[seen:])
    if work != "pass":
        kernel.call("interrupt")
    kernel.done(msg_id)


def test_the_control_thread_of_ours_answers(start: Any, host: Host) -> None:
    """Beside the heartbeat, which says nothing of the interpreter."""
    start(fast_iopub=True)
    assert host.call("ping_kernel", seconds=10) == {"heartbeat": True, "control": True}


def stop(host: Host) -> None:
    """Stop every thread of the kernel, and wait until it stands: the signal is taken by one of them in its time."""
    tasks = Path(f"/proc/{host.call('stats')['pid']}/task")
    host.call("signal", signum=19)
    host.until(lambda: host.pump(0.01) or all(") T " in (task / "stat").read_text() for task in tasks.iterdir()))


def test_a_stopped_kernel_does_not_answer(kernel: Host) -> None:
    """Within the time given, and by name."""
    stop(kernel)
    began = time.monotonic()
    with pytest.raises(AgentError) as caught:
        kernel.call("ping_kernel", seconds=0.5)
    assert caught.value.code == "kernel_failed"
    assert 0.4 < time.monotonic() - began < 10
    kernel.call("signal", signum=18)
    assert kernel.call("ping_kernel", seconds=20)["heartbeat"] is True


def test_a_kernel_that_dies_under_the_question(kernel: Host) -> None:
    """The answer comes at once."""
    stop(kernel)
    number = kernel.request("ping_kernel", seconds=60)
    kernel.call("signal", signum=9)
    with pytest.raises(AgentError):
        kernel.answer(number)


def test_without_a_kernel_there_is_nothing_to_ask(host: Host) -> None:
    """An error, and facts that say so."""
    with pytest.raises(AgentError) as caught:
        host.call("ping_kernel")
    assert caught.value.code == "invalid_request"
    assert host.call("activity")["phase"] == "none"


def test_everything_is_heard_after_another_attach(kernel: Host, agent: AgentProcess) -> None:
    """The listeners are made anew: messages, output, log and the death of a child still come."""
    for _ in range(3):
        kernel.attach(received=None)
        assert kernel.run("print('heard')") == "heard\n"
    kernel.execute("import os; os.write(2, b'raw\\n'); os._exit(3)", wait=False)
    assert kernel.event("kernel_exit")["code"] == 3


def test_time_away_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the clock jumps during a sleep, as in a restore, timers go on with what was left of them."""
    loop = Loop()
    jump = 0.0
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + jump)
    fired: list[str] = []
    loop.later(5.0, lambda: fired.append("late"))
    loop.later(0.01, lambda: fired.append("early"))

    class Sleeper:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def poll(self, timeout: float) -> Any:
            nonlocal jump
            jump = 3600.0
            return self.inner.poll(timeout)

        def close(self) -> None:
            self.inner.close()

    loop._epoll = Sleeper(loop._epoll)  # type: ignore[assignment]
    before = loop.now()
    loop.turn()
    assert loop.now() - before < 1
    while not fired:
        loop.turn()
    assert fired == ["early"]
    loop.close()


def test_a_renewed_listener_hears_what_was_watched() -> None:
    """Also what was ready before, and not what was forgotten."""
    loop = Loop()
    heard: list[int] = []
    pipes = [os.pipe() for _ in range(2)]
    for number, (receiving, sending) in enumerate(pipes):
        loop.watch(receiving, lambda number=number: heard.append(number))  # type: ignore[misc]
        os.write(sending, b"x")
    loop.forget(pipes[0][0])
    loop.renew()
    loop.turn()
    assert heard == [1]
    loop.close()
    for pair in pipes:
        for fd in pair:
            os.close(fd)
