"""What comes out of a sandbox is hostile: floods, garbage and lies on the kernel's sockets."""

from __future__ import annotations

import os

import psutil
import pytest
from acceptance import Bystander, Client

pytestmark = pytest.mark.timeout(300)

MIB = 1024**2

SOCKETS = """
import glob, json, os, zmq
from ipykernel.connect import get_connection_file
info = json.load(open(get_connection_file()))
def endpoint(name):
    port = info[name + '_port']
    return f"ipc://{info['ip']}-{port}" if info['transport'] == 'ipc' else f"tcp://{info['ip']}:{port}"
context = zmq.Context()
def connected(kind, name, identity=None):
    socket = context.socket(kind)
    socket.linger = 200
    socket.sndtimeo = socket.rcvtimeo = 2000
    if identity is not None:
        socket.identity = identity
    socket.connect(endpoint(name))
    return socket
"""
"""Code inside that opens sockets of its own to the kernel's endpoints, as the agent does."""


def _memory() -> int:
    return int(psutil.Process(os.getpid()).memory_info().rss)


def _goes_on(client: Client) -> bool:
    result = client.run("print('on')", timeout=60)
    return result.status == "ok" and result.stdout == "on\n"


def test_a_flood_of_prints_is_bounded_and_loses_nothing_silently(attacker: Client, bystander: Bystander) -> None:
    before = _memory()
    result = attacker.run("for n in range(300):\n    print('x' * 99_999)", timeout=120)
    assert result.status == "ok"
    left_out = "[sandbox]" in result.stderr
    assert left_out or result.stdout.count("\n") == 300
    assert _memory() - before < 800 * MIB
    bystander.check()


def test_a_flood_of_raw_descriptor_output_is_kept_in_a_bounded_log(attacker: Client, bystander: Bystander) -> None:
    """50 MB straight to the process's real standard output, past ipykernel."""
    before = _memory()
    result = attacker.run(
        "import os, subprocess\n"
        "for n in range(40):\n    os.write(1, b'y' * 1_000_000)\n"
        "subprocess.run(['sh', '-c', 'head -c 10000000 /dev/zero'])\nprint('end')",
        timeout=120,
    )
    assert result.status == "ok", result.text[-300:]
    assert _memory() - before < 800 * MIB
    assert _goes_on(attacker)
    bystander.check()


def test_a_flood_of_tiny_messages_on_iopub(attacker: Client, bystander: Bystander) -> None:
    result = attacker.run(
        "from IPython import get_ipython\nk = get_ipython().kernel\n"
        "dot = {'name': 'stdout', 'text': '.'}\n"
        "for n in range(20_000):\n    k.session.send(k.iopub_socket, 'stream', dot, ident=b'stream')\n",
        timeout=120,
    )
    assert result.status == "ok", result.text[-500:]
    assert _goes_on(attacker)
    bystander.check()


@pytest.mark.parametrize(
    "parts",
    [
        "[]",
        "[b'']",
        "[b'<IDS|MSG>']",
        "[b'x'] * 3000",
        "[b'topic', b'<IDS|MSG>', b'sig']",
        "[b'topic', b'<IDS|MSG>', b'bad signature', b'{}', b'{}', b'{}', b'{}']",
        "[b'topic', b'<IDS|MSG>', b'', b'{', b'[', b'nul', b'\\xff\\xfe']",
        "[b'topic', b'<IDS|MSG>', b'', b'{\"msg_type\": 7, \"msg_id\": null}', b'[]', b'1', b'\"x\"']",
        "[b'topic', b'<IDS|MSG>', b'', b'[' * 200_000, b'{}', b'{}', b'{}']",
        "[b'status', b'<IDS|MSG>', b'', b'{\"msg_type\":\"status\"}', b'{}', b'{}', b'{\"execution_state\":\"off\"}']",
        "[b'G' * 40_000_000]",
        "[os.urandom(300_000) for _ in range(5)]",
    ],
)
def test_garbage_on_iopub_harms_neither_host_nor_neighbour(attacker: Client, bystander: Bystander, parts: str) -> None:
    """Messages that no kernel sends, put on the real iopub socket; a client may refuse them, as the plain kernel's."""
    result = attacker.run(
        "import os\nfrom IPython import get_ipython\nk = get_ipython().kernel\n"
        f"parts = {parts}\n"
        "for _ in range(3):\n    parts and k.iopub_socket.send_multipart(parts)\n",
        timeout=60,
    )
    assert result.status in ("ok", "error"), result
    assert _goes_on(attacker)
    bystander.check()


@pytest.mark.parametrize(
    "parts",
    [
        "[b'']",
        "[b'x'] * 3000",
        "[b'<IDS|MSG>', b'sig']",
        "[b'<IDS|MSG>', b'', b'{', b'[', b'', b'']",
        "[b'G' * 40_000_000]",
    ],
)
def test_garbage_as_a_reply_harms_neither_host_nor_neighbour(
    attacker: Client, bystander: Bystander, parts: str
) -> None:
    """Answers that no kernel gives, sent to the agent's identity from the real shell socket."""
    result = attacker.run(
        "from IPython import get_ipython\nk = get_ipython().kernel\n"
        f"parts = {parts}\n"
        "socket = getattr(k.shell_stream, 'socket', k.shell_stream)\n"
        "sent = 0\n"
        "for _ in range(3):\n    socket.send_multipart([b'agent', *parts]); sent += 1\n",
        timeout=60,
    )
    assert result.status in ("ok", "error", "timeout"), result
    bystander.check()
    if not _goes_on(attacker):
        attacker.manager.restart_kernel(now=True)
        attacker.client.wait_for_ready(timeout=60)
        assert _goes_on(attacker)


def test_properly_signed_nonsense_is_relayed_without_harm(attacker: Client, bystander: Bystander) -> None:
    result = attacker.run(
        "from IPython import get_ipython\nk = get_ipython().kernel\n"
        "for kind, content in [('status', {'execution_state': 'suspended'}), ('status', {}), ('stream', {'name': 7}),\n"
        "                      ('execute_input', {}), ('shutdown_reply', {}), ('', {}), ('x' * 70000, {}),\n"
        "                      ('iopub_welcome', {'subscription': ''}), ('input_request', {'prompt': 'password? '})]:\n"
        "    k.session.send(k.iopub_socket, kind, content, ident=b'x')\n",
        timeout=60,
    )
    assert result.status == "ok", result.text
    assert _goes_on(attacker)
    bystander.check()


def test_impersonating_the_agent_takes_over_nothing_of_anybody_else(attacker: Client, bystander: Bystander) -> None:
    """Sockets with the agent's own identity on every endpoint, held while the owner goes on working."""
    result = attacker.run(
        SOCKETS
        + "held = [connected(zmq.DEALER, name, b'agent') for name in ('shell', 'control', 'stdin')]\n"
        + "for s in held:\n    s.send_multipart([b'<IDS|MSG>', b'', b'{}', b'{}', b'{}', b'{}'])\n"
        + "    s.send_multipart([b'garbage'] * 50)\n",
        timeout=60,
    )
    assert result.status in ("ok", "error", "timeout"), result
    bystander.check()
    # The kernel may have cheated itself out of its own replies; it must stay restartable.
    if not _goes_on(attacker):
        attacker.manager.restart_kernel(now=True)
        attacker.client.wait_for_ready(timeout=60)
        assert _goes_on(attacker)


def test_other_peers_on_the_kernels_sockets_get_no_signature_key_right(attacker: Client, bystander: Bystander) -> None:
    """Unsigned requests on shell and control are not executed, heartbeat noise is harmless."""
    result = attacker.run(
        SOCKETS
        + "shell = connected(zmq.DEALER, 'shell', b'stranger')\n"
        + "for n in range(200):\n"
        + "    shell.send_multipart([b'<IDS|MSG>', b'0' * 64, os.urandom(99), b'{}', b'{}', b'{}'])\n"
        + "hb = connected(zmq.DEALER, 'hb')\n"
        + "for n in range(2000):\n    hb.send(os.urandom(50))\n"
        + "sub = connected(zmq.SUB, 'iopub')\nsub.subscribe(b'')\nsub.send(b'\\x01' + b'q' * 100_000)\n"
        + "print('sent')",
        timeout=60,
    )
    assert "sent" in result.stdout or result.status == "error", result
    assert _goes_on(attacker)
    bystander.check()


def test_raw_bytes_on_the_ipc_sockets(attacker: Client, bystander: Bystander) -> None:
    """Not ZMTP at all, written to every socket file that can be found."""
    result = attacker.run(
        SOCKETS
        + "import socket\nsent = 0\n"
        + "for name in ('shell', 'control', 'stdin', 'iopub', 'hb'):\n"
        + "    path = endpoint(name)[len('ipc://'):]\n"
        + "    for garbage in (b'\\xff' * 4096, b'SG' * 5000, os.urandom(8192), b'GET / HTTP/1.1\\r\\n\\r\\n'):\n"
        + "        with socket.socket(socket.AF_UNIX) as s:\n"
        + "            try:\n                s.connect(path); s.sendall(garbage); sent += 1\n"
        + "            except OSError:\n                pass\n"
        + "print(sent)",
        timeout=60,
    )
    assert result.status == "ok", result.text
    assert _goes_on(attacker)
    bystander.check()


def test_taking_the_kernels_sockets_away_ends_in_a_clear_reason_or_a_working_kernel(
    attacker: Client, bystander: Bystander
) -> None:
    """The socket files are the kernel uid's own: it may remove them and harms itself alone."""
    attacker.run(
        SOCKETS
        + "for path in glob.glob(os.path.dirname(info['ip']) + '/*'):\n"
        + "    try:\n        os.unlink(path)\n    except OSError:\n        pass\n",
        timeout=60,
    )
    bystander.check()
    attacker.manager.restart_kernel(now=True)
    attacker.client.wait_for_ready(timeout=90)
    assert _goes_on(attacker)


def test_a_kernel_that_stops_itself_can_be_ended(attacker: Client, bystander: Bystander) -> None:
    """SIGSTOP on itself: the neighbour goes on and a restart brings it back."""
    attacker.client.execute("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)")
    bystander.check()
    attacker.manager.restart_kernel(now=True)
    attacker.client.wait_for_ready(timeout=90)
    assert _goes_on(attacker)
