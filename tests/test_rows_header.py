"""kernels/rows.h, the row mathematics of GPU kernels, compiled for the host and held against float64 PyTorch."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_build import host_library, needs_compiler
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from logitless import reference
from logitless.types import LogitTransform

ROOT = Path(__file__).resolve().parents[1]
FIELDS = ("logprob", "lse", "entropy", "log_sum_sq", "mean_logit", "correct")
INF = math.inf

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(host_library(target="logitless_rows")))


def run(
    library: ctypes.CDLL, raw: Tensor, targets: Tensor, transform: LogitTransform, part_of: Tensor, upstream: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """The header's statistics and `dL/d raw`, in the dtype of `raw [N, V]`; `part_of [V]` cuts the rows."""
    function = library.logitless_rows_float if raw.dtype == torch.float32 else library.logitless_rows_double
    options = raw.new_tensor([transform.logit_scale, transform.softcap or 0.0, transform.temperature])
    statistics, gradient = raw.new_full((len(raw), len(FIELDS)), math.nan), torch.full_like(raw, math.nan)
    part_of, upstream = part_of.to(torch.int32), upstream.to(raw.dtype)

    def pointer(x: Tensor) -> ctypes.c_void_p:
        assert x.is_contiguous()
        return ctypes.c_void_p(x.data_ptr())

    function(
        pointer(raw),
        pointer(targets),
        ctypes.c_int64(raw.shape[0]),
        ctypes.c_int64(raw.shape[1]),
        pointer(part_of),
        ctypes.c_int32(int(part_of.max()) + 1),
        pointer(options),
        pointer(upstream),
        pointer(statistics),
        pointer(gradient),
    )
    return dict(zip(FIELDS, statistics.unbind(1), strict=True)), gradient


def expected(
    raw: Tensor, targets: Tensor, transform: LogitTransform, upstream: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics and gradient by the reference and autograd in float64. The head is the identity: z is raw."""
    raw = raw.double().requires_grad_()
    masked = raw.isneginf()
    z = raw.masked_fill(masked, 0) * transform.logit_scale
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    stats = reference.statistics(z.masked_fill(masked, -INF) / transform.temperature, targets, FIELDS)
    differentiable = (stats.logprob, stats.lse, stats.entropy, stats.mean_logit)
    total = sum((x * u).sum() for x, u in zip(differentiable, upstream.double().T, strict=True) if u.any())
    (gradient,) = torch.autograd.grad(total, raw)
    return {name: getattr(stats, name).detach() for name in FIELDS}, gradient


def check(
    library: ctypes.CDLL, raw: Tensor, targets: Tensor, transform: LogitTransform, part_of: Tensor, upstream: Tensor
) -> None:
    """Statistics and gradients within a few roundings of the largest logit and of the logarithm of a sum of all."""
    # A saturated softcap ties logits in one precision that the other tells apart.
    fields = FIELDS if transform.softcap is None else FIELDS[:-1]
    for dtype in (torch.float32, torch.float64):
        x = raw.to(dtype)
        want, want_gradient = expected(x, targets, transform, upstream)
        found, gradient = run(library, x, targets, transform, part_of, upstream)
        largest = x.masked_fill(x.isinf(), 0).abs().max().item() * abs(transform.slope)
        tolerance = 8 * torch.finfo(dtype).eps * (1 + largest + math.log(raw.shape[1]))
        for name in fields:
            torch.testing.assert_close(found[name].double(), want[name], rtol=0, atol=tolerance, msg=f"{name}, {dtype}")
        scale = (1 + upstream.abs().max().item()) * max(1.0, abs(transform.slope)) * (1 + math.log(raw.shape[1]))
        torch.testing.assert_close(gradient.double(), want_gradient, rtol=0, atol=tolerance * scale)


TRANSFORMS = st.builds(
    LogitTransform,
    logit_scale=st.sampled_from([1.0, 0.25, 2.0]),
    softcap=st.sampled_from([None, 5.0, 30.0]),
    temperature=st.sampled_from([1.0, 0.7, 3.0]),
)


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 4),
    vocabulary=st.integers(2, 67),
    spread=st.sampled_from([0.1, 3.0, 40.0]),
    parts=st.integers(1, 33),
    transform=TRANSFORMS,
)
@example(seed=0, rows=1, vocabulary=1, spread=1.0, parts=5, transform=LogitTransform())
def test_any_split_merged_in_any_order(
    library: ctypes.CDLL, seed: int, rows: int, vocabulary: int, spread: float, parts: int, transform: LogitTransform
) -> None:
    """Columns are dealt to the parts at random, so parts interleave and some stay empty."""
    g = torch.Generator().manual_seed(seed)
    raw = torch.randn(rows, vocabulary, generator=g) * spread
    targets = torch.randint(vocabulary, (rows,), generator=g)
    part_of = torch.randint(parts, (vocabulary,), generator=g)
    upstream = torch.randn(rows, 4, generator=g)
    check(library, raw, targets, transform, part_of=part_of, upstream=upstream)


@given(
    seed=st.integers(0, 2**32 - 1),
    masked=st.floats(0.1, 0.95),
    parts=st.integers(1, 9),
    transform=TRANSFORMS,
    mask_target=st.booleans(),
)
def test_masked_vocabulary(
    library: ctypes.CDLL, seed: int, masked: float, parts: int, transform: LogitTransform, mask_target: bool
) -> None:
    """-inf over part of the vocabulary, whole parts of it included; without mean_logit, which is -inf there."""
    g = torch.Generator().manual_seed(seed)
    raw = torch.randn(3, 40, generator=g) * 4
    part_of = torch.arange(40) * parts // 40
    hidden_part = int(torch.randint(parts, (), generator=g))
    raw[:, (torch.rand(40, generator=g) < masked) | (part_of == hidden_part)] = -INF
    targets = torch.tensor([0, 7, 39])
    raw[:, 20] = 1.0  # something is left
    if not mask_target:
        raw[torch.arange(3), targets] = 2.0
    upstream = torch.randn(3, 4, generator=g)
    upstream[:, 3] = 0
    if mask_target:
        upstream[:, 0] = 0  # the gradient of log 0 is not a number in the reference
    check(library, raw, targets, transform, part_of=part_of, upstream=upstream)


def test_confident_token_keeps_its_digits(library: ctypes.CDLL) -> None:
    """A 20-nat margin: relative, not absolute, precision of logprob, entropy and the target's gradient."""
    raw, targets = torch.zeros(1, 64), torch.tensor([5])
    raw[0, 5] = 20.0
    upstream = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    want, want_gradient = expected(raw, targets, LogitTransform(), upstream)
    found, gradient = run(library, raw, targets, LogitTransform(), torch.arange(64) % 8, upstream)
    for name in ("logprob", "entropy"):
        torch.testing.assert_close(found[name].double(), want[name], rtol=1e-6, atol=0)
        assert found[name].item() != 0
    assert gradient[0, 5].item() == pytest.approx(-math.expm1(want["logprob"].item()), rel=1e-6)
    torch.testing.assert_close(gradient.double()[:, :5], want_gradient[:, :5], rtol=1e-5, atol=0)


def test_only_the_target_is_left(library: ctypes.CDLL) -> None:
    raw = torch.full((1, 8), -INF)
    raw[0, 3] = 2.5
    found, gradient = run(
        library, raw, torch.tensor([3]), LogitTransform(), torch.arange(8) % 3, torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    )
    got = {name: value.item() for name, value in found.items()}
    assert got == {"logprob": 0, "lse": 2.5, "entropy": 0, "log_sum_sq": 0, "mean_logit": -INF, "correct": 1}
    assert gradient.tolist() == [[0, 0, 0, 1, 0, 0, 0, 0]]


def test_ties_with_the_target_count_as_correct(library: ctypes.CDLL) -> None:
    raw = torch.tensor([[1.0, 3.0, 3.0], [1.0, 3.0, 3.5]])
    found, _ = run(library, raw, torch.tensor([1, 1]), LogitTransform(), torch.tensor([0, 0, 0]), torch.zeros(2, 4))
    assert found["correct"].tolist() == [1, 0]


@pytest.mark.parametrize("position", [0, 3, 7])
def test_nan_reaches_every_result(library: ctypes.CDLL, position: int) -> None:
    raw = torch.randn(1, 8)
    raw[0, position] = math.nan
    found, gradient = run(library, raw, torch.tensor([3]), LogitTransform(), torch.arange(8) % 3, torch.ones(1, 4))
    assert all(found[name].isnan().all() for name in FIELDS[:-1])
    assert gradient.isnan().all()


@pytest.mark.slow
def test_under_sanitizers() -> None:
    """The tests above with the library built under AddressSanitizer and UndefinedBehaviorSanitizer."""
    runtime = subprocess.run(["c++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("the compiler has no AddressSanitizer runtime")
    library = host_library("address", target="logitless_rows")
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED_RUN.format(library=str(library), tests=str(Path(__file__).parent))],
        capture_output=True,
        text=True,
        env={"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(ROOT / "python")},
    )
    assert done.returncode == 0 and "ERROR" not in done.stderr, done.stdout + done.stderr
    assert "checked" in done.stdout


SANITIZED_RUN = """
import ctypes, sys
sys.path.insert(0, {tests!r})
import torch
import test_rows_header as t
library = ctypes.CDLL({library!r})
t.test_confident_token_keeps_its_digits(library)
t.test_only_the_target_is_left(library)
t.test_ties_with_the_target_count_as_correct(library)
for vocabulary, parts in ((1, 1), (2, 7), (67, 16), (1000, 33)):
    g = torch.Generator().manual_seed(vocabulary)
    raw = torch.randn(5, vocabulary, generator=g) * 9
    raw[:, 1 : vocabulary // 2] = -t.INF
    upstream = torch.randn(5, 4, generator=g)
    upstream[:, 3] = 0
    part_of = torch.randint(parts, (vocabulary,), generator=g)
    transform = t.LogitTransform(softcap=10.0)
    t.check(library, raw, torch.zeros(5, dtype=torch.int64), transform, part_of=part_of, upstream=upstream)
print("checked")
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_nvcc_takes_the_same_text(tmp_path: Path, architecture: str) -> None:
    """A kernel can use every function of the header, without a warning."""
    source = tmp_path / "rows.cu"
    source.write_text(KERNEL)
    command = ["nvcc", "-std=c++17", f"-arch={architecture}", "-Werror", "all-warnings", "-cubin"]
    command += ["-I", str(ROOT / "kernels"), "-o", str(tmp_path / "rows.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


KERNEL = """
#include "rows.h"
using namespace logitless;
template <typename T>
__global__ void row(const T* raw, T* out, std::int64_t vocabulary, Transform<T> options, Upstream<T> g) {
    Moments<T> others = no_columns<T>();
    for (std::int64_t j = 1; j < vocabulary; ++j) others = merge(others, one_column(transform(options, raw[j])));
    const RowStatistics<T> found = finish(others, transform(options, raw[0]), vocabulary);
    out[0] = target_gradient(g, found, vocabulary) * derivative(options, raw[0]);
    for (std::int64_t j = 1; j < vocabulary; ++j)
        out[j] = other_gradient(g, found, transform(options, raw[j]), vocabulary) * derivative(options, raw[j]);
}
template __global__ void row<float>(const float*, float*, std::int64_t, Transform<float>, Upstream<float>);
template __global__ void row<double>(const double*, double*, std::int64_t, Transform<double>, Upstream<double>);
"""
