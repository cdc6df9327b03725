"""The tuned numbers of the Triton kernels: tile sizes by architecture and shape, and how a vocabulary is split.

None of them has been timed, because no GPU was at hand. They come from what cross-compiled code shows (registers,
spills, shared memory, tensor-core instructions against the other instructions of the inner loop), which
tests/test_triton_compile.py checks, and from the sizes of caches. Nothing is timed while a program runs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache

import torch

#: Products and sums in one instruction, as Triton had it by default up to 3.9.
FUSED = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class TileConfig:
    """The tile of a kernel that multiplies: a program has `[BLOCK_N, BLOCK_V]` logits, and sums BLOCK_H at a time."""

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_H: int
    GROUP_N: int
    """Tiles of tokens that walk the vocabulary together (`tile.grouped`), so that the L2 cache holds their states."""
    num_warps: int
    num_stages: int

    @property
    def blocks(self) -> dict[str, int]:
        """Keyword arguments of a kernel."""
        return asdict(self) | FUSED

    @property
    def ungrouped(self) -> dict[str, int]:
        """Keyword arguments of a kernel whose grid has its tiles in order, so without GROUP_N."""
        return {name: value for name, value in self.blocks.items() if name != "GROUP_N"}


@dataclass(frozen=True)
class RowConfig:
    """The shape of a kernel on finished products: a program walks BLOCK_N rows, BLOCK_V columns at a time."""

    BLOCK_N: int
    BLOCK_V: int
    num_warps: int

    @property
    def blocks(self) -> dict[str, int]:
        """Keyword arguments of a kernel."""
        return asdict(self) | FUSED


#: The largest number of "few" tokens, for which the weight is read once and memory is the bound.
FEW_TOKENS = 32

#: architecture -> (operands, shape) -> tile.
#: Operands are "half" (bfloat16 and float16), or "tf32" and "ieee" (float32).
#: Shapes are "few" tokens, "many", and "rich": many tokens with an epilogue that keeps more of a tile in registers, for
#: a softcap, an entropy, a sum of squares, or blocks' masses. Accumulators of 128 registers a thread leave it too few.
#: If there is no line for "rich", that for "many" is used.
TILES: dict[str, dict[tuple[str, str], TileConfig]] = {
    "ampere": {
        ("half", "many"): TileConfig(128, 256, 32, 16, 8, 4),
        ("half", "rich"): TileConfig(128, 128, 32, 16, 8, 4),
        ("half", "few"): TileConfig(32, 128, 128, 1, 4, 3),
        ("tf32", "many"): TileConfig(128, 128, 32, 16, 8, 4),
        ("tf32", "few"): TileConfig(32, 128, 64, 1, 4, 3),
        ("ieee", "many"): TileConfig(64, 64, 16, 16, 4, 3),
        ("ieee", "few"): TileConfig(32, 64, 32, 1, 4, 3),
    },
    "ada": {
        ("half", "many"): TileConfig(128, 128, 32, 16, 8, 4),
        ("half", "rich"): TileConfig(128, 128, 32, 16, 8, 4),
        ("half", "few"): TileConfig(32, 128, 64, 1, 4, 4),
        ("tf32", "many"): TileConfig(128, 128, 32, 16, 8, 3),
        ("tf32", "few"): TileConfig(32, 128, 32, 1, 4, 4),
        ("ieee", "many"): TileConfig(64, 64, 16, 16, 4, 3),
        ("ieee", "few"): TileConfig(32, 64, 32, 1, 4, 3),
    },
    "hopper": {
        ("half", "many"): TileConfig(128, 256, 64, 16, 8, 4),
        ("half", "rich"): TileConfig(128, 128, 64, 16, 8, 4),
        ("half", "few"): TileConfig(32, 128, 128, 1, 4, 4),
        ("tf32", "many"): TileConfig(128, 128, 32, 16, 8, 4),
        ("tf32", "few"): TileConfig(32, 128, 64, 1, 4, 4),
        ("ieee", "many"): TileConfig(64, 64, 16, 16, 4, 3),
        ("ieee", "few"): TileConfig(32, 64, 32, 1, 4, 3),
    },
    "blackwell": {
        ("half", "many"): TileConfig(128, 256, 64, 16, 8, 4),
        ("half", "rich"): TileConfig(128, 128, 64, 16, 8, 4),
        ("half", "few"): TileConfig(32, 128, 128, 1, 4, 4),
        ("tf32", "many"): TileConfig(128, 128, 32, 16, 8, 4),
        ("tf32", "few"): TileConfig(32, 128, 64, 1, 4, 4),
        ("ieee", "many"): TileConfig(64, 64, 16, 16, 4, 3),
        ("ieee", "few"): TileConfig(32, 64, 32, 1, 4, 3),
    },
    "amd": {
        ("half", "many"): TileConfig(128, 128, 64, 16, 8, 2),
        ("half", "rich"): TileConfig(128, 128, 64, 16, 8, 2),
        ("half", "few"): TileConfig(32, 128, 64, 1, 4, 2),
        ("ieee", "many"): TileConfig(64, 64, 32, 16, 4, 2),
        ("ieee", "few"): TileConfig(32, 64, 32, 1, 4, 2),
    },
}
#: GeForce Blackwell (compute capability 12) has Ada's shared memory and warp-wide tensor-core instructions. A float32
#: tile of Ada's depth spills a little.
TILES["geforce-blackwell"] = {**TILES["ada"], ("ieee", "few"): TileConfig(32, 64, 16, 1, 4, 3)}

#: architecture -> (operands, product) -> tile of a product with a listed gradient (`sparse.py`).
#: "d_weight" has a tile `[BLOCK_V, BLOCK_H]` and sums BLOCK_N listed tokens at a time. "d_hidden" (with atomics) and
#: "ordered" have a tile `[BLOCK_N, BLOCK_H]` and sum BLOCK_V entries at a time. BLOCK_V divides 128, and BLOCK_N of
#: "ordered" too. GPUs before Hopper have no atomics of four numbers, so the pointers of a wide tile spill there.
LISTED: dict[str, dict[tuple[str, str], TileConfig]] = {
    "ampere": {
        ("half", "d_weight"): TileConfig(32, 128, 128, 1, 8, 4),
        ("half", "d_hidden"): TileConfig(128, 64, 64, 1, 8, 3),
        ("half", "ordered"): TileConfig(128, 32, 128, 1, 8, 4),
        ("tf32", "d_weight"): TileConfig(32, 128, 128, 1, 8, 3),
        ("tf32", "d_hidden"): TileConfig(128, 32, 64, 1, 8, 3),
        ("tf32", "ordered"): TileConfig(128, 32, 128, 1, 8, 3),
        ("ieee", "d_weight"): TileConfig(16, 64, 64, 1, 4, 3),
        ("ieee", "d_hidden"): TileConfig(64, 16, 64, 1, 4, 3),
        ("ieee", "ordered"): TileConfig(64, 16, 64, 1, 4, 3),
    },
    "hopper": {
        ("half", "d_weight"): TileConfig(64, 128, 128, 1, 8, 4),
        ("half", "d_hidden"): TileConfig(128, 64, 128, 1, 8, 2),
        ("half", "ordered"): TileConfig(128, 64, 128, 1, 8, 4),
        ("tf32", "d_weight"): TileConfig(32, 128, 128, 1, 8, 4),
        ("tf32", "d_hidden"): TileConfig(128, 32, 128, 1, 8, 4),
        ("tf32", "ordered"): TileConfig(128, 32, 128, 1, 8, 4),
        ("ieee", "d_weight"): TileConfig(16, 64, 64, 1, 4, 3),
        ("ieee", "d_hidden"): TileConfig(64, 16, 64, 1, 4, 3),
        ("ieee", "ordered"): TileConfig(64, 16, 64, 1, 4, 3),
    },
    "amd": {
        ("half", "d_weight"): TileConfig(32, 128, 128, 1, 8, 2),
        ("half", "d_hidden"): TileConfig(128, 32, 128, 1, 8, 2),
        ("half", "ordered"): TileConfig(128, 32, 128, 1, 8, 2),
        ("ieee", "d_weight"): TileConfig(32, 64, 64, 1, 4, 2),
        ("ieee", "d_hidden"): TileConfig(64, 32, 64, 1, 4, 2),
        ("ieee", "ordered"): TileConfig(64, 32, 64, 1, 4, 2),
    },
}
LISTED |= {"ada": LISTED["ampere"], "blackwell": LISTED["hopper"]}
LISTED["geforce-blackwell"] = {**LISTED["ada"], ("ieee", "d_hidden"): TileConfig(64, 16, 32, 1, 4, 3)}

#: Rows on every architecture. A row of 128k float32 entries is 32 steps of 16 numbers a thread.
ROW = RowConfig(1, 4096, 8)
#: Rows of two heads at once (`divergence.py`), 8 numbers of each a thread. With 16 some forms fill 128 registers.
ROW_PAIR = RowConfig(1, 1024, 4)

#: Tiles in Triton's interpreter, so small that a small problem has several tiles and splits each way.
INTERPRETED_TILE, INTERPRETED_ROW = TileConfig(16, 32, 16, 2, 1, 1), RowConfig(8, 32, 1)
INTERPRETED_LISTED = TileConfig(64, 64, 32, 1, 1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The choice


def on_device(x: torch.Tensor) -> AbstractContextManager[object]:
    """A context in which the device of `x` is the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def architecture(device: torch.device) -> str:
    """The table's name of a device, or "interpreter" for a CPU. An unknown GPU is taken for Ada, which needs least."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return "amd"
    major, minor = torch.cuda.get_device_capability(device)
    names = {(8, 0): "ampere", (9, 0): "hopper", (10, 0): "blackwell", (10, 3): "blackwell"}
    return names.get((major, minor), "geforce-blackwell" if major == 12 else "ada")


def precision(dtype: torch.dtype) -> str:
    """The precision of float32 products: "tf32" if PyTorch's own may be, else "ieee". Other dtypes ignore it."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and torch.version.hip is None else "ieee"


def operands(dtype: torch.dtype) -> str:
    """The table's name of operands of a dtype."""
    return precision(dtype) if dtype == torch.float32 else "half"


def tile(hidden: torch.Tensor, *, rich: bool) -> TileConfig:
    """The tile of a kernel that multiplies `hidden [N, H]` by the head, for statistics or for a gradient."""
    name = architecture(hidden.device)
    if name == "interpreter":
        return INTERPRETED_TILE
    kind = operands(hidden.dtype)
    shape = "few" if hidden.shape[0] <= FEW_TOKENS else "rich" if rich else "many"
    return TILES[name].get((kind, shape)) or TILES[name][kind, "many"]


def listed_tile(operand: torch.Tensor, product: str) -> TileConfig:
    """The tile of a product ("d_weight", "d_hidden" or "ordered") of a listed gradient with an operand."""
    name = architecture(operand.device)
    return INTERPRETED_LISTED if name == "interpreter" else LISTED[name][operands(operand.dtype), product]


def row(device: torch.device) -> RowConfig:
    """The shape of a kernel on rows of one chunk."""
    return INTERPRETED_ROW if device.type == "cpu" else ROW


def row_pair(device: torch.device) -> RowConfig:
    """The shape of a kernel on rows of two chunks, one of each head."""
    return INTERPRETED_ROW if device.type == "cpu" else ROW_PAIR


@cache
def processors(device: torch.device) -> int:
    """The number of the device's multiprocessors. The interpreter has none; there it is 4."""
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def split(tiles_n: int, tiles_v: int, processors: int) -> tuple[int, int]:
    """(splits, tiles in a split) of the vocabulary: the fewest splits with the shortest schedule.

    A schedule's length is its number of rounds, in each of which a processor takes one program, times the tiles of a
    program. There are at most 128 splits, because each leaves up to five numbers a token behind.
    """
    tiles_v = max(tiles_v, 1)

    def schedule(splits: int) -> int:
        return -(-tiles_n * splits // processors) * -(-tiles_v // splits)

    best = min(range(1, min(tiles_v, 128) + 1), key=schedule)
    each = -(-tiles_v // best)
    return -(-tiles_v // each), each
