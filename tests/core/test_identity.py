"""What a restored kernel is given: never twice the same, and nothing that could not take effect."""

from __future__ import annotations

import base64
import logging
import time

import pytest

from sandbox_gateway import identity
from sandbox_gateway.model import Image, KernelSpec, Launch, Limits, SandboxSpec

ENVIRONMENT = {"PATH": "/bin", "SANDBOX_ID": "one", "TOKEN": "a-secret-value"}


@pytest.fixture
def launch() -> Launch:
    spec = SandboxSpec(id="a" * 8, profile="python", runtime="fake", image=Image("host", ()), limits=Limits())
    kernel = KernelSpec(argv=("python",), environment=ENVIRONMENT, cwd="/home/jovyan")
    return Launch(spec, kernel, b"the-key", 1000, 1000)


def test_everything_of_the_launch_is_in_it(launch: Launch) -> None:
    """Environment, working directory and key as they are to be; the clock is now."""
    given = identity.fresh(launch)
    assert (given["env"], given["cwd"], given["key"]) == (ENVIRONMENT, "/home/jovyan", "the-key")
    assert abs(given["time"] - time.time()) < 5
    assert len(base64.b64decode(given["entropy"])) == identity.ENTROPY_BYTES
    assert given["env"] is not launch.kernel.environment


def test_no_two_are_alike(launch: Launch) -> None:
    """Entropy and session of many calls for the same launch."""
    many = [identity.fresh(launch) for _ in range(500)]
    assert len({given["entropy"] for given in many}) == len({given["session"] for given in many}) == 500


def test_nothing_of_it_is_logged(launch: Launch, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the level."""
    with caplog.at_level(logging.DEBUG):
        identity.fresh(launch)
        identity.out_of_reach({"PYTHONPATH": "secret"}, {})
    assert not caplog.records


@pytest.mark.parametrize(
    "name",
    """PYTHONPATH PYTHONHASHSEED PYTHONSTARTUP LD_PRELOAD LD_LIBRARY_PATH OMP_NUM_THREADS MKL_NUM_THREADS MPLBACKEND
    OPENBLAS_NUM_THREADS HOME LANG LC_ALL IPYTHONDIR GLIBC_TUNABLES XDG_CONFIG_HOME HF_HOME""".split(),
)
def test_what_acts_at_the_start(name: str) -> None:
    """The loader's, the interpreter's, and those that a module reads when it is imported."""
    assert identity.acts_at_start(name)


@pytest.mark.parametrize(
    "name",
    "PATH TZ SANDBOX_ID TOKEN HF_TOKEN JUPYTER_TOKEN RAY_PASSWORD AWS_REGION TMPDIR JPY_SESSION_NAME USER".split(),
)
def test_what_can_be_given_later(name: str) -> None:
    """Read when they are used, or renewed by the kernel when it takes its identity."""
    assert not identity.acts_at_start(name)


def test_what_a_template_cannot_become() -> None:
    """Other, missing and additional variables that act at the start, by name; the rest does not matter."""
    template = {"PATH": "/a", "HOME": "/h", "LANG": "C", "OMP_NUM_THREADS": "2"}
    wanted = {"PATH": "/b", "HOME": "/h", "OMP_NUM_THREADS": "4", "PYTHONPATH": "/x", "TOKEN": "t"}
    assert identity.out_of_reach(template, wanted) == ("LANG", "OMP_NUM_THREADS", "PYTHONPATH")
    assert identity.out_of_reach(template, {**template, "PATH": "/b", "TOKEN": "t"}) == ()
    assert list(identity.startup_part(wanted)) == ["HOME", "OMP_NUM_THREADS", "PYTHONPATH"]
