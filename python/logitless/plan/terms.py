"""Memory of a step's head and loss, counted term by term from the code of each strategy.

A step has several moments at which much is alive, such as a chunk of the backward, or the rounding of the sums at the
end. Each is a list of terms, and the peak is the largest of them. Beside the peak are the inputs, which the caller has.

    inputs      hidden states, head, targets and the loss's constants
    gradients   one copy of each gradient asked for and, below float32, of its float32 sum
    extra       what the peak has beyond these gradients (`bench.memory` measures it)

The extra is negative where less than the gradients and their sums is alive at the peak.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..backends.exact.chunks import chunk_budget, row_stride
from ..backends.exact.divergence import ROW_GROUPS
from ..backends.exact.gradients import GATHERED_TOKENS
from ..backends.exact.products import (
    ADDS_NARROW_PRODUCTS,
    CONVERTED_ENTRIES,
    CONVERTED_ENTRIES_ACCELERATOR,
    PART_BYTES,
    PART_BYTES_ACCELERATOR,
    logit_dtype,
)
from ..backends.exact.torch_rows import PIECE_BYTES, PIECE_BYTES_ACCELERATOR
from ..backends.native import SERIAL_ELEMENTS
from ..backends.triton import GRADIENT_TOKENS, scratch_budget
from ..losses.sft.likelihood import NLL
from ..types import PAIR_BLOCK
from .step import Step

#: Tensors of a group of rows that a divergence in PyTorch's operations holds at its peak: both sides' log-softmax, its
#: exponentials, the log-ratio and its negative, the terms, their share of the gradient, and the gradient.
DIVERGENCE_TENSORS = 9


class Term(NamedTuple):
    """A tensor, or several alike, at a moment; `formula` is its size in words and numbers."""

    name: str
    bytes: int
    formula: str


@dataclass(frozen=True)
class Memory:
    """Bytes of a step by one strategy."""

    inputs: tuple[Term, ...]
    gradients: tuple[Term, ...]
    moment: str
    alive: tuple[Term, ...]  # at the peak

    @property
    def peak(self) -> int:
        """The most that the step holds beyond its inputs."""
        return total(self.alive)

    @property
    def extra(self) -> int:
        """The peak beyond one copy of the gradients and their sums."""
        return self.peak - total(self.gradients)

    @property
    def total(self) -> int:
        """All that has to fit: inputs, gradients and extra."""
        return total(self.inputs) + self.peak


def total(terms: tuple[Term, ...] | list[Term]) -> int:
    """The bytes of terms together."""
    return sum(each.bytes for each in terms)


def term(name: str, **factors: int) -> Term:
    """A term that is a product; one-letter factors are sizes, and of others the name says what is counted."""
    size, shown = 1, []
    for symbol, number in factors.items():
        size *= number
        shown.append(f"{symbol} {number}" if len(symbol) == 1 else f"{number} {symbol}")
    return Term(name, size, " x ".join(shown))


def memory_of(step: Step, strategy: str) -> Memory:
    """The memory of a strategy that serves the step."""
    moments = {"materialised": _materialised, "recompute": _recompute, "single_pass": _single_pass}[strategy](step)
    moment, alive = max(moments.items(), key=lambda item: total(item[1]))
    return Memory(tuple(_input_terms(step)), tuple(_gradients(step)), moment, tuple(alive))


def _input_terms(step: Step) -> list[Term]:
    terms = [
        term("hidden states", N=step.tokens, H=step.hidden, bytes=step.size),
        term("head", V=step.vocabulary, H=step.hidden, bytes=step.size),
        term("targets, int64", N=step.tokens, bytes=8),
    ]
    if step.loss.inputs:
        terms.append(term("the loss's constants of a token", N=step.tokens, numbers=len(step.loss.inputs), bytes=4))
    if step.loss.compares_distributions:
        terms.append(term("the reference's hidden states", N=step.tokens, H=step.hidden, bytes=step.size))
    return terms


def _gradients(step: Step) -> list[Term]:
    return [*_rounded(step), *_sum_terms(step)] if step.rounds else _sum_terms(step)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients of hidden states and head


def _sum_terms(step: Step) -> list[Term]:
    """The sums over the chunks, in the statistics' dtype."""
    what = "float32 sum of the gradient" if step.rounds else "gradient"
    terms = [term(f"{what} of the hidden states", N=step.tokens, H=step.hidden, bytes=step.wide)]
    if not step.frozen_head:
        terms.append(term(f"{what} of the head", V=step.vocabulary, H=step.hidden, bytes=step.wide))
    return terms


def _rounded(step: Step) -> list[Term]:
    """The gradients in the dtype of hidden states and head."""
    terms = [term("gradient of the hidden states", N=step.tokens, H=step.hidden, bytes=step.size)]
    if not step.frozen_head:
        terms.append(term("gradient of the head", V=step.vocabulary, H=step.hidden, bytes=step.size))
    return terms


def _sums_of_sweep(step: Step) -> list[Term]:
    """The sums while chunks are added; one product for the only chunk needs none for the head."""
    return [_sum_terms(step)[0], _rounded(step)[1]] if step.one_product else _sum_terms(step)


def _end(step: Step, *, swept: bool = True) -> list[Term]:
    """The end: the sums, of a sweep or not, and what is rounded from them."""
    if not step.rounds:
        return _sum_terms(step)
    sums = _sums_of_sweep(step) if swept else _sum_terms(step)
    return [*sums, *(each for each in _rounded(step) if each not in sums)]


# ---------------------------------------------------------------------------------------------------------------------
# Chunks


def _logit_terms(step: Step, tokens: int) -> list[Term]:
    """A chunk's buffer, and what PyTorch's operations keep beside it under a softcap."""
    stride = row_stride(step.vocabulary, torch.float32, step.device)
    terms = [term("logits of a chunk, float32", n=tokens, V=stride, bytes=step.wide)]
    if step.softcap is not None and not step.in_place:
        terms.append(term("derivative of the softcap", n=tokens, V=step.vocabulary, bytes=step.wide))
    return terms


def _chunk_terms(step: Step, tokens: int, used: int | None = None) -> list[Term]:
    """What is alive while a chunk's gradient is multiplied, where of its tokens some are used."""
    used = tokens if used is None else used
    terms = _logit_terms(step, tokens)
    if not step.in_place:
        if step.operand.itemsize < step.wide:
            size = step.operand.itemsize
            terms.append(term("its gradient as it is multiplied", n=used, V=step.vocabulary, bytes=size))
        terms += _converted(step)
    return [*terms, _scaled_states(step, used)]


def _scaled_states(step: Step, tokens: int) -> Term:
    """A chunk's hidden states as they are multiplied, times their rows' factors."""
    copies, narrow = step.wide, step.operand.itemsize
    if step.by_library and tokens * step.hidden > SERIAL_ELEMENTS:
        copies = 2 * narrow  # scaled by parts, then joined
    elif narrow < step.wide:
        copies += narrow
    return term("a chunk's hidden states, scaled", n=tokens, H=step.hidden, bytes=copies)


def _converted(step: Step) -> list[Term]:
    """Room for a part of the head in another dtype, and for a part of a product that is added in another dtype."""
    terms = []
    if step.operand != step.dtype or logit_dtype(step.dtype, torch.device(step.device), None) != step.dtype:
        rows = min(step.vocabulary, CONVERTED_ENTRIES.get(step.device, CONVERTED_ENTRIES_ACCELERATOR))
        terms.append(term("a part of the head, float32", rows=rows, H=step.hidden, bytes=4))
    adds_wide = step.by_library or (step.device == "cuda" and ADDS_NARROW_PRODUCTS)
    if step.operand.itemsize < step.wide and not adds_wide:
        terms.append(Term("a part of a product", _part_bytes(step), "as large as products.PART_BYTES allows"))
    return terms


def _part_bytes(step: Step) -> int:
    whole = step.vocabulary * step.hidden * step.wide
    return min(whole, PART_BYTES.get(step.device, PART_BYTES_ACCELERATOR))


def _entropy_terms(step: Step) -> list[Term]:
    """A chunk whose entropy is measured, by PyTorch's operations on a piece of it at a time."""
    whole, budget = step.chunk * step.vocabulary * step.wide, PIECE_BYTES.get(step.device, PIECE_BYTES_ACCELERATOR)
    piece = Term("logarithms of a piece of it", min(whole, budget), "as large as torch_rows.PIECE_BYTES allows")
    needed = "entropy" in step.loss.outputs and not (step.in_place or step.by_kernels)
    return [*_logit_terms(step, step.chunk), *([piece] if needed else ())]


def _vectors(step: Step, numbers: int, size: int) -> Term:
    return term("statistics and gradients of a token", N=step.tokens, numbers=numbers, bytes=size)


# ---------------------------------------------------------------------------------------------------------------------
# Strategies


def _materialised(step: Step) -> dict[str, list[Term]]:
    """`cross_entropy` on full logits, in the model's dtype, differentiated by autograd."""

    def logits(name: str) -> Term:
        return term(name, N=step.tokens, V=step.vocabulary, bytes=step.size)

    of_logits = logits("gradient of the logits")
    products = _rounded(step) if step.rounds else _sum_terms(step)
    return {
        "backward of the log-softmax": [
            logits("log-softmax of all logits"),
            logits("gradient of the log-softmax"),
            of_logits,
        ],
        "products of the backward": [of_logits, *products],
    }


def _recompute(step: Step) -> dict[str, list[Term]]:
    if step.loss.compares_distributions:
        return _divergence(step, recomputes=True)
    numbers = 4 + ("entropy" in step.loss.outputs)  # logprob, lse, the loss's own and its gradient
    kept = [_vectors(step, numbers, step.wide)]
    moments = {"end of the backward": [*_end(step, swept=step.backend != "triton"), *kept]}
    if step.backend == "triton":
        return moments | {"backward": [*_sum_terms(step), *_scratch(step), *kept]}
    if step.backend == "cuda":
        moments["forward"] = [_moments(step), *kept]
    return moments | {"a chunk of the backward": [*_sums_of_sweep(step), *_chunk_terms(step, step.chunk), *kept]}


def _scratch(step: Step) -> list[Term]:
    """The scratch of Triton's recomputing backward, whose forward keeps logits in registers."""
    height = min(step.tokens, GRADIENT_TOKENS)
    whole = height * step.vocabulary * step.operand.itemsize
    budget = scratch_budget(height, step.vocabulary, step.chunk_bytes)
    terms = [Term("scratch for a part of the gradient", min(whole, budget), "as large as triton.scratch_budget allows")]
    rows = min(step.tokens, GATHERED_TOKENS)
    terms.append(term("targets' rows of the head, gathered", tokens=rows, H=step.hidden, bytes=step.wide))
    if step.operand != step.dtype:
        terms.append(term("float32 copy of the head", V=step.vocabulary, H=step.hidden, bytes=4))
        terms.append(term("float32 copy of the hidden states", N=step.tokens, H=step.hidden, bytes=4))
    return terms


def _moments(step: Step) -> Term:
    """Two numbers for each token and block of the vocabulary in the CUDA library's fused forward."""
    most = chunk_budget(step.chunk_bytes, step.device)
    blocks = -(-step.vocabulary // PAIR_BLOCK)
    whole = term("two numbers of a token and block", N=step.tokens, blocks=blocks, bytes=8)
    return whole if whole.bytes <= most else whole._replace(bytes=most, formula="a chunk's budget")


def _single_pass(step: Step) -> dict[str, list[Term]]:
    if step.loss.compares_distributions:
        return _divergence(step, recomputes=False)
    if step.unit_gradient("single_pass"):
        return _unit_gradient(step)
    if step.by_groups("single_pass"):
        return _whole_groups(step)
    kept = [_vectors(step, 2, step.wide)]
    return {
        "a chunk's statistics": [*_sums_of_sweep(step), *_entropy_terms(step), *kept],
        "a chunk of the sweep": [*_sums_of_sweep(step), *_chunk_terms(step, step.chunk), *kept],
        "rounding of the gradients": _end(step),
    }


def _unit_gradient(step: Step) -> dict[str, list[Term]]:
    """A frozen head's gradient from one vector for each token, scaled in the backward."""
    kept = [_vectors(step, 4, step.wide)]
    unit = term("unit gradient", N=step.tokens, H=step.hidden, bytes=step.size)
    scaled = term("its sum with its scaled rows", N=step.tokens, H=step.hidden, tensors=3, bytes=step.wide)
    return {
        "a chunk of the forward": [*_sum_terms(step), *_chunk_terms(step, step.chunk), *kept],
        "scaling of the unit gradient": [unit, scaled, *kept],
    }


def _whole_groups(step: Step) -> dict[str, list[Term]]:
    """A sweep over pairs or sequences, whose tokens are sorted: hidden states and their gradient are there twice."""
    sorted_states = term("hidden states in the order of the groups", N=step.tokens, H=step.hidden, bytes=step.size)
    kept = [_vectors(step, 6, 8), _vectors(step, 2, step.wide)]
    most = min(step.tokens_at_once, step.tokens)
    used = most if step.group is None else max(step.group, most - most % step.group)
    chunk = _chunk_terms(step, most, min(used, most))
    back = term("their gradient in the order of the tokens", N=step.tokens, H=step.hidden, bytes=step.wide)
    return {
        "a chunk of the sweep": [*_sums_of_sweep(step), sorted_states, *chunk, *kept],
        "end of the sweep": [*_sum_terms(step), sorted_states, back, *kept],
        "rounding of the gradients": _end(step),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Divergences


def _divergence(step: Step, *, recomputes: bool) -> dict[str, list[Term]]:
    """A sweep over both sides' chunks, and one over the rest of the loss, if there is a rest."""
    both = _both_chunks(step)
    if not step.loss.outputs:
        return {
            "a chunk of both sides": [*_sum_terms(step), *both],
            "rounding of the gradients": _end(step, swept=False),
        }
    first = _rounded(step) if recomputes and step.rounds else _sum_terms(step)
    alone = replace(step, loss=NLL())
    rest = [*_sum_terms(step), *_chunk_terms(alone, alone.chunk)]
    first = [each._replace(name=f"{each.name}, of the other sweep") for each in first]
    if recomputes:
        return {
            "a chunk of the log-probs": rest,
            "a chunk of both sides": [*first, *_sum_terms(step), *both],
            "end of the backward": [*first, *_end(step, swept=False)],
        }
    return {
        "a chunk of both sides": [*_sum_terms(step), *both],
        "a chunk of the log-probs": [*first, *rest],
        "rounding of the gradients": [*first, *_end(step, swept=False)],
    }


def _both_chunks(step: Step) -> list[Term]:
    tokens, vocabulary = step.chunk, step.vocabulary
    stride = row_stride(vocabulary, torch.float32, step.device)
    terms = [term("logits of a chunk, the model's and the reference's", sides=2, n=tokens, V=stride, bytes=step.wide)]
    if step.backend != "triton":
        rows = -(-tokens // ROW_GROUPS)
        name = "temporaries of a group of its rows"
        terms.append(term(name, tensors=DIVERGENCE_TENSORS, rows=rows, V=vocabulary, bytes=step.wide))
    if step.operand.itemsize < step.wide:
        size = step.operand.itemsize
        terms.append(term("its gradient as it is multiplied", n=tokens, V=vocabulary, bytes=size))
    return terms
