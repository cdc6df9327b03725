"""A per-token loss inside an op: its values, chunk by chunk, and its derivative for the statistics by autograd."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ...backends.interface import Coefficients, Upstream
from ...types import TokenStats
from ..functions import PerTokenLoss
from ..tokens import Tokens


def coefficients(
    function: PerTokenLoss,
    inputs: Sequence[Tensor],
    outputs: tuple[str, ...],
    mask: Tensor | None,
    *,
    differentiate: bool,
    kept: Tensor | None,
) -> Coefficients:
    """`function` of the statistics named in `outputs`, with its derivative; both are 0 outside a mask.

    `kept [n]` takes every token's own loss; None where the function gives other than one for each token.
    """

    def of_chunk(stats: TokenStats, rows: slice) -> tuple[Tensor, Upstream]:
        here = Tokens(None, None if mask is None else mask[rows])
        stats = TokenStats(**{name: here.take(x) for name, x in stats._asdict().items() if name in outputs})
        constants = [x[rows] for x in inputs]
        shape = None if kept is None else (rows.stop - rows.start,)
        if not differentiate:
            return _summed(here.take(check_losses(function(stats, *constants), shape)), kept, rows), Upstream()
        with _autograd_inside_an_op():
            known = {name: x.detach() for name, x in stats._asdict().items() if x is not None}
            leaves = TokenStats(**{name: x.requires_grad_(name in Upstream._fields) for name, x in known.items()})
            losses = check_losses(function(leaves, *constants), shape)
            _check_leaves(losses, leaves)
            total = _summed(here.take(losses), kept, rows)
            upstream = _derivative(total, leaves)
        return total.detach(), Upstream(*(here.take(g) for g in upstream))

    return of_chunk


def _summed(losses: Tensor, kept: Tensor | None, rows: slice) -> Tensor:
    """The losses' sum; each of them is kept, where there is a place for it."""
    if kept is not None:
        kept[rows] = losses.detach()
    return losses.sum()


def _derivative(total: Tensor, leaves: TokenStats) -> Upstream:
    """Gradients of a chunk's sum for the differentiable statistics; None for one that it does not read."""
    wanted = {name: x for name, x in leaves._asdict().items() if x is not None and x.requires_grad}
    if not total.requires_grad:
        return Upstream()
    results = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return Upstream(**dict(zip(wanted, results, strict=True)))


def check_losses(losses: object, shape: tuple[int, ...] | None) -> Tensor:
    """A per-token loss's result: one loss per token, where a shape says how many."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"per_token_loss: expected it to return a tensor, got {type(losses).__name__}")
    if shape is not None and losses.shape != shape:
        raise ValueError(f"per_token_loss: expected losses of shape {list(shape)} from it, got {list(losses.shape)}")
    return losses


def _check_leaves(losses: Tensor, leaves: TokenStats) -> None:
    """Raises unless the gradient leads to the statistics alone."""
    known = {id(x) for x in leaves if x is not None}
    for leaf in _graph_leaves(losses):
        if id(leaf) not in known:
            raise ValueError(
                f"per_token_loss: closes over a tensor of shape {list(leaf.shape)} that requires a gradient, which the "
                "single pass cannot give; detach it, or use linear_logprobs and apply the loss to its result"
            )


def _graph_leaves(tensor: Tensor) -> Iterator[Tensor]:
    """The leaves that autograd would accumulate a gradient into."""
    if tensor.grad_fn is None:
        if tensor.requires_grad:
            yield tensor
        return
    stack, seen = [tensor.grad_fn], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)


@contextmanager
def _autograd_inside_an_op() -> Iterator[None]:
    """Switches autograd back on: a custom op runs below it, and a loss on `[chunk]` vectors is differentiated by it."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, name))
    with (
        torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        yield
