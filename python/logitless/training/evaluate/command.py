"""From options to figures: what the rows allow to be measured, measured, shown and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from logitless.training import files, parallel
from logitless.training.checks import Reach, reach_of
from logitless.training.config import TrainOptions
from logitless.training.data import Row, read_rows
from logitless.training.errors import InputError
from logitless.training.evaluate.answers import (
    has_pairs,
    measures_of_answers,
    measures_of_pairs,
    prompts_of_answers,
    prompts_of_pairs,
)
from logitless.training.evaluate.measures import Figure, Measure, figure
from logitless.training.evaluate.sampled import make_judge, measures_of_samples, rows_of_samples, sample_prompts
from logitless.training.examples import TokenizedData
from logitless.training.forms import canonical_prompt, renamed
from logitless.training.frozen import load_frozen, load_reference_of, start_alone
from logitless.training.loader import row_renderer
from logitless.training.metrics import Progress
from logitless.training.model import load_tokenizer, locate
from logitless.training.parallel import World
from logitless.training.places import require_places
from logitless.training.render import Renderer
from logitless.training.right import Right
from logitless.training.rollouts.prompts import Prompts, reach_of_prompts, read_prompts
from logitless.training.rollouts.setup import make_generator, sampling_of
from logitless.training.row_files import require_file, write_rows
from logitless.training.tables import print_table
from logitless.training.template_date import with_date

#: The options that say how completions are drawn, which the file of metrics holds.
SAMPLING = ("num_generations", "max_completion_length", "temperature", "top_p", "top_k", "min_p", "seed")


def evaluate_model(
    options: TrainOptions, *, output: str | None = None, metrics_file: str | None = None, right: Right | None = None
) -> dict[str, Figure]:
    """Measures the model of the options on the rows of `dataset_name` as `logitless evaluate` does.

    What is measured follows from rows and options:

        reward_funcs, or on_policy     samples: rewards, accuracy, pass@k, lengths, entropy
          with a teacher               and their divergence from the reference
        chosen and rejected            preference accuracy and margins
          with a teacher               and those of implicit rewards
        an answer                      its negative log-likelihood and token accuracy

    Args:
        output: file for the samples, .jsonl or .parquet: rows of prompt and completion with their rewards.
        metrics_file: file for the figures, JSON.
        right: what counts as right for accuracy and pass@k; by default a reward of at least 1.

    Returns:
        The figures by name, as the table shows them.

    Raises:
        InputError: options, rows, models or functions that cannot be used.
    """
    options.require_inputs()
    if options.mixture is not None:
        raise InputError("mixture: rows of one dataset_name are evaluated; evaluate each data set by itself")
    path = None if output is None else require_file(output, "output")
    if path is not None and not options.samples:
        raise InputError("output: nothing is sampled without reward_funcs, or on_policy")
    json_path = None if metrics_file is None else require_file(metrics_file, "json", ".json")
    world = parallel.start(options.use_cpu)
    try:
        start_alone(world, "an evaluation")
        require_places(options)
        figures = _measured_all(options, world, path, Right() if right is None else right)
    finally:
        parallel.stop(world)
    if json_path is not None:
        files.write_json(json_path, _as_json(options, figures))
    return figures


class _Tokens(NamedTuple):
    """The rows of an evaluation, tokenised for everything that is measured of them."""

    prompts: Prompts | None  # to be sampled
    answers: TokenizedData | None
    pairs: TokenizedData | None
    number: torch.Tensor  # of the prompt of each answer, or pair
    reach: list[Reach]

    @property
    def data(self) -> list[TokenizedData]:
        return [each for each in (self.prompts, self.answers, self.pairs) if each is not None]


def _read_for(options: TrainOptions, renderer: Renderer) -> _Tokens:
    name, chat = options.dataset_name, bool(renderer.tokenizer.chat_template)
    rows = read_rows(name, split=options.dataset_test_split, config=options.dataset_config)
    rows = renamed(rows, options.column_map)
    prompts, reach = None, []
    if options.samples:
        room = options.max_completion_length
        prompts = read_prompts(rows, renderer, name, room=room, demonstrations=False)
        reach.append(reach_of_prompts(prompts, room))
    if has_pairs(rows):
        pairs = renderer.pairs(rows, name)
        number = prompts_of_pairs([rows[i] for i in pairs.kept], chat)
        return _Tokens(prompts, None, pairs, number, [*reach, reach_of(pairs, rows)])
    answered = [row for row in rows if _is_answered(row, options, chat)]
    if not answered:
        if prompts is None:
            raise InputError(f"{name}: no row has an answer, or chosen and rejected; name reward_funcs, so that the "
                             "model answers the prompts itself")  # fmt: skip
        return _Tokens(prompts, None, None, torch.zeros(0), reach)
    answers = renderer.sequences(answered, name)
    number = prompts_of_answers([answered[i] for i in answers.kept], renderer)
    return _Tokens(prompts, answers, None, number, [*reach, reach_of(answers, answered)])


def _is_answered(row: Row, options: TrainOptions, chat: bool) -> bool:
    """Whether the row holds something whose likelihood can be measured."""
    if row.values.get(options.dataset_text_field) is not None and not options.samples:
        return True
    return "completion" in canonical_prompt(row, chat=chat).values


def _measured_all(options: TrainOptions, world: World, output: Path | None, right: Right) -> dict[str, Figure]:
    judge = make_judge(options, right)  # before time is spent on models
    tokenizer = load_tokenizer(locate(options), options)
    renderer = row_renderer(options, with_date(tokenizer, datetime.now()))
    read = _read_for(options, renderer)
    policy, notes = load_frozen(options, world, tokenizer, read.reach)
    reference, more = load_reference_of(policy, world, tokenizer, read.reach, read.data)
    measures: dict[str, Measure] = {}
    progress = Progress(0, max(len(data.items) for data in read.data))
    try:
        for line in [*(data.summary() for data in read.data), *(f"note: {note}" for note in [*notes, *more])]:
            progress.say(line)
        if read.prompts is not None:
            generator = make_generator(options, world, policy.model, tokenizer, policy.pad_token, renderer.answer_end,
                                       bf16=policy.engine.bf16)  # fmt: skip
            sampling = sampling_of(options)
            sampled = sample_prompts(options, generator, read.prompts, judge, tokenizer, progress)
            measures |= measures_of_samples(sampled, right, policy, reference, sampling.temperature or 1.0,
                                            cuts=sampling.cuts)  # fmt: skip
            if output is not None:
                write_rows(output, rows_of_samples(sampled, tokenizer))
        if read.pairs is not None:
            measures |= measures_of_pairs(read.pairs, read.number, policy, reference, progress)
        if read.answers is not None:
            measures |= measures_of_answers(read.answers, read.number, policy, progress)
    finally:
        progress.stop()
    figures = {name: figure(found, seed=options.seed) for name, found in measures.items()}
    print_table(options.model_name_or_path, ("metric", "value", "95% interval", "prompts", "items"), _cells(figures))
    return figures


def _cells(figures: Mapping[str, Figure]) -> Sequence[Sequence[str]]:
    return [
        (name, f"{own.value:.4g}", "{:.4g} to {:.4g}".format(*own.interval), str(own.prompts), str(own.items))
        for name, own in figures.items()
    ]


def _as_json(options: TrainOptions, figures: Mapping[str, Figure]) -> dict[str, Any]:
    """What the file of metrics holds."""
    content: dict[str, Any] = {
        "model_name_or_path": options.model_name_or_path,
        "teacher_model_name_or_path": options.teacher_model_name_or_path,
        "dataset_name": options.dataset_name,
        "metrics": {name: own.to_dict() for name, own in figures.items()},
    }
    return content | ({"sampling": {name: getattr(options, name) for name in SAMPLING}} if options.samples else {})
