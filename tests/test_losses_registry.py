"""Losses as pure functions with checked hyper-parameters and inputs, and the registry that knows them by name."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from loss_cases import SFT_LOSSES, doubles, ident, random_stats, reference_like, value_loss
from torch import Tensor

from logitless import losses
from logitless.arguments import LossArguments
from logitless.losses import DFT, DPO, NLL, FDivergenceSFT, Loss, sequence_logprob
from logitless.types import TokenStats

# Common to all


@pytest.mark.parametrize("loss", [NLL(label_smoothing=0.1, z_loss=0.1), DFT(), *SFT_LOSSES, value_loss()], ids=ident)
def test_token_losses_are_pure_and_elementwise(loss: Loss) -> None:
    stats, _, _ = random_stats(2, 6)
    ref_logprob, ref_lse = reference_like(stats)
    inputs = {"ref_logprob": ref_logprob.requires_grad_(), "ref_lse": ref_lse.requires_grad_()}
    arguments = [inputs[name] for name in loss.inputs]
    before = [x.detach().clone() for x in (*stats[:2], stats.mean_logit, *arguments)]
    value = loss(stats, *arguments)
    value.sum().backward()
    after = (*stats[:2], stats.mean_logit, *arguments)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert value.shape == (2, 6) and value.dtype == torch.float64
    assert ref_logprob.grad is None and ref_lse.grad is None, "the reference is a constant"
    assert stats.logprob is not None and value.data_ptr() != stats.logprob.data_ptr()
    row = TokenStats(*(None if x is None else x[1] for x in stats))
    torch.testing.assert_close(loss(row, *(x[1] for x in arguments)), value[1], rtol=0, atol=0)
    if loss.token_wise:
        flat = TokenStats(*(None if x is None else x.flatten() for x in stats))
        torch.testing.assert_close(loss(flat, *(x.flatten() for x in arguments)), value.flatten(), rtol=0, atol=0)


def test_dtype_follows_the_statistics() -> None:
    stats = TokenStats(logprob=torch.tensor([-1.0, -2.0]))
    for loss in (NLL(), DFT(), FDivergenceSFT(), FDivergenceSFT(divergence="alpha", alpha=-0.5)):
        inputs = [torch.tensor([-1.5, -1.5], dtype=torch.float64)] * len(loss.inputs)
        assert loss(stats, *inputs).dtype == torch.float32
    assert stats.logprob is not None
    assert DPO()(stats.logprob, stats.logprob, *[doubles(-1.0, -2.0)] * 2).loss.dtype == torch.float32


@pytest.mark.parametrize(
    "loss", [NLL(label_smoothing=0.1), DFT(), *SFT_LOSSES[::4], value_loss(divergence="alpha")], ids=ident
)
def test_losses_trace_without_a_graph_break(loss: Loss) -> None:
    stats, _, _ = random_stats(2, 4)
    arguments = reference_like(stats)[: len(loss.inputs)]
    torch._dynamo.reset()
    traced = torch.compile(
        lambda *xs: loss(TokenStats(xs[0], xs[1], None, xs[2]), *xs[3:]), fullgraph=True, backend="eager"
    )
    value = traced(stats.logprob, stats.lse, stats.mean_logit, *arguments)
    torch.testing.assert_close(value, loss(stats, *arguments), rtol=0, atol=0)


def test_pair_losses_trace_without_a_graph_break() -> None:
    tokens, sequence = -torch.rand(12), torch.arange(4).repeat_interleave(3)
    loss = DPO(divergence="alpha", alpha=0.3, label_smoothing=0.1)

    def from_tokens(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
        sums = [sequence_logprob(x, sequence=sequence, num_sequences=4) for x in (logprob, ref_logprob)]
        return loss(*sums[0].chunk(2), *sums[1].chunk(2)).loss

    torch._dynamo.reset()
    traced = torch.compile(from_tokens, fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(tokens, 2 * tokens), from_tokens(tokens, 2 * tokens), rtol=0, atol=0)


# Hyper-parameters, inputs, registry


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: NLL(label_smoothing=1.5), ValueError, "NLL: label_smoothing"),
        (lambda: NLL(label_smoothing=-0.1), ValueError, "NLL: label_smoothing"),
        (lambda: NLL(z_loss=-1), ValueError, "NLL: z_loss"),
        (lambda: losses.get("nll", z_loss="1e-4"), TypeError, "NLL: z_loss must be a number, got str"),
        (lambda: DFT(power=-1), ValueError, "DFT: power"),
        (lambda: DFT(power=math.nan), ValueError, "DFT: power"),
        (lambda: DFT(power=True), TypeError, "DFT: power"),
        (lambda: FDivergenceSFT(beta=0), ValueError, "FDivergenceSFT: beta"),
        (lambda: FDivergenceSFT(beta=-0.1), ValueError, "FDivergenceSFT: beta"),
        (lambda: FDivergenceSFT(beta=math.inf), ValueError, "FDivergenceSFT: beta"),
        (lambda: FDivergenceSFT(divergence="hellinger"), ValueError, "squared_hellinger"),
        (lambda: losses.get("f_divergence_sft", divergence=None), TypeError, "FDivergenceSFT: divergence"),
        (lambda: FDivergenceSFT(value="mean"), ValueError, "FDivergenceSFT: value"),
        (lambda: losses.get("f_divergence_sft", saturate=1), TypeError, "FDivergenceSFT: saturate"),
        (lambda: FDivergenceSFT(divergence="js", saturate=True), ValueError, "saturate"),
        (lambda: FDivergenceSFT(divergence="js", alpha=0.3), ValueError, "alpha"),
        (lambda: DPO(beta=-0.1), ValueError, "DPO: beta"),
        (lambda: DPO(beta=0), ValueError, "DPO: beta"),
        (lambda: DPO(loss_type="sigmod"), ValueError, "did you mean 'sigmoid'"),
        (lambda: DPO(label_smoothing=0.5), ValueError, r"\[0.0, 0.5\)"),
        (lambda: DPO(label_smoothing=0.1, loss_type="ipo"), ValueError, "label_smoothing"),
        (lambda: DPO(label_smoothing=0.1, loss_type="hinge"), ValueError, "label_smoothing"),
        (lambda: DPO(divergence="js", loss_type="ipo"), ValueError, "ipo"),
        (lambda: DPO(divergence="total_variation"), ValueError, "DPO: divergence"),
        (lambda: DPO(alpha=0.3), ValueError, "alpha"),
        (lambda: DPO(divergence="alpha", alpha=-0.3), ValueError, "DPO: alpha"),
    ],
)
def test_bad_hyper_parameters(make, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_bad_inputs_are_named() -> None:
    stats = TokenStats(logprob=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"nll reads stats\.lse"):
        NLL(z_loss=0.1)(stats)
    with pytest.raises(ValueError, match=r"ref_logprob must have shape \(2, 3\), got \(3,\)"):
        FDivergenceSFT()(stats, torch.zeros(3))
    with pytest.raises(ValueError, match="ref_lse belongs to value='lse'"):
        FDivergenceSFT()(stats, torch.zeros(2, 3), torch.zeros(2, 3))
    both = TokenStats(logprob=torch.zeros(2, 3), lse=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="needs ref_lse"):
        value_loss()(both, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"mask: expected torch\.bool"):
        value_loss()(both, torch.zeros(2, 3), torch.zeros(2, 3), mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="sequence: expected"):
        value_loss()(both, torch.zeros(2, 3), torch.zeros(2, 3), sequence=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="mask and sequence belong to the sequence losses"):
        FDivergenceSFT()(stats, torch.zeros(2, 3), mask=torch.ones(2, 3).bool())
    with pytest.raises(ValueError, match="rejected must have the shape of chosen"):
        DPO()(torch.zeros(2), torch.zeros(2, 1), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="ref_chosen"):
        DPO()(torch.zeros(2), torch.zeros(2), torch.zeros(1), torch.zeros(2))


def test_registry() -> None:
    assert losses.names() == sorted(losses.names())
    assert {"nll", "dft", "f_divergence_sft", "dpo"} <= set(losses.names())
    assert losses.get("dft") == DFT() and losses.get("dft", power=2) == DFT(power=2)
    loss = DPO(beta=0.2)
    assert losses.get(loss) is loss
    assert losses.get(loss, loss_type="hinge") == DPO(beta=0.2, loss_type="hinge")
    assert all(losses.get(name).name == name for name in losses.names())
    assert len({losses.get(name) for name in losses.names()}) == len(losses.names()), "hashable"
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.beta = 0.3


def test_registry_errors() -> None:
    with pytest.raises(ValueError, match=r"'f_divergence'.*did you mean 'f_divergence_sft'"):
        losses.get("f_divergence")
    with pytest.raises(ValueError, match=r"there are .*dft, .*dpo"):
        losses.get("zzz")
    with pytest.raises(TypeError, match=r"dft has no hyper-parameter 'powr' \(did you mean 'power'"):
        losses.get("dft", powr=2)
    with pytest.raises(TypeError, match="has no hyper-parameter 'betta'"):
        losses.get(DPO(), betta=2)
    with pytest.raises(TypeError, match="a name or a logitless"):
        losses.get(DFT)
    with pytest.raises(ValueError, match="'dft' is taken by DFT"):
        losses.register(DFT)
    with pytest.raises(TypeError, match="frozen dataclass"):
        losses.register(type("Plain", (Loss,), {"name": "plain"}))


def test_type_checkers_know_every_input() -> None:
    every = [losses.get(name) for name in losses.names()]
    inputs = {name for x in every for name in (*x.inputs, *x.optional_inputs, *x.sequence_inputs)}
    assert inputs <= set(LossArguments.__annotations__)
