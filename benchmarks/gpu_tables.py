"""From what `gpu_report` found to Markdown: the targets with what was reached, the tests, the kernels, every cell."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from .gpu_cells import CELLS, FASTEST_PEER, FROZEN_GEMMS, GEMM, LOGITS, MAIN, ROWS_SHARE, TARGETS, Target
from .report import DOES_NOT_RUN, MIB, Json, number, ratio, scaled, table

COLUMNS = (
    *("", "forward ms", "/ GEMM", "backward ms", "both ms", "/ GEMMs", "/ materialised"),
    *("extra MiB", "of logits", "loss", "d_hidden", "d_weight"),
)


def markdown(results: Json) -> str:
    """The whole report; what was not measured is left out."""
    parts = results["parts"]
    dry = any(part["environment"]["dry"] for part in parts.values())
    title = "# A dry run on a CPU: no figure here means anything" if dry else "# Measured on a GPU"
    sections = [title, _HOW_TO_READ, _build(results["build"]), "## Targets", targets_table(parts)]
    if "tests" in parts:
        sections += ["## Tests on the device", _tests(parts["tests"])]
    if "rows" in parts:
        sections += ["## Kernels on a chunk of logits", _provenance(parts["rows"]), rows_table(parts["rows"])]
    for name in (cell.name for cell in CELLS if cell.name in parts):
        sections += [f"## {name}", _provenance(parts[name]), cell_table(parts[name])]
    return "\n\n".join(sections) + "\n"


_HOW_TO_READ = (
    "Medians of the device's own time, the ways in turns, the L2 cache overwritten before each. Forward is without "
    "gradients; both is a step, forward and backward, and the next column the backward alone (a single pass does its "
    "work in the forward). Ratios are medians over rounds of the ratio within a round, a frozen head's to the products "
    "of a frozen head. Extra memory is the peak of a step beyond the inputs and one copy of the gradients and of their "
    "float32 accumulators (a way that has no such accumulators may show less than nothing), also as a share of the "
    "bfloat16 logits. Errors are relative, against float64 on 256 tokens."
)


def _provenance(measured: Json) -> str:
    e = measured["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items() if version)
    cut = "" if measured.get("complete") else " NOT COMPLETE: the time ended, or the process did."
    failure = f" {measured['failure']}." if measured.get("failure") else ""
    return (
        f"{measured.get('problem', '')}. {e['date']}, commit {e['commit'] or 'unknown'}, {e['device']}, driver "
        f"{e['driver'] or 'unknown'}, CUDA {e['cuda'] or 'none'}. {versions}. Cut Cross-Entropy: "
        f"{e['cut_cross_entropy'] or 'not installed'}.{failure}{cut}"
    )


def _build(found: Json) -> str:
    """What the last run built, and what its parts left out."""
    what = found["library"] or found["failure"].splitlines()[0]
    return " ".join([f"CUDA library: {what}.", *(note.removeprefix("-- logitless: ") + "." for note in found["notes"])])


def _tests(found: Json) -> str:
    if "tests" not in found:
        return f"{_provenance(found)}\n\n{found.get('failure')}"
    counts = ", ".join(f"{found[name]} {name}" for name in ("tests", "failures", "errors", "skipped"))
    lines = [f"{counts} in {found['seconds']:.0f} s.", *(f"- {line}" for line in found["failed"])]
    return f"{_provenance(found)}\n\n" + "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def cell_table(measured: Json) -> str:
    """One row a way."""
    by_name = {row["provider"]: row for row in measured["rows"]}
    return table(COLUMNS, [_line(row, by_name, measured) for row in measured["rows"]])


def _line(row: Json, by_name: dict[str, Json], measured: Json) -> Sequence[str]:
    if row["failure"]:
        return (row["provider"], f"{DOES_NOT_RUN}: {row['failure']}", *[""] * (len(COLUMNS) - 2))
    floor = by_name.get(FROZEN_GEMMS if row["frozen"] else GEMM)
    base, error, extra = by_name.get("materialised"), row["error"] or {}, extra_bytes(row, measured)
    return (
        row["provider"],
        _milliseconds(row["forward"]),
        number(_ratio(row, floor, "forward"), ".2f"),
        _milliseconds(row["backward"]),
        _milliseconds(row["both"]),
        number(_ratio(row, floor, "both"), ".2f"),
        number(_ratio(row, base, "both"), ".2f"),
        number(scaled(extra, MIB), ".0f"),
        number(scaled(extra, measured["logits_bytes"]), ".2%"),
        number(row["loss"], ".5f"),
        number(error.get("d_hidden"), ".1e"),
        number(error.get("d_weight"), ".1e"),
    )


def rows_table(measured: Json) -> str:
    """Bytes read and written in a second, and their share of a copy's."""
    copy = bandwidth(measured["rows"][0]) if measured["rows"] else None
    lines = []
    for row in measured["rows"]:
        if row["failure"]:
            lines.append((row["provider"], f"{DOES_NOT_RUN}: {row['failure']}", "", ""))
            continue
        found = bandwidth(row)
        share = None if found is None or copy is None else found / copy
        lines.append(
            (row["provider"], _milliseconds(row["both"]), number(scaled(found, 10**9), ".0f"), number(share, ".2f"))
        )
    return table(("", "ms", "GB/s", "of copy"), lines)


def targets_table(parts: Json) -> str:
    """The targets of the main cell and of the kernels on a chunk, beside what was reached."""
    lines = [_target(target, parts.get(MAIN.name)) for target in TARGETS]
    for row in parts.get("rows", {}).get("rows", [])[1:]:
        if row["provider"].startswith("cuda"):
            found, copy = bandwidth(row), bandwidth(parts["rows"]["rows"][0])
            share = None if found is None or copy is None else found / copy
            met = None if share is None else share >= ROWS_SHARE
            lines.append(
                (f"{row['provider']}: share of copy bandwidth", number(share, ".3f"), f">= {ROWS_SHARE}", _verdict(met))
            )
    return table((MAIN.name, "measured", "target", ""), lines)


def _target(target: Target, measured: Json | None) -> Sequence[str]:
    value, against = reached(target, measured) if measured else (None, target.relative_to)
    what = {"forward": "forward", "both": "forward + backward", "memory": "extra memory"}[target.measure]
    met = None if value is None else value <= target.limit
    return f"{target.way}: {what} / {against}", number(value, ".3f"), f"<= {target.limit:g}", _verdict(met)


def _verdict(met: bool | None) -> str:
    return "not measured" if met is None else "met" if met else "missed"


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def reached(target: Target, measured: Json) -> tuple[float | None, str]:
    """The measured counterpart of `target.limit`, None where one side is missing, and what it is relative to."""
    by_name = {row["provider"]: row for row in measured["rows"] if not row["failure"]}
    row = by_name.get(target.way)
    if target.measure == "memory":
        whole = measured["logits_bytes" if target.relative_to == LOGITS else "chunk_bytes"]
        return (None if row is None else scaled(extra_bytes(row, measured), whole)), target.relative_to
    if target.relative_to != FASTEST_PEER:
        return _ratio(row, by_name.get(target.relative_to), target.measure), target.relative_to
    peers = [x for x in by_name.values() if x["role"] == "peer" and x["both"]]
    if not peers:
        return None, FASTEST_PEER
    fastest = min(peers, key=lambda x: statistics.median(x["both"]))
    return _ratio(row, fastest, "both"), f"{FASTEST_PEER} ({fastest['provider']})"


def extra_bytes(row: Json, measured: Json) -> int | None:
    """Of a step, beyond the inputs, the gradients and their accumulators."""
    gradients = measured["frozen_gradient_bytes" if row["frozen"] else "gradient_bytes"]
    return None if row["peak_bytes"] is None else row["peak_bytes"] - gradients


def bandwidth(row: Json) -> float | None:
    """Bytes in a second."""
    return row["bytes"] / statistics.median(row["both"]) if row["both"] else None


def _ratio(row: Json | None, other: Json | None, what: str) -> float | None:
    if row is None or other is None:
        return None
    return ratio({"seconds": row[what]}, {"seconds": other[what]})


def _milliseconds(seconds: Iterable[float]) -> str:
    found = list(seconds)
    return f"{1e3 * statistics.median(found):.3f}" if found else ""
