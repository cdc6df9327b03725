"""The command line: `logitless train`, `logitless teach` and `logitless info`.

The options of `train` are those of `TrainOptions`, which is their single statement: the flags are generated from it, a
YAML file given with `--config` may hold the same names, and a flag wins over the file. `teach` has those of them that
say which model reads which tokens, and takes the same file.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Collection
from typing import Annotated, Any

import typer

from logitless.training.config import TEACHER_IDS, TrainOptions, field_types, options_from_mapping, read_yaml
from logitless.training.errors import InputError, NonFiniteLossError

# --learning-rate and --learning_rate are the same flag
_CONTEXT = {"token_normalize_func": lambda name: name.replace("-", "_"), "help_option_names": ["-h", "--help"]}

#: The options of a run that say which model reads which tokens, which is what `teach` needs.
TEACHER_OPTIONS = (
    *("model_name_or_path", "teacher_model_name_or_path", "model_revision", "gguf_file", "dtype", "bf16"),
    *("attn_implementation", "trust_remote_code", "use_liger_kernel", "use_cpu", "cache_dir", "backend"),
    *("chat_template_path", "dataset_name", "dataset_config", "dataset_train_split", "dataset_text_field"),
    *("max_length", "truncation_mode"),
    *("completion_only_loss", "per_device_eval_batch_size"),
)

app = typer.Typer(
    help="Losses for LLM post-training from hidden states, never from logits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=_CONTEXT,
)


def train(config: str | None, **flags: Any) -> None:
    """Fine-tune a causal language model: --method sft, dft, f-divergence or dpo."""

    def run(options: TrainOptions) -> None:
        from logitless.training import train as run_training

        run_training(options)

    _run(config, flags, run)


def teach(config: str | None, output: str, k: int, server: str | None, **flags: Any) -> None:
    """Write rows with a teacher's likeliest ids, for --method top_k_distillation."""

    def run(options: TrainOptions) -> None:
        from logitless.training.teach import write_teacher_columns

        write_teacher_columns(options, output, k=k, server=server)

    _run(config, flags, run)


def _run(config: str | None, flags: dict[str, Any], command: Callable[[TrainOptions], None]) -> None:
    """Calls a command with the options of a file and of flags; its errors are one line and a status."""
    try:
        values = read_yaml(config) if config is not None else {}
        given = {name: value for name, value in flags.items() if value is not None}
        options, notes = options_from_mapping(_merged(values, given), config or "command line")
        for note in notes:
            typer.echo(f"note: {note}", err=True)
        command(options)
    except (InputError, NonFiniteLossError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1 if isinstance(error, NonFiniteLossError) else 2) from error


def _merged(values: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The file's values without those that a flag replaces under whatever name."""
    from logitless.training.config import ALIASES

    return {key: value for key, value in values.items() if ALIASES.get(key, key) not in flags} | flags


def _flags(names: Collection[str]) -> list[inspect.Parameter]:
    """One parameter per option of these names; None means that the flag was not given."""
    hints = field_types()
    config = typer.Option("--config", "-c", help="YAML file of options; flags win over it.", rich_help_panel="Config")
    parameters = [_parameter("config", Annotated[str | None, config])]
    for spec in dataclasses.fields(TrainOptions):
        if spec.name not in names:
            continue
        switch = hints[spec.name] in (bool, bool | None)
        name = f"--{spec.name}/--no_{spec.name}" if switch else f"--{spec.name}"
        flag = typer.Option(
            name,
            help=_help(spec),
            metavar=None if switch else _metavar(hints[spec.name]),
            rich_help_panel=spec.metadata["group"],
            show_default=False,
        )
        # text is read by `coerce`, as in a file, so both give the same errors
        parameters.append(_parameter(spec.name, Annotated[bool | None if switch else str | None, flag]))
    return parameters


def _parameter(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _teacher_flags() -> list[inspect.Parameter]:
    """The parameters of `teach` that are no options of a training run."""
    own: list[tuple[str, Any, Any, str]] = [
        ("output", str, inspect.Parameter.empty, "File to write: .parquet or .jsonl."),
        ("k", int, TEACHER_IDS, "Ids a token."),
        ("server", str | None, None, "Address of a server with vLLM's prompt_logprobs, in place of a model."),
    ]
    return [
        _parameter(name, Annotated[kind, typer.Option(f"--{name}", help=text, rich_help_panel="Teacher")], default)
        for name, kind, default, text in own
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


train.__signature__ = inspect.Signature(_flags(field_types()))  # type: ignore[attr-defined]
app.command()(train)
teach.__signature__ = inspect.Signature(_teacher_flags() + _flags(TEACHER_OPTIONS))  # type: ignore[attr-defined]
app.command()(teach)


@app.command()
def info() -> None:
    """Versions, devices, and which backend would be picked, and why."""
    import logitless

    lines = logitless.info()
    width = max(map(len, lines))
    for name, value in lines.items():
        typer.echo(f"{name:<{width}}  {value}")


def main() -> None:
    """Entry point of the `logitless` command."""
    app(prog_name="logitless")
