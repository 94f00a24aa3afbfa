"""Kernelspecs of profiles: written where Jupyter looks for them, and taken away again.

A kernelspec of ours is known by its provisioner stanza, ``metadata.kernel_provisioner.provisioner_name`` being
``sandbox``, or ``sandbox-remote`` for a profile of a gateway (:mod:`sandbox_gateway.remote.kernelspecs`); nothing else
is ever overwritten or removed. Which profile it starts is in the stanza's ``config``, so that a changed profile needs a
new installation only when a name, description, language or image changed.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox_gateway import guard
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.model import WorkspaceMode
from sandbox_gateway.profiles import Profile

PROVISIONER = "sandbox"
"""The entry point's name in ``jupyter_client.kernel_provisioners``."""
REMOTE_PROVISIONER = "sandbox-remote"
"""The same for kernels on a gateway."""
LOGOS = ("logo-svg.svg", "logo-32x32.png", "logo-64x64.png")
LOGO_DIRECTORY = Path(__file__).with_name("logos")


@dataclass(frozen=True, slots=True)
class Installed:
    """A kernelspec of ours as it is on disk."""

    name: str
    """What Jupyter calls it."""
    profile: str
    """The profile it starts."""
    display_name: str
    path: Path
    """Its directory."""
    gateway: str = ""
    """The address of the gateway whose profile it is; empty: this machine's."""

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "name": self.name,
            "profile": self.profile,
            "display_name": self.display_name,
            "path": str(self.path),
            "gateway": self.gateway or None,
        }


@dataclass(frozen=True, slots=True)
class Change:
    """What an installation or removal did."""

    name: str
    path: Path
    action: str
    """``installed``, ``updated``, ``unchanged`` or ``removed``."""

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"name": self.name, "path": str(self.path), "action": self.action}


# -- where --------------------------------------------------------------------------------------------------------


def sys_prefix_directory() -> Path:
    """The kernels' directory of this Python environment."""
    return Path(sys.prefix) / "share" / "jupyter" / "kernels"


def user_directory() -> Path:
    """The kernels' directory of this user."""
    from jupyter_core.paths import jupyter_data_dir

    return Path(jupyter_data_dir()) / "kernels"


def prefix_directory(prefix: Path) -> Path:
    """The kernels' directory below ``prefix``."""
    return prefix.expanduser().absolute() / "share" / "jupyter" / "kernels"


def default_directory(environment: Mapping[str, str] | None = None) -> Path:
    """This environment's when it is one of the user's own (venv, conda), else the user's."""
    env = os.environ if environment is None else environment
    own = sys.prefix != sys.base_prefix or (bool(env.get("CONDA_PREFIX")) and Path(sys.prefix, "conda-meta").is_dir())
    return sys_prefix_directory() if own else user_directory()


def search_directories() -> tuple[Path, ...]:
    """Where Jupyter looks for kernelspecs, the first find wins."""
    from jupyter_core.paths import jupyter_path

    found = dict.fromkeys(Path(path) for path in jupyter_path("kernels"))
    return tuple(found)


# -- what ---------------------------------------------------------------------------------------------------------


def kernel_json(profile: Profile) -> dict[str, Any]:
    """The kernelspec of ``profile``."""
    metadata: dict[str, Any] = {
        "kernel_provisioner": {"provisioner_name": PROVISIONER, "config": {"profile": profile.name}},
        "description": profile.description,
        "sandbox_gateway": {
            "runtime": profile.runtime,
            "isolated": profile.runtime != "fake",
            "workspace": str(profile.workspace),
        },
    }
    if profile.language.lower() == "python":
        metadata["debugger"] = True
    display_name = profile.display_name
    if profile.runtime == "fake":
        # DESIGN 4.12: the runtime without isolation says so wherever it shows.
        display_name += " (not isolated)"
    return {
        "argv": list(guard.wrap(kernel_argv(profile))),
        "display_name": display_name,
        "language": profile.language,
        "interrupt_mode": profile.interrupt_mode,
        "metadata": metadata,
    }


def kernel_argv(profile: Profile) -> tuple[str, ...]:
    """The command inside: the profile's own, else ipykernel on the interpreter of its image.

    A bare ``python3`` stands for the image's interpreter where its path is not known before the image is read.
    """
    if profile.argv is not None:
        return profile.argv
    kind, _, path = profile.image.partition(":")
    if kind == "directory" or os.path.isdir(path):  # a root filesystem, or the folder of an environment
        interpreter = "python3"
    else:
        interpreter = path or sys.executable
    # As ipykernel's own kernelspec: with frozen modules the debugger misses breakpoints, and says so in each console.
    return (interpreter, "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", "{connection_file}")


def describe(profile: Profile) -> str:
    """One line for people on what a profile opens."""
    opens = {
        WorkspaceMode.NONE: "sees no files of this machine",
        WorkspaceMode.RO: "reads the notebook's folder",
        WorkspaceMode.RW: "reads and writes the notebook's folder",
    }[profile.workspace]
    return opens + ("; NOT ISOLATED" if profile.runtime == "fake" else "")


# -- doing it -----------------------------------------------------------------------------------------------------


def find(directories: Iterable[Path]) -> Iterator[Installed]:
    """The kernelspecs of ours in ``directories``."""
    for directory in directories:
        try:
            entries = sorted(entry for entry in directory.iterdir() if entry.is_dir())
        except OSError:
            continue
        for entry in entries:
            found = _ours(entry)
            if found is not None:
                yield found


def install(profile: Profile, directory: Path) -> Change:
    """Write the kernelspec of ``profile`` into ``directory``; does nothing when it is there already.

    Raises ``invalid_request`` when another kernelspec has the name, ``data_directory`` when it cannot be written.
    """
    return put(profile.name, kernel_json(profile), directory)


def put(name: str, spec: Mapping[str, Any], directory: Path) -> Change:
    """As :func:`install`, for any kernelspec of ours."""
    target = directory / name
    there = os.path.lexists(target)
    if there and _ours(target) is None:
        raise SandboxGatewayError(
            "invalid_request",
            f"{target} is a kernelspec of somebody else's",
            "Give the profile another name, or remove that kernelspec with `jupyter kernelspec remove`.",
        )
    if there and _same(target, spec):
        return Change(name, target, "unchanged")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Built aside and renamed: Jupyter never sees half a kernelspec. The dot makes it no valid kernel's name.
        with tempfile.TemporaryDirectory(prefix=".new-", suffix="~", dir=directory) as workplace:
            fresh, old = Path(workplace, "fresh"), Path(workplace, "old")
            fresh.mkdir()
            _write(fresh, spec)
            if there:
                target.rename(old)
            fresh.rename(target)
    except OSError as error:
        raise _unwritable(directory, error) from error
    return Change(name, target, "updated" if there else "installed")


def uninstall(spec: Installed) -> Change:
    """Remove a kernelspec of ours. Raises ``data_directory`` when it cannot be removed."""
    try:
        if spec.path.is_symlink():
            spec.path.unlink()
        else:
            shutil.rmtree(spec.path)
    except OSError as error:
        raise _unwritable(spec.path, error) from error
    return Change(spec.name, spec.path, "removed")


def _ours(directory: Path) -> Installed | None:
    try:
        spec = json.loads((directory / "kernel.json").read_bytes())
        stanza = spec["metadata"]["kernel_provisioner"]
        if stanza["provisioner_name"] not in (PROVISIONER, REMOTE_PROVISIONER):
            return None
        config = stanza.get("config", {})
        profile, shown = config.get("profile", directory.name), spec.get("display_name", directory.name)
        gateway = config.get("gateway", "") if stanza["provisioner_name"] == REMOTE_PROVISIONER else ""
        return Installed(directory.name, str(profile), str(shown), directory, str(gateway))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _same(directory: Path, spec: Mapping[str, Any]) -> bool:
    try:
        if json.loads((directory / "kernel.json").read_bytes()) != spec:
            return False
        return all((directory / logo).read_bytes() == (LOGO_DIRECTORY / logo).read_bytes() for logo in LOGOS)
    except (OSError, ValueError):
        return False


def _write(directory: Path, spec: Mapping[str, Any]) -> None:
    (directory / "kernel.json").write_text(json.dumps(spec, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for logo in LOGOS:
        shutil.copyfile(LOGO_DIRECTORY / logo, directory / logo)
    for file in directory.iterdir():
        file.chmod(0o644)
    directory.chmod(0o755)


def _unwritable(place: Path, error: OSError) -> SandboxGatewayError:
    return SandboxGatewayError(
        "data_directory",
        f"cannot write {place}: {error.strerror}",
        "Choose another place: --user, or --prefix DIRECTORY.",
    )
