"""A reply whose client had not yet come back is not lost with the owner that had it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import zmq
from acceptance import KERNEL, Product
from jupyter_client import KernelClient

OWNER = """
import sys
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel(kernel_name=sys.argv[1])
print(manager.provisioner.kernel_id, manager.connection_file, flush=True)
sys.stdin.read()
"""


def received(socket: zmq.Socket[bytes], client: KernelClient, msg_id: str, kind: str) -> bool:
    """Whether a message of this kind to this request comes within half a minute."""
    deadline = time.monotonic() + 30.0
    while (left := deadline - time.monotonic()) > 0:
        if socket.poll(int(left * 1000)):
            _, parts = client.session.feed_identities(socket.recv_multipart())
            message = client.session.deserialize(parts)
            ours = message["parent_header"].get("msg_id") == msg_id and message["msg_type"] == kind
            if ours and (kind != "status" or message["content"]["execution_state"] == "idle"):
                return True
    return False


def test_a_reply_that_came_while_nobody_owned_the_kernel_comes_from_the_next_owner(product: Product) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, KERNEL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdin is not None and owner.stdout is not None
    sandbox_id, file = owner.stdout.readline().split()
    client = KernelClient(connection_file=file)
    client.load_connection_file(str(Path(file)))
    client.session.digest_history_size = 0  # after a kill the same message may come twice
    iopub, shell = client.connect_iopub(), client.connect_shell(identity=client.session.bsession)
    try:
        assert iopub.poll(10_000), "the bridge welcomes"
        content = {"code": "import time; time.sleep(0.5)", "silent": False, "allow_stdin": False}
        message = client.session.send(shell, "execute_request", content)
        assert message is not None
        assert received(iopub, client, message["header"]["msg_id"], "execute_input"), "it has begun"
        owner.kill()
        owner.wait()
        time.sleep(1.5)  # the cell ends, and nobody is there to hear of it
        assert product.command("connect", sandbox_id).returncode == 0
        assert received(iopub, client, message["header"]["msg_id"], "status")
        assert received(shell, client, message["header"]["msg_id"], "execute_reply"), "the reply was lost"
    finally:
        for socket in (iopub, shell):
            socket.close(linger=0)
        owner.kill()
        owner.wait()
        owner.stdin.close()
        owner.stdout.close()
        product.command("rm", sandbox_id)


def test_a_reply_comes_after_a_suspend_and_the_death_of_two_owners(product: Product) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, KERNEL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdin is not None and owner.stdout is not None
    sandbox_id, file = owner.stdout.readline().split()
    client = KernelClient(connection_file=file)
    client.load_connection_file(str(Path(file)))
    client.session.digest_history_size = 0  # after a kill the same message may come twice
    identity = client.session.bsession
    iopub, shell = client.connect_iopub(), client.connect_shell(identity=identity)
    again = None
    try:
        assert iopub.poll(10_000), "the bridge welcomes"
        content = {"code": "import time; time.sleep(8)", "silent": False, "allow_stdin": False}
        message = client.session.send(shell, "execute_request", content)
        assert message is not None
        assert received(iopub, client, message["header"]["msg_id"], "execute_input"), "it has begun"
        shell.close(linger=0)
        owner.kill()
        owner.wait()
        assert product.command("connect", sandbox_id).returncode == 0
        assert received(iopub, client, message["header"]["msg_id"], "status")
        assert product.command("suspend", sandbox_id).returncode == 0
        keeper = next(row["owner_pid"] for row in product.ps() if row["id"] == sandbox_id)
        if keeper is not None:
            os.kill(keeper, signal.SIGKILL)
        done = product.command("resume", sandbox_id)
        assert done.returncode == 0, done.stderr
        again = client.connect_shell(identity=identity)
        assert received(again, client, message["header"]["msg_id"], "execute_reply"), "the reply was lost"
    finally:
        for socket in (iopub, shell, again):
            if socket is not None:
                socket.close(linger=0)
        owner.kill()
        owner.wait()
        owner.stdin.close()
        owner.stdout.close()
        product.command("rm", sandbox_id)
