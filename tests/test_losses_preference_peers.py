"""The preference losses against TRL's and Liger's, per token and per sequence; where they differ, the reason.

TRL's trainers are not built: their loss methods run on stand-ins (`trl_standins`).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from preference_cases import pair_loss
from torch import Tensor
from trl_standins import cpo_settings, trl_dpo, trl_kto

from logitless.losses import (
    CPO,
    DPO,
    KTO,
    MPO,
    ORPO,
    AlphaPO,
    ChosenNLL,
    Loss,
    SimPO,
    WeightedSum,
    kto_reference_point,
)

pytest.importorskip("trl")

LENGTHS = torch.tensor([5, 3, 6, 2, 2, 6, 4, 1])  # four chosen completions, four rejected
WIDTH = 8
#: TRL and Liger hold EXO's epsilon in float32, whatever the dtype of the log-probabilities.
EXO_RTOL = 1e-6


def tokens(scale: float = 1.5, lengths: Tensor = LENGTHS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities `[2B, T]` of the model (a leaf) and the reference, the mask, and `log sum p^2`; the prompt is
    a row's first token, and what is masked is 0, as the ops give it."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.arange(WIDTH) < lengths[:, None]
    ours, theirs = (torch.where(mask, -scale * torch.rand(mask.shape, generator=draw).double(), 0.0) for _ in range(2))
    log_sum_sq = torch.where(mask, -2 * torch.rand(mask.shape, generator=draw).double(), 0.0)
    return ours.requires_grad_(), theirs, mask, log_sum_sq


# ---------------------------------------------------------------------------------------------------------------------
# TRL: DPO


def ours(loss: Loss, problem: tuple[Tensor, Tensor, Tensor, Tensor]) -> Any:
    """A pair loss from tokens."""
    return pair_loss(loss, *problem)


def gradient(loss: Tensor, logprob: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, logprob, retain_graph=True)
    return found


def assert_same(found: Any, expected: Tensor, problem: tuple[Tensor, ...], mask: Tensor, rtol: float = 1e-9) -> None:
    """Mean loss and per-token gradients."""
    torch.testing.assert_close(found.loss.mean(), expected, rtol=rtol, atol=1e-9)
    a, b = (torch.where(mask, gradient(x, problem[0]), 0.0) for x in (found.loss.mean(), expected))
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-9)


DPO_CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *(
        (dict(loss_type=kind), dict(loss_types=[kind]))
        for kind in (
            *("sigmoid", "hinge", "ipo", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
            *("apo_zero", "apo_down", "discopop", "sigmoid_norm"),
        )
    ),
    *(
        (dict(loss_type=kind, label_smoothing=0.2), dict(loss_types=[kind], label_smoothing=0.2))
        for kind in ("exo_pair", "robust", "aot", "aot_unpaired")
    ),
    *(
        (
            dict(loss_type=kind, divergence=name, label_smoothing=0.1 if kind == "exo_pair" else 0.0),
            dict(loss_types=[kind], f_divergence_type=theirs, label_smoothing=0.1 if kind == "exo_pair" else 0.0),
        )
        for kind in ("sigmoid", "hinge", "exo_pair", "robust", "discopop")
        for name, theirs in (("forward_kl", "forward_kl"), ("js", "js_divergence"))
    ),
    *(
        (dict(loss_type=kind, tail_weight=x), dict(loss_types=[kind], ld_alpha=x))
        for kind in ("sigmoid", "sppo_hard", "aot")
        for x in (0.0, 0.4, 1.0)
    ),
    *(
        (dict(loss_type=kind, use_weighting=True, weight_cap=None), dict(loss_types=[kind], use_weighting=True))
        for kind in ("sigmoid", "ipo", "apo_zero", "sigmoid_norm")
    ),
    (
        dict(use_weighting=True, weight_cap=None, tail_weight=0.4),
        dict(use_weighting=True, ld_alpha=0.4),
    ),
    (
        dict(loss_type="discopop", discopop_tau=0.5),
        dict(loss_types=["discopop"], args=SimpleNamespace(discopop_tau=0.5)),
    ),
]


@pytest.mark.parametrize(("hyper", "settings"), DPO_CASES, ids=lambda x: ",".join(f"{k}={v}" for k, v in x.items()))
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_dpo_is_trls(hyper: dict[str, Any], settings: dict[str, Any], beta: float) -> None:
    problem = tokens()
    found = ours(DPO(beta=beta, **hyper), problem)
    expected, metrics = trl_dpo(problem, beta=beta, **settings)
    assert_same(found, expected, problem, problem[2], EXO_RTOL if hyper.get("loss_type") == "exo_pair" else 1e-9)
    if hyper.get("loss_type") in ("ipo", "sigmoid_norm"):
        return  # TRL logs the rewards of sums, though the loss is of averages; ours are what the loss compares
    for name, value in (
        ("rewards/chosen", found.chosen_reward),
        ("rewards/rejected", found.rejected_reward),
        ("rewards/margins", found.margin),
        ("rewards/accuracies", found.accuracy),
        ("logps/chosen", found.chosen_logprob),
        ("logps/rejected", found.rejected_logprob),
    ):
        assert metrics[name] == pytest.approx(value.mean().item(), rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("alpha", [-0.5, 0.25, 0.5, 1.0])
def test_alpha_divergence_is_trls_with_one_minus_alpha(alpha: float) -> None:
    """TRL's coefficient multiplies the other side's exponent since release 1 (0.23 had ours); float32 alone there."""
    logprob, ref, mask, log_sum_sq = tokens()
    problem = logprob.detach().float().requires_grad_(), ref.float(), mask, log_sum_sq.float()
    expected, _ = trl_dpo(problem, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1 - alpha)
    if alpha < 0:  # f' is bounded at 0 there: such a divergence does not hold the model, and is refused
        with pytest.raises(ValueError, match="DPO: alpha"):
            DPO(divergence="alpha", alpha=alpha)
    else:
        found = ours(DPO(divergence="alpha", alpha=alpha), problem)
        assert_same(found, expected, problem, mask, rtol=2e-5)


def test_several_terms_are_trls() -> None:
    """MPO, and DPO with the NLL (RPO), on chosen completions of one length: TRL's NLL is a mean over all tokens."""
    lengths = torch.tensor([4, 4, 4, 4, 2, 6, 4, 1])
    problem = tokens(lengths=lengths)
    expected, metrics = trl_dpo(problem, loss_types=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0])
    found = ours(MPO(), problem)
    assert_same(found, expected, problem, problem[2])
    assert metrics["rewards/margins"] == pytest.approx(found.margin.mean().item())
    expected, _ = trl_dpo(problem, loss_types=["ipo", "hinge", "sft"], loss_weights=[0.5, 2.0, 0.3])
    mixed = WeightedSum(
        terms=[{"name": "dpo", "loss_type": "ipo"}, {"name": "dpo", "loss_type": "hinge"}, "chosen_nll"],
        weights=[0.5, 2.0, 0.3],
    )
    assert_same(ours(mixed, problem), expected, problem, problem[2])


def test_chosen_nll_of_unequal_lengths_is_trls_by_the_number_of_tokens() -> None:
    problem = tokens()
    expected, _ = trl_dpo(problem, loss_types=["sft"])
    summed = ours(ChosenNLL(average=False), problem).loss.sum() / LENGTHS[:4].sum()
    torch.testing.assert_close(summed, expected)
    assert not torch.allclose(ours(ChosenNLL(), problem).loss.mean(), expected, rtol=1e-2)


def test_label_smoothing_of_the_sigmoid_takes_effect_here_and_not_in_trl() -> None:
    problem = tokens()
    with_it, without = (trl_dpo(problem, label_smoothing=eps)[0] for eps in (0.3, 0.0))
    assert torch.equal(with_it, without)
    found = ours(DPO(label_smoothing=0.3), problem).loss.mean()
    assert not torch.allclose(found, with_it, rtol=1e-3)
    torch.testing.assert_close(found, cdpo(problem, 0.3))


def cdpo(problem: tuple[Tensor, Tensor, Tensor, Tensor], eps: float) -> Tensor:
    """TRL's own code of the form, in its AOT loss, on batches of one pair."""
    logprob, ref, mask, log_sum_sq = problem
    total = logprob.new_zeros(())
    for i in range(4):
        one = [i, i + 4]
        pair = logprob[one], ref[one], mask[one], log_sum_sq[one]
        total = total + trl_dpo(pair, loss_types=["aot"], label_smoothing=eps)[0] / 4
    return total


def test_where_trl_overflows_on_drifted_policies() -> None:
    """forward_kl: TRL does not clamp exp(-log u); discopop: inf * 0. Ours stay finite and pull back."""
    _, ref, mask, log_sum_sq = tokens()
    far = torch.where(mask, torch.tensor(-1e3), torch.tensor(0.0)).requires_grad_()
    problem = far, ref.float(), mask, log_sum_sq.float()
    for hyper, settings in (
        (dict(divergence="forward_kl"), dict(f_divergence_type="forward_kl")),
        (dict(loss_type="discopop"), dict(loss_types=["discopop"])),
    ):
        theirs = trl_dpo(problem, **settings)[0]
        assert not gradient(theirs, far).isfinite().all()
        found = gradient(ours(DPO(**hyper), problem).loss.mean(), far)
        assert found.isfinite().all() and (found[:4] <= 0).all() and (found[4:] >= 0).all() and found.any()


def test_where_trl_fails_on_weighted_terms() -> None:
    """An in-place product on an expanded tensor: the NLL with WPO's weights. Here the weights are their term's own."""
    problem = tokens()
    with pytest.raises(RuntimeError):
        trl_dpo(problem, loss_types=["sigmoid", "sft"], loss_weights=[1.0, 1.0], use_weighting=True)
    both = WeightedSum(terms=[DPO(use_weighting=True), ChosenNLL()])
    expected = ours(DPO(use_weighting=True), problem).loss + ours(ChosenNLL(), problem).loss
    torch.testing.assert_close(ours(both, problem).loss, expected)


def test_f_divergences_of_averages_do_not_cancel_in_trl() -> None:
    """Two equal policies: the margin must be 0. TRL divides each score's constant by another length; we refuse."""
    logprob, _, mask, log_sum_sq = tokens()
    same = logprob, logprob.detach(), mask, log_sum_sq
    plain = trl_dpo(same, loss_types=["sigmoid_norm"], beta=1.0)[0]
    shifted = trl_dpo(
        (logprob, logprob.detach() + 0.1 * mask, mask, log_sum_sq),
        loss_types=["sigmoid_norm"], beta=1.0, f_divergence_type="js_divergence",
    )[0]  # fmt: skip
    assert plain.item() == pytest.approx(torch.tensor(2.0).log().item()) and shifted.item() != pytest.approx(
        plain.item()
    )
    with pytest.raises(ValueError, match="reverse_kl"):
        DPO(loss_type="sigmoid_norm", divergence="js")


# ---------------------------------------------------------------------------------------------------------------------
# TRL: without a reference, and unpaired


def averages(scale: float) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return tuple((-scale * torch.rand(16, generator=draw).double()).requires_grad_() for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("scale", [0.5, 3.0, 30.0])
@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (CPO(nll_weight=0.0), dict()),
        (CPO(nll_weight=0.0, beta=0.7, label_smoothing=0.2), dict(beta=0.7, label_smoothing=0.2)),
        (CPO(nll_weight=0.0, loss_type="hinge"), dict(loss_type="hinge")),
        (CPO(nll_weight=0.0, loss_type="ipo"), dict(loss_type="ipo")),
        (SimPO(), dict(loss_type="simpo", beta=2.0)),
        (
            SimPO(beta=3.0, gamma=1.0, label_smoothing=0.1),
            dict(loss_type="simpo", beta=3.0, simpo_gamma=1.0, label_smoothing=0.1),
        ),
        (AlphaPO(), dict(loss_type="simpo", beta=2.0, alpha=0.25)),
        (AlphaPO(alpha=-0.5, gamma=0.0), dict(loss_type="simpo", beta=2.0, alpha=-0.5, simpo_gamma=0.0)),
    ],
    ids=str,
)  # fmt: skip
def test_reference_free_losses_are_trls(loss: Any, settings: dict[str, Any], scale: float) -> None:
    cpo = pytest.importorskip("trl.experimental.cpo")
    chosen, rejected = averages(scale)
    expected, reward, other = cpo.CPOTrainer.cpo_loss(cpo_settings(**settings), chosen, rejected)
    found = loss(chosen, rejected)
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.chosen_reward, reward)
    torch.testing.assert_close(found.rejected_reward, other)
    for leaf in (chosen, rejected):
        torch.testing.assert_close(gradient(found.loss.sum(), leaf), gradient(expected.sum(), leaf))


def test_where_trls_alphapo_underflows() -> None:
    """p ** -alpha of p = exp(-120) = 0 in float32; in log space it is a number."""
    cpo = pytest.importorskip("trl.experimental.cpo")
    chosen, rejected = torch.tensor([-120.0], requires_grad=True), torch.tensor([-1.0])
    theirs = cpo.CPOTrainer.cpo_loss(cpo_settings(loss_type="simpo", alpha=0.25), chosen, rejected)[0]
    assert not gradient(theirs.sum(), chosen).isfinite().all()
    assert gradient(AlphaPO()(chosen, rejected).loss.sum(), chosen).item() < 0


@pytest.mark.parametrize("scale", [0.5, 3.0, 30.0])
def test_orpo_is_trls(scale: float) -> None:
    """In float32, which TRL casts to; up to where our odds continue linearly."""
    orpo = pytest.importorskip("trl.experimental.orpo")
    chosen, rejected = ((x.detach().float() - 1e-3).requires_grad_() for x in averages(scale))
    ratio, reward, other, *_ = orpo.ORPOTrainer.odds_ratio_loss(cpo_settings(), chosen, rejected)
    found = ORPO()(chosen, rejected)
    torch.testing.assert_close(found.loss, -ratio - chosen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((found.chosen_reward, found.rejected_reward), (reward, other))
    for leaf in (chosen, rejected):
        ours_, theirs = (
            torch.autograd.grad(x.sum(), leaf, retain_graph=True)[0] for x in (found.loss, -ratio - chosen)
        )
        torch.testing.assert_close(ours_, theirs, rtol=1e-4, atol=1e-5)


def test_where_trls_orpo_is_nan() -> None:
    """Both branches of its `where` are differentiated, and one divides by 1 - exp(a) = 0."""
    orpo = pytest.importorskip("trl.experimental.orpo")
    rejected = torch.tensor([-1e-9], requires_grad=True)
    theirs = orpo.ORPOTrainer.odds_ratio_loss(cpo_settings(), torch.tensor([-1.0]), rejected)[0]
    assert not gradient(theirs.sum(), rejected).isfinite().all()
    assert gradient(ORPO()(torch.tensor([-1.0]), rejected).loss.sum(), rejected).item() > 0


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("shift", [0.5, -0.5])
def test_kto_is_trls(kind: str, shift: float) -> None:
    """With its reference point, of mismatched completions, above 0 and clamped to 0."""
    logprob, ref, mask, _ = tokens()
    mismatched, ref_mismatched = tokens(seed=5)[0].detach() + shift * mask, tokens(seed=6)[0].detach()
    label = torch.tensor([True, False, True, True, False, False, True, False])
    sums = (mismatched.sum(-1), ref_mismatched.sum(-1)) if kind == "kto" else None
    expected, metrics = trl_kto(
        (logprob, ref, mask), sums, label, loss_type=kind, desirable_weight=1.3, undesirable_weight=0.6
    )
    point = kto_reference_point(mismatched.sum(-1), ref_mismatched.sum(-1))
    assert (point.item() == 0) == (shift < 0)
    more = dict(reference_point=point) if kind == "kto" else {}
    loss = KTO(loss_type=kind, desirable_weight=1.3, undesirable_weight=0.6)
    found = loss(logprob.sum(-1), ref.sum(-1), desirable=label, **more)
    assert_same(found, expected, (logprob,), mask)
    assert metrics["rewards/chosen"][-1] == pytest.approx(found.reward[label].mean().item())
    assert metrics["rewards/rejected"][-1] == pytest.approx(found.reward[~label].mean().item())


# ---------------------------------------------------------------------------------------------------------------------
# Liger


def liger(name: str) -> Any:
    """The static loss function of one of Liger's chunked losses."""
    module = pytest.importorskip(f"liger_kernel.chunked_loss.{name}_loss")
    (function,) = [x for key, x in vars(module).items() if key.startswith("LigerFused") and key.endswith("Function")]
    return function.preference_loss_fn


def four(scale: float) -> list[Tensor]:
    draw = torch.Generator().manual_seed(7)
    return [-scale * torch.rand(32, generator=draw).double() for _ in range(4)]


@pytest.mark.parametrize("scale", [2.0, 60.0, 800.0])
@pytest.mark.parametrize(
    ("kind", "eps"),
    [
        ("sigmoid", 0.0), ("hinge", 0.0), ("exo_pair", 0.1), ("nca_pair", 0.0), ("robust", 0.0), ("robust", 0.2),
        ("bco_pair", 0.0), ("sppo_hard", 0.0), ("apo_zero", 0.0), ("apo_down", 0.0), ("discopop", 0.0),
    ],
)  # fmt: skip
def test_dpo_is_ligers(kind: str, eps: float, scale: float) -> None:
    function, inputs, target = liger("dpo"), four(scale), torch.zeros(64)
    for leaf in inputs[:2]:
        leaf.requires_grad_()
    chosen, rejected, ref_chosen, ref_rejected = inputs
    expected, reward, other = function(
        chosen, rejected, target, ref_chosen, ref_rejected, loss_type=kind, label_smoothing=eps
    )
    found = DPO(loss_type=kind, label_smoothing=eps)(*inputs)
    rtol = EXO_RTOL if kind == "exo_pair" else 1e-8
    torch.testing.assert_close(found.loss.mean(), expected, rtol=rtol, atol=1e-9)
    torch.testing.assert_close((found.chosen_reward, found.rejected_reward), (reward.detach(), other.detach()))
    for leaf in (chosen, rejected):
        torch.testing.assert_close(gradient(found.loss.mean(), leaf), gradient(expected, leaf), rtol=rtol, atol=1e-10)


def test_label_smoothing_of_the_sigmoid_is_ignored_by_liger() -> None:
    inputs = four(20.0)
    with_it, without = (liger("dpo")(*inputs[:2], torch.zeros(64), *inputs[2:], label_smoothing=x)[0] for x in (0.3, 0))
    assert torch.equal(with_it, without)
    assert not torch.allclose(DPO(label_smoothing=0.3)(*inputs).loss.mean(), with_it, rtol=1e-3)


@pytest.mark.parametrize("scale", [0.5, 3.0, 30.0])
def test_reference_free_losses_are_ligers(scale: float) -> None:
    chosen, rejected, target = *(x.detach() - 1e-3 for x in averages(scale)), torch.zeros(32)
    for loss, expected in (
        (SimPO(beta=2.0, label_smoothing=0.1), liger("simpo")(chosen, rejected, target, 2.0, 0.5, 0.1)[0]),
        (CPO(nll_weight=0.0, label_smoothing=0.1), liger("cpo")(chosen, rejected, target, 0.1, 0.1)[0]),
    ):
        torch.testing.assert_close(loss(chosen, rejected).loss.mean(), expected)
    expected = liger("orpo")(chosen, rejected, target)[0] - chosen.mean()
    torch.testing.assert_close(ORPO()(chosen, rejected).loss.mean(), expected)


def test_where_ligers_orpo_is_imprecise() -> None:
    """log1p(-exp(a)) near 0: float32 has no digits of 1 - exp(a) left, and at 0 there is none at all."""
    exact = liger("orpo")(torch.tensor([-1e-4]).double(), torch.tensor([-1.0]).double(), torch.zeros(2), 1.0)[0]
    theirs = liger("orpo")(torch.tensor([-1e-4]), torch.tensor([-1.0]), torch.zeros(2), 1.0)[0]
    found = (ORPO(beta=1.0)(torch.tensor([-1e-4]), torch.tensor([-1.0])).loss - 1e-4).item()
    assert abs(found - exact.item()) < 1e-7 * exact.item() + 1e-10 < abs(theirs.item() - exact.item())
    certain = liger("orpo")(torch.tensor([-1.0]), torch.tensor([0.0]), torch.zeros(2))[0]
    assert certain.item() == float("inf")
    assert ORPO()(torch.tensor([-1.0]), torch.tensor([0.0])).loss.isfinite().all()


@pytest.mark.parametrize("scale", [2.0, 60.0, 800.0])
def test_kto_is_ligers(scale: float) -> None:
    logprob, ref, point, _ = four(scale)
    label = torch.arange(32) % 3 == 0
    point = point.mean().abs() / 10
    expected, good, bad = liger("kto")(logprob, label, torch.zeros(32), ref, kl=point)
    found = KTO()(logprob, ref, desirable=label, reference_point=point)
    torch.testing.assert_close(found.loss.mean(), expected)
    torch.testing.assert_close((found.reward[label].sum(), found.reward[~label].sum()), (good, bad))
