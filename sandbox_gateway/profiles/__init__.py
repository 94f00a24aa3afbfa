"""Profiles: what an administrator offers. One profile is one kernelspec.

Two profiles are built in; ``<home>/profiles.toml`` changes them and adds others, and its
``[settings]`` hold for all of them. Its contract is
``profiles.schema.json`` beside this package, plus what a schema cannot say (:mod:`.checks`). A key that is left out
keeps the built-in profile's value where the name is a built-in one, else it has the default of :class:`Profile`.
Paths are checked for form here; whether they exist is found out when a sandbox starts.
"""

from __future__ import annotations

from sandbox_gateway.model import Idle
from sandbox_gateway.profiles.file import Problem, ProfileError
from sandbox_gateway.profiles.loading import Profiles, load_profiles
from sandbox_gateway.profiles.profile import (
    BUILT_IN,
    DEFAULT_PROFILE,
    HOME,
    WORKSPACE,
    Choices,
    Pool,
    Profile,
    Settings,
)
from sandbox_gateway.profiles.schema import schema

__all__ = [
    "BUILT_IN",
    "DEFAULT_PROFILE",
    "HOME",
    "WORKSPACE",
    "Choices",
    "Idle",
    "Pool",
    "Problem",
    "Profile",
    "ProfileError",
    "Profiles",
    "Settings",
    "load_profiles",
    "schema",
]
