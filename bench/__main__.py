"""``python -m bench [--quick]``: the sandboxed kernel beside the plain one."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

from bench.kernels import BenchError, start
from bench.measures import FULL, MEASURES, QUICK, machine
from bench.report import table, write

DOCS = Path(__file__).resolve().parent.parent / "docs" / "bench"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer samples: a look, not a result to keep")
    parser.add_argument("--plain", default="python3", help="kernelspec of the reference (default: %(default)s)")
    parser.add_argument("--sandboxed", default="python3-gvisor", help="kernelspec measured (default: %(default)s)")
    parser.add_argument("--only", action="append", choices=[measure.__name__ for measure in MEASURES])
    parser.add_argument("--check", action="store_true", help="exit status 1 when a target of the issue is missed")
    parser.add_argument(
        "--output", type=Path, help="folder for latest.json and latest.svg (default: docs/bench; none with --quick)"
    )
    return parser.parse_args()


def _say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def _install(prefix: Path, name: str) -> None:
    """Make sure that the kernelspec is there: in this user's places, else in a prefix of this run."""
    try:
        KernelSpecManager().get_kernel_spec(name)
        return
    except NoSuchKernel:
        pass
    done = subprocess.run(
        [sys.executable, "-m", "sandbox_gateway.cli", "install", "--prefix", str(prefix)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BenchError(f"cannot install the kernelspecs: {done.stderr.strip()}")
    os.environ["JUPYTER_PATH"] = os.pathsep.join(
        filter(None, [str(prefix / "share" / "jupyter"), os.environ.get("JUPYTER_PATH", "")])
    )


def main() -> int:
    """Run the measures; returns the exit status."""
    arguments = _arguments()
    plan = QUICK if arguments.quick else FULL
    names = {"plain": arguments.plain, "sandboxed": arguments.sandboxed}
    about = machine()
    measures = []
    with tempfile.TemporaryDirectory(prefix="sandbox-bench-") as folder:
        os.environ["IPYTHONDIR"] = str(Path(folder) / "ipython")
        try:
            _install(Path(folder), arguments.sandboxed)
            for name in names.values():  # builds the image, fills the page cache
                _say(f"warming up {name}")
                start(name).stop()
            for measure in MEASURES:
                if not arguments.only or measure.__name__ in arguments.only:
                    measures += measure(names, plan, _say)
        except BenchError as error:
            sys.stderr.write(f"bench: {error}\n")
            return 2
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
