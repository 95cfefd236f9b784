#!/bin/sh
# Prints the path of a CPython >= 3.12 that can make virtual environments, or says how to get one and exits 1.
# PYTHON=/path/to/python asks for that one and no other. Order: PATH, pyenv (also versions that are installed but
# not activated), uv. A version that the lock file was not tried with (3.15 and later) is the last choice.

# Prints "ok|new|bad  <what>": the base interpreter, or why the candidate cannot be used. A pyenv shim may exist
# and fail; the interpreter of an active .venv would vanish with it, so its base is printed instead.
probe() {
    "$1" -c '
import os, sys
version = "%d.%d.%d" % sys.version_info[:3]
def end(kind, what):
    print(kind + " " + what)
    sys.exit(0)
if sys.version_info < (3, 12):
    end("bad", version + " is older than 3.12")
import sysconfig
if sys.implementation.name != "cpython":
    end("bad", version + " is not CPython")
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    end("bad", version + " is a free-threaded build")
try:
    import ensurepip, venv
except ImportError:
    end("bad", "%s lacks venv or ensurepip (Debian, Ubuntu: apt install python%d.%d-venv)" % ((version,) + sys.version_info[:2]))
end("ok" if sys.version_info < (3, 15) else "new", os.path.realpath(sys._base_executable))
' 2>/dev/null </dev/null || echo "bad does not run"
}

candidates() {
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" || echo "$PYTHON"
        return
    fi
    for name in python3 python3.12 python3.13 python3.14 python3.15 python; do command -v "$name"; done
    for path in "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[2-9]*/bin/python; do
        [ -x "$path" ] && echo "$path"
    done
    command -v uv >/dev/null && uv python find --no-project '>=3.12' 2>/dev/null </dev/null
    true
}

list=$(candidates)
tried="" newer=""
while IFS= read -r candidate; do
    [ -n "$candidate" ] || continue
    found=$(probe "$candidate")
    case $found in
        "ok "*) echo "${found#ok }"; exit 0 ;;
        "new "*) newer=${newer:-${found#new }} ;;
        *) tried="$tried
    $candidate: ${found#bad }" ;;
    esac
done <<END
$list
END
[ -n "$newer" ] && { echo "$newer"; exit 0; }

cat >&2 <<END
No usable Python >= 3.12${PYTHON:+ at PYTHON=$PYTHON}. Tried:${tried:- nothing was found}
Get one in any of these ways, then repeat the command:
    pyenv install 3.12
    uv python install 3.12
    apt install python3 python3-venv      (Debian 13, Ubuntu 24.04, and later)
    dnf install python3.12                (Fedora, RHEL)
or name one that is somewhere else: make PYTHON=/path/to/python3.12 ...
END
exit 1
