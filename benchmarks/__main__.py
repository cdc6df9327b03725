"""python -m benchmarks cpu|gpu|losses|tail: measures a suite, and writes its results and tables by kind of machine.

cpu       against materialised logits and other libraries, on the processor
gpu       the Triton and CUDA kernels on this machine's GPU: right or wrong, against floors and peers, profiled
losses    every registered loss against NLL or log-probs alone, and other libraries' losses of the same name
tail      the approximate strategies on a model and real text
figures   every measured figure of README and of the pages, from the results
bundle    what a machine with a GPU and no network lacks, in one folder (for `gpu --bundle`)

Every command has --help. The four suites share --only, --tiny, --output and --tables.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    **{name: f".suites.{name}" for name in ("cpu", "gpu", "losses", "tail")},
    "figures": ".figures.command",
    "bundle": ".gpu.bundle",
}


def main(arguments: Sequence[str] | None = None) -> None:
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__)
    elif name not in COMMANDS:
        sys.exit(f"benchmarks: expected one of {', '.join(COMMANDS)}, got {name!r}")
    else:
        importlib.import_module(COMMANDS[name], "benchmarks").main(rest)


if __name__ == "__main__":
    main()
