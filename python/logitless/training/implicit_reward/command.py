"""Rows with the implicit reward of their answers: what `logitless reward` does.

    rows ──> tokens, as training has them ──> model, reference ──> JSONL, a summary, and if asked a page and a plot

A row of JSONL has an answer's tokens and the numbers of each (`scores.py`). Batches are written as they come, so that
memory holds the rows, one batch of numbers, and what the summary and the page need.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from logitless.losses import NLL
from logitless.training import files, parallel
from logitless.training.checks import check_finite, check_positions, check_tokenizers, check_vocabulary
from logitless.training.collate import consecutive
from logitless.training.config import TrainOptions
from logitless.training.errors import InputError
from logitless.training.frozen import start_alone
from logitless.training.implicit_reward.page import Shown, html_page
from logitless.training.implicit_reward.picture import draw, require_matplotlib
from logitless.training.implicit_reward.rows import AnswerRows, read_answers
from logitless.training.implicit_reward.scores import Scorer
from logitless.training.implicit_reward.summary import (
    Collected,
    Summary,
    summary_facts,
    summary_lines,
    summary_tables,
)
from logitless.training.metrics import Progress
from logitless.training.model import hide_progress_bars, load_model, load_tokenizer, locate, patched
from logitless.training.objective import engine_of
from logitless.training.parallel import World
from logitless.training.places import require_places
from logitless.training.row_files import require_file
from logitless.training.run import confirm_patch

BETA = 1.0  # as in the endogenous reward's paper; it only scales
PICTURE_ROWS = 4  # how many of the first rows the plot has


class Outputs(NamedTuple):
    """The files to write."""

    rows: Path  # .jsonl
    html: Path | None = None
    png: Path | None = None

    @property
    def summary(self) -> Path:
        """Beside the rows."""
        return self.rows.with_suffix(".summary.json")


def write_rewards(
    options: TrainOptions,
    output: str,
    *,
    labels: str | None = None,
    html: str | None = None,
    png: str | None = None,
) -> Summary:
    """Writes the implicit reward of every token of the answers in `options.dataset_name`, and returns the summary.

    The options are those of a training run. The model is `model_name_or_path` and the reference
    `teacher_model_name_or_path`; without a reference the reward is the endogenous one. `beta` is the unit, 1 by
    default, and `seed` that of the resampling. A row of which `max_length` leaves no answer is left out.

    Args:
        output: the file to write, .jsonl; a file of the same name with .summary.json gets the summary. Each appears
            when it is whole.
        labels: the column of single answers that says which of them are right; a pair's sides say it themselves.
        html: a page to write, .html, of the first 100 rows.
        png: a plot to write, .png, of the first 4 rows; needs matplotlib.

    Raises:
        InputError: options, rows, labels or models that cannot be used.

    Source: `losses.dense_rewards` has the formulas and their papers.
    """
    outputs = _named_outputs(output, html, png)
    if options.mixture is not None:
        raise InputError("mixture: a model scores the rows of one dataset_name; score each data set by itself")
    if options.beta is not None and options.beta <= 0:
        raise InputError(f"beta must be positive, got {options.beta}")
    options.require_inputs()
    world = parallel.start(options.use_cpu)
    try:
        start_alone(world, "the computation of rewards")
        return _write_files(options, world, outputs, labels)
    finally:
        parallel.stop(world)


def _named_outputs(output: str, html: str | None, png: str | None) -> Outputs:
    outputs = Outputs(
        require_file(output, "output", ".jsonl"),
        None if html is None else require_file(html, "html", ".html"),
        None if png is None else require_file(png, "png", ".png"),
    )
    if png is not None:
        require_matplotlib()
    return outputs


def _write_files(options: TrainOptions, world: World, outputs: Outputs, labels: str | None) -> Summary:
    require_places(options)
    source = locate(options)
    if Path(source).is_dir():  # a download's bars stay
        hide_progress_bars()
    read = read_answers(options, source, labels)
    batches = consecutive(len(read.items), options.per_device_eval_batch_size)
    progress, collected = Progress(0, len(batches)), Collected()
    try:
        progress.say(f"data: {read.data.summary()}")
        scorer = _scorer(options, world, read, progress.say)
        with files.new_file(outputs.rows) as unfinished, unfinished.open("w", encoding="utf-8") as file:
            for number, batch in enumerate(batches, 1):
                for record in _scored_rows(scorer, read, batch, collected):
                    file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
                progress.advance(number)
        about = {"model": options.model_name_or_path, "reference": options.teacher_model_name_or_path}
        summary = collected.summary(read, about | {"beta": scorer.beta}, options.seed)
        files.write_json(outputs.summary, summary)
        _show_rows(outputs, collected.shown, summary)
        for line in (*summary_lines(summary), f"done: {len(read.items)} rows in {outputs.rows}"):
            progress.say(line)
        return summary
    finally:
        progress.stop()


def _scored_rows(scorer: Scorer, read: AnswerRows, batch: Sequence[int], collected: Collected) -> list[dict[str, Any]]:
    """The rows of a batch, as they are written."""
    sides = len(read.names)
    examples = [example for index in batch for example in read.items[index]]
    found = scorer(examples, [read.rows[index].origin for index in batch for _ in range(sides)])
    return [collected.add(read, index, found[place * sides : (place + 1) * sides]) for place, index in enumerate(batch)]


def _scorer(options: TrainOptions, world: World, read: AnswerRows, say: Callable[[str], None]) -> Scorer:
    engine = engine_of(options, NLL(), world.device)
    reference = options.teacher_model_name_or_path

    def loaded(name: str) -> Any:
        own = dataclasses.replace(options, model_name_or_path=name, use_peft=False)
        source = locate(own)
        if name == reference:
            theirs = load_tokenizer(source, own)
            check_tokenizers(read.tokenizer, theirs, [read.data], name, whole=True, role="reference")
        model = patched(load_model(source, own, world, frozen=True), own, NLL()).eval()
        check_finite(model, name)
        check_vocabulary(model, read.tokenizer, read.reach, name)
        for note in check_positions(model, read.reach, name):
            say(f"note: {note}")
        confirm_patch(engine, model, own, world.device)
        return model

    return Scorer(
        engine=engine,
        model=loaded(options.model_name_or_path),
        reference=None if reference is None else loaded(reference),
        tokenizer=read.tokenizer,
        beta=BETA if options.beta is None else options.beta,
        device=world.device,
    )


def _show_rows(outputs: Outputs, rows: Sequence[Shown], summary: Summary) -> None:
    """Writes the page and the plot that are asked for."""
    with_reference = summary["reference"] is not None
    if outputs.html is not None:
        facts = summary_facts(summary)
        if len(rows) < summary["rows"]:
            facts["shown here"] = f"the first {len(rows)} rows"
        files.write_text(outputs.html, html_page(rows, facts, summary_tables(summary), with_reference))
    if outputs.png is not None:
        draw(rows[:PICTURE_ROWS], outputs.png, with_reference)
