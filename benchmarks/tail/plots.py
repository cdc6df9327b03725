"""The picture and the tables of what the suite `tail` measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logitless.bench.environment import processor
from logitless.bench.report import load
from logitless.bench.tables import table
from logitless.bench.targets import Json

from ..figures.pictures import Picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def picture(path: Path) -> Picture:
    """The PNG beside a file of results."""
    return Picture(path.with_suffix(".png"), load(path), draw)


def draw(results: Json) -> Figure:
    """Six panels; one whose measurement is missing stays empty."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 13.5), dpi=110, layout="tight")
    axes = figure.subplots(3, 2)
    kept_against_tolerance(axes[0][0], of_kind(results, "curves"))
    error_against_kept(axes[0][1], of_kind(results, "curves"))
    time_against_exact(axes[1][0], of_kind(results, "times"))
    error_by_order(axes[2][0], of_kind(results, "orders"), "entries")
    error_by_order(axes[2][1], of_kind(results, "orders"), "blocks of 128")
    runs = of_kind(results, "finetune")
    if runs:
        losses(axes[1][1], runs)
    else:
        axes[1][1].set_axis_off()
    return figure


def of_kind(results: Json, kind: str) -> list[Json]:
    """The parts of one kind of measurement."""
    return [part for part in results["parts"].values() if part["kind"] == kind]


def _name(result: Json) -> str:
    return f"{result['text']}, {result['label']}"


def kept_against_tolerance(axis: Any, curves: list[Json]) -> None:
    for result, colour in zip(curves, COLOURS, strict=False):
        x = [point["tolerance"] for point in result["points"]]
        axis.plot(
            x,
            [point["kept"] for point in result["points"]],
            color=colour,
            label=f"{_name(result)} ({result['loss']:.2f})",
        )
        axis.plot(x, [point["blocks_kept"] for point in result["points"]], color=colour, linestyle=":")
    axis.set(xscale="log", yscale="log", xlabel="tolerance", ylabel="share of the logits kept")
    axis.set_title("what is kept: entries (solid), blocks of 64 (dotted)")
    if curves:
        axis.legend(fontsize=7, title="text, model (loss)")


def error_against_kept(axis: Any, curves: list[Json]) -> None:
    rules = (("kept", "corrected", "-"), ("kept", "dropped", "--"), ("blocks_kept", "blocks_corrected", ":"))
    for result, colour in zip(curves, COLOURS, strict=False):
        for kept, errors, style in rules:
            points = [(point[kept], point[errors][0]) for point in result["points"]]
            axis.plot(*zip(*points, strict=True), style, color=colour, label=_name(result) if style == "-" else None)
        axis.axhline(result["bfloat16"][0], color=colour, linewidth=0.5)
    axis.set(xscale="log", yscale="log", xlabel="share of the logits kept", ylabel="relative error of d hidden")
    axis.set_title("error: corrected; dropped (dashed), blocks (dotted), bf16 (thin)", fontsize=10)


def time_against_exact(axis: Any, times: list[Json]) -> None:
    rows = [(f"{result['text']}: {name}", row, result) for result in times for name, row in result["methods"].items()]
    ratios = [min(row["seconds"]) / min(result["methods"]["three GEMMs"]["seconds"]) for _, row, result in rows]
    axis.barh(range(len(rows)), ratios)
    axis.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=6)
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=0.5)
    axis.set(xlabel="time / three GEMMs (best of the rounds)")


def error_by_order(axis: Any, orders: list[Json], rule: str) -> None:
    """The larger of the two errors, of the first text measured."""
    for result in orders[:1]:
        for (name, rows), colour in zip(_drawn(result["orders"]), COLOURS, strict=False):
            points = [(point["kept"], max(point["errors"])) for point in rows[rule]["points"]]
            axis.plot(*zip(*points, strict=True), color=colour, label=name)
        axis.axhline(max(result["equal_error"]), color="black", linewidth=0.5)
        axis.set(xscale="log", yscale="log", xlabel="share of the logits kept", ylabel="the larger relative error")
        axis.xaxis.set_minor_formatter("")
        axis.set_title(f"orders of the vocabulary, {rule}: {_name(result)}", fontsize=10)
        axis.legend(fontsize=7)


def _drawn(orders: Json) -> list[tuple[str, Json]]:
    """The native order, the best of each way from other tokens of the text, from another text, and from the head."""
    starts = ("native", "mean probability, another part", "head: clusters", "clusters of logits, another part")
    names = [name for start in starts for name in orders if name.startswith(start)][:4]
    others = [name for name in orders if name.startswith("clusters of logits") and "part" not in name]
    return [(name, orders[name]) for name in [*names, *(x for x in others if "these" not in x)]]


def losses(axis: Any, runs: list[Json], width: int = 10) -> None:
    for result, colour in zip(runs, COLOURS, strict=False):
        values = result["losses"]
        smooth = [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]
        axis.plot(smooth, color=colour, linewidth=1, label=_run(result))
    axis.set(xlabel="step", ylabel=f"loss, mean of the last {width}")
    axis.legend(fontsize=7)


def _run(result: Json) -> str:
    return f"{result['label']}, {result['text']}"


def markdown(results: Json) -> str:
    """The tables of all parts."""
    processors = dict.fromkeys(processor(part["environment"]) for part in results["parts"].values())
    head = (
        "# The tail-corrected backward, measured\n\nWritten by `python -m benchmarks tail`; its JSON has every sample. "
        f"Measured on {'; '.join(processors)}."
    )
    kinds = ("curves", "orders", "times", "flat")
    sections = [section(result) for kind in kinds for result in of_kind(results, kind)]
    runs = of_kind(results, "finetune")
    return "\n\n".join([head, *sections, *([_finetune(runs)] if runs else [])]) + "\n"


def section(result: Json) -> str:
    """One part's heading and table."""
    texts = {"curves": _curve, "orders": _orders, "times": _times, "flat": _times}
    kind = result["kind"]
    return _finetune([result]) if kind == "finetune" else texts[kind](result)


def pair(errors: Sequence[float]) -> str:
    """Errors of d hidden and of d weight."""
    return ", ".join(f"{x:.4f}" for x in errors)


def _curve(result: Json) -> str:
    title = f"## {_name(result)}: loss {result['loss']:.2f}, {result['tokens']} tokens"
    return f"{title}\n\n{curve_table(result)}"


def curve_table(result: Json) -> str:
    """Shares kept and errors by tolerance, under those of exact bfloat16 arithmetic."""
    note = "Exact in bfloat16: d hidden {:.4f}, d weight {:.4f}.".format(*result["bfloat16"])
    head = ["tolerance", "entries kept", "tail mass", "corrected: d hidden, d weight", "dropped"]
    rows = []
    for p in result["points"]:
        entries = [f"{p['kept']:.4f}", f"{p['tail_mass']:.4f}", pair(p["corrected"]), pair(p["dropped"])]
        blocks = [f"{p['blocks_kept']:.3f}", pair(p["blocks_corrected"])]
        rows.append([f"2^{_exponent(p['tolerance'])}", *entries, *blocks])
    return f"{note}\n\n{table([*head, 'blocks of 64 kept', 'corrected'], rows)}"


def _exponent(tolerance: float) -> int:
    return round(math.log2(tolerance))


def cpu_time(kept: float) -> float:
    """Time of a single pass by entries over the three GEMMs, by the model of docs/tail-corrected.md.

    The passes' share and a kept entry's cost were measured once: docs/log.md, 2026-11-21.
    """
    return (1 + 0.21 + 2 * 9 * kept + 2 / 256) / 3


def gpu_gemms(kept: float) -> float:
    """GEMMs of a forward and a backward by blocks; the exact single pass has 3, recomputing 4."""
    return 1 + 3 * kept


#: Each rule, the exponent of a tolerance that shows its errors, and what a share kept costs, in which unit.
RULES = (
    ("entries", -12, cpu_time, "of three GEMMs"),
    ("blocks of 128", -10, gpu_gemms, "GEMMs"),
    ("blocks of 64", -10, gpu_gemms, "GEMMs"),
)


def _order(result: Json, tolerance: float, cost: Callable[[float], float]) -> list[str]:
    kept = result["kept_at_equal_error"]
    errors = pair(next(p["errors"] for p in result["points"] if p["tolerance"] == tolerance))
    return [errors, "", ""] if kept is None else [errors, f"{kept:.4f}", f"{cost(kept):.2f}"]


def _orders(result: Json) -> str:
    title = f"## Orders of the vocabulary: {_name(result)}, {result['tokens']} tokens"
    note = "Equal error: that of single entries in the native order at 2^-12, d hidden {:.4f} and d weight {:.4f}."
    head, rows = ["order"], []
    for rule, exponent, _, unit in RULES:
        head += [f"{rule}, errors at 2^{exponent}", "kept at equal error", unit]
    for name, by_rule in result["orders"].items():
        cells = [_order(by_rule[rule], 2.0**exponent, cost) for rule, exponent, cost, _ in RULES]
        rows.append([name, *itertools.chain(*cells)])
    return "\n\n".join([title, note.format(*result["equal_error"]), table(head, rows)])


def _times(result: Json) -> str:
    title = f"## {result['kind']}: {_name(result)}, N {result['tokens']}"
    methods = result["methods"]
    base, cpu = min(methods["three GEMMs"]["seconds"]), methods["three GEMMs"]["cpu_seconds"]
    rows = [
        [
            name,
            f"{min(row['seconds']):.2f}",
            f"{min(row['seconds']) / base:.3f}",
            f"{row['cpu_seconds'] / cpu:.3f}",
            f"{row['errors'][0]:.0e}" if "errors" in row else "",
            pair(row["errors"][1:]) if "errors" in row else "",
            f"{row['kept']:.4f}" if "kept" in row else "",
        ]
        for name, row in methods.items()
    ]
    about = result["environment"]
    note = f"{processor(about)}, torch {about['versions']['torch']}; load {about['load']} at the start."
    head = ["method", "s, best", "/ three GEMMs", "CPU time / theirs", "loss off by", "d hidden, d weight", "kept"]
    return "\n\n".join([title, note, table(head, rows)])


def _finetune(runs: list[Json]) -> str:
    return f"## Fine-tuning\n\n{finetune_table(runs)}"


def finetune_table(runs: list[Json]) -> str:
    """Losses at the beginning and at the end of every run."""
    head = ["run", "steps", "loss of the first 20", "of the last 20"]
    rows = []
    for result in runs:
        x = result["losses"]
        first, last = (f"{sum(some) / len(some):.4f}" for some in (x[:20], x[-20:]))
        rows.append([_run(result), str(len(x)), first, last])
    return table(head, rows)
