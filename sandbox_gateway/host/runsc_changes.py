"""What is changed in gVisor's sources for a build of ours.

The files of ``gvisor_build/`` are added to its packages, and called by edits of a line or two. Each makes starts and
restores quicker, changes nothing that a sandbox may do, and says how; an edit that calls none of them says so here.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from sandbox_gateway.errors import SandboxGatewayError

FOLDER = Path(__file__).parent / "gvisor_build"
"""What is added, and the compiler of filters that :mod:`~sandbox_gateway.host.runsc_build` runs."""

_STATE = "pkg/state"
_WIRE = "pkg/state/wire"
_BOOT = "runsc/cmd/sentry/sentrycmd"
_SETUP = "runsc/cmd/sandboxsetup"
_SYSTRAP = "pkg/sentry/platform/systrap"

ADDED = {
    "gc.go": "runsc",
    "reads.go": "pkg/sentry/state/stateio",
    "dentries.go": "pkg/sentry/fsimpl/erofs",
    "octets.go": _STATE,
    "objects.go": _STATE,
    "buffer.go": "pkg/compressio",
    "ahead.go": _WIRE,
    "in_place.go": _BOOT,
    "threads.go": _SETUP,
    "cpuid.go": "pkg/cpuid",
}
"""Package of gVisor's that each file is added to."""


@dataclass(frozen=True)
class Edit:
    """Text of a file of gVisor's, which has it once, and what it becomes."""

    file: str
    before: str
    after: str


def _in_front(file: str, place: str, added: str) -> Edit:
    return Edit(file, place, added + place)


def _slab(name: str, kind: str, slab: str) -> Edit:
    """What is loaded is one of a slab's."""
    before = f"\t{name} := load{kind}(r)\n\treturn &{name}\n"
    after = f"\t{name} := &r.{slab}.take(1)[0]\n\t*{name} = load{kind}(r)\n\treturn {name}\n"
    return Edit(f"{_WIRE}/wire.go", before, after)


_TIMED = "\t\tencoded: encoded,\n\t}\n"
_DECODED = "\t\t\t\t\tds.decodeObject(ods, ods.obj, encoded)\n"
_DEFERRED = "\t\t\t\t\tds.deferred[id] = encoded\n"
_LOADED = "\t\tds.Load(reflect.ValueOf(rootPtr).Elem())\n\t})\n"

_READING = (
    Edit(
        "pkg/sentry/state/stateio/pagesfile.go",
        "*FDReader {\n\treturn NewPagesFileFDReader(fd, pagesFileFDDefaultMaxIOBytes, pagesFileFDDefaultMaxParallel)",
        "AsyncReader {\n\treturn newMemoryReader(fd)",
    ),
)

_LOADING = (
    _in_front(
        f"{_STATE}/encode.go",
        "\tl := obj.Len()\n\ta := &wire.Array{",
        "\tif encodeOctets(obj, dest) {\n\t\treturn\n\t}\n",
    ),
    _in_front(
        f"{_STATE}/decode.go",
        "\tswitch x := encoded.(type) {\n\tcase wire.Nil: // Fast path: first.\n",
        "\tif decodeOctets(obj, encoded) {\n\t\treturn\n\t}\n",
    ),
    # Two looks at the clock for each object, for statistics that nobody reads.
    Edit(f"{_STATE}/decode.go", f"{_TIMED}\tds.stats.start(ods.typ)\n\tdefer ds.stats.done()\n", _TIMED),
    Edit(
        f"{_STATE}/decode.go",
        "\tif ods.callbacks != nil && ods.typ != 0 {\n\t\tds.stats.start(ods.typ)\n\t\tdefer ds.stats.done()\n\t}\n",
        "",
    ),
    Edit(
        f"{_STATE}/decode.go",
        f"{_DECODED}\t\t\t\t}} else {{\n",
        f"{_DECODED}\t\t\t\t\tds.r.Drop()\n\t\t\t\t}} else {{\n",
    ),
    Edit(f"{_STATE}/decode.go", _DEFERRED, f"{_DEFERRED}\t\t\t\t\tds.r.Keep()\n"),
    _in_front(f"{_STATE}/decode.go", "\t// types is the type database.\n", "\tobjects\n\n"),
    Edit(
        f"{_STATE}/decode.go",
        "\tods := &objectDecodeState{\n\t\tid:  id,\n\t\tobj: obj,\n\t}\n",
        "\tods := ds.next()\n\tods.id, ods.obj = id, obj\n",
    ),
    Edit(f"{_STATE}/decode.go", "\tdefer origObj.Set(obj)\n", "\tdefer ds.setInterface(origObj, obj)\n"),
    Edit(f"{_STATE}/state.go", _LOADED, f"{_LOADED}\tds.r.Done()\n"),
    Edit(f"{_WIRE}/wire.go", "\tbuf [1]byte\n", "\tbuf [1]byte\n\tahead\n"),
    _in_front(
        f"{_WIRE}/wire.go",
        "\tvar (\n\t\tu Uint\n\t\ts uint\n\t)\n",
        "\tif u, ok := r.short(); ok {\n\t\treturn u\n\t}\n",
    ),
    Edit(
        f"{_WIRE}/wire.go",
        "\tn, err := r.Read(r.buf[:])\n\tif n != 1 {\n\t\tpanic(err)\n\t}\n\treturn r.buf[0]\n",
        "\treturn r.nextByte()\n",
    ),
    Edit(f"{_WIRE}/wire.go", "make(multipleObjects, l)\n\tfor", "r.list(l)\n\tfor"),
    _slab("m", "MultipleObjects", "lists"),
    _slab("ref", "Ref", "refs"),
    _slab("s", "Slice", "slices"),
    _slab("s", "Struct", "structs"),
    _slab("i", "Interface", "interfaces"),
)

_BEGINNING = (
    Edit(
        f"{_BOOT}/boot.go",
        "\t\tif !conf.Rootless {\n\t\t\t// /proc is umounted",
        "\t\tif !conf.Rootless && !b.inPlace(conf) {\n\t\t\t// /proc is umounted",
    ),
    Edit(f"{_BOOT}/boot.go", "sandboxsetup.ApplyCapsAllThreads(caps, timer)", "b.confine(conf, caps, timer)"),
    _in_front(
        f"{_BOOT}/boot.go",
        "\tif b.syncUsernsFD >= 0 {\n\t\t// syncUsernsFD is set, but",
        "\tif !b.applyCaps && b.inPlace(conf) {\n"
        "\t\tif err := b.confine(conf, &specs.LinuxCapabilities{}, timer); err != nil {\n"
        '\t\t\tutil.Fatalf("giving up capabilities: %v", err)\n'
        "\t\t}\n\t}\n",
    ),
    _in_front(
        f"{_BOOT}/boot.go",
        "\tif b.procMountSyncFD != -1 {\n\t\tl.PreSeccompCallback",
        "\tif descriptors != nil {\n\t\tl.PreSeccompCallback = func() { checkDescriptors(bootArgs.PassFDs) }\n\t}\n",
    ),
    Edit(f"{_SETUP}/caps_unsafe.go", "if r.haveSetPCap {", "if r.haveSetPCap && !noNewPrivileges() {"),
    Edit("pkg/cpuid/native_amd64.go", "Function: &Native{},", "Function: answered{},"),
    # The thousand points at which a sandbox can be traced are described where a trace asks for one, not at each start.
    Edit("runsc/boot/loader.go", "\tseccheck.Initialize()\n", ""),
    _in_front("pkg/sentry/seccheck/config.go", "\tif desc, ok := Points[name]; ok {", "\tInitialize()\n"),
    # Where a program has put a mapping at the very place: /proc/self/maps is out of reach by then, and 31 other places
    # are as good.
    Edit(f"{_SYSTRAP}/stub_unsafe.go", "\t\tif i == 0 { // fast path\n", "\t\tif i < 31 { // without /proc\n"),
    # The filters of the sandbox's own processes are computed at each start, since they hold a random address; to make
    # them shorter takes twice the time of that, and they allow the same without.
    *(
        Edit(f"{_SYSTRAP}/{file}", before, f"{before}\t\t\tSkipOptimizations: true,\n")
        for file, before in (
            ("subprocess_linux.go", "\t\t\tBadArchAction: defaultAction,\n"),
            ("sysmsg_thread.go", "\t\t\tBadArchAction: seccomp.Trap,\n"),
            ("sysmsg_thread.go", "\t\t\tBadArchAction: seccomp.Allow,\n"),
        )
    ),
)

EDITS = (*_READING, *_LOADING, *_BEGINNING)
"""In this order."""


@functools.cache
def recipe() -> str:
    """What is done to the sources, by one word; reads some files the first time."""
    added = (file.read_bytes() for file in sorted(FOLDER.glob("*.go")))
    return hashlib.sha256(b"\0".join([repr((ADDED, EDITS)).encode(), *added])).hexdigest()[:12]


def change(source: Path) -> None:
    """Change the sources in this folder; raises ``setup_failed`` where they are not as expected."""
    for edit in EDITS:
        file = source / edit.file
        text = file.read_text() if file.is_file() else ""
        if text.count(edit.before) != 1:
            hint = "`jupyter sandbox setup --file FILE` takes a runsc from elsewhere."
            raise SandboxGatewayError("setup_failed", f"gVisor's {file.name} is not as expected", hint)
        file.chmod(0o644)
        file.write_text(text.replace(edit.before, edit.after))
    for name, package in ADDED.items():
        shutil.copyfile(FOLDER / name, source / package / f"sandbox_gateway_{name}")
