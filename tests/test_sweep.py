"""Sweeps over chunks: results do not depend on a chunk's layout, nor on how much is converted or measured at a time.

Every other test runs on a CPU's own layout and sizes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Case, cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from logitless import linear_divergence, linear_logprobs, linear_token_loss
from logitless.backends.exact import chunks, divergence, products, torch_rows
from logitless.backends.exact.torch_rows import TorchRows
from logitless.backends.interface import Problem, Upstream
from logitless.testing import TokenProblem, assert_matches_float64, make_problem, materialised, watch_allocations
from logitless.types import DIFFERENTIABLE, OUTPUTS, Head, LogitTransform, Options

patched = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def small_parts(monkeypatch):
    """A few entries of the vocabulary at a time."""
    monkeypatch.setattr(products, "CONVERTED_ENTRIES", {"cpu": 3})
    monkeypatch.setattr(torch_rows, "PIECE_BYTES", {"cpu": 64})


@pytest.fixture
def gpu_layout(monkeypatch):
    """Chunks as on a GPU, in a CPU's memory."""
    row_stride, lay_out = chunks.row_stride, chunks.lay_out
    for module in (chunks, divergence):
        monkeypatch.setattr(module, "row_stride", lambda *sizes: row_stride(*sizes[:-1], "cuda"))
        monkeypatch.setattr(module, "lay_out", lambda *chunk: lay_out(*chunk[:-1], "cuda"))


def check(case: Case, backward: str) -> None:
    def ours(p: TokenProblem):
        return linear_logprobs(
            p.hidden, p.weight, p.targets, bias=p.bias, outputs=OUTPUTS, backward=backward, **case.options
        )

    assert_matches_float64(
        ours,
        lambda p: materialised(p, case.transform, outputs=OUTPUTS),
        case.problem,
        scale=max(case.scale, case.bent_scale),
    )


@patched
@given(case=cases())
def test_parts_of_the_vocabulary(small_parts, case):
    check(case, "recompute")


@patched
@given(case=cases())
def test_a_gpus_layout(gpu_layout, case):
    check(case, "recompute")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("place", ["small_parts", "gpu_layout"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_single_pass(request, place, dtype, softcap):
    request.getfixturevalue(place)
    case = Case(make_problem((13,), 6, 37, dtype=dtype, bias=True), LogitTransform(softcap=softcap), 5)

    def loss(stats):
        return stats.entropy * stats.lse - stats.logprob

    def ours(p):
        options = {"reduction": "sum", "backward": "single_pass", **case.options}
        return linear_token_loss(p.hidden, p.weight, p.targets, loss, bias=p.bias, outputs=DIFFERENTIABLE, **options)

    exact = lambda p: loss(materialised(p, case.transform, outputs=DIFFERENTIABLE)).sum()  # noqa: E731
    assert_matches_float64(ours, exact, case.problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("place", ["small_parts", "gpu_layout"])
def test_a_divergence(request, place, dtype):
    p = make_problem((9,), 5, 37, dtype=dtype, bias=True)
    ref = make_problem((9,), 4, 37, dtype=dtype, seed=1, trainable=())

    def step():
        for x in p[:2]:
            x.grad = None
        values = linear_divergence(p.hidden, p.weight, ref.hidden, ref.weight, kind="js", chunk_bytes=2**11)
        values.sum().backward()
        return p.hidden.grad, p.weight.grad

    expected = step()
    request.getfixturevalue(place)
    for found, wanted in zip(step(), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@given(
    vocabulary=st.integers(1, 40),
    count=st.integers(1, 5),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_rows_on_a_gpu_begin_at_16_bytes(vocabulary, count, dtype):
    stride = chunks.row_stride(vocabulary, dtype, "cuda")
    out = chunks.lay_out(torch.empty(5 * stride, dtype=dtype), count, vocabulary, "cuda")
    assert out.shape == (count, vocabulary) and out.stride() == (stride, 1)
    assert stride * dtype.itemsize % 16 == 0 and 0 <= stride - vocabulary < 16 // dtype.itemsize


@given(vocabulary=st.integers(1, 40), count=st.integers(1, 5))
def test_a_cpus_chunk_is_vocabulary_major_and_dense(vocabulary, count):
    stride = chunks.row_stride(vocabulary, torch.float32, "cpu")
    out = chunks.lay_out(torch.empty(5 * stride), count, vocabulary, "cpu")
    assert stride == vocabulary and out.shape == (count, vocabulary) and out.T.is_contiguous()


@pytest.mark.parametrize("vocabulary", [4, 13, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_is_converted_by_parts(monkeypatch, vocabulary, dtype):
    monkeypatch.setattr(products, "CONVERTED_ENTRIES", {"cpu": 4})
    weight = torch.randn(vocabulary, 3).to(dtype)
    parts = [(columns, part.clone()) for columns, part in products.parts_in(torch.float32, weight)]
    assert [columns.start for columns, _ in parts] == ([0] if dtype == torch.float32 else [*range(0, vocabulary, 4)])
    torch.testing.assert_close(torch.cat([part for _, part in parts]), weight.float(), rtol=0, atol=0)


def test_a_copy_of_the_head_serves_the_products():
    """A copy is made if one is asked for, and only once."""
    p = make_problem((3,), 4, 8, dtype=torch.float16, trainable=())
    operands = chunks.Operands(Problem(p.hidden, Head(p.weight), p.targets))
    assert operands.head_at_hand(torch.float32) is p.weight
    assert operands.weight.dtype == torch.float32
    assert operands.head_at_hand(torch.float32) is operands.weight is not p.weight


def test_rows_need_no_second_chunk_for_the_entropy(monkeypatch):
    """Neither its value nor its gradient does, because temporaries are a part of the vocabulary."""
    z, targets = torch.randn(4096, 64).T, torch.arange(64)
    head = Head(torch.empty(0, 0))
    monkeypatch.setattr(torch_rows, "PIECE_BYTES", {"cpu": 2**16})
    with watch_allocations() as seen:
        tile = TorchRows().measure(z, head, targets, OUTPUTS, None)
        TorchRows().gradient(tile, head, Upstream(entropy=torch.ones(64)), torch.float32)
    assert seen.peak <= 2.5 * 2**16 < z.numel() * z.itemsize / 4


# ---------------------------------------------------------------------------------------------------------------------
# How many tokens a chunk has


def tokens_of(hidden_size: int, vocabulary: int, trainable: bool, **options) -> int:
    """On an accelerator ("meta" is none of the devices with a rule of its own), bfloat16."""
    hidden, weight = (torch.empty(n, hidden_size, dtype=torch.bfloat16, device="meta") for n in (1, vocabulary))
    return chunks.chunk_tokens(hidden, weight, Options(**options), trainable=trainable)


@pytest.mark.parametrize(
    ("hidden_size", "vocabulary", "trainable", "frozen"),
    [(576, 49152, 1280, 1280), (2304, 256000, 2304, 256), (4096, 151936, 4096, 384), (4096, 128256, 4096, 512)],
)
def test_a_gpus_chunk_is_as_large_as_the_heads_gradient(hidden_size, vocabulary, trainable, frozen):
    """H tokens, or 256 MiB of logits where that is more; whole tiles of 128."""
    assert tokens_of(hidden_size, vocabulary, True) == trainable
    assert tokens_of(hidden_size, vocabulary, False) == frozen


def test_chunk_bytes_rules():
    assert tokens_of(4096, 128256, True, chunk_bytes=128256 * 4 * 700) == 640
    assert tokens_of(4096, 128256, True, chunk_bytes=128256 * 4 * 100) == 96  # below a tile: in steps of 16
    assert tokens_of(4096, 128256, True, chunk_bytes=128256 * 4 * 9) == 9
    assert tokens_of(4096, 128256, True, chunk_bytes=1) == 1
    assert tokens_of(4096, 128256, True, chunk_bytes=128256 * 2 * 700, chunk_dtype=torch.bfloat16) == 640


@given(count=st.integers(0, 20_000), most=st.integers(1, 5000), device=st.sampled_from(["cpu", "cuda"]))
def test_chunks_are_equal(count, most, device):
    """The fewest chunks there can be, all but the last of one size, which is whole steps unless nothing else fits."""
    size = chunks.equal_chunks(count, most, device)
    step = 16 if device == "cpu" else 128
    sizes = [rows.stop - rows.start for rows in products.spans(count, size)]
    assert sum(sizes) == count and all(x == size for x in sizes[:-1])
    assert 1 <= size <= most and len(sizes) == -(-count // most)
    if len(sizes) > 1:
        assert size % step == 0 or size == most
        assert size - count / len(sizes) < step


def test_groups_may_be_as_long_as_the_budget_allows():
    """Chunks of equal size would cut a group that the budget holds."""
    p = make_problem((40,), 4, 8)
    problem = Problem(p.hidden, Head(p.weight), p.targets, chunk_bytes=8 * 4 * 32)
    assert chunks.Chunks(TorchRows(), problem, ()).tokens == 32
    assert chunks.Chunks(TorchRows(), problem, (), whole_groups=True).tokens == 32
    problem = replace(problem, chunk_bytes=8 * 4 * 39)
    assert chunks.Chunks(TorchRows(), problem, (), whole_groups=True).tokens == 32


# ---------------------------------------------------------------------------------------------------------------------
# What products are made in


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize("offset", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("backward", ["recompute", "single_pass"])
def test_logits_of_bfloat16_operands_are_float32(monkeypatch, units, offset, backward):
    """Whatever the processor: an offset that all logits share, which bfloat16 logits would be rounded by, changes
    nothing."""
    monkeypatch.setattr(products, "has_bfloat16_units", lambda: units)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.cat([torch.randn(64, 64, generator=draw), torch.ones(64, 1)], 1).bfloat16().requires_grad_()
    weight = torch.cat([torch.randn(500, 64, generator=draw) * 0.3, torch.full((500, 1), offset)], 1).bfloat16()
    targets = torch.randint(0, 500, (64,), generator=draw)
    exact = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().T, targets)
    found = linear_token_loss(hidden, weight, targets, lambda stats: -stats.logprob, backward=backward)
    # 65 products are summed in float32, next to the offset; bfloat16's error would be 2^16 times this one's unit.
    assert abs(found.double() - exact) <= 4 * 2.0**-24 * (offset + 10)
    (gradient,) = torch.autograd.grad(found, hidden)
    (expected,) = torch.autograd.grad(exact, hidden)
    # But for the coordinate of the offset, which multiplies the roundings of a bfloat16 gradient.
    assert (gradient - expected)[:, :-1].norm() <= 2.0**-7 * expected[:, :-1].norm()


def test_bfloat16_logits_are_to_be_had(monkeypatch):
    """`chunk_dtype` asks for the speed of a processor's units, and has their rounding."""
    seen: list[torch.dtype] = []
    monkeypatch.setattr(products, "has_bfloat16_units", lambda: True)
    monkeypatch.setattr(products, "multiply", lambda a, b, out, add=False: (seen.append(out.dtype), out.copy_(a @ b)))
    p = make_problem((3,), 4, 8, dtype=torch.bfloat16, trainable=())
    for chunk_dtype in (None, torch.float32, torch.bfloat16):
        linear_logprobs(p.hidden, p.weight, p.targets, chunk_dtype=chunk_dtype)
    assert seen == [torch.float32, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("units", [True, False])
def test_sums_of_bfloat16_products_are_float32(monkeypatch, units):
    """Chunk by chunk: a sum in bfloat16 would stand still after 256 equal terms."""
    monkeypatch.setattr(products, "has_bfloat16_units", lambda: units)
    monkeypatch.setattr(products, "PART_BYTES", {"cpu": 4})
    tokens = 16 * 18
    hidden, weight = (torch.full((n, 1), x).bfloat16().requires_grad_() for n, x in ((tokens, 1.0), (3, 0.0)))
    targets = torch.zeros(tokens, dtype=torch.long)
    options = dict(reduction="sum", backward="single_pass", chunk_bytes=3 * 4 * 16)
    linear_token_loss(hidden, weight, targets, lambda stats: stats.logprob, **options).backward()
    assert weight.grad[:, 0].tolist() == [tokens * 2 / 3, -tokens / 3, -tokens / 3]


def test_float16_on_a_gpu():
    """Logits from float16 operands into float32; gradients in tf32, which holds float16. The setting comes back."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert products.logit_dtype(torch.float16, gpu, None) == torch.float16
    assert products.logit_dtype(torch.float16, cpu, None) == products.operand_dtype(torch.float16, gpu) == torch.float32
    before = torch.backends.cuda.matmul.fp32_precision
    for dtype, device, inside in (
        (torch.float16, gpu, "tf32"),
        (torch.float32, gpu, before),
        (torch.float16, cpu, before),
    ):
        with pytest.raises(KeyError), products.float16_products(dtype, device):
            assert torch.backends.cuda.matmul.fp32_precision == inside
            raise KeyError
        assert torch.backends.cuda.matmul.fp32_precision == before


def test_tf32_of_a_wider_setting_is_not_made_a_setting_of_products():
    """Transformers sets the wider one, which still decides afterwards."""
    before = torch.backends.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "none"
    try:
        torch.backends.fp32_precision = "tf32"
        with products.float16_products(torch.float16, torch.device("cuda")):
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = before
