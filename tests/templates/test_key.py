"""What a template's key holds: whatever a restored kernel could not change, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sandbox_gateway.model import Image, KernelSpec, Launch, Layer, Limits, Mount, SandboxSpec
from sandbox_gateway.templates.key import cores, key_of

LAYER = Layer("/layers/a", "/", digest="sha256:" + "a" * 64)
SPEC = SandboxSpec(
    "id", "p", "gvisor", Image("host", (LAYER,), agent=replace(LAYER, destination="/opt/agent")), Limits(cpu=2.0)
)
ARGV = ("python", "-m", "ipykernel_launcher", "-f", "{connection_file}")
LAUNCH = Launch(SPEC, KernelSpec(ARGV, {"HOME": "/home/jovyan", "TZ": "UTC"}), b"key", 1000, 1000)
FACTS: dict[str, Any] = {
    "preload": ("numpy",),
    "shape": {"mounts": "m"},
    "cores": 2,
    "requirements": {"runsc": "r", "cpu": "a,b"},
    "link_version": 1,
}


def with_kernel(**changes: Any) -> Launch:
    return replace(LAUNCH, kernel=replace(LAUNCH.kernel, **changes))


def with_spec(**changes: Any) -> Launch:
    return replace(LAUNCH, spec=replace(SPEC, **changes))


@pytest.mark.parametrize(
    "same",
    [
        with_spec(id="other", hostname="other"),
        with_spec(limits=Limits(cpu=1.5, memory=1 << 30)),
        with_spec(image=replace(SPEC.image, layers=(replace(LAYER, source="/elsewhere"),))),
        with_kernel(environment={"HOME": "/home/jovyan", "TZ": "Asia/Tokyo", "TOKEN": "x"}),
        with_kernel(cwd="/home/jovyan/work"),
        replace(LAUNCH, key=b"other"),
    ],
)
def test_what_a_clone_can_have_of_its_own_is_no_part_of_the_key(same: Launch) -> None:
    assert key_of(same, **FACTS) == key_of(LAUNCH, **FACTS)


@pytest.mark.parametrize(
    "other",
    [
        with_spec(image=replace(SPEC.image, layers=(replace(LAYER, digest="sha256:" + "b" * 64),))),
        with_spec(image=replace(SPEC.image, layers=(replace(LAYER, writable=True),))),
        with_spec(image=replace(SPEC.image, agent=replace(LAYER, digest="sha256:" + "b" * 64))),
        with_spec(mounts=(Mount("/data", "/data"),)),
        with_spec(agent_uid=64998),
        with_kernel(argv=("python3", *ARGV[1:])),
        with_kernel(environment={"HOME": "/root"}),
        with_kernel(environment={"HOME": "/home/jovyan", "PYTHONPATH": "/x"}),
        with_kernel(interrupt_mode="message"),
        replace(LAUNCH, uid=1001),
        replace(LAUNCH, gid=1001),
    ],
)
def test_what_a_clone_cannot_change_makes_another_key(other: Launch) -> None:
    assert key_of(other, **FACTS).digest != key_of(LAUNCH, **FACTS).digest


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("preload", ("numpy", "pandas")),
        ("shape", {"mounts": "n"}),
        ("cores", 1),
        ("requirements", {"runsc": "s", "cpu": "a,b"}),
        ("requirements", {"runsc": "r", "cpu": "a"}),
        ("link_version", 2),
    ],
)
def test_each_fact_of_the_machine_and_of_the_profile_counts(name: str, value: Any) -> None:
    assert key_of(LAUNCH, **{**FACTS, name: value}).digest != key_of(LAUNCH, **FACTS).digest


def test_an_update_of_the_machine_keeps_the_slot() -> None:
    updated = with_spec(image=replace(SPEC.image, layers=(replace(LAYER, digest="sha256:" + "b" * 64),)))
    new = key_of(updated, **{**FACTS, "requirements": {"runsc": "s"}, "preload": ()})
    assert new.slot == key_of(LAUNCH, **FACTS).slot
    assert key_of(with_kernel(argv=("x", *ARGV[1:])), **FACTS).slot != new.slot
    assert key_of(replace(LAUNCH, uid=7), **FACTS).slot != new.slot


def test_no_value_can_be_read_from_a_key() -> None:
    key = key_of(with_kernel(environment={"HOME": "/home/jovyan", "PYTHONPATH": "/secret"}), **FACTS)
    assert "secret" not in repr(key)


def test_a_kernel_sees_as_many_processors_as_it_may_use() -> None:
    assert cores(Limits(), 8) == 8
    assert cores(Limits(cpu=1.5), 8) == 2
    assert cores(Limits(cpu=0.1), 8) == 1
    assert cores(Limits(cpu=64), 8) == 8
