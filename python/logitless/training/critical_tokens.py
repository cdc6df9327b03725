"""Rows of which only the tokens are trained on which a right answer hangs: critical token fine-tuning.

    row ──> is its answer right? ──> each token in turn: other tokens in its place ──> the rest sampled ──> right still?

The written row has prompt and completion, and a column `token_weight`: 1 for a critical token, 0 for any other.
`logitless train` multiplies the losses of tokens by it, and counts no token of weight 0.

Work is kept row by row in a file beside the output, so that a command that is started again goes on where it ended.

Source: arXiv 2510.10974.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from logitless.training import files, parallel
from logitless.training.checks import head_rows
from logitless.training.collate import consecutive
from logitless.training.columns import TOKEN_WEIGHT
from logitless.training.config import TrainOptions
from logitless.training.data import Row, read_rows
from logitless.training.errors import InputError
from logitless.training.evaluate.sampled import make_judge
from logitless.training.examples import IGNORED, Example, Item
from logitless.training.forms import canonical_prompt, renamed, with_completion
from logitless.training.frozen import Frozen, load_frozen, start_alone
from logitless.training.loader import row_renderer
from logitless.training.metrics import Progress
from logitless.training.model import load_tokenizer, locate
from logitless.training.parallel import World
from logitless.training.places import require_places
from logitless.training.render import Renderer
from logitless.training.right import Right
from logitless.training.rollouts.generation import Sampling, TextGenerator
from logitless.training.rollouts.groups import Slot
from logitless.training.rollouts.model_generator import ends_of
from logitless.training.rollouts.prompts import Prompt, Prompts, reach_of_prompts
from logitless.training.rollouts.rollout import Rollout, rollout_of
from logitless.training.rollouts.rounds import Judge
from logitless.training.rollouts.setup import make_generator, sampling_of
from logitless.training.row_files import json_line, require_file
from logitless.training.teachers import ModelTeacher
from logitless.training.template_date import with_date
from logitless.types import BackendName

#: Continuations that are sampled together where `per_device_generation_batch_size` does not say it.
TOGETHER_AT_MOST = 64
#: Share of wrong continuations from which a token is critical.
WRONG_SHARE = 0.5
#: Options that a command that goes on must share with the one that began.
_SETTINGS = (
    *("model_name_or_path", "model_revision", "dtype", "bf16", "dataset_name", "dataset_config", "dataset_train_split"),
    *("dataset_text_field", "column_map", "chat_template_path", "max_length", "max_completion_length", "reward_funcs"),
    *("reward_weights", "temperature", "top_p", "top_k", "min_p", "seed"),
)


@dataclass(frozen=True)
class Search:
    """How critical tokens are looked for.

    Args:
        alternatives: how many of the model's likeliest other tokens stand in for a token, one after the other; 2 as in
            the paper.
        positions: tokens of an answer that are looked at, those where the model holds another token likeliest; the
            others count as not critical. None, the default: all.
        samples: continuations of each that are drawn as the options say; 0, the default, is one of the likeliest
            tokens.

    Raises:
        InputError: a number out of range.
    """

    alternatives: int = 2
    positions: int | None = None
    samples: int = 0

    def __post_init__(self) -> None:
        for name, least in (("alternatives", 1), ("positions", 1), ("samples", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")


def mask_critical_tokens(
    options: TrainOptions, output: str, *, search: Search | None = None, right: Right | None = None
) -> None:
    """Writes the rows of `options.dataset_name` whose answers are right, with a column `token_weight`.

    A token is critical if at least half of the continuations behind its replacements are wrong. Rows without an answer,
    with a wrong one, or with one longer than `max_completion_length` are left out, and so are those whose prompt leaves
    less room than that within `max_length`.

    Args:
        output: the file to write, .jsonl. It appears when it is whole; until then `<output>.part` holds the rows that
            are done, which are kept when the command is started again with the same options.
        search: by default all tokens of an answer, 2 alternatives each, one greedy continuation of either.
        right: by default a reward of at least 1.

    Raises:
        InputError: options, rows, model or functions that cannot be used; a whole file of that name; or one that other
            options began.
    """
    search, right = search or Search(), right or Right()
    path = require_file(output, "output", ".jsonl")
    if path.exists():
        raise InputError(f"output: {path} is there, and whole; move it away, or give another name")
    if options.mixture is not None:
        raise InputError("mixture: rows of one dataset_name are read; mask each data set by itself")
    options = dataclasses.replace(options, assistant_only_loss=None, completion_only_loss=None)
    options.require_inputs()
    judge = make_judge(options, right)
    if judge is None:
        raise InputError("reward_funcs: name a function, which says whether an answer is right")
    if search.samples and options.temperature == 0:
        raise InputError("samples: at temperature 0 all of them are alike; leave it out for one")
    world = parallel.start(options.use_cpu)
    try:
        start_alone(world, "the search for critical tokens")
        require_places(options)
        _mask(options, world, path, search, right, judge)
    finally:
        parallel.stop(world)


class _Answer(NamedTuple):
    """A row with its answer, as it is looked at and written."""

    prompt: Prompt
    row: dict[str, Any]  # of prompt and completion
    example: Example

    @property
    def counted(self) -> list[int]:
        """The places of the tokens that count."""
        places: list[int] = (self.example.labels != IGNORED).nonzero()[:, 0].tolist()
        return places


def _read_answers(options: TrainOptions, renderer: Renderer) -> tuple[list[_Answer], int]:
    """The answers that can be looked at, and how many rows there are.

    Raises:
        InputError: none is.
    """
    name, room = options.dataset_name, options.max_completion_length
    rows = renamed(read_rows(name, split=options.dataset_train_split, config=options.dataset_config),
                   options.column_map)  # fmt: skip
    found = [_whole_answer(row, renderer) for row in rows]
    usable = [each for each in found if each is not None and len(each.counted) <= room
              and len(each.prompt.ids) + room <= options.max_length]  # fmt: skip
    if not usable:
        raise InputError(f"{name}: none of {len(rows)} rows has an answer of at most {room} tokens "
                         f"(max_completion_length) within max_length={options.max_length}")  # fmt: skip
    return usable, len(rows)


def _whole_answer(row: Row, renderer: Renderer) -> _Answer | None:
    asked = canonical_prompt(row, chat=bool(renderer.tokenizer.chat_template)).values
    if "completion" not in asked:
        return None
    values = with_completion(row.values, asked["prompt"], asked["completion"])
    example = renderer.whole(Row(values, row.origin))
    places = (example.labels != IGNORED).nonzero()[:, 0]
    if not len(places):
        return None
    start = int(places[0])
    if start == 0:
        raise InputError(f"{row.origin}: the prompt is empty, and the tokenizer has no start token to continue")
    return _Answer(Prompt(example.input_ids[:start], None, asked["prompt"], row.values, row.origin), values, example)


@dataclass(frozen=True)
class _Searcher:
    """What looks for the critical tokens of an answer."""

    search: Search
    right: Right
    judge: Judge
    tokenizer: Any
    generator: TextGenerator
    sampling: Sampling
    ends: tuple[int, ...]
    teacher: ModelTeacher
    seed: int
    together: int

    def is_right(self, answers: Sequence[_Answer]) -> list[bool]:
        """Whether the answers that the rows have are right."""
        rollouts = [_as_it_is(each, self.sampling.max_tokens) for each in answers]
        verdicts = self.right(self.judge([each.prompt for each in answers], rollouts, self.tokenizer))
        return [bool(verdict == 1) for verdict in verdicts]

    def weights(self, answer: _Answer) -> list[int]:
        """1 for every token that counts and is critical, 0 for every other one that counts."""
        places, slots = answer.counted, self._slots(answer)
        if not slots:
            return [0] * len(places)
        rollouts = list(self._continued(slots))
        scores = self.judge([answer.prompt] * len(slots), rollouts, self.tokenizer)
        verdicts: dict[int, list[float]] = {}
        for slot, verdict in zip(slots, self.right(scores).tolist(), strict=True):
            if verdict == verdict:  # not NaN: known
                verdicts.setdefault(len(slot.start) - 1, []).append(verdict)
        wrong = {place: 1 - sum(own) / len(own) for place, own in verdicts.items()}
        return [int(wrong.get(place, 0.0) >= WRONG_SHARE) for place in places]

    def _slots(self, answer: _Answer) -> list[Slot]:
        """The beginnings of the answer with another token at their end."""
        ids, places = answer.example.input_ids, answer.counted
        (listed,) = self.teacher([answer.example], [answer.prompt.origin])
        found: list[tuple[float, int, list[int]]] = []  # log-probability of the likeliest other token, place, tokens
        for place, own, logprob in zip(places, listed.ids.tolist(), listed.logprob.tolist(), strict=True):
            others = [(token, value) for token, value in zip(own, logprob, strict=True) if token != int(ids[place])]
            found.append((others[0][1], place, [token for token, _ in others[: self.search.alternatives]]))
            if int(ids[place]) in self.ends:
                break  # what a template writes behind an answer's end is not the model's
        found.sort(key=lambda each: (-each[0], each[1]))
        begin = len(answer.prompt.ids)
        slots = []
        for _, place, tokens in sorted(found[: self.search.positions], key=lambda each: each[1]):
            for token in tokens:
                start = torch.cat([ids[:place], ids.new_tensor([token])])
                ended = token in self.ends or place + 1 - begin == self.sampling.max_tokens
                times = 1 if ended else max(self.search.samples, 1)
                slots += [Slot(0, start, place + 1 - begin, not ended)] * times
        return slots

    def _continued(self, slots: Sequence[Slot]) -> Iterator[Rollout]:
        """The slots with what the model goes on with; those of neighbouring places are sampled together."""
        room = self.sampling.max_tokens
        for numbers in consecutive(len(slots), self.together):
            own = [slots[number] for number in numbers]
            sampled = [slot for slot in own if slot.sampled]
            longest = room - min((slot.shown for slot in sampled), default=0)
            sampling = dataclasses.replace(self.sampling, max_tokens=longest)
            starts = [slot.start for slot in sampled]
            found = self.generator.generate(starts, sampling, self.seed + numbers[0]) if starts else []
            completions = iter(found)
            yield from (rollout_of(slot, next(completions) if slot.sampled else None, room) for slot in own)


def _as_it_is(answer: _Answer, room: int) -> Rollout:
    ids = answer.example.input_ids[: answer.counted[-1] + 1]
    return rollout_of(Slot(0, ids, len(ids) - len(answer.prompt.ids), False), None, room)


def _mask(options: TrainOptions, world: World, path: Path, search: Search, right: Right, judge: Judge) -> None:
    tokenizer = load_tokenizer(locate(options), options)
    renderer = row_renderer(options, with_date(tokenizer, datetime.now()))
    answers, rows = _read_answers(options, renderer)
    kept = _Kept.begin(path, {name: getattr(options, name) for name in _SETTINGS} | dataclasses.asdict(search)
                       | {"threshold": right.threshold, "threshold_func": right.function})  # fmt: skip
    if len(kept.done) > len(answers):
        raise InputError(f"{kept.path}: {len(kept.done)} rows are done, and {options.dataset_name} has {len(answers)} "
                         "to do; the data are others; delete the file to begin again")  # fmt: skip
    progress = Progress(len(kept.done), len(answers))
    try:
        progress.say(f"data: {len(answers)} of {rows} rows with an answer, {len(kept.done)} of them done before")
        waiting = answers[len(kept.done) :]
        if waiting:
            searcher = _make_searcher(options, world, tokenizer, renderer, waiting, search, right, judge, progress)
            for numbers in consecutive(len(waiting), options.per_device_eval_batch_size):
                batch = [waiting[number] for number in numbers]
                for answer, is_right in zip(batch, searcher.is_right(batch), strict=True):
                    weights = searcher.weights(answer) if is_right else None
                    kept.add(None if weights is None else {**answer.row, TOKEN_WEIGHT: weights})
                    progress.advance(len(kept.done))
        found = kept.finish(path)
        weights = [weight for row in found for weight in row[TOKEN_WEIGHT]]
        progress.say(f"done: {len(found)} rows with a right answer in {path}, {sum(weights)} of {len(weights)} tokens "
                     "critical")  # fmt: skip
    finally:
        kept.close()
        progress.stop()


def _make_searcher(
    options: TrainOptions, world: World, tokenizer: Any, renderer: Renderer, answers: Sequence[_Answer],
    search: Search, right: Right, judge: Judge, progress: Progress,
) -> _Searcher:  # fmt: skip
    room = options.max_completion_length
    items: list[Item] = [(answer.example,) for answer in answers]
    prompts = Prompts(items, len(items), 0, 0, (), 0, tuple(answer.prompt for answer in answers))
    policy, notes = load_frozen(options, world, tokenizer, [reach_of_prompts(prompts, room)])
    for note in notes:
        progress.say(f"note: {note}")
    generator = make_generator(options, world, policy.model, tokenizer, policy.pad_token, renderer.answer_end,
                               bf16=policy.engine.bf16)  # fmt: skip
    sampling = sampling_of(options)
    if not search.samples:
        sampling = Sampling(max_tokens=room, temperature=0.0)
    return _Searcher(
        search=search,
        right=right,
        judge=judge,
        tokenizer=tokenizer,
        generator=generator,
        sampling=sampling,
        ends=ends_of(policy.model, tokenizer, renderer.answer_end),
        teacher=_make_teacher(policy, tokenizer, search),
        seed=options.seed,
        together=options.per_device_generation_batch_size or TOGETHER_AT_MOST,
    )


def _make_teacher(policy: Frozen, tokenizer: Any, search: Search) -> ModelTeacher:
    """The model as what names the likeliest tokens of a place."""
    vocabulary = min(head_rows(policy.model), 1 + max(tokenizer.get_vocab().values()))
    k = search.alternatives + 1  # the token itself may be among them
    if k > vocabulary:
        raise InputError(f"alternatives must be below {vocabulary}, the size of the vocabulary, got {k - 1}")
    return ModelTeacher(policy.engine, policy.model, k, cast(BackendName, policy.options.backend), vocabulary)


# ---------------------------------------------------------------------------------------------------------------------
# Rows that are done


class _Kept:
    """The rows that are done, in a file that grows by a line with each: the settings, then a row or null."""

    def __init__(self, path: Path, done: list[dict[str, Any] | None]) -> None:
        self.path, self.done = path, done
        self._file = path.open("a", encoding="utf-8")

    @classmethod
    def begin(cls, output: Path, settings: dict[str, Any]) -> _Kept:
        """The file of this output as it was left, or a new one.

        Raises:
            InputError: other settings began it.
        """
        path = output.with_name(f"{output.name}.part")
        settings = json.loads(json.dumps(settings))  # as they are read back
        whole = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []  # a killed run's half line
        if not whole:
            whole = [json.dumps(settings)]
        before = json.loads(whole[0])
        for name, value in settings.items():
            if before.get(name) != value:
                raise InputError(f"{path}: was begun with {name}={before.get(name)!r}, not {value!r}; expected the "
                                 "same, or delete the file to begin again")  # fmt: skip
        files.write_text(path, "".join(f"{line}\n" for line in whole))
        return cls(path, [json.loads(line) for line in whole[1:]])

    def add(self, row: dict[str, Any] | None) -> None:
        """Keeps a row, or that there is none to keep."""
        self._file.write("null\n" if row is None else json_line(row))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done.append(row)

    def finish(self, output: Path) -> list[dict[str, Any]]:
        """Writes the rows to the output and deletes the file; returns them."""
        rows = [row for row in self.done if row is not None]
        files.write_text(output, "".join(map(json_line, rows)))
        self.path.unlink()
        return rows

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
