"""``python -m bench [--quick]``: the sandboxed kernel beside the plain one."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.density import density
from bench.frontend import frontend
from bench.kernels import BenchError, start
from bench.measures import FULL, QUICK, bursts, idle, machine, starts, throughput
from bench.report import table, write
from bench.serving import served
from bench.sleeping import forks, naps, states
from sandbox_gateway.background import background_loop

MEASURES = (starts, bursts, throughput, served, naps, forks, states, idle)
ON_REQUEST = (density, frontend)
"""Measures that are taken only where ``--only`` names them."""
QUIET = 0.7
"""Load of the last minute above which other work would be in the figures."""
PATIENCE = 300.0
"""Seconds to wait for a quiet machine: the load of what has just ended fades in one or two minutes."""
DOCS = Path(__file__).resolve().parent.parent / "docs" / "bench"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer samples: a look, not a result to keep")
    parser.add_argument("--plain", default="python3", help="kernelspec of the reference (default: %(default)s)")
    parser.add_argument("--sandboxed", default="python3-gvisor", help="kernelspec measured (default: %(default)s)")
    parser.add_argument("--only", action="append", choices=[measure.__name__ for measure in (*MEASURES, *ON_REQUEST)])
    parser.add_argument("--busy", action="store_true", help="measure beside other work, too: compare nothing with that")
    parser.add_argument("--check", action="store_true", help="exit status 1 when a target of the issue is missed")
    parser.add_argument(
        "--output", type=Path, help="folder for latest.json and latest.svg (default: docs/bench; none with --quick)"
    )
    return parser.parse_args()


def _say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def _quiet() -> None:
    """Return when nothing else runs here; raises :class:`BenchError` when that does not come to pass."""
    end, told = time.monotonic() + PATIENCE, False
    while (load := os.getloadavg()[0]) > QUIET:
        if time.monotonic() > end:
            text = f"other work is running (load {load:.1f}); end it, or measure beside it with --busy"
            raise BenchError(text)
        if not told:
            _say(f"waiting for a quiet machine (load {load:.1f}, to be {QUIET} at most)")
            told = True
        time.sleep(2)


PROFILES = """
[profiles.bench-cold]
template = false

[profiles.bench-preloaded]
preload = ["numpy", "pandas", "matplotlib.pyplot"]

[profiles.bench-pool]
pool = { ready = 1 }
"""
"""What is measured beside the default profile: no template, modules imported beforehand, a kernel that stands ready."""


def _install(folder: Path) -> None:
    """An installation of this run's own, with the runsc that the user has and all profiles as kernelspecs."""
    from sandbox_gateway.host.paths import discover
    from sandbox_gateway.host.setup import find_runsc

    runsc = find_runsc(discover(), os.environ)
    home, prefix = folder / "home", folder / "prefix"
    home.mkdir(mode=0o700)
    (home / "profiles.toml").write_text(PROFILES)
    os.environ["SANDBOX_GATEWAY_HOME"] = str(home)
    os.environ["JUPYTER_PATH"] = os.pathsep.join(
        filter(None, [str(prefix / "share" / "jupyter"), os.environ.get("JUPYTER_PATH", "")])
    )
    for arguments in (["setup", *(["--from", str(runsc)] if runsc else [])], ["install", "--prefix", str(prefix)]):
        done = subprocess.run(
            [sys.executable, "-m", "sandbox_gateway.cli", *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise BenchError(f"jupyter sandbox {arguments[0]}: {done.stderr.strip()}")


def main() -> int:
    """Run the measures; returns the exit status."""
    arguments = _arguments()
    plan = QUICK if arguments.quick else FULL
    names = {"plain": arguments.plain, "sandboxed": arguments.sandboxed}
    about = machine()
    measures = []
    with tempfile.TemporaryDirectory(prefix="sgb-", dir="/tmp") as folder:
        os.environ["IPYTHONDIR"] = str(Path(folder) / "ipython")
        try:
            if not (arguments.quick or arguments.busy):
                _quiet()
                about = machine()
            _say("an installation for this run, with its image and templates")
            _install(Path(folder))
            for name in names.values():  # fills the page cache
                _say(f"warming up {name}")
                start(name).stop()
            for measure in (*MEASURES, *ON_REQUEST):
                if measure.__name__ in (arguments.only or [default.__name__ for default in MEASURES]):
                    measures += measure(names, plan, _say)
        except BenchError as error:
            sys.stderr.write(f"bench: {error}\n")
            return 2
        finally:
            background_loop().stop()
    about["load_after"] = [round(value, 2) for value in os.getloadavg()]
    sys.stdout.write(table(measures) + "\n")
    output = arguments.output or (None if arguments.quick or arguments.only else DOCS)
    if output is not None:
        for path in write(measures, about, arguments.quick, output):
            _say(f"wrote {path}")
    missed = [m.name for m in measures if m.met is False and m.target_from == "issue"]
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
