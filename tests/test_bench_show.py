"""Showing a file of the bench: Markdown, the page, and the schema that files keep to."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import bench_files as files
import jsonschema
import pytest
from bench_files import Json

from logitless.bench import page, plots, sections, summary
from logitless.bench.tables import reason
from logitless.training.document import Table, table_html

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = json.loads(Path(page.__file__).with_name("schema.json").read_text())
HOSTILE = "<script>document.title = 'taken'</script> & \"$x^2$\" \x1b[31m\u4e2d"

# ---------------------------------------------------------------------------------------------------------------------
# Schema


def errors(results: Json) -> list[str]:
    return [error.json_path for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(results)]


COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("*/bench.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_runs_keep_to_the_schema_and_their_tables_are_theirs(path: Path) -> None:
    results = json.loads(path.read_text(encoding="utf-8"))
    assert errors(results) == []
    assert path.with_suffix(".md").read_text(encoding="utf-8") == sections.file_markdown(results)


def test_the_schema_is_one_and_takes_every_kind_of_part() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    results = files.whole()
    results["parts"]["pairs"] = files.limit("pairs")
    assert errors(results) == errors(files.on_gpu(results)) == []
    assert {part["kind"] for part in results["parts"].values()} == set(summary.SENTENCES) == set(sections.TABLES)


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (lambda results: results.update(format="logitless-bench/2"), "$.format"),
        (lambda results: results["parts"]["step"].update(kind="stride"), "$.parts.step.kind"),
        (lambda results: results["parts"]["step"].pop("rows"), "$.parts.step"),
        (lambda results: results["parts"]["step"]["environment"].pop("commit"), "$.parts.step.environment"),
        (lambda results: results["parts"]["step"]["rows"][0].update(role="loser"), "$.parts.step.rows[0].role"),
        (lambda results: results["parts"]["step"]["rows"][0].update(seconds=[-1.0]), "$.parts.step.rows[0].seconds[0]"),
        (
            lambda results: results["parts"]["most tokens"]["rows"][0].update(ended_by="whim"),
            "$.parts['most tokens'].rows[0].ended_by",
        ),
    ],
)
def test_the_schema_refuses_what_the_page_could_not_show(change: Callable[[Json], Any], path: str) -> None:
    results = files.whole()
    change(results)
    assert errors(results) == [path]


def described_fields(schema: Any) -> set[str]:
    """The names of all properties, wherever they stand."""
    if isinstance(schema, list):
        return {name for one in schema for name in described_fields(one)}
    if not isinstance(schema, dict):
        return set()
    inner = {name for value in schema.values() for name in described_fields(value)}
    own = schema.get("properties", {})
    return inner | (set(own) if isinstance(own, dict) else set())


def test_the_manual_has_every_field_of_the_schema() -> None:
    manual = (ROOT / "docs" / "bench-schema.md").read_text(encoding="utf-8")
    fields = set(re.findall(r"^\| `(\w+)` \|", manual, re.MULTILINE))
    assert fields == described_fields(SCHEMA)


# ---------------------------------------------------------------------------------------------------------------------
# Sentences and Markdown


def test_headlines_are_computed() -> None:
    lines = summary.headlines(files.whole())
    assert len(lines) == 4
    assert re.match(
        r"step: the fastest exact method is logitless, with 0\.5\d of the materialised loss's time", lines[0]
    )
    assert lines[0].endswith("and 2120 MiB less memory (30.7 instead of 2150.4 MiB).")
    assert lines[1].startswith(
        "by vocabulary: extra memory grows as vocabulary^1.00 with materialised; vocabulary^1.00"
    )
    assert (
        lines[2]
        == "most tokens: within 2048 MiB, logitless fits at least 262144 tokens, and the materialised loss 4096."
    )
    assert lines[3].startswith("model: in a whole step of SmolLM2-135M the fastest of logitless is logitless, with 0.8")


def test_a_faster_peer_is_named_before_logitless() -> None:
    results = files.only(files.step())
    peer = results["parts"]["step"]["rows"][-1]
    peer["seconds"] = [x / 100 for x in peer["seconds"]]
    first, second = summary.headlines(results)
    assert "the fastest exact method is Liger scaled cross-entropy, with 0.02 of" in first
    assert "the fastest of logitless is logitless, with 0.5" in second


@pytest.mark.parametrize(
    ("error", "base", "expected"),
    [
        (9e-6, 4e-7, True),
        (2e-5, 4e-7, False),
        (5e-3, 3e-3, True),
        (7e-3, 3e-3, False),
        (None, 3e-3, False),
        (1e-6, None, True),
    ],
)
def test_exact_is_what_rounding_explains(error: float | None, base: float | None, expected: bool) -> None:
    row, other = ({"error": None if x is None else {"loss": 0.5, "d_hidden": x}} for x in (error, base))
    assert summary.exact(row, other) is expected


def test_an_approximation_is_not_the_fastest_exact_method() -> None:
    results = files.only(files.step())
    ours = next(row for row in results["parts"]["step"]["rows"] if row["provider"] == "logitless")
    ours["error"]["d_weight"] = 0.01
    assert "method is logitless, recompute," in summary.headlines(results)[0]


def test_a_file_without_a_materialised_loss_has_no_headline() -> None:
    results = files.only(files.step())
    rows = results["parts"]["step"]["rows"]
    rows[:] = [row for row in rows if row["role"] != "materialised"]
    assert summary.headlines(results) == []
    assert "| logitless " in sections.file_markdown(results)


def cells(markdown: str, name: str) -> list[list[str]]:
    """The cells of the rows of this name, in every table."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if line[:1] == "|"]
    return [line[1:] for line in lines if line[0] == name]


def test_every_failure_is_a_line_with_its_reason() -> None:
    shown = sections.section("step", files.with_failures(files.step()))
    for provider, failure in files.FAILING:
        assert cells(shown, provider)[0][0] == reason(failure)
    assert reason(files.WRONG) == files.WRONG and reason(files.ABSENT) == f"does not run: {files.ABSENT}"
    assert "- not reached at N 4096 H 576 V 49152 float32: TRL ChunkedLogProbFunction" in shown
    assert "- materialised at vocabulary 131072: does not run: out of memory" in sections.section("c", files.curve())


def test_columns_of_a_step() -> None:
    part = files.step(3)
    rows = {row["provider"]: row for row in part["rows"]}
    rows["copy"]["seconds"] = [0.5, 0.25, 1.0]
    rows["logitless"]["seconds"] = [2.0, 1.0, 4.0]
    rows["GEMMs alone"]["seconds"] = [4.0, 1.0, 2.0]
    shown = sections.section("step", part)
    assert cells(shown, "logitless")[0][:2] == ["2.000 x 3", "1.000-4.000"]
    assert cells(shown, "logitless")[0][3] == "1.00", "the median of 0.5, 1 and 2"
    assert cells(shown, "copy")[0][4] == f"{rows['copy']['bytes'] / 0.5e9:.0f}"
    assert cells(shown, "logitless")[0][5:7] == ["30.7", "4.0%"]


def test_short_steps_are_in_milliseconds() -> None:
    part = files.step(tokens=16)
    assert sections.time_columns(part["rows"]) == ("step ms", "range ms")
    assert sections.time_columns([]) == ("step ms", "range ms")


def test_products_are_the_floor_wherever_the_copy_stands() -> None:
    part = files.step()
    part["rows"][:2] = part["rows"][1::-1]
    assert part["rows"][0]["provider"] == "copy"
    assert cells(sections.section("step", part), "GEMMs alone")[0][3] == "1.00"


def test_limits_say_what_ended_them() -> None:
    shown = sections.section("most tokens", files.limit())
    assert cells(shown, "logitless")[0][:2] == ["at least 262144", "at least 64.00"]
    assert cells(shown, "Liger scaled cross-entropy")[0][:2] == ["65536", "16.00"]
    assert "of 2 x 512 tokens in a training step" in sections.section("pairs", files.limit("pairs"))
    bounded = files.limit()
    bounded["rows"][0]["ended_by"] = "time"
    assert cells(sections.section("x", bounded), "logitless")[0][1] == "", "the materialised loss's limit is not known"


def test_tokens_a_second_of_a_model() -> None:
    part = files.model()
    part["rows"][1]["seconds"] = [4.0, 2.0, 1.0]
    assert cells(sections.section("model", part), "logitless")[0][2] == "1024"


def test_exponents_of_a_curve_and_those_of_too_few_points() -> None:
    growth = cells(sections.section("by vocabulary", files.curve()), "materialised")[0]
    assert growth[1] == "1.00 ± 0.00" and growth[2] == "3"
    brief = files.curve()
    del brief["points"][2:]
    assert cells(sections.section("by vocabulary", brief), "logitless")[0][:2] == ["too few points"] * 2


def test_a_curve_without_points_and_a_tiny_run() -> None:
    results = files.only({**files.curve(), "points": [], "complete": False})
    assert "for 0 values of vocabulary" in sections.file_markdown(results) and page.html_page({"here": results})
    tiny = files.only(files.step())
    tiny["parts"]["step"]["environment"]["tiny"] = True
    assert sections.file_markdown(tiny).startswith("# A tiny run: no figure here means anything")


def test_machines_stand_side_by_side() -> None:
    one = files.whole()
    other = files.on_gpu(one)
    del other["parts"]["model"]
    other["parts"]["step"]["rows"].pop(3)
    shown = sections.side_by_side({"cpu": one, "gpu": other})
    assert cells(shown, "machine") == [["epyc-avx512-bf16", "nvidia-h100-80gb-hbm3"]]
    assert cells(shown, "logitless")[0][1] == "not measured"
    assert cells(shown, "quack")[0] == ["does not run", "does not run"] and len(cells(shown, "quack")) == 1
    assert cells(shown, "materialised, vocabulary 131072")[0] == ["does not run"] * 2
    assert "## most tokens\n\n**the most that fit**" in shown


# ---------------------------------------------------------------------------------------------------------------------
# Page

VOID = ("meta", "br", "input")


class Reader(HTMLParser):
    """The tags of a page, each of which must be closed, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def one() -> str:
    return page.html_page({"here": files.whole()})


@pytest.fixture(scope="module")
def several() -> str:
    return page.html_page({"cpu": files.whole(), "gpu": files.on_gpu(files.whole())})


def test_the_page_needs_no_network(one: str, several: str) -> None:
    for html in (one, several):
        found = Reader(html)
        assert not re.search(r"https?://|//www|url\((?!#)|@import|xmlns", html)
        links = [value for name, value in found.attributes if name in ("src", "href", "xlink:href")]
        assert links and all(link.startswith("#") for link in links)
        policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
        assert policy is not None and "default-src 'none'" in policy[1] and "unsafe" not in policy[1]
        assert "script" not in found.tags and found.tags.count("style") == 1
        assert not [name for name, _ in found.attributes if name == "style" or name.startswith("on")]


def test_names_inside_a_page_are_there_once(several: str) -> None:
    found = Reader(several)
    names = [value for name, value in found.attributes if name == "id"]
    used = {value[1:] for name, value in found.attributes if name == "href"}
    used |= set(re.findall(r"url\(#(\w+)\)", several))
    assert len(names) == len(set(names)) and used <= set(names)


def test_every_table_of_the_markdown_is_on_the_page(one: str) -> None:
    """With a caption, and cells in the same words."""
    results = files.whole()
    found = Reader(one)
    tables = [table for part in results["parts"].values() for table in sections.tables_of(part)]
    assert found.tags.count("table") == found.tags.count("caption") == len(tables)
    for table in tables:
        assert table_html(table) in one
    for line in summary.headlines(results):
        assert line in found.text
    for facts in sections.machine_facts(results).values():
        assert facts in found.text


def test_plots_are_told_to_those_who_do_not_see_them(one: str) -> None:
    labels = [unescape(label) for label in re.findall(r'role="img" class="plot" aria-label="([^"]+)"', one)]
    kinds = ["step: time", "step: extra", "by vocabulary: time", "by vocabulary: extra", "most tokens: the most"]
    kinds += ["model: time", "model: peak"]
    assert len(labels) == len(kinds) == one.count("<figcaption>")
    assert all(label.startswith(kind) for label, kind in zip(labels, kinds, strict=True))
    assert f"quack: does not run: {files.CRASHED}" in labels[0] and "logitless: 30.7" in labels[1]
    assert "materialised, exponent 1.0" in labels[2] and "16384: 179" in labels[3]


def test_the_same_file_gives_the_same_page(one: str) -> None:
    assert page.html_page({"here": files.whole()}) == one


def test_texts_stay_texts() -> None:
    results = files.whole()
    for part in results["parts"].values():
        for row in [row for point in part.get("points", [part]) for row in point["rows"]]:
            row["provider"] = HOSTILE if row["provider"] == "logitless" else row["provider"]
    results["parts"][HOSTILE] = results["parts"].pop("step")
    for html in (page.html_page({HOSTILE: results}), page.html_page({HOSTILE: results, "b": results})):
        found = Reader(html)
        assert "script" not in found.tags and found.text.count(HOSTILE) > 5


def test_ink_and_colours_are_the_page_s(one: str) -> None:
    assert "currentColor" in one and "#0101" not in one
    used = set(re.findall(r"var\(--(c\d)\)", one))
    light, dark = re.findall(r":root\{[^}]*?(--c0[^}]*)\}", one)
    assert used <= set(re.findall(r"--(c\d):#", light)) == set(re.findall(r"--(c\d):#", dark))
    assert light != dark


def luminance(colour: str) -> float:
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize(("colours", "ground"), [(page.LIGHT, "#ffffff"), (page.DARK, "#121212")])
def test_colours_stand_out_from_the_page(colours: tuple[str, ...], ground: str) -> None:
    for colour in colours:
        dark, light = sorted((luminance(colour), luminance(ground)))
        assert (light + 0.05) / (dark + 0.05) >= 3, colour


def test_a_bar_is_as_long_as_its_number() -> None:
    part = files.step(3)
    for place, row in enumerate(part["rows"]):
        row["seconds"] = [float(place + 1)] * 3
    figure, _ = plots.plots_of("step", part)
    svg = ElementTree.fromstring(figure.removeprefix("<figure>").split("<figcaption>")[0])
    paths = [path.get("d", "") for path in svg.iter("path") if path.get("fill", "").startswith("var(--c")]
    widths = [float(path.split()[4]) - float(path.split()[1]) for path in paths]
    assert widths == pytest.approx([widths[0] * (place + 1) for place in range(len(part["rows"]))], rel=1e-4)


def test_a_part_without_a_number_has_no_plot() -> None:
    part = files.step()
    part["rows"] = [files.row("quack", "peer", [], failure=files.CRASHED)]
    assert plots.plots_of("step", part) == []


def test_without_matplotlib_the_page_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"need matplotlib: pip install 'logitless\[bench\]'"):
        page.html_page({"here": files.whole()})


def test_a_page_needs_a_file() -> None:
    with pytest.raises(ValueError, match="results: expected at least one file, got none"):
        page.html_page({})


def test_a_short_line_of_a_table_spans_what_it_lacks() -> None:
    html = table_html(Table("caption", ("", "a", "b"), [("x", "1", "2"), ("y", "failed")]))
    assert "<td>1</td><td>2</td>" in html and '<td colspan="2">failed</td>' in html
