#!/bin/sh
# What pip cannot bring: a Python that can make virtual environments (Debian ships venv apart) and, with the second
# argument `test`, a browser for the tests. Installs it with apt where it may; otherwise says what is missing and what
# to do. Without the browser its tests are skipped, which is no failure.
set -u
python=${1:?the Python interpreter to look at}
wanted=${2:-run}

if [ "$(id -u)" -eq 0 ]; then as_root=
elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then as_root=sudo
else as_root=none
fi

install() { # package; on failure, why holds the reason
    if ! command -v apt-get >/dev/null 2>&1; then
        why="this machine has no apt-get"
        return 1
    elif [ "$as_root" = none ]; then
        why="installing it needs root, or sudo without a password"
        return 1
    fi
    echo "setup: installing the system package $1"
    # A fresh image has no package lists, an old one stale ones: refresh them first.
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq update >/dev/null \
        || echo "setup: apt-get update failed; trying with the lists at hand" >&2
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$1" >/dev/null \
        || { why="apt-get could not install it"; return 1; }
}

if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    # The package of exactly this Python: on machines with several, plain python3-venv is that of another one.
    package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    if ! install "$package"; then
        echo "setup: $python cannot make virtual environments: $package is missing, and $why." >&2
        echo "setup: install it, or name another interpreter: make setup PYTHON=/path/to/python3" >&2
        exit 1
    fi
fi

if [ "$wanted" = test ] && [ -z "${SANDBOX_TEST_CHROMIUM:-}" ]; then
    for name in chromium chromium-browser google-chrome; do
        command -v "$name" >/dev/null 2>&1 && exit 0
    done
    install chromium || echo "test: no Chromium here, and $why: the tests that drive JupyterLab's page are skipped" >&2
fi
exit 0
