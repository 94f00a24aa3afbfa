"""AutoGen's Jupyter code executor on a server that is there already; prints what came of it as JSON."""

import asyncio
import json
import os
from pathlib import Path

from autogen_core import CancellationToken
from autogen_core.code_executor import CodeBlock
from autogen_ext.code_executors.docker_jupyter import DockerJupyterCodeExecutor
from autogen_ext.code_executors.docker_jupyter._jupyter_server import JupyterConnectionInfo

PLOT = """
import matplotlib.pyplot as plt
plt.plot([1, 2, 3])
plt.show()
"""


async def main() -> None:
    server = JupyterConnectionInfo(
        host="127.0.0.1", use_https=False, port=int(os.environ["PORT"]), token=os.environ["TOKEN"]
    )
    found = {}
    async with DockerJupyterCodeExecutor(
        server, kernel_name=os.environ["KERNEL"], timeout=120, output_dir=Path(os.environ["FOLDER"])
    ) as executor:

        async def run(*codes: str) -> dict:
            blocks = [CodeBlock(code=code, language="python") for code in codes]
            done = await executor.execute_code_blocks(blocks, CancellationToken())
            return {
                "exit_code": done.exit_code,
                "output": done.output,
                "files": [Path(file).read_bytes()[:8].hex() for file in done.output_files],
            }

        found["state"] = await run("x = 20 + 1", "print(2 * x)")
        found["error"] = await run("1 / 0")
        found["html"] = await run("from IPython.display import HTML\nHTML('<b>bold</b>')")
        found["plot"] = await run(PLOT)
        await executor.restart()
        found["restarted"] = await run("print('x' in globals())")
    print(json.dumps(found))


asyncio.run(main())
