"""`linear_divergence`, the primitive of distillation: checks, choice of backend and strategy, then the ops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, Never, get_args

import torch
from torch import Tensor

from .. import backends, reduce, reference
from ..peers import refuse_unknown
from ..types import BackendName, BackwardName, DivergenceKind, DivergenceOptions, Head, Options, Reduction
from . import checks
from .call import Call, prepare_call
from .registered.divergence import divergence, divergence_sum
from .sharded import on_whole_tensors
from .token_loss import check_token_input
from .vocabulary_parallel import side_of_shard


@on_whole_tensors
def linear_divergence(
    hidden: Tensor,
    head: Tensor | Head,
    ref_hidden: Tensor,
    ref_head: Tensor | Head,
    *,
    kind: DivergenceKind,
    mask: Tensor | None = None,
    mixture: float = 0.5,
    skew: float = 0.1,
    alpha: float = 0.5,
    normalized: bool = False,
    token_weight: Tensor | None = None,
    reduction: Reduction = "none",
    normalizer: Tensor | float | None = None,
    backend: BackendName = "auto",
    backward: BackwardName = "auto",
    chunk_bytes: int | None = None,
    group: Any = None,
    grad_out: Tensor | None = None,
    **unknown: Never,
) -> Tensor:
    """Per-token divergence between two next-token distributions over the whole vocabulary, without either's logits.

    P is the reference's (teacher's) distribution and Q the model's (student's), each the softmax of its own head's
    logits, options and temperature included (no factor temperature^2 is applied: multiply where it is wanted):

        forward_kl          KL(P|Q)
        reverse_kl          KL(Q|P)
        symmetric_kl        (1-w) KL(P|Q) + w KL(Q|P),  w = mixture
        js                  w KL(P|M) + (1-w) KL(Q|M),  M = w P + (1-w) Q
        skew_forward_kl     KL(P | (1-l) Q + l P),  l = skew
        skew_reverse_kl     KL(Q | (1-l) P + l Q)
        total_variation     1/2 sum |P - Q|
        squared_hellinger   1 - sum sqrt(P Q)
        pearson_chi2        sum (Q - P)^2 / P
        neyman_chi2         sum (Q - P)^2 / Q
        alpha               (1 - sum P^a Q^(1-a)) / (a (1-a)); forward KL at a = 1, reverse KL at 0
        cross_entropy       -sum P log Q

    Args:
        hidden, ref_hidden: `[..., H]` and `[..., H']`, the same leading shape; H' may differ from H.
        head, ref_head: `[V, H]` and `[V, H']` weights, or `Head`s with bias and options of their own. One vocabulary.
        kind: see above.
        mask: `[...]` bool, the tokens that count; the others give 0 and no gradient, and cost nothing. None: all.
        mixture: weight of the *reference* in `js`, as in GKD; 1/2 is the symmetric one. The divergence vanishes
            towards both ends, so 0 and 1 are refused unless `normalized`. In `symmetric_kl` it weights the reverse KL,
            as DistiLLM's lambda does; 1/2 is half of Jeffreys' divergence.
        normalized: divides `js` by w (1-w), which makes it continuous: forward KL at 0, reverse KL at 1.
        skew: in [0, 1), the weight of the divergence's own first argument in the mixture; 0.1 as in DistiLLM.
        alpha: any number; 1/2 is 4 times the squared Hellinger distance, 2 half of Neyman's chi2, -1 of Pearson's.
        token_weight: `[...]` constants that multiply the tokens' divergences.
        reduction: "none" gives one number per token. "sum" and "mean" (by the number of tokens that count, or by
            `normalizer`) know every token's share at once, so that the gradients need no second sweep.
        normalizer: number, or tensor of one, that "mean" divides by.
        backend: "reference" (full logits, plain autograd), or one of `linear_logprobs`'s, or "auto".
        backward: "recompute" computes each chunk's logits again; "single_pass" does not: for "sum" and "mean", or
            where the heads are frozen, by keeping `d divergence / d hidden` of each token. "auto" takes the cheapest.
        chunk_bytes: budget for a chunk's float32 logits of both sides and the temporaries of their row operations.
            None: 96 MiB on a CPU, 768 MiB elsewhere, so that the GEMMs are as large as those of `linear_logprobs`.
        group: the processes that share the rows of both heads, as in `linear_logprobs`: each has the same rows of
            either. Then the rows of a chunk are PyTorch's operations, whatever the backend.
        grad_out: `[V, H]`, a buffer that the gradient of the model's head is added to, as in `linear_logprobs`.

    Returns:
        `[...]`, or a scalar for "sum" and "mean"; float32 (float64 where an input is). Differentiable for `hidden` and
        `head`, and for the reference's tensors where they require a gradient; with any upstream gradient.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device or value, before anything is computed; a parameter
            that `kind` does not read.
        RuntimeError: the gradient is differentiated again (`create_graph=True`) with a backend other than "reference".

    Cost, in GEMMs of `2 N H V` flops of a side: forward 1 of each side. Backward: 2 of a trainable model, or 1 of a
    frozen head, and the forward's again where it recomputes: with a frozen reference 4 + 2 by recomputation, 3 + 1 in
    a single pass, 2 + 1 with frozen heads.

    Infinite results: `forward_kl` and `cross_entropy` are inf where P has mass and Q has none (-inf logits), their
    gradient for the model is finite there; `reverse_kl` where Q has mass and P has none, `pearson_chi2` and
    `neyman_chi2` also where `q^2 / p` (`p^2 / q`) overflows, at log-ratios of about 88 in float32, and `alpha` outside
    (0, 1) likewise: there the gradient is NaN. `symmetric_kl` is inf where either of its KLs is; its gradient is finite
    or NaN as that one's. The others are bounded: js by the entropy of the mixture (log 2 at 1/2), skew by -log skew,
    total variation and squared Hellinger by 1. An entry whose probability underflows counts as absent.

    Source: GKD, arXiv 2306.13649 (js: its JSD(beta) with beta = mixture); DistiLLM, arXiv 2402.03898 and its code
    (skews, symmetric_kl); the others are textbook f-divergences. Gradients derived; see
    `logitless.backends.exact.divergence`.
    """
    refuse_unknown("linear_divergence", unknown)
    options = DivergenceOptions(kind, mixture, skew, alpha, normalized)
    checks.check_choice("reduction", reduction, get_args(Reduction))
    reduce.check(reduction, normalizer)
    shared = Options(backend=backend, backward=backward, chunk_bytes=chunk_bytes, group=group, grad_out=grad_out)
    pair = _prepare(hidden, head, ref_hidden, ref_head, mask, shared)
    if token_weight is not None:
        check_token_input("token_weight", token_weight, hidden)
        token_weight = token_weight.reshape(-1)
    strategy = _strategy(pair, reduction)
    if strategy == "sum":
        total = _weighted_sum(pair, options, token_weight)
    else:
        values = _values(pair, options, unit=strategy == "unit")
        if token_weight is not None:
            values = values * token_weight.to(values.dtype)
        if reduction == "none":
            return values.reshape(hidden.shape[:-1])
        total = values.sum()
    if reduction == "sum":
        return total
    return reduce.mean(total, pair.tokens() if normalizer is None else normalizer)


# ---------------------------------------------------------------------------------------------------------------------
# Checks and strategy


class _Pair(NamedTuple):
    """One call, checked, cast and flattened."""

    model: Call
    ref: Call
    mask: Tensor | None  # [N] bool

    def needs(self) -> list[bool]:
        """Whether hidden, weight and bias of the model and then of the reference want a gradient here and now."""
        return [*self.model.needs(), *self.ref.needs()]

    def tokens(self) -> Tensor | float:
        """How many count; 1 at least where there is no mask."""
        return float(max(1, len(self.model.hidden))) if self.mask is None else self.mask.sum().float()

    def arguments(self, options: DivergenceOptions) -> tuple[Any, ...]:
        """The arguments that both ops begin with: the tensors, the kind with its parameters, both heads' transforms."""
        sides = (self.model, self.ref)
        tensors = [x for side in sides for x in (side.hidden, side.weight, side.options.bias)]
        parameters = [float(x) for x in (options.mixture, options.skew, options.alpha)]
        transforms = [x for side in sides for x in side.options.transform.packed()]
        return (*tensors, self.mask, options.kind, parameters, options.normalized, transforms)

    def execution(self) -> tuple[str, int | None, str, int]:
        """The arguments that both ops end with: the backend, the budget of a chunk, the group and its widest part."""
        group = self.model.options.group
        shared = ("", 0) if group is None else (group.group.group_name, max(group.rows))
        return self.backend(), self.model.options.chunk_bytes, *shared

    def backend(self) -> str:
        """The first of the table that takes both sides; "cuda" by name alone, as its rows here are PyTorch's."""
        name = self.model.options.backend
        picked = [backends.pick(name, side.hidden, without=("cuda",)) for side in (self.model, self.ref)]
        return max(picked, key=list(backends.BACKENDS).index)


def _prepare(
    hidden: Tensor,
    head: Tensor | Head,
    ref_hidden: Tensor,
    ref_head: Tensor | Head,
    mask: Tensor | None,
    options: Options,
) -> _Pair:
    model = _side("", hidden, head, options)
    ref = _side("ref_", ref_hidden, ref_head, replace(options, grad_out=None))
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        shape = f"{[*hidden.shape[:-1], ref_hidden.shape[-1]]} like hidden"
        raise ValueError(f"ref_hidden: expected shape {shape}, got {list(ref_hidden.shape)}")
    if ref_hidden.device != hidden.device:
        raise ValueError(f"ref_hidden: expected device {hidden.device} like hidden, got {ref_hidden.device}")
    if ref.options.group != model.options.group:
        rows = [side.options.group and side.options.group.rows for side in (model, ref)]
        raise ValueError(f"ref_head: expected the rows of head on every rank, {rows[0]}, got {rows[1]}")
    if len(ref.weight) != len(model.weight):
        raise ValueError(
            f"ref_head: expected a vocabulary of {len(model.weight)} like head's, got {len(ref.weight)}; cut the "
            "larger, or give the missing entries a bias of -inf"
        )
    if mask is not None:
        checks.check_tensor("mask", mask, f"{list(hidden.shape[:-1])}")
        if mask.shape != hidden.shape[:-1] or mask.dtype != torch.bool or mask.device != hidden.device:
            raise ValueError(
                f"mask: expected bool {list(hidden.shape[:-1])} on {hidden.device}, got {mask.dtype} "
                f"{list(mask.shape)} on {mask.device}"
            )
        mask = mask.reshape(-1)
    if model.options.group is not None:
        if options.backend == "reference":
            raise ValueError("backend: 'reference' makes a divergence of whole logits, which no process of a group has")
        model, ref = side_of_shard(model), side_of_shard(ref)
    return _Pair(model, ref, mask)


def _side(prefix: str, hidden: Tensor, head: Tensor | Head, options: Options) -> Call:
    if isinstance(head, Tensor):
        head = Head(head)
    if not isinstance(head, Head):
        raise TypeError(f"{prefix}head: expected a weight [V, H] or a logitless.Head, got {type(head).__name__}")
    weight, bias, logit_scale, softcap, temperature = head
    options = replace(options, bias=bias, logit_scale=logit_scale, softcap=softcap, temperature=temperature)
    names = (f"{prefix}hidden", f"{prefix}head.weight", f"{prefix}head.bias")
    return prepare_call(hidden, weight, None, options, names=names)


def _strategy(pair: _Pair, reduction: str) -> str:
    """ "plain", "unit" or "sum"; an error if the single pass was asked for by name and cannot be.

    plain   values, and the logits again in the backward
    unit    values and a gradient vector for each token, where the heads are frozen
    sum     the sum and its gradients in one sweep
    """
    needs, backward = pair.needs(), pair.model.options.backward
    trainable_head = pair.model.trains_head() or pair.ref.trains_head()
    checks.check_choice("backward", backward, ("auto", "recompute", "single_pass"))
    if backward == "single_pass" and reduction == "none" and trainable_head:
        raise ValueError(
            "backward: 'single_pass' cannot serve reduction='none' with a trainable head, whose upstream gradients "
            "come after the pass; use backward='auto' or 'recompute'"
        )
    if backward == "recompute" or not any(needs) or pair.model.options.backend == "reference":
        return "plain"
    if reduction != "none":
        return "sum"
    return "plain" if trainable_head else "unit"


def _values(pair: _Pair, options: DivergenceOptions, unit: bool) -> Tensor:
    """The divergences `[N]`, differentiable."""
    if pair.model.options.backend == "reference":
        heads = [
            Head(side.weight, side.options.bias, *side.options.transform.numbers) for side in (pair.model, pair.ref)
        ]
        return reference.linear_divergence(
            pair.model.hidden, heads[0], pair.ref.hidden, heads[1], mask=pair.mask, options=options
        )
    units = [unit and side.needs().hidden for side in (pair.model, pair.ref)]
    out = pair.model.options.grad_out
    values, *_ = divergence(*pair.arguments(options), units, out, *pair.execution())
    return values


def _weighted_sum(pair: _Pair, options: DivergenceOptions, token_weight: Tensor | None) -> Tensor:
    """The weighted sum `[]`, with its gradients in one sweep."""
    if token_weight is None:
        token_weight = torch.ones(len(pair.model.hidden), device=pair.model.hidden.device)
    out = pair.model.options.grad_out
    total, *_ = divergence_sum(token_weight, *pair.arguments(options), pair.needs(), out, *pair.execution())
    return total
