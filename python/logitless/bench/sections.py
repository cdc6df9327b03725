"""The parts of a file of `python -m logitless bench` as tables of texts, and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from logitless.training.document import Table

from . import fits
from .environment import machine_kind, processor
from .report import about, heading, markdown
from .summary import headlines
from .tables import COLUMNS, Line, number, part_lines, reason, table
from .targets import MIB, Json, divided, median

#: A part whose slowest provider takes less is in milliseconds.
SECONDS_FROM = 0.1
MEMORY_AND_ERROR = ("extra MiB", "of logits", "resident", "d_hidden", "d_weight")
#: What a limit's search ended with, as a text.
ENDINGS = {
    "memory": "one more step needs more memory than given",
    "time": "the time given to the search",
    "cap": "the largest asked for",
    "failure": "a failure",
}
#: The columns of `tables.COLUMNS` in which several files are set side by side, by the kind of part.
SIDES = {
    "step": ("seconds", "/ materialised", "/ GEMMs", "GB/s", "extra MiB"),
    "curve": ("seconds", "/ materialised", "extra MiB"),
    "model": ("seconds", "tokens/s", "peak MiB", "/ materialised"),
}


def file_markdown(results: Json) -> str:
    """A whole file: what it comes to, and every part."""
    lines = "\n".join(f"- {line}" for line in headlines(results))
    parts = results["parts"]
    title = heading("Losses on this machine", parts)
    return markdown(title, [*filter(None, [lines]), *(section(name, part) for name, part in parts.items())])


def section(name: str, part: Json) -> str:
    """One part: what was measured, where and when, and its tables."""
    return "\n\n".join([f"## {name}", described(part), *_captioned(tables_of(part)), *_listed(notes_of(part))])


def _captioned(some: Sequence[Table]) -> Iterator[str]:
    for one in some:
        yield f"**{one.caption}**"
        yield table(one.columns, one.rows)


def _listed(lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield "\n".join(f"- {line}" for line in lines)


def described(part: Json) -> str:
    """The part's loss and settings in sentences, and its circumstances."""
    return f"{SENTENCES[part['kind']](part)} {about(part)}"


def _step_sentence(part: Json) -> str:
    return f"A training step of the head and the loss {part['loss']}: forward and backward."


def _curve_sentence(part: Json) -> str:
    points = part["points"]
    ends = f", from {points[0]['problem']} to {points[-1]['problem']}" if points else ""
    return f"A training step of the head and the loss {part['loss']} for {len(points)} values of {part['axis']}{ends}."


def _limit_sentence(part: Json) -> str:
    length = f" of 2 x {part['length']} tokens" if part["unit"] == "pairs" else ""
    budget = f"{part['memory_bytes'] / MIB:.0f} MiB for the head and the loss"
    return f"The most {part['unit']}{length} in a training step of the loss {part['loss']}, within {budget}. From"


def _model_sentence(part: Json) -> str:
    parameters = part["parameters"]
    size = part["model"] if parameters is None else f"{part['model']}, {parameters / 1e6:.0f} million parameters"
    batch = f"{part['sequences']} sequences of {part['length']} tokens"
    return f"A training step of a whole model ({size}) with the loss {part['loss']} on {batch}."


SENTENCES: dict[str, Callable[[Json], str]] = {
    "step": _step_sentence,
    "curve": _curve_sentence,
    "limit": _limit_sentence,
    "model": _model_sentence,
}


def tables_of(part: Json) -> list[Table]:
    """All tables of a part."""
    return list(TABLES[part["kind"]](part))


def time_columns(rows: Sequence[Json]) -> tuple[str, str]:
    """The columns of the time and of its range, in a unit that suits the slowest."""
    slowest = max((median(row["seconds"]) or 0.0 for row in rows), default=0.0)
    return ("seconds", "range s") if slowest >= SECONDS_FROM else ("step ms", "range ms")


def _step(part: Json) -> Iterator[Table]:
    columns = (*time_columns(part["rows"]), "/ materialised", "/ GEMMs", "GB/s", *MEMORY_AND_ERROR)
    yield Table("Time, memory and error of a step", ("", *columns), part_lines(part, columns))


def _model(part: Json) -> Iterator[Table]:
    columns = (*time_columns(part["rows"]), "tokens/s", "/ materialised", "peak MiB", "largest error")
    yield Table("Time and memory of a whole step", ("", *columns), part_lines(part, columns))


def _curve(part: Json) -> Iterator[Table]:
    every = [row for point in part["points"] for row in point["rows"]]
    names = list(fits.providers(part))
    for caption, column in (("Time", time_columns(every)[0]), ("Extra memory", "extra MiB")):
        lines = [(str(point["value"]), *_cells(point, names, column)) for point in part["points"]]
        yield Table(f"{caption} by {part['axis']}: {column}", (part["axis"], *names), lines)
    yield _exponents(part, names)


def _cells(measured: Json, names: Sequence[str], column: str) -> list[str]:
    """The column's texts of these providers; of one that fails, in a word."""
    rows = {row["provider"]: row for row in measured["rows"]}
    return [_cell(rows.get(name), measured, column) for name in names]


def _cell(row: Json | None, measured: Json, column: str) -> str:
    if row is None:
        return "not measured"
    if row["failure"]:
        return reason(row["failure"]).partition(":")[0]
    return COLUMNS[column](Line(row, measured["rows"], measured, ""))


def _exponents(part: Json, names: Sequence[str]) -> Table:
    lines = []
    for name in names:
        time, memory = (fits.fit(series(part, name)) for series in (fits.times, fits.memories))
        points = max((found.points for found in (time, memory) if found), default=0)
        lines.append((name, str(time or "too few points"), str(memory or "too few points"), str(points or "")))
    axis = part["axis"]
    caption = f"Growth: the exponent k of {axis}^k, fitted to log against log, ± its standard error"
    return Table(caption, ("", f"time, {axis}^k", f"extra memory, {axis}^k", "points"), lines)


def _limit(part: Json) -> Iterator[Table]:
    base = next((row for row in part["rows"] if row["role"] == "materialised"), None)
    lines = [_limit_line(row, base) for row in part["rows"]]
    yield Table(
        f"The most {part['unit']} that fit",
        ("", part["unit"], "/ materialised", "peak MiB", "ended by", "tried"),
        lines,
    )


def _limit_line(row: Json, base: Json | None) -> tuple[str, ...]:
    if row["failure"]:
        return row["provider"], reason(row["failure"])
    tried = ", ".join(f"{step['value']}{'' if step['fits'] else ' not'}" for step in row["tried"])
    peak = number(divided(row["bytes"], MIB), ".0f")
    return row["provider"], largest_text(row), times_as_many(row, base), peak, ENDINGS[row["ended_by"]], tried


def largest_text(row: Json) -> str:
    """The largest value that fitted; a search that memory did not end has found a lower bound."""
    if row["largest"] is None:
        return "none fits"
    return f"{'' if row['ended_by'] == 'memory' else 'at least '}{row['largest']}"


def times_as_many(row: Json, base: Json | None) -> str:
    """The largest value over the materialised loss's, where the latter is known."""
    if base is None or base["failure"] or base["ended_by"] != "memory" or row["largest"] is None:
        return ""
    return number(divided(row["largest"], base["largest"]), ".2f") and (
        f"{'' if row['ended_by'] == 'memory' else 'at least '}{row['largest'] / base['largest']:.2f}"
    )


TABLES: dict[str, Callable[[Json], Iterator[Table]]] = {
    "step": _step,
    "curve": _curve,
    "limit": _limit,
    "model": _model,
}


def notes_of(part: Json) -> list[str]:
    """Why cells of a part are empty: providers that failed at a point of a curve, or whose turn did not come."""
    if part["kind"] == "limit":
        return []
    if part["kind"] == "curve":
        return [*_failures(part), *(note for point in part["points"] for note in _unreached(point))]
    return list(_unreached(part))


def _failures(curve: Json) -> Iterator[str]:
    found: dict[tuple[str, str], list[str]] = {}
    for point in curve["points"]:
        for row in point["rows"]:
            if row["failure"]:
                found.setdefault((row["provider"], row["failure"]), []).append(str(point["value"]))
    for (provider, failure), values in found.items():
        yield f"{provider} at {curve['axis']} {', '.join(values)}: {reason(failure)}"


def _unreached(measured: Json) -> Iterator[str]:
    names = [row["provider"] for row in measured["rows"] if not row["failure"] and not row["seconds"]]
    if names:
        yield f"not reached at {measured['problem']}: {', '.join(names)}"


# ---------------------------------------------------------------------------------------------------------------------
# Several files


def side_by_side(results: Mapping[str, Json]) -> str:
    """Several files in Markdown, a column for each by its label."""
    parts = list(dict.fromkeys(name for one in results.values() for name in one["parts"]))
    sections = ["\n\n".join(_captioned([machines(results)]))]
    sections += ["\n\n".join([f"## {name}", *_captioned(beside(name, results))]) for name in parts]
    return markdown("Several machines", sections)


def machines(results: Mapping[str, Json]) -> Table:
    """Where each file was measured."""
    facts = [machine_facts(one) for one in results.values()]
    lines = [(name, *(own.get(name, "") for own in facts)) for name in dict.fromkeys(n for own in facts for n in own)]
    return Table("Where and when", ("", *results), lines)


def machine_facts(results: Json) -> dict[str, str]:
    """Names and values of a file's machine, software and request; what differs among its parts is listed."""
    every = [part["environment"] for part in results["parts"].values()]
    texts: dict[str, Callable[[Json], str | None]] = {
        "machine": machine_kind,
        "device": lambda about: about.get("device"),
        "driver": lambda about: about.get("driver"),
        "CUDA": lambda about: about.get("cuda"),
        "processor": processor,
        "load at the start": lambda about: str(about["load"]),
        "date": lambda about: about["date"],
        "commit": lambda about: about["commit"] or "unknown",
        "Python": lambda about: about["python"],
        "versions": lambda about: ", ".join(
            f"{name} {version}" for name, version in about["versions"].items() if version
        ),
    }
    found = {name: "; ".join(dict.fromkeys(filter(None, map(text, every)))) for name, text in texts.items()}
    asked = ", ".join(f"{name} {_plain(value)}" for name, value in results["request"].items() if value is not None)
    return {"request": asked, **{name: text for name, text in found.items() if text}}


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def beside(name: str, results: Mapping[str, Json]) -> list[Table]:
    """A part of several files: a table a quantity, a column a file."""
    parts = {label: one["parts"].get(name) for label, one in results.items()}
    kind = next(part["kind"] for part in parts.values() if part)
    same = {label: part for label, part in parts.items() if part and part["kind"] == kind}
    if kind == "limit":
        return [_quantity("the most that fit", list(results), {x: _largest(part) for x, part in same.items()})]
    columns = {column: {x: dict(_values(part, column)) for x, part in same.items()} for column in SIDES[kind]}
    first, *rest = (_quantity(column, list(results), values) for column, values in columns.items())
    return [first, *(one for one in map(_with_numbers, rest) if one.rows)]


def _quantity(caption: str, labels: Sequence[str], values: Mapping[str, Mapping[str, str]]) -> Table:
    names = dict.fromkeys(name for own in values.values() for name in own)
    lines = [(name, *(values.get(label, {}).get(name, "not measured") for label in labels)) for name in names]
    return Table(caption, ("", *labels), lines)


def _with_numbers(one: Table) -> Table:
    """The table without the rows that have no number in any column."""
    return one._replace(rows=[row for row in one.rows if any(map(str.isdigit, "".join(row[1:])))])


def _largest(part: Json) -> dict[str, str]:
    rows = part["rows"]
    return {row["provider"]: reason(row["failure"]) if row["failure"] else largest_text(row) for row in rows}


def _values(part: Json, column: str) -> Iterator[tuple[str, str]]:
    """The column's text of each provider; of a curve, of each provider and value."""
    if part["kind"] != "curve":
        yield from ((row["provider"], _cell(row, part, column)) for row in part["rows"])
        return
    for name in fits.providers(part):
        for point in part["points"]:
            yield f"{name}, {part['axis']} {point['value']}", _cells(point, [name], column)[0]
