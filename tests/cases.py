"""Hypothesis strategies shared by the tests of the ops: problems, head options, chunk budgets."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from logitless.backends import BACKENDS
from logitless.testing import TokenProblem, make_problem
from logitless.types import LogitTransform

#: Where the problems of `cases` live; `device_suite.py` is for other places than a CPU.
DEVICE = torch.device(os.environ.get("LOGITLESS_TEST_DEVICE", "cpu"))
#: The backends that take tensors here: on a CPU the chunked one, Triton's where its interpreter is on, and CUDA's where
#: `LOGITLESS_CUDA_LIBRARY` names its build for the CPU.
HERE = [name for name, module in BACKENDS.items() if module.supports(DEVICE, torch.float32) is None]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FLOATING = ("hidden", "weight", "bias")


#: Statistics whose gradient is a sum of terms that cancel: lse's, with a frozen head, is the difference `slope weight_t
#: - d logprob`; the entries of the entropy's add up to 0.
CANCELLING = {"lse", "entropy"}


@dataclass(frozen=True)
class Case:
    """One call of an op: its tensors, the head's options, and how many tokens fit a chunk."""

    problem: TokenProblem
    transform: LogitTransform
    chunk_tokens: int | None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the op; the budget counts float32 logits (float64 for float64)."""
        size = 8 if self.problem.hidden.dtype == torch.float64 else 4
        budget = None if self.chunk_tokens is None else self.chunk_tokens * size * self.problem.weight.shape[0]
        return {**vars(self.transform), "chunk_bytes": budget}

    @property
    def scale(self) -> float:
        """Size of the terms of a frozen head's gradient, for the statistics of `CANCELLING`."""
        frozen = not any(x is not None and x.requires_grad for x in self.problem[1:3])
        return self.problem.weight.abs().max().item() if frozen else 0.0

    def scale_of(self, outputs: Collection[str]) -> float:
        """`scale` if one of these statistics has a gradient whose terms cancel, else 0."""
        return self.scale if CANCELLING & set(outputs) else 0.0

    @property
    def bent_scale(self) -> float:
        """Size of the terms of a gradient under a softcap, whose factor `1 - tanh^2` is a difference."""
        largest = max((x.abs().max().item() for x in self.problem[:2] if x is not None and x.numel()), default=0.0)
        return 0.0 if self.transform.softcap is None else self.transform.slope * largest


shapes = st.one_of(
    st.tuples(st.integers(0, 9)),
    st.tuples(st.integers(1, 3), st.integers(0, 4)),
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3)),
    st.just(()),
)
transforms = st.builds(
    LogitTransform,
    logit_scale=st.sampled_from([1.0, 0.25, 1.7]),
    softcap=st.sampled_from([None, 1.5, 30.0]),
    temperature=st.sampled_from([1.0, 0.6, 2.5]),
)
subsets = st.sets(st.sampled_from(FLOATING)).map(lambda names: tuple(sorted(names)))


@st.composite
def cases(draw: Any, dtypes: tuple[torch.dtype, ...] = DTYPES, trainable: Any = subsets) -> Case:
    """Any shape, sizes, dtype, bias (part of it -inf), ignored targets, frozen tensors, options and chunks."""
    vocabulary = draw(st.integers(1, 23))
    masked = None
    if vocabulary > 2 and draw(st.booleans()):
        start = draw(st.integers(0, vocabulary - 2))
        masked = slice(start, draw(st.integers(start + 1, vocabulary - 1 + (start > 0))))
    problem = make_problem(
        draw(shapes),
        draw(st.integers(1, 9)),
        vocabulary,
        dtype=draw(st.sampled_from(dtypes)),
        device=DEVICE,
        bias=draw(st.booleans()),
        masked=masked,
        ignored=draw(st.sampled_from([0.0, 0.3, 1.0])),
        trainable=draw(trainable),
        seed=draw(st.integers(0, 10**6)),
    )
    return Case(problem, draw(transforms), draw(st.sampled_from([None, 1, 2, 5])))


def strided(problem: TokenProblem) -> TokenProblem:
    """A copy of the problem in which no row is contiguous."""

    def scatter(x: torch.Tensor | None) -> torch.Tensor | None:
        if x is None:
            return None
        base = x.detach().new_zeros(*x.shape, 2)
        base[..., 0] = x.detach()
        return base[..., 0].requires_grad_(x.requires_grad)

    return TokenProblem(*(scatter(x) for x in problem))  # type: ignore[arg-type]
