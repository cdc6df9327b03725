"""Several ids a token: log-probs and tail in one sweep, within a kept set, and the likeliest ids."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DEVICE, HERE, Case, cases
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from list_cases import check, check_approximate, full_logits, listed_cases, run, stated
from torch import Tensor

from logitless import TokenStats, linear_logprobs, linear_loss, linear_token_loss, linear_top_k, losses
from logitless.backends import BACKENDS
from logitless.ops.registered import listed as ops
from logitless.testing import (
    TokenProblem,
    assert_matches_float64,
    make_problem,
    measure,
    watch_allocations,
)
from logitless.types import LIST_OUTPUTS, LogitTransform, statistics_dtype

ALL_BACKENDS = ["reference", *HERE]
KEPT = ("logprob", "lse", "entropy", "correct", "log_sum_sq")


def takes(backend: str, dtype: torch.dtype) -> bool:
    return backend == "reference" or BACKENDS[backend].supports(DEVICE, dtype) is None


outputs_subset = st.sets(st.sampled_from(LIST_OUTPUTS), min_size=1).map(
    lambda names: tuple(name for name in LIST_OUTPUTS if name in names)
)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@settings(max_examples=150)
@given(case=listed_cases(), outputs=outputs_subset)
def test_any_options_against_float64(backend, case, outputs):
    assume(takes(backend, case.problem.hidden.dtype))
    check(case, outputs, backend=backend)


@pytest.mark.slow
@settings(max_examples=1500)
@given(case=listed_cases(), outputs=outputs_subset)
def test_many_options_against_float64(case, outputs):
    check(case, outputs, backend="chunked")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_ragged_sizes(softcap, dtype):
    problem = make_problem((150,), 64, 507, dtype=dtype, bias=True)
    generator = torch.Generator().manual_seed(3)
    lists = torch.randint(0, 507, (150, 70), generator=generator)
    check(Case(problem._replace(targets=lists), LogitTransform(softcap=softcap), 32), LIST_OUTPUTS)


@pytest.mark.parametrize("backend", HERE)
def test_one_id_a_token_is_the_op_of_single_targets(backend):
    problem = make_problem((9,), 6, 31, ignored=0.2)
    lists = problem._replace(targets=problem.targets[:, None])
    one = measure(lambda p: run(p, outputs=("logprob", "lse", "entropy"), backend=backend), problem)
    many = measure(lambda p: run(p, outputs=("logprob", "lse", "entropy"), backend=backend), lists)
    for name, value in one.items():
        torch.testing.assert_close(many[name].view(value.shape), value)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("gap", [5.0, 20.0, 60.0])
def test_the_tail_keeps_its_digits_where_the_list_has_all_the_mass(backend, gap):
    """1 - sum p would be 0, or rounding error, from a gap of 16 on."""
    weight = torch.eye(8)
    hidden = torch.full((1, 8), -gap)
    hidden[0, :2] = torch.tensor([0.0, -1.0])
    stats = linear_logprobs(hidden, weight, torch.tensor([[1, 0]]), outputs=("logprob", "tail"), backend=backend)
    exact = hidden.double()[0].log_softmax(-1)
    torch.testing.assert_close(stats.tail[0].double(), exact[2:].logsumexp(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.logprob[0].double(), exact[[1, 0]], rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("masked", [False, True])
def test_nothing_is_left_out_of_the_list(backend, softcap, masked):
    hidden = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    bias = torch.zeros(6)
    if masked:
        bias[3:] = -math.inf
    lists = torch.arange(3 if masked else 6).expand(3, -1)
    options = dict(bias=bias if masked else None, softcap=softcap, backend=backend)
    stats = linear_logprobs(hidden, weight, lists, outputs=LIST_OUTPUTS, **options)
    assert stats.tail.isneginf().all()
    torch.testing.assert_close(stats.logprob.exp().sum(-1), torch.ones(3))
    gradients = torch.autograd.grad(
        (stats.logprob * torch.rand(lists.shape)).sum() + stats.entropy.sum(), [hidden, weight]
    )
    assert all(g.isfinite().all() and g.any() for g in gradients)
    tail = linear_logprobs(hidden, weight, lists, outputs=("tail",), **options).tail
    assert not torch.autograd.grad(tail.sum(), hidden)[0].any()


def test_an_id_listed_twice_counts_once():
    problem = make_problem((5,), 4, 11, dtype=torch.float64)
    once, twice = torch.tensor([[3, 7]]).expand(5, -1), torch.tensor([[3, 7, 3, -1]]).expand(5, -1)
    one = linear_logprobs(problem.hidden, problem.weight, once, outputs=LIST_OUTPUTS)
    two = linear_logprobs(problem.hidden, problem.weight, twice, outputs=LIST_OUTPUTS)
    for name in ("lse", "entropy", "tail"):
        torch.testing.assert_close(getattr(two, name), getattr(one, name))
    torch.testing.assert_close(two.logprob[:, :3], one.logprob[:, [0, 1, 0]])
    assert not two.logprob[:, 3].any()


def test_an_approximate_strategy_gives_the_log_probs():
    check_approximate("tail_corrected")


@pytest.mark.parametrize("trainable", [("hidden", "weight", "bias"), ("hidden",), ("weight",)], ids=str)
@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_pass(dtype, backend, trainable):
    problem = make_problem((50,), 16, 120, dtype=dtype, bias=True, trainable=trainable)
    lists = torch.randint(0, 120, (50, 7), generator=torch.Generator().manual_seed(0))
    lists[4], lists[6, 3:] = -100, -1
    given = torch.rand(50, 7, dtype=statistics_dtype(dtype), generator=torch.Generator().manual_seed(1))

    def loss(stats: TokenStats, x: Tensor) -> Tensor:
        return -(x.to(stats.logprob) * stats.logprob).sum(-1) + stats.tail.sin() + stats.entropy.square()

    names = ("logprob", "entropy", "tail")

    def ours(p: TokenProblem) -> Tensor:
        arguments = p.hidden, p.weight, p.targets, loss
        chunk = dict(chunk_bytes=16 * 120 * 4) if backend != "reference" else {}
        options = dict(token_inputs=[given], outputs=names, reduction="sum", backend=backend, bias=p.bias, **chunk)
        return linear_token_loss(*arguments, **options)

    def theirs(p: TokenProblem) -> Tensor:
        counts = (p.targets >= 0).any(-1)
        return loss(stated(p, LogitTransform(), names), given)[counts].sum()

    problem = problem._replace(targets=lists)
    assert_matches_float64(ours, theirs, problem, scale=20.0)


# ---------------------------------------------------------------------------------------------------------------------
# A kept set


@st.composite
def kept_cases(draw) -> tuple[Case, Tensor]:
    """A case, and for each token a kept set with its target in it."""
    case = draw(cases(dtypes=(torch.float64, torch.float32)))
    p = case.problem
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    kept = torch.randint(0, len(p.weight), (*p.targets.shape, draw(st.integers(1, 5))), generator=generator)
    absent = torch.rand(kept.shape, generator=generator) < draw(st.sampled_from([0.0, 0.4]))
    kept = kept.masked_fill(absent, -1).to(p.targets.device)
    if p.bias is not None:
        p = p._replace(bias=p.bias.detach().masked_fill(p.bias.isneginf(), -3.0).requires_grad_(p.bias.requires_grad))
    kept[..., 0] = p.targets
    return Case(p, case.transform, None), kept


def renormalised(p: TokenProblem, transform: LogitTransform, kept: Tensor) -> TokenStats:
    counts = p.targets != -100
    z = full_logits(p, transform).masked_fill(~counts[..., None], 0.0)
    ids = kept.masked_fill(~counts[..., None], 0)
    allowed = (torch.nn.functional.one_hot(ids.clamp(min=0), z.shape[-1]).bool() & (ids >= 0)[..., None]).any(-2)
    z = z.masked_fill(~allowed, -math.inf)
    logp = z.log_softmax(-1)
    finite = logp.masked_fill(logp.isneginf(), 0.0)
    found = {
        "logprob": finite.gather(-1, p.targets.clamp(min=0)[..., None])[..., 0],
        "lse": z.logsumexp(-1),
        "entropy": -(logp.exp() * finite).sum(-1),
    }
    return TokenStats(**{name: x.masked_fill(~counts, 0.0) for name, x in found.items()})


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@settings(max_examples=100)
@given(case=kept_cases())
def test_a_kept_set_against_float64(backend, case):
    case, kept = case
    names = ("logprob", "lse", "entropy")
    assert_matches_float64(
        lambda p: run(p, among=kept, outputs=names, backend=backend, **vars(case.transform)),
        lambda p: renormalised(p, case.transform, kept),
        case.problem,
        scale=max(1.0, case.scale, case.bent_scale),
    )


def test_a_kept_set_makes_no_product_with_the_vocabulary():
    p = make_problem((64,), 16, 20000, trainable=("hidden",))
    kept = torch.cat([p.targets[:, None], torch.randint(0, 20000, (64, 7))], 1)
    with watch_allocations() as seen:
        linear_logprobs(p.hidden, p.weight, p.targets, among=kept).logprob.sum().backward()
    assert seen.largest < 20000 * 4  # not one row of logits


def test_the_ratio_of_a_truncated_sampler():
    """A rollout under top-p has renormalised log-probs; replayed with its mask, the ratio is 1."""
    p = make_problem((30,), 8, 50, trainable=())
    logp = (p.hidden @ p.weight.T).log_softmax(-1)
    order = logp.argsort(-1, descending=True)
    ranked = logp.gather(-1, order)
    nucleus = ranked.exp().cumsum(-1) - ranked.exp() < 0.9
    kept = order.masked_fill(~nucleus, -1)
    sampled = order[:, 0]
    old = ranked.masked_fill(~nucleus, -math.inf).log_softmax(-1)[:, 0]
    advantages = torch.ones(30)
    options = dict(old_logprob=old, advantages=advantages, reduction="none")
    ratio = -linear_loss(losses.PPO(), p.hidden, p.weight, sampled, among=kept, **options)
    torch.testing.assert_close(ratio, torch.ones(30), rtol=1e-5, atol=0)
    without = -linear_loss(losses.PPO(), p.hidden, p.weight, sampled, **options)
    assert without.mean() < 0.95


def test_dpo_among_a_kept_set():
    p = make_problem((4, 5), 8, 30)
    kept = torch.cat([p.targets[..., None], torch.randint(0, 30, (4, 5, 6))], -1)
    stats = linear_logprobs(p.hidden, p.weight, p.targets, among=kept)
    tokens = losses.layout.token_layout(p.targets >= 0, None)
    reference = torch.zeros(4, 5)
    found = linear_loss("dpo", p.hidden, p.weight, p.targets, among=kept, ref_logprob=reference).loss
    torch.testing.assert_close(found, losses.DPO().evaluate(stats, tokens, {"ref_logprob": reference}).loss)


def test_lists_renormalised_over_themselves():
    p = make_problem((6,), 5, 40, dtype=torch.float64)
    lists = torch.randint(0, 40, (6, 4), generator=torch.Generator().manual_seed(2))
    lists[1, 2:], lists[2, 1] = -1, lists[2, 0]
    found = linear_logprobs(p.hidden, p.weight, lists, among=lists, outputs=("logprob", "entropy"))
    logits = p.hidden @ p.weight.T
    for row in range(6):
        ids = [i for i in lists[row].tolist() if i >= 0]
        z = logits[row, sorted(set(ids))]
        expected = logits[row, ids] - z.logsumexp(0)
        torch.testing.assert_close(found.logprob[row, : len(ids)], expected)
        torch.testing.assert_close(found.entropy[row], torch.distributions.Categorical(logits=z).entropy())


# ---------------------------------------------------------------------------------------------------------------------
# The likeliest ids


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@settings(max_examples=60)
@given(case=cases(trainable=st.just(()), dtypes=(torch.float64, torch.float32)), k=st.integers(1, 5))
def test_top_k_against_full_logits(backend, case, k):
    assume(takes(backend, case.problem.hidden.dtype))
    p, k = case.problem, min(k, len(case.problem.weight))
    found = linear_top_k(p.hidden, p.weight, k, bias=p.bias, backend=backend, **case.options)
    logp = full_logits(p.to(torch.float64), case.transform).log_softmax(-1)
    assert found.ids.shape == (*p.targets.shape, k)
    at = logp.gather(-1, found.ids)
    tolerance = 1e-4 if p.hidden.dtype == torch.float32 else 1e-10
    torch.testing.assert_close(found.logprob.double(), at, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(at, logp.topk(k, dim=-1).values, rtol=tolerance, atol=tolerance)  # but for ties
    left = logp.scatter(-1, found.ids, -math.inf).logsumexp(-1)
    torch.testing.assert_close(found.tail.double(), left, rtol=tolerance, atol=10 * tolerance)
    assert not found.logprob.requires_grad


def test_top_k_allocates_no_logits():
    p = make_problem((200,), 16, 5000, trainable=())
    with watch_allocations() as seen:
        linear_top_k(p.hidden, p.weight, 8, chunk_bytes=16 * 5000 * 4)
    assert seen.peak < 200 * 5000 * 4 / 3


# ---------------------------------------------------------------------------------------------------------------------
# Ops, compilation, refusals

TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("trainable", [("hidden", "weight", "bias"), ("hidden",), ()], ids=str)
@pytest.mark.parametrize("outputs", ["logprob", "logprob lse entropy tail"])
def test_opcheck(trainable, outputs):
    hidden, weight, bias, _ = make_problem((6,), 4, 9, bias=True, trainable=trainable)
    ids = torch.randint(0, 9, (6, 3))
    ids[2] = -1
    transform = LogitTransform(1.5, 3.0, 0.7).packed()
    arguments = (hidden, weight, bias, ids, transform, -100, outputs, None, "chunked", 100, None)
    torch.library.opcheck(torch.ops.logitless.list_logprobs.default, arguments, test_utils=TESTS)
    arguments = (hidden, weight, ids, "among", None)
    torch.library.opcheck(torch.ops.logitless.listed_products.default, arguments, test_utils=TESTS)
    arguments = (hidden.detach(), weight.detach(), bias.detach(), 3, transform, "chunked", 100, None)
    torch.library.opcheck(torch.ops.logitless.top_k.default, arguments, test_utils=TESTS)


def test_opcheck_of_the_backwards():
    hidden, weight, bias, _ = (x.detach() for x in make_problem((6,), 4, 9, bias=True))
    ids = torch.randint(0, 9, (6, 3))
    rest = (LogitTransform().packed(), -100)
    stats = ops.list_logprobs(hidden, weight, bias, ids, *rest, "entropy", None, "chunked", None, None)
    upstream = [torch.randn(x.shape) for x in stats]
    arguments = (
        upstream,
        list(stats),
        [True, True, True],
        hidden,
        weight,
        bias,
        ids,
        *rest,
        None,
        "chunked",
        None,
        None,
    )
    torch.library.opcheck(torch.ops.logitless.list_logprobs_backward.default, arguments, test_utils=TESTS)
    arguments = (torch.randn(6, 3), hidden, weight, ids, [True, False], None)
    torch.library.opcheck(torch.ops.logitless.listed_products_backward.default, arguments, test_utils=TESTS)


@pytest.mark.parametrize("unlisted", ["bucket", "renormalized"])
def test_compiled_without_a_graph_break(unlisted):
    p = make_problem((7,), 4, 20)
    ids = torch.randint(0, 20, (7, 3))
    given = torch.rand(7, 3).log_softmax(-1) - 0.1

    def function(hidden: Tensor, weight: Tensor) -> Tensor:
        stats = linear_logprobs(hidden, weight, ids, outputs=LIST_OUTPUTS)
        top = linear_top_k(hidden, weight, 2)
        loss = linear_loss(losses.TopKDistillation(unlisted=unlisted), hidden, weight, ids, teacher_logprob=given)
        return loss + stats.tail.sum() + stats.logprob.sum() + top.logprob.sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    plain, fused = function(p.hidden, p.weight), compiled(p.hidden, p.weight)
    torch.testing.assert_close(fused, plain)
    for a, b in zip(*(torch.autograd.grad(x, [p.hidden, p.weight]) for x in (fused, plain)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_call_shows_a_target_that_is_not_in_its_list():
    p = make_problem((3,), 4, 9, trainable=("hidden",))
    kept = torch.stack([p.targets, (p.targets + 1) % 9], -1)
    kept[1] = (kept[1] + 2) % 9

    def function(hidden: Tensor) -> Tensor:
        return linear_logprobs(hidden, p.weight, p.targets, among=kept).logprob

    found = torch.compile(function, fullgraph=True, backend="aot_eager")(p.hidden)
    assert found.isnan().tolist() == [False, True, False]


def test_refusals():
    p = make_problem((4,), 3, 9)
    lists = torch.zeros(4, 2, dtype=torch.long)
    call = lambda targets, **options: linear_logprobs(p.hidden, p.weight, targets, **options)  # noqa: E731
    with pytest.raises(ValueError, match=r"targets: expected shape \[4\], or \[4, 'K'\], like hidden, got \[2, 4\]"):
        call(lists.T)
    with pytest.raises(ValueError, match=r"targets: expected shape"):
        call(lists[:, :0])
    with pytest.raises(ValueError, match=r"targets: expected ids in \[0, 9\) .* got 9"):
        call(lists + 9)
    with pytest.raises(ValueError, match=r"outputs: tokens that list several ids have .* got 'correct'"):
        call(lists, outputs=("correct",))
    with pytest.raises(ValueError, match="outputs: 'tail' is of targets"):
        call(lists[:, 0], outputs=("tail",))
    with pytest.raises(ValueError, match="backward: 'single_pass' keeps one gradient vector per token"):
        call(lists, backward="single_pass")
    for backend in ALL_BACKENDS:
        with pytest.raises(ValueError, match=r"targets: expected ids in \[0, 9\) .* got -5"):
            call(lists - 5, backend=backend)
        with pytest.raises(ValueError, match=r"among: expected ids in \[0, 9\) .* got 9"):
            call(lists[:, 0], among=lists + 9, backend=backend)
    with pytest.raises(ValueError, match=r"targets: expected ids in .* got -5"):
        call(lists - 5, backward="tail_corrected")
    with pytest.raises(ValueError, match=r"among: expected shape \[\.\.\., K\], several ids a token, got \[4\]"):
        call(lists[:, 0], among=lists[:, 0])
    with pytest.raises(TypeError, match="among: expected int64"):
        call(lists[:, 0], among=lists.float())
    with pytest.raises(ValueError, match="among: expected every token's target in its list"):
        call(lists[:, 0] + 1, among=lists)
    with pytest.raises(ValueError, match="targets: with among"):
        call(lists, among=lists.clone())
    with pytest.raises(ValueError, match="got 'tail'"):
        call(lists[:, 0], among=lists, outputs=("tail",))
    for k, error in ((0, ValueError), (10, ValueError), (True, TypeError)):
        with pytest.raises(error, match="k: expected"):
            linear_top_k(p.hidden, p.weight, k)
    with pytest.raises(ValueError, match=r"targets: 'nll' expects shape \[...\], one id a token, got \[4, 2\]"):
        linear_loss("nll", p.hidden, p.weight, lists)
    with pytest.raises(ValueError, match="targets: 'top_k_distillation' expects shape"):
        linear_loss("top_k_distillation", p.hidden, p.weight, lists[:, 0], teacher_logprob=torch.zeros(4))
    with pytest.raises(ValueError, match=r"teacher_logprob: expected shape \[4, 2\] like targets, got \[4\]"):
        linear_loss("top_k_distillation", p.hidden, p.weight, lists, teacher_logprob=torch.zeros(4))
    with pytest.raises(ValueError, match="among: 'asft' reads more"):
        linear_loss("asft", p.hidden, p.weight, lists[:, 0], among=lists, ref_hidden=p.hidden.detach())
    with pytest.raises(ValueError, match="backward: 'tail_corrected' takes one target a token here"):
        linear_token_loss(p.hidden, p.weight, lists, lambda s: s.logprob.sum(-1), backward="tail_corrected")
