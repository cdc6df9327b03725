"""Other programs: with an end to their time, and with this process's Python packages."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

from ..places import ROOT

#: Seconds from Ctrl-C to the end by force.
GRACE = 20.0


def find(name: str) -> str | None:
    """The program in PATH or among CUDA's, whose folder is often in no PATH."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def run(command: list[str], seconds: float, environment: dict[str, str] | None = None) -> tuple[int | str, str]:
    """Status and output. After its time a command is asked to end, as by Ctrl-C, and a little later made to, with all
    that it has started. The variables are set beside this process's own."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(environment or {})}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    late = f"the end of its {seconds:.0f} s"
    for end, patience in ((signal.SIGINT, max(1.0, seconds)), (signal.SIGKILL, GRACE)):
        try:
            output, _ = process.communicate(timeout=patience)
            return late if end == signal.SIGKILL else process.returncode, output
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, end)
    output, _ = process.communicate()
    return late, output
