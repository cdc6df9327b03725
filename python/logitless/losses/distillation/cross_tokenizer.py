"""A teacher of another tokenizer: spans of text that both cut alike, and distances that need no common ids.

Two tokenizers cut one text differently. `align_spans` finds the shortest spans of tokens at whose ends both agree, so
that what either model says about a span can be compared. For on-policy distillation, `share_spans` gives the model's
tokens of a span the teacher's log-probability of it. A distribution over the ids that may end a span comes from
`merge_spans`, and `universal_logit_distance` compares two of them by their sorted probabilities, whatever the ids mean.
Ids of the same string in both vocabularies (`shared_ids`) can be compared directly. `logitless.linear_top_k` gives a
teacher's likeliest ids, and `linear_logprobs` with targets `[..., K]` the model's log-probabilities of listed ids.

```python
from itertools import accumulate

import torch
from logitless import losses

model_tokens, teacher_tokens = [b"dis", b"till", b"ation"], [b"distil", b"lation"]
spans, ref_spans = losses.align_spans(*(list(accumulate(map(len, x))) for x in (model_tokens, teacher_tokens)))
print(spans, ref_spans)  # one span: the boundaries 3, 7 and 6 are not common

ref_logprob = losses.share_spans(torch.tensor([-1.5, -0.3]), ref_spans, spans, 3)  # for each of the model's tokens
top, ref_top = (torch.randn(n, 50).log_softmax(-1).topk(8).values for n in (3, 2))  # log-probs of the likeliest ids
merged = losses.merge_spans(top, torch.tensor([-0.2, -0.7, -0.1]), spans)
ref_merged = losses.merge_spans(ref_top, torch.tensor([-1.5, -0.3]), ref_spans)
print(ref_logprob, losses.universal_logit_distance(merged, ref_merged))
```
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["align_spans", "merge_spans", "share_spans", "shared_ids", "universal_logit_distance"]

Spans: TypeAlias = list[range]


def align_spans(ends: Sequence[int], ref_ends: Sequence[int]) -> tuple[Spans, Spans]:
    """The shortest spans of tokens at whose ends two tokenizers of one text agree.

    A token of no bytes, such as an end marker, is a span of its own where both sides have one at the same place. Tokens
    behind the last common boundary belong to no span.

    Args:
        ends: where each of the model's tokens ends, in bytes of the text: the running sum of the tokens' lengths. In
            bytes, as byte-level tokenizers split characters.
        ref_ends: the same of the teacher's tokens.

    Returns:
        The model's spans and the teacher's, ranges of places among the tokens, as many of one as of the other.

    Raises:
        ValueError: ends that go backwards.

    Source: TRL (experimental/gold), whose last span also takes tokens that have no common end.
    """
    for name, places in (("ends", ends), ("ref_ends", ref_ends)):
        if any(places[i] > places[i + 1] for i in range(len(places) - 1)):
            raise ValueError(f"{name}: expected places that do not decrease, got {list(places)}")
    spans, ref_spans = [], []
    start = ref_start = here = there = 0
    while here < len(ends) and there < len(ref_ends):
        end, ref_end = ends[here], ref_ends[there]
        here, there = here + (end <= ref_end), there + (ref_end <= end)
        if end == ref_end:
            spans.append(range(start, here))
            ref_spans.append(range(ref_start, there))
            start, ref_start = here, there
    return spans, ref_spans


def share_spans(ref_logprob: Tensor, ref_spans: Spans, spans: Spans, length: int) -> Tensor:
    """The teacher's log-probability of each span in equal shares on the model's tokens there: `[length]`, 0 elsewhere.

    Over a span, the sum of `ref_logprob - logprob` is then the teacher's log-ratio of that text. Take the other tokens,
    which are in no span, out of the targets: a 0 is a probability of 1.

    Args:
        ref_logprob: `[T']`, of the teacher's own tokens.
        ref_spans, spans: of `align_spans`.
        length: the number T of the model's tokens.

    Raises:
        ValueError: more spans of one side than of the other.

    Source: rLLM (trainer/distill/alignment.py), which shares each of the teacher's tokens among those that it overlaps:
    the same sums over spans.
    """
    if len(ref_spans) != len(spans):
        raise ValueError(f"ref_spans: expected as many as spans, {len(spans)}, got {len(ref_spans)}")
    total = _span_sums(ref_logprob, ref_spans)
    size = torch.tensor([len(span) for span in spans], dtype=total.dtype, device=total.device)
    places, index = _places(spans, ref_logprob.device)
    return total.new_zeros(length).index_copy(0, places, (total / size)[index])


def merge_spans(logprob: Tensor, token_logprob: Tensor, spans: Spans) -> Tensor:
    """Log-probabilities of the ids that may end a span, `[S, K]`: those at its last token, and the tokens before it.

    `sum_{i before the last} token_logprob_i + logprob_last`, the chain rule: that of the span's text with the id in its
    last place. Over all ids the probabilities sum to that of the tokens before the last. Differentiable.

    Args:
        logprob: `[T, K]`, log-probabilities of K ids at each token of one text.
        token_logprob: `[T]`, of the token that stands there.
        spans: one side of `align_spans`.

    Source: TRL (experimental/gold), token_merge_strategy "bayesian". Its default "observed" takes the distribution of
    the first token and multiplies it by the probabilities of the later ones. NeMo-RL averages log-probabilities.
    """
    before = [range(span.start, span.stop - 1) for span in spans]
    last = torch.tensor([span.stop - 1 for span in spans], dtype=torch.int64, device=logprob.device)
    return logprob[last] + _span_sums(token_logprob, before)[:, None]


def universal_logit_distance(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """ULD on the likeliest ids: `sum_k |p_(k) - q_(k)|` over both sides' probabilities in descending order, `[...]`.

    The published loss sorts whole vocabularies and pads the smaller with 0. Here each side gives its K largest alone;
    with `a` and `b` the masses that are left out, the published value U lies above the value L here:

        L + |a - b| <= U <= L + a + b

    So the difference is at most the mass outside of the K, and the gradient lacks the terms of those entries. With both
    vocabularies whole, the smaller padded with -inf, it is the published loss.

    Detached: `ref_logprob`. The order is a constant; where two probabilities of one side are equal, so is the value.
    The slope is 0 where both sides' probabilities agree.

    Args:
        logprob: `[..., K]`, the log-probabilities of the model's K likeliest ids, in any order; -inf for an absent
            place. Differentiable.
        ref_logprob: `[..., K']`, the teacher's. The longer list is cut to the length of the shorter, as NeMo-RL cuts.

    Raises:
        ValueError: leading shapes that differ.

    Source: ULD, arXiv 2402.12030, the authors' code (Nicolas-BZRD/llm-recipes) and TRL (experimental/gold) for whole
    vocabularies; NeMo-RL (x_token, `uncommon_topk`) for the largest alone. The bounds are derived.
    """
    if logprob.shape[:-1] != ref_logprob.shape[:-1]:
        expected = ", ".join([*map(str, logprob.shape[:-1]), "K'"])
        raise ValueError(f"ref_logprob: expected shape [{expected}], got {list(ref_logprob.shape)}")
    shorter = min(logprob.shape[-1], ref_logprob.shape[-1])
    p, q = (x.exp().sort(dim=-1, descending=True).values[..., :shorter] for x in (logprob, ref_logprob.detach()))
    return (p - q.to(p.dtype)).abs().sum(-1)


def shared_ids(vocabulary: Mapping[str, int], ref_vocabulary: Mapping[str, int]) -> Tensor:
    """For each of the teacher's ids the model's id of the same string, -1 where it has none: int64 `[V']`.

    `shared_ids(tokenizer.get_vocab(), teacher.get_vocab())[ref_ids]` are the teacher's likeliest ids among the model's.
    GOLD compares these directly, by GKD's divergence, and the rest by ULD; TRL weights the two parts by the shares of
    ids that are in both vocabularies and of those that are not, by default.

    Source: TRL (experimental/gold), `uld_use_hybrid_loss`. Tokenizers must write their strings alike: a byte-level one
    and one with "▁" for spaces share few.
    """
    shared = torch.full((max(ref_vocabulary.values(), default=-1) + 1,), -1, dtype=torch.int64)
    for string, ref_id in ref_vocabulary.items():
        shared[ref_id] = vocabulary.get(string, -1)
    return shared


def _places(spans: Spans, device: torch.device) -> tuple[Tensor, Tensor]:
    """The places of all tokens in spans, and the number of each one's span."""
    pairs = [(place, index) for index, span in enumerate(spans) for place in span]
    places, index = torch.tensor(pairs, dtype=torch.int64, device=device).reshape(-1, 2).unbind(1)
    return places, index


def _span_sums(values: Tensor, spans: Spans) -> Tensor:
    """The sum over each span of `[T]` values, `[S]`."""
    places, index = _places(spans, values.device)
    return values.new_zeros(len(spans)).index_add(0, index, values[places])
