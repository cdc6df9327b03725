"""`plan`: what each strategy takes and costs, what fits, and what to choose."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .. import backends, losses
from ..losses import Loss
from .cost import Cost, costs_of, products
from .rates import Rates, calibrate
from .rest import rough_terms
from .shape import Shape, read_shape
from .step import STRATEGIES, Step
from .terms import Memory, Term, memory_of, total

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Where the search for the most tokens ends.
SEARCH_LIMIT = 2**40


@dataclass(frozen=True)
class Strategy:
    """One way to compute the step. `obstacle` says why it does not serve, or is not predicted; the rest is None then.

    Args:
        products: in units of 2 N H V flops. costs: parts of the time.
        ratio: of its time to the materialised step's. most_tokens: that fit.
    """

    name: str
    obstacle: str | None
    memory: Memory | None = None
    fits: bool = False
    most_tokens: int = 0
    products: int | None = None
    costs: tuple[Cost, ...] | None = None
    ratio: float | None = None

    @property
    def seconds(self) -> float | None:
        return None if self.costs is None else math.fsum(cost.seconds for cost in self.costs)


@dataclass(frozen=True)
class StepPlan:
    """What was asked, and the answers. `choice` is None where nothing fits."""

    step: Step
    shape: Shape
    memory: int
    rates: Rates | None
    rest: tuple[Term, ...]
    strategies: tuple[Strategy, ...]
    choice: str | None

    def strategy(self, name: str) -> Strategy:
        """The strategy of that name."""
        return next(each for each in self.strategies if each.name == name)


def plan(
    model: str | None = None,
    *,
    tokens: int,
    memory: int,
    hidden: int | None = None,
    vocabulary: int | None = None,
    loss: Loss | str = "nll",
    dtype: torch.dtype = torch.bfloat16,
    device: str | None = None,
    frozen_head: bool = False,
    lora: int | None = None,
    length: int | None = None,
    checkpointing: bool = False,
    chunk_bytes: int | None = None,
    backend: str | None = None,
    rates: Rates | None = None,
) -> StepPlan:
    """Predicts memory and time of a loss over a head, for each strategy, from formulas.

    Args:
        model: folder with a `config.json`, or hub id. Or `hidden` and `vocabulary`, for the head and the loss alone.
        tokens: N, those that count. memory: bytes that there are.
        loss: a loss of the registry or its name.
        device: "cpu" or "cuda". None: "cuda" where there is one.
        lora: rank of adapters below a head that is frozen then.
        length: tokens of a sequence, which say whether a pair fits a chunk; None: every one is taken to fit.
        checkpointing: whether the layers' activations are computed again.
        chunk_bytes: as in `linear_logprobs`.
        backend: "chunked", "triton" or "cuda". None: what would be picked here; of a GPU that is not here, "triton".
        rates: of the machine that is planned for. None: measured here if the device is here, in seconds.

    Raises:
        TypeError, ValueError: an argument that cannot be, by name; a loss that is not predicted.
    """
    for name, value in (("tokens", tokens), ("memory", memory)):
        _check_count(name, value)
    for name, optional in (("lora", lora), ("length", length), ("chunk_bytes", chunk_bytes)):
        if optional is not None:
            _check_count(name, optional)
    shape, loss = _shape(model, hidden, vocabulary), _predicted(losses.get(loss))
    device = _device(device)
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
    step = Step(
        tokens,
        shape.hidden,
        shape.vocabulary,
        loss,
        dtype,
        device,
        _backend(backend, device, dtype),
        frozen_head or lora is not None,
        shape.softcap,
        length,
        chunk_bytes,
    )
    if rates is None and _is_here(device):
        rates = calibrate(step)

    def rest_of(step: Step) -> list[Term]:
        return rough_terms(shape, step, lora=lora, checkpointing=checkpointing)

    found = _with_ratios([_predict(step, name, memory, rest_of, rates) for name in STRATEGIES])
    return StepPlan(step, shape, memory, rates, tuple(rest_of(step)), tuple(found), _fastest(found))


def read_dtype(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        ValueError: it is not one that is predicted.
    """
    if name not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a positive whole number, got {type(value).__name__}")
    if value <= 0:
        raise ValueError(f"{name}: expected a positive whole number, got {value}")


def _shape(model: str | None, hidden: int | None, vocabulary: int | None) -> Shape:
    if model is not None:
        if hidden is not None or vocabulary is not None:
            raise ValueError("model: expected a model, or hidden and vocabulary, got both")
        return read_shape(model)
    if hidden is None or vocabulary is None:
        raise ValueError("model: expected a model, or both hidden and vocabulary")
    _check_count("hidden", hidden)
    _check_count("vocabulary", vocabulary)
    return Shape(hidden, vocabulary)


def _predicted(loss: Loss) -> Loss:
    if loss.lists:
        raise ValueError(f"loss: {loss.name!r} lists several ids a token, which is not predicted")
    return loss


def _is_here(device: str) -> bool:
    return device == "cpu" or torch.cuda.is_available()


def _device(device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {device!r}")
    return device


def _backend(name: str | None, device: str, dtype: torch.dtype) -> str:
    if name is not None and name not in backends.BACKENDS:
        raise ValueError(f"backend: expected one of {list(backends.BACKENDS)}, got {name!r}")
    if name is None and _is_here(device):
        return backends.pick("auto", torch.empty(0, dtype=dtype, device=device))
    return name or "triton"


def _predict(
    step: Step, name: str, memory: int, rest_of: Callable[[Step], list[Term]], rates: Rates | None
) -> Strategy:
    obstacle = step.obstacle(name)
    if obstacle is not None:
        return Strategy(name, obstacle)

    def needed(tokens: int) -> int:
        shorter = replace(step, tokens=tokens)
        return memory_of(shorter, name).total + total(rest_of(shorter))

    costs = None if rates is None else costs_of(step, name, rates)
    return Strategy(
        name,
        None,
        memory_of(step, name),
        needed(step.tokens) <= memory,
        _most_tokens(lambda tokens: needed(tokens) <= memory),
        products(step, name),
        None if costs is None else tuple(costs),
    )


def _most_tokens(fits: Callable[[int], bool]) -> int:
    """The most tokens that fit, 0 where not even one does."""
    low, high = 0, 1
    while high < SEARCH_LIMIT and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _with_ratios(found: list[Strategy]) -> list[Strategy]:
    base = found[0].seconds
    return [replace(each, ratio=each.seconds / base) if base and each.seconds else each for each in found]


def _fastest(found: list[Strategy]) -> str | None:
    """The fastest that fits, of equals the one that takes less; by products where there are no seconds."""

    def effort(strategy: Strategy) -> tuple[float, int]:
        seconds, memory = strategy.seconds, strategy.memory
        assert strategy.products is not None and memory is not None
        return (strategy.products if seconds is None else seconds), memory.total

    fitting = [strategy for strategy in found if strategy.fits]
    return min(fitting, key=effort).name if fitting else None
