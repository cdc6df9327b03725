"""The command line: `logitless train` and the other commands; each is a function here that calls what does the work.

The options of `train` are those of `TrainOptions`, which is their single statement: the flags are generated from it, a
YAML file given with `--config` may hold the same names, and a flag wins over the file. Names that no flag has are read
as the file's keys are, so that both know the same names of other tools and give the same errors. The other commands
that read rows have those of the options that they need, and take the same file.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from logitless import commands
from logitless.bench.command import app as bench_app
from logitless.training.config import (
    GROUPS,
    TEACHER_IDS,
    TRUTH,
    TrainOptions,
    field_types,
    options_from_mapping,
    read_yaml,
)
from logitless.training.errors import InputError, nearest_names
from logitless.training.other_names import ALIASES, INERT_KEYS, LOSS_SETTINGS, UNSUPPORTED_KEYS
from logitless.training.reported import reported

# --learning-rate and --learning_rate are the same flag
_CONTEXT = {"token_normalize_func": lambda name: name.replace("-", "_"), "help_option_names": ["-h", "--help"]}
_FURTHER = {"allow_extra_args": True, "ignore_unknown_options": True}  # `_further` reads them

_MASKS = ("assistant_only_loss", "completion_only_loss")
#: The options of a run that say which model reads which tokens, which is what `teach` needs.
TEACHER_OPTIONS = (
    *("model_name_or_path", "teacher_model_name_or_path", "model_revision", "gguf_file", "dtype", "bf16"),
    *("attn_implementation", "trust_remote_code", "use_liger_kernel", "use_cpu", "cache_dir", "backend"),
    *("dataset_name", "dataset_config", "dataset_train_split", "dataset_text_field", "max_length", "truncation_mode"),
    *("column_map", "chat_template_path", "assistant_only_loss", "completion_only_loss", "per_device_eval_batch_size"),
)
#: Those that `reward` needs: it compares with a reference in the unit of beta, and resamples.
REWARD_OPTIONS = (*TEACHER_OPTIONS, "beta", "seed")
#: Shorter flags of `reward` for some of them, and what they mean there.
REWARD_FLAGS = {
    "model_name_or_path": ("--model", "The model whose reward is asked for: hub id, folder, or .gguf file. Required."),
    "teacher_model_name_or_path": (
        "--reference",
        "The model that it is compared with, for a fine-tuned one the model before that. Default: none, which gives "
        "the endogenous reward.",
    ),
    "dataset_name": ("--dataset_name", "The rows, where they are not named without a flag. Files as for train."),
    "beta": ("--beta", "Unit of the rewards. Default: 1."),
    "seed": ("--seed", "Seed of the intervals' resampling."),
}

#: Those that say how completions are drawn and rewarded.
_DRAWN = (
    *("reward_funcs", "reward_weights", "max_completion_length", "temperature", "top_p", "top_k", "min_p", "seed"),
    "per_device_generation_batch_size",
)
#: Those of `evaluate`, which compares with a reference.
EVALUATE_OPTIONS = (
    *(name for name in TEACHER_OPTIONS if name != "dataset_train_split"),
    *("dataset_test_split", *_DRAWN, "on_policy", "num_generations", "beta"),
)
#: Those of `mask-critical`, which has a form of rows of its own, where the answer counts.
CRITICAL_OPTIONS = (
    *(name for name in TEACHER_OPTIONS if name not in ("teacher_model_name_or_path", *_MASKS)),
    *_DRAWN,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=_CONTEXT,
)


class _Command(TyperCommand):
    """A command whose switches take a value too, as Hugging Face's do: `--bf16 true`, `--packing=false`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        switches = {name for name, kind in field_types().items() if kind in (bool, bool | None)}
        found: list[str] = []
        rest = deque(args)
        while rest:
            argument = rest.popleft()
            first, given, value = argument.partition("=")
            name = first[2:].replace("-", "_") if first.startswith("--") else ""
            if ALIASES.get(name, name) in switches and not given and rest and rest[0].lower() in TRUTH:
                given, value = "=", rest.popleft()
            if name in switches and value.lower() in TRUTH:
                argument = f"--{name}" if TRUTH[value.lower()] else f"--no_{name}"
            elif given:
                argument = f"{first}={value}"
            found.append(argument)
        return super().parse_args(ctx, found)


def train(context: typer.Context, config: str | None, seeds: str | None, **flags: Any) -> None:
    """Fine-tune a causal language model: --method sft, dft, dpo, grpo, prefix-rft or any loss of the registry."""

    def run(options: TrainOptions) -> None:
        if seeds is not None:
            from logitless.training.seeds import read_seeds, train_seeds

            train_seeds(options, read_seeds(seeds))
            return
        from logitless.training import train as run_training

        run_training(options)

    _run(config, flags, context.args, field_types(), run)


def teach(context: typer.Context, config: str | None, output: str, k: int, server: str | None, **flags: Any) -> None:
    """Write rows with a teacher's likeliest ids, for --method top_k_distillation."""

    def run(options: TrainOptions) -> None:
        from logitless.training.teach import write_teacher_columns

        write_teacher_columns(options, output, k=k, server=server)

    _run(config, flags, context.args, TEACHER_OPTIONS, run)


def reward(
    context: typer.Context,
    config: str | None,
    output: str,
    labels: str | None,
    html: str | None,
    png: str | None,
    **flags: Any,
) -> None:
    """Write the reward that a model implies for every token of the rows' answers: reward --model ... ROWS."""

    def run(options: TrainOptions) -> None:
        from logitless.training.implicit_reward.command import write_rewards

        write_rewards(options, output, labels=labels, html=html, png=png)

    _run(config, flags, context.args, REWARD_OPTIONS, run, word="dataset_name")


def evaluate_rows(
    context: typer.Context,
    config: str | None,
    output: str | None,
    json: str | None,
    threshold: float,
    threshold_func: str | None,
    **flags: Any,
) -> None:
    """Measure a model on rows: rewards of its samples, pass@k, distance from a reference, preferences, likelihood."""

    def run(options: TrainOptions) -> None:
        from logitless.training.evaluate.command import evaluate_model
        from logitless.training.right import Right

        evaluate_model(options, output=output, metrics_file=json, right=Right(threshold, threshold_func))

    _run(config, flags, context.args, EVALUATE_OPTIONS, run)


def mask_critical(
    context: typer.Context,
    config: str | None,
    output: str,
    alternatives: int,
    positions: int | None,
    samples: int,
    threshold: float,
    threshold_func: str | None,
    **flags: Any,
) -> None:
    """Write rows with a column token_weight, so that only the tokens are trained on which a right answer hangs."""

    def run(options: TrainOptions) -> None:
        from logitless.training.critical_tokens import Search, mask_critical_tokens
        from logitless.training.right import Right

        search = Search(alternatives, positions, samples)
        mask_critical_tokens(options, output, search=search, right=Right(threshold, threshold_func))

    _run(config, flags, context.args, CRITICAL_OPTIONS, run)


def _run(
    config: str | None,
    flags: dict[str, Any],
    further: Sequence[str],
    known: Collection[str],
    command: Callable[[TrainOptions], None],
    word: str | None = None,
) -> None:
    """Calls a command with the options of a file and of flags.

    `word` is the option that a word without a flag gives, if there is one.
    """
    with reported():
        values = read_yaml(config) if config is not None else {}
        given = {name: value for name, value in flags.items() if value is not None}
        given |= _further(further, known, None if word in given else word)
        options, notes = options_from_mapping(_merged(values, given), config or "command line")
        for note in notes:
            typer.echo(f"note: {note}", err=True)
        command(options)


def _further(arguments: Sequence[str], known: Collection[str], word: str | None = None) -> dict[str, Any]:
    """Options under names that no flag has: `--name value`, `--name=value`, or `--name` alone for true.

    Args:
        known: the options of the command; one that another command has is refused by name.
        word: the option that one word without a flag may give.
    """
    found: dict[str, Any] = {}
    rest = deque(arguments)
    while rest:
        argument = rest.popleft()
        if word is not None and word not in found and not argument.startswith("-"):
            found[word] = argument
            continue
        first, given, value = argument.partition("=")
        name = first[2:].replace("-", "_")
        if not first.startswith("--") or not name:
            raise InputError(f"command line: expected an option (--name), got {first!r}")
        if not given:
            value = rest.popleft() if rest and not rest[0].startswith("--") else "true"
        _require_known(ALIASES.get(name, name), name, known)
        found[name] = value
    return found


def _require_known(option: str, name: str, known: Collection[str]) -> None:
    """Raises InputError for an option that is another command's or no option at all."""
    if option in known or option in {*INERT_KEYS, *UNSUPPORTED_KEYS, *LOSS_SETTINGS}:
        return
    if option in field_types():
        raise InputError(f"command line: --{name} is an option of train, and of no use to this command")
    names = [f"--{each}" for each in nearest_names(name, [*known, "config"])]
    raise InputError(f"command line: unknown option --{name}" + (f" (nearest: {', '.join(names)})" if names else ""))


def _merged(values: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The file's values without those that a flag replaces under whatever name."""
    replaced = {ALIASES.get(name, name) for name in flags}
    return {key: value for key, value in values.items() if ALIASES.get(key, key) not in replaced} | flags


def _flags(names: Collection[str], also: Mapping[str, tuple[str, str]] | None = None) -> list[inspect.Parameter]:
    """One parameter per option of these names; None means that the flag was not given.

    `also` has a further flag and another help for some of them.
    """
    also = also or {}
    hints = field_types()
    config = typer.Option("--config", "-c", help="YAML file of options; flags win over it.", rich_help_panel="Config")
    parameters = [_parameter("config", Annotated[str | None, config])]
    for spec in sorted(dataclasses.fields(TrainOptions), key=lambda spec: GROUPS.index(spec.metadata["group"])):
        if spec.name not in names:
            continue
        switch = hints[spec.name] in (bool, bool | None)
        name = f"--{spec.name}/--no_{spec.name}" if switch else f"--{spec.name}"
        further, text = also.get(spec.name, (name, _help(spec)))
        flag = typer.Option(
            *dict.fromkeys((further, name)),
            help=text,
            metavar=None if switch else _metavar(hints[spec.name]),
            rich_help_panel=spec.metadata["group"],
            show_default=False,
        )
        # text is read by `coerce`, as in a file, so both give the same errors
        parameters.append(_parameter(spec.name, Annotated[bool | None if switch else str | None, flag]))
    return parameters


def _parameter(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


#: The parameters of commands that are no options of a training run: name, type, default, help.
_TRAIN_FLAGS: list[tuple[str, Any, Any, str]] = [
    ("seeds", str | None, None, "Seeds of several runs, one after the other, comma-separated; each in its own folder."),
]
_TEACHER_FLAGS: list[tuple[str, Any, Any, str]] = [
    ("output", str, inspect.Parameter.empty, "File to write: .parquet or .jsonl."),
    ("k", int, TEACHER_IDS, "Ids a token."),
    ("server", str | None, None, "Address of a server with vLLM's prompt_logprobs, in place of a model."),
]
_REWARD_FLAGS: list[tuple[str, Any, Any, str]] = [
    ("output", str, inspect.Parameter.empty, "File to write: .jsonl. A summary goes beside it."),
    ("labels", str | None, None, "Column that says which answers are right; pairs need none."),
    ("html", str | None, None, "Page to write: .html, with the first rows' tokens in colours."),
    ("png", str | None, None, "Plot to write: .png, of the first few rows."),
]
_RIGHT_FLAGS: list[tuple[str, Any, Any, str]] = [
    ("threshold", float, 1.0, "Least reward of a completion that counts as right."),
    ("threshold_func", str | None, None, "Reward function that is compared with it. Default: the weighted sum of all."),
]
_EVALUATE_FLAGS: list[tuple[str, Any, Any, str]] = [
    ("output", str | None, None, "File for the samples with their rewards: .jsonl or .parquet."),
    ("json", str | None, None, "File for the metrics: .json."),
    *_RIGHT_FLAGS,
]
_CRITICAL_FLAGS: list[tuple[str, Any, Any, str]] = [
    ("output", str, inspect.Parameter.empty, "File to write: .jsonl."),
    ("alternatives", int, 2, "Likeliest other tokens that stand in for a token."),
    ("positions", int | None, None, "Tokens of an answer that are looked at. Default: all."),
    ("samples", int, 0, "Continuations of each that are sampled; 0: one, of the likeliest tokens."),
    *_RIGHT_FLAGS,
]


def _own_flags(flags: Sequence[tuple[str, Any, Any, str]], panel: str) -> list[inspect.Parameter]:
    return [
        _parameter(name, Annotated[kind, typer.Option(f"--{name}", help=text, rich_help_panel=panel)], default)
        for name, kind, default, text in flags
    ]


def _help(spec: dataclasses.Field[Any]) -> str:
    choices = f" One of {', '.join(spec.metadata['choices'])}." if spec.metadata["choices"] else ""
    shown = spec.default not in (None, "", False)
    return f"{spec.metadata['help']}{choices}" + (f" (default: {spec.default})" if shown else "")


def _metavar(annotation: Any) -> str:
    """The type as help shows it."""
    kinds = typing.get_args(annotation) or (annotation,)
    kind = next((kind for kind in (int, float, str) if kind in kinds), None)
    return "TEXT" if kind in (str, None) else kind.__name__.upper()


def _with_context(parameters: list[inspect.Parameter]) -> inspect.Signature:
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    return inspect.Signature([context, *parameters])


train.__signature__ = _with_context(  # type: ignore[attr-defined]
    _flags(field_types()) + _own_flags(_TRAIN_FLAGS, "Optimisation")
)
app.command(cls=_Command, context_settings=_FURTHER)(train)
teach.__signature__ = _with_context(  # type: ignore[attr-defined]
    _own_flags(_TEACHER_FLAGS, "Teacher") + _flags(TEACHER_OPTIONS)
)
app.command(cls=_Command, context_settings=_FURTHER)(teach)
reward.__signature__ = _with_context(  # type: ignore[attr-defined]
    _own_flags(_REWARD_FLAGS, "Reward") + _flags(REWARD_OPTIONS, REWARD_FLAGS)
)
app.command(cls=_Command, context_settings=_FURTHER, options_metavar="[OPTIONS] ROWS")(reward)
evaluate_rows.__signature__ = _with_context(  # type: ignore[attr-defined]
    _own_flags(_EVALUATE_FLAGS, "Evaluation") + _flags(EVALUATE_OPTIONS)
)
app.command("evaluate", cls=_Command, context_settings=_FURTHER)(evaluate_rows)
mask_critical.__signature__ = _with_context(  # type: ignore[attr-defined]
    _own_flags(_CRITICAL_FLAGS, "Critical tokens") + _flags(CRITICAL_OPTIONS)
)
app.command("mask-critical", cls=_Command, context_settings=_FURTHER)(mask_critical)


app.add_typer(bench_app, name="bench", context_settings=_CONTEXT)


@app.command()
def extrapolate(
    start: Annotated[str, typer.Option("--start", help="Folder or hub id of the model before its alignment.")],
    aligned: Annotated[str, typer.Option("--aligned", help="Folder or hub id of the model after it.")],
    alpha: Annotated[float, typer.Option("--alpha", help="How far beyond, as a share of the way between the two.")],
    output: Annotated[str, typer.Option("--output", help="Folder to write.")],
) -> None:
    """Write the model aligned + alpha (aligned - start), beyond an alignment (ExPO)."""
    with reported():
        from logitless.training.extrapolate import write_extrapolated

        for note in write_extrapolated(start, aligned, output, alpha=alpha):
            typer.echo(f"note: {note}", err=True)
        typer.echo(f"model in {output}")


@app.command("plan")
def plan_step(
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens of a step that count.")],
    memory: Annotated[str, typer.Option("--memory", help="Memory that there is: 80GB, 79GiB, 24000MB.")],
    model: Annotated[str | None, typer.Option("--model", help="Folder with a config.json, or hub id.")] = None,
    hidden: Annotated[int | None, typer.Option("--hidden", help="Hidden size, in place of a model.")] = None,
    vocab: Annotated[int | None, typer.Option("--vocab", help="Vocabulary, in place of a model.")] = None,
    loss: Annotated[str, typer.Option("--loss", help="A loss; `logitless losses` lists them.")] = "nll",
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "bfloat16",
    device: Annotated[str | None, typer.Option("--device", help="cpu or cuda. Default: cuda where it is.")] = None,
    backend: Annotated[str | None, typer.Option("--backend", help="Default: what would be picked.")] = None,
    frozen_head: Annotated[bool, typer.Option("--frozen_head", help="The head is not trained.")] = False,
    lora: Annotated[int | None, typer.Option("--lora", help="Rank of adapters; the head is frozen then.")] = None,
    length: Annotated[int | None, typer.Option("--length", help="Tokens of a sequence.")] = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Of the layers' activations.")] = False,
    chunk_bytes: Annotated[int | None, typer.Option("--chunk_bytes", help="As in linear_logprobs.")] = None,
    tflops: Annotated[float | None, typer.Option("--tflops", help="Of another machine, with --bandwidth.")] = None,
    bandwidth: Annotated[float | None, typer.Option("--bandwidth", help="GB/s of its memory.")] = None,
    json: Annotated[str | None, typer.Option("--json", help="File for everything: .json.")] = None,
) -> None:
    """Predict memory and time of a head and its loss, what fits, and what to choose."""
    from logitless import plan as planner
    from logitless.training.files import write_text

    try:
        found = planner.plan(
            model,
            tokens=tokens,
            memory=planner.read_bytes(memory),
            hidden=hidden,
            vocabulary=vocab,
            loss=loss,
            dtype=planner.read_dtype(dtype),
            device=device,
            frozen_head=frozen_head,
            lora=lora,
            length=length,
            checkpointing=checkpointing,
            chunk_bytes=chunk_bytes,
            backend=backend,
            rates=planner.given_rates(tflops, bandwidth),
        )
        if json is not None:
            write_text(Path(json), planner.report_json(found))
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo("\n".join(planner.report_lines(found)))


@app.command()
def info() -> None:
    """Versions, devices, and which backend would be picked, and why."""
    typer.echo("\n".join(commands.info_lines()))


@app.command()
def losses(name: Annotated[str | None, typer.Argument(help="A loss: everything about it.")] = None) -> None:
    """All losses with level, inputs and formula, or one of them in full."""
    try:
        typer.echo("\n".join(commands.loss_lines(name)))
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(commands.version())
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="The version.")
    ] = False,
) -> None:
    """Losses for LLM post-training from hidden states, never from logits."""


def main() -> None:
    """Entry point of the `logitless` command."""
    app(prog_name="logitless")
