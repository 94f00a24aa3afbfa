"""An owner that is killed in the middle of a fork leaves its kernel frozen: the next one lets it go on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from acceptance import KERNEL, Product, _runsc
from jupyter_client import BlockingKernelClient

from sandbox_gateway.host.paths import discover

OWNER = """
import sys
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel(kernel_name=sys.argv[1])
print(manager.provisioner.kernel_id, flush=True)
sys.stdin.read()
"""


def test_a_kernel_that_was_left_frozen_goes_on_with_the_next_owner(product: Product) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, KERNEL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdin is not None and owner.stdout is not None
    sandbox_id = owner.stdout.readline().strip()
    try:
        root = discover({"SANDBOX_GATEWAY_HOME": str(product.home)}).runsc_root
        owner.kill()
        owner.wait()
        subprocess.run([str(_runsc()), f"--root={root}", "pause", sandbox_id], check=True, capture_output=True)
        done = product.command("connect", sandbox_id)
        assert done.returncode == 0, done.stderr
        client = BlockingKernelClient(connection_file=done.stdout.strip())
        client.load_connection_file(str(Path(done.stdout.strip())))
        client.start_channels()
        try:
            client.wait_for_ready(timeout=60)
            assert client.execute_interactive("1 + 1", timeout=60)["content"]["status"] == "ok"
        finally:
            client.stop_channels()
    finally:
        owner.kill()
        owner.wait()
        owner.stdin.close()
        owner.stdout.close()
        product.command("rm", sandbox_id)
