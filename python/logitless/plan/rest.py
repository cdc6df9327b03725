"""Rough terms of what a training step holds outside the head: weights, gradients, AdamW and activations.

They are counts for the matrices of a usual decoder, whose attention keeps no matrix of scores and whose parameters have
one dtype. Norms, biases, what a framework caches, and fragmentation are left out.
"""

from __future__ import annotations

from .shape import Body, Shape
from .step import Step
from .terms import Term, term

#: Numbers that AdamW keeps for each parameter.
MOMENTS = 2


def rough_terms(shape: Shape, step: Step, *, lora: int | None, checkpointing: bool) -> list[Term]:
    """What is outside the head; nothing where only the sizes of the head are known.

    `lora`: the rank of adapters on every matrix of the layers, in float32, in place of training the weights.
    """
    terms = []
    if not step.frozen_head:
        terms.append(term("AdamW of the head", numbers=MOMENTS, V=step.vocabulary, H=step.hidden, bytes=step.size))
    if shape.body is None:
        return terms
    parameters = _parameter_count(shape.body, step.hidden) + (0 if shape.tied else step.vocabulary * step.hidden)
    terms.insert(0, term("weights below the head", parameters=parameters, bytes=step.size))
    if lora is None:
        terms.append(term("their gradients", parameters=parameters, bytes=step.size))
        terms.append(term("AdamW of them", numbers=MOMENTS, parameters=parameters, bytes=step.size))
    else:
        adapters = _adapters(shape.body, step.hidden, lora)
        name = "adapters, their gradients and AdamW, float32"
        terms.append(term(name, numbers=2 + MOMENTS, parameters=adapters, bytes=4))
    return [*terms, *_activations(shape.body, step, checkpointing)]


def _matrices(body: Body, hidden: int) -> list[tuple[int, int, int]]:
    """The matrices of a layer: how many there are of each shape."""
    return [
        (1, hidden, body.queries),
        (2, hidden, body.keys),
        (1, body.queries, hidden),
        (3 * body.experts, hidden, body.intermediate),
    ]


def _parameter_count(body: Body, hidden: int) -> int:
    return body.layers * sum(count * rows * columns for count, rows, columns in _matrices(body, hidden))


def _adapters(body: Body, hidden: int, rank: int) -> int:
    return body.layers * sum(count * rank * (rows + columns) for count, rows, columns in _matrices(body, hidden))


def _activations(body: Body, step: Step, checkpointing: bool) -> list[Term]:
    """What the layers keep for the backward; with checkpointing each layer's input, and one layer's numbers."""
    numbers = 4 * step.hidden + 2 * body.queries + 2 * body.keys + 4 * body.intermediate * body.routed
    one = term("activations of a layer", N=step.tokens, numbers=numbers, bytes=step.size)
    if not checkpointing:
        name = "activations of all layers, without checkpointing"
        return [term(name, N=step.tokens, numbers=numbers, layers=body.layers, bytes=step.size)]
    return [term("inputs of all layers", N=step.tokens, H=step.hidden, layers=body.layers, bytes=step.size), one]
