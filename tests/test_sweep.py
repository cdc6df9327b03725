"""Sweeps over chunks: what must not depend on a chunk's layout, nor on the parts of the vocabulary that are converted,
or that row operations take, at a time. A CPU's own layout and sizes are what every other test runs on."""

from __future__ import annotations

import pytest
import torch
from cases import Case, cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from logitless import linear_divergence, linear_logprobs, linear_token_loss
from logitless.backends import divergence, rows, sweep
from logitless.backends.problem import Problem, Upstream
from logitless.testing import TokenProblem, assert_matches_float64, make_problem, materialised, watch_allocations
from logitless.types import DIFFERENTIABLE, OUTPUTS, LogitTransform

patched = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def small_parts(monkeypatch):
    """A few entries of the vocabulary at a time."""
    monkeypatch.setattr(sweep, "CONVERTED_ENTRIES", {"cpu": 3})
    monkeypatch.setattr(rows, "PIECE_BYTES", {"cpu": 64})


@pytest.fixture
def gpu_layout(monkeypatch):
    """Chunks as on a GPU, in a CPU's memory."""
    row_stride, lay_out = sweep.row_stride, sweep.lay_out
    for module in (sweep, divergence):
        monkeypatch.setattr(module, "row_stride", lambda *sizes: row_stride(*sizes[:-1], "cuda"))
        monkeypatch.setattr(module, "lay_out", lambda *chunk: lay_out(*chunk[:-1], "cuda"))


def check(case: Case, backward: str) -> None:
    def ours(p: TokenProblem):
        return linear_logprobs(
            p.hidden, p.weight, p.targets, bias=p.bias, outputs=OUTPUTS, backward=backward, **case.options
        )

    assert_matches_float64(
        ours, lambda p: materialised(p, case.transform, outputs=OUTPUTS), case.problem, scale=case.scale
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
    stride = sweep.row_stride(vocabulary, dtype, "cuda")
    out = sweep.lay_out(torch.empty(5 * stride, dtype=dtype), count, vocabulary, "cuda")
    assert out.shape == (count, vocabulary) and out.stride() == (stride, 1)
    assert stride * dtype.itemsize % 16 == 0 and 0 <= stride - vocabulary < 16 // dtype.itemsize


@given(vocabulary=st.integers(1, 40), count=st.integers(1, 5))
def test_a_cpus_chunk_is_vocabulary_major_and_dense(vocabulary, count):
    stride = sweep.row_stride(vocabulary, torch.float32, "cpu")
    out = sweep.lay_out(torch.empty(5 * stride), count, vocabulary, "cpu")
    assert stride == vocabulary and out.shape == (count, vocabulary) and out.T.is_contiguous()


@pytest.mark.parametrize("vocabulary", [4, 13, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_is_converted_by_parts(monkeypatch, vocabulary, dtype):
    monkeypatch.setattr(sweep, "CONVERTED_ENTRIES", {"cpu": 4})
    weight = torch.randn(vocabulary, 3).to(dtype)
    parts = [(columns, part.clone()) for columns, part in sweep.parts_in(torch.float32, weight)]
    assert [columns.start for columns, _ in parts] == ([0] if dtype == torch.float32 else [*range(0, vocabulary, 4)])
    torch.testing.assert_close(torch.cat([part for _, part in parts]), weight.float(), rtol=0, atol=0)


def test_a_copy_of_the_head_serves_the_products():
    """Where one was asked for; it is made once."""
    p = make_problem((3,), 4, 8, dtype=torch.float16, trainable=())
    chunks = sweep.Chunks(rows.ENGINE, Problem(p.hidden, p.weight, None, p.targets, LogitTransform()), ())
    assert chunks.head_at_hand is p.weight
    assert chunks.weight.dtype == torch.float32
    assert chunks.head_at_hand is chunks.weight


def test_rows_need_no_second_chunk_for_the_entropy(monkeypatch):
    """Its value and its gradient: temporaries are a part of the vocabulary."""
    z, targets = torch.randn(4096, 64).T, torch.arange(64)
    head = sweep.RowHead(None, LogitTransform())
    monkeypatch.setattr(rows, "PIECE_BYTES", {"cpu": 2**16})
    with watch_allocations() as seen:
        tile = rows.ENGINE.measure(z, head, targets, OUTPUTS, None)
        rows.ENGINE.gradient(tile, head, Upstream(entropy=torch.ones(64)), torch.float32)
    assert seen.peak <= 2.5 * 2**16 < z.numel() * z.itemsize / 4
