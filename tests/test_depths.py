"""`linear_depth_loss` against one loss for each depth, its normalizers and refusals, and the targets of a depth."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import HERE

import logitless
from logitless import losses
from logitless.testing import watch_allocations

V, H = 211, 8
WEIGHTS = (1.0, 0.3, 0.05)


def depths(dtype: torch.dtype = torch.float32, ignored: int = 4, batch: int = 3):
    """Hidden states of three depths, of which a deeper one has fewer positions, the head, and the targets."""
    torch.manual_seed(0)
    weight = (torch.randn(V, H) * 0.4).to(dtype).requires_grad_()
    hidden = [torch.randn(batch, 12 - d, H, dtype=dtype, requires_grad=True) for d in range(3)]
    labels = torch.randint(V, (batch, 13))
    labels[0, :ignored] = -100
    targets = [t[:, : 12 - d] for d, t in enumerate(logitless.depth_targets(labels, 3))]
    return hidden, weight, targets


def apart(loss, hidden, weight, targets, **options):
    """The total and the losses by one call a depth."""
    each = [logitless.linear_loss(loss, h, weight, t, **options) for h, t in zip(hidden, targets, strict=True)]
    return sum(w * x for w, x in zip(WEIGHTS, each, strict=True)), torch.stack(each).detach()


@pytest.mark.parametrize("loss", ["nll", "dft", losses.NLL(label_smoothing=0.1, z_loss=0.01)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"backward": "recompute"}, {"backend": "reference"}, {"chunk_bytes": 16 * V * 4}, {"temperature": 0.7}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_losses_and_gradients_are_those_of_one_call_a_depth(dtype, options, loss):
    hidden, weight, targets = depths(dtype)
    ours = logitless.linear_depth_loss(loss, hidden, weight, targets, depth_weight=WEIGHTS, **options)
    total, each = apart(loss, hidden, weight, targets, **options)
    tight = {"rtol": 1e-13, "atol": 1e-13} if dtype == torch.float64 else {}
    torch.testing.assert_close(ours.loss, total, **tight)
    torch.testing.assert_close(ours.losses, each, **tight)
    assert not ours.losses.requires_grad
    upstream = torch.tensor(0.7, dtype=dtype)
    for a, b in zip(
        torch.autograd.grad(ours.loss, [weight, *hidden], upstream),
        torch.autograd.grad(total, [weight, *hidden], upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", HERE)
def test_the_losses_are_those_of_full_logits(backend):
    hidden, weight, targets = depths()
    ours = logitless.linear_depth_loss("nll", hidden, weight, targets, depth_weight=WEIGHTS, backend=backend)
    each = [F.cross_entropy((h @ weight.T).flatten(0, 1), t.flatten()) for h, t in zip(hidden, targets, strict=True)]
    torch.testing.assert_close(ours.losses, torch.stack(each).detach())


def test_inputs_and_token_weights_of_every_depth():
    hidden, weight, targets = depths()
    ref = [-torch.rand(t.shape) for t in targets]
    scale = [torch.rand(t.shape) for t in targets]
    arguments = dict(depth_weight=WEIGHTS, ref_logprob=ref, token_weight=scale)
    ours = logitless.linear_depth_loss(losses.FDivergenceSFT(per="token"), hidden, weight, targets, **arguments)
    each = [
        logitless.linear_loss(losses.FDivergenceSFT(per="token"), h, weight, t, ref_logprob=r, token_weight=s)
        for h, t, r, s in zip(hidden, targets, ref, scale, strict=True)
    ]
    torch.testing.assert_close(ours.losses, torch.stack(each).detach())


def test_a_loss_that_takes_its_statistics_at_a_temperature():
    loss = losses.GEM(beta=0.5)
    assert loss.stats_temperature == 0.5
    hidden, weight, targets = depths()
    for backward in ("auto", "recompute"):
        options = dict(backward=backward, temperature=0.8)
        ours = logitless.linear_depth_loss(loss, hidden, weight, targets, depth_weight=WEIGHTS, **options)
        torch.testing.assert_close(ours.losses, apart(loss, hidden, weight, targets, **options)[1])


@pytest.mark.parametrize("form", ["list", "tensor"])
@pytest.mark.parametrize("backward", ["auto", "recompute"])
def test_micro_batches_under_each_depths_global_count(backward, form):
    """Unequal micro-batches divide by the global count of each depth, so that their sum is the whole batch's loss."""
    hidden, weight, targets = depths(batch=4)
    whole = logitless.linear_depth_loss("nll", hidden, weight, targets, depth_weight=WEIGHTS)
    counts = [(t != -100).sum() for t in targets]
    assert len({int(n) for n in counts}) == 3
    normalizer = torch.stack(counts) if form == "tensor" else counts
    parts = [
        logitless.linear_depth_loss(
            "nll", [h[rows] for h in hidden], weight, [t[rows] for t in targets], depth_weight=WEIGHTS,
            normalizer=normalizer, backward=backward,
        )
        for rows in (slice(0, 1), slice(1, 4))
    ]  # fmt: skip
    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss)
    torch.testing.assert_close(parts[0].losses + parts[1].losses, whole.losses)
    for a, b in zip(
        torch.autograd.grad(parts[0].loss + parts[1].loss, [weight, *hidden]),
        torch.autograd.grad(whole.loss, [weight, *hidden]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_one_number_divides_every_depth():
    hidden, weight, targets = depths()
    ours = logitless.linear_depth_loss("nll", hidden, weight, targets, depth_weight=WEIGHTS, normalizer=1)
    _, each = apart("nll", hidden, weight, targets, reduction="sum")
    torch.testing.assert_close(ours.losses, each)


def test_a_depth_without_a_token_gives_0_and_leaves_the_others():
    hidden, weight, targets = depths()
    targets[2] = torch.full_like(targets[2], -100)
    ours = logitless.linear_depth_loss("nll", hidden, weight, targets, depth_weight=WEIGHTS)
    whole = logitless.linear_depth_loss("nll", hidden[:2], weight, targets[:2], depth_weight=WEIGHTS[:2])
    torch.testing.assert_close(ours.losses, torch.cat([whole.losses, torch.zeros(1)]))
    torch.testing.assert_close(ours.loss, whole.loss)
    ours.loss.backward()
    assert not hidden[2].grad.any() and weight.grad.isfinite().all()


def test_without_a_gradient():
    hidden, weight, targets = depths()
    with torch.no_grad():
        ours = logitless.linear_depth_loss("nll", hidden, weight, targets, depth_weight=WEIGHTS)
    torch.testing.assert_close(ours.losses, apart("nll", hidden, weight, targets)[1])


def test_the_frozen_head():
    hidden, weight, targets = depths()
    frozen = weight.detach()
    ours = logitless.linear_depth_loss("nll", hidden, frozen, targets, depth_weight=WEIGHTS)
    total, _ = apart("nll", hidden, frozen, targets)
    for a, b in zip(torch.autograd.grad(ours.loss, hidden), torch.autograd.grad(total, hidden), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_without_a_graph_break():
    hidden, weight, targets = depths()

    def call(hidden, weight, targets):
        return logitless.linear_depth_loss("nll", hidden, weight, targets, depth_weight=WEIGHTS)

    ours, expected = torch.compile(call, fullgraph=True)(hidden, weight, targets), call(hidden, weight, targets)
    torch.testing.assert_close(ours.loss, expected.loss)
    torch.testing.assert_close(ours.losses, expected.losses)
    (a,), (b,) = (torch.autograd.grad(x.loss, weight) for x in (ours, expected))
    torch.testing.assert_close(a, b)


def test_the_heads_gradient_is_summed_in_one_buffer():
    """One call a depth has as many gradients of the head as depths, before autograd adds them."""
    torch.manual_seed(0)
    weight = torch.randn(8192, 32).requires_grad_()
    hidden = [torch.randn(64, 32, requires_grad=True) for _ in range(4)]
    targets = [torch.randint(8192, (64,)) for _ in hidden]
    size, peaks = weight.nbytes, []
    for together in (True, False):
        with watch_allocations() as seen:
            if together:
                options = dict(depth_weight=[1.0] * 4, chunk_bytes=2**17)
                loss = logitless.linear_depth_loss("nll", hidden, weight, targets, **options).loss
            else:
                loss = sum(
                    logitless.linear_loss("nll", h, weight, t, chunk_bytes=2**17)
                    for h, t in zip(hidden, targets, strict=True)
                )
            loss.backward()
        peaks.append(seen.peak)
        weight.grad = None
    assert peaks[0] < 3 * size < 4 * size < peaks[1]


# ---------------------------------------------------------------------------------------------------------------------
# Targets


def test_targets_of_rows():
    labels = torch.arange(10, 16)[None]
    first, second, third = logitless.depth_targets(labels, 3)
    assert first.tolist() == [[11, 12, 13, 14, 15, -100]]
    assert second.tolist() == [[12, 13, 14, 15, -100, -100]]
    assert third.tolist() == [[13, 14, 15, -100, -100, -100]]


def test_targets_do_not_look_across_packed_sequences():
    labels = torch.arange(10, 18)
    for shaped in (labels, labels[None]):
        packed = logitless.depth_targets(shaped, 4, cu_seqlens=torch.tensor([0, 3, 4, 8]))
        alone = [logitless.depth_targets(labels[a:b], 4) for a, b in ((0, 3), (3, 4), (4, 8))]
        for d in range(4):
            assert torch.equal(packed[d], torch.cat([x[d] for x in alone]).view_as(shaped))


def test_a_label_that_does_not_count_is_no_target_at_any_depth():
    labels = torch.tensor([[-100, -100, 5, 6, -100]])
    first, second = logitless.depth_targets(labels, 2)
    assert first.tolist() == [[-100, 5, 6, -100, -100]]
    assert second.tolist() == [[5, 6, -100, -100, -100]]
    assert logitless.depth_targets(labels, 1, ignore_index=-1)[0][0, -1] == -1


def test_a_sequence_shorter_than_the_depth():
    assert [t.tolist() for t in logitless.depth_targets(torch.tensor([[7]]), 3)] == [[[-100]]] * 3


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(loss="dpo"), ValueError, "loss: expected one of each token's own statistics, got 'dpo', a pair loss"),
        (dict(loss="distillation"), ValueError, "loss: expected one of each token's own statistics"),
        (dict(loss="top_k_distillation"), ValueError, "loss: expected one of each token's own statistics"),
        (dict(loss="grpo"), ValueError, "loss: expected one that is averaged over all tokens.*'grpo'"),
        (dict(hidden=torch.zeros(3, 4, H)), TypeError, "hidden: expected a sequence of tensors.*got Tensor"),
        (dict(targets=[]), TypeError, "targets: expected a sequence of tensors.*got none"),
        (dict(targets=[torch.zeros(3, 12, dtype=torch.long)]), ValueError, "targets: expected 3 tensors like hidden"),
        (dict(depth_weight=[1.0]), ValueError, "depth_weight: expected 3 numbers, one a depth, got 1"),
        (dict(depth_weight=[1.0, 0.0, 1.0]), ValueError, r"depth_weight\[1\]: expected a positive number"),
        (dict(depth_weight=1.0), TypeError, "depth_weight: expected a sequence of 3 numbers, got float"),
        (dict(normalizer=[1, 2]), ValueError, "normalizer: expected one number, or 3, one a depth, got 2"),
        (dict(normalizer=torch.ones(2)), ValueError, r"normalizer: expected one number, or 3, one a depth, got \[2\]"),
        (dict(normalizer=[1, 2, -1]), ValueError, "normalizer: expected a positive number, got -1"),
        (dict(token_weight=[torch.ones(1)] * 3), ValueError, r"token_weight\[0\]: expected shape \[3, 12\]"),
        (dict(token_weight=torch.ones(3)), ValueError, "token_weight: expected a sequence of 3 tensors"),
        (dict(reduction="sum"), TypeError, "has no input or option 'reduction'"),
        (dict(softcap=-1.0), ValueError, "softcap: "),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(change, error, message):
    hidden, weight, targets = depths()
    arguments = dict(loss="nll", hidden=hidden, weight=weight, targets=targets, depth_weight=WEIGHTS)
    with pytest.raises(error, match=message):
        logitless.linear_depth_loss(**{**arguments, **change})


def test_hidden_states_of_another_width_or_shape_are_refused_by_name():
    hidden, weight, targets = depths()
    wide = [hidden[0], torch.zeros(3, 11, H + 1), hidden[2]]
    with pytest.raises(ValueError, match=r"hidden\[1\]: expected \[..., 8\]"):
        logitless.linear_depth_loss("nll", wide, weight, targets, depth_weight=WEIGHTS)
    with pytest.raises(ValueError, match=r"targets\[1\]: expected shape \[3, 11\], got \[3, 12\]"):
        logitless.linear_depth_loss("nll", hidden, weight, [targets[0]] * 3, depth_weight=WEIGHTS)


@pytest.mark.parametrize("depth", [0, True, 1.5])
def test_depths_that_are_no_number_of_depths_are_refused(depth):
    with pytest.raises(ValueError, match="depths: expected a positive int"):
        logitless.depth_targets(torch.zeros(2, 3, dtype=torch.long), depth)
