"""What a caller may choose: never more than the bounds, and what the schema says is what is taken."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from sandbox_gateway.choices import TIERS, bound, choice_schema, chosen
from sandbox_gateway.errors import InvalidField, SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.model import Idle, Limits
from sandbox_gateway.profiles import Choices, Profile, load_profiles

MIB = 1 << 20
GIB = 1 << 30
PLAIN = Profile("plain", limits=Limits(cpu=2.0, memory=4 * GIB, disk=GIB, processes=1024), idle=Idle(600.0, 3600.0))
WIDE = replace(
    PLAIN,
    choices=Choices(8.0, 16 * GIB, math.inf, math.inf, ("host:/opt/py/bin/python",), Idle(3600.0, 7200.0, 1e6)),
)
OPEN = Profile("open", choices=Choices(idle=True))
CLOSED = replace(PLAIN, choices=Choices(idle=False))
PROFILES = (PLAIN, WIDE, OPEN, CLOSED)


def test_without_a_choice_a_profile_stays_as_it_is() -> None:
    assert chosen(PLAIN, {}) == PLAIN


def test_less_than_the_profile_has_is_always_allowed_and_then_required() -> None:
    found = chosen(PLAIN, {"cpu": 1, "memory": "512MiB", "processes": 64})
    assert found.limits == Limits(1.0, 512 * MIB, GIB, 64)
    assert found.required_limits == found.chosen == {"cpu", "memory", "processes"}


@pytest.mark.parametrize(
    ("resources", "field"),
    [
        ({"cpu": 2.5}, "resources.cpu"),
        ({"cpu": 0.01}, "resources.cpu"),
        ({"cpu": True}, "resources.cpu"),
        ({"cpu": math.nan}, "resources.cpu"),
        ({"cpu": "none"}, "resources.cpu"),
        ({"cpu": 10**400}, "resources.cpu"),
        ({"memory": "5GiB"}, "resources.memory"),
        ({"memory": "50%"}, "resources.memory"),
        ({"memory": 1}, "resources.memory"),
        ({"memory": 256 * MIB + 0.5}, "resources.memory"),
        ({"disk": []}, "resources.disk"),
        ({"processes": 2}, "resources.processes"),
        ({"image": "host:/opt/py/bin/python"}, "resources.image"),
        ({"image": ["host"]}, "resources.image"),
        ({"network": "full"}, "resources.network"),
        ({"gpu": 1}, "resources.gpu"),
        ({"gpu": False}, "resources.gpu"),
        ({"idle": {"pause": 601}}, "resources.idle.pause"),
        ({"idle": {"suspend": "never"}}, "resources.idle.suspend"),
        ({"idle": {"suspend": "2h"}}, "resources.idle.suspend"),
        ({"idle": {"suspend": 0.1}}, "resources.idle.suspend"),
        ({"idle": {"pause": 60, "suspend": 30}}, "resources.idle.suspend"),
        ({"idle": {"cpu": 1}}, "resources.idle.cpu"),
        ({"idle": True}, "resources.idle"),
        ({"mounts": []}, "resources.mounts"),
    ],
)
def test_what_is_out_of_bounds_is_refused_with_its_name(resources: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        chosen(PLAIN, resources)
    assert caught.value.field == field and caught.value.code == "invalid_request"
    assert caught.value.as_dict()["field"] == field


def test_an_administrator_widens_the_bounds() -> None:
    wanted = {"cpu": 8, "memory": 16 * GIB, "disk": "none", "image": "host:/opt/py/bin/python"}
    found = chosen(WIDE, {**wanted, "idle": {"pause": "1h", "expire": 1e5}})
    assert found.limits == Limits(8.0, 16 * GIB, None, 1024) and found.image == wanted["image"]
    assert found.idle == Idle(3600.0, 3600.0, 1e5) and "idle" in found.chosen
    with pytest.raises(InvalidField):
        chosen(WIDE, {"idle": {"expire": "never"}})


def test_who_is_suspended_sooner_is_not_paused_later() -> None:
    assert chosen(PLAIN, {"idle": {"suspend": 60}}).idle == Idle(60.0, 60.0)


def test_idle_times_can_be_left_to_the_caller_or_closed() -> None:
    assert chosen(OPEN, {"idle": {"suspend": "never", "expire": "10d"}}).idle == Idle(None, None, 864000.0)
    with pytest.raises(InvalidField):
        chosen(CLOSED, {"idle": {"pause": 1}})
    assert "idle" not in choice_schema(CLOSED)["properties"]


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 0.1, 1, 16, 64, 600, 3600, GIB, 4 * GIB, 4 * GIB + 1, 1 << 60, 1e9]),
    st.floats(),
    st.sampled_from(["none", "never", "host", "host:/opt/py/bin/python", ""]),
    st.lists(st.integers(), max_size=1),
)
RESOURCES = st.dictionaries(
    st.sampled_from(["cpu", "memory", "disk", "processes", "image", "network", "gpu", "other"]), VALUES, max_size=3
)
IDLE = st.dictionaries(st.sampled_from([*TIERS, "cpu"]), VALUES, max_size=1)


@given(st.sampled_from(PROFILES), RESOURCES, st.one_of(st.none(), IDLE, VALUES))
def test_the_schema_and_the_decision_agree_and_bounds_hold(profile: Profile, resources: Any, idle: Any) -> None:
    wanted = resources if idle is None else {**resources, "idle": idle}
    if any(isinstance(value, float) and not math.isfinite(value) for value in resources.values()):
        wanted = {}
    schema = choice_schema(profile)
    Draft202012Validator.check_schema(schema)
    valid = Draft202012Validator(schema).is_valid(wanted)
    try:
        found = chosen(profile, wanted)
    except SandboxGatewayError as error:
        comes_before = "comes before" in error.message
        assert not valid or comes_before or "idle" in wanted
        return
    assert valid
    for key in ("cpu", "memory", "disk", "processes"):
        limit = getattr(found.limits, key)
        assert (math.inf if limit is None else limit) <= max(bound(profile, key), 0)


def _load(tmp_path: Path, text: str) -> Profile:
    paths = Paths(tmp_path, tmp_path / "run")
    paths.profiles.parent.mkdir(parents=True, exist_ok=True)
    paths.profiles.write_text(text)
    return load_profiles(paths, memory=16 * GIB)["x"]


def test_the_profile_file_says_what_may_be_chosen(tmp_path: Path) -> None:
    text = """[profiles.x]
    memory = "2GiB"
    cpu = 2
    idle = { pause = "10m", suspend = "1h" }
    [profiles.x.choices]
    cpu = 8
    memory = "50%"
    disk = "none"
    processes = 4096
    image = ["host:/opt/a/bin/python", "host:/opt/a/bin/python"]
    idle = { suspend = "1d" }
    """
    profile = _load(tmp_path, text)
    assert profile.choices == Choices(
        8, 8 * GIB, math.inf, 4096, ("host:/opt/a/bin/python",), Idle(600.0, 86400.0, None)
    )
    assert profile.as_dict()["choices"]["disk"] == "none"
    assert _load(tmp_path, "[profiles.x.choices]\nidle = true\n").choices == Choices(idle=True)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('choices = { memory = "1GiB" }\nmemory = "2GiB"', "profiles.x.choices.memory"),
        ("choices = { processes = 16 }", "profiles.x.choices.processes"),
        ("choices = { cpu = 0 }", "profiles.x.choices.cpu"),
        ("choices = { cpu = 2 }", "profiles.x.choices.cpu"),
        ('choices = { image = ["docker"] }', "profiles.x.choices.image[0]"),
        ('choices = { image = ["host:/a/../b"] }', "profiles.x.choices.image[0]"),
        ("choices = { idle = 3 }", "profiles.x.choices.idle"),
        ('choices = { idle = { pause = "1h", cpu = 1 } }', "profiles.x.choices.idle.cpu"),
        ('idle = { pause = "2h" }\nchoices = { idle = { pause = "1h" } }', "profiles.x.choices.idle.pause"),
        ("choices = { gpu = 1 }", "profiles.x.choices.gpu"),
    ],
)
def test_bounds_that_make_no_sense_are_told_with_their_key(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(SandboxGatewayError) as caught:
        _load(tmp_path, f"[profiles.x]\n{text}\n")
    assert caught.value.code == "invalid_profile" and f"{key}: " in caught.value.message
