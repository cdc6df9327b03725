"""While a CUDA graph is captured: no wait for the device, no token dropped, and the same results.

A GPU's capture is pretended: the values are a CPU's, and what would wait is shown by fake tensors, which have no
numbers to wait for.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

import logitless
from logitless import linear_divergence, linear_logprobs, linear_token_loss
from logitless.backends import chunked
from logitless.ops import library, tokens
from logitless.testing import TokenProblem, assert_matches_float64, make_problem, materialised
from logitless.types import DIFFERENTIABLE, OUTPUTS, LogitTransform

patched = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
WAITS = (DataDependentOutputException, DynamicOutputShapeException)


@pytest.fixture
def captured(monkeypatch):
    monkeypatch.setattr(tokens, "is_captured", lambda device: True)


# ---------------------------------------------------------------------------------------------------------------------
# The same results


@patched
@given(case=cases(), backward=st.sampled_from(["auto", "recompute"]))
def test_statistics(captured, case, backward):
    def ours(p: TokenProblem):
        return linear_logprobs(
            p.hidden, p.weight, p.targets, bias=p.bias, outputs=OUTPUTS, backward=backward, **case.options
        )

    assert_matches_float64(
        ours, lambda p: materialised(p, case.transform, outputs=OUTPUTS), case.problem, scale=case.scale
    )


def of_all(stats):
    return stats.entropy * stats.lse - stats.logprob.exp() * stats.logprob


@patched
@given(case=cases())
def test_a_single_pass(captured, case):
    outputs = ("logprob", "lse", "entropy")

    def ours(p: TokenProblem):
        options = {"reduction": "sum", "outputs": outputs, **case.options}
        return linear_token_loss(p.hidden, p.weight, p.targets, of_all, bias=p.bias, **options)

    def theirs(p: TokenProblem):
        return torch.where(p.targets != -100, of_all(materialised(p, case.transform, outputs=outputs)), 0).sum()

    assert_matches_float64(ours, theirs, case.problem)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backward", ["single_pass", "recompute"])
@pytest.mark.parametrize("trainable", [("hidden", "weight", "bias"), ("hidden",)], ids=str)
def test_what_stands_behind_an_ignored_token_reaches_nothing(captured, trainable, backward, value):
    """A bias that would overflow next to it, too, and a loss that has no value at 0."""
    p = make_problem((9,), 5, 11, bias=True, trainable=trainable)
    p.targets[::2] = -100
    with torch.no_grad():
        p.hidden[::2], p.bias[3] = value, 200.0
    factor = torch.where(p.targets == -100, value, 1.0)
    options = dict(bias=p.bias, backward=backward, token_inputs=[factor])
    loss = linear_token_loss(
        p.hidden, p.weight, p.targets, lambda stats, x: x * (-stats.logprob).sqrt(), reduction="sum", **options
    )
    loss.backward()
    kept = TokenProblem(p.hidden.detach()[1::2], p.weight.detach(), p.bias.detach(), p.targets[1::2]).to(torch.float64)
    kept = TokenProblem(*(x.requires_grad_() if x.is_floating_point() else x for x in kept))
    exact = (-materialised(kept).logprob).sqrt().sum()
    exact.backward()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(p.hidden.grad[1::2].double(), kept.hidden.grad, rtol=1e-4, atol=1e-4)
    assert p.hidden.grad[::2].eq(0).all()
    for name in trainable[1:]:
        torch.testing.assert_close(getattr(p, name).grad.double(), getattr(kept, name).grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trainable", [("hidden", "weight"), ("hidden",)], ids=str)
def test_a_divergence(captured, trainable):
    p = make_problem((9,), 5, 11, trainable=trainable)
    ref, mask = make_problem((9,), 5, 11, seed=1, trainable=()), torch.arange(9) % 2 == 0
    found = linear_divergence(p.hidden, p.weight, ref.hidden, ref.weight, kind="js", mask=mask, reduction="sum")
    found.backward()
    kept = p.to(torch.float64)
    head = (kept.weight, ref.hidden.double()[mask], ref.weight.double())
    exact = linear_divergence(kept.hidden[mask], *head, kind="js", reduction="sum", backend="reference")
    exact.backward()
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    for name in trainable:
        torch.testing.assert_close(getattr(p, name).grad.double(), getattr(kept, name).grad, rtol=1e-4, atol=1e-5)


def test_every_token_ignored(captured):
    p = make_problem((4,), 3, 7)
    p.targets[:] = -100
    loss = logitless.linear_cross_entropy(p.hidden, p.weight, p.targets)
    loss.backward()
    assert loss == 0 and p.hidden.grad.eq(0).all() and p.weight.grad.eq(0).all()


# ---------------------------------------------------------------------------------------------------------------------
# What must not wait


def op_bodies(fake: FakeTensorMode) -> dict[str, Any]:
    """What stands behind the ops, on fake tensors."""
    head = (1.0, None, 1.0, -100)
    with fake:
        hidden = torch.empty(6, 4, dtype=torch.bfloat16)
        weight = torch.empty(9, 4, dtype=torch.bfloat16)
        targets = torch.empty(6, dtype=torch.long)
        vectors = [torch.empty(6) for _ in range(3)]
    handle = next(library._next_handle)
    library._functions[handle] = lambda stats, x: x * stats.logprob
    needs, rest = [True, True, False], ("chunked", 100, None)
    tensors = (hidden, weight, None, targets)
    return {
        "logprobs": lambda: library.logprobs._init_fn(*tensors, *head, "logprob entropy", False, *rest),
        "frozen head": lambda: library.logprobs._init_fn(*tensors, *head, "logprob", True, *rest),
        "recompute": lambda: library.logprobs_backward._init_fn(
            [vectors[0], None, None, None], *tensors, [*vectors[:2], None], *head, needs, *rest
        ),
        "single pass": lambda: library.token_loss._init_fn(
            *tensors, vectors[:1], None, handle, [], *head, "logprob", needs, *rest, None, None, False
        ),
    }


@pytest.fixture
def device_assertion(monkeypatch):
    """Targets are checked by the device, as a GPU's are; a CPU's are by the host."""
    monkeypatch.setattr(tokens, "check_ids", lambda *arguments: None)


@pytest.mark.parametrize("name", op_bodies(FakeTensorMode()))
def test_no_op_waits(captured, device_assertion, name):
    fake = FakeTensorMode()
    body = op_bodies(fake)[name]
    with fake:
        body()


@pytest.mark.parametrize("name", op_bodies(FakeTensorMode()))
def test_the_test_sees_a_wait(monkeypatch, device_assertion, name):
    """The one of an eager call, which drops ignored tokens."""
    monkeypatch.setattr(tokens, "is_captured", lambda device: False)
    fake = FakeTensorMode()
    body = op_bodies(fake)[name]
    with fake, pytest.raises(WAITS):
        body()


@pytest.mark.parametrize("backward", ["tail_corrected", "single_pass"])
def test_what_has_to_wait_is_refused_by_name(captured, backward):
    p = make_problem((4, 3), 4, 9)
    with pytest.raises(RuntimeError, match=r"(tail-corrected backward|whole pairs or sequences).*backward='recompute'"):
        options = {} if backward == "tail_corrected" else {"ref_logprob": torch.zeros(4, 3)}
        name = "nll" if backward == "tail_corrected" else "dpo"
        logitless.linear_loss(name, p.hidden, p.weight, p.targets, backward=backward, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Losses without a gradient


@pytest.mark.parametrize("backward", ["auto", "single_pass"])
@pytest.mark.parametrize("name", ["nll", "dft", "eaft", "dpo"])
def test_a_loss_without_a_gradient_takes_the_forward(monkeypatch, name, backward):
    """The fused one, where a backend has it: no chunk of logits is made for a gradient that nobody asks for."""
    p = make_problem((4, 3), 4, 9, ignored=0.2)
    inputs = {"ref_logprob": torch.zeros(4, 3)} if name == "dpo" else {}

    def value():
        out = logitless.linear_loss(name, p.hidden, p.weight, p.targets, backward=backward, **inputs)
        return out.loss if name == "dpo" else out

    expected = value().detach()
    monkeypatch.setattr(chunked, "single_pass", None)
    with torch.no_grad():
        torch.testing.assert_close(value(), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(TypeError):
        value()


@given(case=cases())
@settings(max_examples=30)
def test_any_loss_without_a_gradient(case):
    p = case.problem.to(torch.float64)
    outputs = DIFFERENTIABLE

    def value(problem):
        return linear_token_loss(
            problem.hidden, problem.weight, problem.targets, of_all, bias=problem.bias, outputs=outputs, **case.options
        )

    with torch.no_grad():
        found = value(p)
    torch.testing.assert_close(found, value(p).detach(), rtol=1e-9, atol=1e-9)


def test_a_transform_reaches_a_loss_without_a_gradient():
    p = make_problem((5,), 4, 9, trainable=())
    stats = materialised(p, LogitTransform(1.5, 3.0, 0.7))
    found = linear_token_loss(
        p.hidden, p.weight, p.targets, lambda s: -s.logprob, logit_scale=1.5, softcap=3.0, temperature=0.7
    )
    torch.testing.assert_close(found, -stats.logprob.mean(), rtol=1e-5, atol=1e-6)
