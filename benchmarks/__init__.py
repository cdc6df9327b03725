"""Time, memory and gradient error of every way to the same loss: four suites by one harness. See README.md."""

import importlib.util
import sys
from pathlib import Path

# A checkout that nobody installed, on a machine that has PyTorch and no more.
if importlib.util.find_spec("logitless") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))
