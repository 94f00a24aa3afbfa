"""The soak: random steps on several kernels at once, and an exact model of what their clients must see.

``make soak N=2000 [SEED=..] [KERNELS=4]`` is the long run. In the suite it is bounded. The variables:
``SANDBOX_TEST_SOAK`` (suspend and resume cycles), ``SANDBOX_TEST_SOAK_SEED`` (repeats a run's choices),
``SANDBOX_TEST_SOAK_KERNELS``, ``SANDBOX_TEST_SOAK_SECONDS`` (an end by time), ``SANDBOX_TEST_SOAK_STOP`` (failures
at which it is given up), ``SANDBOX_TEST_SOAK_REPORT`` (a file for the figures, as JSON),
``SANDBOX_TEST_SOAK_WITHOUT`` (leave out steps with ``suspend``, ``pause``, ``fork``, ``connect``).
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from acceptance import KERNEL, Product, kernel, profile_kernelspec, until
from driver import Plan, World

LONG = "SANDBOX_TEST_SOAK" in os.environ
CYCLES = int(os.environ.get("SANDBOX_TEST_SOAK", "40"))
SECONDS = float(os.environ.get("SANDBOX_TEST_SOAK_SECONDS", "1e6" if LONG else "90"))
COMMANDS = frozenset({"suspend", "pause", "fork", "connect"})


@pytest.mark.timeout(900 + 20 * CYCLES)
def test_every_line_comes_once_and_in_order_whatever_is_done_to_the_kernels(
    product: Product, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = int(os.environ.get("SANDBOX_TEST_SOAK_SEED", random.randrange(10**6)))
    profiles = product.home / "profiles.toml"
    before = profiles.read_text()
    profiles.write_text(before + '\n[profiles.soak]\non_owner_exit = "keep"\n')
    others = product.ids()
    try:
        with profile_kernelspec(product, "soak") as keeping, capsys.disabled():
            plan = Plan(
                cycles=CYCLES,
                seed=seed,
                kernels=int(os.environ.get("SANDBOX_TEST_SOAK_KERNELS", "4")),
                specs=(keeping, KERNEL),
                seconds=SECONDS,
                stop_at=int(os.environ.get("SANDBOX_TEST_SOAK_STOP", "20" if LONG else "1")),
                features=COMMANDS - set(os.environ.get("SANDBOX_TEST_SOAK_WITHOUT", "").split(",")),
            )
            print(f"\nsoak: {CYCLES} cycles, seed {seed}, {plan.kernels} kernels", flush=True)
            world = World(product, plan, tmp_path)
            try:
                report = world.run()
            finally:
                world.close()
            print(f"soak, seed {seed}: {report.summary()}", flush=True)
    finally:
        profiles.write_text(before)
    if file := os.environ.get("SANDBOX_TEST_SOAK_REPORT"):
        Path(file).write_text(json.dumps({"seed": seed, **report.as_dict()}, indent=1))
    assert not report.failures, f"seed {seed}: {len(report.failures)} failures; the first:\n{report.failures[0]}"
    assert report.lines > 0
    assert product.ids() <= others
    halves = product.home / "snapshots"

    def half_done() -> list[str]:
        return [str(path) for path in halves.glob(".*") if path.name != ".lock"]

    with kernel(KERNEL):
        # What killed owners left half-way goes with the next start.
        until(lambda: not half_done(), 60, half_done)
    if not others:
        # The keeper ends when it owns nothing.
        until(lambda: not answering(product), 60, lambda: answering(product))


def answering(product: Product) -> list[str]:
    """The owners that answer still, this process excepted: the names of their sockets, and what they are."""
    found = []
    owners = product.home / "run" / "owners"
    for path in owners.iterdir() if owners.exists() else ():
        pid = path.name.split("-")[0]
        if pid != str(os.getpid()):
            arguments = Path("/proc", pid, "cmdline")
            found.append(f"{path.name}: {arguments.read_text()[:300] if arguments.exists() else 'gone'}")
    return found
