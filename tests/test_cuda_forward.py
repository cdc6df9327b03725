"""The fused forwards of kernels/cuda, up to the statistics, against float64. On a GPU where there is one; elsewhere the
Ampere kernel's own text on the CPU, its tensor-core and copy instructions emulated (kernels/cuda/host/mma.h), and what
of Hopper's can be checked there."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cases import transforms
from cuda_build import ROOT, cutlass_headers, gpu_library, library_of_cpu_tensors, needs_compiler, needs_nvcc
from cuda_build import run as run_command
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitless import reference
from logitless.kernels.cuda.library import Library
from logitless.types import OUTPUTS, LogitTransform

INF = math.inf
PART = 128
CPU = torch.device("cpu")
EPS = torch.finfo(torch.float32).eps

pytestmark = needs_compiler


class Operands(NamedTuple):
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    targets: Tensor  # [N]


Change = Callable[[Operands], Operands]


class Result(NamedTuple):
    stats: dict[str, Tensor]
    block_lse: Tensor  # [N, parts]


@pytest.fixture(scope="module")
def library() -> Library:
    return library_of_cpu_tensors()


def draw(
    rows: int,
    vocabulary: int,
    depth: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    masked: float = 0.0,
    seed: int = 0,
) -> Operands:
    """Operands inside larger matrices of NaNs, so that a read beyond their edges shows."""
    g = torch.Generator().manual_seed(seed)

    def inside_nans(x: Tensor) -> Tensor:
        outer = x.new_full((len(x) + 3, x.shape[1] + 16), math.nan)
        inner = outer[: len(x), : x.shape[1]]
        return inner.copy_(x)

    hidden = torch.randn(rows, depth, generator=g).to(dtype)
    weight = (torch.randn(vocabulary, depth, generator=g) * 2 / depth**0.5).to(dtype)
    targets = torch.randint(vocabulary, (rows,), generator=g)
    offsets = torch.randn(vocabulary, generator=g)
    offsets[torch.rand(vocabulary, generator=g) < masked] = -INF
    offsets[targets] = offsets[targets].clamp(min=-3)
    return Operands(inside_nans(hidden), inside_nans(weight), offsets if bias or masked else None, targets)


def arguments(x: Operands, transform: LogitTransform, moments: Tensor, target_logit: Tensor) -> tuple:
    strides = (x.hidden.stride(0), x.weight.stride(0))
    options = (transform.logit_scale, transform.softcap or 0.0, transform.temperature)
    sizes = (len(x.hidden), *x.weight.shape)
    return (x.hidden, x.weight, x.hidden.dtype, *sizes, *strides, x.bias, x.targets, *options, moments, target_logit)


def forwards(library: Library) -> list[str]:
    """Those that run here."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9 and library.has("forward_sm90")
    return ["forward_sm80", *(["forward_sm90"] if hopper else [])]


def run(library: Library, x: Operands, transform: LogitTransform, kernel: str = "forward_sm80") -> Result:
    rows, vocabulary = len(x.hidden), len(x.weight)
    parts = -(-vocabulary // PART)
    moments, target_logit = torch.full((parts, 5, rows), math.nan), torch.full((rows,), math.nan)
    library.launch(kernel, *arguments(x, transform, moments, target_logit), on=CPU)
    found = {name: torch.full((rows,), math.nan) for name in OUTPUTS}
    block_lse = torch.full((rows, parts), math.nan)
    sizes = (torch.float32, parts, rows, vocabulary)
    library.launch("merge", moments, target_logit, *sizes, *found.values(), block_lse, parts, on=CPU)
    return Result(found, block_lse)


def logits(x: Operands, transform: LogitTransform) -> Tensor:
    """Of the same halves, in float64."""
    s = x.hidden.double() @ x.weight.double().T
    masked = None
    if x.bias is not None:
        masked = x.bias.isneginf()
        s = s + x.bias.masked_fill(masked, 0).double()
    transform.apply_(s, may_be_masked=False)
    return s if masked is None else s.masked_fill(masked, -INF)


def logit_error(x: Operands, transform: LogitTransform) -> float:
    """What float32 sums of H exact products may be off by, and the roundings after them."""
    absolute = (x.hidden.double().abs() @ x.weight.double().abs().T).max().item()
    if x.bias is not None:
        absolute += x.bias.masked_fill(x.bias.isinf(), 0).abs().max().item()
    return EPS * (x.hidden.shape[1] + 8) * (1 + absolute) * max(1.0, abs(transform.slope))


def check(library: Library, x: Operands, transform: LogitTransform) -> None:
    for kernel in forwards(library):
        check_kernel(library, x, transform, kernel)


def check_kernel(library: Library, x: Operands, transform: LogitTransform, kernel: str) -> None:
    found, z = run(library, x, transform, kernel), logits(x, transform)
    want = reference.statistics(z, x.targets, OUTPUTS)
    error = logit_error(x, transform)
    # By how much a change of every logit by 1 may move a statistic; entropy moves with p (log p + entropy).
    reach = {"logprob": 2, "lse": 1, "mean_logit": 1, "log_sum_sq": 4, "entropy": 2 * (1 + math.log(len(x.weight)))}
    for name, times in reach.items():
        got, expected = found.stats[name].double(), getattr(want, name)
        torch.testing.assert_close(got, expected, rtol=4 * EPS, atol=times * error, msg=lambda m, n=name: f"{n}: {m}")
    others = z.scatter(1, x.targets[:, None], -INF)
    margin = z.gather(1, x.targets[:, None])[:, 0] - others.amax(1)
    clear = margin.abs() > 2 * error
    assert torch.equal(found.stats["correct"][clear], (margin > 0).float()[clear])
    blocks = [block.logsumexp(1) for block in others.split(PART, dim=1)]
    torch.testing.assert_close(found.block_lse.double(), torch.stack(blocks, 1), rtol=4 * EPS, atol=error)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 140),
    vocabulary=st.integers(1, 270),
    depth=st.sampled_from([8, 24, 32, 40, 72]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    bias=st.booleans(),
    masked=st.sampled_from([0.0, 0.0, 0.6, 1.0]),
    transform=transforms,
)
@example(
    seed=0, rows=1, vocabulary=1, depth=8, dtype=torch.bfloat16, bias=False, masked=0.0, transform=LogitTransform()
)
@example(
    seed=1, rows=129, vocabulary=257, depth=136, dtype=torch.float16, bias=True, masked=0.0, transform=LogitTransform()
)
def test_statistics(
    library: Library,
    seed: int,
    rows: int,
    vocabulary: int,
    depth: int,
    dtype: torch.dtype,
    bias: bool,
    masked: float,
    transform: LogitTransform,
) -> None:
    """Sizes that no tile divides, strides beyond the rows, whole parts of the vocabulary masked."""
    check(library, draw(rows, vocabulary, depth, dtype, bias=bias, masked=masked, seed=seed), transform)


def test_more_tiles_of_tokens_than_are_at_work_at_one_time(library: Library) -> None:
    """17 and 2 parts: every tile is done, once."""
    check(library, draw(16 * 128 + 5, 130, 8, torch.bfloat16), LogitTransform())


def test_nan_reaches_its_row_alone(library: Library) -> None:
    x = draw(5, 300, 16, torch.bfloat16)
    x.hidden[2, 3] = math.nan
    found = run(library, x, LogitTransform())
    for name in ("logprob", "lse", "entropy", "mean_logit", "log_sum_sq"):
        assert found.stats[name].isnan().tolist() == [False, False, True, False, False], name


def test_no_tokens(library: Library) -> None:
    run(library, draw(0, 20, 8, torch.bfloat16), LogitTransform())


def odd_depth(x: Operands) -> Operands:
    return x._replace(hidden=x.hidden[:, :12], weight=x.weight[:, :12])


def odd_stride(x: Operands) -> Operands:
    return x._replace(hidden=x.hidden.new_zeros(4, 17)[:, :16])


def unaligned(x: Operands) -> Operands:
    return x._replace(weight=x.weight.new_zeros(20, 24)[:, 1:17])


def float32(x: Operands) -> Operands:
    return x._replace(hidden=x.hidden.float(), weight=x.weight.float())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [(odd_depth, "size"), (odd_stride, "stride"), (unaligned, "aligned"), (float32, "dtype")],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_operands_that_the_chunk_kernels_take_instead(library: Library, change: Change, complaint: str) -> None:
    with pytest.raises(RuntimeError, match=complaint):
        run(library, change(draw(4, 20, 16, torch.bfloat16)), LogitTransform())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a build for GPUs may have it")
def test_hopper_is_not_on_a_cpu(library: Library) -> None:
    assert not library.has("forward_sm90")
    assert library.has("forward_sm80")


# ---------------------------------------------------------------------------------------------------------------------
# What nvcc makes of them


def find_cuobjdump() -> str | None:
    """CUDA's own, or the one that comes with Triton."""
    triton = importlib.util.find_spec("triton")
    places = [os.environ["PATH"]]
    if triton is not None and triton.origin is not None:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(places))


CUOBJDUMP = find_cuobjdump()


def instructions(library: Path, architecture: str, kernel: str) -> str:
    """The assembly of a kernel, of all its instances."""
    assert CUOBJDUMP is not None
    listing = run_command(CUOBJDUMP, "-sass", "-arch", architecture, library).stdout
    return "".join(part for part in listing.split("Function : ") if kernel in part.splitlines()[0])


@pytest.mark.slow
@needs_nvcc
@pytest.mark.skipif(CUOBJDUMP is None, reason="needs cuobjdump")
@pytest.mark.parametrize(
    ("architecture", "kernel", "expected"),
    [
        ("sm_80", "forward_sm80", ("HMMA.16816.F32.BF16", "HMMA.16816.F32 ", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4")),
        ("sm_80", "sparse_d_weight", ("HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS.128", "LDSM.16.MT88.4")),
        ("sm_90a", "sparse_d_hidden", ("HMMA.16816.F32.BF16", "REDG.E.ADD.F32x4")),
        ("sm_90a", "ReduceRows", ("HGMMA.64x256x16.F32.BF16", "HGMMA.64x256x16.F32 ", "UTMALDG", "MUFU.EX2")),
    ],
)
def test_the_instructions_that_a_kernel_is_there_for(architecture: str, kernel: str, expected: tuple[str, ...]) -> None:
    library = gpu_library()
    if kernel == "ReduceRows" and cutlass_headers() is None:
        pytest.skip("needs CUTLASS's headers")
    found = instructions(library, architecture, kernel)
    assert [name for name in expected if name not in found] == []
    assert "LDL" not in found and "STL" not in found, "local memory"


@pytest.mark.slow
@needs_nvcc
def test_hopper_multiplies_without_waiting() -> None:
    """ptxas has not serialised wgmma, which it says in passing where it does."""
    log = gpu_library().parent / "logitless_cuda.log"
    assert "wgmma.mma_async instructions are serialized" not in log.read_text()


@pytest.mark.slow
@needs_nvcc
def test_hopper_accumulators_lie_as_rows_are_reduced(tmp_path: Path) -> None:
    """CuTe's own layout of the accumulators, evaluated on the CPU, is the one that tile_rows.cuh counts columns by."""
    headers = cutlass_headers()
    if headers is None:
        pytest.skip("needs CUTLASS's headers")
    program = tmp_path / "layout"
    source = ROOT / "kernels" / "cuda" / "host" / "hopper_layout.cu"
    options = ("-std=c++17", "-arch=sm_90a", "--expt-relaxed-constexpr", "-DNDEBUG")
    run_command("nvcc", *options, "-isystem", headers, "-I", source.parents[1], "-o", program, source)
    assert run_command(program).stdout == "0 of 32768 accumulators elsewhere\n"
