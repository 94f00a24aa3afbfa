"""smolagents' Docker executor, whose container is a gateway that runs already; prints what came of it as JSON."""

import json
import os
from unittest import mock

from smolagents import FinalAnswerTool, Tool
from smolagents.monitoring import AgentLogger, LogLevel
from smolagents.remote_executors import DockerExecutor


class Doubler(Tool):
    name = "doubler"
    description = "Doubles a number."
    inputs = {"number": {"type": "integer", "description": "the number"}}  # noqa: RUF012 - as the library asks
    output_type = "integer"

    def forward(self, number: int) -> int:
        return 2 * number


def executor() -> DockerExecutor:
    """All is smolagents' own but Docker, and the token that it would hand to its container."""
    container = mock.Mock(status="running", short_id="gateway")
    docker = mock.Mock()
    docker.containers.run.return_value = container
    with (
        mock.patch("docker.from_env", return_value=docker),
        mock.patch("smolagents.remote_executors.secrets.token_urlsafe", return_value=os.environ["TOKEN"]),
    ):
        return DockerExecutor([], AgentLogger(LogLevel.ERROR), port=int(os.environ["PORT"]), build_new_image=False)


def main() -> None:
    python = executor()
    found = {}
    python.send_variables({"base": 20, "words": ["a", "b"]})
    python.send_tools({"doubler": Doubler(), "final_answer": FinalAnswerTool()})
    done = python("x = base + 1\nprint('logged', words)\nx")
    found["cell"] = [done.output, done.logs, done.is_final_answer]
    done = python("print(doubler(x))")
    found["tool"] = done.logs
    done = python("final_answer({'answer': doubler(x)})")
    found["final"] = [done.output, done.is_final_answer]
    try:
        python("1 / 0")
    except Exception as error:
        found["error"] = [type(error).__name__, str(error)]
    found["kernel"] = python.kernel_id
    python.cleanup()
    print(json.dumps(found))


main()
