"""A command's errors as one line and a status."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from logitless.training.errors import InputError, NonFiniteLossError


@contextmanager
def reported(extra: str = "train") -> Iterator[None]:
    """Makes a command's errors one line and a status; a package that is missing is one of `extra`."""
    try:
        yield
    except (InputError, NonFiniteLossError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1 if isinstance(error, NonFiniteLossError) else 2) from error
    except ModuleNotFoundError as error:
        typer.echo(f"error: the package {error.name} is missing: pip install 'logitless[{extra}]'", err=True)
        raise typer.Exit(1) from error
