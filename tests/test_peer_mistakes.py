"""Behaviours that one or the other library of this kind got wrong, one test or more for each.

Two mistakes are left out, because the package has no such feature: gradients of a vocabulary-parallel head, and heads
sharded by ZeRO-3. Heads behind LoRA or sharded by FSDP are tested with the patch (`test_patch.py`).
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import logitless
from logitless.testing import make_problem, measure

BACKWARDS = ["auto", "recompute"]


def full_logprob(hidden, weight, targets):
    return torch.log_softmax((hidden @ weight.T).double(), -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]


# 1. The upstream gradient of each token is folded in before the sum over tokens.


@pytest.mark.parametrize("trainable", [("hidden",), ("weight",), ("hidden", "weight")], ids=str)
@pytest.mark.parametrize("function", ["logprobs", "cross_entropy", "dft"])
def test_per_token_upstream_gradients_with_the_first_token_ignored(function, trainable):
    problem = make_problem((12,), 5, 30, trainable=trainable)
    problem.targets[0] = -100
    upstream = torch.randn(12)

    def ours(p):
        if function == "logprobs":
            per_token = -logitless.linear_logprobs(p.hidden, p.weight, p.targets, chunk_bytes=500).logprob
        elif function == "dft":
            per_token = logitless.linear_dft(p.hidden, p.weight, p.targets, reduction="none", chunk_bytes=500)
        else:
            per_token = logitless.linear_cross_entropy(p.hidden, p.weight, p.targets, reduction="none", chunk_bytes=500)
        return (upstream * per_token).sum()

    def expected(p):
        logprob = full_logprob(p.hidden, p.weight, p.targets)
        weight = logprob.detach().exp() if function == "dft" else 1
        return (upstream * torch.where(p.targets != -100, -weight * logprob, 0)).sum().float()

    found, exact = measure(ours, problem), measure(expected, problem)
    for name in exact:
        torch.testing.assert_close(found[name], exact[name])


# 2. The mean counts the tokens that count, by an independent reference; nothing to count gives 0 with a graph.


@pytest.mark.parametrize("backward", BACKWARDS)
def test_the_mean_is_over_tokens_that_count(backward):
    problem = make_problem((4, 8), 5, 30, ignored=0.6)
    found = logitless.linear_cross_entropy(problem.hidden, problem.weight, problem.targets, backward=backward)
    expected = F.cross_entropy((problem.hidden @ problem.weight.T).flatten(0, 1), problem.targets.flatten())
    torch.testing.assert_close(found, expected)
    logprob = full_logprob(problem.hidden, problem.weight, problem.targets)
    torch.testing.assert_close(found, -logprob[problem.targets != -100].mean().float())


def test_all_ignored_is_zero_with_a_graph():
    problem = make_problem((6,), 4, 9, ignored=1.0)
    loss = logitless.linear_cross_entropy(problem.hidden, problem.weight, problem.targets)
    loss.backward()
    assert loss.item() == 0
    assert (problem.hidden.grad == 0).all() and (problem.weight.grad == 0).all()


# 3. The weight's gradient is summed in float32 over any number of chunks.


@pytest.mark.parametrize("backward", BACKWARDS)
def test_a_thousand_chunks_lose_no_digit_in_bf16(backward):
    """Every token adds the same small amount: a bf16 sum stands still after 256 of them."""
    tokens = 1000
    hidden = torch.ones(tokens, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.long)
    loss = logitless.linear_cross_entropy(hidden, weight, targets, reduction="sum", backward=backward, chunk_bytes=1)
    loss.backward()
    assert weight.grad[:, 0].tolist() == [-500.0, 500.0]


# 4. The target's entry is right near p = 1.


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_margin_of_twenty_nats(dtype, trainable):
    """log p = -9 exp(-20), and its gradient: exactly 0 where p - 1 or z - lse is rounded."""
    weight = torch.zeros(10, 1, dtype=dtype)
    weight[3] = 20.0
    weight.requires_grad_(trainable)
    hidden = torch.ones(1, 1, dtype=dtype, requires_grad=True)
    logprob = logitless.linear_logprobs(hidden, weight, torch.tensor([3])).logprob
    logprob.sum().backward()
    wrong = 9 * math.exp(-20)
    assert logprob.item() == pytest.approx(-wrong, rel=1e-6)
    assert hidden.grad.item() == pytest.approx(20 * wrong, rel=1e-5 if dtype == torch.float32 else 4e-3)
    if trainable:
        assert weight.grad[3].item() == pytest.approx(wrong, rel=1e-5 if dtype == torch.float32 else 4e-3)


# 5. Every transform of the logits is applied in forward and backward.


@pytest.mark.parametrize(
    "option",
    [{"softcap": 3.0}, {"logit_scale": 0.3}, {"temperature": 0.5}, {"bias": torch.linspace(-1, 1, 9)}],
    ids=str,
)
@pytest.mark.parametrize("function", ["logprobs", "cross_entropy", "dft", "f_divergence", "dpo"])
@pytest.mark.parametrize("trainable", [("hidden",), ("hidden", "weight")], ids=str)
def test_transforms_are_in_value_and_gradient(function, option, trainable):
    problem = make_problem((4, 3), 4, 9, trainable=trainable)
    ref = torch.linspace(-2, 0, 12).view(4, 3)

    def ours(p, **options):
        arguments = dict(hidden=p.hidden, weight=p.weight, targets=p.targets, **options)
        return {
            "logprobs": lambda: logitless.linear_logprobs(**arguments).logprob.sum(),
            "cross_entropy": lambda: logitless.linear_cross_entropy(**arguments),
            "dft": lambda: logitless.linear_dft(**arguments),
            "f_divergence": lambda: logitless.linear_f_divergence_sft(**arguments, ref_logprob=ref),
            "dpo": lambda: logitless.linear_dpo(**arguments, ref_logprob=ref).loss,
        }[function]()

    found = measure(lambda p: ours(p, **option), problem)
    expected = measure(lambda p: ours(p, **option, backend="reference"), problem)
    without = measure(ours, problem)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
        assert not torch.allclose(found[name], without[name])


def test_there_are_no_hidden_defaults():
    """No temperature, cap, smoothing or z-loss that was not asked for."""
    problem = make_problem((6,), 4, 9)
    expected = F.cross_entropy(problem.hidden @ problem.weight.T, problem.targets)
    for function in (logitless.linear_cross_entropy, logitless.nn.LinearCrossEntropyLoss()):
        torch.testing.assert_close(function(problem.hidden, problem.weight, problem.targets), expected)


# 6. Logits of -inf: a whole block of the vocabulary, and 0 x -inf in the entropy.


@pytest.mark.parametrize("masked", [slice(0, 64), slice(64, 128), slice(1, 128)])
@pytest.mark.parametrize("trainable", [("hidden",), ("hidden", "weight", "bias")], ids=str)
def test_a_masked_vocabulary_gives_no_nan(masked, trainable):
    problem = make_problem((5,), 4, 128, masked=masked, trainable=trainable)
    outputs = ("logprob", "lse", "entropy", "correct", "log_sum_sq")
    found = measure(
        lambda p: logitless.linear_logprobs(p.hidden, p.weight, p.targets, bias=p.bias, outputs=outputs), problem
    )
    kept = torch.ones(128, dtype=torch.bool)
    kept[masked] = False
    logp = torch.log_softmax((problem.hidden @ problem.weight.T + problem.bias).detach()[:, kept].double(), -1)
    torch.testing.assert_close(found["entropy"].double(), -(logp.exp() * logp).sum(-1), rtol=1e-5, atol=1e-6)
    assert all(x.isfinite().all() for x in found.values())


# 7. What is skipped is never decided by one output's gradient.


def test_the_lse_of_a_confident_token_keeps_its_gradient():
    """d lse / d hidden is the target's row, though p - onehot is 0."""
    weight = torch.zeros(10, 2)
    weight[3] = torch.tensor([40.0, 3.6])
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    for trainable in (False, True):
        stats = logitless.linear_logprobs(
            hidden, weight.requires_grad_(trainable), torch.tensor([3]), outputs=("logprob", "lse")
        )
        gradient = torch.autograd.grad(stats.lse.sum(), hidden)[0]
        torch.testing.assert_close(gradient, torch.tensor([[40.0, 3.6]]))


# 8. The head is read as it is: a transposed or sliced weight is the weight.


def test_views_of_a_weight():
    table = torch.randn(4, 40, requires_grad=True)
    hidden, targets = torch.randn(6, 4), torch.randint(9, (6,))
    view = table[:, ::4][:, :9].T  # [9, 4], strided
    found = torch.autograd.grad(logitless.linear_cross_entropy(hidden, view, targets), table)[0]
    expected = torch.autograd.grad(F.cross_entropy(hidden @ view.T, targets), table)[0]
    torch.testing.assert_close(found, expected)


# 9. Smoothing is over the whole vocabulary, masked targets or not.


def test_label_smoothing_is_torchs():
    problem = make_problem((6,), 4, 9, ignored=0.3)
    found = logitless.linear_cross_entropy(problem.hidden, problem.weight, problem.targets, label_smoothing=0.3)
    expected = F.cross_entropy(problem.hidden @ problem.weight.T, problem.targets, label_smoothing=0.3)
    torch.testing.assert_close(found, expected)


# 10. Nothing of the caller's is changed, and a backward can be repeated.


@pytest.mark.parametrize("name", ["nll", "dft", "dpo"])
@pytest.mark.parametrize("trainable", [("hidden",), ("hidden", "weight")], ids=str)
def test_backward_can_be_repeated_and_changes_nothing(name, trainable):
    problem = make_problem((4, 3), 4, 9, ignored=0.2, trainable=trainable)
    extra = {"ref_logprob": torch.zeros(4, 3)} if name == "dpo" else {}
    before = [None if x is None else x.detach().clone() for x in problem]
    out = logitless.linear_loss(name, problem.hidden, problem.weight, problem.targets, **extra)
    loss = out.loss if name == "dpo" else out
    leaves = [x for x in (problem.hidden, problem.weight) if x.requires_grad]
    results = [torch.autograd.grad(3 * loss, leaves, retain_graph=True) for _ in range(3)]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
    for now, then in zip(problem, before, strict=True):
        assert now is None or torch.equal(now, then)


def test_log_probs_that_carry_no_gradient_say_so():
    """The metrics of DPO are detached; what adds a term to the loss takes `linear_logprobs`, which is not."""
    problem = make_problem((4, 3), 4, 9)
    out = logitless.linear_dpo(problem.hidden, problem.weight, problem.targets, ref_logprob=torch.zeros(4, 3))
    assert out.loss.requires_grad and not any(x.requires_grad for x in out[1:])
    assert logitless.linear_logprobs(problem.hidden, problem.weight, problem.targets).logprob.requires_grad


# Also.


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("target", [-1, 9, 10**9, -(10**12)])
def test_a_target_outside_the_vocabulary_is_never_read(backend, target):
    problem = make_problem((6,), 4, 9)
    problem.targets[2] = target
    with pytest.raises(ValueError, match=rf"targets.*{target}"):
        logitless.linear_logprobs(problem.hidden, problem.weight, problem.targets, backend=backend)


@pytest.mark.parametrize("backward", BACKWARDS)
def test_no_tokens_at_all(backward):
    problem = make_problem((0,), 4, 9, bias=True)
    loss = logitless.linear_cross_entropy(
        problem.hidden, problem.weight, problem.targets, bias=problem.bias, backward=backward
    )
    loss.backward()
    assert loss.item() == 0 and (problem.weight.grad == 0).all()


def test_a_loss_of_bf16_inputs_is_float32():
    problem = make_problem((4, 3), 4, 9, dtype=torch.bfloat16)
    ref = torch.zeros(4, 3)
    for out in (
        logitless.linear_cross_entropy(problem.hidden, problem.weight, problem.targets),
        logitless.linear_dft(problem.hidden, problem.weight, problem.targets, reduction="none"),
        logitless.linear_dpo(problem.hidden, problem.weight, problem.targets, ref_logprob=ref).loss,
    ):
        assert out.dtype == torch.float32
