"""The page and the plot of `logitless reward`: texts stay texts, colours can be told apart, a browser opens a page."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from logitless.losses.policy.implicit_reward import ImplicitReward
from logitless.training import InputError
from logitless.training.document import Table
from logitless.training.implicit_reward import picture
from logitless.training.implicit_reward.page import NUMBERS, SCRIPT, Shown, html_page
from logitless.training.implicit_reward.scale import COLOURS, INK, STEPS, Scale, fitted
from logitless.training.implicit_reward.scores import Answer

HOSTILE = [
    "<script>document.title = 'taken'</script>",
    "</script><script>document.title = 'taken'</script>",
    '" onfocus="document.title = 1" x="',
    "<img src=x onerror=\"document.title = 'taken'\">",
    "</style></title></textarea><!-- ",
    "&lt;b&gt; &amp;amp; &#x41;",
    "\N{RIGHT-TO-LEFT OVERRIDE}<b>bold</b>",
    "$x^2$ \\n \n\t end",
    "",
]


def answer(pieces: list[str], between: list[str] | None = None, scale: float = 1.0) -> Answer:
    generator = torch.Generator().manual_seed(len(pieces))
    numbers = ImplicitReward(*(scale * torch.randn(len(pieces), generator=generator) for _ in ImplicitReward._fields))
    return Answer(list(range(len(pieces))), pieces, between or ["a prompt", *[""] * (len(pieces) - 1)], numbers)


def hostile_page() -> str:
    between = [HOSTILE[0], *[""] * (len(HOSTILE) - 2), HOSTILE[3]]
    rows = [
        Shown(HOSTILE[1], {"chosen": answer(HOSTILE, between), "rejected": answer(HOSTILE[::-1])}, HOSTILE[2]),
        Shown("rows.jsonl, line 2", {"answer": answer(["plain", " text"])}),
    ]
    table = Table(HOSTILE[0], [HOSTILE[1], "b"], [[HOSTILE[4], HOSTILE[5]]])
    return html_page(rows, {"model": HOSTILE[3]}, [table], with_reference=True)


class Reader(HTMLParser):
    """The tags of a page, and the texts of its tokens."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tokens: list[str] = []
        self.text = ""
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._inside = tag == "span" and ("data-id" in dict(attrs))
        if self._inside:
            self.tokens.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._inside:
            self.tokens[-1] += data


def test_texts_stay_texts() -> None:
    page = hostile_page()
    found = Reader(page)
    assert found.tokens == [*HOSTILE, *HOSTILE[::-1], "plain", " text"]
    assert found.tags.count("script") == found.tags.count("style") == 1 and "img" not in found.tags
    assert not [name for name, _ in found.attributes if name.startswith("on") or name in ("src", "href", "style")]
    for text in HOSTILE[:6]:
        assert text in found.text


def test_the_page_needs_no_network_and_allows_no_other_script() -> None:
    page = hostile_page()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None and "default-src 'none'" in policy[1] and "unsafe" not in policy[1]
    own = re.sub("|".join(map(re.escape, HOSTILE[:5])), "", page)
    assert not re.search(r"https?://|url\(|@import|fetch\(|innerHTML", own)


def test_tokens_have_their_numbers_and_steps() -> None:
    numbers = ImplicitReward(*(torch.tensor([-2.0, 0.0, 2.0]) + k for k in range(5)))
    row = Shown("row", {"answer": Answer([7, 8, 9], ["a", "b\n", ""], ["p", "", "gap"], numbers)})
    page = html_page([row], {}, [], with_reference=True)
    tokens = re.findall(
        r'<span class="(token[^"]*)" tabindex="(-?\d)" data-step="(-?\d)" data-id="(\d)" data-x="([^"]*)"', page
    )
    assert [token[0] for token in tokens] == ["token", "token newline", "token empty"]
    assert [token[1] for token in tokens] == ["0", "-1", "-1"], "one stop of the Tab key an answer"
    assert [token[2] for token in tokens] == ["-4", "0", "4"]
    values = {name: float(values[0]) for name, values in zip(numbers._fields, numbers, strict=True)}
    assert tokens[0][4].split() == [f"{values[name]:.4g}" for name in NUMBERS]
    assert '<span class="uncounted">gap</span>' in page and set(NUMBERS) == set(numbers._fields)


@pytest.mark.parametrize(
    ("value", "step"), [(-9, -4), (-2, -4), (-1.76, -4), (-1.74, -3), (0.24, 0), (0.26, 1), (9, 4)]
)
def test_steps_of_a_scale(value: float, step: int) -> None:
    assert Scale(0.0, 2.0).step(value) == step and Scale(5.0, 2.0).step(value + 5) == step


def test_a_scale_holds_most_numbers() -> None:
    values = torch.cat([torch.linspace(-1, 1, 199), torch.tensor([1e6])])
    scale = fitted(values, around_zero=True)
    assert scale.centre == 0 and 0.9 < scale.span < 1
    assert fitted(values + 5, around_zero=False).centre == pytest.approx(5, abs=0.02)
    assert fitted(torch.zeros(3), around_zero=True).span == 1


# Colours

#: What is left of linear red, green and blue without one kind of cone: Machado, Oliveira and Fernandes, IEEE
#: Transactions on Visualization and Computer Graphics 15 (2009), severity 1.
BLINDNESS = {
    "none": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(colour: str) -> torch.Tensor:
    """Linear red, green and blue of #rrggbb."""
    s = torch.tensor([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])
    return torch.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)


def lab(rgb: torch.Tensor) -> torch.Tensor:
    """CIELAB, in which a distance of about 2 can just be seen."""
    to_xyz = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ rgb.clamp(0, 1) / torch.tensor([0.9505, 1.0, 1.089])
    f = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("mode", COLOURS)
def test_text_can_be_read_on_every_colour(mode: str) -> None:
    def luminance(colour: str) -> float:
        return float(linear(colour) @ torch.tensor([0.2126, 0.7152, 0.0722]))

    for colour in COLOURS[mode]:
        dark, light = sorted((luminance(colour), luminance(INK[mode])))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, colour


@pytest.mark.parametrize("mode", COLOURS)
@pytest.mark.parametrize("blindness", BLINDNESS)
def test_colours_can_be_told_apart(mode: str, blindness: str) -> None:
    matrix = torch.tensor(BLINDNESS[blindness])
    seen = [lab(matrix @ linear(colour)) for colour in COLOURS[mode]]
    for one, other in itertools.combinations(range(2 * STEPS + 1), 2):
        apart = float((seen[one] - seen[other]).norm())
        opposite = min(one, other) < STEPS < max(one, other)
        assert apart > (8 if opposite else 4), (one - STEPS, other - STEPS)


# Plot


def test_the_plot_draws_any_text(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [Shown("a $ row", {"answer": answer(["long " * 60, *HOSTILE, "line\n" * 40])})]
    picture.draw(rows, tmp_path / "plot.png", with_reference=False)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


def test_boxes_hold_every_character_once() -> None:
    pieces = ["ab\n", "", "c" * 150, "\td"]
    boxes = list(picture._boxes(answer(pieces), Scale(0.0, 1.0)))
    text = "".join(box.text for box in boxes)
    assert text == "".join(pieces).replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}").replace("\t", " ")
    assert all(box.column + len(box.text) <= picture.WIDTH for box in boxes)
    places = [(box.line, box.column + k) for box in boxes for k in range(len(box.text))]
    assert len(set(places)) == len(places) == sum(map(len, pieces))


def test_without_matplotlib_the_plot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(InputError, match="png: drawing needs matplotlib"):
        picture.require_matplotlib()


# Browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


needs_browser = pytest.mark.skipif(
    not any(map(shutil.which, BROWSERS)), reason=f"needs a browser: none of {', '.join(BROWSERS)} is here"
)


def opened(page: str, folder: Path) -> str:
    """The page's document after its script has run in a browser."""
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    browser = next(found for found in map(shutil.which, BROWSERS) if found)
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    command = [browser, *flags.split(), f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000"]
    done = subprocess.run([*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120)
    assert 'data-ready=""' in done.stdout, done.stderr[-2000:]
    return done.stdout


@needs_browser
def test_a_browser_opens_the_page(tmp_path: Path) -> None:
    """The page's own script runs, and no text of a row does anything."""
    document = opened(hostile_page(), tmp_path)
    assert "<title>Implicit reward</title>" in document
    found = Reader(document)
    assert found.tokens == [*HOSTILE, *HOSTILE[::-1], "plain", " text"]
    assert found.tags.count("script") == 1 and "img" not in found.tags


#: What a reader does, and what is seen; it runs as a part of the page's script, whose hash the page names. A window
#: that has no focus yet, as on a busy machine, tells its page nothing of where the focus goes.
READER = """
const seen = [];
if (!document.hasFocus()) {
  const move = HTMLElement.prototype.focus;
  HTMLElement.prototype.focus = function () {
    move.call(this);
    this.dispatchEvent(new FocusEvent("focusin", {bubbles: true}));
  };
}
const press = key => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const look = () => seen.push(`${document.activeElement.textContent}:${tip.hidden ? "" : tip.children[1].textContent}`);
tokens[0].focus(); look();
for (const key of ["ArrowRight", "End", "ArrowRight", "Home", "Escape"]) { press(key); look(); }
seen.push(document.querySelectorAll('main .token[tabindex="0"]').length);
measure.selectedIndex = 4; measure.dispatchEvent(new Event("change")); seen.push(tokens[0].dataset.step);
document.documentElement.dataset.seen = seen.join("|");
"""


@needs_browser
def test_the_page_can_be_used_by_keyboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = ImplicitReward(*(torch.tensor([-2.0, 1.0, 2.0]) for _ in range(5)))
    numbers = numbers._replace(value=torch.tensor([3.0, 0.0, 0.0]))
    given = Answer([7, 8, 9], ["a", "b", "c"], ["p", "", ""], numbers)
    monkeypatch.setattr("logitless.training.implicit_reward.page.SCRIPT", SCRIPT + READER)
    rows = [Shown("row", {"chosen": given, "rejected": given})]
    document = opened(html_page(rows, {}, [], with_reference=True), tmp_path)
    seen = re.search('data-seen="([^"]*)"', document)
    assert seen is not None
    name = NUMBERS["log_odds"]
    expected = [f"a:{name}: -2", f"b:{name}: 1", f"c:{name}: 2", f"c:{name}: 2", f"a:{name}: -2", "a:"]
    assert seen[1].split("|") == [*expected, "2", "4"], "two answers have a stop each, and V is 3 at the first token"
