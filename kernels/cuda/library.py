"""The compiled CUDA library with the functions of logitless.h, called through ctypes.

The library is `liblogitless_cuda.so` beside this file, where `pip install` puts it. The environment variable
`LOGITLESS_CUDA_LIBRARY` names another: one that CMake left in a build folder, or its twin for the CPU,
`liblogitless_host.so`, which runs the same kernels on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from ctypes import c_double as _D
from ctypes import c_int32 as _I
from ctypes import c_int64 as _L
from ctypes import c_void_p as _P
from functools import cache
from itertools import count, takewhile
from pathlib import Path

import torch
from torch import Tensor

from .. import loading

VARIABLE = "LOGITLESS_CUDA_LIBRARY"

_HEAD = (_P, _P, _D, _D, _D)  # bias, targets, logit_scale, softcap, temperature
_RESULTS = (_P,) * 6
_END = (_I, _P)  # device, stream
_FORWARD = (_P, _P, _I, _L, _L, _L, _L, _L, *_HEAD, _P, _I, _P, _P, _L)
_PAIRS = (_P, _P, _L, _L)  # starts, tokens, first_block, block_count

#: The result of each function, then its arguments. tests/test_cuda_library.py holds this against the header.
SIGNATURES: dict[str, tuple[type, ...]] = {
    "logitless_target": (ctypes.c_char_p,),
    "logitless_explain": (ctypes.c_char_p, _I),
    "logitless_check_device": (_I, _I),
    "logitless_measure_workspace": (_L, _L, _L, _I),
    "logitless_measure": (_I, _P, _I, _L, _L, _L, *_HEAD, *_RESULTS, _P, _L, _L, _P, _L, *_END),
    "logitless_gradient": (_I, _P, _I, _L, _L, _L, *_HEAD, _P, _P, _P, _P, _P, _P, _P, _P, _I, *_END),
    "logitless_forward_sm80": (_I, *_FORWARD, *_END),
    "logitless_forward_sm90": (_I, *_FORWARD, _I, *_END),
    "logitless_forward_sm90_configuration": (ctypes.c_char_p, _I),
    "logitless_merge": (_I, _P, _P, _I, _L, _I, _L, _L, *_RESULTS, _P, _L, *_END),
    "logitless_route": (_I, _P, _L, _P, _P, _P, _L, _L, _P, _P, _P, _L, *_END),
    "logitless_sparse_gradient": (
        *(_I, _P, _P, _L, _L, _L, _L, _L, *_HEAD, _P, _P, _P, _P, _P, *_PAIRS, _P, _L, *_END),
    ),
    "logitless_sparse_d_weight": (_I, _P, _P, _L, _L, _L, _L, *_PAIRS, _P, _L, *_END),
    "logitless_sparse_d_hidden": (_I, _P, _P, _L, _L, _L, _L, *_PAIRS, _I, _P, _L, *_END),
}

#: Codes of the dtypes, `enum logitless_dtype`.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
#: LOGITLESS_NOT_BUILT in `enum logitless_code`.
NOT_BUILT = -8


class Library:
    """The loaded CUDA library. Names of functions are those of the header without `logitless_`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._functions = loading.declared(path, SIGNATURES)
        self.target: str = self._functions.logitless_target().decode()

    def explain(self, code: int) -> str:
        """The sentence for a code that a function returned."""
        return self._functions.logitless_explain(code).decode()

    def device_code(self, device: torch.device) -> int:
        """0 if the library's kernels run on the device, else the code that says why not."""
        with _current(device):  # the library's runtime leaves the device it asks current
            return self._functions.logitless_check_device(_index_of(device))

    def measure_workspace(self, rows: int, vocabulary: int, dtype: torch.dtype) -> int:
        """Bytes of workspace that `measure` needs."""
        return self._functions.logitless_measure_workspace(rows, vocabulary, DTYPE_CODES[dtype])

    def has(self, name: str) -> bool:
        """Whether this build has the kernel. If so, a call without arguments returns another code than NOT_BUILT."""
        _, *arguments = SIGNATURES[f"logitless_{name}"]
        return self._call(name, [kind() for kind in arguments]) != NOT_BUILT

    def configurations(self) -> tuple[str, ...]:
        """Names of the configurations of `forward_sm90` in this build, by number; none if the kernel is left out."""
        names = (self._functions.logitless_forward_sm90_configuration(index) for index in count())
        return tuple(name.decode() for name in takewhile(lambda name: name is not None, names))

    def launch(self, name: str, *arguments: Tensor | torch.dtype | float | None, on: torch.device) -> None:
        """Queues a function's work on the current stream of a device, and does not wait for it.

        Tensors are passed as their addresses, dtypes as their codes, None as a null pointer. The function's last two
        arguments, device and stream, are added here.

        Raises:
            RuntimeError: the function refused its arguments, or CUDA could not start it.
        """
        with _current(on):
            stream = torch.cuda.current_stream(on).cuda_stream if on.type == "cuda" else None
            code = self._call(name, [*map(_argument, arguments), _index_of(on), stream])
        if code != 0:
            raise RuntimeError(f"logitless_{name}: {self.explain(code)} (code {code})")

    def _call(self, name: str, arguments: list[object]) -> int:
        return getattr(self._functions, f"logitless_{name}")(*arguments)


def _index_of(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index


def _current(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _argument(value: Tensor | torch.dtype | float | None) -> float | None:
    if isinstance(value, Tensor):
        return value.data_ptr()
    return DTYPE_CODES[value] if isinstance(value, torch.dtype) else value


def location() -> Path | None:
    """The path of the library to load, or None if there is none."""
    return loading.find(VARIABLE, Path(__file__).with_name("liblogitless_cuda.so"))


@cache
def load(path: Path) -> Library:
    """The library at a path, loaded once. Needs no driver and no GPU.

    Raises:
        OSError: there is no such file, or the system cannot load it.
        AttributeError: the library is of another version.
    """
    return Library(path)
