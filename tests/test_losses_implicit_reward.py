"""The implicit reward: Q - V against the logits themselves, telescoping returns, endogenous rewards, errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitless import linear_logprobs
from logitless.losses import FDivergenceSFT, centred_advantage, dense_rewards
from logitless.types import TokenStats

F64 = torch.float64


def text(*shape: int, seed: int, vocabulary: int = 6) -> tuple[TokenStats, Tensor, Tensor]:
    """Statistics of random logits, the logits, and the tokens (the same for every seed)."""
    logits = 3 * torch.randn(*shape, vocabulary, dtype=F64, generator=torch.Generator().manual_seed(seed))
    targets = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    lse = logits.logsumexp(-1)
    return TokenStats(logits.gather(-1, targets[..., None])[..., 0] - lse, lse), logits, targets


def picked(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(-1, targets[..., None])[..., 0]


def test_q_and_v_are_what_the_logits_say() -> None:
    """Q = beta (logit - ref_logit), V = beta log sum_a ref(a) exp(Q(a) / beta) at the reference's own normalisation."""
    stats, logits, targets = text(2, 5, seed=1)
    ref_stats, ref_logits, _ = text(2, 5, seed=2)
    found = dense_rewards(stats, ref_stats, beta=0.3)
    q = 0.3 * (logits - ref_logits)
    v = 0.3 * (ref_logits.log_softmax(-1) + q / 0.3).logsumexp(-1)
    torch.testing.assert_close(found.q, picked(q, targets))
    torch.testing.assert_close(found.value, v)
    torch.testing.assert_close(found.log_odds, found.q - found.value)
    torch.testing.assert_close(found.log_odds, 0.3 * (stats.logprob - ref_stats.logprob))
    torch.testing.assert_close(found.reward[:, :-1], (found.q - v.roll(-1, 1))[:, :-1])
    torch.testing.assert_close(found.reward[:, -1], found.q[:, -1])


def test_the_endogenous_reward_is_the_logit_less_the_next_lse() -> None:
    stats, logits, targets = text(7, seed=3)
    found = dense_rewards(stats)
    following = torch.cat([logits.logsumexp(-1)[1:], torch.zeros(1, dtype=F64)])
    torch.testing.assert_close(found.reward, picked(logits, targets) - following)
    assert stats.logprob is not None and stats.lse is not None
    torch.testing.assert_close(found.returns[0], stats.logprob.sum() + stats.lse[0])


def test_by_hand() -> None:
    """log-odds (1, 2, -1), values (0.5, -0.5, 3), beta 2."""
    stats, ref_stats = (
        TokenStats(*torch.tensor([[0.0, 1, -2], [1.5, 0.5, 4]])),
        TokenStats(*torch.tensor([[-1.0, -1, -1], [1, 1, 1]])),
    )
    found = dense_rewards(stats, ref_stats, beta=2.0, discount=0.5)
    assert found.log_odds.tolist() == [2, 4, -2]
    assert found.value.tolist() == [1, -1, 6]
    assert found.q.tolist() == [3, 3, 4]
    assert found.reward.tolist() == [4, -3, 4]
    assert found.returns.tolist() == [3.5, -1, 4]


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 5), min_size=1, max_size=5), st.floats(0.01, 5))
def test_returns_telescope_in_every_text(seed: int, lengths: list[int], beta: float) -> None:
    """sum_{k >= t} r_k = beta sum_{k >= t} rho_k + V_t over a text's counted tokens, however texts are laid out."""
    tokens = sum(lengths)
    stats, ref_stats = (text(tokens, seed=seed + i)[0] for i in range(2))
    mask = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.7
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    found = dense_rewards(stats, ref_stats, beta=beta, mask=mask, sequence=sequence)
    assert stats.logprob is not None and ref_stats.logprob is not None
    assert stats.lse is not None and ref_stats.lse is not None
    for number in range(len(lengths)):
        here = mask & (sequence == number)
        rho, value = (stats.logprob - ref_stats.logprob)[here], beta * (stats.lse - ref_stats.lse)[here]
        expected = beta * rho.flip(0).cumsum(0).flip(0) + value
        torch.testing.assert_close(found.returns[here], expected)
    assert all(x[~mask].eq(0).all() for x in found)


def test_the_reward_is_that_of_f_divergence_sft_with_the_lse_as_value() -> None:
    """FDivergenceSFT's x_t is r_t. With beta 1 the loss of the linear phi is minus the sum of rewards plus V_0."""
    stats, ref_stats = (text(3, 6, seed=i)[0] for i in (4, 5))
    loss = FDivergenceSFT(divergence="reverse_kl", beta=0.2, value="lse")
    found = dense_rewards(stats, ref_stats, beta=0.2)
    per_token = loss(stats, ref_stats.logprob, ref_stats.lse)
    expected = -loss.row.value(found.reward) / 0.2
    expected[:, 0] += found.value[:, 0] / 0.2
    torch.testing.assert_close(per_token, expected)


def test_padding_and_layout_do_not_matter() -> None:
    stats, ref_stats = (text(2, 5, seed=i)[0] for i in (6, 7))
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 1]]).bool()
    poisoned = [
        TokenStats(*(None if x is None else x.masked_fill(~mask, math.nan) for x in s)) for s in (stats, ref_stats)
    ]
    rows = dense_rewards(*poisoned, mask=mask)
    sequence = torch.tensor([0] * 5 + [1] * 5)
    flat = [TokenStats(*(None if x is None else x.flatten() for x in s)) for s in (stats, ref_stats)]
    for one, two in zip(rows, dense_rewards(*flat, mask=mask.flatten(), sequence=sequence), strict=True):
        torch.testing.assert_close(one.flatten(), two)
        assert one[~mask].eq(0).all()


def test_centred_advantages_have_mean_zero_under_the_model() -> None:
    _, logits, _ = text(4, seed=8)
    _, ref_logits, _ = text(4, seed=9)
    log_p, log_ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    kl, entropy = (log_p.exp() * (log_p - log_ref)).sum(-1), -(log_p.exp() * log_p).sum(-1)
    by_token = [
        (
            centred_advantage(log_p[:, v], log_ref[:, v], kl=kl),
            centred_advantage(log_p[:, v], entropy=entropy),
        )
        for v in range(6)
    ]
    for kind in range(2):
        mean = sum(log_p[:, v].exp() * by_token[v][kind] for v in range(6))
        torch.testing.assert_close(mean, torch.zeros(4, dtype=F64))


def test_constants_of_the_statistics_dtype_from_a_head() -> None:
    hidden = torch.randn(3, 4, 8, requires_grad=True)
    weight, ref_weight = torch.randn(11, 8), torch.randn(11, 8)
    targets = torch.randint(11, (3, 4))
    outputs = ("logprob", "lse")
    stats, ref_stats = (linear_logprobs(hidden, w, targets, outputs=outputs) for w in (weight, ref_weight))
    found = dense_rewards(stats, ref_stats)
    assert all(x.dtype == torch.float32 and not x.requires_grad and x.shape == (3, 4) for x in found)
    gap = picked((hidden @ weight.T) - (hidden @ ref_weight.T), targets).detach()
    torch.testing.assert_close(found.q, gap, rtol=1e-4, atol=1e-4)
    assert not centred_advantage(stats.logprob, entropy=stats.logprob).requires_grad


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_texts_of_nothing(shape: tuple[int, ...]) -> None:
    empty = torch.zeros(shape)
    assert all(x.shape == shape for x in dense_rewards(TokenStats(empty, empty), TokenStats(empty, empty)))


def test_extreme_values_stay_finite() -> None:
    logprob = torch.tensor([-1e4, 0.0, -1e4, 0.0])
    stats, ref_stats = TokenStats(logprob, torch.full((4,), 80.0)), TokenStats(logprob.flip(0), torch.full((4,), -80.0))
    assert all(x.isfinite().all() for x in dense_rewards(stats, ref_stats, beta=10.0))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"beta": 0.0}, "beta: expected a positive number, got 0.0"),
        ({"beta": math.inf}, "beta"),
        ({"discount": 1.5}, r"discount: expected a number in \[0, 1\], got 1.5"),
        ({"stats": TokenStats(torch.zeros(3))}, "stats: needs lse"),
        ({"ref_stats": TokenStats(torch.zeros(3))}, "ref_stats: needs lse"),
        (
            {"ref_stats": TokenStats(torch.zeros(2), torch.zeros(2))},
            r"ref_stats.logprob: expected shape \[3\], got \[2\]",
        ),
        ({"mask": torch.ones(2, dtype=torch.bool)}, r"mask: expected shape \[3\]"),
        ({"mask": torch.ones(3)}, "mask: expected torch.bool"),
        ({"sequence": torch.zeros(3)}, "sequence: expected torch.int64"),
    ],
)
def test_errors(arguments: dict[str, object], words: str) -> None:
    known = {"stats": TokenStats(torch.zeros(3), torch.zeros(3))} | arguments
    with pytest.raises(ValueError, match=words):
        dense_rewards(**known)


def test_centred_advantage_errors() -> None:
    x = torch.zeros(3)
    for inputs in (
        {},
        {"ref_logprob": x},
        {"kl": x},
        {"ref_logprob": x, "kl": x, "entropy": x},
        {"kl": x, "entropy": x},
    ):
        with pytest.raises(ValueError, match="either ref_logprob and kl, or entropy alone"):
            centred_advantage(x, **inputs)
    with pytest.raises(ValueError, match="entropy: expected shape"):
        centred_advantage(x, entropy=x[:1])
