"""The figures of the pages are those of the committed results, and the command writes them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from benchmarks.figures import bench, command, first_run, machines, memory, pages, studies, tail
from benchmarks.figures.command import BLOCKS, stale_pages, stale_pictures
from benchmarks.figures.pictures import Picture, digest
from benchmarks.figures.results import newest, origin
from benchmarks.places import RESULTS, ROOT
from benchmarks.tail import times

from logitless.bench.measure import Row
from logitless.bench.providers import materialised, own
from logitless.bench.providers.floors import GEMMS

pytest.importorskip("rich")

NAMES = {"one": lambda results: "1\n", "two": lambda results: f"{results.name}\n"}


def test_committed_pages_state_what_the_results_say() -> None:
    assert [str(path.relative_to(ROOT)) for path, _ in stale_pages()] == [], "run python -m benchmarks figures"


def test_committed_pictures_show_what_the_results_say() -> None:
    """By the digest of their numbers, since their bytes differ between releases of matplotlib."""
    stale = [str(picture.path.relative_to(ROOT)) for picture in stale_pictures()]
    assert stale == [], "run python -m benchmarks figures"


def test_every_block_stands_on_one_page() -> None:
    names = [found["name"] for path in pages.pages(ROOT) for found in pages.BLOCK.finditer(path.read_text("utf-8"))]
    assert sorted(names) == sorted(BLOCKS)


def test_a_measurement_by_hand_stands_in_the_diary_alone() -> None:
    """A measurement has a day: no page has one outside of its blocks, but to link to the diary's."""
    day = re.compile(r"(?<!log\.md#)\b20\d\d-\d\d-\d\d\b")
    dated = {
        str(path.relative_to(ROOT)): found
        for path in pages.pages(ROOT)
        if path.name != "log.md" and (found := day.findall(pages.without_blocks(path.read_text("utf-8"))))
    }
    assert dated == {}


# ---------------------------------------------------------------------------------------------------------------------
# Pages and pictures


def test_a_block_is_written_anew_and_the_rest_stays() -> None:
    page = "a\n<!-- figures: two -->\nold\n<!-- end of figures -->\nb `<!-- figures: NAME -->`\n"
    fresh = pages.filled(page, NAMES, Path("there"))
    assert fresh == page.replace("old", "there")
    assert pages.filled(fresh, NAMES, Path("there")) == fresh
    assert pages.block(fresh, "two") == "there\n"
    assert pages.without_blocks(fresh) == "a\nb `<!-- figures: NAME -->`\n"


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("<!-- figures: three -->\n<!-- end of figures -->\n", "'three', expected one of one, two"),
        ("<!-- figures: one -->\n", "opens 1 blocks and closes 0"),
        ("<!-- end of figures -->\n", "opens 0 blocks and closes 1"),
        ("<!-- figures: one -->\n<!-- figures: two -->\n<!-- end of figures -->\n", "opens 2 blocks and closes 1"),
    ],
)
def test_a_wrong_marker_is_named(page: str, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        pages.filled(page, NAMES, Path())


def test_a_picture_carries_a_digest_of_its_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = memory.measured(RESULTS).found
    picture = Picture(tmp_path / "new" / "memory.png", data, memory.draw)
    assert not picture.is_fresh()
    picture.write()
    assert picture.is_fresh()
    assert picture._replace(data=dict(reversed(data.items()))).is_fresh()
    assert not picture._replace(data=data | {"axis": "hidden"}).is_fresh()
    assert digest({"a": 1.0}) != digest({"a": 1.5})


def test_every_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    shutil.copytree(RESULTS, tmp_path / "results", ignore=shutil.ignore_patterns("*.png"))
    missing = stale_pictures(tmp_path, tmp_path / "results")
    names = {"memory", "first-run", "tail", *studies.NAMES}
    assert {picture.path.name for picture in missing} == {f"{name}.png" for name in names}
    for picture in missing:
        picture.write()
    assert stale_pictures(tmp_path, tmp_path / "results") == []


def test_the_command_writes_what_changed_and_the_check_only_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "docs" / "lists.md"
    page.parent.mkdir()
    shutil.copy(ROOT / "README.md", tmp_path)
    page.write_text("<!-- figures: lists -->\nold\n<!-- end of figures -->\n")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "stale_pictures", lambda root, results: [])
    with pytest.raises(SystemExit, match="1"):
        command.main(["--check"])
    assert "old" in page.read_text() and capsys.readouterr().out == "docs/lists.md\n"
    command.main([])
    assert "old" not in page.read_text() and "top_k_distillation" in page.read_text()
    with pytest.raises(SystemExit, match="0"):
        command.main(["--check"])


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


ABOUT = {"cpu": "a CPU", "units": ["AVX2"], "threads": 2, "versions": {"torch": "2.13.0+cpu"}, "commit": "0123456789+"}


def about(**changes: Any) -> dict[str, Any]:
    return ABOUT | {"date": "2026-11-21T01:00:00+00:00"} | changes


def test_the_most_recent_measurement_of_any_machine_is_shown(tmp_path: Path) -> None:
    for kind, day in (("epyc-avx2", "2026-11-30T00:00:00+00:00"), ("xeon-amx", "2026-11-29T00:00:00+00:00")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "studies.json").write_text(json.dumps({"environment": about(date=day)}))
        part = {"environment": about(date=day)}
        parts = {"lists": part, "nll": part} if kind == "xeon-amx" else {"nll": part}
        (tmp_path / kind / "cpu.json").write_text(json.dumps({"parts": parts}))
    assert newest(tmp_path, "studies").kind == newest(tmp_path, "cpu", "nll").kind == "epyc-avx2"
    assert newest(tmp_path, "cpu", "lists").kind == "xeon-amx"
    with pytest.raises(ValueError, match=r"expected a cpu\.json with a part 'dpo' of some kind of machine"):
        newest(tmp_path, "cpu", "dpo")


def test_an_origin_names_machine_day_and_commits_once_each() -> None:
    parts = [about(), about(date="2026-11-22", commit=None), about()]
    expected = "`epyc-avx2`: a CPU (AVX2), 2 threads, torch 2.13.0, 2026-11-21, 2026-11-22, commits 0123456+, unknown"
    assert origin("epyc-avx2", parts) == expected


def curve(**mib: tuple[int, ...]) -> dict[str, Any]:
    """A part with a point for 32 and one for 64 entries of the vocabulary."""
    points = [
        {
            "value": value,
            "problem": f"N 16 H 8 V {value} float32",
            "rows": [
                vars(Row(name, "peer", memory={"allocated": x[i] << 20})) for name, x in mib.items() if i < len(x)
            ],
        }
        for i, value in enumerate((32, 64))
    ]
    return {"environment": about(), "points": points}


def test_readme_states_the_memory_that_was_measured(tmp_path: Path) -> None:
    part = curve(**{memory.OURS: (7, 9), memory.MATERIALISED: (10, 20), "a peer": (30,)})
    (tmp_path / "epyc-avx2").mkdir()
    (tmp_path / "epyc-avx2" / "bench.json").write_text(json.dumps({"parts": {"vocabulary": part}}))
    text = " ".join(memory.text(tmp_path).split())
    assert "7 to 9 MiB with logitless, up to 20 materialised]" in text
    assert "Of 16 tokens, H 8 and a vocabulary of 64, materialised logits take 20 MiB" in text
    assert "logitless 9 MiB (`epyc-avx2`, torch 2.13.0, 2026-11-21, commit 0123456+)" in text


def test_the_picture_has_every_curve() -> None:
    pytest.importorskip("matplotlib")
    [axes] = memory.draw(curve(ours=(7, 9), theirs=(10,))).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[7, 9], [10]]


def test_what_fits_has_a_line_for_each_way(tmp_path: Path) -> None:
    def part(loss: str, *rows: tuple[str, int, str]) -> dict[str, Any]:
        keys = ("provider", "largest", "ended_by")
        found = [dict(zip(keys, row, strict=True)) | {"role": "materialised", "failure": None} for row in rows]
        absent = {"provider": "quack", "role": "peer", "failure": "not installed: quack"}
        return {"environment": about(), "rows": [*found, absent], "memory_bytes": 2**20, "length": 8, "loss": loss}

    (tmp_path / "epyc-avx2").mkdir()
    parts = {
        "longest": part("nll", ("materialised", 5, "memory"), ("materialised, compiled", 7, "time")),
        "pairs": part("dpo", ("materialised DPO", 2, "memory")),
    }
    (tmp_path / "epyc-avx2" / "bench.json").write_text(json.dumps({"parts": parts}))
    assert bench.limits(tmp_path).splitlines()[2:4] == [
        "| materialised | 5 | 2 |",
        "| materialised, compiled | at least 7 | |",
    ]


def test_a_remark_on_a_run_is_shown(tmp_path: Path) -> None:
    found = json.loads((RESULTS / "epyc-avx2" / "first-run.json").read_text())
    (tmp_path / "epyc-avx2").mkdir()
    for remark in ("Another process ran.", ""):
        (tmp_path / "epyc-avx2" / "first-run.json").write_text(json.dumps(found | {"remark": remark}))
        head = first_run.text(tmp_path).split("\n\n")[0]
        assert head.endswith(remark or ").")


def test_another_kind_of_machine_is_another_pair_of_columns(tmp_path: Path) -> None:
    """A row is of one problem: where the same part has other tokens, that is a row of its own."""
    _measure_made_up(tmp_path / "epyc-avx2", tokens=64, units=["AVX2"], date="2026-11-21T01:00:00+00:00")
    _measure_made_up(tmp_path / "xeon-amx", tokens=4096, units=["AVX2", "AMX"], date="2026-11-30T02:00:00+00:00")
    (tmp_path / "nvidia-h100").mkdir()
    assert machines.TABLE.text(tmp_path).splitlines() == [
        "| | `epyc-avx2` | | `xeon-amx` | |",
        "|---|---|---|---|---|",
        "| time / | materialised | GEMMs | materialised | GEMMs |",
        "| NLL, 4096 tokens, bfloat16 | | | 0.50 | 1.00 |",
        "| NLL, 64 tokens, bfloat16 | 0.50 | 1.00 | | |",
        "| NLL, tail-corrected, on SmolLM2's own states | | 0.25 | | 0.25 |",
        "",
        "- `epyc-avx2`: a CPU (AVX2), 2 threads, torch 2.13.0, 2026-11-21, commit 0123456+",
        "- `xeon-amx`: a CPU (AVX2, AMX), 2 threads, torch 2.13.0, 2026-11-30, commit 0123456+",
    ]


def _measure_made_up(folder: Path, *, tokens: int, units: list[str], date: str) -> None:
    folder.mkdir()
    measured = about(units=units, date=date)
    rows = [
        vars(Row(name, "peer", seconds=seconds))
        for name, seconds in ((materialised.NLL.name, [4.0, 2.0]), (GEMMS.name, [2.0, 1.0]), (own.NLL.name, [2.0, 1.0]))
    ]
    part = {"problem": f"N {tokens} H 576 V 49152 bfloat16", "rows": rows, "environment": measured}
    (folder / "cpu.json").write_text(json.dumps({"parts": {"bf16": part}}))
    few, many = (
        {"tail-corrected 2^-12": {"seconds": [x] * n}, times.FLOOR: {"seconds": [4.0] * n}}
        for x, n in ((3.0, 2), (1.0, 6))
    )
    parts = {
        f"times / as released{label} / docstrings": {"methods": methods, "environment": measured}
        for label, methods in (("", few), (", few methods", many))
    }
    (folder / "tail.json").write_text(json.dumps({"parts": parts}))


def test_times_of_a_machine_are_of_the_part_with_the_most_rounds(tmp_path: Path) -> None:
    _measure_made_up(tmp_path / "epyc-avx2", tokens=64, units=["AVX2"], date="2026-11-21T01:00:00+00:00")
    path = tmp_path / "epyc-avx2" / "tail.json"
    parts = json.loads(path.read_text())["parts"]
    for part in parts.values():
        part["kind"] = "times"
        part["methods"]["tail-corrected 2^-12"]["errors"] = [0.0, 0.25, 0.125]
    path.write_text(json.dumps({"parts": parts}))
    assert "| tail-corrected 2^-12 | 0.25 | 0e+00 | 0.2500, 0.1250 |" in tail.times(tmp_path)
