"""jupyter-kernel-client from start to end: output, variables, input, interrupt, a second client, restart.

Its ``set_variable`` and ``get_variable`` are left out: they want jupyter-mimetypes, and so pyarrow, inside the kernel.
"""

import json
import os
import threading

from jupyter_kernel_client import JupyterKernelClient

SERVER = {"server_url": f"http://127.0.0.1:{os.environ['PORT']}", "token": os.environ["TOKEN"]}


def interrupt(kernel: JupyterKernelClient, over: threading.Event) -> None:
    """Interrupt a cell until it is over: before it has begun the kernel does not heed that."""
    while not over.wait(1.0):
        kernel.interrupt()


def main() -> None:
    found = {}
    with JupyterKernelClient(**SERVER) as kernel:
        found["language"] = kernel.kernel_info["language_info"]["name"]
        found["ran"] = kernel.execute("import sys\nprint('out')\nprint('err', file=sys.stderr)\n6 * 7", timeout=60)
        found["error"] = kernel.execute("1 / 0", timeout=60)
        kernel.execute("answer = 42", timeout=60)
        found["variables"] = [variable["name"] for variable in kernel.list_variables()]
        found["input"] = kernel.execute(
            "print('hello', input('who? '))",
            allow_stdin=True,
            timeout=60,
            stdin_hook=lambda message: kernel._manager.client.input("sandbox"),
        )
        over = threading.Event()
        waiting = threading.Thread(target=interrupt, args=(kernel, over))
        waiting.start()
        found["interrupted"] = kernel.execute("import time\ntime.sleep(60)", timeout=60)["status"]
        over.set()
        waiting.join()
        with JupyterKernelClient(kernel_id=kernel.id, **SERVER) as second:
            found["second"] = second.execute("print(answer)", timeout=60)["outputs"]
        found["alive"] = kernel.is_alive()
        found["listed"] = kernel.id in [listed["id"] for listed in kernel.list_kernels()]
        kernel.restart()
        found["restarted"] = kernel.execute("print('answer' in globals())", timeout=60)["outputs"]
        found["id"] = kernel.id
    print(json.dumps(found))


main()
