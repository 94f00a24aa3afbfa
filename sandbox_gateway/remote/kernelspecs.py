"""Kernelspecs for a gateway's profiles, beside those of this machine's own."""

from __future__ import annotations

import re
from typing import Any

from sandbox_gateway import guard
from sandbox_gateway.kernelspecs import REMOTE_PROVISIONER
from sandbox_gateway.remote.address import Address
from sandbox_gateway.remote.client import RemoteProfile


def name_of(profile: RemoteProfile, address: Address) -> str:
    """What Jupyter calls it: the profile and where it is, in letters that a kernelspec's name may have."""
    return re.sub(r"[^a-z0-9._]+", "-", f"{profile.name}-at-{address.place}".lower()).strip("-")


def variables_of(profile: RemoteProfile) -> tuple[str, ...]:
    """The variables of this machine's applications that the kernel gets: those that the profile names one by one.

    A pattern of a gateway's would reach for whatever secrets are set here.
    """
    return tuple(name for name in profile.variables if "*" not in name)


def kernel_json(profile: RemoteProfile, address: Address) -> dict[str, Any]:
    """The kernelspec; there is no secret in it."""
    config: dict[str, Any] = {"gateway": address.url, "profile": profile.name, "variables": [*variables_of(profile)]}
    if address.ca_file:
        config["ca_file"] = address.ca_file
    display_name = f"{profile.display_name} on {address.place}"
    if not profile.isolated and "not isolated" not in display_name:
        display_name += " (not isolated)"
    metadata: dict[str, Any] = {
        "kernel_provisioner": {"provisioner_name": REMOTE_PROVISIONER, "config": config},
        "description": profile.description,
        "sandbox_gateway": {"gateway": address.url, "isolated": profile.isolated, "workspace": "none"},
    }
    if profile.language.lower() == "python":
        metadata["debugger"] = True
    return {
        # Nothing here runs on this machine; a client that starts it without its provisioner is told so.
        "argv": list(guard.wrap(("remote", "{connection_file}"))),
        "display_name": display_name,
        "language": profile.language,
        "interrupt_mode": profile.interrupt_mode,
        "metadata": metadata,
    }
