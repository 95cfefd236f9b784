"""Writes requirements.lock from the packages of the Python that runs this; `make lock` calls it."""

import os
import subprocess
import sys

HEADER = """\
# The exact versions of the stack that was tried: Linux x86_64, Python 3.12, with the extras dev and hf.
# Install:  pip install -r requirements.lock   (`make venv` does it)
# Remake:   make lock                          (after a change of setup.py; never edit by hand)
"""


def main() -> None:
    freeze = [sys.executable, "-m", "pip", "freeze", "--exclude-editable", "--exclude", "hmoe-megatron"]
    lines = subprocess.run(freeze, check=True, capture_output=True, text=True).stdout.split("\n")
    packages = sorted((line for line in lines if line), key=str.lower)
    local = [line for line in packages if "==" not in line or "+" in line]
    if local:
        sys.exit(f"requirements.lock not written: {', '.join(local)} came from no registry; reinstall and repeat")
    with open("requirements.lock.new", "w") as file:
        file.write(HEADER + "\n".join(packages) + "\n")
    os.replace("requirements.lock.new", "requirements.lock")
    print(f"requirements.lock: {len(packages)} packages")


if __name__ == "__main__":
    main()
