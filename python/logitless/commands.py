"""The commands that need PyTorch alone: `info`, `losses` and `--version`.

The command line has them beside those of `NEEDING`, whose packages it imports. Where one of these is missing, `main` is
a command line of what is left.
"""

from __future__ import annotations

import argparse
import inspect
import sys

from . import losses
from .info import info, version_of
from .losses import Loss

#: The commands that need the packages of the extra `train`.
NEEDING = ("train", "teach", "evaluate", "reward", "mask-critical", "bench", "plan", "extrapolate")


def version() -> str:
    """The version of the installed package."""
    return f"logitless {version_of('logitless')}"


def info_lines() -> list[str]:
    """Versions, devices, and which backend would be picked, and why: a line each."""
    return columns_of([(name, value) for name, value in info().items()])


def loss_lines(name: str | None) -> list[str]:
    """All losses, a line each, or everything about the one of this name.

    A line has name, level, inputs (in brackets those that a loss can do without), and what the loss is.

    Raises:
        ValueError: no loss has that name; the message lists near ones.
    """
    if name is None:
        return columns_of([(*_facts(losses.get(each)), _summary(losses.get(each))) for each in losses.names()])
    loss = losses.get(name)
    titles = ("name", "level", "inputs", "default")
    facts = columns_of(list(zip(titles, (*_facts(loss), repr(loss)), strict=True)))
    return [*facts, "", *inspect.cleandoc(type(loss).__doc__ or "").splitlines()]


def _facts(loss: Loss) -> tuple[str, str, str]:
    """Name, level and inputs."""
    needed = ("ref_hidden",) if loss.compares_distributions else ()
    names = (*needed, *loss.inputs, *loss.sequence_inputs, *(f"[{name}]" for name in loss.optional_inputs))
    return loss.name, loss.level, ", ".join(names) or "-"


def _summary(loss: Loss) -> str:
    """The first sentence of the docstring, which has the formula where one line can hold it."""
    lines = inspect.cleandoc(type(loss).__doc__ or "").split("\n\n")[0].splitlines()
    end = next((number for number, line in enumerate(lines, 1) if line.endswith(".")), len(lines))
    return " ".join(lines[:end])


def columns_of(rows: list[tuple[str, ...]]) -> list[str]:
    """The rows with their columns under one another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def main(missing: str | None) -> None:
    """The command line without the packages of `train`, the first of which to be missing is given."""
    if not sys.argv[1:] or sys.argv[1] in NEEDING:
        what = " ".join(("logitless", *sys.argv[1:2]))
        sys.exit(f"{what} needs {missing}: pip install 'logitless[train]'; info, losses and --version work without it")
    needing = f"{', '.join(NEEDING[:-1])} and {NEEDING[-1]}"
    parser = argparse.ArgumentParser(
        "logitless", epilog=f"{needing} need {missing}, which pip install 'logitless[train]' brings."
    )
    parser.add_argument("--version", action="version", version=version())
    commands = parser.add_subparsers(dest="command", metavar="info | losses [NAME]", required=True)
    commands.add_parser("info", help=inspect.getdoc(info_lines))
    commands.add_parser("losses", help="The losses, or everything about one.").add_argument("name", nargs="?")
    arguments = parser.parse_args()
    try:
        lines = info_lines() if arguments.command == "info" else loss_lines(arguments.name)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print("\n".join(lines))
