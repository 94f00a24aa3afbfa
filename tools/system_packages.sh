#!/bin/sh
# The two things that pip cannot bring: a Python that can make virtual environments, and mkfs.erofs.
# Installs what is missing with apt where it may; otherwise says what is missing and what that costs, and goes on.
set -u
python=${1:?the Python interpreter to look at}

needed=
"$python" -c 'import ensurepip, venv' 2>/dev/null || needed="$needed python3-venv"
command -v mkfs.erofs >/dev/null 2>&1 || [ -x /usr/sbin/mkfs.erofs ] || needed="$needed erofs-utils"
[ -n "$needed" ] || exit 0

if [ "$(id -u)" -eq 0 ]; then as_root=
elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then as_root=sudo
else as_root=none
fi

if ! command -v apt-get >/dev/null 2>&1; then
    why="this machine has no apt-get"
elif [ "$as_root" = none ]; then
    why="installing them needs root, or sudo without a password"
else
    echo "setup: installing system packages:$needed"
    # An old package list fails on the first try of a fresh image: refresh it once, then install.
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq update >/dev/null || echo "setup: apt-get update failed; trying with the lists at hand"
    # shellcheck disable=SC2086  # a list of words, split on purpose
    if $as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $needed >/dev/null; then
        exit 0
    fi
    why="apt-get could not install them"
fi

echo "setup: missing system packages:$needed ($why)" >&2
case $needed in
    *python3-venv*)
        echo "setup: without python3-venv (or a Python with ensurepip) there is no virtual environment: install it, or name" \
             "another interpreter with 'make setup PYTHON=/path/to/python3'" >&2
        exit 1 ;;
esac
echo "setup: going on without erofs-utils: kernels start from a live read-only view of the environment, which is slower" >&2
