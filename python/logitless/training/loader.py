"""Data loading: rows are read, tokenised and held out, and any batch of them is collated on demand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from logitless.losses import Loss, PairLoss
from logitless.training.checks import Reach, reach_of
from logitless.training.collate import Batch, Piece, Stored, best_fit, packed, padded, padding_free
from logitless.training.config import TrainOptions
from logitless.training.data import Row, has_split, read_rows
from logitless.training.errors import InputError
from logitless.training.examples import TokenizedData
from logitless.training.forms import renamed, unpaired
from logitless.training.inputs import InputSources, input_sources, sampled_sources
from logitless.training.model import check_packing, check_width, uses_flash_attention
from logitless.training.objective import reads_sequences
from logitless.training.render import Renderer
from logitless.training.rollouts.groups import shows
from logitless.training.rollouts.prompts import Prompts, reach_of_prompts, read_prompts

TOGETHER = "group"  # the input that says which rows a loss compares, so that they must be in one batch
DESIRABLE = "desirable"  # the input that marks single completions, which a pair gives too


class Loaded(NamedTuple):
    """The data of a run, tokenised."""

    sources: InputSources  # of the loss's inputs
    training: TokenizedData
    held_out: TokenizedData | None  # to evaluate on, if any
    reach: tuple[Reach, ...]  # of both


def load_data(options: TrainOptions, tokenizer: Any, loss: Loss, estimated: Collection[str]) -> Loaded:
    """The rows to train on and those to evaluate on, tokenised, and where the loss's inputs come from.

    Args:
        estimated: the inputs that the run can estimate.

    Raises:
        InputError: see `read_rows`, `input_sources` and `Renderer`; evaluation asked for without data for it.
    """
    rows = read_rows(options.dataset_name, split=options.dataset_train_split, config=options.dataset_config)
    rows = renamed(rows, options.column_map)
    single = _as_single(loss, tokenizer)
    if options.samples:
        sources = sampled_sources(loss, rewarded=options.reward_funcs is not None)
        read, reach = _prompt_reader(options, tokenizer, loss)
    else:
        sources = input_sources(loss, single(rows), options.dataset_name, estimated)
        renderer = row_renderer(options, tokenizer, sources.columns, (*loss.sequence_inputs, TOGETHER))
        read, reach = (renderer.pairs if isinstance(loss, PairLoss) else renderer.sequences), reach_of
    held_out, origin = _evaluation_rows(options)
    if options.eval_fraction:
        rows, held_out = split_rows(rows, options.eval_fraction, options.seed)
    if held_out is None and _evaluates(options):
        raise InputError("evaluation is asked for, but there is no data for it: give --eval_dataset_name or "
                         f"--eval_fraction; {options.dataset_name} has no split {options.dataset_test_split!r} "
                         "(dataset_test_split)")  # fmt: skip
    parts = [(single(rows), options.dataset_name)] + ([] if held_out is None else [(single(held_out), origin)])
    found = [(read(part, name), part) for part, name in parts]
    evaluated = None if held_out is None else found[1][0]
    return Loaded(sources, found[0][0], evaluated, tuple(reach(*each) for each in found))


def _prompt_reader(
    options: TrainOptions, tokenizer: Any, loss: Loss
) -> tuple[Callable[[list[Row], str], TokenizedData], Callable[[Any, list[Row]], Reach]]:
    """What reads rows as prompts, and what tells their reach."""
    room, shown = options.max_completion_length, shows(loss) != "nothing"
    # a demonstration is the completion, whatever an SFT component beside this one learns
    renderer = replace(row_renderer(options, tokenizer), completion_only=None)

    def read(rows: list[Row], origin: str) -> Prompts:
        return read_prompts(
            rows, renderer, origin, room=room, demonstrations=shown, required=loss.name if shown else ""
        )

    return read, lambda prompts, rows: reach_of_prompts(prompts, room)


def _as_single(loss: Loss, tokenizer: Any) -> Callable[[list[Row]], list[Row]]:
    """What makes two rows of a pair, one marked desirable and one not, where the loss reads such marks."""
    if DESIRABLE not in (*loss.inputs, *loss.sequence_inputs):
        return lambda rows: rows
    return lambda rows: unpaired(rows, chat=bool(tokenizer.chat_template))


def row_renderer(
    options: TrainOptions, tokenizer: object, columns: tuple[str, ...] = (), single: tuple[str, ...] = ()
) -> Renderer:
    """What renders rows as the options say; see `Renderer` for the columns."""
    return Renderer(
        tokenizer,
        options.max_length,
        options.truncation_mode,
        assistant_only=options.assistant_only_loss,
        completion_only=options.completion_only_loss,
        text_field=options.dataset_text_field,
        columns=columns,
        single=single,
    )


def _evaluates(options: TrainOptions) -> bool:
    return options.eval_strategy != "no" or options.eval_on_start


def _evaluation_rows(options: TrainOptions) -> tuple[list[Row] | None, str]:
    """Rows of `eval_dataset_name`, or of the dataset's own test split where evaluation is asked for."""
    split, config = options.dataset_test_split, options.dataset_config
    if options.eval_dataset_name is not None:
        rows = read_rows(options.eval_dataset_name, split=split, config=config)
        return renamed(rows, options.column_map), options.eval_dataset_name
    wanted = _evaluates(options) and not options.eval_fraction
    if wanted and has_split(options.dataset_name, split, config):
        rows = read_rows(options.dataset_name, split=split, config=config)
        return renamed(rows, options.column_map), f"{options.dataset_name}[{split}]"
    return None, options.dataset_name


def split_rows(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows), both in their old order; at least one of each.

    Raises:
        InputError: fewer than two rows.
    """
    count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    if count < 1:
        raise InputError(f"eval_fraction={fraction} leaves no rows to train on: the data has {len(rows)}")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = set(order[:count])
    kept = [row for index, row in enumerate(rows) if index not in chosen]
    return kept, [row for index, row in enumerate(rows) if index in chosen]


def make_loaders(
    options: TrainOptions,
    loss: Loss,
    models: Sequence[Any],
    pad_token: int,
    data: TokenizedData,
    eval_data: TokenizedData | None,
) -> tuple[Loader, Loader | None]:
    """Loaders of training and evaluation data, in the shape that the options and the model's attention ask for.

    Args:
        models: those that read the batches, the trained one first.

    Raises:
        InputError: packing for a loss of whole sequences, or for a model that lets packed rows see each other or that
            cannot read rows as long as the packs.
    """
    flash = uses_flash_attention(models[0])
    flat = flash if options.padding_free is None else options.padding_free
    if options.packing and reads_sequences(loss):
        raise InputError(f"packing: {loss.name} looks at whole sequences; use --padding_free instead")
    capacity = options.max_length if options.packing else None
    # Flash attention finds boundaries in a single row only.
    together = TOGETHER if TOGETHER in loss.inputs and not options.samples else None
    train = Loader(data, pad_token, flat or (options.packing and flash), capacity, together=together)
    held_out = None if eval_data is None else Loader(eval_data, pad_token, flat, together=together)
    if options.packing or flat:
        widths = [train.widest(options.per_device_train_batch_size)]
        widths += [held_out.widest(options.per_device_eval_batch_size)] if held_out is not None and flat else []
        for model in models:
            check_packing(model)
            check_width(model, max(widths))
    return train, held_out


@dataclass
class Loader:
    """Builds batches of units; a unit is one item, or all items with one value of `together`, or a pack of items.

    Args:
        data: tokenised rows.
        pad_token: what fills short rows; never read by attention or loss.
        flat: one row per batch instead of padding.
        capacity: tokens per pack, or None for no packing.
        together: column whose equal values must be in one batch, such as the prompt that several answers share.
        stored: the reference's values per item, where they were computed before.
    """

    data: TokenizedData
    pad_token: int
    flat: bool
    capacity: int | None = None
    stored: Stored | None = None
    together: str | None = None
    units: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        items = self.data.items
        if self.together is not None:
            self.units = _by_value([float(item[0].inputs[self.together][0]) for item in items])
        elif self.capacity is None:
            self.units = [[index] for index in range(len(items))]
        else:
            self.units = best_fit([len(example.input_ids) for (example,) in items], self.capacity)

    def batch(self, units: list[int]) -> Batch:
        """The batch of these units: all first examples of their items, then (of pairs) all second ones."""
        packs = [[self._pieces(item) for item in self.units[unit]] for unit in units]
        parts = range(len(packs[0][0]))
        pieces = [pieces[part] for part in parts for pack in packs for pieces in pack]
        if self.capacity is not None and not self.flat:
            return packed([[pieces[0] for pieces in pack] for pack in packs], self.pad_token)
        return self.collate(pieces)

    def collate(self, pieces: list[Piece]) -> Batch:
        """A batch of sequences of any origin, in one row or padded."""
        return padding_free(pieces) if self.flat else padded(pieces, self.pad_token)

    def widest(self, batch_size: int) -> int:
        """Tokens of the longest row that holds several sequences, in batches of at most this many units."""
        lengths = [sum(len(example.input_ids) for example in item) for item in self.data.items]
        units = sorted((sum(lengths[index] for index in unit) for unit in self.units), reverse=True)
        return sum(units[: batch_size if self.flat else 1])

    def without_packs(self) -> Loader:
        """A loader of the same items, each a unit of its own."""
        return Loader(self.data, self.pad_token, flat=self.flat and self.capacity is None)

    def _pieces(self, item: int) -> list[Piece]:
        stored = self.stored[item] if self.stored is not None else ({},) * len(self.data.items[item])
        return [
            Piece(example, {**inputs, **example.inputs})
            for example, inputs in zip(self.data.items[item], stored, strict=True)
        ]


def _by_value(values: list[float]) -> list[list[int]]:
    """Indices of equal values together, in the order in which the values appear."""
    found: dict[float, list[int]] = {}
    for index, value in enumerate(values):
        found.setdefault(value, []).append(index)
    return list(found.values())
