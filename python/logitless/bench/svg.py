"""A plot as SVG inside a page: text is text, ink has the page's colour, and no style stands in an attribute.

Matplotlib writes styles that a page without inline styles refuses, and names of colours that a dark page would hide.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from html import escape
from typing import Any
from xml.etree import ElementTree

#: Colours by number, which the page's style gives a value for light and for dark: see `palette`.
COLOURS = 8
LIGHT = ("#6b7280", "#c2410c", "#1d4ed8", "#0e7490", "#15803d", "#a21caf", "#a16207", "#be123c")
DARK = ("#9ca3af", "#fb923c", "#60a5fa", "#22d3ee", "#4ade80", "#e879f9", "#facc15", "#fb7185")
#: Stand-ins by which Matplotlib's output names them.
INK = "#010101"
#: Characters that XML does not admit; an error's text may colour a terminal with them.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a name begins no formula
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def colour(number: int) -> str:
    """The stand-in of the colour of this number."""
    return f"#0101{0x10 + number % COLOURS:02x}"


def palette(values: tuple[str, ...]) -> str:
    """CSS that gives the colours their values."""
    return "".join(f"--c{number}:{value};" for number, value in enumerate(values))


def require_matplotlib() -> None:
    """Raises ModuleNotFoundError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the page's plots need matplotlib: pip install 'logitless[bench]'", name="matplotlib"
        ) from error


def drawn(draw: Callable[[Any, Any], None], width: float, height: float, name: str, title: str) -> str:
    """A plot of so many inches.

    Args:
        draw: called with the figure and its axes.
        name: different for each plot of a page, for the names inside it.
        title: what a reader who does not see it is told.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    file = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")  # the reader's browser has its own fonts
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure, figure.subplots())
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inline(CONTROL.sub(" ", file.getvalue()), title)


def _inline(text: str, title: str) -> str:
    root = ElementTree.fromstring(text)
    inside = {element for definitions in _named(root, "defs") for element in definitions.iter()}
    for element in root.iter():
        element.attrib = {_local(name): value for name, value in element.attrib.items()}
        if element not in inside:
            element.attrib.pop("id", None)  # Matplotlib's numbers, which every plot has alike
        for name, value in _attributes(element.attrib.pop("style", "")):
            element.set(name, value)
        for child in list(element):
            if _local(child.tag) in ("metadata", "style"):
                element.remove(child)
        element.tag = _local(element.tag)
    box = root.get("viewBox", "")
    root.attrib = {"viewBox": box, "role": "img", "class": "plot", "aria-label": title}
    return _coloured(ElementTree.tostring(root, encoding="unicode"))


def _named(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [element for element in root.iter() if _local(element.tag) == name]


def _local(name: str) -> str:
    """A name without its namespace."""
    return name.rpartition("}")[2]


def _attributes(style: str) -> list[tuple[str, str]]:
    """A style as attributes, the font's family left to the page."""
    pairs = [tuple(map(str.strip, part.split(":", 1))) for part in style.split(";") if ":" in part]
    found = []
    for name, value in pairs:
        if name == "font":
            size = re.search(r"[\d.]+px", value)
            found.append(("font-size", size[0] if size else "10px"))
        else:
            found.append((name, value))
    return found


def _coloured(text: str) -> str:
    """The stand-ins in attributes replaced by what the page's style knows."""
    for number in range(COLOURS):
        text = text.replace(f'="{colour(number)}"', f'="var(--c{number})"')
    return text.replace(f'="{INK}"', '="currentColor"')


def figure_html(svg: str, caption: str) -> str:
    """The plot with its caption."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
