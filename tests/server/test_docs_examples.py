"""The programs of the manual do what its pages say."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from served import Served

pytestmark = pytest.mark.timeout(300)
DOCS = Path(__file__).resolve().parents[2] / "docs"
PROGRAM = DOCS / "examples" / "llm_backend.py"
UNIT = DOCS / "examples" / "sandbox-gateway.service"
PAGE = DOCS / "how-to" / "llm-backend.md"


def shown() -> str:
    """The output that the page shows below the program."""
    found = re.search(r"^It prints:\n+```text\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


async def run(url: str, token: str) -> tuple[int | None, str, str]:
    """The program's exit status and what it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        PROGRAM,
        url,
        env={**os.environ, "SANDBOX_GATEWAY_TOKEN": token},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 240)
    return process.returncode, out.decode(), err.decode()


async def test_the_llm_backend_prints_what_its_page_shows_and_leaves_nothing(gateway: Served) -> None:
    everything = "/api/sandboxes?state=all&limit=1000"
    before = (await gateway.ok("GET", everything))["sandboxes"]  # what other tests have ended
    status, out, err = await run(gateway.url, gateway.token)
    assert status == 0, err
    assert out == shown()
    assert (await gateway.ok("GET", everything))["sandboxes"] == before


async def test_the_llm_backend_tells_what_a_gateway_refuses(gateway: Served) -> None:
    status, _, err = await run(gateway.url, "wrong")
    assert status == 1
    assert "GatewayError: " in err
    assert "Authorization: Bearer" in err


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_the_unit_for_systemd_is_valid_and_leaves_the_kernels_alone(tmp_path: Path) -> None:
    text = UNIT.read_text()
    assert "KillMode=process\n" in text
    unit = tmp_path / UNIT.name
    unit.write_text(re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", text, flags=re.MULTILINE))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    # Older ones do not know one line, and say so.
    assert [line for line in done.stderr.splitlines() if unit.name in line and "DelegateSubgroup" not in line] == []
