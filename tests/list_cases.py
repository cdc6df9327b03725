"""Lists of ids per token, shared by their tests on a CPU and on a device: cases, and the statistics by definition."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Case, cases
from hypothesis import strategies as st
from torch import Tensor

from logitless import TokenStats, linear_logprobs
from logitless.testing import TokenProblem, assert_matches_float64, make_problem, measure, poison_empty
from logitless.types import LIST_OUTPUTS, LogitTransform, statistics_dtype


def full_logits(p: TokenProblem, transform: LogitTransform) -> Tensor:
    z = torch.nn.functional.linear(p.hidden, p.weight, p.bias).to(statistics_dtype(p.hidden.dtype))
    z = z * transform.logit_scale
    if transform.softcap is not None:
        masked = z.isneginf()
        z = (transform.softcap * torch.tanh(z.masked_fill(masked, 0) / transform.softcap)).masked_fill(
            masked, -math.inf
        )
    return z / transform.temperature


def stated(p: TokenProblem, transform: LogitTransform, outputs=LIST_OUTPUTS) -> TokenStats:
    """The statistics of the problem's lists by definition, from full logits."""
    z, present = full_logits(p, transform), p.targets >= 0
    ids, counts = p.targets.clamp(min=0), (p.targets >= 0).any(-1)
    z = z.masked_fill(~counts[..., None], 0.0)
    logp = z.log_softmax(-1)
    listed = (torch.nn.functional.one_hot(ids, z.shape[-1]).bool() & present[..., None]).any(-2)
    nothing = (listed | logp.isneginf()).all(-1)
    tail = logp.masked_fill(listed & ~nothing[..., None], -math.inf).masked_fill(nothing[..., None], 0.0).logsumexp(-1)
    tail = tail.masked_fill(nothing, -math.inf)
    entropy = -(logp.exp() * logp.masked_fill(logp.isneginf(), 0.0)).sum(-1)
    of_tokens = (x.masked_fill(~counts, 0.0) for x in (z.logsumexp(-1), entropy, tail))
    found = dict(zip(("lse", "entropy", "tail"), of_tokens, strict=True))
    found["logprob"] = logp.gather(-1, ids).masked_fill(~present, 0.0)
    return TokenStats(**{name: found[name] for name in outputs})


@st.composite
def listed_cases(draw, **options) -> Case:
    """A case whose targets are lists: some places absent, some ids twice, some tokens without any."""
    case = draw(cases(**options))
    p = case.problem
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    lists = torch.randint(0, len(p.weight), (*p.targets.shape, draw(st.integers(1, 6))), generator=generator)
    absent = torch.rand(lists.shape, generator=generator) < draw(st.sampled_from([0.0, 0.4]))
    lists = lists.masked_fill(absent, draw(st.sampled_from([-1, -100])))
    lists = lists.to(p.targets.device).masked_fill((p.targets == -100)[..., None], -100)
    return Case(p._replace(targets=lists), case.transform, case.chunk_tokens)


def run(p: TokenProblem, **options) -> TokenStats:
    return linear_logprobs(p.hidden, p.weight, p.targets, bias=p.bias, **options)


def check(case: Case, outputs: tuple[str, ...], **options) -> None:
    with poison_empty():
        assert_matches_float64(
            lambda p: run(p, outputs=outputs, **case.options, **options),
            lambda p: stated(p, case.transform, outputs),
            case.problem,
            scale=max(1.0, case.scale, case.bent_scale),  # the listed entries' terms cancel against one another
        )


def check_approximate(backward: str) -> None:
    """Log-probs and lse within what the tolerance allows; the tail is refused."""
    p = make_problem((40,), 32, 3000, trainable=("hidden", "weight"))
    lists = torch.randint(0, 3000, (40, 5), generator=torch.Generator().manual_seed(0))
    lists[3, 2:], lists[4] = -1, -100
    options = dict(outputs=("logprob", "lse"), backward=backward, tail_tolerance=0.0)
    exact = measure(lambda q: run(q, outputs=("logprob", "lse")), p._replace(targets=lists))
    found = measure(lambda q: run(q, **options), p._replace(targets=lists))
    close = measure(lambda q: run(q, **{**options, "tail_tolerance": 2**-13}), p._replace(targets=lists))
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
        assert (close[name] - value).norm() <= 2**-6 * value.norm()
    with pytest.raises(ValueError, match=r"outputs: backward='.*' cannot give 'tail'"):
        run(p._replace(targets=lists), outputs=("tail",), backward=backward)
