"""Kernels from templates: nobody's before, one's own after (DESIGN 4.4, 4.5, invariant 6)."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from acceptance import FILES_KERNEL, KERNEL
from templating import Driver, holds

from sandbox_gateway import standby
from sandbox_gateway.runtimes.gvisor_bundle import RUN_SIZE
from sandbox_gateway.snapshots import Kind

CLONES = 20
DRAWN = """
import os, random, secrets, socket, ssl, tempfile, uuid
found = {
    "random": random.random(),
    "randint": random.getrandbits(64),
    "uuid4": str(uuid.uuid4()),
    "uuid1": str(uuid.uuid1()),
    "secrets": secrets.token_hex(),
    "urandom": os.urandom(16),
    "openssl": ssl.RAND_bytes(32),
    "temporary": next(tempfile._get_candidate_names()),
    "hostname": socket.gethostname(),
    "id": os.environ["SANDBOX_ID"],
    "mine": os.environ["CANARY"],
    "session": get_ipython().kernel.session.session,
    "ident": get_ipython().kernel.ident,
    "key": get_ipython().kernel.session.key,
}
try:
    import numpy
except ImportError:
    pass
else:
    found["numpy"] = numpy.random.rand()
    found["numpy2"] = numpy.random.default_rng().random()
print({name: value if isinstance(value, (str, bytes)) else float(value) for name, value in found.items()})
"""


async def test_a_kernel_from_a_template_looks_like_one_that_was_just_booted(driver: Driver, tmp_path: Path) -> None:
    kernel = await driver.warm(driver.profile(KERNEL), tmp_path)
    assert kernel.sandbox.record.notes == () or "cold" not in " ".join(kernel.sandbox.record.notes)
    reply = await kernel.execute(
        "print((_, __, ___, len(In), Out, _ih[:-1], _oh, _dh == [__import__('pathlib').Path.cwd()]))"
    )
    assert reply["execution_count"] == 1
    assert reply["text"] == "('', '', '', 2, {}, [''], {}, True)\n"
    assert await kernel.value("import sys; print((sys.argv[1:2], __name__))") == (["-f"], "__main__")
    history = "print([line for *_, line in get_ipython().history_manager.get_range(raw=True)][:1])"
    assert "len(In)" in (await kernel.value(history))[0]
    now = await kernel.value("import time; print((time.time(), time.monotonic()))")
    assert abs(now[0] - time.time()) < 5
    assert await kernel.value("import os; print((os.getcwd(), os.environ['HOME']))") == ("/home/jovyan", "/home/jovyan")


async def test_clones_of_a_template_differ_in_all_that_is_drawn_or_named(driver: Driver, tmp_path: Path) -> None:
    profile = driver.profile(KERNEL, client_environment=("CANARY",), preload=("numpy",))
    await driver.end(await driver.warm(profile, tmp_path))
    drawn: list[dict[str, object]] = []
    for first in range(0, CLONES, 5):
        some = [driver.warm(profile, tmp_path, {"CANARY": f"value-{first + n}"}) for n in range(5)]
        kernels = await asyncio.gather(*some)
        for kernel in kernels:
            values = await kernel.value(DRAWN)
            assert values["id"] == kernel.sandbox.id
            assert values["key"] == kernel.seat.key
            drawn.append(values)
        for kernel in kernels:
            await driver.end(kernel)
    for name in drawn[0]:
        assert len({str(values[name]) for values in drawn}) == CLONES, name


async def test_no_value_of_one_caller_is_in_a_template_or_in_anothers_memory(driver: Driver, tmp_path: Path) -> None:
    canaries = [f"canary-{os.urandom(12).hex()}" for _ in range(3)]
    profile = driver.profile(
        KERNEL, client_environment=("SECRET",), environment={"ADMIN_SECRET": canaries[2]}, preload=("json.tool",)
    )
    first = await driver.warm(profile, tmp_path, {"SECRET": canaries[0]})
    assert await first.value("import os; print(repr(os.environ['SECRET']))") == canaries[0]
    second = await driver.warm(profile, tmp_path, {"SECRET": canaries[1]})
    template = await driver.template(profile, tmp_path)
    assert template.manifest.kind is Kind.TEMPLATE
    assert await second.value("import os; print(repr((os.environ['SECRET'], os.environ['ADMIN_SECRET'])))") == (
        canaries[1],
        canaries[2],
    )
    saved = await second.sandbox.save(Kind.SAVED)
    try:
        assert holds(saved, canaries[1].encode()), "the search finds what is there"
        for name, text in (("environment", canaries[0]), ("key", first.seat.key.decode())):
            assert holds(saved, text.encode()) == [], f"the other caller's {name}"
        everybodys = [*canaries, first.seat.key.decode(), second.seat.key.decode(), first.sandbox.id]
        assert [text for text in everybodys if holds(template, text.encode())] == []
    finally:
        driver.lifecycle.snapshots.remove(saved.id)


async def test_a_kernel_that_opens_a_folder_finds_it_and_is_in_it(driver: Driver, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "data.txt").write_text("of the host")
    (tmp_path / "module.py").write_text("answer = 42")
    profile = driver.profile(FILES_KERNEL)
    kernel = await driver.warm(profile, tmp_path)
    template = await driver.template(profile, tmp_path)
    assert template.manifest.workspace == ()
    told = await kernel.value(
        "import os, module; print((os.getcwd(), sorted(os.listdir()), open('sub/data.txt').read(), module.answer))"
    )
    assert told == ("/home/jovyan/work", ["__pycache__", "module.py", "sub"], "of the host", 42)
    await kernel.execute("open('written.txt', 'w').write('by the kernel')")
    assert (tmp_path / "written.txt").read_text() == "by the kernel"
    assert (tmp_path / "written.txt").stat().st_uid == tmp_path.stat().st_uid


async def test_what_only_acts_at_the_start_is_never_taken_and_ignored(driver: Driver, tmp_path: Path) -> None:
    profile = driver.profile(KERNEL, client_environment=("PYTHON*", "LD_*", "HARMLESS"))
    await driver.template(profile, tmp_path)
    for name, value in (("PYTHONHASHSEED", "123"), ("LD_BIND_NOW", "1")):
        kernel = await driver.start(profile, tmp_path, {name: value})
        assert not kernel.warm
        assert any(name in note and value not in note for note in kernel.sandbox.record.notes)
        assert await kernel.value(f"import os; print(repr(os.environ[{name!r}]))") == value
        await driver.end(kernel)
    await driver.warm(profile, tmp_path, {"HARMLESS": "1"})
    # Of the profile itself, it belongs to the key.
    seeded = replace(profile, environment={"PYTHONHASHSEED": "7"})
    kernel = await driver.warm(seeded, tmp_path)
    assert await kernel.value("import sys; print((sys.flags.hash_randomization, hash('a') == hash('a')))") == (1, True)


async def test_template_false_starts_cold_and_says_so(driver: Driver, tmp_path: Path) -> None:
    kernel = await driver.start(driver.profile(KERNEL, template=False), tmp_path)
    assert not kernel.warm
    assert any("template = false" in note for note in kernel.sandbox.record.notes)
    assert await kernel.value("print(6 * 7)") == 42


async def test_modules_are_imported_already_and_one_that_is_missing_is_told(driver: Driver, tmp_path: Path) -> None:
    profile = driver.profile(KERNEL, preload=("decimal", "no_such_module"))
    plan = await driver.plan(profile, tmp_path)
    await driver.lifecycle.templates.build(plan)
    record = driver.lifecycle.templates.records.get(plan.key.digest)
    assert record is not None and "no_such_module" in record.preload_failed
    kernel = await driver.start(profile, tmp_path)
    assert await kernel.value("import sys; print(('decimal' in sys.modules, 'decimal' in globals()))") == (True, False)


async def test_a_template_knows_few_of_the_files_that_its_modules_came_from(driver: Driver, tmp_path: Path) -> None:
    """gVisor's part of the snapshot may have the names of all files that were looked at (one that we have built forgets
    those that are closed). What is imported later has them."""
    profile = driver.profile(KERNEL, preload=("json.tool",))
    template = await driver.template(profile, tmp_path)
    bytecode = f".cpython-{sys.version_info[0]}{sys.version_info[1]}.pyc".encode()
    for name in (b"displayhook", b"kernelapp", b"traitlets"):
        assert holds(template, name + bytecode) == ["image/pages.img"], name
    kernel = await driver.warm(profile, tmp_path)
    code = "import json.tool, IPython.core.displayhook as one, inspect\n"
    code += (
        "print((one.__file__, one.__spec__.cached, type(one.__loader__).__name__, len(inspect.getsource(one)) > 999))"
    )
    file, cached, loader, source = await kernel.value(code)
    assert file.endswith("/IPython/core/displayhook.py") and cached.endswith("displayhook" + bytecode.decode())
    assert (loader, source) == ("SourceFileLoader", True)
    assert await kernel.value("import xml.dom.pulldom as new; print(repr(new.__file__))")


@pytest.mark.parametrize(
    ("told", "preload"),
    [(None, "sched"), (b"garbage" * 1000, "shelve"), (bytes(RUN_SIZE + 1), "tabnanny")],
    ids=["nothing", "garbage", "more-than-there-is-room-for"],
)
async def test_whatever_the_first_kernel_tells_of_its_imports_there_is_a_template(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bytes | None, preload: str
) -> None:
    async def tells(*_: object) -> bytes | None:
        return told

    monkeypatch.setattr(standby, "imported", tells)
    profile = driver.profile(KERNEL, preload=(preload,))
    kernel = await driver.warm(profile, tmp_path)
    code = f"import os, sys; print(({preload!r} in sys.modules, os.path.exists('/run/kernel/modules')))"
    assert await kernel.value(code) == (True, False)


async def test_a_template_that_no_longer_fits_is_built_again_and_the_old_one_goes(
    driver: Driver, tmp_path: Path
) -> None:
    before = driver.profile(KERNEL, preload=("wave",))
    old = await driver.template(before, tmp_path)
    after = replace(before, preload=("wave", "mailbox"))
    new = await driver.template(after, tmp_path)
    kept = {snapshot.id for snapshot in driver.lifecycle.snapshots.list()}
    assert new.id in kept and old.id not in kept
    keys = {record.key for record in driver.lifecycle.templates.records.list()}
    assert new.manifest.template_key in keys and old.manifest.template_key not in keys


async def test_beside_a_cold_start_the_template_is_built_for_the_next(driver: Driver, tmp_path: Path) -> None:
    profile = driver.profile(KERNEL, preload=("colorsys",))
    driver.lifecycle.templates._delay = 0.0
    first = await driver.start(profile, tmp_path)
    assert not first.warm
    assert any("not built yet" in note for note in first.sandbox.record.notes)
    worker = driver.lifecycle.templates._worker
    assert worker is not None
    await asyncio.wait_for(worker, 60)
    assert (await driver.start(profile, tmp_path)).warm
    assert [record for record in driver.lifecycle.store.list() if record.blank] == []


async def test_a_damaged_template_gives_a_cold_start_and_is_built_again(driver: Driver, tmp_path: Path) -> None:
    profile = driver.profile(KERNEL, preload=("sched",))
    driver.lifecycle.templates._delay = 0.0
    template = await driver.template(profile, tmp_path)
    pages = max((path for path in template.image.iterdir()), key=lambda path: path.stat().st_size)
    with open(pages, "r+b") as file:
        file.truncate(pages.stat().st_size // 2)
    kernel = await driver.start(profile, tmp_path)
    assert not kernel.warm
    assert any("its template failed" in note and "truncated" in note for note in kernel.sandbox.record.notes)
    assert await kernel.value("print(6 * 7)") == 42
    assert template.id not in {snapshot.id for snapshot in driver.lifecycle.snapshots.list()}
    worker = driver.lifecycle.templates._worker
    assert worker is not None
    await asyncio.wait_for(worker, 60)
    assert (await driver.start(profile, tmp_path)).warm


async def test_a_template_whose_kernel_does_not_answer_is_given_up_at_the_second_time(
    driver: Driver, tmp_path: Path
) -> None:
    profile = driver.profile(KERNEL, preload=("shelve",))
    template = await driver.template(profile, tmp_path)
    plan = await driver.plan(profile, tmp_path)
    driver.lifecycle.templates._closed = True  # nothing is built beside it
    records = driver.lifecycle.templates.records
    launch = {**template.manifest.launch}
    assert launch["key"] not in {"", None}
    for times in (1, 2):
        kernel_or_none = await _with_a_deaf_agent(driver, profile, tmp_path)
        assert not kernel_or_none
        record = records.get(plan.key.digest)
        assert record is not None
        assert (record.snapshot is None, record.suspicions) == ((False, 1) if times == 1 else (True, 0))
    assert template.id not in {snapshot.id for snapshot in driver.lifecycle.snapshots.list()}


async def _with_a_deaf_agent(driver: Driver, profile: object, folder: Path) -> bool:
    """Start a kernel while no identity is taken; whether it came from the template."""
    from sandbox_gateway.errors import SandboxGatewayError
    from sandbox_gateway.link.host import Link

    answer = Link.call

    async def call(self: Link, op: str, **params: object) -> dict[str, object]:
        if op == "identify":
            raise SandboxGatewayError("timeout", "the agent did not answer")
        return await answer(self, op, **params)  # type: ignore[arg-type]

    Link.call = call  # type: ignore[method-assign, assignment]
    try:
        kernel = await driver.start(profile, folder)  # type: ignore[arg-type]
    finally:
        Link.call = answer  # type: ignore[method-assign]
    assert await kernel.value("print(6 * 7)") == 42
    warm = kernel.warm
    await driver.end(kernel)
    return warm
