"""The one-call losses against `F.cross_entropy` and against the pure losses on full logits."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import cases
from hypothesis import given, settings
from hypothesis import strategies as st

from logitless import (
    Head,
    linear_cross_entropy,
    linear_dft,
    linear_dpo,
    linear_f_divergence_sft,
    linear_logprobs,
    linear_loss,
)
from logitless.losses import DFT, DPO, NLL, FDivergenceSFT, sequence_logprob
from logitless.testing import (
    TokenProblem,
    assert_matches_float64,
    make_problem,
    materialised,
    measure,
    poison_empty,
)
from logitless.types import LogitTransform

# ---------------------------------------------------------------------------------------------------------------------
# Cross-entropy


def logits(p: TokenProblem) -> torch.Tensor:
    return F.linear(p.hidden, p.weight, p.bias).to(torch.promote_types(p.hidden.dtype, torch.float32))


def torch_cross_entropy(p: TokenProblem, class_weight=None, softcap=None, **options) -> torch.Tensor:
    """torch's own, on flat logits; 0 where it gives NaN for a mean of nothing."""
    weight = None if class_weight is None else class_weight.to(logits(p))
    z = logits(p) if softcap is None else softcap * torch.tanh(logits(p) / softcap)
    out = F.cross_entropy(z.reshape(-1, len(p.weight)), p.targets.reshape(-1), weight, **options)
    return out.reshape(p.targets.shape) if options.get("reduction") == "none" else out


def ours(p: TokenProblem, **options) -> torch.Tensor:
    return linear_cross_entropy(p.hidden, p.weight, p.targets, bias=p.bias, **options)


@pytest.mark.parametrize("with_classes", [False, True])
@settings(max_examples=80)
@given(
    case=cases(),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    backward=st.sampled_from(["auto", "recompute"]),
    softcap=st.sampled_from([None, 2.0]),
    backend=st.sampled_from(["auto", "auto", "reference"]),
)
def test_any_options_are_torchs(with_classes, case, label_smoothing, reduction, backward, softcap, backend):
    case = replace(case, transform=LogitTransform(softcap=softcap))
    problem = case.problem
    masked = problem.bias is not None and bool(problem.bias.isinf().any())
    if (masked and (label_smoothing or softcap)) or ((problem.targets == -100).all() and reduction == "mean"):
        return  # refused, and no mask beneath torch's tanh; NaN in torch
    classes = torch.rand(len(problem.weight)) + 0.1 if with_classes else None
    options = dict(label_smoothing=label_smoothing, reduction=reduction, softcap=softcap)
    call = dict(chunk_bytes=case.options["chunk_bytes"], backend=backend, backward=backward)
    with poison_empty():
        assert_matches_float64(
            lambda p: ours(p, **options, class_weight=classes, **call),
            lambda p: torch_cross_entropy(p, classes, **options),
            problem,
            # The smoothed part is a difference of two terms of the logits' size: rounding, not 0, where V is 1.
            scale=max(case.scale, case.bent_scale, 1.0 if label_smoothing else 0.0),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_class_weights_with_smoothing_keep_float32_accuracy(softcap, dtype):
    problem = make_problem((64,), 48, 200, dtype=dtype, bias=True)
    classes = torch.rand(200) * 5
    assert_matches_float64(
        lambda p: ours(p, class_weight=classes, label_smoothing=0.5, softcap=softcap, chunk_bytes=4 * 200 * 48),
        lambda p: torch_cross_entropy(p, classes, label_smoothing=0.5, softcap=softcap),
        problem,
    )


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("trainable", [("hidden",), ("weight", "bias"), ("hidden", "weight", "bias")], ids=str)
def test_class_weights_under_scale_and_temperature(trainable, reduction, softcap):
    problem = make_problem((6,), 4, 9, dtype=torch.float64, bias=True, ignored=0.3, trainable=trainable)
    classes = torch.rand(9)
    options = dict(label_smoothing=0.2, reduction=reduction)

    def expected(p):
        z = logits(p) * 1.7
        z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / 0.6
        return F.cross_entropy(z, p.targets, classes.to(z), **options)

    assert_matches_float64(
        lambda p: ours(p, class_weight=classes, logit_scale=1.7, temperature=0.6, softcap=softcap, **options),
        expected,
        problem,
    )


def test_class_weights_z_loss_and_token_weights_together():
    problem = make_problem((2, 5), 4, 9, dtype=torch.float64, ignored=0.3)
    classes, tokens = torch.rand(9), torch.rand(2, 5)

    def expected(p):
        flat = p.targets.reshape(-1)
        per_token = F.cross_entropy(
            logits(p).reshape(-1, 9), flat, classes.double(), label_smoothing=0.2, reduction="none"
        )
        per_token = per_token + 0.01 * torch.where(flat != -100, logits(p).logsumexp(-1).reshape(-1).square(), 0)
        own = classes.double()[flat.clamp(min=0)][flat != -100]
        return (per_token * tokens.reshape(-1)).sum() / own.sum()

    assert_matches_float64(
        lambda p: ours(p, class_weight=classes, token_weight=tokens, z_loss=0.01, label_smoothing=0.2),
        expected,
        problem,
    )


def test_class_weights_read_no_ignored_token():
    problem = make_problem((6,), 4, 9, bias=True)
    problem.targets[[0, 3]] = -100
    with torch.no_grad():
        problem.hidden[[0, 3]] = math.nan
    found = measure(lambda p: ours(p, class_weight=torch.rand(9), label_smoothing=0.1), problem)
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_z_loss_and_token_weights(reduction, z_loss, label_smoothing):
    problem = make_problem((2, 5), 4, 9, bias=True, ignored=0.3)
    weights = torch.rand(2, 5)

    def expected(p):
        per_token = torch_cross_entropy(p, reduction="none", label_smoothing=label_smoothing)
        counts = p.targets != -100
        per_token = weights * (per_token + z_loss * torch.where(counts, logits(p).logsumexp(-1).square(), 0))
        return {"none": per_token, "sum": per_token.sum(), "mean": per_token.sum() / counts.sum()}[reduction]

    assert_matches_float64(
        lambda p: ours(
            p, z_loss=z_loss, token_weight=weights, reduction=reduction, label_smoothing=label_smoothing, chunk_bytes=80
        ),
        expected,
        problem,
    )


@pytest.mark.parametrize("class_weight", [None, torch.linspace(0.1, 1.0, 9)])
@pytest.mark.parametrize("normalizer", [3, 7.5, torch.tensor(12)])
def test_normalizer(class_weight, normalizer):
    problem = make_problem((6,), 4, 9, ignored=0.3)
    total = ours(problem, reduction="sum", class_weight=class_weight)
    found = ours(problem, normalizer=normalizer, class_weight=class_weight)
    torch.testing.assert_close(found, total / normalizer)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"class_weight": torch.linspace(0.1, 1.0, 9)}])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 2, 3)])
def test_shift(shape, reduction, options):
    problem = make_problem(shape, 4, 9, ignored=0.3)
    weights = torch.rand(shape)
    found = measure(lambda p: ours(p, shift=True, reduction=reduction, token_weight=weights, **options), problem)
    expected = measure(
        lambda p: linear_cross_entropy(
            p.hidden[..., :-1, :], p.weight, p.targets[..., 1:], reduction=reduction, token_weight=weights[..., 1:],
            **options,
        ),
        problem,
    )  # fmt: skip
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_shift_of_a_single_token_is_nothing():
    problem = make_problem((2, 1), 4, 9)
    assert ours(problem, shift=True).item() == 0
    assert ours(problem, shift=True, reduction="none").shape == (2, 0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "class_weight": torch.ones(5)}, {"z_loss": 0.1}])
@pytest.mark.parametrize("shape", [(4,), (0,), (2, 0)])
def test_all_ignored_is_zero_and_connected(shape, options, reduction):
    problem = make_problem(shape, 3, 5, bias=True, ignored=1.0)
    loss = ours(problem, reduction=reduction, **options)
    assert (loss == 0).all()
    loss.sum().backward()
    for leaf in (problem.hidden, problem.weight, problem.bias):
        assert leaf.grad is not None and (leaf.grad == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_ignore_index_and_nothing_of_the_callers_changes(reduction):
    problem = make_problem((6,), 4, 9)
    target = int(problem.targets[2])
    classes, tokens = torch.rand(9), torch.rand(6)
    before = [x.clone() for x in (problem.targets, classes, tokens)]
    weights = dict(class_weight=classes, token_weight=tokens)
    found = ours(problem, ignore_index=target, shift=True, reduction=reduction, **weights)
    found.sum().backward()
    assert found.isfinite().all()
    for now, then in zip((problem.targets, classes, tokens), before, strict=True):
        assert torch.equal(now, then)


def test_gradcheck_of_cross_entropy():
    problem = make_problem((5,), 3, 8, dtype=torch.float64, bias=True, ignored=0.3)
    classes, tokens = torch.rand(8), torch.rand(5)
    for class_weight, reduction, softcap in itertools.product([None, classes], ["mean", "none"], [None, 1.5]):

        def function(hidden, weight, bias, class_weight=class_weight, reduction=reduction, softcap=softcap):
            return linear_cross_entropy(
                hidden, weight, problem.targets, bias=bias, label_smoothing=0.1, z_loss=0.01, token_weight=tokens,
                class_weight=class_weight, reduction=reduction, softcap=softcap, chunk_bytes=100,
            )  # fmt: skip

        assert torch.autograd.gradcheck(function, (problem.hidden, problem.weight, problem.bias))


# ---------------------------------------------------------------------------------------------------------------------
# Token and sequence losses of the registry


TOKEN_LOSSES = [
    NLL(),
    NLL(label_smoothing=0.1, z_loss=0.01),
    DFT(),
    DFT(power=0.5),
    FDivergenceSFT(),
    FDivergenceSFT(divergence="forward_kl", beta=0.5),
    FDivergenceSFT(divergence="js"),
    FDivergenceSFT(divergence="alpha", alpha=0.3),
    FDivergenceSFT(divergence="pearson_chi2", saturate=True, beta=2.0),
    FDivergenceSFT(value="lse"),
    FDivergenceSFT(value="lse", divergence="squared_hellinger"),
]


def reference_inputs(loss, shape) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {name: -2 * torch.rand(shape, generator=draw) for name in loss.inputs}


@pytest.mark.parametrize("loss", TOKEN_LOSSES, ids=str)
@settings(max_examples=15)
@given(
    case=cases(dtypes=(torch.float64, torch.float32, torch.bfloat16)),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    backward=st.sampled_from(["auto", "recompute"]),
)
def test_any_loss_against_float64(loss, case, reduction, backward):
    problem = case.problem
    masked = problem.bias is not None and bool(problem.bias.isinf().any())
    if problem.targets.dim() == 0 or (masked and "mean_logit" in loss.outputs):
        return
    inputs = reference_inputs(loss, problem.targets.shape)
    counts = problem.targets != -100
    flat = problem.targets.dim() == 1 and loss.of_sequences  # one sequence, which has to be said
    boundaries = {"cu_seqlens": torch.tensor([0, len(problem.targets)])} if flat else {}

    def expected(p):
        stats = materialised(p, case.transform, outputs=loss.outputs)
        extra = {"mask": counts} if not loss.token_wise else {}
        per_token = torch.where(counts, loss(stats, *inputs.values(), **extra), 0)
        if reduction == "none":
            return per_token
        return per_token.sum() / (max(int(counts.sum()), 1) if reduction == "mean" else 1)

    def compute(p):
        return linear_loss(
            loss, p.hidden, p.weight, p.targets, bias=p.bias, reduction=reduction, backward=backward, **inputs,
            **boundaries, **case.options,
        )  # fmt: skip

    assert_matches_float64(compute, expected, problem, scale=case.scale_of(loss.outputs))


def test_shortcuts_are_the_losses():
    problem = make_problem((2, 6), 4, 9, ignored=0.3)
    arguments = (problem.hidden, problem.weight, problem.targets)
    ref, ref_lse, weights = -torch.rand(2, 6), torch.rand(2, 6), torch.rand(2, 6)
    pairs = [
        (linear_dft(*arguments, power=0.7), linear_loss(DFT(power=0.7), *arguments)),
        (linear_dft(*arguments, token_weight=weights), linear_loss("dft", *arguments, token_weight=weights)),
        (
            linear_f_divergence_sft(*arguments, ref, divergence="js", beta=0.3),
            linear_loss(FDivergenceSFT(divergence="js", beta=0.3), *arguments, ref_logprob=ref),
        ),
        (
            linear_f_divergence_sft(*arguments, ref, value="lse", ref_lse=ref_lse),
            linear_loss(FDivergenceSFT(value="lse"), *arguments, ref_logprob=ref, ref_lse=ref_lse),
        ),
        (linear_cross_entropy(*arguments), linear_loss("nll", *arguments)),
    ]
    for shortcut, loss in pairs:
        assert torch.equal(shortcut, loss) and shortcut.requires_grad


@pytest.mark.parametrize("loss", [DFT(), FDivergenceSFT(), FDivergenceSFT(value="lse")], ids=str)
def test_token_weight(loss):
    problem = make_problem((2, 6), 4, 9, ignored=0.3)
    inputs, weights = reference_inputs(loss, (2, 6)), torch.rand(2, 6)

    def compute(p, **options):
        return linear_loss(loss, p.hidden, p.weight, p.targets, **inputs, **options)

    found = measure(lambda p: compute(p, token_weight=weights, reduction="sum"), problem)
    expected = measure(lambda p: (weights * compute(p, reduction="none")).sum(), problem)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_flat_sequences_are_the_padded_ones():
    """`value="lse"` looks at the next token: cu_seqlens keeps it within its sequence."""
    loss = FDivergenceSFT(value="lse")
    problem = make_problem((3, 4), 5, 9)
    problem.targets[1, 2:] = -100
    inputs = reference_inputs(loss, (3, 4))
    arguments = (problem.hidden, problem.weight, problem.targets)
    padded = linear_loss(loss, *arguments, reduction="none", **inputs)
    flat = linear_loss(
        loss,
        problem.hidden.reshape(-1, 5),
        problem.weight,
        problem.targets.reshape(-1),
        cu_seqlens=torch.tensor([0, 4, 8, 12]),
        reduction="none",
        **{k: v.reshape(-1) for k, v in inputs.items()},
    )
    torch.testing.assert_close(flat.reshape(3, 4), padded)


# ---------------------------------------------------------------------------------------------------------------------
# DPO


DPO_LOSSES = [
    dict(),
    dict(beta=0.5, label_smoothing=0.1),
    dict(loss_type="hinge"),
    dict(loss_type="ipo"),
    dict(divergence="forward_kl"),
    dict(divergence="js"),
    dict(divergence="alpha", alpha=0.3),
    dict(loss_type="hinge", divergence="js"),
]


def pairs_problem(batch=3, length=4, dtype=torch.float32, trainable=("hidden", "weight", "bias"), **options: Any):
    options |= dict(dtype=dtype, trainable=trainable)
    problem = make_problem((2 * batch, length), 5, 11, bias=True, ignored=0.3, **options)
    return problem, -2 * torch.rand(2 * batch, length)


def dpo_oracle(p: TokenProblem, ref: torch.Tensor, transform=None, reduction="mean", **hyper) -> torch.Tensor:
    loss = DPO(**hyper)
    logprob = materialised(p, transform).logprob
    mask = p.targets != -100
    ours, theirs = (
        sequence_logprob(torch.where(mask, x, 0), mask=mask, average=loss.average_logprob)
        for x in (logprob, ref.to(logprob))
    )
    b = len(ours) // 2
    per_pair = loss(ours[:b], ours[b:], theirs[:b], theirs[b:]).loss
    return {"none": per_pair, "sum": per_pair.sum(), "mean": per_pair.mean()}[reduction]


@pytest.mark.parametrize("hyper", DPO_LOSSES, ids=str)
@pytest.mark.parametrize("trainable", [("hidden",), ("weight",), ("hidden", "weight", "bias")], ids=str)
@pytest.mark.parametrize("budget", [1, 11 * 4 * 8, None])
def test_dpo_against_float64(hyper, trainable, budget):
    """Frozen head; pairs that fit a chunk of 8 tokens; pairs larger than the budget, a token a chunk."""
    problem, ref = pairs_problem(trainable=trainable)
    for reduction in ("mean", "sum", "none"):
        assert_matches_float64(
            lambda p, reduction=reduction: linear_dpo(
                p.hidden, p.weight, p.targets, bias=p.bias, ref_logprob=ref, reduction=reduction, chunk_bytes=budget,
                **hyper,
            ).loss,
            lambda p, reduction=reduction: dpo_oracle(p, ref, reduction=reduction, **hyper),
            problem,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("backward", ["auto", "single_pass", "recompute"])
def test_dpo_strategies_and_dtypes(dtype, softcap, backward):
    problem, ref = pairs_problem(dtype=dtype)
    transform = LogitTransform(1.3, softcap, 0.7)
    assert_matches_float64(
        lambda p: (
            linear_dpo(
                p.hidden, p.weight, p.targets, bias=p.bias, ref_logprob=ref, backward=backward, **vars(transform)
            ).loss
        ),
        lambda p: dpo_oracle(p, ref, transform),
        problem,
    )


def flat(problem: TokenProblem, ref: torch.Tensor, lengths: list[int]):
    """The first `lengths[i]` tokens of each row, behind one another."""
    keep = torch.arange(problem.targets.shape[1]) < torch.tensor(lengths)[:, None]
    tokens = problem._replace(
        hidden=problem.hidden.detach()[keep].requires_grad_(problem.hidden.requires_grad), targets=problem.targets[keep]
    )
    padded = problem._replace(targets=problem.targets.masked_fill(~keep, -100))
    return tokens, padded, ref[keep], torch.tensor([0, *itertools.accumulate(lengths)]), keep


@pytest.mark.parametrize("lengths", [[4, 3, 2, 1, 4, 4], [4, 0, 2, 3, 0, 1], [0, 0, 4, 0, 2, 0], [0] * 6, [4] * 6])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("trainable", [("hidden",), ("hidden", "weight", "bias")], ids=str)
@pytest.mark.parametrize("budget", [1, 11 * 4 * 8, None])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_dpo_flat_is_dpo_padded(lengths, loss_type, trainable, budget, dtype):
    """Empty sequences and empty pairs included."""
    problem, ref = pairs_problem(trainable=trainable)
    tokens, padded, flat_ref, cu_seqlens, keep = flat(problem, ref, lengths)
    options = dict(loss_type=loss_type, chunk_bytes=budget)

    def run(p, ref, **more):
        return linear_dpo(p.hidden, p.weight, p.targets, bias=p.bias, ref_logprob=ref, **options, **more)

    expected, found = run(padded, ref), run(tokens, flat_ref, cu_seqlens=cu_seqlens.to(dtype))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    a = measure(lambda p: run(p, flat_ref, cu_seqlens=cu_seqlens.to(dtype)).loss, tokens)
    b = measure(lambda p: run(p, ref).loss, padded)
    b["d_hidden"] = b["d_hidden"][keep]
    for name in b:
        torch.testing.assert_close(a[name], b[name])


@pytest.mark.parametrize("backward", ["auto", "recompute", "single_pass"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_dpo_of_nothing(backward, loss_type):
    problem, ref = pairs_problem()
    ignored = torch.full_like(problem.targets, -100)
    result = linear_dpo(
        problem.hidden, problem.weight, ignored, ref_logprob=ref, loss_type=loss_type, backward=backward
    )
    result.loss.backward()
    assert (problem.weight.grad == 0).all() and (problem.hidden.grad == 0).all()
    assert result.loss.item() == pytest.approx(math.log(2) if loss_type == "sigmoid" else 25.0)
    for shape in ((0, 3), (4, 0)):
        empty = make_problem(shape, 5, 11)
        loss = linear_dpo(
            empty.hidden, empty.weight, empty.targets, ref_logprob=torch.zeros(shape), backward=backward
        ).loss
        loss.backward()
        assert loss.item() == pytest.approx(0.0 if shape[0] == 0 else math.log(2))
        assert (empty.weight.grad == 0).all()


def test_dpo_metrics():
    problem, ref = pairs_problem()
    arguments = (problem.hidden, problem.weight, problem.targets)
    stats = linear_logprobs(*arguments)
    mask = problem.targets != -100
    logprob, reference = stats.logprob.detach().sum(-1), torch.where(mask, ref, 0).sum(-1)
    for options in ({}, {"backward": "recompute"}, {"reduction": "none"}):
        result = linear_dpo(*arguments, ref_logprob=ref, beta=0.3, **options)
        torch.testing.assert_close(result.chosen_logprob, logprob[:3])
        torch.testing.assert_close(result.rejected_logprob, logprob[3:])
        torch.testing.assert_close(result.chosen_reward, 0.3 * (logprob - reference)[:3])
        torch.testing.assert_close(result.rejected_reward, 0.3 * (logprob - reference)[3:])
        torch.testing.assert_close(result.margin, result.chosen_reward - result.rejected_reward)
        assert torch.equal(result.accuracy, (result.margin > 0).float())
        assert not any(x.requires_grad for x in result[1:]) and result.loss.requires_grad
        assert all(x.shape == (3,) for x in result[1:])


@pytest.mark.parametrize("trainable", [("hidden",), ("hidden", "weight", "bias")], ids=str)
def test_dpo_reference_hidden_states(trainable):
    problem, _ = pairs_problem(trainable=trainable)
    arguments = (problem.hidden, problem.weight, problem.targets)
    ref_hidden = torch.randn(6, 4, 7, requires_grad=True)
    head = Head(torch.randn(11, 7, requires_grad=True), torch.randn(11), softcap=5.0)
    scored = linear_logprobs(ref_hidden, head.weight, problem.targets, bias=head.bias, softcap=5.0).logprob.detach()
    expected = linear_dpo(*arguments, ref_logprob=scored)
    found = linear_dpo(*arguments, ref_hidden=ref_hidden, ref_head=head)
    assert torch.equal(found.loss, expected.loss)
    found.loss.backward()
    assert ref_hidden.grad is None and head.weight.grad is None
    plain = linear_dpo(*arguments, ref_hidden=ref_hidden, ref_head=head.weight, temperature=2.0)
    scored = linear_logprobs(ref_hidden, head.weight, problem.targets, temperature=2.0).logprob.detach()
    assert torch.equal(plain.loss, linear_dpo(*arguments, ref_logprob=scored, temperature=2.0).loss)
    own = torch.randn(6, 4, 5)
    scored = linear_logprobs(own, problem.weight, problem.targets).logprob.detach()
    found = linear_dpo(*arguments, ref_hidden=own)
    assert torch.equal(found.loss, linear_dpo(*arguments, ref_logprob=scored).loss)


@pytest.mark.parametrize("trainable", [("hidden",), ("hidden", "weight", "bias")], ids=str)
@pytest.mark.parametrize("normalizer", [7, torch.tensor(2.5)])
def test_dpo_normalizer(trainable, normalizer):
    problem, ref = pairs_problem(trainable=trainable)
    arguments = dict(hidden=problem.hidden, weight=problem.weight, targets=problem.targets, ref_logprob=ref)
    total = linear_dpo(**arguments, reduction="sum").loss
    torch.testing.assert_close(linear_dpo(**arguments, normalizer=normalizer).loss, total / normalizer)


@pytest.mark.parametrize("budget", [1, 11 * 4 * 8, None])
def test_dpo_backward_twice_and_create_graph(budget):
    problem, ref = pairs_problem()
    leaves = (problem.hidden, problem.weight)
    loss = linear_dpo(problem.hidden, problem.weight, problem.targets, ref_logprob=ref, chunk_bytes=budget).loss
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in "12")
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, leaves, create_graph=True)


def test_dpo_reads_no_ignored_token():
    problem, ref = pairs_problem()
    skip = problem.targets == -100
    with torch.no_grad():
        problem.hidden[skip], ref[skip] = math.nan, math.nan
    for trainable in (True, False):
        problem.weight.requires_grad_(trainable)
        found = measure(lambda p: linear_dpo(p.hidden, p.weight, p.targets, ref_logprob=ref).loss, problem)
        assert all(x.isfinite().all() for x in found.values())


def test_dpo_nan_reaches_the_loss():
    problem, ref = pairs_problem()
    problem.targets[0, 0] = 3
    with torch.no_grad():
        problem.hidden[0, 0, 0] = math.nan
    assert linear_dpo(problem.hidden, problem.weight, problem.targets, ref_logprob=ref).loss.isnan()


def test_dpo_under_autocast_is_a_cast():
    problem, ref = pairs_problem()

    def under_autocast(p):
        with torch.autocast("cpu", torch.bfloat16):
            return linear_dpo(p.hidden, p.weight, p.targets, ref_logprob=ref).loss

    def cast(p):
        return linear_dpo(p.hidden.bfloat16(), p.weight.bfloat16(), p.targets, ref_logprob=ref).loss

    found, expected = measure(under_autocast, problem), measure(cast, problem)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_dpo_gradcheck():
    problem, ref = pairs_problem(dtype=torch.float64)
    for budget in (1, None):

        def function(hidden, weight, bias, budget=budget):
            return linear_dpo(
                hidden, weight, problem.targets, bias=bias, ref_logprob=ref, beta=0.5, chunk_bytes=budget
            ).loss

        assert torch.autograd.gradcheck(function, (problem.hidden, problem.weight, problem.bias))


@pytest.mark.parametrize("loss", ["dpo", *[x for x in TOKEN_LOSSES if x.token_wise]], ids=str)
def test_the_reference_backend_runs_every_loss(loss):
    problem, ref = pairs_problem()
    inputs = {"ref_logprob": ref} if loss == "dpo" or loss.inputs else {}

    def compute(p, backend):
        out = linear_loss(loss, p.hidden, p.weight, p.targets, backend=backend, **inputs)
        return out.loss if loss == "dpo" else out

    found, expected = (measure(lambda p, b=b: compute(p, b), problem) for b in ("auto", "reference"))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
