"""Measures a part: error against float64, memory, and time in turns, every provider once a round.

In turns a slow minute or a warm chip is everybody's, so that ratios within a round mean more than the times themselves.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from . import work
from .machine import Machine
from .problem import CPU, Problem
from .provider import Outcome, Provider, Role, Subject, differentiate
from .providers.materialised import DEFINITIONS
from .targets import Json, Target

T = TypeVar("T")
#: Told what is being done and what has been measured so far, before anything that may never return.
Tell = Callable[[str, Json], None]
#: Relative errors against float64 that a right loss stays below, whatever the order of its sums. An approximate
#: strategy has a bound of its own.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2, torch.float64: 1e-9}
APPROXIMATE = 0.1
#: Many times the error of materialised logits is no rounding, where that is larger.
ROUNDING = 10
#: What a failure for lack of memory is called.
OUT_OF_MEMORY = "out of memory"
#: Why a provider was not called before the rounds had to begin. The part is not complete then.
NO_TIME = "no time was left for its first call"


def silent(doing: str, so_far: Json) -> None:
    """Drops the message: nobody waits for it."""


@dataclass(frozen=True)
class Method:
    """How the providers of a part are measured.

    Args:
        rounds: at most so many; one is always run.
        seconds: what all rounds may take. A round that has begun is finished.
        may_fail: roles whose failure is a line in the table. Any other's is an error.
        whole: a whole step comes before the rounds, which warms up, and whose memory is taken in this process.
        forwards: forwards without gradients are timed too.
        patience: a peer that takes so many times as long as the materialised loss is timed once.
        counted: products and passes over the vocabulary are counted, of logitless's providers.
    """

    rounds: int = 3
    seconds: float = math.inf
    may_fail: tuple[Role, ...] = ("peer",)
    whole: bool = False
    forwards: bool = False
    patience: float = math.inf
    counted: bool = False

    @property
    def reserve(self) -> float:
        """Seconds to keep for the rounds."""
        return self.seconds if math.isfinite(self.seconds) else 0.0


@dataclass(frozen=True)
class Part:
    """A problem and the providers that take turns on it; the kernels' parts measure something else on it.

    Args:
        targets: what logitless has to reach.
        columns: of its table, by their names in `tables.COLUMNS`.
        base: the provider of the columns "/ base" and "spread".
        memory: whether memory is measured too, in a process of its own for each provider.
    """

    name: str
    problem: Problem
    providers: tuple[Provider, ...] = ()
    targets: tuple[Target, ...] = ()
    method: Method = Method()
    columns: tuple[str, ...] = ()
    base: str = ""
    memory: bool = False

    def tiny(self) -> Part:
        return replace(self, problem=self.problem.tiny())

    def inputs(self, device: torch.device = CPU) -> Subject:
        """What the providers take their steps on."""
        return self.problem.inputs(device)

    def provider(self, name: str) -> Provider:
        return next(p for p in self.providers if p.name == name)

    def measure(self, machine: Machine, deadline: float, skip: Json, tell: Tell) -> Json:
        """Ready for JSON, with "complete". `skip` has the reason for each row that is left out."""
        return measure_part(self, machine, deadline, skip, tell)


@dataclass
class Row:
    """Results of one provider (or kernel). Seconds are in round order, from round 0 on."""

    provider: str
    role: str
    frozen: bool = False
    seconds: list[float] = field(default_factory=list)  # a step: forward with gradients, and backward; a kernel's call
    forward: list[float] = field(default_factory=list)  # without gradients
    backward: list[float] = field(default_factory=list)  # of the step, `backward()` alone
    floor: list[float] = field(default_factory=list)  # of a kernel: what it is set against, in the same turns
    first_call_seconds: float | None = None  # imports and compilation
    loss: float | None = None
    error: dict[str, float] | None = None  # relative, of loss, d_hidden and d_weight, against float64 on few tokens
    memory: dict[str, int | None] | None = None  # bytes; a step's are beyond inputs and gradients
    work: dict[str, float] | None = None  # products and passes over the vocabulary, on few tokens
    wrong: list[str] | None = None  # of a kernel: errors that are larger than rounding explains; None: not checked
    bytes: int | None = None  # of a kernel's traffic, read and written
    floor_bytes: int | None = None  # of its floor's, where that is a copy of another size
    failure: str | None = None

    @property
    def runs(self) -> bool:
        return self.failure is None


class DeviceLost(Exception):
    """No kernel runs in this process any more."""


class WrongResult(Exception):
    """A loss or a gradient is further from float64 than rounding explains."""


def attempt(row: Row, function: Callable[[], object], machine: Machine, method: Method) -> None:
    """Calls it. A failure is a line in the table, if the row's role may fail.

    Raises:
        DeviceLost: the device went with it.
    """
    try:
        function()
        return
    except Exception as reason:
        if row.role not in method.may_fail:
            raise
        row.failure = explain(reason)
    try:
        machine.recover()
    except Exception:
        raise DeviceLost(row.failure) from None


def explain(reason: Exception) -> str:
    """An exception in a line."""
    if isinstance(reason, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    if isinstance(reason, ModuleNotFoundError) and reason.name:
        return f"not installed: {reason.name}"
    if isinstance(reason, WrongResult):
        return f"wrong: {reason}"
    lines = str(reason).strip().splitlines()
    return f"{type(reason).__name__}: {lines[0] if lines else ''}"


def in_turns(items: Sequence[T], rounds: int, stop: float = math.inf) -> Iterator[T]:
    """Every item once a round, in alternating order; no round but the first begins after `stop`."""
    for turn in range(rounds):
        if turn and time.monotonic() > stop:
            return
        yield from items[:: -1 if turn % 2 else 1]


def measure_part(part: Part, machine: Machine, deadline: float, skip: Json, tell: Tell) -> Json:
    """Errors, memory and times of every provider. No round begins after `deadline`, on `time.monotonic`'s clock."""
    torch.compiler.reset()
    method = part.method
    rows = [Row(p.name, p.role, p.frozen, bytes=p.bytes, failure=skip.get(p.name) or p.absent) for p in part.providers]
    pairs = list(zip(part.providers, rows, strict=True))
    inputs = part.inputs(machine.device)

    stop = math.inf

    def so_far(complete: bool = False) -> Json:
        result = {**inputs.about(), "rows": [asdict(row) for row in rows], "complete": complete}
        return result if complete else result | {"seconds_left": _left(rows, method.rounds, stop)}

    def call(function: Callable[..., object], provider: Provider, row: Row, until: float = math.inf) -> None:
        if row.runs and time.monotonic() > until:
            row.failure = NO_TIME
        elif row.runs:
            tell(provider.name, so_far())
            attempt(row, partial(function, provider, row), machine, method)

    check = _Check(part, inputs.brief())
    for provider, row in pairs:
        call(check, provider, row, deadline - 2 * method.reserve)
    del check  # its references are as large as four heads in bfloat16
    for provider, row in pairs if method.whole else ():
        whole = partial(_whole, inputs=inputs, machine=machine, forwards=method.forwards)
        call(whole, provider, row, deadline - method.reserve)
    clock = partial(time_once, inputs=inputs, machine=machine, forwards=method.forwards)
    stop = min(deadline, time.monotonic() + method.seconds)
    for provider, row in in_turns(pairs, method.rounds, stop):
        if not _hopeless(row, rows, method.patience):
            call(clock, provider, row)
    return so_far(complete=all(row.failure != NO_TIME for row in rows))


def _left(rows: Sequence[Row], rounds: int, stop: float) -> float | None:
    """Seconds that the rounds will still take, judged by rounds or first calls; None where some had neither yet."""
    rest = 0.0
    for row in (row for row in rows if row.runs):
        if not row.seconds and row.first_call_seconds is None:
            return None
        each = statistics.mean(row.seconds) if row.seconds else row.first_call_seconds or 0.0
        rest += each * (rounds - len(row.seconds))
    return min(rest, max(0.0, stop - time.monotonic()))


class _Check:
    """First calls on few tokens, which load and compile, and their errors against float64."""

    def __init__(self, part: Part, few: Subject) -> None:
        self.method, self.few = part.method, few
        names = {p.compared for p in part.providers if p.compared}
        self.references = {name: self._reference(name) for name in names}
        self.materialised: dict[str, float] = {}

    def _reference(self, name: str) -> Outcome | None:
        """Outcome in float64; None if float64 copies of the head do not fit."""
        with suppress(torch.OutOfMemoryError):
            return differentiate(DEFINITIONS[name], self.few.to(torch.float64))
        return None

    def __call__(self, provider: Provider, row: Row) -> None:
        if self.method.whole and not provider.compared:
            return  # whole calls follow, and some would compile for few tokens in vain
        start = time.perf_counter()
        outcome = provider.step(self.few)
        row.first_call_seconds = time.perf_counter() - start
        reference = self.references.get(provider.compared)
        if reference is not None:
            row.error = errors(outcome, reference)
            self._judge(provider, row.error)
        if self.method.counted and provider.role == "logitless":
            row.work = work.count(partial(provider.step, self.few), self.few.problem)._asdict()

    def _judge(self, provider: Provider, found: dict[str, float]) -> None:
        """Raises WrongResult for an error beyond `TOLERANCE`, and beyond what materialised logits have here."""
        if provider.role == "materialised":
            self.materialised = {name: max(x, self.materialised.get(name, 0.0)) for name, x in found.items()}
        limit = APPROXIMATE if provider.approximate else TOLERANCE.get(self.few.problem.dtype, 0.0)
        for name, x in found.items():
            most = max(limit, ROUNDING * self.materialised.get(name, 0.0))
            if not x <= most:  # NaN is wrong too
                raise WrongResult(f"{name} is off by {x:.1e}, and {most:.1e} is the most that rounding explains")


def errors(outcome: Outcome, reference: Outcome) -> dict[str, float]:
    """`|x - reference| / |reference|` of the loss and of each gradient."""
    pairs = zip(Outcome._fields, outcome, reference, strict=True)
    return {name: relative(x, exact) for name, x, exact in pairs if x is not None and exact is not None}


def relative(x: Tensor, exact: Tensor) -> float:
    """`|x - exact| / |exact|` in the exact one's dtype."""
    return float((x.to(exact.dtype) - exact).norm() / (exact.norm() or 1.0))


def _whole(provider: Provider, row: Row, *, inputs: Subject, machine: Machine, forwards: bool) -> None:
    """The loss and the memory of a whole step, and of a forward if that is timed; both warm up."""
    start, whole = time.perf_counter(), provider.of(inputs)
    outcomes: list[Outcome] = []
    forward = {"forward": machine.peak(partial(_forward, provider, whole))} if forwards else {}
    step = machine.peak(lambda: outcomes.append(differentiate(provider.loss, whole)))
    if row.role != "floor":
        row.memory = {**forward, "allocated": step - whole.gradient_bytes}
        row.loss = float(outcomes[0].loss)
    row.first_call_seconds = (row.first_call_seconds or 0.0) + time.perf_counter() - start


def _forward(provider: Provider, inputs: Subject) -> None:
    with torch.no_grad():
        provider.loss(*inputs.operands())


def time_once(provider: Provider, row: Row, inputs: Subject, machine: Machine, *, forwards: bool = False) -> None:
    """Appends the seconds of a step and of its backward to the row's, and those of a forward before."""
    whole = provider.of(inputs)
    if forwards:
        row.forward.append(seconds(partial(_forward, provider, whole), machine))
    machine.flush()
    marks = [machine.mark()]
    differentiate(provider.loss, whole, between=lambda: marks.append(machine.mark()))
    marks.append(machine.mark())
    row.seconds.append(machine.seconds(marks[0], marks[2]))
    row.backward.append(machine.seconds(marks[1], marks[2]))


def seconds(function: Callable[[], object], machine: Machine) -> float:
    """Time of one call on the machine's clock."""
    machine.flush()
    start = machine.mark()
    function()
    return machine.seconds(start, machine.mark())


def _hopeless(row: Row, rows: Sequence[Row], patience: float) -> bool:
    base = next((r for r in rows if r.role == "materialised" and r.seconds), None)
    known = row.role == "peer" and bool(row.seconds) and base is not None
    return known and base is not None and row.seconds[0] > patience * base.seconds[0]
