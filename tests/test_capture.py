"""While a CUDA graph is captured: no wait for the device, no token dropped, and the same results.

A GPU's capture is pretended. Values are computed on a CPU, and fake tensors, which have no numbers to wait for, show
any operation that would wait.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
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
from torch.utils._python_dispatch import TorchDispatchMode

import logitless
from logitless import linear_divergence, linear_logprobs, linear_token_loss
from logitless.backends import BACKENDS, cuda, native
from logitless.ops import functions, tokens
from logitless.ops.registered.divergence import divergence, divergence_sum
from logitless.ops.registered.listed import list_logprobs
from logitless.ops.registered.logprobs import logprobs, logprobs_backward
from logitless.ops.registered.shared import Execution
from logitless.ops.registered.token_loss import token_loss
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

    scale = max(case.scale, case.bent_scale)
    assert_matches_float64(ours, lambda p: materialised(p, case.transform, outputs=OUTPUTS), case.problem, scale=scale)


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

    # Entropies and lse of either sign, and their gradients, cancel within a token and over the tokens.
    scale = case.problem.weight.abs().max().item() + case.problem.targets.numel()
    assert_matches_float64(ours, theirs, case.problem, scale=scale)


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


def op_bodies(fake: FakeTensorMode, backend: str, chunk_bytes: int | None = None) -> dict[str, Any]:
    """The calls behind the registered ops, on fake tensors."""
    head, no_cap = (LogitTransform().packed(), -100), LogitTransform().packed()
    with fake:
        hidden = torch.empty(6, 8, dtype=torch.bfloat16)
        weight = torch.empty(9, 8, dtype=torch.bfloat16)
        targets, lists = torch.empty(6, dtype=torch.long), torch.empty(6, 3, dtype=torch.long)
        mask = torch.empty(6, dtype=torch.bool)
        vectors, bias = [torch.empty(6) for _ in range(3)], torch.empty(9)
    handle = functions.keep(_weighted_logprob)
    needs = [True, True, False]
    recompute = Execution(backend, "recompute", 0.0, chunk_bytes, None)
    single = recompute._replace(strategy="single_pass")
    tensors = (hidden, weight, None, targets, None, None)
    sides = (*tensors[:3], *tensors[:3], mask, "js", [0.5, 0.1, 0.5], False, no_cap * 2)
    both = ("chunked" if backend == "cuda" else backend, chunk_bytes)
    return {
        "logprobs": lambda: logprobs._init_fn(*tensors, *head, "logprob entropy", None, *recompute),
        "frozen head": lambda: logprobs._init_fn(*tensors, *head, "logprob", None, *single),
        "recompute": lambda: logprobs_backward._init_fn(
            [vectors[0], None, None, None], [*vectors[:2], None], [], needs, *tensors, *head, None, *recompute
        ),
        "single pass": lambda: token_loss._init_fn(
            *tensors, vectors[:1], None, handle, [], *head, "logprob", needs, None, *single
        ),
        "lists, a bias": lambda: list_logprobs._init_fn(
            hidden, weight, bias, lists, *head, "logprob entropy", None, backend, chunk_bytes, None
        ),
        "divergence": lambda: divergence._init_fn(*sides, [True, False], None, *both, "", 0),
        "divergence with gradients": lambda: divergence_sum._init_fn(
            vectors[0], *sides, [*needs, *needs], None, *both, "", 0
        ),
    }


def _weighted_logprob(stats, x):
    return x * stats.logprob


NAMES = list(op_bodies(FakeTensorMode(), "chunked"))


@pytest.fixture
def no_kernels(monkeypatch):
    """The GPU backends without their kernels, whose launches are listed instead."""
    pytest.importorskip("triton")
    from logitless.kernels.triton import chunk

    launched: list[str] = []

    def launch(name: str, *arguments: object, on: torch.device) -> None:
        launched.append(name)

    monkeypatch.setattr(native, "why_not", lambda device: "fake tensors stand for a GPU's")
    stub = SimpleNamespace(has=lambda name: True, measure_workspace=lambda *sizes: 16, launch=launch)
    monkeypatch.setattr(cuda, "_library", lambda: stub)
    monkeypatch.setattr(cuda, "_has_vectors", lambda matrix: True)  # a fake tensor has no address
    kind = type(chunk.measure_kernel)
    monkeypatch.setattr(kind, "__getitem__", lambda kernel, grid: lambda *a, **k: launched.append("triton"))
    return launched


@pytest.fixture
def device_assertion(monkeypatch):
    """Targets are checked by the device, as a GPU's are; a CPU's are by the host."""
    monkeypatch.setattr(tokens, "check_ids", lambda *arguments: None)


@pytest.mark.parametrize("chunk_bytes", [None, 100], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("backend", ["chunked", "triton", "cuda"])
@pytest.mark.parametrize("name", NAMES)
def test_no_op_waits(captured, device_assertion, no_kernels, name, backend, chunk_bytes):
    fake = FakeTensorMode()
    body = op_bodies(fake, backend, chunk_bytes)[name]
    with fake:
        body()
    by_pytorch = backend == "chunked" or (backend == "cuda" and "divergence" in name)
    assert bool(no_kernels) != by_pytorch


@pytest.mark.parametrize("name", NAMES)
def test_the_test_sees_a_wait(monkeypatch, device_assertion, name):
    """The one of an eager call, which drops ignored tokens."""
    monkeypatch.setattr(tokens, "is_captured", lambda device: False)
    fake = FakeTensorMode()
    body = op_bodies(fake, "chunked")[name]
    with fake, pytest.raises(WAITS):
        body()


@pytest.mark.parametrize("backward", ["tail_corrected", "single_pass"])
def test_what_has_to_wait_is_refused_by_name(captured, backward):
    p = make_problem((4, 3), 4, 9)
    with pytest.raises(RuntimeError, match=r"(tail-corrected backward|whole pairs or sequences).*backward='recompute'"):
        options = {} if backward == "tail_corrected" else {"ref_logprob": torch.zeros(4, 3)}
        name = "nll" if backward == "tail_corrected" else "dpo"
        logitless.linear_loss(name, p.hidden, p.weight, p.targets, backward=backward, **options)


def test_a_refusal_comes_before_any_work(captured):
    p = make_problem((4, 3), 4, 9)
    with Calls() as calls, pytest.raises(RuntimeError, match="whole pairs or sequences"):
        groups = torch.zeros(12, dtype=torch.long)
        token_loss._init_fn(
            *(
                p.hidden.view(12, 4),
                p.weight,
                None,
                p.targets.view(12),
                None,
                None,
                [],
                groups,
                0,
                [],
                [1.0, 30.0, 1.0],
            ),
            *(-100, "logprob", [True, True, False], None, "chunked", "single_pass", 0.0, None, None),
        )
    assert set(calls.found) <= {"zeros", "view"}


class Calls(TorchDispatchMode):
    """Counts PyTorch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    def waits(self) -> int:
        """How often a GPU's host would wait for a number."""
        return sum(self.found[name] for name in ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select"))


@pytest.mark.parametrize("ignored", [0.0, 0.5])
@pytest.mark.parametrize("recomputes", [False, True])
def test_an_eager_op_waits_once(device_assertion, recomputes, ignored):
    """Whether there are ignored tokens or not."""
    p = make_problem((8,), 4, 9, ignored=ignored, trainable=())
    problem = (p.hidden, p.weight, None, p.targets, None, None, LogitTransform().packed(), -100)
    execution = Execution("chunked", "recompute", 0.0, 100, None)
    known = [torch.zeros(8), torch.zeros(8), None]
    with Calls() as calls:
        if recomputes:
            upstream = [torch.ones(8), None, None, None]
            logprobs_backward._init_fn(upstream, known, [], [True, True, False], *problem, None, *execution)
        else:
            logprobs._init_fn(*problem, "logprob entropy", None, *execution)
    assert calls.waits() == 1


# ---------------------------------------------------------------------------------------------------------------------
# Losses without a gradient


@pytest.mark.parametrize("backward", ["auto", "single_pass"])
@pytest.mark.parametrize("name", ["nll", "dft", "eaft", "dpo"])
def test_a_loss_without_a_gradient_takes_the_forward(monkeypatch, name, backward):
    """The fused one, where a backend has it: no chunk of logits is made for a gradient that nobody asks for."""
    p = make_problem((4, 3), 4, 9, ignored=0.2)
    inputs = {"ref_logprob": torch.zeros(4, 3)} if name == "dpo" else {}

    def value():
        options = dict(backend="chunked", backward=backward, **inputs)
        out = logitless.linear_loss(name, p.hidden, p.weight, p.targets, **options)
        return out.loss if name == "dpo" else out

    expected = value().detach()
    monkeypatch.setattr(BACKENDS["chunked"], "single_pass", None)
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
