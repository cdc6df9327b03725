"""The approximate strategies on SmolLM2 and real text, which docs/tail-corrected.md shows.

python -m benchmarks tail --only curves      share kept, error with and without correction
python -m benchmarks tail --only orders      of the vocabulary, on tokens that they were not made from
python -m benchmarks tail --only times       against the three GEMMs and the exact methods, in turns
python -m benchmarks tail --only finetune    loss curves with it and without
python -m benchmarks tail --tiny             the first three on made-up tensors, in seconds; not saved
python -m benchmarks tail --tables FILE.json the tables and the PNG of a file again, without measuring

Without --only all four, but what the file has from this commit and processor. --work keeps the model, hidden states and
the fine-tuned model (runs/tail). --model measures another folder's model than SmolLM2 as it comes, such as
WORK/finetuned after `finetune`; --label names it in the results.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import logitless
from logitless.bench.environment import describe
from logitless.bench.problem import Inputs, Problem
from logitless.bench.report import Report
from logitless.bench.targets import Json

from ..tail import data, exact, orders, plots, times
from ..tail.finetune import RUNS, Settings, finetune
from .suite import options, output, tables_again

PARTS = ("curves", "orders", "times", "finetune")
#: Tokens of a text that hidden states are computed for, and that are measured by default.
WHOLE, MEASURED = 4096, 1024
#: A tiny run's tensors: a vocabulary of three blocks.
TINY = Problem(96, hidden=24, vocabulary=700, data="peaked")


class TailReport(Report):
    """One part for each kind of measurement, model and text: `kind / label / text`."""

    def __init__(self, given: argparse.Namespace, end: float) -> None:
        about, tables = describe(tiny=given.tiny), plots.markdown
        super().__init__(
            "tail",
            output(given, about),
            about,
            end=end,
            tiny=given.tiny,
            tables=tables,
            text=lambda _, x: plots.section(x),
        )
        self.given = given
        self.texts = given.texts[:1] if given.tiny else given.texts
        self.units: dict[str, Callable[[], Json]] = {}
        for kind in given.only or PARTS[: 3 if given.tiny else 4]:
            {"curves": self._curves, "orders": self._orders, "times": self._times, "finetune": self._finetunes}[kind]()

    def _add(self, kind: str, label: str, text: str, measure: Callable[[], Json]) -> None:
        about = {"kind": kind, "label": label, "text": text}
        self.units[f"{kind} / {label} / {text}"] = lambda: about | measure()

    def measure_part(self, name: str) -> Json:
        self.about = describe(tiny=self.tiny)
        return self.units[name]()

    def _sample(self, text: str, tokens: int = WHOLE, folder: Path | None = None) -> Inputs:
        if self.tiny:
            return TINY.inputs()
        return data.sample(folder or self._folder(), text, tokens, self.given.work / "hidden")

    def _folder(self) -> Path:
        return self.given.model or data.model_folder(self.given.work)

    def _other(self, text: str) -> Inputs:
        """Hidden states of another text."""
        return self._sample(next(name for name in data.TEXTS if name != text))

    def _curves(self) -> None:
        for text in self.texts:
            self._add("curves", self.given.label, text, partial(self._curve, text))

    def _curve(self, text: str) -> Json:
        sample = self._sample(text)
        return exact.curves(data.drawn(sample, self.given.tokens or MEASURED, len(sample.hidden)))

    def _orders(self) -> None:
        for text in self.texts:
            self._add("orders", self.given.label, text, partial(self._order, text))

    def _order(self, text: str) -> Json:
        """An order is made from other tokens of a text, from other texts, and from the model as it was at first."""
        whole = self._sample(text)
        sample, others = orders.split(whole, self.given.tokens or MEASURED)
        sources = {"another part": orders.Source(whole.weight, others)}
        for name in data.TEXTS:
            if name != text:
                other = self._sample(name)
                sources[name] = orders.Source(other.weight, other.hidden[: len(others)])
        if self.given.model is not None:
            before = self._sample(text, folder=data.model_folder(self.given.work))
            sources["another part, before"] = orders.Source(before.weight, before.hidden[-len(others) :])
        return orders.measure(sample, sources, partial(print, f"{self.given.label} {text}", flush=True))

    def _times(self) -> None:
        """Times on every text and, unless methods are named, of flat distributions on the first."""
        for text in self.texts:
            self._add("times", self.given.label, text, partial(self._time, text))
        if not self.given.methods:
            first = self.texts[0]
            self._add("flat", self.given.label, first, partial(self._time, first, flat=True))

    def _time(self, text: str, *, flat: bool = False) -> Json:
        sample = self._sample(text, self.given.tokens or WHOLE)
        order = logitless.vocabulary_order(sample.weight, self._other(text).hidden)
        names = ("tail-corrected 2^-12", "screened 2^-12") if flat else self.given.methods
        every = times.chosen(times.providers(order), names)
        result = times.times(every, times.flat(sample) if flat else sample, self.given.rounds)
        return {"tokens": len(sample.targets), "methods": result}

    def _finetunes(self) -> None:
        settings = Settings(*(getattr(self.given, name) for name in Settings._fields))
        for seed in self.given.seeds:
            for name in RUNS:
                first = name == "tail-corrected" and seed == self.given.seeds[0]
                save = self.given.work / "finetuned" if first else None
                self._add("finetune", name, f"seed {seed}", partial(self._finetune, name, seed, settings, save))

    def _finetune(self, name: str, seed: int, settings: Settings, save: Path | None) -> Json:
        losses = finetune(self._folder(), seed, RUNS[name], settings, save)
        return {"settings": settings._asdict(), "losses": losses}


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.monotonic()
    parser = options("tail", __doc__, PARTS, minutes=240)
    add = parser.add_argument
    add("--work", type=Path, default=Path("runs/tail"), metavar="FOLDER")
    add("--model", type=Path, metavar="FOLDER", help="a Transformers model (default: SmolLM2)")
    add("--label", default="as released", help="the model's name in the results")
    add("--texts", nargs="+", choices=list(data.TEXTS), default=list(data.TEXTS), metavar="TEXT")
    add("--tokens", type=int, help=f"of each text (default {MEASURED}, {WHOLE} for times)")
    add("--rounds", type=int, default=4)
    add("--methods", nargs="+", default=[], help="of times: these, the three GEMMs and the single pass")
    add("--steps", type=int, default=300)
    add("--seeds", type=int, nargs="+", default=[0, 1])
    add("--batch", type=int, default=2, help="sequences of a step")
    add("--length", type=int, default=128, help="tokens of a sequence")
    add("--lr", type=float, default=5e-5)
    given = parser.parse_args(arguments)
    if given.tables is not None:
        tables_again(given.tables, plots.markdown)
        return plots.picture(given.tables).write()
    report = TailReport(given, start + 60 * given.minutes)
    report.measure([name for name in report.units if given.only or not report.has(name)])
    if report.path is None or not report.path.exists():
        return None
    if importlib.util.find_spec("matplotlib") is None:
        return print("no PNG: matplotlib is not installed", file=sys.stderr)
    return plots.picture(report.path).write()
