"""The rows of docs/migration.md whose other side is a Triton kernel of Liger's, for a process with the interpreter on.

By hand: `TRITON_INTERPRET=1 pytest tests/migration_suite.py`. Two things of the interpreter stand in the way of
Liger's kernels, which its compiler does otherwise: a number of a kernel's arguments is a Python float, without `to`,
and there is no `tanh` of the device library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from interpreter import runs_here
from migration_peers import INTERPRETED, SECTIONS
from migration_rows import Row, check_row, rows_of

pytest.importorskip("liger_kernel")
np, tl = pytest.importorskip("numpy"), pytest.importorskip("triton.language")


@pytest.fixture(autouse=True)
def _fitting_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    from liger_kernel.ops import cross_entropy
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter, "_implicit_cvt", _with_floats(interpreter, interpreter._implicit_cvt))
    monkeypatch.setattr(cross_entropy, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)


def _with_floats(interpreter: Any, convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def converted(argument: Any) -> Any:
        if not isinstance(argument, float):
            return convert(argument)
        return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)

    return converted


@pytest.mark.skipif(not runs_here(), reason="the kernels need a GPU or TRITON_INTERPRET=1")
@pytest.mark.parametrize("row", rows_of(*INTERPRETED), ids=str)
def test_a_row_is_right(row: Row) -> None:
    check_row(row, *SECTIONS[row.section])
