"""The owner's lock: one holder at a time, gone with its holder, never inherited."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.owner_lock import OwnerLock, holder, renew_held

HOLDER = """
import sys
from pathlib import Path
from sandbox_gateway.owner import OwnerLock
lock = OwnerLock(Path(sys.argv[1])); lock.try_acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other_process(tmp_path: Path):
    """A process that holds the lock of ``tmp_path / 's'`` until its stdin ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "s")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_only_one_holds_it_and_others_see_who(tmp_path: Path):
    first, second = OwnerLock(tmp_path / "s"), OwnerLock(tmp_path / "s")
    assert holder(tmp_path / "s") is None
    first.acquire()
    first.acquire()
    assert holder(tmp_path / "s") == os.getpid() == first.pid
    assert not second.try_acquire()
    with pytest.raises(SandboxGatewayError, match=str(os.getpid())) as caught:
        second.acquire()
    assert caught.value.code == "owned_elsewhere"
    first.release()
    first.release()
    assert holder(tmp_path / "s") is None
    assert second.try_acquire()
    second.release()


def test_another_process_holds_it_until_it_is_killed(tmp_path: Path, other_process: subprocess.Popen[bytes]):
    lock = OwnerLock(tmp_path / "s")
    assert not lock.try_acquire()
    assert holder(tmp_path / "s") == other_process.pid
    other_process.send_signal(signal.SIGKILL)
    other_process.wait()
    assert holder(tmp_path / "s") is None, "its name is still in the file, and it is not believed"
    with lock:
        assert holder(tmp_path / "s") == os.getpid()


def test_asking_who_holds_it_never_disturbs_a_taker(tmp_path: Path):
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            holder(tmp_path / "s")

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        lock = OwnerLock(tmp_path / "s")
        for _ in range(500):
            assert lock.try_acquire()
            lock.release()
    finally:
        done.set()
        asking.join()


def test_children_do_not_inherit_it(tmp_path: Path):
    lock = OwnerLock(tmp_path / "s")
    lock.acquire()
    child = os.fork()
    if child == 0:
        still_owned = holder(tmp_path / "s") is not None and not lock.held
        lock.release()
        still_owned = still_owned and holder(tmp_path / "s") is not None
        signal.pause() if still_owned else os._exit(1)
    executed = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        lock.release()
        again = OwnerLock(tmp_path / "s")
        assert again.try_acquire()
        again.release()
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child saw the lock held by its parent"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        executed.kill()
        executed.wait()


def test_the_death_of_a_holder_that_forked_frees_it(tmp_path: Path):
    program = (
        "import os, signal, sys; from pathlib import Path; from sandbox_gateway.owner import OwnerLock\n"
        "lock = OwnerLock(Path(sys.argv[1])); lock.acquire(); child = os.fork()\n"
        "if child == 0: os.write(1, b'ready\\n'); signal.pause()\n"
        "os.write(1, b'%d\\n' % child); os.kill(os.getpid(), signal.SIGKILL) if sys.stdin.readline() else None\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "s")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    lines = {process.stdout.readline(), process.stdout.readline()}
    child = int(next(line for line in lines if line != b"ready\n"))
    try:
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.wait()
        assert holder(tmp_path / "s") is None
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdin.close()
        process.stdout.close()


def test_release_with_remove_leaves_no_file_and_no_second_owner(tmp_path: Path):
    wins: list[int] = []
    inside = threading.Lock()

    def own_and_remove() -> None:
        for _ in range(200):
            lock = OwnerLock(tmp_path / "s")
            if lock.try_acquire():
                assert inside.acquire(blocking=False), "two owners at once"
                wins.append(1)
                inside.release()
                lock.release(remove=True)

    threads = [threading.Thread(target=own_and_remove) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wins
    assert list(tmp_path.iterdir()) == []


def test_remove_keeps_what_is_not_the_locks(tmp_path: Path):
    lock = OwnerLock(tmp_path / "s")
    lock.acquire()
    (tmp_path / "s" / "in").touch()
    lock.release(remove=True)
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["in"]


def test_the_lock_is_private(tmp_path: Path):
    lock = OwnerLock(tmp_path / "s")
    with lock:
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o700
        (file,) = (tmp_path / "s").iterdir()
        assert file.name.startswith("owner")
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path):
    (tmp_path / "s").mkdir()
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / "s" / "owner.lock").symlink_to(target)
    with pytest.raises(SandboxGatewayError) as caught:
        OwnerLock(tmp_path / "s").try_acquire()
    assert caught.value.code == "data_directory"
    assert target.read_text() == "precious"
    assert holder(tmp_path / "s") is None


def test_a_file_in_place_of_the_directory_is_an_unusable_data_directory(tmp_path: Path):
    (tmp_path / "s").touch()
    with pytest.raises(SandboxGatewayError) as caught:
        OwnerLock(tmp_path / "s").acquire()
    assert caught.value.code == "data_directory"


def test_a_lock_file_that_was_removed_is_made_again_and_still_ours(tmp_path: Path):
    with OwnerLock(tmp_path / "s") as lock:
        (tmp_path / "s" / "owner.lock").unlink()
        assert holder(tmp_path / "s") is None, "nobody sees an owner"
        assert lock.renew()
        assert holder(tmp_path / "s") == os.getpid()
        assert not OwnerLock(tmp_path / "s").try_acquire()
        (tmp_path / "s" / "owner.lock").unlink()
        (tmp_path / "s").rmdir()
        assert lock.renew() and holder(tmp_path / "s") == os.getpid()
    assert holder(tmp_path / "s") is None


def test_a_removed_lock_that_another_one_took_is_told(tmp_path: Path):
    with OwnerLock(tmp_path / "s") as lock:
        (tmp_path / "s" / "owner.lock").unlink()
        with OwnerLock(tmp_path / "s"):
            assert not lock.renew()
            lock.release(remove=True)
            assert holder(tmp_path / "s") == os.getpid(), "it is still the other's"


def test_a_lock_that_is_held_is_kept_young(tmp_path: Path):
    with OwnerLock(tmp_path / "s"):
        os.utime(tmp_path / "s" / "owner.lock", (1, 1))
        renew_held()
        assert (tmp_path / "s" / "owner.lock").stat().st_mtime > 1e9
    assert OwnerLock(tmp_path / "s").renew(), "one that is not held has nothing to keep"
