"""A kernel is forked: its children go on from the same state, and are nobody's copies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from acceptance import Client, Product
from jupyter_client import BlockingKernelClient
from suspending import COUNTING, Running, lines, state, tell

DRAWN = """
import os, random, secrets, socket, ssl, uuid, json
import numpy
print(json.dumps([random.random(), float(numpy.random.random()), secrets.token_hex(8), str(uuid.uuid4()),
    ssl.RAND_bytes(8).hex(), os.environ["SANDBOX_ID"]]))
"""


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
    drawn = []
    with forked(product, client.id, 3) as children:
        assert len(set(children)) == 3
        for child in children:
            row = next(row for row in product.ps() if row["id"] == child)
            assert row["state"] == "running" and row["parent"] == f"sandbox:{client.id}"
            with connected(product, child) as other:
                assert said(other, "print(x + 1, open('f').read())") == "42 same\n"
                drawn.append(json.loads(said(other, DRAWN)))
                said(other, "x = 'changed'; open('f', 'w').write('changed')")
        drawn.append(json.loads(client.run(DRAWN).stdout))
        for values in zip(*drawn, strict=True):
            assert len(set(values)) == 4, values
        assert [values[-1] for values in drawn] == [*children, client.id]
        assert client.run("print(x, open('f').read())").stdout == "41 same\n"
    assert not set(children) & product.ids()


def test_a_fork_in_the_middle_of_a_cell_goes_on_in_parent_and_child(product: Product, client: Client) -> None:
    cell = Running(client, COUNTING.format(count=100, pause=0.05))
    cell.until_line(10)
    with forked(product, client.id, 1) as children, connected(product, children[0]) as other:
        shown = ""
        while "99\n" not in shown:
            message = other.get_iopub_msg(timeout=60)
            if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
                shown += message["content"]["text"]
        numbers = [int(line) for line in shown.split()]
        assert numbers == list(range(numbers[0], 100)), "the child shows the rest of the cell, in order"
        assert cell.finish()["status"] == "ok"
        assert cell.stdout == lines(100), "the parent loses nothing"


def test_a_suspended_kernel_can_be_forked_and_stays_suspended(product: Product, client: Client) -> None:
    client.run("x = 7")
    tell(product, client.id, "suspend")
    with forked(product, client.id, 2) as children:
        assert state(product, client.id) == "suspended"
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
