"""The only tuned numbers of the Triton kernels: block sizes by architecture and shape, and how a vocabulary is split.

None of them has been timed: no GPU was at hand. They are chosen from what cross-compiled code shows (registers, spills,
shared memory, tensor-core instructions against the other instructions of the inner loop; tests/test_triton_compile.py
checks it) and from the sizes of caches. `refine` times a few neighbours of a choice on a real device and keeps the best
on disk; nothing is ever timed in passing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from time import monotonic

import torch
import triton

#: Products and sums in one instruction, as Triton had it by default up to 3.9.
FUSED = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Tile:
    """A kernel that multiplies: one program makes `[BLOCK_N, BLOCK_V]` logits, BLOCK_H of the sum at a time."""

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_H: int
    GROUP_N: int
    """Tiles of tokens that walk the vocabulary together (`tile.grouped`): their hidden states stay in the L2 cache."""
    num_warps: int
    num_stages: int

    @property
    def blocks(self) -> dict[str, int]:
        """As keyword arguments of a kernel."""
        return asdict(self) | FUSED

    @property
    def ungrouped(self) -> dict[str, int]:
        """The same, of a kernel whose grid has its tiles in order."""
        return {name: value for name, value in self.blocks.items() if name != "GROUP_N"}


@dataclass(frozen=True)
class Row:
    """A kernel that reads finished products: one program walks BLOCK_N rows, BLOCK_V columns at a time."""

    BLOCK_N: int
    BLOCK_V: int
    num_warps: int

    @property
    def blocks(self) -> dict[str, int]:
        return asdict(self) | FUSED


#: At most this many tokens are "few": the weight is read once, and memory is the bound.
FEW_TOKENS = 32

#: architecture -> (operands, shape) -> tile. Operands: "half" for bfloat16 and float16; "tf32" and "ieee" for float32.
#: Shapes: "few" tokens; "many"; "rich", many with an epilogue that keeps more of a tile at hand (a softcap, an entropy,
#: a sum of squares, blocks' masses), for which accumulators of 128 registers a thread leave too few. Where "rich" is
#: missing it is "many".
TILES: dict[str, dict[tuple[str, str], Tile]] = {
    "ampere": {
        ("half", "many"): Tile(128, 256, 32, 16, 8, 4),
        ("half", "rich"): Tile(128, 128, 32, 16, 8, 4),
        ("half", "few"): Tile(32, 128, 128, 1, 4, 3),
        ("tf32", "many"): Tile(128, 128, 32, 16, 8, 4),
        ("tf32", "few"): Tile(32, 128, 64, 1, 4, 3),
        ("ieee", "many"): Tile(64, 64, 16, 16, 4, 3),
        ("ieee", "few"): Tile(32, 64, 32, 1, 4, 3),
    },
    "ada": {
        ("half", "many"): Tile(128, 128, 32, 16, 8, 4),
        ("half", "rich"): Tile(128, 128, 32, 16, 8, 4),
        ("half", "few"): Tile(32, 128, 64, 1, 4, 4),
        ("tf32", "many"): Tile(128, 128, 32, 16, 8, 3),
        ("tf32", "few"): Tile(32, 128, 32, 1, 4, 4),
        ("ieee", "many"): Tile(64, 64, 16, 16, 4, 3),
        ("ieee", "few"): Tile(32, 64, 32, 1, 4, 3),
    },
    "hopper": {
        ("half", "many"): Tile(128, 256, 64, 16, 8, 4),
        ("half", "rich"): Tile(128, 128, 64, 16, 8, 4),
        ("half", "few"): Tile(32, 128, 128, 1, 4, 4),
        ("tf32", "many"): Tile(128, 128, 32, 16, 8, 4),
        ("tf32", "few"): Tile(32, 128, 64, 1, 4, 4),
        ("ieee", "many"): Tile(64, 64, 16, 16, 4, 3),
        ("ieee", "few"): Tile(32, 64, 32, 1, 4, 3),
    },
    "blackwell": {
        ("half", "many"): Tile(128, 256, 64, 16, 8, 4),
        ("half", "rich"): Tile(128, 128, 64, 16, 8, 4),
        ("half", "few"): Tile(32, 128, 128, 1, 4, 4),
        ("tf32", "many"): Tile(128, 128, 32, 16, 8, 4),
        ("tf32", "few"): Tile(32, 128, 64, 1, 4, 4),
        ("ieee", "many"): Tile(64, 64, 16, 16, 4, 3),
        ("ieee", "few"): Tile(32, 64, 32, 1, 4, 3),
    },
    "amd": {
        ("half", "many"): Tile(128, 128, 64, 16, 8, 2),
        ("half", "rich"): Tile(128, 128, 64, 16, 8, 2),
        ("half", "few"): Tile(32, 128, 64, 1, 4, 2),
        ("ieee", "many"): Tile(64, 64, 32, 16, 4, 2),
        ("ieee", "few"): Tile(32, 64, 32, 1, 4, 2),
    },
}
#: GeForce Blackwell (compute capability 12) has Ada's shared memory and warp-wide tensor-core instructions; at Ada's
#: depth of a float32 tile it spills a little.
TILES["geforce-blackwell"] = {**TILES["ada"], ("ieee", "few"): Tile(32, 64, 16, 1, 4, 3)}

#: architecture -> (operands, product) -> tile of a product with a listed gradient (`sparse.py`), in the same letters:
#: "d_weight" makes `[BLOCK_V, BLOCK_H]` and sums BLOCK_N listed tokens at a time; "d_hidden", with its atomics, and
#: "ordered" make `[BLOCK_N, BLOCK_H]` and sum BLOCK_V entries. BLOCK_V divides 128, and so does BLOCK_N of the latter.
#: Before Hopper there are no atomics of four numbers, and the pointers of a wide tile's spill.
LISTED: dict[str, dict[tuple[str, str], Tile]] = {
    "ampere": {
        ("half", "d_weight"): Tile(32, 128, 128, 1, 8, 4),
        ("half", "d_hidden"): Tile(128, 64, 64, 1, 8, 3),
        ("half", "ordered"): Tile(128, 32, 128, 1, 8, 4),
        ("tf32", "d_weight"): Tile(32, 128, 128, 1, 8, 3),
        ("tf32", "d_hidden"): Tile(128, 32, 64, 1, 8, 3),
        ("tf32", "ordered"): Tile(128, 32, 128, 1, 8, 3),
        ("ieee", "d_weight"): Tile(16, 64, 64, 1, 4, 3),
        ("ieee", "d_hidden"): Tile(64, 16, 64, 1, 4, 3),
        ("ieee", "ordered"): Tile(64, 16, 64, 1, 4, 3),
    },
    "hopper": {
        ("half", "d_weight"): Tile(64, 128, 128, 1, 8, 4),
        ("half", "d_hidden"): Tile(128, 64, 128, 1, 8, 2),
        ("half", "ordered"): Tile(128, 64, 128, 1, 8, 4),
        ("tf32", "d_weight"): Tile(32, 128, 128, 1, 8, 4),
        ("tf32", "d_hidden"): Tile(128, 32, 128, 1, 8, 4),
        ("tf32", "ordered"): Tile(128, 32, 128, 1, 8, 4),
        ("ieee", "d_weight"): Tile(16, 64, 64, 1, 4, 3),
        ("ieee", "d_hidden"): Tile(64, 16, 64, 1, 4, 3),
        ("ieee", "ordered"): Tile(64, 16, 64, 1, 4, 3),
    },
    "amd": {
        ("half", "d_weight"): Tile(32, 128, 128, 1, 8, 2),
        ("half", "d_hidden"): Tile(128, 32, 128, 1, 8, 2),
        ("half", "ordered"): Tile(128, 32, 128, 1, 8, 2),
        ("ieee", "d_weight"): Tile(32, 64, 64, 1, 4, 2),
        ("ieee", "d_hidden"): Tile(64, 32, 64, 1, 4, 2),
        ("ieee", "ordered"): Tile(64, 32, 64, 1, 4, 2),
    },
}
LISTED |= {"ada": LISTED["ampere"], "blackwell": LISTED["hopper"]}
LISTED["geforce-blackwell"] = {**LISTED["ada"], ("ieee", "d_hidden"): Tile(64, 16, 32, 1, 4, 3)}

#: For every architecture: a row of 128k float32 entries is 32 blocks, 16 numbers a thread each.
ROW = Row(1, 4096, 8)
#: Rows of two heads at once (`divergence.py`): 8 numbers of each a thread. With 16 some forms fill 128 registers.
ROW_PAIR = Row(1, 1024, 4)

#: Small enough that a small problem has several tiles and splits each way.
INTERPRETED, INTERPRETED_ROW = Tile(16, 32, 16, 2, 1, 1), Row(8, 32, 1)
INTERPRETED_LISTED = Tile(64, 64, 32, 1, 1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The choice


def on_device(x: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: that of `x` within this context."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def architecture(device: torch.device) -> str:
    """The table's name of a device; "interpreter" for a CPU. What is unknown is taken for Ada, which asks for least."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return "amd"
    major, minor = torch.cuda.get_device_capability(device)
    names = {(8, 0): "ampere", (9, 0): "hopper", (10, 0): "blackwell", (10, 3): "blackwell"}
    return names.get((major, minor), "geforce-blackwell" if major == 12 else "ada")


def precision(dtype: torch.dtype) -> str:
    """Of products of float32: "tf32" where PyTorch's own may be, else "ieee". Without meaning for other dtypes."""
    allowed = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed and torch.version.hip is None else "ieee"


def operands(dtype: torch.dtype) -> str:
    return precision(dtype) if dtype == torch.float32 else "half"


def key(hidden: torch.Tensor, kernel: str, *, rich: bool) -> str:
    """ "kernel/operands/shape" of `hidden [N, H]` and a kernel, "forward" or "gradient"."""
    shape = "few" if hidden.shape[0] <= FEW_TOKENS else "rich" if rich else "many"
    return f"{kernel}/{operands(hidden.dtype)}/{shape}"


def tile(hidden: torch.Tensor, kernel: str, *, rich: bool) -> Tile:
    """What was refined on this device for the same `key`, or the table's."""
    name = architecture(hidden.device)
    if name == "interpreter":
        return INTERPRETED
    wanted = key(hidden, kernel, rich=rich)
    _, kind, shape = wanted.split("/")
    kept = refined(hidden.device).get(wanted)
    return kept or TILES[name].get((kind, shape)) or TILES[name][kind, "many"]


def listed(operand: torch.Tensor, product: str) -> Tile:
    """Of a product of a listed gradient, "d_weight", "d_hidden" or "ordered", with an operand of its dtype."""
    name = architecture(operand.device)
    return INTERPRETED_LISTED if name == "interpreter" else LISTED[name][operands(operand.dtype), product]


def row(device: torch.device) -> Row:
    return INTERPRETED_ROW if device.type == "cpu" else ROW


def row_pair(device: torch.device) -> Row:
    return INTERPRETED_ROW if device.type == "cpu" else ROW_PAIR


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; 4 in the interpreter, which has none."""
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def split(tiles_n: int, tiles_v: int, processors: int) -> tuple[int, int]:
    """(splits, tiles in a split) of the vocabulary: the fewest splits with the shortest schedule, which is the number
    of rounds in which the processors take one program each, times the tiles of a program. At most 128 splits: a split
    leaves five numbers a token behind."""
    tiles_v = max(tiles_v, 1)

    def schedule(splits: int) -> int:
        return -(-tiles_n * splits // processors) * -(-tiles_v // splits)

    best = min(range(1, min(tiles_v, 128) + 1), key=schedule)
    each = -(-tiles_v // best)
    return -(-tiles_v // each), each


# ---------------------------------------------------------------------------------------------------------------------
# Refinement on a device


def neighbours(start: Tile) -> list[Tile]:
    """Tiles one step away from `start`, itself first."""
    return [
        start,
        *(replace(start, num_stages=s) for s in (start.num_stages - 1, start.num_stages + 1) if s > 0),
        *(replace(start, BLOCK_H=h) for h in (start.BLOCK_H // 2, start.BLOCK_H * 2) if h >= 16),
        *(replace(start, BLOCK_V=v) for v in (start.BLOCK_V // 2, start.BLOCK_V * 2) if v >= 32),
        *(replace(start, num_warps=w) for w in (start.num_warps // 2, start.num_warps * 2) if 2 <= w <= 16),
    ]


def refine(
    key: str, candidates: Iterable[Tile], seconds: Callable[[Tile], float], path: Path, *, budget: float = 60.0
) -> Tile:
    """Times candidates in their order until `budget` seconds have passed, and keeps the fastest in `path` under `key`.

    Args:
        key: as `key` makes it.
        candidates: the first is always timed.
        seconds: the time of one; that it asks for more than the device has (OutOfResources) takes a candidate out.
        path: of the JSON file (`cache_path`).
        budget: of wall-clock seconds, compilation included; one candidate may run over it.

    Raises:
        RuntimeError: no candidate fits the device.
    """
    start, found = monotonic(), {}
    for candidate in candidates:
        try:
            found[candidate] = seconds(candidate)
        except triton.runtime.OutOfResources:
            continue
        if monotonic() - start > budget:
            break
    if not found:
        raise RuntimeError(f"no tile for {key} fits this device")
    best = min(found, key=lambda candidate: found[candidate])
    _store(path, key, best)
    return best


def cache_path(device: torch.device) -> Path:
    """One file for each kind of device and Triton, below `$XDG_CACHE_HOME` (`~/.cache`)."""
    kind = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "logitless" / f"triton-{triton.__version__}-{kind}.json"


@cache
def refined(device: torch.device) -> dict[str, Tile]:
    """What `refine` kept for this device, read once a process."""
    return load(cache_path(device))


def load(path: Path) -> dict[str, Tile]:
    """The tiles of a file; none where there is no file, or one that cannot be read as such (it is only a cache)."""
    try:
        return {key: Tile(**numbers) for key, numbers in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _store(path: Path, key: str, best: Tile) -> None:
    """Adds a line; the file is replaced in one step, for a reader at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = {name: asdict(value) for name, value in (load(path) | {key: best}).items()}
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(lines, indent=1))
    partial.replace(path)
