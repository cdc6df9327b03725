"""The tail-corrected backward of the backend "cuda", by its kernels (route.cuh, sparse.cuh).

They run on a GPU if there is one. Otherwise their own code runs on the CPU, compiled against host/shim.h.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import block_properties as properties
import pytest
import torch
from block_properties import PROPERTIES, Backend
from cuda_build import library_here, needs_compiler
from hypothesis import given, settings
from tail_cases import peaked_problem, tail_calls

from logitless import backends, linear_logprobs, tail_report
from logitless.backends import cuda
from logitless.kernels.cuda import library as cuda_library
from logitless.testing import poison_empty, watch_allocations
from logitless.types import Head, Options

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
HALF = Backend("cuda", torch.bfloat16, DEVICE)
#: What a kernel could have wrong first: the CPU takes a second for each, and more for the others.
FIRST = (
    properties.every_gradient_is_close,
    properties.more_tokens_than_a_slice,
    properties.the_report_is_exact,
    properties.flat_calls_are_exact,
    properties.a_softcap_is_exact,
    properties.a_tolerance_of_0_is_exact,
    properties.per_token_losses,
    properties.the_op_is_well_formed,
)
LATER = tuple(check for check in PROPERTIES if check not in FIRST)

pytestmark = needs_compiler


@pytest.fixture(autouse=True, scope="module")
def library() -> Iterator[None]:
    """The backend "cuda" takes tensors on `DEVICE`."""
    loaded = cuda_library.load(library_here())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cuda_library.VARIABLE, str(loaded.path))
        patch.setitem(backends.BACKENDS, "cuda", cuda.CUDA)
        yield


@settings(max_examples=2, deadline=None)
@given(tail_calls())
def test_the_bounds_hold(case: dict[str, Any]) -> None:
    with poison_empty():
        properties.check_bounds(HALF, case)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(tail_calls())
def test_the_bounds_hold_on_many(case: dict[str, Any]) -> None:
    properties.check_bounds(HALF, case)


@pytest.mark.parametrize("check", FIRST, ids=lambda check: check.__name__)
def test_properties(check: Callable[[Backend], None]) -> None:
    check(HALF)


@pytest.mark.slow
@pytest.mark.parametrize("check", LATER, ids=lambda check: check.__name__)
def test_more_properties(check: Callable[[Backend], None]) -> None:
    check(HALF)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["lse", "entropy", "mean_logit"])
def test_the_other_statistics(output: str) -> None:
    properties.the_other_statistics(HALF, output)


@pytest.mark.parametrize("frozen", [pytest.param(False, marks=pytest.mark.slow), True])
def test_preferences(frozen: bool) -> None:
    properties.preferences(HALF, frozen)


@pytest.mark.slow
def test_without_a_fused_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU without a fused forward, such as Blackwell, measures cuBLAS's chunks with their blocks."""
    monkeypatch.setattr(cuda, "fused_kernel", lambda hidden, weight: None)
    with poison_empty():
        properties.the_report_is_exact(HALF)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_other_dtypes_go_entry_by_entry(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """No listed kernel has them; the correction and its report are the same."""
    monkeypatch.setattr(cuda.CudaBlocks, "route", lambda *_: pytest.fail("it went by blocks"))
    properties.check_close(Backend("cuda", dtype, DEVICE), peaked_problem(), tail_tolerance=2.0**-8)


def test_what_goes_by_blocks() -> None:
    hidden, weight = torch.zeros(4, 16, dtype=torch.bfloat16), torch.zeros(300, 16, dtype=torch.bfloat16)
    plain, bent = Head(weight), Head(weight, softcap=30.0)
    corrected, options = cuda.CUDA.approximate("tail_corrected"), Options(backward="tail_corrected")
    assert corrected.saved_width(hidden, plain) == 3 == -(-300 // 128)
    assert corrected.saved_width(hidden, bent) == 2 == -(-300 // 256)
    assert not cuda.CudaBlocks().takes(hidden[:, :12], Head(weight[:, :12])), "rows of 24 bytes"
    assert corrected.tokens_at_once(hidden, plain, options) == sys.maxsize
    assert corrected.tokens_at_once(hidden, bent, options) < sys.maxsize
    assert cuda.CUDA.tokens_at_once(hidden, plain, Options()) < sys.maxsize


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_order_of_sums_follows_pytorch(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[object] = []
    launch = cuda_library.Library.launch

    def spy(library: cuda_library.Library, name: str, *arguments: Any, on: torch.device) -> None:
        if name == "sparse_d_hidden":
            launched.append(arguments[10])
        launch(library, name, *arguments, on=on)

    monkeypatch.setattr(cuda_library.Library, "launch", spy)
    with properties.deterministic(deterministic):
        properties.check_close(HALF, peaked_problem(count=10))
    assert launched == [int(deterministic)]


@pytest.mark.slow
def test_no_matrix_of_tokens_by_vocabulary() -> None:
    """Between the passes a 128th of the logits is kept, and a group's gradient keeps to the budget."""
    tokens, vocabulary, size = 200, 3000, 16
    made = peaked_problem(count=tokens)
    draw = torch.Generator().manual_seed(0)
    weight = HALF.cast(torch.randn(vocabulary, size, generator=draw) * 6 / size**0.5).requires_grad_()
    hidden, targets = properties.leaf(HALF.cast(made["hidden"])), HALF.cast(made["targets"])
    budget = 2**18
    with tail_report() as report, watch_allocations(DEVICE.type) as seen:
        stats = linear_logprobs(hidden, weight, targets, chunk_bytes=budget, **HALF.options())
        stats.logprob.sum().backward()
    assert report.exact_tokens == 0
    assert seen.largest <= max(budget, 4 * vocabulary * size), "the head's gradient is the largest"
    assert seen.peak < 4 * tokens * vocabulary / 2, "half of float32 logits"
