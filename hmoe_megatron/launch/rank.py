"""Become a rank that the kernel kills when its launcher is gone: python rank.py LAUNCHER_PID PROGRAM ARGUMENT..."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):  # gone already
    sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
