"""Kernels and calls one by one: right or wrong at real shapes, and their time beside a floor taken in the same turns.

Every part is a sequence of `Kernel`s on the tensors of one problem. A floor is cuBLAS's products as large, or a copy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import logitless
from logitless import TokenStats
from logitless.bench.machine import Machine
from logitless.bench.measure import Method, Part, Row, Tell, attempt, in_turns, seconds
from logitless.bench.problem import Inputs
from logitless.bench.provider import Provider
from logitless.bench.providers import floors, own
from logitless.bench.targets import Json
from logitless.types import BackendName, LogitTransform

from .. import internals

#: Turns that are kept of each kernel and its floor. Any failure is a line in the table.
METHOD = Method(rounds=7, may_fail=("logitless",))
#: Rows that are held against float64, half of them the first and half the last.
CHECKED = 128
#: Bytes of float32 logits in the chunk of `rows`.
CHUNK_BYTES = 2**28
#: Gemma 2's.
SOFTCAP = 30.0
#: The backends whose kernels are ours.
OWN: tuple[BackendName, ...] = ("cuda", "triton")
#: The forward that is not one kernel of ours.
BY_CHUNKS = "cuda, by chunks"
COLUMNS = ("ms", "floor ms", "/ floor", "GB/s", "peak MiB", "largest error", "right")


@dataclass(frozen=True)
class Kernel:
    """A call beside its floor.

    Args:
        prepare: makes the arguments of `run`, untimed.
        check: errors against float64, each with the most that is right.
    """

    name: str
    run: Callable[..., object]
    floor: Callable[[], object]
    prepare: Callable[[], tuple[Any, ...]] = tuple
    check: Callable[[], dict[str, tuple[float, float]]] | None = None
    bytes: int | None = None
    floor_bytes: int | None = None
    failure: str | None = None

    def once(self) -> object:
        return self.run(*self.prepare())


@dataclass(frozen=True)
class KernelPart(Part):
    """Kernels on the tensors of one problem, in place of providers."""

    method: Method = METHOD
    columns: tuple[str, ...] = COLUMNS

    def kernels(self, inputs: Inputs) -> Iterator[Kernel]:
        return KERNELS[self.name](inputs)

    def measure(self, machine: Machine, deadline: float, skip: Json, tell: Tell) -> Json:
        """Errors and times of every kernel, ready for JSON."""
        rows: list[Row] = []

        def so_far(complete: bool = False) -> Json:
            return {"problem": str(self.problem), "rows": [asdict(row) for row in rows], "complete": complete}

        for kernel in self.kernels(self.problem.inputs(machine.device)):
            if time.monotonic() > deadline:
                return so_far()
            row = Row(kernel.name, "logitless", bytes=kernel.bytes, floor_bytes=kernel.floor_bytes)
            row.failure = kernel.failure or skip.get(kernel.name)
            rows.append(row)
            tell(kernel.name, so_far())
            if row.runs:
                attempt(row, partial(measure_kernel, kernel, row, machine), machine, self.method)
        return so_far(complete=True)


def measure_kernel(kernel: Kernel, row: Row, machine: Machine) -> None:
    """The first call loads and compiles; then the floor and the kernel take turns."""
    start = time.perf_counter()
    row.memory = {"allocated": machine.peak(kernel.once)}
    row.first_call_seconds = time.perf_counter() - start
    if kernel.check is not None:
        checked = kernel.check()
        row.error = {name: error for name, (error, _) in checked.items()}
        row.wrong = [name for name, (error, most) in checked.items() if not error <= most]  # NaN is wrong
    kernel.floor()
    floor = partial(_timed, row.floor, lambda: kernel.floor, machine)
    ours = partial(_timed, row.seconds, lambda: partial(kernel.run, *kernel.prepare()), machine)
    for timed in in_turns((floor, ours), METHOD.rounds):
        timed()


def _timed(result: list[float], ready: Callable[[], Callable[[], object]], machine: Machine) -> None:
    """Appends the time of what `ready` prepares."""
    result.append(seconds(ready(), machine))


# ---------------------------------------------------------------------------------------------------------------------
# Forwards


def _forward_kernels(inputs: Inputs) -> Iterator[Kernel]:
    """Fused forwards, and one that stores its logits chunk by chunk, beside one product."""
    check = _Exact(inputs)
    for name, run, failure in _forwards(inputs):
        yield Kernel(name, run, _product(inputs), check=partial(check, run), failure=failure)
    yield from _projections(inputs)


def _projections(inputs: Inputs) -> Iterator[Kernel]:
    """A chunk's logits stored and measured in one kernel, where the device has that."""
    if _unsupported("cuda", inputs) or not internals.projects(inputs):
        return
    for count in sorted({min(n, len(inputs.hidden)) for n in (512, 4096)}):
        few = _first(inputs, count)
        logits = torch.empty(count, len(inputs.weight), dtype=torch.float32, device=inputs.weight.device)
        run = partial(internals.project, few, logits)
        name = f"cuda, {count} tokens' logits and statistics"
        yield Kernel(name, run, _product(few), check=partial(_Exact(few), run))


def _configurations(inputs: Inputs) -> Iterator[Kernel]:
    """Every configuration of Hopper's fused forward that the library names, beside one product."""
    names = () if _unsupported("cuda", inputs) else internals.configurations()
    check = _Exact(inputs)
    for number, name in enumerate(names):
        run = partial(_configured, number, inputs)
        yield Kernel(name, run, _product(inputs), check=partial(check, run))


def _configured(number: int, inputs: Inputs) -> TokenStats:
    with internals.configuration(number):
        return internals.fused_forward("forward_sm90", inputs)


def _forwards(inputs: Inputs) -> Iterator[tuple[str, Callable[[], TokenStats], str | None]]:
    failure = _unsupported("cuda", inputs)
    fused = None if failure else internals.fused_kernel(inputs)
    absent = failure or (None if fused else "no fused forward takes these tensors on this device")
    yield "cuda, fused", partial(internals.fused_forward, fused or "", inputs), absent
    yield BY_CHUNKS, partial(internals.forward_by_chunks, inputs), failure
    yield "triton, fused", partial(internals.forward, "triton", inputs), _unsupported("triton", inputs)


def _unsupported(backend: str, inputs: Inputs) -> str | None:
    return internals.unsupported(backend, inputs.weight.device, inputs.weight.dtype)


def _product(inputs: Inputs) -> Callable[[], Tensor]:
    return lambda: inputs.hidden @ inputs.weight.T


class _Exact:
    """logprob and lse of the first and last rows against float64, and whether a second call gives the same bits.

    What is right: a float32 sum of H products errs like a random walk of its partial sums' roundings, sqrt(H) 2^-24 of
    the logit's size. Four times that, for the largest logit.
    """

    def __init__(self, inputs: Inputs, softcap: float | None = None) -> None:
        self._rows = _ends(len(inputs.hidden), inputs.hidden.device)
        logits = inputs.hidden[self._rows].double() @ inputs.weight.double().T
        LogitTransform(softcap=softcap).apply_(logits, may_be_masked=False)
        self.most = 4 * math.sqrt(inputs.weight.shape[1]) * 2**-24 * _largest(logits)
        self._expected = _statistics(logits, inputs.targets[self._rows])

    def __call__(self, run: Callable[[], TokenStats]) -> dict[str, tuple[float, float]]:
        stats, again = run(), run()
        result = {name: (getattr(stats, name), getattr(again, name)) for name in ("logprob", "lse")}
        errors = {
            name: (_largest(x[self._rows].double() - getattr(self._expected, name)), self.most)
            for name, (x, _) in result.items()
        }
        unlike = sum(int((x != y).sum()) for x, y in result.values())
        return {**errors, "other bits": (float(unlike), 0.0)}


def _ends(count: int, device: torch.device) -> Tensor:
    few = min(count, CHECKED)
    every = torch.arange(count, device=device)
    return torch.cat([every[: few // 2], every[count - (few - few // 2) :]])


def _statistics(logits: Tensor, targets: Tensor) -> TokenStats:
    lse = logits.logsumexp(-1)
    return TokenStats(logprob=logits.gather(1, targets[:, None])[:, 0] - lse, lse=lse)


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


# ---------------------------------------------------------------------------------------------------------------------
# Rows of a chunk


def _row_kernels(inputs: Inputs) -> Iterator[Kernel]:
    """Every backend's row engine on a chunk of float32 logits, beside a copy of it."""
    bytes_ = inputs.problem.chunk_bytes or CHUNK_BYTES
    tokens = max(1, min(len(inputs.hidden), bytes_ // (4 * len(inputs.weight))))
    raw, targets = (inputs.hidden[:tokens] @ inputs.weight.T).float(), inputs.targets[:tokens]
    for name in internals.BACKENDS:
        yield from _Rows(name, raw, targets, torch.empty_like(raw), _unsupported(name, inputs)).kernels()


@dataclass(frozen=True)
class _Rows:
    """One backend's engine on the raw products `raw [n, V]`. `buffer`, as large, is written by copies and gradients."""

    backend: str
    raw: Tensor
    targets: Tensor
    buffer: Tensor
    failure: str | None

    def kernels(self) -> Iterator[Kernel]:
        """Statistics: one read. Their bfloat16 gradient in the logits' place: one read and half a write."""
        for what, outputs in (("statistics", ()), ("statistics, entropy", ("entropy",))):
            measure = partial(self._measure, outputs)
            yield self._kernel(what, measure, self._fill, partial(self._check_measure, measure), self.raw.nbytes)
        yield self._kernel("gradient", self._gradient, self._recall, self._check_gradient, self.raw.nbytes * 3 // 2)

    def _kernel(self, what: str, run: Any, prepare: Any, check: Any, bytes_: int) -> Kernel:
        name = f"{self.backend}, {what}"
        copied = 2 * self.raw.nbytes
        return Kernel(name, run, self._fill, prepare, check, bytes_, copied, self.failure)

    @property
    def _operations(self) -> internals.Rows:
        return internals.Rows(self.backend)

    def _fill(self) -> tuple[Tensor]:
        return (self.buffer.copy_(self.raw),)

    def _measure(self, outputs: tuple[str, ...], logits: Tensor) -> TokenStats:
        return self._operations.measure(logits, self.targets, ("logprob", "lse", *outputs))

    def _recall(self) -> tuple[Any, ...]:
        return self._operations.recall(*self._fill(), self.targets, _statistics(self.raw, self.targets))

    def _gradient(self, tile: Any, upstream: Any) -> Any:
        return self._operations.gradient(tile, upstream, torch.bfloat16)

    def _check_measure(self, measure: Callable[[Tensor], TokenStats]) -> dict[str, tuple[float, float]]:
        """A logsumexp of float32 logits: roundings of the logits' own size, and of V sums; 2^-18 of the largest."""
        rows = _ends(len(self.raw), self.raw.device)
        expected, result = _statistics(self.raw[rows].double(), self.targets[rows]), measure(*self._fill())
        most = 2**-18 * max(1.0, _largest(self.raw[rows]))
        pairs = ((name, getattr(result, name)[rows].double(), getattr(expected, name)) for name in ("logprob", "lse"))
        return {name: (_largest(x - exact), most) for name, x, exact in pairs}

    def _check_gradient(self) -> dict[str, tuple[float, float]]:
        """Each entry is rounded to bfloat16 once, by at most 2^-8 of it; float32's own errors are far below."""
        rows = _ends(len(self.raw), self.raw.device)
        matrix = self._operations.scaled(self._gradient(*self._recall()), rows)
        exact = -self.raw[rows].double().softmax(-1)
        exact.scatter_(1, self.targets[rows, None], 0.0)
        return {"gradient": (float((matrix - exact).norm() / exact.norm()), 2**-8)}


# ---------------------------------------------------------------------------------------------------------------------
# Products of a chunk


def _products(inputs: Inputs) -> Iterator[Kernel]:
    """What cuBLAS makes of a chunk's three products by its size and layout, each beside one product to bfloat16."""
    hidden, weight = inputs.hidden, inputs.weight
    d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    narrow = torch.empty_like(weight)
    for tokens in sorted({min(n, len(hidden)) for n in (512, 1024, 2048, 4096)}):
        yield from _chunk_products(hidden[:tokens], weight, d_weight, narrow)
    one = torch.ones((), device=weight.device)
    copy = partial(narrow.copy_, d_weight)
    yield Kernel("d_weight: zeros", lambda: d_weight.zero_(), copy)
    yield Kernel("d_weight: scaled in place, then cast", lambda: narrow.copy_(d_weight.mul_(one)), copy)
    yield Kernel("d_weight: scaled and cast in one pass", lambda: torch.mul(d_weight, one, out=narrow), copy)


def _chunk_products(hidden: Tensor, weight: Tensor, d_weight: Tensor, narrow: Tensor) -> Iterator[Kernel]:
    count, vocabulary = len(hidden), len(weight)
    raw, floor = hidden.new_empty(count, vocabulary, dtype=torch.float32), partial(torch.mm, hidden, weight.T)
    # In place of float32 logits their gradient has twice its own row stride.
    dense = floor()
    strided = raw.view(hidden.dtype)[:, :vocabulary]
    d_hidden = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
    yield Kernel(f"{count} tokens: logits to float32", partial(internals.multiply, hidden, weight.T, out=raw), floor)
    strided.copy_(dense)
    for kind, matrix in (("gradient in place", strided), ("gradient dense", dense)):
        name = f"{count} tokens, {kind}"
        yield Kernel(f"{name}: d_hidden", partial(internals.multiply, matrix, weight, out=d_hidden), floor)
        for what, multiply in (("beta 0", internals.multiply), ("beta 1", partial(internals.multiply, add=True))):
            run = partial(multiply, matrix.T, hidden, out=d_weight)
            yield Kernel(f"{name}: d_weight, {what}", run, floor)
    yield Kernel(f"{count} tokens: d_weight to bfloat16", partial(torch.mm, dense.T, hidden, out=narrow), floor)


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def _steps_by_chunk(inputs: Inputs) -> Iterator[Kernel]:
    """A step of NLL by the budget of a chunk of logits, the default first; beside three products, frozen beside two."""
    vocabulary = len(inputs.weight)
    tokens = (2048, 4096) if inputs.problem.chunk_bytes is None else (16, 32)
    budgets = (None, CHUNK_BYTES, *(4 * vocabulary * n for n in tokens))
    for backend in OWN:
        for dtype in (None, torch.bfloat16):
            for budget in budgets:
                yield _step(inputs, backend, f"chunk {_mib(budget)}{_narrow(dtype)}", budget, dtype)
        for budget in budgets:
            yield _step(inputs, backend, f"frozen head, chunk {_mib(budget)}", budget, frozen=True)


def _mib(budget: int | None) -> str:
    return "by default" if budget is None else f"{budget / 2**20:.4g} MiB"


def _narrow(dtype: torch.dtype | None) -> str:
    return "" if dtype is None else f" of {str(dtype).removeprefix('torch.')}"


def _step(
    inputs: Inputs,
    backend: BackendName,
    what: str,
    budget: int | None,
    dtype: torch.dtype | None = None,
    frozen: bool = False,
) -> Kernel:
    """A step of NLL beside three products, with a frozen head beside two."""
    problem = replace(inputs.problem, chunk_bytes=budget, frozen_head=frozen)
    given = inputs._replace(problem=problem)
    step = Provider(backend, "logitless", partial(own.nll, backend=backend, chunk_dtype=dtype)).step
    floor = partial(floors.GEMMS.step, given)
    return Kernel(f"{backend}: {what}", partial(step, given), floor, failure=_unsupported(backend, inputs))


def _calls_by_tokens(inputs: Inputs) -> Iterator[Kernel]:
    """`linear_logprobs` without gradients beside one product, and a step of NLL beside three, by the tokens.

    At last `linear_logprobs` under a softcap, whose tanh every logit goes through.
    """
    every = (128, 512, 1024, 2048, 2304, 4096, 8192)
    for count in sorted({min(n, len(inputs.hidden)) for n in every}):
        few = _first(inputs, count)
        yield _logprobs(few, f"linear_logprobs, N {count}")
        yield _step(few, "cuda", f"step, N {count}", inputs.problem.chunk_bytes)
    yield _logprobs(inputs, f"linear_logprobs, softcap {SOFTCAP:g}", SOFTCAP)


def _logprobs(inputs: Inputs, name: str, softcap: float | None = None) -> Kernel:
    @torch.no_grad()
    def run() -> TokenStats:
        hidden, weight, targets, _, problem = inputs
        outputs, budget = ("logprob", "lse"), problem.chunk_bytes
        return logitless.linear_logprobs(hidden, weight, targets, softcap=softcap, outputs=outputs, chunk_bytes=budget)

    return Kernel(name, run, _product(inputs), check=partial(_Exact(inputs, softcap), run))


def _first(inputs: Inputs, count: int) -> Inputs:
    return inputs.first(replace(inputs.problem, tokens=count))


def _float16(inputs: Inputs) -> Iterator[Kernel]:
    """Forwards and steps of float16 operands, beside products of float16."""
    half, chunk_bytes = inputs.to(torch.float16), inputs.problem.chunk_bytes
    for kernel in _forward_kernels(half):
        yield replace(kernel, name=f"float16: {kernel.name}")
    for backend in OWN:
        yield _step(half, backend, "step of float16", chunk_bytes)
        yield _step(half, backend, "step of float16, frozen head", chunk_bytes, frozen=True)


FORWARD, ROWS, CHUNKS, TOKENS = "forward", "rows", "chunks", "tokens"
CONFIGURATIONS, PRODUCTS_OF_CHUNKS, FLOAT16 = "configurations", "products", "float16"
#: The kernels of each part.
KERNELS: dict[str, Callable[[Inputs], Iterator[Kernel]]] = {
    FORWARD: _forward_kernels,
    ROWS: _row_kernels,
    CHUNKS: _steps_by_chunk,
    TOKENS: _calls_by_tokens,
    CONFIGURATIONS: _configurations,
    PRODUCTS_OF_CHUNKS: _products,
    FLOAT16: _float16,
}
