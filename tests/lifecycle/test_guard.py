"""A kernelspec of ours that somebody starts without its provisioner."""

from __future__ import annotations

import json
import subprocess

from acceptance import KERNEL, Product

from sandbox_gateway import guard


def test_a_client_that_ignores_the_provisioner_gets_an_explanation_and_no_kernel(product: Product) -> None:
    spec = json.loads((product.prefix / "share/jupyter/kernels" / KERNEL / "kernel.json").read_text())
    done = subprocess.run(spec["argv"], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: this kernel runs in a sandbox only") and "hint:" in done.stderr


def test_unwrapping_gives_the_command_back() -> None:
    argv = ("/usr/bin/python3", "-m", "ipykernel_launcher", "-f", "{connection_file}")
    assert guard.unwrap(guard.wrap(argv)) == argv
    assert guard.unwrap(argv) == argv
