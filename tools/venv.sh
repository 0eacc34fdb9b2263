#!/bin/sh
# Make a virtual environment: tools/venv.sh PYTHON DIRECTORY
#
# Debian and Ubuntu ship python3 without ensurepip, so that `python3 -m venv` fails there until the package pythonX.Y-venv
# is installed. This script installs it (as root, or through sudo) and says so; elsewhere it stops with the reason.
set -eu

python=$1
directory=$2

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

require_python() {
    command -v "$python" >/dev/null 2>&1 ||
        fail "there is no '$python' here; name a Python 3.11 or later: make PYTHON=/path/to/python3"
    found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "'$python' does not run"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "bulkhead needs Python 3.11 or later and '$python' is $found; name another: make PYTHON=/path/to/python3.11"
}

has_ensurepip() {
    "$python" -c 'import ensurepip, venv' >/dev/null 2>&1
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null 2>&1; then
        sudo "$@"
    else
        fail "'$python' cannot make virtual environments; as root: apt-get install python$found-venv"
    fi
}

install_ensurepip() {
    command -v apt-get >/dev/null 2>&1 ||
        fail "'$python' has no ensurepip, which 'python -m venv' needs; install it, or name another: make PYTHON=..."
    echo "'$python' cannot make virtual environments yet: installing python$found-venv"
    as_root apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "python$found-venv"
    has_ensurepip || fail "'$python' still has no ensurepip after installing python$found-venv; name another: make PYTHON=..."
}

clear_directory() {
    [ ! -e "$directory" ] || [ -f "$directory/pyvenv.cfg" ] ||
        fail "'$directory' exists and is not a virtual environment; name another: make VENV=..."
    rm -rf "$directory"
}

require_python
clear_directory
has_ensurepip || install_ensurepip
"$python" -m venv "$directory"
