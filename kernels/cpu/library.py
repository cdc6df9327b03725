"""The compiled CPU library with the functions of screen.h, called through ctypes.

The library is `liblogitless_cpu.so` beside this file, where `pip install` puts it. The environment variable
`LOGITLESS_CPU_LIBRARY` names another, such as one that CMake left in a build folder.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float as _F
from ctypes import c_int32 as _I
from ctypes import c_int64 as _L
from ctypes import c_void_p as _P
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .. import loading

VARIABLE = "LOGITLESS_CPU_LIBRARY"
#: Codes of the dtypes, `enum logitless_screen_dtype`.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: Rows of the head in a panel, and tokens in a tile.
PANEL, TILE = 16, 6

#: The result of each function, then its arguments. tests/test_screen.py holds this and `Screen` against the header.
SIGNATURES: loading.Signatures = {
    "logitless_screen_supported": (_I,),
    "logitless_screen_pack": (None, _P, _I, _L, _L, _L, _P, _L, _L, _P, _P),
    "logitless_screen_chunk": (_L, _P, _L, _L, _P, _P, _P, _P, _L),
}


class Screen(ctypes.Structure):
    """The arguments of a screened forward, `struct logitless_screen`."""

    _fields_ = (
        *((name, _P) for name in ("hidden", "weight", "bias", "targets")),
        *((name, _P) for name in ("order", "places", "panels", "units", "offset")),
        *((name, _L) for name in ("vocabulary", "depth", "hidden_stride", "weight_stride")),
        *(("dtype", _I), ("slope", _F), ("largest_unit", _F), ("keep", _F)),
        *((name, _P) for name in ("logprob", "lse", "rows")),
    )

    def __init__(self, **values: Tensor | float | None) -> None:
        """A tensor is passed as its address, so the caller must keep it alive."""
        super().__init__(**{name: x.data_ptr() if isinstance(x, Tensor) else x for name, x in values.items()})


class Library:
    """The loaded CPU library."""

    def __init__(self, path: Path) -> None:
        self._functions = loading.declared(path, SIGNATURES)
        self.supported: bool = bool(self._functions.logitless_screen_supported())

    def pack(self, weight: Tensor, order: Tensor | None, places: slice, panels: Tensor, units: Tensor) -> None:
        """Packs `places` of the head, `[V, H]` of unit column stride. The first place is a multiple of `PANEL`."""
        head = (weight.data_ptr(), DTYPE_CODES[weight.dtype], *weight.shape, weight.stride(0))
        where = (None if order is None else order.data_ptr(), places.start, places.stop - places.start)
        self._functions.logitless_screen_pack(*head, *where, panels.data_ptr(), units.data_ptr())

    def chunk(self, screen: Screen, rows: slice, logits: Tensor, counts: Tensor, column: Tensor, value: Tensor) -> int:
        """Screens some tokens, and returns how many entries were kept, or -1 if `column` and `value` are too short."""
        room = (x.data_ptr() for x in (logits, counts, column, value))
        tokens = (rows.start, rows.stop - rows.start)
        return self._functions.logitless_screen_chunk(ctypes.addressof(screen), *tokens, *room, len(column))


def location() -> Path | None:
    """The path of the library to load, or None if there is none."""
    return loading.find(VARIABLE, Path(__file__).with_name("liblogitless_cpu.so"))


@cache
def load(path: Path) -> Library:
    """The library at a path, loaded once.

    Raises:
        OSError: there is no such file, or the system cannot load it.
        AttributeError: the library is of another version.
    """
    return Library(path)
