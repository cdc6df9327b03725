"""The SFT family as functions of vectors: formulas by hand in float64, w = -d loss / d logprob, limits, extremes.

NLL, DFT and the token-level f-divergences have files of their own.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitless import linear_loss, losses, reference
from logitless.losses import (
    ASFT,
    DFT,
    EAFT,
    GEM,
    IDFT,
    IFT,
    IWSFT,
    NLL,
    PSFT,
    SEDSFT,
    SFTKL,
    CHORDPhi,
    DeformedLog,
    DiscriminativeSFT,
    FDivergenceSFT,
    Focal,
    Loss,
    LUFFYShaping,
    MinorSFT,
    PoFT,
    ProFiT,
    Unlikelihood,
)
from logitless.losses.sft.reward_transforms import REWARD_TRANSFORMS
from logitless.losses.sft.schedules import idft_mix
from logitless.types import DivergenceOptions, TokenStats

F64 = torch.float64


def doubles(*values: float, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=F64, requires_grad=grad)


def ident(loss: Loss) -> str:
    changed = [f for f in dataclasses.fields(loss) if getattr(loss, f.name) != f.default]
    return "-".join([loss.name, *(f"{f.name}={getattr(loss, f.name)}" for f in changed)])


#: Per-token statistics and constants of a few tokens, all of them possible: likely, unlikely, sure and unsure.
LOGPROB = doubles(-0.01, -0.3, -0.7, -1.1, -2.5, -6.0, -14.0)
ENTROPY = doubles(0.05, 0.9, 1.4, 2.9, 3.4, 0.2, 4.0)
STATS = TokenStats(logprob=LOGPROB, lse=doubles(2, -1, 0.4, 3, 7, -2, 1), entropy=ENTROPY, log_sum_sq=-0.8 * ENTROPY)
INPUTS = {
    "ref_logprob": doubles(-0.5, -0.2, -0.9, -2.0, -2.4, -3.0, -9.0),
    "old_logprob": doubles(-0.02, -0.7, -0.6, -1.2, -2.0, -6.1, -14.0),
    "ref_lse": doubles(1.5, -1.2, 0.6, 3.3, 6.0, -2.4, 1),
    "group": doubles(0, 0, 0, 0, 0, 0, 0),
    "negative": doubles(0, 0, 0, 0, 0, 0, 0),
    "log_normalizer": doubles(0, 0, 0, 0, 0, 0, 0),
}


def call(loss: Loss, logprob: Tensor = LOGPROB, stats: TokenStats = STATS, **others: Tensor | None) -> Tensor:
    """The loss on other log-probs, with the constants above."""
    known = {name: INPUTS[name] for name in loss.inputs} | others
    if loss.compares_distributions:
        known.setdefault("divergence", torch.zeros_like(logprob))
    return loss(stats._replace(logprob=logprob), **known)


def weights(loss: Loss, logprob: Tensor = LOGPROB, **others: Tensor | None) -> Tensor:
    """w = -d loss / d logprob."""
    logprob = logprob.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(call(loss, logprob, **others).sum(), logprob)
    return -gradient


# What pulls how hard: the weight of every loss, in closed form

P = LOGPROB.exp()
RHO = LOGPROB - INPUTS["ref_logprob"]
RATIO = (LOGPROB - INPUTS["old_logprob"]).exp()
PHI = LOGPROB + ENTROPY
POWER = torch.exp(-PHI / 0.7).clamp(0.1, 2.0)
BATCH_FLOOR = 0.5 * P.mean()
CAYLEY = (BATCH_FLOOR + (1 - BATCH_FLOOR) * P / (2 - P)).clamp(1e-3, 1)
MEAN_RHO = RHO.mean()

WEIGHTS: list[tuple[Loss, Tensor | float]] = [
    (NLL(), 1.0),
    (DFT(), P),
    (DFT(power=0.3), P**0.3),
    (DeformedLog(), P),
    (DeformedLog(exponent=0.0), 1.0),
    (DeformedLog(exponent=2.5), P**2.5),
    (DeformedLog(exponent=0.5, min_prob=0.1, max_prob=0.6), P**0.5 * (P >= 0.1) * (P <= 0.6)),
    (DeformedLog(form="deft"), P ** torch.exp(-0.8 * ENTROPY)),
    (DeformedLog(form="cayley"), P**CAYLEY),
    (CHORDPhi(), P * (1 - P)),
    (CHORDPhi(cutoff=0.5), P * (1 - P) * (P <= 0.5)),
    (LUFFYShaping(), 0.1 * P / (P + 0.1) ** 2),
    (LUFFYShaping(gamma=2.0), 2.0 * P / (P + 2.0) ** 2),
    (Focal(), (1 - P) ** 2 - 2 * P * LOGPROB * (1 - P)),
    (Focal(gamma=0.5), (1 - P) ** 0.5 - 0.5 * P * LOGPROB * (1 - P) ** -0.5),
    (Focal(gamma=0.0), 1.0),
    (Unlikelihood(), -P / (1 - P)),
    (Unlikelihood(alpha=0.3), -0.3 * P / (1 - P)),
    (EAFT(), (ENTROPY / math.log(20)).clamp(max=1)),
    (EAFT(alpha=2.0, k=5), (ENTROPY / math.log(5)).clamp(max=1) ** 2),
    (EAFT(alpha=0.0), 1.0),
    (SEDSFT(), 1 - 2 * (ENTROPY > 2.2) * P * (P - 0.5)),
    (SEDSFT(scale=0.2, min_entropy=0.0), 1 - 0.4 * P * (P - 0.5)),
    (IDFT(beta=0.7), P**POWER),
    (IDFT(beta=0.7, mix=0.25), P ** (1 + 0.25 * (POWER - 1))),
    (IDFT(beta=0.7, detach=False), P**POWER * (1 + POWER * LOGPROB)),
    (IDFT(mix=0.0), P),
    (ProFiT(), 1.0 * (P > 0.1)),
    (ProFiT(threshold=0.0), 1.0),
    (GEM(), 0.7 * torch.sigmoid(-0.7 * (LOGPROB + ENTROPY) / 100)),
    (GEM(h="linear"), 0.7),
    (ASFT(), P),
    (SFTKL(), 1.0),
    (ASFT(kl="k3", kl_weight=0.2), P + 0.2 * torch.expm1(-RHO)),
    (SFTKL(kl="k3", kl_weight=0.2), 1 + 0.2 * torch.expm1(-RHO)),
    (PSFT(), RATIO * (RATIO <= 1.28)),
    (PSFT(epsilon=0.01), RATIO * (RATIO <= 1.01)),
    (FDivergenceSFT(value="one_step", divergence="total_variation"), 1.0),
    (MinorSFT(), 2 * torch.sigmoid(-0.1 * RHO.sum()) / 7),
    (MinorSFT(beta=2.0), 2 * torch.sigmoid(-2 * RHO.sum()) / 7),
    (PoFT(), torch.sigmoid(-MEAN_RHO) / 7),
    (IWSFT(), MEAN_RHO.exp().clamp(0, 16)),
    (IWSFT(temperature=3.0, low=0.9, high=1.1), (3 * MEAN_RHO).exp().clamp(0.9, 1.1)),
    (IWSFT(per="token"), RHO.exp().clamp(0.2, 1.8)),
    (IWSFT(per="token", low=0.0, high=100.0), RHO.exp()),
    *(
        (FDivergenceSFT(divergence=name, beta=0.07, per="sequence"), row.weight(0.07 * RHO.sum()))
        for name, row in REWARD_TRANSFORMS.items()
    ),
    (DiscriminativeSFT(), 1.0),
    (DiscriminativeSFT(ref_free=True), 1 / 7),
]


@pytest.mark.parametrize(("loss", "expected"), WEIGHTS, ids=[ident(loss) for loss, _ in WEIGHTS])
def test_weights(loss: Loss, expected: Tensor | float) -> None:
    torch.testing.assert_close(weights(loss), torch.ones_like(LOGPROB) * expected, rtol=1e-9, atol=1e-12)


ALL = [loss for loss, _ in WEIGHTS] + [IFT(), IFT(discount=0.0), IFT(detach=False)]
EVERY = pytest.mark.parametrize("loss", ALL, ids=ident)
#: Where part of the value is held constant the derivative differs from the value's slope, on purpose.
DETACHED = (DFT, CHORDPhi, EAFT, IDFT, ProFiT, ASFT, IWSFT, DiscriminativeSFT)


@pytest.mark.parametrize(
    "loss",
    [x for x in ALL if not isinstance(x, DETACHED) and getattr(x, "form", "constant") == "constant"
     and getattr(x, "detach", False) is False and getattr(x, "h", "linear") == "linear"],
    ids=ident,
)  # fmt: skip
def test_gradcheck_where_nothing_of_the_model_is_detached(loss: Loss) -> None:
    logprob = doubles(-0.4, -0.2, -0.9, -2.0, -2.6, -6.5, -14.0, grad=True)
    assert torch.autograd.gradcheck(lambda x: call(loss, x), logprob)


def test_every_detached_weight_is_one() -> None:
    """The value's own slope is another one: `weights` above is not just the derivative of the value."""
    for loss in (DFT(), CHORDPhi(), IDFT(), IWSFT(per="token"), DeformedLog(form="cayley"), IFT()):
        step = 1e-6
        moved = (call(loss, LOGPROB + step).sum() - call(loss, LOGPROB - step).sum()) / (2 * step)
        assert abs(moved + weights(loss).sum()) > 1e-3, loss


@EVERY
def test_only_the_logprob_gets_a_gradient(loss: Loss) -> None:
    """Entropies, collision probabilities and every constant are detached, but for GEM's entropy."""
    leaves = {name: value.clone().requires_grad_() for name, value in INPUTS.items()}
    statistics = [None if x is None else x.clone().requires_grad_() for x in STATS]
    known = {name: leaves[name] for name in loss.inputs}
    call(loss, statistics[0], TokenStats(*statistics), **known).sum().backward()  # type: ignore[arg-type]
    assert statistics[0] is not None and statistics[0].grad is not None
    assert all(value.grad is None for value in leaves.values())
    if getattr(loss, "value", "none") == "none" and loss != GEM():
        assert all(x is None or x.grad is None for x in statistics[1:])


# Values


def test_values_by_hand() -> None:
    """A token with p = 1/4, entropy log 2, reference 1/2, and one with p = 1/2, entropy 3, reference 1/4."""
    quarter, half = math.log(0.25), math.log(0.5)
    stats = TokenStats(
        doubles(quarter, half), doubles(0, 0), doubles(math.log(2), 3.0), None, None, doubles(half, half)
    )
    other = doubles(half, quarter)

    def check(loss: Loss, first: float, second: float, **inputs: Tensor) -> None:
        torch.testing.assert_close(loss(stats, **inputs), doubles(first, second), rtol=1e-12, atol=1e-13)

    check(DFT(), 0.25 * -quarter, 0.5 * -half)
    check(DFT(), 0.5 * -quarter, 0.25 * -half, token_power=doubles(0.5, 2.0))
    check(DeformedLog(), 0.75, 0.5)
    check(DeformedLog(exponent=2.0), (1 - 1 / 16) / 2, (1 - 1 / 4) / 2)
    check(DeformedLog(form="deft"), (1 - 0.5) / 0.5, (1 - math.sqrt(0.5)) / 0.5)
    floor = 0.5 * (0.25 + 0.5) / 2
    a, b = floor + (1 - floor) * 0.25 / 1.75, floor + (1 - floor) * 0.5 / 1.5
    check(DeformedLog(form="cayley"), (1 - 0.25**a) / a, (1 - 0.5**b) / b)
    check(CHORDPhi(), 3 / 16 * -quarter, 1 / 4 * -half)
    check(CHORDPhi(cutoff=0.3), 3 / 16 * -quarter, 1 / 4 * -math.log(0.3))
    check(LUFFYShaping(), -0.25 / 0.35, -0.5 / 0.6)
    check(Focal(), 9 / 16 * -quarter, 1 / 4 * -half)
    check(Unlikelihood(), -math.log(0.75), -math.log(0.5))
    check(Unlikelihood(alpha=2.0), -quarter, -2 * math.log(0.5), negative=doubles(0, 1))
    check(EAFT(), math.log(2) / math.log(20) * -quarter, -half)
    check(SEDSFT(), -quarter, -half)
    check(SEDSFT(min_entropy=0.5), -quarter + 1 / 16, -half)
    phi = quarter + math.log(2)
    check(IDFT(), 0.25 ** min(math.exp(-phi), 2.0) * -quarter, 0.5**0.1 * -half)
    check(ProFiT(threshold=0.4), 0.0, -half)
    check(GEM(h="linear"), 0.7 * -quarter, 0.7 * -half)
    first, second = (1 / (1 + math.exp(0.007 * x)) for x in (quarter + math.log(2), half + 3))
    spread = [0.0049 * s * (1 - s) * h for s, h in ((first, math.log(2)), (second, 3.0))]
    check(GEM(), 0.7 * first * -quarter - spread[0], 0.7 * second * -half - spread[1])
    check(ASFT(), 0.25 * -quarter + 0.05 * 3, 0.5 * -half + 0.05 * 4, divergence=doubles(3, 4))
    check(SFTKL(kl_weight=1.0), -quarter + 3, -half + 4, divergence=doubles(3, 4))
    check(SFTKL(kl="k3", kl_weight=1.0), -quarter + 1 - math.log(2), -half + math.log(2) - 0.5, ref_logprob=other)
    check(PSFT(), -0.5, -1.28, old_logprob=other)
    check(MinorSFT(), 5 * math.log(2), 5 * math.log(2), ref_logprob=other)
    check(PoFT(), math.log(2) / 2, math.log(2) / 2, ref_logprob=other)
    check(IWSFT(), -quarter, -half, ref_logprob=other)
    check(IWSFT(per="token"), 0.5 * -quarter, 1.8 * -half, ref_logprob=other)
    check(IWSFT(per="token"), -quarter, 0.0, ref_logprob=other, quality=doubles(2, 0))


def test_one_step_value_is_its_formula() -> None:
    """`-phi(beta (rho + dl)) / beta + dl`; for total variation NLL plus a constant."""
    drift = STATS.lse - INPUTS["ref_lse"]
    for name, row in REWARD_TRANSFORMS.items():
        loss = FDivergenceSFT(value="one_step", divergence=name, beta=0.2)
        assert (loss.level, loss.inputs, loss.outputs) == ("token", ("ref_logprob", "ref_lse"), ("logprob", "lse"))
        torch.testing.assert_close(call(loss), -row.value(0.2 * (RHO + drift)) / 0.2 + drift)
    linear = FDivergenceSFT(value="one_step", divergence="total_variation")
    torch.testing.assert_close(call(linear), INPUTS["ref_logprob"] - LOGPROB)
    lse = STATS.lse.clone().requires_grad_()
    call(linear, stats=STATS._replace(lse=lse)).sum().backward()
    assert lse.grad is not None and lse.grad.abs().max() < 1e-12


@pytest.mark.parametrize("divergence", [*REWARD_TRANSFORMS, "alpha"])
def test_f_divergence_of_an_answer_is_its_formula(divergence: str) -> None:
    loss = FDivergenceSFT(divergence=divergence, beta=0.05, per="sequence")
    assert (loss.level, loss.reduction, loss.inputs) == ("sequence", "sequence_mean", ("ref_logprob",))
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
    rho = torch.linspace(-3, 4, 12, dtype=F64).reshape(3, 4)
    value = loss(TokenStats(rho - 1), torch.full_like(rho, -1.0), mask=mask)
    for row in range(2):
        expected = -loss.row.value(0.05 * rho[row, mask[row]].sum()) / 0.05
        torch.testing.assert_close(value[row].sum(), expected)
        torch.testing.assert_close(value[row, mask[row]], (expected / mask[row].sum()).expand(int(mask[row].sum())))
    assert value[~mask].eq(0).all()


@settings(max_examples=60)
@given(st.floats(-30, 0), st.floats(0.05, 3), st.floats(0.01, 2))
def test_probability_losses_at_any_token(logprob: float, exponent: float, gamma: float) -> None:
    p, x = math.exp(logprob), doubles(logprob)
    close = {"rtol": 1e-9, "atol": 1e-13}
    torch.testing.assert_close(call(DeformedLog(exponent=exponent), x), doubles((1 - p**exponent) / exponent), **close)
    torch.testing.assert_close(weights(DeformedLog(exponent=exponent), x), doubles(p**exponent), **close)
    torch.testing.assert_close(call(LUFFYShaping(gamma=gamma), x), doubles(-p / (p + gamma)), **close)
    assert 0 <= weights(LUFFYShaping(gamma=gamma), x).item() <= 0.25 + 1e-12
    assert 0 <= weights(CHORDPhi(), x).item() <= 0.25 + 1e-12
    assert weights(Focal(gamma=gamma), x).item() >= 0


# Limits and relatives


def test_dft_is_trl_s() -> None:
    """Equal at random and extreme log-probs, with a mask. At -inf TRL's own product is NaN, and ours is 0."""
    trainer = pytest.importorskip("trl.trainer.sft_trainer").SFTTrainer
    logprob = torch.cat([-20 * torch.rand(40, dtype=F64), doubles(0.0, -1e-9, -90.0, -1e4)]).reshape(4, 11)
    mask = torch.rand(4, 11, generator=torch.Generator().manual_seed(1)) < 0.7
    same = SimpleNamespace(gather_for_metrics=lambda x: x, parallelism_config=None)
    stub = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(loss_type="dft", average_tokens_across_devices=False),
        accelerator=same,
        aux_loss_enabled=False,
        compute_loss_func=None,
        label_smoother=None,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    ours, theirs = (logprob.clone().requires_grad_() for _ in range(2))

    def model(**_: object) -> SimpleNamespace:
        zero = torch.zeros(4, 11)
        return SimpleNamespace(log_probs=theirs * mask, label_mask=mask, entropy=zero, is_top1=zero)

    for count in (None, torch.tensor(100)):
        expected = trainer.compute_loss(stub, model, {"labels": mask}, num_items_in_batch=count)
        value = torch.where(mask, DFT()(TokenStats(ours)), 0.0).sum() / (mask.sum() if count is None else count)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value, ours), torch.autograd.grad(expected, theirs))
    with torch.no_grad():
        theirs.fill_(-math.inf)
        mask.fill_(True)
    assert trainer.compute_loss(stub, model, {"labels": mask}).isnan()
    assert DFT()(TokenStats(theirs)).eq(0).all()


def test_dft_s_gradient_is_p_times_that_of_nll_through_the_logits() -> None:
    logits = torch.randn(5, 9, dtype=F64, requires_grad=True)
    logprob = logits.log_softmax(-1)[:, 3]
    stats = TokenStats(logprob)
    of_nll, of_dft = (torch.autograd.grad(loss(stats).sum(), logits, retain_graph=True)[0] for loss in (NLL(), DFT()))
    torch.testing.assert_close(of_dft, logprob.exp()[:, None] * of_nll)


def test_limits() -> None:
    nll = -LOGPROB
    for loss in (
        DeformedLog(exponent=0.0),
        DeformedLog(exponent=1e-9),
        Focal(gamma=0.0),
        EAFT(alpha=0.0),
        GEM(beta=1.0, h="linear"),
    ):
        torch.testing.assert_close(call(loss), nll, rtol=1e-7, atol=0)
    torch.testing.assert_close(call(IDFT(mix=0.0)), call(DFT()))
    torch.testing.assert_close(call(IDFT(min_power=1.0, max_power=1.0)), call(DFT()))
    torch.testing.assert_close(call(ASFT(kl_weight=0.0)), call(DFT()))
    torch.testing.assert_close(call(SFTKL(kl_weight=0.0)), nll)
    torch.testing.assert_close(call(SEDSFT(min_entropy=9.0)), nll)
    torch.testing.assert_close(call(Unlikelihood(), negative=torch.zeros_like(LOGPROB)), nll)
    torch.testing.assert_close(call(IFT(discount=0.0)), nll)
    torch.testing.assert_close(weights(PSFT(), old_logprob=LOGPROB), torch.ones_like(LOGPROB))
    for loss in (IWSFT(), IWSFT(per="token")):
        torch.testing.assert_close(call(loss, ref_logprob=LOGPROB), nll)
    torch.testing.assert_close(weights(MinorSFT(beta=0.4), ref_logprob=LOGPROB), torch.full_like(LOGPROB, 1 / 7))


def test_minor_sft_is_dpo_without_a_rejected_answer() -> None:
    """Times `2 / (beta T)`."""
    zero = doubles(0.0)
    pair = losses.DPO(beta=0.3)(LOGPROB.sum()[None], zero, INPUTS["ref_logprob"].sum()[None], zero)
    torch.testing.assert_close(call(MinorSFT(beta=0.3)).sum()[None], 2 / (0.3 * 7) * pair.loss)


def test_minor_sft_has_the_paper_s_gradient() -> None:
    """`-2 / m sigmoid(-beta R) grad log pi` of an answer of m tokens, averaged over answers of different lengths."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(3, 6, 4, generator=generator, dtype=F64, requires_grad=True)
    weight = torch.randn(9, 4, generator=generator, dtype=F64)
    targets = torch.randint(9, (3, 6), generator=generator)
    targets[0, 4:] = targets[1, 1:] = -100
    ref = -2 * torch.rand(3, 6, generator=generator, dtype=F64)
    found = linear_loss(MinorSFT(beta=0.3), hidden, weight, targets, ref_logprob=ref)
    logprob = (hidden @ weight.T).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    surrogate = torch.zeros((), dtype=F64)
    for row, length in enumerate((4, 1, 6)):
        answer, before = logprob[row, :length].sum(), ref[row, :length].sum()
        surrogate = surrogate - 2 / length / (1 + (0.3 * (answer - before)).exp()).detach() * answer / 3
    torch.testing.assert_close(torch.autograd.grad(found, hidden), torch.autograd.grad(surrogate, hidden))


def test_luffy_s_weight_peaks_at_gamma() -> None:
    at = weights(LUFFYShaping(gamma=0.2), doubles(math.log(0.19), math.log(0.2), math.log(0.21)))
    assert at[1] == pytest.approx(0.25) and at[0] < at[1] > at[2]


def test_deft_s_exponent_is_the_collision_probability() -> None:
    logits = torch.randn(6, 11, dtype=F64)
    p = logits.softmax(-1)
    exponent = p.square().sum(-1)
    expected = (1 - p[:, 2] ** exponent) / exponent
    stats = TokenStats(logprob=p[:, 2].log(), log_sum_sq=exponent.log())
    torch.testing.assert_close(DeformedLog(form="deft")(stats), expected)


def test_cayley_reads_the_counted_tokens_alone() -> None:
    loss = DeformedLog(form="cayley")
    assert (loss.level, loss.batch_wide, DeformedLog().batch_wide) == ("sequence", True, False)
    mask = torch.tensor([True, True, False, True, False, True, True])
    poisoned = LOGPROB.masked_fill(~mask, math.nan).requires_grad_()
    value = loss(TokenStats(poisoned), mask=mask)
    torch.testing.assert_close(value[mask], loss(TokenStats(LOGPROB[mask])))
    value.sum().backward()
    assert value[~mask].eq(0).all() and poisoned.grad is not None and poisoned.grad[~mask].eq(0).all()


def test_linear_gem_s_gradient_is_the_tempered_distribution_less_the_target() -> None:
    """Through `linear_loss` on a head. The paper's form `-logprob + sum_v sg(q_v) log p_v` has this gradient too."""
    hidden = torch.randn(6, 4, dtype=F64, requires_grad=True)
    weight = torch.randn(9, 4, dtype=F64, requires_grad=True)
    targets = torch.tensor([0, 3, 8, -100, 2, 2])
    counted = targets >= 0
    log_p = (hidden @ weight.T / 1.3).log_softmax(-1)
    tempered = (hidden @ weight.T / 1.3 / 0.7).softmax(-1).detach()
    paper = -log_p.gather(-1, targets.clamp(min=0)[:, None])[:, 0] + (tempered * log_p).sum(-1)
    ours = linear_loss(GEM(h="linear"), hidden, weight, targets, temperature=1.3, reduction="sum")
    expected = torch.autograd.grad(paper[counted].sum(), (hidden, weight))
    torch.testing.assert_close(torch.autograd.grad(ours, (hidden, weight)), expected)
    assert GEM(beta=0.4).stats_temperature == 0.4


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0, 12.0])
@pytest.mark.parametrize("beta", [0.3, 0.7, 1.0])
def test_gem_s_gradient_is_that_of_its_weighted_form(scale: float, beta: float) -> None:
    """`sum_v sg(q_v sigmoid((z_v - z_y) / 100)) (log p_v - log p_y)`, to the bound of the docstring, entry by entry."""
    logits = (scale * torch.randn(40, 30, generator=torch.Generator().manual_seed(1), dtype=F64)).requires_grad_()
    targets = torch.arange(40) % 30
    z = logits.detach()
    gap, q = z - z.gather(1, targets[:, None]), (z / beta).softmax(-1)
    log_p = logits.log_softmax(-1)
    theirs = (q * torch.sigmoid(gap / 100) * (log_p - log_p.gather(1, targets[:, None]))).sum()
    (expected,) = torch.autograd.grad(theirs, logits)
    ours = linear_loss(GEM(beta=beta), logits, torch.eye(30, dtype=F64), targets, reduction="sum")
    (found,) = torch.autograd.grad(ours, logits)
    mean = (q * gap).sum(-1, keepdim=True)
    bound = 4.9e-6 * q * (gap - mean).square()
    bound = bound.scatter(1, targets[:, None], bound.sum(-1, keepdim=True))
    assert ((found - expected).abs() <= bound + 1e-14).all()
    assert (found - expected).abs().max() < 0.002 * expected.abs().max()
    flat = torch.autograd.grad(linear_loss(GEM(beta, "linear"), logits, torch.eye(30, dtype=F64), targets), logits)[0]
    if scale >= 1:
        assert (40 * flat / 2 - expected).abs().max() > 0.002 * expected.abs().max(), "h is no constant"


@pytest.mark.parametrize("kl", ["forward_kl", "reverse_kl"])
def test_anchored_losses_take_the_whole_distribution_s_kl(kl: str) -> None:
    options = DivergenceOptions(**SFTKL(kl=kl).linear_divergence)
    ref = torch.randn(5, 7, dtype=F64).log_softmax(-1)
    logits = torch.randn(5, 7, dtype=F64, requires_grad=True)
    log_p = logits.log_softmax(-1)
    divergence = reference.divergence(ref, log_p, options)
    by_hand = {"forward_kl": (ref.exp() * (ref - log_p)).sum(-1), "reverse_kl": (log_p.exp() * (log_p - ref)).sum(-1)}
    stats = TokenStats(log_p[:, 1])
    torch.testing.assert_close(SFTKL(kl=kl, kl_weight=0.3)(stats, divergence), -log_p[:, 1] + 0.3 * by_hand[kl])
    value = ASFT(kl=kl, kl_weight=0.3)(stats, divergence)
    torch.testing.assert_close(value, -(log_p.exp() * log_p)[:, 1] + 0.3 * by_hand[kl])
    p = log_p[:, 1].detach().exp()
    surrogate = (-p * log_p[:, 1] + 0.3 * by_hand[kl]).sum()
    torch.testing.assert_close(
        torch.autograd.grad(value.sum(), logits, retain_graph=True), torch.autograd.grad(surrogate, logits)
    )


def test_sft_kl_settles_on_the_mixture_of_expert_and_reference() -> None:
    expert, ref, weight = doubles(0.6, 0.3, 0.1), doubles(0.2, 0.2, 0.6), 0.5
    best = ((expert + weight * ref) / (1 + weight)).log().requires_grad_()
    log_p = best.log_softmax(-1)
    divergence = (ref * (ref.log() - log_p)).sum().expand(3)
    (expert * SFTKL(kl_weight=weight)(TokenStats(log_p), divergence)).sum().backward()
    assert best.grad is not None and best.grad.abs().max() < 1e-15


@settings(max_examples=40)
@given(st.floats(0.05, 1.5), st.lists(st.floats(-2, 2), min_size=8, max_size=8))
def test_reverse_kl_s_optimum_is_the_geometric_mixture(beta: float, logits: list[float]) -> None:
    expert, ref = doubles(*logits).reshape(2, 4).softmax(-1)
    mixture = (expert.log() + beta * ref.log()) / (1 + beta)
    best = mixture.clone().requires_grad_()
    loss = FDivergenceSFT(divergence="reverse_kl", beta=beta)
    (expert * loss(TokenStats(best.log_softmax(-1)), ref.log())).sum().backward()
    assert best.grad is not None and best.grad.abs().max() < 1e-9


# Whole answers

MASK = torch.tensor([[0, 1, 1, 1, 0, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
ANSWERS = [
    MinorSFT(),
    PoFT(),
    IWSFT(),
    IFT(),
    IFT(detach=False),
    FDivergenceSFT(per="sequence"),
    DeformedLog(form="cayley"),
]


def rows(seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(-3 * torch.rand(3, 6, generator=generator, dtype=F64) for _ in range(2))  # type: ignore[return-value]


def known(loss: Loss, ref_logprob: Tensor) -> dict[str, Tensor]:
    return {"ref_logprob": ref_logprob} if loss.inputs else {}


@pytest.mark.parametrize("loss", ANSWERS, ids=ident)
def test_rows_and_flat_sequences_agree_and_the_mask_is_a_wall(loss: Loss) -> None:
    """NaN behind ignored tokens reaches neither the loss nor the gradient; an answer without tokens is 0."""
    logprob, ref = rows()
    poisoned = logprob.masked_fill(~MASK, math.nan).requires_grad_()
    value = loss(TokenStats(poisoned), **known(loss, ref.masked_fill(~MASK, math.nan)), mask=MASK)
    (gradient,) = torch.autograd.grad(value.sum(), poisoned)
    assert value.isfinite().all() and value[~MASK].eq(0).all() and gradient[~MASK].eq(0).all()
    assert gradient[MASK].ne(0).all()
    flat, sequence = logprob.reshape(-1).clone().requires_grad_(), torch.arange(3).repeat_interleave(6)
    again = loss(TokenStats(flat), **known(loss, ref.reshape(-1)), mask=MASK.reshape(-1), sequence=sequence)
    torch.testing.assert_close(again, value.reshape(-1))
    torch.testing.assert_close(torch.autograd.grad(again.sum(), flat)[0], gradient.reshape(-1))
    if not loss.batch_wide:
        alone = loss(TokenStats(logprob[:1, [1, 2, 3, 5]]), **known(loss, ref[:1, [1, 2, 3, 5]]))
        torch.testing.assert_close(alone[0], value[0, MASK[0]])


@pytest.mark.parametrize("loss", ANSWERS, ids=ident)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_answers_of_nothing(loss: Loss, shape: tuple[int, ...]) -> None:
    empty = torch.zeros(shape, requires_grad=True)
    value = loss(TokenStats(empty), **known(loss, empty), sequence=torch.zeros(shape, dtype=torch.int64))
    assert value.shape == shape
    value.sum().backward()


def test_poft_takes_a_mean_per_answer_or_log_probs_per_token() -> None:
    logprob, ref = rows()
    per_answer = torch.where(MASK, ref, 0.0).sum(-1, keepdim=True) / MASK.sum(-1, keepdim=True).clamp(min=1)
    one, two = (PoFT()(TokenStats(logprob), x, mask=MASK) for x in (ref, per_answer.expand_as(ref)))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("discount", [0.3, 0.95, 1.0])
def test_ift_is_its_formula(discount: float) -> None:
    logprob, _ = rows()
    value = IFT(discount=discount)(TokenStats(logprob), mask=MASK)
    for row in range(2):
        nll = -logprob[row, MASK[row]]
        future = [sum(discount ** (k - t) * nll[k] for k in range(t, len(nll))) for t in range(len(nll))]
        weight = torch.stack(future) * len(nll) / sum(future)  # type: ignore[arg-type]
        assert weight.mean().item() == pytest.approx(1)
        torch.testing.assert_close(value[row, MASK[row]], nll * weight)


def test_ift_detaches_its_weights_unless_told_otherwise() -> None:
    logprob = rows()[0].requires_grad_()
    gradient, value = [], []
    for detach in (True, False):
        value.append(IFT(detach=detach)(TokenStats(logprob), mask=MASK))
        gradient.append(torch.autograd.grad(value[-1].sum(), logprob)[0])
    torch.testing.assert_close(*value)
    torch.testing.assert_close(gradient[0][MASK], (value[0] / logprob)[MASK])
    assert not torch.allclose(*gradient)


# Discriminative fine-tuning: one prompt with a demonstration and three samples, another with one of each

GROUP = torch.tensor([2**40, 2**40, 2**40, 2**40, 2**40 + 1, 2**40 + 1])
NEGATIVE = torch.tensor([0, 1, 1, 1, 0, 1])
KEPT = doubles(0.5, 0.5, 0.5, 0.5, -1.0, -1.0)


def discriminative(loss: DiscriminativeSFT, logprob: Tensor, ref: Tensor, **other: Tensor) -> dict[str, Tensor]:
    per_answer = {"group": GROUP, "negative": NEGATIVE, "log_normalizer": KEPT} | other
    spread = {name: value[:, None].expand_as(logprob) for name, value in per_answer.items()}
    return spread if loss.ref_free else spread | {"ref_logprob": ref}


@pytest.mark.parametrize("loss", [DiscriminativeSFT(), DiscriminativeSFT(temperature=0.5, decay=0.3),
                                  DiscriminativeSFT(ref_free=True, temperature=0.2), DiscriminativeSFT(decay=1.0)],
                         ids=ident)  # fmt: skip
def test_discriminative_sft_is_its_formula(loss: DiscriminativeSFT) -> None:
    generator = torch.Generator().manual_seed(11)
    logprob, ref = (-torch.rand(6, 5, generator=generator, dtype=F64) for _ in range(2))
    logprob.requires_grad_()
    mask = torch.rand(6, 5, generator=generator) < 0.7
    mask[:, 2] = True
    inputs = discriminative(loss, logprob, ref)
    value = loss(TokenStats(logprob), **inputs, mask=mask)
    lengths = mask.sum(-1)
    scores = torch.where(mask, logprob, 0.0).sum(-1) / (lengths if loss.ref_free else 1)
    temperature, decay = loss.recipe
    d = scores.detach() / temperature - (0 if loss.ref_free else torch.where(mask, ref, 0.0).sum(-1))
    expected = torch.zeros((), dtype=F64)
    kept = {}
    for prompt, chosen, sampled in ((2**40, 0, [1, 2, 3]), (2**40 + 1, 4, [5])):
        mean = d[sampled].exp().mean()
        kept[prompt] = ((1 - decay) * KEPT[chosen].exp() + decay * mean).log()
        weight = (d[sampled] - kept[prompt]).exp()
        assert weight.max() <= len(sampled) / decay * (1 + 1e-12)
        expected = expected - scores[chosen] + (weight * scores[sampled]).mean()
    torch.testing.assert_close(value.sum(), expected)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), logprob), torch.autograd.grad(expected, logprob))
    assert value[~mask].eq(0).all()
    updated = loss.updated_normalizer(TokenStats(logprob), **inputs, mask=mask)
    assert not updated.requires_grad
    per_answer = torch.stack([kept[int(prompt)] for prompt in GROUP])
    torch.testing.assert_close(updated, per_answer[:, None].expand(6, 5))


def test_discriminative_sft_has_the_authors_recipes() -> None:
    assert DiscriminativeSFT().recipe == (1.0, 0.85) and DiscriminativeSFT(ref_free=True).recipe == (0.3, 0.9)
    assert DiscriminativeSFT(temperature=0.5, decay=0.2, ref_free=True).recipe == (0.5, 0.2)


def test_discriminative_sft_matches_the_gradient_of_its_objective() -> None:
    """With decay 1: `-s+ / t + log mean_j exp(s_j / t - r_j)`, times t."""
    logprob, ref = (-torch.rand(6, 5, generator=torch.Generator().manual_seed(n), dtype=F64) for n in (1, 2))
    logprob.requires_grad_()
    loss = DiscriminativeSFT(temperature=0.7, decay=1.0)
    value = loss(TokenStats(logprob), **discriminative(loss, logprob, ref)).sum()
    s, r = logprob.sum(-1), ref.sum(-1)
    objective = -(s[0] + s[4]) / 0.7
    for sampled in ([1, 2, 3], [5]):
        objective = objective + (s[sampled] / 0.7 - r[sampled]).exp().mean().log()
    torch.testing.assert_close(torch.autograd.grad(value, logprob), torch.autograd.grad(0.7 * objective, logprob))


def test_discriminative_sft_far_from_the_base_model() -> None:
    """exp of hundreds on either side overflows nowhere; without samples a prompt is left with NLL."""
    loss = DiscriminativeSFT()
    logprob = torch.full((6, 5), -200.0, requires_grad=True)
    for reference_level in (-0.1, -400.0):
        ref = torch.full((6, 5), reference_level)
        value = loss(TokenStats(logprob), **discriminative(loss, logprob, ref))
        (gradient,) = torch.autograd.grad(value.sum(), logprob)
        assert value.isfinite().all() and gradient.isfinite().all()
    none = discriminative(loss, logprob, ref, negative=torch.zeros(6))
    torch.testing.assert_close(loss(TokenStats(logprob), **none), -logprob)


@pytest.mark.parametrize("loss", [DiscriminativeSFT(), DiscriminativeSFT(ref_free=True), DiscriminativeSFT(decay=1.0)],
                         ids=ident)  # fmt: skip
def test_discriminative_sft_of_samples_that_the_model_excludes(loss: DiscriminativeSFT) -> None:
    """All samples of the second prompt, one without a token, and one of the first's: they weigh nothing."""
    logprob = torch.full((7, 5), -1.0, dtype=F64)
    logprob[2, 0] = logprob[5, 1] = -math.inf
    mask = torch.ones(7, 5, dtype=torch.bool)
    mask[6] = False
    more = {"group": torch.cat([GROUP, GROUP[-1:]]), "negative": torch.cat([NEGATIVE, NEGATIVE[-1:]])}
    given = discriminative(loss, logprob, torch.full_like(logprob, -2.0), log_normalizer=doubles(*7 * [0.0]), **more)
    value = loss(TokenStats(logprob.requires_grad_()), **given, mask=mask)
    (gradient,) = torch.autograd.grad(value.sum(), logprob)
    assert value.isfinite().all() and gradient.isfinite().all()
    assert not gradient[[2, 5, 6]].any() and gradient[[0, 1, 3, 4]].all()
    assert not loss.updated_normalizer(TokenStats(logprob), **given, mask=mask).isnan().any()


def test_discriminative_sft_tells_prompts_apart_that_are_one_number_in_float32() -> None:
    logprob, ref = (-torch.rand(6, 5, generator=torch.Generator().manual_seed(n), dtype=F64) for n in (1, 2))
    single, double = (
        DiscriminativeSFT()(TokenStats(x), **discriminative(DiscriminativeSFT(), x, ref.to(x.dtype)))
        for x in (logprob.float(), logprob)
    )
    torch.testing.assert_close(single, double.float(), rtol=1e-4, atol=1e-5)


def test_discriminative_sft_through_a_head() -> None:
    """Numbers per answer are spread over its tokens; the mean is over prompts, of which there are two."""
    hidden, weight = torch.randn(6, 5, 4, dtype=F64, requires_grad=True), torch.randn(9, 4, dtype=F64)
    targets = torch.randint(9, (6, 5))
    ref = -2 * torch.rand(6, 5, dtype=F64)
    loss = DiscriminativeSFT()
    inputs = {"ref_logprob": ref, "group": GROUP, "negative": NEGATIVE, "log_normalizer": KEPT}
    found = linear_loss(loss, hidden, weight, targets, **inputs)
    logprob = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    expected = loss(TokenStats(logprob), **discriminative(loss, logprob, ref)).sum() / 2
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, hidden), torch.autograd.grad(expected, hidden))
    torch.testing.assert_close(linear_loss(loss, hidden, weight, targets, **inputs, normalizer=8), expected / 4)


# Means whose divisor the loss decides


def thresholded(reduction: str, p: Tensor, counted: Tensor) -> Tensor:
    """`1 - p` of the tokens with 0.1 <= p <= 0.5, over the number of these, or of the sequences that hold one."""
    kept = counted & (p >= 0.1) & (p <= 0.5)
    rows = torch.where(kept, 1 - p, 0.0).sum(-1)
    if reduction == "mean":
        return rows.sum() / kept.sum()
    if reduction == "mean_of_means":
        rows = rows / counted.sum(-1).clamp(min=1)
    return rows.sum() / kept.any(-1).sum()


@pytest.mark.parametrize("form", ["constant", "deft", "cayley"])
def test_thresholds_leave_the_mean_s_divisor(form: str) -> None:
    """The mean over kept tokens, as the authors' code has it, in value and gradient; a row keeps none."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(4, 5, 6, generator=generator, dtype=F64, requires_grad=True)
    weight = torch.randn(6, 6, generator=generator, dtype=F64, requires_grad=True)
    targets = torch.randint(6, (4, 5), generator=generator)
    targets[0, 3:] = -100
    logprob = (hidden @ weight.T).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    p, counted = logprob.exp(), targets >= 0
    kept = counted & (p >= 0.1) & (p <= 0.5)
    assert 0 < kept.sum() < counted.sum()
    loss = DeformedLog(form=form, min_prob=0.1, max_prob=0.5)
    found = linear_loss(loss, hidden, weight, targets)
    total = linear_loss(loss, hidden, weight, targets, reduction="sum")
    torch.testing.assert_close(found, total / kept.sum())
    torch.testing.assert_close(linear_loss(loss, hidden, weight, targets, normalizer=7), total / 7)
    if form == "constant":
        for reduction in ("mean", "sequence_mean", "mean_of_means"):
            found = linear_loss(loss, hidden, weight, targets, reduction=reduction)
            expected = thresholded(reduction, p, counted)
            torch.testing.assert_close(found, expected)
            ours, theirs = (torch.autograd.grad(x, (hidden, weight), retain_graph=True) for x in (found, expected))
            torch.testing.assert_close(ours, theirs)


def test_thresholds_compile_without_a_graph_break() -> None:
    loss, targets = DeformedLog(min_prob=0.1, max_prob=0.5), torch.tensor([[0, 1, -100], [2, 2, 3]])
    hidden, weight = torch.randn(2, 3, 4, dtype=F64, requires_grad=True), torch.randn(5, 4, dtype=F64)
    torch._dynamo.reset()
    traced = torch.compile(lambda x: linear_loss(loss, x, weight, targets), fullgraph=True, backend="aot_eager")
    found, expected = traced(hidden), linear_loss(loss, hidden, weight, targets)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, hidden), torch.autograd.grad(expected, hidden))


def test_thresholds_that_keep_nothing() -> None:
    hidden = torch.zeros(2, 3, 4, requires_grad=True)
    loss = DeformedLog(min_prob=0.9)
    value = linear_loss(loss, hidden, torch.randn(5, 4), torch.zeros(2, 3, dtype=torch.int64))
    value.backward()
    assert value == 0 and hidden.grad is not None and not hidden.grad.any()


@pytest.mark.parametrize("name", ["nll", "iw_sft"])
def test_mean_of_means_has_all_digits_of_float64(name: str) -> None:
    """Three tokens of logprob -log 5 each, and seven: the mean of means is log 5, in one sweep and from statistics."""
    targets = torch.zeros(2, 7, dtype=torch.int64)
    targets[0, 3:] = -100
    inputs = {"ref_logprob": torch.full((2, 7), -math.log(5), dtype=F64)} if name == "iw_sft" else {}
    hidden, weight = torch.zeros(2, 7, 4, dtype=F64, requires_grad=True), torch.zeros(5, 4, dtype=F64)
    found = linear_loss(name, hidden, weight, targets, reduction="mean_of_means", **inputs)
    torch.testing.assert_close(found.item(), math.log(5), rtol=1e-14, atol=0)


def test_sed_sft_min_entropy_marks_the_share_of_tokens_that_the_authors_mark() -> None:
    """A mass below `sorted(mass)[-int(0.7 n)]` is marked by their code; here an entropy above its own threshold."""
    for n in (1, 2, 9, 10, 101, 1000):
        mass = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=F64)
        marked = (mass < sorted(mass.tolist())[-max(int(0.7 * n), 1)]).sum()
        assert (1 - mass > losses.sed_sft_min_entropy(1 - mass)).sum() == marked
    for bad, words in (((torch.zeros(0), 0.3), "entropy"), ((torch.zeros(3), 1.0), "share")):
        with pytest.raises(ValueError, match=words):
            losses.sed_sft_min_entropy(bad[0], share=bad[1])


# Extreme values


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_finite_log_probs_give_finite_losses_and_gradients(loss: Loss, dtype: torch.dtype) -> None:
    """-1e4 and 0 on either side: ratios up to exp(1e4)."""
    logprob = torch.tensor([-1e4, -1e4, 0.0, 0.0, -1e-9, -90.0, -1.0], dtype=dtype)
    other = torch.tensor([0.0, -1e4, -1e4, 0.0, -1e-9, -3.0, -1.0], dtype=dtype)
    stats = TokenStats(*(None if x is None else x.to(dtype) for x in STATS))
    inputs = {name: x.to(dtype) for name, x in INPUTS.items()} | {"ref_logprob": other, "old_logprob": other}
    inputs = {name: inputs[name] for name in loss.inputs}
    logprob.requires_grad_()
    value = call(loss, logprob, stats, **inputs)
    value.sum().backward()
    assert value.dtype == dtype and value.isfinite().all()
    assert logprob.grad is not None and logprob.grad.isfinite().all()


#: What a logprob of -inf gives, value and w, where the other token has logprob -1 and all references are -1.
IMPOSSIBLE: list[tuple[Loss, float, float]] = [
    (DFT(), 0.0, 0.0),
    (DeformedLog(exponent=2.0), 0.5, 0.0),
    (DeformedLog(exponent=0.0), math.inf, 1.0),
    (DeformedLog(form="deft"), math.exp(-0.8 * -1.0), 0.0),
    (CHORDPhi(), 0.0, 0.0),
    (LUFFYShaping(), 0.0, 0.0),
    (Focal(), math.inf, 1.0),
    (Focal(gamma=0.5), math.inf, 1.0),
    (Unlikelihood(), 0.0, 0.0),
    (EAFT(), math.inf, 1.0),
    (SEDSFT(), math.inf, 1.0),
    (IDFT(), 0.0, 0.0),
    (IDFT(detach=False), 0.0, 0.0),
    (ProFiT(), 0.0, 0.0),
    (GEM(), math.inf, 0.7),
    (GEM(h="linear"), math.inf, 0.7),
    (ASFT(), 0.0, 0.0),
    (SFTKL(), math.inf, 1.0),
    (SFTKL(kl="k3", kl_weight=1.0), math.inf, math.exp(20)),
    (PSFT(), 0.0, 0.0),
    (MinorSFT(beta=0.4), math.inf, 1.0),
    (PoFT(), math.inf, 0.5),
    (IWSFT(), 0.0, 0.0),
    (IWSFT(per="token"), math.inf, 0.2),
    (IWSFT(temperature=0.0), math.inf, 1.0),
    (FDivergenceSFT(divergence="squared_hellinger", per="sequence"), math.inf, 4.0),
    (FDivergenceSFT(per="sequence"), math.inf, 5001.0),
    (FDivergenceSFT(saturate=True, per="sequence"), math.inf, 5001.0),
    (IFT(), math.inf, 2e6 / (2e6 + 1)),
]


@pytest.mark.parametrize(("loss", "value", "weight"), IMPOSSIBLE, ids=[ident(row[0]) for row in IMPOSSIBLE])
def test_an_impossible_target(loss: Loss, value: float, weight: float) -> None:
    """The documented value and a finite gradient. (IFT: both tokens' futures are 1e6 or so; it stands second.)"""
    place = 1 if isinstance(loss, IFT) else 0
    logprob = doubles(-1.0, -1.0)
    logprob[place] = -math.inf
    logprob.requires_grad_()
    stats = TokenStats(logprob, doubles(0, 0), doubles(9, 9), None, None, doubles(-0.8, -0.8))
    inputs = {name: doubles(-1, -1) for name in loss.inputs}
    if loss.compares_distributions:
        inputs["divergence"] = doubles(0, 0)
    found = loss(stats, **inputs)
    (gradient,) = torch.autograd.grad(found.sum(), logprob)
    assert found[place].item() == pytest.approx(value)
    assert -gradient[place].item() == pytest.approx(weight, rel=0.1 if isinstance(loss, IFT) else 1e-9)
    assert gradient.isfinite().all()


def test_unlikelihood_keeps_its_gradient_where_the_model_is_sure() -> None:
    """Beyond p = 1 - 1e-6 linearly, with the slope it has there; with respect to the logits never more than alpha."""
    near = -weights(Unlikelihood(), doubles(-1.1e-6, -1e-6, -0.9e-6, -1e-9, 0.0))
    torch.testing.assert_close(near[0], doubles(math.exp(-1.1e-6) / -math.expm1(-1.1e-6))[0])
    torch.testing.assert_close(near[1:], torch.full((4,), 1 / math.expm1(1e-6), dtype=F64))
    logits = torch.tensor([[0.0, gap] for gap in (1.0, 5.0, 13.0, 20.0)], dtype=F64, requires_grad=True)
    Unlikelihood()(TokenStats(logits.log_softmax(-1)[:, 1])).sum().backward()
    assert logits.grad is not None and logits.grad.abs().max() <= 1.0
    torch.testing.assert_close(logits.grad[:3, 1], logits.detach().softmax(-1)[:3, 1], rtol=1e-6, atol=0)


def test_k3_is_exact_up_to_a_ratio_of_e_to_the_twenty_and_linear_beyond() -> None:
    loss = SFTKL(kl="k3", kl_weight=1.0)

    def k3(r: float) -> float:
        return loss(TokenStats(doubles(0.0)), ref_logprob=doubles(r)).item()

    assert k3(19.99) == pytest.approx(math.expm1(19.99) - 19.99, rel=1e-12)
    assert k3(22.0) == pytest.approx(math.expm1(20) - 20 + 2 * math.expm1(20), rel=1e-12)
    assert k3(1e-9) == pytest.approx(0.5e-18, rel=1e-6)


def test_idft_mix() -> None:
    assert [idft_mix(step, 100) for step in (0, 20, 25, 30, 99)] == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert [idft_mix(step, 10, warmup=0.0, transition=0.0) for step in (0, 1)] == [0.0, 1.0]
    for bad in ({"step": -1, "total_steps": 5}, {"step": 0, "total_steps": 0}):
        with pytest.raises(ValueError, match="idft_mix"):
            idft_mix(**bad)
    with pytest.raises(ValueError, match="shares of the steps"):
        idft_mix(0, 10, warmup=0.8, transition=0.3)


# Hyper-parameters, inputs, names


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("deformed_log", {"form": "tsallis"}, "DeformedLog: form"),
        ("deformed_log", {"exponent": -0.1}, "DeformedLog: exponent"),
        ("deformed_log", {"form": "deft", "exponent": 0.5}, "exponent belongs to form='constant'"),
        ("deformed_log", {"min_prob": 0.6, "max_prob": 0.5}, "DeformedLog: max_prob"),
        ("chord_phi", {"cutoff": 0.0}, "CHORDPhi: cutoff"),
        ("luffy_shaping", {"gamma": 0}, "LUFFYShaping: gamma"),
        ("focal", {"gamma": -1}, "Focal: gamma"),
        ("unlikelihood", {"alpha": -1}, "Unlikelihood: alpha"),
        ("eaft", {"k": 1}, "EAFT: k"),
        ("eaft", {"alpha": -1}, "EAFT: alpha"),
        ("sed_sft", {"scale": -1}, "SEDSFT: scale"),
        ("idft", {"beta": 0}, "IDFT: beta"),
        ("idft", {"min_power": 0.0}, "IDFT: min_power"),
        ("idft", {"max_power": 0.05}, "IDFT: max_power"),
        ("idft", {"mix": 1.1}, "IDFT: mix"),
        ("profit", {"threshold": 1.0}, "ProFiT: threshold"),
        ("gem", {"beta": 0.0}, "GEM: beta"),
        ("gem", {"beta": 1.5}, "GEM: beta"),
        ("gem", {"h": "sigmoid"}, "GEM: h"),
        ("asft", {"kl_weight": -0.1}, "ASFT: kl_weight"),
        ("sft_kl", {"kl": "k1"}, "SFTKL: kl"),
        ("psft", {"epsilon": 0}, "PSFT: epsilon"),
        ("minor_sft", {"beta": 0}, "MinorSFT: beta"),
        ("iw_sft", {"per": "batch"}, "IWSFT: per"),
        ("iw_sft", {"per": "token", "temperature": 2.0}, "temperature belongs to per='sequence'"),
        ("iw_sft", {"low": 3.0, "high": 1.0}, "low must not exceed high"),
        ("iw_sft", {"low": -1.0}, "IWSFT: low"),
        ("discriminative_sft", {"decay": 0.0}, "DiscriminativeSFT: decay"),
        ("discriminative_sft", {"temperature": 0.0}, "DiscriminativeSFT: temperature"),
        ("ift", {"discount": 1.1}, "IFT: discount"),
        ("f_divergence_sft", {"per": "sequence", "value": "lse"}, "takes value='none' alone"),
    ],
)
def test_bad_hyper_parameters(name: str, parameters: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        losses.get(name, **parameters)


def test_bad_inputs_are_named() -> None:
    with pytest.raises(ValueError, match=r"eaft reads stats\.entropy"):
        EAFT()(TokenStats(LOGPROB))
    with pytest.raises(ValueError, match=r"log_sum_sq, which is None"):
        DeformedLog(form="deft")(TokenStats(LOGPROB))
    with pytest.raises(ValueError, match="needs the divergence per token"):
        ASFT()(TokenStats(LOGPROB))
    with pytest.raises(ValueError, match="sft_kl needs ref_logprob"):
        SFTKL(kl="k3")(TokenStats(LOGPROB))
    with pytest.raises(ValueError, match="old_logprob must have shape"):
        PSFT()(TokenStats(LOGPROB), old_logprob=LOGPROB[:2])
    with pytest.raises(ValueError, match="mask must have shape"):
        MinorSFT()(TokenStats(LOGPROB), LOGPROB, mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="sequence: expected"):
        PoFT()(TokenStats(LOGPROB), LOGPROB, sequence=LOGPROB)
    with pytest.raises(ValueError, match="discriminative_sft needs ref_logprob"):
        call(DiscriminativeSFT(), ref_logprob=None)


@pytest.mark.parametrize("loss", [*ANSWERS, IDFT(), GEM(), DFT(), Focal(), SFTKL(kl="k3"), PSFT()], ids=ident)
def test_losses_trace_without_a_graph_break(loss: Loss) -> None:
    names = [field for field in loss.outputs if field != "logprob"]

    def run(logprob: Tensor, mask: Tensor, *others: Tensor) -> Tensor:
        stats = TokenStats(logprob=logprob, **dict(zip(names, others[: len(names)], strict=True)))
        inputs = dict(zip(loss.inputs, others[len(names) :], strict=True))
        sequence = torch.zeros_like(mask, dtype=torch.int64)
        return loss(
            stats,
            **inputs,
            **(
                {"mask": mask, "sequence": sequence}
                if isinstance(loss, losses.SequenceLoss) and not loss.token_wise
                else {}
            ),
        )

    others = [getattr(STATS, name) for name in names] + [INPUTS[name] for name in loss.inputs]
    torch._dynamo.reset()
    traced = torch.compile(run, fullgraph=True, backend="eager")
    mask = torch.tensor([True, False, True, True, True, True, False])
    torch.testing.assert_close(traced(LOGPROB, mask, *others), run(LOGPROB, mask, *others), rtol=0, atol=0)


def test_the_family_is_registered_and_tested_here() -> None:
    names = (
        "asft chord_phi deformed_log dft discriminative_sft eaft f_divergence_sft focal gem idft ift iw_sft "
        "luffy_shaping minor_sft nll poft profit psft sed_sft sft_kl unlikelihood"
    )
    assert set(names.split()) <= set(losses.names())
    assert {loss.name for loss in ALL} == set(names.split())
