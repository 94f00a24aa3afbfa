"""What of the host can be seen from inside: nothing but what the profile names."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from acceptance import Bystander, Client, Product

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("bystander")]

PROBE = """
import json, os
def attempt(path):
    try:
        with open(path, "rb") as file:
            return file.read(100_000).decode("latin-1")
    except OSError as error:
        return None
print(json.dumps({path: attempt(path) for path in %s}))
"""


def _read(client: Client, *paths: str | Path) -> dict[str, str | None]:
    found: dict[str, str | None] = client.value(PROBE % json.dumps([str(path) for path in paths]))
    return found


def test_the_home_directory_of_the_host_user_is_not_there(inside: Client, canary: str) -> None:
    home = Path.home()
    assert (home / f".sg-{canary}").read_text() == canary
    assert _read(inside, home / f".sg-{canary}") == {str(home / f".sg-{canary}"): None}
    names = inside.value(
        "import json, os\nfound = []\n"
        "for top, folders, files in os.walk('/'):\n"
        "    if top == '/':\n        folders[:] = [f for f in folders if f not in ('proc', 'sys')]\n"
        f"    found += [os.path.join(top, n) for n in files + folders if 'sg-{canary[:10]}' in n]\n"
        "print(json.dumps(found))",
        timeout=180,
    )
    assert names == []


def test_the_hosts_shadow_file_is_not_there(inside: Client) -> None:
    (theirs,) = _read(inside, "/etc/shadow").values()
    if os.geteuid() == 0:
        host = Path("/etc/shadow").read_text()
        assert theirs is None or not set(theirs.splitlines()) & set(host.splitlines())
    assert theirs is None or "$" not in theirs


def test_the_hosts_accounts_and_names_are_not_there(inside: Client) -> None:
    found = _read(inside, "/etc/passwd", "/etc/machine-id", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf")
    for path, text in found.items():
        if text and text.strip() and path in ("/etc/machine-id", "/etc/hostname"):
            host = Path(path).read_text().strip() if Path(path).exists() else ""
            assert text.strip() != host, path
    assert socket.gethostname() != inside.value("import json, socket\nprint(json.dumps(socket.gethostname()))")


def test_the_products_own_directories_are_not_there(inside: Client, bystander_kernel: Client, product: Product) -> None:
    """Neither the store, nor other kernels' runtime directories, nor the link's FIFOs, its own included."""
    from sandbox_gateway.host.paths import discover

    paths = discover()
    assert paths.home == product.home
    places = [paths.home, paths.runtime, paths.sandbox(inside.id), paths.sandbox(bystander_kernel.id), paths.database]
    assert all(place.exists() for place in places)
    places += [entry for top in (inside.id, bystander_kernel.id) for entry in paths.sandbox(top).iterdir()]
    seen = inside.value(
        f"import json, os\nprint(json.dumps([p for p in {[str(place) for place in places]!r} if os.path.lexists(p)]))"
    )
    assert seen == []
    fifos = inside.value(
        "import json, os, stat\nfound = []\n"
        "for top, folders, files in os.walk('/'):\n"
        "    if top == '/':\n        folders[:] = [f for f in folders if f not in ('proc', 'sys')]\n"
        "    for name in files:\n"
        "        try:\n            mode = os.lstat(os.path.join(top, name)).st_mode\n"
        "        except OSError:\n            continue\n"
        "        if stat.S_ISFIFO(mode) or stat.S_ISBLK(mode):\n            found.append(os.path.join(top, name))\n"
        "print(json.dumps(found))",
        timeout=180,
    )
    assert fifos == []


def test_mounts_name_no_place_of_the_host(inside: Client, product: Product) -> None:
    (text,) = _read(inside, "/proc/self/mountinfo").values()
    assert text
    assert str(product.home) not in text
    for line in text.splitlines():
        where, _, what = line.partition(" - ")
        assert where.split()[3] == "/", line  # what is mounted is whole; its own path may be any, an environment's is
        assert not what.split()[1].startswith("/"), line


def test_host_processes_are_neither_seen_nor_signalled(inside: Client) -> None:
    mark = "sg-host-process-mark"
    with subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.stdin.read()  # {mark}"], stdin=subprocess.PIPE
    ) as host:
        try:
            found = inside.value(
                "import json, os, signal\n"
                "lines = {}\n"
                "for name in os.listdir('/proc'):\n"
                "    if name.isdigit():\n"
                "        try:\n            lines[name] = open(f'/proc/{name}/cmdline').read()\n"
                "        except OSError as error:\n            lines[name] = repr(error)\n"
                f"try:\n    os.kill({host.pid}, signal.SIGKILL)\n    killed = True\n"
                "except OSError as error:\n    killed = repr(error)\n"
                "print(json.dumps([lines, killed]))"
            )
            assert mark not in "".join(found[0].values())
            assert len(found[0]) < 20, found[0]
            assert host.poll() is None
        finally:
            host.kill()


def test_the_hosts_environment_is_not_handed_in(inside: Client, canary: str) -> None:
    found = inside.value(
        "import json, os\nprint(json.dumps([dict(os.environ), open('/proc/self/environ', errors='replace').read()]))"
    )
    assert canary not in json.dumps(found)
    assert found[0]["SANDBOX_ID"] == inside.id
    for name in ("SANDBOX_GATEWAY_HOME", "JUPYTER_PATH", "SSH_AUTH_SOCK", "JPY_PARENT_PID", "PYTEST_CURRENT_TEST"):
        assert name not in found[0]
    (pid1,) = _read(inside, "/proc/1/environ").values()
    assert canary not in (pid1 or "")


class _Counting(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    seen = 0


class _Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.server.seen += 1  # type: ignore[attr-defined]
        self.request.sendall(b"hello")


@contextlib.contextmanager
def _server() -> Iterator[_Counting]:
    with _Counting(("0.0.0.0", 0), _Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def _addresses() -> list[str]:
    """Every IPv4 address of this machine."""
    return sorted(
        {
            entry.address
            for entries in psutil.net_if_addrs().values()
            for entry in entries
            if entry.family == socket.AF_INET
        }
    )


def test_no_address_of_the_host_answers(inside: Client) -> None:
    """TCP to a server of the test's own, on each of the host's addresses; the server must not see anybody."""
    with _server() as server:
        port = server.server_address[1]
        addresses = _addresses()
        assert "127.0.0.1" in addresses
        for address in addresses:  # the trap works
            with socket.create_connection((address, port), 5) as probe:
                assert probe.recv(5) == b"hello"
        before = server.seen
        answers = inside.value(
            "import json, socket\nanswers = {}\n"
            f"for address in {addresses!r}:\n"
            f"    try:\n        with socket.create_connection((address, {port}), 3) as s:\n"
            "            answers[address] = s.recv(5).decode()\n"
            "    except OSError as error:\n        answers[address] = None\n"
            "print(json.dumps(answers))"
        )
        assert answers == dict.fromkeys(addresses)
        assert server.seen == before


def test_no_datagram_leaves(inside: Client) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as trap:
        trap.bind(("0.0.0.0", 0))
        trap.settimeout(1.0)
        port = trap.getsockname()[1]
        inside.run(
            "import socket\n"
            f"for address in {_addresses()!r}:\n"
            "    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:\n"
            f"        try:\n            s.sendto(b'out', (address, {port}))\n"
            "        except OSError:\n            pass\n"
        )
        with pytest.raises(TimeoutError):
            trap.recv(10)


def test_there_is_no_interface_but_loopback_and_no_raw_socket(inside: Client) -> None:
    found = inside.value(
        "import json, socket\n"
        "def raw(*a):\n    try:\n        socket.socket(*a).close(); return True\n"
        "    except OSError:\n        return False\n"
        "print(json.dumps([[n for _, n in socket.if_nameindex()],"
        " raw(socket.AF_INET, socket.SOCK_RAW, 1), raw(socket.AF_PACKET, socket.SOCK_RAW, 3)]))"
    )
    assert set(found[0]) <= {"lo"}
    assert found[1:] == [False, False]


def test_sockets_of_the_host_cannot_be_reached(inside: Client, product: Product, tmp_path: Path) -> None:
    """Unix sockets with a path, abstract ones, and the ZMQ endpoints of the kernel's own bridge."""
    with socket.socket(socket.AF_UNIX) as named, socket.socket(socket.AF_UNIX) as abstract:
        path = f"{product.home}/s"
        named.bind(path)
        abstract.bind("\0sg-abstract-trap")
        for trap in (named, abstract):
            trap.listen()
            trap.settimeout(0.5)
        own = inside.client.get_connection_info()
        endpoints = [f"{own['ip']}-{own[f'{name}_port']}" for name in ("shell", "control", "iopub", "stdin", "hb")]
        if own["transport"] == "ipc":
            assert all(os.path.exists(endpoint) for endpoint in endpoints)
        targets = [path, "\0sg-abstract-trap", *endpoints, "/var/run/docker.sock", "/run/systemd/private"]
        answers = inside.value(
            "import json, socket\nanswers = []\n"
            f"for target in {targets!r}:\n"
            "    with socket.socket(socket.AF_UNIX) as s:\n"
            "        s.settimeout(2)\n"
            "        try:\n            s.connect(target); answers.append(target)\n"
            "        except OSError:\n            pass\n"
            "print(json.dumps(answers))"
        )
        assert answers == []
        for trap in (named, abstract):
            with pytest.raises(TimeoutError):
                trap.accept()
    os.unlink(path)


def test_what_is_read_only_stays_as_it_is(inside: Client, bystander_kernel: Client) -> None:
    """Writes to the system and to the agent's layer fail, or land in this sandbox's memory only."""
    targets = [
        "/opt/agent/x",
        "/usr/bin/x",
        "/etc/x",
        "/x",
        "/proc/sys/kernel/hostname",
        "/sys/x",
        "/dev/x",
        sys.executable,
    ]
    before = os.stat(sys.executable)
    written = inside.value(
        "import json\nwritten = []\n"
        f"for target in {targets!r}:\n"
        "    try:\n        open(target, 'ab').write(b'attack'); written.append(target)\n"
        "    except OSError:\n        pass\n"
        "print(json.dumps(written))"
    )
    assert "/opt/agent/x" not in written
    assert "/usr/bin/x" not in written
    assert "/etc/x" not in written
    for target in targets[:-1]:
        assert not os.path.exists(target) or target.startswith("/proc"), target
    after = os.stat(sys.executable)
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    with another_client(bystander_kernel) as neighbour:
        assert all(text is None for text in _read(neighbour, *targets[:4]).values())


@contextlib.contextmanager
def another_client(client: Client) -> Iterator[Client]:
    """A second client of the same kernel, since the first one is at work in another thread."""
    again = client.manager.blocking_client()
    again.start_channels()
    try:
        again.wait_for_ready(timeout=30)
        yield Client(client.manager, again)
    finally:
        again.stop_channels()


def test_temporary_files_are_its_own(inside: Client, bystander: Bystander) -> None:
    assert inside.run("open('/tmp/sg-left-inside', 'w').write('x')").status == "ok"
    assert not os.path.exists("/tmp/sg-left-inside")
