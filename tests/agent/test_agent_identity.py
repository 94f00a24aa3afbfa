"""A kernel is given another identity: everything that a clone would share with its siblings, before clients speak."""

from __future__ import annotations

import base64
import ctypes
import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agent_host import KEY, AgentError, Host
from jupyter_client.session import Session
from test_agent_activity import stop

from sandbox_gateway.agent import kernel_seeds
from sandbox_gateway.agent.identify import Identification
from sandbox_gateway.agent.launch import KernelError
from sandbox_gateway.agent.loop import Loop
from sandbox_gateway.wire.frames import Channel

NEW_KEY = "another-secret"


def identity(home: Path, **changes: Any) -> dict[str, Any]:
    """The parameters of ``identify``."""
    fields = {
        "env": {"PATH": os.environ["PATH"], "HOME": str(home), "IPYTHONDIR": str(home / "ipython"), "GIVEN": "new"},
        "cwd": str(home),
        "session": os.urandom(16).hex(),
        "entropy": base64.b64encode(os.urandom(256)).decode(),
        "time": time.time(),
    }
    return {**fields, **changes}


@pytest.fixture
def ours(start: Callable[..., dict[str, Any]], host: Host, tmp_path: Path) -> Host:
    """An agent with our ipykernel application, started with an environment that must go."""
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "IPYTHONDIR": str(tmp_path / "ipython")}
    start(fast_iopub=True, env={**env, "OLD": "old-value", "GIVEN": "old-value"})
    return host


def values(host: Host, code: str) -> Any:
    """What an expression is in the kernel, as JSON."""
    return json.loads(host.run(f"import json; print(json.dumps({code}))"))


def use_new_key(host: Host) -> None:
    """From now on; what came before cannot be checked any more."""
    host.messages.clear()
    host.session = Session(key=NEW_KEY.encode())


def test_the_environment_is_another_for_the_kernel_and_what_it_starts(ours: Host, tmp_path: Path) -> None:
    """Also for C code and after a reload; ipykernel's own additions stay, as after a start."""
    before = values(ours, "dict(__import__('os').environ)")
    ours.call("identify", **identity(tmp_path))
    after = values(ours, "dict(__import__('os').environ)")
    assert after["GIVEN"] == "new"
    assert "OLD" not in after
    assert {name: after.get(name) for name in ("PAGER", "TERM", "MPLBACKEND")} == {
        name: before[name] for name in ("PAGER", "TERM", "MPLBACKEND")
    }
    everything = ours.run(
        "import subprocess, ctypes, posix\n"
        "print(subprocess.run(['env'], capture_output=True, text=True).stdout)\n"
        "print(dict(__import__('os').environ), posix.environ)\n"
        "libc = ctypes.CDLL(None); libc.getenv.restype = ctypes.c_char_p\n"
        "print(libc.getenv(b'OLD'), libc.getenv(b'GIVEN'))\n"
    )
    assert "old-value" not in everything
    assert "None b'new'" in everything


def test_what_the_program_itself_has_set_stays(ours: Host, tmp_path: Path) -> None:
    """A fork goes on with what its cells have put in os.environ, unless the new environment changes that name."""
    ours.run("import os; os.environ['MINE'] = 'kept'; os.environ['GIVEN'] = 'mine'; del os.environ['OLD']")
    env = {**identity(tmp_path)["env"], "OLD": "old-value", "GIVEN": "old-value"}
    ours.call("identify", **identity(tmp_path, env=env))
    names = "[__import__('os').environ.get(name) for name in ('MINE', 'GIVEN', 'OLD')]"
    assert values(ours, names) == ["kept", "mine", None]
    ours.call("identify", **identity(tmp_path, env={**env, "GIVEN": "newer"}))
    assert values(ours, names) == ["kept", "newer", None]


def test_an_environment_replaced_by_the_program_is_cleaned_as_well(ours: Host, tmp_path: Path) -> None:
    """os.environ put aside by a cell: neither it nor the real one keeps an old value."""
    ours.run("import os; real = os.environ; os.environ = dict(os.environ)")
    ours.call("identify", **identity(tmp_path))
    assert values(ours, "[dict(real).get('OLD'), os.environ.get('OLD'), os.environ['GIVEN']]") == [None, None, "new"]


def test_the_working_directory_and_what_remembers_it(ours: Host, tmp_path: Path) -> None:
    """chdir, and IPython's list of visited directories; a program that went elsewhere stays there."""
    place = tmp_path / "place"
    place.mkdir()
    ours.call("identify", **identity(tmp_path, cwd=str(place)))
    assert values(ours, "[__import__('os').getcwd(), list(map(str, _dh))]") == [str(place), [str(place)]]
    ours.run("import os; os.chdir('/')")
    assert ours.call("identify", **identity(tmp_path))["missing"] == []
    assert values(ours, "os.getcwd()") == "/"


def test_a_directory_that_cannot_be_entered_is_said_to_be_missing(ours: Host, tmp_path: Path) -> None:
    """As at a start of the kernel it is then in /."""
    assert "cwd" in ours.call("identify", **identity(tmp_path, cwd=str(tmp_path / "nowhere")))["missing"]
    assert values(ours, "__import__('os').getcwd()") == "/"


def test_a_new_time_zone_is_in_force(ours: Host, tmp_path: Path) -> None:
    """TZ acts at once."""
    env = {**identity(tmp_path)["env"], "TZ": "XYZ-5"}
    ours.call("identify", **identity(tmp_path, env=env))
    assert values(ours, "[__import__('time').tzname[0], __import__('time').localtime(0).tm_hour]") == ["XYZ", 5]


def test_signatures_session_and_identity_are_new(ours: Host, tmp_path: Path) -> None:
    """Messages are signed with the new key, and the old one opens nothing; ids of messages and topics begin anew."""
    before = ours.execute("1")
    earlier = list(ours.messages)
    ours.call("identify", **identity(tmp_path, key=NEW_KEY, session="feed" * 8))
    use_new_key(ours)
    after = ours.execute("print('hello'); 2")
    messages = [*ours.parsed("iopub", after), ours.reply(after)]
    assert {message["header"]["session"] for message in messages} == {"feed" * 8}
    raw = [parts for name, parts in earlier if name == "iopub" and any(before.encode() in p for p in parts)]
    topics = {message["idents"][0] for message in messages if message["msg_type"] in ("status", "execute_result")}
    kernels = {topic.decode().rsplit(".", 1)[0] for topic in topics}
    assert len(kernels) == 1
    assert raw
    assert not any(topic.decode().rsplit(".", 1)[0] in kernels for topic, *_ in raw)
    old = Session(key=KEY.encode())
    forged = old.msg("execute_request", {"code": "print('forged')", "silent": False})
    ours.endpoint.send(Channel.SHELL, [b"client", *old.serialize(forged)])
    assert ours.run("print('good')") == "good\n"
    assert not ours.parsed("shell", forged["header"]["msg_id"])


def test_nothing_of_the_request_reaches_a_client(ours: Host, tmp_path: Path) -> None:
    """No status, no reply, no execution count, no history."""
    ours.run("x = 1")
    seen = len(ours.messages)
    ours.call("identify", **identity(tmp_path))
    ours.pump(0.2)
    assert len(ours.messages) == seen
    reply = ours.reply(ours.execute("len(In)"))
    assert reply["content"]["execution_count"] == 2


def test_generators_in_the_same_state_go_different_ways(ours: Host, tmp_path: Path) -> None:
    """random, numpy, libc, tempfile: put into the same state before each identity, as in two clones."""
    pytest.importorskip("numpy")
    ours.run(
        "import random, numpy, ctypes, tempfile, uuid, ssl, multiprocessing\nlibc = ctypes.CDLL(None)\n"
        "def equal():\n"
        "    random.seed(1); numpy.random.seed(1); libc.srandom(1); libc.srand48(1)\n"
        "    tempfile._name_sequence = names = tempfile._RandomNameSequence(); next(names); names._rng.seed(1)\n"
        "    multiprocessing.current_process().authkey = b'same'\n"
        "def draw():\n"
        "    return [random.random(), numpy.random.random(), libc.random(), libc.lrand48(),\n"
        "            next(tempfile._get_candidate_names()), bytes(multiprocessing.current_process().authkey).hex()]\n"
        "equal(); once = draw(); equal(); assert draw() == once\n"
    )
    drawn = []
    for _ in range(2):
        ours.run("equal()")
        answer = ours.call("identify", **identity(tmp_path))
        assert {"random", "numpy", "libc", "openssl", "tempfile", "uuid", "multiprocessing"} <= set(answer["seeded"])
        assert answer["missing"] == []
        drawn.append(values(ours, "draw()"))
    once = values(ours, "once")
    for column in zip(once, *drawn, strict=True):
        assert len(set(column)) == 3, column


def test_fresh_entropy_reaches_openssl(ours: Host, tmp_path: Path) -> None:
    """RAND_add of the very library that the ssl module uses was called: its generator has been reseeded."""
    counted = (
        "import ssl, ctypes, _ssl\n"
        "lib = ctypes.CDLL(_ssl.__file__)\n"
        "primary = lib.RAND_get0_primary; primary.restype, primary.argtypes = ctypes.c_void_p, [ctypes.c_void_p]\n"
        "lib.EVP_RAND_CTX_get_params.argtypes = (ctypes.c_void_p, ctypes.c_void_p)\n"
        "class Param(ctypes.Structure):\n"
        "    _fields_ = [('key', ctypes.c_char_p), ('type', ctypes.c_uint), ('data', ctypes.c_void_p),\n"
        "                ('size', ctypes.c_size_t), ('back', ctypes.c_size_t)]\n"
        "def reseeds():\n"
        "    ssl.RAND_bytes(1)\n"
        "    count = ctypes.c_uint()\n"
        "    p = (Param * 2)(Param(b'reseed_counter', 2, ctypes.addressof(count), 4, 0), Param())\n"
        "    assert lib.EVP_RAND_CTX_get_params(primary(None), p) == 1\n"
        "    return count.value\n"
    )
    ours.run(counted)
    for _ in range(2):  # the second time its functions are known
        before = values(ours, "reseeds()")
        assert "openssl" in ours.call("identify", **identity(tmp_path))["seeded"]
        assert values(ours, "reseeds()") > before


def test_what_is_mapped_is_looked_at_again_where_a_library_was_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With hundreds of libraries that takes milliseconds, which every clone of a template would wait for."""
    looked: list[str] = []
    monkeypatch.setattr(kernel_seeds, "_known", None)
    monkeypatch.setattr(kernel_seeds, "mapped_libraries", lambda: looked.append("") or [])
    counted = kernel_seeds._loads()
    assert counted is not None
    for _ in range(3):
        kernel_seeds._rand_adds()
    assert len(looked) == 1
    files = (getattr(module, "__file__", None) for module in tuple(sys.modules.values()))
    library = next((name for name in files if name and ".so" in name), None)
    if library is None:
        pytest.skip("this Python has no extension module in a file of its own")
    ctypes.CDLL(str(shutil.copy(library, tmp_path / "copy.so")))
    kernel_seeds._rand_adds()
    assert (len(looked), kernel_seeds._loads()) == (2, (counted[0] + 1, counted[1]))


def test_a_library_that_is_busy_is_seeded_as_soon_as_it_can_be(ours: Host, tmp_path: Path) -> None:
    """A long call holds numpy's generator: the identity does not wait for its end, and says what is missing."""
    pytest.importorskip("numpy")
    ours.run("import numpy, threading; numpy.random.seed(1); lock = numpy.random.mtrand._rand._bit_generator.lock")
    ours.run(
        "held, gate = threading.Event(), threading.Event()\n"
        "def hold():\n    with lock:\n        held.set(); gate.wait(60)\n"
        "threading.Thread(target=hold, daemon=True).start(); held.wait()"
    )
    answer = ours.call("identify", **identity(tmp_path))
    assert answer["missing"] == ["numpy"]
    assert "random" in answer["seeded"]
    ours.run(
        "gate.set()\nwaiting = [t for t in threading.enumerate() if t.name == 'sandbox-seed-numpy']\n"
        "for thread in waiting: thread.join(30)"
    )
    drawn = values(ours, "numpy.random.random()")
    assert drawn != values(ours, "[numpy.random.seed(1), numpy.random.random()][1]")


def test_torch_and_what_cannot_be_reached(ours: Host, tmp_path: Path) -> None:
    """torch by its own function, whatever that does; modules with generators out of reach are named."""
    ours.run(
        "import sys, types\nseeds = []\n"
        "sys.modules['torch'] = types.SimpleNamespace(manual_seed=seeds.append)\n"
        "sys.modules['tensorflow'] = types.ModuleType('tensorflow')"
    )
    answer = ours.call("identify", **identity(tmp_path))
    assert "torch" in answer["seeded"]
    assert answer["missing"] == ["tensorflow"]
    ours.call("identify", **identity(tmp_path))
    first, second = values(ours, "seeds")
    assert first != second
    ours.run("sys.modules['torch'] = types.SimpleNamespace(manual_seed=None)")
    assert "torch" in ours.call("identify", **identity(tmp_path))["missing"]


def test_processes_that_the_kernel_has_started_are_named(ours: Host, tmp_path: Path) -> None:
    """Nobody can change a copy of theirs: whoever asked for the clone is told."""
    ours.run("import subprocess; child = subprocess.Popen(['sleep', '60'])")
    assert ours.call("identify", **identity(tmp_path))["missing"] == ["processes"]


@pytest.mark.parametrize("work", ["time.sleep(30)", "while True: pass", "gate.wait(30)"])
def test_in_the_middle_of_a_cell(ours: Host, tmp_path: Path, work: str) -> None:
    """Whatever it does; it goes on, publishes under the new key, and can be interrupted."""
    code = f"import time, threading; gate = threading.Event(); print('in', flush=True)\n{work}"
    msg_id = ours.execute(code, wait=False, stop_on_error=False)
    ours.until(lambda: ours.text(msg_id))
    ours.call("identify", **identity(tmp_path, key=NEW_KEY))
    use_new_key(ours)
    ours.call("interrupt")
    assert ours.reply(msg_id)["content"]["ename"] == "KeyboardInterrupt"
    assert values(ours, "__import__('os').environ['GIVEN']") == "new"


def test_requests_wait_until_the_kernel_has_become_it(ours: Host, tmp_path: Path) -> None:
    """Sent right behind the operation, with the new key; their order stays."""
    ours.run("order = []")
    number = ours.request("identify", **identity(tmp_path, key=NEW_KEY))
    use_new_key(ours)
    asked = [ours.execute(f"order.append({n}); import os; print(os.environ['GIVEN'])", wait=False) for n in range(3)]
    ours.answer(number)
    for msg_id in asked:
        ours.done(msg_id)
        assert ours.text(msg_id) == "new\n"
    assert values(ours, "order") == [0, 1, 2]


def test_a_restart_and_the_connection_file_use_the_new_key(ours: Host, tmp_path: Path) -> None:
    """What is started later in the same place is the new identity's, not the old one's."""
    ours.call("identify", **identity(tmp_path, key=NEW_KEY))
    use_new_key(ours)
    path = values(ours, "__import__('ipykernel').connect.get_connection_file()")
    assert json.loads(Path(path).read_text())["key"] == NEW_KEY
    assert Path(path).stat().st_mode & 0o777 == 0o600
    ours.call("restart_kernel")
    ours.event("kernel_ready", generation=2)
    assert values(ours, "[__import__('os').environ.get(name) for name in ('GIVEN', 'OLD')]") == ["new", None]


def test_a_connection_file_that_cannot_be_written_leaves_the_old_one(ours: Host, tmp_path: Path) -> None:
    """The clone is of no use then; whoever asked for it is told why."""
    path = Path(values(ours, "__import__('ipykernel').connect.get_connection_file()"))
    before = path.read_text()
    draft = path.with_name("connection.new")
    draft.mkdir()
    with pytest.raises(AgentError, match="connection file") as caught:
        ours.call("identify", **identity(tmp_path, key=NEW_KEY))
    assert caught.value.code == "identity_failed"
    assert path.read_text() == before
    draft.rmdir()
    use_new_key(ours)
    assert ours.call("ping_kernel", seconds=10)["control"] is True, "the kernel has become it, whatever was written"


def test_what_could_not_be_prepared_is_not_made_valid() -> None:
    """Half a file would take the place of a whole one."""

    def draft() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def accepted(undrafted: OSError | None) -> None:
        assert undrafted is not None
        raise undrafted

    answers: list[dict[str, Any] | KernelError] = []
    loop = Loop()
    try:
        identification = Identification(loop, answers.append, draft, accepted, lambda: pytest.fail())
        identification.asked()
        assert answers == [] and identification.waiting, "the kernel may still say that it cannot"
        identification.replied({"status": "ok", "seeded": [], "missing": []})
    finally:
        loop.close()
    assert [getattr(answer, "code", None) for answer in answers] == ["identity_failed"]
    assert "No space left" in str(answers[0]) and not identification.done


def test_the_key_stays_when_none_is_given(ours: Host, tmp_path: Path) -> None:
    """A suspended kernel's clients go on with theirs."""
    ours.call("identify", **identity(tmp_path))
    assert ours.run("print(1)") == "1\n"


def test_a_kernel_that_ends_meanwhile(ours: Host, tmp_path: Path) -> None:
    """The operation fails at once, and a restart works."""
    stop(ours)
    number = ours.request("identify", **identity(tmp_path))
    ours.call("signal", signum=9)
    with pytest.raises(AgentError) as caught:
        ours.answer(number)
    assert caught.value.code == "identity_failed"
    ours.call("restart_kernel")
    ours.event("kernel_ready", generation=2)
    assert ours.run("print(1)") == "1\n"


@pytest.mark.parametrize("module", ["bash_kernel", "ipykernel_launcher"])
def test_kernels_that_are_not_ours(start: Callable[..., Any], host: Host, tmp_path: Path, module: str) -> None:
    """They say so, and go on as they were."""
    pytest.importorskip(module)
    argv = [sys.executable, "-m", module, "-f", "{connection_file}"]
    start(argv=argv, fast_iopub=module == "bash_kernel")
    with pytest.raises(AgentError) as caught:
        host.call("identify", **identity(tmp_path))
    assert caught.value.code == "unsupported"
    assert "ipykernel" in str(caught.value)
    host.done(host.execute("echo 1" if module == "bash_kernel" else "1", wait=False))


def test_whether_it_can_is_said_beforehand(ours: Host) -> None:
    """In the event, and to each host that attaches later."""
    ours.attach()
    assert ours.other[-1].hello.agent["identity"] is True


def test_wrong_requests_change_nothing(ours: Host, tmp_path: Path) -> None:
    """Each is refused with what is wrong about it."""
    wrong: list[dict[str, Any]] = [
        {"env": {"A": 1}},
        {"env": {"A": "nul\0"}},
        {"cwd": 3},
        {"session": ""},
        {"session": "x" * 200},
        {"entropy": "AAAA"},
        {"entropy": "no base64 at all!"},
        {"time": "now"},
        {"key": 3},
    ]
    for changes in wrong:
        with pytest.raises(AgentError) as caught:
            ours.call("identify", **identity(tmp_path, **changes))
        assert caught.value.code == "invalid_request", changes
    assert values(ours, "__import__('os').environ['OLD']") == "old-value"
