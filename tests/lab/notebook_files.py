"""What notebooks on disk remember of their sandboxes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

from browser import Lab


def remembered(lab: Lab, name: str) -> Any:
    """What the notebook's file remembers of its sandbox; None while JupyterLab is writing it."""
    with contextlib.suppress(ValueError):
        return json.loads((lab.folder / name).read_text())["metadata"].get("sandbox")
    return None


async def until_saved(lab: Lab, name: str) -> Any:
    """As :func:`remembered`, once there is something."""
    async with asyncio.timeout(30):
        while not (found := remembered(lab, name)):
            await asyncio.sleep(0.1)
    return found


def remember(lab: Lab, name: str, **metadata: Any) -> None:
    """Write what a notebook remembers, as somebody who sends one might."""
    notebook = json.loads((lab.folder / name).read_text())
    notebook["metadata"]["sandbox"] = metadata
    (lab.folder / name).write_text(json.dumps(notebook))
