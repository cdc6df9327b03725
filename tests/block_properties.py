"""The properties of a tail-corrected backward by blocks, for any backend that has one.

`test_blocks.py` asks them of plain PyTorch; `test_cuda_tail.py` and Triton's tests ask them of their kernels.

With the identity for a head, `d hidden` is the gradient of the logits as the backward has it, g'. The gradients of head
and bias then follow from g'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from tail_cases import APPROXIMATE, gradients, peaked_problem, relative
from torch import Tensor

from logitless import linear_logprobs, linear_loss, linear_token_loss, tail_report
from logitless.losses import DPO
from logitless.ops.registered.shared import Execution
from logitless.types import LogitTransform

#: For V = 2000, whose blocks are too few for the default.
TOLERANCE = 2.0**-7
#: Of a relative error that such a tolerance leaves.
LIMIT = 0.04


class Backend(NamedTuple):
    """A backend that works by blocks, and with what."""

    name: str
    dtype: torch.dtype
    device: torch.device = torch.device("cpu")

    def options(self, tolerance: float = TOLERANCE) -> dict[str, Any]:
        return {"backend": self.name, "backward": "tail_corrected", "tail_tolerance": tolerance}

    def cast(self, x: Any) -> Any:
        """A tensor on the backend's device and in its dtype. Numbers and names are returned unchanged."""
        if not isinstance(x, Tensor):
            return x
        return x.to(self.device, self.dtype if x.is_floating_point() else x.dtype)

    @property
    def rounding(self) -> float:
        """Rounding of a sum relative to its terms. In half precision it is half an ulp each of the listed gradient, the
        tail, the block's mean and the result."""
        return {torch.float64: 1e-11, torch.float32: 1e-4}.get(self.dtype, 4 * torch.finfo(self.dtype).eps)


def double(x: Any) -> Any:
    """An operand of the reference: a float64 copy on the CPU."""
    if not isinstance(x, Tensor):
        return x
    return x.detach().cpu().double() if x.is_floating_point() else x.cpu()


@contextmanager
def deterministic(mode: bool = True) -> Iterator[None]:
    """Sums in one order, where a property is about bits."""
    torch.use_deterministic_algorithms(mode, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def exact_gradients(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """By the materialised formula in float64."""
    options = {name: double(x) for name, x in case.items() if name not in (*APPROXIMATE, "chunk_bytes")}
    return gradients(**options, backend="reference")


def beside_the_reference(
    backend: Backend, problem: dict[str, Any], *ways: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The problem, as the backend takes it, in float64 for the reference, and then as it is for each set of options."""
    case = {name: backend.cast(x) for name, x in problem.items()}
    yield {name: double(x) for name, x in case.items()}, {"backend": "reference"}
    yield from ((case, options) for options in ways)


def found_gradients(
    backend: Backend, case: dict[str, Any], **options: Any
) -> tuple[list[Tensor | None], Any, dict[str, Any]]:
    """In float64, the report, and the case as the backend got it."""
    case = {name: backend.cast(x) for name, x in case.items()}
    case["coefficient"] = case["coefficient"].to(torch.float64 if backend.dtype == torch.float64 else torch.float32)
    with tail_report() as report:
        found = gradients(**{**backend.options(), **case, **options})
    return [double(x) for x in found], report, case


def check_bounds(backend: Backend, case: dict[str, Any]) -> None:
    """The bounds hold, rows keep their sum, and all three gradients are products of one matrix."""
    found, report, given = found_gradients(backend, case)
    exact, _, _ = exact_gradients(given)
    matrix, of_weight, of_bias = found
    assert matrix is not None and of_weight is not None
    rounding = backend.rounding * (given["coefficient"].double().cpu().abs() / given["temperature"])
    error = matrix - exact
    assert (error.abs().sum(-1) <= report.l1_bound + rounding).all()
    assert (error.norm(dim=-1) <= report.l2_bound + rounding).all()
    assert (matrix.sum(-1).abs() <= rounding).all()
    assert (report.tail_mass <= 1 + backend.rounding).all()
    hidden = double(given["hidden"])
    allowed = 2 * backend.rounding * (matrix.abs().T @ hidden.abs()) + 1e-30
    assert ((of_weight - matrix.T @ hidden).abs() <= allowed).all()
    if of_bias is not None:
        assert ((of_bias - matrix.sum(0)).abs() <= 2 * backend.rounding * matrix.abs().sum(0) + 1e-30).all()


def check_close(backend: Backend, case: dict[str, Any], *, corrected: bool = True, **options: Any) -> Any:
    """Every gradient against the exact one; by blocks, or not at all."""
    found, report, given = found_gradients(backend, case, **options)
    assert (report.exact_tokens == 0) == corrected
    limit = (LIMIT if corrected else 0.0) + backend.rounding
    for x, y in zip(found, exact_gradients({**given, **options_of_head(options)}), strict=True):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            assert relative(x, y) < limit, (relative(x, y), limit)
    return report


def options_of_head(options: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in options.items() if name in ("softcap", "logit_scale", "temperature")}


# ---------------------------------------------------------------------------------------------------------------------
# One property each


def every_gradient_is_close(backend: Backend) -> None:
    problem = peaked_problem(count=40)
    problem["bias"] = torch.linspace(-1, 1, 2000)
    report = check_close(backend, problem)
    assert len(report.left) == 40 and 0 < report.kept < report.entries / 2 and report.tail_mass.max() > 1e-4


def more_tokens_than_a_slice(backend: Backend) -> None:
    """Groups of blocks too: the budget holds 3 of 16 blocks' worst case."""
    problem = peaked_problem(count=150)
    itemsize = torch.finfo(backend.dtype).bits // 8
    check_close(backend, problem, chunk_bytes=3 * 150 * 128 * itemsize)


def any_order_of_the_vocabulary(backend: Backend) -> None:
    """Blocks follow a given order, and gradients come back in the head's. The head's own order changes no bit."""
    problem = peaked_problem(count=40)
    problem["bias"] = torch.linspace(-1, 1, 2000)
    probability = (problem["hidden"] @ problem["weight"].T + problem["bias"]).softmax(-1).mean(0)
    order = probability.argsort().to(backend.device)
    report = check_close(backend, problem, vocabulary_order=order)
    assert report.kept < check_close(backend, problem).kept, "a few blocks hold the most now"
    with deterministic():
        own, _, _ = found_gradients(backend, problem, vocabulary_order=torch.arange(2000, device=backend.device))
        native, _, _ = found_gradients(backend, problem)
    for x, y in zip(own, native, strict=True):
        assert x is not None and y is not None and torch.equal(x, y)


def the_report_is_exact(backend: Backend) -> None:
    """The mass of the pairs below the threshold, and how many entries were kept, counted in float64."""
    problem = peaked_problem()
    _, report, given = found_gradients(backend, problem)
    p = (double(given["hidden"]) @ double(given["weight"]).T).softmax(-1)
    targets = given["targets"].cpu()
    p[torch.arange(len(p)), targets] = 0
    mass = torch.stack([block.sum(1) for block in p.split(128, 1)], 1)
    c = given["coefficient"].double().cpu().abs()
    product, threshold = mass * c[:, None], TOLERANCE * c.mean()
    assert ((product / threshold - 1).abs() > 1e-4).all(), "none is so close that rounding decides"
    kept = product >= threshold
    torch.testing.assert_close(report.left, product.where(~kept, 0).sum(1), rtol=1e-4, atol=1e-9)
    entries = torch.cat([kept[:, [b]].expand(-1, block.shape[1]) for b, block in enumerate(p.split(128, 1))], 1)
    entries = entries.clone()
    entries[torch.arange(len(p)), targets] = True
    assert report.kept == int(entries.sum()) and report.entries == p.numel()


def flat_calls_are_exact(backend: Backend) -> None:
    """Too many pairs, or too much left of the gradient."""
    problem = peaked_problem(count=20)
    problem["hidden"] = 0.01 * problem["hidden"]
    for tolerance in (2.0**-12, 0.5):
        report = check_close(backend, problem, corrected=False, tail_tolerance=tolerance)
        assert report.exact_tokens == 20 and report.l1_bound.max() == 0


def a_softcap_is_exact(backend: Backend) -> None:
    check_close(backend, peaked_problem(), corrected=False, softcap=20.0)


def a_tolerance_of_0_is_exact(backend: Backend) -> None:
    """Bit for bit the recomputing backward; nothing is reported."""
    case = {name: backend.cast(x) for name, x in peaked_problem().items()}
    with deterministic():
        found = gradients(**case, **backend.options(0.0))
        exact = gradients(**case, backend=backend.name, backward="recompute")
    assert all(x is None or torch.equal(x, y) for x, y in zip(found, exact, strict=True))


def a_tiny_tolerance_leaves_rounding(backend: Backend) -> None:
    problem = peaked_problem()
    problem["hidden"] = 8 * problem["hidden"]
    found, report, given = found_gradients(backend, problem, tail_tolerance=2.0**-30)
    assert report.exact_tokens == 0
    for x, y in zip(found[:2], exact_gradients(given)[:2], strict=True):
        assert x is not None and y is not None and relative(x, y) < 1e-7 + backend.rounding


def the_other_statistics(backend: Backend, output: str) -> None:
    """lse's gradient is by blocks, the entropy's by recomputation, the mean logit's exact apart."""
    found = []
    for problem, options in beside_the_reference(backend, peaked_problem(), backend.options()):
        hidden, weight = (leaf(problem[name]) for name in ("hidden", "weight"))
        stats = linear_logprobs(hidden, weight, problem["targets"], outputs=(output,), **options)
        (getattr(stats, output) * problem["coefficient"]).sum().backward()
        found.append((double(hidden.grad), double(weight.grad)))
    for x, y in zip(found[1], found[0], strict=True):
        assert relative(x, y) < backend.rounding + (LIMIT if output == "lse" else 0)


def a_weighted_mean_logit(backend: Backend) -> None:
    """Exact apart, in another order of the vocabulary too; a softcap makes the call exact."""
    flipped = {"vocabulary_order": torch.arange(2000, device=backend.device).flip(0)}
    weight_of = torch.linspace(0.0, 2.0, 2000, device=backend.device)
    for softcap in (None, 20.0):
        found = []
        ways = (backend.options(), {**backend.options(), **flipped})
        for problem, options in beside_the_reference(backend, peaked_problem(), *ways):
            hidden, weight = (leaf(problem[name]) for name in ("hidden", "weight"))
            call = dict(outputs=("mean_logit",), logit_weight=weight_of, softcap=softcap)
            mean = linear_logprobs(hidden, weight, problem["targets"], **call, **options).mean_logit
            assert mean is not None
            (mean * problem["coefficient"]).sum().backward()
            found.append([double(x) for x in (mean, hidden.grad, weight.grad)])
        for other in found[1:]:
            assert all(relative(x, y) < backend.rounding for x, y in zip(other, found[0], strict=True))


def per_token_losses(backend: Backend) -> None:
    """One sweep, here in another order of the vocabulary, and the loss on the statistics: close gradients."""
    made = peaked_problem()
    made["targets"][::5] = -100

    def loss(stats: Any) -> Tensor:
        return -stats.logprob.detach().exp() * stats.logprob + 1e-2 * stats.lse.square() - 0.1 * stats.mean_logit

    found: list[tuple[Tensor, Tensor, Tensor]] = []
    one_sweep = {**backend.options(), "vocabulary_order": torch.arange(2000, device=backend.device).flip(0)}
    each = {**backend.options(), "reduction": "none"}
    for problem, options in beside_the_reference(backend, made, one_sweep, each):
        hidden, weight = (leaf(problem[name]) for name in ("hidden", "weight"))
        with tail_report() as report:
            value = linear_token_loss(
                hidden, weight, problem["targets"], loss, outputs=("logprob", "lse", "mean_logit"), **options
            )
            value = value.sum() / 19 if options.get("reduction") else value
            value.backward()
        assert report.exact_tokens == 0 and len(report.left) == (0 if options["backend"] == "reference" else 19)
        found.append(tuple(map(double, (value, hidden.grad, weight.grad))))  # type: ignore[arg-type]
    for other in found[1:]:
        assert relative(other[0], found[0][0]) < backend.rounding
        assert all(relative(x, y) < LIMIT + backend.rounding for x, y in zip(other[1:], found[0][1:], strict=True))
        assert other[1][::5].abs().max() == 0


def preferences(backend: Backend, frozen: bool) -> None:
    """DPO in one sweep over pairs that no chunk would hold, and a frozen head."""
    ref = -2 * torch.rand(4, 6, generator=torch.Generator().manual_seed(3))
    found = []
    small = {**backend.options(), "chunk_bytes": 2**16}
    for case, options in beside_the_reference(backend, peaked_problem(count=24), small):
        hidden, weight = leaf(case["hidden"].view(4, 6, -1)), leaf(case["weight"]).requires_grad_(not frozen)
        with tail_report() as report:
            result = linear_loss(
                DPO(), hidden, weight, case["targets"].view(4, 6), ref_logprob=ref.to(hidden.device), **options
            )
            result.loss.backward()
        assert report.exact_tokens == 0
        found.append([double(x) for x in (result.loss, hidden.grad, weight.grad)])
    assert len(report.left) == 24
    (loss, *got), (exact_loss, *exact) = found[1], found[0]
    assert relative(loss, exact_loss) < max(1e-5, backend.rounding)
    assert (got[1] is None) == frozen
    for x, y in zip(got, exact, strict=True):
        assert x is None or relative(x, y) < LIMIT + backend.rounding


def settled_tokens_keep_nothing(backend: Backend) -> None:
    problem = peaked_problem()
    problem["coefficient"][4:] = 0
    _, report, _ = found_gradients(backend, problem)
    assert report.exact_tokens == 0
    assert report.left[4:].max() == 0 < report.left[:4].max()
    problem["coefficient"][:] = 0
    found, report, _ = found_gradients(backend, problem)
    assert report.kept == 24 and all(x is None or x.abs().max() == 0 for x in found)


def ignored_tokens_and_none(backend: Backend) -> None:
    problem = peaked_problem()
    problem["targets"][::3] = -100
    found, report, given = found_gradients(backend, problem)
    assert len(report.left) == 16 and found[0] is not None and found[0][::3].abs().max() == 0
    assert relative(found[0], exact_gradients(given)[0]) < LIMIT + backend.rounding
    problem["targets"][:] = -100
    empty = {name: value[:0] if name != "weight" else value for name, value in problem.items()}
    for case in (problem, empty):
        found, report, _ = found_gradients(backend, case)
        assert len(report.left) == 0 and found[1] is not None and found[1].abs().max() == 0


def any_layout(backend: Backend) -> None:
    """Rows that are not contiguous, an offset that 16 does not divide, and a bias with gaps: the same bits."""
    case = {name: backend.cast(x) for name, x in peaked_problem().items()}
    case["bias"] = backend.cast(torch.linspace(-1, 1, 2000))
    case["bias"][300:700] = -torch.inf
    case["targets"] = case["targets"].clamp(max=299)
    with deterministic():
        plain = linear_gradients(backend, case, lambda x: x)
        for layout in (lambda x: spaced(x, 2, 0), lambda x: spaced(x, 1, 1)):
            for x, y in zip(linear_gradients(backend, case, layout), plain, strict=True):
                assert torch.equal(x, y)
    assert plain[1][300:700].abs().max() == 0 and plain[2][300:700].abs().max() == 0


def spaced(x: Tensor, step: int, offset: int) -> Tensor:
    """A copy in memory whose elements lie `step` apart, from an odd address on."""
    base = x.new_zeros(x.numel() * step + offset)
    view = base[offset:].view(*x.shape, step)[..., 0]
    return view.copy_(x)


def linear_gradients(backend: Backend, case: dict[str, Any], layout: Callable[[Tensor], Tensor]) -> list[Tensor]:
    leaves = [layout(case[name]).detach().requires_grad_() for name in ("hidden", "weight", "bias")]
    stats = linear_logprobs(leaves[0], leaves[1], case["targets"], bias=leaves[2], **backend.options())
    return list(torch.autograd.grad((case["coefficient"] * stats.logprob).sum(), leaves))


def nan_is_not_hidden(backend: Backend) -> None:
    problem = peaked_problem()
    problem["hidden"][3, 0] = torch.nan
    found, _, _ = found_gradients(backend, problem)
    of_hidden, of_weight, _ = found
    assert of_hidden is not None and of_weight is not None
    assert of_hidden[3].isnan().all() and of_hidden[0].isfinite().all() and of_weight.isnan().any()


def it_compiles_without_a_break(backend: Backend) -> None:
    problem = {name: backend.cast(x) for name, x in peaked_problem().items()}

    def total(hidden: Tensor, weight: Tensor) -> Tensor:
        stats = linear_logprobs(hidden, weight, problem["targets"], **backend.options())
        return (problem["coefficient"] * stats.logprob).sum()

    found = []
    for function in (total, torch.compile(total, backend="aot_eager", fullgraph=True)):
        hidden, weight = (leaf(problem[name]) for name in ("hidden", "weight"))
        function(hidden, weight).backward()
        found.append((hidden.grad, weight.grad))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)


def the_op_is_well_formed(backend: Backend) -> None:
    problem = {name: backend.cast(x) for name, x in peaked_problem(count=6).items()}
    hidden, weight = (leaf(problem[name]) for name in ("hidden", "weight"))
    execution = Execution(backend.name, "tail_corrected", TOLERANCE, None, None)
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


def backward_twice(backend: Backend) -> None:
    """A second backward gives the first one's gradients: the first does not use up what the forward saved."""
    problem = {name: backend.cast(x) for name, x in peaked_problem().items()}
    hidden = leaf(problem["hidden"])
    total = linear_logprobs(hidden, problem["weight"], problem["targets"], **backend.options()).logprob.sum()
    first = torch.autograd.grad(total, hidden, retain_graph=True)[0]
    second = torch.autograd.grad(total, hidden, retain_graph=True)[0]
    torch.testing.assert_close(first, second)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(total, hidden, create_graph=True)


#: All that take a backend alone.
PROPERTIES: tuple[Callable[[Backend], None], ...] = (
    every_gradient_is_close,
    more_tokens_than_a_slice,
    any_order_of_the_vocabulary,
    the_report_is_exact,
    flat_calls_are_exact,
    a_softcap_is_exact,
    a_tolerance_of_0_is_exact,
    a_tiny_tolerance_leaves_rounding,
    a_weighted_mean_logit,
    per_token_losses,
    settled_tokens_keep_nothing,
    ignored_tokens_and_none,
    any_layout,
    nan_is_not_hidden,
    it_compiles_without_a_break,
    the_op_is_well_formed,
    backward_twice,
)
