"""A kernel is forked: its children go on from the same state, and are nobody's copies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty
from typing import Any

import pytest
from acceptance import Client, Product
from jupyter_client import BlockingKernelClient
from suspending import COUNTING, Running, lines, state, tell

CHILDREN = 5

KEYS = """
import ctypes, ssl
crypto = ctypes.CDLL(next(line.split()[-1] for line in open("/proc/self/maps") if "/libcrypto" in line))
crypto.EVP_PKEY_Q_keygen.restype = ctypes.c_void_p
def generated():
    "An X25519 key that the process's OpenSSL makes; its private half."
    made = ctypes.c_void_p(crypto.EVP_PKEY_Q_keygen(None, None, b"X25519"))
    raw, size = ctypes.create_string_buffer(32), ctypes.c_size_t(32)
    assert crypto.EVP_PKEY_get_raw_private_key(made, raw, ctypes.byref(size)) == 1
    return raw.raw.hex()
generated()
"""
"""Run before the fork, so that the generator of keys has been used and its state is cloned."""

DRAWN = """
import os, random, secrets, socket, ssl, subprocess, tempfile, uuid, json
import numpy
print(json.dumps([random.random(), random.getrandbits(64), float(numpy.random.random()), secrets.token_hex(8),
    str(uuid.uuid4()), str(uuid.uuid1()), ssl.RAND_bytes(8).hex(), generated(),
    subprocess.run(["openssl", "rand", "-hex", "16"], capture_output=True, text=True).stdout,
    next(tempfile._get_candidate_names()), socket.gethostname(), get_ipython().kernel.session.session,
    get_ipython().kernel.ident, get_ipython().kernel.session.key.decode(), os.environ["SANDBOX_ID"]]))
"""
"""What no two kernels may have in common; the id comes last."""


@contextmanager
def forked(product: Product, parent: str, count: int) -> Iterator[list[str]]:
    """Children of a sandbox, by the command line; removed at the end."""
    done = product.command("fork", parent, "-n", str(count), "--json")
    children = json.loads(done.stdout) if done.stdout else []
    try:
        assert done.returncode == 0, done.stderr
        yield children
    finally:
        if children:
            removed = product.command("rm", *children)
            assert removed.returncode == 0, removed.stderr


@contextmanager
def connected(product: Product, sandbox_id: str) -> Iterator[BlockingKernelClient]:
    """A client by the connection file that ``connect`` prints."""
    done = product.command("connect", sandbox_id)
    assert done.returncode == 0, done.stderr
    client = BlockingKernelClient(connection_file=done.stdout.strip())
    client.load_connection_file()
    client.start_channels()
    try:
        yield client
    finally:
        client.stop_channels()


def happened(product: Product, sandbox_id: str) -> list[dict[str, Any]]:
    """The events of a sandbox."""
    found: list[dict[str, Any]] = json.loads(product.command("events", sandbox_id, "--json").stdout)
    return found


def said(client: BlockingKernelClient, code: str) -> str:
    """What a cell prints."""
    texts: list[str] = []

    def take(message: dict[str, object]) -> None:
        content = message["content"]
        assert isinstance(content, dict)
        if message["msg_type"] == "stream":
            texts.append(content["text"])
        assert message["msg_type"] != "error", content

    client.execute_interactive(code, timeout=60, output_hook=take)
    return "".join(texts)


def test_children_have_the_parents_state_and_nothing_else_of_it(product: Product, client: Client) -> None:
    client.run("import random, numpy; random.seed(1); numpy.random.seed(1); x = 41; open('f', 'w').write('same')")
    assert client.run(KEYS).status == "ok"
    drawn = []
    with forked(product, client.id, CHILDREN) as children:
        assert len(set(children)) == CHILDREN
        for child in children:
            row = next(row for row in product.ps() if row["id"] == child)
            assert row["state"] == "running" and row["parent"] == f"sandbox:{client.id}"
            with connected(product, child) as other:
                assert said(other, "print(x + 1, open('f').read())") == "42 same\n"
                drawn.append(json.loads(said(other, DRAWN)))
                said(other, "x = 'changed'; open('f', 'w').write('changed')")
        drawn.append(json.loads(client.run(DRAWN).stdout))
        for values in zip(*drawn, strict=True):
            assert len(set(values)) == CHILDREN + 1, values
        assert [values[-1] for values in drawn] == [*children, client.id]
        assert client.run("print(x, open('f').read())").stdout == "41 same\n"
        told = [event for event in happened(product, client.id) if event["kind"] == "forked"]
        assert [event["data"]["children"] for event in told] == [children]
    assert not set(children) & product.ids()


def test_torch_draws_other_numbers_in_each_child(product: Product, client: Client) -> None:
    pytest.importorskip("torch", reason="torch is not installed; tests/agent seeds a stand-in for it")
    client.run("import torch; torch.manual_seed(1)")
    drawn = []
    with forked(product, client.id, CHILDREN) as children:
        for child in children:
            with connected(product, child) as other:
                drawn.append(said(other, "import torch; print(torch.rand(4).tolist())"))
    assert len(set(drawn)) == CHILDREN


def test_a_question_stays_with_the_parent(product: Product, client: Client) -> None:
    """A child that waits for an answer waits for nobody's; an interrupt gets it out of there."""
    client.client.allow_stdin = True
    asked = client.client.execute("print('hello ' + input('who? '))", allow_stdin=True, stop_on_error=False)
    assert client.client.get_stdin_msg(timeout=30)["content"]["prompt"] == "who? "
    with forked(product, client.id, 1) as children, connected(product, children[0]) as other:
        client.client.input("parent")
        reply = client.client.get_shell_msg(timeout=60)
        assert (reply["parent_header"]["msg_id"], reply["content"]["status"]) == (asked, "ok")
        other.control_channel.send(other.session.msg("interrupt_request", {}))
        errors: list[str] = []
        while not errors:
            message = other.get_iopub_msg(timeout=60)
            if message["msg_type"] == "error":
                errors.append(message["content"]["ename"])
        assert errors == ["KeyboardInterrupt"]
        assert said(other, "print('free')") == "free\n"
        with pytest.raises(Empty):
            other.get_stdin_msg(timeout=0.5)


def test_a_fork_in_the_middle_of_a_cell_goes_on_in_parent_and_child(product: Product, client: Client) -> None:
    cell = Running(client, COUNTING.format(count=300, pause=0.05))
    cell.until_line(10)
    with forked(product, client.id, 1) as children, connected(product, children[0]) as other:
        shown = ""
        while "299\n" not in shown:
            message = other.get_iopub_msg(timeout=60)
            if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
                shown += message["content"]["text"]
        numbers = [int(line) for line in shown.split()]
        assert numbers == list(range(numbers[0], 300)), "the child shows the rest of the cell, in order"
        assert cell.finish()["status"] == "ok"
        assert cell.stdout == lines(300), "the parent loses nothing"


def test_a_suspended_kernel_can_be_forked_and_stays_suspended(product: Product, client: Client) -> None:
    client.run("x = 7")
    tell(product, client.id, "suspend")
    with forked(product, client.id, 2) as children:
        assert state(product, client.id) == "suspended"
        assert happened(product, client.id)[-1]["data"] == {"children": children}
        for child in children:
            with connected(product, child) as other:
                assert said(other, "print(x)") == "7\n"
    assert client.run("print(x)").stdout == "7\n"


@pytest.mark.parametrize("count", ["0", "-1", "100000"])
def test_a_number_of_children_that_makes_no_sense_is_refused(product: Product, client: Client, count: str) -> None:
    before = product.ids()
    done = product.command("fork", client.id, "-n", count, "--json")
    assert done.returncode != 0
    assert product.ids() == before
