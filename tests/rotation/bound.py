"""The command line for a user whom the modes of files bind: root first gives up for good what lets it pass them.

A program, run by its path: it imports nothing of the tests, which would change its environment.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_VERSION_3 = 0x20080522


def _give_up_powers() -> None:
    empty, of_this_process = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    if ctypes.CDLL(None, use_errno=True).capset(of_this_process, empty):
        raise OSError(ctypes.get_errno(), "capset")


if __name__ == "__main__":
    if os.geteuid() == 0:
        _give_up_powers()
    # As Python sets it for a script: its directory, not that of this file.
    sys.path[0] = str(ROOT)
    runpy.run_path(str(ROOT / "cli.py"), run_name="__main__")
