"""A head whose rows are shared among processes (`group=`): every result and gradient is that of one process.

The workers run the property on the whole head: they cut their own rows out of it, and the gradient of the cut is summed
over the ranks, so that every rank checks the whole gradient of the head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from processes import in_processes
from torch import Tensor

import logitless
from logitless import Head, VocabularyGroup, gather_sequence, linear_divergence, linear_logprobs, linear_loss
from logitless.functional import linear_cross_entropy
from logitless.losses import NLL, TokenLoss
from logitless.ops import linear_token_loss, linear_top_k
from logitless.parallel import SumGradient
from logitless.testing import TokenProblem, assert_matches_float64, make_problem, materialised, watch_allocations
from logitless.types import LogitTransform, TokenStats

BENT = LogitTransform(logit_scale=0.7, softcap=3.0, temperature=1.3)
#: Rows of each rank: even, uneven, and a rank without any.
TWO = ((50, 50), (60, 41), (0, 33))
EVERYTHING = ("logprob", "lse", "entropy", "mean_logit", "correct", "log_sum_sq")


def own_rows(x: Tensor | None, group: VocabularyGroup) -> Any:
    """This rank's rows of a whole `[V, ...]`, whose gradient is summed over the ranks."""
    if x is None:
        return None
    return SumGradient.apply(x, group.group)[group.start : group.start + group.rows[group.rank]]


def world(rows: tuple[int, ...], **options: Any) -> VocabularyGroup:
    assert dist.group.WORLD is not None
    return VocabularyGroup(dist.group.WORLD, rows, **options)


def statistics(rows: tuple[int, ...], transform: LogitTransform, outputs: tuple[str, ...], **options: Any) -> Any:
    """`linear_logprobs` over the group as a function of a whole problem."""
    group = world(rows)

    def function(p: TokenProblem) -> TokenStats:
        weight, bias = own_rows(p.weight, group), own_rows(p.bias, group)
        settings = {**vars(transform), "bias": bias, "outputs": outputs, "group": group, **options}
        return linear_logprobs(p.hidden, weight, p.targets, **settings)

    return function


def check_statistics(rows: tuple[int, ...], problem: TokenProblem, transform: LogitTransform, **options: Any) -> None:
    outputs = options.pop("outputs", EVERYTHING)
    ours = statistics(rows, transform, outputs, **options)
    assert_matches_float64(ours, lambda p: materialised(p, transform, outputs=outputs), problem)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def statistics_worker(rows: tuple[int, ...]) -> None:
    vocabulary = sum(rows)
    for number, dtype in enumerate((torch.float64, torch.float32, torch.bfloat16)):
        for transform in (LogitTransform(), BENT):
            plain = make_problem((3, 9), 8, vocabulary, dtype=dtype, ignored=0.3, seed=number)
            check_statistics(rows, plain, transform)
            frozen = make_problem((12,), 8, vocabulary, dtype=dtype, ignored=0.3, trainable=("hidden",), seed=number)
            check_statistics(rows, frozen, transform, outputs=("logprob",))
            masked = make_problem((12,), 8, vocabulary, dtype=dtype, masked=slice(0, 20), seed=number)
            check_statistics(rows, masked, transform, outputs=("logprob", "lse", "entropy", "correct", "log_sum_sq"))
            nobody = make_problem((4,), 8, vocabulary, dtype=dtype, ignored=1.0)
            check_statistics(rows, nobody, transform)
    masked = make_problem((12,), 8, vocabulary, masked=slice(0, rows[0]))  # all that a rank has
    check_statistics(rows, masked, LogitTransform(), outputs=("logprob", "lse", "entropy", "log_sum_sq"))
    confident_worker(rows)
    weighted_worker(rows)
    ignored_id_worker(rows)


def confident_worker(rows: tuple[int, ...]) -> None:
    """A confident token's log-prob keeps its digits, whichever rank holds the others' mass."""
    problem = make_problem((6,), 16, sum(rows), dtype=torch.float32, spread=4.0)
    with torch.no_grad():
        problem.hidden.copy_(problem.weight[problem.targets] * 9)
    exact = materialised(problem.to(torch.float64)).logprob
    found = statistics(rows, LogitTransform(), ("logprob",))(problem).logprob
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-12)
    assert 0 < exact.abs().min() < 1e-7


def weighted_worker(rows: tuple[int, ...]) -> None:
    """Weights of the mean logit, of each rank's own rows."""
    group, problem = world(rows), make_problem((7,), 4, sum(rows), dtype=torch.float64)
    by_logit = torch.rand(sum(rows), dtype=torch.float64)

    def ours(p: TokenProblem) -> TokenStats:
        own = own_rows(by_logit, group)
        options: dict[str, Any] = dict(outputs=("mean_logit",), logit_weight=own, group=group)
        return linear_logprobs(p.hidden, own_rows(p.weight, group), p.targets, **options)

    def whole(p: TokenProblem) -> TokenStats:
        return materialised(p, outputs=("mean_logit",), logit_weight=by_logit)

    trained = problem._replace(bias=None)
    assert_matches_float64(ours, whole, trained)


def ignored_id_worker(rows: tuple[int, ...]) -> None:
    """An `ignore_index` inside the vocabulary is the whole vocabulary's id, not a rank's."""
    problem = make_problem((30,), 4, sum(rows), dtype=torch.float64)
    problem.targets[::3] = 2
    options: Any = dict(outputs=("logprob",), ignore_index=2)
    found = statistics(rows, LogitTransform(), **options)(problem).logprob
    expected = materialised(problem, ignore_index=2).logprob
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rows", [pytest.param(TWO[0], marks=pytest.mark.slow), *TWO[1:]], ids=str)
def test_statistics_are_those_of_the_whole_head(tmp_path: Path, rows: tuple[int, ...]) -> None:
    in_processes(2, tmp_path, statistics_worker, rows)


def everything_worker(rows: tuple[int, ...]) -> None:
    for worker in (statistics_worker, losses_worker, lists_worker, divergences_worker):
        worker(rows)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [(20, 1, 30), (0, 0, 40), (26, 25, 25, 25), (3, 0, 50, 48)], ids=str)
def test_more_processes(tmp_path: Path, rows: tuple[int, ...]) -> None:
    in_processes(len(rows), tmp_path, everything_worker, rows)


# ---------------------------------------------------------------------------------------------------------------------
# Losses


class Total(TokenLoss):
    """A loss that reads everything that has a gradient."""

    outputs = ("logprob", "lse", "entropy", "mean_logit")

    def __call__(self, stats: TokenStats) -> Tensor:
        return _total(stats)


def _total(stats: TokenStats) -> Tensor:
    assert stats.logprob is not None and stats.lse is not None and stats.entropy is not None
    assert stats.mean_logit is not None
    return stats.lse.square() / 10 - stats.logprob * stats.logprob.exp() + stats.entropy - stats.mean_logit / 3


def same_as_one_process(rows: tuple[int, ...], problem: TokenProblem, function: Callable[..., Tensor]) -> None:
    """`function(hidden, weight, bias, group)` with the group equals itself on the whole head."""
    group = world(rows)
    ours = lambda p: function(p.hidden, own_rows(p.weight, group), own_rows(p.bias, group), group)  # noqa: E731
    assert_matches_float64(ours, lambda p: function(p.hidden, p.weight, p.bias, None), problem)


def losses_worker(rows: tuple[int, ...]) -> None:
    targets = make_problem((21,), 8, sum(rows), ignored=0.3).targets
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        problem = make_problem((21,), 8, sum(rows), dtype=dtype, bias=True)._replace(targets=targets)
        for chunk_bytes in (None, 4 * 5 * max(rows)):
            for per_token, outputs in ((lambda s: -s.logprob, ("logprob",)), (_total, Total.outputs)):
                same_as_one_process(
                    rows,
                    problem,
                    lambda h, w, b, group, f=per_token, o=outputs, c=chunk_bytes: linear_token_loss(
                        h, w, targets, f, outputs=o, bias=b, group=group, chunk_bytes=c
                    ),
                )
    problem = make_problem((8, 5), 8, sum(rows), dtype=torch.float64)
    targets = make_problem((8, 5), 8, sum(rows), ignored=0.3).targets
    ref = {"ref_logprob": torch.randn(8, 5).double() - 3}
    for loss in ("dft", NLL(label_smoothing=0.1, z_loss=0.01), "dpo", "kto", "simpo", "grpo", "eaft"):
        inputs = _inputs(loss, ref)
        same_as_one_process(rows, problem, lambda h, w, b, group, x=loss, i=inputs: _loss(x, h, w, targets, group, i))
    class_weight = torch.rand(sum(rows), dtype=torch.float64)
    for smoothing in (0.0, 0.1):
        same_as_one_process(
            rows,
            problem,
            lambda h, w, b, group, s=smoothing: linear_cross_entropy(
                h,
                w,
                targets,
                class_weight=class_weight if group is None else own_rows(class_weight, group),
                label_smoothing=s,
                group=group,
            ),
        )
    depths_worker(rows)
    buffer_worker(rows)
    module = logitless.nn.LinearLoss("dft", group=world(rows))
    module = copy.deepcopy(module)  # as of a moving average's model
    value = module(problem.hidden, own_rows(problem.weight, world(rows)), targets)
    torch.testing.assert_close(value, linear_loss("dft", problem.hidden, problem.weight, targets))


def depths_worker(rows: tuple[int, ...]) -> None:
    """Several hidden states over a shared head."""
    group, problem = world(rows), make_problem((2, 9), 8, sum(rows), dtype=torch.float64)
    hidden, targets = list(problem.hidden), list(problem.targets)
    options: Any = {"depth_weight": (1.0, 0.3)}
    whole = logitless.linear_depth_loss("dft", hidden, problem.weight, targets, **options)
    weight = own_rows(problem.weight, group)
    found = logitless.linear_depth_loss("dft", hidden, weight, targets, group=group, **options)
    torch.testing.assert_close(found.loss, whole.loss)
    torch.testing.assert_close(found.losses, whole.losses)
    tensors = (problem.hidden, problem.weight)
    expected = torch.autograd.grad(whole.loss, tensors)
    torch.testing.assert_close(torch.autograd.grad(found.loss, tensors), expected)


def approximate_depths_worker(group: VocabularyGroup, problem: TokenProblem, weight: Tensor) -> None:
    """The statistics come first, as an approximate strategy's chunks may differ from rank to rank."""
    hidden, targets = list(problem.hidden[:, None]), list(problem.targets[:, None])
    options: Any = {"group": group, "depth_weight": [1.0] * len(hidden)}
    leaf = weight.clone().requires_grad_()
    exact = logitless.linear_depth_loss("nll", hidden, leaf, targets, **options)
    found = logitless.linear_depth_loss("nll", hidden, leaf, targets, backward="tail_corrected", **options)
    torch.testing.assert_close(found.losses, exact.losses)
    one, other = (torch.autograd.grad(x.loss, leaf)[0] for x in (exact, found))
    assert (one - other).norm() < 0.02 * one.norm()


def buffer_worker(rows: tuple[int, ...]) -> None:
    """The gradient of this rank's rows, added to its buffer."""
    group, problem = world(rows), make_problem((9,), 8, sum(rows))
    whole = torch.autograd.grad(linear_loss("nll", *problem[:2], problem.targets), problem.weight)[0]
    weight = own_rows(problem.weight, group).detach().requires_grad_()
    for backward in ("auto", "recompute"):
        buffer = torch.ones_like(weight)
        options: Any = {"group": group, "grad_out": buffer, "backward": backward}
        linear_loss("nll", problem.hidden, weight, problem.targets, **options).backward()
        assert weight.grad is None or not len(weight)
        torch.testing.assert_close(buffer, 1 + own_rows(whole, group))


def _inputs(loss: Any, ref: dict[str, Tensor]) -> dict[str, Any]:
    """The inputs that the loss reads."""
    loss = logitless.losses.get(loss)
    known: dict[str, Any] = {
        **ref,
        "old_logprob": ref["ref_logprob"],
        "advantages": torch.linspace(-1, 1, 8).double(),
        "desirable": torch.arange(8) % 2 == 0,
        "reference_point": torch.tensor(0.1).double(),
    }
    return {name: known[name] for name in (*loss.inputs, *loss.sequence_inputs)}


def _loss(loss: Any, hidden: Tensor, weight: Tensor, targets: Tensor, group: Any, inputs: dict[str, Any]) -> Tensor:
    result = linear_loss(loss, hidden, weight, targets, group=group, **inputs)
    value: Tensor = result if isinstance(result, Tensor) else result.loss
    return value


@pytest.mark.parametrize("rows", [TWO[1], pytest.param(TWO[2], marks=pytest.mark.slow)], ids=str)
def test_losses_are_those_of_the_whole_head(tmp_path: Path, rows: tuple[int, ...]) -> None:
    in_processes(2, tmp_path, losses_worker, rows)


# ---------------------------------------------------------------------------------------------------------------------
# Several ids a token, and divergences


def lists_worker(rows: tuple[int, ...]) -> None:
    vocabulary, group = sum(rows), world(rows)
    draw = torch.Generator().manual_seed(3)
    lists = torch.randint(vocabulary, (11, 3), generator=draw)
    lists[2], lists[::4, 1], lists[5, 2] = -100, -100, lists[5, 0]
    for dtype in (torch.float64, torch.float32):
        for transform in (LogitTransform(), BENT):
            problem = make_problem((11,), 8, vocabulary, dtype=dtype)._replace(targets=lists)
            check_statistics(rows, problem, transform, outputs=("logprob", "lse", "entropy", "tail"))
        problem = make_problem((11,), 8, vocabulary, dtype=dtype, bias=True)
        same_as_one_process(
            rows,
            problem,
            lambda h, w, b, g: linear_token_loss(
                h, w, lists, lambda s: s.tail - s.logprob.sum(-1), outputs=("logprob", "tail"), bias=b, group=g
            ),
        )
        kept = torch.stack([torch.randperm(vocabulary, generator=draw)[:5] for _ in range(11)])
        same_as_one_process(
            rows,
            problem,
            lambda h, w, b, g, k=kept: _sum(
                linear_logprobs(h, w, k[:, 1], among=k, outputs=("logprob", "entropy"), bias=b, group=g)
            ),
        )
        for k in (1, 5, vocabulary):
            hidden, weight, bias = (None if x is None else x.detach() for x in problem[:3])
            whole = linear_top_k(hidden, weight, k, bias=bias)
            found = linear_top_k(hidden, own_rows(weight, group), k, bias=own_rows(bias, group), group=group)
            assert torch.equal(found.ids, whole.ids)
            for name in ("logprob", "lse"):
                torch.testing.assert_close(getattr(found, name), getattr(whole, name))
            torch.testing.assert_close(found.tail.exp(), whole.tail.exp())


def _sum(stats: TokenStats) -> Tensor:
    assert stats.logprob is not None and stats.entropy is not None
    return stats.logprob.sum() + 2 * stats.entropy.sum()


def divergences_worker(rows: tuple[int, ...]) -> None:
    group, vocabulary = world(rows), sum(rows)
    draw = torch.Generator().manual_seed(4)
    ref_hidden = torch.randn(13, 5, generator=draw)
    ref_weight, ref_bias = torch.randn(vocabulary, 5, generator=draw), torch.randn(vocabulary, generator=draw)
    mask = torch.rand(13, generator=draw) > 0.3
    for kind in ("forward_kl", "reverse_kl", "js", "total_variation", "skew_forward_kl", "alpha", "cross_entropy"):
        for dtype, reduction in ((torch.float64, "none"), (torch.float32, "sum"), (torch.float64, "mean")):
            problem = make_problem((13,), 8, vocabulary, dtype=dtype, bias=True)

            def function(h: Tensor, w: Tensor, b: Tensor, g: Any, kind=kind, reduction=reduction) -> Tensor:  # type: ignore[no-untyped-def]
                cut = (lambda x: x) if g is None else (lambda x: own_rows(x, group))
                ref = Head(cut(ref_weight.to(w)), cut(ref_bias.to(w)))
                return linear_divergence(
                    h,
                    Head(w, b, softcap=20.0),
                    ref_hidden.to(h),
                    ref,
                    kind=kind,
                    reduction=reduction,
                    mask=mask,
                    chunk_bytes=5 * 3 * 8 * vocabulary,
                    group=g,
                )

            same_as_one_process(rows, problem, function)
    student = make_problem((13,), 8, vocabulary, dtype=torch.float64)
    reference = {"ref_hidden": ref_hidden.double()}
    for loss in ("gkd", "asft", "distillation"):
        own = own_rows(student.weight, group), own_rows(ref_weight.double(), group)
        found = linear_loss(loss, student.hidden, own[0], student.targets, ref_head=own[1], group=group, **reference)
        whole = linear_loss(
            loss, student.hidden, student.weight, student.targets, ref_head=ref_weight.double(), **reference
        )
        torch.testing.assert_close(found, whole)


@pytest.mark.parametrize("worker", [lists_worker, divergences_worker])
def test_lists_and_divergences_are_those_of_the_whole_head(tmp_path: Path, worker: Callable[..., None]) -> None:
    in_processes(2, tmp_path, worker, TWO[1])


# ---------------------------------------------------------------------------------------------------------------------
# Cost


def messages_of(function: Callable[[], Any]) -> list[tuple[str, int]]:
    """The names and sizes in bytes of what one rank sends while the function runs."""
    names = ("all_gather_single", "all_gather_into_tensor", "all_reduce")
    seen: list[tuple[str, int]] = []

    def watched(name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            x = args[1] if name.startswith("all_gather") else args[0]
            seen.append((name.removesuffix("_single").removesuffix("_into_tensor"), x.numel() * x.itemsize))
            return real(*args, **kwargs)

        return call

    with mock.patch.multiple(dist, **{n: watched(n, getattr(dist, n)) for n in names if hasattr(dist, n)}):
        function()
    return seen


def cost_worker() -> None:
    rows, tokens, width = (4000, 4001), 64, 16
    group, problem = world(rows), make_problem((64,), 16, sum((4000, 4001)))
    weight = own_rows(problem.weight, group).detach().requires_grad_()
    options: dict[str, Any] = dict(group=group, chunk_bytes=16 * 4001 * 4)

    def step() -> None:
        linear_loss("nll", problem.hidden, weight, problem.targets, **options).backward()

    step()
    assert sorted({name for name, _ in messages_of(step)}) == ["all_gather", "all_reduce"]
    sent = messages_of(step)
    per_token = 4 * 2  # logprob and lse
    assert sum(size for name, size in sent if name == "all_gather") == tokens * per_token
    assert [size for name, size in sent if name == "all_reduce"] == [tokens * width * 4]
    with watch_allocations() as seen:
        step()
    assert seen.largest <= 16 * 4001 * 4 < tokens * 4000 * 4
    with watch_allocations() as seen, torch.no_grad():
        linear_logprobs(problem.hidden, weight, problem.targets, outputs=EVERYTHING, **options)
    assert seen.largest <= 16 * 4001 * 4


def test_a_call_sends_a_few_numbers_a_token_and_holds_one_chunk_of_its_own_logits(tmp_path: Path) -> None:
    in_processes(2, tmp_path, cost_worker)


# ---------------------------------------------------------------------------------------------------------------------
# Around the op


def sequence_worker() -> None:
    """Sequence parallelism: each rank has some tokens, and gets the whole gradient of these."""
    rows = (30, 21)
    problem = make_problem((6, 2), 8, sum(rows), dtype=torch.float64)
    whole = torch.autograd.grad(linear_loss("nll", *problem[:2], problem.targets), problem[:2])
    group = world(rows, reduces_hidden=False)
    for dim in (0, 1):
        own = problem.hidden.detach().chunk(2, dim)[group.rank].clone().requires_grad_()
        weight = own_rows(problem.weight, group).detach().requires_grad_()
        hidden = gather_sequence(own, group.group, dim)
        linear_loss("nll", hidden, weight, problem.targets, group=group).backward()
        torch.testing.assert_close(own.grad, whole[0].chunk(2, dim)[group.rank])
        torch.testing.assert_close(weight.grad, own_rows(whole[1], group))


def groups_worker() -> None:
    """A bare group, a mesh, autocast, a compiled call, no gradient: one result."""
    from torch.distributed.device_mesh import init_device_mesh

    rows = (30, 21)
    group, problem = world(rows), make_problem((6,), 8, sum(rows))
    weight = own_rows(problem.weight, group).detach()
    expected = linear_loss("dft", *problem[:2], problem.targets)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    assert VocabularyGroup.of(mesh, weight) == VocabularyGroup(mesh, rows) == group

    def value(given: Any, dtype: torch.dtype | None = None) -> Tensor:
        hidden = problem.hidden if dtype is None else problem.hidden.to(dtype)
        return linear_loss("dft", hidden, weight if dtype is None else weight.to(dtype), problem.targets, group=given)

    for given in (dist.group.WORLD, mesh, group):
        torch.testing.assert_close(value(given), expected)
    dtensor_worker(mesh, problem, expected)
    with torch.autocast("cpu", torch.bfloat16):
        inside = value(group)
    torch.testing.assert_close(inside, value(group, torch.bfloat16), rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(value(group), expected.detach())
    compiled = torch.compile(
        lambda h, w: linear_loss("dft", h, w, problem.targets, group=group), fullgraph=True, backend="aot_eager"
    )
    leaves = [x.detach().clone().requires_grad_() for x in (problem.hidden, weight)]
    compiled(*leaves).backward()
    eager = [x.detach().clone().requires_grad_() for x in (problem.hidden, weight)]
    linear_loss("dft", *eager, problem.targets, group=group).backward()
    for one, other in zip(leaves, eager, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    for options in ({"backward": "recompute"}, {"backward": "tail_corrected", "tail_tolerance": 0.0}):
        found = linear_loss("dft", *eager, problem.targets, group=group, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected)
    approximate_worker(group)


def dtensor_worker(mesh: Any, problem: TokenProblem, expected: Tensor) -> None:
    """A head that tensor parallelism has as a DTensor: with a group its own rows are read, and nothing is gathered."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    weight = distribute_tensor(problem.weight.detach().clone(), mesh, [Shard(0)]).requires_grad_()
    loss = linear_loss("dft", problem.hidden.detach(), weight, problem.targets, group=mesh)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert weight.grad is not None and weight.grad.placements == weight.placements
    whole = torch.autograd.grad(expected, problem.weight, retain_graph=True)[0]
    torch.testing.assert_close(weight.grad.full_tensor(), whole)
    with pytest.raises(ValueError, match=r"weight: with group= expected a DTensor whose rows are sharded"):
        whole_weight = distribute_tensor(problem.weight.detach(), mesh, [Replicate()])
        linear_loss("dft", problem.hidden, whole_weight, problem.targets, group=mesh)


def approximate_worker(group: VocabularyGroup) -> None:
    """The tail-corrected gradient of a shared head is as near to the exact one as that of a whole head."""
    problem = make_problem((40,), 16, group.vocabulary, spread=6.0)
    weight = own_rows(problem.weight, group).detach()

    def gradient(weight: Tensor, **options: Any) -> Tensor:
        hidden = problem.hidden.detach().clone().requires_grad_()
        linear_loss("nll", hidden, weight.clone().requires_grad_(), problem.targets, **options).backward()
        assert hidden.grad is not None
        return hidden.grad

    exact = gradient(problem.weight.detach())
    error = gradient(weight, backward="tail_corrected", group=group) - exact
    assert error.norm() < 0.02 * exact.norm()
    approximate_depths_worker(group, problem, weight)


@pytest.mark.parametrize("worker", [sequence_worker, groups_worker])
def test_groups(tmp_path: Path, worker: Callable[..., None]) -> None:
    in_processes(2, tmp_path, worker)


def refusals_worker() -> None:
    rows = (30, 21)
    group, problem = world(rows), make_problem((6,), 8, sum(rows))
    weight = own_rows(problem.weight, group)
    other = 21 if group.rank == 0 else 30
    call = lambda **options: linear_loss("nll", problem.hidden, weight, problem.targets, **{"group": group, **options})  # noqa: E731
    refused: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ValueError, rf"weight: expected shape \[{rows[group.rank]}, H\]", lambda: linear_loss(
            "nll", problem.hidden, weight[:7], problem.targets, group=group)),
        (ValueError, "rows: expected 2 numbers", lambda: world((3,))),
        (ValueError, "rows: expected numbers of rows", lambda: world((3, -1))),
        (ValueError, "rows: expected at least one row", lambda: world((0, 0))),
        (TypeError, "group: expected a process group", lambda: call(group="tp")),
        (ValueError, "targets: expected ids in", lambda: linear_loss(
            "nll", problem.hidden, weight, problem.targets + sum(rows), group=group)),
        (ValueError, "backend: 'reference'", lambda: linear_divergence(
            problem.hidden, weight, problem.hidden, weight, kind="js", backend="reference", group=group)),
        (ValueError, r"k: expected a number in \[1, 51\]", lambda: linear_top_k(
            problem.hidden, weight, 52, group=group)),
        (ValueError, "bias: expected shape", lambda: call(bias=torch.zeros(other))),
    ]  # fmt: skip
    for kind, message, function in refused:
        with pytest.raises(kind, match=message):
            function()
    reference = call(backend="reference")
    torch.testing.assert_close(reference, linear_loss("nll", *problem[:2], problem.targets))
    assert math.isfinite(float(reference))


def test_a_tensor_called_group_is_an_input_of_the_losses_that_read_it() -> None:
    """GVPO and the discriminative loss compare answers of one prompt; a module holds no option of the name for them."""
    problem = make_problem((4, 3), 8, 20, dtype=torch.float64)
    inputs: Any = {"group": torch.tensor([0, 0, 1, 1]), "advantages": torch.arange(4.0).double()}
    tensors = problem.hidden, problem.weight, problem.targets
    value = linear_loss("gvpo", *tensors, **inputs)
    torch.testing.assert_close(logitless.nn.LinearLoss("gvpo")(*tensors, **inputs), value)
    other = linear_loss("gvpo", *tensors, **{**inputs, "group": torch.tensor([0, 1, 0, 1])})
    assert not torch.equal(value, other)


def test_what_is_wrong_is_named_before_any_message(tmp_path: Path) -> None:
    in_processes(2, tmp_path, refusals_worker)
