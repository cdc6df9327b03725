"""The tail-corrected backward: its bound on every input, what is exact in it, and what plain filtering gets wrong.

With the identity for a head, hidden states are logits and `d hidden` is the gradient of the logits itself.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tail_cases import check_compiled, exact_of, gradients, peaked_problem, relative, tail_calls
from torch import Tensor

import logitless
from logitless import linear_cross_entropy, linear_logprobs, linear_token_loss, tail_report
from logitless.backends.approximate import entries
from logitless.backends.approximate.select import SHARE
from logitless.ops.registered.shared import Execution
from logitless.testing import make_problem
from logitless.types import TAIL_TOLERANCE, LogitTransform

#: Coarse enough for the small vocabularies here; at the default most of their entries would be kept, and all be exact.
TAIL: dict[str, Any] = {"backward": "tail_corrected", "tail_tolerance": 2.0**-8}


@settings(max_examples=60, deadline=None)
@given(tail_calls())
def test_the_bounds_hold_and_rows_keep_their_sum(case: dict[str, Any]) -> None:
    exact, _, _ = exact_of(case)
    with tail_report() as report:
        found, _, _ = gradients(**case, backward="tail_corrected")
    error, rounding = found - exact, 1e-12 * case["coefficient"].abs() / case["temperature"]
    assert (error.abs().sum(-1) <= report.l1_bound + rounding).all()
    assert (error.norm(dim=-1) <= report.l2_bound + rounding).all()
    assert (found.sum(-1).abs() <= rounding).all()
    assert (report.tail_mass <= 1 + 1e-12).all()


@settings(max_examples=60, deadline=None)
@given(tail_calls(), st.sampled_from([None, 3.0, 30.0]), st.sampled_from([0.0, 1.0]))
def test_the_bounds_hold_in_the_single_pass(case: dict[str, Any], softcap: float | None, entropy: float) -> None:
    """The bounds hold with a softcap and entropies too, because a single pass has the matrix itself."""
    coefficient = case.pop("coefficient")
    hidden, weight, targets = (case.pop(name) for name in ("hidden", "weight", "targets"))
    tail_options = {name: case.pop(name) for name in ("tail_tolerance", "vocabulary_order")}

    def loss(stats: Any, c: Tensor) -> Tensor:
        return c * (stats.logprob + entropy * stats.entropy)

    def gradient(**options: Any) -> Tensor:
        leaf = hidden.clone().requires_grad_()
        total = linear_token_loss(
            leaf,
            weight,
            targets,
            loss,
            token_inputs=(coefficient,),
            outputs=("logprob", "entropy"),
            reduction="sum",
            softcap=softcap,
            **case,
            **options,
        )
        total.backward()
        assert leaf.grad is not None
        return leaf.grad

    exact = gradient()
    with tail_report() as report:
        found = gradient(backward="tail_corrected", **tail_options)
    error, rounding = found - exact, 1e-11 * coefficient.abs() / case["temperature"]
    assert (error.abs().sum(-1) <= report.l1_bound + rounding).all()
    assert (error.norm(dim=-1) <= report.l2_bound + rounding).all()
    assert ((found - exact).sum(-1).abs() <= rounding).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_gradient_is_close_and_the_tail_mass_is_what_was_left(dtype: torch.dtype) -> None:
    problem = peaked_problem(dtype=dtype)
    problem["bias"] = torch.linspace(-1, 1, 2000).to(dtype)
    exact = gradients(**{k: v if v.dtype == torch.long else v.double() for k, v in problem.items()})
    with tail_report() as report:
        found = gradients(**problem, **TAIL)
    assert report.exact_tokens == 0 and 0 < report.kept < report.entries / 32 and report.tail_mass.max() > 1e-3
    for x, y in zip(found, exact, strict=True):
        assert x is not None and y is not None and x.dtype == dtype
        assert relative(x.double(), y) < (0.03 if dtype in (torch.float64, torch.float32) else 0.05)


def test_the_tail_mass_is_exact() -> None:
    """Against probabilities in float64; the threshold is the tolerance's, for all coefficients are one size."""
    problem = peaked_problem()
    problem["coefficient"] = torch.ones_like(problem["coefficient"])
    with tail_report() as report:
        gradients(**problem, **TAIL)
    p = (problem["hidden"] @ problem["weight"].T).softmax(-1)
    p[torch.arange(len(p)), problem["targets"]] = 1  # the target's entry is kept
    torch.testing.assert_close(report.tail_mass, p.where(p < 2.0**-8 / SHARE, 0).sum(-1), rtol=1e-9, atol=1e-12)


def test_a_tolerance_of_0_is_exact() -> None:
    problem = peaked_problem()
    exact, found = gradients(**problem), gradients(**problem, backward="tail_corrected", tail_tolerance=0.0)
    assert all(x is None or torch.equal(x, y) for x, y in zip(exact, found, strict=True))


def test_a_tiny_tolerance_agrees_in_float64() -> None:
    """Only rounding can be left below such a tolerance, so the products in two parts must give the rest."""
    problem = peaked_problem()
    problem["hidden"] = 8 * problem["hidden"]
    with tail_report() as report:
        found = gradients(**problem, backward="tail_corrected", tail_tolerance=2.0**-30)
    assert report.exact_tokens == 0
    for x, y in zip(found[:2], gradients(**problem)[:2], strict=True):
        assert relative(x, y) < 1e-7


def test_plain_filtering_is_biased_where_this_is_not() -> None:
    """A fifth of every token's mass is in a thousand small entries whose rows of the head all point one way."""
    count, size = 32, 8
    draw = torch.Generator().manual_seed(0)
    weight = 0.01 * torch.randn(2048, size, generator=draw, dtype=torch.float64)
    weight[1024:, 0] += 5
    hidden = torch.randn(count, size, generator=draw, dtype=torch.float64)
    hidden[:, 0] = 0
    bias = torch.full((2048,), -30.0, dtype=torch.float64)
    bias[0], bias[1024:] = 0, torch.tensor(0.25 / 1024).log()
    problem = {"hidden": hidden, "weight": weight, "bias": bias, "targets": torch.zeros(count, dtype=torch.long)}
    problem["coefficient"] = torch.ones(count, dtype=torch.float64)
    exact, _, _ = gradients(**problem)
    p = (hidden @ weight.T + bias).softmax(-1)
    filtered = torch.where(p >= TAIL_TOLERANCE / SHARE, -p, 0)
    filtered[:, 0] += 1
    filtered = torch.where(p >= 2.0**-10, filtered, 0)
    assert relative(filtered @ weight, exact) > 0.5
    with tail_report() as report:
        found, _, _ = gradients(**problem, backward="tail_corrected", tail_tolerance=2.0**-7)
    assert report.exact_tokens == 0 and report.tail_mass.min() > 0.15
    assert relative(found, exact) < 1e-3


@pytest.mark.parametrize("single_pass", [False, True])
def test_flat_distributions_take_the_exact_products(single_pass: bool) -> None:
    made = make_problem((40,), 8, 2000, dtype=torch.float64, spread=0.5, trainable=())
    found = []
    for backward in ("recompute", "tail_corrected"):
        hidden, weight = made.hidden.clone().requires_grad_(), made.weight.clone().requires_grad_()
        with tail_report() as report:
            if single_pass:
                options = {} if backward == "recompute" else {"backward": backward}
                loss = linear_token_loss(hidden, weight, made.targets, lambda stats: -stats.logprob, **options)
            else:
                stats = linear_logprobs(hidden, weight, made.targets, backward=backward)
                loss = -stats.logprob.mean()
            loss.backward()
        found.append((hidden.grad, weight.grad))
    assert report.exact_tokens == 40 and report.l1_bound.max() == 0
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_flat_and_peaked_chunks_in_one_call() -> None:
    problem = peaked_problem(count=40)
    problem["hidden"][10:30] = 0
    budget = {"chunk_bytes": 8 * 2000 * 10}
    with tail_report() as report:
        found = gradients(**problem, **budget, **TAIL)
    assert report.exact_tokens == 20 and len(report.left) == 40
    for x, y in zip(found[:2], gradients(**problem)[:2], strict=True):
        assert relative(x, y) < 0.03


@pytest.mark.parametrize("output", ["lse", "entropy", "mean_logit"])
def test_the_other_statistics(output: str) -> None:
    """lse's gradient is the probabilities; the entropy's takes the exact path; the mean logit's is exact apart."""
    problem = peaked_problem()
    found = {}
    for backward in ("recompute", "tail_corrected"):
        hidden, weight = (problem[name].clone().requires_grad_() for name in ("hidden", "weight"))
        options = TAIL if backward == "tail_corrected" else {}
        stats = linear_logprobs(hidden, weight, problem["targets"], outputs=(output,), **options)
        (problem["coefficient"] * getattr(stats, output)).sum().backward()
        found[backward] = (hidden.grad, weight.grad)
    for x, y in zip(found["tail_corrected"], found["recompute"], strict=True):
        assert relative(x, y) < (0.03 if output == "lse" else 1e-12)


def test_a_loss_that_mixes_statistics_by_both_paths() -> None:
    problem = peaked_problem()

    def loss(stats: Any) -> Tensor:
        return -stats.logprob.detach().exp() * stats.logprob + 1e-2 * stats.lse.square() - 0.1 * stats.mean_logit

    outputs = ("logprob", "lse", "mean_logit")
    found: list[tuple[Tensor, Tensor]] = []
    for options in ({}, TAIL, {**TAIL, "reduction": "none"}):
        hidden, weight = (problem[name].clone().requires_grad_() for name in ("hidden", "weight"))
        value = linear_token_loss(hidden, weight, problem["targets"], loss, outputs=outputs, **options)
        value.mean().backward()
        assert hidden.grad is not None and weight.grad is not None
        found.append((hidden.grad, weight.grad))
    for other in found[1:]:
        assert all(relative(x, y) < 0.03 for x, y in zip(other, found[0], strict=True))


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_class_weights_of_smoothed_labels(reduction: str, softcap: float | None) -> None:
    """Corrected but for the mean logit's part, which is exact; under a softcap all of it is exact."""
    problem = peaked_problem()
    classes = torch.linspace(0.5, 2.0, len(problem["weight"]))
    call = dict(class_weight=classes, label_smoothing=0.1, reduction=reduction, softcap=softcap)
    found, exact_tokens = [], []
    for options in ({}, TAIL):
        hidden, weight = (problem[name].clone().requires_grad_() for name in ("hidden", "weight"))
        with tail_report() as report:
            linear_cross_entropy(hidden, weight, problem["targets"], **call, **options).sum().backward()
        found.append((hidden.grad, weight.grad))
        exact_tokens.append(report.exact_tokens)
    assert exact_tokens == [0, 0 if softcap is None else len(problem["targets"])]
    for x, y in zip(*found, strict=True):
        assert relative(x, y) < (0.03 if softcap is None else 1e-12)


def test_ignored_tokens_give_nothing_and_are_not_reported() -> None:
    problem = peaked_problem()
    problem["targets"][::3] = -100
    with tail_report() as report:
        found = gradients(**problem, **TAIL)
    assert len(report.left) == 16
    assert found[0][::3].abs().max() == 0
    assert relative(found[0], gradients(**problem)[0]) < 0.03


def test_all_ignored_and_no_tokens() -> None:
    problem = peaked_problem()
    problem["targets"][:] = -100
    assert gradients(**problem, **TAIL)[1].abs().max() == 0
    empty = {name: value[:0] if name != "weight" else value for name, value in problem.items()}
    assert gradients(**empty, **TAIL)[1].abs().max() == 0


def test_tokens_without_an_upstream_gradient_keep_nothing() -> None:
    """A settled pair, a clipped token: their entries are below any threshold."""
    problem = peaked_problem()
    problem["coefficient"][4:] = 0
    with tail_report() as report:
        gradients(**problem, **TAIL)
    assert report.exact_tokens == 0
    assert report.left[4:].max() == 0 < report.left[:4].min()
    problem["coefficient"][4:] = 1
    with tail_report() as busy:
        gradients(**problem, **TAIL)
    assert report.kept < busy.kept / 3


def test_a_frozen_head_costs_no_work_for_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = peaked_problem()
    trainable, _, _ = gradients(**problem, **TAIL)
    monkeypatch.setattr(entries.EntrySums, "_flush", lambda self: pytest.fail("the head's gradient was computed"))
    hidden = problem["hidden"].clone().requires_grad_()
    stats = linear_logprobs(hidden, problem["weight"], problem["targets"], **TAIL)
    (problem["coefficient"] * stats.logprob).sum().backward()
    torch.testing.assert_close(hidden.grad, trainable)


def test_entries_that_wait_are_flushed_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = peaked_problem(count=40)
    once = gradients(**problem, **TAIL, chunk_bytes=8 * 2000 * 8)
    monkeypatch.setattr(entries, "MOST_WAITING", 10)
    often = gradients(**problem, **TAIL, chunk_bytes=8 * 2000 * 8)
    torch.testing.assert_close(often[1], once[1])


def test_masked_entries_get_no_gradient() -> None:
    problem = peaked_problem()
    problem["bias"] = torch.zeros(2000, dtype=torch.float64)
    problem["bias"][300:700] = -torch.inf
    problem["targets"].clamp_(max=299)
    _, weight, bias = gradients(**problem, **TAIL)
    assert weight[300:700].abs().max() == 0 and bias is not None and bias[300:700].abs().max() == 0


def test_nan_is_not_hidden() -> None:
    problem = peaked_problem()
    problem["hidden"][3, 0] = torch.nan
    found = gradients(**problem, **TAIL)
    assert found[0][3].isnan().all() and found[0][0].isfinite().all() and found[1].isnan().any()


def test_backward_twice_and_create_graph() -> None:
    problem = peaked_problem()
    hidden = problem["hidden"].clone().requires_grad_()
    total = linear_logprobs(hidden, problem["weight"], problem["targets"], **TAIL).logprob.sum()
    first = torch.autograd.grad(total, hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(total, hidden, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(total, hidden, create_graph=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tail_tolerance": 0.1}, ValueError, "tail_tolerance: is read by backward in .* alone, got backward='auto'"),
        ({"tail_tolerance": -1.0}, ValueError, r"tail_tolerance: expected a number in \[0, 1\], got -1"),
        ({"tail_tolerance": float("nan")}, ValueError, "tail_tolerance: expected"),
        ({"tail_tolerance": "small"}, TypeError, "tail_tolerance: expected a number, got str"),
        ({"tail_tolerance": True}, TypeError, "tail_tolerance: expected a number, got bool"),
    ],
)
def test_bad_tolerances(options: dict[str, Any], error: type[Exception], message: str) -> None:
    hidden, weight, targets = torch.randn(2, 4), torch.randn(5, 4), torch.tensor([0, 1])
    with pytest.raises(error, match=message):
        linear_logprobs(hidden, weight, targets, **options)
    if options["tail_tolerance"] != 0.1:
        with pytest.raises(error, match=message):
            linear_logprobs(hidden, weight, targets, backward="tail_corrected", **options)


def test_the_ops_are_well_formed() -> None:
    problem = peaked_problem(count=6, dtype=torch.float32)
    hidden, weight = (problem[name].requires_grad_() for name in ("hidden", "weight"))
    execution = Execution("chunked", "tail_corrected", 2e-4, None, None)
    arguments = (
        hidden,
        weight,
        None,
        problem["targets"],
        None,
        None,
        LogitTransform().packed(),
        -100,
        "logprob",
        None,
        *execution,
    )
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.logitless.logprobs.default, arguments, test_utils=tests)


def test_compiled_gradients_are_the_eager_ones() -> None:
    """How many entries are kept is data, which torch before 2.13 compiles only where it is told to."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        check_compiled(TAIL)


def test_reports_nest_and_end() -> None:
    problem = peaked_problem()
    with tail_report() as outer:
        gradients(**problem, **TAIL)
        with logitless.tail_report() as inner:
            gradients(**problem, **TAIL)
    gradients(**problem, **TAIL)
    assert len(outer.left) == 48 and len(inner.left) == 24
    empty = logitless.TailReport()
    assert len(empty.left) == len(empty.l2_bound) == len(empty.tail_mass) == 0
