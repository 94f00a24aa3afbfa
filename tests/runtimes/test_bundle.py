"""The OCI configuration says what the specification says, and nothing more."""

from __future__ import annotations

from typing import Any

import pytest

from sandbox_gateway.model import Image, Layer, Limits, Mount, SandboxSpec
from sandbox_gateway.runtimes import gvisor_bundle as bundle

ROOT = Layer("/layers/root.erofs", "/")
ENVIRONMENT = Layer("/layers/env.erofs", "/opt/env", writable=True)
LIVE = Layer("/host/env", "/host/env", kind="bind", writable=True)
AGENT = Layer("/layers/agent.erofs", "/opt/agent")
WORKSPACE = Mount("/home/me/work", "/home/jovyan/work", readonly=False)


def spec(**changes: Any) -> SandboxSpec:
    """A specification with some changes."""
    values = {"image": Image("i", (ROOT, ENVIRONMENT), agent=AGENT), **changes}
    return SandboxSpec("the-id", "p", "gvisor", **values)


def config(given: SandboxSpec, **arguments: Any) -> dict[str, Any]:
    """Its configuration."""
    return bundle.config(given, ("/opt/agent/init",), empty_root="/empty", **arguments)


def mount_at(given: SandboxSpec, destination: str) -> dict[str, Any]:
    """One of its mounts."""
    (found,) = [mount for mount in bundle.mounts(given) if mount["destination"] == destination]
    return found


def test_hardening_is_always_on() -> None:
    """No network, no host sockets or pipes, no raw sockets, systrap; annotations may not override flags."""
    flags = bundle.flags(spec())
    for flag in ("--network=none", "--host-uds=none", "--host-fifo=none", "--net-raw=false", "--platform=systrap"):
        assert flag in flags
    assert not any("allow-flag-override" in flag for flag in flags)


def test_files_of_the_host_are_opened_by_the_gofer_only_where_there_is_a_uid_for_it() -> None:
    """Without direct access gVisor runs as nobody, whom an ordinary user's namespace does not have."""
    assert "--directfs=false" in bundle.flags(spec())
    assert "--directfs=false" not in bundle.flags(spec(), rootless=True)
    process = config(spec())["process"]
    assert process["noNewPrivileges"] is True
    assert {"type": "RLIMIT_CORE", "soft": 0, "hard": 0} in process["rlimits"]


def test_init_is_the_agents_uid_with_its_capabilities_only() -> None:
    """PID 1 holds what it needs to start a kernel under another uid, in every set, and no more."""
    process = config(spec(agent_uid=4321))["process"]
    assert process["user"] == {"uid": 4321, "gid": 4321}
    assert process["args"] == ["/opt/agent/init"]
    for held in process["capabilities"].values():
        assert held == ["CAP_CHOWN", "CAP_KILL", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID"]
    assert "SANDBOX_ID=the-id" in process["env"]


def test_erofs_root_is_an_annotation_over_an_empty_directory() -> None:
    """gVisor takes an EROFS root by annotation, with its overlay in memory and the disk limit as its size."""
    found = config(spec(limits=Limits(disk=1000)))
    assert found["root"]["path"] == "/empty"
    notes = found["annotations"]
    assert notes["dev.gvisor.spec.rootfs.source"] == "/layers/root.erofs"
    assert notes["dev.gvisor.spec.rootfs.overlay"] == "memory"
    assert notes["dev.gvisor.spec.rootfs.options"] == "size=1000"


def test_live_root_is_the_directory_itself() -> None:
    """Without mkfs.erofs the root is a directory, which the overlay keeps unwritten."""
    given = spec(image=Image("i", (Layer("/host/root", "/", kind="bind"),)))
    found = config(given)
    assert found["root"]["path"] == "/host/root"
    assert found["annotations"] == {}
    assert "--overlay2=all:memory" in bundle.flags(given)


def test_image_without_a_root_is_refused() -> None:
    """An image has a layer at /."""
    with pytest.raises(ValueError, match="layer at /"):
        config(spec(image=Image("i", (ENVIRONMENT,))))


def test_only_writable_layers_lack_the_read_only_option() -> None:
    """The agent's layer is read-only whatever the environment is."""
    assert "ro" not in mount_at(spec(), "/opt/env")["options"]
    assert "ro" in mount_at(spec(), "/opt/agent")["options"]


def test_writable_workspace_is_not_swallowed_by_an_overlay() -> None:
    """With a writable mount the global overlay is the root's alone, and a writable EROFS layer has one by a hint."""
    given = spec(mounts=(WORKSPACE,), limits=Limits(disk=1000))
    assert "--overlay2=root:memory,size=1000" in bundle.flags(given)
    notes = config(given)["annotations"]
    assert notes["dev.gvisor.spec.mount.layer1.source"] == "/layers/env.erofs"
    assert notes["dev.gvisor.spec.mount.layer1.share"] == "container"
    assert "rw" in mount_at(given, "/home/jovyan/work")["options"]
    assert "--overlay2=all:memory,size=1000" in bundle.flags(spec(limits=Limits(disk=1000)))


def test_equal_trees_at_two_places_are_one_writable_layer_beside_a_writable_workspace() -> None:
    """As with an environment that is reached by a link, too: gVisor takes one hint for a source."""
    layers = (Layer("/l/root", "/"), Layer("/l/env", "/env", writable=True), Layer("/l/env", "/link", writable=True))
    given = spec(image=Image("x", layers), mounts=(Mount("/host/work", "/home/jovyan/work", False),))
    hints = [value for name, value in config(given)["annotations"].items() if name.endswith(".source")]
    assert hints.count("/l/env") == 1
    assert "ro" not in mount_at(given, "/env")["options"]
    assert "ro" in mount_at(given, "/link")["options"]


def test_live_layer_beside_a_writable_workspace_is_read_only() -> None:
    """Its overlay's store would lie in the host's directory: rather no writes."""
    image = Image("i", (ROOT, LIVE))
    assert "ro" in mount_at(spec(image=image, mounts=(WORKSPACE,)), "/host/env")["options"]
    assert "rw" in mount_at(spec(image=image), "/host/env")["options"]


def test_mounts_come_after_what_they_lie_in() -> None:
    """Home before the workspace in it, /dev before /dev/shm, a layer before one inside it."""
    inner = Layer("/layers/inner.erofs", "/opt/env/lib/inner")
    order = [mount["destination"] for mount in bundle.mounts(spec(image=Image("i", (ROOT, inner, ENVIRONMENT))))]
    order_with = [mount["destination"] for mount in bundle.mounts(spec(mounts=(WORKSPACE,)))]
    assert order.index("/opt/env") < order.index("/opt/env/lib/inner")
    assert order.index("/dev") < order.index("/dev/shm")
    assert order_with.index("/home/jovyan") < order_with.index("/home/jovyan/work")


def test_mounts_take_no_devices_and_no_setuid() -> None:
    """Neither binds nor temporary files nor layers bring devices or setuid programs."""
    for mount in bundle.mounts(spec(mounts=(WORKSPACE,))):
        if mount["destination"] not in ("/dev", "/proc"):
            assert {"nosuid", "nodev"} <= set(mount["options"]), mount


def test_home_is_the_kernels_and_run_is_the_agents() -> None:
    """Each finds a place of its own to write to."""
    given = spec(kernel_uid=77, agent_uid=88)
    assert {"uid=77", "gid=77", "mode=755"} <= set(mount_at(given, "/home/jovyan")["options"])
    assert {"uid=88", "gid=88", "mode=755"} <= set(mount_at(given, "/run")["options"])


def test_limits_are_sizes_and_rlimits() -> None:
    """Disk bounds each place for files, processes bound each guest user; without limits there are none."""
    given = spec(limits=Limits(disk=1 << 20, processes=9, memory=1 << 30))
    for place in ("/tmp", "/home/jovyan", "/dev/shm"):
        assert f"size={1 << 20}" in mount_at(given, place)["options"]
    assert {"type": "RLIMIT_NPROC", "soft": 9, "hard": 9} in config(given)["process"]["rlimits"]
    assert not any("size" in option for option in mount_at(spec(), "/tmp")["options"])
    assert not any(limit["type"] == "RLIMIT_NPROC" for limit in config(spec())["process"]["rlimits"])


def test_cgroup_is_named_only_when_given() -> None:
    """runsc joins the group that we made, and none otherwise."""
    assert "cgroupsPath" not in config(spec())["linux"]
    assert config(spec(), cgroups_path="/p/x")["linux"]["cgroupsPath"] == "/p/x"
