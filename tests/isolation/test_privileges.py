"""The kernel has no privileges, gets none, and cannot reach into PID 1."""

from __future__ import annotations

import os

import pytest
from acceptance import Client

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("bystander")]

CALLS = """
import ctypes, json, os, platform
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    ctypes.set_errno(0)
    code = getattr(libc, name)(*arguments)
    return None if code == 0 else os.strerror(ctypes.get_errno())
"""


def test_no_capability_and_no_way_to_one(inside: Client) -> None:
    status = inside.value(
        "import json\nprint(json.dumps(dict(line.rstrip('\\n').split(':\\t', 1) "
        "for line in open('/proc/self/status') if ':\\t' in line)))"
    )
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd"):
        assert int(status[name], 16) == 0, name
    assert int(status.get("CapAmb", "0"), 16) == 0
    assert status.get("NoNewPrivs", "1") == "1"
    assert status["Groups"].strip() in ("", status["Gid"].split()[0])


def test_other_ids_are_refused(inside: Client) -> None:
    found = inside.value(
        CALLS + "mine = os.getuid()\n"
        "other = 0 if mine else 1000\n"
        "print(json.dumps([mine, call('setuid', other), call('setgid', other), call('setresuid', other, other, other), "
        "call('setgroups', 1, (ctypes.c_int * 1)(other)), call('setuid', 64999)]))"
    )
    assert None not in found[1:], found


def test_a_setuid_program_does_not_help(inside: Client) -> None:
    found = inside.value(
        "import json, os, shutil, subprocess, glob, stat\n"
        "suid = [p for d in ('/bin', '/usr/bin', '/usr/sbin', '/sbin') for p in glob.glob(d + '/*')"
        " if os.path.exists(p) and os.stat(p).st_mode & stat.S_ISUID]\n"
        "shutil.copy(shutil.which('id') or '/bin/true', '/tmp/own')\n"
        "os.chmod('/tmp/own', 0o6755)\n"
        "run = subprocess.run(['/tmp/own', '-u'], capture_output=True, text=True)\n"
        "su = subprocess.run(['sh', '-c', 'su -c id root </dev/null; sudo -n id'], capture_output=True, text=True)\n"
        "print(json.dumps([os.getuid(), run.stdout.strip(), su.returncode]))"
    )
    assert found[1] in ("", str(found[0]))
    assert found[2] != 0


def test_the_machine_cannot_be_administered(inside: Client) -> None:
    """mount, chroot, pivot_root, reboot, time, modules, devices: each refused."""
    found = inside.value(
        CALLS + "b = ctypes.c_char_p\n"
        "os.makedirs('/tmp/at', exist_ok=True)\n"
        "print(json.dumps({\n"
        " 'mount': call('mount', b(b'none'), b(b'/tmp/at'), b(b'tmpfs'), 0, None),\n"
        " 'bind': call('mount', b(b'/'), b(b'/tmp/at'), None, 4096, None),\n"
        " 'remount': call('mount', b(b'none'), b(b'/'), None, 32, None),\n"
        " 'umount': call('umount2', b(b'/opt/agent'), 2),\n"
        " 'chroot': call('chroot', b(b'/tmp')),\n"
        " 'reboot': call('reboot', 0x1234567),\n"
        " 'sethostname': call('sethostname', b(b'x'), 1),\n"
        " 'settimeofday': call('settimeofday', (ctypes.c_long * 2)(1, 1), None),\n"
        " 'swapon': call('swapon', b(b'/tmp/x'), 0),\n"
        " 'mknod': call('mknod', b(b'/tmp/disk'), 0o60600, 0x801),\n"
        " 'init_module': call('init_module', None, 0, b(b'')),\n"
        " 'iopl': call('iopl', 3),\n"
        "}))"
    )
    assert [name for name, refusal in found.items() if refusal is None] == []


IN_A_USER_NAMESPACE = (
    CALLS
    + """
made = call('unshare', 0x10000000 | 0x00020000)
def works(function, *arguments):
    try:
        function(*arguments)
        return True
    except OSError:
        return False
print(json.dumps({
    'made': made,
    'memory': works(os.open, '/proc/1/mem', os.O_RDWR),
    'link': works(os.open, '/proc/1/fd/0', os.O_WRONLY) or works(os.open, '/proc/1/fd/1', os.O_WRONLY),
    'signal': works(os.kill, 1, 19),
    'ptrace': call('ptrace', 16, 1, 0, 0) is None,
    'agent': works(os.open, '/opt/agent/y', os.O_CREAT | os.O_WRONLY),
}))
"""
)


def test_a_user_namespace_inside_opens_nothing(inside: Client) -> None:
    """gVisor may allow one (it is its own kernel's): PID 1, its link and the agent's layer must stay shut."""
    found = inside.value(
        "import subprocess, sys\n"
        f"print(subprocess.check_output([sys.executable, '-c', {IN_A_USER_NAMESPACE!r}], text=True))"
    )
    found.pop("made")
    assert not any(found.values()), found


def test_pid_1_cannot_be_traced_read_or_written(inside: Client) -> None:
    """No ptrace, no memory, no descriptors: the link is behind /proc/1/fd."""
    found = inside.value(
        CALLS + "def opened(path, mode):\n"
        "    try:\n        os.close(os.open(path, mode | os.O_NONBLOCK)); return True\n"
        "    except OSError:\n        return False\n"
        "try:\n    listed = os.listdir('/proc/1/fd')\nexcept OSError:\n    listed = []\n"
        "paths = [f'/proc/1/fd/{n}' for n in range(64)] + [f'/proc/1/task/1/fd/{n}' for n in range(16)]\n"
        "paths += [f'/proc/1/root/proc/1/fd/{n}' for n in range(8)]\n"
        "print(json.dumps({\n"
        " 'attach': call('ptrace', 16, 1, 0, 0), 'seize': call('ptrace', 0x4206, 1, 0, 0),\n"
        " 'vm': libc.process_vm_readv(1, None, 0, None, 0, 0) > 0,\n"
        " 'pidfd': (lambda fd: fd >= 0 and libc.syscall(438, fd, 1, 0) >= 0)(libc.syscall(434, 1, 0)),\n"
        " 'open': [p for p in paths for m in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR) if opened(p, m)],\n"
        " 'mem': opened('/proc/1/mem', os.O_RDWR), 'listed': listed,\n"
        "}))"
    )
    assert found["attach"] is not None
    assert found["seize"] is not None
    assert found["vm"] is False
    assert found["pidfd"] is False
    assert found["open"] == []
    assert found["mem"] is False


def test_no_process_of_the_kernel_holds_a_descriptor_of_the_link(inside: Client) -> None:
    found = inside.value(
        "import json, os, stat\nfound = {}\n"
        "for name in os.listdir('/proc'):\n"
        "    if not name.isdigit() or name == '1':\n        continue\n"
        "    try:\n        fds = os.listdir(f'/proc/{name}/fd')\n    except OSError:\n        continue\n"
        "    for fd in fds:\n"
        "        try:\n            link = os.readlink(f'/proc/{name}/fd/{fd}')\n"
        "        except OSError:\n            continue\n"
        "        found[f'{name}/{fd}'] = link\n"
        "print(json.dumps(found))"
    )
    assert found, "a kernel sees its own descriptors"
    assert not [f"{fd}: {link}" for fd, link in found.items() if "fifo" in link.lower() or link.startswith("host:")]


@pytest.mark.parametrize("number", [9, 15, 19, 2])
def test_a_signal_to_pid_1_harms_nobody_else(attacker: Client, number: int) -> None:
    """Refused; or, were it taken, the death is told. The other kernel goes on either way (the fixture looks)."""
    result = attacker.run(f"import os\nos.kill(1, {number})", timeout=30)
    if result.status == "error":
        assert result.error.startswith("PermissionError")
        assert attacker.run("print(1)").stdout == "1\n"
    else:
        assert result.status == "dead"
        assert "[sandbox]" in result.stderr


def test_killing_everything_ends_the_kernel_with_a_reason(attacker: Client) -> None:
    result = attacker.run(
        "import os\ntry:\n    os.kill(-1, 9)\nexcept OSError:\n    pass\nos.kill(os.getpid(), 9)", timeout=60
    )
    assert result.status == "dead"
    assert "signal 9" in result.stderr or "SIGKILL" in result.stderr, result.stderr
    assert os.path.exists("/proc/1")
    attacker.manager.restart_kernel(now=True)
    attacker.client.wait_for_ready(timeout=60)
    assert attacker.run("print('back')").stdout == "back\n"
