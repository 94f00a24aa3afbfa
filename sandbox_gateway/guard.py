"""What runs when a client starts our kernelspec by itself: nothing but an explanation.

Some clients read ``argv`` from a kernelspec and start it without asking for its provisioner. The command of our
kernelspecs would then run outside of any sandbox under a name that promises one (DESIGN 4.12: no sandbox, no kernel).
So they begin with this module, which refuses; the provisioner takes it off before the command goes into a sandbox.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

MODULE = "sandbox_gateway.guard"


def wrap(argv: Sequence[str]) -> tuple[str, ...]:
    """The command for a kernelspec: it refuses when it is run as it stands."""
    return (sys.executable, "-m", MODULE, *argv)


def unwrap(argv: Sequence[str]) -> tuple[str, ...]:
    """The command to run inside; one that is not wrapped is given back unchanged."""
    return tuple(argv[3:]) if tuple(argv[1:3]) == ("-m", MODULE) else tuple(argv)


def main() -> int:
    """Refuse, in words that a client shows its user."""
    sys.stderr.write(
        "error: this kernel runs in a sandbox only, and this client started it without one\n"
        "hint: use a client that starts kernels through jupyter_client's provisioners or a Jupyter server "
        "(JupyterLab, nbclient, papermill, jupyter console; in VS Code choose an existing Jupyter server)\n"
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
