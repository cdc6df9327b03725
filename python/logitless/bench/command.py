"""`logitless bench`: whether logitless pays on this machine, for this model and this batch.

What the functions here call is imported when they are called, so that the command line itself starts fast.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from logitless.training.reported import reported

app = typer.Typer(invoke_without_command=True, add_completion=False)


def _option(flag: str, text: str, panel: str) -> Any:
    return typer.Option(flag, help=text, rich_help_panel=panel, show_default=False)


@app.callback()
def bench(
    context: typer.Context,
    model: Annotated[
        str | None, _option("--model", "Hub id, folder or .gguf file: sizes, and its whole step.", "What")
    ] = None,
    hidden: Annotated[int | None, _option("--hidden", "Hidden size H. Default: 576.", "What")] = None,
    vocab: Annotated[int | None, _option("--vocab", "Vocabulary V. Default: 49152.", "What")] = None,
    tokens: Annotated[
        int | None, _option("--tokens", "Tokens of a step, N. Default: 2048, on a GPU 8192; quick: half.", "What")
    ] = None,
    loss: Annotated[str, _option("--loss", "Any loss of `logitless losses`. Default: nll.", "What")] = "nll",
    dtype: Annotated[
        str | None, _option("--dtype", "float32, bfloat16 or float16. Default: float32, on a GPU bfloat16.", "What")
    ] = None,
    length: Annotated[
        int, _option("--length", "Tokens of each sequence, where sequences or pairs matter. Default: 256.", "What")
    ] = 256,
    losses: Annotated[
        str | None, _option("--losses", "Of the model's step. Default: --loss, and nll, dft, dpo and grpo.", "What")
    ] = None,
    checkpointing: Annotated[
        bool, _option("--checkpointing", "The model's step computes activations again.", "What")
    ] = False,
    frozen_head: Annotated[bool, _option("--frozen_head", "The head gets no gradient, as under LoRA.", "What")] = False,
    data: Annotated[
        str, _option("--data", "peaked, like a trained model's distributions (the default), or random.", "What")
    ] = "peaked",
    against: Annotated[
        str | None,
        _option("--against", "materialised,compiled,torch,trl,liger,cce,quack,flash-attn. Default: most.", "Whom"),
    ] = None,
    backward: Annotated[
        str,
        _option("--backward", "logitless's strategies, comma-separated. Default: auto,recompute.", "Whom"),
    ] = "auto,recompute",
    device: Annotated[str | None, _option("--device", "cpu or cuda. Default: a GPU if there is one.", "How")] = None,
    quick: Annotated[bool, _option("--quick", "The step alone, in two minutes.", "How")] = False,
    parts: Annotated[
        str | None,
        _option("--parts", "Comma-separated: step,tokens,vocabulary,hidden,longest,pairs,model. Default: all.", "How"),
    ] = None,
    memory: Annotated[
        str | None,
        _option("--memory", "What longest and pairs have to fit: 8GB, ... Default: little beside the head.", "How"),
    ] = None,
    rounds: Annotated[
        int | None, _option("--rounds", "Turns of every competitor. Default: 5, on a GPU 20.", "How")
    ] = None,
    minutes: Annotated[
        float | None, _option("--minutes", "Nothing new begins later. Default: 14; quick: 1.8.", "How")
    ] = None,
    patience: Annotated[
        float, _option("--patience", "Seconds without a word after which a competitor hangs. Default: 150.", "How")
    ] = 150.0,
    output: Annotated[
        Path | None, _option("--output", "Folder for bench.json, .md and .html. Default: named by the request.", "How")
    ] = None,
) -> None:
    """Measure what a loss takes here: time, memory and error, with logitless and with others."""
    if context.invoked_subcommand is not None:
        return
    given = {name: x for name, x in context.params.items() if name not in ("output", "patience")}
    start = time.monotonic()
    with reported("bench"):
        from .defaults import completed, folder_of
        from .progress import Progress
        from .session import Session

        request = completed(**given)
        folder = output or folder_of(request, quick=quick)
        session = Session(request, folder, Progress(), start=start, patience=patience)
        try:
            session.run()
        except KeyboardInterrupt:
            typer.echo(f"interrupted; what was measured is in {folder}, and the same command goes on", err=True)
            raise typer.Exit(130) from None
        typer.echo(f"{folder / 'bench.html'} has it with plots", err=True)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="bench.json of one run.")],
    after: Annotated[Path, typer.Argument(help="bench.json of another.")],
    fail_if_slower: Annotated[
        bool, typer.Option("--fail_if_slower", help="Status 1 if a row of logitless is slower, or fails.")
    ] = False,
) -> None:
    """Compare two files of results: what became faster or slower, and whether that is more than chance."""
    with reported("bench"):
        from .compare import compare as compared
        from .compare import text
        from .results import read_results

        found = compared(read_results(before), read_results(after))
        typer.echo(text(found, str(before), str(after)))
        if fail_if_slower and (found.slower or found.broken):
            raise typer.Exit(1)


@app.command()
def report(
    files: Annotated[list[Path], typer.Argument(help="bench.json of one or several runs or machines.")],
    output: Annotated[Path, typer.Option("--output", help="Page to write: .html; the tables go beside it as .md.")],
) -> None:
    """Write the page and the tables of files of results, of several machines side by side; measures nothing."""
    with reported("bench"):
        from .results import write_pages

        write_pages(files, output)
        typer.echo(f"{output}", err=True)
