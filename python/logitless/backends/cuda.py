"""CUDA C++ kernels (`kernels/cuda`) for NVIDIA GPUs from Ampere on, behind a plain C library.

Forward of half-precision operands: one fused GEMM, whose epilogue keeps two numbers for each token and 128 columns, or
five where entropy, `log_sum_sq` or the mean logit is asked for, and a kernel that merges these; logits stay on the
chip. Elsewhere (other dtypes, single pass, backward, unit gradient): cuBLAS makes a chunk's logits, one kernel measures
them in one read, and one turns them into their gradient in one read and one write (`sweep`, with this backend's row
engine). On Hopper the fused GEMM makes a half-precision chunk's logits too, and measures them on their way to memory.
In numbers of `2 N H V` flops: forward 1, backward 3, single pass 3 in all, frozen head 2 in all.

Tail-corrected, bfloat16 without a softcap: by pairs of a token and a block of 128 columns (`blocks`), 1 + 3 s in all
with s the share of the pairs that matter, for per-token losses and `linear_logprobs` alike. The forward's merge, or the
measuring kernel, leaves the logsumexp of every pair; one kernel lists those that are kept, three compute them. Anything
else is tail-corrected entry by entry, in PyTorch's operations on this backend's row engine (`tail`).

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

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..types import OUTPUTS, LogitTransform, Options, TokenStats, statistics_dtype
from . import blocks, sweep
from .blocks import BLOCK, Routed
from .divergence import rows as divergence_rows
from .divergence import sweep as divergence_sweep
from .problem import (
    Coefficients,
    DivergenceProblem,
    DivergenceResult,
    Forward,
    Gradients,
    Needs,
    Problem,
    SinglePass,
    Upstream,
)
from .sweep import RowEngine, RowGradient, RowHead, Tile

if TYPE_CHECKING:
    from ..kernels.cuda.library import Library

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
#: Numbers in one partial result of the fused forward, which is of `BLOCK` columns of the vocabulary: enough for
#: logprob, lse, correct and the blocks' logsumexps, or all.
FEWEST_MOMENTS, ALL_MOMENTS = 2, 5
#: Outputs that need all.
OF_ALL_MOMENTS = {"entropy", "mean_logit", "log_sum_sq"}
#: The configuration of `forward_sm90`, a place in `Library.configurations()`.
CONFIGURATION = 0


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """GPU tensors of any floating dtype, where the library is built and has code for the GPU; CPU tensors where
    `LOGITLESS_CUDA_LIBRARY` names the library's twin for the CPU."""
    from ..kernels.cuda import library

    if dtype not in DTYPES:
        return f"it takes {[str(dtype) for dtype in DTYPES]}, got {dtype}"
    path = library.location()
    if path is None:
        return "its library is not built: install logitless where nvcc is (LOGITLESS_CUDA=require says what is missing)"
    try:
        loaded = library.load(path)
    except (OSError, AttributeError) as error:
        return f"its library cannot be loaded: {error}"
    wanted = {"cuda": "cuda", "host": "cpu"}[loaded.target]
    if device.type != wanted:
        return f"{path.name} takes tensors on {wanted}, got {device}"
    code = loaded.device_code(device)
    return None if code == 0 else f"{device}: {loaded.explain(code)}"


def tokens_at_once(hidden: Tensor, weight: Tensor, options: Options) -> int:
    """The longest group that `single_pass` keeps whole; any, where it goes by blocks."""
    if options.tail is not None and TAIL.takes(hidden, weight, options.transform):
        return sys.maxsize
    return sweep.chunk_tokens(hidden, weight, options, ENGINE.buffers(options), trainable=weight.requires_grad)


def forward(problem: Problem, outputs: tuple[str, ...], unit_gradient: bool) -> Forward:
    """`TokenStats` of every token and, for a frozen head, `d logprob / d hidden`."""
    kernel = None if unit_gradient else fused_kernel(problem.hidden, problem.weight)
    if kernel is None:
        return sweep.forward(ENGINE, problem, outputs, unit_gradient)
    return Forward(_fused_forward(kernel, problem, _wanted(outputs), None), None)


def backward(problem: Problem, stats: TokenStats, upstream: Upstream, needs: Needs) -> Gradients:
    """Gradients from `upstream`, the chunk's logits computed again."""
    return sweep.backward(ENGINE, problem, stats, upstream, needs)


def single_pass(
    problem: Problem, outputs: tuple[str, ...], coefficients: Coefficients, groups: Tensor | None, needs: Needs
) -> SinglePass:
    """The sum of a loss and its gradients in one sweep."""
    return sweep.single_pass(ENGINE, problem, outputs, coefficients, groups, needs)


def divergence(problem: DivergenceProblem, upstream: Tensor | None, needs: tuple[Needs, Needs]) -> DivergenceResult:
    """Divergences and, where `upstream` is given, gradients, in one sweep, by PyTorch's row operations."""
    return divergence_sweep(divergence_rows, problem, upstream, needs)


def _library() -> Library:
    """The library that `supports` has accepted."""
    from ..kernels.cuda import library

    path = library.location()
    assert path is not None
    return library.load(path)


def _wanted(outputs: tuple[str, ...]) -> tuple[str, ...]:
    """logprob and lse come always."""
    return tuple(name for name in OUTPUTS if name in ("logprob", "lse", *outputs))


def _options(transform: LogitTransform) -> tuple[float, float, float]:
    """As the library takes them: softcap 0 for none."""
    return transform.logit_scale, transform.softcap or 0.0, transform.temperature


# ---------------------------------------------------------------------------------------------------------------------
# Rows of a chunk


class RowKernels(RowEngine):
    """`sweep.RowEngine` by `logitless_measure` and `logitless_gradient`; a tile has the logsumexps of blocks of the
    vocabulary where `block` says how many columns are one (`BLOCK`, if any)."""

    def __init__(self, block: int = 0) -> None:
        self.block = block

    def buffers(self, problem: Problem | Options) -> int:
        """The chunk itself: its gradient overwrites it."""
        return 1

    def measure(
        self, raw: Tensor, head: RowHead, targets: Tensor, outputs: tuple[str, ...], mean_logit: Tensor | None
    ) -> Tile:
        """One read of the raw products `[n, V]`, which are left as they are."""
        raw, library = _rows(raw), _library()
        found, block_lse = self._results(raw, outputs, mean_logit)
        size = library.measure_workspace(raw.shape[0], raw.shape[1], raw.dtype)
        workspace = torch.empty(size, dtype=torch.uint8, device=raw.device)
        library.launch(
            "measure",
            *_chunk(raw, head, targets),
            *(found.get(name) for name in OUTPUTS),
            *(block_lse, blocks.blocks(raw.shape[1]), self.block),
            *(workspace, size),
            on=raw.device,
        )
        return _tile(raw, targets, found, mean_logit, block_lse)

    def project(
        self,
        hidden: Tensor,
        weight: Tensor,
        out: Tensor,
        head: RowHead,
        targets: Tensor,
        outputs: tuple[str, ...],
        mean_logit: Tensor | None,
    ) -> Tile | None:
        """By the fused forward, which stores its products; moments of parts are merged."""
        kernel = projecting_kernel(hidden, weight, out.dtype)
        if kernel is None:
            return None
        raw = out if _is_row_major(out) else out.new_empty(out.shape)
        found, block_lse = self._results(raw, outputs, mean_logit)
        _fuse(kernel, hidden, weight, head, targets, found, raw, block_lse)
        return _tile(raw, targets, found, mean_logit, block_lse)

    def _results(
        self, raw: Tensor, outputs: tuple[str, ...], mean_logit: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Room for the statistics that are not known yet, and for the blocks' logsumexps."""
        found = {name: _vector(raw) for name in _wanted(outputs) if name != "mean_logit" or mean_logit is None}
        return found, _vector(raw).new_empty(len(raw), blocks.blocks(raw.shape[1])) if self.block else None

    def recall(self, raw: Tensor, head: RowHead, targets: Tensor, stats: TokenStats) -> Tile:
        """Nothing to do: the gradient is made of the raw products themselves."""
        return Tile(_rows(raw), targets, stats, None)

    def gradient(self, tile: Tile, head: RowHead, upstream: Upstream, operand: torch.dtype) -> RowGradient:
        """In the memory of the raw products, at twice their row stride where they are float32 and it is narrower."""
        raw, dtype = tile.logits, statistics_dtype(tile.logits.dtype)
        capped = head.transform.softcap is not None
        upstream = upstream._replace(mean_logit=upstream.mean_logit if capped else None)
        made = operand if raw.dtype == torch.float32 and operand.itemsize <= 4 else raw.dtype
        stats = (tile.stats.logprob, tile.stats.lse, tile.stats.entropy if upstream.entropy is not None else None)
        target = _vector(raw)
        _library().launch(
            "gradient",
            *_chunk(raw, head, tile.targets),
            *(None if x is None else x.to(dtype).contiguous() for x in (*stats, *upstream)),
            *(target, made),
            on=raw.device,
        )
        return RowGradient(raw.view(made)[:, : raw.shape[1]].to(operand), None, target)


ENGINE = RowKernels()


def _tile(
    raw: Tensor, targets: Tensor, found: dict[str, Tensor], mean_logit: Tensor | None, block_lse: Tensor | None
) -> Tile:
    stats = TokenStats(**found)
    return Tile(raw, targets, stats if mean_logit is None else stats._replace(mean_logit=mean_logit), block_lse)


def _is_row_major(raw: Tensor) -> bool:
    """As a GPU's chunks are; a CPU's are not. (`contiguous` keeps strides where a size is 1.)"""
    return raw.stride(1) == 1 and raw.stride(0) >= raw.shape[1]


def _rows(raw: Tensor) -> Tensor:
    return raw if _is_row_major(raw) else raw.new_empty(raw.shape).copy_(raw)


def _vector(raw: Tensor) -> Tensor:
    return torch.empty(len(raw), dtype=statistics_dtype(raw.dtype), device=raw.device)


def _chunk(raw: Tensor, head: RowHead, targets: Tensor) -> tuple[Tensor | torch.dtype | float | None, ...]:
    """The arguments that both functions begin with."""
    bias = None if head.bias is None else head.bias.contiguous()
    return (raw, raw.dtype, *raw.shape, raw.stride(0), bias, targets.contiguous(), *_options(head.transform))


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
    """Rows can be read 16 bytes at a time."""
    return _has_width(matrix) and blocks.has_aligned_rows(matrix)


def _has_width(matrix: Tensor) -> bool:
    return matrix.shape[1] > 0 and matrix.shape[1] * matrix.itemsize % 16 == 0


def _fused_forward(kernel: str, problem: Problem, wanted: tuple[str, ...], block_lse: Tensor | None) -> TokenStats:
    """`block_lse [N, blocks]` is written where it is given."""
    hidden, device = problem.hidden, problem.hidden.device
    budget = problem.chunk_bytes or sweep.DEFAULT_CHUNK_BYTES.get(device.type, sweep.DEFAULT_CHUNK_BYTES_ACCELERATOR)
    tokens = max(1, budget // (4 * _moment_count(wanted) * blocks.blocks(len(problem.weight))))
    head = RowHead(problem.bias, problem.transform)
    found = {name: torch.empty(len(hidden), dtype=torch.float32, device=device) for name in wanted}
    for rows in sweep.spans(len(hidden), tokens):
        part = {name: x[rows] for name, x in found.items()}
        of_blocks = None if block_lse is None else block_lse[rows]
        _fuse(kernel, hidden[rows], problem.weight, head, problem.targets[rows], part, None, of_blocks)
    return TokenStats(**found)


def _moment_count(wanted: Iterable[str]) -> int:
    return FEWEST_MOMENTS if OF_ALL_MOMENTS.isdisjoint(wanted) else ALL_MOMENTS


def _fuse(
    kernel: str,
    hidden: Tensor,
    weight: Tensor,
    head: RowHead,
    targets: Tensor,
    found: dict[str, Tensor],
    raw: Tensor | None,
    block_lse: Tensor | None,
) -> None:
    """Writes the statistics in `found`, and the raw products `[n, V]` and `block_lse [n, blocks]` where given."""
    library, device = _library(), hidden.device
    parts, count = blocks.blocks(len(weight)), _moment_count(found)
    moments = torch.empty(parts * count * len(hidden), dtype=torch.float32, device=device)
    target_logit = torch.empty(len(hidden), dtype=torch.float32, device=device)
    library.launch(
        kernel,
        *(hidden, weight, hidden.dtype, len(hidden), *weight.shape, hidden.stride(0), weight.stride(0)),
        *(None if head.bias is None else head.bias.float().contiguous(), targets.contiguous()),
        *(*_options(head.transform), moments, count, target_logit),
        *(raw, 0 if raw is None else raw.stride(0)),
        *((CONFIGURATION,) if kernel == "forward_sm90" else ()),
        on=device,
    )
    sizes = (torch.float32, parts, count, len(hidden), len(weight))
    results = (found.get(name) for name in OUTPUTS)
    library.launch("merge", moments, target_logit, *sizes, *results, block_lse, parts, on=device)


# ---------------------------------------------------------------------------------------------------------------------
# Tail-corrected backward


class BlockKernels:
    """`blocks.BlockEngine` by `logitless_route` and `logitless_sparse_*`, for bfloat16."""

    def takes(self, hidden: Tensor, weight: Tensor, transform: LogitTransform) -> bool:
        return hidden.dtype == torch.bfloat16 and _has_width(weight) and transform.softcap is None

    def measure(self, problem: Problem, outputs: tuple[str, ...]) -> tuple[TokenStats, Tensor]:
        """As `forward`: the fused kernel's merge, or `logitless_measure`, writes the blocks' logsumexps too."""
        shape = (len(problem.hidden), blocks.blocks(len(problem.weight)))
        block_lse = torch.empty(shape, dtype=torch.float32, device=problem.hidden.device)
        kernel = fused_kernel(problem.hidden, problem.weight)
        if kernel is not None:
            return _fused_forward(kernel, problem, _wanted(outputs), block_lse), block_lse
        chunks, found = sweep.Chunks(RowKernels(BLOCK), problem, outputs), []
        for rows in sweep.spans(len(problem.hidden), chunks.tokens):
            tile = chunks.measure(rows)
            found.append(tile.stats)
            block_lse[rows] = tile.private
        return sweep.concatenate(found, torch.float32, problem, outputs), block_lse

    def route(self, block_lse: Tensor, lse: Tensor, magnitude: Tensor, threshold: Tensor) -> Routed:
        count, width = block_lse.shape
        routed = Routed(
            lse.new_empty(width * -(-count // blocks.SLICE) + 1, dtype=torch.int32),
            lse.new_empty(count * width, dtype=torch.int32),
            torch.empty_like(block_lse),
        )
        inputs = (block_lse, width, lse, magnitude, threshold)
        _library().launch("route", *inputs, count, width, *routed, width, on=lse.device)
        return routed

    def gradient(
        self, problem: Problem, lse: Tensor, factor: Tensor, routed: Routed, first: int, count: int, out: Tensor
    ) -> None:
        hidden, weight, bias = problem.hidden, problem.weight, problem.bias
        _library().launch(
            "sparse_gradient",
            *(hidden, weight, len(hidden), *weight.shape, hidden.stride(0), weight.stride(0)),
            *(None if bias is None else bias.float().contiguous(), problem.targets, *_options(problem.transform)),
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


TAIL = blocks.Tail(BlockKernels(), ENGINE, backward)
tail_forward, tail_backward, tail_single_pass, tail_blocks = TAIL.forward, TAIL.backward, TAIL.single_pass, TAIL.blocks
