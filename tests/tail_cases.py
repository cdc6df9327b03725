"""Calls with an approximate backward, their gradients, and a check that several strategies share."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from logitless import linear_logprobs
from logitless.testing import make_problem

V = 600  # two whole blocks and a short one
#: Options that an exact backward refuses.
APPROXIMATE = ("tail_tolerance", "vocabulary_order", "backward")
SHAPES = ("peaked", "flat", "two-peaked", "dominating", "ties", "random", "in between")


def logits_of(kind: str, count: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """`[count, V]` logits."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, V, generator=draw, dtype=torch.float64)
    top = torch.randint(V, (count, 2), generator=draw)
    if kind == "flat":
        return (1e-3 * noise).to(dtype)
    if kind == "peaked":
        return noise.mul(3).scatter_add_(1, top[:, :1], torch.full((count, 1), 15.0, dtype=torch.float64)).to(dtype)
    if kind == "two-peaked":
        return noise.scatter_add_(1, top, torch.full((count, 2), 9.0, dtype=torch.float64)).to(dtype)
    if kind == "dominating":
        return noise.scatter_(1, top[:, :1], 300.0).to(dtype)
    if kind == "ties":
        return noise.round().mul(4).to(dtype)
    return noise.mul(2 if kind == "in between" else 5).to(dtype)


def gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, coefficient: Tensor, *, bias: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `sum_i coefficient_i logprob_i`."""
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    stats = linear_logprobs(leaves[0], leaves[1], targets, bias=leaves[2], **options)
    (coefficient * stats.logprob).sum().backward()
    return leaves[0].grad, leaves[1].grad, None if bias is None else leaves[2].grad  # type: ignore[union-attr, return-value]


@st.composite
def tail_calls(draw: Any) -> dict[str, Any]:
    count, seed = draw(st.integers(1, 9)), draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed + 1)
    parts = [logits_of(draw(st.sampled_from(SHAPES)), 1, seed + i) for i in range(count)]
    coefficient = torch.randn(count, generator=generator, dtype=torch.float64)
    coefficient *= (torch.rand(count, generator=generator) > 0.2) * 10 ** draw(st.integers(-4, 4))
    bias = None
    if draw(st.booleans()):
        bias = torch.zeros(V, dtype=torch.float64)
        bias[torch.rand(V, generator=generator) < draw(st.sampled_from([0.1, 0.9]))] = -torch.inf
        bias[0] = 0
    allowed = torch.arange(V) if bias is None else bias.isfinite().nonzero()[:, 0]
    return {
        "hidden": torch.cat(parts),
        "weight": torch.eye(V, dtype=torch.float64),
        "targets": allowed[torch.randint(len(allowed), (count,), generator=generator)],
        "coefficient": coefficient,
        "bias": bias,
        "temperature": draw(st.sampled_from([1.0, 0.5, 2.0])),
        "tail_tolerance": draw(st.sampled_from([2.0**-14, 2.0**-10, 2.0**-6, 0.1, 1.0])),
        "chunk_bytes": draw(st.sampled_from([None, 8 * V * 2])),
        "vocabulary_order": draw(st.sampled_from([None, torch.randperm(V, generator=generator)])),
    }


def exact_of(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    options = {name: value for name, value in case.items() if name not in APPROXIMATE}
    return gradients(**options, backward="recompute")


def peaked_problem(count: int = 24, hidden_size: int = 16, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Hidden states, head and likely targets, such that the products in two parts are taken."""
    made = make_problem((count,), hidden_size, 2000, dtype=dtype, spread=6.0, trainable=())
    targets = torch.multinomial((made.hidden.double() @ made.weight.double().T).softmax(-1), 1)[:, 0]
    coefficient = torch.randn(count, generator=torch.Generator().manual_seed(2)).to(dtype)
    return {"hidden": made.hidden, "weight": made.weight, "targets": targets, "coefficient": coefficient}


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def check_compiled(options: dict[str, Any]) -> None:
    """Asserts that a call compiles without a graph break, and has the eager call's gradients."""
    problem = peaked_problem(dtype=torch.float32)

    def total(hidden: Tensor, weight: Tensor) -> Tensor:
        stats = linear_logprobs(hidden, weight, problem["targets"], **options)
        return (problem["coefficient"] * stats.logprob).sum()

    found = []
    for function in (total, torch.compile(total, backend="aot_eager", fullgraph=True)):
        hidden, weight = (problem[name].clone().requires_grad_() for name in ("hidden", "weight"))
        function(hidden, weight).backward()
        found.append((hidden.grad, weight.grad))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)
