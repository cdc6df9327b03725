"""Streamed gradients (kernels/cpu), screened: the screen's error, the bound, and what is left to others.

With the identity for a head, hidden states are logits and `d hidden` is the gradient of the logits itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_sets import SETS, using
from cuda_build import needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from list_cases import check_approximate
from loss_cases import B, LossBatch, T, loss_inputs, run_loss
from tail_cases import check_compiled, exact_of, gradients, peaked_problem, relative, tail_calls
from torch import Tensor

from logitless import linear_cross_entropy, linear_logprobs, linear_loss, linear_token_loss, losses, tail_report
from logitless.backends import BACKENDS
from logitless.backends.approximate.streamed import Streamed
from logitless.kernels.cpu import library as cpu_library
from logitless.losses import DPO, Loss
from logitless.testing import make_problem

pytestmark = needs_compiler
FLOATING = ("hidden", "weight", "bias", "coefficient")
SCREENED: dict[str, Any] = {"backward": "screened", "tail_tolerance": 2.0**-8}


@pytest.fixture(scope="module", params=SETS, autouse=True)
def library(request: pytest.FixtureRequest) -> Iterator[cpu_library.Library]:
    """This checkout's, not an installed one, with each set of instructions."""
    with using(request.param) as loaded:
        yield loaded


def logit_error(hidden: Tensor, weight: Tensor, slope: float = 1.0) -> Tensor:
    """`[N]`: what a screened logit is off by at most: half a unit an integer, of rows of 32767 - sqrt(H) / 2 units."""
    depth = weight.shape[1]
    units = 32767 - math.sqrt(depth) / 2
    of_row = math.sqrt(depth) / 2 / units
    norms = hidden.double().norm(dim=1) * weight.double().norm(dim=1).max()
    return slope * norms * (2 * of_row + of_row**2 + 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


@settings(max_examples=60)
@given(
    count=st.integers(1, 20),
    vocabulary=st.integers(1, 700),
    depth=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bias=st.booleans(),
    transform=st.sampled_from([(1.0, 1.0), (0.25, 3.0), (4.0, 0.5)]),
    spread=st.sampled_from([0.5, 4.0, 20.0]),
    layout=st.sampled_from(["contiguous", "transposed", "strided"]),
    chunk=st.sampled_from([None, 1, 40_000]),
    seed=st.integers(0, 10**6),
)
def test_statistics(count, vocabulary, depth, dtype, bias, transform, spread, layout, chunk, seed) -> None:
    """Within the screen's error of float64's, which only what is not computed again has."""
    made = make_problem((count,), depth, vocabulary, dtype=dtype, bias=bias, spread=spread, trainable=(), seed=seed)
    hidden, weight = (laid_out(x, layout).requires_grad_() for x in (made.hidden, made.weight))
    options = {"bias": made.bias, "logit_scale": transform[0], "temperature": transform[1], "chunk_bytes": chunk}
    found = linear_logprobs(hidden, weight, made.targets, outputs=("logprob", "lse"), **options, **SCREENED)
    options = {**options, "bias": None if bias is False else made.bias.double()}
    head = (made.hidden.double(), made.weight.double(), made.targets)
    want = linear_logprobs(*head, outputs=("logprob", "lse"), **options, backend="reference")
    slope = transform[0] / transform[1]
    rounding = 1e-5 * (1 + want.lse.abs() + want.logprob.abs())
    for name in ("logprob", "lse"):
        off = (getattr(found, name).double() - getattr(want, name)).abs()
        assert (off <= logit_error(made.hidden, made.weight, slope) + rounding).all(), name


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return x.T.contiguous().T
    return torch.stack([x, x], 1)[:, 0] if layout == "strided" else x


def test_what_matters_leaves_no_error_of_the_screen() -> None:
    """At a low tolerance everything that counts is computed again: float32's error is far below an integer's."""
    problem = peaked_problem(dtype=torch.float32, hidden_size=64)
    problem["hidden"] *= 4
    head = (problem["hidden"].requires_grad_(), problem["weight"], problem["targets"])
    found = linear_logprobs(*head, backward="screened", tail_tolerance=2.0**-20).logprob.detach().double()
    exact = linear_logprobs(*(x.detach().double() if x.is_floating_point() else x for x in head)).logprob
    assert (found - exact).abs().max() < 1e-4 < logit_error(head[0].detach(), head[1]).min()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_nan_is_not_hidden(name: str, value: float) -> None:
    problem = peaked_problem(dtype=torch.float32)
    problem["bias"] = torch.zeros(2000)
    problem[name].view(-1)[5] = value
    hidden = problem["hidden"].requires_grad_()
    stats = linear_logprobs(hidden, problem["weight"], problem["targets"], bias=problem["bias"], **SCREENED)
    touched = torch.tensor([name != "hidden"] * 24)
    touched[0] = True
    assert stats.logprob[touched].isfinite().logical_not().all() and stats.logprob[~touched].isfinite().all()
    stats.logprob.sum().backward()
    assert hidden.grad[touched].isnan().any(1).all() and hidden.grad[~touched].isfinite().all()


def test_masked_vocabulary_and_a_masked_target() -> None:
    problem = peaked_problem(dtype=torch.float32)
    bias = torch.zeros(2000)
    bias[100:1900] = -torch.inf
    problem["targets"][:] = torch.arange(24)
    problem["targets"][3] = 200
    hidden, weight = problem["hidden"].requires_grad_(), problem["weight"].requires_grad_()
    stats = linear_logprobs(hidden, weight, problem["targets"], bias=bias, **SCREENED)
    exact = linear_logprobs(hidden, weight, problem["targets"], bias=bias)
    assert stats.logprob[3] == -torch.inf
    torch.testing.assert_close(stats.logprob, exact.logprob, rtol=0, atol=1e-3)
    stats.logprob[:3].sum().backward()
    assert weight.grad[100:1900].abs().max() == 0 and hidden.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


@settings(max_examples=60)
@given(tail_calls())
def test_the_bounds_hold_and_rows_keep_their_sum(case: dict[str, Any]) -> None:
    """To the screen's error, a factor of exp(2 delta) on every probability; where a chunk is flat, all is exact."""
    case = {name: x.float() if name in FLOATING and x is not None else x for name, x in case.items()}
    with tail_report() as report:
        found, of_weight, of_bias = gradients(**case, backward="screened")
    doubled = {name: x.double() if name in FLOATING and x is not None else x for name, x in case.items()}
    exact, exact_weight, exact_bias = exact_of(doubled)
    size = case["coefficient"].double().abs() / case["temperature"]
    delta = logit_error(case["hidden"], case["weight"], 1 / case["temperature"])
    error, rounding = found.double() - exact, 2e-5 * size
    allowed = report.l1_bound * (2 * delta).exp() + (report.left > 0) * size * torch.expm1(2 * delta) + rounding
    assert (error.abs().sum(-1) <= allowed).all()
    assert (found.double().sum(-1).abs() <= rounding).all()
    assert (report.tail_mass <= 1 + 1e-5).all()
    hidden = case["hidden"].double().abs()
    assert ((of_weight.double() - exact_weight).abs().sum(0) <= hidden.T @ allowed).all()
    if of_bias is not None and exact_bias is not None:
        assert (of_bias.double() - exact_bias).abs().sum() <= allowed.sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_gradient_is_tail_correcteds(dtype: torch.dtype) -> None:
    """Nearly the same entries are kept; for d hidden those too that a small coefficient leaves to d weight's tail."""
    problem = peaked_problem(dtype=dtype, count=50)
    problem["bias"] = torch.linspace(-1, 1, 2000).to(dtype)
    found = {}
    for backward in ("tail_corrected", "screened"):
        with tail_report() as report:
            found[backward] = gradients(**problem, **{**SCREENED, "backward": backward}, chunk_bytes=4 * 2000 * 24)
        found[backward] = (*found[backward], torch.tensor(float(report.kept)))
        assert report.exact_tokens == 0
    for x, y in zip(*found.values(), strict=True):
        assert x.dtype == y.dtype and relative(x.double(), y.double()) < 0.02


def test_entries_that_no_token_needs_join_the_tail_once() -> None:
    """A flat chunk outweighs the other one, all of whose kept entries are needless."""
    problem = peaked_problem(count=33, dtype=torch.float32)
    problem["hidden"][:32] = 0
    problem["coefficient"] = torch.tensor([1.0] * 32 + [1e-6])
    options = {"backward": "screened", "tail_tolerance": 2.0**-8, "chunk_bytes": 1}
    with tail_report() as report:
        gradients(**problem, **options)
    assert report.exact_tokens == 32 and report.kept == 32 * 2000 + 1
    target = linear_logprobs(*(problem[name] for name in ("hidden", "weight", "targets"))).logprob[32].exp()
    torch.testing.assert_close(report.tail_mass[32], (1 - target).double(), rtol=1e-3, atol=1e-4)


def test_an_order_of_the_vocabulary_changes_the_blocks_alone() -> None:
    """Entries that share a row of the head stand apart in it, and together in the order: their means are exact."""
    count, vocabulary = 30, 2048
    kinds = torch.arange(vocabulary) % 4
    rows = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    weight = rows[kinds] + 1e-4 * torch.randn(vocabulary, 16, generator=torch.Generator().manual_seed(1))
    hidden = torch.randn(count, 16, generator=torch.Generator().manual_seed(2))
    bias = torch.full((vocabulary,), -9.0)
    bias[:40] = 0
    targets = torch.arange(count)
    problem = dict(hidden=hidden, weight=weight, bias=bias, targets=targets, coefficient=torch.ones(count))
    exact = gradients(**problem)
    order = kinds.argsort(stable=True)
    plain = gradients(**problem, backward="screened", tail_tolerance=2.0**-6)
    sorted_ = gradients(**problem, backward="screened", tail_tolerance=2.0**-6, vocabulary_order=order)
    assert relative(plain[0], exact[0]) > 4e-3 and relative(sorted_[0], exact[0]) < 2e-4


def test_flat_distributions_take_the_exact_products() -> None:
    made = make_problem((40,), 8, 2000, spread=0.5, trainable=())
    problem = dict(hidden=made.hidden, weight=made.weight, targets=made.targets, coefficient=torch.ones(40))
    with tail_report() as report:
        found = gradients(**problem, backward="screened")
    assert report.exact_tokens == 40
    for x, y in zip(found[:2], gradients(**problem)[:2], strict=True):
        torch.testing.assert_close(x, y)


def test_a_flat_chunk_among_others_is_computed_again() -> None:
    """Chunks of 32 tokens, the least, of which the second is flat."""
    problem = peaked_problem(count=160, dtype=torch.float32)
    problem["hidden"][32:64] = 0
    options = {**SCREENED, "chunk_bytes": 1}
    with tail_report() as report:
        found = gradients(**problem, **options)
    assert report.exact_tokens == 32 and len(report.left) == 160
    exact = gradients(**problem)
    torch.testing.assert_close(found[0][32:64], exact[0][32:64])
    for x, y in zip(found[:2], exact[:2], strict=True):
        assert relative(x, y) < 0.03


@pytest.mark.parametrize(
    "options", [{"softcap": 20.0}, {"outputs": ("logprob", "entropy")}, {"outputs": ("logprob", "correct")}]
)
def test_what_it_does_not_take_is_tail_correcteds(options: dict[str, Any]) -> None:
    problem = peaked_problem(dtype=torch.float32)
    found = []
    for backward in ("tail_corrected", "screened"):
        hidden, weight = (problem[name].clone().requires_grad_() for name in ("hidden", "weight"))
        stats = linear_logprobs(hidden, weight, problem["targets"], **options, **{**SCREENED, "backward": backward})
        loss = stats.logprob.sum() if stats.entropy is None else (stats.logprob + stats.entropy).sum()
        loss.backward()
        found.append((stats.logprob.detach(), hidden.grad, weight.grad))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_a_loss_of_statistics() -> None:
    """Between a whole forward and a whole backward; ignored tokens cost nothing and are not reported."""
    problem = peaked_problem(dtype=torch.float32, count=50)
    problem["targets"][::5] = -100
    found = []
    for options in ({}, SCREENED):
        hidden, weight = (problem[name].clone().requires_grad_() for name in ("hidden", "weight"))
        with tail_report() as report:
            loss = linear_token_loss(
                hidden, weight, problem["targets"], lambda s: -s.logprob.detach().exp() * s.logprob, **options
            )
            loss.backward()
        found.append((loss.detach(), hidden.grad, weight.grad))
    assert len(report.left) == 40 and report.exact_tokens == 0
    assert found[1][1][::5].abs().max() == 0
    for x, y in zip(*found, strict=True):
        assert relative(x, y) < 0.03


@pytest.mark.parametrize("classes", [None, torch.linspace(0.5, 2.0, 2000)], ids=["", "weighted"])
def test_smoothed_labels(classes: Tensor | None) -> None:
    """The mean logit, linear in the hidden states, is added apart."""
    problem = peaked_problem(dtype=torch.float32, count=50)
    found = []
    for options in ({}, SCREENED):
        hidden, weight = (problem[name].clone().requires_grad_() for name in ("hidden", "weight"))
        with tail_report() as report:
            call = dict(label_smoothing=0.1, class_weight=classes)
            loss = linear_cross_entropy(hidden, weight, problem["targets"], **call, **options)
            loss.backward()
        found.append((loss.detach(), hidden.grad, weight.grad))
    assert len(report.left) == 50 and report.exact_tokens == 0
    for x, y in zip(*found, strict=True):
        assert relative(x, y) < 0.03


def test_pairs_longer_than_a_chunk() -> None:
    """No group is cut, and none is too long."""
    problem = peaked_problem(dtype=torch.float32, count=64)
    hidden, targets = problem["hidden"].view(4, 16, -1), problem["targets"].view(4, 16)
    found = []
    for options in ({}, {**SCREENED, "chunk_bytes": 4 * 2000 * 6}):
        leaves = [x.clone().requires_grad_() for x in (hidden, problem["weight"])]
        loss = linear_loss(DPO(), *leaves, targets, ref_logprob=torch.full((4, 16), -2.0), **options).loss
        loss.backward()
        found.append((loss.detach(), leaves[0].grad, leaves[1].grad))
    for x, y in zip(*found, strict=True):
        assert relative(x, y) < 0.03


def test_a_frozen_head_and_frozen_hidden_states() -> None:
    problem = peaked_problem(dtype=torch.float32)
    both = gradients(**problem, **SCREENED)
    for trainable, want in (("hidden", both[0]), ("weight", both[1])):
        leaves = {name: problem[name].clone().requires_grad_(name == trainable) for name in ("hidden", "weight")}
        stats = linear_logprobs(leaves["hidden"], leaves["weight"], problem["targets"], **SCREENED)
        (problem["coefficient"] * stats.logprob).sum().backward()
        torch.testing.assert_close(leaves[trainable].grad, want)


def test_without_a_gradient_the_forward_is_exact() -> None:
    problem = peaked_problem(dtype=torch.float32)
    arguments = (problem["hidden"], problem["weight"], problem["targets"])
    found, exact = linear_logprobs(*arguments, **SCREENED), linear_logprobs(*arguments)
    assert torch.equal(found.logprob, exact.logprob)


def test_no_tokens_and_none_that_counts() -> None:
    problem = peaked_problem(dtype=torch.float32)
    problem["targets"][:] = -100
    assert gradients(**problem, **SCREENED)[1].abs().max() == 0
    empty = {name: value[:0] if name != "weight" else value for name, value in problem.items()}
    assert gradients(**empty, **SCREENED)[1].abs().max() == 0


def test_the_same_bits_whatever_the_number_of_threads() -> None:
    problem = peaked_problem(dtype=torch.float32, count=100)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gradients(**problem, **SCREENED)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_compiled_gradients_are_the_eager_ones() -> None:
    check_compiled(SCREENED)


# ---------------------------------------------------------------------------------------------------------------------
# Where it cannot be used


def ask(**options: Any) -> None:
    problem = peaked_problem(dtype=torch.float32)
    linear_logprobs(problem["hidden"].requires_grad_(), problem["weight"], problem["targets"], **SCREENED, **options)


def test_another_backend_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"backward: 'screened' .* backend='chunked', got backend='triton'"):
        ask(backend="triton")


def test_a_library_that_is_missing_or_of_no_use_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu_library, "location", lambda: None)
    with pytest.raises(ValueError, match="backward: 'screened' cannot be used: its library is not built"):
        ask()
    monkeypatch.setattr(cpu_library, "location", lambda: tmp_path / "none.so")
    with pytest.raises(ValueError, match="its library cannot be loaded"):
        ask()
    monkeypatch.undo()
    monkeypatch.setattr(cpu_library.load(cpu_library.location()), "set", None)
    with pytest.raises(ValueError, match="the processor lacks AVX2"):
        ask()


def test_the_strategy_is_not_a_backend() -> None:
    strategy = BACKENDS["chunked"].approximate("screened")
    assert isinstance(strategy, Streamed) and strategy.screens
    with pytest.raises(ValueError, match="backend: expected one of"):
        linear_logprobs(torch.randn(2, 3), torch.randn(5, 3), torch.zeros(2).long(), backend="screened")


# ---------------------------------------------------------------------------------------------------------------------
# Every loss


def peaked_batch(loss: Loss) -> LossBatch:
    """Rows of sequences with likely targets, whose products are taken in two parts."""
    made = peaked_problem(dtype=torch.float32, count=B * T)
    targets = made["targets"].view(B, T)
    targets[torch.arange(T) >= torch.tensor([5, 3, 4, 1, 5, 2])[:, None]] = -100
    inputs = loss_inputs(loss, B, T, 16, torch.Generator().manual_seed(3), dtype=torch.float32)
    return LossBatch(made["hidden"].view(B, T, -1), made["weight"], targets, inputs)


def test_lists_of_ids() -> None:
    check_approximate("screened")


def takes_it(loss: losses.Loss) -> bool:
    return not (loss.compares_distributions or loss.lists)


@pytest.mark.parametrize("backward", ["tail_corrected", "screened"])
@pytest.mark.parametrize("name", [name for name in losses.names() if takes_it(losses.get(name))])
def test_every_loss_takes_it(name: str, backward: str) -> None:
    batch = peaked_batch(losses.get(name))
    exact = run_loss(name, batch)
    found = run_loss(name, batch, **{**SCREENED, "backward": backward})
    assert relative(found[0], exact[0]) < 1e-3
    for x, y in zip(found[1:], exact[1:], strict=True):
        assert relative(x, y) < 0.05 or y.norm() == 0
