#!/bin/sh
# Makes .venv in the current directory from requirements.lock, and installs this package in it as editable.
# Does nothing, quickly, where .venv/.installed still says the same; that file is written last, so an install that was
# interrupted is taken up again. A .venv that was moved or copied, or whose Python is gone, is made anew.
# PYTHON=/path asks for that Python; without it a sound .venv keeps the one it has.
set -eu

root=$(pwd -P)
venv=$root/.venv
stamp=$venv/.installed
here=$(dirname "$0")

wanted() {  # what the install depends on
    echo "at $venv"
    echo "python $1"
    cksum requirements.lock setup.py
}

fault() {  # why the existing .venv cannot be used; prints nothing where it can
    if [ ! -x "$venv/bin/python" ]; then echo "it has no working Python"
    elif ! head -n 3 "$venv/bin/pip" 2>/dev/null | grep -qF "$venv/bin/"; then echo "it was moved or copied, or made halfway"
    elif ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null </dev/null; then
        echo "its Python does not run or is older than 3.12"
    elif [ -n "$asked" ] && [ "$asked" != "$(base)" ]; then echo "it was made with $(base), PYTHON asks for $asked"
    fi
}

base() { "$venv/bin/python" -c 'import os, sys; print(os.path.realpath(sys._base_executable))' </dev/null; }

asked=
[ -z "${PYTHON:-}" ] || asked=$(sh "$here/find_python.sh")

# Two makes started at once must not install into the same place.
exec 9<"$0"
! command -v flock >/dev/null || flock 9

why=
if [ -e "$venv" ] || [ -L "$venv" ]; then
    why=$(fault)
    if [ -z "$why" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$(wanted "$(base)")" ]; then exit 0; fi
    if [ -n "$why" ]; then
        echo "Remaking .venv: $why."
        if [ ! -L "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ ! -d "$venv/bin" ]; then
            echo "$venv is no virtual environment: move it away, then repeat the command." >&2
            exit 1
        fi
        rm -rf "$venv"
    fi
fi

if [ ! -e "$venv" ]; then
    python=${asked:-$(sh "$here/find_python.sh")}
    echo "Making .venv with $python"
    "$python" -m venv "$venv"
fi

rm -f "$stamp"
start=$(date +%s)
echo "Installing $(grep -c == requirements.lock) packages into .venv: 75 s to several minutes, about 5 GB on disk"
"$venv/bin/python" -m pip install -q --no-input --disable-pip-version-check --progress-bar off -r requirements.lock
# setuptools is in the lock, so nothing is fetched to build the editable install.
"$venv/bin/python" -m pip install -q --no-input --disable-pip-version-check --no-deps --no-build-isolation -e .
wanted "$(base)" >"$stamp.new"
mv "$stamp.new" "$stamp"
echo "Installed in $(($(date +%s) - start)) s"
