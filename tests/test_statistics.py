"""The area under the ROC curve, intervals and pass@k, against worked values and against counting everything."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from logitless.training.statistics import auc, bootstrap_interval, pass_at_k, weighted_auc, wilson_interval, wins


def counted(score: list[float], label: list[bool], group: list[int]) -> float:
    """All pairs, one by one."""
    items = list(zip(score, label, group, strict=True))
    pairs = [(a, b) for a, x, g in items for b, y, h in items if x and not y and g == h]
    return sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs) if pairs else math.nan


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.integers(-1, 2)), min_size=1, max_size=20))
def test_auc_counts_pairs(items: list[tuple[int, bool, int]]) -> None:
    score, label, group = map(list, zip(*items, strict=True))
    tensors = torch.tensor(score), torch.tensor(label), torch.tensor(group)
    assert auc(*tensors[:2]) == pytest.approx(counted(score, label, [0] * len(items)), nan_ok=True)
    assert auc(*tensors) == pytest.approx(counted(score, label, group), nan_ok=True)


def test_auc_of_a_worked_case() -> None:
    """Positives 3 and 2, negatives 2 and 1: of four pairs three are won and one is a tie."""
    assert auc(torch.tensor([3.0, 2.0, 2.0, 1.0]), torch.tensor([True, True, False, False])) == 3.5 / 4
    assert auc(torch.tensor([float("inf"), -float("inf")]), torch.tensor([True, False])) == 1
    assert math.isnan(auc(torch.tensor([1.0, 2.0]), torch.tensor([True, True])))


@pytest.mark.parametrize(
    ("score", "label", "message"),
    [
        (torch.zeros(2), torch.zeros(3, dtype=torch.bool), r"one shape \[N\], got \[2\], \[3\]"),
        (torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.bool), "one shape"),
        (torch.zeros(2), torch.zeros(2), "label: expected bool, got torch.float32"),
        (torch.tensor([0.0, torch.nan]), torch.tensor([True, False]), "score: .* got NaN"),
    ],
)
def test_auc_refuses_what_it_cannot_rank(score: Tensor, label: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        auc(score, label)
    with pytest.raises(ValueError, match=message):
        weighted_auc(score, label, torch.ones(1, len(score)))


def test_weights_of_other_items_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight: expected shape \[R, 2\], got \[1, 3\]"):
        weighted_auc(torch.zeros(2), torch.tensor([True, False]), torch.ones(1, 3))


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.integers(0, 3)), min_size=1, max_size=12))
def test_weights_are_copies(items: list[tuple[int, bool, int]]) -> None:
    score, label, weight = map(torch.tensor, zip(*items, strict=True))
    copies = torch.arange(len(items)).repeat_interleave(weight)
    expected = [auc(score[copies], label[copies]), auc(score, label)]
    found = weighted_auc(score, label, torch.stack([weight, torch.ones_like(weight)])).tolist()
    assert found == pytest.approx(expected, nan_ok=True)


def test_wins_are_those_of_each_item() -> None:
    score, label = torch.tensor([3.0, 2.0, 2.0, 1.0, 9.0]), torch.tensor([True, True, False, False, False])
    won, met = wins(score, label, torch.tensor([5, 5, 5, 5, -1]))
    assert won.tolist() == [2.0, 1.5, 0, 0, 0] and met.tolist() == [2, 2, 0, 0, 0]


def test_resamples_hold_whole_clusters() -> None:
    cluster, seen = torch.tensor([7, 3, 7, 9, 7]), []

    def look(weight: Tensor) -> Tensor:
        assert (weight[:, [0, 0]] == weight[:, [2, 4]]).all() and (weight[:, [0, 1, 3]].sum(1) == 3).all()
        seen.append(weight[:, [0, 1, 3]])
        return weight[:, 0]

    bootstrap_interval(look, cluster, resamples=3000)
    times = torch.cat(seen)
    # of 9000 draws a third is each cluster's, with a standard deviation of 45; none is left out in 6 of 27 resamples
    assert ((times.sum(0) - 3000).abs() < 180).all()
    assert int((times == 1).all(1).sum()) == pytest.approx(3000 * 6 / 27, abs=100)


def test_the_interval_of_a_mean_is_that_of_its_clusters() -> None:
    """Fifty clusters of twenty equal items are fifty items: the standard error is that of fifty."""
    torch.manual_seed(0)
    means = torch.randn(50, dtype=torch.float64)
    values, cluster = means.repeat_interleave(20), torch.arange(50).repeat_interleave(20)
    low, high = bootstrap_interval(lambda w: w @ values / w.sum(1), cluster, resamples=2000, seed=1)
    width = 2 * 1.96 * float(means.std(correction=0)) / math.sqrt(50)
    assert high - low == pytest.approx(width, rel=0.08)  # a quantile of 2000 draws is off by 2% to 4%
    assert low < float(means.mean()) < high


def test_chunks_change_nothing_but_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def count(weight: Tensor) -> Tensor:
        sizes.append(len(weight))
        return weight[:, 0]

    monkeypatch.setattr("logitless.training.statistics._CHUNK", 21)
    bootstrap_interval(count, torch.arange(3), resamples=25)
    assert sizes == [7, 7, 7, 4]


def test_the_seed_and_the_level_are_the_caller_s() -> None:
    values, cluster = torch.randn(30, dtype=torch.float64), torch.arange(30)

    def interval(**options: float) -> tuple[float, float]:
        return bootstrap_interval(lambda w: w @ values / w.sum(1), cluster, resamples=200, **options)  # type: ignore[arg-type]

    assert interval(seed=1) == interval(seed=1) != interval(seed=2)
    (low, high), (inner_low, inner_high) = interval(level=0.95), interval(level=0.5)
    assert low < inner_low < inner_high < high


def test_resamples_without_a_statistic_are_left_out() -> None:
    score, label = torch.tensor([1.0, 0.0]), torch.tensor([True, False])
    found = bootstrap_interval(lambda w: weighted_auc(score, label, w), torch.tensor([0, 1]), resamples=50)
    assert found == (1.0, 1.0)
    assert all(map(math.isnan, bootstrap_interval(lambda w: w[:, 0] * math.nan, torch.tensor([0]), resamples=3)))


@pytest.mark.parametrize(
    ("cluster", "options", "message"),
    [
        (torch.zeros(0, dtype=torch.int64), {}, "cluster: expected shape"),
        (torch.tensor([0]), {"resamples": 0}, "resamples: expected at least 1, got 0"),
        (torch.tensor([0]), {"level": 1.0}, r"level: expected a number in \(0, 1\), got 1.0"),
    ],
)
def test_bad_resampling_is_refused(cluster: Tensor, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(lambda w: w[:, 0], cluster, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962), (0, 0, 0.0, 1.0)],
)
def test_wilson_s_worked_values(right: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(right, total) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_wilson_s_interval_solves_its_equation() -> None:
    """The ends are the proportions from which the observed one is z standard errors away."""
    z = 1.6448536269514722
    for end in wilson_interval(3, 17, level=0.9):
        assert abs(3 / 17 - end) == pytest.approx(z * math.sqrt(end * (1 - end) / 17))


@pytest.mark.parametrize("right", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_counts_choices(right: int, k: int) -> None:
    samples = [index < right for index in range(6)]
    chosen = list(itertools.combinations(samples, k))
    assert pass_at_k(right, 6, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))


def test_pass_at_k_of_many_samples() -> None:
    assert pass_at_k(2, 5, 2) == pytest.approx(0.7)
    assert pass_at_k(1, 100_000, 100) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson_interval(3, 2), r"right: expected a number in \[0, total=2\], got 3"),
        (lambda: wilson_interval(1, 2, level=0), "level"),
        (lambda: pass_at_k(-1, 2, 1), "right: expected"),
        (lambda: pass_at_k(1, 2, 3), r"k: expected a number in \[1, samples=2\], got 3"),
        (lambda: pass_at_k(0, 2, 0), "k: expected"),
    ],
)
def test_numbers_out_of_range_are_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
