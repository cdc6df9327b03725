"""Time of a step's head and loss: products and passes over the vocabulary, counted from the code, at given rates.

A product takes the longer of its operations and its bytes. Row operations take the bytes that they read and write. Time
for vectors of a number a token, for the loss itself and for Python is left out.
"""

from __future__ import annotations

from typing import NamedTuple

from .rates import Rates
from .step import Step

#: Reads and writes of full logits by a materialised loss, without its products: log-softmax 2, the gradient of the
#: gather 1, that of the log-softmax 3.
MATERIALISED_PASSES = 6
#: Reads and writes of a chunk by PyTorch's operations for its statistics: maximum 1, subtraction 2, exponential 2,
#: sum 1. An entropy takes 5 more: clamp 2, product 2, sum 1.
TORCH_PASSES, ENTROPY_PASSES = 6, 5


class Cost(NamedTuple):
    """A part of a step's time."""

    name: str
    seconds: float
    formula: str


def products(step: Step, strategy: str) -> int | None:
    """Products of 2 N H V flops; None where a strategy does not serve the step."""
    if step.obstacle(strategy) and strategy != "materialised":
        return None
    of_gradient = 1 if step.frozen_head else 2
    again = 1 if strategy == "recompute" else 0
    if not step.loss.compares_distributions:
        return 1 + again + of_gradient
    sides = 2 * (1 + again) + of_gradient
    return sides + (1 + again + of_gradient if step.loss.outputs else 0)


def costs_of(step: Step, strategy: str, rates: Rates) -> list[Cost] | None:
    """The parts of a strategy's time; None for a divergence, whose passes depend on its kind."""
    if step.loss.compares_distributions:
        return None
    if strategy == "materialised":
        return _of_full_logits(step, rates)
    passes = _statistics_bytes(step, strategy) + _gradient_bytes(step, strategy)
    return [
        *_of_chunks(step, strategy, rates),
        _pass("row operations on chunks", step.tokens * step.vocabulary, passes, rates.cache),
        _pass(
            "scaling and rounding of the gradients", _gradient_elements(step), _end_bytes(step, strategy), rates.stream
        ),
    ]


def _of_full_logits(step: Step, rates: Rates) -> list[Cost]:
    count, flops = products(step, "materialised"), 2 * step.tokens * step.hidden * step.vocabulary
    assert count is not None
    return [
        Cost("products", count * flops / rates.whole, f"{count} of 2 N H V = {flops:.3g} flops at {rates.whole:.3g}/s"),
        _pass("row operations", step.tokens * step.vocabulary, MATERIALISED_PASSES * step.size, rates.memory),
    ]


def _pass(name: str, elements: int, each: int, rate: float) -> Cost:
    return Cost(name, elements * each / rate, f"{elements:.3g} numbers x {each} bytes at {rate / 1e9:.3g} GB/s")


def _of_chunks(step: Step, strategy: str, rates: Rates) -> list[Cost]:
    """Each chunk's products; one with the head reads all of it, and one into the head's sum reads and writes that."""
    tokens, head = step.chunk, step.vocabulary * step.hidden
    chunks, matrix = -(-step.tokens // tokens), tokens * step.vocabulary
    gradient = matrix * step.operand.itemsize
    traffic = {
        "the logits' product": head * step.size + matrix * step.wide,
        "the product with the head": head * step.size + gradient,
        "the product into the head's sum": 2 * head * step.wide + gradient,
    }
    times = {"the logits' product": 2 if strategy == "recompute" else 1}
    if step.frozen_head:
        del traffic["the product into the head's sum"]
    flops = 2 * tokens * head
    found = []
    for name, moved in traffic.items():
        count, arithmetic, memory = chunks * times.get(name, 1), flops / rates.chunk, moved / rates.stream
        what = f"{flops:.3g} flops at {rates.chunk:.3g}/s"
        if memory > arithmetic:
            what = f"{moved:.3g} bytes at {rates.stream / 1e9:.3g} GB/s"
        found.append(Cost(name, count * max(arithmetic, memory), f"{count} x {what}"))
    return found


def _statistics_bytes(step: Step, strategy: str) -> int:
    """Bytes read and written for each logit's statistics, in all of a strategy's sweeps."""
    again = strategy == "recompute"
    if step.backend != "chunked":
        return 0 if again else step.wide
    entropy = "entropy" in step.loss.outputs
    if step.by_kernels:
        written = step.wide if entropy else step.operand.itemsize
        return 2 * step.wide + written + (2 * step.wide + step.operand.itemsize if again else 0)
    passes = TORCH_PASSES * (2 if again else 1) + (ENTROPY_PASSES if entropy else 0)
    return passes * step.wide


def _gradient_bytes(step: Step, strategy: str) -> int:
    """Bytes read and written to turn what the statistics left into the gradient that is multiplied."""
    copied = step.wide + step.operand.itemsize
    if step.backend == "triton" and strategy == "recompute":
        return step.operand.itemsize
    if step.backend != "chunked":
        return copied
    done = step.operand.itemsize == step.wide or (step.by_kernels and "entropy" not in step.loss.outputs)
    return 0 if done else copied


def _gradient_elements(step: Step) -> int:
    return (step.tokens + (0 if step.frozen_head else step.vocabulary)) * step.hidden


def _end_bytes(step: Step, strategy: str) -> int:
    """Bytes read and written for each number of the gradients: the upstream gradient's factor, and the rounding."""
    rounding = step.wide + step.size if step.rounds else 0
    scales = strategy == "single_pass" and not (step.rounds and step.device == "cuda")
    return rounding + (2 * step.wide if scales else 0)
