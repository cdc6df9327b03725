"""The command line: `logitless train` and `logitless info`.

The options of `train` are those of `TrainOptions`, which is their single statement: the flags are generated from it, a
YAML file given with `--config` may hold the same names, and a flag wins over the file.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Annotated, Any

import typer

from logitless.training.config import TrainOptions, field_types, options_from_mapping, read_yaml
from logitless.training.errors import InputError, NonFiniteLossError

# --learning-rate and --learning_rate are the same flag
_CONTEXT = {"token_normalize_func": lambda name: name.replace("-", "_"), "help_option_names": ["-h", "--help"]}

app = typer.Typer(
    help="Losses for LLM post-training from hidden states, never from logits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=_CONTEXT,
)


def train(config: str | None, **flags: Any) -> None:
    """Fine-tune a causal language model: --method sft, dft, f-divergence or dpo."""
    try:
        values = read_yaml(config) if config is not None else {}
        given = {name: value for name, value in flags.items() if value is not None}
        options, notes = options_from_mapping(_merged(values, given), config or "command line")
        for note in notes:
            typer.echo(f"note: {note}", err=True)
        from logitless.training import train as run

        run(options)
    except (InputError, NonFiniteLossError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1 if isinstance(error, NonFiniteLossError) else 2) from error


def _merged(values: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The file's values without those that a flag replaces under whatever name."""
    from logitless.training.config import ALIASES

    return {key: value for key, value in values.items() if ALIASES.get(key, key) not in flags} | flags


def _flags() -> list[inspect.Parameter]:
    """One parameter per option; None means that the flag was not given."""
    hints = field_types()
    config = typer.Option("--config", "-c", help="YAML file of options; flags win over it.", rich_help_panel="Config")
    parameters = [_parameter("config", Annotated[str | None, config])]
    for spec in dataclasses.fields(TrainOptions):
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


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _help(spec: dataclasses.Field[Any]) -> str:
    choices = f" One of {', '.join(spec.metadata['choices'])}." if spec.metadata["choices"] else ""
    shown = spec.default not in (None, "", False)
    return f"{spec.metadata['help']}{choices}" + (f" (default: {spec.default})" if shown else "")


def _metavar(annotation: Any) -> str:
    """The type as help shows it."""
    kinds = typing.get_args(annotation) or (annotation,)
    kind = next((kind for kind in (int, float, str) if kind in kinds), None)
    return "TEXT" if kind in (str, None) else kind.__name__.upper()


train.__signature__ = inspect.Signature(_flags())  # type: ignore[attr-defined]
app.command()(train)


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
