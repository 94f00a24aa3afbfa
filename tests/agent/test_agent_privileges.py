"""What the kernel is allowed: nothing of the agent's. As root natively, and with the capabilities that PID 1 has."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_host import KEY, AgentError, AgentProcess, Host

OPEN = tuple[str, dict[str, str], Path]
PROBE = """
import os, subprocess
def status(text):
    return {k: v.strip() for k, v in (line.split(':', 1) for line in text.splitlines() if ':' in line)}
def attempt(call):
    try:
        call()
    except OSError as error:
        return type(error).__name__
    return 'done'
own = status(open('/proc/self/status').read())
child = status(subprocess.run(['cat', '/proc/self/status'], capture_output=True, text=True).stdout)
agent = os.getppid()
print({
    'ids': (own['Uid'].split(), own['Gid'].split(), own['Groups']),
    'caps': {own[k] for k in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb')},
    'child caps': {child[k] for k in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb')},
    'new privileges': own['NoNewPrivs'],
    'kill': attempt(lambda: os.kill(agent, 9)),
    'descriptors': attempt(lambda: os.listdir(f'/proc/{agent}/fd')),
    'memory': attempt(lambda: open(f'/proc/{agent}/mem', 'rb')),
    'setuid': attempt(lambda: os.setuid(64999)),
    'connection': attempt(lambda: open(os.path.join(os.path.dirname(get_file()), 'mine'), 'w')),
    'oom': open('/proc/self/oom_score_adj').read().strip(),
    'umask': os.umask(0o022),
})
"""


def start(host: Host, python: OPEN, uid: int, **changes: Any) -> None:
    program, environment, home = python
    argv = [program, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    fields = {"argv": argv, "env": environment, "cwd": str(home), "uid": uid, "gid": uid, "key": KEY}
    host.call("start_kernel", **{**fields, **changes})
    host.event("kernel_ready")


def check(host: Host, uid: int) -> None:
    found = ast.literal_eval(host.run("from ipykernel import get_connection_file as get_file" + PROBE))
    assert found["ids"] == ([str(uid)] * 4, [str(uid)] * 4, "")
    assert found["caps"] == found["child caps"] == {"0" * 16}
    assert found["new privileges"] == "1"
    for forbidden in ("kill", "descriptors", "memory", "connection"):
        assert found[forbidden] == "PermissionError", forbidden
    assert (found["oom"], found["umask"]) == ("500", 0o022)


def test_a_kernel_of_another_uid_is_powerless(open_python: OPEN, host: Host) -> None:
    """No capability, none to regain, and neither signals nor the agent's descriptors nor its connection file."""
    start(host, open_python, 54321)
    check(host, 54321)
    host.call("interrupt")
    host.call("restart_kernel")
    host.event("kernel_ready", generation=2)
    check(host, 54321)


@pytest.fixture
def limited(open_python: OPEN) -> Iterator[Callable[[str], AgentProcess]]:
    """Makes agents with a uid and a few capabilities only, as PID 1 of a sandbox has them."""
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("setpriv is not installed")
    made: list[AgentProcess] = []

    def make(capabilities: str) -> AgentProcess:
        caps = ",".join(["-all", capabilities] if capabilities else ["-all"])
        sets = [f"--inh-caps={caps}", f"--ambient-caps={caps}", f"--bounding-set={caps}"]
        prefix = [setpriv, "--reuid", "64999", "--regid", "64999", "--clear-groups", *sets]
        program, environment, _ = open_python
        made.append(AgentProcess(prefix, program, **environment, TMPDIR="/tmp"))
        made[-1].host.attach()
        return made[-1]

    yield make
    for process in made:
        process.end()


CAPABILITIES = "+chown,+kill,+setgid,+setpcap,+setuid"


@pytest.mark.parametrize("uid", [54321, 0])
def test_an_agent_with_few_capabilities_starts_a_powerless_kernel(
    limited: Callable[[str], AgentProcess], open_python: OPEN, uid: int
) -> None:
    """Also as uid 0 (where a workspace belongs to it): exec would give root whatever the bounding set holds."""
    host = limited(CAPABILITIES).host
    start(host, open_python, uid)
    found = ast.literal_eval(host.run("from ipykernel import get_connection_file as get_file" + PROBE))
    assert found["caps"] == found["child caps"] == {"0" * 16}
    assert found["kill"] == found["setuid"] == "PermissionError"
    host.call("interrupt")
    host.call("restart_kernel")
    host.event("kernel_ready", generation=2)
    assert host.run("print(1)") == "1\n"
    assert host.call("stop_kernel", grace=1)["exit"]["signal"] == 15


def test_a_kernel_that_would_keep_privileges_is_not_started(
    limited: Callable[[str], AgentProcess], open_python: OPEN
) -> None:
    """Without the capability to empty the bounding set, uid 0 is refused with the reason."""
    host = limited("+chown,+kill,+setgid,+setuid").host
    with pytest.raises(AgentError, match="CAP_SETPCAP"):
        start(host, open_python, 0)


def test_resource_limits_hold_in_the_kernel(open_python: OPEN, host: Host) -> None:
    """Those that the request names, and never more than the agent's own."""
    start(host, open_python, 54321, rlimits={"nofile": [256, 512], "core": 0})
    code = (
        "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_CORE))"
    )
    assert host.run(code) == "(256, 512) (0, 0)\n"


def test_a_missing_working_directory_becomes_the_root(open_python: OPEN, host: Host) -> None:
    """The kernel starts in / instead."""
    start(host, open_python, 54321, cwd="/no/such/place")
    assert host.run("import os; print(os.getcwd())") == "/\n"


def test_a_uid_that_cannot_be_taken_is_an_error_of_the_start(
    limited: Callable[[str], AgentProcess], open_python: OPEN
) -> None:
    """An agent without the right to switch says so, and starts nothing."""
    host = limited("").host
    with pytest.raises(AgentError, match="not permitted"):
        start(host, open_python, 54321)
    assert host.call("stats")["processes"] == 0
