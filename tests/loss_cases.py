"""Losses, their inputs and their statistics, shared by the tests of several families."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logitless import linear_loss, losses
from logitless.losses import DPO, FDivergenceSFT, Loss
from logitless.losses.sft.reward_transforms import REWARD_TRANSFORMS
from logitless.types import TokenStats

ALPHAS = (-1.0, -0.3, 0.0, 0.05, 0.5, 1.0, 1.7, 2.0)
SFT_LOSSES = [
    *(FDivergenceSFT(divergence=name, beta=0.3) for name in REWARD_TRANSFORMS),
    FDivergenceSFT(saturate=True, beta=0.3),
    *(FDivergenceSFT(divergence="alpha", alpha=alpha, beta=0.3) for alpha in ALPHAS),
]
DPO_LOSSES = [
    DPO(),
    DPO(beta=0.5, label_smoothing=0.2),
    DPO(loss_type="hinge"),
    DPO(loss_type="ipo"),
    *(DPO(divergence=name) for name in ("forward_kl", "js")),
    *(DPO(divergence="alpha", alpha=alpha) for alpha in (0.0, 0.25, 0.5, 1.0, 1.5)),
    DPO(divergence="forward_kl", loss_type="hinge"),
    DPO(divergence="js", label_smoothing=0.1),
]


def ident(loss: Loss) -> str:
    changed = [f for f in dataclasses.fields(loss) if getattr(loss, f.name) != f.default]
    return "-".join([loss.name, *(f"{f.name}={getattr(loss, f.name)}" for f in changed)])


def doubles(*values: float, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def weight_of(loss: Loss, logprob: Tensor, *inputs: Tensor) -> Tensor:
    """w = -d loss / d logprob, token by token."""
    logprob = logprob.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(TokenStats(logprob=logprob), *inputs).sum(), logprob)
    return -gradient


def random_stats(*shape: int, seed: int = 0, vocabulary: int = 7) -> tuple[TokenStats, Tensor, Tensor]:
    """Statistics of random logits with their graph, the logits, the targets."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(*shape, vocabulary, generator=generator, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(vocabulary, shape, generator=generator)
    lse = logits.logsumexp(-1)
    picked = logits.gather(-1, targets[..., None])[..., 0]
    return TokenStats(logprob=picked - lse, lse=lse, mean_logit=logits.mean(-1)), logits, targets


def value_loss(**overrides: object) -> FDivergenceSFT:
    return FDivergenceSFT(**{"divergence": "squared_hellinger", "beta": 0.3, "value": "lse", **overrides})


def reference_like(stats: TokenStats, seed: int = 5) -> tuple[Tensor, Tensor]:
    other, _, _ = random_stats(*stats.logprob.shape, seed=seed)
    return other.logprob.detach(), other.lse.detach()


def loss_inputs(
    loss: Loss, rows: int, width: int, hidden_size: int, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """All that `linear_loss` may be given for `rows` sequences of `width` tokens, the optional inputs too."""
    names = (*loss.inputs, *loss.optional_inputs)
    inputs = {name: _per_token(name, rows, width, generator, dtype) for name in names}
    inputs |= {name: _per_sequence(name, rows, dtype) for name in loss.sequence_inputs}
    if loss.compares_distributions:
        inputs["ref_hidden"] = torch.randn(rows, width, hidden_size, generator=generator, dtype=dtype)
    return inputs


#: Ids that a token lists, for a loss of lists.
LISTED = 3


def lists_of_ids(targets: Tensor, vocabulary: int) -> Tensor:
    """Three different ids for each token that counts, its target the first."""
    others = torch.stack([(targets + 1 + k) % vocabulary for k in range(LISTED - 1)], -1)
    return torch.cat([targets[..., None], others], -1).masked_fill((targets == -100)[..., None], -100)


def counted(targets: Tensor, hidden: Tensor) -> Tensor:
    """The tokens that count, of targets or of lists of them."""
    counts = targets != -100
    return counts.any(-1) if targets.dim() == hidden.dim() else counts


def _per_token(name: str, rows: int, width: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    if name == "demonstration":
        return (torch.arange(rows) % 3 == 0)[:, None].expand(rows, width).clone()
    if name == "negative":
        return torch.rand(rows, width, generator=generator) < 0.4
    if name == "group":
        return (torch.arange(rows) // 2)[:, None].expand(rows, width).clone()
    if name == "teacher_logprob":
        return torch.randn(rows, width, LISTED, generator=generator, dtype=dtype).log_softmax(-1) - 0.2
    if name == "teacher_tail":
        return -1 - torch.rand(rows, width, generator=generator, dtype=dtype)
    if name.endswith("logprob"):
        return -2 * torch.rand(rows, width, generator=generator, dtype=dtype)
    if name in ("policy_weight", "quality", "token_power", "draw", "nll_weight"):
        return torch.rand(rows, width, generator=generator, dtype=dtype)
    return torch.randn(rows, width, generator=generator, dtype=dtype)


def _per_sequence(name: str, rows: int, dtype: torch.dtype) -> Tensor:
    if name in ("desirable", "from_reference"):
        return torch.arange(rows) % 3 != 1
    if name in ("advantages", "reward"):
        return torch.linspace(-1, 1, rows, dtype=dtype).square()
    return torch.tensor(0.1, dtype=dtype)  # a reference point, a shift of the reward: one for the batch


B, T, H, V = 6, 5, 4, 11


class LossBatch(NamedTuple):
    """Rows of sequences, `[B, T]`, and what a loss wants to know about them."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    inputs: dict[str, Tensor]

    def rows(self, rows: Any) -> LossBatch:
        inputs = {name: x if x.dim() == 0 else x[rows] for name, x in self.inputs.items()}
        return LossBatch(self.hidden[rows], self.weight, self.targets[rows], inputs)

    def padded(self, width: int) -> LossBatch:
        """More positions that do not count, with nonsense behind them."""
        inputs = {name: pad(x, width, 7.0) if x.dim() >= 2 else x for name, x in self.inputs.items()}
        return LossBatch(pad(self.hidden, width, 3.0), self.weight, pad(self.targets, width, -100), inputs)


def pad(x: Tensor, width: int, value: float) -> Tensor:
    return torch.cat([x, x.new_full((len(x), width, *x.shape[2:]), value)], dim=1)


def batch_of(loss: Loss) -> LossBatch:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(B, T, H, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64)
    targets = torch.randint(V, (B, T), generator=generator)
    targets[torch.arange(T) >= torch.tensor([5, 3, 4, 1, 5, 2])[:, None]] = -100
    inputs = loss_inputs(loss, B, T, H, generator)
    if loss.lists:
        targets = lists_of_ids(targets, V)
    return LossBatch(hidden, weight, targets, inputs)


def length(loss: Loss) -> dict[str, int]:
    return {"max_length": 8} if loss.reduction == "constant_length" else {}


def run_loss(loss: Loss | str, batch: LossBatch, **options: Any) -> Any:
    """Loss and the gradients of hidden states and head."""
    options = {**length(losses.get(loss)), **options}
    hidden, weight = (x.clone().requires_grad_() for x in (batch.hidden, batch.weight))
    out = linear_loss(loss, hidden, weight, batch.targets, **batch.inputs, **options)
    value = out if isinstance(out, Tensor) else out.loss
    return value.detach(), *torch.autograd.grad(value, (hidden, weight))
