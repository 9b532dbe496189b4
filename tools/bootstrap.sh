#!/usr/bin/env bash
# Set-up behind every make target: finds Python 3.12 or newer and makes .venv with it.
# Returns at once when .venv/.setup-complete names this folder and the present set-up files.
# The work itself, with its lock and markers, is in setup_venv.py. PYTHON=... names an interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

sha() { if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi; }
key=$({ pwd -P; cat setup.py pyproject.toml tools/bootstrap.sh tools/setup_venv.py; } | sha)
key=${key%% *}
if [[ -x .venv/bin/python && "$(cat .venv/.setup-complete 2>/dev/null)" == "$key" ]]; then
    exit 0
fi

rejected=""
# Accepts an interpreter by running it: a pyenv shim can be on PATH and still fail.
works() {
    local answer
    command -v "$1" >/dev/null 2>&1 || return 1
    if ! answer=$("$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null </dev/null); then
        rejected+="  $1: does not run"$'\n'
    elif ! "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
        rejected+="  $1: is Python $answer"$'\n'
    elif ! "$1" -c 'import ctypes, ensurepip, ssl, venv' 2>/dev/null; then
        rejected+="  $1: Python $answer without venv, ensurepip, ssl or ctypes (Debian: apt install python${answer%.*}-venv)"$'\n'
    else
        return 0
    fi
    return 1
}

find_python() {
    local candidate pyenv_root=${PYENV_ROOT:-$HOME/.pyenv}
    if [[ -n "${PYTHON:-}" ]]; then
        works "$PYTHON" && echo "$PYTHON" && return 0
        rejected+="  (only PYTHON=$PYTHON was tried)"$'\n'
        return 1
    fi
    # 3.12 and 3.13 first: megatron-core has wheels for them; newer ones compile it.
    for candidate in python3.12 python3.13 python3 python \
        "$pyenv_root"/versions/3.12*/bin/python "$pyenv_root"/versions/3.13*/bin/python \
        /usr/local/bin/python3.1[23] /opt/homebrew/bin/python3.1[23] \
        "$HOME"/.local/share/uv/python/cpython-3.1[23]*/bin/python3 \
        python3.14 python3.15 "$pyenv_root"/versions/3.1[4-9]*/bin/python; do
        if works "$candidate"; then echo "$candidate"; return 0; fi
    done
    if command -v uv >/dev/null 2>&1; then
        candidate=$(uv python find --no-project '>=3.12' 2>/dev/null) ||
            { uv python install 3.12 >&2 && candidate=$(uv python find --no-project 3.12); } || true
        if works "$candidate"; then echo "$candidate"; return 0; fi
    fi
    return 1
}

found=$(mktemp)
trap 'rm -f "$found"' EXIT
if ! find_python >"$found"; then
    {
        echo "error: no usable Python 3.12 or newer was found. Tried:"
        echo -n "${rejected:-  nothing named python3 is on PATH}"$'\n'
        echo "Install one, then run make again; any of these will do:"
        echo "  uv python install 3.12          (https://docs.astral.sh/uv)"
        echo "  pyenv install 3.12"
        echo "  apt install python3.12 python3.12-venv, or brew install python@3.12"
        echo "or name one yourself: make PYTHON=/path/to/python3.12 setup"
    } >&2
    exit 1
fi
python=$(cat "$found")
rm -f "$found"
exec "$python" tools/setup_venv.py "$key"
