"""The policy losses: against TRL and Liger, hand-worked weights, limits, extremes, and what is detached."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import length
from torch import Tensor
from trl_standins import MAX_LENGTH, trl_loss

from logitless import linear_loss, losses
from logitless.losses import (
    BNPO,
    CISPO,
    DAPO,
    DPPO,
    DPPOKL,
    DRO,
    GMPO,
    GRPO,
    GSPO,
    GVPO,
    LUSPO,
    PPO,
    RLOO,
    SAPO,
    TOPR,
    VAPO,
    VESPO,
    ClipCov,
    DrGRPO,
    GSPOToken,
    KLCov,
    PolicyLoss,
    Reinforce,
    kl_estimate,
    off_policy_mask,
    own_means,
    rejection_mask,
    sampler_correction,
    top_entropy_mask,
    value_loss,
)
from logitless.losses.formulas import bounded_exp, k3
from logitless.losses.policy.policy_loss import LEAST_LOGPROB, Samples
from logitless.types import TokenStats

TOKEN_LOSSES = [Reinforce(), PPO(), PPO(delta=3.0), GRPO(), DrGRPO(), DAPO(), BNPO(), CISPO(), SAPO(), DPPO(), DRO()]
TOKEN_LOSSES += [DPPOKL(), TOPR(per="token")]
SEQUENCE_LOSSES = [RLOO(), GSPO(), GSPO(epsilon_low=0.1, epsilon_high=0.2), GSPOToken(), LUSPO(), GMPO(), VESPO()]
SEQUENCE_LOSSES += [TOPR(), KLCov(share=0.3)]
LOSSES = TOKEN_LOSSES + SEQUENCE_LOSSES
#: Losses that at ratio 1 are something else than REINFORCE.
APART = [VAPO(), ClipCov(share=0.3, covariance_low=-1.0), GVPO()]
#: Losses whose gradient is that of their value: nothing of the model is detached in them.
WHOLE = [*TOKEN_LOSSES[:7], SAPO(), DRO(), RLOO(), GSPO(), GSPO(epsilon_low=0.1, epsilon_high=0.2), LUSPO(), GMPO()]
WHOLE += [KLCov(share=0.3), *APART]


def ident(loss: PolicyLoss) -> str:
    changed = [f for f in dataclasses.fields(loss) if getattr(loss, f.name) != f.default]
    return "-".join([loss.name, *(f"{f.name}={getattr(loss, f.name)}" for f in changed)])


EVERY = pytest.mark.parametrize("loss", LOSSES, ids=ident)
ALL = pytest.mark.parametrize("loss", LOSSES + APART, ids=ident)


class PolicyBatch(SimpleNamespace):
    """Random samples: rows of sequences, the first token of the last row and the tails masked."""

    def __init__(self, seed: int = 0, drift: float = 0.4, dtype: torch.dtype = torch.float64, empty: bool = False):
        draw = torch.Generator().manual_seed(seed)
        shape = (4, 6)
        super().__init__(
            logprob=(-3 * torch.rand(shape, generator=draw, dtype=dtype)).requires_grad_(),
            entropy=(2 * torch.rand(shape, generator=draw, dtype=dtype)).requires_grad_(),
            per_sequence=torch.tensor([1.3, -0.7, 0.4, -1.1], dtype=dtype),
            mask=torch.arange(6) < torch.tensor([6, 4, 0 if empty else 1, 5])[:, None],
        )
        self.mask[3, 0] = False
        self.old_logprob = self.logprob.detach() + drift * torch.randn(shape, generator=draw, dtype=dtype)
        self.ref_logprob = self.logprob.detach() + 0.5 * torch.randn(shape, generator=draw, dtype=dtype)
        self.sampling_logprob = self.old_logprob + 0.2 * torch.randn(shape, generator=draw, dtype=dtype)
        self.advantages = self.per_sequence[:, None].expand(shape)
        self.draw = torch.rand(shape, generator=draw, dtype=dtype)
        self.nll_weight = 1.7 * (self.advantages > 0)
        self.group = torch.tensor([5, 2, 5, 2])[:, None].expand(shape)

    @property
    def stats(self) -> TokenStats:
        return TokenStats(logprob=self.logprob, entropy=self.entropy)

    def inputs(self, loss: PolicyLoss, **changed: Any) -> dict[str, Any]:
        """All that the loss knows of this batch, those of `changed` replaced."""
        known = {k: v for k, v in vars(self).items() if k in (*loss.inputs, *loss.optional_inputs)}
        return known | ({"mask": self.mask} if not loss.token_wise else {}) | changed

    def call(self, loss: PolicyLoss, **changed: Any) -> Tensor:
        return loss(self.stats, **self.inputs(loss, **changed))

    def reduced(self, loss: PolicyLoss, **changed: Any) -> Tensor:
        return reduced(loss.reduction, self.call(loss, **changed), self.mask)

    def gradient(self, loss: PolicyLoss, **changed: Any) -> Tensor:
        return torch.autograd.grad(self.reduced(loss, **changed), self.logprob)[0]


def reduced(reduction: str, per_token: Tensor, mask: Tensor) -> Tensor:
    """The named reductions in plain words; a row without tokens counts as a sequence, as in TRL."""
    per_token = torch.where(mask, per_token, 0.0)
    rows = per_token.sum(-1)
    return {
        "mean": rows.sum() / mask.sum(),
        "mean_of_means": (rows / mask.sum(-1).clamp(min=1)).mean(),
        "sequence_mean": rows.mean(),
        "constant_length": rows.sum() / (len(rows) * MAX_LENGTH),
    }[reduction]


# Against TRL


def assert_same(ours: Tensor, theirs: Tensor, batch: PolicyBatch) -> None:
    """Values, and gradients wherever either reaches."""
    torch.testing.assert_close(ours, theirs)
    wanted = [batch.logprob, batch.entropy]
    one, two = (torch.autograd.grad(x, wanted, allow_unused=True, materialize_grads=True) for x in (ours, theirs))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)


KL = {"beta": 0.3}
BIASED = {"use_bias_correction_kl": True}
WIDE = {"epsilon_low": 0.2, "epsilon_high": 0.2}
NARROW = {"epsilon_low": 0.1, "epsilon_high": 0.1}
SEQUENCE = {"importance_sampling_level": "sequence"}
TRL_CASES: list[tuple[PolicyLoss, str, dict[str, Any]]] = [
    (GRPO(), "grpo", {}),
    (GRPO(delta=1.3), "grpo", {"delta": 1.3}),
    (GRPO(**KL), "grpo", KL),
    (GRPO(**KL, kl_importance=True), "grpo", {**KL, **BIASED}),
    (BNPO(), "bnpo", {}),
    (BNPO(epsilon_low=0.1), "bnpo", {"epsilon_low": 0.1}),
    (BNPO(**KL, entropy_coef=0.2), "bnpo", {**KL, "entropy_coef": 0.2}),
    (DAPO(), "dapo", {"epsilon_high": 0.28}),
    (DAPO(top_entropy=0.4), "dapo", {"epsilon_high": 0.28, "top_entropy_quantile": 0.4}),
    (DAPO(off_policy_threshold=0.05), "dapo", {"epsilon_high": 0.28, "off_policy_mask_threshold": 0.05}),
    (DrGRPO(), "dr_grpo", {}),
    (CISPO(ratio_cap=1.1), "cispo", {"epsilon_high": 1.1}),
    (CISPO(), "cispo", {"epsilon_high": 5.0}),
    (SAPO(), "sapo", {}),
    (VESPO(), "vespo", {}),
    (GSPO(**NARROW), "grpo", {**SEQUENCE, **NARROW}),
    (GSPO(**WIDE, **KL, kl_importance=True), "grpo", {**SEQUENCE, **KL, **BIASED}),
    (LUSPO(**WIDE), "luspo", SEQUENCE),
    (LUSPO(**WIDE, **KL), "luspo", {**SEQUENCE, **KL}),
    (GMPO(), "gmpo", {"epsilon_low": 0.4, "epsilon_high": 0.4}),
    (GMPO(**NARROW, **KL), "gmpo", {**NARROW, **KL}),
    (RLOO(), "rloo", {}),
]


def named(value: object) -> str:
    return ident(value) if isinstance(value, PolicyLoss) else ""


@pytest.mark.parametrize(("loss", "loss_type", "options"), TRL_CASES, ids=named)
@pytest.mark.parametrize("drift", [0.0, 0.05, 0.6])
def test_losses_are_trl_s(loss: PolicyLoss, loss_type: str, options: dict[str, Any], drift: float) -> None:
    """Value and gradient, also where the ratio is 1 throughout and every comparison is a tie."""
    batch = PolicyBatch(drift=drift)
    assert_same(batch.reduced(loss), trl_loss(batch, loss_type, **options), batch)


def test_trl_s_gspo_with_an_empty_completion() -> None:
    batch = PolicyBatch(empty=True)
    assert_same(batch.reduced(GSPO(**WIDE)), trl_loss(batch, "grpo", **SEQUENCE), batch)


def test_on_policy_samples_without_old_logprob_are_trl_s() -> None:
    batch = PolicyBatch()
    theirs = trl_loss(batch, "grpo", {"old_per_token_logps": None})
    assert_same(batch.reduced(GRPO(), old_logprob=None), theirs, batch)


def test_sampler_correction_is_trl_s_weight() -> None:
    """The weight is a policy weight: it comes before the KL, and not into the normaliser."""
    batch = PolicyBatch()
    weight = sampler_correction(batch.old_logprob, batch.sampling_logprob, mode="token_truncate", high=1.1)
    theirs = trl_loss(batch, "grpo", {"importance_sampling_ratio": weight}, use_vllm=True, **KL)
    assert_same(batch.reduced(GRPO(**KL), policy_weight=weight), theirs, batch)


def test_vespo_takes_the_sampler_s_logprobs_as_old_ones() -> None:
    """TRL folds the sampler's ratio into the weight; here the sampler's log-probs stand for the old ones."""
    batch = PolicyBatch()
    ratio = torch.where(batch.mask, (batch.old_logprob - batch.sampling_logprob).exp(), 1.0)
    theirs = trl_loss(batch, "vespo", {"importance_sampling_ratio": ratio}, use_vllm=True)
    assert_same(batch.reduced(VESPO(), old_logprob=batch.sampling_logprob), theirs, batch)


def test_metrics_are_trl_s() -> None:
    batch = PolicyBatch(drift=0.6)
    loss = BNPO(**KL)
    trl_loss(batch, "bnpo", **KL)
    got = loss.metrics(batch.stats, **batch.inputs(loss))
    assert all(x is None or not x.requires_grad for x in got)
    for ours, name in ((got.clipped_low, "low"), (got.clipped_high, "high")):
        assert ours[batch.mask].mean().item() == pytest.approx(batch.trl_metrics[f"clip_ratio/{name}_mean"])
        assert 0 < ours[batch.mask].mean() < 1
    assert got.kl is not None and got.entropy is None
    assert got.kl[batch.mask].mean().item() == pytest.approx(batch.trl_metrics["kl"])
    log_ratio = (batch.logprob - batch.old_logprob).detach()
    torch.testing.assert_close(got.ratio, log_ratio.exp())
    torch.testing.assert_close(got.old_kl, log_ratio.exp() - 1 - log_ratio)


# Against Liger


def liger_loss(batch: PolicyBatch, loss_type: str, **options: Any) -> Tensor:
    module = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")
    mask = batch.mask.to(batch.logprob.dtype)
    loss: Tensor = module.LigerFusedLinearGRPOFunction.ppo_loss_fn(
        batch.logprob,
        mask,
        batch.per_sequence,
        mask,
        ref_per_token_logps=batch.ref_logprob,
        old_per_token_logps=batch.old_logprob,
        loss_type=loss_type,
        max_completion_length=MAX_LENGTH,
        num_items_in_batch=mask.sum(),
        **{"beta": 0.0, **options},
    )[0]
    return loss


@pytest.mark.parametrize(
    ("loss", "loss_type", "options"),
    [
        (GRPO(), "grpo", {}),
        (GRPO(delta=1.3, **KL), "grpo", {"delta": 1.3, **KL}),
        (BNPO(**KL, kl_importance=True), "bnpo", {**KL, **BIASED}),
        (DrGRPO(), "dr_grpo", {}),
        (DAPO(), "dapo", {"epsilon_high": 0.28}),
        (CISPO(ratio_cap=1.2), "cispo", {"epsilon_high": 1.2}),
        (SAPO(), "sapo", {}),
        (VESPO(), "vespo", {}),
        (LUSPO(**WIDE), "luspo", SEQUENCE),
    ],
    ids=named,
)
def test_losses_are_liger_s(loss: PolicyLoss, loss_type: str, options: dict[str, Any]) -> None:
    batch = PolicyBatch(drift=0.5)
    assert_same(batch.reduced(loss), liger_loss(batch, loss_type, **options), batch)


def test_liger_s_luspo_with_a_kl_counts_padding() -> None:
    """A known defect of Liger: terms are multiplied by |y| and averaged over all positions, padded ones too."""
    batch = PolicyBatch(drift=0.5)
    loss = LUSPO(**WIDE, **KL)
    theirs = liger_loss(batch, "luspo", **SEQUENCE, **KL)
    s = loss.metrics(batch.stats, **batch.inputs(loss)).ratio
    surrogate = -torch.min(s * batch.advantages, s.clamp(0.8, 1.2) * batch.advantages)
    kappa = batch.ref_logprob - batch.logprob
    wrong = ((surrogate + 0.3 * (kappa.exp() - kappa - 1)) * batch.mask.sum(-1, keepdim=True)).mean()
    torch.testing.assert_close(theirs, wrong)
    assert not torch.allclose(batch.reduced(loss), theirs)


# Weights, worked by hand


def weight_of(loss: PolicyLoss, logprob: float, old: float, advantage: float, **inputs: float) -> tuple[float, float]:
    """Value and w = -d loss / d logprob of a single token."""
    lp = torch.tensor([[logprob]], dtype=torch.float64, requires_grad=True)
    given = {"advantages": advantage, "old_logprob": old, **inputs}
    known = (*loss.inputs, *loss.optional_inputs)
    constants = {k: torch.full((1, 1), v, dtype=torch.float64) for k, v in given.items() if k in known}
    value = loss(TokenStats(logprob=lp), **constants)
    return value.item(), -torch.autograd.grad(value.sum(), lp)[0].item()


@given(st.floats(-4, 0), st.floats(-4, 0), st.floats(-2, 2))
@settings(max_examples=30)
def test_weights_of_single_tokens(logprob: float, old: float, advantage: float) -> None:
    r, change = math.exp(logprob - old), math.exp(logprob) - math.exp(old)
    up = advantage > 0

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    def outside(low: float, high: float) -> bool:
        return r > high if up else r < low

    tau = 1.0 if up else 1.05
    gate = sigmoid(tau * (r - 1))
    k, lam = (2, 3) if advantage >= 0 else (3, 2)
    phi = r**k * math.exp(lam * (1 - r))
    kept = change <= 0.15 if up else change >= -0.15
    rest, old_rest = 1 - math.exp(logprob) + 1e-8, 1 - math.exp(old) + 1e-8
    divergence = math.exp(old) * (old - logprob) + old_rest * math.log(old_rest / rest)
    within = divergence <= 0.05 or (change <= 0 if up else change >= 0)
    expected = {
        Reinforce(): (-advantage * logprob, advantage),
        PPO(): (
            -advantage * (min(r, 1.2) if up else max(r, 0.8)),
            0 if outside(0.8, 1.2) else advantage * r,
        ),
        CISPO(): (-min(r, 5) * advantage * logprob, min(r, 5) * advantage),
        CISPO(ratio_cap=None): (-r * advantage * logprob, r * advantage),
        CISPO(ratio_floor=0.9): (
            -max(min(r, 5), 0.9) * advantage * logprob,
            max(min(r, 5), 0.9) * advantage,
        ),
        SAPO(): (-4 / tau * gate * advantage, 4 * r * gate * (1 - gate) * advantage),
        DPPO(): (-min(r, 20) * advantage * logprob * kept, min(r, 20) * advantage * kept),
        DPPOKL(): (-min(r, 20) * advantage * logprob * within, min(r, 20) * advantage * within),
        DRO(strength=0.3): (
            -advantage * logprob + 0.15 * (logprob - old) ** 2,
            advantage - 0.3 * (logprob - old),
        ),
        VESPO(): (-phi * advantage * logprob, phi * advantage),
        GMPO(): (
            -advantage * math.exp(min(logprob - old, 0.4) if up else max(logprob - old, -0.4)),
            0 if outside(math.exp(-0.4), math.exp(0.4)) else advantage * r,
        ),
    }
    for loss, (value, weight) in expected.items():
        assert weight_of(loss, logprob, old, advantage) == pytest.approx((value, weight), rel=1e-7, abs=1e-9), loss


@pytest.mark.parametrize("loss", WHOLE, ids=ident)
@pytest.mark.parametrize("extra", [{}, {**KL, "kl_importance": True, "entropy_coef": 0.1}], ids=["alone", "with"])
def test_gradcheck(loss: PolicyLoss, extra: dict[str, Any]) -> None:
    batch = PolicyBatch(drift=0.6)
    loss = dataclasses.replace(loss, **extra)

    def value(logprob: Tensor, entropy: Tensor) -> Tensor:
        batch.logprob, batch.entropy = logprob, entropy
        return batch.call(loss)

    assert torch.autograd.gradcheck(value, (batch.logprob, batch.entropy))


@ALL
def test_constants_get_no_gradient(loss: PolicyLoss) -> None:
    batch = PolicyBatch()
    loss = dataclasses.replace(loss, beta=0.1)
    names = [name for name in (*loss.inputs, *loss.optional_inputs) if name not in ("policy_weight", "group")]
    leaves = {name: getattr(batch, name).clone().requires_grad_() for name in names}
    total = batch.call(loss, **leaves).sum()
    assert torch.autograd.grad(total, list(leaves.values()), allow_unused=True) == (None,) * len(leaves)
    reference = batch.ref_logprob.clone().requires_grad_()
    kl = kl_estimate(batch.logprob, reference).sum()
    assert torch.autograd.grad(kl, reference, allow_unused=True) == (None,)


@pytest.mark.parametrize(
    ("bound", "advantage", "loss"),
    [(1.5, 1.0, PPO(epsilon_high=0.5)), (0.5, -1.0, PPO(epsilon_low=0.5)), (3.0, -1.0, PPO(delta=3.0))],
)
def test_a_ratio_on_its_bound_counts_as_inside(bound: float, advantage: float, loss: PPO) -> None:
    beyond = bound * (1 + math.copysign(1e-9, math.log(bound)))
    ratio = torch.tensor([bound, beyond], dtype=torch.float64, requires_grad=True)
    advantages = torch.full_like(ratio, advantage)
    samples = Samples(ratio.log(), ratio.log(), None, {"advantages": advantages}, None)
    (gradient,) = torch.autograd.grad(loss._objective(samples, ratio).sum(), ratio)
    assert gradient.tolist() == [-advantage, 0]
    low, high = loss._clipped(samples, ratio)
    assert (low | high).tolist() == [False, True]


def test_delta_is_the_dual_clip() -> None:
    """max(-rA, -clip(r)A), and where A < 0 at most -cA: arXiv 1912.09729, as verl writes it."""
    r = torch.linspace(0.01, 6, 600, dtype=torch.float64)
    for advantage in (-1.7, 0.9):
        m = torch.max(-r * advantage, -r.clamp(0.8, 1.2) * advantage)
        expected = torch.min(m, torch.tensor(-3.0 * advantage)) if advantage < 0 else m
        constants = {"advantages": torch.full_like(r, advantage), "old_logprob": torch.zeros_like(r)}
        got = PPO(delta=3.0)(TokenStats(logprob=r.log()), **constants)
        torch.testing.assert_close(got, expected)


# Limits


@EVERY
def test_on_policy_all_are_reinforce_with_a_baseline(loss: PolicyLoss) -> None:
    """One gradient, -A per token, up to how each paper averages; with and without old_logprob."""
    batch = PolicyBatch(drift=0.0)
    weights = reduced(loss.reduction, torch.ones_like(batch.logprob), batch.mask)
    counted = torch.autograd.functional.jacobian(lambda x: reduced(loss.reduction, x, batch.mask), batch.old_logprob)
    expected = -batch.advantages * counted
    if loss.name == "rloo":  # of sequences' summed log-probs
        expected = expected * batch.mask.sum(-1, keepdim=True)
    assert weights > 0
    torch.testing.assert_close(batch.gradient(loss), expected)
    if "old_logprob" in loss.optional_inputs:
        torch.testing.assert_close(batch.gradient(loss, old_logprob=None), expected)


def test_gspo_of_single_tokens_is_grpo() -> None:
    batch = PolicyBatch(drift=0.5)
    single = torch.zeros_like(batch.mask)
    single[:, 2] = True
    batch.mask = single
    for loss in (GSPO(**WIDE), GSPOToken(**WIDE), RLOO(), LUSPO(**WIDE)):
        torch.testing.assert_close(batch.reduced(loss), batch.reduced(GRPO()))
        torch.testing.assert_close(batch.gradient(loss), batch.gradient(GRPO()))


def test_gspo_token_is_gspo_where_advantages_are_equal() -> None:
    batch = PolicyBatch(drift=0.5)
    for eps in (0.05, 0.5):
        one, two = (cls(epsilon_low=eps, epsilon_high=eps) for cls in (GSPO, GSPOToken))
        torch.testing.assert_close(batch.reduced(one), batch.reduced(two))
        torch.testing.assert_close(batch.gradient(one), batch.gradient(two))


def test_cispo_without_a_cap_is_reinforce_with_the_ratio() -> None:
    batch = PolicyBatch(drift=1.0)
    ratio = (batch.logprob - batch.old_logprob).exp().detach()
    one, two = batch.call(CISPO(ratio_cap=None)), batch.call(Reinforce(), policy_weight=ratio)
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(batch.gradient(CISPO(ratio_cap=None)), batch.gradient(Reinforce(), policy_weight=ratio))


@given(st.integers(0, 2**16))
@settings(max_examples=20)
def test_names_of_the_clip_share_its_formula(seed: int) -> None:
    batch = PolicyBatch(seed=seed)
    expected = batch.call(PPO(epsilon_high=0.28))
    for cls in (GRPO, DrGRPO, DAPO, BNPO):
        assert torch.equal(batch.call(cls(epsilon_high=0.28)), expected)


def test_reductions_are_those_of_the_papers() -> None:
    wanted = {
        "mean_of_means": "grpo sapo gspo gspo_token gmpo rloo gvpo",
        "constant_length": "dr_grpo prefix_rft",
        "mean": "reinforce ppo dapo bnpo cispo dppo dppo_kl dro vespo luffy chord uft srft clip_cov kl_cov vapo",
        "sequence_mean": "luspo topr",
    }
    for reduction, those in wanted.items():
        assert {losses.get(name).reduction for name in those.split()} == {reduction}


def test_defaults_are_those_of_the_papers() -> None:
    assert (LUSPO().epsilon_low, LUSPO().epsilon_high) == (2e-3, 2.5e-3)
    assert (GSPO().epsilon_low, GSPO().epsilon_high) == (3e-4, 4e-4)
    assert (DPPO().threshold_low, DPPO().threshold_high) == (0.15, 0.15)
    assert (DPPOKL().threshold_low, DPPOKL().threshold_high) == (0.05, 0.05)


# Extremes


@ALL
@pytest.mark.parametrize("extra", [{}, {"beta": 0.1}, {"beta": 0.1, "kl": "k2", "kl_importance": True}], ids=str)
def test_extreme_log_probabilities_stay_finite(loss: PolicyLoss, extra: dict[str, Any]) -> None:
    """Every pair of -1e4, 0 and -inf, in float32: ratios of e^10000 among them."""
    loss = dataclasses.replace(loss, **extra)
    ends = torch.tensor([-1e4, 0.0, -math.inf, -1.0])
    grid = torch.cartesian_prod(ends, ends, ends, torch.tensor([-1.0, 0.0, 1.0]))
    logprob, old, reference, advantages = (x[:, None].contiguous() for x in grid.T)
    logprob.requires_grad_()
    inputs = {"advantages": advantages, "old_logprob": old, "ref_logprob": reference}
    inputs |= {"nll_weight": (advantages > 0).float(), "draw": torch.rand_like(old), "group": torch.zeros_like(old)}
    given = {k: v for k, v in inputs.items() if k in (*loss.inputs, *loss.optional_inputs)}
    value = loss(TokenStats(logprob=logprob), **given)
    (gradient,) = torch.autograd.grad(value.sum(), logprob)
    assert value.isfinite().all() and gradient.isfinite().all()
    assert (gradient[logprob.isneginf()] == 0).all()
    without = loss(TokenStats(logprob=logprob), **{k: v for k, v in given.items() if k != "old_logprob"})
    assert without.isfinite().all()


def test_a_ratio_beyond_float32_keeps_its_gradient() -> None:
    """If A < 0 and the policy has made a token likelier by e^50, the push back is not clamped away."""
    logprob = torch.tensor([-1.0], requires_grad=True)
    constants = {"advantages": torch.tensor([-1.0]), "old_logprob": torch.tensor([-51.0])}
    value = PPO()(TokenStats(logprob=logprob), **constants)
    (gradient,) = torch.autograd.grad(value, logprob)
    assert gradient.item() == pytest.approx(math.exp(20)) and value.item() == pytest.approx(math.exp(20) * 31)
    bounded = PPO(delta=3.0)(TokenStats(logprob=logprob), **constants)
    assert bounded.item() == 3 and torch.autograd.grad(bounded, logprob)[0].item() == 0


def test_bounded_exp_follows_exp_and_then_its_tangent() -> None:
    x = torch.tensor([-math.inf, -5.0, 0.0, 20.0, 21.0, 1e4], dtype=torch.float64, requires_grad=True)
    y = bounded_exp(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    top = math.exp(20)
    assert y.tolist() == pytest.approx([0, math.exp(-5), 1, top, 2 * top, top * (1e4 - 19)])
    assert slope.tolist() == pytest.approx([0, math.exp(-5), 1, top, top, top])
    assert bounded_exp(torch.tensor([math.nan])).isnan().all()


@pytest.mark.parametrize("loss", [*SEQUENCE_LOSSES, *APART[1:]], ids=ident)
def test_empty_sequences_and_masked_garbage(loss: PolicyLoss) -> None:
    """An empty sequence adds nothing; NaN and inf behind the mask reach neither value nor gradient."""
    loss = dataclasses.replace(loss, beta=0.1, entropy_coef=0.1)
    batch = PolicyBatch(empty=True)
    expected, gradient = batch.call(loss), batch.gradient(loss)
    for name in ("advantages", "old_logprob", "ref_logprob"):
        setattr(batch, name, torch.where(batch.mask, getattr(batch, name), torch.tensor([math.nan, math.inf] * 3)))
    batch.entropy = torch.where(batch.mask, batch.entropy, math.nan)
    batch.logprob = torch.where(batch.mask, batch.logprob.detach(), math.nan).requires_grad_()
    assert torch.equal(batch.call(loss), expected) and torch.equal(batch.gradient(loss), gradient)
    assert (expected[~batch.mask] == 0).all() and (gradient[~batch.mask] == 0).all()
    assert (batch.call(loss, mask=torch.zeros_like(batch.mask)) == 0).all()


@pytest.mark.parametrize(
    "loss", [*SEQUENCE_LOSSES, *APART[1:], DAPO(top_entropy=0.3), DAPO(off_policy_threshold=0.1)], ids=ident
)
def test_padded_and_packed_agree(loss: PolicyLoss) -> None:
    batch = PolicyBatch(drift=0.5)
    loss = dataclasses.replace(loss, beta=0.1)
    keep = torch.ones_like(batch.mask)
    keep[1, 5] = keep[2, 2:] = False  # padding that a packed batch leaves out; other masked tokens stay
    names = (*loss.inputs, *loss.optional_inputs)
    flat = {name: getattr(batch, name)[keep] for name in names if name != "policy_weight"}
    sequence = torch.arange(4)[:, None].expand(4, 6)[keep] * 3 + 5
    stats = TokenStats(logprob=batch.logprob[keep], entropy=batch.entropy[keep])
    packed = loss(stats, mask=batch.mask[keep], sequence=sequence, **flat)
    torch.testing.assert_close(packed, batch.call(loss)[keep])
    gradient = torch.autograd.grad(packed.sum(), batch.logprob)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(batch.call(loss).sum(), batch.logprob)[0])


# Covariances, tapers, groups, imitation


def covariances(batch: PolicyBatch) -> list[tuple[float, int, int]]:
    """(A - mean A) (logprob - mean logprob) of the tokens that count, with their places."""
    places = batch.mask.nonzero().tolist()
    advantages, logprobs = ([x[i, j].item() for i, j in places] for x in (batch.advantages, batch.logprob))
    means = sum(advantages) / len(places), sum(logprobs) / len(places)
    pairs = zip(advantages, logprobs, places, strict=True)
    return [((a - means[0]) * (lp - means[1]), i, j) for a, lp, (i, j) in pairs]


@pytest.mark.parametrize("share", [1e-6, 0.26, 1.0])
@pytest.mark.parametrize("delta", [None, 1.3])
def test_clip_cov_leaves_out_random_tokens_of_high_covariance(share: float, delta: float | None) -> None:
    batch = PolicyBatch(drift=0.2)
    low, high = -1.0, 0.4
    ratio = (batch.logprob - batch.old_logprob).exp()
    candidates = []
    for c, i, j in covariances(batch):
        r, up = ratio[i, j].item(), batch.advantages[i, j].item() > 0
        clipped = r > 1.2 if up else r < 0.8 or (delta is not None and r > delta)
        if low < c < high and not clipped:
            candidates.append((batch.draw[i, j].item(), i, j))
    wanted = max(int(share * batch.mask.sum()), 1)
    assert 4 < len(candidates) < batch.mask.sum()
    keep = torch.ones_like(batch.mask)
    for _, i, j in sorted(candidates)[:wanted]:
        keep[i, j] = False
    loss = ClipCov(share=share, covariance_low=low, covariance_high=high, delta=delta)
    expected = torch.where(batch.mask & keep, batch.call(PPO(delta=delta)), 0.0)
    torch.testing.assert_close(batch.call(loss), expected)
    (gradient,) = torch.autograd.grad(expected.sum() / batch.mask.sum(), batch.logprob)
    torch.testing.assert_close(batch.gradient(loss), gradient)
    assert loss.outputs == ("logprob",) and ClipCov(top_entropy=0.5).outputs == ("logprob", "entropy")


@pytest.mark.parametrize("share", [1e-6, 0.26, 1.0])
def test_kl_cov_penalises_the_tokens_of_greatest_covariance(share: float) -> None:
    batch = PolicyBatch(drift=0.5)
    chosen = sorted(covariances(batch), reverse=True)[: max(int(share * batch.mask.sum()), 1)]
    log_ratio = (batch.logprob - batch.old_logprob).detach()
    value = torch.where(batch.mask, -batch.advantages * log_ratio.exp(), 0.0)
    slope = value.clone()
    for _, i, j in chosen:
        value[i, j] += 0.7 * log_ratio[i, j].abs()
        slope[i, j] += 0.7 * log_ratio[i, j].sign()
    loss = KLCov(share=share, kl_coef=0.7)
    torch.testing.assert_close(batch.call(loss), value)
    torch.testing.assert_close(batch.gradient(loss), slope / batch.mask.sum())


def test_of_equal_covariances_no_more_are_penalised_than_wanted() -> None:
    """Sure tokens have a logprob of 0, and with it one covariance."""
    logprob = torch.zeros(2, 4)
    advantages = torch.tensor([[1.0] * 4, [-1.0] * 4])
    inputs = {"advantages": advantages, "old_logprob": torch.full((2, 4), -0.5)}
    extra = KLCov(share=0.5)(TokenStats(logprob=logprob), **inputs) + advantages * math.exp(0.5)
    assert (extra > 0.4).sum() == 4


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_topr_tapers_wrong_answers_alone(per: str) -> None:
    batch = PolicyBatch(seed=1, drift=0.3)
    log_ratio = torch.where(batch.mask, batch.logprob - batch.old_logprob, 0.0).detach()
    ratio = log_ratio.sum(-1, keepdim=True).exp() if per == "sequence" else log_ratio.exp()
    weight = torch.where(batch.advantages > 0, torch.ones_like(ratio), ratio.clamp(max=1.0))
    wrong = weight[batch.mask & (batch.advantages < 0)]
    assert (wrong == 1).any() and (wrong < 1).any(), "both sides of the taper are met"
    expected = torch.where(batch.mask, -weight * batch.advantages * batch.logprob, 0.0)
    torch.testing.assert_close(torch.where(batch.mask, batch.call(TOPR(per=per)), 0.0), expected)
    slope = torch.where(batch.mask, -weight * batch.advantages, 0.0)
    torch.testing.assert_close(batch.gradient(TOPR(per=per)), slope / 4)
    low, high = batch_metrics(batch, TOPR(per=per))
    assert not low.any() and torch.equal(high[batch.mask], ((batch.advantages < 0) & (ratio > 1))[batch.mask])


def batch_metrics(batch: PolicyBatch, loss: PolicyLoss) -> tuple[Tensor, Tensor]:
    found = loss.metrics(batch.stats, **batch.inputs(loss))
    return found.clipped_low > 0, found.clipped_high > 0


def test_gvpo_is_its_authors_loss() -> None:
    """Half the squared distance of centred `0.3 log w` and centred rewards, over n - 1 and averaged over the groups;
    their group means are constants, whose gradient adds up to 0."""
    batch = PolicyBatch(drift=0.5)
    batch.advantages = torch.tensor([0.8, -0.3, -0.8, 0.3], dtype=torch.float64)[:, None].expand(4, 6)
    log_w = torch.where(batch.mask, batch.logprob - batch.old_logprob, 0.0).sum(-1)
    expected = torch.zeros((), dtype=torch.float64)
    for rows in ([0, 2], [1, 3]):
        centred = 0.3 * log_w[rows] - (0.3 * log_w[rows]).mean().detach()
        expected = expected + (centred - batch.advantages[rows, 0]).square().sum() / 2 / (2 - 1) / 2
    loss = GVPO(ratio_scale=0.3)
    torch.testing.assert_close(batch.reduced(loss), expected)
    torch.testing.assert_close(batch.gradient(loss), torch.autograd.grad(expected, batch.logprob)[0])
    shifted = batch.advantages + torch.tensor([7.0, 1.0, 7.0, 1.0])[:, None]  # a number a group, as rewards have it
    torch.testing.assert_close(batch.reduced(loss, advantages=shifted), batch.reduced(loss))
    torch.testing.assert_close(batch.gradient(loss, advantages=shifted), batch.gradient(loss))


def test_gvpo_is_0_at_its_optimum_and_in_groups_of_one() -> None:
    batch = PolicyBatch(drift=0.5)
    log_w = torch.where(batch.mask, batch.logprob - batch.old_logprob, 0.0).sum(-1, keepdim=True).detach()
    reward = 0.1 * log_w.expand(4, 6) + torch.tensor([7.0, 1.0, 7.0, 1.0])[:, None]
    assert batch.reduced(GVPO(), advantages=reward).item() == pytest.approx(0, abs=1e-24)
    assert batch.gradient(GVPO(), advantages=reward).abs().max() < 1e-12
    alone = torch.arange(4)[:, None].expand(4, 6)
    assert not batch.call(GVPO(), group=alone).any() and not batch.gradient(GVPO(), group=alone).any()


def test_gvpo_tells_groups_of_large_numbers_apart() -> None:
    batch = PolicyBatch(dtype=torch.float32)
    expected = batch.call(GVPO())
    assert torch.equal(batch.call(GVPO(), group=batch.group + 2**40), expected)


@pytest.mark.parametrize("extra", [{}, {**KL, "entropy_coef": 0.2}], ids=["alone", "with"])
def test_vapo_adds_the_mean_nll_of_right_answers(extra: dict[str, Any]) -> None:
    batch = PolicyBatch(drift=0.5)
    right = batch.mask & (batch.advantages > 0)
    weight = torch.where(right, batch.mask.sum() / right.sum(), 0.0)
    silent = torch.zeros_like(batch.logprob)  # for the policy's own term alone
    for inputs in ({}, {"policy_weight": silent}):
        expected = batch.reduced(DAPO(**extra), **inputs) - 0.3 * batch.logprob[right].mean()
        got = batch.reduced(VAPO(nll_coef=0.3, **extra), nll_weight=weight, **inputs)
        assert_same(got, expected, batch)


# KL


def test_kl_values_and_gradients() -> None:
    logprob = torch.tensor([-1.0, -0.3, -2.0, -1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5, -0.2, -2.0, -1.0005], dtype=torch.float64)
    kappa = (reference - logprob).detach()
    value = {"k1": -kappa, "k2": kappa**2 / 2, "k3": kappa.exp() - kappa - 1}
    slope = {"k1": torch.ones_like(kappa), "k2": -kappa, "k3": 1 - kappa.exp()}
    ratio = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
    for estimator in value:
        for gradient in (None, *slope):
            for r in (None, ratio):
                weight = 1.0 if r is None else r
                got = kl_estimate(logprob, reference, estimator=estimator, gradient=gradient, ratio=r)
                torch.testing.assert_close(got, weight * value[estimator])
                (found,) = torch.autograd.grad(got.sum(), logprob)
                torch.testing.assert_close(found, weight * slope[gradient or estimator])


def test_kl_estimators_are_named() -> None:
    x = torch.zeros(2)
    for field in ("estimator", "gradient"):
        with pytest.raises(ValueError, match=rf"{field}: expected one of k1, k2, k3, got 'k4'"):
            kl_estimate(x, x, **{field: "k4"})  # type: ignore[arg-type]


def test_kl_with_the_ratio_in_the_graph_has_the_k2_gradient() -> None:
    """d (r k3) = r (logprob - ref_logprob)."""
    batch = PolicyBatch()
    ratio = (batch.logprob - batch.old_logprob).exp()
    total = kl_estimate(batch.logprob, batch.ref_logprob, ratio=ratio).sum()
    expected = ratio.detach() * (batch.logprob - batch.ref_logprob).detach()
    torch.testing.assert_close(torch.autograd.grad(total, batch.logprob)[0], expected)


def test_k1_and_k3_are_unbiased_and_k2_has_the_gradient_of_the_kl() -> None:
    """Exact expectations over a small vocabulary."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    logp, logq = logits.log_softmax(0), torch.tensor([1.0, 0.2, -0.5, 0.3], dtype=torch.float64).log_softmax(0)
    p = logp.exp()
    exact = (p * (logp - logq)).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((p * kl_estimate(logp, logq, estimator=estimator)).sum(), exact)
    straight = kl_estimate(logp, logq, estimator="k3", gradient="k2")
    gradients = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in ((p.detach() * straight).sum(), exact)]
    torch.testing.assert_close(*gradients)
    forward = (logq.exp() * (logq - logp)).sum()
    score = (p.detach() * kl_estimate(logp, logq)).sum()
    gradients = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (score, forward)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kappa", [0.0, 1e-7, -1e-5, 1e-4, -9.9e-4, 1.1e-3, -0.5, 3.0, 19.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-4), (torch.float64, 1e-9)])
def test_k3_keeps_its_digits(kappa: float, dtype: torch.dtype, tolerance: float) -> None:
    x = torch.tensor(kappa, dtype=dtype, requires_grad=True)
    y, exact = k3(x), x.item()
    series = sum(exact**n / math.factorial(n) for n in range(2, 9))
    assert y.item() == pytest.approx(series if abs(kappa) < 0.01 else math.expm1(exact) - exact, rel=tolerance)
    assert torch.autograd.grad(y, x)[0].item() == pytest.approx(math.expm1(exact), rel=tolerance)


def test_k3_does_not_lose_the_worst_drifts() -> None:
    """verl clamps k3 at 10, where its gradient vanishes (kappa > 2.6 or < -11)."""
    kappa = torch.tensor([5.0, 15.0, 30.0, 1e4, -30.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(k3(kappa).sum(), kappa)
    assert k3(kappa).isfinite().all() and (gradient.abs() > 0.9).all()


# Weights and masks


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_sampler_correction(mode: str) -> None:
    old = torch.tensor([[0.0, 0.0, 0.0], [-1.0, -1.0, -9.0]], dtype=torch.float64)
    sampling = torch.tensor([[-0.5, -1.0, math.nan], [-0.8, -0.7, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    per_token = [[math.exp(0.5), math.exp(1.0), 1.0], [math.exp(-0.2), math.exp(-0.3), None]]
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for i, row in enumerate(per_token):
        total = math.prod(x for x in row if x is not None)
        for j, x in enumerate(row):
            if x is not None:
                rho = total if mode.startswith("sequence") else x
                inside = 0.75 <= rho <= 2.0
                expected[i, j] = rho if inside else min(max(rho, 0.75), 2.0) if mode.endswith("truncate") else 0.0
    got = sampler_correction(old, sampling, mode=mode, low=0.75, high=2.0, mask=mask)
    torch.testing.assert_close(got, expected)
    flat = sampler_correction(
        old.flatten(), sampling.flatten(), mode=mode, low=0.75, high=2.0, mask=mask.flatten(),
        sequence=torch.tensor([7, 7, 7, 8, 8, 8]),
    )  # fmt: skip
    torch.testing.assert_close(flat, expected.flatten())
    extreme = sampler_correction(torch.zeros(1, 2), torch.tensor([[-1e4, 1e4]]), mode=mode, low=0.5)
    inside = {"token_truncate": [3.0, 0.5], "token_mask": [0.0, 0.0]}.get(mode, [1.0, 1.0])
    assert extreme.tolist() == [inside]


K_ESTIMATES = {"k1": lambda d: -d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(d) - d - 1}


@pytest.mark.parametrize("over", ["token", "sum", "mean", "max"])
@pytest.mark.parametrize("estimator", list(K_ESTIMATES))
def test_rejection_mask(over: str, estimator: str) -> None:
    """By plain loops, for bounds between all of the values that are met."""
    difference = [[0.5, -0.2, None], [-0.8, 0.1, 9.0], [0.3, 0.0, -0.4], [50.0, 0.0, 0.0]]
    old = torch.tensor([[0.0 if d is None else d for d in row] for row in difference], dtype=torch.float64)
    sampling = torch.tensor([[math.nan if d is None else 0.0 for d in row] for row in difference], dtype=torch.float64)
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[1, 2] = False
    each = [[K_ESTIMATES[estimator](min(d or 0.0, 20.0)) for d in row] for row in difference]
    counted = [[x for x, m in zip(row, kept, strict=True) if m] for row, kept in zip(each, mask.tolist(), strict=True)]
    whole = {"sum": sum, "mean": lambda x: sum(x) / len(x), "max": max}
    found = each if over == "token" else [[whole[over](row)] * 3 for row in counted]
    bounds = sorted({x for row in found for x in row})
    for low, high in [(None, bounds[0] - 1), *((a - 1e-3, b + 1e-3) for a in bounds for b in bounds if a <= b)]:
        options = {"over": over, "estimator": estimator, "low": low, "high": high}
        got = rejection_mask(old, sampling, mask=mask, **options)
        expected = [[(low is None or x >= low) and x <= high for x in row] for row in found]
        assert torch.equal(got, torch.tensor(expected) & mask)
        sequence = torch.arange(4).repeat_interleave(3) * 2
        flat = rejection_mask(old.flatten(), sampling.flatten(), mask=mask.flatten(), sequence=sequence, **options)
        assert torch.equal(flat, got.flatten())


def test_a_mask_by_the_geometric_mean_of_the_ratio() -> None:
    """NeMo-RL's and OpenRLHF's seq-mask-tis: whole sequences go, what stays keeps the weight of its own token."""
    batch = PolicyBatch(drift=0.3)
    low, high = 0.95, 1.1
    ratio = (batch.old_logprob - batch.sampling_logprob).exp()
    geometric = torch.stack([row[m].log().mean().exp() for row, m in zip(ratio, batch.mask, strict=True)])
    expected = ratio * ((geometric >= low) & (geometric <= high))[:, None] * batch.mask
    given = (batch.old_logprob, batch.sampling_logprob)
    weight = sampler_correction(*given, mode="token_truncate", high=1e4, mask=batch.mask)
    options = {"over": "mean", "estimator": "k1", "low": -math.log(high), "high": -math.log(low)}
    keep = rejection_mask(*given, mask=batch.mask, **options)
    torch.testing.assert_close(weight * keep, expected)
    assert 0 < keep.any(-1).sum() < 4


@pytest.mark.parametrize("clip", [0.2, None])
def test_value_loss(clip: float | None) -> None:
    """Value and gradient by hand, value by value: inside, past the bound towards the return, past it away from it."""
    values = torch.tensor([[0.1, 0.5, -0.5, 5.0], [1.0, 0.2, -3.0, math.nan]], dtype=torch.float64, requires_grad=True)
    returns = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.2, -2.0, math.nan]], dtype=torch.float64)
    old = torch.zeros_like(returns) if clip else None
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, 3] = False
    expected, slopes = 0.0, []
    for v, r in zip(values.flatten().tolist()[:7], returns.flatten().tolist(), strict=False):
        held = v if clip is None else min(max(v, -clip), clip)
        outside = held != v and (held - r) ** 2 > (v - r) ** 2
        expected += max((v - r) ** 2, (held - r) ** 2) / 2 / 7
        slopes.append(0.0 if outside else (v - r) / 7)
    found = value_loss(values, returns, old, clip=clip, mask=mask)
    (gradient,) = torch.autograd.grad(found, values, retain_graph=True)
    assert found.item() == pytest.approx(expected) and gradient.flatten().tolist() == pytest.approx([*slopes, 0.0])
    assert value_loss(values, returns, old, clip=clip, mask=mask, normalizer=14).item() == pytest.approx(expected / 2)
    nothing = value_loss(values, returns, old, clip=clip, mask=torch.zeros_like(mask))
    assert nothing == 0 and not torch.autograd.grad(nothing, values)[0].any()


def test_value_loss_has_the_gradient_of_its_value_and_detaches_the_rest() -> None:
    draw = torch.Generator().manual_seed(0)
    values, returns, old = (torch.randn(3, 5, generator=draw).double().requires_grad_() for _ in range(3))
    assert torch.autograd.gradcheck(lambda v: value_loss(v, returns, old), values)
    found = value_loss(values, returns, old)
    assert torch.autograd.grad(found, (returns, old), allow_unused=True) == (None, None)


@given(st.lists(st.floats(0, 3, width=32), min_size=1, max_size=12), st.floats(0.05, 1), st.integers(0, 2**12))
def test_top_entropy_mask_is_the_quantile_s(values: list[float], share: float, seed: int) -> None:
    entropy = torch.tensor(values, dtype=torch.float64)
    mask = torch.rand(len(values), generator=torch.Generator().manual_seed(seed)) < 0.7
    got = top_entropy_mask(entropy, share, mask)
    if mask.any():
        threshold = torch.quantile(entropy[mask], 1 - share)
        near = (entropy - threshold).abs() < 1e-9  # either side of rounding
        assert torch.equal(got[~near], (mask & (entropy >= threshold))[~near])
        assert got.any()
    else:
        assert not got.any()
    assert torch.equal(top_entropy_mask(entropy, 1.0, mask), mask)


def test_masks_silence_the_own_term_and_leave_kl_and_normaliser_alone() -> None:
    batch = PolicyBatch(drift=0.5)
    kl = batch.call(GRPO(**KL)) - batch.call(GRPO())
    keep = top_entropy_mask(batch.entropy, 0.3, batch.mask)
    assert 0 < keep.sum() < batch.mask.sum()
    expected = torch.where(batch.mask, torch.where(keep, batch.call(GRPO()), 0.0) + kl, 0.0)
    torch.testing.assert_close(batch.call(GRPO(**KL, top_entropy=0.3)), expected)
    keep = off_policy_mask(batch.advantages, batch.logprob, batch.sampling_logprob, threshold=0.0, mask=batch.mask)
    assert keep[batch.mask].any() and not keep[batch.mask].all() and not keep[~batch.mask].any()
    expected = torch.where(batch.mask, torch.where(keep, batch.call(GRPO()), 0.0) + kl, 0.0)
    got = batch.call(GRPO(**KL, off_policy_threshold=0.0), sampling_logprob=batch.sampling_logprob)
    torch.testing.assert_close(got, expected)
    zero = batch.call(GRPO(**KL), policy_weight=torch.zeros_like(batch.logprob))
    torch.testing.assert_close(zero, kl)


def test_off_policy_mask_by_hand() -> None:
    logprob = torch.tensor([[-2.0, -2.0], [-2.0, -2.0], [-2.0, -1.0]])
    sampling = torch.tensor([[-1.0, -1.5], [-1.0, -1.5], [-1.9, math.nan]])
    advantages = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [-1.0, -1.0]])
    keep = off_policy_mask(advantages, logprob, sampling, threshold=0.5)
    assert keep.tolist() == [[True, True], [False, False], [True, True]]


def test_own_means_make_one_mean_of_two() -> None:
    demonstration = torch.tensor([True, False, False, True, False])
    values = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0])
    weight = own_means(demonstration, rollout_tokens=3, demonstration_tokens=2)
    assert (weight * values).mean().item() == pytest.approx(3 + 4)
    assert own_means(demonstration, rollout_tokens=torch.tensor(0.0), demonstration_tokens=5).isfinite().all()


# Errors


def rejected(**changed: Any) -> Tensor:
    options: dict[str, Any] = {"over": "mean", "estimator": "k1", "high": 1.0, **changed}
    return rejection_mask(torch.zeros(2, 3), torch.zeros(2, 3), **options)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: GRPO(beta=-0.1), ValueError, "GRPO: beta"),
        (lambda: GRPO(beta=0.1, kl="k4"), ValueError, "GRPO: kl must be one of k1, k2, k3"),
        (lambda: GRPO(beta=0.1, kl_gradient="k"), ValueError, "GRPO: kl_gradient"),
        (lambda: GRPO(beta=0.1, kl_importance=1), TypeError, "GRPO: kl_importance"),
        (lambda: GRPO(kl="k1"), ValueError, "need beta > 0"),
        (lambda: GRPO(kl_gradient="k2"), ValueError, "need beta > 0"),
        (lambda: GRPO(kl_importance=True), ValueError, "need beta > 0"),
        (lambda: GRPO(entropy_coef=-1.0), ValueError, "GRPO: entropy_coef"),
        (lambda: GRPO(top_entropy=0.0), ValueError, "GRPO: top_entropy"),
        (lambda: GRPO(off_policy_threshold=math.inf), ValueError, "GRPO: off_policy_threshold"),
        (lambda: PPO(epsilon_low=1.1), ValueError, "PPO: epsilon_low"),
        (lambda: PPO(epsilon_high=-0.1), ValueError, "PPO: epsilon_high"),
        (lambda: PPO(delta=1.1), ValueError, "PPO: delta"),
        (lambda: CISPO(ratio_cap=-1.0), ValueError, "CISPO: ratio_cap"),
        (lambda: CISPO(ratio_cap=1.0, ratio_floor=1.1), ValueError, "CISPO: ratio_floor"),
        (lambda: SAPO(tau_positive=0.0), ValueError, "SAPO: tau_positive"),
        (lambda: DPPO(threshold_high=2.0), ValueError, "DPPO: threshold_high"),
        (lambda: DRO(strength=-1.0), ValueError, "DRO: strength"),
        (lambda: GMPO(epsilon_low=-0.4), ValueError, "GMPO: epsilon_low"),
        (lambda: VESPO(k_negative=0.0), ValueError, "VESPO: k_negative"),
        (lambda: ClipCov(share=0.0), ValueError, "ClipCov: share"),
        (lambda: ClipCov(covariance_low=6.0), ValueError, "ClipCov: covariance_high"),
        (lambda: KLCov(kl_coef=-1.0), ValueError, "KLCov: kl_coef"),
        (lambda: TOPR(per="row"), ValueError, "TOPR: per must be one of sequence, token"),
        (lambda: GVPO(ratio_scale=0.0), ValueError, "GVPO: ratio_scale"),
        (lambda: VAPO(nll_coef=-0.1), ValueError, "VAPO: nll_coef"),
        (lambda: losses.get("ppo_clip"), ValueError, "did you mean .*'ppo'"),
        (lambda: losses.get("cispo", epsilon_high=5.0), TypeError, "cispo has no hyper-parameter 'epsilon_high'"),
        (lambda: top_entropy_mask(torch.zeros(2), 0.0), ValueError, "share"),
        (lambda: sampler_correction(torch.zeros(2), torch.zeros(2), mode="truncate"), ValueError, "mode"),
        (lambda: sampler_correction(torch.zeros(2), torch.zeros(2), low=4.0), ValueError, "low, high"),
        (lambda: sampler_correction(torch.zeros(2), torch.zeros(2), high=math.inf), ValueError, "low, high"),
        (lambda: sampler_correction(torch.zeros(2), torch.zeros(3)), ValueError, "sampling_logprob"),
        (lambda: rejected(over="row"), ValueError, "over, estimator: .*'row'"),
        (lambda: rejected(estimator="k4"), ValueError, "over, estimator: .*'k4'"),
        (lambda: rejected(high=math.inf), ValueError, "low, high"),
        (lambda: rejected(low=2.0), ValueError, "low, high"),
        (lambda: value_loss(torch.zeros(2), torch.zeros(2)), ValueError, "old_values absent"),
        (lambda: value_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), clip=None), ValueError, "old_values given"),
        (lambda: value_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), clip=-1.0), ValueError, "clip: .*-1.0"),
        (lambda: value_loss(torch.zeros(2), torch.zeros(3), clip=None), ValueError, "returns: expected shape"),
        (lambda: value_loss(torch.zeros(2), torch.zeros(2), clip=None, normalizer=0.0), ValueError, "normalizer"),
    ],
)
def test_bad_hyper_parameters(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_bad_inputs_are_named() -> None:
    stats = TokenStats(logprob=torch.zeros(2, 3))
    one = torch.zeros(2, 3)
    for loss, inputs, error, words in (
        (GRPO(), {}, ValueError, "grpo needs advantages"),
        (GRPO(), {"advantages": torch.zeros(2)}, ValueError, r"advantages must have shape \(2, 3\)"),
        (GRPO(beta=0.1), {"advantages": one}, ValueError, "grpo needs ref_logprob"),
        (GRPO(), {"advantages": one, "ref_logprob": one}, TypeError, "grpo has no input 'ref_logprob'"),
        (Reinforce(), {"advantages": one, "old_logprob": one}, TypeError, "reinforce has no input 'old_logprob'"),
        (GRPO(), {"advantages": one, "mask": one > 0}, ValueError, "mask and sequence"),
        (GRPO(entropy_coef=0.1), {"advantages": one}, ValueError, r"stats\.entropy"),
        (GSPO(), {"advantages": one, "mask": one}, ValueError, "mask"),
        (GSPO(), {"advantages": one, "sequence": one}, ValueError, "sequence"),
        (GRPO(off_policy_threshold=0.1), {"advantages": one}, ValueError, "sampling_logprob or old_logprob"),
    ):
        with pytest.raises(error, match=words):
            loss(stats, **inputs)
    with pytest.raises(NotImplementedError):
        PolicyLoss()._objective(None, one)  # type: ignore[arg-type]


def test_a_logprob_below_the_least_counts_as_the_least() -> None:
    logprob = torch.tensor([-math.inf, -1e7, -1e5], dtype=torch.float64, requires_grad=True)
    value = Reinforce()(TokenStats(logprob=logprob), advantages=torch.ones(3, dtype=torch.float64))
    assert value.tolist() == [-LEAST_LOGPROB, -LEAST_LOGPROB, 1e5]
    assert torch.autograd.grad(value.sum(), logprob)[0].tolist() == [0, 0, -1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dapo", "gspo", "vespo", "prefix_rft", "dense_path_reinforce"])
def test_one_graph_under_torch_compile(name: str) -> None:
    """Keyword-only fields, quantiles and scans included."""
    loss = losses.get(name, beta=0.1, entropy_coef=0.1)
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=draw).requires_grad_() for shape in ((3, 5, 8), (13, 8)))
    targets = torch.randint(13, (3, 5), generator=draw)
    targets[0, 3:] = -100
    inputs = {key: -torch.rand(3, 5, generator=draw) for key in (*loss.inputs, "old_logprob")}
    inputs = {key: x < -0.5 if key == "demonstration" else x for key, x in inputs.items()}
    known = {key: x for key, x in inputs.items() if key in (*loss.inputs, *loss.optional_inputs)}

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = linear_loss(loss, hidden, weight, targets, backend="chunked", **known, **length(loss))
        return out

    eager, compiled = value(hidden, weight), torch.compile(value, backend="aot_eager", fullgraph=True)(hidden, weight)
    assert torch.equal(eager, compiled)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (eager, compiled)), strict=True):
        assert torch.equal(a, b)
