"""f-divergence SFT: the table of reward transforms against its definition, and the losses against their formulas."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import ALPHAS, SFT_LOSSES, doubles, ident, random_stats, reference_like, value_loss, weight_of
from torch import Tensor

from logitless.losses import FDivergenceSFT
from logitless.losses.sft.reward_transforms import (
    REWARD_TRANSFORMS,
    SATURATED_PEARSON,
    RewardTransform,
    alpha_transform,
)
from logitless.types import TokenStats

# The divergences: their table against its own definition


def rows() -> list[tuple[str, RewardTransform]]:
    named = [*REWARD_TRANSFORMS.items(), ("saturated", SATURATED_PEARSON)]
    return named + [(f"alpha={alpha}", alpha_transform(alpha)) for alpha in ALPHAS]


ROWS = pytest.mark.parametrize("row", [row for _, row in rows()], ids=[name for name, _ in rows()])


@ROWS
def test_divergence_is_normalised(row: RewardTransform) -> None:
    zero, one = doubles(0.0, grad=True), doubles(1.0)
    assert row.value(zero).item() == 0.0
    assert row.weight(zero).item() == 1.0
    assert abs(row.generator(one).item()) < 1e-14
    (gradient,) = torch.autograd.grad(row.value(zero).sum(), zero)
    assert gradient.item() == pytest.approx(1.0, rel=1e-15)


@ROWS
def test_phi_is_the_conjugate_of_its_generator(row: RewardTransform) -> None:
    """phi(x) = -sup_u (-x u - f(u)) = min_u (x u + f(u)), over a fine grid of u."""
    if row is REWARD_TRANSFORMS["pearson_chi2"]:
        x = torch.linspace(-3, 2, 41, dtype=torch.float64)  # beyond 2 the exact conjugate saturates
    elif row is REWARD_TRANSFORMS["total_variation"]:
        x = torch.linspace(-0.5, 0.5, 41, dtype=torch.float64)
    else:
        x = torch.linspace(-3 if row.low is None else max(row.low, -3), 4, 41, dtype=torch.float64)
    u = torch.linspace(math.log(1e-9), math.log(1e4), 100_001, dtype=torch.float64).exp()
    u = torch.cat([u, doubles(1.0)])  # where total variation has its kink
    f = row.generator(u)
    expected = torch.stack([(value * u + f).min() for value in x])
    torch.testing.assert_close(row.value(x), expected, rtol=1e-6, atol=3e-6)


@ROWS
def test_slope_is_the_derivative_of_phi_everywhere(row: RewardTransform) -> None:
    x = torch.linspace(-9, 9, 73, dtype=torch.float64) + 0.011
    x = torch.cat([x, doubles(0.0 if row.low is None else row.low)]).requires_grad_()
    (gradient,) = torch.autograd.grad(row.value(x).sum(), x)
    torch.testing.assert_close(gradient, row.weight(x), rtol=1e-9, atol=1e-12)


@ROWS
def test_continuation_keeps_value_slope_and_concavity(row: RewardTransform) -> None:
    x = torch.linspace(-60, 20, 4001, dtype=torch.float64)
    value, weight = row.value(x), row.weight(x)
    assert bool((weight.diff() <= 1e-12).all()), "concave"
    assert bool((value.diff(n=2) <= 1e-9).all()), "concave"
    if row is not REWARD_TRANSFORMS["pearson_chi2"]:
        assert bool((weight >= 0).all()), "increasing"
    if row.low is not None:
        low = doubles(row.low)
        assert row.low_slope == pytest.approx(row.slope(low).item(), rel=1e-14)
        assert row.low_slope <= (math.exp(5) * (1 + 1e-12) if row.low > -1e4 else 5001)
        torch.testing.assert_close(row.value(low), row.phi(low))
        torch.testing.assert_close(row.value(low - 7), row.phi(low) - 7 * row.low_slope)


def test_alpha_contains_the_named_divergences() -> None:
    x = torch.linspace(-0.45, 3, 50, dtype=torch.float64)

    def at(alpha: float, scale: float) -> Tensor:
        return scale * alpha_transform(alpha).value(x / scale)

    torch.testing.assert_close(at(1, 1), REWARD_TRANSFORMS["forward_kl"].value(x))
    torch.testing.assert_close(at(0, 1), REWARD_TRANSFORMS["reverse_kl"].value(x))
    torch.testing.assert_close(at(0.5, 0.5), REWARD_TRANSFORMS["squared_hellinger"].value(x))
    torch.testing.assert_close(at(2, 2), REWARD_TRANSFORMS["neyman_chi2"].value(x))
    torch.testing.assert_close(at(-1, 2), SATURATED_PEARSON.value(x))


@pytest.mark.parametrize("limit", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", [1e-3, 1e-6, 1e-9, 1e-11, 1e-13, 1e-200, -1e-9, -1e-13])
def test_alpha_approaches_its_limits_smoothly(limit: float, dtype: torch.dtype, step: float) -> None:
    x = torch.linspace(-0.4, 3, 40, dtype=dtype, requires_grad=True)
    near, exact = alpha_transform(limit + step).value(x), alpha_transform(limit).value(x)
    tolerance = 10 * abs(step) + 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(near, exact, rtol=tolerance, atol=tolerance)
    (gradient,) = torch.autograd.grad(near.sum(), x)
    torch.testing.assert_close(gradient, alpha_transform(limit).weight(x), rtol=tolerance, atol=tolerance)


def test_alpha_orientation_is_that_of_the_divergence_itself() -> None:
    """sum P f(Q / P) is (1 - sum P^a Q^(1-a)) / (a (1 - a)); 1 gives KL(P || Q), 0 gives KL(Q || P)."""
    p, q = doubles(0.2, 0.5, 0.3), doubles(0.6, 0.1, 0.3)
    for alpha in (-1.0, 0.3, 0.5, 1.7):
        expected = (1 - (p**alpha * q ** (1 - alpha)).sum()) / (alpha * (1 - alpha))
        torch.testing.assert_close((p * alpha_transform(alpha).generator(q / p)).sum(), expected)
    torch.testing.assert_close((p * alpha_transform(1.0).generator(q / p)).sum(), (p * (p / q).log()).sum())
    torch.testing.assert_close((p * alpha_transform(0.0).generator(q / p)).sum(), (q * (q / p).log()).sum())
    divergence = {name: (p * row.generator(q / p)).sum() for name, row in REWARD_TRANSFORMS.items()}
    torch.testing.assert_close(divergence["forward_kl"], (p * (p / q).log()).sum())
    torch.testing.assert_close(divergence["reverse_kl"], (q * (q / p).log()).sum())
    torch.testing.assert_close(divergence["pearson_chi2"], ((q - p) ** 2 / p).sum())
    torch.testing.assert_close(divergence["neyman_chi2"], ((q - p) ** 2 / q).sum())
    torch.testing.assert_close(divergence["total_variation"], (q - p).abs().sum() / 2)
    torch.testing.assert_close(divergence["squared_hellinger"], 2 * (1 - (p * q).sqrt().sum()))
    m = (p + q) / 2
    torch.testing.assert_close(divergence["js"], (p * (p / m).log()).sum() + (q * (q / m).log()).sum())


# f-divergence SFT

CLOSED_FORMS = {
    "total_variation": (lambda x: x, lambda x: 1.0),
    "pearson_chi2": (lambda x: x - x * x / 4, lambda x: 1 - x / 2),
    "squared_hellinger": (lambda x: x / (1 + x), lambda x: (1 + x) ** -2),
    "reverse_kl": (lambda x: 1 - math.exp(-x), lambda x: math.exp(-x)),
    "forward_kl": (lambda x: math.log(1 + x), lambda x: 1 / (1 + x)),
    "js": (lambda x: math.log(2 - math.exp(-x)), lambda x: 1 / (2 * math.exp(x) - 1)),
    "neyman_chi2": (lambda x: 2 * (math.sqrt(1 + x) - 1), lambda x: (1 + x) ** -0.5),
}


def test_every_named_divergence_has_a_closed_form_here() -> None:
    assert set(CLOSED_FORMS) == set(REWARD_TRANSFORMS)


@pytest.mark.parametrize("name", CLOSED_FORMS)
@settings(max_examples=40)
@given(logprob=st.floats(-8, 0), x=st.floats(-0.29, 1.9), beta=st.floats(0.01, 2))
def test_f_divergence_value_and_weight(name: str, logprob: float, x: float, beta: float) -> None:
    phi, slope = CLOSED_FORMS[name]
    loss = FDivergenceSFT(divergence=name, beta=beta)
    reference = doubles(logprob - x / beta)
    value = loss(TokenStats(logprob=doubles(logprob)), reference)
    torch.testing.assert_close(value, doubles(-phi(x) / beta), rtol=1e-7, atol=1e-9 / beta)
    torch.testing.assert_close(weight_of(loss, doubles(logprob), reference), doubles(slope(x)), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("loss", SFT_LOSSES, ids=ident)
def test_f_divergence_gradcheck(loss: FDivergenceSFT) -> None:
    logprob = doubles(-7.0, -2.3, -0.1, -3.0, -40.0, grad=True)
    reference = doubles(-6.7, -2.4, -3.1, -1.7, -2.0)
    assert torch.autograd.gradcheck(lambda value: loss(TokenStats(logprob=value), reference), logprob)


@pytest.mark.parametrize("loss", SFT_LOSSES, ids=ident)
def test_f_divergence_becomes_nll_as_beta_vanishes(loss: FDivergenceSFT) -> None:
    logprob, reference = doubles(-7.0, -0.1, -2.0), doubles(-2.0, -3.0, -2.0)
    for beta, tolerance in ((1e-3, 2e-2), (1e-8, 2e-7), (1e-30, 1e-12)):
        small = dataclasses.replace(loss, beta=beta)
        value = small(TokenStats(logprob=logprob), reference)
        torch.testing.assert_close(value, reference - logprob, rtol=tolerance, atol=1e-15)
        weight = weight_of(small, logprob, reference)
        torch.testing.assert_close(weight, torch.ones_like(weight), rtol=tolerance, atol=0)
    tiny = dataclasses.replace(loss, beta=1e-30)(TokenStats(logprob=logprob.float()), reference.float())
    torch.testing.assert_close(tiny, (reference - logprob).float())


@pytest.mark.parametrize("loss", SFT_LOSSES, ids=ident)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.01, 1.0, 10.0])
def test_f_divergence_is_finite_for_finite_input(loss: FDivergenceSFT, dtype: torch.dtype, beta: float) -> None:
    loss = dataclasses.replace(loss, beta=beta)
    logprob = torch.tensor([-1e4, -1e3, -1e3, 0.0, 0.0, 0.0, -1.0], dtype=dtype)
    reference = torch.tensor([0.0, 0.0, -1e3, -1e3, -1e4, 0.0, -1.0], dtype=dtype)
    assert loss(TokenStats(logprob=logprob), reference).isfinite().all()
    weight = weight_of(loss, logprob, reference)
    assert weight.isfinite().all()
    torch.testing.assert_close(weight[[2, 5, 6]], torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("loss", SFT_LOSSES, ids=ident)
def test_f_divergence_of_an_impossible_target(loss: FDivergenceSFT) -> None:
    logprob, reference = torch.tensor([-math.inf]), torch.tensor([-3.0])
    assert loss(TokenStats(logprob=logprob), reference).item() == math.inf
    assert weight_of(loss, logprob, reference).item() == pytest.approx(loss.row.low_slope)


def test_chi2_raw_is_a_regression_and_saturated_stops() -> None:
    beta, logprob = 0.5, doubles(0.0, -1.0, -9.0, -0.5)
    reference = doubles(-9.0, -1.0, -1.0, -4.5)
    rho = logprob - reference
    raw, saturated = FDivergenceSFT(beta=beta), FDivergenceSFT(beta=beta, saturate=True)
    regression = beta / 4 * (rho - 2 / beta) ** 2 - 1 / beta
    torch.testing.assert_close(raw(TokenStats(logprob=logprob), reference), regression)
    torch.testing.assert_close(weight_of(raw, logprob, reference), 1 - beta * rho / 2)
    torch.testing.assert_close(weight_of(saturated, logprob, reference), torch.relu(1 - beta * rho / 2))
    value = saturated(TokenStats(logprob=logprob), reference)
    torch.testing.assert_close(value, torch.where(beta * rho > 2, doubles(-1 / beta), regression))


def minimiser(loss: FDivergenceSFT, expert: Tensor, reference: Tensor) -> Tensor:
    """The distribution that minimises the expected loss under the expert, by Newton-like descent on free logits."""
    logits = reference.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=400, tolerance_grad=1e-12, tolerance_change=1e-16, history_size=20,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = (expert * loss(TokenStats(logprob=logits.log_softmax(-1)), reference.log())).sum()
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().softmax(-1)


EXPERT = doubles(0.30, 0.05, 0.25, 0.10, 0.22, 0.08)
REFERENCE = doubles(0.10, 0.20, 0.30, 0.15, 0.05, 0.20)


def test_reverse_kl_settles_on_the_geometric_mixture() -> None:
    for beta in (0.1, 0.7):
        found = minimiser(FDivergenceSFT(divergence="reverse_kl", beta=beta), EXPERT, REFERENCE)
        mixture = EXPERT ** (1 / (1 + beta)) * REFERENCE ** (beta / (1 + beta))
        torch.testing.assert_close(found, mixture / mixture.sum(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("loss", SFT_LOSSES, ids=ident)
def test_fixed_point_lies_between_reference_and_expert(loss: FDivergenceSFT) -> None:
    """pi proportional to expert * phi'(beta log(pi / ref)); for total variation the expert itself."""
    found = minimiser(loss, EXPERT, REFERENCE)
    weighted = EXPERT * loss.row.weight(loss.beta * (found / REFERENCE).log())
    torch.testing.assert_close(found, weighted / weighted.sum(), rtol=1e-5, atol=1e-7)
    if loss.divergence == "total_variation":
        torch.testing.assert_close(found, EXPERT, rtol=1e-6, atol=1e-8)
    else:
        distance = [(EXPERT * (EXPERT / other).log()).sum().item() for other in (EXPERT, found, REFERENCE)]
        assert distance[0] < distance[1] < distance[2]


# f-divergence SFT with the logsumexp as the value


def by_hand(loss: FDivergenceSFT, rho: Tensor, drift: Tensor) -> Tensor:
    """(1 / beta) (-sum_t phi(x_t) + beta dl_0) of one sequence, with a loop over its counted tokens."""
    total = drift[0]
    for t in range(len(rho)):
        after = drift[t + 1] if t + 1 < len(rho) else 0.0
        total = total - loss.row.value(loss.beta * (rho[t] + drift[t] - after)) / loss.beta
    return total


def test_value_lse_declares_what_it_needs() -> None:
    assert (value_loss().level, FDivergenceSFT().level) == ("sequence", "token")
    assert (value_loss().inputs, FDivergenceSFT().inputs) == (("ref_logprob", "ref_lse"), ("ref_logprob",))
    assert (value_loss().outputs, FDivergenceSFT().outputs) == (("logprob", "lse"), ("logprob",))


@pytest.mark.parametrize("divergence", [*REWARD_TRANSFORMS, "alpha"])
def test_value_lse_is_its_formula(divergence: str) -> None:
    """Prompt tokens, padding, a turn of somebody else in the middle, and a row where nothing counts."""
    mask = torch.tensor(
        [[0, 0, 1, 1, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1], [0] * 9, [0, 0, 0, 1, 0, 0, 0, 0, 0]]
    )
    mask = mask.bool()
    full, logits, _ = random_stats(4, 9)
    stats = TokenStats(*(None if x is None else x.masked_fill(~mask, 0.0) for x in full))
    ref_logprob, ref_lse = reference_like(stats)  # not 0 at ignored tokens: that must not matter
    loss = value_loss(divergence=divergence)
    tokens = loss(stats, ref_logprob, ref_lse, mask=mask)
    expected = [by_hand(loss, (full.logprob - ref_logprob)[b, mask[b]], (full.lse - ref_lse)[b, mask[b]])
                for b in (0, 1, 3)]  # fmt: skip
    torch.testing.assert_close(tokens.sum(-1)[[0, 1, 3]], torch.stack(expected))
    assert tokens[~mask].eq(0).all()
    (gradient,) = torch.autograd.grad(tokens.sum(), logits, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(torch.stack(expected).sum(), logits)
    torch.testing.assert_close(gradient, expected_gradient)


def test_value_lse_of_sequences_behind_one_another() -> None:
    lengths, mask = [4, 1, 5], torch.tensor([0, 1, 1, 1, 1, 0, 0, 1, 1, 0]).bool()
    full, _, _ = random_stats(10)
    ref_logprob, ref_lse = reference_like(full)
    sequence = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    flat = value_loss()(full, ref_logprob, ref_lse, mask=mask, sequence=sequence)
    pieces = [
        value_loss()(TokenStats(logprob=p, lse=q), r, s, mask=m)
        for p, q, r, s, m in zip(
            *(x.split(lengths) for x in (full.logprob, full.lse, ref_logprob, ref_lse, mask)),
            strict=True,
        )
    ]
    torch.testing.assert_close(flat, torch.cat(pieces), rtol=0, atol=0)
    one_row = value_loss()(full, ref_logprob, ref_lse, mask=mask)
    assert not torch.allclose(one_row, flat)


def test_value_lse_total_variation_telescopes_to_nll() -> None:
    stats, logits, _ = random_stats(3, 6)
    ref_logprob, ref_lse = reference_like(stats)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 1, 0], [0, 1, 1, 1, 1, 0]]).bool()
    assert stats.logprob is not None
    tokens = value_loss(divergence="total_variation")(stats, ref_logprob, ref_lse, mask=mask)
    nll = torch.where(mask, ref_logprob - stats.logprob, 0.0)
    torch.testing.assert_close(tokens.sum(-1), nll.sum(-1))
    torch.testing.assert_close(
        torch.autograd.grad(tokens.sum(), logits, retain_graph=True), torch.autograd.grad(nll.sum(), logits)
    )


def test_value_lse_gradcheck() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 0]]).bool()
    full, _, _ = random_stats(2, 5)
    ref_logprob, ref_lse = reference_like(full)
    for divergence in REWARD_TRANSFORMS:
        loss = value_loss(divergence=divergence)
        assert torch.autograd.gradcheck(
            lambda p, q, loss=loss: loss(TokenStats(logprob=p, lse=q), ref_logprob, ref_lse, mask=mask),
            (full.logprob.detach().requires_grad_(), full.lse.detach().requires_grad_()),
        )


def test_value_lse_does_not_read_behind_ignored_tokens() -> None:
    """NaN there reaches neither the loss nor the gradient."""
    mask = torch.tensor([False, True, True, False])
    full, _, _ = random_stats(4)
    ref_logprob, ref_lse = reference_like(full)
    stats = [x.detach().masked_fill(~mask, math.nan).requires_grad_() for x in (full.logprob, full.lse)]
    poisoned = [x.masked_fill(~mask, math.nan) for x in (ref_logprob, ref_lse)]
    tokens = value_loss()(TokenStats(logprob=stats[0], lse=stats[1]), poisoned[0], poisoned[1], mask=mask)
    tokens.sum().backward()
    torch.testing.assert_close(tokens, value_loss()(full, ref_logprob, ref_lse, mask=mask), rtol=0, atol=0)
    assert all(x.grad is not None and x.grad.isfinite().all() and x.grad[~mask].eq(0).all() for x in stats)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)])
def test_value_lse_of_nothing(shape: tuple[int, ...]) -> None:
    empty = torch.zeros(shape, requires_grad=True)
    sequence = torch.zeros(shape, dtype=torch.int64)
    tokens = value_loss()(TokenStats(logprob=empty, lse=empty), empty, empty, sequence=sequence)
    assert tokens.shape == shape
    tokens.sum().backward()
