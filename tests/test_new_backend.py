"""CONTRIBUTING's example of a new backend, as it stands: a row engine of four methods, and every op runs on it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from logitless import backends, linear_divergence, linear_logprobs, linear_token_loss, tail_report
from logitless.testing import TokenProblem, make_problem
from logitless.types import DIFFERENTIABLE, OUTPUTS

ROOT = Path(__file__).parents[1]
CAPPED = {"softcap": 3.0, "temperature": 0.7, "logit_scale": 1.5}


@pytest.fixture(autouse=True, scope="module")
def plain() -> Iterator[None]:
    """The example's backend is in the table, under the name that the text gives it."""
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("**A new backend**")[2]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(compile(found[1], "CONTRIBUTING.md", "exec"), names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.BACKENDS, "plain", names["PLAIN"])
        yield


def problem(**options: Any) -> TokenProblem:
    return make_problem((13,), 5, 17, dtype=torch.float64, bias=True, ignored=0.2, **options)


def gradients(loss: Tensor, p: TokenProblem) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [x for x in p if x is not None and x.requires_grad]))


@pytest.mark.parametrize("transform", [{}, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("trainable", [("hidden", "weight", "bias"), ("hidden",)], ids=["trainable", "frozen head"])
def test_statistics_and_their_gradients(trainable: tuple[str, ...], transform: dict[str, float]) -> None:
    p, results = problem(trainable=trainable), []
    for backend in ("plain", "reference"):
        options = {"bias": p.bias, "backend": backend, "chunk_bytes": 6 * 17 * 8 * 4, **transform}
        if backend == "reference":
            del options["chunk_bytes"]
        stats = linear_logprobs(p.hidden, p.weight, p.targets, outputs=OUTPUTS, **options)
        loss = sum((i + 1) * getattr(stats, name).sin().sum() for i, name in enumerate(DIFFERENTIABLE))
        results.append([*stats, *gradients(loss, p)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("transform", [{}, CAPPED], ids=["plain", "capped"])
def test_a_single_pass(transform: dict[str, float]) -> None:
    p, results = problem(), []
    for backend in ("plain", "reference"):
        loss = linear_token_loss(
            p.hidden,
            p.weight,
            p.targets,
            lambda stats: stats.entropy * stats.lse - stats.logprob * stats.mean_logit,
            outputs=DIFFERENTIABLE,
            bias=p.bias,
            backend=backend,
            **transform,
        )
        results.append([loss, *gradients(loss, p)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_tail_corrected_gradients() -> None:
    """Approximate where the distributions are peaked, within the bound that the report gives."""
    draw = torch.Generator().manual_seed(0)
    hidden = (12 * torch.randn(9, 700, generator=draw, dtype=torch.float64)).requires_grad_()
    weight, targets = torch.eye(700, dtype=torch.float64), hidden.argmax(-1)  # `d hidden` is the logits' gradient
    results = []
    for backward in ("tail_corrected", "recompute"):
        with tail_report() as report:
            loss = linear_logprobs(hidden, weight, targets, backend="plain", backward=backward).logprob.sum()
            results.append(torch.autograd.grad(loss, hidden)[0])
        if backward == "tail_corrected":
            assert report.exact_tokens == 0
            bound = report.l1_bound
    error = (results[0] - results[1]).abs().sum(-1)
    assert error.max() > 0 and (error <= bound + 1e-12).all()


def test_a_divergence() -> None:
    p, ref, results = problem(), make_problem((13,), 4, 17, dtype=torch.float64, seed=1, trainable=()), []
    for backend in ("plain", "reference"):
        options: dict[str, Any] = {"kind": "js", "reduction": "sum", "backend": backend}
        loss = linear_divergence(p.hidden, p.weight, ref.hidden, ref.weight, **options)
        results.append([loss, *torch.autograd.grad(loss, [p.hidden, p.weight])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
