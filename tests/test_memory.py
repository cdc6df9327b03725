"""Allocations as the allocator itself sees them: never anything near N x V elements.

Sizes are such that a chunk is a small part of the whole: N x V is 2^21 elements, a chunk's budget 2^18 bytes. The
reference, which does allocate N x V, is watched in the same way, so that these tests can fail.
"""

from __future__ import annotations

import pytest
import torch
from loss_cases import lists_of_ids, loss_inputs

import logitless
from logitless import losses
from logitless.testing import TokenProblem, make_problem, poison_empty, watch_allocations
from logitless.types import DIFFERENTIABLE

N, H, V = 512, 16, 4096
WHOLE = N * V * 4  # bytes of float32 logits: 8 MiB
CHUNK = 2**18  # 16 tokens
#: The largest single allocation: the head's gradient and its like, V x H x 4 = 256 KiB, and chunks; 8 % of the whole.
LARGEST = WHOLE // 12


def problem(trainable=("hidden", "weight", "bias"), shape=(N,), **options) -> TokenProblem:
    return make_problem(shape, H, V, bias=True, ignored=0.1, trainable=trainable, **options)


def pairs(p: TokenProblem, rows: int) -> dict:
    """The tokens of a problem as `rows` sequences."""
    hidden = p.hidden.detach().reshape(rows, -1, H).requires_grad_(p.hidden.requires_grad)
    return dict(hidden=hidden, weight=p.weight, targets=p.targets.reshape(rows, -1), bias=p.bias)


def arguments(p: TokenProblem) -> dict:
    return dict(hidden=p.hidden, weight=p.weight, targets=p.targets, bias=p.bias)


REF = -torch.rand(N)
CALLS = {
    "logprobs": lambda p, **o: sum(
        x.sum() for x in logitless.linear_logprobs(**arguments(p), outputs=DIFFERENTIABLE, **o)[:4]
    ),
    "logprob": lambda p, **o: logitless.linear_logprobs(**arguments(p), **o).logprob.sum(),
    "metrics": lambda p, **o: logitless.linear_logprobs(
        **arguments(p), outputs=("logprob", "correct", "log_sum_sq"), **o
    ).logprob.sum(),
    "softcap": lambda p, **o: logitless.linear_logprobs(
        **arguments(p), outputs=DIFFERENTIABLE, softcap=5.0, **o
    ).entropy.sum(),
    "token loss": lambda p, **o: logitless.linear_token_loss(
        **arguments(p), per_token_loss=lambda s: s.entropy * s.lse, outputs=("lse", "entropy"), **o
    ),
    "token loss, none": lambda p, **o: logitless.linear_token_loss(
        **arguments(p), per_token_loss=lambda s: -s.logprob, reduction="none", **o
    ).sum(),
    "cross-entropy": lambda p, **o: logitless.linear_cross_entropy(
        **arguments(p), label_smoothing=0.1, z_loss=0.01, shift=True, token_weight=REF, **o
    ),
    "class weights": lambda p, **o: logitless.linear_cross_entropy(
        **arguments(p), label_smoothing=0.1, class_weight=torch.ones(V), **o
    ),
    "class weights under a softcap": lambda p, **o: logitless.linear_cross_entropy(
        **arguments(p), label_smoothing=0.1, class_weight=torch.ones(V), softcap=5.0, **o
    ),
    "dft": lambda p, **o: logitless.linear_dft(**arguments(p), **o),
    "f-divergence": lambda p, **o: logitless.linear_f_divergence_sft(**arguments(p), ref_logprob=REF, **o),
    "f-divergence with values": lambda p, **o: logitless.linear_f_divergence_sft(
        **pairs(p, 4), ref_logprob=REF.view(4, -1), ref_lse=REF.view(4, -1), value="lse", **o
    ),
    "dpo, small pairs": lambda p, **o: logitless.linear_dpo(**pairs(p, 64), ref_logprob=REF.view(64, -1), **o).loss,
    "dpo, large pairs": lambda p, **o: logitless.linear_dpo(**pairs(p, 4), ref_logprob=REF.view(4, -1), **o).loss,
    "dpo, reference's states": lambda p, **o: (
        logitless.linear_dpo(**pairs(p, 4), ref_hidden=p.hidden.detach().reshape(4, -1, H), **o).loss
    ),
}


def largest(call, p: TokenProblem, **options) -> int:
    with watch_allocations() as seen:
        loss = call(p, **options)
        if loss.requires_grad:
            loss.backward()
    return seen.largest


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("trainable", [("hidden", "weight", "bias"), ("hidden",), ()], ids=["all", "frozen", "nothing"])
def test_no_allocation_comes_near_the_logits(name, trainable):
    assert largest(CALLS[name], problem(trainable), chunk_bytes=CHUNK) <= LARGEST


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_allocation_comes_near_the_logits_in_half_precision(name, dtype):
    assert largest(CALLS[name], problem(dtype=dtype), chunk_bytes=CHUNK) <= LARGEST


@pytest.mark.parametrize("backward", ["recompute", "single_pass"])
def test_no_allocation_comes_near_the_logits_of_dpo_by_name(backward):
    call = CALLS["dpo, small pairs"]
    assert largest(call, problem(), chunk_bytes=CHUNK, backward=backward) <= LARGEST


@pytest.mark.parametrize("name", CALLS)
def test_the_reference_is_seen_to_allocate_the_logits(name):
    assert largest(CALLS[name], problem(), backend="reference") >= 0.85 * WHOLE  # a tenth is ignored


def test_poisoning_reaches_no_result():
    p = problem()
    with poison_empty():
        for call in CALLS.values():
            loss = call(p, chunk_bytes=CHUNK)
            loss.backward()
            assert loss.isfinite()
    assert all(x.grad.isfinite().all() for x in p[:3])


def peak(p: TokenProblem, loss, **options) -> int:
    """Most memory beyond the inputs and the gradients that remain, of a forward and a backward."""
    with watch_allocations() as seen:
        loss(p, **options).backward()
        gradients = sum(x.grad.numel() * x.grad.element_size() for x in p[:3] if x is not None and x.grad is not None)
    return seen.peak - gradients


@pytest.mark.parametrize("name", ["nll", "dft", "dpo"])
@pytest.mark.parametrize("trainable", [("hidden", "weight"), ("hidden",)], ids=["all", "frozen"])
def test_single_pass_needs_five_percent_of_the_logits_beyond_the_gradients(name, trainable):
    """N 1024, V 8192, H 32; a chunk is 1/32 of the whole, as 32 MiB are of 2^28 float32 logits."""
    tokens, vocabulary = 1024, 8192
    p = make_problem((64, 16), 32, vocabulary, trainable=trainable)
    extra = {"ref_logprob": torch.zeros(64, 16)} if name == "dpo" else {}

    def loss(p, **options):
        out = logitless.linear_loss(name, p.hidden, p.weight, p.targets, **extra, **options)
        return out.loss if name == "dpo" else out

    whole = tokens * vocabulary * 4
    assert peak(p, loss, chunk_bytes=whole // 32) <= 0.05 * whole
    assert peak(p.to(torch.float32), loss, backend="reference") >= 1.5 * whole


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trainable", [("hidden", "weight"), ("hidden",), ()], ids=["all", "frozen", "nothing"])
@pytest.mark.parametrize("backward", ["recompute", "single_pass"])
def test_a_head_in_half_precision_is_not_copied_whole(dtype, trainable, backward):
    """N 1024, V 8192, H 64: a float32 copy of the head would be 1/16 of the float32 logits, a chunk is 1/32 of them."""
    tokens, vocabulary = 1024, 8192
    p = make_problem((tokens,), 64, vocabulary, trainable=trainable, dtype=dtype)
    whole = tokens * vocabulary * 4
    with watch_allocations() as seen:
        loss = logitless.linear_loss("nll", p.hidden, p.weight, p.targets, backward=backward, chunk_bytes=whole // 32)
        if trainable:
            loss.backward()
    # One float32 sum of each gradient, and the gradient that is rounded from it.
    sums = sum(x.numel() * (4 + x.element_size()) for x in p[:2] if x is not None and x.requires_grad)
    assert seen.peak - sums <= 0.05 * whole


def test_one_accumulator_is_the_gradient():
    """float32: the head's gradient is made once, and not copied when it is scaled."""
    p = make_problem((64,), 64, 4096)
    with watch_allocations() as seen:
        logitless.linear_cross_entropy(p.hidden, p.weight, p.targets, chunk_bytes=CHUNK).backward()
    head = p.weight.numel() * 4
    assert seen.peak <= 1.5 * head + CHUNK


def test_ignored_tokens_cost_nothing():
    """A prompt of 15/16 of the tokens: no chunk's work or memory goes to it."""
    p = problem(trainable=("hidden",))
    p.targets[: N * 15 // 16] = -100
    with watch_allocations() as seen:
        logitless.linear_logprobs(p.hidden, p.weight, p.targets, chunk_bytes=8 * WHOLE).logprob.sum().backward()
    assert seen.largest <= WHOLE // 15


def test_the_watch_sees_inside_registered_ops():
    """The watch sees an allocation that a `TorchDispatchMode` cannot see."""

    @torch.library.custom_op("logitless_tests::allocates", mutates_args=())
    def allocates(x: torch.Tensor) -> torch.Tensor:
        return torch.ones(1000, 1000).sum() + x

    with watch_allocations() as seen:
        allocates(torch.ones(1))
    assert 4_000_000 <= seen.largest <= seen.peak <= 4_100_000


@pytest.mark.parametrize("name", losses.names())
def test_every_registered_loss_is_watched(name):
    """A loss that is added is found by itself."""
    loss = losses.get(name)
    inputs = loss_inputs(loss, 4, N // 4, H, torch.Generator().manual_seed(0), torch.float32)
    if loss.reduction == "constant_length":
        inputs["max_length"] = N

    def call(p, **options):
        batch = pairs(p, 4)
        if loss.lists:
            batch["targets"] = lists_of_ids(batch["targets"], len(batch["weight"]))
        out = logitless.linear_loss(loss, **batch, **inputs, **options)
        return out if isinstance(out, torch.Tensor) else out.loss

    assert largest(call, problem(), chunk_bytes=CHUNK) <= LARGEST
