"""The vocabulary between the ops and a backend: one call's tensors, its results, and the engines behind a backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..types import DivergenceOptions, Head, Options, TokenStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# ---------------------------------------------------------------------------------------------------------------------
# A call


@dataclass(frozen=True)
class Problem:
    """Tokens that count, and the head. N may be 0."""

    hidden: Tensor  # [N, H]
    head: Head
    targets: Tensor  # [N] int64 in [0, V), or [N, K] with -1 for an absent place
    chunk_bytes: int | None = None  # budget for a chunk of logits; None: the backend's default
    chunk_dtype: torch.dtype | None = None  # of a chunk's logits; None: the statistics'
    vocabulary_order: Tensor | None = None  # [V] int64, of the tail's blocks (`order`); None: the head's own
    rounds_head: bool = False  # the head's gradient may come in the head's dtype, where one product makes it
    logit_weight: Tensor | None = None  # [V] in the statistics' dtype: mean_logit is `mean_j w_j z_j`; None: w = 1
    head_sum: Tensor | None = None  # [V, H] in the sums' dtype, to which an exact backward adds the head's gradient


@dataclass(frozen=True)
class Side:
    """Tokens that count, and the head of their distributions: the model's, or the reference's."""

    hidden: Tensor  # [N, H]
    head: Head
    head_sum: Tensor | None = None  # [V, H] in the sums' dtype, to which the head's gradient is added


@dataclass(frozen=True)
class DivergenceProblem:
    """Two distributions for each token. H may differ between the sides, V and N may not."""

    model: Side
    ref: Side
    options: DivergenceOptions
    chunk_bytes: int | None = None  # budget for both sides' logits of a chunk; None: the backend's default
    ranks: Ranks | None = None  # the processes that share both heads' rows; None: these are all


class Ranks(NamedTuple):
    """The processes that share the rows of the heads of a divergence."""

    group: ProcessGroup
    widest: int  # the most rows that one of them has, by which all cut the tokens into chunks


class Needs(NamedTuple):
    """Which gradients somebody asked for."""

    hidden: bool
    weight: bool
    bias: bool


class Upstream(NamedTuple):
    """Gradients that reach the differentiable statistics, of their shapes; None means zero."""

    logprob: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    tail: Tensor | None = None

    def by_probability(self, like: Tensor) -> Tensor:
        """`lse - logprob`, `[N]`: the gradient that reaches entries by their probability, without the entropy's."""
        zero = torch.zeros_like(like)
        return (zero if self.lse is None else self.lse) - (zero if self.logprob is None else self.logprob)


PerToken = TypeVar("PerToken", TokenStats, Upstream)


def rows_of(vectors: PerToken, rows: slice) -> PerToken:
    """Some tokens' statistics, or their gradients."""
    return type(vectors)(*(None if x is None else x[rows] for x in vectors))


#: (statistics of a chunk, its rows) -> (sum of its losses, gradients to those statistics)
Coefficients = Callable[[TokenStats, slice], tuple[Tensor, Upstream]]


class SummedLosses(NamedTuple):
    """A single pass's task: a sum of losses of the tokens' statistics, and the gradients that it needs."""

    outputs: tuple[str, ...]  # the statistics that the losses read
    coefficients: Coefficients
    groups: Tensor | None  # [N], non-decreasing: the tokens of one group are seen together
    needs: Needs


# ---------------------------------------------------------------------------------------------------------------------
# Its results


class Forward(NamedTuple):
    """The result of a forward."""

    stats: TokenStats  # [N]; always with logprob and lse, which the backward needs
    unit: Tensor | None  # [N, H] d logprob / d hidden, where asked for


class Gradients(NamedTuple):
    """Gradients in the sums' dtype (float32, or float64; see `Problem.rounds_head`); None where not needed."""

    hidden: Tensor | None  # [N, H]
    weight: Tensor | None  # [V, H]
    bias: Tensor | None  # [V]


class SinglePass(NamedTuple):
    """The result of a single pass."""

    loss: Tensor  # [] the sum of the per-token losses
    logprob: Tensor  # of the targets' shape
    gradients: Gradients  # of that sum


class DivergenceResult(NamedTuple):
    """Divergences, and gradients of their sum, each times its upstream gradient."""

    values: Tensor  # [N]
    model: Gradients
    ref: Gradients


class Saved(NamedTuple):
    """The tensors that an approximate forward leaves for its backward. Their meaning is the strategy's own affair."""

    counts: Tensor  # [N] int32: how many of the entries belong to each token
    column: Tensor  # [K] int32
    value: Tensor  # [K]
    by_block: Tensor  # [N, as many as `saved_width` says]


def empty_gradients(side: Problem | Side, needs: Needs, dtype: torch.dtype) -> Gradients:
    """Memory for the sums that are needed: zeros for the bias, for the others what a first product overwrites."""
    count, (weight, bias) = len(side.hidden), side.head[:2]
    return Gradients(
        empty_sum(side.hidden, dtype, count) if needs.hidden else None,
        empty_sum(weight, dtype, count) if needs.weight else None,
        torch.zeros(bias.shape, dtype=dtype, device=bias.device) if needs.bias and bias is not None else None,
    )


def empty_sum(like: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """Memory for a sum over `count` tokens; zeros where there is none, and so no product to overwrite it."""
    make = torch.empty if count else torch.zeros
    return make(like.shape, dtype=dtype, device=like.device)


def zero_gradients(problem: Problem, needs: Needs, dtype: torch.dtype) -> Gradients:
    """The gradients of a loss that no statistic reaches."""
    return Gradients(*(None if x is None else x.zero_() for x in empty_gradients(problem, needs, dtype)))


# ---------------------------------------------------------------------------------------------------------------------
# Engines: the row operations on a chunk of logits


class Tile(NamedTuple):
    """A chunk of rows that was measured, or recalled."""

    logits: Tensor  # [n, V] whatever the engine left there
    targets: Tensor  # [n]
    stats: TokenStats  # [n]; always with logprob and lse
    private: Any  # the engine's own


class RowGradient(NamedTuple):
    """`dL / d(raw product)` of a chunk: `row_scale[:, None] * matrix`, plus `target` at each row's target entry.

    The target's entry of the matrix is 0, unless `target` is None. Without a softcap the mean logit's part is not in
    it: the sums add it by two products with one vector.
    """

    matrix: Tensor  # [n, V] in the operands' dtype
    row_scale: Tensor | None  # [n]; None means 1
    target: Tensor | None  # [n]; None where the targets' entries are in the matrix


class RowEngine(Protocol):
    """Row operations on a chunk of raw products `hidden @ weight.T`. A tile is used once: `gradient` may overwrite it.

    `head` comes with its bias in the statistics' dtype. Four methods make an engine; `project` is for kernels that
    measure a chunk's products while they make them.
    """

    def buffers(self, head: Head, chunk_dtype: torch.dtype | None) -> int:
        """How many buffers of a chunk's size the operations take, the chunk's own among them."""
        ...

    def measure(
        self, raw: Tensor, head: Head, targets: Tensor, outputs: tuple[str, ...], mean_logit: Tensor | None
    ) -> Tile:
        """Statistics of raw products `[n, V]`; `mean_logit` where it is known already."""
        ...

    def recall(self, raw: Tensor, head: Head, targets: Tensor, stats: TokenStats) -> Tile:
        """A tile whose statistics are known, for a backward that computes the logits again."""
        ...

    def gradient(self, tile: Tile, head: Head, upstream: Upstream, operand: torch.dtype) -> RowGradient:
        """The gradient of the raw products from the gradients that reach the statistics."""
        ...

    def project(
        self,
        hidden: Tensor,
        out: Tensor,
        head: Head,
        targets: Tensor,
        outputs: tuple[str, ...],
        mean_logit: Tensor | None,
    ) -> Tile | None:
        """Raw products in `out [n, V]` and their statistics, by one kernel; None where a GEMM and `measure` do it."""
        return None


class RawSide(NamedTuple):
    """One side of a chunk of two distributions: raw products, and how they become logits and a gradient."""

    raw: Tensor  # [n, V] in the statistics' dtype; overwritten
    head: Head  # its bias in the statistics' dtype
    operand: torch.dtype | None  # of the gradient for the raw products; None: nobody needs it


class DivergenceEngine(Protocol):
    """Row operations on a chunk of two distributions."""

    def __call__(
        self, model: RawSide, ref: RawSide, options: DivergenceOptions, upstream: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Values `[n]`, and `upstream * d value / d raw product` of either side that needs it.

        A gradient may lie in the place of the raw products. Both are None without `upstream [n]`.
        """
        ...


class ExactPasses(Protocol):
    """The exact passes of a backend, which its approximate strategies stand on and fall back to."""

    def row_engine(self, problem: Problem) -> RowEngine:
        """The row engine of a sweep."""
        ...

    def tokens_at_once(self, hidden: Tensor, head: Head, options: Options) -> int:
        """The longest group of tokens that a single pass keeps whole."""
        ...

    def forward(self, problem: Problem, outputs: tuple[str, ...], unit_gradient: bool) -> Forward:
        """`TokenStats` of every token and, for a frozen head, `d logprob / d hidden`."""
        ...

    def backward(self, problem: Problem, stats: TokenStats, upstream: Upstream, needs: Needs) -> Gradients:
        """Gradients from `upstream`, the logits computed again."""
        ...


class Approximate(Protocol):
    """A strategy that approximates gradients: `backward="tail_corrected"` or `"screened"`."""

    def tokens_at_once(self, hidden: Tensor, head: Head, options: Options) -> int:
        """The longest group of tokens that `single_pass` keeps whole."""
        ...

    def saved_width(self, hidden: Tensor, head: Head) -> int:
        """How many numbers `forward` leaves for each token in `Saved.by_block`; of fake tensors too."""
        ...

    def forward(self, problem: Problem, outputs: tuple[str, ...], tolerance: float) -> tuple[Forward, Saved]:
        """`TokenStats` of every token, and what `backward` needs of its logits."""
        ...

    def backward(
        self, problem: Problem, stats: TokenStats, saved: Saved, upstream: Upstream, needs: Needs, tolerance: float
    ) -> Gradients:
        """Gradients from what `forward` saved."""
        ...

    def single_pass(self, problem: Problem, losses: SummedLosses, tolerance: float) -> SinglePass:
        """The sum of a loss and its approximate gradients."""
        ...
