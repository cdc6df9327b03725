"""The losses as functions of vectors: each against its formula in float64, its limits, extremes and errors."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitless import losses
from logitless.losses import DFT, DPO, NLL, FDivergenceSFT, Loss, sequence_logprob
from logitless.losses.sft.reward_transforms import (
    REWARD_TRANSFORMS,
    SATURATED_PEARSON,
    RewardTransform,
    alpha_transform,
)
from logitless.types import TokenStats

ALPHAS = (-1.0, -0.3, 0.0, 0.05, 0.5, 1.0, 1.7, 2.0)
SFT_LOSSES = [
    *(FDivergenceSFT(divergence=name, beta=0.3) for name in REWARD_TRANSFORMS),
    FDivergenceSFT(saturate=True, beta=0.3),
    *(FDivergenceSFT(divergence="alpha", alpha=alpha, beta=0.3) for alpha in ALPHAS),
]
DPO_LOSSES = [
    DPO(),
    DPO(beta=0.5, label_smoothing=0.2),
    DPO(loss_type="hinge"),
    DPO(loss_type="ipo"),
    *(DPO(divergence=name) for name in ("forward_kl", "js")),
    *(DPO(divergence="alpha", alpha=alpha) for alpha in (0.0, 0.25, 0.5, 1.0, 1.5)),
    DPO(divergence="forward_kl", loss_type="hinge"),
    DPO(divergence="js", label_smoothing=0.1),
]


def ident(loss: Loss) -> str:
    changed = [f for f in dataclasses.fields(loss) if getattr(loss, f.name) != f.default]
    return "-".join([loss.name, *(f"{f.name}={getattr(loss, f.name)}" for f in changed)])


def doubles(*values: float, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def weight_of(loss: Loss, logprob: Tensor, *inputs: Tensor) -> Tensor:
    """w = -d loss / d logprob, token by token."""
    logprob = logprob.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(TokenStats(logprob=logprob), *inputs).sum(), logprob)
    return -gradient


def random_stats(*shape: int, seed: int = 0, vocabulary: int = 7) -> tuple[TokenStats, Tensor, Tensor]:
    """Statistics of random logits with their graph, the logits, the targets."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(*shape, vocabulary, generator=generator, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(vocabulary, shape, generator=generator)
    lse = logits.logsumexp(-1)
    picked = logits.gather(-1, targets[..., None])[..., 0]
    return TokenStats(logprob=picked - lse, lse=lse, mean_logit=logits.mean(-1)), logits, targets


# NLL


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_nll_is_torch_cross_entropy(label_smoothing: float) -> None:
    stats, logits, targets = random_stats(11)
    upstream = torch.linspace(-1, 2, 11, dtype=torch.float64)
    loss = NLL(label_smoothing=label_smoothing)(stats)
    expected = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits, upstream, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(expected, logits, upstream)
    torch.testing.assert_close(gradient, expected_gradient)


def test_nll_z_loss_adds_the_squared_lse() -> None:
    stats, _, _ = random_stats(5)
    assert stats.logprob is not None and stats.lse is not None
    torch.testing.assert_close(NLL(z_loss=1e-2)(stats), -stats.logprob + 1e-2 * stats.lse**2)


def test_nll_reads_only_what_it_needs() -> None:
    assert NLL().outputs == ("logprob",)
    assert NLL(z_loss=1e-4).outputs == ("logprob", "lse")
    assert NLL(label_smoothing=0.1).outputs == ("logprob", "lse", "mean_logit")
    assert NLL(label_smoothing=0.1, z_loss=1e-4).outputs == ("logprob", "lse", "mean_logit")


def test_nll_of_an_impossible_target_is_inf_with_gradient_minus_one() -> None:
    logprob = doubles(-math.inf, -1e4, 0.0, grad=True)
    loss = NLL()(TokenStats(logprob=logprob))
    loss.sum().backward()
    assert loss.tolist() == [math.inf, 1e4, 0.0]
    assert logprob.grad is not None and logprob.grad.tolist() == [-1, -1, -1]


# DFT


@given(st.floats(-30, 0), st.floats(0, 3))
def test_dft_value_and_weight(logprob: float, power: float) -> None:
    p = math.exp(power * logprob)
    value = DFT(power=power)(TokenStats(logprob=doubles(logprob)))
    torch.testing.assert_close(value, doubles(-p * logprob))
    torch.testing.assert_close(weight_of(DFT(power=power), doubles(logprob)), doubles(p))


def test_dft_gradient_is_that_of_the_probability() -> None:
    logprob = doubles(-0.1, -1.0, -5.0)
    torch.testing.assert_close(weight_of(DFT(), logprob), logprob.exp())
    torch.testing.assert_close(weight_of(DFT(power=0), logprob), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [0.3, 1.0, 2.0])
def test_dft_of_an_impossible_target_is_zero(dtype: torch.dtype, power: float) -> None:
    logprob = torch.tensor([-math.inf, -1e4, 0.0], dtype=dtype)
    assert DFT(power=power)(TokenStats(logprob=logprob)).tolist() == [0, 0, 0]
    assert weight_of(DFT(power=power), logprob).tolist() == [0, 0, 1]


def test_dft_power_zero_is_nll_at_infinity_and_nan_stays_visible() -> None:
    logprob = doubles(-math.inf, -2.0)
    assert DFT(power=0)(TokenStats(logprob=logprob)).tolist() == [math.inf, 2.0]
    assert weight_of(DFT(power=0), logprob).tolist() == [1, 1]
    assert DFT()(TokenStats(logprob=doubles(math.nan))).isnan().all()


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
        assert row.low_slope <= math.exp(5) * (1 + 1e-12)
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


@pytest.mark.parametrize("loss", [loss for loss in SFT_LOSSES if loss.divergence != "pearson_chi2"], ids=ident)
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


def value_loss(**overrides: object) -> FDivergenceSFT:
    return FDivergenceSFT(**{"divergence": "squared_hellinger", "beta": 0.3, "value": "lse", **overrides})


def reference_like(stats: TokenStats, seed: int = 5) -> tuple[Tensor, Tensor]:
    other, _, _ = random_stats(*stats.logprob.shape, seed=seed)
    return other.logprob.detach(), other.lse.detach()


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


# DPO


def score(name: str, v: float, alpha: float) -> float:
    if name == "reverse_kl" or (name == "alpha" and alpha == 0):
        return v
    if name == "js":
        return math.log(2 * math.exp(v) / (1 + math.exp(v)))
    alpha = 1.0 if name == "forward_kl" else alpha
    return (1 - math.exp(-alpha * v)) / alpha


def link(loss: DPO, h: float) -> float:
    if loss.loss_type == "ipo":
        return (h - 1 / (2 * loss.beta)) ** 2
    u = loss.beta * h
    if loss.loss_type == "hinge":
        return max(0.0, 1 - u)
    eps = loss.label_smoothing
    return (1 - eps) * math.log1p(math.exp(-u)) + eps * math.log1p(math.exp(u))


@pytest.mark.parametrize("loss", DPO_LOSSES, ids=ident)
@settings(max_examples=30)
@given(v=st.tuples(st.floats(-5, 5), st.floats(-5, 5)), ref=st.tuples(st.floats(-90, -1), st.floats(-90, -1)))
def test_dpo_is_its_formula(loss: DPO, v: tuple[float, float], ref: tuple[float, float]) -> None:
    h = score(loss.divergence, v[0], loss.alpha) - score(loss.divergence, v[1], loss.alpha)
    result = loss(doubles(ref[0] + v[0]), doubles(ref[1] + v[1]), doubles(ref[0]), doubles(ref[1]))
    torch.testing.assert_close(result.loss, doubles(link(loss, h)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.chosen_reward, doubles(loss.beta * v[0]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.rejected_reward, doubles(loss.beta * v[1]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loss", DPO_LOSSES, ids=ident)
def test_dpo_gradcheck(loss: DPO) -> None:
    chosen, rejected = doubles(-5.0, -9.0, -30.0, grad=True), doubles(-4.0, -11.0, -2.5, grad=True)
    ref = doubles(-5.5, -8.0, -3.0), doubles(-4.4, -9.0, -3.5)
    assert torch.autograd.gradcheck(lambda c, r: loss(c, r, *ref).loss, (chosen, rejected), rtol=1e-4)


def test_dpo_gradient_weights() -> None:
    """d loss / d chosen: -beta sigmoid(-beta h) for the sigmoid, scaled by s'(v) for the divergences."""
    chosen, rejected, ref = doubles(-5.0, grad=True), doubles(-4.0, grad=True), doubles(-5.5)
    v = doubles(0.5), doubles(1.5)

    def gradient(loss: DPO) -> tuple[Tensor, Tensor]:
        c, r = torch.autograd.grad(loss(chosen, rejected, ref, ref).loss.sum(), (chosen, rejected))
        return c, r

    push = 0.1 * torch.sigmoid(doubles(0.1))
    torch.testing.assert_close(gradient(DPO()), (-push, push))
    for loss, slope in (
        (DPO(divergence="forward_kl"), lambda x: torch.exp(-x)),
        (DPO(divergence="js"), lambda x: torch.sigmoid(-x)),
        (DPO(divergence="alpha", alpha=0.3), lambda x: torch.exp(-0.3 * x)),
    ):
        h = score(loss.divergence, 0.5, loss.alpha) - score(loss.divergence, 1.5, loss.alpha)
        push = 0.1 * torch.sigmoid(doubles(-0.1 * h))
        torch.testing.assert_close(gradient(loss), (-push * slope(v[0]), push * slope(v[1])))
    torch.testing.assert_close(gradient(DPO(loss_type="hinge")), (doubles(-0.1), doubles(0.1)))
    torch.testing.assert_close(gradient(DPO(loss_type="ipo")), (doubles(-12.0), doubles(12.0)))


def test_label_smoothing_takes_effect_and_has_its_minimum() -> None:
    eps, beta, zero = 0.2, 0.5, doubles(0.0)
    loss = DPO(beta=beta, label_smoothing=eps)
    best = doubles(math.log((1 - eps) / eps) / beta, grad=True)
    result = loss(best, zero, zero, zero)
    result.loss.sum().backward()
    assert best.grad is not None and best.grad.abs().item() < 1e-15
    assert result.loss.item() > DPO(beta=beta)(best, zero, zero, zero).loss.item()


def test_dpo_alpha_limits() -> None:
    inputs = doubles(-5.0, -2.0), doubles(-4.0, -6.0), doubles(-5.5, -3.0), doubles(-4.4, -5.0)
    for alpha, name in ((1.0, "forward_kl"), (0.0, "reverse_kl"), (1e-9, "reverse_kl"), (1e-300, "reverse_kl")):
        loss = DPO(divergence="alpha", alpha=alpha)(*inputs).loss
        torch.testing.assert_close(loss, DPO(divergence=name)(*inputs).loss, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("loss", DPO_LOSSES, ids=ident)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dpo_is_finite_for_finite_input(loss: DPO, dtype: torch.dtype) -> None:
    v = torch.tensor([-1e4, -1e3, -200, -100, 0, 100, 1e3, 1e4], dtype=dtype)
    chosen, rejected = (x.flatten().clone().requires_grad_() for x in torch.meshgrid(v, v, indexing="ij"))
    zero = torch.zeros_like(chosen)
    result = loss(chosen, rejected, zero, zero)
    assert all(x.isfinite().all() for x in result)
    gradient = torch.autograd.grad(result.loss.sum(), (chosen, rejected))
    assert all(x.isfinite().all() for x in gradient)
    if loss.loss_type == "sigmoid" and loss.label_smoothing == 0:
        assert (gradient[0] <= 0).all() and (gradient[1] >= 0).all()


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_dpo_keeps_a_useful_gradient_far_below_the_reference(divergence: str) -> None:
    """A drifted chosen sequence is pulled back, at most beta e^10 hard; torch's exp would have overflowed."""
    for drift in (-30.0, -1e3, -math.inf):
        chosen, zero = torch.tensor([drift], requires_grad=True), torch.zeros(1)
        result = DPO(divergence=divergence)(chosen, zero, zero, zero)
        result.loss.sum().backward()
        assert chosen.grad is not None and -0.1 * math.exp(10) * 1.001 < chosen.grad.item() < -0.05
        assert result.loss.item() == math.inf if math.isinf(drift) else math.isfinite(result.loss.item())


def test_power_scores_are_exact_down_to_the_continuation_and_linear_below() -> None:
    zero = doubles(0.0)

    def h(v: float) -> float:
        return -DPO(divergence="forward_kl", loss_type="hinge", beta=1.0)(doubles(v), zero, zero, zero).loss.item() + 1

    assert h(-9.99) == pytest.approx(1 - math.exp(9.99), rel=1e-12)
    assert h(-13.0) == pytest.approx(1 - math.exp(10) - 3 * math.exp(10), rel=1e-12)


def test_dpo_metrics() -> None:
    chosen, rejected, ref = (
        doubles(-5.0, -4.0, -3.0, grad=True),
        doubles(-6.0, -4.0, -2.0, grad=True),
        doubles(-5, -4, -3),
    )
    for loss in (DPO(beta=0.2), DPO(beta=0.2, loss_type="ipo"), DPO(beta=0.2, divergence="js")):
        result = loss(chosen, rejected, ref, ref)
        torch.testing.assert_close(result.chosen_reward, doubles(0.0, 0.0, 0.0))
        torch.testing.assert_close(result.rejected_reward, doubles(-0.2, 0.0, 0.2))
        torch.testing.assert_close(result.margin, doubles(0.2, 0.0, -0.2))
        assert result.accuracy.tolist() == [1, 0, 0]  # a tie is wrong
        assert torch.equal(result.chosen_logprob, chosen) and torch.equal(result.rejected_logprob, rejected)
        assert result.loss.requires_grad and not any(x.requires_grad for x in result[1:])
        assert result.loss.shape == (3,)


def test_dpo_reference_is_a_constant() -> None:
    inputs = [doubles(-1.0 - i, grad=True) for i in range(4)]
    for loss in DPO_LOSSES:
        gradients = torch.autograd.grad(loss(*inputs).loss.sum(), inputs, allow_unused=True)
        assert gradients[2] is None and gradients[3] is None
    assert [DPO(loss_type=name).average_logprob for name in ("sigmoid", "hinge", "ipo")] == [False, False, True]
    assert (DPO().level, DPO().inputs, DPO().outputs) == ("pair", ("ref_logprob",), ("logprob",))


# Common to all


@pytest.mark.parametrize("loss", [NLL(label_smoothing=0.1, z_loss=0.1), DFT(), *SFT_LOSSES, value_loss()], ids=ident)
def test_token_losses_are_pure_and_elementwise(loss: Loss) -> None:
    stats, _, _ = random_stats(2, 6)
    ref_logprob, ref_lse = reference_like(stats)
    inputs = {"ref_logprob": ref_logprob.requires_grad_(), "ref_lse": ref_lse.requires_grad_()}
    arguments = [inputs[name] for name in loss.inputs]
    before = [x.detach().clone() for x in (*stats[:2], stats.mean_logit, *arguments)]
    value = loss(stats, *arguments)
    value.sum().backward()
    after = (*stats[:2], stats.mean_logit, *arguments)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert value.shape == (2, 6) and value.dtype == torch.float64
    assert ref_logprob.grad is None and ref_lse.grad is None, "the reference is a constant"
    assert stats.logprob is not None and value.data_ptr() != stats.logprob.data_ptr()
    row = TokenStats(*(None if x is None else x[1] for x in stats))
    torch.testing.assert_close(loss(row, *(x[1] for x in arguments)), value[1], rtol=0, atol=0)
    if loss.token_wise:
        flat = TokenStats(*(None if x is None else x.flatten() for x in stats))
        torch.testing.assert_close(loss(flat, *(x.flatten() for x in arguments)), value.flatten(), rtol=0, atol=0)


def test_dtype_follows_the_statistics() -> None:
    stats = TokenStats(logprob=torch.tensor([-1.0, -2.0]))
    for loss in (NLL(), DFT(), FDivergenceSFT(), FDivergenceSFT(divergence="alpha", alpha=-0.5)):
        inputs = [torch.tensor([-1.5, -1.5], dtype=torch.float64)] * len(loss.inputs)
        assert loss(stats, *inputs).dtype == torch.float32
    assert stats.logprob is not None
    assert DPO()(stats.logprob, stats.logprob, *[doubles(-1.0, -2.0)] * 2).loss.dtype == torch.float32


@pytest.mark.parametrize(
    "loss", [NLL(label_smoothing=0.1), DFT(), *SFT_LOSSES[::4], value_loss(divergence="alpha")], ids=ident
)
def test_losses_trace_without_a_graph_break(loss: Loss) -> None:
    stats, _, _ = random_stats(2, 4)
    arguments = reference_like(stats)[: len(loss.inputs)]
    torch._dynamo.reset()
    traced = torch.compile(
        lambda *xs: loss(TokenStats(xs[0], xs[1], None, xs[2]), *xs[3:]), fullgraph=True, backend="eager"
    )
    value = traced(stats.logprob, stats.lse, stats.mean_logit, *arguments)
    torch.testing.assert_close(value, loss(stats, *arguments), rtol=0, atol=0)


def test_pair_losses_trace_without_a_graph_break() -> None:
    tokens, sequence = -torch.rand(12), torch.arange(4).repeat_interleave(3)
    loss = DPO(divergence="alpha", alpha=0.3, label_smoothing=0.1)

    def from_tokens(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
        sums = [sequence_logprob(x, sequence=sequence, num_sequences=4) for x in (logprob, ref_logprob)]
        return loss(*sums[0].chunk(2), *sums[1].chunk(2)).loss

    torch._dynamo.reset()
    traced = torch.compile(from_tokens, fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(tokens, 2 * tokens), from_tokens(tokens, 2 * tokens), rtol=0, atol=0)


# Hyper-parameters, inputs, registry


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: NLL(label_smoothing=1.5), ValueError, "NLL: label_smoothing"),
        (lambda: NLL(label_smoothing=-0.1), ValueError, "NLL: label_smoothing"),
        (lambda: NLL(z_loss=-1), ValueError, "NLL: z_loss"),
        (lambda: losses.get("nll", z_loss="1e-4"), TypeError, "NLL: z_loss must be a number, got str"),
        (lambda: DFT(power=-1), ValueError, "DFT: power"),
        (lambda: DFT(power=math.nan), ValueError, "DFT: power"),
        (lambda: DFT(power=True), TypeError, "DFT: power"),
        (lambda: FDivergenceSFT(beta=0), ValueError, "FDivergenceSFT: beta"),
        (lambda: FDivergenceSFT(beta=-0.1), ValueError, "FDivergenceSFT: beta"),
        (lambda: FDivergenceSFT(beta=math.inf), ValueError, "FDivergenceSFT: beta"),
        (lambda: FDivergenceSFT(divergence="hellinger"), ValueError, "squared_hellinger"),
        (lambda: losses.get("f_divergence_sft", divergence=None), TypeError, "FDivergenceSFT: divergence"),
        (lambda: FDivergenceSFT(value="mean"), ValueError, "FDivergenceSFT: value"),
        (lambda: losses.get("f_divergence_sft", saturate=1), TypeError, "FDivergenceSFT: saturate"),
        (lambda: FDivergenceSFT(divergence="js", saturate=True), ValueError, "saturate"),
        (lambda: FDivergenceSFT(divergence="js", alpha=0.3), ValueError, "alpha"),
        (lambda: DPO(beta=-0.1), ValueError, "DPO: beta"),
        (lambda: DPO(beta=0), ValueError, "DPO: beta"),
        (lambda: DPO(loss_type="sigmod"), ValueError, "did you mean 'sigmoid'"),
        (lambda: DPO(label_smoothing=0.5), ValueError, r"\[0.0, 0.5\)"),
        (lambda: DPO(label_smoothing=0.1, loss_type="ipo"), ValueError, "label_smoothing"),
        (lambda: DPO(label_smoothing=0.1, loss_type="hinge"), ValueError, "label_smoothing"),
        (lambda: DPO(divergence="js", loss_type="ipo"), ValueError, "ipo"),
        (lambda: DPO(divergence="total_variation"), ValueError, "DPO: divergence"),
        (lambda: DPO(alpha=0.3), ValueError, "alpha"),
        (lambda: DPO(divergence="alpha", alpha=-0.3), ValueError, "DPO: alpha"),
    ],
)
def test_bad_hyper_parameters(make, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_bad_inputs_are_named() -> None:
    stats = TokenStats(logprob=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"nll reads stats\.lse"):
        NLL(z_loss=0.1)(stats)
    with pytest.raises(ValueError, match=r"ref_logprob must have shape \(2, 3\), got \(3,\)"):
        FDivergenceSFT()(stats, torch.zeros(3))
    with pytest.raises(ValueError, match="ref_lse belongs to value='lse'"):
        FDivergenceSFT()(stats, torch.zeros(2, 3), torch.zeros(2, 3))
    both = TokenStats(logprob=torch.zeros(2, 3), lse=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="needs ref_lse"):
        value_loss()(both, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"mask: expected torch\.bool"):
        value_loss()(both, torch.zeros(2, 3), torch.zeros(2, 3), mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="sequence: expected"):
        value_loss()(both, torch.zeros(2, 3), torch.zeros(2, 3), sequence=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="mask and sequence belong to the sequence losses"):
        FDivergenceSFT()(stats, torch.zeros(2, 3), mask=torch.ones(2, 3).bool())
    with pytest.raises(ValueError, match="rejected must have the shape of chosen"):
        DPO()(torch.zeros(2), torch.zeros(2, 1), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="ref_chosen"):
        DPO()(torch.zeros(2), torch.zeros(2), torch.zeros(1), torch.zeros(2))


def test_registry() -> None:
    assert losses.names() == sorted(losses.names())
    assert {"nll", "dft", "f_divergence_sft", "dpo"} <= set(losses.names())
    assert losses.get("dft") == DFT() and losses.get("dft", power=2) == DFT(power=2)
    loss = DPO(beta=0.2)
    assert losses.get(loss) is loss
    assert losses.get(loss, loss_type="hinge") == DPO(beta=0.2, loss_type="hinge")
    assert all(losses.get(name).name == name for name in losses.names())
    assert len({losses.get(name) for name in losses.names()}) == len(losses.names()), "hashable"
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.beta = 0.3


def test_registry_errors() -> None:
    with pytest.raises(ValueError, match=r"'f_divergence'.*did you mean 'f_divergence_sft'"):
        losses.get("f_divergence")
    with pytest.raises(ValueError, match=r"there are .*dft, .*dpo"):
        losses.get("zzz")
    with pytest.raises(TypeError, match=r"dft has no hyper-parameter 'powr' \(did you mean 'power'"):
        losses.get("dft", powr=2)
    with pytest.raises(TypeError, match="has no hyper-parameter 'betta'"):
        losses.get(DPO(), betta=2)
    with pytest.raises(TypeError, match="a name or a logitless"):
        losses.get(DFT)
    with pytest.raises(ValueError, match="'dft' is taken by DFT"):
        losses.register(DFT)
    with pytest.raises(TypeError, match="frozen dataclass"):
        losses.register(type("Plain", (Loss,), {"name": "plain"}))


# sequence_logprob


@settings(max_examples=50)
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6), seed=st.integers(0, 2**16), average=st.booleans())
def test_padded_and_flat_agree(lengths: list[int], seed: int, average: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [-torch.rand(length, generator=generator, dtype=torch.float64) for length in lengths]
    padded = torch.nn.utils.rnn.pad_sequence([*rows, torch.zeros(1)], batch_first=True)[:-1].requires_grad_()
    mask = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]
    flat = torch.cat(rows).requires_grad_()
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    expected = torch.stack([row.mean() if average and len(row) else row.sum() for row in rows])
    one = sequence_logprob(padded, mask=mask, average=average)
    two = sequence_logprob(flat, sequence=sequence, num_sequences=len(lengths), average=average)
    torch.testing.assert_close(one, expected)
    torch.testing.assert_close(two, expected)
    upstream = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(one, padded, upstream)[0][mask], torch.autograd.grad(two, flat, upstream)[0]
    )


def test_sequence_logprob_details() -> None:
    order = torch.tensor([2, 0, 2, 0])
    values = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    assert sequence_logprob(values, sequence=order).tolist() == [-6, 0, -4]
    assert sequence_logprob(values, sequence=order, num_sequences=4, average=True).tolist() == [-3, 0, -2, 0]
    keep = torch.tensor([True, False, True, True])
    assert sequence_logprob(values, sequence=order, mask=keep, average=True).tolist() == [-4, 0, -2]
    assert sequence_logprob(values[:0], sequence=order[:0]).shape == (0,)
    assert sequence_logprob(values[:0], sequence=order[:0], num_sequences=2).tolist() == [0, 0]
    assert sequence_logprob(torch.zeros(2, 0), average=True).tolist() == [0, 0]
    assert sequence_logprob(values[None], average=True).tolist() == [-2.5]
    masked = torch.tensor([[-math.inf, -1.0]], requires_grad=True)
    total = sequence_logprob(masked, mask=torch.tensor([[False, True]]))
    total.sum().backward()
    assert total.item() == -1.0 and masked.grad is not None and masked.grad.tolist() == [[0, 1]]


def test_sequence_logprob_sums_in_float32() -> None:
    ones = torch.full((1, 1000), -1.0, dtype=torch.bfloat16)
    total = sequence_logprob(ones)
    assert total.dtype == torch.float32 and total.item() == -1000
    assert sequence_logprob(ones.flatten(), sequence=torch.zeros(1000, dtype=torch.int64)).item() == -1000
    assert sequence_logprob(ones.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"logprob": torch.zeros(3)}, ValueError, "needs `sequence`"),
        ({"logprob": torch.zeros(1, 3), "sequence": torch.zeros(3, dtype=torch.int64)}, ValueError, "when `sequence`"),
        ({"logprob": torch.zeros(3), "sequence": torch.zeros(3)}, ValueError, "sequence must be int64"),
        ({"logprob": torch.zeros(3), "sequence": torch.zeros(2, dtype=torch.int64)}, ValueError, "sequence must be"),
        ({"logprob": torch.zeros(1, 3), "mask": torch.ones(1, 3)}, ValueError, "mask must be bool"),
        ({"logprob": torch.zeros(1, 3), "num_sequences": 1}, ValueError, "num_sequences"),
        ({"logprob": torch.zeros(1, 3, dtype=torch.int64)}, TypeError, "floating-point"),
        ({"logprob": torch.zeros(1), "sequence": torch.tensor([4]), "num_sequences": 2}, IndexError, "range"),
    ],
)
def test_sequence_logprob_errors(arguments: dict[str, Tensor], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        sequence_logprob(**arguments)
