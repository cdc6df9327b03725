"""Properties of every loss of the registry: by name and object, against full logits, and however the batch is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import B, LossBatch, T, V, batch_of, counted, length, pad, run_loss
from torch import Tensor

from logitless import Head, linear_divergence, linear_logprobs, linear_loss, losses
from logitless.losses import Loss, PairLoss, UnpairedLoss
from logitless.losses.layout import token_layout
from logitless.reduce import OF_SEQUENCES
from logitless.testing import TokenProblem, materialised
from logitless.types import LogitTransform, TokenStats

NAMES = losses.names()
WHOLE = (PairLoss, UnpairedLoss)


def close(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def total(parts: list[Any]) -> list[Tensor]:
    return [sum(values) for values in zip(*parts, strict=True)]  # type: ignore[misc]


def count_of(loss: Loss, batch: LossBatch) -> float:
    """The divisor of the loss's own reduction, for the whole batch."""
    if isinstance(loss, WHOLE):
        return loss.count_groups(len(batch.targets))
    counts = counted(batch.targets, batch.hidden)
    return float((counts.any(-1) if loss.reduction in OF_SEQUENCES else counts).sum())


@pytest.mark.parametrize("name", NAMES)
def test_by_name_and_by_object(name):
    batch = batch_of(losses.get(name))
    close(run_loss(name, batch), run_loss(losses.get(name), batch), 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_a_graph_break(name):
    loss = losses.get(name)
    batch = batch_of(loss)
    torch._dynamo.reset()

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        out = linear_loss(loss, hidden, weight, batch.targets, **batch.inputs, **length(loss))
        return out if isinstance(out, Tensor) else out.loss

    compiled = torch.compile(value, backend="aot_eager", fullgraph=True)
    hidden, weight = (x.clone().requires_grad_() for x in (batch.hidden, batch.weight))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):  # of groups, on torch 2.9
        found = compiled(hidden, weight)
    close((found.detach(), *torch.autograd.grad(found, (hidden, weight))), run_loss(loss, batch))


@pytest.mark.parametrize("name", NAMES)
def test_against_the_loss_of_full_logits(name):
    """Value and gradients are those of plain autograd through `[tokens, vocabulary]` logits."""
    loss = losses.get(name)
    batch = batch_of(loss)
    hidden, weight = (x.clone().requires_grad_() for x in (batch.hidden, batch.weight))
    transform = LogitTransform(temperature=loss.stats_temperature)
    stats = materialised(TokenProblem(hidden, weight, None, batch.targets), transform, outputs=loss.outputs)
    inputs = dict(batch.inputs)
    divergence = None
    if loss.compares_distributions:
        mask = batch.targets != -100
        divergence = linear_divergence(
            hidden,
            Head(weight),
            inputs.pop("ref_hidden"),
            Head(weight.detach()),
            mask=mask,
            backend="reference",
            **loss.linear_divergence,
        )
    tokens = token_layout(counted(batch.targets, hidden), None)
    length = 8 if loss.reduction == "constant_length" else None
    out = loss.evaluate(stats, tokens, inputs, reduction=loss.reduction, max_length=length, divergence=divergence)
    value = out if isinstance(out, Tensor) else out.loss
    close(run_loss(loss, batch), (value.detach(), *torch.autograd.grad(value, (hidden, weight))))


@pytest.mark.parametrize(
    "loss",
    [
        *(losses.get(name) for name in NAMES if losses.get(name).compares_distributions),
        losses.ASFT(kl_weight=0.7),
        losses.SFTKL(kl="reverse_kl", kl_weight=0.0),
        losses.Distillation("js", nll_weight=0.4),
    ],
    ids=str,
)
def test_a_distribution_loss_is_affine_in_its_divergence(loss):
    """So the divergence and the rest can have a sweep each, and the sums of both add up to the loss."""
    stats, divergence = TokenStats(logprob=torch.tensor([-0.3, -4.0]).double()), torch.tensor([0.2, 30.0]).double()
    expected = loss(stats, torch.zeros_like(divergence)) + loss.divergence_weight * divergence
    torch.testing.assert_close(loss(stats, divergence), expected)
    batch = batch_of(loss)
    each = linear_loss(loss, batch.hidden, batch.weight, batch.targets, **batch.inputs, reduction="none")
    torch.testing.assert_close(run_loss(loss, batch, reduction="sum")[0], each.sum())


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name):
    loss = losses.get(name)
    batch = batch_of(loss)
    value, d_hidden, d_weight = run_loss(loss, batch)
    close(run_loss(loss, batch.padded(3)), (value, pad(d_hidden, 3, 0.0), d_weight))


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_rows_changes_nothing(name):
    """In a batch of pairs, the chosen and the rejected halves are reordered alike."""
    loss = losses.get(name)
    batch = batch_of(loss)
    order = torch.tensor([2, 0, 1, 5, 3, 4]) if isinstance(loss, PairLoss) else torch.tensor([4, 0, 5, 2, 1, 3])
    value, d_hidden, d_weight = run_loss(loss, batch)
    close(run_loss(loss, batch.rows(order)), (value, d_hidden[order], d_weight))


@pytest.mark.parametrize("name", [name for name in NAMES if not losses.get(name).batch_wide])
def test_micro_batches_of_any_size_add_up(name):
    """With the global count as the normalizer; ranks that sum their gradients are micro-batches."""
    loss = losses.get(name)
    batch = batch_of(loss)
    parts = [[0, 3], [1, 2, 4, 5]] if isinstance(loss, PairLoss) else [[0], [1, 2, 3], [4, 5]]
    normalizer = count_of(loss, batch)
    found = []
    for rows in parts:
        value, d_hidden, d_weight = run_loss(loss, batch.rows(torch.tensor(rows)), normalizer=normalizer)
        spread = torch.zeros_like(batch.hidden)
        spread[torch.tensor(rows)] = d_hidden
        found.append((value, spread, d_weight))
    close(total(found), run_loss(loss, batch))


@pytest.mark.parametrize("name", NAMES)
def test_flat_sequences_are_rows(name):
    """`[N, H]` with boundaries gives what `[B, T, H]` gives."""
    loss = losses.get(name)
    batch = batch_of(loss)
    keep = counted(batch.targets, batch.hidden)
    lengths = keep.sum(-1)
    boundaries = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    inputs = {k: x[keep] if x.dim() >= 2 else x for k, x in batch.inputs.items()}
    flat = LossBatch(batch.hidden[keep], batch.weight, batch.targets[keep], inputs)
    value, d_hidden, d_weight = run_loss(loss, batch)
    close(run_loss(loss, flat, cu_seqlens=boundaries), (value, d_hidden[keep], d_weight))


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_head_has_the_same_gradient(name):
    loss = losses.get(name)
    batch = batch_of(loss)
    value, d_hidden, _ = run_loss(loss, batch)
    hidden = batch.hidden.clone().requires_grad_()
    length = {"max_length": 8} if loss.reduction == "constant_length" else {}
    out = linear_loss(loss, hidden, batch.weight, batch.targets, **batch.inputs, **length)
    found = out if isinstance(out, Tensor) else out.loss
    close((found.detach(), torch.autograd.grad(found, hidden)[0]), (value, d_hidden))


@pytest.mark.parametrize("name", NAMES)
def test_no_token_that_counts(name):
    """A finite value, connected to the graph, with gradient 0."""
    loss = losses.get(name)
    batch = batch_of(loss)
    batch = batch._replace(targets=torch.full_like(batch.targets, -100))
    value, d_hidden, d_weight = run_loss(loss, batch)
    assert value.isfinite() and not d_hidden.any() and not d_weight.any()
    if not isinstance(loss, WHOLE):
        assert value == 0


@pytest.mark.parametrize(
    "loss",
    [
        *(x for x in map(losses.get, NAMES) if x.of_sequences),
        losses.FDivergenceSFT(value="lse"),
        losses.PPO(off_policy_threshold=0.1),
        losses.DensePathReinforce(credit="token", off_policy_threshold=0.1),
    ],
    ids=str,
)
def test_flat_tokens_are_no_sequence_unless_said_so(loss):
    """One for all of a batch's tokens would be a silent mistake, whatever the reduction."""
    batch = batch_of(loss)
    inputs = {k: x.flatten() if x.dim() == 2 else x for k, x in batch.inputs.items()}
    flat = LossBatch(batch.hidden.flatten(0, 1), batch.weight, batch.targets.flatten(), inputs)
    with pytest.raises(ValueError, match="cu_seqlens"):
        run_loss(loss, flat, reduction="sum")


@pytest.mark.parametrize("loss", [losses.DeformedLog(form="cayley"), losses.PPO(top_entropy=0.5)], ids=str)
def test_a_loss_of_the_whole_batch_needs_no_sequences(loss):
    batch = batch_of(loss)
    assert loss.level == "sequence" and not loss.of_sequences
    inputs = {k: x.flatten() for k, x in batch.inputs.items()}
    flat = LossBatch(batch.hidden.flatten(0, 1), batch.weight, batch.targets.flatten(), inputs)
    close(run_loss(loss, flat)[::2], run_loss(loss, batch)[::2])


@pytest.mark.parametrize("name", NAMES)
def test_missing_and_unknown_inputs_are_named(name):
    loss = losses.get(name)
    batch = batch_of(loss)
    for missing in (*loss.inputs, *loss.sequence_inputs):
        given = {k: v for k, v in batch.inputs.items() if k != missing}
        with pytest.raises(ValueError, match=missing):
            run_loss(loss, batch._replace(inputs=given))
    with pytest.raises(TypeError, match="nonsense"):
        run_loss(loss, batch._replace(inputs={**batch.inputs, "nonsense": batch.targets}))


@pytest.mark.parametrize("name", [name for name in NAMES if "advantages" in losses.get(name).inputs])
def test_one_advantage_a_sequence_is_spread_over_its_tokens(name):
    loss = losses.get(name)
    batch = batch_of(loss)
    each = torch.linspace(-1, 1, B, dtype=torch.float64)
    short = batch._replace(inputs={**batch.inputs, "advantages": each})
    long = batch._replace(inputs={**batch.inputs, "advantages": each[:, None].expand(B, T)})
    close(run_loss(loss, short), run_loss(loss, long), 0.0)


WITH_REFERENCE = [
    *(loss for loss in map(losses.get, NAMES) if "ref_logprob" in loss.inputs),
    losses.FDivergenceSFT(value="lse"),
    losses.ASFT(kl="k3"),
    losses.GRPO(beta=0.1),
]


def of_reference(batch: LossBatch) -> tuple[LossBatch, dict[str, Any], dict[str, Tensor]]:
    """The batch without what a reference gives; the reference's hidden states and head; the inputs in their place."""
    generator = torch.Generator().manual_seed(4)
    hidden, weight = (torch.randn(*shape, 3, generator=generator, dtype=torch.float64) for shape in ((B, T), (V,)))
    stats = linear_logprobs(hidden, weight, batch.targets, softcap=5.0, outputs=("logprob", "lse"))
    scored = {"ref_logprob": stats.logprob, "ref_lse": stats.lse}
    rest = {name: x for name, x in batch.inputs.items() if name not in scored}
    reference = {"ref_hidden": hidden, "ref_head": Head(weight, softcap=5.0)}
    return batch._replace(inputs=rest), reference, {k: x for k, x in scored.items() if k in batch.inputs}


@pytest.mark.parametrize("loss", WITH_REFERENCE, ids=str)
def test_hidden_states_of_the_reference_stand_for_its_log_probs(loss):
    batch, reference, scored = of_reference(batch_of(loss))
    expected = run_loss(loss, batch._replace(inputs=batch.inputs | scored))
    close(run_loss(loss, batch, **reference), expected, 0.0)
    for name, value in scored.items():
        with pytest.raises(ValueError, match=rf"{name}: .*ref_hidden"):
            run_loss(loss, batch, **reference, **{name: value})


@pytest.mark.parametrize("loss", [losses.DPO(), losses.FDivergenceSFT(value="lse")], ids=str)
def test_hidden_states_of_the_reference_compile_without_a_graph_break(loss):
    batch, reference, _ = of_reference(batch_of(loss))
    torch._dynamo.reset()

    def value(hidden: Tensor) -> Tensor:
        out = linear_loss(loss, hidden, batch.weight, batch.targets, **reference)
        return out if isinstance(out, Tensor) else out.loss

    compiled = torch.compile(value, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch.hidden), value(batch.hidden))


@pytest.mark.parametrize(
    "loss",
    [x for x in map(losses.get, NAMES) if "ref_logprob" not in x.inputs and not x.compares_distributions],
    ids=lambda loss: loss.name,
)
def test_a_reference_that_is_not_read_is_refused(loss):
    batch = batch_of(loss)
    reference = {"ref_hidden": torch.zeros(B, T, 3, dtype=torch.float64), "ref_head": Head(torch.zeros(V, 3).double())}
    for argument, value in reference.items():
        with pytest.raises(ValueError, match=rf"{argument}: '{loss.name}' reads nothing of a reference"):
            run_loss(loss, batch, **{argument: value})
