"""From what `gpu_report` found to Markdown: the targets with what was reached, then every part."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from .gpu_cells import BUDGET, FLOOR, FROZEN_GEMMS, GEMM, HEAD_GRADIENT, LOGITS, MAIN, ROWS_SHARE, TARGETS, Target
from .report import DOES_NOT_RUN, MIB, Json, number, ratio, scaled, table

COLUMNS = (
    *("", "forward ms", "/ GEMM", "backward ms", "both ms", "/ GEMMs", "/ materialised"),
    *("extra MiB", "of logits", "loss", "d_hidden", "d_weight"),
)


KERNEL_COLUMNS = ("", "ms", "floor ms", "/ floor", "GB/s", "peak MiB", "largest error", "right")
#: The parts that are neither a cell nor kernels, and their headings.
TESTS, PROFILES, SANITIZER = "tests", "profiles", "sanitizer"
HEADINGS = {TESTS: "Tests on the device", PROFILES: "Nsight Compute", SANITIZER: "compute-sanitizer"}


def markdown(results: Json) -> str:
    """The whole report; what was not measured is left out."""
    parts = results["parts"]
    dry = any(part["environment"]["dry"] for part in parts.values())
    title = "# A dry run on a CPU: no figure here means anything" if dry else "# Measured on a GPU"
    head = [title, _HOW_TO_READ, _build(results["build"]), "## Targets", targets_table(parts)]
    return "\n\n".join([*head, *(section(name, parts[name]) for name in parts)]) + "\n"


def section(name: str, found: Json) -> str:
    """One part: when and where it was measured, and what was found."""
    texts = {TESTS: _tests, PROFILES: _profiles, SANITIZER: _sanitizer}
    text = texts.get(name) or (cell_table if "logits_bytes" in found else kernel_table)
    return "\n\n".join([f"## {HEADINGS.get(name, name)}", _provenance(found), text(found)])


_HOW_TO_READ = (
    "Medians of the device's own time, the ways in turns, the L2 cache overwritten before each. Forward is without "
    "gradients; both is a step, forward and backward, and the next column the backward alone (a single pass does its "
    "work in the forward). Ratios are medians over rounds of the ratio within a round, a frozen head's to the products "
    "of a frozen head. Extra memory is the peak of a step beyond the inputs and one copy of the gradients and of their "
    "float32 accumulators (a way that has no such accumulators may show less than nothing), also as a share of the "
    "bfloat16 logits. Errors are relative, against float64 on 256 tokens. Of a kernel or call, the floor is cuBLAS's "
    "products as large, or a copy (then the ratio is for each byte), in the same turns; right is what is no further "
    "from float64, in the first and last rows, than rounding may bring it."
)


def _provenance(measured: Json) -> str:
    e = measured["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items() if version)
    cut = "" if measured.get("complete") else " NOT COMPLETE: the time ended, or the process did."
    failure = f" {measured['failure']}." if measured.get("failure") else ""
    problem = f"{measured['problem']}. " if "problem" in measured else ""
    return (
        f"{problem}{e['date']}, commit {e['commit'] or 'unknown'}, {e['device']}, driver "
        f"{e['driver'] or 'unknown'}, CUDA {e['cuda'] or 'none'}. {versions}. Cut Cross-Entropy: "
        f"{e['cut_cross_entropy'] or 'not installed'}.{failure}{cut}"
    )


def _build(found: Json) -> str:
    """What the last run built, and what its parts left out."""
    what = found["library"] or found["failure"].splitlines()[0]
    return " ".join([f"CUDA library: {what}.", *(note.removeprefix("-- logitless: ") + "." for note in found["notes"])])


def _tests(found: Json) -> str:
    counts = ", ".join(f"{found[name]} {name}" for name in ("tests", "failures", "errors", "skipped"))
    suites = "" if found["left_out"] is None else f" {found['left_out']}."
    return "\n".join([f"{counts} in {found['seconds']:.0f} s.{suites}", *(_quoted(text) for text in found["failed"])])


def _quoted(failure: str) -> str:
    name, *lines = failure.splitlines()
    return "\n".join([f"- {name}", *(f"      {line}" for line in lines)])


def _profiles(found: Json) -> str:
    lines = []
    for kernel in found["kernels"]:
        told = kernel["failure"] or "; ".join(" ".join(line.split()) for line in kernel["summary"])
        lines.append(f"- {kernel['kernel']}, {kernel['ratio']:.2f} of its floor: {told}")
    return "\n".join(lines)


def _sanitizer(found: Json) -> str:
    return "\n".join(f"- {x['tool']} ended with {x['status']}: {x['summary']}" for x in found["tools"])


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


def kernel_table(measured: Json) -> str:
    """One row a kernel or call, beside its own floor."""
    return table(KERNEL_COLUMNS, [_kernel(row) for row in measured["rows"]])


def _kernel(row: Json) -> Sequence[str]:
    if row["failure"]:
        return (row["provider"], f"{DOES_NOT_RUN}: {row['failure']}", *[""] * (len(KERNEL_COLUMNS) - 2))
    errors, wrong = list((row["error"] or {}).values()), row["wrong"]
    return (
        row["provider"],
        _milliseconds(row["both"]),
        _milliseconds(row["floor"]),
        number(against_floor(row), ".2f"),
        number(scaled(bandwidth(row), 10**9), ".0f"),
        number(scaled(row["peak_bytes"], MIB), ".0f"),
        number(max(errors) if errors else None, ".1e"),
        "" if wrong is None else f"NO: {', '.join(wrong)}" if wrong else "yes",
    )


def targets_table(parts: Json) -> str:
    """The targets beside what was reached."""
    lines = [_target(target, parts.get(target.part)) for target in TARGETS]
    of_kernels = {row["provider"]: row for row in parts.get("rows", {}).get("rows", [])}
    for name in ("cuda, statistics", "cuda, gradient"):
        ratio = against_floor(of_kernels[name]) if name in of_kernels else None
        met = None if ratio is None else 1 / ratio >= ROWS_SHARE
        share = number(None if ratio is None else 1 / ratio, ".3f")
        lines.append((f"{name}: share of copy bandwidth", share, f">= {ROWS_SHARE}", _verdict(met)))
    return table((MAIN.name, "measured", "target", ""), lines)


_MEASURES = {"forward": "forward", "both": "forward + backward", "memory": "extra memory", "error": "gradient error"}


def _target(target: Target, measured: Json | None) -> Sequence[str]:
    value = reached(target, measured) if measured else None
    limit = f"{'<' if target.beaten else '<='} {target.limit:g}"
    met = None if value is None else value < target.limit if target.beaten else value <= target.limit
    what = f"{target.way}: {_MEASURES[target.measure]} / {target.relative_to}"
    return what, number(value, ".3f"), limit, _verdict(met)


def _verdict(met: bool | None) -> str:
    return "not measured" if met is None else "met" if met else "missed"


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def reached(target: Target, measured: Json) -> float | None:
    """The measured counterpart of `target.limit`, None where one side is missing."""
    by_name = {row["provider"]: row for row in measured["rows"] if not row["failure"]}
    row, other = by_name.get(target.way), by_name.get(target.relative_to)
    if row is None:
        return None
    if target.relative_to == FLOOR:
        return against_floor(row)
    if target.measure == "memory":
        wholes = {LOGITS: measured["logits_bytes"], HEAD_GRADIENT: measured["head_gradient_bytes"], BUDGET: 256 * MIB}
        return scaled(extra_bytes(row, measured), wholes[target.relative_to])
    if target.measure == "error":
        return None if other is None else _gradient_error(row, other)
    return _ratio(row, other, target.measure)


def _gradient_error(row: Json, other: Json) -> float | None:
    """The larger ratio of the two gradients' errors."""
    if not (row["error"] and other["error"]):
        return None
    return max(row["error"][name] / other["error"][name] for name in ("d_hidden", "d_weight"))


def against_floor(row: Json) -> float | None:
    """A kernel's time over its floor's, within turns; of copies, both for each byte."""
    if row["failure"] or not row["both"] or not row["floor"]:
        return None
    bytes_ = row["floor_bytes"] / row["bytes"] if row["floor_bytes"] else 1.0
    return bytes_ * statistics.median(x / y for x, y in zip(row["both"], row["floor"], strict=True))


def extra_bytes(row: Json, measured: Json) -> int | None:
    """Of a step, beyond the inputs, the gradients and their accumulators."""
    gradients = measured["frozen_gradient_bytes" if row["frozen"] else "gradient_bytes"]
    return None if row["peak_bytes"] is None else row["peak_bytes"] - gradients


def bandwidth(row: Json) -> float | None:
    """Bytes in a second."""
    return row["bytes"] / statistics.median(row["both"]) if row["bytes"] and row["both"] else None


def _ratio(row: Json | None, other: Json | None, what: str) -> float | None:
    if row is None or other is None:
        return None
    return ratio({"seconds": row[what]}, {"seconds": other[what]})


def _milliseconds(seconds: Iterable[float]) -> str:
    found = list(seconds)
    return f"{1e3 * statistics.median(found):.3f}" if found else ""
