"""Comparing two files of the bench: the exact test against counting, fits against laws, verdicts against what is so."""

from __future__ import annotations

import copy
import itertools
import math
import random
from statistics import fmean, median

import bench_files as files
import pytest
from bench_files import Json
from hypothesis import given
from hypothesis import strategies as st

from logitless.bench.compare import FASTER, FLOOR, SAME, SLOWER, TOO_FEW, UNTESTED, Comparison, Pair, compare, text
from logitless.bench.fits import fit, memories, times
from logitless.bench.significance import holm, p_of, ratio_of

# ---------------------------------------------------------------------------------------------------------------------
# Fits


@given(
    exponent=st.floats(-3, 3),
    scale=st.floats(1e-6, 1e6),
    values=st.lists(st.integers(1, 10**6), min_size=3, max_size=9, unique=True),
)
def test_a_fit_recovers_a_power_law(exponent: float, scale: float, values: list[int]) -> None:
    found = fit([(x, scale * x**exponent) for x in values])
    assert found is not None and found.points == len(values)
    assert found.exponent == pytest.approx(exponent, abs=1e-6)
    assert found.error < 1e-6
    assert found.at(values[0]) == pytest.approx(scale * values[0] ** exponent, rel=1e-6)


def test_the_standard_error_of_an_exponent_covers_it_as_often_as_it_says() -> None:
    """The deviation of exponents fitted to noisy laws is the mean of their standard errors."""
    draw = random.Random(0)
    laws = [[(x, x * math.exp(draw.gauss(0, 0.1))) for x in (1, 2, 4, 8, 16, 32)] for _ in range(2000)]
    found = [one for one in map(fit, laws) if one is not None]
    deviation = math.sqrt(fmean((one.exponent - 1) ** 2 for one in found))
    assert math.sqrt(fmean(one.error**2 for one in found)) == pytest.approx(deviation, rel=0.05)


@pytest.mark.parametrize("points", [[], [(1, 1), (2, 2)], [(1, 1), (2, 2), (4, 0)], [(2, 1), (2, 2), (2, 3)]], ids=str)
def test_too_few_points_have_no_fit(points: list[tuple[float, float]]) -> None:
    assert fit(points) is None


def test_points_that_failed_are_left_out_of_a_curve() -> None:
    curve = files.curve()
    assert [value for value, _ in times(curve, "materialised")] == [16384, 32768, 65536]
    assert [value for value, _ in memories(curve, "logitless")] == [16384, 32768, 65536, 131072]
    assert memories(curve, "GEMMs alone") == []


# ---------------------------------------------------------------------------------------------------------------------
# The test of two lists

ROUNDS = st.lists(st.integers(1, 6).map(float), min_size=1, max_size=5)


def mean_rank(value: float, values: list[float]) -> float:
    return sum(x < value for x in values) + (1 + sum(x == value for x in values)) / 2


def counted_p(first: list[float], second: list[float]) -> float:
    """Every split, one by one."""
    ranks = [mean_rank(x, first + second) for x in first + second]
    sums = [sum(some) for some in itertools.combinations(ranks, len(second))]
    own = sum(ranks[len(first) :])
    return min(1.0, 2 * min(sum(x <= own for x in sums), sum(x >= own for x in sums)) / len(sums))


@given(ROUNDS, ROUNDS)
def test_p_counts_splits(first: list[float], second: list[float]) -> None:
    assert p_of(first, second) == pytest.approx(counted_p(first, second))
    assert p_of(first, second) == pytest.approx(p_of(second, first))


@pytest.mark.parametrize(("rounds", "smallest"), [(3, 2 / 20), (5, 2 / 252), (7, 2 / 3432)])
def test_the_smallest_p_is_that_of_lists_apart(rounds: int, smallest: float) -> None:
    first, second = [1 + x / 100 for x in range(rounds)], [2 + x / 100 for x in range(rounds)]
    found = ratio_of(first, second)
    assert found.p == found.smallest == pytest.approx(smallest)
    assert found.estimate == pytest.approx(median(y / x for x in first for y in second))


def test_intervals_and_tests_say_the_same() -> None:
    """The interval leaves out 1 exactly where p is below 5%; three rounds each have no interval."""
    draw = random.Random(1)
    for _ in range(300):
        first, second = ([draw.lognormvariate(0, 0.1) for _ in range(5)] for _ in range(2))
        found = ratio_of(first, second)
        assert (found.interval.low <= 1 <= found.interval.high) == (found.p > 0.05)
    assert math.isnan(ratio_of([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]).interval.low)


def test_intervals_hold_the_ratio_as_often_as_they_say() -> None:
    """The exact level of 5 and 5 rounds is 1 - 8 / 252."""
    draw, trials, held = random.Random(2), 4000, 0
    for _ in range(trials):
        first, second = ([scale * draw.lognormvariate(0, 0.1) for _ in range(5)] for scale in (1, 1.3))
        low, high = ratio_of(first, second).interval
        held += low <= 1.3 <= high
    assert held / trials == pytest.approx(1 - 8 / 252, abs=0.01)


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_rejects_what_its_steps_reject(values: list[float]) -> None:
    """From the smallest p on, each times how many are left, until one is too large."""
    for level in (0.01, 0.05, 0.5):
        rejected = set()
        for step, place in enumerate(sorted(range(len(values)), key=lambda k: values[k])):
            if min(1.0, (len(values) - step) * values[place]) > level:
                break
            rejected.add(place)
        assert {place for place, p in enumerate(holm(values)) if p <= level} == rejected


# ---------------------------------------------------------------------------------------------------------------------
# Files


def slowed(results: Json, provider: str, factor: float) -> Json:
    result = copy.deepcopy(results)
    for part in result["parts"].values():
        for row in part["rows"]:
            if row["provider"] == provider:
                row["seconds"] = [factor * x for x in row["seconds"]]
    return result


def verdicts(comparison: Comparison) -> dict[str, str]:
    return {pair.place.provider: pair.verdict for pair in comparison.pairs}


def pair_of(comparison: Comparison, provider: str) -> Pair:
    return next(pair for pair in comparison.pairs if pair.place.provider == provider)


def lines_of(shown: str, provider: str) -> list[list[str]]:
    """The cells of this provider's rows, in every table."""
    lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line[:1] == "|")
    return [line for line in lines if line[1] == provider]


@pytest.mark.parametrize("rounds", [5, 6, 7])
def test_a_slowdown_of_a_tenth_is_found_at_one_percent_of_noise(rounds: int) -> None:
    a = files.only(files.step(rounds, seed=1))
    b = slowed(files.only(files.step(rounds, seed=2)), "logitless", 1.1)
    found = compare(a, b)
    own = pair_of(found, "logitless")
    assert [pair.place.provider for pair in found.slower] == ["logitless"] and own.verdict == SLOWER
    assert own.time is not None and own.time.estimate == pytest.approx(1.1, abs=0.02) and own.normalised
    assert verdicts(found)["GEMMs alone"] == verdicts(found)["copy"] == FLOOR
    assert verdicts(compare(b, a))["logitless"] == FASTER and not compare(b, a).slower


def test_a_slower_machine_is_no_difference() -> None:
    """Every row of B takes 1.5 times as long, the products too."""
    a, b = files.only(files.step(seed=1)), files.only(files.step(seed=2))
    for row in b["parts"]["step"]["rows"]:
        row["seconds"] = [1.5 * x for x in row["seconds"]]
    found = compare(a, b)
    assert set(verdicts(found).values()) <= {SAME, FLOOR}
    floor = pair_of(found, "GEMMs alone").time
    assert floor is not None and floor.estimate == pytest.approx(1.5, rel=0.2)


def test_equal_code_is_rarely_called_different() -> None:
    """At most a twentieth of whole comparisons of five rounds has any wrong verdict."""
    trials = 400
    pairs = ((files.step(seed=2 * trial), files.step(seed=2 * trial + 1)) for trial in range(trials))
    wrong = sum(
        any(verdict in (SLOWER, FASTER) for verdict in verdicts(compare(*map(files.only, pair))).values())
        for pair in pairs
    )
    assert 0 < wrong <= 0.05 * trials + 3 * math.sqrt(0.05 * 0.95 * trials)


def test_too_few_rounds_are_said_to_be_too_few() -> None:
    a, b = files.only(files.step(3, seed=1)), slowed(files.only(files.step(3, seed=2)), "logitless", 2)
    found = compare(a, b)
    assert verdicts(found)["logitless"] == TOO_FEW and not found.slower
    assert pair_of(found, "logitless").corrected is None
    assert "With these rounds p cannot be below 0.1, so nothing can be told" in text(found)
    many = files.whole()
    del many["parts"]["most tokens"], many["parts"]["by vocabulary"]
    assert verdicts(compare(many, many))["logitless"] == TOO_FEW, "eight rows of five rounds"
    assert "p can be 0.0079 at the least; of 8 tested rows the first needs 0.0063" in text(compare(many, many))


def test_rows_that_can_have_no_small_p_cost_the_others_nothing() -> None:
    a = files.only(files.step(seed=1))
    b = slowed(files.only(files.step(seed=2)), "logitless", 1.1)
    for results in (a, b):
        once = [files.row(f"slow {k}", "peer", [9.0]) for k in range(20)]
        results["parts"]["step"]["rows"] += once
    found = verdicts(compare(a, b))
    assert found["logitless"] == SLOWER and found["slow 3"] == TOO_FEW


def test_without_a_floor_times_are_compared_as_they_are_and_the_table_says_so() -> None:
    results = files.only(files.model())
    found = compare(results, results)
    assert not pair_of(found, "logitless").normalised
    assert "| 5, 5, raw |" in text(found) and "5, 5 |" not in text(found)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"units": ["AVX2"]}, "the machines are of different kinds (epyc-avx512-bf16; epyc-avx2)"),
        ({"threads": 8}, "the numbers of threads differ (2; 8)"),
        ({"tiny": True}, "one of the files is of a tiny run"),
    ],
)
def test_times_of_other_machines_are_shown_and_not_tested(change: Json, reason: str) -> None:
    a = files.only(files.step(seed=1))
    b = slowed(a, "logitless", 3)
    b["parts"]["step"]["environment"] |= change
    found = compare(a, b)
    assert set(verdicts(found).values()) == {FLOOR, UNTESTED} and not found.slower
    shown = text(found)
    assert reason in shown and "95% interval" not in shown
    middle = median(a["parts"]["step"]["rows"][3]["seconds"])
    [seconds, _] = lines_of(shown, "logitless")
    assert seconds[2:4] == [f"{middle:.4f}", f"{3 * middle:.4f}"]


def test_threads_do_not_matter_to_a_gpu() -> None:
    a = files.on_gpu(files.only(files.step()))
    b = copy.deepcopy(a)
    b["parts"]["step"]["environment"]["threads"] = 64
    assert compare(a, b).obstacle == ""


def test_rows_of_one_file_are_listed() -> None:
    a = files.only(files.step())
    b = copy.deepcopy(a)
    b["parts"]["step"]["rows"][-1]["provider"] = "newer"
    b["parts"]["other"] = {**files.limit()}
    found = compare(a, b)
    assert [place.provider for place in found.only_a] == ["Liger scaled cross-entropy"]
    assert [place.provider for place in found.only_b][:2] == ["newer", "materialised"]
    assert "## Only in A\n\n- step (nll, N 4096 H 576 V 49152 float32): Liger scaled cross-entropy" in text(found)


def test_what_no_longer_runs_is_broken() -> None:
    a = files.only(files.step())
    b = copy.deepcopy(a)
    row = next(row for row in b["parts"]["step"]["rows"] if row["provider"] == "logitless")
    row |= {"seconds": [], "failure": "wrong: d_hidden is off"}
    found = compare(a, b)
    assert [pair.place.provider for pair in found.broken] == ["logitless"] and not compare(b, a).broken
    assert "| wrong: d_hidden is off (fails in B) |" in text(found)
    assert "(fails in A)" in text(compare(b, a))


def test_memory_and_limits_are_plain_differences() -> None:
    a = files.whole()
    b = copy.deepcopy(a)
    own = next(row for row in b["parts"]["step"]["rows"] if row["provider"] == "logitless")
    own["memory"]["allocated"] += 3 * files.MIB
    b["parts"]["most tokens"]["rows"][0]["largest"] = 2048
    shown = text(compare(a, b), "before", "after")
    assert shown.startswith("# Two files compared\n\nA is before, B is after.")
    assert "+3.00" in [cells[4] for cells in lines_of(shown, "logitless")]
    assert "0.50" in [cells[4] for cells in lines_of(shown, "materialised")]


def test_rows_that_were_not_reached_say_so() -> None:
    results = files.only(files.with_failures(files.step()))
    found = verdicts(compare(results, results))
    assert found["TRL ChunkedLogProbFunction"] == "not reached" and found["quack"] == "fails in A and B"


def test_files_without_a_row_in_common() -> None:
    empty = {"format": "logitless-bench/1", "request": files.REQUEST, "parts": {}}
    found = compare(empty, files.only(files.step()))
    assert not found.pairs and len(found.only_b) == 6
    assert "# Two files compared" in text(found)
