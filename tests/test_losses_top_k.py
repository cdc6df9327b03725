"""`TopKDistillation`: its definition on full distributions, its bounds and limits, and TRL's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from logitless import TokenStats, linear_logprobs, linear_loss, linear_top_k, losses
from logitless.losses import TopKDistillation
from logitless.losses.distillation.top_k import LEAST_TAIL

KINDS = ("forward_kl", "reverse_kl", "mixed_kl", "cross_entropy")
N, H, V, K = 7, 4, 12, 3


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and head of a model, log-probs `[N, V]` of a teacher, and its likeliest ids."""
    draw = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((N, H), (V, H)))
    teacher = (2 * torch.randn(N, V, generator=draw, dtype=torch.float64)).log_softmax(-1)
    return hidden.requires_grad_(), weight.requires_grad_(), teacher, teacher.topk(K).indices


def outcomes(logp: Tensor, ids: Tensor, unlisted: str) -> list[list[float]]:
    """The probabilities that are compared, token by token, in plain numbers."""
    rows = []
    for row, listed in zip(logp.exp().tolist(), ids.tolist(), strict=True):
        p = [row[i] for i in listed if i >= 0]
        if unlisted == "bucket":
            p.append(sum(x for i, x in enumerate(row) if i not in listed))
        if unlisted == "renormalized":
            p = [x / sum(p) for x in p]
        rows.append(p)
    return rows


def stated(kind: str, p: list[float], q: list[float], mixture: float) -> float:
    forward = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    reverse = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    entropy = -sum(a * math.log(a) for a in p)
    return {
        "forward_kl": forward,
        "reverse_kl": reverse,
        "mixed_kl": mixture * forward + (1 - mixture) * reverse,
        "cross_entropy": forward + entropy,
    }[kind]


def allowed(kind: str, unlisted: str) -> bool:
    return unlisted != "left_out" or kind in ("forward_kl", "cross_entropy")


CASES = [(k, u) for k in KINDS for u in ("bucket", "renormalized", "left_out") if allowed(k, u)]


@pytest.mark.parametrize(("kind", "unlisted"), CASES)
@pytest.mark.parametrize("tail", [False, True])
def test_its_definition(kind, unlisted, tail):
    hidden, weight, teacher, ids = problem()
    ids[2, 1:] = -1
    ids[4, 2] = -100
    given = teacher.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, 7.0)  # nonsense where nothing is listed
    inputs = {"teacher_logprob": given}
    if tail and unlisted == "bucket":
        inputs["teacher_tail"] = (
            torch.tensor(outcomes(teacher, ids, "bucket")[0][-1:])
            .log()
            .new_tensor([math.log(p[-1]) for p in outcomes(teacher, ids, "bucket")])
        )
    loss = TopKDistillation(kind, unlisted, mixture=0.3)
    found = linear_loss(loss, hidden, weight, ids, reduction="none", **inputs)
    model = (hidden @ weight.T).log_softmax(-1)
    pairs = zip(*(outcomes(x, ids, unlisted) for x in (teacher, model)), strict=True)
    expected = [stated(kind, p, q, 0.3) for p, q in pairs]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("kind", "unlisted"), CASES)
def test_gradcheck(kind, unlisted):
    hidden, weight, teacher, ids = problem(1)
    loss = TopKDistillation(kind, unlisted)

    def value(hidden, weight, backend):
        given = teacher.gather(-1, ids)
        return linear_loss(loss, hidden, weight, ids, teacher_logprob=given, reduction="none", backend=backend)

    for backend in ("chunked", "reference"):
        assert torch.autograd.gradcheck(lambda h, w: value(h, w, backend), (hidden, weight))  # noqa: B023


@pytest.mark.parametrize(("kind", "unlisted"), CASES)
def test_the_teacher_itself_is_the_minimum(kind, unlisted):
    hidden, weight, _, _ = problem(2)
    top = linear_top_k(hidden, weight, K)
    tail = {"teacher_tail": top.tail} if unlisted == "bucket" else {}
    loss = TopKDistillation(kind, unlisted)
    found = linear_loss(loss, hidden, weight, top.ids, teacher_logprob=top.logprob, **tail)
    if kind != "cross_entropy":
        torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)
    if unlisted != "left_out":  # whose listed sum falls when mass moves into the list
        for gradient in torch.autograd.grad(found, (hidden, weight)):
            assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_a_list_of_everything_is_the_divergence_of_distributions(kind):
    hidden, weight, teacher, _ = problem(3)
    ids = torch.arange(V).expand(N, V)
    model = (hidden @ weight.T).log_softmax(-1)
    p, q = (teacher, model) if kind == "forward_kl" else (model, teacher)
    full = (p.exp() * (p - q)).sum(-1)
    for unlisted in ("bucket", "renormalized"):
        found = linear_loss(
            TopKDistillation(kind, unlisted), hidden, weight, ids, teacher_logprob=teacher, reduction="none"
        )
        torch.testing.assert_close(found, full)
        close = zip(
            *(torch.autograd.grad(x.sum(), (hidden, weight), retain_graph=True) for x in (found, full)), strict=True
        )
        for a, b in close:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_more_ids_are_nearer_to_the_divergence_of_distributions(kind):
    """Merging outcomes loses information: the bucket's value rises with the list, up to the full divergence."""
    hidden, weight, teacher, _ = problem(4)
    values = []
    for k in range(1, V + 1):
        top = teacher.topk(k)
        loss = TopKDistillation(kind)
        inputs = dict(teacher_logprob=top.values, reduction="none")
        values.append(linear_loss(loss, hidden, weight, top.indices, **inputs).detach())
    rises = torch.stack(values).diff(dim=0)
    assert rises.min() > -1e-12 and rises.max() > 1e-3


def test_nothing_reaches_the_teacher_and_nothing_else_is_detached():
    stats = TokenStats(
        logprob=torch.tensor([[-1.0, -2.0]], requires_grad=True), tail=torch.tensor([-0.7], requires_grad=True)
    )
    teacher = torch.tensor([[-0.5, -1.5]], requires_grad=True)
    TopKDistillation("mixed_kl")(stats, teacher).sum().backward()
    assert teacher.grad is None
    assert stats.logprob.grad.all() and stats.tail.grad.all()
    with pytest.raises(ValueError, match=r"teacher_logprob: .*requires one; detach it"):
        linear_loss(
            "top_k_distillation", torch.randn(1, 3), torch.randn(5, 3), torch.tensor([[0, 1]]), teacher_logprob=teacher
        )


@pytest.mark.parametrize(("kind", "unlisted"), CASES)
def test_extremes_are_finite(kind, unlisted):
    """A confident student, a confident teacher, ids that the teacher gives nothing, listed mass of 1 by rounding."""
    hidden = torch.tensor([[60.0, 0.0], [0.0, 0.0], [-60.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5], [0.0, -1.0]], requires_grad=True)
    ids = torch.tensor([[0, 1], [2, 3], [0, 1]])
    given = torch.tensor([[0.0, -math.inf], [-1e-8, -40.0], [-80.0, 0.0]])
    loss = linear_loss(TopKDistillation(kind, unlisted), hidden, weight, ids, teacher_logprob=given, reduction="none")
    assert loss.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), (hidden, weight)))


def test_a_tail_within_rounding_is_no_less_than_float32s():
    stats = TokenStats(logprob=torch.tensor([[-0.5, -1.0]]), tail=torch.tensor([-3.0]))
    found = TopKDistillation("reverse_kl")(stats, torch.tensor([[0.0, -math.inf]]))
    p, q = [1.0, LEAST_TAIL], [math.exp(x) for x in (-0.5, -3.0)]
    expected = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_its_value_from_statistics_of_a_call():
    hidden, weight, teacher, ids = problem(5)
    loss = TopKDistillation("mixed_kl", mixture=0.8)
    stats = linear_logprobs(hidden, weight, ids, outputs=loss.outputs)
    expected = loss(stats, teacher.gather(-1, ids)).mean()
    torch.testing.assert_close(
        linear_loss(loss, hidden, weight, ids, teacher_logprob=teacher.gather(-1, ids)), expected
    )


@pytest.mark.parametrize(("beta", "kind"), [(0, "forward_kl"), (1, "reverse_kl")])
@pytest.mark.parametrize("bucket", [True, False])
def test_trls_server_distillation(beta, kind, bucket):
    trl = pytest.importorskip("trl.experimental.server_distillation.server_distillation_trainer")
    hidden, weight, teacher, ids = problem(6)
    given = teacher.gather(-1, ids)
    student = (hidden @ weight.T).log_softmax(-1).gather(-1, ids)
    mask = torch.ones_like(ids, dtype=torch.bool)
    if bucket:
        (student, support), (target, _) = (trl._add_tail_bucket(x, mask) for x in (student, given))
    else:
        student, target, support = student.log_softmax(-1), given.log_softmax(-1), mask
    expected = trl._jsd_divergence(student, target, beta, support).sum(-1)
    loss = TopKDistillation(kind, "bucket" if bucket else "renormalized")
    found = linear_loss(loss, hidden, weight, ids, teacher_logprob=given, reduction="none")
    torch.testing.assert_close(found, expected)


def test_hyper_parameters_are_checked():
    with pytest.raises(ValueError, match="unlisted: 'left_out' makes 'reverse_kl' fall without bound"):
        TopKDistillation("reverse_kl", "left_out")
    with pytest.raises(ValueError, match="TopKDistillation: kind must be one of"):
        TopKDistillation("js")
    with pytest.raises(ValueError, match="TopKDistillation: mixture must be a finite number"):
        TopKDistillation("mixed_kl", mixture=1.5)
    assert losses.get("top_k_distillation", unlisted="renormalized").outputs == ("logprob",)
