"""The same training with logitless and with materialised logits: what each cost, and how far they differ."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from logitless.training.metrics import Record, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVE_TOLERANCE = 1e-3  # nats; float32 rounding, grown over some steps of training, is far below
MIB = 2**20
SHOWN = {  # the methods; metrics of the held-out data, and their names for a reader
    "DFT": {
        "eval_loss": "loss",
        "eval_nll": "negative log-likelihood",
        "eval_mean_token_accuracy": "token accuracy",
    },
    "DPO": {
        "eval_loss": "loss",
        "eval_rewards/margins": "margin",
        "eval_rewards/accuracies": "pairs ranked rightly",
    },
}
LEARNT_HEADER = ("on held-out questions", "before", "after")
COSTS_HEADER = ("", "logitless", "materialised logits", "ratio")
COSTS = (("seconds per step", "step_seconds", 1, ".2f"), ("peak memory, MiB", "peak_memory", MIB, ".0f"))


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


def learnt(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of what training changed on held-out questions, from the results file: (what, before, after)."""
    right, rows = results["right_answers"], []
    for method, names in SHOWN.items():
        before, after = (results[method]["held_out"][when] for when in ("before", "after"))
        rows += [(f"{method}: {text}", f"{before[name]:.3f}", f"{after[name]:.3f}") for name, text in names.items()]
    for method, before, after in (("DFT", "base", "DFT"), ("DPO", "DFT", "DPO")):
        rows.append((f"{method}: right answers of {right['of']}", str(right[before]), str(right[after])))
    return rows


def costs(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of time, memory and the agreement of the curves: (what, logitless, materialised, their ratio)."""
    rows = []
    for method in SHOWN:
        ours, other = (results[method][way] for way in ("logitless", "materialised"))
        for text, name, unit, form in COSTS:
            mine, theirs = ours[name] / unit, other[name] / unit
            rows.append((f"{method}: {text}", f"{mine:{form}}", f"{theirs:{form}}", f"{mine / theirs:.2f}"))
        difference = results[method]["largest_curve_difference"]
        rows.append((f"{method}: largest difference of the curves", f"{difference:.1e}", "", ""))
    return rows


def printed(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    """Rows as a table for a terminal."""
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    return table


def curves(results: Mapping[str, Any]) -> Figure:
    """Both training curves of each method over one another, and their difference below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(SHOWN), 5), dpi=150, layout="constrained")
    axes = figure.subplots(2, len(SHOWN), sharex="col", squeeze=False, height_ratios=(3, 1))
    for (above, below), method in zip(axes.T, SHOWN, strict=True):
        ours, other = (results[method][way]["losses"] for way in ("logitless", "materialised"))
        steps = range(1, len(ours) + 1)
        above.plot(steps, other, color="tab:orange", linewidth=5, label="materialised logits")
        above.plot(steps, ours, color="tab:blue", marker="o", markersize=3, label="logitless")
        above.set(title=method, ylabel="training loss")
        above.legend()
        differences = [abs(a - b) for a, b in zip(ours, other, strict=True)]
        below.plot(steps, [max(difference, 1e-12) for difference in differences], color="tab:gray", marker=".")
        below.set(yscale="log", xlabel="step", ylabel="difference")
        below.xaxis.get_major_locator().set_params(integer=True)
    return figure
