"""The plot: the first rows' answers, every token in the colour of its log-odds, as on the page."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from logitless.training import files
from logitless.training.errors import InputError
from logitless.training.implicit_reward.page import Shown, number_text
from logitless.training.implicit_reward.scale import COLOURS, INK, STEPS, Scale, fitted
from logitless.training.implicit_reward.scores import Answer

WIDTH = 100  # characters of a line
MOST_LINES = 24  # of an answer; the rest is left out, and a line says so
LINE, LETTER = 0.2, 0.085  # inches: the height of a line, the width of a character


class _Box(NamedTuple):
    """A stretch of characters of one token on one line."""

    line: int
    column: int
    text: str
    step: int


def require_matplotlib() -> None:
    """Raises InputError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("png: drawing needs matplotlib (pip install matplotlib)") from error


def draw(rows: Sequence[Shown], path: Path, with_reference: bool) -> None:
    """Writes a PNG of these rows, at least one."""
    from matplotlib.figure import Figure

    answers = [(f"{row.origin}, {name}", answer) for row in rows for name, answer in row.answers.items()]
    scale = fitted(torch.cat([answer.numbers.log_odds for _, answer in answers]), around_zero=with_reference)
    layouts = [list(_boxes(answer, scale)) for _, answer in answers]
    heights = [2 + min(MOST_LINES + 1, 1 + max((box.line for box in boxes), default=0)) for boxes in layouts]
    total = sum(heights) + 2
    figure = Figure(figsize=(WIDTH * LETTER + 0.4, total * LINE))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), xlim=(-2, WIDTH + 2), ylim=(total, 0))
    axes.axis("off")
    _legend(axes, scale)
    top = 2
    for (name, answer), boxes, height in zip(answers, layouts, heights, strict=True):
        title = f"{name}: sum of log-odds {number_text(answer.sequence_reward)}, tokens {len(answer.ids)}"
        _put_text(axes, 0, top + 0.6, title[:WIDTH], weight="bold")
        _draw_boxes(axes, boxes, top + 1)
        top += height
    with files.new_file(path) as unfinished, warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")  # they are drawn as boxes
        figure.savefig(unfinished, format="png", dpi=150)


def _boxes(answer: Answer, scale: Scale) -> Iterator[_Box]:
    """The answer's characters in lines; a new line is shown as a mark, and begins one."""
    line = column = 0
    for piece, number in zip(answer.pieces, answer.numbers.log_odds.tolist(), strict=True):
        step, run = scale.step(number), ""
        for character in piece:
            run += "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}" if character == "\n" else _printable(character)
            if character == "\n" or column + len(run) == WIDTH:
                yield _Box(line, column, run, step)
                line, column, run = line + 1, 0, ""
        if run:
            yield _Box(line, column, run, step)
            column += len(run)


def _printable(character: str) -> str:
    return character if character.isprintable() else " "


def _draw_boxes(axes: Any, boxes: Sequence[_Box], top: int) -> None:
    from matplotlib.patches import Rectangle

    for box in boxes:
        if box.line >= MOST_LINES:
            _put_text(axes, 0, top + MOST_LINES + 0.5, "(the rest is left out)")
            return
        colour = COLOURS["light"][box.step + STEPS]
        axes.add_patch(Rectangle((box.column, top + box.line), len(box.text), 0.9, facecolor=colour))
        for place, character in enumerate(box.text):  # one by one, so that each stands on its own column
            _put_text(axes, box.column + place, top + box.line + 0.5, character)


def _legend(axes: Any, scale: Scale) -> None:
    from matplotlib.patches import Rectangle

    for place, colour in enumerate(COLOURS["light"]):
        axes.add_patch(
            Rectangle((24 + 4 * place, 0.5), 4, 0.9, facecolor=colour, edgecolor=INK["light"], linewidth=0.3)
        )
    low, centre, high = (number_text(scale.centre + side * scale.span) for side in (-1, 0, 1))
    _put_text(axes, 0, 1.0, f"log-odds: {low} or less")
    _put_text(axes, 61, 1.0, f"{high} or more; centre {centre}")


def _put_text(axes: Any, x: float, y: float, text: str, **options: Any) -> None:
    """Text as it stands: a dollar sign begins no formula."""
    axes.text(x, y, text, family="monospace", fontsize=9, va="center", color=INK["light"], parse_math=False, **options)
