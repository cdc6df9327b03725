"""The HTML page: one file without network, in which every token has the colour of its number.

Texts of the rows are only ever text: they are escaped, and a policy in the page's head lets no script run but the
page's own, whose hash it names. The colours are there without the script. It adds the choice of numbers, the tooltips,
and the keyboard: Tab goes from answer to answer, the arrow keys from token to token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

import torch

from logitless.training.document import Table, document, fact_list, table_html
from logitless.training.implicit_reward.scale import COLOURS, INK, STEPS, Scale, fitted
from logitless.training.implicit_reward.scores import Answer

#: Fields of `ImplicitReward` in the order in which a token has them, with their names on the page.
NUMBERS = {
    "log_odds": "log-odds, Q - V",
    "reward": "dense reward, r",
    "returns": "return from here on",
    "q": "Q of the token",
    "value": "V of the state before it",
}


class Shown(NamedTuple):
    """A row on the page: its place in the data, and its answers under their names."""

    origin: str
    answers: Mapping[str, Answer]
    note: str = ""


def html_page(rows: Sequence[Shown], facts: Mapping[str, str], tables: Sequence[Table], with_reference: bool) -> str:
    """The page of these rows, at least one.

    Args:
        rows: what is shown.
        facts: names and values that stand above.
        tables: further numbers that stand above.
        with_reference: whether the numbers compare with a reference, so that 0 is the middle of the colours.
    """
    scales = {name: _scale(rows, name, with_reference) for name in NUMBERS}
    first = next(iter(scales.values()))
    body = "\n".join(
        [
            "<h1>Implicit reward</h1>",
            fact_list(facts),
            *map(table_html, tables),
            _controls(scales),
            "<main>",
            *(_section(row, first) for row in rows),
            "</main>",
            '<div id="tip" role="tooltip" hidden></div>',
        ]
    )
    return document("Implicit reward", body, STYLE, SCRIPT)


def _scale(rows: Sequence[Shown], name: str, with_reference: bool) -> Scale:
    values = [getattr(answer.numbers, name) for row in rows for answer in row.answers.values()]
    return fitted(torch.cat(values), around_zero=with_reference)


def _controls(scales: Mapping[str, Scale]) -> str:
    """The choice of numbers, and the legend."""
    options = "".join(
        f'<option data-centre="{scale.centre!r}" data-span="{scale.span!r}">{escape(NUMBERS[name])}</option>'
        for name, scale in scales.items()
    )
    first = next(iter(scales.values()))
    ends = [number_text(first.centre + side * first.span) for side in (-1, 0, 1)]
    names = ("low", "centre", "high")
    labels = [f'<output id="{name}">{end}</output>' for name, end in zip(names, ends, strict=True)]
    swatches = "".join(f'<i class="token" data-step="{step}">abc</i>' for step in range(-STEPS, STEPS + 1))
    return (
        f'<div id="controls"><label>Colour by <select id="measure">{options}</select></label>\n'
        f'<div id="legend" role="group" aria-label="legend">at most {labels[0]} <span aria-hidden="true">{swatches}'
        f"</span> {labels[2]} or more, centre {labels[1]}; a dotted line is below the centre, a solid one above</div>\n"
        "<p>Tab goes to the next answer; the arrow keys, Home and End to a token; Escape closes its numbers.</p></div>"
    )


def _section(row: Shown, scale: Scale) -> str:
    answers = list(row.answers.items())
    prompt = answers[0][1].between[0]
    heading = f"<h2><bdi>{escape(row.origin)}</bdi></h2>"
    note = f"<p>{escape(row.note)}</p>" if row.note else ""
    asked = f'<details><summary>prompt</summary><div class="text" dir="auto">{escape(prompt)}</div></details>'
    sides = "".join(_answer(name, answer, scale) for name, answer in answers)
    return f'<section>{heading}{note}{asked}<div class="sides">{sides}</div></section>'


def _answer(name: str, answer: Answer, scale: Scale) -> str:
    line = (
        f"{name}: sum of log-odds {number_text(answer.sequence_reward)}, tokens {len(answer.ids)}, mean "
        f"{number_text(answer.mean_log_odds)}"
    )
    tokens = "".join(_tokens(answer, scale))
    return (
        f'<article><h3>{escape(line)}</h3><div class="text answer" dir="auto" role="group" '
        f'aria-label="{escape(name)}, token by token">{tokens}</div></article>'
    )


def _tokens(answer: Answer, scale: Scale) -> Iterator[str]:
    columns = [getattr(answer.numbers, name).tolist() for name in NUMBERS]
    for place, numbers in enumerate(zip(*columns, strict=True)):
        if place and (text := answer.between[place]):
            yield f'<span class="uncounted">{escape(text)}</span>'
        piece = answer.pieces[place]
        mark = " empty" if not piece else " newline" if "\n" in piece else ""
        values = " ".join(number_text(number) for number in numbers)
        yield (
            f'<span class="token{mark}" tabindex="{0 if place == 0 else -1}" data-step="{scale.step(numbers[0])}" '
            f'data-id="{answer.ids[place]}" data-x="{values}">{escape(piece)}</span>'
        )


def number_text(value: float) -> str:
    """A number for a reader: four digits."""
    return f"{value:.4g}"


def _step_colours(mode: str) -> str:
    sides = zip(range(-STEPS, STEPS + 1), COLOURS[mode], strict=True)
    colours = "".join(f'[data-step="{step}"]{{background:{colour}}}' for step, colour in sides)
    return f"body{{color:{INK[mode]};background:{COLOURS[mode][STEPS]}}}{colours}"


STYLE = (
    """
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:80rem;padding:1rem}
h1{font-size:1.5rem}h2{font-size:1.1rem;overflow-wrap:anywhere}h3{font-size:1rem;font-weight:600}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem}dd{margin:0;overflow-wrap:anywhere}
table{border-collapse:collapse;margin:1rem 0}caption{text-align:left;font-weight:600}
th,td{text-align:left;padding:.1rem .8rem .1rem 0}td{font-variant-numeric:tabular-nums}
#controls{position:sticky;top:0;padding:.5rem 0;border-bottom:1px solid;background:inherit;z-index:1}
#controls p{margin:.2rem 0;font-size:.85rem}select{font:inherit}
section{border-top:1px solid #8888;margin-top:1.5rem}
.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(24rem,100%),1fr));gap:0 2rem}
.text{font-family:ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;
line-height:1.9}
.token{font-style:normal;border-radius:3px;scroll-margin:12rem 0 6rem;
padding:.15em 0;text-decoration:2px underline transparent}
.token[data-step="-4"],.token[data-step="-3"],.token[data-step="-2"],.token[data-step="-1"]
{text-decoration:2px dotted underline;text-underline-offset:.3em}
.token[data-step="1"],.token[data-step="2"],.token[data-step="3"],.token[data-step="4"]
{text-decoration:2px solid underline;text-underline-offset:.3em}
main .token:hover,main .token:focus{outline:2px solid currentColor;outline-offset:1px}
.newline::before{content:"\\21b5";opacity:.7}.empty::before{content:"\\25e6";opacity:.7}
.uncounted{opacity:.75;font-style:italic}
#tip{position:fixed;z-index:2;padding:.5rem .8rem;border:1px solid;border-radius:6px;max-width:min(24rem,90vw);
background:inherit}
#tip p{margin:0;overflow-wrap:anywhere;white-space:pre-wrap;font-variant-numeric:tabular-nums}
@media print,(max-width:40rem),(max-height:40rem){#controls{position:static}}
"""
    + _step_colours("light")
    + f"@media (prefers-color-scheme:dark){{{_step_colours('dark')}}}"
)

SCRIPT = """
"use strict";
const find = name => document.getElementById(name);
const tip = find("tip"), measure = find("measure");
const tokens = [...document.querySelectorAll("main .token")];
const short = x => String(Number(x.toPrecision(4)));
let shown = null;  // the token that the tooltip is about
const numbers = token => token.dataset.x.split(" ");

function colour() {
  const place = measure.selectedIndex, {centre, span} = measure.selectedOptions[0].dataset;
  for (const token of tokens) {
    const step = Math.floor(4 * (numbers(token)[place] - centre) / span + 0.5);
    token.dataset.step = Math.max(-4, Math.min(4, step));
  }
  find("low").value = short(centre - span);
  find("centre").value = short(Number(centre));
  find("high").value = short(Number(centre) + Number(span));
}

function show(token) {
  shown = token;
  const named = [...measure.options].map((option, place) => `${option.text}: ${numbers(token)[place]}`);
  const lines = [`${JSON.stringify(token.textContent)}, id ${token.dataset.id}`, ...named];
  tip.replaceChildren(...lines.map(line => {
    const paragraph = document.createElement("p");
    paragraph.textContent = line;
    return paragraph;
  }));
  tip.hidden = false;
  const box = token.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const below = box.bottom + 6 + own.height <= innerHeight;
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - own.width - 4))}px`;
  tip.style.top = `${below ? box.bottom + 6 : Math.max(4, box.top - own.height - 6)}px`;
}

function hide() {
  tip.hidden = true;
  shown = null;
}

function left() {
  const token = document.activeElement?.closest("main .token");
  if (token) show(token); else hide();
}

function focused(token) {
  for (const other of token.parentElement.querySelectorAll('.token[tabindex="0"]')) other.tabIndex = -1;
  token.tabIndex = 0;
  token.setAttribute("aria-describedby", "tip");
  show(token);
}

function go(event) {
  if (event.key === "Escape") return hide();
  const token = event.target.closest("main .token");
  if (!token || event.ctrlKey || event.altKey || event.metaKey) return;
  const own = [...token.parentElement.querySelectorAll(".token")], place = own.indexOf(token);
  const aims = {ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: own.length - 1};
  if (!(event.key in aims)) return;
  event.preventDefault();
  own[aims[event.key]]?.focus();
}

const over = event => event.target.closest?.("main .token");
document.addEventListener("keydown", go);
document.addEventListener("pointerover", event => { const token = over(event); if (token) show(token); });
document.addEventListener("pointerout", event => { if (over(event)) left(); });
document.addEventListener("focusin", event => { const token = over(event); if (token) focused(token); else hide(); });
document.addEventListener("scroll", () => { if (shown) show(shown); }, {passive: true});
measure.addEventListener("change", colour);
colour();
document.documentElement.dataset.ready = "";
"""
