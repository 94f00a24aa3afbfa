"""Sphinx configuration. Commands, routes, profiles and errors are told by the code itself, so that they cannot lie."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from _gateway_reference import PAGES  # noqa: E402
from _reference import command_line, environment_keys, error_table, profile_keys  # noqa: E402

import sandbox_gateway  # noqa: E402

project = "sandbox_gateway"
author = "sandbox_gateway contributors"
copyright = "2026, sandbox_gateway contributors"
version = release = sandbox_gateway.__version__

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "deflist", "substitution"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "_generated"]
html_theme = "furo"
html_title = "sandbox_gateway"
nitpicky = True

generated = HERE / "_generated"
generated.mkdir(exist_ok=True)
for name, text in {
    "cli.md": command_line(),
    "profiles.md": profile_keys(),
    "errors.md": error_table(),
    "environment.md": environment_keys(),
    **{name: page() for name, page in PAGES},
}.items():
    file = generated / name
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
