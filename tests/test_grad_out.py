"""`grad_out`: the head's gradient added to a caller's buffer, by every op, strategy and loss, and its refusals."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cases import HERE
from loss_cases import lists_of_ids

import logitless
from logitless.testing import TokenProblem, make_problem, poison_empty, watch_allocations

V, H, N = 300, 8, 40
#: Two chunks at least, and a size that no chunk divides.
OPTIONS = {"chunk_bytes": V * 4 * 16}


def of_divergence(p: TokenProblem, reduction: str, **options) -> torch.Tensor:
    head = logitless.Head(p.weight, p.bias, softcap=9.0)
    ref = make_problem((N,), H + 1, V, seed=3, trainable=(), dtype=p.hidden.dtype)
    mask = p.targets != -100
    arguments = (p.hidden, head, ref.hidden, ref.weight)
    return logitless.linear_divergence(*arguments, kind="js", mask=mask, reduction=reduction, **options).sum()


def weighted(stats: logitless.TokenStats) -> torch.Tensor:
    """Every statistic, with an upstream gradient of its own for every token."""
    parts = [x.reshape(N, -1).sum(-1) for x in stats if x is not None]
    return sum((k + 1) * (torch.linspace(-1, 1, N, dtype=x.dtype) * x).sum() for k, x in enumerate(parts))


def head(p: TokenProblem) -> dict:
    return dict(hidden=p.hidden, weight=p.weight, targets=p.targets, bias=p.bias)


def listed(p: TokenProblem) -> dict:
    return {**head(p), "targets": lists_of_ids(p.targets, V)}


def pairs(p: TokenProblem) -> dict:
    inputs = {
        name: x if name in ("weight", "bias") else x.reshape(4, N // 4, *x.shape[1:]) for name, x in head(p).items()
    }
    return {**inputs, "ref_logprob": torch.full((4, N // 4), -1.0)}


ALL = ("logprob", "lse", "entropy", "mean_logit")
CALLS = {
    "statistics": lambda p, **o: weighted(logitless.linear_logprobs(**head(p), outputs=ALL, softcap=9.0, **o)),
    "logprob": lambda p, **o: weighted(logitless.linear_logprobs(**head(p), **o)),
    "lists": lambda p, **o: weighted(logitless.linear_logprobs(**listed(p), outputs=("logprob", "tail"), **o)),
    "among": lambda p, **o: weighted(
        logitless.linear_logprobs(**head(p), among=lists_of_ids(p.targets, V), outputs=("logprob", "entropy"), **o)
    ),
    "token loss": lambda p, **o: logitless.linear_token_loss(
        **head(p), per_token_loss=lambda s: s.logprob * s.entropy + s.mean_logit, outputs=ALL, **o
    ),
    "token losses": lambda p, **o: (
        logitless.linear_token_loss(**head(p), per_token_loss=lambda s: s.logprob.square(), reduction="none", **o)
        * torch.linspace(-1, 1, N)
    ).sum(),
    "cross-entropy": lambda p, **o: logitless.linear_cross_entropy(**head(p), label_smoothing=0.1, z_loss=0.1, **o),
    "class weights": lambda p, **o: logitless.linear_cross_entropy(
        **head(p), class_weight=torch.linspace(0.5, 2, V), label_smoothing=0.1, **o
    ),
    "dft": lambda p, **o: logitless.linear_dft(**head(p), **o),
    "dpo": lambda p, **o: logitless.linear_dpo(**pairs(p), **o).loss,
    "dpo, large pairs": lambda p, **o: logitless.linear_dpo(**pairs(p), **{**o, "chunk_bytes": V * 4 * 8}).loss,
    "divergences": lambda p, **o: of_divergence(p, "none", **o),
    "divergence": lambda p, **o: of_divergence(p, "mean", **o),
    "depths": lambda p, **o: (
        logitless.linear_depth_loss(
            "nll", [p.hidden, p.hidden], p.weight, [p.targets] * 2, bias=p.bias, depth_weight=[1, 0.3], **o
        ).loss
    ),
}


def problem(dtype: torch.dtype = torch.float32, *, count: int = N, **options) -> TokenProblem:
    return make_problem((count,), H, V, dtype=dtype, ignored=0.2, bias=True, **options)


def assert_adds(call, dtype: torch.dtype = torch.float32, **options) -> None:
    """What `call` adds to a buffer is what it gives to `.grad`; hidden states and bias get theirs as ever."""
    own, ours = problem(dtype), problem(dtype)
    call(own, **OPTIONS, **options).backward()
    start = torch.linspace(-1, 1, V * H, dtype=torch.promote_types(dtype, torch.float32)).view(V, H)
    buffer = start.clone()
    loss = call(ours, **OPTIONS, **options, grad_out=buffer)
    assert torch.equal(buffer, start)
    loss.backward()
    assert ours.weight.grad is None
    # The sum is rounded once more, at the size of what the buffer held; a bfloat16 gradient was rounded on its own.
    scale = float(own.weight.grad.abs().max())
    rounding = 2 * torch.finfo(start.dtype).eps * (1 + scale) + torch.finfo(dtype).eps * scale
    torch.testing.assert_close(buffer - start, own.weight.grad.to(start.dtype), rtol=0, atol=4 * rounding)
    torch.testing.assert_close(ours.hidden.grad, own.hidden.grad, rtol=0, atol=0)
    torch.testing.assert_close(ours.bias.grad, own.bias.grad, rtol=0, atol=0)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", HERE)
def test_what_is_added_is_the_gradient(name, backend):
    assert_adds(CALLS[name], backend=backend)


@pytest.mark.parametrize("name", ["cross-entropy", "dft", "divergence", "dpo"])
def test_recomputation_adds_too(name):
    assert_adds(CALLS[name], backward="recompute")


@pytest.mark.parametrize("name", ["logprob", "cross-entropy", "dpo"])
def test_an_approximate_gradient_is_added_too(name):
    assert_adds(CALLS[name], backward="tail_corrected", tail_tolerance=2**-9)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(name, dtype):
    assert_adds(CALLS[name], dtype)


@pytest.mark.parametrize("name", ["logprob", "cross-entropy", "divergence", "divergences", "lists"])
def test_a_buffer_of_the_weights_own_dtype(name):
    own, ours = problem(torch.bfloat16), problem(torch.bfloat16)
    CALLS[name](own).backward()
    buffer = torch.zeros(V, H, dtype=torch.bfloat16)
    CALLS[name](ours, grad_out=buffer).backward()
    torch.testing.assert_close(buffer, own.weight.grad, rtol=2**-7, atol=2**-7 * float(own.weight.grad.abs().max()))


@pytest.mark.parametrize("backward", ["recompute", "single_pass"])
def test_nothing_is_rounded_to_the_weights_dtype(backward):
    """Against float64, a bfloat16 gradient has 2^-9 of its size; the buffer has what the products leave."""
    exact, narrow = problem(torch.float64, count=2000), problem(torch.bfloat16, count=2000)
    exact.hidden.data, exact.weight.data = narrow.hidden.double().detach(), narrow.weight.double().detach()
    exact.bias.data = narrow.bias.double().detach()
    buffer = torch.zeros(V, H)
    for p, options in ((exact, {}), (narrow, {"grad_out": buffer})):
        logitless.linear_cross_entropy(**head(p), backward=backward, chunk_bytes=V * 4 * 64, **options).backward()
    error = (buffer - exact.weight.grad).abs().max() / exact.weight.grad.abs().max()
    rounded = (exact.weight.grad.bfloat16() - exact.weight.grad).abs().max() / exact.weight.grad.abs().max()
    assert not torch.equal(buffer, buffer.bfloat16().float())
    assert error <= 4 * rounded


@pytest.mark.parametrize("name", ["logprob", "cross-entropy", "dpo", "divergence", "divergences", "lists", "among"])
def test_a_second_backward_adds_a_second_time(name):
    p, buffer = problem(), torch.zeros(V, H)
    loss = CALLS[name](p, grad_out=buffer)
    loss.backward(retain_graph=True)
    once = buffer.clone()
    loss.backward()
    torch.testing.assert_close(buffer, 2 * once)


@pytest.mark.parametrize("backward", ["recompute", "single_pass"])
def test_micro_batches_add_up_whatever_the_order_of_their_passes(backward):
    """Two forward passes before the first backward, as pipelines interleave them."""
    whole, parts, buffer = problem(), problem(), torch.zeros(V, H)
    count = (whole.targets != -100).sum()
    options = dict(bias=parts.bias, backward=backward, normalizer=count, **OPTIONS)
    logitless.linear_cross_entropy(**head(whole), backward=backward, **OPTIONS).backward()
    losses = [
        logitless.linear_cross_entropy(
            parts.hidden[rows], parts.weight, parts.targets[rows], grad_out=buffer, **options
        )
        for rows in (slice(0, 13), slice(13, N))
    ]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(buffer, whole.weight.grad)


def test_a_tied_head_leaves_autograd_the_embeddings_share():
    torch.manual_seed(0)
    ids, weight = torch.randint(V, (12,)), torch.randn(V, H).requires_grad_()
    loss = logitless.linear_cross_entropy(weight[ids], weight, ids.roll(1))
    (whole,) = torch.autograd.grad(loss, weight)
    buffer = torch.zeros(V, H)
    logitless.linear_cross_entropy(weight[ids], weight, ids.roll(1), grad_out=buffer).backward()
    torch.testing.assert_close(buffer + weight.grad, whole)
    assert weight.grad.abs().sum(1).count_nonzero() <= len(ids)


def test_the_gradient_may_be_added_to_grad_itself():
    p, q = problem(), problem()
    CALLS["cross-entropy"](p).backward()
    q.weight.grad = torch.zeros(V, H)
    CALLS["cross-entropy"](q, grad_out=q.weight.grad).backward()
    torch.testing.assert_close(q.weight.grad, p.weight.grad)


@pytest.mark.parametrize("name", ["cross-entropy", "dpo", "logprob"])
def test_under_autocast_the_buffer_is_the_float32_heads(name):
    own, ours, buffer = problem(), problem(), torch.zeros(V, H)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = CALLS[name](own), CALLS[name](ours, grad_out=buffer)
    a.backward(), b.backward()
    assert ours.weight.grad is None
    torch.testing.assert_close(buffer, own.weight.grad, rtol=2**-7, atol=2**-7 * float(own.weight.grad.abs().max()))


@pytest.mark.parametrize("name", CALLS)
def test_a_pass_for_other_inputs_adds_nothing(name):
    """The gradient of a tensor that `torch.autograd.grad` was not asked for stays as it is, too."""
    p, q, buffer = problem(), problem(), torch.zeros(V, H)
    loss, expected = CALLS[name](p, grad_out=buffer), CALLS[name](q)
    (ours,) = torch.autograd.grad(loss, p.hidden, retain_graph=True)
    own, of_weight = torch.autograd.grad(expected, (q.hidden, q.weight))
    torch.testing.assert_close(ours, own)
    assert not buffer.any()
    loss.backward(inputs=[p.weight])  # the second of a pipeline's two passes
    torch.testing.assert_close(buffer, of_weight)


def test_a_part_of_a_padded_head():
    """A slice is no leaf; detached, it is the caller's word that the buffer is where its gradient goes."""
    p, q, padded = problem(), problem(), torch.zeros(V, H)
    bias = p.bias[:200].detach()
    targets = p.targets.clamp(max=199)
    logitless.linear_cross_entropy(p.hidden, p.weight[:200], targets, bias=bias).backward()
    part = q.weight[:200].detach().requires_grad_()
    logitless.linear_cross_entropy(q.hidden, part, targets, bias=bias, grad_out=padded[:200]).backward()
    torch.testing.assert_close(padded, p.weight.grad)


def test_modules_take_it():
    p, q, buffer = problem(), problem(), torch.zeros(V, H)
    CALLS["dft"](p).backward()
    module = logitless.nn.LinearLoss("dft", grad_out=buffer)
    module(**head(q)).backward()
    torch.testing.assert_close(buffer, p.weight.grad)


def test_without_a_gradient_nothing_is_added():
    p, buffer = problem(), torch.zeros(V, H)
    with torch.no_grad():
        loss = CALLS["cross-entropy"](p, grad_out=buffer)
    assert not loss.requires_grad and not buffer.any()


def test_no_token_adds_nothing():
    p, buffer = problem(), torch.ones(V, H)
    p.targets.fill_(-100)
    for name in ("logprob", "cross-entropy", "lists"):
        CALLS[name](p, grad_out=buffer).backward()
    assert torch.equal(buffer, torch.ones(V, H)) and p.weight.grad is None


def test_memory_that_was_not_written_is_not_read():
    with poison_empty():
        for name in CALLS:
            buffer = torch.zeros(V, H)
            CALLS[name](problem(), grad_out=buffer).backward()
            assert buffer.isfinite().all(), name


def gradient_added() -> type[torch.autograd.Function]:
    """The recipe of docs/extras.md."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "extras.md").read_text(encoding="utf-8")
    found = re.search(r"^class GradientAdded.*?(?=^\w+\.main_grad)", page, re.MULTILINE | re.DOTALL)
    assert found is not None
    names = {"torch": torch}
    exec(found[0], names)
    return names["GradientAdded"]


def watched_by_megatron(weight: torch.Tensor) -> list[torch.Tensor]:
    """Puts on a parameter what Megatron's DistributedDataParallel does, by its published rules: a stub of it.

    The list holds the gradient that would be reduced, each time the parameter is said to be ready.
    """
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(weight.shape), False
    node, ready = weight.expand_as(weight).grad_fn.next_functions[0][0], []

    def hook(*_: object) -> None:
        assert weight.grad is not None, "not safe when gradients are reduced in the background"
        if not weight.grad_added_to_main_grad or getattr(weight, "zero_out_wgrad", False):
            weight.main_grad.add_(weight.grad)
        weight.grad = None
        ready.append(weight.main_grad.clone())

    node.register_hook(hook)
    ready.append(node)  # which must live as long as the hook
    return ready


@pytest.mark.parametrize("backward", ["recompute", "single_pass"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_recipe_for_megatron(tied, backward):
    """The hook sees the whole gradient, once: the head's share, and a tied embedding's."""
    torch.manual_seed(0)
    ids = torch.randint(V, (20,))
    own = torch.randn(V, H).requires_grad_()
    ours = own.detach().clone().requires_grad_()
    ready, recipe = watched_by_megatron(ours), gradient_added()
    ours.zero_out_wgrad = tied

    def loss(weight, **options):
        hidden = (weight if tied else weight.detach())[ids]
        return logitless.linear_cross_entropy(hidden, weight, ids.roll(1), backward=backward, **options)

    for _ in range(2):  # micro-batches
        loss(own).backward()
        recipe.apply(loss(ours, grad_out=ours.main_grad), ours).backward()
    assert len(ready) == 3
    torch.testing.assert_close(ready[2], own.grad)


# ---------------------------------------------------------------------------------------------------------------------
# Memory

BIG = 2**21  # bytes of the head: V * H * 4


def wide(**options) -> dict:
    p = make_problem((512,), 64, 8192, ignored=0.1, **options)
    return dict(hidden=p.hidden, weight=p.weight, targets=p.targets, chunk_bytes=2**19)


def largest(backward: str, **options) -> tuple[int, int]:
    arguments = wide()
    with watch_allocations() as seen:
        loss = logitless.linear_cross_entropy(**arguments, backward=backward, **options)
        loss.backward()
    return seen.largest, seen.peak


def test_recomputation_takes_no_second_buffer():
    """The buffer of the head's gradient is the largest allocation without `grad_out`; with it there is none."""
    buffer = torch.zeros(8192, 64)
    assert largest("recompute")[0] == BIG
    assert largest("recompute", grad_out=buffer)[0] < BIG // 2


def test_a_single_pass_takes_one_buffer():
    """The sweep has one of its own, which is scaled on the way: a copy of it would be a second."""
    buffer = torch.zeros(8192, 64)
    assert largest("single_pass", grad_out=buffer)[1] < 2 * BIG


def test_a_bfloat16_heads_second_gradient_is_saved():
    """Into `.grad`, and from there to a float32 buffer, takes both; the buffer alone takes neither."""
    arguments = wide(dtype=torch.bfloat16)
    buffer = torch.zeros(8192, 64)
    with watch_allocations() as seen:
        logitless.linear_cross_entropy(**arguments, backward="recompute", grad_out=buffer).backward()
    assert seen.largest < BIG // 2


def test_divergences_take_no_second_buffer():
    p, ref = make_problem((512,), 64, 8192), torch.randn(512, 4)
    ref_head, buffer = torch.randn(8192, 4), torch.zeros(8192, 64)
    with watch_allocations() as seen:
        logitless.linear_divergence(
            p.hidden, p.weight, ref, ref_head, kind="forward_kl", chunk_bytes=2**19, grad_out=buffer
        ).sum().backward()
    assert seen.largest < BIG // 2


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile, second derivatives, refusals


@pytest.mark.parametrize("backward", ["recompute", "single_pass"])
def test_compiled_without_a_graph_break(backward):
    p, q, buffers = problem(), problem(), (torch.zeros(V, H), torch.zeros(V, H))

    def call(p, buffer):
        return logitless.linear_cross_entropy(**head(p), backward=backward, grad_out=buffer)

    call(p, buffers[0]).backward()
    torch.compile(call, fullgraph=True)(q, buffers[1]).backward()
    torch.testing.assert_close(buffers[1], buffers[0])
    assert q.weight.grad is None


def test_opcheck_of_the_backwards():
    from logitless.ops.registered import logprobs
    from logitless.types import LogitTransform

    p = make_problem((6,), 4, 9, trainable=())
    inputs = (p.hidden, p.weight, None, p.targets, None, None, LogitTransform().packed(), -100)
    execution = (torch.zeros(9, 4), "chunked", "recompute", 0.0, 100, None)
    stats = logprobs.logprobs(*inputs, "logprob", *execution)
    arguments = ([torch.randn(6), None, None, None], [*stats[:2], None], [], [True, True, False], *inputs, *execution)
    torch.library.opcheck(
        torch.ops.logitless.logprobs_backward.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("name", ["cross-entropy", "logprob", "divergence"])
def test_a_second_derivative_is_refused(name):
    p = problem()
    loss = CALLS[name](p, grad_out=torch.zeros(V, H))
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(loss, p.hidden, create_graph=True)


def strided() -> torch.Tensor:
    return torch.zeros(H, V).T


@pytest.mark.parametrize(
    ("buffer", "error", "message"),
    [
        (lambda p: 1.0, TypeError, "grad_out: expected a tensor"),
        (
            lambda p: torch.zeros(V, H + 1),
            ValueError,
            r"grad_out: expected shape \[300, 8\] like weight, got \[300, 9\]",
        ),
        (lambda p: torch.zeros(V, H, dtype=torch.bfloat16), TypeError, "grad_out: expected dtype torch.float32, got"),
        (lambda p: torch.zeros(V, H, device="meta"), ValueError, "grad_out: expected device cpu like weight, got meta"),
        (lambda p: strided(), ValueError, r"grad_out: expected a contiguous buffer, got strides \[1, 300\]"),
        (lambda p: torch.zeros(V, H).requires_grad_(), ValueError, "grad_out: .*requires one itself"),
        (lambda p: p.weight.detach(), ValueError, "grad_out: .*some of weight's"),
    ],
)
def test_what_is_no_buffer_is_refused_by_name(buffer, error, message):
    p = problem()
    for name in ("logprob", "cross-entropy", "dpo", "divergence", "depths"):
        with pytest.raises(error, match=message):
            CALLS[name](p, grad_out=buffer(p))


@pytest.mark.parametrize("name", ["logprob", "cross-entropy", "dpo", "divergence", "depths"])
def test_a_head_that_has_no_gradient_to_add_is_refused(name):
    frozen = problem(trainable=("hidden",))
    with pytest.raises(ValueError, match="grad_out: the head is frozen"):
        CALLS[name](frozen, grad_out=torch.zeros(V, H))
    p = problem()
    with pytest.raises(ValueError, match="grad_out: expected a weight that is a leaf"):
        CALLS[name](p._replace(weight=p.weight * 1), grad_out=torch.zeros(V, H))
    with pytest.raises(ValueError, match="grad_out: backend='reference' is plain autograd"):
        CALLS[name](p, grad_out=torch.zeros(V, H), backend="reference")
