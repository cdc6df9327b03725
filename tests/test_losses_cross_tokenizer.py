"""Distillation across tokenizers: spans, what models say about them, sorted probabilities, against texts and peers."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from logitless import linear_logprobs, linear_loss, losses

# ---------------------------------------------------------------------------------------------------------------------
# Spans


def pieces(text: bytes, cuts: list[int]) -> list[bytes]:
    """The text, cut at those places."""
    places = [0, *sorted(cuts), len(text)]
    return [text[a:b] for a, b in pairwise(places)]


def ends(tokens: list[bytes]) -> list[int]:
    return list(accumulate(map(len, tokens)))


TEXT = "naïve café, 東京!".encode()
cuts = st.lists(st.integers(0, len(TEXT)), max_size=12, unique=True)


@given(cuts, cuts)
def test_spans_are_the_same_text_and_no_shorter_ones_are(here, there):
    tokens, ref_tokens = (pieces(TEXT, [c for c in x if 0 < c < len(TEXT)]) for x in (here, there))
    spans, ref_spans = losses.align_spans(ends(tokens), ends(ref_tokens))
    assert len(spans) == len(ref_spans)
    common = sorted(set(ends(tokens)) & set(ends(ref_tokens)))
    for side, cut in ((spans, tokens), (ref_spans, ref_tokens)):
        assert [place for span in side for place in span] == list(range(len(cut)))
        assert [len(b"".join(cut[: span.stop])) for span in side] == common


def test_end_markers_and_what_only_one_side_has():
    assert losses.align_spans([3, 5, 5], [2, 5, 5]) == ([range(2), range(2, 3)], [range(2), range(2, 3)])
    assert losses.align_spans([3, 5, 5], [5]) == ([range(2)], [range(1)])
    assert losses.align_spans([3, 6], [3, 5]) == ([range(1)], [range(1)])
    assert losses.align_spans([], [4]) == ([], [])
    with pytest.raises(ValueError, match=r"ref_ends: expected places that do not decrease, got \[3, 2\]"):
        losses.align_spans([3], [3, 2])


@given(cuts, cuts)
def test_spans_of_trl(here, there):
    gold = pytest.importorskip("trl.experimental.gold.gold_trainer")
    mine, other = (ends(pieces(TEXT, [c for c in x if 0 < c < len(TEXT)])) for x in (here, there))
    theirs = gold.ULDLoss._align_by_byte_offsets([(0, end) for end in mine], [(0, end) for end in other])
    assert [[list(span) for span in side] for side in losses.align_spans(mine, other)] == [*theirs]


# ---------------------------------------------------------------------------------------------------------------------
# What a model says about a span


SPANS, REF_SPANS = [range(2), range(2, 3), range(3, 6)], [range(1), range(1, 4), range(4, 5)]


def test_the_teachers_log_probs_are_shared_within_spans():
    ref = torch.randn(6, dtype=torch.float64)  # the last of them is in no span
    found = losses.share_spans(ref, REF_SPANS, SPANS, 7)
    first, second, third = ref[0], ref[1:4].sum(), ref[4]
    expected = [first / 2, first / 2, second, third / 3, third / 3, third / 3, torch.zeros(())]
    torch.testing.assert_close(found, torch.stack([x.double() for x in expected]))
    assert not losses.share_spans(ref, [], [], 2).any()
    with pytest.raises(ValueError, match="ref_spans: expected as many as spans, 3, got 2"):
        losses.share_spans(ref, REF_SPANS[:2], SPANS, 7)


def test_a_merged_distribution_has_the_probabilities_of_texts():
    """Over all texts of three tokens, the merged distributions sum to what the chain rule says."""
    draw = torch.Generator().manual_seed(0)
    states = {
        prefix: torch.randn(3, generator=draw, dtype=torch.float64).log_softmax(-1)
        for n in range(3)
        for prefix in product(range(3), repeat=n)
    }
    total = 0.0
    for text in product(range(3), repeat=3):
        table = torch.stack([states[text[:n]] for n in range(3)])
        own = table[torch.arange(3), torch.tensor(text)]
        merged = losses.merge_spans(table, own, [range(3)])
        torch.testing.assert_close(merged[0, text[-1]], own.sum())
        torch.testing.assert_close(merged[0].exp().sum(), own[:2].sum().exp())
        total += merged[0, text[-1]].exp().item()
    assert total == pytest.approx(1.0)


def test_merging_one_token_changes_nothing_and_gradcheck():
    table, own = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(losses.merge_spans(table, own, [range(i, i + 1) for i in range(6)]), table)
    inputs = (table.requires_grad_(), own.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: losses.merge_spans(a, b, SPANS), inputs)
    assert losses.merge_spans(table, own, []).shape == (0, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Sorted probabilities


def published(p: Tensor, q: Tensor) -> Tensor:
    """The loss of arXiv 2402.12030: whole vocabularies, sorted, the smaller padded with 0."""
    size = max(p.shape[-1], q.shape[-1])
    p, q = (torch.nn.functional.pad(x.sort(descending=True).values, (0, size - x.shape[-1])) for x in (p, q))
    return (p - q).abs().sum(-1)


def distributions(*sizes: int, seed: int = 0, spread: float = 2.0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [(spread * torch.randn(2, 3, n, generator=draw, dtype=torch.float64)).log_softmax(-1) for n in sizes]


def test_it_is_the_published_loss_of_whole_vocabularies():
    log_p, log_q = distributions(9, 13)
    padded = torch.nn.functional.pad(log_p, (0, 4), value=-math.inf).requires_grad_()
    found = losses.universal_logit_distance(padded, log_q)
    torch.testing.assert_close(found, published(log_p.exp(), log_q.exp()))
    (gradient,) = torch.autograd.grad(found.sum(), padded)
    assert gradient.isfinite().all() and not gradient[..., 9:].any()


@given(st.integers(1, 12), st.integers(0, 10**6), st.sampled_from([0.1, 2.0, 8.0]))
def test_what_is_left_out_bounds_the_difference(kept, seed, spread):
    log_p, log_q = distributions(13, 13, seed=seed, spread=spread)
    top, ref_top = (x.topk(kept).values for x in (log_p, log_q))
    short, whole = losses.universal_logit_distance(top, ref_top), published(log_p.exp(), log_q.exp())
    a, b = (1 - x.exp().sum(-1) for x in (top, ref_top))
    assert (short + (a - b).abs() <= whole + 1e-12).all() and (whole <= short + a + b + 1e-12).all()


def test_gradcheck_order_and_lengths_of_sorted_probabilities():
    log_p, log_q = distributions(6, 8)
    leaf = log_p.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: losses.universal_logit_distance(x, log_q), leaf)
    found = losses.universal_logit_distance(log_p.flip(-1), log_q)
    torch.testing.assert_close(found, losses.universal_logit_distance(log_p, log_q.topk(6).values))
    with pytest.raises(ValueError, match=r"ref_logprob: expected shape \[2, 3, K'\], got \[1, 3, 8\]"):
        losses.universal_logit_distance(log_p, log_q[:1])


def test_the_teacher_is_a_constant_and_equal_probabilities_have_no_slope():
    log_p, log_q = (x.requires_grad_() for x in distributions(6, 6))
    losses.universal_logit_distance(log_p, log_q).sum().backward()
    assert log_p.grad is not None and log_q.grad is None
    found = losses.universal_logit_distance(log_p, log_p.flip(-1))
    (gradient,) = torch.autograd.grad(found.sum(), log_p)
    assert not found.any() and not gradient.any()


def test_trl_uld_of_aligned_texts(monkeypatch):
    """The whole way of TRL's extended ULD with its Bayesian merging, over whole vocabularies."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    gold = pytest.importorskip("trl.experimental.gold.gold_trainer")
    loss = object.__new__(gold.ULDLoss)
    loss.token_merge_strategy = "bayesian"
    draw = torch.Generator().manual_seed(0)
    tables = [torch.randn(n, v, generator=draw, dtype=torch.float64).log_softmax(-1) for n, v in ((6, 9), (5, 13))]
    ids = [torch.randint(x.shape[1], (len(x),), generator=draw) for x in tables]
    sides = list(zip(tables, ids, (SPANS, REF_SPANS), strict=True))
    theirs = [loss._merge_probabilities_with_alignment_groups(x.exp(), spans, y.tolist()) for x, y, spans in sides]
    ours = [losses.merge_spans(x, x[torch.arange(len(x)), y], spans) for x, y, spans in sides]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.exp(), b)
    model, teacher = torch.nn.functional.pad(ours[0], (0, 4), value=-math.inf), ours[1]
    torch.testing.assert_close(losses.universal_logit_distance(model, teacher), published(*theirs))


def test_from_hidden_states_without_logits():
    """The likeliest ids' log-probs come from the ops; the gradient is that of the sorted softmax."""
    draw = torch.Generator().manual_seed(4)
    hidden, weight = (torch.randn(n, 5, generator=draw, dtype=torch.float64).requires_grad_() for n in (6, 20))
    ref = torch.randn(3, 30, generator=draw, dtype=torch.float64).log_softmax(-1).topk(4).values
    targets = torch.randint(20, (6,), generator=draw)
    log_p = (hidden @ weight.T).log_softmax(-1)
    own, ids = log_p[torch.arange(6), targets], log_p.topk(4).indices
    expected = losses.universal_logit_distance(losses.merge_spans(log_p.topk(4).values, own, SPANS), ref).mean()
    *top, token = (linear_logprobs(hidden, weight, x).logprob for x in (*ids.T, targets))
    found = losses.universal_logit_distance(losses.merge_spans(torch.stack(top, -1), token, SPANS), ref).mean()
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_on_policy_distillation_from_another_tokenizer():
    """Shared over spans, the teacher's log-probs make the loss of the spans' log-ratios."""
    draw = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, 5, generator=draw, dtype=torch.float64) for n in (6, 20))
    targets, ref = torch.randint(20, (6,), generator=draw), -torch.rand(5, generator=draw, dtype=torch.float64)
    shared = losses.share_spans(ref, REF_SPANS, SPANS, 6)
    found = linear_loss("on_policy_distillation", hidden, weight, targets, ref_logprob=shared, reduction="sum")
    own = (hidden @ weight.T).log_softmax(-1)[torch.arange(6), targets]
    torch.testing.assert_close(found, own.sum() - ref.sum())


# ---------------------------------------------------------------------------------------------------------------------
# Ids


def test_ids_of_the_same_string():
    shared = losses.shared_ids({"a": 0, "b": 1, " the": 7}, {"b": 0, "c": 2, " the": 3})
    assert shared.tolist() == [1, -1, -1, 7] and shared.dtype == torch.int64
    assert losses.shared_ids({"a": 0}, {}).shape == (0,)
