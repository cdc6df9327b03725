"""`benchmarks/gpu_report.py` in its dry mode: every step on the CPU, and what becomes of what fails."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks import gpu_build, gpu_measure, gpu_report, gpu_rows, gpu_tables
from benchmarks.definitions import materialised_nll
from benchmarks.gpu_cells import CELLS, CHUNK, FASTEST_PEER, FROZEN_GEMMS, GEMM, LOGITS, MAIN, Target
from benchmarks.gpu_ways import WAYS, Way
from benchmarks.gpu_worker import ROWS, Worker
from benchmarks.providers import differentiate, gemms

CPU = torch.device("cpu")
FEW = tuple(way for way in WAYS if way.role == "floor" or way.name == "materialised" or way.name.startswith("chunked"))


def dies(hidden, weight, inputs):
    os._exit(7)


def hangs(hidden, weight, inputs):
    time.sleep(600)


def fails(hidden, weight, inputs):
    raise ValueError("no such shape\nand more")


def out_of_memory(hidden, weight, inputs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")


def far() -> float:
    return time.monotonic() + 600


def by_name(found: dict) -> dict:
    return {row["provider"]: row for row in found["rows"]}


# ---------------------------------------------------------------------------------------------------------------------
# The table


def test_the_cells_are_the_shapes_by_the_data_and_the_main_one_comes_first():
    assert len({cell.name for cell in CELLS}) == len(CELLS) == 24
    assert MAIN.name == "n8192-h4096-v128256-peaked"
    assert all(cell.problem.dtype == torch.bfloat16 for cell in CELLS)


def test_every_backend_and_strategy_and_peer_has_a_way():
    names = {way.name for way in WAYS}
    assert len(names) == len(WAYS)
    assert {"triton, single_pass", "cuda, recompute", "chunked, tail_corrected", "cuda, frozen head"} <= names
    peers = " ".join(way.name for way in WAYS if way.role == "peer")
    assert all(x in peers for x in ("torch", "TRL", "Liger fused", "Liger scaled", "Cut Cross", "quack", "flash-attn"))


def test_peaked_data_is_like_a_trained_models():
    """Half of the tokens are nearly certain, and the mean is that of tokens which are not."""
    cell = CELLS[0].tiny()
    cell = type(cell)(type(cell.problem)(2000, 128, 5000, dtype=torch.float32), "peaked")
    inputs = cell.inputs(CPU)
    nll = torch.nn.functional.cross_entropy(inputs.hidden @ inputs.weight.T, inputs.targets, reduction="none")
    assert 0.05 < nll.median() < 0.3 and 0.7 < nll.mean() < 1.5
    again = cell.inputs(CPU)
    assert torch.equal(again.hidden, inputs.hidden) and torch.equal(again.targets, inputs.targets)


def test_random_data_is_flat():
    inputs = CELLS[1].tiny().inputs(CPU)
    logits = inputs.hidden.float() @ inputs.weight.float().T
    assert CELLS[1].data == "random" and 1.5 < logits.std() < 2.5


@pytest.mark.parametrize("name", [GEMM, FROZEN_GEMMS])
def test_the_floor_is_the_products_alone(name):
    [way] = [way for way in WAYS if way.name == name]
    inputs = way.of(MAIN.tiny().inputs(CPU))
    found, expected = differentiate(way.loss, inputs), gemms(inputs)
    assert torch.equal(found.d_hidden, expected.d_hidden)
    if name == GEMM:
        assert torch.equal(found.d_weight, expected.d_weight)
    else:
        assert found.d_weight is None and expected.d_weight is None


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def test_a_cell_measures_every_way_that_runs_and_names_the_others():
    ways = (
        *FEW,
        Way("fails", "peer", fails),
        Way("oom", "peer", out_of_memory),
        Way("absent", "peer", fails, package="x"),
    )
    told = []
    found = gpu_measure.measure_cell(
        MAIN.tiny(), ways, gpu_measure.Cpu(), time.monotonic(), {"chunked, recompute": "skipped"},
        lambda doing, so_far: told.append((doing, so_far["complete"])),
    )  # fmt: skip
    rows = by_name(found)
    assert found["complete"] and not any(complete for _, complete in told) and told[0][0] == GEMM
    assert rows["fails"]["failure"] == "ValueError: no such shape" and rows["oom"]["failure"] == "out of memory"
    assert rows["absent"]["failure"] == "x is not installed" and rows["chunked, recompute"]["failure"] == "skipped"
    for name in ("chunked, single_pass", "chunked, frozen head", "materialised"):
        row = rows[name]
        assert [len(row[x]) for x in ("forward", "backward", "both")] == [1, 1, 1]
        assert row["peak_bytes"] > 0 and row["loss"] == pytest.approx(rows["materialised"]["loss"], rel=1e-2)
        assert max(row["error"].values()) < 2e-2
        assert ("d_weight" in row["error"]) != row["frozen"]
    assert rows[GEMM]["error"] is None and rows[GEMM]["loss"] is None
    json.dumps(found)


def test_kernels_on_a_chunk_against_a_copy():
    found = gpu_rows.measure_rows(MAIN.tiny(), gpu_measure.Cpu(), far(), {}, lambda doing, so_far: None)
    rows = by_name(found)
    assert found["complete"] and next(iter(rows)) == "copy"
    logits = 16 * 96 * 4
    assert rows["copy"]["bytes"] == 2 * logits and rows["chunked, gradient"]["bytes"] == 1.5 * logits
    assert len(rows["chunked, statistics"]["both"]) == gpu_measure.ROUNDS - 1
    assert all(row["failure"] or row["both"] for row in rows.values())


def test_a_device_that_is_lost_with_a_failure_is_no_mere_line():
    class Lost(gpu_measure.Cpu):
        def recover(self):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    row = gpu_measure.Row("x", "peer")
    with pytest.raises(gpu_measure.DeviceLost, match="no such shape"):
        gpu_measure.attempt(row, partial(fails, None, None, None), Lost())


def test_a_way_that_ends_its_process_is_a_line_and_the_others_are_measured():
    ways = (Way("dies", "peer", dies), Way("materialised", "materialised", materialised_nll))
    worker = Worker(dry=True, ways=ways)
    try:
        found = worker.measure(MAIN.name, time.monotonic(), far())
        rows = by_name(found)
        assert found["complete"] and rows["materialised"]["both"]
        assert rows["dies"]["failure"] == f"its process ended with status 7, in {MAIN.name}"
    finally:
        worker.stop()


@pytest.mark.slow
def test_a_way_that_hangs_is_ended():
    ways = (Way("hangs", "peer", hangs), Way("materialised", "materialised", materialised_nll))
    worker = Worker(dry=True, ways=ways, patience=30)
    try:
        rows = by_name(worker.measure(MAIN.name, time.monotonic(), far()))
        assert rows["materialised"]["both"] and "no answer for 30 s" in rows["hangs"]["failure"]
    finally:
        worker.stop()


# ---------------------------------------------------------------------------------------------------------------------
# Building and testing


def test_a_build_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(gpu_build.shutil, "which", lambda name, path=None: None)
    found = gpu_build.build(10)
    assert found["missing"] == ["cmake", "nvcc"] and found["failure"] == "not built: no cmake and no nvcc in PATH"


@pytest.mark.parametrize("code", [0, 3])
def test_a_build_keeps_cmakes_notes_and_names_the_library(monkeypatch, tmp_path, code):
    for name in ("cmake", "nvcc"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '-- logitless: no CUTLASS'\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv(gpu_build.VARIABLE, "")
    found = gpu_build.build(60)
    assert "-- logitless: no CUTLASS" in found["notes"]
    assert (found["failure"] is None) == (code == 0)
    assert os.environ[gpu_build.VARIABLE] == (str(gpu_build.FOLDER / "liblogitless_cuda.so") if code == 0 else "")


def test_the_suite_runs_on_the_device_and_its_numbers_come_back(monkeypatch, tmp_path):
    suite = tmp_path / "suite.py"
    suite.write_text(
        "import os\ndef test_device(): assert os.environ['LOGITLESS_TEST_DEVICE'] == 'cpu'\n"
        "def test_broken(): assert False, 'seven is not eight'\n"
    )
    monkeypatch.setattr(gpu_build, "SUITES", (str(suite),))
    found = gpu_build.run_tests("cpu", 300, tmp_path / "out")
    assert (found["tests"], found["failures"], found["errors"], found["status"]) == (2, 1, 0, 1) and found["complete"]
    assert "seven is not eight" in found["failed"][0] and found["failed"][0].startswith("test_broken")


def test_a_suite_that_does_not_end_in_time_is_ended(monkeypatch, tmp_path):
    suite = tmp_path / "suite.py"
    suite.write_text("import time\ndef test_slow(): time.sleep(600)\n")
    monkeypatch.setattr(gpu_build, "SUITES", (str(suite),))
    found = gpu_build.run_tests("cpu", 1, tmp_path / "out")
    assert not found["complete"]


# ---------------------------------------------------------------------------------------------------------------------
# The report


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_without_a_gpu_it_says_so_in_a_sentence():
    with pytest.raises(SystemExit, match=r"finds no GPU here; --dry runs the same steps"):
        gpu_report.main([])


def report(folder: Path) -> gpu_report.Report:
    return gpu_report.Report(folder, gpu_report.describe("abc", dry=True), minutes=5, dry=True, ways=FEW)


def test_a_dry_run_writes_json_and_tables_part_by_part_and_resumes(tmp_path, monkeypatch):
    first = report(tmp_path)
    first.measure([MAIN.name, ROWS])
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert set(results["parts"]) == {MAIN.name, ROWS} and results["build"]["failure"] == "a dry run builds nothing"
    about = results["parts"][ROWS]["environment"]
    assert about["commit"] == "abc" and about["dry"] and "torch" in about["versions"] and "quack" in about["missing"]
    text = (tmp_path / "gpu.md").read_text()
    assert text.startswith("# A dry run") and "chunked, single_pass" in text and "chunked, gradient" in text
    second = report(tmp_path)
    assert second.has(MAIN.name) and not second.has(CELLS[1].name)
    second.about = {**second.about, "commit": "abd"}
    assert not second.has(MAIN.name)


def test_out_of_time_it_begins_nothing_and_names_what_is_left(tmp_path, capsys):
    late = gpu_report.Report(tmp_path, gpu_report.describe(None, dry=True), minutes=0, dry=True, ways=FEW)
    late.measure([MAIN.name, ROWS])
    assert late.results["parts"] == {} and f"goes on with: {MAIN.name} {ROWS}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_runs_every_part_and_way_and_writes_nothing_by_itself(capsys, tmp_path):
    committed = set(gpu_report.RESULTS.iterdir())
    gpu_report.main(["--dry", "--minutes", "20"])
    printed = capsys.readouterr().out
    assert set(gpu_report.RESULTS.iterdir()) == committed
    assert "## Tests on the device" in printed and "0 failures, 0 errors" in printed
    for way in WAYS:
        assert f"| {way.name} " in printed


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def row(name: str, role: str = "logitless", seconds: float = 1.0, peak: int | None = None, **other) -> dict:
    times = [seconds, seconds, seconds]
    made = dict(provider=name, role=role, frozen=False, forward=times, backward=times, both=times, peak_bytes=peak)
    return {**made, "loss": 1.0, "error": None, "failure": None, **other}


def measured(*rows: dict) -> dict:
    return dict(rows=rows, logits_bytes=1000, chunk_bytes=100, gradient_bytes=500, frozen_gradient_bytes=50)


def test_a_target_is_a_ratio_of_what_was_measured():
    found = measured(
        row(GEMM, "floor", 2.0), row("triton, recompute", seconds=3.0, peak=505), row("slow", "peer", 9.0),
        row("fast", "peer", 4.0), row("broken", "peer", 0.1, failure="out of memory"),
    )  # fmt: skip
    way = "triton, recompute"
    assert gpu_tables.reached(Target(way, "forward", GEMM, 1), found)[0] == 1.5
    assert gpu_tables.reached(Target(way, "memory", LOGITS, 1), found)[0] == 0.005
    assert gpu_tables.reached(Target(way, "memory", CHUNK, 1), found)[0] == 0.05
    assert gpu_tables.reached(Target(way, "both", FASTEST_PEER, 1), found) == (0.75, "the fastest peer (fast)")
    assert gpu_tables.reached(Target("cuda, recompute", "both", GEMM, 1), found)[0] is None


def test_the_targets_table_says_met_missed_and_not_measured():
    environment = dict(dry=False)
    cell = {**measured(row(GEMM, "floor", 2.0), row("triton, recompute", seconds=2.2)), "environment": environment}
    kernels = [row("copy", "floor", 1.0, bytes=100), row("cuda, gradient", seconds=1.0, bytes=95)]
    text = gpu_tables.targets_table({MAIN.name: cell, "rows": dict(rows=kernels, environment=environment)})
    lines = {line.split("|")[1].strip(): line for line in text.splitlines()}
    assert (
        " met " in lines[f"triton, recompute: forward / {GEMM}"]
        and "1.100" in lines[f"triton, recompute: forward / {GEMM}"]
    )
    assert "not measured" in lines[f"cuda, recompute: forward / {GEMM}"]
    assert "0.950" in lines["cuda, gradient: share of copy bandwidth"]
    kernels[1]["bytes"] = 50
    text = gpu_tables.targets_table({"rows": dict(rows=kernels, environment=environment)})
    assert "missed" in next(line for line in text.splitlines() if "share of copy" in line)
