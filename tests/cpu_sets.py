"""The CPU library built for the tests, and the sets of instructions that this machine can run, AMX's in emulation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cuda_build import build

from logitless.kernels.cpu import library

#: What each test of a kernel runs with; AMX's instructions as loops, too, where there are none.
SETS = [*library.SETS, "amx emulated"]


def built(sanitize: str = "", *, emulate: bool = False) -> Path:
    options = ["-DLOGITLESS_CUDA=OFF", "-DLOGITLESS_HOST=OFF", f"-DLOGITLESS_SANITIZE={sanitize}"]
    name = f"cpu{sanitize}{'-emulated' if emulate else ''}"
    return build(name, *options, f"-DLOGITLESS_EMULATE_AMX={'ON' if emulate else 'OFF'}", target="logitless_cpu")


@contextmanager
def using(name: str) -> Iterator[library.Library]:
    """This checkout's library with a set of instructions, for all that is called inside; a skip where there is none.

    The environment may name a library for all sets, such as one under sanitizers.
    """
    emulate = name == "amx emulated"
    path = Path(os.environ.get("LOGITLESS_TESTED_CPU_LIBRARY") or built(emulate=emulate))
    chosen = "amx" if emulate else name
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(library.VARIABLE, str(path))
        patch.delenv(library.SET_VARIABLE, raising=False)
        if chosen not in library.load(path).sets:
            pytest.skip(f"the processor has no {name}")
        patch.setenv(library.SET_VARIABLE, chosen)
        yield library.load(path)
