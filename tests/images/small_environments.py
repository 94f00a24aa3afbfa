"""Small Python environments for the image tests."""

from __future__ import annotations

from pathlib import Path


def site_of(venv: Path) -> Path:
    """The site-packages folder of a virtual environment."""
    return next(venv.glob("lib/python3*/site-packages"))


def add_distribution(site: Path, name: str, version: str, **files: str) -> Path:
    """What ``pip install`` leaves: a package, its metadata, a RECORD."""
    package = site / name
    package.mkdir()
    (package / "__init__.py").write_text(f"__version__ = {version!r}\n")
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(f"{name}/__init__.py,,\n")
    for file, text in files.items():
        (info / file.replace("_json", ".json")).write_text(text)
    return package
