"""The same training with logitless and with materialised logits: what each cost, and how far they differ."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from logitless.training.metrics import Record, read_metrics

CURVE_TOLERANCE = 1e-3  # nats; float32 rounding, grown over some steps of training, is far below
MIB = 2**20


@dataclass(frozen=True)
class Run:
    """Metrics of one run, from a metrics.jsonl that was written with logging_steps=1."""

    losses: list[float]  # of every step
    step_seconds: float  # median, which the first step, slower by its set-up, hardly moves
    peak_memory: int  # bytes
    evaluations: list[Record]  # in the order in which they were made

    @classmethod
    def read(cls, folder: Path) -> Run:
        """The run that wrote to `folder`."""
        records = read_metrics(folder)
        steps = [record for record in records if "loss" in record]
        seen = [0, *(record["num_tokens"] for record in steps)]
        seconds = [
            (after - before) / record["tokens_per_second"]
            for before, after, record in zip(seen, seen[1:], steps, strict=False)
        ]
        return cls(
            losses=[record["loss"] for record in steps],
            step_seconds=statistics.median(seconds),
            peak_memory=max(record["peak_memory"] for record in steps),
            evaluations=[record for record in records if "eval_loss" in record],
        )


@dataclass(frozen=True)
class Comparison:
    """One training method, run both ways."""

    name: str
    ours: Run
    materialised: Run

    @property
    def largest_difference(self) -> float:
        """Largest difference of the two training curves, in nats."""
        pairs = zip(self.ours.losses, self.materialised.losses, strict=True)
        return max(abs(ours - materialised) for ours, materialised in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the results file."""
        return {
            "held_out": {"before": self.ours.evaluations[0], "after": self.ours.evaluations[-1]},
            "logitless": _costs(self.ours),
            "materialised": _costs(self.materialised),
            "largest_curve_difference": self.largest_difference,
        }


def _costs(run: Run) -> dict[str, Any]:
    return {"losses": run.losses, "step_seconds": run.step_seconds, "peak_memory": run.peak_memory}


def cost_table(comparisons: list[Comparison]) -> Table:
    """Time, memory and the agreement of the curves."""
    table = Table("", "logitless", "materialised logits", "ratio", title="What it cost")
    for each in comparisons:
        ours, other = each.ours, each.materialised
        table.add_row(
            f"{each.name}: seconds per step",
            f"{ours.step_seconds:.2f}",
            f"{other.step_seconds:.2f}",
            f"{ours.step_seconds / other.step_seconds:.2f}",
        )
        table.add_row(
            f"{each.name}: peak memory, MiB",
            f"{ours.peak_memory / MIB:.0f}",
            f"{other.peak_memory / MIB:.0f}",
            f"{ours.peak_memory / other.peak_memory:.2f}",
        )
        table.add_row(f"{each.name}: largest difference of the curves", f"{each.largest_difference:.1e}", "", "")
    return table


def learning_table(rows: list[tuple[str, str, str]]) -> Table:
    """A table of (quantity, before, after) on held-out questions."""
    table = Table("on held-out questions", "before", "after", title="What was learnt")
    for row in rows:
        table.add_row(*row)
    return table


def plot(comparisons: list[Comparison], file: Path) -> None:
    """Both training curves of each method over one another, and their difference below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(comparisons), 5), layout="constrained")
    axes = figure.subplots(2, len(comparisons), sharex="col", squeeze=False, height_ratios=(3, 1))
    for (above, below), each in zip(axes.T, comparisons, strict=True):
        steps = range(1, len(each.ours.losses) + 1)
        above.plot(steps, each.materialised.losses, color="tab:orange", linewidth=5, label="materialised logits")
        above.plot(steps, each.ours.losses, color="tab:blue", marker="o", markersize=3, label="logitless")
        above.set(title=each.name, ylabel="training loss")
        above.legend()
        differences = [abs(a - b) for a, b in zip(each.ours.losses, each.materialised.losses, strict=True)]
        below.plot(steps, [max(difference, 1e-12) for difference in differences], color="tab:gray", marker=".")
        below.set(yscale="log", xlabel="step", ylabel="difference")
        below.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(file, dpi=150)
