#!/bin/sh
# The one thing that pip cannot bring: a Python that can make virtual environments (Debian ships venv apart).
# Installs it with apt where it may; otherwise says what is missing and what to do.
set -u
python=${1:?the Python interpreter to look at}

"$python" -c 'import ensurepip, venv' 2>/dev/null && exit 0

# The package of exactly this Python: on machines with several, plain python3-venv is that of another one.
package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
if [ "$(id -u)" -eq 0 ]; then as_root=
elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then as_root=sudo
else as_root=none
fi

if ! command -v apt-get >/dev/null 2>&1; then
    why="this machine has no apt-get"
elif [ "$as_root" = none ]; then
    why="installing it needs root, or sudo without a password"
else
    echo "setup: installing the system package $package"
    # A fresh image has no package lists, an old one stale ones: refresh them first.
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq update >/dev/null \
        || echo "setup: apt-get update failed; trying with the lists at hand" >&2
    if $as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$package" >/dev/null; then
        exit 0
    fi
    why="apt-get could not install it"
fi

echo "setup: $python cannot make virtual environments: $package is missing, and $why." >&2
echo "setup: install it, or name another interpreter: make setup PYTHON=/path/to/python3" >&2
exit 1
