"""Advantages and the sums over sequences they are made of, against plain loops."""

from __future__ import annotations

import math
import statistics
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from logitless.losses import (
    best_of_group_advantages,
    discounted_sum,
    gdpo_advantages,
    generalized_advantages,
    gpg_advantages,
    group_advantages,
    length_adaptive_lambda,
    opo_advantages,
    pass_at_k_advantages,
    prefix_rft_advantages,
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    remax_advantages,
    rloo_advantages,
    token_rewards,
    whiten,
)
from logitless.losses.sequences import Sequences

rewards_and_groups = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.7, 1.0]), st.integers(0, 3)), max_size=12)


def split(samples: list[tuple[float, int]]) -> tuple[Tensor, Tensor]:
    return torch.tensor([r for r, _ in samples], dtype=torch.float64), torch.tensor([g for _, g in samples]).long()


@given(rewards_and_groups, st.sampled_from(["group", "batch", "none"]))
def test_group_advantages(samples: list[tuple[float, int]], scale: str) -> None:
    rewards, group = split(samples)
    got = group_advantages(rewards, group * 7 - 3, scale=scale, epsilon=1e-3).tolist()
    for (reward, g), value in zip(samples, got, strict=True):
        own = [r for r, other in samples if other == g]
        everyone = own if scale == "group" else [r for r, _ in samples]
        deviation = statistics.stdev(everyone) if len(everyone) > 1 else 0.0
        expected = reward - statistics.fmean(own)
        assert value == pytest.approx(expected if scale == "none" else expected / (deviation + 1e-3), abs=1e-9)
        if len(set(own)) == 1:
            assert value == 0, "exactly: a group of one, or of equal rewards"


@given(rewards_and_groups)
def test_rloo_advantages_leave_one_out(samples: list[tuple[float, int]]) -> None:
    rewards, group = split(samples)
    got = rloo_advantages(rewards, group).tolist()
    for i, (reward, g) in enumerate(samples):
        others = [r for j, (r, other) in enumerate(samples) if other == g and j != i]
        assert got[i] == pytest.approx(reward - statistics.fmean(others) if others else 0.0, abs=1e-12)


def groups_of(samples: list[tuple[float, int]]) -> list[list[int]]:
    return [[i for i, (_, g) in enumerate(samples) if g == which] for which in sorted({g for _, g in samples})]


@given(rewards_and_groups, st.lists(st.integers(0, 9), min_size=12, max_size=12))
def test_opo_advantages_subtract_a_mean_weighted_by_length(samples: list[tuple[float, int]], drawn: list[int]) -> None:
    rewards, group = split(samples)
    lengths = torch.tensor(drawn[: len(samples)])
    got = opo_advantages(rewards, group, lengths).tolist()
    for places in groups_of(samples):
        total = sum(drawn[i] for i in places)
        baseline = (
            sum(drawn[i] * samples[i][0] for i in places) / total if total else min(samples[i][0] for i in places)
        )
        for i in places:
            assert got[i] == pytest.approx(samples[i][0] - baseline, abs=1e-12)
            if len({samples[j][0] for j in places}) == 1:
                assert got[i] == 0


@given(rewards_and_groups)
def test_gpg_advantages_make_up_for_groups_without_signal(samples: list[tuple[float, int]]) -> None:
    rewards, group = split(samples)
    got = gpg_advantages(rewards, group).tolist()
    informative = sum(len(places) for places in groups_of(samples) if len({samples[i][0] for i in places}) > 1)
    for places in groups_of(samples):
        mean = statistics.fmean(samples[i][0] for i in places)
        for i in places:
            alpha = len(samples) / informative if informative else 1.0
            assert got[i] == pytest.approx(alpha * (samples[i][0] - mean), abs=1e-9)


@given(st.integers(1, 6), st.integers(0, 3), st.integers(0, 2**6), st.integers(0, 2**3))
def test_pass_at_k_is_the_mean_over_all_teams(size: int, more: int, right: int, other: int) -> None:
    """By enumeration of every team of k, for a group of `size` and one of `size + more`."""
    answers = [[float(right >> i & 1) for i in range(size)], [float(other >> i & 1) for i in range(size + more)]]
    rewards = torch.tensor([*answers[0], *answers[1]], dtype=torch.float64)
    group = torch.tensor([7] * size + [3] * (size + more))
    for k in range(1, size + 1):
        got = pass_at_k_advantages(rewards, group, k, epsilon=0.01).split([size, size + more])
        for found, own in zip(got, answers, strict=True):
            teams = [(team, max(own[i] for i in team)) for team in combinations(range(len(own)), k)]
            mean = statistics.fmean(reward for _, reward in teams)
            deviation = statistics.pstdev(reward for _, reward in teams)
            expected = [
                (statistics.fmean(reward for team, reward in teams if i in team) - mean) / (deviation + 0.01)
                for i in range(len(own))
            ]
            assert found.tolist() == pytest.approx(expected, abs=1e-9)
            assert found.sum().item() == pytest.approx(0, abs=1e-9)
            if deviation == 0:
                assert (found == 0).all()


def test_pass_at_one_is_grpo_with_the_biased_deviation() -> None:
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 0, 1, 1], dtype=torch.float64)
    rows = rewards.reshape(2, 4)
    expected = (rows - rows.mean(1, keepdim=True)) / rows.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(pass_at_k_advantages(rewards, 4, 1, epsilon=0.0), expected.flatten())


@given(rewards_and_groups, st.sampled_from(["group", "none"]))
def test_the_best_of_a_group_gets_what_the_group_would_lose(samples: list[tuple[float, int]], scale: str) -> None:
    rewards, group = split(samples)
    got = best_of_group_advantages(rewards, group, scale=scale, epsilon=0.1).tolist()
    for places in groups_of(samples):
        own = [samples[i][0] for i in places]
        for i in places:
            others = [samples[j][0] for j in places if j != i]
            expected = max(own) - max(others) if others else 0.0
            if others and scale == "group":
                expected /= statistics.stdev(own) + 0.1
            assert got[i] == pytest.approx(expected, abs=1e-9)


def test_gdpo_advantages_are_trl_s() -> None:
    """Normalised per reward and group, weighted, summed, normalised over the batch."""
    rewards = torch.rand(12, 3, dtype=torch.float64) * torch.tensor([1.0, 100.0, 0.01])
    grouped = rewards.reshape(3, 4, 3)
    each = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    total = (each.reshape(12, 3) * torch.tensor([1.0, 0.5, 2.0])).sum(1)
    expected = (total - total.mean()) / (total.std() + 1e-4)
    torch.testing.assert_close(gdpo_advantages(rewards, 4, weights=[1.0, 0.5, 2.0]), expected)
    assert (gdpo_advantages(torch.ones(6, 2), 3) == 0).all() and gdpo_advantages(torch.ones(0, 2), 3).shape == (0,)
    assert gdpo_advantages(torch.tensor([[1.0, 2.0]]), 1).tolist() == [0]


def test_remax_advantages() -> None:
    got = remax_advantages(torch.tensor([1.0, 0.0], requires_grad=True), torch.tensor([0.5, 0.5]))
    assert got.tolist() == [0.5, -0.5] and not got.requires_grad


def test_token_rewards_stand_on_the_last_token() -> None:
    mask = torch.tensor([[False, True, True, False], [True, True, True, True], [False] * 4])
    rewards, kl = torch.tensor([2.0, 3.0, 5.0]), torch.full((3, 4), 0.5)
    kl[0, 0] = math.nan
    got = token_rewards(rewards, mask)
    assert got.tolist() == [[0, 0, 2, 0], [0, 0, 0, 3], [0] * 4]
    less = token_rewards(rewards, mask, kl=kl, beta=0.1)
    torch.testing.assert_close(less, got - 0.05 * mask)
    flat = token_rewards(rewards, mask.flatten(), sequence=torch.arange(3).repeat_interleave(4))
    assert torch.equal(flat, got.flatten())
    assert not token_rewards(rewards.requires_grad_(), mask).requires_grad


def whitened(values: list[float]) -> list[float]:
    mean = statistics.fmean(values)
    deviation = math.sqrt(statistics.variance(values) + 1e-8)
    return [(x - mean) / deviation for x in values]


def test_reinforce_plus_plus_whitens_returns_over_tokens() -> None:
    mask = torch.tensor([[True, True, True], [True, False, True]])
    rewards = torch.tensor([[0.0, -0.1, 1.0], [0.2, 9.0, 0.5]], dtype=torch.float64)
    got = reinforce_plus_plus_advantages(rewards, gamma=0.9, mask=mask)
    returns = [0.9 * (-0.1 + 0.9), -0.1 + 0.9, 1.0, 0.2 + 0.9 * 0.5, 0.5]
    assert got[mask].tolist() == pytest.approx(whitened(returns)) and got[1, 1] == 0


def test_reinforce_plus_plus_with_a_baseline_whitens_over_tokens() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False], [False, False, True]])
    rewards = torch.tensor([1.0, 0.0, 0.25, 0.75], dtype=torch.float64)
    got = reinforce_plus_plus_baseline_advantages(rewards, 2, mask)
    expected = whitened([0.5, 0.5, 0.5, -0.5, -0.25, -0.25, 0.25])
    assert got[mask].tolist() == pytest.approx(expected) and (got[~mask] == 0).all()
    sequence = torch.arange(4).repeat_interleave(3)
    flat = reinforce_plus_plus_baseline_advantages(rewards, 2, mask.flatten(), sequence=sequence)
    torch.testing.assert_close(flat, got.flatten())
    assert reinforce_plus_plus_baseline_advantages(rewards.bfloat16(), 2, mask).dtype == torch.float32


def test_a_lambda_of_each_sequence_s_length() -> None:
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    lam = length_adaptive_lambda(mask, alpha=0.5)
    torch.testing.assert_close(lam, torch.tensor([1 - 1 / 2.5, 1 - 1 / 1.5])[:, None].expand(2, 5))
    assert (length_adaptive_lambda(mask, alpha=0.1) == 0).all()
    rewards, values = torch.rand(2, 5), torch.rand(2, 5)
    got = generalized_advantages(rewards, values, lam=lam, mask=mask)
    for row in (0, 1):
        alone = generalized_advantages(rewards[row : row + 1], values[row : row + 1], lam=lam[row, 0].item(),
                                       mask=mask[row : row + 1])  # fmt: skip
        torch.testing.assert_close(got.advantages[row : row + 1], alone.advantages)
        torch.testing.assert_close(got.returns[row : row + 1], alone.returns)


def test_groups_by_size_dtypes_and_detachment() -> None:
    rewards = torch.tensor([1.0, 2.0, 5.0, 5.0], dtype=torch.bfloat16)
    got = group_advantages(rewards, 2, scale="none")
    assert got.tolist() == [-0.5, 0.5, 0, 0] and got.dtype == torch.float32
    leaf = torch.rand(4, requires_grad=True)
    assert not group_advantages(leaf, 2).requires_grad and not rloo_advantages(leaf, 2).requires_grad
    tenth = torch.full((3,), 0.1)
    assert (group_advantages(tenth, 3) == 0).all() and (group_advantages(tenth, 3, scale="batch") == 0).all()
    assert group_advantages(torch.zeros(0), 4).shape == (0,)


def test_group_advantages_are_trl_s() -> None:
    """`(R - mean) / (std + 1e-4)` with the unbiased deviation, groups behind one another."""
    rewards = torch.rand(3, 8, dtype=torch.float64)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards.flatten(), 8), expected.flatten())
    batch = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std() + 1e-4)
    torch.testing.assert_close(group_advantages(rewards.flatten(), 8, scale="batch"), batch.flatten())


tokens = st.lists(
    st.tuples(st.floats(-2, 2), st.booleans(), st.booleans(), st.floats(-2, 2)), min_size=1, max_size=13
)  # value, counts, begins a sequence, another value


def loop(samples: list[tuple[float, bool, bool, float]]) -> list[list[int]]:
    """The counted tokens of each sequence, in order."""
    found: list[list[int]] = [[]]
    for i, (_, counts, begins, _) in enumerate(samples):
        if begins:
            found.append([])
        if counts:
            found[-1].append(i)
    return found


def tensors(samples: list[tuple[float, bool, bool, float]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values, mask, begins, other = zip(*samples, strict=True)
    sequence = torch.tensor(begins).cumsum(0) * 2 + 1
    return torch.tensor(values, dtype=torch.float64), torch.tensor(mask), sequence, torch.tensor(other).double()


@given(tokens, st.sampled_from([1.0, 0.9, 0.0]))
def test_sums_and_scans_over_packed_sequences(samples: list[Any], factor: float) -> None:
    values, mask, sequence, _ = tensors(samples)
    sequences = Sequences(mask, sequence)
    total, following, most = sequences.sum(values), sequences.following(values), sequences.max(values)
    discounted = sequences.discounted(values, factor)
    torch.testing.assert_close(discounted_sum(values, factor, mask=mask, sequence=sequence), discounted)
    for places in loop(samples):
        for k, i in enumerate(places):
            rest = places[k:]
            assert total[i].item() == pytest.approx(sum(samples[j][0] for j in places))
            expected = sum(samples[j][0] * factor**n for n, j in enumerate(rest))
            assert discounted[i].item() == pytest.approx(expected, abs=1e-12)
            assert following[i].item() == pytest.approx(samples[rest[1]][0] if len(rest) > 1 else 0.0)
            assert sequences.first()[i].item() == (k == 0)
            assert most[i] == max(samples[j][0] for j in places)
    assert (discounted[~mask] == 0).all()


@given(st.integers(1, 4), st.integers(0, 9), st.integers(0, 2**16))
def test_rows_and_packed_sequences_agree(rows: int, length: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, length, generator=draw, dtype=torch.float64)
    mask = torch.rand(rows, length, generator=draw) < 0.7
    sequence = torch.arange(rows)[:, None].expand(rows, length)
    padded, packed = Sequences(mask), Sequences(mask.flatten(), sequence.flatten())
    for name, arguments in (("sum", ()), ("mean", ()), ("max", ()), ("discounted", (0.8,)), ("following", ())):
        one = getattr(padded, name)(values, *arguments)
        two = getattr(packed, name)(values.flatten(), *arguments)
        counted = mask if name == "following" else torch.ones_like(mask)
        torch.testing.assert_close(one[counted], two.reshape(rows, length)[counted])


@given(tokens)
def test_generalized_advantages(samples: list[Any]) -> None:
    rewards, mask, sequence, values = tensors(samples)
    got = generalized_advantages(rewards, values, gamma=0.9, lam=0.8, mask=mask, sequence=sequence)
    for places in loop(samples):
        advantage, after = 0.0, 0.0
        for i in reversed(places):
            delta = rewards[i].item() + 0.9 * after - values[i].item()
            advantage, after = delta + 0.72 * advantage, values[i].item()
            assert got.advantages[i].item() == pytest.approx(advantage, abs=1e-12)
            assert got.returns[i].item() == pytest.approx(advantage + values[i].item(), abs=1e-12)
    assert (got.advantages[~mask] == 0).all() and (got.returns[~mask] == 0).all()


def test_generalized_advantages_at_lambda_one_are_returns_minus_values() -> None:
    rewards, values = torch.rand(2, 5), torch.rand(2, 5)
    got = generalized_advantages(rewards, values, lam=1.0)
    torch.testing.assert_close(got.returns, rewards.flip(-1).cumsum(-1).flip(-1))
    assert got.advantages.dtype == torch.float32


def test_long_scans_keep_their_digits() -> None:
    values = torch.ones(1, 5000)
    torch.testing.assert_close(discounted_sum(values)[0], torch.arange(5000, 0, -1).float())
    assert discounted_sum(values, 0.99)[0, 0].item() == pytest.approx(100, rel=1e-5)


def test_whiten() -> None:
    values, mask = torch.tensor([1.0, 2.0, 4.0, math.nan]), torch.tensor([True, True, True, False])
    got = whiten(values, mask)
    expected = (values[:3] - values[:3].mean()) / values[:3].std()
    torch.testing.assert_close(got[:3], expected)
    assert got[3] == 0 and whiten(torch.ones(3)).tolist() == [0, 0, 0] and whiten(torch.ones(1)).tolist() == [0]


def test_prefix_rft_advantages_by_hand() -> None:
    """Prompt 0: three free samples and one that continues a prefix; prompt 1: two free, two of one prefix."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.8, 0.5, 0.5, 1.0, 0.0], dtype=torch.float64)
    prompt = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    prefix = torch.tensor([-1, -1, -1, 4, -1, -1, 9, 9])
    got = prefix_rft_advantages(rewards, prompt, prefix)
    third = 1 / 3
    assert got.continuation.tolist() == pytest.approx([1 - third, -third, -third, 0.8, 0, 0, 0.5, -0.5])
    assert got.prefix.tolist() == pytest.approx([0, 0, 0, 0.8 - third, 0, 0, 0.0, (-0.5 - 0.5) / 2])
    scaled = prefix_rft_advantages(rewards, 4, prefix, scale="group", epsilon=0.0)
    deviation = statistics.stdev([1.0, 0.0, 0.0])
    assert scaled.continuation[:4].tolist() == pytest.approx([(1 - third) / deviation, *[-third / deviation] * 2, 0.8])
    assert scaled.continuation[6].item() == pytest.approx(0.5 / statistics.stdev([1.0, 0.0]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: group_advantages(torch.zeros(2, 2), 2), r"rewards.*\[2, 2\]"),
        (lambda: group_advantages(torch.zeros(4, dtype=torch.int64), 2), "rewards"),
        (lambda: group_advantages([1.0, 2.0], 2), "rewards.*list"),
        (lambda: group_advantages(torch.zeros(4), 3), "a size that divides the 4 rewards, got 3"),
        (lambda: group_advantages(torch.zeros(4), torch.zeros(3).long()), r"group: expected int64 of shape \[4\]"),
        (lambda: group_advantages(torch.zeros(4), torch.zeros(4)), "group: expected int64"),
        (lambda: group_advantages(torch.zeros(4), 2, scale="std"), "scale"),
        (lambda: prefix_rft_advantages(torch.zeros(2), 2, torch.zeros(2)), "prefix"),
        (lambda: prefix_rft_advantages(torch.zeros(2), 2, torch.zeros(2).long(), scale="batch"), "scale"),
        (lambda: generalized_advantages(torch.zeros(2, 3), torch.zeros(2)), "values"),
        (lambda: generalized_advantages(torch.zeros(2, 3), torch.zeros(2, 3), lam=torch.zeros(2)), "lam"),
        (lambda: length_adaptive_lambda(torch.ones(2, 3).bool(), alpha=0.0), "alpha"),
        (lambda: opo_advantages(torch.zeros(4), 2, torch.zeros(2)), "lengths"),
        (lambda: remax_advantages(torch.zeros(4), torch.zeros(2)), "greedy_rewards"),
        (lambda: gdpo_advantages(torch.zeros(4), 2), r"rewards: expected a tensor \[S, K\], got \[4\]"),
        (lambda: gdpo_advantages([[1.0, 0.0]], 1), "got list"),
        (lambda: gdpo_advantages(torch.zeros(4, 2), 2, weights=[1.0]), "weights: expected 2 numbers"),
        (lambda: pass_at_k_advantages(torch.tensor([0.0, 0.5]), 2, 1), "0 or 1"),
        (lambda: pass_at_k_advantages(torch.zeros(4), 2, 3), "k: .*size of every group, got 3"),
        (lambda: pass_at_k_advantages(torch.zeros(4), 2, 0), "k: .*positive int"),
        (lambda: best_of_group_advantages(torch.zeros(4), 2, scale="batch"), "scale"),
        (lambda: token_rewards(torch.zeros(2), torch.ones(2, 3).bool(), beta=0.1), "kl absent"),
        (lambda: token_rewards(torch.zeros(2), torch.ones(2, 3).bool(), kl=torch.zeros(2, 3)), "kl given"),
        (lambda: token_rewards(torch.zeros(2), torch.ones(2, 3).bool(), kl=torch.zeros(2), beta=1.0), "kl: expected"),
        (lambda: token_rewards(torch.zeros(3), torch.ones(2, 3).bool()), r"rewards: .*got \[3\]"),
        (lambda: token_rewards(torch.zeros(3), torch.ones(3).bool()), "flat mask and sequence"),
        (lambda: discounted_sum(torch.zeros(2, 3), mask=torch.ones(2, 3)), "mask"),
        (lambda: discounted_sum(torch.zeros(3), sequence=torch.zeros(3)), "sequence"),
    ],
)
def test_bad_values(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
