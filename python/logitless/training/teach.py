"""Rows with a teacher's likeliest ids, for top-k distillation from a file.

    rows ──> tokens, as training has them ──> teacher ──> the rows and three columns, in Parquet or JSONL

Each list has an entry for every token of the row that counts, as columns of the loss have. A token that `max_length`
cuts off, and the first of a text, are not predicted: their lists of ids are empty. Batches are written as they come, so
that memory holds the rows and one batch of lists.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, cast

from logitless.losses import NLL
from logitless.training import files, parallel
from logitless.training.checks import Reach, check_positions, check_tokenizers, check_vocabulary, head_rows, reach_of
from logitless.training.collate import consecutive
from logitless.training.columns import TARGET_IDS
from logitless.training.config import TEACHER_IDS, TrainOptions
from logitless.training.data import Row, read_rows
from logitless.training.errors import InputError
from logitless.training.examples import IGNORED, Example, TokenizedData
from logitless.training.forms import renamed
from logitless.training.frozen import start_alone
from logitless.training.loader import row_renderer
from logitless.training.metrics import Progress
from logitless.training.model import hide_progress_bars, load_model, load_tokenizer, locate, patched
from logitless.training.objective import PatchedEngine, computes_in_bf16
from logitless.training.parallel import World
from logitless.training.places import require_places
from logitless.training.render import Renderer
from logitless.training.run import confirm_patch
from logitless.training.teachers import Listed, ModelTeacher, ServerTeacher, Teacher
from logitless.training.template_date import with_date
from logitless.types import BackendName

Taught = Mapping[str, list[Any]]  # the columns of a row
Write = Callable[[Sequence[Row], Sequence[Taught]], None]

LOGPROB, TAIL = "teacher_logprob", "teacher_tail"


def write_teacher_columns(
    options: TrainOptions, output: str, *, k: int = TEACHER_IDS, server: str | None = None
) -> None:
    """Writes the rows of `options.dataset_name` with the columns `target_ids`, `teacher_logprob` and `teacher_tail`.

    The options are those of a training run. Rows are tokenised with the tokenizer of `model_name_or_path`, and the
    teacher is `teacher_model_name_or_path`, by default the same model. A row of which `max_length` leaves no completion
    is left out.

    Args:
        output: the file to write, .parquet or .jsonl. It appears when it is whole.
        k: ids a token, 64 by default; verl's and NeMo-RL's recipes have 32 to 512.
        server: address of an OpenAI-compatible server with vLLM's `prompt_logprobs`, in place of the teacher's model.

    Raises:
        InputError: options, rows, teacher, or an answer of the server that cannot be used.
    """
    path = Path(output)
    if path.suffix.lower() not in _WRITERS:
        raise InputError(f"output: expected a name that ends in {' or '.join(_WRITERS)}, got {output!r}")
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    if server is not None and options.teacher_model_name_or_path is not None:
        raise InputError("server and teacher_model_name_or_path are two teachers: give one of them")
    if options.mixture is not None:
        raise InputError("mixture: a teacher reads the rows of one dataset_name; teach each data set by itself")
    options.require_inputs()
    world = parallel.start(options.use_cpu)
    try:
        start_alone(world, "a teacher")
        _teach(options, world, path, k, server)
    finally:
        parallel.stop(world)


class _Tokenised(NamedTuple):
    """The rows to teach and their tokens, without rows of which nothing that counts is left."""

    rows: list[Row]  # as they came: `column_map` renames nothing in what is written
    examples: list[Example]
    data: TokenizedData
    reach: Reach
    renderer: Renderer
    column_map: Mapping[str, str] | None

    def whole(self, row: Row) -> Example:
        """The tokens of a row as it came, before it is cut."""
        return self.renderer.whole(*renamed([row], self.column_map))


def _tokenise(options: TrainOptions, source: str) -> _Tokenised:
    rows = read_rows(options.dataset_name, split=options.dataset_train_split, config=options.dataset_config)
    renderer = row_renderer(options, with_date(load_tokenizer(source, options), datetime.now()))
    mapped = renamed(rows, options.column_map)
    data = renderer.sequences(mapped, options.dataset_name)
    kept, examples = [rows[number] for number in data.kept], [example for (example,) in data.items]
    return _Tokenised(kept, examples, data, reach_of(data, mapped), renderer, options.column_map)


def _teach(options: TrainOptions, world: World, path: Path, k: int, server: str | None) -> None:
    require_places(options)
    source = locate(options)
    if Path(source).is_dir():  # a download's bars stay
        hide_progress_bars()
    read = _tokenise(options, source)
    size = options.per_device_eval_batch_size
    teacher = _model_teacher(options, world, read, k) if server is None else ServerTeacher(server, k, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    batches = consecutive(len(read.rows), size)
    progress = Progress(0, len(batches))
    try:
        progress.say(f"data: {read.data.summary()}")
        if server is not None:
            progress.say(f"note: the server's tokens are not compared with those of {options.model_name_or_path}")
        with files.new_file(path) as unfinished, _WRITERS[path.suffix.lower()](unfinished, read) as write:
            for number, batch in enumerate(batches, 1):
                rows, examples = [read.rows[i] for i in batch], [read.examples[i] for i in batch]
                write(rows, _taught(read, rows, examples, teacher, options.truncation_mode))
                progress.advance(number)
        size_written = path.stat().st_size / 2**20
        progress.say(f"done: {len(read.rows)} rows with {k} ids a token in {path}, {size_written:.1f} MiB")
    finally:
        progress.stop()


def _taught(
    read: _Tokenised, rows: Sequence[Row], examples: Sequence[Example], teacher: Teacher, truncation_mode: str
) -> list[Taught]:
    """The teacher's columns of a batch of rows."""
    listed = teacher(examples, [row.origin for row in rows])
    wholes = map(read.whole, rows)
    return [_columns(*each, truncation_mode) for each in zip(wholes, examples, listed, strict=True)]


def _model_teacher(options: TrainOptions, world: World, read: _Tokenised, k: int) -> Teacher:
    """The teacher's model, frozen and patched; it must give every token the id that the rows have."""
    if options.backend == "materialised":
        raise InputError("backend: a teacher's hidden states are needed, which 'materialised' does not have")
    options = dataclasses.replace(
        options,
        model_name_or_path=options.teacher_model_name_or_path or options.model_name_or_path,
        use_peft=False,
    )
    source, name, tokenizer = locate(options), options.model_name_or_path, read.renderer.tokenizer
    check_tokenizers(tokenizer, load_tokenizer(source, options), [read.data], name, whole=True)
    loss = NLL()
    engine = PatchedEngine(loss, world.device, computes_in_bf16(options, world.device))
    model = patched(load_model(source, options, world, frozen=True), options, loss).eval()
    check_vocabulary(model, tokenizer, read.reach, name)
    check_positions(model, read.reach, name)
    confirm_patch(engine, model, options, world.device)
    vocabulary = min(head_rows(model), 1 + max(tokenizer.get_vocab().values()))
    if k > vocabulary:
        raise InputError(f"k: expected at most {vocabulary}, the vocabulary of {name}, got {k}")
    return ModelTeacher(engine, model, k, cast(BackendName, options.backend), vocabulary)


def _columns(whole: Example, cut: Example, listed: Listed, truncation_mode: str) -> Taught:
    """The lists of a row, with an entry for every token that counts before the row is cut."""
    start = len(whole.labels) - len(cut.labels) if truncation_mode == "keep_end" else 0
    place = {int(t) + start: n for n, t in enumerate((cut.labels != IGNORED).nonzero()[:, 0])}
    numbers = [place.get(int(t)) for t in (whole.labels != IGNORED).nonzero()[:, 0]]
    ids, logprob, tail = (values.tolist() for values in listed)
    return {
        TARGET_IDS: [[] if n is None else ids[n] for n in numbers],
        LOGPROB: [[] if n is None else logprob[n] for n in numbers],
        TAIL: [0.0 if n is None else tail[n] for n in numbers],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Files


@contextmanager
def _jsonl_writer(path: Path, read: _Tokenised) -> Iterator[Write]:
    with path.open("w", encoding="utf-8") as file:

        def write(batch: Sequence[Row], columns: Sequence[Taught]) -> None:
            for row, own in zip(batch, columns, strict=True):
                try:
                    file.write(json.dumps({**row.values, **own}, ensure_ascii=False) + "\n")
                except TypeError as error:
                    raise InputError(f"{row.origin}: not a row for JSONL: {error}; write .parquet") from error

        yield write


@contextmanager
def _parquet_writer(path: Path, read: _Tokenised) -> Iterator[Write]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path}: writing Parquet needs pyarrow (pip install pyarrow)") from error
    numbers = pyarrow.list_(pyarrow.float32())
    own = {TARGET_IDS: pyarrow.list_(pyarrow.list_(pyarrow.int32())), LOGPROB: pyarrow.list_(numbers), TAIL: numbers}
    names = [name for name in dict.fromkeys(name for row in read.rows for name in row.values) if name not in own]
    try:
        given = pyarrow.table({name: [row.values.get(name) for row in read.rows] for name in names})
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError) as error:
        raise InputError(f"the rows' columns do not fit into Parquet: {error}; write .jsonl") from error
    if any(pyarrow.types.is_nested(field.type) for field in given.schema):
        _require_same_tokens(given.to_pylist(), read)
    schema = pyarrow.schema([*given.schema, *own.items()])
    with parquet.ParquetWriter(path, schema) as file:

        def write(batch: Sequence[Row], columns: Sequence[Taught]) -> None:
            lists = {name: [taught[name] for taught in columns] for name in own}
            values = {name: [row.values.get(name) for row in batch] for name in names}
            file.write_table(pyarrow.table(values | lists, schema=schema))

        yield write


def _require_same_tokens(stored: Sequence[dict[str, Any]], read: _Tokenised) -> None:
    """Raises where the table's rows are read as other tokens: nested names have one order there, and one type."""
    for row, values in zip(read.rows, stored, strict=True):
        if not read.whole(row).input_ids.equal(read.whole(Row(values, row.origin)).input_ids):
            raise InputError(f"{row.origin}: Parquet gives the names in nested columns one order and one type for all "
                             "rows, which changes the row's tokens; write .jsonl")  # fmt: skip


_WRITERS: dict[str, Callable[[Path, _Tokenised], AbstractContextManager[Write]]] = {
    ".parquet": _parquet_writer,
    ".jsonl": _jsonl_writer,
}
