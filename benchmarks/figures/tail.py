"""The tables and pictures of docs/tail-corrected.md, from the results of the suite `tail`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from logitless.bench.report import load
from logitless.bench.tables import number
from logitless.bench.targets import Json, ratio

from ..tail import plots
from ..tail.times import FLOOR
from .pictures import Picture
from .results import Measured, newest, origin, paragraph, plain_table
from .side_by_side import Row, Rows, Table

FILE, DEFAULT = "tail", 2.0**-12
#: The model and the text that most is measured on.
MODEL, TEXT = "as released", "docstrings"


def tolerances(results: Path) -> str:
    """The picture, and shares kept and errors by tolerance."""
    measured = _newest(results, "curves")
    folder = f"../benchmarks/results/{measured.kind}"
    about = (
        f"Loss {measured.found['loss']:.2f}, {measured.found['tokens']} tokens; {measured.origin}. "
        f"[Every table]({folder}/{FILE}.md)."
    )
    image = f"![share kept, errors and times]({folder}/{FILE}.png)"
    return f"{image}\n\n{paragraph(about)}\n{plots.curve_table(measured.found)}\n"


def _newest(results: Path, kind: str) -> Measured:
    return newest(results, FILE, f"{kind} / {MODEL} / {TEXT}")


def texts(results: Path) -> str:
    """Loss, share kept and errors at the default tolerance, by text and model."""
    kind = _newest(results, "curves").kind
    curves = plots.of_kind(load(results / kind / f"{FILE}.json"), "curves")
    found = {(part["text"], part["label"]): part for part in curves}
    names, labels = (list(dict.fromkeys(keys)) for keys in zip(*found, strict=True))
    header = ["text", *(f"{label}: {what}" for label in labels for what in ("loss", "kept", "errors"))]
    rows = [[name, *(cell for label in labels for cell in _at_default(found.get((name, label))))] for name in names]
    about = origin(kind, [part["environment"] for part in curves])
    return f"{plain_table(header, rows)}\n{paragraph(about + '.')}"


def _at_default(part: Json | None) -> list[str]:
    if part is None:
        return ["", "", ""]
    point = next(each for each in part["points"] if each["tolerance"] == DEFAULT)
    return [f"{part['loss']:.2f}", f"{point['kept']:.4f}", plots.pair(point["corrected"])]


def orders(results: Path) -> str:
    """What each order of the vocabulary is worth."""
    measured = _newest(results, "orders")
    header = ["order", "entries, errors at 2^-12", "kept at equal error", "blocks of 128 kept", "blocks of 64 kept"]
    rows = [[name, *_order(rules)] for name, rules in measured.found["orders"].items()]
    errors = plots.pair(measured.found["equal_error"])
    about = f"{measured.found['tokens']} tokens, equal error {errors}; {measured.origin}."
    return f"{plain_table(header, rows)}\n{paragraph(about)}"


def _order(rules: Json) -> list[str]:
    entries, *blocks = (rules[name] for name in ("entries", "blocks of 128", "blocks of 64"))
    errors = next(point["errors"] for point in entries["points"] if point["tolerance"] == DEFAULT)
    kept = [entries["kept_at_equal_error"], *(rule["kept_at_equal_error"] for rule in blocks)]
    return [plots.pair(errors), number(kept[0], ".4f"), *(number(share, ".3f") for share in kept[1:])]


def finetune(results: Path) -> str:
    """Losses of a training with the strategy and without."""
    kind = newest(results, FILE, "finetune / exact / seed 0").kind
    runs = plots.of_kind(load(results / kind / f"{FILE}.json"), "finetune")
    about = origin(kind, [run["environment"] for run in runs])
    return f"{plots.finetune_table(runs)}\n\n{paragraph(about + '.')}"


def times(results: Path) -> str:
    """Time and errors of every method on every kind of machine, and of flat distributions."""
    parts = [part for path in sorted(results.glob(f"*/{FILE}.json")) for part in load(path)["parts"].values()]
    rows = [*_rows(parts, "times", ""), *_rows(parts, "flat", "flat distributions, ")]
    return Table("", ("time", "loss off by", "errors"), _cells, rows).text(results)


def _rows(parts: Sequence[Json], kind: str, label: str) -> Iterator[Row]:
    pattern = f"{kind} / {MODEL}.* / {TEXT}"
    for method in dict.fromkeys(name for part in parts if part["kind"] == kind for name in part["methods"]):
        if method != FLOOR:
            yield Row(label + method, FILE, pattern, ours=method, others=(FLOOR,))


def _cells(rows: Rows) -> Sequence[str]:
    """Time over the three GEMMs, error of the loss, and those of the gradients."""
    mine, floor = rows
    loss, *gradients = (mine or {}).get("errors") or [None]
    return [number(ratio(mine, floor), ".2f"), number(loss, ".0e"), plots.pair(gradients)]


def pictures(results: Path) -> Iterator[Picture]:
    """One beside every file of results."""
    for path in sorted(results.glob(f"*/{FILE}.json")):
        yield plots.picture(path)
