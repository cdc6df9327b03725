"""Every shipped configuration of the Triton kernels, compiled for six architectures without a GPU.

What is read off the code that a GPU would run: shared memory within the architecture's limit, no spill in the loop of
the product, the tensor-core instruction and the pipeline that the configuration is meant to have, and the instructions
of that loop against the throughputs of the units, which bound how near to the tensor cores' peak it can be. Nothing
here is a measurement. The arguments are specialised as the launcher would: pointers, H and strides divisible by 16,
else the loads are narrow and nothing is pipelined.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from triton_code import ARCHITECTURES, Architecture, ASTSource, GPUTarget, resources, tool, triton

from logitless.kernels.triton import chunk, configs, logprobs, sparse
from logitless.types import PAIR_BLOCK, PAIR_SPAN

KERNELS = {"forward": logprobs.forward_kernel, "gradient": logprobs.gradient_kernel}
#: Of listed pairs; each takes the configuration of its name, the first that of a gradient.
LISTED = {
    "listed": sparse.listed_gradient_kernel,
    "d_weight": sparse.d_weight_kernel,
    "d_hidden": sparse.d_hidden_kernel,
    "ordered": sparse.ordered_d_hidden_kernel,
}
#: What a rich epilogue may have beyond a plain one, which has at most a bias. Blocks' masses come without moments.
RICH = {
    "forward": ("p_bias", "p_moment", "p_square", "p_sum", "inner", "outer"),
    "blocks": ("p_bias", "p_block_lse", "inner", "outer"),
    "gradient": ("p_bias", "inner", "outer", "p_entropy_factor", "p_mean_factor", "p_column_sum"),
}
OPTIONAL = {name for names in RICH.values() for name in names}
ALL = [(arch, *key) for arch, table in configs.TILES.items() for key in table]
#: A few for every run of the tests; the rest takes minutes.
FAST = [
    ("ampere", "half", "few", "gradient"),
    ("hopper", "half", "many", "gradient"),
    ("amd", "half", "few", "forward"),
    ("hopper", "half", "d_hidden"),
    ("ampere", "half", "d_weight"),
]
INDICES = ("p_starts", "p_tokens", "p_counts", "p_place", "p_alive", "p_alive_count")


def slow_unless_fast(cases: list[tuple[str, ...]]) -> list:
    return [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow, id="-".join(case)) for case in cases]


# ---------------------------------------------------------------------------------------------------------------------
# Compiling


def signature(kernel, present: tuple[str, ...], values: dict[str, object], halves: str) -> tuple[dict, dict, dict]:
    """Types, constants and divisibilities of a kernel's arguments as the launcher would find them."""
    types, constants, attributes = {}, {}, {}
    unspecialised = {p.name for p in kernel.params if p.do_not_specialize}
    for i, name in enumerate(kernel.arg_names):
        if name in values or (name in OPTIONAL and name not in present):
            types[name], constants[i,] = "constexpr", values.get(name)
        elif name in ("stride_hh", "stride_wh", "stride_v", "stride_gv"):
            types[name], constants[i,] = "constexpr", 1
        elif name.startswith("p_"):
            operand = name in ("p_hidden", "p_weight", "p_bias", "p_gradient")
            types[name] = "*i64" if name == "p_targets" else halves if operand else "*fp32"
            types[name] = "*i32" if name in INDICES else types[name]
        else:
            types[name] = "fp32" if name in ("slope", "inner", "outer") else "i32"
        if types[name].startswith("*") or (types[name] == "i32" and name not in unspecialised):
            attributes[i,] = [["tt.divisibility", 16]]
    return types, constants, attributes


def compiled(
    kernel, present: tuple[str, ...], values: dict, halves: str, target: GPUTarget, warps: int, stages: int = 2
):
    types, constants, attributes = signature(kernel, present, values, halves)
    source = ASTSource(kernel, types, constants, attributes)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})


@cache
def tile_kernel(name: str, operands: str, tile: configs.TileConfig, present: tuple[str, ...], target: GPUTarget):
    kernel = KERNELS["forward" if name == "blocks" else name]
    values = {k: v for k, v in tile.blocks.items() if k in kernel.arg_names}
    values |= {"BLOCK": min(128, tile.BLOCK_V), "PRECISION": "ieee" if operands == "half" else operands}
    values = {k: v for k, v in values.items() if k in kernel.arg_names}
    halves = "*bf16" if operands == "half" else "*fp32"
    return compiled(kernel, present, values, halves, target, tile.num_warps, tile.num_stages)


@cache
def listed_kernel(name: str, operands: str, tile: configs.TileConfig, target: GPUTarget):
    kernel = LISTED[name]
    values = {**tile.blocks, "BLOCK": PAIR_BLOCK, "SPAN": PAIR_SPAN}
    values["PRECISION"] = "ieee" if operands == "half" else operands
    values = {k: v for k, v in values.items() if k in kernel.arg_names}
    halves = "*bf16" if operands == "half" else "*fp32"
    return compiled(kernel, ("p_bias",), values, halves, target, tile.num_warps, tile.num_stages)


def inner_loop(code, folder: Path) -> Counter[str]:
    """Opcodes of the smallest loop that multiplies, in the machine code of an NVIDIA GPU."""
    listing = tool("nvdisasm", "-c", data=code.asm["cubin"], folder=folder)
    lines, labels, loops = [], {}, []
    for line in listing.splitlines():
        if found := re.match(r"\s*(\.L_x_\w+):", line):
            labels[found[1]] = len(lines)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)([^;]*);", line):
            target = re.search(r"`\((\.L_x_\w+)\)", found[2])
            if found[1].startswith("BRA") and target and target[1] in labels:
                loops.append([*lines[labels[target[1]] :], found[1]])
            lines.append(found[1])
    products = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "UTCMMA", "FFMA")
    multiply = [
        loop for loop in loops if sum(op.startswith(products) for op in loop) >= 2 or any("GMMA" in op for op in loop)
    ]
    assert multiply, "no loop multiplies"
    return Counter(min(multiply, key=len))


def instruction(code) -> str:
    """The matrix instruction that the PTX asks for, "" for none."""
    names = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
    return next((name for name in names if name in code.asm["ptx"]), "")


# ---------------------------------------------------------------------------------------------------------------------
# Every configuration

#: Bytes a thread may park in memory. The forward keeps pointers and row numbers of a whole split through each tile's
#: epilogue, once in thousands of instructions; what matters is that the loop of the product has none.
PARKED = {"forward": 128, "gradient": 0}
#: What a release of Triton parks beyond that, exactly, so that an entry that no longer holds fails. None is Hopper's.
PARKED_BY = {
    "3.6": {
        ("ampere", "tf32", "many", "forward"): 152,
        ("blackwell", "half", "many", "forward"): 288,
        ("blackwell", "half", "rich", "forward"): 152,
        ("blackwell", "half", "rich", "gradient"): 120,
        ("blackwell", "tf32", "many", "forward"): 152,
        ("blackwell", "tf32", "many", "gradient"): 64,
        ("geforce-blackwell", "half", "rich", "forward"): 152,
        ("geforce-blackwell", "tf32", "many", "forward"): 200,
    },
}
KNOWN = PARKED_BY.get(".".join(triton.__version__.split(".")[:2]), {})


def expected_instruction(name: str, operands: str, shape: str) -> str:
    """Warp-group instructions want 64 rows, and accumulators of their own on Blackwell 128; few tokens have 32."""
    if operands == "ieee":
        return ""
    if shape == "few":
        return "mma.sync"
    return {"hopper": "wgmma.mma_async", "blackwell": "tcgen05.mma"}.get(name, "mma.sync")


def variants(operands: str, shape: str, kernel: str) -> list[tuple[str, tuple[str, ...]]]:
    """(kernel, optional arguments present) that a configuration is used with, the most demanding of each sort."""
    if (operands, shape) == ("half", "many"):
        return [(kernel, ("p_bias",))]
    names = (kernel, "blocks") if kernel == "forward" and (operands == "half" or shape == "many") else (kernel,)
    return [(name, RICH[name]) for name in names]


@pytest.mark.parametrize(
    ("name", "operands", "shape", "kernel"),
    slow_unless_fast([(*key, kernel) for key in ALL for kernel in KERNELS]),
)
def test_configuration(name, operands, shape, kernel, tmp_path):
    arch, tile = ARCHITECTURES[name], configs.TILES[name][operands, shape]
    parked = 0
    for variant, present in variants(operands, shape, kernel):
        code = tile_kernel(variant, operands, tile, present, arch.target)
        used = resources(code, tmp_path)
        assert code.metadata.shared <= arch.shared
        if name == "amd":
            assert used.stack == 0
            assert "v_mfma" in code.asm["amdgcn"]  # of float32 too
            continue
        loop = inner_loop(code, tmp_path)
        assert not any(op.startswith(("LDL", "STL")) for op in loop)
        parked = max(parked, used.stack)
        assert instruction(code) == expected_instruction(name, operands, shape)
        stage = (tile.BLOCK_N + tile.BLOCK_V) * tile.BLOCK_H * (2 if operands == "half" else 4)
        assert code.metadata.shared >= (tile.num_stages - 1) * stage, "the pipeline is not as deep as asked for"
        assert any(op.startswith(("LDGSTS", "UTMALDG")) for op in loop), "the loop does not copy ahead"
    known = KNOWN.get((name, operands, shape, kernel))
    assert parked <= PARKED[kernel] if known is None else parked == known, f"{parked} bytes spilt, {known} known"


def check_resources(code, arch: Architecture, folder: Path) -> None:
    assert code.metadata.shared <= arch.shared
    assert resources(code, folder).stack == 0


@pytest.mark.parametrize(
    ("name", "operands", "shape"),
    [pytest.param(*case, marks=pytest.mark.slow, id="-".join(case)) for case in ALL],
)
def test_the_gradient_of_listed_pairs(name, operands, shape, tmp_path):
    """By every tile that it may have, down to a block's width."""
    arch, tile = ARCHITECTURES[name], configs.TILES[name][operands, shape]
    tile = replace(tile, BLOCK_V=min(tile.BLOCK_V, PAIR_BLOCK))
    code = listed_kernel("listed", operands, tile, arch.target)
    check_resources(code, arch, tmp_path)
    if name != "amd":
        assert instruction(code) == expected_instruction(name, operands, shape)
        assert any(op.startswith("LDGSTS") for op in inner_loop(code, tmp_path)), "the loop does not copy ahead"


@pytest.mark.parametrize(
    ("name", "operands", "product"),
    slow_unless_fast([(arch, *key) for arch, table in configs.LISTED.items() for key in table]),
)
def test_products_of_listed_pairs(name, operands, product, tmp_path):
    """Rows are gathered as deep ahead as asked for, although where they are is itself read. The sum over a block's 128
    entries may be unrolled, copies and all."""
    arch, tile = ARCHITECTURES[name], configs.LISTED[name][operands, product]
    code = listed_kernel(product, operands, tile, arch.target)
    check_resources(code, arch, tmp_path)
    if name == "amd":
        assert "v_mfma" in code.asm["amdgcn"]
        return
    assert instruction(code) == expected_instruction(name, operands, "many")
    if product == "d_hidden":
        wide = name in ("hopper", "blackwell", "geforce-blackwell")
        vectors = re.search(r"(red|atom)\.global\.gpu\.relaxed\.add\.v4\.f32", code.asm["ptx"])  # Triton 3.9, 3.6
        assert (vectors is not None) == wide
        return
    rows = tile.BLOCK_N + tile.BLOCK_H if product == "ordered" else tile.BLOCK_V + tile.BLOCK_H
    depth = tile.BLOCK_V if product == "ordered" else tile.BLOCK_N
    stage = rows * depth * (2 if operands == "half" else 4)
    assert code.metadata.shared >= (tile.num_stages - 1) * stage, "the pipeline is not as deep as asked for"
    assert any(op.startswith("LDGSTS") for op in inner_loop(code, tmp_path)), "the loop does not copy ahead"


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_routing(name, tmp_path):
    arch = ARCHITECTURES[name]
    counting, listing = ("p_tail", "p_counts"), ("p_starts", "p_tokens")
    for absent in (counting, listing):
        values = {"SPAN": PAIR_SPAN, "BLOCK_B": sparse.ROUTE_BLOCKS, **dict.fromkeys(absent)}
        check_resources(
            compiled(sparse.route_kernel, ("p_block_lse",), values, "*fp32", arch.target, 4), arch, tmp_path
        )
    code = compiled(sparse.place_kernel, (), {"SPAN": PAIR_SPAN}, "*fp32", arch.target, 4)
    check_resources(code, arch, tmp_path)


def row_kernel(kernel, present: tuple[str, ...], target: GPUTarget):
    values = {k: v for k, v in configs.ROW.blocks.items() if k in kernel.arg_names}
    optional = tuple(name for name in kernel.arg_names if name in OPTIONAL_ROW and name not in present)
    values |= dict.fromkeys(optional) | ({"BLOCK": 128} if "BLOCK" in kernel.arg_names else {})
    return compiled(kernel, present, values, "*fp32", target, configs.ROW.num_warps)


OPTIONAL_ROW = OPTIONAL | {"p_entropy", "p_mean_logit", "p_correct", "p_log_sum_sq"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "hopper" else pytest.mark.slow) for n in ARCHITECTURES]
)
def test_row_kernels(name, tmp_path):
    """Wide loads, next to no spill, and a barrier between a block's reads and its writes."""
    arch = ARCHITECTURES[name]
    measure = row_kernel(chunk.measure_kernel, ("p_bias", "p_entropy", "p_mean_logit", "p_log_sum_sq"), arch.target)
    gradient = row_kernel(chunk.gradient_in_place_kernel, ("p_bias", "p_entropy_factor", "inner", "outer"), arch.target)
    for code in (measure, gradient):
        assert resources(code, tmp_path).stack <= 16 and code.metadata.shared <= arch.shared  # 8 on sm_80
        if name != "amd":
            assert re.search(r"ld\.global[.\w]*\.v4", code.asm["ptx"]), "narrow loads"
    if name == "amd":
        assert "s_barrier" in gradient.asm["amdgcn"]
        return
    body = gradient.asm["ptx"]
    first_write = body.index("st.global")
    assert "bar.sync" in body[:first_write] or "barrier.sync" in body[:first_write]


# ---------------------------------------------------------------------------------------------------------------------
# The bound that the instructions set


def bound(name: str, operands: str, tile: configs.TileConfig, folder: Path) -> float:
    """The share of the tensor cores' peak that the forward's loop of the product cannot exceed: clocks of the products
    over those of whichever takes longest, of

    - the tensor cores (or, for "ieee", the float32 units) themselves,
    - four schedulers that issue one instruction a clock for all warps,
    - shared memory at 128 bytes a clock: what is copied in, and what the products read,
    - the L2 cache at 64 bytes a clock and multiprocessor: what is copied in.
    """
    arch = ARCHITECTURES[name]
    code = tile_kernel("forward", operands, tile, ("p_bias",), arch.target)
    loop = inner_loop(code, folder)
    itemsize = 2 if operands == "half" else 4
    copied = (tile.BLOCK_N + tile.BLOCK_V) * tile.BLOCK_H * itemsize
    product = 2 * tile.BLOCK_N * tile.BLOCK_V * tile.BLOCK_H / arch.flops[operands]
    issue = sum(loop.values()) * tile.num_warps / 4
    shared = (copied + shared_reads(loop, tile, itemsize)) / 128
    return product / max(product, issue, shared, copied / 64)


def shared_reads(loop: Counter[str], tile: configs.TileConfig, itemsize: int) -> float:
    """Bytes that products read in one round of the loop: `ldmatrix` and wide loads by their count; a warp group's
    (64 rows of hidden) or Blackwell's (both operands once) by the instruction's own reading."""
    counted = sum(n * {"4": 512, "2": 256}.get(op[-1], 128) for op, n in loop.items() if op.startswith("LDSM"))
    counted += sum(n * (512 if "128" in op else 128) for op, n in loop.items() if op.split(".")[0] == "LDS")
    if any("GMMA" in op for op in loop):
        groups = tile.num_warps // 4
        return (tile.BLOCK_N + groups * tile.BLOCK_V) * tile.BLOCK_H * itemsize
    if any(op.startswith("UTC") for op in loop):
        return (tile.BLOCK_N + tile.BLOCK_V) * tile.BLOCK_H * itemsize
    return counted * tile.num_warps


#: What the table's choice for many tokens can reach at least. Blackwell's tensor cores outrun what one block copies
#: from the L2 cache at this tile; blocks that share their copies would be another kernel.
LEAST = {"ampere": 0.95, "ada": 0.95, "hopper": 0.95, "blackwell": 0.6, "geforce-blackwell": 0.95}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEAST)
def test_no_smaller_tile_has_a_better_bound(name, tmp_path):
    tile = configs.TILES[name]["half", "many"]
    chosen = bound(name, "half", tile, tmp_path)
    assert chosen >= LEAST[name]
    for other in (replace(tile, BLOCK_V=tile.BLOCK_V // 2), replace(tile, BLOCK_N=tile.BLOCK_N // 2)):
        assert chosen >= bound(name, "half", other, tmp_path), other
