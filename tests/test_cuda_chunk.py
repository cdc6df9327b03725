"""The chunk and merge kernels of kernels/cuda against float64 PyTorch: through the C interface, and under the ops.

They run on a GPU if there is one. Otherwise their own code runs on the CPU, compiled against host/shim.h.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cases import Case, cases, subsets
from cuda_build import ROOT, host_library, library_here, needs_compiler, run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitless import TokenStats, backends, linear_logprobs, linear_token_loss, reference
from logitless.backends import cuda
from logitless.backends.approximate.blocks import PAIR_BLOCK
from logitless.backends.exact import gradients, products
from logitless.backends.interface import Upstream
from logitless.kernels.cuda import library as cuda_library
from logitless.kernels.cuda.library import DTYPE_CODES, Library
from logitless.testing import TokenProblem, assert_matches_float64, make_problem, materialised, poison_empty
from logitless.types import DIFFERENTIABLE, OUTPUTS, Head, LogitTransform, statistics_dtype

INF = math.inf
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
HALF_TYPES = (torch.bfloat16, torch.float16)

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def library() -> Library:
    return cuda_library.load(library_here())


@pytest.fixture(scope="module")
def backend(library: Library) -> Iterator[None]:
    """The backend "cuda" takes tensors on `DEVICE`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cuda_library.VARIABLE, str(library.path))
        patch.setitem(backends.BACKENDS, "cuda", cuda.CUDA)
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Through the C interface


@dataclass
class Chunk:
    """Raw products inside a wider matrix of NaNs, and what goes with them."""

    memory: Tensor  # [n, stride]
    vocabulary: int
    bias: Tensor | None
    targets: Tensor
    transform: LogitTransform

    @property
    def raw(self) -> Tensor:
        return self.memory[:, : self.vocabulary]

    @property
    def dtype(self) -> torch.dtype:
        return statistics_dtype(self.memory.dtype)

    def head(self) -> tuple:
        """The arguments that both functions begin with."""
        matrix = (self.memory, self.memory.dtype, *self.raw.shape, self.memory.stride(0))
        t = self.transform
        return (*matrix, self.bias, self.targets, t.logit_scale, t.softcap or 0.0, t.temperature)


def make_chunk(
    rows: int,
    vocabulary: int,
    dtype: torch.dtype = torch.float32,
    *,
    padding: int = 0,
    spread: float = 3.0,
    bias: bool = False,
    transform: LogitTransform | None = None,
    seed: int = 0,
) -> Chunk:
    g = torch.Generator().manual_seed(seed)
    memory = torch.full((rows, vocabulary + padding), math.nan, dtype=dtype)
    memory[:, :vocabulary] = (torch.randn(rows, vocabulary, generator=g) * spread).to(dtype)
    offset = torch.randn(vocabulary, generator=g).to(statistics_dtype(dtype)) if bias else None
    targets = torch.randint(vocabulary, (rows,), generator=g)
    offset = None if offset is None else offset.to(DEVICE)
    return Chunk(memory.to(DEVICE), vocabulary, offset, targets.to(DEVICE), transform or LogitTransform())


def nans(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype, device=DEVICE)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def measure(library: Library, chunk: Chunk, block: int | None = None) -> tuple[dict[str, Tensor], Tensor | None]:
    """All statistics, and the logsumexp of blocks of the vocabulary. What is not written is NaN."""
    rows, vocabulary = chunk.raw.shape
    found = {name: nans(rows, dtype=chunk.dtype) for name in OUTPUTS}
    blocks = None if block is None else nans(rows, -(-vocabulary // block), dtype=chunk.dtype)
    size = library.measure_workspace(rows, vocabulary, chunk.memory.dtype)
    workspace = torch.full((size,), 255, dtype=torch.uint8, device=DEVICE)
    stride = 0 if blocks is None else blocks.stride(0)
    library.launch("measure", *chunk.head(), *found.values(), blocks, stride, block or 0, workspace, size, on=DEVICE)
    return found, blocks


def gradient(
    library: Library, chunk: Chunk, stats: dict[str, Tensor], upstream: Tensor, out: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`dL/ds [n, V]` without the target's entry, and that entry; overwrites the chunk. upstream `[4, n]`."""
    target = nans(len(chunk.raw), dtype=chunk.dtype)
    inputs = (stats["logprob"], stats["lse"], stats["entropy"], *upstream.to(chunk.dtype).contiguous())
    library.launch("gradient", *chunk.head(), *inputs, target, out, on=DEVICE)
    return chunk.memory.view(out)[:, : chunk.vocabulary], target


def expected(chunk: Chunk, upstream: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics and gradients by the reference and autograd, in float64."""
    raw = chunk.raw.double().requires_grad_()
    s = raw if chunk.bias is None else raw + chunk.bias.double()
    stats = reference.statistics(reference.transformed(s, chunk.transform), chunk.targets, OUTPUTS)
    total = sum(
        (getattr(stats, name) * u).sum() for name, u in zip(DIFFERENTIABLE, upstream.double(), strict=True) if u.any()
    )
    (found,) = torch.autograd.grad(total, raw)
    return {name: getattr(stats, name).detach() for name in OUTPUTS}, found


def check(library: Library, chunk: Chunk, upstream: Tensor, out: torch.dtype, block: int | None = None) -> None:
    """Statistics within a few roundings of the largest finite logit, or of the largest logsumexp of that many logits;
    gradients likewise, and rounded to their type."""
    want, want_gradient = expected(chunk, upstream)
    s = chunk.raw.double() if chunk.bias is None else chunk.raw.double() + chunk.bias.double()
    z = reference.transformed(s, chunk.transform)
    before = chunk.memory.clone()
    found, blocks = measure(library, chunk, block)
    torch.testing.assert_close(chunk.memory, before, rtol=0, atol=0, equal_nan=True)
    largest = s.masked_fill(s.isinf(), 0).abs().max().item() * abs(chunk.transform.slope)
    tolerance = 8 * torch.finfo(chunk.dtype).eps * (1 + largest + math.log(chunk.vocabulary))
    for name in OUTPUTS:
        if name == "correct" and chunk.transform.softcap is not None:
            continue  # a saturated softcap ties logits in one precision that the other tells apart
        torch.testing.assert_close(
            found[name].double(), want[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    if blocks is not None and block is not None:
        others = z.scatter(1, chunk.targets[:, None], -INF)
        parts = [part.logsumexp(1) for part in others.split(block, 1)]
        torch.testing.assert_close(blocks.double(), torch.stack(parts, 1), rtol=0, atol=tolerance)
    made, target = gradient(library, chunk, found, upstream, out)
    scale = (1 + upstream.abs().max().item()) * max(1.0, abs(chunk.transform.slope)) * (1 + math.log(chunk.vocabulary))
    column = chunk.targets[:, None]
    torch.testing.assert_close(target.double(), want_gradient.gather(1, column)[:, 0], rtol=0, atol=tolerance * scale)
    assert (made.gather(1, column) == 0).all()
    others = want_gradient.scatter(1, column, 0)
    rounding = torch.finfo(out).eps
    smallest = torch.finfo(out).smallest_normal * rounding
    torch.testing.assert_close(made.double(), others, rtol=rounding, atol=max(tolerance * scale, smallest))


transforms = st.builds(
    LogitTransform,
    logit_scale=st.sampled_from([1.0, 0.25, 2.0]),
    softcap=st.sampled_from([None, 5.0, 30.0]),
    temperature=st.sampled_from([1.0, 0.7, 3.0]),
)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


def gradient_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    return (torch.float32, *HALF_TYPES) if dtype == torch.float32 else (dtype,)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 6),
    vocabulary=st.integers(1, 300),
    padding=st.integers(0, 8),
    dtype=dtypes,
    spread=st.sampled_from([0.1, 3.0, 30.0]),
    bias=st.booleans(),
    transform=transforms,
    block=st.sampled_from([None, 32, 64, 128, 256]),
    data=st.data(),
)
def test_short_rows(library, seed, rows, vocabulary, padding, dtype, spread, bias, transform, block, data):
    """A warp for a row; aligned where vocabulary and padding happen to make it so."""
    chunk = make_chunk(
        rows, vocabulary, dtype, padding=padding, spread=spread, bias=bias, transform=transform, seed=seed
    )
    out = data.draw(st.sampled_from(gradient_dtypes(dtype)))
    check(library, chunk, draw(4, rows, seed=seed), out, block)


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 2),
    vocabulary=st.integers(2049, 6000).map(lambda v: v - v % 8) | st.integers(2049, 6000),
    dtype=dtypes,
    bias=st.booleans(),
    transform=transforms,
    block=st.sampled_from([None, 64, 256, 1024]),
    data=st.data(),
)
@example(
    seed=0, rows=1, vocabulary=16_500, dtype=torch.float32, bias=True, transform=LogitTransform(), block=128, data=None
)
@example(
    seed=0,
    rows=2,
    vocabulary=24_584,
    dtype=torch.bfloat16,
    bias=False,
    transform=LogitTransform(),
    block=None,
    data=None,
)
def test_long_rows(library, seed, rows, vocabulary, dtype, bias, transform, block, data):
    """A block for a row, and from 16384 columns on several, which the merge kernel joins."""
    assert (vocabulary >= 16_384) == (library.measure_workspace(rows, vocabulary, dtype) > 0)
    chunk = make_chunk(rows, vocabulary, dtype, bias=bias, transform=transform, seed=seed)
    out = gradient_dtypes(dtype)[0] if data is None else data.draw(st.sampled_from(gradient_dtypes(dtype)))
    check(library, chunk, draw(4, rows, seed=seed), out, block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("vocabulary", [160, 2600])
def test_masked_vocabulary(library, dtype, softcap, vocabulary):
    """-inf over most of the vocabulary, whole lanes and blocks of it, by the bias and by the raw products."""
    chunk = make_chunk(3, vocabulary, dtype, bias=True, transform=LogitTransform(2.0, softcap, 0.7))
    chunk.bias[: vocabulary - 40] = -INF
    chunk.raw[:, -9:-2] = -INF
    chunk.targets[:] = torch.tensor([vocabulary - 1, vocabulary - 20, vocabulary - 30])
    upstream = draw(4, 3)
    upstream[3] = 0  # mean_logit is -inf
    check(library, chunk, upstream, torch.bfloat16, 32)


def test_only_the_target_is_left(library):
    chunk = make_chunk(2, 200)
    chunk.raw[:] = -INF
    chunk.raw.scatter_(1, chunk.targets[:, None], 2.5)
    found, blocks = measure(library, chunk, 64)
    assert {name: x.tolist() for name, x in found.items()} == {
        "logprob": [0, 0],
        "lse": [2.5, 2.5],
        "entropy": [0, 0],
        "mean_logit": [-INF, -INF],
        "correct": [1, 1],
        "log_sum_sq": [0, 0],
    }
    assert (blocks == -INF).all()
    made, target = gradient(
        library, chunk, found, torch.tensor([[1.0], [1], [1], [0]], device=DEVICE).expand(4, 2), torch.float32
    )
    assert (made == 0).all() and target.tolist() == [1, 1]


def test_a_masked_target_has_logprob_minus_infinity(library):
    chunk = make_chunk(1, 50)
    chunk.raw[0, chunk.targets[0]] = -INF
    found, _ = measure(library, chunk)
    assert found["logprob"].item() == -INF and found["correct"].item() == 0 and found["lse"].isfinite().all()


def test_confident_token_keeps_its_digits(library):
    """A 20-nat margin: relative, not absolute, precision of logprob, entropy and the target's gradient."""
    chunk = make_chunk(1, 64)
    chunk.raw[:] = 0
    chunk.raw[0, chunk.targets[0]] = 20
    upstream = torch.tensor([[1.0], [0], [0], [0]], device=DEVICE)
    want, want_gradient = expected(chunk, upstream)
    found, _ = measure(library, chunk)
    for name in ("logprob", "entropy"):
        torch.testing.assert_close(found[name].double(), want[name], rtol=2e-6, atol=0)
    made, target = gradient(library, chunk, found, upstream, torch.float32)
    torch.testing.assert_close(target.double(), want_gradient[0, chunk.targets], rtol=2e-6, atol=0)
    torch.testing.assert_close(
        made.double().sum(), want_gradient.sum() - want_gradient[0, chunk.targets[0]], rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("column", [0, 77, 99, 2500])
@pytest.mark.parametrize("masked", [False, True])
def test_nan_reaches_every_result(library, column, masked):
    """A NaN reaches them even if all other columns of its part are masked."""
    chunk = make_chunk(1, 3000 if column > 99 else 100)
    if masked:
        chunk.raw[:] = -INF
        chunk.raw[:, 5] = 1.0
    chunk.targets[0] = 5
    chunk.raw[0, column] = math.nan
    found, _ = measure(library, chunk)
    assert all(found[name].isnan().all() for name in OUTPUTS if name != "correct")
    reached = ~chunk.raw.isneginf()  # of what is masked, the gradient is the mean logit's alone
    reached[0, 5] = False
    made, target = gradient(library, chunk, found, torch.ones(4, 1, device=DEVICE), torch.float32)
    assert torch.equal(made.isnan(), reached) and target.isnan().all()


def test_what_is_not_asked_for_is_not_written(library):
    chunk = make_chunk(3, 40)
    lse = nans(3)
    library.launch("measure", *chunk.head(), None, lse, None, None, None, None, None, 0, 0, None, 0, on=DEVICE)
    torch.testing.assert_close(lse, chunk.raw.logsumexp(1))
    found, _ = measure(library, chunk)
    target = nans(3)
    given_stats = (found["logprob"], lse, None)
    library.launch("gradient", *chunk.head(), *given_stats, *(None,) * 4, target, torch.float32, on=DEVICE)
    assert (chunk.raw == 0).all() and (target == 0).all()  # no gradient in, none out


@given(
    seed=st.integers(0, 2**32 - 1),
    parts=st.integers(1, 40),
    rows=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=20)
def test_merge(library, seed, parts, rows, dtype):
    """Moments of random parts, some of them empty, are those of the whole."""
    g = torch.Generator().manual_seed(seed)
    z = draw(rows, parts, 5, seed=seed).to(dtype) * 4
    z[:, (torch.rand(parts, generator=g) < 0.3).to(DEVICE)] = -INF
    own = draw(rows, seed=seed + 1).to(dtype)
    top = z.amax(-1, keepdim=True)
    shift = torch.where(z.isneginf(), -INF, z - top)
    e = shift.exp()
    total = torch.where(z.isneginf(), 0, z).sum(-1)
    moments = torch.stack([top[..., 0], e.sum(-1), torch.xlogy(e, e).sum(-1), e.square().sum(-1), total])
    moments = moments.permute(2, 0, 1).contiguous()  # [parts, 5, rows]
    found = {name: nans(rows, dtype=dtype) for name in OUTPUTS}
    blocks = nans(rows, parts, dtype=dtype)
    sizes = (dtype, parts, 5, rows, 5 * parts + 1)
    library.launch("merge", moments, own, *sizes, *found.values(), blocks, parts, on=DEVICE)
    everything = torch.cat([own[:, None], z.flatten(1)], 1).double()
    want = reference.statistics(everything, torch.zeros(rows, dtype=torch.int64, device=DEVICE), OUTPUTS)
    largest = everything[everything.isfinite()].abs().max().item()
    tolerance = 8 * torch.finfo(dtype).eps * (1 + largest + math.log(everything.shape[1]))
    for name in OUTPUTS:
        if name != "mean_logit":  # an empty part has no columns here, but masked ones in `everything`
            torch.testing.assert_close(found[name].double(), getattr(want, name), rtol=0, atol=tolerance)
    mean = (total.double().sum(1) + own.double()) / (5 * parts + 1)
    torch.testing.assert_close(found["mean_logit"].double(), mean, rtol=0, atol=tolerance)
    torch.testing.assert_close(blocks.double(), z.double().logsumexp(-1), rtol=0, atol=tolerance)
    first_two, few = (
        moments[:, :2].contiguous(),
        {name: nans(rows, dtype=dtype) for name in ("logprob", "lse", "correct")},
    )
    sizes, again = (dtype, parts, 2, rows, 5 * parts + 1), nans(rows, parts, dtype=dtype)
    library.launch("merge", first_two, own, *sizes, *(few.get(name) for name in OUTPUTS), again, parts, on=DEVICE)
    assert torch.equal(again, blocks) and all(torch.equal(few[name], found[name]) for name in few)


def test_same_input_gives_the_same_bits(library):
    chunk = make_chunk(2, 17_000)
    first, second = measure(library, chunk)[0], measure(library, chunk)[0]
    assert all(torch.equal(first[name], second[name]) for name in OUTPUTS)


BAD_MEASURE = {  # position of an argument, its value, what the sentence says
    "dtype": (1, 7, "dtype"),
    "rows": (2, -1, "size"),
    "vocabulary": (3, 0, "size"),
    "stride": (4, 39, "stride"),
    "raw": (0, None, "pointer"),
    "targets": (6, None, "pointer"),
    "logit_scale": (7, 0.0, "not positive and finite"),
    "softcap": (8, -1.0, "not positive and finite"),
    "temperature": (9, INF, "not positive and finite"),
}


@pytest.mark.parametrize("case", BAD_MEASURE)
def test_bad_arguments_are_refused_with_a_sentence(library, case):
    position, value, sentence = BAD_MEASURE[case]
    head = list(make_chunk(3, 40).head())
    head[position] = value
    with pytest.raises(RuntimeError, match=f"logitless_measure: .*{sentence}"):
        library.launch("measure", *head, *(None,) * 6, None, 0, 0, None, 0, on=DEVICE)


def test_the_rest_of_what_is_refused(library):
    chunk, lse, blocks = make_chunk(3, 40), torch.zeros(3, device=DEVICE), torch.zeros(3, 2, device=DEVICE)
    start = (*chunk.head(), None, lse, *(None,) * 4)
    with pytest.raises(RuntimeError, match="size"):
        library.launch("measure", *start, blocks, 2, 48, None, 0, on=DEVICE)  # no power of two
    with pytest.raises(RuntimeError, match="stride"):
        library.launch("measure", *start, blocks, 1, 32, None, 0, on=DEVICE)
    long = make_chunk(1, 20_000)
    with pytest.raises(RuntimeError, match="workspace"):
        library.launch("measure", *long.head(), None, lse, *(None,) * 4, None, 0, 0, None, 0, on=DEVICE)
    half = make_chunk(3, 40, torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        library.launch("gradient", *half.head(), lse, lse, None, *(None,) * 4, lse, torch.float32, on=DEVICE)
    with pytest.raises(RuntimeError, match="pointer"):  # an entropy's gradient needs the entropy
        library.launch("gradient", *chunk.head(), lse, lse, None, None, None, lse, None, lse, torch.float32, on=DEVICE)
    with pytest.raises(RuntimeError, match="dtype"):
        library.launch("merge", lse, lse, torch.bfloat16, 1, 5, 3, 40, None, lse, *(None,) * 4, None, 0, on=DEVICE)
    for count, entropy in ((4, None), (2, lse)):  # two moments make no entropy
        with pytest.raises(RuntimeError, match="number of moments"):
            library.launch(
                "merge", lse, lse, torch.float32, 1, count, 3, 40, None, lse, entropy, *(None,) * 4, 0, on=DEVICE
            )


@pytest.mark.parametrize("dtype", DTYPE_CODES)
def test_no_rows(library, dtype):
    chunk = make_chunk(0, 40, dtype)
    found, _ = measure(library, chunk)
    assert found["lse"].shape == (0,)
    gradient(library, chunk, found, torch.zeros(4, 0, device=DEVICE), dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Under the ops


def moved(tensors: tuple, device: torch.device) -> tuple:
    """Problems and results are the CPU's, in between they are on `DEVICE`."""
    return type(tensors)(*(None if x is None else x.to(device) for x in tensors))


def statistics(problem: TokenProblem, **options) -> TokenStats:
    p = moved(problem, DEVICE)
    found = linear_logprobs(p.hidden, p.weight, p.targets, bias=p.bias, backend="cuda", **options)
    return moved(found, torch.device("cpu"))


def check_op(case: Case, outputs: tuple[str, ...], backward: str) -> None:
    def ours(p):
        return statistics(p, outputs=outputs, backward=backward, **case.options)

    with poison_empty():
        assert_matches_float64(
            ours,
            lambda p: materialised(p, case.transform, outputs=outputs),
            case.problem,
            scale=max(case.scale_of(outputs), case.bent_scale),
        )


outputs_subset = st.sets(st.sampled_from(OUTPUTS), min_size=1).map(lambda s: tuple(x for x in OUTPUTS if x in s))


@settings(max_examples=60)
@given(case=cases(), outputs=outputs_subset, backward=st.sampled_from(["auto", "recompute"]))
def test_any_options_against_float64(backend, case, outputs, backward):
    check_op(case, outputs, backward)


@pytest.mark.slow
@settings(max_examples=1000)
@given(case=cases(trainable=subsets), outputs=outputs_subset, backward=st.sampled_from(["auto", "recompute"]))
def test_many_options_against_float64(backend, case, outputs, backward):
    check_op(case, outputs, backward)


@settings(max_examples=20)
@given(case=cases(trainable=st.just(("hidden",))), outputs=st.sampled_from(["logprob", "logprob lse", "lse"]))
def test_frozen_head_keeps_one_vector_per_token(backend, case, outputs):
    check_op(case, tuple(outputs.split()), "single_pass")


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ragged_sizes(backend, dtype, softcap):
    """Sizes that no tile divides. H is a multiple of 8, so the fused forward runs too."""
    problem = make_problem((70,), 40, 507, dtype=dtype, bias=True, ignored=0.2)
    check_op(Case(problem, LogitTransform(softcap=softcap), 20), DIFFERENTIABLE, "recompute")


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(backend, softcap):
    problem = make_problem((4,), 3, 8, dtype=torch.float64, bias=True, ignored=0.3)
    options = dict(outputs=DIFFERENTIABLE, softcap=softcap, logit_scale=1.3, temperature=0.8)

    def function(hidden, weight, bias):
        return statistics(TokenProblem(hidden, weight, bias, problem.targets), **options)[:4]

    assert torch.autograd.gradcheck(function, (problem.hidden, problem.weight, problem.bias))


@settings(max_examples=20)
@given(case=cases())
def test_single_pass(backend, case):
    """A loss of every differentiable statistic, in one sweep."""

    def loss(stats):
        return stats.entropy * 0.3 - stats.logprob * stats.logprob.exp() + 0.1 * stats.lse.square()

    outputs = ("logprob", "lse", "entropy")

    def ours(p):
        p = moved(p, DEVICE)
        options = {**case.options, "backend": "cuda", "outputs": outputs, "reduction": "sum"}
        return linear_token_loss(p.hidden, p.weight, p.targets, loss, bias=p.bias, **options).cpu()

    def theirs(p):
        counts = p.targets != -100
        stats = materialised(p, case.transform, outputs=outputs)
        return torch.where(counts, loss(stats), 0).sum()

    assert_matches_float64(ours, theirs, case.problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bfloat16_chunks(backend, dtype):
    """`chunk_dtype`: the chunk's logits are bfloat16, and so is their gradient."""
    problem = make_problem((12,), 16, 64, dtype=dtype)
    found = statistics(problem, backward="recompute", chunk_dtype=torch.bfloat16).logprob
    want = materialised(problem.to(torch.float64)).logprob
    torch.testing.assert_close(found.double(), want, rtol=0, atol=0.1)
    ours = torch.autograd.grad(found.sum(), problem.hidden)[0]
    exact = problem.to(torch.float64)
    theirs = torch.autograd.grad(materialised(exact).logprob.sum(), exact.hidden)[0]
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=0.03 * theirs.abs().max().item())


def test_no_second_chunk_is_allocated(backend):
    """The gradient overwrites the logits."""
    raw, ones = draw(4, 64), torch.ones(4, device=DEVICE)
    head = Head(raw.new_empty(64, 0))
    assert cuda.CUDA.rows.buffers(head, None) == 1
    tile = cuda.CUDA.rows.measure(raw, head, torch.zeros_like(ones, dtype=torch.int64), ("entropy",), None)
    upstream = Upstream(logprob=ones, entropy=ones)
    for_bfloat16 = cuda.CUDA.rows.gradient(tile, head, upstream, torch.bfloat16).matrix
    assert for_bfloat16.data_ptr() == raw.data_ptr() and for_bfloat16.stride() == (128, 1)


def summed(stats: TokenStats) -> torch.Tensor:
    return torch.stack([x for x in stats if x is not None]).sum(0)


@pytest.mark.parametrize("outputs", [("logprob",), ("logprob", "lse", "entropy")])
@pytest.mark.parametrize("backward", ["recompute", "single_pass"])
def test_one_chunk_rounds_the_heads_gradient_once(monkeypatch, backend, backward, outputs):
    """bfloat16: the product that makes it writes it, targets and all; within the budget of materialised bfloat16."""
    monkeypatch.setattr(products, "has_bfloat16_units", lambda: True)
    problem = make_problem((40,), 16, 300, dtype=torch.bfloat16, bias=True, ignored=0.2)
    problem.targets[:20] = 7  # a sum in bfloat16 would lose most of them

    def ours(p):
        p = moved(p, DEVICE)
        options = dict(outputs=outputs, reduction="sum", backward=backward, backend="cuda")
        return linear_token_loss(p.hidden, p.weight, p.targets, summed, bias=p.bias, **options).cpu()

    def theirs(p):
        return torch.where(p.targets != -100, summed(materialised(p, outputs=outputs)), 0).sum()

    made: list[torch.dtype] = []
    finish = gradients.Accumulators.finish

    def watched(self):
        found = finish(self)
        made.append(found.weight.dtype)
        return found

    monkeypatch.setattr(gradients.Accumulators, "finish", watched)
    with poison_empty():
        assert_matches_float64(ours, theirs, problem)
    assert made == [torch.bfloat16]


def projects() -> bool:
    """Whether the fused forward makes the chunks here."""
    return DEVICE.type == "cpu" or torch.cuda.get_device_capability(DEVICE)[0] == 9


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 140),
    vocabulary=st.integers(1, 270),
    dtype=st.sampled_from(HALF_TYPES),
    bias=st.booleans(),
    transform=transforms,
    block=st.sampled_from([0, PAIR_BLOCK]),
    outputs=outputs_subset,
    mean_known=st.booleans(),
    padding=st.sampled_from([0, 1, 4]),
)
def test_a_chunk_of_one_kernel(
    backend, seed, rows, vocabulary, dtype, bias, transform, block, outputs, mean_known, padding
):
    """`project` leaves what a GEMM and `measure` leave: raw products, statistics, the blocks' logsumexps."""
    if not projects():
        pytest.skip("cuBLAS makes the chunks")
    hidden, weight = draw(rows, 16, seed=seed).to(dtype), draw(vocabulary, 16, seed=seed + 1).to(dtype)
    head = Head(weight, draw(vocabulary, seed=seed + 2) if bias else None, *transform.numbers)
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    mean = draw(rows, seed=seed + 3) if mean_known and "mean_logit" in outputs else None
    engine = cuda.CudaRows(block)
    with poison_empty():
        out = torch.empty(rows, vocabulary + padding, device=DEVICE)[:, :vocabulary]
        tile = engine.project(hidden, out, head, targets, outputs, mean)
    assert tile is not None and tile.logits.data_ptr() == out.data_ptr()
    exact = hidden.double() @ weight.double().T
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-6 * exact.abs().max().item() + 1e-6)
    expected = engine.measure(out, head, targets, outputs, mean)
    tolerance = 16 * torch.finfo(torch.float32).eps * (1 + exact.abs().max().item() * abs(transform.slope) + 6)
    for name in OUTPUTS:
        found, wanted = getattr(tile.stats, name), getattr(expected.stats, name)
        assert (found is None) == (wanted is None)
        if found is not None and not (name == "correct" and transform.softcap is not None):  # which ties
            torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
    if block:
        torch.testing.assert_close(tile.private, expected.private, rtol=0, atol=tolerance)
    else:
        assert tile.private is None


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_a_single_pass_reads_no_chunk_to_measure_it(backend, monkeypatch, dtype):
    if not projects():
        pytest.skip("cuBLAS makes the chunks")
    monkeypatch.setattr(cuda.CudaRows, "measure", None)
    problem = moved(make_problem((30,), 16, 100, dtype=dtype), DEVICE)
    options = {"backend": "cuda", "backward": "single_pass"}
    loss = linear_token_loss(problem.hidden, problem.weight, problem.targets, lambda stats: -stats.logprob, **options)
    loss.backward()
    want = -materialised(problem.to(torch.float64)).logprob.mean()
    torch.testing.assert_close(loss.double(), want, rtol=0, atol=1e-2)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="the suites' tensors are the CPU's")
def test_the_suites_of_the_ops(library):
    """Everything that is asked of every backend."""
    suites = ("tests/test_linear_logprobs.py", "tests/test_token_loss.py")
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cuda", *suites)
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, cuda_library.VARIABLE: str(library.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2000:]


# ---------------------------------------------------------------------------------------------------------------------
# Sanitizers, and that they see what they should


@pytest.mark.slow
@pytest.mark.parametrize("sanitize", ["address", "thread"])
def test_under_sanitizers(sanitize):
    """Every function over shapes that take every path, on memory allocated to the byte (host/sweep.c)."""
    done = run(host_library(sanitize, target="logitless_sweep"))
    assert done.stdout == "swept\n" and "ERROR" not in done.stderr


SHIM_USER = """
#include <cmath>
#include <cstdio>
#include "shim.h"

// Every thread adds up what its block wrote to shared memory.
void sum_kernel(float* out, bool waits, bool some_leave) {
    LOGITLESS_SHARED(float, values, 64);
    if (some_leave && threadIdx.x % 2) return;
    if (std::isnan(values[threadIdx.x])) values[threadIdx.x] = 1.0f;
    if (some_leave) __syncwarp();
    if (waits) __syncthreads();
    float sum = 0.0f;
    for (int i = 0; i < 64; ++i) sum += values[i];
    out[blockIdx.x * 64 + threadIdx.x] = sum;
}

int main(int count, char** arguments) {
    const bool waits = arguments[1][0] == 'w', some_leave = arguments[1][0] == 'l', shared_out = count > 2;
    float out[128];
    logitless::host::run_grid(dim3(2), dim3(64), 0, [&] {
        sum_kernel(shared_out ? out - blockIdx.x * 64 : out, waits, some_leave);
    });
    std::printf("%g\\n", double(out[0]));
}
"""


def build_shim_user(folder: Path, sanitize: bool) -> Path:
    host = ROOT / "kernels" / "cuda" / "host"
    source, program, shim = folder / "user.cpp", folder / "user", folder / "shim.o"
    source.write_text(SHIM_USER)
    defines = ["-DLOGITLESS_SANITIZE", "-DLOGITLESS_SANITIZE_THREAD"] if sanitize else []
    run("c++", "-std=c++17", "-O1", *defines, "-c", host / "shim.cpp", "-o", shim)
    flags = ["-fsanitize=thread", "-g"] if sanitize else []
    run("c++", "-std=c++17", "-O1", *flags, "-I", host, source, shim, "-o", program)
    return program


def test_shim_shows_what_is_wrong_with_a_kernel(tmp_path):
    """Shared memory begins as NaNs, and a warp's operation without all its lanes stops."""
    program = build_shim_user(tmp_path, sanitize=False)
    assert run(program, "waits").stdout == "64\n"
    done = subprocess.run([program, "leaves"], capture_output=True, text=True)
    assert done.returncode != 0 and "after some of its lanes have ended" in done.stderr


@pytest.mark.slow
def test_shim_shows_races(tmp_path):
    """A missing barrier, and two blocks that write to one place; not the same kernel as it should be."""
    program = build_shim_user(tmp_path, sanitize=True)
    assert run(program, "waits").stdout == "64\n"
    for arguments in (["no barrier"], ["waits", "one place for both blocks"]):
        done = subprocess.run([program, *arguments], capture_output=True, text=True)
        assert "ThreadSanitizer: data race" in done.stderr, arguments
