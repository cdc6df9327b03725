"""The HTML page of one file or of several: what they come to, plots, every table, and where they were measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape

from logitless.training.document import Table, document, fact_list, table_html

from .plots import OF_ROLE, plots_of
from .report import heading
from .sections import beside, described, machine_facts, machines, notes_of, tables_of
from .summary import headlines
from .svg import DARK, LIGHT, palette, require_matplotlib
from .targets import Json

TITLE = "logitless bench"
#: What the role of a provider means.
ROLES = {
    "floor": "the floor: products or a copy alone",
    "materialised": "the loss on materialised logits",
    "logitless": "logitless",
    "peer": "other libraries",
}


def html_page(results: Mapping[str, Json]) -> str:
    """One page that opens from disk, of files by their labels; several stand side by side.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: there is no file.
    """
    require_matplotlib()
    if not results:
        raise ValueError("results: expected at least one file, got none")
    every = {f"{label} {name}": part for label, one in results.items() for name, part in one["parts"].items()}
    body = _single(next(iter(results.values()))) if len(results) == 1 else _several(results)
    title = heading(TITLE, every)
    return document(title, "\n".join([f"<h1>{escape(title)}</h1>", *body]), PAGE_STYLE)


def _single(results: Json) -> Iterator[str]:
    yield _list(headlines(results), "summary")
    yield _key()
    for name, part in results["parts"].items():
        yield f"<section><h2>{escape(name)}</h2>{_part(name, part)}</section>"
    yield f"<section><h2>Where and when</h2>{fact_list(machine_facts(results))}</section>"


def _several(results: Mapping[str, Json]) -> Iterator[str]:
    for label, one in results.items():
        yield f"<h2><bdi>{escape(label)}</bdi></h2>{_list(headlines(one), 'summary')}"
    yield f'<div class="facts">{_wide(machines(results))}</div>'
    yield _key()
    for name in dict.fromkeys(name for one in results.values() for name in one["parts"]):
        there = {label: one["parts"][name] for label, one in results.items() if name in one["parts"]}
        plots = "".join(f"<div>{''.join(plots_of(name, part, label))}</div>" for label, part in there.items())
        tables = "".join(map(_wide, beside(name, results)))
        own = "".join(
            f"<details><summary>{escape(f'{name} of {label} in full')}</summary>{_numbers(part)}</details>"
            for label, part in there.items()
        )
        yield f'<section><h2>{escape(name)}</h2><div class="plots">{plots}</div>{tables}{own}</section>'


def _part(name: str, part: Json) -> str:
    return f'<div class="plots">{"".join(plots_of(name, part))}</div>{_numbers(part)}'


def _numbers(part: Json) -> str:
    tables = "".join(map(_wide, tables_of(part)))
    return f'<p class="about">{escape(described(part))}</p>{tables}{_list(notes_of(part), "notes")}'


def _wide(table: Table) -> str:
    """A table that scrolls by itself where the screen is narrow, by keyboard too."""
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(table.caption)}">{table_html(table)}</div>'
    )


def _list(lines: list[str], kind: str) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="{kind}">{items}</ul>' if items else ""


def _key() -> str:
    """What the colours mean."""
    items = (
        f"<li>{''.join(f'<i class=c{number}></i>' for number in OF_ROLE[role])} {escape(meaning)}</li>"
        for role, meaning in ROLES.items()
    )
    return f'<ul class="key">{"".join(items)}</ul>'


PAGE_STYLE = (
    f":root{{color-scheme:light dark;{palette(LIGHT)}}}"
    f"@media (prefers-color-scheme:dark){{:root{{{palette(DARK)}}}}}"
    + "".join(f".c{number}{{background:var(--c{number})}}" for number in range(len(LIGHT)))
    + """
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:80rem;padding:1rem;color:#111;background:#fff}
@media (prefers-color-scheme:dark){body{color:#e8e8e8;background:#121212}}
h1{font-size:1.5rem}h2{font-size:1.2rem;overflow-wrap:anywhere}
section{border-top:1px solid #8888;margin-top:2rem}
.summary{font-size:1.1rem;padding-left:1.2rem}.summary li{margin:.3rem 0}
.key{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.2rem 1.5rem}
.key i{display:inline-block;width:.9em;height:.9em;border-radius:2px;margin-right:.2em;vertical-align:-.1em}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(24rem,100%),1fr));gap:1rem 2rem;align-items:start}
figure{margin:0 0 1rem;min-width:0;max-width:34rem}figcaption{font-size:.85rem;overflow-wrap:anywhere}
.plot{width:100%;height:auto}.plot *{stroke-linejoin:round;stroke-linecap:butt}.plot text{font-family:inherit}
.wide{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-size:.9rem}caption{text-align:left;font-weight:600}
th,td{text-align:right;padding:.15rem .9rem .15rem 0;white-space:nowrap;border-bottom:1px solid #8883}
th:first-child,td[colspan]{text-align:left}td{font-variant-numeric:tabular-nums}
.facts th,.facts td{text-align:left;white-space:normal;vertical-align:top;overflow-wrap:anywhere}
@media (max-width:40rem){th[scope=row]{white-space:normal;min-width:7rem}}
.about,.notes{font-size:.85rem;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;font-size:.9rem}
dd{margin:0;overflow-wrap:anywhere}
"""
)
