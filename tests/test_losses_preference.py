"""The preference losses as functions of vectors: formulas in float64, limits, extremes, errors, sums of terms.

Against the implementations of others: test_losses_preference_peers.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preference_cases import pair_loss
from torch import Tensor

from logitless import linear_loss, losses
from logitless.losses import (
    BCO,
    CPO,
    DPO,
    DPOP,
    KTO,
    MPO,
    ORPO,
    RDPO,
    RPO,
    AlphaPO,
    ChosenNLL,
    Loss,
    SimPO,
    WeightedSum,
    bco_density_ratio,
    bco_reward_shift,
    kto_reference_point,
)
from logitless.losses.layout import token_layout
from logitless.losses.preference.dpo import LOSS_TYPES
from logitless.types import TokenStats

DPO_TYPES = [DPO(loss_type=kind, label_smoothing=0.1 if kind == "exo_pair" else 0.0) for kind in LOSS_TYPES]
DPO_LOSSES = [
    *DPO_TYPES,
    *(
        DPO(loss_type=kind, label_smoothing=0.2, beta=0.5)
        for kind in ("sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot")
    ),
    *(
        DPO(loss_type=kind, divergence=name, label_smoothing=0.1 if kind == "exo_pair" else 0.0)
        for kind in ("hinge", "exo_pair", "robust", "discopop")
        for name in ("forward_kl", "js", "alpha")
    ),
    DPO(loss_type="discopop", discopop_tau=1.0),
    DPO(tail_weight=0.3),
    DPO(use_weighting=True),
    DPO(use_weighting=True, loss_type="ipo"),
]
REFERENCED = [*DPO_LOSSES, DPOP(), DPOP(beta=0.1, penalty=0.5), RDPO(), RDPO(alpha=-0.3), RPO(), MPO()]
REFERENCE_FREE = [
    ChosenNLL(),
    ChosenNLL(average=False),
    SimPO(),
    SimPO(label_smoothing=0.1),
    AlphaPO(),
    AlphaPO(alpha=-0.5),
    *(CPO(loss_type=kind) for kind in ("sigmoid", "hinge", "ipo")),
    CPO(nll_weight=0.0, label_smoothing=0.1),
    ORPO(),
]
MIXED = WeightedSum(terms=["simpo", DPO(use_weighting=True), "r_dpo", "chosen_nll"], weights=[0.5, 1, 2, 0.1])
PAIRS = [*REFERENCED, *REFERENCE_FREE, MIXED]
QUADRATIC = ("ipo", "sppo_hard")


def ident(value: object) -> str:
    if not isinstance(value, Loss):
        return str(value)
    changed = [f for f in dataclasses.fields(value) if getattr(value, f.name) != f.default]  # type: ignore[arg-type]
    return "-".join([value.name, *(f"{f.name}={getattr(value, f.name)}" for f in changed)])


def doubles(*values: float, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def extras_of(loss: Loss, like: Tensor) -> dict[str, Tensor]:
    """Lengths and weights as a batch might have them."""
    steps = torch.arange(like.numel(), device=like.device).reshape(like.shape)
    named = {
        "chosen_length": 3 + steps % 4,
        "rejected_length": 5 - steps % 3,
        "chosen_weight": 1.0 + 0.1 * (steps % 5),
        "rejected_weight": 0.7 + 0.1 * (steps % 3),
    }
    return {name: value for name, value in named.items() if name.partition("_")[2] in loss.extras}


def call(loss: Loss, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Any:
    """The loss with whatever it asks for."""
    reference = (ref_chosen, ref_rejected) if loss.inputs else ()
    return loss(chosen, rejected, *reference, **extras_of(loss, chosen))


# ---------------------------------------------------------------------------------------------------------------------
# Formulas, written once more as the papers have them


def sg(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def of_margin(kind: str, u: float, beta: float, eps: float, tau: float) -> float:
    smoothed = -(1 - eps) * math.log(sg(u)) - eps * math.log(sg(-u))
    if kind == "hinge":
        return max(0.0, 1 - u)
    if kind == "ipo":
        return (u / beta - 1 / (2 * beta)) ** 2
    if kind == "exo_pair":
        return sg(u) * math.log(sg(u) / (1 - eps)) + sg(-u) * math.log(sg(-u) / eps)
    if kind == "robust":
        return (-(1 - eps) * math.log(sg(u)) + eps * math.log(sg(-u))) / (1 - 2 * eps)
    if kind == "discopop":
        w = sg(u / tau)
        return -(1 - w) * math.log(sg(u)) + w * math.exp(-u)
    return smoothed


def of_rewards(kind: str, c: float, r: float, beta: float) -> float:
    return {
        "nca_pair": lambda: -math.log(sg(c)) - 0.5 * math.log(1 - sg(c)) - 0.5 * math.log(1 - sg(r)),
        "bco_pair": lambda: -math.log(sg(c)) - math.log(1 - sg(r)),
        "sppo_hard": lambda: (c / beta - 0.5 / beta) ** 2 + (r / beta + 0.5 / beta) ** 2,
        "apo_zero": lambda: (1 - sg(c)) + sg(r),
        "apo_down": lambda: sg(c) + (1 - sg(c - r)),
    }[kind]()


def score(loss: DPO, v: float) -> float:
    alpha = {"forward_kl": 1.0, "alpha": loss.alpha}.get(loss.divergence, 0.0)
    if loss.divergence == "js":
        return math.log(2 * math.exp(v) / (1 + math.exp(v)))
    return v if alpha == 0 else (1 - math.exp(-alpha * v)) / alpha


@settings(max_examples=25)
@given(v=st.tuples(st.floats(-5, 5), st.floats(-5, 5)), ref=st.tuples(st.floats(-90, -1), st.floats(-90, -1)))
def test_dpo_is_its_formula(v: tuple[float, float], ref: tuple[float, float]) -> None:
    """One pair; the losses of sorted batches too, which are then the sigmoid's."""
    inputs = doubles(ref[0] + v[0]), doubles(ref[1] + v[1]), doubles(ref[0]), doubles(ref[1])
    for loss in (x for x in DPO_LOSSES if not x.use_weighting):
        result = loss(*inputs)
        if loss.loss_type in ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"):
            expected = of_rewards(loss.loss_type, loss.beta * v[0], loss.beta * v[1], loss.beta)
        else:
            u = loss.beta * (score(loss, v[0]) - score(loss, v[1]))
            expected = of_margin(loss.loss_type, u, loss.beta, loss.label_smoothing, loss.discopop_tau)
        assert result.loss.item() == pytest.approx(expected, rel=1e-8, abs=1e-9), ident(loss)
        assert result.chosen_reward.item() == pytest.approx(loss.beta * v[0], rel=1e-9, abs=1e-9)
        assert result.rejected_reward.item() == pytest.approx(loss.beta * v[1], rel=1e-9, abs=1e-9)


def log_odds(a: float) -> float:
    return a - math.log(1 - math.exp(a))


#: Of a reference-free loss: its value at log-probabilities c and r of sequences of the given lengths.
BY_HAND = {
    ChosenNLL(): lambda c, r: -c,
    ChosenNLL(average=False): lambda c, r: -c,
    SimPO(): lambda c, r: -math.log(sg(2 * (c - r) - 0.5)),
    SimPO(beta=3.0, gamma=1.0, label_smoothing=0.1): lambda c, r: (
        -0.9 * math.log(sg(3 * (c - r) - 1)) - 0.1 * math.log(sg(-3 * (c - r) + 1))
    ),
    AlphaPO(): lambda c, r: (
        -math.log(sg(2 * ((1 - math.exp(c) ** -0.25) / 0.25 - (1 - math.exp(r) ** -0.25) / 0.25) - 0.5))
    ),
    AlphaPO(alpha=-0.5): lambda c, r: (
        -math.log(sg(2 * ((1 - math.exp(c) ** 0.5) / -0.5 - (1 - math.exp(r) ** 0.5) / -0.5) - 0.5))
    ),
    CPO(): lambda c, r: -math.log(sg(0.1 * (c - r))) - c / 3,
    CPO(nll_weight=0.0, label_smoothing=0.2): lambda c, r: (
        -0.8 * math.log(sg(0.1 * (c - r))) - 0.2 * math.log(sg(-0.1 * (c - r)))
    ),
    CPO(loss_type="hinge", nll_weight=2.0): lambda c, r: max(0, 1 - 0.1 * (c - r)) - 2 * c / 3,
    CPO(loss_type="ipo"): lambda c, r: (c - r - 5) ** 2 - c,
    ORPO(): lambda c, r: -c - 0.1 * math.log(sg(log_odds(c) - log_odds(r))),
    ORPO(nll_weight=0.5): lambda c, r: -0.5 * c - 0.1 * math.log(sg(log_odds(c) - log_odds(r))),
    ORPO(nll_weight=0.0): lambda c, r: -0.1 * math.log(sg(log_odds(c) - log_odds(r))),
}


@pytest.mark.parametrize("loss", BY_HAND, ids=ident)
@settings(max_examples=10)
@given(c=st.floats(-6, -0.01), r=st.floats(-6, -0.01))
def test_reference_free_losses_are_their_formulas(loss: Loss, c: float, r: float) -> None:
    lengths = dict(chosen_length=torch.tensor([3]), rejected_length=torch.tensor([7])) if loss.extras else {}
    result = loss(doubles(c), doubles(r), **lengths)
    torch.testing.assert_close(result.loss, doubles(BY_HAND[loss](c, r)), rtol=1e-9, atol=1e-9)
    assert result.accuracy.item() == (result.chosen_reward > result.rejected_reward).item()


@settings(max_examples=10)
@given(v=st.tuples(st.floats(-5, 5), st.floats(-5, 5)))
def test_dpop_and_r_dpo_are_their_formulas(v: tuple[float, float]) -> None:
    inputs = doubles(v[0] - 9), doubles(v[1] - 7), doubles(-9), doubles(-7)
    expected = -math.log(sg(0.3 * (v[0] - v[1] - 2 * max(0, -v[0]))))
    torch.testing.assert_close(DPOP(penalty=2.0)(*inputs).loss, doubles(expected), rtol=1e-9, atol=1e-9)
    lengths = dict(chosen_length=torch.tensor([9]), rejected_length=torch.tensor([4]))
    expected = -math.log(sg(0.1 * (v[0] - v[1]) + 0.5 * 5))
    torch.testing.assert_close(RDPO(alpha=0.5)(*inputs, **lengths).loss, doubles(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loss", PAIRS, ids=ident)
def test_gradcheck(loss: Loss) -> None:
    chosen, rejected = doubles(-5.0, -9.0, -3.0, grad=True), doubles(-4.0, -11.0, -2.5, grad=True)
    ref = doubles(-5.5, -8.0, -3.3), doubles(-4.4, -9.0, -3.5)
    assert torch.autograd.gradcheck(lambda c, r: call(loss, c, r, *ref).loss, (chosen, rejected), rtol=1e-4)


@pytest.mark.parametrize("loss", PAIRS, ids=ident)
def test_what_is_detached(loss: Loss) -> None:
    """References, lengths and weights get no gradient and the metrics carry none; the shapes are the pairs'."""
    inputs = [doubles(-5.0, -9.0, -3.0, grad=True) - i for i in range(4)]
    named = {name: value.double().requires_grad_() for name, value in extras_of(loss, inputs[0]).items()}
    result = loss(*(inputs if loss.inputs else inputs[:2]), **named)
    leaves = [*inputs, *named.values()]
    found = torch.autograd.grad(result.loss.sum(), leaves, allow_unused=True)
    assert found[0] is not None and all(x is None for x in found[2:])
    assert all(x.shape == (3,) for x in result) and not any(x.requires_grad for x in result[1:])
    assert torch.equal(result.margin, result.chosen_reward - result.rejected_reward)


@pytest.mark.parametrize("loss", PAIRS, ids=ident)
def test_dtype_is_that_of_the_model(loss: Loss) -> None:
    chosen, ref = torch.tensor([-3.0, -4.0]), torch.tensor([-3.5, -4.5], dtype=torch.float64)
    assert all(x.dtype == torch.float32 for x in call(loss, chosen, chosen - 1, ref, ref))


# ---------------------------------------------------------------------------------------------------------------------
# Limits


def some_pairs(count: int = 6) -> list[Tensor]:
    return [-8 * torch.rand(count, dtype=torch.float64) - 0.5 for _ in range(4)]


def gradients(loss: Loss, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in inputs[:2]]
    return torch.autograd.grad(call(loss, *leaves, *inputs[2:]).loss.sum(), leaves)


def assert_same(one: Loss, other: Loss, inputs: list[Tensor], rtol: float = 1e-12) -> None:
    for a, b in zip(call(one, *inputs), call(other, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)
    for a, b in zip(gradients(one, inputs), gradients(other, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)


def test_dpo_without_beta_is_a_coin_whose_gradient_is_half() -> None:
    for beta in (1e-3, 1e-6):
        loss, inputs = DPO(beta=beta), some_pairs()
        torch.testing.assert_close(
            loss(*inputs).loss, torch.full((6,), math.log(2), dtype=torch.float64), atol=10 * beta, rtol=0
        )
        for sign, found in zip((-1, 1), gradients(loss, inputs), strict=True):
            torch.testing.assert_close(
                found / beta, sign * torch.full((6,), 0.5, dtype=torch.float64), atol=10 * beta, rtol=0
            )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (DPO(loss_type="robust"), DPO()),
        (DPO(divergence="alpha", alpha=0.0, loss_type="discopop"), DPO(loss_type="discopop")),
        (DPO(divergence="alpha", alpha=1.0, loss_type="robust"), DPO(divergence="forward_kl", loss_type="robust")),
        (DPO(tail_weight=0.2), DPO()),  # the weight is the caller's to apply
        (DPOP(beta=0.1, penalty=0.0), DPO()),
        (RDPO(alpha=0.0), DPO()),
        (AlphaPO(alpha=0.0), SimPO()),
        (WeightedSum(terms=["dpo"]), DPO()),
        (WeightedSum(terms=["dpo", "dpo"], weights=[0.25, 0.75]), DPO()),
        (WeightedSum(terms=[DPO(), ChosenNLL()], weights=[1.0, 1.0]), RPO()),
        (WeightedSum(terms=[DPO(), DPO(loss_type="bco_pair"), "chosen_nll"], weights=[0.8, 0.2, 1]), MPO()),
        (WeightedSum(terms=[WeightedSum(terms=["dpo"]), "chosen_nll"]), RPO()),
    ],
    ids=ident,
)
def test_settings_that_are_another_loss(one: Loss, other: Loss) -> None:
    assert_same(one, other, some_pairs())


@pytest.mark.parametrize("kind", ["aot", "aot_unpaired"])
@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_aot_of_one_pair_is_the_sigmoid(kind: str, eps: float) -> None:
    assert_same(DPO(loss_type=kind, label_smoothing=eps), DPO(label_smoothing=eps), some_pairs(1), rtol=1e-9)


def test_aot_matches_ranks_and_not_samples() -> None:
    """Any order of the pairs (unpaired: of either side) gives the same values and the permuted gradients."""
    inputs, order, other = some_pairs(), torch.randperm(6), torch.randperm(6)
    for kind, orders in (("aot", [order] * 4), ("aot_unpaired", [order, other, order, other])):
        loss = DPO(loss_type=kind)
        moved = [x[o] for x, o in zip(inputs, orders, strict=True)]
        torch.testing.assert_close(loss(*moved).loss, loss(*inputs).loss)
        for a, b, o in zip(gradients(loss, moved), gradients(loss, inputs), orders, strict=False):
            torch.testing.assert_close(a, b[o])
    chosen, rejected, ref = doubles(1.0, 5.0), doubles(0.0, 0.0), doubles(0.0, 0.0)
    found = DPO(loss_type="aot", beta=1.0)(chosen, rejected, doubles(3.0, 2.0), ref).loss
    torch.testing.assert_close(found, doubles(-math.log(sg(1 - 2)), -math.log(sg(5 - 3))))


def test_length_normalisation_on_equal_lengths() -> None:
    """`sigmoid_norm` of averages is the sigmoid with beta over the length, and SimPO without a margin is CPO."""
    inputs, length = some_pairs(), 7
    averages = [x / length for x in inputs]
    torch.testing.assert_close(
        DPO(loss_type="sigmoid_norm", beta=2.0)(*averages).loss, DPO(beta=2.0 / length)(*inputs).loss
    )
    torch.testing.assert_close(
        SimPO(beta=2.0, gamma=0.0)(*averages[:2]).loss, CPO(beta=2.0 / length, nll_weight=0.0)(*inputs[:2]).loss
    )
    assert [DPO(loss_type=k).average_logprob for k in ("sigmoid", "ipo", "sigmoid_norm")] == [False, True, True]


def test_cpo_is_dpo_with_a_uniform_reference() -> None:
    inputs = some_pairs()
    same = torch.full((6,), -3.0, dtype=torch.float64)
    torch.testing.assert_close(CPO(nll_weight=0.0)(*inputs[:2]).loss, DPO()(*inputs[:2], same, same).loss)


def margin_gradient(loss: DPO, u: float) -> float:
    """d loss / d u at the margin u = beta h."""
    h = doubles(u / loss.beta, grad=True)
    (found,) = torch.autograd.grad(loss(h, doubles(0.0), doubles(0.0), doubles(0.0)).loss.sum(), h)
    return found.item() / loss.beta


@pytest.mark.parametrize("eps", [0.05, 0.3])
@pytest.mark.parametrize("kind", ["sigmoid", "sigmoid_norm", "aot", "exo_pair"])
def test_smoothed_losses_have_their_minimum_where_the_labels_are_believed(kind: str, eps: float) -> None:
    loss, best = DPO(loss_type=kind, label_smoothing=eps, beta=0.5), math.log((1 - eps) / eps)
    assert abs(margin_gradient(loss, best)) < 1e-12
    assert margin_gradient(loss, best - 0.5) < -1e-3 < 1e-3 < margin_gradient(loss, best + 0.5)


def test_exo_gradient() -> None:
    loss = DPO(loss_type="exo_pair", label_smoothing=0.1)
    for u in (-30.0, -2.0, 0.5, 3.0):
        expected = sg(u) * sg(-u) * (u - math.log(9))
        assert margin_gradient(loss, u) == pytest.approx(expected, rel=1e-9)


def test_robust_is_unbiased_and_has_no_minimum() -> None:
    """Over labels that are flipped with chance eps its expectation is DPO's loss; it falls for ever."""
    eps, zero = 0.2, doubles(0.0)
    loss = DPO(loss_type="robust", label_smoothing=eps, beta=1.0)
    for u in (-3.0, 0.0, 2.0):
        h = doubles(u)
        expected = (1 - eps) * loss(h, zero, zero, zero).loss + eps * loss(-h, zero, zero, zero).loss
        torch.testing.assert_close(expected, DPO(beta=1.0)(h, zero, zero, zero).loss)
    assert all(margin_gradient(loss, u) < -0.1 for u in (-50.0, 0.0, 1.0, 50.0, 1e3))


def test_nca_settles_at_two_thirds() -> None:
    best = doubles(math.log(2) / 0.1, grad=True)
    loss = DPO(loss_type="nca_pair")(best, doubles(0.0), doubles(0.0), doubles(0.0)).loss
    (found,) = torch.autograd.grad(loss.sum(), best)
    assert abs(found.item()) < 1e-15


def test_discopop_is_not_monotone() -> None:
    """At tau = 0.05 the loss has a local minimum and a local maximum."""
    loss = DPO(loss_type="discopop")
    for place, below, above in ((-0.119, -1, 1), (0.072, 1, -1)):
        assert margin_gradient(loss, place - 1e-3) * below > 0 and margin_gradient(loss, place + 1e-3) * above > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_discopop_is_stable_where_the_exponential_overflows(dtype: torch.dtype) -> None:
    zero = torch.zeros(1, dtype=dtype)
    for u in (-89.0, -745.0, -1e4):
        h = torch.tensor([u / 0.1], dtype=dtype, requires_grad=True)
        value = DPO(loss_type="discopop")(h, zero, zero, zero).loss
        value.sum().backward()
        assert h.grad is not None
        assert value.item() == pytest.approx(-u, rel=1e-6) and h.grad.item() == pytest.approx(-0.1, rel=1e-6)
    assert margin_gradient(DPO(loss_type="discopop"), 60.0) == pytest.approx(-math.exp(-50), abs=1e-20)


def test_apo_keeps_its_digits_where_one_minus_sigmoid_has_none() -> None:
    zero, far = torch.zeros(1), torch.tensor([300.0])
    assert DPO(loss_type="apo_zero")(far, -far, zero, zero).loss.item() == pytest.approx(2 * math.exp(-30), rel=1e-5)
    assert DPO(loss_type="apo_down")(-far, -3 * far, zero, zero).loss.item() == pytest.approx(
        math.exp(-30) + math.exp(-60), rel=1e-5
    )


def test_dpop_pulls_harder_below_the_reference() -> None:
    """1 + penalty times DPO's pull on the chosen sequence, relative to that on the rejected one."""
    zero = doubles(0.0)
    for drift, factor in ((-0.2, 6.0), (0.2, 1.0)):
        chosen, rejected = gradients(DPOP(penalty=5.0), [doubles(drift), zero, zero, zero])
        torch.testing.assert_close(-chosen, factor * rejected)


def test_r_dpo_has_the_sign_of_its_objective() -> None:
    """The optimum for the reward r - alpha |y| is ref exp((r - alpha |y|) / beta): the loss recovers r's preference."""
    alpha, beta = 0.2, 0.5
    reward, length = doubles(1.0, 0.3), doubles(12.0, 5.0)
    v = (reward - alpha * length) / beta
    found = RDPO(beta=beta, alpha=alpha)(
        v[:1], v[1:], doubles(0.0), doubles(0.0), chosen_length=length[:1], rejected_length=length[1:]
    )
    torch.testing.assert_close(found.loss, doubles(-math.log(sg(1.0 - 0.3))))


def test_orpo_in_log_space() -> None:
    """Exact where exp(a) rounds to 1, linear from the slope e^10 on, certain at 0."""
    for a in (-1e-3, -1e-4):
        found = ORPO(beta=1.0)(torch.tensor([a]), torch.tensor([-1.0])).loss.item()
        odds = a - math.log(-math.expm1(a)) - log_odds(-1.0)
        assert found == pytest.approx(-a + math.log1p(math.exp(-odds)), rel=1e-5)
    for value in (-1e-5, -1e-9, 0.0):
        rejected = torch.tensor([value], requires_grad=True)
        ORPO(beta=1.0)(torch.tensor([-50.0]), rejected).loss.sum().backward()
        assert rejected.grad is not None and rejected.grad.item() == pytest.approx(math.exp(10), rel=1e-3)
    same = torch.tensor([0.0])
    assert ORPO(beta=1.0)(same, same).loss.item() == pytest.approx(math.log(2))


def test_alphapo_far_below_where_the_probability_underflows() -> None:
    """At -120, past the continuation's start at -40: e^10 (1 + 80 alpha) / alpha, about, and no NaN."""
    chosen = torch.tensor([-120.0], requires_grad=True)
    result = AlphaPO(beta=1.0, gamma=0.0)(chosen, torch.tensor([-1.0]))
    result.loss.sum().backward()
    expected = (math.exp(10) - 1) / 0.25 + 80 * math.exp(10)
    assert -result.chosen_reward.item() == pytest.approx(expected, rel=1e-6)
    assert chosen.grad is not None and chosen.grad.item() == pytest.approx(-math.exp(10), rel=1e-6)
    near = AlphaPO(beta=1.0, gamma=0.0)(torch.tensor([-39.0]), torch.tensor([-1.0]))
    assert near.chosen_reward.item() == pytest.approx(-math.expm1(9.75) / 0.25, rel=1e-6)


def test_weights_of_wpo_multiply_and_are_those_of_the_pair() -> None:
    inputs = some_pairs(2)
    weights = dict(chosen_weight=doubles(0.5, 0.0), rejected_weight=doubles(3.0, 2.0))
    for cap, weight in ((1.0, 1.0), (None, 1.5), (1.2, 1.2), (2.0, 1.5)):
        found = DPO(use_weighting=True, weight_cap=cap)(*inputs, **weights)
        torch.testing.assert_close(found.loss, DPO()(*inputs).loss * doubles(weight, 0.0))
    assert DPO(use_weighting=True).weight_cap == 1
    assert torch.equal(found.margin, DPO()(*inputs).margin)
    chosen = doubles(-math.inf, -math.inf, grad=True)
    loss = DPO(use_weighting=True)(chosen, *inputs[1:], **weights).loss
    assert loss.tolist() == [math.inf, 0.0]
    (gradient,) = torch.autograd.grad(loss.sum(), chosen)
    torch.testing.assert_close(gradient, doubles(-0.1, 0.0))


# ---------------------------------------------------------------------------------------------------------------------
# Sums of terms


def test_weighted_sum_gives_each_term_what_it_wants() -> None:
    """Averages to SimPO and the NLL, sums to DPO and R-DPO, weights to the weighted DPO; the first term's metrics."""
    chosen, rejected, ref_chosen, ref_rejected = some_pairs()
    named = extras_of(MIXED, chosen)
    assert MIXED.inputs == ("ref_logprob",) and set(MIXED.extras) == {"length", "weight"}
    assert MIXED.outputs == ("logprob", "log_sum_sq") and not MIXED.average_logprob
    found = MIXED(chosen, rejected, ref_chosen, ref_rejected, **named)
    lengths = {name: value for name, value in named.items() if name.endswith("length")}
    weights = {name: value for name, value in named.items() if name.endswith("weight")}
    averages = chosen / lengths["chosen_length"], rejected / lengths["rejected_length"]
    simpo = SimPO()(*averages)
    expected = (
        0.5 * simpo.loss
        + DPO(use_weighting=True)(chosen, rejected, ref_chosen, ref_rejected, **weights).loss
        + 2 * RDPO()(chosen, rejected, ref_chosen, ref_rejected, **lengths).loss
        - 0.1 * averages[0]
    )
    torch.testing.assert_close(found.loss, expected)
    assert torch.equal(found.margin, simpo.margin) and torch.equal(found.accuracy, simpo.accuracy)
    assert torch.equal(found.chosen_logprob, chosen) and torch.equal(found.rejected_logprob, rejected)


def test_weighted_sum_averages_the_reference_too() -> None:
    inputs, lengths = some_pairs(), dict(chosen_length=torch.full((6,), 4), rejected_length=torch.full((6,), 4))
    found = WeightedSum(terms=[{"name": "dpo", "loss_type": "ipo"}])(*inputs, **lengths)
    expected = DPO(loss_type="ipo")(*(x / 4 for x in inputs))
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.margin, expected.margin)


def test_weighted_sum_of_plain_values() -> None:
    """Plain values, as from a YAML file, make a loss that is equal, hashable and replaceable like any."""
    plain = losses.get(
        "weighted_sum",
        terms=["simpo", {"name": "dpo", "loss_type": "hinge", "beta": 0.3}, {"name": "chosen_nll"}],
        weights=[1, 0.5, 0.25],
    )
    made = WeightedSum(terms=(SimPO(), DPO(loss_type="hinge", beta=0.3), ChosenNLL()), weights=(1.0, 0.5, 0.25))
    assert plain == made and hash(plain) == hash(made)
    assert losses.get(made, weights=[1, 1, 1]).weights == (1.0, 1.0, 1.0)
    assert WeightedSum(terms=["dpo", "simpo", "orpo"]).weights == (1.0, 1.0, 1.0)
    assert losses.get("weighted_sum") == WeightedSum(terms=["dpo", "chosen_nll"])
    free = WeightedSum(terms=["simpo", "chosen_nll"])
    assert free.inputs == () and free.extras == ("length",) and free.tail_weight == 1
    assert WeightedSum(terms=[DPO(loss_type="aot"), "dpo"]).batch_wide
    desensitised = {"name": "dpo", "tail_weight": 0.5}
    assert WeightedSum(terms=[desensitised, {**desensitised, "loss_type": "bco_pair"}]).tail_weight == 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Extreme values


@pytest.mark.parametrize("loss", PAIRS, ids=ident)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_for_finite_input(loss: Loss, dtype: torch.dtype) -> None:
    values = torch.tensor([-1e4, -1e3, -104, -40, -1, -1e-9, 0], dtype=dtype)
    chosen, rejected = (x.flatten().clone().requires_grad_() for x in torch.meshgrid(values, values, indexing="ij"))
    for reference in (0.0, -1e4):
        ref = torch.full_like(chosen, reference)
        result = call(loss, chosen, rejected, ref, ref)
        assert all(x.isfinite().all() for x in result)
        for found in torch.autograd.grad(result.loss.sum(), (chosen, rejected), allow_unused=True):
            assert found is None or found.isfinite().all()


@pytest.mark.parametrize("loss", PAIRS, ids=ident)
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_an_impossible_completion_has_a_finite_gradient(loss: Loss, side: str) -> None:
    """No gradient is NaN. Losses that are quadratic in the log-prob have an infinite one, as they must."""
    chosen = torch.tensor([-math.inf if side == "chosen" else -2.0], requires_grad=True)
    rejected = torch.tensor([-math.inf if side == "rejected" else -2.0], requires_grad=True)
    result = call(loss, chosen, rejected, torch.tensor([-2.5]), torch.tensor([-2.5]))
    found = torch.autograd.grad(result.loss.sum(), (chosen, rejected), allow_unused=True)
    assert not result.loss.isnan().any() and not any(x is not None and x.isnan().any() for x in found)
    if getattr(loss, "loss_type", "") not in QUADRATIC:
        assert all(x is None or x.isfinite().all() for x in found)


@pytest.mark.parametrize(
    ("loss", "lost"),
    [
        (DPO(), math.inf),
        (DPO(loss_type="apo_zero"), 1.5),
        (SimPO(), math.inf),
        (ORPO(), math.inf),
        (CPO(), math.inf),
        (DPOP(penalty=0.0), math.inf),
    ],
    ids=ident,
)
def test_value_of_an_impossible_chosen_completion(loss: Loss, lost: float) -> None:
    result = call(loss, doubles(-math.inf), doubles(-2.0), doubles(-2.0), doubles(-2.0))
    assert result.loss.item() == lost and result.accuracy.item() == 0


@pytest.mark.parametrize("loss", [x for x in PAIRS if x.extras or x.average_logprob], ids=ident)
def test_empty_completions(loss: Loss) -> None:
    """Log-probability 0 in sum and average, length 0, weight 1: a constant with finite gradients."""
    chosen, rejected, zero = doubles(0.0, 0.0, -3.0, grad=True), doubles(0.0, -3.0, 0.0, grad=True), doubles(0, 0, 0)
    named = {
        "chosen_length": torch.tensor([0, 0, 2]),
        "rejected_length": torch.tensor([0, 2, 0]),
        "chosen_weight": torch.ones(3),
        "rejected_weight": torch.ones(3),
    }
    wanted = {name: value for name, value in named.items() if name.partition("_")[2] in loss.extras}
    result = loss(chosen, rejected, *((zero, zero) if loss.inputs else ()), **wanted)
    assert all(x.isfinite().all() for x in result)
    for found in torch.autograd.grad(result.loss.sum(), (chosen, rejected), allow_unused=True):
        assert found is None or found.isfinite().all()
    assert ChosenNLL()(chosen, rejected).loss.tolist() == [0.0, 0.0, 3.0]


@pytest.mark.parametrize("loss", PAIRS, ids=ident)
def test_no_pairs(loss: Loss) -> None:
    empty = torch.zeros(0)
    assert all(x.shape == (0,) for x in call(loss, empty, empty, empty, empty))


# ---------------------------------------------------------------------------------------------------------------------
# Unpaired


UNPAIRED = [KTO(), KTO(loss_type="apo_zero_unpaired"), KTO(desirable_weight=1.3, undesirable_weight=0.4), BCO()]
UNPAIRED += [BCO(beta=0.5, distribution_matching=True)]


def sequence_inputs(loss: Loss, count: int) -> dict[str, Tensor]:
    named = {
        "desirable": torch.arange(count) % 2 == 0,
        "reference_point": torch.tensor(0.7),
        "reward_shift": torch.tensor(-0.3),
        "density_ratio": torch.linspace(0.5, 2, count),
    }
    return {name: named[name] for name in loss.sequence_inputs}


@pytest.mark.parametrize("loss", UNPAIRED, ids=ident)
@settings(max_examples=10)
@given(v=st.floats(-20, 20), ref=st.floats(-90, -1), good=st.booleans())
def test_unpaired_losses_are_their_formulas(loss: Any, v: float, ref: float, good: bool) -> None:
    named = {**sequence_inputs(loss, 1), "desirable": torch.tensor([good])}
    found = loss(doubles(ref + v), doubles(ref), **named)
    if isinstance(loss, KTO):
        z0 = 0.7 if loss.loss_type == "kto" else 0.0
        gain = sg(loss.beta * (v - z0))
        expected = loss.desirable_weight * (1 - gain) if good else loss.undesirable_weight * gain
    else:
        reward = loss.beta * v + 0.3
        expected = -math.log(sg(reward)) if good else -math.log(1 - sg(reward))
        expected *= 0.5 if loss.distribution_matching and not good else 1.0
    torch.testing.assert_close(found.loss, doubles(expected), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.reward, doubles(loss.beta * v), rtol=1e-9, atol=1e-9)
    assert found.logprob.item() == ref + v


@pytest.mark.parametrize("loss", UNPAIRED, ids=ident)
def test_unpaired_gradients_and_what_is_detached(loss: Any) -> None:
    logprob, ref = doubles(-5.0, -9.0, -30.0, grad=True), doubles(-5.5, -8.0, -3.0, grad=True)
    named = {k: v if v.dtype == torch.bool else v.requires_grad_() for k, v in sequence_inputs(loss, 3).items()}
    assert torch.autograd.gradcheck(lambda x: loss(x, ref, **named).loss, (logprob,))
    result = loss(logprob, ref, **named)
    constants = [ref, *(x for x in named.values() if x.requires_grad)]
    found = torch.autograd.grad(result.loss.sum(), [logprob, *constants], allow_unused=True)
    assert found[0] is not None and all(x is None for x in found[1:])
    assert all(x.shape == (3,) for x in result) and not any(x.requires_grad for x in result[1:])
    assert (loss.level, loss.inputs, loss.outputs) == ("unpaired", ("ref_logprob",), ("logprob",))


@pytest.mark.parametrize("loss", UNPAIRED, ids=ident)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unpaired_extremes(loss: Any, dtype: torch.dtype) -> None:
    """Finite gradients at any logprob; values finite too, but for a desirable completion that is impossible (BCO)."""
    values = torch.tensor([0.0, -1e4, -math.inf], dtype=dtype)
    logprob = values.repeat_interleave(2).requires_grad_()
    for reference in (0.0, -1e4):
        ref = torch.full_like(logprob, reference)
        result = loss(logprob, ref, **sequence_inputs(loss, 6))
        (gradient,) = torch.autograd.grad(result.loss.sum(), logprob)
        assert gradient.isfinite().all() and result.loss[:4].isfinite().all() and result.loss[5].isfinite()
        expected = math.inf if isinstance(loss, BCO) else pytest.approx(loss.desirable_weight)
        assert result.loss[4].item() == expected
    assert loss(logprob[:0], ref[:0], **sequence_inputs(loss, 0)).loss.shape == (0,)


def test_unpaired_losses_meet_the_paired_ones() -> None:
    """A pair's two completions with the reference point, or the shift, at 0: APO-zero and the paired form of BCO."""
    chosen, rejected, ref_chosen, ref_rejected = some_pairs()
    mark = torch.ones(6, dtype=torch.bool)
    for unpaired, more, paired in (
        (KTO(), dict(reference_point=torch.tensor(0.0)), "apo_zero"),
        (KTO(loss_type="apo_zero_unpaired"), {}, "apo_zero"),
        (BCO(), dict(reward_shift=torch.tensor(0.0)), "bco_pair"),
    ):
        good = unpaired(chosen, ref_chosen, desirable=mark, **more).loss
        bad = unpaired(rejected, ref_rejected, desirable=~mark, **more).loss
        torch.testing.assert_close(good + bad, DPO(loss_type=paired)(chosen, rejected, ref_chosen, ref_rejected).loss)


def test_a_constant_each_or_one_for_all() -> None:
    logprob, ref, mark = doubles(-1.0, -2.0), doubles(-1.5, -1.5), torch.tensor([True, False])
    for loss, name in ((KTO(), "reference_point"), (BCO(), "reward_shift")):
        one = loss(logprob, ref, desirable=mark, **{name: torch.tensor(0.4)})
        each = loss(logprob, ref, desirable=mark, **{name: torch.tensor([0.4, 0.4])})
        torch.testing.assert_close(one.loss, each.loss)


def test_kto_reference_point() -> None:
    ours, theirs = doubles(-1.0, -3.0, grad=True), doubles(-2.0, -3.5)
    assert kto_reference_point(ours, theirs).item() == 0.75 and not kto_reference_point(ours, theirs).requires_grad
    assert kto_reference_point(theirs, ours).item() == 0.0  # an estimate below 0 is no divergence
    assert kto_reference_point(ours[:0], theirs[:0]).item() == 0.0


@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_bco_reward_shift_is_the_mean_of_all_rewards_however_they_come(sizes: list[int]) -> None:
    rewards = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(1))
    state = None
    for part in rewards.split(sizes):
        state = bco_reward_shift(part.requires_grad_() if part.is_leaf else part, state)
    assert state is not None and state.seen.item() == len(rewards) and not state.mean.requires_grad
    expected = rewards.double().mean() if len(rewards) else torch.tensor(0.0, dtype=torch.float64)
    torch.testing.assert_close(state.mean, expected)


def test_bco_density_ratio() -> None:
    found = bco_density_ratio(doubles(0.0, 0.5, 0.75, 1.0, grad=True))
    assert found.tolist() == [0.5, 1.0, 3.0, 10.0] and not found.requires_grad
    assert bco_density_ratio(doubles(0.0, 1.0), low=0.1, high=4.0).tolist() == [0.1, 4.0]


# ---------------------------------------------------------------------------------------------------------------------
# From hidden states


def hidden_problem() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Hidden states, head and targets of three pairs, one completion of them empty; the reference; the mask."""
    draw = torch.Generator().manual_seed(11)
    mask = torch.arange(5) < torch.tensor([5, 2, 3, 4, 3, 0])[:, None]
    tensors = dict(
        hidden=torch.randn(6, 5, 3, generator=draw, dtype=torch.float64, requires_grad=True),
        weight=torch.randn(7, 3, generator=draw, dtype=torch.float64, requires_grad=True),
        targets=torch.randint(7, (6, 5), generator=draw).masked_fill(~mask, -100),
    )
    return tensors, -2 * torch.rand(6, 5, generator=draw, dtype=torch.float64), mask


def from_logits(tensors: dict[str, Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets, 0 where masked, and log sum p^2."""
    logp = torch.log_softmax(tensors["hidden"] @ tensors["weight"].T, -1)
    picked = logp.gather(-1, tensors["targets"].clamp(min=0)[..., None])[..., 0]
    return torch.where(mask, picked, 0.0), (2 * logp).logsumexp(-1).detach()


def assert_same_result(found: Any, expected: Any, tensors: dict[str, Tensor]) -> None:
    upstream = torch.linspace(-1, 2, len(expected.loss), dtype=torch.float64)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.detach(), b.detach())
    leaves = tensors["hidden"], tensors["weight"]
    both = (torch.autograd.grad((upstream * x.loss).sum(), leaves, retain_graph=True) for x in (found, expected))
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("loss", PAIRS, ids=ident)
def test_linear_loss_of_pairs(loss: Loss) -> None:
    tensors, ref, mask = hidden_problem()
    inputs = dict(ref_logprob=ref) if loss.inputs else {}
    logprob, log_sum_sq = from_logits(tensors, mask)
    expected = pair_loss(loss, logprob, ref * mask, mask, log_sum_sq)
    assert_same_result(linear_loss(loss, **tensors, **inputs, reduction="none"), expected, tensors)
    found = linear_loss(loss, **tensors, **inputs)  # one sweep over whole pairs, where it can
    torch.testing.assert_close(found.loss, expected.loss.mean())
    leaves = tensors["hidden"], tensors["weight"]
    torch.testing.assert_close(*(torch.autograd.grad(x, leaves) for x in (found.loss, expected.loss.mean())))


def test_a_dropped_tail_is_not_read() -> None:
    """tail_weight 0 and an impossible token beyond the pair's shorter length: 0 * -inf would be NaN."""
    logprob = torch.tensor([[-1.0, -2.0, -math.inf], [-3.0, -1.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    inputs = dict(ref_logprob=torch.tensor([[-1.5, -1.0, -4.0], [-2.0, -2.0, 0.0]]))
    found = DPO(tail_weight=0.0).evaluate(TokenStats(logprob=logprob), token_layout(mask, None), inputs)
    torch.testing.assert_close(found.loss, torch.tensor(-math.log(sg(-0.05))))
    (gradient,) = torch.autograd.grad(found.loss, logprob)
    assert gradient.isfinite().all() and gradient[0, 2] == 0 and (gradient[0, :2] < 0).all()


@pytest.mark.parametrize("loss", UNPAIRED, ids=ident)
def test_linear_loss_of_single_completions(loss: Any) -> None:
    tensors, ref, mask = hidden_problem()
    named = sequence_inputs(loss, 6)
    expected = loss(from_logits(tensors, mask)[0].sum(-1), (ref * mask).sum(-1), **named)
    found = linear_loss(loss, **tensors, ref_logprob=ref, **named, reduction="none")
    assert_same_result(found, expected, tensors)
    found = linear_loss(loss, **tensors, ref_logprob=ref, **named)
    torch.testing.assert_close(found.loss, expected.loss.mean())


# ---------------------------------------------------------------------------------------------------------------------
# Settings that mean nothing, bad input, registry


EXO = dict(loss_type="exo_pair", label_smoothing=0.1)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        *(
            (lambda k=k: DPO(loss_type=k, label_smoothing=0.1), ValueError, "label_smoothing belongs to")
            for k in ("hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop")
        ),
        *(
            (lambda k=k: DPO(loss_type=k, divergence="js"), ValueError, "takes divergence='reverse_kl' alone")
            for k in (
                *("ipo", "sigmoid_norm", "aot", "aot_unpaired"),
                *("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"),
            )
        ),
        *(
            (lambda k=k: DPO(loss_type=k, use_weighting=True), ValueError, "use_weighting weights pairs")
            for k in ("aot", "aot_unpaired")
        ),
        *(
            (lambda k=k: DPO(loss_type=k, tail_weight=0.5), ValueError, "tail_weight belongs to losses of sums")
            for k in ("ipo", "sigmoid_norm")
        ),
        (lambda: DPO(loss_type="exo_pair"), ValueError, "needs label_smoothing > 0"),
        (lambda: DPO(discopop_tau=0.1), ValueError, "discopop_tau belongs to"),
        (lambda: DPO(loss_type="discopop", discopop_tau=0.0), ValueError, "DPO: discopop_tau"),
        (lambda: DPO(loss_type="discopop", discopop_tau=1.1), ValueError, "DPO: discopop_tau"),
        (lambda: DPO(tail_weight=-0.1), ValueError, "DPO: tail_weight"),
        (lambda: DPO(tail_weight=1.1), ValueError, "DPO: tail_weight"),
        (lambda: losses.get("dpo", use_weighting=1), TypeError, "DPO: use_weighting must be a bool"),
        (lambda: DPO(weight_cap=2.0), ValueError, "weight_cap belongs to use_weighting=True"),
        (lambda: DPO(weight_cap=0.0, use_weighting=True), ValueError, "DPO: weight_cap"),
        (lambda: DPO(loss_type="apo_zer"), ValueError, "did you mean 'apo_zero'"),
        (lambda: DPO(**EXO, alpha=0.3), ValueError, "alpha belongs to"),
        (lambda: DPOP(beta=0), ValueError, "DPOP: beta"),
        (lambda: DPOP(penalty=-1), ValueError, "DPOP: penalty"),
        (lambda: RDPO(beta=0), ValueError, "RDPO: beta"),
        (lambda: RDPO(alpha=math.inf), ValueError, "RDPO: alpha"),
        (lambda: SimPO(beta=0), ValueError, "SimPO: beta"),
        (lambda: SimPO(gamma=-1), ValueError, "SimPO: gamma"),
        (lambda: SimPO(label_smoothing=0.5), ValueError, "SimPO: label_smoothing"),
        (lambda: AlphaPO(beta=0), ValueError, "AlphaPO: beta"),
        (lambda: AlphaPO(alpha=math.nan), ValueError, "AlphaPO: alpha"),
        (lambda: AlphaPO(gamma=-1), ValueError, "AlphaPO: gamma"),
        (lambda: CPO(beta=-1), ValueError, "CPO: beta"),
        (lambda: CPO(loss_type="simpo"), ValueError, "CPO: loss_type"),
        (lambda: CPO(loss_type="hinge", label_smoothing=0.1), ValueError, "label_smoothing belongs to"),
        (lambda: CPO(nll_weight=-1), ValueError, "CPO: nll_weight"),
        (lambda: ORPO(beta=0), ValueError, "ORPO: beta"),
        (lambda: ORPO(nll_weight=-1), ValueError, "ORPO: nll_weight"),
        (lambda: losses.get("chosen_nll", average=None), TypeError, "ChosenNLL: average"),
        (lambda: KTO(beta=0), ValueError, "KTO: beta"),
        (lambda: KTO(loss_type="bco"), ValueError, "KTO: loss_type"),
        (lambda: KTO(desirable_weight=-1), ValueError, "KTO: desirable_weight"),
        (lambda: KTO(undesirable_weight=-1), ValueError, "KTO: undesirable_weight"),
        (lambda: BCO(beta=0), ValueError, "BCO: beta"),
        (lambda: losses.get("bco", distribution_matching="yes"), TypeError, "BCO: distribution_matching"),
        (lambda: RPO(beta=0), ValueError, "RPO: beta"),
        (lambda: RPO(nll_weight=0), ValueError, "RPO: nll_weight"),
        (lambda: MPO(beta=0), ValueError, "MPO: beta"),
        (lambda: MPO(weights=[1, 2]), ValueError, "MPO: weights must be 3"),
        (lambda: losses.get("mpo", weights=0.8), TypeError, "weights must be a list"),
        (lambda: WeightedSum(terms=[]), ValueError, "WeightedSum: weights must be"),
        (lambda: WeightedSum(terms=["dpo"], weights=[1, 2]), ValueError, "weights must be 1"),
        (lambda: WeightedSum(terms=["dpo"], weights=[0.0]), ValueError, "positive"),
        (lambda: WeightedSum(terms=["dpo"], weights=[math.inf]), ValueError, "positive"),
        (lambda: losses.get("weighted_sum", terms=["dpo"], weights=["1"]), ValueError, "numbers"),
        (lambda: losses.get("weighted_sum", terms="dpo"), TypeError, "terms must be a list"),
        (lambda: losses.get("weighted_sum", terms={"name": "dpo"}), TypeError, "terms must be a list"),
        (lambda: losses.get("weighted_sum", terms=[3]), TypeError, "must be a name or"),
        (lambda: WeightedSum(terms=["dpoo"]), ValueError, "did you mean 'dpo'"),
        (lambda: WeightedSum(terms=[{"loss_type": "ipo"}]), ValueError, "needs the loss's name"),
        (lambda: WeightedSum(terms=[{"name": "dpo", "betta": 1}]), TypeError, "did you mean 'beta'"),
        (lambda: WeightedSum(terms=["dpo", "nll"]), ValueError, "must be pair losses, got 'nll'"),
        (lambda: WeightedSum(terms=["dpo", "kto"]), ValueError, "must be pair losses, got 'kto'"),
        (lambda: WeightedSum(terms=[DPO(tail_weight=0.5), "chosen_nll"]), ValueError, "must share one tail_weight"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_errors(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


TWO, THREE, MARK = torch.zeros(2), torch.zeros(3), torch.tensor([True, False])


@pytest.mark.parametrize("loss", PAIRS, ids=ident)
def test_shapes_that_differ_are_named(loss: Loss) -> None:
    with pytest.raises(ValueError, match="rejected must have the shape of chosen"):
        call(loss, TWO, THREE, TWO, TWO)
    if loss.inputs:
        with pytest.raises(ValueError, match=r"ref_rejected|rejected_length"):
            call(loss, TWO, TWO, TWO, THREE)
    for missing in extras_of(loss, TWO):
        rest = {k: v for k, v in extras_of(loss, TWO).items() if k != missing}
        if isinstance(loss, CPO) and missing == "rejected_length":
            continue  # passed for symmetry, not read
        with pytest.raises((ValueError, TypeError), match=missing):
            loss(TWO, TWO, *((TWO, TWO) if loss.inputs else ()), **rest)


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        (lambda: DPO()(TWO, TWO, TWO, TWO, chosen_weight=TWO), ValueError, "belong to use_weighting=True"),
        (lambda: WeightedSum()(TWO, TWO, TWO, TWO), ValueError, "needs chosen_length"),
        (lambda: KTO()(TWO, TWO, desirable=MARK), ValueError, "kto needs reference_point"),
        (lambda: KTO()(TWO, THREE, desirable=MARK, reference_point=TWO[0]), ValueError, "ref_logprob must have shape"),
        (lambda: KTO()(TWO, TWO, desirable=TWO, reference_point=TWO[0]), TypeError, "desirable must be bool"),
        (lambda: KTO()(TWO, TWO, desirable=MARK[:1], reference_point=TWO[0]), ValueError, "desirable must have shape"),
        (lambda: KTO()(TWO, TWO, desirable=MARK, reference_point=THREE), ValueError, "reference_point must have shape"),
        (
            lambda: KTO(loss_type="apo_zero_unpaired")(TWO, TWO, desirable=MARK, reference_point=TWO[0]),
            ValueError,
            "reference_point belongs to",
        ),
        (lambda: BCO()(TWO, TWO, desirable=MARK, reward_shift=THREE), ValueError, "reward_shift must have shape"),
        (
            lambda: BCO()(TWO, TWO, desirable=MARK, reward_shift=TWO[0], density_ratio=TWO),
            ValueError,
            "belongs to distribution_matching=True",
        ),
        (
            lambda: BCO(distribution_matching=True)(TWO, TWO, desirable=MARK, reward_shift=TWO[0]),
            ValueError,
            "bco needs density_ratio",
        ),
    ],
)
def test_bad_input(function: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        function()


def test_names() -> None:
    pairs = ["alphapo", "chosen_nll", "cpo", "dpo", "dpop", "mpo", "orpo", "r_dpo", "rpo", "simpo", "weighted_sum"]
    for name in (*pairs, "kto", "bco"):
        loss = losses.get(name)
        assert loss.name == name and hash(loss) == hash(losses.get(name))
        assert loss.level == ("pair" if name in pairs else "unpaired")
        for label in ("Detached:", "When to use:", "Left open:", "Source:"):
            assert label in (type(loss).__doc__ or ""), (name, label)


@pytest.mark.parametrize(
    "loss",
    [DPO(loss_type="aot", label_smoothing=0.1), DPO(loss_type="discopop"), MIXED],
    ids=ident,
)
def test_losses_trace_without_a_graph_break(loss: Loss) -> None:
    inputs = some_pairs()
    torch._dynamo.reset()
    traced = torch.compile(lambda *xs: call(loss, *xs).loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(*inputs), call(loss, *inputs).loss, rtol=0, atol=0)


def test_an_unpaired_loss_traces_without_a_graph_break() -> None:
    for loss in (KTO(), BCO(distribution_matching=True)):
        torch._dynamo.reset()
        traced = torch.compile(lambda x, r, loss=loss, **more: loss(x, r, **more).loss, fullgraph=True, backend="eager")
        x, r, *_ = some_pairs(4)
        named = sequence_inputs(loss, 4)
        torch.testing.assert_close(traced(x, r, **named), loss(x, r, **named).loss, rtol=0, atol=0)


def test_every_label_smoothing_takes_effect() -> None:
    """No setting is accepted and then ignored."""
    inputs = some_pairs()
    for kind, eps in itertools.product(LOSS_TYPES, (0.1, 0.3)):
        try:
            smoothed, other = (DPO(loss_type=kind, label_smoothing=x) for x in (eps, eps / 2))
        except ValueError:
            continue
        assert not torch.allclose(smoothed(*inputs).loss, other(*inputs).loss)
