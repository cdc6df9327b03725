"""Distillation by distributions: definitions, `linear_loss` against full logits, peers, temperature, constants."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from logitless import Head, linear_divergence, linear_logprobs, linear_loss, losses
from logitless.losses.distillation.distribution import GKD, Distillation
from logitless.reference import divergence
from logitless.types import DivergenceKind, DivergenceOptions, TokenStats

KINDS = get_args(DivergenceKind)
N, H, H_TEACHER, V = 10, 4, 6, 13


def problem(dtype=torch.float64, trainable=("hidden", "weight")) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = dict(
        hidden=torch.randn(2, N // 2, H, generator=draw),
        weight=torch.randn(V, H, generator=draw),
        targets=torch.randint(V, (2, N // 2), generator=draw),
        ref_hidden=torch.randn(2, N // 2, H_TEACHER, generator=draw),
        ref_head=torch.randn(V, H_TEACHER, generator=draw) * 0.5,
    )
    x["targets"][0, :2] = -100
    x = {name: y.to(dtype) if y.is_floating_point() else y for name, y in x.items()}
    return {name: y.requires_grad_() if name in trainable else y for name, y in x.items()}


def materialised(x: dict[str, Tensor], loss: Distillation, temperature=1.0, ref_temperature=1.0) -> Tensor:
    """Per token, from full logits."""
    log_q = (x["hidden"] @ x["weight"].T / temperature).log_softmax(-1).flatten(0, 1)
    log_p = (x["ref_hidden"] @ x["ref_head"].T / ref_temperature).log_softmax(-1).flatten(0, 1)
    found = divergence(log_p, log_q, DivergenceOptions(**loss.linear_divergence))
    nll = F.nll_loss(log_q, x["targets"].flatten(), ignore_index=-100, reduction="none")
    return torch.where(x["targets"].flatten() == -100, 0, found + loss.nll_weight * nll).view(x["targets"].shape)


def gradients(value: Tensor, x: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value, [y for y in x.values() if y.requires_grad]))


LOSSES = [
    *(Distillation(kind) for kind in KINDS),
    Distillation("symmetric_kl", mixture=0.9),
    Distillation("js", mixture=0.2),
    Distillation("js", mixture=0.9, normalized=True),
    Distillation("skew_reverse_kl", skew=0.5),
    Distillation("alpha", alpha=-0.4),
    Distillation("reverse_kl", nll_weight=0.7),
    Distillation("forward_kl", nll_weight=1.0),
]


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("trainable", [("hidden", "weight"), ("hidden",)], ids=["all", "frozen"])
def test_linear_loss_is_the_definition(loss, trainable):
    x = problem(trainable=trainable)
    expected = materialised(x, loss, 0.8, 0.8)
    per_token = linear_loss(loss, **x, temperature=0.8, reduction="none")
    torch.testing.assert_close(per_token, expected)
    counted = (x["targets"] != -100).sum()
    value = linear_loss(loss, **x, temperature=0.8, chunk_bytes=1000)
    torch.testing.assert_close(value, expected.sum() / counted)
    for found, exact in zip(gradients(value, x), gradients(expected.sum() / counted, x), strict=True):
        torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("loss", [Distillation("js"), Distillation("js", nll_weight=0.3)], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean", "sequence_mean", "mean_of_means", "none"])
def test_token_weights_and_reductions(loss, reduction):
    x = problem()
    weight = torch.linspace(0, 2, N, dtype=torch.float64).view(2, -1)
    per_token = materialised(x, loss) * weight
    lengths = (x["targets"] != -100).sum(1)
    expected = {
        "none": per_token,
        "sum": per_token.sum(),
        "mean": per_token.sum() / lengths.sum(),
        "sequence_mean": per_token.sum() / 2,
        "mean_of_means": (per_token.sum(1) / lengths).mean(),
    }[reduction]
    found = linear_loss(loss, **x, token_weight=weight, reduction=reduction)
    torch.testing.assert_close(found, expected)
    for ours, exact in zip(gradients(found.sum(), x), gradients(expected.sum(), x), strict=True):
        torch.testing.assert_close(ours, exact)


def test_a_split_into_micro_batches_changes_nothing():
    x, loss = problem(), Distillation("js", nll_weight=0.3)
    whole = linear_loss(loss, **x)
    count = (x["targets"] != -100).sum()
    parts = [
        linear_loss(
            loss,
            x["hidden"][i : i + 1],
            x["weight"],
            x["targets"][i : i + 1],
            ref_hidden=x["ref_hidden"][i : i + 1],
            ref_head=x["ref_head"],
            normalizer=count,
        )
        for i in range(2)
    ]
    torch.testing.assert_close(sum(parts), whole)
    for a, b in zip(gradients(sum(parts), x), gradients(whole, x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("loss", [Distillation("js"), Distillation("reverse_kl", nll_weight=0.3), GKD(1.0)], ids=str)
def test_gradcheck(loss):
    x = problem()

    def function(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_loss(loss, **{**x, "hidden": hidden, "weight": weight}, chunk_bytes=700)

    assert torch.autograd.gradcheck(function, (x["hidden"], x["weight"]))


@pytest.mark.parametrize("nll_weight", [0.0, 1.0])
def test_no_token_that_counts(nll_weight):
    x = problem(torch.float32)
    x["targets"] = torch.full_like(x["targets"], -100)
    value = linear_loss(Distillation("reverse_kl", nll_weight=nll_weight), **x)
    assert value == 0
    assert all((g == 0).all() for g in gradients(value, x))


# ---------------------------------------------------------------------------------------------------------------------
# What is constant


@pytest.mark.parametrize("loss", [Distillation("js"), Distillation("js", nll_weight=0.5), GKD(1.0)], ids=str)
def test_the_teacher_is_a_constant(loss):
    x = problem(trainable=("hidden", "weight", "ref_hidden", "ref_head"))
    linear_loss(loss, **x).backward()
    assert x["hidden"].grad is not None and x["weight"].grad is not None
    assert x["ref_hidden"].grad is None and x["ref_head"].grad is None


def test_the_models_own_head_as_the_teachers_is_a_constant_there():
    """A teacher that shares the head: the gradient is that of a copy of it."""
    x = problem()
    x["ref_hidden"] = torch.randn_like(x["hidden"])
    del x["ref_head"]
    shared = gradients(linear_loss("distillation", **x), x)
    copied = gradients(linear_loss("distillation", **x, ref_head=x["weight"].detach().clone()), x)
    for a, b in zip(shared, copied, strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# Temperature


def test_temperature_is_the_heads_and_brings_no_factor():
    """`T^2 KL` tends to half of the variance of the logits' difference (Hinton et al., section 2.1): so it is the loss
    times T^2 that keeps its size, and the loss itself falls with T^2."""
    x = problem()
    difference = x["hidden"] @ x["weight"].T - x["ref_hidden"] @ x["ref_head"].T
    limit = difference.var(-1, correction=0) / 2
    for temperature in (1e2, 1e4):
        found = linear_loss("distillation", **x, temperature=temperature, reduction="none")
        kept = x["targets"] != -100
        torch.testing.assert_close(
            found[kept] * temperature**2, limit[kept], rtol=100 / temperature, atol=100 / temperature
        )


def test_each_head_may_have_its_own_temperature():
    x, loss = problem(), Distillation("skew_forward_kl")
    x["ref_head"] = Head(x["ref_head"], temperature=2.0)
    found = linear_loss(loss, **x, reduction="none", temperature=0.5)
    x["ref_head"] = x["ref_head"].weight
    torch.testing.assert_close(found, materialised(x, loss, 0.5, 2.0))


# ---------------------------------------------------------------------------------------------------------------------
# Peers


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("hard", [0.0, 0.5])
def test_liger_fused_linear_jsd(beta, hard):
    """Liger's default mixes half of the cross-entropy in; here it is added only when asked for."""
    jsd = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss")
    x = problem(torch.float32)
    theirs = jsd.LigerFusedLinearJSDLoss(
        weight_hard_loss=hard, weight_soft_loss=1 - hard, beta=beta, ignore_index=-100, compiled=False, chunk_size=4
    )(
        x["hidden"].flatten(0, 1),
        x["weight"],
        x["ref_hidden"].flatten(0, 1),
        x["ref_head"],
        x["targets"].flatten(),
    )
    loss = Distillation("js", mixture=beta, normalized=beta == 0, nll_weight=hard / (1 - hard))
    ours = linear_loss(loss, **x) * (1 - hard)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_torchs_kl_div():
    x = problem()
    log_q = (x["hidden"] @ x["weight"].T).log_softmax(-1)
    log_p = (x["ref_hidden"] @ x["ref_head"].T).log_softmax(-1)
    kept = x["targets"] != -100
    forward = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)[kept]
    reverse = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)[kept]
    torch.testing.assert_close(linear_loss("distillation", **x), forward.mean())
    torch.testing.assert_close(linear_loss(Distillation("reverse_kl"), **x), reverse.mean())


def test_distillms_symmetric_kl():
    """`(1 - lam) forward + lam reverse` with lam 0.9, whose forward part is a cross-entropy."""
    x = problem()
    log_q = (x["hidden"] @ x["weight"].T).log_softmax(-1)
    log_p = (x["ref_hidden"] @ x["ref_head"].T).log_softmax(-1)
    forward, reverse = -(log_p.exp() * log_q).sum(-1), (log_q.exp() * (log_q - log_p)).sum(-1)
    kept = x["targets"] != -100
    theirs = (0.1 * forward + 0.9 * reverse)[kept].mean()
    ours = linear_loss(Distillation("symmetric_kl", mixture=0.9), **x)
    entropy = -(log_p.exp() * log_p).sum(-1)[kept].mean()
    torch.testing.assert_close(ours, theirs - 0.1 * entropy)
    for a, b in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# GKD and SDFT


def gkd(x: dict[str, Tensor], beta: float) -> Tensor:
    """Per token, from the paper's definition on probabilities, with TRL's ends."""
    q, p = ((x[h] @ x[w].T).softmax(-1) for h, w in (("hidden", "weight"), ("ref_hidden", "ref_head")))

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    if beta in (0, 1):
        return kl(q, p) if beta else kl(p, q)
    mixture = beta * p + (1 - beta) * q
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


@pytest.mark.parametrize("beta", [0, 0.0, 0.01, 0.3, 0.5, 1.0])
def test_gkd_is_its_definition(beta):
    x = problem()
    expected = gkd(x, beta)[x["targets"] != -100].mean()
    found = linear_loss(GKD(beta), **x, chunk_bytes=700)
    torch.testing.assert_close(found, expected)
    for a, b in zip(gradients(found, x), gradients(expected, x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("end", "inside", "kind"), [(0, 1e-4, "forward_kl"), (1, 1 - 1e-4, "reverse_kl")])
def test_gkd_jumps_at_its_ends(end, inside, kind):
    x = problem(trainable=())
    torch.testing.assert_close(linear_loss(GKD(end), **x), linear_loss(Distillation(kind), **x))
    torch.testing.assert_close(linear_loss(GKD(inside), **x), 1e-4 * linear_loss(GKD(end), **x), rtol=0.01, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_trl_sdft(alpha, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    sdft = pytest.importorskip("trl.experimental.sdft.loss_utils")
    x = problem()
    student, teacher = (x[h] @ x[w].T for h, w in (("hidden", "weight"), ("ref_hidden", "ref_head")))
    each = sdft.compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=alpha)
    theirs = each[x["targets"] != -100].mean()
    ours = linear_loss(GKD(alpha), **x)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    for a, b in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# The loss itself


def test_it_reads_no_statistics_unless_nll_is_asked_for():
    assert Distillation().outputs == () and Distillation(nll_weight=0.1).outputs == ("logprob",)
    assert Distillation().level == "distribution" and losses.get("distillation") == Distillation()
    value = torch.tensor([0.3, 0.0], requires_grad=True)
    assert Distillation()(None, value) is value
    stats = TokenStats(logprob=torch.tensor([-1.0, -2.0]))
    torch.testing.assert_close(Distillation(nll_weight=0.5)(stats, value), torch.tensor([0.8, 1.0]))
    with pytest.raises(ValueError, match=r"reads stats\.logprob"):
        Distillation(nll_weight=0.5)(TokenStats(), value)


def test_the_parts_add_up():
    x = problem()
    mask = x["targets"] != -100
    parts = linear_divergence(x["hidden"], x["weight"], x["ref_hidden"], x["ref_head"], kind="js", mask=mask)
    logprob = linear_logprobs(x["hidden"], x["weight"], x["targets"]).logprob
    whole = linear_loss(Distillation("js", nll_weight=0.4), **x, reduction="none")
    torch.testing.assert_close(whole, parts - 0.4 * logprob)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(kind="kl"), ValueError, "kind: expected one of"),
    (dict(kind="js", mixture=0.0), ValueError, "normalized=True it is forward_kl at 0 and reverse_kl at 1"),
    (dict(kind="js", mixture=-0.1), ValueError, r"mixture: expected a number in \[0, 1\]"),
    (dict(kind="forward_kl", mixture=0.3), ValueError, "mixture: kind 'forward_kl' does not read it"),
    (dict(kind="skew_forward_kl", skew=1), ValueError, "skew: expected a number"),
    (dict(alpha=0.3), ValueError, "alpha: kind 'forward_kl' does not read it"),
    (dict(nll_weight=-1.0), ValueError, "Distillation: nll_weight must be a finite number"),
    (dict(nll_weight="half"), TypeError, "Distillation: nll_weight must be a number"),
]


@pytest.mark.parametrize(("fields", "error", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_hyper_parameters_are_checked(fields, error, message):
    with pytest.raises(error, match=message):
        Distillation(**fields)


@pytest.mark.parametrize(("beta", "error"), [(-0.1, ValueError), (1.1, ValueError), ("half", TypeError)])
def test_gkds_beta_is_checked(beta, error):
    with pytest.raises(error, match="GKD: beta must be a"):
        GKD(beta)


def test_the_teachers_states_are_needed():
    x = problem()
    del x["ref_hidden"]
    with pytest.raises(ValueError, match="ref_hidden: 'distillation' needs the reference's hidden states"):
        linear_loss("distillation", **x)
