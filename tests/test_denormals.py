"""No denormal number enters a gradient's product on a CPU, and what was cut is below any rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from cases import Case
from divergence_cases import KINDS, SideTensors, assert_right
from list_cases import check as check_lists
from torch import Tensor

from logitless import Head, linear_divergence, linear_logprobs, linear_token_loss
from logitless.backends import native
from logitless.backends.exact import divergence as divergence_rows
from logitless.backends.exact.denormals import drop_denormals_, exponential
from logitless.testing import TokenProblem, assert_matches_float64, make_problem, materialised
from logitless.types import LIST_OUTPUTS, OUTPUTS, DivergenceOptions, LogitTransform

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
#: Hidden states are so many times their target's row of the head, whose logits spread by 2: others lie around -100,
#: where float32 has denormal exponentials, more or less far out.
CONFIDENCE = (22.0, 25.0, 26.0, 30.0)
#: Bends logits of that size a little.
SOFTCAP = 4000.0


def confident(dtype: torch.dtype, times: float, **options) -> TokenProblem:
    """Tokens whose targets have nearly all the probability."""
    problem = make_problem((24,), 256, 600, dtype=dtype, trainable=(), **options)
    if dtype == torch.float64:  # whose exponents reach that much further
        times *= math.log(torch.finfo(torch.float64).tiny) / math.log(torch.finfo(torch.float32).tiny)
    hidden = (problem.weight[problem.targets] * times).to(dtype)
    return problem._replace(hidden=hidden.requires_grad_(), weight=problem.weight.requires_grad_())


def statistics(*outputs: str, **options) -> Callable[[TokenProblem], Tensor]:
    """The sum of the mean statistics, which is differentiated by recomputation."""

    def call(p: TokenProblem) -> Tensor:
        stats = linear_logprobs(p.hidden, p.weight, p.targets, bias=p.bias, outputs=outputs, **options)
        return torch.stack([getattr(stats, name).mean() for name in outputs]).sum()

    return call


def loss_in_one_sweep(p: TokenProblem, **options) -> Tensor:
    return linear_token_loss(
        p.hidden, p.weight, p.targets, per_token_loss=lambda stats: -stats.logprob, reduction="mean", **options
    )


def divergence(kind: str) -> Callable[[TokenProblem], Tensor]:
    def call(p: TokenProblem) -> Tensor:
        model, ref = Head(p.weight), Head(p.weight.flip(1))
        return linear_divergence(p.hidden, model, p.hidden.flip(1) * 0.9, ref, kind=kind).mean()

    return call


def listed(p: TokenProblem) -> TokenProblem:
    """The target and two unlikely ids."""
    return p._replace(targets=torch.stack([p.targets, (p.targets + 1) % 600, (p.targets + 2) % 600], 1))


def biased(p: TokenProblem) -> TokenProblem:
    return p._replace(bias=torch.zeros_like(p.weight[:, 0]).requires_grad_())


def frozen_head(p: TokenProblem) -> Tensor:
    return statistics("logprob")(p._replace(weight=p.weight.detach()))


CALLS: dict[str, Callable[[TokenProblem], Tensor]] = {
    "nll": statistics("logprob"),
    "nll in one sweep": loss_in_one_sweep,
    "frozen head": frozen_head,
    "entropy": statistics("logprob", "entropy"),
    "softcap": statistics("logprob", softcap=SOFTCAP),
    "entropy under a softcap": statistics("logprob", "entropy", softcap=SOFTCAP),
    "tokens of little weight": lambda p: 1e-36 * statistics("logprob")(biased(p)),
    "tokens of less weight": lambda p: 1e-37 * statistics("logprob")(biased(p)),
    "lists": lambda p: statistics("logprob")(listed(p)),
    "lists and their entropy": lambda p: statistics("logprob", "entropy")(listed(p)),
    "tail_corrected": statistics("logprob", backward="tail_corrected"),
    "tail_corrected in one sweep": lambda p: loss_in_one_sweep(p, backward="tail_corrected"),
    "tail_corrected for the head alone": lambda p: (
        1e-6 * statistics("logprob", backward="tail_corrected")(p._replace(hidden=p.hidden.detach()))
    ),
    **{kind: divergence(kind) for kind in ("forward_kl", "reverse_kl", "js", "total_variation")},
}


@contextmanager
def watched_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many entries of the two factors of each matrix product are denormal."""
    seen: list[int] = []

    def watch(function: Callable[..., Tensor], first: int) -> Callable[..., Tensor]:
        def watched(*args, **keywords) -> Tensor:
            seen.append(sum(denormals(x) for x in args[first : first + 2]))
            return function(*args, **keywords)

        return watched

    with monkeypatch.context() as patch:
        patch.setattr(native, "multiply_float32", watch(native.multiply_float32, 0))  # asked first, whoever multiplies
        patch.setattr(torch, "mm", watch(torch.mm, 0))
        patch.setattr(torch, "addmm", watch(torch.addmm, 1))
        patch.setattr(torch.Tensor, "addmm_", watch(torch.Tensor.addmm_, 1))
        yield seen


def denormals(x: Tensor) -> int:
    return int(((x != 0) & (x.abs() < torch.finfo(x.dtype).tiny)).sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_no_denormal_enters_a_product(monkeypatch, call, dtype):
    for times in CONFIDENCE:
        with watched_products(monkeypatch) as seen:
            CALLS[call](confident(dtype, times)).backward()
        assert seen and not any(seen), f"denormal factors at {times}: {seen}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_divergences_have_no_denormal_probabilities(monkeypatch, dtype):
    seen, terms = [], divergence_rows.terms
    monkeypatch.setattr(
        divergence_rows, "terms", lambda x, options: seen.append(denormals(x.p) + denormals(x.q)) or terms(x, options)
    )
    for times in CONFIDENCE:
        divergence("forward_kl")(confident(dtype, times))
    assert seen and not any(seen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, SOFTCAP])
@pytest.mark.parametrize("masked", [None, slice(40, 90)])
def test_statistics_and_gradients_against_float64(dtype, softcap, masked):
    transform = LogitTransform(softcap=softcap)
    outputs = OUTPUTS if masked is None else tuple(name for name in OUTPUTS if name != "mean_logit")  # -inf there
    for times in CONFIDENCE:
        assert_matches_float64(
            lambda p: linear_logprobs(p.hidden, p.weight, p.targets, bias=p.bias, outputs=outputs, softcap=softcap),
            lambda p: materialised(p, transform, outputs=outputs),
            confident(dtype, times, masked=masked),
            scale=1.0,  # of the entropy's terms, which cancel
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lists_against_float64(dtype):
    for times in CONFIDENCE:
        check_lists(Case(listed(confident(dtype, times)), LogitTransform(), None), LIST_OUTPUTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_divergences_against_float64(kind, dtype):
    for times in CONFIDENCE:
        p = confident(dtype, times)
        ref = [x.detach().clone().requires_grad_() for x in (0.9 * p.hidden, p.weight)]
        assert_right(SideTensors(p.hidden, p.weight, None, ref[0], ref[1], None), DivergenceOptions(kind))


def two_entries(margin: float, dtype: torch.dtype, **options) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics of a token whose only other entry lies `margin` below its target, beside a masked one; `d hidden`."""
    hidden = torch.tensor([[margin]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [0.5]], dtype=dtype)
    bias = torch.tensor([0.0, 0.0, -math.inf], dtype=dtype)
    outputs = tuple(name for name in OUTPUTS if name != "mean_logit")
    stats = linear_logprobs(hidden, weight, torch.tensor([0]), bias=bias, outputs=outputs, **options)
    (stats.logprob + stats.entropy).sum().backward()
    return {name: getattr(stats, name).detach() for name in outputs}, hidden.grad


@pytest.mark.parametrize(
    ("dtype", "margin"), [(torch.float32, 40.0), (torch.float32, 83.0), (torch.float32, 86.0), (torch.float64, 700.0)]
)
def test_a_confident_token_keeps_its_digits(dtype, margin):
    found, _ = two_entries(margin, dtype)
    truth = torch.tensor(-math.exp(-margin), dtype=dtype)
    torch.testing.assert_close(found["logprob"][0], truth, rtol=32 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("softcap", [None, SOFTCAP])
@pytest.mark.parametrize(
    ("dtype", "margin"), [(torch.float32, 90.0), (torch.float32, 200.0), (torch.float64, 730.0), (torch.float64, 900.0)]
)
def test_a_token_beyond_the_normal_range_is_certain(dtype, margin, softcap):
    found, gradient = two_entries(margin, dtype, softcap=softcap)
    assert {name: found[name].item() for name in found if name != "lse"} == {
        "logprob": 0.0, "entropy": 0.0, "correct": 1.0, "log_sum_sq": 0.0,
    }  # fmt: skip
    assert not found["logprob"].signbit().any() and not found["entropy"].signbit().any()
    assert gradient.item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("call", [name for name in CALLS if "head alone" not in name])
def test_nan_reaches_every_gradient_of_its_token(call, dtype):
    p = confident(dtype, 25.0)
    with torch.no_grad():
        p.hidden[3, 7] = math.nan
    CALLS[call](p).backward()
    assert p.hidden.grad[3].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_denormal_stays(dtype):
    """Whole vectors of each kind, and a rest."""
    tiny = torch.finfo(dtype).tiny
    for value, expected in (
        (math.nan, math.nan), (math.inf, math.inf), (-math.inf, -math.inf), (2 * tiny, 2 * tiny), (-1.0, -1.0),
        (tiny / 2, 0.0), (-tiny / 2, 0.0),
    ):  # fmt: skip
        x = torch.full((67,), value, dtype=dtype)
        torch.testing.assert_close(drop_denormals_(x), torch.full_like(x, expected), rtol=0, atol=0, equal_nan=True)
    if dtype == torch.bfloat16:
        return
    for value in (math.nan, math.inf, -math.inf, 0.0, math.log(4 * tiny), math.log(tiny / 2)):
        x = torch.full((67,), value, dtype=dtype)
        expected = torch.zeros_like(x) if value < math.log(tiny) else x.exp()
        for found in (exponential(x), exponential(x, inplace=True)):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
