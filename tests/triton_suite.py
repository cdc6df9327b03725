"""The Triton backend against the float64 reference: its kernels one by one, and behind the ops.

`test_triton.py` runs these, on a GPU where there is one, else in Triton's interpreter in a process of its own, since
TRITON_INTERPRET must be set before Triton is imported. By hand: `TRITON_INTERPRET=1 pytest tests/triton_suite.py`.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES, Case, cases, strided
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitless import linear_cross_entropy, linear_logprobs, linear_token_loss, reference
from logitless.backends import triton as backend
from logitless.backends.exact import products
from logitless.backends.interface import Needs, Problem, Upstream
from logitless.kernels.triton import chunk, configs, logprobs
from logitless.testing import (
    TokenProblem,
    assert_matches_float64,
    assert_within_budget,
    make_problem,
    materialised,
    measure,
    poison_empty,
)
from logitless.types import DIFFERENTIABLE, OUTPUTS, Head, LogitTransform, TokenStats

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAIN, BENT = LogitTransform(), LogitTransform(1.3, 3.0, 0.7)
HALVES = (torch.bfloat16, torch.float16)
outputs_subset = st.sets(st.sampled_from(OUTPUTS), min_size=1).map(lambda s: tuple(x for x in OUTPUTS if x in s))


def on_device(problem: TokenProblem) -> TokenProblem:
    return TokenProblem(
        *(x if x is None else x.detach().to(DEVICE).requires_grad_(x.requires_grad) for x in problem)  # type: ignore[arg-type]
    )


def run(problem: TokenProblem, **options) -> TokenStats:
    return linear_logprobs(
        problem.hidden, problem.weight, problem.targets, bias=problem.bias, backend="triton", **options
    )


def check(case: Case, outputs: tuple[str, ...], logit_weight=None, **options) -> None:
    problem = on_device(case.problem)
    with poison_empty():
        assert_matches_float64(
            lambda p: run(p, outputs=outputs, logit_weight=logit_weight, **case.options, **options),
            lambda p: materialised(p, case.transform, outputs=outputs, logit_weight=logit_weight),
            problem,
            scale=max(case.scale_of(outputs), case.bent_scale),
        )


def several_tiles(**options) -> TokenProblem:
    """No size is a multiple of a block; the interpreter's blocks give three tiles of tokens by three of vocabulary."""
    return make_problem((37,), 21, 75, **options)


# ---------------------------------------------------------------------------------------------------------------------
# The ops


@settings(max_examples=25)
@given(case=cases(DTYPES[1:]), outputs=outputs_subset, backward=st.sampled_from(["auto", "recompute"]))
def test_any_options_against_float64(case, outputs, backward):
    check(case, outputs, backward=backward)


@pytest.mark.slow
@settings(max_examples=300)
@given(case=cases(DTYPES[1:]), outputs=outputs_subset, backward=st.sampled_from(["auto", "recompute"]))
def test_many_options_against_float64(case, outputs, backward):
    check(case, outputs, backward=backward)


@settings(max_examples=8)
@given(case=cases(DTYPES[1:], trainable=st.just(("hidden",))), outputs=st.sampled_from(["logprob", "logprob lse"]))
def test_a_frozen_head_keeps_one_vector_per_token(case, outputs):
    check(case, tuple(outputs.split()), backward="single_pass")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("transform", [PLAIN, BENT], ids=["plain", "softcap"])
def test_several_tiles_each_way(dtype, transform):
    problem = several_tiles(dtype=dtype, bias=True, ignored=0.2)
    check(Case(problem, transform, 20), DIFFERENTIABLE, backward="recompute")


@pytest.mark.parametrize("backward", ["auto", "recompute"])
@pytest.mark.parametrize("trainable", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "trainable"])
@pytest.mark.parametrize("transform", [PLAIN, BENT], ids=["plain", "softcap"])
def test_weights_of_the_mean_logit(transform, trainable, backward):
    problem = several_tiles(bias=True, ignored=0.2, trainable=trainable)
    weights = torch.linspace(0.1, 3.0, 75, device=DEVICE)
    check(Case(problem, transform, 20), ("logprob", "lse", "mean_logit"), logit_weight=weights, backward=backward)


@pytest.mark.slow
@pytest.mark.parametrize("outputs", [OUTPUTS, ("logprob",)], ids=["all", "logprob"])
@pytest.mark.parametrize("masked", [None, slice(3, 40)], ids=["", "masked"])
@pytest.mark.parametrize("transform", [PLAIN, BENT], ids=["plain", "softcap"])
@pytest.mark.parametrize("trainable", [("hidden",), ("weight",), ("bias",), ("hidden", "weight", "bias")], ids=str)
def test_several_tiles_with_every_kind_of_gradient(outputs, masked, transform, trainable):
    problem = several_tiles(bias=True, masked=masked, ignored=0.2, trainable=trainable)
    check(Case(problem, transform, None), outputs, backward="recompute")


@settings(max_examples=12)
@given(case=cases(DTYPES[1:]), reduction=st.sampled_from(["sum", "mean"]))
def test_single_pass(case, reduction):
    """A loss of every differentiable statistic."""

    def loss(stats: TokenStats) -> Tensor:
        return stats.logprob.exp() * stats.lse - 0.3 * stats.entropy + stats.logprob.square()

    def ours(p: TokenProblem, backend: str) -> Tensor:
        return linear_token_loss(
            p.hidden,
            p.weight,
            p.targets,
            loss,
            outputs=("logprob", "lse", "entropy"),
            reduction=reduction,
            bias=p.bias,
            backend=backend,
            **case.options,
        )

    def baseline(p: TokenProblem) -> Tensor:
        stats = materialised(p, case.transform, outputs=("logprob", "lse", "entropy"))
        total = torch.where(p.targets == -100, 0, loss(stats)).sum()
        return total / (p.targets != -100).sum().clamp(min=1) if reduction == "mean" else total

    problem = on_device(case.problem)
    assert_matches_float64(
        lambda p: ours(p, "triton"), baseline, problem, scale=problem.weight.abs().max().item() + len(problem.hidden)
    )


def test_logits_of_a_chunk_in_bfloat16():
    """The caller's choice: statistics right to the rounding of the logits, in place."""
    problem = on_device(several_tiles(dtype=torch.bfloat16, spread=1.0))
    exact = measure(lambda p: materialised(p).logprob.sum(), problem.to(torch.float64))
    found = measure(
        lambda p: linear_token_loss(
            p.hidden,
            p.weight,
            p.targets,
            lambda s: s.logprob,
            reduction="sum",
            backend="triton",
            chunk_dtype=torch.bfloat16,
        ),
        problem,
    )
    for name in ("d_hidden", "d_weight"):
        error = (found[name].double() - exact[name]).norm() / exact[name].norm()
        assert error < 2**-6, name


@pytest.mark.parametrize("backward", ["auto", "recompute"])
def test_no_tokens_and_none_that_count(backward):
    for problem in (make_problem((0,), 4, 9, bias=True), make_problem((6,), 4, 9, bias=True, ignored=1.0)):
        p = on_device(problem)
        loss = linear_cross_entropy(p.hidden, p.weight, p.targets, bias=p.bias, backend="triton", backward=backward)
        loss.backward()
        assert loss.item() == 0 and not any(x.grad.any() for x in (p.hidden, p.weight, p.bias))


@pytest.mark.parametrize("backward", ["auto", "recompute"])
def test_strided_tensors(backward):
    problem = make_problem((5,), 7, 40, bias=True, ignored=0.2)
    expected = measure(lambda p: run(p, outputs=DIFFERENTIABLE, backward=backward), on_device(problem))
    hidden, weight, bias, targets = strided(on_device(problem))  # a copy to a device would be dense
    assert not weight.is_contiguous()
    for view in (weight, weight.detach().T.contiguous().T.requires_grad_()):
        stats = linear_logprobs(
            hidden, view, targets, bias=bias, outputs=DIFFERENTIABLE, backend="triton", backward=backward
        )
        for name in DIFFERENTIABLE:
            assert torch.equal(getattr(stats, name), expected[name]), name


@pytest.mark.parametrize("trainable", [("hidden", "weight"), ("hidden",)], ids=str)
def test_the_same_bits_twice(trainable):
    torch.use_deterministic_algorithms(True)
    problem = on_device(several_tiles(bias=True, trainable=trainable))
    backwards = ["recompute", "single_pass"] if trainable == ("hidden",) else ["recompute"]
    for backward in backwards:
        first, second = (measure(lambda p, b=backward: run(p, backward=b), problem) for _ in range(2))
        for name in first:
            assert torch.equal(first[name], second[name]), name


# ---------------------------------------------------------------------------------------------------------------------
# Rows that break kernels


def row_problem(rows: Tensor, targets: Tensor, **options) -> Problem:
    """A head whose raw products are `rows [N, V]`: the identity's (float32: exact)."""
    identity = torch.eye(rows.shape[1], device=DEVICE)
    return Problem(rows.T.contiguous().T.to(DEVICE) @ identity, Head(identity, **options), targets.to(DEVICE))


def adversarial(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Raw rows and targets. No -inf: a product with the identity's zeros would be NaN; a bias brings those."""
    draw = torch.Generator().manual_seed(3)
    usual = torch.randn(vocabulary, generator=draw)
    dominated = usual.clone()
    dominated[5] = 80.0
    rows = [
        (dominated, 5),  # the target dominates
        (dominated, 7),  # another one does
        (torch.full((vocabulary,), 3.0), 2),  # all equal: a tie
        (torch.zeros(vocabulary), vocabulary - 1),
        (usual * 1e4, int(usual.argmax())),
        (usual * 1e4, int(usual.argmin())),
        (usual + 1e4, 0),
        (usual - 1e4, 0),
        (usual, vocabulary - 1),  # the last, ragged block
    ]
    return torch.stack([row for row, _ in rows]), torch.tensor([target for _, target in rows])


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("kernel", ["fused", "chunk"])
def test_adversarial_rows(kernel, softcap):
    rows, targets = adversarial(75)
    problem = row_problem(rows, targets, softcap=softcap)
    with poison_empty():
        if kernel == "fused":
            found, _ = backend.measure_blocks(problem, OUTPUTS, None)
        else:
            found, _ = chunk.measure_chunk(
                problem.hidden, None, problem.targets, transform=problem.head.transform, outputs=OUTPUTS
            )
    exact = reference.statistics(reference.transformed(rows.double(), problem.head.transform), targets, OUTPUTS)
    same_dtype = reference.statistics(reference.transformed(rows, problem.head.transform), targets, OUTPUTS)
    for name in OUTPUTS:
        for i in range(len(rows)):  # each row by its own measure
            assert_within_budget(
                getattr(found, name)[i],
                getattr(same_dtype, name)[i],
                getattr(exact, name)[i],
                dtype=torch.float32,
                scale=max(1.0, rows[i].abs().max().item() if name in ("logprob", "entropy", "log_sum_sq") else 1.0),
                name=f"{name} of row {i}",
            )


def test_a_margin_of_twenty_nats_keeps_its_digits():
    raw = torch.zeros(1, 75)
    raw[0, 70] = 20.0
    problem = row_problem(raw, torch.tensor([70]))
    wrong = math.log1p(74 * math.exp(-20))
    fused, _ = backend.measure_blocks(problem, ("entropy",), None)
    chunked, _ = chunk.measure_chunk(problem.hidden, None, problem.targets, transform=PLAIN, outputs=("entropy",))
    for stats in (fused, chunked):
        assert stats.logprob.item() == pytest.approx(-wrong, rel=1e-6)
        assert stats.entropy.item() == pytest.approx(wrong + 74 * math.exp(-20) * 20, rel=1e-5)
    upstream = Upstream(logprob=torch.ones(1, device=DEVICE))
    gradient = backend.TRITON.backward(problem, fused, upstream, Needs(True, False, False)).hidden
    assert gradient[0, 70].item() == pytest.approx(wrong, rel=1e-5)
    assert gradient[0, 0].item() == pytest.approx(-math.exp(-20), rel=1e-5)


@pytest.mark.parametrize("masked", [slice(0, 64), slice(32, 64), slice(64, 75), slice(1, 75)], ids=str)
@pytest.mark.parametrize("transform", [PLAIN, BENT], ids=["plain", "softcap"])
def test_masked_vocabulary(masked, transform):
    """Whole blocks and splits of -inf, at either end; at last all but one entry."""
    problem = make_problem((5,), 4, 75, masked=masked, trainable=("hidden", "weight"))
    outputs = tuple(name for name in OUTPUTS if name != "mean_logit")
    check(Case(problem, transform, None), outputs, backward="recompute")


@pytest.mark.parametrize("kernel", ["fused", "chunk"])
@pytest.mark.parametrize("column", [3, 40])
def test_nan_reaches_every_result(kernel, column):
    """In the target's column (3), or in another one's; the row beside it is untouched."""
    bias = torch.zeros(75, device=DEVICE)
    bias[column] = math.nan
    raw, targets = torch.zeros(1, 75, device=DEVICE), torch.tensor([3], device=DEVICE)
    if kernel == "fused":
        problem = row_problem(raw.cpu(), targets, bias=bias)
        stats, _ = backend.measure_blocks(problem, OUTPUTS, None)
    else:
        stats, _ = chunk.measure_chunk(raw, bias, targets, transform=PLAIN, outputs=OUTPUTS)
    assert stats.correct.item() == 0
    assert all(getattr(stats, name).isnan().all() for name in OUTPUTS if name != "correct")


def test_a_nan_in_one_token_stays_there():
    problem = several_tiles(trainable=())
    problem.hidden[20] = math.nan
    stats = run(on_device(problem), outputs=OUTPUTS)
    other = torch.arange(37, device=DEVICE) != 20
    for value in (getattr(stats, name) for name in OUTPUTS):
        assert value[other].isfinite().all()
    assert stats.lse[20].isnan()


# ---------------------------------------------------------------------------------------------------------------------
# The kernels themselves


@pytest.mark.parametrize("block", [8, 32, 64])
@pytest.mark.parametrize("kernel", ["fused", "chunk"])
def test_logsumexp_of_every_block(block, kernel):
    """The target's entry is left out; in its block of 8 no other counts. A block of 64 is two tiles wide."""
    problem = several_tiles(masked=slice(8, 32), ignored=0.0)
    hidden, weight, bias, targets = (x.detach() for x in on_device(problem))
    bias[65:72], targets[3] = -math.inf, 64
    targets[(targets > 64) & (targets < 72)] = 0
    z = reference.logits(hidden.double(), weight.double(), bias.double(), BENT)
    width = -(-z.shape[1] // block)
    others = z.scatter(1, targets[:, None], -math.inf)
    padded = torch.nn.functional.pad(others, (0, width * block - z.shape[1]), value=-math.inf)
    expected = padded.unflatten(1, (width, block)).logsumexp(-1)
    if kernel == "fused":
        stats, found = backend.measure_blocks(Problem(hidden, Head(weight, bias, *BENT.numbers), targets), (), block)
    else:
        stats, found = chunk.measure_chunk(hidden @ weight.T, bias, targets, transform=BENT, outputs=(), block=block)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.lse.double(), z.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("logits", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("operand", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("rows_contiguous", [True, False])
def test_gradient_takes_the_place_of_the_logits(logits, operand, rows_contiguous):
    """Any dtype in; the same memory out, unless the gradient is wider or would spread over other rows."""
    raw = torch.randn(5, 75, device=DEVICE).to(logits)
    raw = raw if rows_contiguous else raw.T.contiguous().T
    targets = torch.tensor([0, 74, 40, 31, 32], device=DEVICE)
    lse = raw.double().logsumexp(-1)
    factor = torch.randn(5, device=DEVICE)
    expected = (raw.double() - lse[:, None]).exp() * factor[:, None]
    expected[torch.arange(5), targets] = 0
    place = raw.data_ptr()
    found = chunk.gradient_(
        raw, None, targets, logprobs.RowFactors(lse.float(), factor, None, None), transform=PLAIN, dtype=operand
    )
    fits = operand == logits or (rows_contiguous and operand.itemsize < logits.itemsize)
    assert found.dtype == operand and (found.data_ptr() == place) == fits
    torch.testing.assert_close(found.double(), expected, rtol=2 * torch.finfo(operand).eps, atol=2e-7)


def test_the_gradient_of_a_part_of_the_vocabulary():
    """Columns beyond the part are zeros, and the column sums are those before rounding."""
    problem = several_tiles(bias=True)
    hidden, weight, bias, targets = (x.detach() for x in on_device(problem))
    first, width = 32, 64
    z = reference.logits(hidden.double(), weight.double(), bias.double(), PLAIN)
    expected = (z - z.logsumexp(-1, keepdim=True)).exp()
    expected[torch.arange(37), targets] = 0
    rows = logprobs.RowFactors(z.logsumexp(-1).float(), torch.ones(37, device=DEVICE), None, None)
    config = logprobs.gradient_config(hidden, rows, PLAIN)
    width = -(-width // config.BLOCK_V) * config.BLOCK_V
    tiles = -(-37 // config.BLOCK_N)
    out = torch.full((37, width), math.nan, dtype=torch.bfloat16, device=DEVICE)
    sums = torch.full((tiles, width), math.nan, device=DEVICE)
    part = (weight[first:], bias[first:], targets, rows, first, out)
    logprobs.gradient_tile(hidden, *part, transform=PLAIN, config=config, column_sum=sums)
    used = 75 - first
    torch.testing.assert_close(
        out[:, :used].double(), expected[:, first:], rtol=2**-7, atol=1e-7
    )  # the interpreter truncates
    torch.testing.assert_close(sums.sum(0)[:used].double(), expected[:, first:].sum(0), rtol=1e-5, atol=1e-6)
    written = -(-used // config.BLOCK_V) * config.BLOCK_V
    assert not out[:, used:written].any()


def test_gradients_gather_in_float32_over_many_parts(monkeypatch):
    """bfloat16 products of 16 tokens by one tile of columns at a time: a bfloat16 sum would stand still after 256."""
    monkeypatch.setattr(backend, "GRADIENT_TOKENS", 16)
    tokens = 16 * 18
    hidden = torch.ones(tokens, 1, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.long, device=DEVICE)
    problem = TokenProblem(hidden, weight, None, targets)
    run(problem, backward="recompute", chunk_bytes=1).logprob.sum().backward()
    assert weight.grad[:, 0].tolist() == [tokens / 2, -tokens / 2]


@pytest.mark.parametrize("names", [("hidden",), ("weight",), ("bias",), ("hidden", "bias")], ids=str)
def test_what_is_frozen_costs_no_product(monkeypatch, names):
    made: list[tuple[int, ...]] = []

    def watched(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
        made.append(tuple(out.shape))
        products.multiply(a, b, out=out, add=add)

    monkeypatch.setattr(backend, "multiply", watched)
    problem = on_device(make_problem((5,), 4, 7, bias=True, trainable=names))
    run(problem, backward="recompute").logprob.sum().backward()
    assert made == [shape for name, shape in (("hidden", (5, 4)), ("weight", (7, 4))) if name in names]


def test_offsets_beyond_two_to_the_thirty_first():
    """Rows of the weight that are 2^30 elements apart; memory that nobody touches is not there."""
    stride = 2**30 + 16
    base = torch.empty(3 * stride, dtype=torch.float16, device=DEVICE)
    weight = base.as_strided((3, 8), (stride, 1))
    weight.copy_(torch.randn(3, 8))
    hidden, targets = torch.randn(4, 8, device=DEVICE).half(), torch.tensor([0, 1, 2, 2], device=DEVICE)
    stats, _ = logprobs.fused_forward(hidden, weight, None, targets, transform=PLAIN, outputs=())
    expected = reference.statistics(hidden.double() @ weight.double().T, targets, ("logprob",)).logprob
    torch.testing.assert_close(stats.logprob.double(), expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# What is asked of whom


def test_float64_is_refused_with_the_reason():
    problem = on_device(make_problem((3,), 4, 9, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"'triton' cannot take these tensors: it takes .*got torch.float64"):
        run(problem)


def test_tf32_is_used_only_where_pytorch_may():
    """By either of PyTorch's interfaces: once both were used, the older one's question raises an error."""
    assert configs.precision(torch.float32) == "ieee"
    matmul = torch.backends.cuda.matmul
    try:
        torch.set_float32_matmul_precision("high")
        assert configs.precision(torch.float32) == ("ieee" if torch.version.hip else "tf32")
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = "tf32"
        assert configs.precision(torch.float32) == ("ieee" if torch.version.hip else "tf32")
        assert configs.precision(torch.bfloat16) == "ieee"
    finally:
        matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")


@given(tiles_n=st.integers(1, 3000), tiles_v=st.integers(1, 2000), processors=st.sampled_from([1, 4, 108, 132]))
def test_splits_cover_the_vocabulary(tiles_n, tiles_v, processors):
    splits, each = configs.split(tiles_n, tiles_v, processors)
    assert 1 <= splits <= 128
    assert (splits - 1) * each < tiles_v <= splits * each  # none is empty
    schedule = -(-tiles_n * splits // processors) * each
    assert schedule <= -(-tiles_n // processors) * tiles_v  # never longer than without


def test_few_tokens_fill_the_device():
    splits, _ = configs.split(1, 501, 132)
    assert splits > 120
