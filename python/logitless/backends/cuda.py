"""CUDA C++ kernels (`kernels/cuda`) for NVIDIA GPUs from Ampere on, behind a plain C library.

Forward of half-precision operands: one fused GEMM, whose epilogue keeps two numbers for each token and 128 columns, or
five where entropy, `log_sum_sq` or the mean logit is asked for, and a kernel that merges these; logits stay on the
chip. Elsewhere (other dtypes, single pass, backward, unit gradient): cuBLAS makes a chunk's logits, one kernel measures
them in one read, and one turns them into their gradient in one read and one write (`exact.sweep`, with this backend's
row engine). On Hopper the fused GEMM makes a half-precision chunk's logits too, and measures them on their way to
memory. In numbers of `2 N H V` flops: forward 1, backward 3, single pass 3 in all, frozen head 2 in all.

Tail-corrected, bfloat16 without a softcap: by pairs of a token and a block of 128 columns (`approximate.blocks`),
1 + 3 s in all with s the share of the pairs that matter, for per-token losses and `linear_logprobs` alike. The
forward's merge, or the measuring kernel, leaves the logsumexp of every pair; one kernel lists those that are kept,
three compute them. Anything else is tail-corrected entry by entry, in PyTorch's operations on this backend's row
engine (`approximate.entries`).

Memory: `8 N ceil(V / 128)` bytes of partial results, or 20 with five numbers, within the budget of a chunk, or one
chunk of logits, which its gradient overwrites, and on Hopper its partial results, 2 to 4% of it; and float32
accumulators of the gradients asked for. By blocks: `4 N V / 128` bytes between the passes, twice as much again in the
backward, and the listed gradient of a group of blocks, within the budget of a chunk.
PyTorch's allocator has all of it; the library allocates nothing, waits for nothing, and works on the current stream, so
that a CUDA graph can capture it. A tail-corrected backward it cannot: the host reads one number in it (`ops.tokens`).

Deterministic: no kernel here adds into memory that another block writes to, so values are the same bits every time. Two
sums of gradients have an order that may vary (float32 atomics on a GPU), unless
`torch.use_deterministic_algorithms(True)` asks for one, for more work: PyTorch's `index_add_` of the targets' entries
into the gradients of weight and bias, and the hidden states' gradient of a tail-corrected backward.

Numerics: logits, exponentials and sums are float32 (float64 for float64). A bfloat16 gradient is rounded once, from
float32, on its way into its two products. No kernel here has run on a GPU yet, only its text on a CPU
(kernels/cuda/README.md): `supports` takes CPU tensors where that build is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..types import OUTPUTS, PAIR_BLOCK, PAIR_SPAN, Head, LogitTransform, TokenStats, statistics_dtype
from .approximate.blocks import BlockEngine, Routed, has_aligned_rows
from .approximate.select import block_count
from .backend import Backend
from .exact.chunks import Chunks, chunk_budget, weighted_mean
from .exact.products import spans
from .exact.sweep import concatenate
from .interface import Forward, Problem, RowEngine, RowGradient, Tile, Upstream

if TYPE_CHECKING:
    from ..kernels.cuda.library import Library

CUDA_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
#: Numbers in one partial result of the fused forward, which is of `BLOCK` columns of the vocabulary: enough for
#: logprob, lse, correct and the blocks' logsumexps, or all.
FEWEST_MOMENTS, ALL_MOMENTS = 2, 5
#: Outputs that need all.
OF_ALL_MOMENTS = {"entropy", "mean_logit", "log_sum_sq"}
#: The configuration of `forward_sm90`, a place in `Library.configurations()`.
CONFIGURATION = 0


class Cuda(Backend):
    """The backend of the CUDA library. It overrides the forward, which is fused for half-precision operands."""

    finishes_gradients = True

    def __init__(self) -> None:
        super().__init__(CudaRows(), blocks=CudaBlocks())

    def supports(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Takes GPU tensors of any floating dtype, if the library is built and has code for the GPU.

        It takes CPU tensors where `LOGITLESS_CUDA_LIBRARY` names the library's twin for the CPU.
        """
        from ..kernels.cuda import library

        if dtype not in CUDA_DTYPES:
            return f"it takes {[str(dtype) for dtype in CUDA_DTYPES]}, got {dtype}"
        path = library.location()
        if path is None:
            hint = "install logitless where nvcc is (LOGITLESS_CUDA=require says what is missing)"
            return f"its library is not built: {hint}"
        try:
            loaded = library.load(path)
        except (OSError, AttributeError) as error:
            return f"its library cannot be loaded: {error}"
        wanted = {"cuda": "cuda", "host": "cpu"}[loaded.target]
        if device.type != wanted:
            return f"{path.name} takes tensors on {wanted}, got {device}"
        code = loaded.device_code(device)
        return None if code == 0 else f"{device}: {loaded.explain(code)}"

    def forward(self, problem: Problem, outputs: tuple[str, ...], unit_gradient: bool) -> Forward:
        """One fused GEMM where a kernel takes the operands; unit gradients, and tasks of other rows, want chunks."""
        chunks = unit_gradient or self.row_engine(problem) is not self.rows
        kernel = None if chunks else fused_kernel(problem.hidden, problem.head.weight)
        if kernel is None:
            return super().forward(problem, outputs, unit_gradient)
        return Forward(weighted_mean(problem, _fused_forward(kernel, problem, _wanted(outputs), None)), None)


def _library() -> Library:
    """The library that `supports` has accepted."""
    from ..kernels.cuda import library

    path = library.location()
    assert path is not None
    return library.load(path)


def _wanted(outputs: tuple[str, ...]) -> tuple[str, ...]:
    """The outputs to compute: logprob and lse come always."""
    return tuple(name for name in OUTPUTS if name in ("logprob", "lse", *outputs))


def _transform_numbers(transform: LogitTransform) -> tuple[float, float, float]:
    """The transform as the library takes it: a softcap of 0 stands for none."""
    return transform.logit_scale, transform.softcap or 0.0, transform.temperature


# ---------------------------------------------------------------------------------------------------------------------
# Rows of a chunk


class CudaRows(RowEngine):
    """The row engine of `logitless_measure` and `logitless_gradient`.

    A tile also has the logsumexps of blocks of the vocabulary if `block` says how many columns are one (`PAIR_BLOCK`).
    """

    def __init__(self, block: int = 0) -> None:
        self.block = block

    def buffers(self, head: Head, chunk_dtype: torch.dtype | None) -> int:
        """The chunk itself: its gradient overwrites it."""
        return 1

    def measure(
        self, raw: Tensor, head: Head, targets: Tensor, outputs: tuple[str, ...], mean_logit: Tensor | None
    ) -> Tile:
        """One read of the raw products `[n, V]`, which are left as they are."""
        raw, library = _row_major(raw), _library()
        stats, block_lse = self._results(raw, outputs, mean_logit)
        size = library.measure_workspace(raw.shape[0], raw.shape[1], raw.dtype)
        workspace = torch.empty(size, dtype=torch.uint8, device=raw.device)
        library.launch(
            "measure",
            *_chunk(raw, head, targets),
            *(stats.get(name) for name in OUTPUTS),
            *(block_lse, block_count(raw.shape[1], PAIR_BLOCK), self.block),
            *(workspace, size),
            on=raw.device,
        )
        return _tile(raw, targets, stats, mean_logit, block_lse)

    def project(
        self,
        hidden: Tensor,
        out: Tensor,
        head: Head,
        targets: Tensor,
        outputs: tuple[str, ...],
        mean_logit: Tensor | None,
    ) -> Tile | None:
        """By the fused forward, which stores its products; moments of parts are merged."""
        kernel = projecting_kernel(hidden, head.weight, out.dtype)
        if kernel is None:
            return None
        raw = out if _is_row_major(out) else out.new_empty(out.shape)
        stats, block_lse = self._results(raw, outputs, mean_logit)
        _fuse(kernel, hidden, head, targets, stats, raw, block_lse)
        return _tile(raw, targets, stats, mean_logit, block_lse)

    def _results(
        self, raw: Tensor, outputs: tuple[str, ...], mean_logit: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Room for the statistics that are not known yet, and for the blocks' logsumexps."""
        stats = {name: _vector(raw) for name in _wanted(outputs) if name != "mean_logit" or mean_logit is None}
        return stats, _vector(raw).new_empty(len(raw), block_count(raw.shape[1], PAIR_BLOCK)) if self.block else None

    def recall(self, raw: Tensor, head: Head, targets: Tensor, stats: TokenStats) -> Tile:
        """Nothing to do: the gradient is computed from the raw products themselves."""
        return Tile(_row_major(raw), targets, stats, None)

    def gradient(self, tile: Tile, head: Head, upstream: Upstream, operand: torch.dtype) -> RowGradient:
        """In the memory of the raw products, at twice their row stride where they are float32 and it is narrower."""
        raw, dtype = tile.logits, statistics_dtype(tile.logits.dtype)
        upstream = upstream._replace(mean_logit=None if head.softcap is None else upstream.mean_logit)
        written = operand if raw.dtype == torch.float32 and operand.itemsize <= 4 else raw.dtype
        stats = (tile.stats.logprob, tile.stats.lse, tile.stats.entropy if upstream.entropy is not None else None)
        target = _vector(raw)
        _library().launch(
            "gradient",
            *_chunk(raw, head, tile.targets),
            *(None if x is None else x.to(dtype).contiguous() for x in (*stats, *upstream[:4])),
            *(target, written),
            on=raw.device,
        )
        return RowGradient(raw.view(written)[:, : raw.shape[1]].to(operand), None, target)


def _tile(
    raw: Tensor, targets: Tensor, measured: dict[str, Tensor], mean_logit: Tensor | None, block_lse: Tensor | None
) -> Tile:
    stats = TokenStats(**measured)
    return Tile(raw, targets, stats if mean_logit is None else stats._replace(mean_logit=mean_logit), block_lse)


def _is_row_major(raw: Tensor) -> bool:
    """Whether rows lie one after the other, as a GPU's do. (`contiguous` keeps strides where a size is 1.)"""
    return raw.stride(1) == 1 and raw.stride(0) >= raw.shape[1]


def _row_major(raw: Tensor) -> Tensor:
    return raw if _is_row_major(raw) else raw.new_empty(raw.shape).copy_(raw)


def _vector(raw: Tensor) -> Tensor:
    return torch.empty(len(raw), dtype=statistics_dtype(raw.dtype), device=raw.device)


def _chunk(raw: Tensor, head: Head, targets: Tensor) -> tuple[Tensor | torch.dtype | float | None, ...]:
    """The arguments that both functions begin with."""
    bias = None if head.bias is None else head.bias.contiguous()
    return (raw, raw.dtype, *raw.shape, raw.stride(0), bias, targets.contiguous(), *_transform_numbers(head.transform))


# ---------------------------------------------------------------------------------------------------------------------
# Fused forward


def fused_kernel(hidden: Tensor, weight: Tensor) -> str | None:
    """The fused forward that takes these tensors, None where cuBLAS and the chunk kernels do the work.

    Hopper has its own (wgmma), which a build without CUTLASS leaves out; Ampere and Ada have theirs (mma.sync). From
    Blackwell on, cuBLAS's tensor-core instructions are far ahead of both.
    """
    if hidden.dtype not in (torch.bfloat16, torch.float16) or not (_has_vectors(hidden) and _has_vectors(weight)):
        return None
    if hidden.device.type != "cuda":
        return "forward_sm80"
    generation = torch.cuda.get_device_capability(hidden.device)[0]
    if generation == 9:
        return "forward_sm90" if _library().has("forward_sm90") else None
    return "forward_sm80" if generation == 8 else None


def projecting_kernel(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> str | None:
    """The fused forward that makes a chunk's products of that dtype and measures them; None where cuBLAS makes them.

    Hopper's alone: what mma.sync loses against cuBLAS on an A100 is more than the read of the chunk that it would save
    (kernels/cuda/README.md). The library's twin for the CPU has no other kernel.
    """
    kernel = fused_kernel(hidden, weight) if dtype == torch.float32 else None
    return kernel if kernel == "forward_sm90" or hidden.device.type != "cuda" else None


def _has_vectors(matrix: Tensor) -> bool:
    """Whether rows can be read 16 bytes at a time."""
    return _has_width(matrix) and has_aligned_rows(matrix)


def _has_width(matrix: Tensor) -> bool:
    return matrix.shape[1] > 0 and matrix.shape[1] * matrix.itemsize % 16 == 0


def _fused_forward(kernel: str, problem: Problem, wanted: tuple[str, ...], block_lse: Tensor | None) -> TokenStats:
    """`TokenStats` of every token; `block_lse [N, blocks]` is written if there is one."""
    hidden, head, device = problem.hidden, problem.head, problem.hidden.device
    blocks = block_count(len(head.weight), PAIR_BLOCK)
    tokens = max(1, chunk_budget(problem.chunk_bytes, device.type) // (4 * _moment_count(wanted) * blocks))
    stats = {name: torch.empty(len(hidden), dtype=torch.float32, device=device) for name in wanted}
    for rows in spans(len(hidden), tokens):
        part = {name: x[rows] for name, x in stats.items()}
        of_blocks = None if block_lse is None else block_lse[rows]
        _fuse(kernel, hidden[rows], head, problem.targets[rows], part, None, of_blocks)
    return TokenStats(**stats)


def _moment_count(wanted: Iterable[str]) -> int:
    return FEWEST_MOMENTS if OF_ALL_MOMENTS.isdisjoint(wanted) else ALL_MOMENTS


def _fuse(
    kernel: str,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    stats: dict[str, Tensor],
    raw: Tensor | None,
    block_lse: Tensor | None,
) -> None:
    """Writes the statistics in `stats`, and the raw products `[n, V]` and `block_lse [n, blocks]` if there are any."""
    library, device, weight = _library(), hidden.device, head.weight
    parts, count = block_count(len(weight), PAIR_BLOCK), _moment_count(stats)
    moments = torch.empty(parts * count * len(hidden), dtype=torch.float32, device=device)
    target_logit = torch.empty(len(hidden), dtype=torch.float32, device=device)
    library.launch(
        kernel,
        *(hidden, weight, hidden.dtype, len(hidden), *weight.shape, hidden.stride(0), weight.stride(0)),
        *(None if head.bias is None else head.bias.float().contiguous(), targets.contiguous()),
        *(*_transform_numbers(head.transform), moments, count, target_logit),
        *(raw, 0 if raw is None else raw.stride(0)),
        *((CONFIGURATION,) if kernel == "forward_sm90" else ()),
        on=device,
    )
    sizes = (torch.float32, parts, count, len(hidden), len(weight))
    results = (stats.get(name) for name in OUTPUTS)
    library.launch("merge", moments, target_logit, *sizes, *results, block_lse, parts, on=device)


# ---------------------------------------------------------------------------------------------------------------------
# Tail-corrected backward


class CudaBlocks(BlockEngine):
    """The block engine of `logitless_route` and `logitless_sparse_*`, for bfloat16."""

    def takes(self, hidden: Tensor, head: Head) -> bool:
        return hidden.dtype == torch.bfloat16 and _has_width(head.weight) and head.softcap is None

    def measure(self, problem: Problem, outputs: tuple[str, ...]) -> tuple[TokenStats, Tensor]:
        """By the fused kernel's merge, or by `logitless_measure`, which write the blocks' logsumexps too."""
        shape = (len(problem.hidden), block_count(len(problem.head.weight), PAIR_BLOCK))
        block_lse = torch.empty(shape, dtype=torch.float32, device=problem.hidden.device)
        kernel = fused_kernel(problem.hidden, problem.head.weight)
        if kernel is not None:
            return _fused_forward(kernel, problem, _wanted(outputs), block_lse), block_lse
        chunks, stats = Chunks(CudaRows(PAIR_BLOCK), problem, outputs), []
        for rows in spans(len(problem.hidden), chunks.tokens):
            tile = chunks.measure(rows)
            stats.append(tile.stats)
            block_lse[rows] = tile.private
        return concatenate(stats, torch.float32, problem, outputs), block_lse

    def route(self, block_lse: Tensor, lse: Tensor, magnitude: Tensor, threshold: Tensor) -> Routed:
        count, width = block_lse.shape
        routed = Routed(
            lse.new_empty(width * -(-count // PAIR_SPAN) + 1, dtype=torch.int32),
            lse.new_empty(count * width, dtype=torch.int32),
            torch.empty_like(block_lse),
        )
        inputs = (block_lse, width, lse, magnitude, threshold)
        _library().launch("route", *inputs, count, width, *routed, width, on=lse.device)
        return routed

    def gradient(
        self, problem: Problem, lse: Tensor, factor: Tensor, routed: Routed, first: int, count: int, out: Tensor
    ) -> None:
        hidden, (weight, bias) = problem.hidden, problem.head[:2]
        _library().launch(
            "sparse_gradient",
            *(hidden, weight, len(hidden), *weight.shape, hidden.stride(0), weight.stride(0)),
            *(
                None if bias is None else bias.float().contiguous(),
                problem.targets,
                *_transform_numbers(problem.head.transform),
            ),
            *(lse, None, None, factor, None),
            *(routed.starts, routed.tokens, first, count, out, len(out)),
            on=hidden.device,
        )

    def add_weight(self, gradient: Tensor, hidden: Tensor, routed: Routed, first: int, count: int, out: Tensor) -> None:
        sizes = (len(hidden), len(out), hidden.shape[1], hidden.stride(0))
        pairs = (routed.starts, routed.tokens, first, count)
        _library().launch("sparse_d_weight", gradient, hidden, *sizes, *pairs, out, out.stride(0), on=out.device)

    def add_hidden(self, gradient: Tensor, weight: Tensor, routed: Routed, first: int, count: int, out: Tensor) -> None:
        """By float32 reductions in memory; in order, with more work, where PyTorch is told to be deterministic."""
        sizes = (len(out), *weight.shape, weight.stride(0))
        pairs = (routed.starts, routed.tokens, first, count, int(torch.are_deterministic_algorithms_enabled()))
        _library().launch("sparse_d_hidden", gradient, weight, *sizes, *pairs, out, out.stride(0), on=out.device)


CUDA = Cuda()
