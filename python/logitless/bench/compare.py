"""Two files of `python -m logitless bench` set against each other: which times differ by more than chance explains.

A round's time is divided by the time of the products alone in the same round, so that a slow minute, or a machine that
is slower today, is no difference. The rounds of one file are compared with those of the other by an exact test, and
the p of all rows are corrected for their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from .environment import machine_kind
from .report import markdown
from .significance import Ratio, holm, ratio_of
from .tables import Line, number, reason, table
from .targets import MIB, Json, allocated, divided, median, ratio, ratios

#: A difference is one where the corrected p is at most this.
ALPHA = 0.05

FASTER, SLOWER, SAME = "faster", "slower", "no difference seen"
TOO_FEW, UNTESTED, FLOOR = "too few rounds", "not tested", "the floor"
HEADER = ("part", "provider", "B / A", "95% interval", "p", "p, Holm", "rounds", "verdict")


class Place(NamedTuple):
    """What must be equal for two rows to be compared."""

    part: str
    loss: str
    problem: str
    provider: str

    def __str__(self) -> str:
        return f"{self.part} ({self.loss}, {self.problem}): {self.provider}"


@dataclass(frozen=True)
class Pair:
    """One provider on one problem, in both files.

    Args:
        a, b: its rows.
        time: the ratio B / A of times; None where one of them has none.
        normalised: whether times are divided by those of the products alone.
        over_floor: the median ratio to the products alone in A and in B.
        corrected: p after Holm's correction; None where nothing was tested.
        verdict: one of the words above, or what fails.
    """

    place: Place
    a: Json
    b: Json
    time: Ratio | None
    normalised: bool
    over_floor: tuple[float | None, float | None] = (None, None)
    corrected: float | None = None
    verdict: str = ""

    @property
    def tested(self) -> bool:
        """Whether it is code under test, and has so many rounds that a p of it could be small."""
        return self.time is not None and self.a["role"] != "floor" and self.time.smallest <= ALPHA


class Largest(NamedTuple):
    """What fits of one provider, in both files."""

    place: Place
    a: Json
    b: Json


@dataclass(frozen=True)
class Comparison:
    """What became of every row.

    Args:
        obstacle: why no time is tested; "": all are.
        only_a, only_b: rows that the other file lacks.
    """

    pairs: tuple[Pair, ...]
    limits: tuple[Largest, ...]
    only_a: tuple[Place, ...]
    only_b: tuple[Place, ...]
    obstacle: str = ""

    @property
    def slower(self) -> tuple[Pair, ...]:
        """Rows of logitless that are slower in B."""
        return tuple(pair for pair in self.pairs if pair.a["role"] == "logitless" and pair.verdict == SLOWER)

    @property
    def broken(self) -> tuple[Pair, ...]:
        """Rows of logitless that ran in A and fail in B."""
        ours = (pair for pair in self.pairs if pair.a["role"] == "logitless")
        return tuple(pair for pair in ours if pair.b["failure"] and not pair.a["failure"])


class _Found(NamedTuple):
    row: Json
    floor: Json | None


def compare(a: Json, b: Json) -> Comparison:
    """Every row of both files that has the same part, loss, problem and provider.

    Args:
        a, b: contents of two files: before and after, or of two machines.

    Returns:
        `Comparison`; times are tested where both files are of one kind of machine with as many threads.
    """
    rows_a, rows_b = (dict(_timed(results)) for results in (a, b))
    limits_a, limits_b = (dict(_limits(results)) for results in (a, b))
    obstacle = _obstacle(a, b)
    pairs = [_pair(place, rows_a[place], rows_b[place]) for place in rows_a if place in rows_b]
    places_a, places_b = [*rows_a, *limits_a], [*rows_b, *limits_b]
    return Comparison(
        tuple(pairs if obstacle else _judged(pairs)),
        tuple(Largest(place, limits_a[place], limits_b[place]) for place in limits_a if place in limits_b),
        tuple(place for place in places_a if place not in places_b),
        tuple(place for place in places_b if place not in places_a),
        obstacle,
    )


def problems_of(part: Json) -> Sequence[Json]:
    """What a part has rows of times for: the points of a curve, itself, or nothing."""
    return () if part["kind"] == "limit" else part["points"] if part["kind"] == "curve" else (part,)


def _timed(results: Json) -> Iterator[tuple[Place, _Found]]:
    for name, part in results["parts"].items():
        for measured in problems_of(part):
            for row in measured["rows"]:
                floor = Line(row, measured["rows"], measured, "").first("floor")
                own = None if row["role"] == "floor" else floor
                yield Place(name, part["loss"], measured["problem"], row["provider"]), _Found(row, own)


def _limits(results: Json) -> Iterator[tuple[Place, Json]]:
    for name, part in results["parts"].items():
        for row in part["rows"] if part["kind"] == "limit" else ():
            yield Place(name, part["loss"], part["problem"], row["provider"]), row


def _obstacle(a: Json, b: Json) -> str:
    """Why times of these two files say nothing about each other's code."""
    about_a, about_b = ([part["environment"] for part in results["parts"].values()] for results in (a, b))
    if any(about.get("tiny") for about in (*about_a, *about_b)):
        return "one of the files is of a tiny run, of which no time means anything"
    kinds_a, kinds_b = ({machine_kind(about) for about in some} for some in (about_a, about_b))
    if kinds_a != kinds_b or len(kinds_a) > 1:
        return f"the machines are of different kinds ({_listed(kinds_a)}; {_listed(kinds_b)})"
    threads_a, threads_b = ({about["threads"] for about in some} for some in (about_a, about_b))
    on_gpu = any("driver" in about for about in about_a)
    if not on_gpu and (threads_a != threads_b or len(threads_a) > 1):
        return f"the numbers of threads differ ({_listed(threads_a)}; {_listed(threads_b)})"
    return ""


def _listed(values: set[str] | set[int]) -> str:
    return ", ".join(sorted(map(str, values))) or "none"


def _pair(place: Place, a: _Found, b: _Found) -> Pair:
    if failing := [name for name, found in (("A", a), ("B", b)) if found.row["failure"]]:
        return Pair(place, a.row, b.row, None, False, verdict=f"fails in {' and '.join(failing)}")
    normalised = all(found.floor is not None and found.floor["seconds"] for found in (a, b))
    times = [ratios(found.row, found.floor) if normalised else found.row["seconds"] for found in (a, b)]
    time = ratio_of(*times) if all(times) else None
    over_floor = (ratio(a.row, a.floor), ratio(b.row, b.floor))
    verdict = "not reached" if time is None else FLOOR if a.row["role"] == "floor" else UNTESTED
    return Pair(place, a.row, b.row, time, normalised, over_floor, verdict=verdict)


def _judged(pairs: Sequence[Pair]) -> Iterator[Pair]:
    """The pairs with their corrected p and verdicts."""
    times = [pair.time for pair in pairs if pair.time is not None and pair.tested]
    found = zip(holm([time.p for time in times]), holm([time.smallest for time in times]), strict=True)
    for pair in pairs:
        if pair.time is not None and pair.tested:
            corrected, best = next(found)
            yield replace(pair, corrected=corrected, verdict=_verdict(pair.time, corrected, best))
        else:
            yield replace(pair, verdict=TOO_FEW) if pair.verdict == UNTESTED else pair


def _verdict(time: Ratio, corrected: float, best: float) -> str:
    """`best` is the least that the corrected p could have been with so many rounds."""
    if best > ALPHA:
        return TOO_FEW
    if corrected > ALPHA:
        return SAME
    return SLOWER if time.estimate > 1 else FASTER


# ---------------------------------------------------------------------------------------------------------------------
# As text


def text(comparison: Comparison, a: str = "A", b: str = "B") -> str:
    """The comparison in Markdown; `a` and `b` say what the files are."""
    sections = [f"A is {a}, B is {b}.", "## Time", _method(comparison), _times(comparison)]
    if lines := [_kept(pair) for pair in comparison.pairs if pair.a["memory"] or pair.b["memory"]]:
        header = ("part", "provider", "extra MiB, A", "extra MiB, B", "B - A", "error, A", "error, B")
        sections += ["## Memory and error", EXACT, table(header, lines)]
    if lines := [_fitting(limit) for limit in comparison.limits]:
        sections += ["## Largest that fits", table(("part", "provider", "A", "B", "B / A"), lines)]
    for name, places in (("A", comparison.only_a), ("B", comparison.only_b)):
        if places:
            sections.append("\n".join([f"## Only in {name}", "", *(f"- {place}" for place in places)]))
    return markdown("Two files compared", sections)


EXACT = (
    "Memory is counted by the allocator, and errors are of seeded inputs: neither has rounds, so the numbers are "
    "compared as they are. The error is the largest of loss and gradients against float64."
)
WITHIN = (
    "A round's time is divided by that of the products alone (GEMMs) in the same round, where the part has them; rows "
    'marked "raw" have none. B / A is the median ratio of a round of B and a round of A. p is of the exact two-sided '
    "rank sum test over the rounds, and Holm's correction is over all tested rows; a difference is a corrected p of at "
    "most 0.05. The test knows the rounds of one run of each, so what differs between two runs of the same code counts "
    "as a difference too: a second run of A against A shows how much that is."
)


def _method(comparison: Comparison) -> str:
    """How times were compared, and how small a p could have been."""
    if comparison.obstacle:
        return f"The times are side by side and not tested, for {comparison.obstacle}."
    timed = [pair for pair in comparison.pairs if pair.time is not None and pair.a["role"] != "floor"]
    if not timed:
        return "No row has times in both files."
    tested = [pair.time.smallest for pair in timed if pair.time is not None and pair.tested]
    if not tested:
        least = min(pair.time.smallest for pair in timed if pair.time is not None)
        told = f"With these rounds p cannot be below {least:.2g}, so nothing can be told"
        return f"{WITHIN} {told}. 4 rounds each are enough for one row."
    reach = f"With these rounds p can be {max(tested):.2g} at the least"
    return f"{WITHIN} {reach}; of {len(tested)} tested rows the first needs {ALPHA / len(tested):.2g}."


def _times(comparison: Comparison) -> str:
    if comparison.obstacle:
        lines = [_beside(pair) for pair in comparison.pairs]
        return table(("part", "provider", "seconds, A", "seconds, B", "/ GEMMs, A", "/ GEMMs, B"), lines)
    return table(HEADER, [_tested(pair) for pair in comparison.pairs])


def _where(place: Place) -> tuple[str, str]:
    return f"{place.part}: {place.problem}", place.provider


def _tested(pair: Pair) -> tuple[str, ...]:
    failure = pair.b["failure"] or pair.a["failure"]
    if pair.time is None:
        return (*_where(pair.place), f"{reason(failure)} ({pair.verdict})" if failure else pair.verdict)
    time, corrected = pair.time, number(pair.corrected, ".2g")
    known = math.isfinite(time.interval.low)
    interval = f"{time.interval.low:.3f}-{time.interval.high:.3f}" if known else "none"
    raw = "" if pair.normalised or pair.a["role"] == "floor" else ", raw"
    rounds = f"{len(pair.a['seconds'])}, {len(pair.b['seconds'])}{raw}"
    p = f"{time.p:.2g}" if pair.tested else ""
    return (*_where(pair.place), f"{time.estimate:.3f}", interval, p, corrected, rounds, pair.verdict)


def _beside(pair: Pair) -> tuple[str, ...]:
    failures = (pair.a["failure"], pair.b["failure"])
    seconds = [
        reason(failure) if failure else number(median(row["seconds"]), ".4f")
        for failure, row in zip(failures, (pair.a, pair.b), strict=True)
    ]
    return (*_where(pair.place), *seconds, *(number(value, ".3f") for value in pair.over_floor))


def _kept(pair: Pair) -> tuple[str, ...]:
    a, b = allocated(pair.a), allocated(pair.b)
    sizes = [number(divided(bytes_, MIB), ".2f") for bytes_ in (a, b)]
    change = "" if a is None or b is None else f"{(b - a) / MIB:+.2f}"
    errors = [number(max((row["error"] or {}).values(), default=None), ".1e") for row in (pair.a, pair.b)]
    return (*_where(pair.place), *sizes, change, *errors)


def _fitting(limit: Largest) -> tuple[str, ...]:
    largest = [row["largest"] for row in (limit.a, limit.b)]
    texts = [reason(row["failure"]) if row["failure"] else number(row["largest"], "d") for row in (limit.a, limit.b)]
    return (*_where(limit.place), *texts, number(divided(largest[1], largest[0]), ".2f"))
