"""The CPU library (kernels/cpu) by itself: its interface, its machine code, and each kernel against float64."""

from __future__ import annotations

import ctypes
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cpu_sets import SETS, built, using
from cuda_build import FOLDER, ROOT, ctype, needs_compiler, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitless.backends import native
from logitless.kernels.cpu import library as cpu_library

pytestmark = needs_compiler
FOLDER_OF_SOURCES = ROOT / "kernels" / "cpu"
HEADER = FOLDER_OF_SOURCES / "logitless_cpu.h"
STRUCTURES = {"stream": cpu_library.Stream, "route": cpu_library.Route, "spread": cpu_library.Spread}


@pytest.fixture(scope="module", params=SETS)
def library(request: pytest.FixtureRequest) -> Iterator[cpu_library.Library]:
    with using(request.param) as loaded:
        yield loaded


# ---------------------------------------------------------------------------------------------------------------------
# Interface


def test_signatures_are_those_of_the_header() -> None:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    found = {}
    for result, name, arguments in re.findall(r"LOGITLESS_API\s+([\w\s*]+?)(\w+)\(([^)]*)\)\s*;", text):
        without = re.sub(r"struct \w+", "void", arguments)
        parts = [] if arguments.strip() == "void" else without.split(",")
        found[name] = (ctype(result), *(ctype(re.sub(r"\w+$", "", part.strip())) for part in parts))
    assert found == cpu_library.SIGNATURES
    dtypes = dict(re.findall(r"LOGITLESS_CPU_(\w*FLOAT\d+) = (\d+)", text))
    assert {name: int(code) for name, code in dtypes.items()} == {
        str(dtype).removeprefix("torch.").upper(): code for dtype, code in cpu_library.DTYPE_CODES.items()
    }
    sets = re.findall(r"LOGITLESS_CPU_(A\w+) = (\d)", text)
    assert [(name.lower(), int(code)) for name, code in sets] == [(x, i) for i, x in enumerate(cpu_library.SETS)]


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_structures_are_those_of_the_header(name: str, tmp_path: Path) -> None:
    """Names in order, offsets and size as a compiler has them."""
    structure = STRUCTURES[name]
    fields = [field for field, _ in structure._fields_]
    declared = re.search(rf"struct logitless_{name} {{(.*?)\n}};", HEADER.read_text(), flags=re.DOTALL)
    assert declared is not None
    text = re.sub(r"/\*.*?\*/", "", declared[1], flags=re.DOTALL)
    assert re.findall(r"(\w+)\s*[,;]", text) == fields
    source = tmp_path / "offsets.c"
    prints = "".join(f'printf("%zu\\n", offsetof(struct logitless_{name}, {field}));' for field in fields)
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "{HEADER}"\n'
        f'int main(void) {{ {prints} printf("%zu\\n", sizeof(struct logitless_{name})); return 0; }}\n'
    )
    run("cc", "-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", source, "-o", tmp_path / "offsets")
    found = [int(line) for line in run(tmp_path / "offsets").stdout.split()]
    assert found == [*(getattr(structure, field).offset for field in fields), ctypes.sizeof(structure)]


def test_nothing_but_the_interface_is_exported() -> None:
    lines = run("nm", "-D", "--defined-only", built()).stdout.splitlines()
    assert {line.split()[-1] for line in lines if " T " in line} == set(cpu_library.SIGNATURES)


def test_no_set_of_instructions_shares_a_function_with_another() -> None:
    """A weak one would be the linker's choice among sets, and could be one that the processor cannot run."""
    built()
    objects = list((FOLDER / "cpu").rglob("a*.cpp.o"))
    assert len(objects) == len(cpu_library.SETS)
    for path in objects:
        assert not re.search(r" [WVu] (?!DW\.ref)", run("nm", "--defined-only", path).stdout), path.name


def test_warnings_are_errors() -> None:
    built()
    log = (FOLDER / "cpu" / "logitless_cpu.log").read_text()
    assert "Building" in log and "warning" not in log


@pytest.mark.parametrize(
    "instruction, count",
    [("vpmaddwd.*ymm", 12), ("vpdpwssd.*zmm", 16), ("vdpbf16ps.*zmm", 16), ("vfmadd231ps.*zmm", 16)],
)
def test_a_product_keeps_its_sums_in_registers(instruction: str, count: int) -> None:
    """All multiplications of a step follow one another, none with an operand on the stack."""
    text = run("objdump", "-d", "--no-show-raw-insn", built()).stdout
    loops = re.findall(rf"(?:.*{instruction}.*\n(?:.*\n){{0,4}}?){{{count}}}", text)
    assert loops and all("rsp" not in loop for loop in loops)


def test_a_set_that_the_machine_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_library.SET_VARIABLE, "avx1024")
    with pytest.raises(ValueError, match=r"LOGITLESS_CPU_SET: expected one of .* got 'avx1024'"):
        cpu_library.load(built())


# ---------------------------------------------------------------------------------------------------------------------
# Products


def laid_out(
    rows: int, columns: int, *, along_rows: bool, step: int, seed: int, offset: float = 0.0, dtype=torch.float32
) -> Tensor:
    """A matrix with its rows or its columns contiguous, `step` elements apart from the next."""
    draw = torch.Generator().manual_seed(seed)
    shape = (rows, columns + step) if along_rows else (columns, rows + step)
    whole = (torch.randn(shape, generator=draw) + offset).to(dtype)
    return whole[:, :columns] if along_rows else whole[:, :rows].T


def check_product(library: cpu_library.Library, a: Tensor, b: Tensor, *, step: int, add: bool, unit: float) -> None:
    """Right to float32's rounding of each term (`unit`), and nothing written beside the result."""
    rows, columns, depth = len(a), b.shape[1], len(b)
    whole = torch.full((rows + 1, columns + step), 7.0)
    out = whole[:rows, :columns]
    library.product(a, b, out, add=add)
    want = a.double() @ b.double() + (7 if add else 0)
    size = a.double().abs() @ b.double().abs() + 7
    assert ((out.double() - want).abs() <= (depth + 1) * unit * size).all()
    assert (whole[rows:] == 7).all() and (whole[:, columns:] == 7).all()


#: Around tiles and vectors, and beyond the depth at which a product is cut.
DEPTHS = [1, 2, 31, 32, 33, 64, 65, 511, 512, 513, 577, 1100, 2100, 4301]
products = given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70), st.sampled_from(DEPTHS)),
    layouts=st.tuples(st.booleans(), st.booleans()),
    steps=st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)),
    offset=st.sampled_from([0.0, 100.0]),
    add=st.booleans(),
    seed=st.integers(0, 10**6),
)


@settings(max_examples=60, deadline=None)
@products
def test_float32_products(library, shape, layouts, steps, offset, add, seed) -> None:
    rows, columns, depth = shape
    a = laid_out(rows, depth, along_rows=layouts[0], step=steps[0], seed=seed, offset=offset)
    b = laid_out(depth, columns, along_rows=layouts[1], step=steps[1], seed=seed + 1)
    check_product(library, a, b, step=steps[2], add=add, unit=2.0**-24)


@settings(max_examples=60, deadline=None)
@products
def test_bfloat16_products_are_float32s(library, shape, layouts, steps, offset, add, seed) -> None:
    """No result is rounded to bfloat16, by whose 2^-9 these would be off, nor a sum on the way."""
    if not library.multiplies_bfloat16:
        pytest.skip("the set has no product of bfloat16")
    if library.set == "amx":  # takes no other
        layouts = (True, False)
    rows, columns, depth = shape
    kind = {"dtype": torch.bfloat16}
    a = laid_out(rows, depth, along_rows=layouts[0], step=steps[0], seed=seed, offset=offset, **kind)
    b = laid_out(depth, columns, along_rows=layouts[1], step=steps[1], seed=seed + 1, **kind)
    check_product(library, a, b, step=steps[2], add=add, unit=2.0**-23)


def test_amx_takes_bfloat16_along_the_depth_alone(library) -> None:
    a = torch.ones(3, 4, dtype=torch.bfloat16)
    takes = [library.takes_bfloat16(x, y.T) for x, y in ((a, a), (a.T.contiguous().T, a))]
    assert takes == [library.multiplies_bfloat16, library.set == "avx512_bf16"]


def test_products_are_shared_among_threads() -> None:
    """By rows or by columns, whichever are more; what PyTorch is to multiply is left alone."""
    with using("avx2"):
        assert not native.multiply_float32(torch.ones(9, 9), torch.ones(9, 9), torch.ones(9, 9), add=False)
    with using("avx512_bf16"):
        for rows, columns in ((300, 40), (40, 300)):
            a, b = torch.randn(rows, 50).bfloat16(), torch.randn(columns, 50).bfloat16().T
            out = torch.empty(rows, columns)
            assert native.multiply_float32(a, b, out, add=False)
            torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
        assert not native.multiply_float32(a, b, torch.empty(rows, columns, dtype=torch.bfloat16), add=False)


# ---------------------------------------------------------------------------------------------------------------------
# A chunk's statistics


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40),
    vocabulary=st.integers(1, 700),
    bias=st.booleans(),
    slope=st.sampled_from([1.0, 0.25, 3.0]),
    spread=st.sampled_from([0.5, 4.0, 100.0]),
    want=st.sampled_from([0, 1, 2, 3]),
    narrow=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_measured_chunks(library, count, vocabulary, bias, slope, spread, want, narrow, seed) -> None:
    draw = torch.Generator().manual_seed(seed)
    raw = spread * torch.randn(vocabulary, count, generator=draw)
    offsets = torch.randn(vocabulary, generator=draw) if bias else None
    targets = torch.randint(vocabulary, (count,), generator=draw)
    z = (raw.double() if offsets is None else raw.double() + offsets.double()[:, None]) * slope
    others = z.scatter(0, targets[None], -math.inf)
    out = torch.empty(vocabulary, count, dtype=torch.bfloat16) if narrow else None
    target, moments = torch.full((count,), math.nan), torch.full((5, count), math.nan)
    library.measure(raw, offsets, slope, targets, want, out, target, moments)
    top = moments[0].double()
    shifted = others - top
    e = shifted.exp()
    unit = 2.0**-8 if narrow else 1e-6
    found = (raw if out is None else out).double()
    exponent = 1e-6 * (1 + z.abs().max())
    assert ((found - e).abs() <= e * (unit + exponent) + 2.0**-125).all()
    assert not ((found > 0) & (found < torch.finfo(torch.float32).tiny)).any()
    torch.testing.assert_close(target.double(), z.gather(0, targets[None])[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(top, z.amax(0), rtol=1e-5, atol=1e-5)
    logarithm = torch.where(e > 0, shifted, 0)
    sums = (moments[1] + moments[2], moments[3], moments[4])
    assert torch.equal(moments[1], (others.float() >= moments[0]).sum(0).float()) or bias or slope != 1
    for i, term in enumerate((e, e * logarithm, e * e)):
        expected = term.sum(0) if i == 0 or want & i else torch.zeros(count).double()
        tolerance = (1e-5 + 2 * exponent) * (1 + expected.abs())
        assert ((sums[i].double() - expected).abs() <= tolerance).all(), i


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_measured_values_that_are_no_numbers(library, value) -> None:
    """NaN and infinity reach the sums; a masked entry is 0."""
    z, targets = torch.randn(300, 20), torch.arange(20)
    z[100, 3] = value
    target, moments = torch.empty(20), torch.empty(5, 20)
    library.measure(z, None, 1.0, targets, 3, None, target, moments)
    others = torch.arange(20) != 3
    assert moments[:, others].isfinite().all()
    assert moments[1:, 3].isfinite().all() if value == -math.inf else moments[1:, 3].isnan().all()


# ---------------------------------------------------------------------------------------------------------------------
# Units


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    depth=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    power=st.sampled_from([-30, -3, 0, 3, 30]),
)
def test_units(library, rows, depth, dtype, power) -> None:
    """A row's norm has 32767 of them, less what rounding may add to it."""
    weight = (torch.randn(rows, depth) * 10.0 ** (power if dtype != torch.float16 else power / 10)).to(dtype)
    units = torch.full((rows,), math.nan)
    library.units(weight, units)
    want = weight.double().norm(dim=1) / (32767 - math.sqrt(depth) / 2)
    torch.testing.assert_close(units.double(), torch.where(want < 1e-37, 0, want), rtol=1e-6, atol=0)


def test_units_of_rows_without_a_size(library) -> None:
    weight = torch.randn(4, 12)
    weight[0], weight[1, 3], weight[2, 5] = 0, math.nan, math.inf
    units = torch.empty(4)
    library.units(weight, units)
    assert units[0] == 0 and units[1:3].isnan().all() and units[3].isfinite()


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.slow
def test_under_the_address_and_undefined_behaviour_sanitizers() -> None:
    """This file's kernels and those of the streamed gradients again, for every set that the machine has."""
    environment = {
        **os.environ,
        "LD_PRELOAD": run("c++", "-print-file-name=libasan.so").stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "LOGITLESS_TESTED_CPU_LIBRARY": str(built("address", emulate=True)),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    files = [str(ROOT / "tests" / name) for name in ("test_cpu_library.py", "test_screen.py")]
    kernels = "products or measured or units or test_statistics or bounds or masked or an_order or flat"
    chosen = f"({kernels}) and not emulated"  # this library's AMX is the emulation already
    done = subprocess.run([*command, *files, "-k", chosen], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-4000:]
