"""The compiled CPU library with the functions of logitless_cpu.h, called through ctypes.

The library is `liblogitless_cpu.so` beside this file, where `pip install` puts it. The environment variable
`LOGITLESS_CPU_LIBRARY` names another, such as one that CMake left in a build folder. `LOGITLESS_CPU_SET` names the set
of instructions to use (`SETS`), for tests and comparisons; otherwise it is the last that the machine has.
"""

from __future__ import annotations

import ctypes
import os
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
SET_VARIABLE = "LOGITLESS_CPU_SET"
#: Codes of the dtypes, `enum logitless_cpu_dtype`.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: Sets of instructions, in the order of `enum logitless_cpu_set`: a later one is the faster.
SETS = ("avx2", "avx512", "avx512_bf16", "amx")
#: Those that multiply bfloat16.
WITH_BFLOAT16 = ("avx512_bf16", "amx")

#: The result of each function, then its arguments. tests/test_cpu_library.py holds this and the structures below
#: against the header.
SIGNATURES: loading.Signatures = {
    "logitless_cpu_sets": (_I,),
    "logitless_cpu_leads": (_I, _I),
    "logitless_cpu_screens": (_I, _I, _I),
    "logitless_cpu_units": (None, _I, _P, _I, _L, _L, _L, _P),
    "logitless_cpu_stream": (_L, _I, _P, _L, _L, _P, _P, _P, _L),
    "logitless_cpu_route": (None, _P, _L, _L, _L, _P),
    "logitless_cpu_spread": (None, _I, _P, _L, _L),
    "logitless_cpu_product": (_I, _I, _I, _P, _L, _L, _P, _L, _L, _P, _L, _L, _L, _L, _I),
    "logitless_cpu_measure": (None, _I, _P, _L, _L, _L, _P, _F, _P, _I, _P, _P, _P, _L),
}


class _Structure(ctypes.Structure):
    """A structure of the header, filled from tensors and numbers."""

    def __init__(self, **values: Tensor | float | None) -> None:
        """A tensor is passed as its address, so the caller must keep it alive."""
        super().__init__(**{name: x.data_ptr() if isinstance(x, Tensor) else x for name, x in values.items()})


def _fields(*groups: tuple[str, type]) -> tuple[tuple[str, type], ...]:
    return tuple((name, kind) for names, kind in groups for name in names.split())


class Stream(_Structure):
    """The arguments of a sparse forward, `struct logitless_stream`."""

    _fields_ = _fields(
        ("hidden weight bias targets order places units", _P),
        ("vocabulary depth hidden_stride weight_stride", _L),
        ("dtype", _I),
        ("slope largest_unit keep", _F),
        ("logprob lse rows", _P),
    )


class Route(_Structure):
    """The arguments of a sort by block, `struct logitless_route`."""

    _fields_ = _fields(
        ("counts column value factor block out_token out_column out_value tail", _P),
        ("tail_stride", _L),
        ("threshold", _F),
    )


class Spread(_Structure):
    """The arguments of the head's gradient, `struct logitless_spread`."""

    _fields_ = _fields(
        ("hidden order starts token column value tail share out", _P),
        ("vocabulary depth hidden_stride out_stride", _L),
        ("dtype add", _I),
    )


class Library:
    """The loaded CPU library, and the set of instructions that its functions are called with.

    Attributes:
        set: the set's name; None where the processor lacks AVX2, and no other method may be called.
    """

    def __init__(self, path: Path) -> None:
        self._functions = loading.declared(path, SIGNATURES)
        found = self._functions.logitless_cpu_sets()
        self.sets = tuple(name for code, name in enumerate(SETS) if found >> code & 1)
        self.set = _chosen(self.sets)
        self._code = -1 if self.set is None else SETS.index(self.set)

    @property
    def leads(self) -> bool:
        """Whether `product` of float32 is faster than PyTorch's."""
        return bool(self._functions.logitless_cpu_leads(self._code))

    def takes_bfloat16(self, a: Tensor, b: Tensor) -> bool:
        """Whether `product` takes these layouts of bfloat16: with AMX only what is contiguous along the depth."""
        if self.set == "avx512_bf16":
            return 1 in a.stride()
        return self.set == "amx" and a.stride(1) == 1 and b.stride(0) == 1

    @property
    def multiplies_bfloat16(self) -> bool:
        """Whether `product` takes bfloat16."""
        return self.set in WITH_BFLOAT16

    def screens(self, dtype: torch.dtype) -> bool:
        """Whether a screened product of this dtype has an error beyond float32's."""
        return bool(self._functions.logitless_cpu_screens(self._code, DTYPE_CODES[dtype]))

    def units(self, rows: Tensor, out: Tensor) -> None:
        """Writes the units `[n]` of rows `[n, H]` of unit column stride."""
        code = DTYPE_CODES[rows.dtype]
        self._functions.logitless_cpu_units(
            self._code, rows.data_ptr(), code, *rows.shape, rows.stride(0), out.data_ptr()
        )

    def stream(self, stream: Stream, rows: slice, counts: Tensor, column: Tensor, value: Tensor) -> int:
        """Streams some tokens, and returns how many entries were kept, or -1 if `column` and `value` are too short.

        Raises:
            MemoryError: there was none for the kernel's own room.
        """
        tokens, room = (rows.start, rows.stop - rows.start), (x.data_ptr() for x in (counts, column, value))
        address = ctypes.addressof(stream)
        kept = self._functions.logitless_cpu_stream(self._code, address, *tokens, *room, len(column))
        return _had_memory(kept)

    def route(self, route: Route, rows: slice, start: int, following: Tensor) -> None:
        """Counts the entries of some tokens by block, or puts them there."""
        tokens = (rows.start, rows.stop - rows.start)
        self._functions.logitless_cpu_route(ctypes.addressof(route), *tokens, start, following.data_ptr())

    def spread(self, spread: Spread, blocks: slice) -> None:
        """Writes the head's gradient in some blocks."""
        self._functions.logitless_cpu_spread(self._code, ctypes.addressof(spread), blocks.start, blocks.stop)

    def product(self, a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
        """`out = a @ b`, or added, for `out` of unit column stride in float32; `takes_bfloat16` of other operands.

        Raises:
            MemoryError: there was none for the panels.
        """
        left, right = ((x.data_ptr(), *x.stride()) for x in (a, b))
        shape = (len(a), b.shape[1], a.shape[1])
        done = self._functions.logitless_cpu_product(
            self._code, DTYPE_CODES[a.dtype], *left, *right, out.data_ptr(), out.stride(0), *shape, add
        )
        _had_memory(done)

    def measure(
        self,
        z: Tensor,
        bias: Tensor | None,
        slope: float,
        targets: Tensor,
        want: int,
        narrow: Tensor | None,
        target_logit: Tensor,
        moments: Tensor,
    ) -> None:
        """Exponentials and their sums of a chunk `z [V, n]`, n being the length of `targets`."""
        shape = (z.stride(0), len(z), len(targets))
        pointers = (None if x is None else x.data_ptr() for x in (narrow, target_logit, moments))
        self._functions.logitless_cpu_measure(
            self._code,
            z.data_ptr(),
            *shape,
            None if bias is None else bias.data_ptr(),
            slope,
            targets.data_ptr(),
            want,
            *pointers,
            moments.stride(0),
        )


def _chosen(sets: tuple[str, ...]) -> str | None:
    """The set that the environment names, or else the last."""
    named = os.environ.get(SET_VARIABLE)
    if named is None:
        return sets[-1] if sets else None
    if named not in sets:
        raise ValueError(f"{SET_VARIABLE}: expected one of {', '.join(sets) or 'none'} on this machine, got {named!r}")
    return named


def _had_memory(result: int) -> int:
    if result == -2:
        raise MemoryError("liblogitless_cpu: no memory for a kernel's own room")
    return result


def location() -> Path | None:
    """The path of the library to load, or None if there is none."""
    return loading.find(VARIABLE, Path(__file__).with_name("liblogitless_cpu.so"))


@cache
def _loaded(path: Path, _set: str | None) -> Library:
    return Library(path)


def load(path: Path) -> Library:
    """The library at a path, loaded once for each set of instructions that the environment names.

    Raises:
        OSError: there is no such file, or the system cannot load it.
        AttributeError: the library is of another version.
        ValueError: `LOGITLESS_CPU_SET` names what this machine has not.
    """
    return _loaded(path, os.environ.get(SET_VARIABLE))
