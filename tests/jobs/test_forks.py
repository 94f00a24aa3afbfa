"""Applications that fork (multiprocessing, process pools) own kernels in the parent and in the children."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

import pytest
from acceptance import KERNEL, PLAIN, Product, kernel

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


def _child(pipe: Connection) -> None:
    with kernel(KERNEL) as client:
        pipe.send((client.id, client.run("print(6 * 7)").stdout))
        pipe.recv()  # the parent looks meanwhile
    pipe.close()


@pytest.mark.skipif(KERNEL == PLAIN, reason="a property of the provisioner")
def test_a_forked_child_owns_kernels_of_its_own(product: Product) -> None:
    """It neither waits for locks of its parent's loop, nor answers with its parent's socket, nor ends its kernels."""
    fork = multiprocessing.get_context("fork")
    with kernel(KERNEL) as mine:
        assert mine.run("kept = 1").status == "ok"
        for _ in range(2):
            here, there = fork.Pipe()
            child = fork.Process(target=_child, args=(there,), daemon=True)
            child.start()
            try:
                assert here.poll(90), "the child's kernel did not start"
                name, text = here.recv()
                assert text == "42\n"
                assert product.command("logs", name).returncode == 0, "the child answers on a socket of its own"
                here.send("end")
                child.join(60)
                assert child.exitcode == 0
            finally:
                if child.is_alive():
                    child.kill()
                    child.join()
            assert mine.run("print(kept)").stdout == "1\n"
            assert name not in {entry["id"] for entry in product.ps() if entry["state"] == "running"}
