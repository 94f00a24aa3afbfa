"""JupyterLabs with the built front end, as the tests need them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from browser import Lab

ROOT = Path(__file__).resolve().parents[2]
NAME = "@sandbox-gateway/labextension"
KERNEL = "python3-gvisor"
TIGHT = "own-tight"
"""The kernel of a profile with 512 MiB."""


def installed_front_end(base: Path) -> Path:
    """A folder for ``JUPYTER_PATH`` in which JupyterLab finds this checkout's bundle as a wheel's."""
    place = base / "share" / "labextensions" / NAME
    place.parent.mkdir(parents=True)
    place.symlink_to(ROOT / "sandbox_gateway" / "_labextension")
    return base / "share"


def enabled(base: Path) -> Path:
    """A folder for ``JUPYTER_CONFIG_PATH`` that enables our server extension, as a wheel does."""
    place = base / "etc" / "jupyter_server_config.d"
    place.mkdir(parents=True)
    shutil.copy(ROOT / "jupyter-config" / "sandbox_gateway.json", place)
    return base / "etc"


def make_lab(
    base: Path,
    *options: str,
    server_extension: bool = True,
    environment: Mapping[str, str] = {},
    application: str = "jupyterlab",
) -> Lab:
    """A JupyterLab, or another ``application``, as `pip install sandbox_gateway` makes it; or without the server half.

    Its page has ``jupyterapp``, by which tests change the theme without closing what is open.
    """
    search = os.pathsep.join(filter(None, [str(installed_front_end(base)), os.environ.get("JUPYTER_PATH", "")]))
    environment = {"JUPYTER_PATH": search, **environment}
    if server_extension:
        environment["JUPYTER_CONFIG_PATH"] = str(enabled(base))
    else:
        options = (*options, "--ServerApp.jpserver_extensions={'sandbox_gateway': False}")
    return Lab(
        base,
        "--LabApp.expose_app_in_browser=True",
        "--JupyterNotebookApp.expose_app_in_browser=True",
        *options,
        environment=environment,
        program=(sys.executable, "-m", application),
    )
