"""What a caller may choose for one sandbox within the bounds of its profile: decisions only, no I/O.

By default the bounds are what the profile itself has: less is always allowed. An administrator's table
``[profiles.NAME.choices]`` widens them. What is chosen is then required: a limit that cannot be enforced is an error
when the sandbox starts, as one that the profile file asks for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any, Final

from sandbox_gateway.errors import InvalidField
from sandbox_gateway.model import Idle
from sandbox_gateway.profiles import Profile
from sandbox_gateway.profiles.checks import MIN_DISK, MIN_MEMORY
from sandbox_gateway.profiles.values import duration, size

TIERS: Final = ("pause", "suspend", "expire")
LEAST: Final[Mapping[str, float]] = {"cpu": 0.1, "memory": MIN_MEMORY, "disk": MIN_DISK, "processes": 16}
"""Less of it makes no working kernel."""
MOST: Final[Mapping[str, float]] = {"cpu": 4096, "memory": 1 << 60, "disk": 1 << 60, "processes": 1 << 22}
"""The largest number that is taken where there is no bound."""
LEAST_TIME: Final = 1.0
LONGEST_TIME: Final = 1e9
"""Seconds of an idle time."""
_SIZE = re.compile(r"[0-9]{1,15}(\.[0-9]{1,6})? ?([KMGT]i?B?|B)\Z")
_DURATION = re.compile(r"(?=.)([0-9]{1,9}d)?([0-9]{1,9}h)?([0-9]{1,9}m)?([0-9]{1,9}s)?\Z")
_UNITS = {"cpu": " cores", "memory": " bytes", "disk": " bytes", "processes": ""}
_TITLES = {
    "cpu": ("Cores", "As a rate: 1.5 is one and a half cores."),
    "memory": ("Memory", "Bytes of the whole sandbox, its files included."),
    "disk": ("Disk", "Bytes of files written inside; they live in its memory."),
    "processes": ("Processes", "Processes and threads."),
}
_TIER_TITLES = {"pause": "Pause after", "suspend": "Suspend after", "expire": "End after"}


def chosen(profile: Profile, resources: Mapping[str, Any]) -> Profile:
    """``profile`` with what a caller chose: ``cpu``, ``memory``, ``disk``, ``processes``, ``image``, ``idle``,
    ``network`` and ``gpu``.

    Sizes are bytes or texts such as ``"2GiB"``, times seconds or texts such as ``"1h30m"``; ``"none"`` and ``"never"``
    where there is no bound. Raises :class:`~sandbox_gateway.errors.InvalidField` for what is unknown, is of another
    type or is out of bounds.
    """
    limits: dict[str, float | int | None] = {}
    changes: dict[str, Any] = {}
    for key, value in resources.items():
        where = f"resources.{key}"
        if key in LEAST:
            limits[key] = _limit(profile, key, value)
        elif key == "image":
            changes[key] = _one_of(where, value, images(profile))
        elif key == "idle":
            changes[key] = _idle(profile, value)
        elif key == "network":
            _one_of(where, value, ("none",))
        elif key == "gpu":
            if isinstance(value, bool) or value != 0:
                raise InvalidField(where, f"profile {profile.name} has no GPU", "Leave it out.")
        else:
            known = ", ".join(choice_schema(profile)["properties"])
            raise InvalidField(_dotted("resources", key), "cannot be chosen", f"Can be chosen: {known}.")
    return replace(
        profile,
        limits=replace(profile.limits, **limits),  # type: ignore[arg-type]  # each is of its limit's type
        required_limits=profile.required_limits | {key for key, value in limits.items() if value is not None},
        chosen=profile.chosen | limits.keys() | changes.keys(),
        **changes,
    )


def choice_schema(profile: Profile) -> dict[str, Any]:
    """A JSON Schema (draft 2020-12) of what :func:`chosen` takes, with numbers for sizes and times: for forms."""
    properties: dict[str, Any] = {key: _limit_schema(profile, key) for key in LEAST}
    properties["image"] = {"title": "Image", "enum": list(images(profile)), "default": profile.image}
    if profile.choices.idle is not False:
        properties["idle"] = {
            "title": "Idle times",
            "description": "Seconds without activity.",
            "type": "object",
            "additionalProperties": False,
            "properties": {tier: _tier_schema(profile, tier) for tier in TIERS},
        }
    properties["network"] = {"title": "Network", "enum": ["none"], "default": "none"}
    properties["gpu"] = {"title": "GPUs", "type": "integer", "minimum": 0, "maximum": 0, "default": 0}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": profile.display_name or profile.name,
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def images(profile: Profile) -> tuple[str, ...]:
    """The images that can be chosen, the profile's own first."""
    return tuple(dict.fromkeys((profile.image, *profile.choices.image)))


def bound(profile: Profile, limit: str) -> float:
    """The most of a limit that can be chosen; infinite where there is no bound."""
    most: float | None = getattr(profile.choices, limit)
    own: float | None = getattr(profile.limits, limit)
    return most if most is not None else math.inf if own is None else own


def longest(profile: Profile, tier: str) -> float | None:
    """The longest time of an idle tier that can be chosen, in seconds; None: any, and never."""
    bounds = profile.choices.idle
    if isinstance(bounds, bool):
        return None
    time: float | None = getattr(bounds if bounds is not None else profile.idle, tier)
    return time


def _limit(profile: Profile, key: str, value: Any) -> float | int | None:
    where, most = f"resources.{key}", bound(profile, key)
    if value == "none" and isinstance(value, str):
        if most < math.inf:
            raise InvalidField(where, f"no limit is more than profile {profile.name} allows ({_show(most, key)})")
        return None
    whole = key != "cpu"
    if key in ("memory", "disk") and isinstance(value, str) and _SIZE.match(value):
        value = size(value, 0)
    if not _number(value) or (whole and value != int(value)):
        expected = 'bytes, or a size such as "2GiB"' if key in ("memory", "disk") else "a number"
        raise InvalidField(where, f"is not {expected}")
    if value < LEAST[key]:
        raise InvalidField(where, f"is too little; at least {_show(LEAST[key], key)}")
    if value > min(most, MOST[key]):
        allowed = _show(min(most, MOST[key]), key)
        raise InvalidField(where, f"is more than profile {profile.name} allows ({allowed})")
    return int(value) if whole else float(value)


def _idle(profile: Profile, value: Any) -> Idle:
    if profile.choices.idle is False:
        raise InvalidField("resources.idle", f"cannot be chosen with profile {profile.name}", "Leave it out.")
    if not isinstance(value, Mapping):
        raise InvalidField("resources.idle", "is not an object", f"Its keys are {', '.join(TIERS)}.")
    for key in value:
        if key not in TIERS:
            raise InvalidField(_dotted("resources.idle", key), "is unknown", f"There are: {', '.join(TIERS)}.")
    given = {tier: _time(profile, tier, value[tier]) for tier in value}
    times = [(tier, given.get(tier, getattr(profile.idle, tier))) for tier in TIERS]
    # Who wants to be suspended sooner does not have to know when he would have been paused.
    times = [
        (tier, min([time, *(after for later, after in times[at:] if later in given and after is not None)]))
        if tier not in given and time is not None
        else (tier, time)
        for at, (tier, time) in enumerate(times)
    ]
    idle = replace(profile.idle, **dict(times))
    for (first, sooner), (second, after) in pairwise((tier, time) for tier, time in times if time is not None):
        if after < sooner:
            wrong = second if second in value else first
            raise InvalidField(f"resources.idle.{wrong}", f"{second} ({after:g} s) comes before {first} ({sooner:g} s)")
    return idle


def _time(profile: Profile, tier: str, value: Any) -> float | None:
    where, most = f"resources.idle.{tier}", longest(profile, tier)
    if value == "never" and isinstance(value, str):
        if most is not None:
            raise InvalidField(where, f"never is longer than profile {profile.name} allows ({most:g} s)")
        return None
    if isinstance(value, str) and _DURATION.match(value):
        value = duration(value)
    if not _number(value):
        raise InvalidField(where, 'is not a number of seconds, or a duration such as "10m"')
    if value < LEAST_TIME:
        raise InvalidField(where, f"is too short; at least {LEAST_TIME:g} s")
    allowed = LONGEST_TIME if most is None else most
    if value > allowed:
        raise InvalidField(where, f"is longer than profile {profile.name} allows ({allowed:g} s)")
    return float(value)


def _one_of(where: str, value: Any, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise InvalidField(where, "cannot be chosen", f"There are: {', '.join(allowed)}.")
    return value


def _number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _show(amount: float, key: str) -> str:
    return f"{amount:g}{_UNITS[key]}" if key == "cpu" else f"{int(amount)}{_UNITS[key]}"


def _dotted(top: str, key: Any) -> str:
    return f"{top}.{str(key)[:60]}"


def _limit_schema(profile: Profile, key: str) -> dict[str, Any]:
    title, description = _TITLES[key]
    most, own = bound(profile, key), getattr(profile.limits, key)
    kind = "number" if key == "cpu" else "integer"
    top = min(most, MOST[key])
    number = {"type": kind, "minimum": LEAST[key], "maximum": top if kind == "number" else int(top)}
    rule = number if most < math.inf else {"anyOf": [number, {"const": "none"}]}
    return {"title": title, "description": description, **rule, "default": "none" if own is None else own}


def _tier_schema(profile: Profile, tier: str) -> dict[str, Any]:
    most, own = longest(profile, tier), getattr(profile.idle, tier)
    number = {"type": "number", "minimum": LEAST_TIME, "maximum": LONGEST_TIME if most is None else most}
    rule = number if most is not None else {"anyOf": [number, {"const": "never"}]}
    return {"title": _TIER_TITLES[tier], **rule, "default": "never" if own is None else own}
