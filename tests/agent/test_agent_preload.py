"""Modules imported before the kernel is ready, for a template: there, and nothing else is different."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agent_host import AgentError, Host, ipykernel_fields

STATE = (
    "import sys, os, threading, json, warnings\n"
    "modules = ['__main__', '__mp_main__']\n"
    "print(json.dumps({\n"
    "    'names': sorted(n for n in globals() if not n.startswith('_') and n not in ('STATE', 'modules')),\n"
    "    'main': sorted(vars(sys.modules['__main__'])) == sorted(globals()),\n"
    "    'argv': sys.argv, 'cwd': os.getcwd(), 'path': sys.path, 'in': len(In), 'out': len(Out),\n"
    "    'last': [repr(_), repr(__), _i], 'environ': sorted(os.environ),\n"
    "    'session': get_ipython().history_manager.session_number,\n"
    "    'history': len(list(get_ipython().history_manager.get_range())),\n"
    "    'streams': [type(sys.stdout).__name__, type(sys.stderr).__name__, sys.displayhook.__class__.__name__],\n"
    "}))"
)


def boot(host: Host, home: Path, **changes: Any) -> dict[str, Any]:
    """Start our application in ``home``; returns the event that says it is ready."""
    answer = host.call("start_kernel", **ipykernel_fields(home, fast_iopub=True, **changes))
    return host.event("kernel_ready", generation=answer["generation"])


def module(home: Path, name: str, text: str) -> None:
    (home / f"{name}.py").write_text(text)


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """An environment in which modules of the test are found."""
    return {**ipykernel_fields(tmp_path)["env"], "PYTHONPATH": str(tmp_path)}


def test_a_module_is_there_and_nothing_else_has_changed(host: Host, tmp_path: Path, env: dict[str, str]) -> None:
    """The state of the kernel with and without it is the same, whatever the module does while it is imported."""
    module(
        tmp_path,
        "restless",
        "import os, sys, warnings\nsys.argv.append('x'); os.chdir('/')\n"
        "print('noise'); print('noise', file=sys.stderr)\nwarnings.warn('noise')\nvalue = 7\n",
    )
    boot(host, tmp_path, env=env)
    without = json.loads(host.run(STATE))
    host.call("stop_kernel", grace=1)
    seen = len(host.messages)
    ready = boot(host, tmp_path, env=env, preload=["restless", "json.tool"])
    assert (ready["preloaded"], ready["preload_failed"], ready["identity"]) == (["restless", "json.tool"], {}, True)
    reply = host.reply(host.execute("pass"))
    assert reply["content"]["execution_count"] == 1
    said = b"".join(part for _, parts in host.messages[seen:] for part in parts)
    assert b"noise" not in said
    host.call("restart_kernel")  # the same again, with a fresh count
    host.event("kernel_ready", generation=3)
    with_it = json.loads(host.run(STATE))
    assert {**with_it, "session": 0} == {**without, "session": 0}
    assert host.run("import restless; print(restless.value)") == "7\n"


def test_what_fails_is_said_and_hurts_nothing(host: Host, tmp_path: Path, env: dict[str, str]) -> None:
    """Missing, broken, and modules that end the program; the next ones are imported all the same."""
    module(tmp_path, "broken", "1 / 0")
    module(tmp_path, "ending", "raise SystemExit(3)")
    ready = boot(host, tmp_path, env=env, preload=["broken", "missing_module", "ending", "csv"])
    assert ready["preloaded"] == ["csv"]
    assert "ZeroDivisionError" in ready["preload_failed"]["broken"]
    assert "missing_module" in ready["preload_failed"]["missing_module"]
    assert "SystemExit" in ready["preload_failed"]["ending"]
    assert host.run("import sys; print('csv' in sys.modules, 'broken' in sys.modules)") == "True False\n"


def test_it_is_ready_only_when_everything_is_imported(host: Host, tmp_path: Path, env: dict[str, str]) -> None:
    """Requests wait meanwhile."""
    module(tmp_path, "slow", "import time\ntime.sleep(0.5)\nbegun = True\n")
    host.call("start_kernel", **ipykernel_fields(tmp_path, fast_iopub=True, env=env, preload=["slow"]))
    asked = host.execute("import sys; print(hasattr(sys.modules.get('slow'), 'begun'))", wait=False)
    host.done(asked)
    assert host.text(asked) == "True\n"
    assert host.event("kernel_ready")["preloaded"] == ["slow"]


def test_output_of_a_modules_thread_comes_later(host: Host, tmp_path: Path, env: dict[str, str]) -> None:
    """A preload may start threads and keep the streams it finds: they are the real ones."""
    module(
        tmp_path,
        "threaded",
        "import sys, threading\nkept = sys.stdout\ngate = threading.Event()\n"
        "def run():\n    gate.wait(); print('from the thread', file=kept, flush=True)\n"
        "thread = threading.Thread(target=run, daemon=True); thread.start()\n",
    )
    boot(host, tmp_path, env=env, preload=["threaded"])
    assert "from the thread" in host.run("import threaded; threaded.gate.set(); threaded.thread.join()")


def test_matplotlib_draws_as_after_an_import_in_a_cell(host: Host, tmp_path: Path) -> None:
    """The inline backend of ipykernel, and a figure as output of its cell."""
    pytest.importorskip("matplotlib")
    boot(host, tmp_path, preload=["matplotlib.pyplot"])
    msg_id = host.execute("import matplotlib.pyplot as plt; plt.plot([1, 2]);")
    assert host.reply(msg_id)["content"]["status"] == "ok"
    shown = [message["content"]["data"] for message in host.parsed("iopub", msg_id) if "data" in message["content"]]
    assert any("image/png" in data for data in shown)
    assert host.run("print(plt.get_backend())") in ("inline\n", "module://matplotlib_inline.backend_inline\n")
    backend = host.run("import os; print(os.environ['MPLBACKEND'])")
    assert backend == "module://matplotlib_inline.backend_inline\n"


def test_a_backend_of_the_environment_is_respected(host: Host, tmp_path: Path) -> None:
    """MPLBACKEND goes before ipykernel's default."""
    pytest.importorskip("matplotlib")
    env = {**ipykernel_fields(tmp_path)["env"], "MPLBACKEND": "agg"}
    boot(host, tmp_path, env=env, preload=["matplotlib.pyplot"])
    assert host.run("import matplotlib.pyplot as plt; plt.figure(); print(plt.get_backend())") == "agg\n"


def test_environment_that_a_module_sets_survives_the_identity(host: Host, tmp_path: Path, env: dict[str, str]) -> None:
    """As it would after an import in a cell; the template's own values do not."""
    from test_agent_identity import identity

    module(tmp_path, "setting", "import os\nos.environ['SET_BY_MODULE'] = 'yes'\n")
    boot(host, tmp_path, env={**env, "OF_THE_TEMPLATE": "x"}, preload=["setting"])
    host.call("identify", **identity(tmp_path))
    names = "import os; print([os.environ.get(name) for name in ('SET_BY_MODULE', 'OF_THE_TEMPLATE', 'GIVEN')])"
    assert host.run(names) == "['yes', None, 'new']\n"


def test_a_kernel_that_is_not_ours_imports_nothing(start: Callable[..., Any], host: Host, tmp_path: Path) -> None:
    """It says so, and is ready all the same."""
    host.call("start_kernel", **ipykernel_fields(tmp_path, preload=["csv"]))
    ready = host.event("kernel_ready")
    assert (ready["identity"], ready["preloaded"], list(ready["preload_failed"])) == (False, [], ["csv"])


@pytest.mark.parametrize("preload", ["csv", [1], ["a b"], ["../x"], ["os;x"], ["x"] * 300])
def test_names_that_are_no_modules_are_refused(host: Host, tmp_path: Path, preload: Any) -> None:
    """Before anything is started."""
    with pytest.raises(AgentError) as caught:
        host.call("start_kernel", **ipykernel_fields(tmp_path, preload=preload))
    assert caught.value.code == "invalid_request"


def test_nothing_of_it_is_left_in_the_environment(host: Host, tmp_path: Path) -> None:
    """Programs that the kernel runs do not see what our application was told."""
    boot(host, tmp_path, preload=["csv"])
    shown = host.run("import subprocess; print(subprocess.run(['env'], capture_output=True, text=True).stdout)")
    assert "SANDBOX_" not in shown
    assert os.environ["PATH"] in shown
