"""Linux capabilities and process attributes, through ``prctl`` and ``capset``; no dependency but libc.

The agent may be root with everything, an ordinary uid holding SETUID, SETGID, SETPCAP, KILL and CHOWN (gVisor), or an
ordinary user with nothing (tests). The kernel must end with no capability at all, and no way to get one back.
"""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

_PR_SET_DUMPABLE = 4
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_PR_GET_NO_NEW_PRIVS = 39
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4

_CAP_V3 = 0x20080522
_LAST_CAP = 63
"""No kernel knows more than 64: the sets are two words of 32 bits."""

_libc = ctypes.CDLL(None, use_errno=True)


class PrivilegeError(OSError):
    """A privilege could not be given up; the kernel must not be started."""


def _prctl(option: int, *arguments: int) -> int:
    padded = [*arguments, 0, 0, 0, 0][:4]
    result = int(_libc.prctl(ctypes.c_int(option), *(ctypes.c_ulong(value) for value in padded)))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def effective_capabilities() -> int:
    """The effective set of the calling thread as a bit mask (``capget(2)``)."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAP_V3, 0))
    data = ctypes.create_string_buffer(24)
    if _libc.capget(header, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    low, _, _, high, _, _ = struct.unpack("=6I", data.raw[:24])
    return int(low) | int(high) << 32


def bounding_set() -> int:
    """The bounding set of the calling thread as a bit mask."""
    mask = 0
    for capability in range(_LAST_CAP + 1):
        try:
            if _prctl(_PR_CAPBSET_READ, capability):
                mask |= 1 << capability
        except OSError:
            break  # the first number that this kernel does not know
    return mask


def protect_self() -> None:
    """Keep other processes of the same uid out of this one's memory and descriptors, and adopt orphans.

    Neither is needed where the agent is PID 1 with a uid of its own; both are where it runs natively, in tests.
    """
    for option, value in ((_PR_SET_DUMPABLE, 0), (_PR_SET_CHILD_SUBREAPER, 1)):
        try:
            _prctl(option, value)
        except OSError:
            pass  # not known to this kernel (gVisor lacks some): see above


def drop_everything(uid: int, gid: int) -> None:
    """Become ``uid``/``gid`` with no supplementary group and no capability, now and after any exec.

    Called in the forked child before its exec. Raises :class:`PrivilegeError` when the result would not hold; above
    all with uid 0 and capabilities left in the bounding set, since exec gives root whatever that set contains.
    """
    switching = os.getresuid() != (uid,) * 3 or os.getresgid() != (gid,) * 3
    bounding = bounding_set()
    for capability in range(_LAST_CAP + 1):
        if bounding >> capability & 1:
            try:
                _prctl(_PR_CAPBSET_DROP, capability)
            except OSError:
                break  # no CAP_SETPCAP; what that means is judged below
    if switching:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    try:
        _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    except OSError:
        pass  # no ambient set in this kernel; capset below empties it by emptying the permitted set
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAP_V3, 0))
    if _libc.capset(header, ctypes.create_string_buffer(24)) < 0:
        number = ctypes.get_errno()
        raise PrivilegeError(number, f"capabilities could not be dropped: {os.strerror(number)}")
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if effective_capabilities() or os.getresuid() != (uid,) * 3 or os.getresgid() != (gid,) * 3:
        raise PrivilegeError(1, "the kernel would have kept privileges")
    if uid == 0 and bounding_set():
        raise PrivilegeError(
            1, "uid 0 would regain capabilities: the agent lacks CAP_SETPCAP to empty the bounding set"
        )


def allow_own_proc() -> None:
    """Make ``/proc/self`` of a forked child its own again (it inherited :func:`protect_self`)."""
    try:
        _prctl(_PR_SET_DUMPABLE, 1)
    except OSError:
        pass  # then protect_self could not have taken it away either


def describe() -> dict[str, object]:
    """Ids and capability sets of this process, for the agent's greeting and the tests."""
    return {
        "uid": os.getuid(),
        "gid": os.getgid(),
        "pid": os.getpid(),
        "effective": effective_capabilities(),
        "no_new_privs": bool(_prctl(_PR_GET_NO_NEW_PRIVS)),
    }


def set_oom_score(value: int) -> None:
    """Make the kernel's memory killer prefer this process (0 to 1000); without effect where it is not known."""
    try:
        Path("/proc/self/oom_score_adj").write_text(str(value), encoding="ascii")
    except OSError:
        pass  # advice only; the limit that counts is the host's cgroup
