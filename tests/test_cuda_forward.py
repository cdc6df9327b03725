"""The fused forwards of kernels/cuda, up to the statistics, against float64.

They run on a GPU if there is one. Otherwise the Ampere kernel's own code runs on the CPU, where its tensor-core and
copy instructions are emulated (kernels/cuda/host/mma.h), and so do the parts of Hopper's kernel that can.
"""

from __future__ import annotations

import ctypes
import heapq
import importlib.util
import math
import os
import re
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
    moments: Tensor  # [parts, 2 or 5, N]
    raw: Tensor | None  # [N, V]


class Kernel(NamedTuple):
    name: str
    arguments: tuple[int, ...] = ()  # its configuration, where it has any


AMPERE = Kernel("forward_sm80")
#: Statistics that need no more than two moments.
OF_TWO = ("logprob", "lse", "correct")


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


def forwards(library: Library, dtype: torch.dtype) -> list[Kernel]:
    """The fused forwards that can run on this machine."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    names = library.configurations() if hopper else ()
    return [AMPERE, *(Kernel("forward_sm90", (k,)) for k in range(len(names)) if k == 0 or dtype == torch.bfloat16)]


def run(
    library: Library,
    x: Operands,
    transform: LogitTransform,
    kernel: Kernel = AMPERE,
    *,
    count: int = 5,
    padding: int | None = None,
) -> Result:
    """Runs a forward and the merge, with `count` moments. With `padding`, raw products go to a matrix wider by that."""
    rows, vocabulary = len(x.hidden), len(x.weight)
    parts = -(-vocabulary // PART)
    moments, target_logit = torch.full((parts, count, rows), math.nan), torch.full((rows,), math.nan)
    raw = None if padding is None else torch.full((rows, vocabulary + padding), math.nan)
    library.launch(
        kernel.name,
        *(x.hidden, x.weight, x.hidden.dtype, rows, *x.weight.shape, x.hidden.stride(0), x.weight.stride(0)),
        *(x.bias, x.targets, transform.logit_scale, transform.softcap or 0.0, transform.temperature),
        *(moments, count, target_logit, raw, 0 if raw is None else raw.stride(0), *kernel.arguments),
        on=CPU,
    )
    if raw is not None:
        assert raw[:, vocabulary:].isnan().all()
        raw = raw[:, :vocabulary]
    return Result(*merge(library, moments, target_logit, vocabulary), moments, raw)


def merge(library: Library, moments: Tensor, target_logit: Tensor, vocabulary: int) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics, those that the moments are enough for, and the parts' logsumexps."""
    parts, count, rows = moments.shape
    found = {name: torch.full((rows,), math.nan) for name in (OUTPUTS if count == 5 else OF_TWO)}
    block_lse = torch.full((rows, parts), math.nan)
    sizes = (torch.float32, parts, count, rows, vocabulary)
    results = (found.get(name) for name in OUTPUTS)
    library.launch("merge", moments, target_logit, *sizes, *results, block_lse, parts, on=CPU)
    return found, block_lse


def logits(x: Operands, transform: LogitTransform) -> Tensor:
    """Logits in float64 from the half-precision operands."""
    s = x.hidden.double() @ x.weight.double().T
    masked = None
    if x.bias is not None:
        masked = x.bias.isneginf()
        s = s + x.bias.masked_fill(masked, 0).double()
    transform.apply_(s, may_be_masked=False)
    return s if masked is None else s.masked_fill(masked, -INF)


def logit_error(x: Operands, transform: LogitTransform) -> float:
    """The largest error of float32 sums of H exact products and of the roundings after them."""
    absolute = (x.hidden.double().abs() @ x.weight.double().abs().T).max().item()
    if x.bias is not None:
        absolute += x.bias.masked_fill(x.bias.isinf(), 0).abs().max().item()
    return EPS * (x.hidden.shape[1] + 8) * (1 + absolute) * max(1.0, abs(transform.slope))


def check(library: Library, x: Operands, transform: LogitTransform, padding: int | None = None) -> None:
    for kernel in forwards(library, x.hidden.dtype):
        found = run(library, x, transform, kernel, padding=padding)
        check_statistics(found.stats, found.block_lse, x, transform)
        two = run(library, x, transform, kernel, count=2)
        check_same(two.stats, two.block_lse, found.stats, found.block_lse)
        if found.raw is not None:
            products = x.hidden.double() @ x.weight.double().T
            error = logit_error(x._replace(bias=None), LogitTransform())
            torch.testing.assert_close(found.raw.double(), products, rtol=0, atol=error)


def check_same(stats: dict[str, Tensor], block_lse: Tensor, all_stats: dict[str, Tensor], all_lse: Tensor) -> None:
    """Two moments and five make the same statistics of two, whatever a compiler fuses in one of the two."""
    for name, x in stats.items():
        torch.testing.assert_close(x, all_stats[name], rtol=4 * EPS, atol=4 * EPS)
    torch.testing.assert_close(block_lse, all_lse, rtol=4 * EPS, atol=4 * EPS)


def check_statistics(stats: dict[str, Tensor], block_lse: Tensor, x: Operands, transform: LogitTransform) -> None:
    z = logits(x, transform)
    want = reference.statistics(z, x.targets, OUTPUTS)
    error = logit_error(x, transform)
    # By how much a change of every logit by 1 may move a statistic; entropy moves with p (log p + entropy).
    reach = {"logprob": 2, "lse": 1, "mean_logit": 1, "log_sum_sq": 4, "entropy": 2 * (1 + math.log(len(x.weight)))}
    for name, times in reach.items():
        got, expected = stats[name].double(), getattr(want, name)
        torch.testing.assert_close(got, expected, rtol=4 * EPS, atol=times * error, msg=lambda m, n=name: f"{n}: {m}")
    others = z.scatter(1, x.targets[:, None], -INF)
    margin = z.gather(1, x.targets[:, None])[:, 0] - others.amax(1)
    clear = margin.abs() > 2 * error
    assert torch.equal(stats["correct"][clear], (margin > 0).float()[clear])
    blocks = [block.logsumexp(1) for block in others.split(PART, dim=1)]
    torch.testing.assert_close(block_lse.double(), torch.stack(blocks, 1), rtol=4 * EPS, atol=error)


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
    padding=st.sampled_from([None, 0, 1, 2]),
)
@example(
    seed=0,
    rows=1,
    vocabulary=1,
    depth=8,
    dtype=torch.bfloat16,
    bias=False,
    masked=0.0,
    transform=LogitTransform(),
    padding=0,
)
@example(
    seed=1,
    rows=129,
    vocabulary=257,
    depth=136,
    dtype=torch.float16,
    bias=True,
    masked=0.0,
    transform=LogitTransform(),
    padding=1,
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
    padding: int | None,
) -> None:
    """Sizes that no tile divides, strides beyond the rows, whole parts of the vocabulary masked, products stored."""
    check(library, draw(rows, vocabulary, depth, dtype, bias=bias, masked=masked, seed=seed), transform, padding)


def test_more_tiles_of_tokens_than_are_at_work_at_one_time(library: Library) -> None:
    """17 and 2 parts: every tile is done, once."""
    check(library, draw(16 * 128 + 5, 130, 8, torch.bfloat16), LogitTransform())


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_nan_reaches_its_row_alone(library: Library, masked: bool, count: int) -> None:
    """From a hidden state; and from one entry of the bias, where all others of its part are masked."""
    x = draw(5, 300, 16, torch.bfloat16, bias=masked)
    expected = [False, False, True, False, False]
    x.targets[:] = 1
    if x.bias is not None:
        x.bias[PART : 2 * PART] = -INF
        x.bias[PART + 5] = math.nan
        expected = [True] * 5
    else:
        x.hidden[2, 3] = math.nan
    found = run(library, x, LogitTransform(), count=count)
    for name in set(found.stats) - {"correct"}:
        assert found.stats[name].isnan().tolist() == expected, name


def test_only_the_target_is_left(library: Library) -> None:
    """Everything else is masked: by the bias, and where the vocabulary has one entry."""
    for vocabulary in (1, 130):
        x = draw(3, vocabulary, 8, torch.bfloat16, bias=True)
        assert x.bias is not None
        x.bias[:] = -INF
        x.targets[:] = vocabulary - 1
        x.bias[-1] = 0.5
        for count in (2, 5):
            found = run(library, x, LogitTransform(), count=count).stats
            assert found["logprob"].tolist() == [0, 0, 0] and found["correct"].tolist() == [1, 1, 1]
            if count == 5:
                assert found["entropy"].tolist() == [0, 0, 0] and found["log_sum_sq"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.25])
def test_large_logits_cost_no_digits(library: Library, temperature: float) -> None:
    """Raw products near 1536 and their logits, exact in float32: a part's moments are as precise as its terms, e^x (|x|
    2^-23 + 2^-22), and sums of 128 of them. Were all exponents off by the rounding of the largest, 2^-14 or more here,
    so were the sums."""
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.zeros(40, 8), torch.zeros(PART + 1, 8)
    hidden[:, 0], hidden[:, 1] = 64, 1
    hidden[:, 2] = torch.arange(40) / 16
    weight[:, 0], weight[:, 2] = 24, 1
    weight[:PART, 1] = torch.randint(-127, 128, (PART,), generator=g) / 16
    x = Operands(hidden.bfloat16(), weight.bfloat16(), None, torch.full((40,), PART))
    transform = LogitTransform(temperature=temperature)
    raw = x.hidden.double() @ x.weight[:PART].double().T
    assert torch.equal(raw.float().double(), raw)
    found = run(library, x, transform).moments[0].double()
    shift = (raw - raw.amax(1, keepdim=True)) * transform.slope
    e = shift.exp()
    for got, want in zip(found[1:4], (e.sum(1), (e * shift).sum(1), e.square().sum(1)), strict=True):
        torch.testing.assert_close(got, want, rtol=2**-18, atol=0)


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


def test_what_a_forward_leaves_behind_is_checked(library: Library) -> None:
    x = draw(4, 20, 16, torch.bfloat16)
    with pytest.raises(RuntimeError, match="number of moments"):
        run(library, x, LogitTransform(), count=3)
    with pytest.raises(RuntimeError, match="stride"):
        run(library, x, LogitTransform(), padding=-1)


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
        ("sm_90a", "RowEpilogue", ("HGMMA.64x256x16.F32.BF16", "HGMMA.64x256x16.F32 ", "UTMALDG", "MUFU.EX2")),
    ],
)
def test_the_instructions_that_a_kernel_is_there_for(architecture: str, kernel: str, expected: tuple[str, ...]) -> None:
    library = gpu_library()
    if kernel == "RowEpilogue" and cutlass_headers() is None:
        pytest.skip("needs CUTLASS's headers")
    found = instructions(library, architecture, kernel)
    assert [name for name in expected if name not in found] == []
    assert "LDL" not in found and "STL" not in found, "local memory"


class Block(NamedTuple):
    """Instructions without a jump among them, and where they may go on."""

    text: list[str]
    following: list[int]  # by the address of the first instruction


def control_flow(listing: str) -> dict[int, Block]:
    """The blocks of one kernel's assembly, by the address of the first instruction."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", listing)]
    places = [re.search(r"\b(?:BRA|BSSY)\b.*?(0x[0-9a-f]+)", text) for _, text in lines]
    starts = {int(place[1], 16) for place in places if place} | {lines[0][0]}
    blocks: dict[int, Block] = {}
    for (at, text), place, (after, _) in zip(lines, places, [*lines[1:], (0, "")], strict=True):
        if at in starts:
            current = blocks[at] = Block([], [])
        current.text.append(text)
        if re.search(r"\b(BRA|EXIT)\b", text):
            starts.add(after)
            current.following.extend([int(place[1], 16)] if place else [])
        if after in starts and not re.fullmatch(r"(BRA 0x[0-9a-f]+|EXIT)\s*", text):
            current.following.append(after)
    return blocks


def instructions_between(blocks: dict[int, Block], start: int, end: int) -> int:
    """The fewest instructions from the beginning of a block to that of another."""
    reached: dict[int, int] = {}
    open_ = [(0, start)]
    while open_:
        cost, at = heapq.heappop(open_)
        if at == end and cost:
            return cost
        if at not in blocks or at in reached:
            continue
        reached[at] = cost
        for following in blocks[at].following:
            heapq.heappush(open_, (cost + len(blocks[at].text), following))
    raise AssertionError("the end is not reached")


@pytest.mark.slow
@needs_nvcc
@pytest.mark.skipif(CUOBJDUMP is None, reason="needs cuobjdump")
@pytest.mark.parametrize(("moments", "most"), [(2, 6.5), (5, 10)])
def test_hopper_reduces_a_logit_in_few_instructions(moments: int, most: float) -> None:
    """Everything from a tile's last product to its last sum, over the 128 logits of a thread, by the shortest way: no
    bias, softcap or raw products, no target in the tile. With five moments the addition of the logits, one more, is not
    on it. All exponentials are in one block, so that no row waits for another's."""
    if cutlass_headers() is None:
        pytest.skip("needs CUTLASS's headers")
    listing = instructions(gpu_library(), "sm_90a", "RowEpilogue")
    kernels = re.split(r"(?=_ZN7cutlass13device_kernel)", listing)[1:]
    assert len(kernels) == 7  # the default for two types and clusters, and three more
    for kernel in kernels:
        blocks = control_flow(kernel)
        products = [at for at, block in blocks.items() if count_of("HGMMA", block)]
        rows = [at for at, block in blocks.items() if count_of("MUFU.EX2", block) == 128]
        assert len(rows) == 2
        end = (min if moments == 2 else max)(rows, key=lambda at: len(blocks[at].text))
        before = instructions_between(blocks, products[-1], end) - len(blocks[products[-1]].text)
        cost = (before + len(blocks[end].text)) / 128
        print(f"{moments} moments: {cost:.1f} instructions a logit, {before / 128:.1f} of them before the exponentials")
        assert cost <= most


def count_of(name: str, block: Block) -> int:
    return sum(name in text for text in block.text)


@pytest.mark.slow
@needs_nvcc
def test_hopper_multiplies_without_waiting() -> None:
    """ptxas has not serialised wgmma, which it says in passing where it does."""
    log = gpu_library().parent / "logitless_cuda.log"
    assert "wgmma.mma_async instructions are serialized" not in log.read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Hopper's, as far as a CPU goes


HOST = ROOT / "kernels" / "cuda" / "host"


def compile_with_cutlass(folder: Path, name: str, *arguments: str | Path) -> Path:
    """By nvcc, with CUTLASS's headers."""
    headers = cutlass_headers()
    if headers is None:
        pytest.skip("needs CUTLASS's headers")
    made = folder / name
    run_command("nvcc", "-std=c++17", "-DNDEBUG", "-isystem", headers, "-I", HOST.parent, "-o", made, *arguments)
    return made


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """host/hopper_layout.cu, a program."""
    options = ("-arch=sm_90a", "--expt-relaxed-constexpr")
    return compile_with_cutlass(tmp_path_factory.mktemp("layout"), "layout", *options, HOST / "hopper_layout.cu")


@pytest.mark.slow
@needs_nvcc
def test_hopper_accumulators_lie_as_rows_are_reduced(layout: Path) -> None:
    """CuTe's own layout of the accumulators, evaluated on the CPU, is the one that tile_rows.cuh counts columns by."""
    lines = run_command(layout, "layout").stdout.splitlines()
    assert len(lines) == 5
    assert all(re.search(r": 0 of (16384|32768) accumulators elsewhere$", line) for line in lines), lines


#: Around the steps of a tile, a pair of tiles and a swizzle. 2049 doubles under a swizzle of 8, 128 quadruples.
TOKENS = (1, 127, 128, 129, 256, 257, 384, 512, 640, 1000, 1024, 2048, 2049, 2304, 3000, 4096, 5000, 6400, 8000, 8192)


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize(("vocabulary", "widest"), [(32_000, 2), (128_256, 8), (151_936, 8)])
def test_hopper_multiplies_hardly_a_tile_too_many(layout: Path, vocabulary: int, widest: int) -> None:
    """CUTLASS's scheduler rounds both numbers of tiles up to swizzle x cluster, and multiplies all of them."""
    lines = run_command(layout, "order", str(vocabulary), "4096", *map(str, TOKENS)).stdout.splitlines()
    found = [line.split() for line in lines]
    assert [int(tokens) for tokens, *_ in found] == list(TOKENS)
    for tokens, tiles, cluster, swizzle in found:
        needed = -(-int(tokens) // 128) * -(-vocabulary // 256)
        assert needed <= int(tiles) <= 1.03 * needed, (tokens, tiles, needed, cluster, swizzle)
    chosen = {int(tokens): (cluster, int(swizzle)) for tokens, _, cluster, swizzle in found}
    assert chosen[8192] == ("2x1", widest) and chosen[384][0] == "1x2"
    # Even numbers of token tiles that no swizzle suits: no matter as long as hidden states stay in the L2 cache.
    assert chosen[2304] == ("2x1", 1) and chosen[6400][0] == "1x2"


#: Rows and columns of a tile, and the warp groups that share it: every configuration of forward_sm90.cu.
TILES = ((128, 256, 2), (256, 128, 2), (128, 128, 1), (64, 256, 1))


@pytest.fixture(scope="module")
def hopper_rows(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """host/hopper_rows.cpp: ReduceRows on the CPU."""
    options = ("-O1", "-shared", "-Xcompiler", "-fPIC,-Wall,-Wextra,-Werror")
    sources = (HOST / "hopper_rows.cpp", HOST / "shim.cpp")
    return ctypes.CDLL(str(compile_with_cutlass(tmp_path_factory.mktemp("rows"), "hopper_rows.so", *options, *sources)))


def reduce_on_cpu(
    rows_library: ctypes.CDLL, tile: tuple[int, ...], x: Operands, transform: LogitTransform, count: int, padding: int
) -> tuple[Tensor, Tensor]:
    """Moments and target logits of x's products in float32. With `padding` columns, or 0, products are stored."""
    products = (x.hidden.double() @ x.weight.double().T).float().contiguous()
    rows, vocabulary = products.shape
    moments = torch.full((-(-vocabulary // PART), count, rows), math.nan)
    target_logit, raw = torch.full((rows,), math.nan), torch.full((rows, vocabulary + padding), math.nan)
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    code = rows_library.hopper_rows(
        *(*tile, pointer(products.data_ptr()), size(rows), size(vocabulary)),
        *(pointer(None if x.bias is None else x.bias.data_ptr()), pointer(x.targets.data_ptr())),
        *(number(transform.logit_scale), number(transform.softcap or 0.0), number(transform.temperature)),
        *(pointer(moments.data_ptr()), count, pointer(target_logit.data_ptr())),
        *((pointer(raw.data_ptr()) if padding >= 0 else pointer()), size(vocabulary + padding)),
    )
    assert code == 0
    if padding >= 0:
        assert torch.equal(raw[:, :vocabulary], products) and raw[:, vocabulary:].isnan().all()
    return moments, target_logit


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("tile", TILES, ids=lambda x: "x".join(map(str, x)))
@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 300),
    vocabulary=st.integers(1, 600),
    bias=st.booleans(),
    masked=st.sampled_from([0.0, 0.6]),
    transform=transforms,
    padding=st.sampled_from([-1, 0, 1, 2]),
)
@example(seed=0, rows=1, vocabulary=1, bias=False, masked=0.0, transform=LogitTransform(), padding=0)
@example(seed=1, rows=256, vocabulary=512, bias=False, masked=0.0, transform=LogitTransform(), padding=0)
@example(seed=2, rows=257, vocabulary=385, bias=True, masked=0.0, transform=LogitTransform(2.0, 5.0, 0.7), padding=1)
def test_hopper_reduces_rows(
    library: Library,
    hopper_rows: ctypes.CDLL,
    tile: tuple[int, ...],
    seed: int,
    rows: int,
    vocabulary: int,
    bias: bool,
    masked: float,
    transform: LogitTransform,
    padding: int,
) -> None:
    """ReduceRows' own text, a fiber a thread, on accumulators as CuTe lays them out: tiles cut short on both sides, and
    wholly beyond the matrix; targets in every place; products stored in pairs, one by one, and not at all."""
    x = draw(rows, vocabulary, 8, torch.bfloat16, bias=bias, masked=masked, seed=seed)
    everything = merge(library, *reduce_on_cpu(hopper_rows, tile, x, transform, 5, padding), vocabulary)
    check_statistics(*everything, x, transform)
    two = merge(library, *reduce_on_cpu(hopper_rows, tile, x, transform, 2, padding), vocabulary)
    check_same(*two, *everything)
