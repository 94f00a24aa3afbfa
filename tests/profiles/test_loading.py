"""Profiles: what a good file gives, what a wrong one says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.model import Limits, Mount, OnOwnerExit, WorkspaceMode
from sandbox_gateway.profiles import Idle, Pool, ProfileError, Profiles, Settings, load_profiles

GIB = 1024**3


@dataclass(frozen=True)
class Places:
    """Where a test keeps its profile file."""

    home: Path
    runtime: Path
    profiles: Path

    def load(self, text: str | bytes, memory: int = 16 * GIB) -> Profiles:
        """Write the file and read it, on a machine with ``memory`` bytes."""
        self.profiles.write_bytes(text.encode() if isinstance(text, str) else text)
        return load_profiles(self, memory=memory)

    def wrong(self, text: str | bytes) -> ProfileError:
        """The error that reading ``text`` raises."""
        with pytest.raises(ProfileError) as caught:
            self.load(text)
        assert caught.value.code == "invalid_profile"
        return caught.value

    def problem(self, text: str | bytes) -> Any:
        """The one problem that ``text`` has."""
        (found,) = self.wrong(text).problems
        return found


@pytest.fixture
def places(tmp_path: Path) -> Places:
    home = tmp_path / "home"
    home.mkdir()
    return Places(home, tmp_path / "run", home / "profiles.toml")


def test_without_a_file_the_two_built_in_profiles_are_there(places: Places) -> None:
    profiles = load_profiles(places)
    assert list(profiles) == ["python3-gvisor", "python3-gvisor-files"] and len(profiles) == 2
    plain, files = profiles.values()
    assert (plain.display_name, plain.workspace) == ("Python 3 (gVisor)", WorkspaceMode.NONE)
    assert (files.display_name, files.workspace) == ("Python 3 (gVisor, this folder)", WorkspaceMode.RW)
    assert "read, change and delete" in files.description
    assert plain.runtime == "gvisor" and plain.image == "host" and plain.on_owner_exit is OnOwnerExit.TERMINATE


def test_default_limits_are_a_share_of_the_machine_and_not_required(places: Places) -> None:
    profile = load_profiles(places, memory=16 * GIB).get("python3-gvisor")
    assert profile.limits == Limits(cpu=None, memory=8 * GIB, disk=4 * GIB, processes=1024)
    assert profile.required_limits == frozenset()


def test_every_key_is_read(places: Places) -> None:
    profile = places.load(
        """
        [profiles.big]
        display_name = "Big"
        description = "Room for much"
        language = "R"
        runtime = "fake"
        image = "directory:/srv/r"
        editable = true
        packages_writable = false
        workspace = "ro"
        cpu = 2
        memory = "2GiB"
        disk = "512MB"
        processes = 300
        client_environment = ["KERNEL_*", "LANG"]
        max_busy = "1h30m"
        max_lifetime = 90.5
        on_owner_exit = "keep"
        grace = 0
        argv = ["/usr/bin/R", "{connection_file}"]
        interrupt_mode = "message"
        active_output = true
        idle = { pause = "10m", suspend = "1h", expire = "never" }
        mounts = [{ source = "/data/", destination = "/data" }, { source = "/out", destination = "/out", mode = "rw" }]
        [profiles.big.environment]
        LC_ALL = "C"
        """
    ).get("big")
    assert profile.limits == Limits(2.0, 2 * GIB, 512 * 10**6, 300)
    assert profile.required_limits == {"cpu", "memory", "disk", "processes"}
    assert (profile.display_name, profile.description, profile.language) == ("Big", "Room for much", "R")
    assert (profile.runtime, profile.image, profile.editable) == ("fake", "directory:/srv/r", True)
    assert (profile.packages_writable, profile.workspace) == (False, WorkspaceMode.RO)
    assert (profile.max_busy, profile.max_lifetime, profile.grace) == (5400.0, 90.5, 0.0)
    assert (profile.idle.pause, profile.idle.suspend, profile.idle.expire) == (600.0, 3600.0, None)
    assert profile.mounts == (Mount("/data", "/data", True), Mount("/out", "/out", False))
    assert dict(profile.environment) == {"LC_ALL": "C"}
    assert profile.argv == ("/usr/bin/R", "{connection_file}") and profile.interrupt_mode == "message"
    assert profile.on_owner_exit is OnOwnerExit.KEEP and profile.source == str(places.profiles)
    assert profile.active_output and not places.load("[profiles.plain]\n").get("plain").active_output
    assert not profile.template, "R cannot be given an identity after its start"


def test_how_kernels_start_and_rest_is_read(places: Places) -> None:
    profile = places.load(
        """
        [profiles.fast]
        preload = ["numpy", "matplotlib.pyplot", "numpy"]
        pool = { created = 4, ready = 2, max_age = "never" }
        idle = { cpu = 0.5, suspend = "1h" }
        """
    ).get("fast")
    assert profile.template and profile.preload == ("numpy", "matplotlib.pyplot")
    assert profile.pool == Pool(created=4, ready=2, max_age=None)
    assert profile.idle == Idle(suspend=3600.0, cpu=0.5)


def test_without_a_word_ipykernel_starts_from_a_template_and_no_pool_is_kept(places: Places) -> None:
    plain = places.load("[profiles.plain]\n").get("plain")
    assert plain.template and plain.preload == () and plain.pool == Pool(0, 0, 3600.0) and plain.idle == Idle()
    assert not places.load("[profiles.x]\ntemplate = false\n").get("x").template


@pytest.mark.parametrize(
    ("argv", "template"),
    [
        ('["python3", "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", "{connection_file}"]', True),
        ('["python", "-m", "ipykernel", "-f", "{connection_file}"]', True),
        ('["python", "-m", "bash_kernel", "-f", "{connection_file}"]', False),
        ('["/opt/kernel", "{connection_file}"]', False),
    ],
)
def test_only_ipykernel_starts_from_a_template(places: Places, argv: str, template: bool) -> None:
    profile = places.load(f"[profiles.x]\nargv = {argv}\n").get("x")
    assert (profile.template, profile.ipykernel) == (template, template)


def test_settings_hold_for_the_whole_installation(places: Places) -> None:
    assert load_profiles(places).settings == Settings(20 * GIB, None)
    settings = places.load('[settings]\nsnapshot_budget = "none"\nmemory_reserve = "10%"\n').settings
    assert settings == Settings(None, 16 * GIB // 10)
    assert places.load("[settings]\nsnapshot_budget = 0\n").settings.snapshot_budget == 0


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ('[settings]\nsnapshot_budget = "50%"\n', "settings.snapshot_budget", ["20GiB", "none"]),
        ("[settings]\nbudget = 1\n", "settings.budget", ["unknown key", "snapshot_budget, memory_reserve"]),
        ("settings = 1\n", "settings", ["[settings]"]),
    ],
)
def test_a_wrong_setting_is_named(places: Places, text: str, key: str, words: list[str]) -> None:
    problem = places.problem(text)
    assert problem.key == key and all(word in problem.message for word in words)


def test_a_table_with_a_built_in_name_changes_only_the_keys_it_names(places: Places) -> None:
    profile = places.load('[profiles.python3-gvisor-files]\nmemory = "1GiB"\n').get("python3-gvisor-files")
    assert profile.workspace is WorkspaceMode.RW and profile.display_name == "Python 3 (gVisor, this folder)"
    assert profile.limits.memory == GIB and profile.limits.processes == 1024
    assert profile.required_limits == {"memory"}


def test_a_profile_without_a_display_name_shows_its_own_name(places: Places) -> None:
    assert places.load("[profiles.plain]\n").get("plain").display_name == "plain"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ('"2GiB"', 2 * GIB),
        ('"2G"', 2 * GIB),
        ('"1.5 GiB"', GIB * 3 // 2),
        ('"2GB"', 2 * 10**9),
        ('"640M"', 640 * 1024**2),
        ('"200000000B"', 200_000_000),
        ("200_000_000", 200_000_000),
        ('"25%"', 4 * GIB),
        ('"100%"', 16 * GIB),
        ('"none"', None),
    ],
)
def test_a_size_is_read_in_each_of_its_forms(places: Places, given: str, expected: int | None) -> None:
    assert places.load(f"[profiles.x]\nmemory = {given}\n").get("x").limits.memory == expected


def test_a_limit_that_is_none_is_not_required(places: Places) -> None:
    profile = places.load('[profiles.x]\ncpu = "none"\nmemory = "none"\nprocesses = "none"\ndisk = "none"\n').get("x")
    assert profile.limits == Limits() and profile.required_limits == frozenset()


def test_a_share_of_a_tiny_machine_is_raised_to_what_a_sandbox_needs(places: Places) -> None:
    assert places.load("[profiles.x]\n", memory=100 * 1024**2).get("x").limits.memory == 128 * 1024**2


def test_clients_may_set_only_what_the_allow_list_names(places: Places) -> None:
    profile = places.load('[profiles.x]\nclient_environment = ["KERNEL_*", "LANG"]\n').get("x")
    assert profile.allows("KERNEL_ID") and profile.allows("LANG")
    assert not any(map(profile.allows, ("LANGUAGE", "PATH", "AWS_SECRET", "kernel_id", "SANDBOX_ID")))


def test_a_reserved_variable_is_not_taken_from_a_client_even_by_a_pattern(places: Places) -> None:
    profile = places.load('[profiles.x]\nclient_environment = ["JPY_*", "SANDBOX_*"]\n').get("x")
    assert profile.allows("JPY_SESSION_NAME")
    assert not profile.allows("JPY_PARENT_PID") and not profile.allows("SANDBOX_ID")


def test_an_unknown_profile_lists_those_there_are_and_the_nearest(places: Places) -> None:
    with pytest.raises(SandboxGatewayError) as caught:
        places.load("[profiles.big]\n").get("python3-gviser")
    error = caught.value
    assert error.code == "unknown_profile" and "'python3-gviser'" in error.message
    assert "'python3-gvisor'?" in error.hint and "big" in error.hint and str(places.profiles) in error.hint


# -- wrong files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "line", "key", "words"),
    [
        ('memory = "2 gigs"', 2, "memory", ['"2 gigs"', "2GiB", "50%", "none"]),
        ('memory = "2GiB\\n"', 2, "memory", ["2GiB"]),
        ("memory = 0", 2, "memory", ["0 is not allowed"]),
        ("memory = true", 2, "memory", ["true is not allowed"]),
        ('memory = "64MiB"', 2, "memory", ["too little", "128MiB"]),
        ('memory = "150%"', 2, "memory", ["50%"]),
        ("disk = 10", 2, "disk", ["too little"]),
        ("cpu = 0", 2, "cpu", ["0.1"]),
        ("cpu = nan", 2, "cpu", ["nan is not allowed"]),
        ('cpu = "two"', 2, "cpu", ['"two"', "number of cores"]),
        ("processes = 1.5", 2, "processes", ["1.5", "whole number"]),
        ("processes = 3", 2, "processes", ["16"]),
        ('workspace = "write"', 2, "workspace", ['"write"', '"none", "ro", "rw"']),
        ('\n\nruntime = "docker"', 4, "runtime", ['"docker"', '"gvisor", "fake"']),
        ('image = "ubuntu:22.04"', 2, "image", ["ubuntu:22.04", "host:/"]),
        ('image = "host:python3"', 2, "image", ["absolute"]),
        ('image = "directory:/a/../b"', 2, "image", ["'..'"]),
        ('image = "directory:/"', 2, "image", ["is not allowed"]),
        ("editable = 1", 2, "editable", ["true or false"]),
        ('on_owner_exit = "die"', 2, "on_owner_exit", ['"terminate", "keep", "suspend"']),
        ('interrupt_mode = "SIGINT"', 2, "interrupt_mode", ['"signal", "message"']),
        ('grace = "never"', 2, "grace", ["30s"]),
        ("grace = -1", 2, "grace", ["-1"]),
        ("argv = []", 2, "argv", ["non-empty array"]),
        ('argv = ["python3", ""]', 2, "argv[1]", ["non-empty string"]),
        ('argv = ["python3", "-m", "x"]', 2, "argv", ["{connection_file}"]),
        ('language = "R"', 2, "language", ["argv"]),
        ('display_name = "a\\nb"', 2, "display_name", ["one non-empty line"]),
        ('memroy = "2GiB"', 2, "memroy", ["unknown key", "did you mean 'memory'?", "allowed: display_name"]),
        ('idle = "10m"', 2, "idle", ["pause, suspend and expire"]),
        ('idle = { sleep = "10m" }', 2, "idle.sleep", ["unknown key", "pause, suspend, expire"]),
        ('idle.pause = "10 minutes"', 2, "idle.pause", ['"10 minutes"', "10m"]),
        ('idle.pause = "0s"', 2, "idle.pause", ["no time"]),
        ('idle = { pause = "1h", suspend = "10m" }', 2, "idle.suspend", ["600 s", "3600 s"]),
        ("idle = { cpu = 0 }", 2, "idle.cpu", ["above 0 and up to 1"]),
        ('max_busy = "0s"', 2, "max_busy", ["no time"]),
        ('template = "yes"', 2, "template", ["true or false"]),
        ('template = true\nargv = ["R", "{connection_file}"]', 2, "template", ["ipykernel only"]),
        ('preload = "numpy"', 2, "preload", ["an array"]),
        ('preload = ["numpy", "os;x"]', 2, "preload[1]", ["dotted name"]),
        ('preload = [".numpy"]', 2, "preload[0]", ["dotted name"]),
        ("preload = [" + '"a",' * 101 + "]", 2, "preload", ["at most 100"]),
        ('template = false\npreload = ["numpy"]', 3, "preload", ["needs a template"]),
        ("template = false\npool.ready = 1", 3, "pool.ready", ["needs a template"]),
        ("pool.ready = -1", 2, "pool.ready", ["whole number from 0"]),
        ("pool.warm = 1", 2, "pool.warm", ["unknown key", "created, ready, max_age"]),
        ('pool.max_age = "0s"', 2, "pool.max_age", ["no time"]),
        ("environment = { A = 1 }", 2, "environment.A", ["write numbers in quotes"]),
        ('environment = { "A-B" = "x" }', 2, "environment.A-B", ["name of a variable"]),
        ('environment = { SANDBOX_ID = "x" }', 2, "environment.SANDBOX_ID", ["by the product"]),
        ('client_environment = ["*"]', 2, "client_environment[0]", ["KERNEL_*"]),
        ('client_environment = [\n"A",\n"JPY_PARENT_PID"]', 4, "client_environment[1]", ["never taken"]),
        ('mounts = [{ source = "/a" }]', 2, "mounts[0].destination", ["is missing"]),
        ('mounts = [{ source = "a", destination = "/b" }]', 2, "mounts[0].source", ["absolute path"]),
        ('mounts = [{ source = "/a", destination = "/b", mode = "w" }]', 2, "mounts[0].mode", ['"ro", "rw"']),
        ('[[profiles.x.mounts]]\nsource = "/a"\ndestination = "/a/.."', 4, "mounts[0].destination", ["'..'"]),
        ('mounts = [{ source = "/", destination = "/b" }]', 2, "mounts[0].source", ["machine itself"]),
        ('mounts = [{ source = "/proc/1", destination = "/b" }]', 2, "mounts[0].source", ["machine itself"]),
        (
            'mounts = [\n{ source = "/a", destination = "/c" },\n{ source = "/b", destination = "/c/" }]',
            4,
            "mounts[1].destination",
            ["given twice"],
        ),
        (
            'workspace = "ro"\nmounts = [{ source = "/a", destination = "/home/jovyan/work/a" }]',
            3,
            "mounts[0].destination",
            ["workspace"],
        ),
    ],
)
def test_a_wrong_value_names_file_line_key_value_and_what_is_allowed(
    places: Places, body: str, line: int, key: str, words: list[str]
) -> None:
    problem = places.problem(f"[profiles.x]\n{body}\n")
    assert (problem.file, problem.line, problem.key) == (str(places.profiles), line, f"profiles.x.{key}")
    assert str(problem).startswith(f"{places.profiles}:{line}: profiles.x.{key}: ")
    for word in words:
        assert word in problem.message


@pytest.mark.parametrize(
    "destination",
    [
        "/",
        "/proc",
        "/proc/x",
        "/dev/shm",
        "/sys",
        "/opt",
        "/opt/agent",
        "/opt/agent/lib",
        "/run",
        "/run/kernel",
        "/etc",
        "/usr",
        "/home",
        "/home/jovyan",
        "//data",
        "/data/./x",
        "/lib/",
    ],
)
def test_a_mount_cannot_cover_what_the_sandbox_needs(places: Places, destination: str) -> None:
    problem = places.problem(f'[profiles.x]\nmounts = [{{ source = "/a", destination = "{destination}" }}]\n')
    assert problem.key == "profiles.x.mounts[0].destination" and problem.value == f'"{destination}"'


@pytest.mark.parametrize(
    "destination", ["/data", "/opt/data", "/usr/share/data", "/home/jovyan/data", "/home/jovyan/work"]
)
def test_a_mount_may_be_anywhere_else(places: Places, destination: str) -> None:
    text = f'[profiles.x]\nmounts = [{{ source = "/a", destination = "{destination}" }}]\n'
    assert places.load(text).get("x").mounts[0].destination == destination


def test_a_mount_cannot_open_what_the_product_stores_not_even_by_a_symbolic_link(
    places: Places, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(places.home)
    for source in (places.home, places.home / "layers", tmp_path / "link"):
        problem = places.problem(f'[profiles.x]\nmounts = [{{ source = "{source}", destination = "/b" }}]\n')
        assert problem.key == "profiles.x.mounts[0].source" and "own data" in problem.message


def test_all_problems_of_a_file_are_listed_in_order(places: Places) -> None:
    error = places.wrong('[profiles.a]\ncpu = 0\nmemory = "x"\n[profiles.b]\nworkspce = "rw"\n')
    assert [(item.line, item.key) for item in error.problems] == [
        (2, "profiles.a.cpu"),
        (3, "profiles.a.memory"),
        (5, "profiles.b.workspce"),
    ]
    assert len(error.message.splitlines()) == 3
    assert [item["line"] for item in error.as_dict()["problems"]] == [2, 3, 5]


def test_all_semantic_problems_are_listed_too(places: Places) -> None:
    error = places.wrong('[profiles.b]\nlanguage = "R"\n[profiles.a]\nmemory = 5\ndisk = 5\n')
    assert [item.line for item in error.problems] == [2, 4, 5]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[profiles.x\n", 1, "TOML syntax"),
        ("[profiles.x]\ncpu = 1\ncpu = 2\n", 3, "overwrite"),
        ("[profiles.x]\nmemory = 2GiB\n", 2, "2GiB"),
        ('[profiles.x]\ndescription = """\nno end\n', 3, "TOML syntax"),
        ('[profiles.x]\ndescription = "no end', 2, "TOML syntax"),
        ("[profiles.x]\ncpu =", 2, "TOML syntax"),
        (b"[profiles.x]\nenvironment = { A = '\xff' }\n", 2, "not UTF-8"),
        ("[profiles.x]\nargv = " + "[" * 2000 + "]" * 2000 + "\n", 1, "nested too deeply"),
        ("[profiles.x]\ncpu = " + "9" * 5000 + "\n", 1, "TOML syntax"),
        (b"#" * (1024 * 1024 + 1), 1, "longer than"),
    ],
)
def test_a_file_that_is_not_toml_names_the_line(places: Places, text: str | bytes, line: int, words: str) -> None:
    problem = places.problem(text)
    assert problem.line == line and words in problem.message


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("profiles = 3\n", "profiles", "[profiles.NAME]"),
        ("[profiles]\nx = 3\n", "profiles.x", "a table"),
        ("[profile.x]\n", "profile", "did you mean 'profiles'?"),
        ('[profiles."My Profile"]\n', 'profiles."My Profile"', "lower-case"),
        ("[profiles.Big]\n", "profiles.Big", "lower-case"),
        ('[profiles.".."]\n', 'profiles.".."', "beginning with a letter or digit"),
    ],
)
def test_a_wrong_table_or_name_is_named(places: Places, text: str, key: str, words: str) -> None:
    problem = places.problem(text)
    assert problem.key == key and words in problem.message


def test_a_file_that_cannot_be_read_says_so(places: Places) -> None:
    places.profiles.mkdir()
    with pytest.raises(ProfileError, match="cannot be read"):
        load_profiles(places)


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(places: Places) -> None:
    assert "x" in places.load(b"\xef\xbb\xbf[profiles.x]\r\ncpu = 1\r\n")
    assert places.problem(b"\xef\xbb\xbf[profiles.x]\r\ncpu = 0\r\n").line == 2


def test_a_profile_as_json_is_plain_values(places: Places) -> None:
    import json

    data = (
        places.load('[profiles.x]\nmounts = [{ source = "/a", destination = "/b" }]\nidle.pause = 5\n')
        .get("x")
        .as_dict()
    )
    assert json.loads(json.dumps(data)) == data
    assert data["mounts"] == [{"source": "/a", "destination": "/b", "mode": "ro"}] and data["idle"]["pause"] == 5
    assert data["preload"] == [] and data["pool"] == {"created": 0, "ready": 0, "max_age": 3600.0}
