"""`benchmarks/gpu_report.py` in its dry mode: every step on the CPU, and what becomes of what fails."""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks import gpu_build, gpu_kernels, gpu_measure, gpu_once, gpu_report, gpu_tables, gpu_tests, gpu_tools
from benchmarks.definitions import materialised_nll
from benchmarks.gpu_bundle import Unpacked
from benchmarks.gpu_cells import BUDGET, CELLS, FLOOR, FROZEN_GEMMS, GEMM, HEAD_GRADIENT, LOGITS, MAIN, Target
from benchmarks.gpu_kernels import CHUNKS, CONFIGURATIONS, FORWARD, PARTS, ROWS, TOKENS
from benchmarks.gpu_tables import PROFILES, SANITIZER, TESTS
from benchmarks.gpu_ways import WAYS, Way
from benchmarks.gpu_worker import Worker
from benchmarks.providers import differentiate, gemms
from cuda_build import host_library, needs_compiler

from logitless.backends import cuda

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


def test_a_cell_measures_every_way_that_runs_and_names_the_others(monkeypatch):
    monkeypatch.setattr(gpu_measure, "ROUNDS", 1)
    ways = (
        *FEW,
        Way("fails", "peer", fails),
        Way("oom", "peer", out_of_memory),
        Way("absent", "peer", fails, package="x"),
    )
    told = []
    found = gpu_measure.measure_cell(
        MAIN.tiny(), ways, gpu_measure.Cpu(), far(), {"chunked, recompute": "skipped"},
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


def test_where_the_first_calls_take_the_time_the_others_are_still_timed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(gpu_measure.time, "monotonic", lambda: clock[0])

    def slow(hidden, weight, inputs):
        clock[0] += 100
        return materialised_nll(hidden, weight, inputs)

    ways = (FEW[0], Way("slow", "peer", slow, checked=False), Way("later", "peer", materialised_nll, checked=False))
    found = gpu_measure.measure_cell(MAIN.tiny(), ways, gpu_measure.Cpu(), 150.0, {}, lambda doing, so_far: None)
    rows = by_name(found)
    assert not found["complete"] and rows["later"]["failure"] == gpu_measure.NO_TIME
    assert rows[GEMM]["both"] and rows["slow"]["both"]


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
        found = worker.measure(MAIN.name, far(), far())
        rows = by_name(found)
        assert found["complete"] and rows["materialised"]["both"]
        assert rows["dies"]["failure"] == f"its process ended with status 7, in {MAIN.name}"
    finally:
        worker.stop()


@pytest.mark.slow
def test_a_way_that_hangs_is_ended():
    ways = (Way("hangs", "logitless", hangs), Way("materialised", "materialised", materialised_nll))
    worker = Worker(dry=True, ways=ways, patience=30)
    try:
        rows = by_name(worker.measure(MAIN.name, far(), far()))
        assert rows["materialised"]["both"] and "no answer for 30 s" in rows["hangs"]["failure"]
    finally:
        worker.stop()


# ---------------------------------------------------------------------------------------------------------------------
# Kernels one by one


def kernels(part: str) -> dict:
    return gpu_kernels.measure_kernels(part, MAIN.tiny(), gpu_measure.Cpu(), far(), {}, lambda doing, so_far: None)


@pytest.fixture
def host(monkeypatch):
    """The CUDA kernels' twin for the CPU."""
    monkeypatch.setenv(gpu_build.VARIABLE, str(host_library()))


@needs_compiler
def test_first_light_holds_forwards_against_float64_and_a_product(host):
    found = kernels(FORWARD)
    row = by_name(found)["cuda, fused"]
    assert found["complete"] and row["wrong"] == [] and row["error"]["other bits"] == 0
    assert len(row["both"]) == len(row["floor"]) == gpu_kernels.TURNS
    json.dumps(found)


@needs_compiler
def test_first_light_names_what_is_wrong(host, monkeypatch):
    right, calls = cuda._fused_forward, []

    def wrong(*given, **options):
        stats = right(*given, **options)
        calls.append(None)
        return stats._replace(lse=stats.lse + 1e-3, logprob=stats.logprob + len(calls) * 1e-9)

    monkeypatch.setattr(cuda, "_fused_forward", wrong)
    assert by_name(kernels(FORWARD))["cuda, fused"]["wrong"][0] == "lse"


@needs_compiler
def test_an_engine_that_makes_and_measures_logits_at_once_is_timed(host, monkeypatch):
    def project(hidden, weight, out, head, targets, outputs, mean_logit):
        torch.mm(hidden.float(), weight.float().T, out=out)
        return cuda.ENGINE.measure(out, head, targets, outputs, mean_logit)

    monkeypatch.setattr(cuda.ENGINE, "project", project, raising=False)
    row = by_name(kernels(FORWARD))["cuda, 40 tokens' logits and statistics"]
    assert row["both"] and row["wrong"] == []


def test_not_a_number_is_wrong():
    row = gpu_measure.Row("x", "logitless")
    check = dict(lse=(float("nan"), 1.0), logprob=(0.5, 1.0))
    kernel = gpu_kernels.Kernel("x", lambda given: None, lambda: None, check=lambda: check)
    gpu_kernels._measure(kernel, row, gpu_measure.Cpu())
    assert row.wrong == ["lse"]


@needs_compiler
def test_every_configuration_that_the_library_names_is_timed(host, monkeypatch):
    assert kernels(CONFIGURATIONS)["rows"] == [] or hasattr(cuda._library(), "configurations")
    right, asked = cuda._fused_forward, []

    def fused(kernel, *given):
        asked.append((kernel, cuda.CONFIGURATION))
        return right("forward_sm80", *given)

    monkeypatch.setattr(cuda, "_fused_forward", fused)
    monkeypatch.setattr(cuda, "CONFIGURATION", 7, raising=False)
    monkeypatch.setattr(cuda._library(), "configurations", lambda: ("wide", "ping-pong"), raising=False)
    rows = by_name(kernels(CONFIGURATIONS))
    assert list(rows) == ["wide", "ping-pong"] and all(row["both"] and row["wrong"] == [] for row in rows.values())
    assert set(asked) == {("forward_sm90", 0), ("forward_sm90", 1)} and cuda.CONFIGURATION == 7


def test_kernels_on_a_chunk_against_a_copy():
    found = kernels(ROWS)
    rows = by_name(found)
    logits = 16 * 96 * 4
    for name, read_and_written in (("statistics", logits), ("gradient", 1.5 * logits)):
        row = rows[f"chunked, {name}"]
        assert (row["bytes"], row["floor_bytes"], row["wrong"]) == (read_and_written, 2 * logits, [])
        assert len(row["both"]) == gpu_kernels.TURNS
    assert found["complete"] and all(row["failure"] or row["both"] for row in rows.values())


def test_steps_are_measured_by_the_budget_of_a_chunk_and_calls_by_their_tokens(monkeypatch):
    monkeypatch.setattr(gpu_kernels, "OWN", ("chunked",))
    steps, calls = by_name(kernels(CHUNKS)), by_name(kernels(TOKENS))
    assert "chunked: chunk by default" in steps and "chunked: frozen head, chunk 256 MiB" in steps
    assert "chunked: chunk 256 MiB of bfloat16" in steps
    rows = [*steps.values(), *calls.values()]
    assert all(row["both"] and row["floor"] and row["peak_bytes"] > 0 for row in rows if not row["failure"])
    assert steps["chunked: chunk 256 MiB"]["peak_bytes"] > steps["chunked: chunk 0.005859 MiB"]["peak_bytes"]
    assert calls["linear_logprobs, N 40"]["wrong"] is not None


@pytest.mark.parametrize("part", sorted(PARTS))
def test_every_kernel_has_a_name_of_its_own(part):
    names = [kernel.name for kernel in PARTS[part](MAIN.tiny().inputs(CPU))]
    assert len(names) == len(set(names))


def test_out_of_time_a_part_of_kernels_is_not_complete():
    found = gpu_kernels.measure_kernels(ROWS, MAIN.tiny(), gpu_measure.Cpu(), 0.0, {}, lambda doing, so_far: None)
    assert not found["complete"] and found["rows"] == []


@needs_compiler
def test_once_calls_everything_of_ours_or_one_kernel(host, capsys, monkeypatch):
    gpu_once.main(["--small"])
    printed = capsys.readouterr().out
    assert "forward: cuda, fused: runs" in printed and "step: cuda, tail_corrected: runs" in printed
    called = []
    monkeypatch.setattr(gpu_kernels._Rows, "_gradient", lambda self, given: called.append(self.backend))
    gpu_once.main([ROWS, "cuda, gradient"])
    assert called == ["cuda", "cuda"]
    with pytest.raises(SystemExit):
        gpu_once.main([ROWS, "nothing"])
    assert "expected one of ['cuda, statistics'" in capsys.readouterr().err


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


def run_tests(suite: Path, text: str, folder: Path, seconds: float = 300, before: dict | None = None) -> dict:
    suite.write_text(text)
    return gpu_tests.run_tests("cpu", seconds, folder, suites=[str(suite)], before=before)


def test_the_suite_runs_on_the_device_and_its_numbers_come_back(tmp_path):
    text = (
        "import os, pytest\ndef test_device(): assert os.environ['LOGITLESS_TEST_DEVICE'] == 'cpu'\n"
        "def test_broken(): assert False, 'seven is not eight'\n"
        "@pytest.mark.skip\ndef test_left_out(): pass\n"
        "@pytest.fixture\ndef bad(): raise OSError\ndef test_error(bad): pass\n"
    )
    found = run_tests(tmp_path / "suite.py", text, tmp_path / "out")
    assert [found[x] for x in ("tests", "failures", "errors", "skipped", "status")] == [4, 1, 1, 1, 1]
    assert found["complete"] and "finished" not in found and (tmp_path / "out" / "tests.xml").exists()
    assert "suite.py::test_broken" in found["failed"][0] and "seven is not eight" in found["failed"][0]


def test_a_suite_that_does_not_end_in_time_is_ended(tmp_path):
    found = run_tests(tmp_path / "suite.py", "import time\ndef test_slow(): time.sleep(600)\n", tmp_path / "out", 1)
    assert not found["complete"] and found["status"] != 0 and "no test was finished" in found["failure"]


def test_what_was_finished_counts_however_the_run_ends_and_the_next_run_goes_on(tmp_path):
    text = (
        "import os, pathlib\nmark = pathlib.Path(__file__).with_name('mark')\n"
        "def test_first(): assert not mark.exists(), 'called again'\n"
        "def test_ends_it():\n    if not mark.exists():\n        mark.touch()\n        os._exit(9)\n"
        "def test_last(): pass\n"
    )
    first = run_tests(tmp_path / "suite.py", text, tmp_path / "out")
    assert not first["complete"] and first["status"] == 9 and first["tests"] == 1
    assert [name.split("::")[1] for name in first["finished"]] == ["test_first"]
    second = run_tests(tmp_path / "suite.py", text, tmp_path / "out", before=first)
    assert second["complete"] and (second["tests"], second["failures"]) == (3, 0)
    assert second["seconds"] > first["seconds"]


# ---------------------------------------------------------------------------------------------------------------------
# The report


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_without_a_gpu_it_says_so_in_a_sentence():
    with pytest.raises(SystemExit, match=r"finds no GPU here; --dry runs the same steps"):
        gpu_report.main([])


def report(folder: Path, end: float | None = None, **options) -> gpu_report.Report:
    about = gpu_report.describe("abc", dry=True)
    return gpu_report.Report(folder, about, end=end or far(), dry=True, ways=FEW, **options)


def test_a_dry_run_writes_json_and_tables_part_by_part_and_resumes(tmp_path, capsys):
    first = report(tmp_path)
    first.measure([ROWS, MAIN.name])
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert list(results["parts"]) == [ROWS, MAIN.name] and results["build"]["failure"] == "a dry run builds nothing"
    about = results["parts"][ROWS]["environment"]
    assert about["commit"] == "abc" and about["dry"] and "torch" in about["versions"] and "quack" in about["missing"]
    text = (tmp_path / "gpu.md").read_text()
    assert text.startswith("# A dry run") and "chunked, single_pass" in text and "chunked, gradient" in text
    assert "chunked, single_pass" in capsys.readouterr().out
    second = report(tmp_path)
    assert second.has(MAIN.name) and not second.has(CELLS[1].name)
    second.about = {**second.about, "commit": "abd"}
    assert not second.has(MAIN.name)


def test_it_goes_on_with_an_earlier_file_unless_the_folder_has_one(tmp_path):
    earlier, later = tmp_path / "earlier.json", tmp_path / "out"
    report(tmp_path / "first").measure([ROWS])
    (tmp_path / "first" / "gpu.json").rename(earlier)
    resumed = report(later, earlier=earlier)
    assert resumed.has(ROWS)
    resumed.results["parts"][ROWS]["complete"] = False
    resumed._save()
    assert not report(later, earlier=earlier).has(ROWS) and report(tmp_path / "other", earlier=earlier).has(ROWS)


def test_out_of_time_it_begins_nothing_and_names_what_is_left(tmp_path, capsys):
    late = report(tmp_path, end=time.monotonic())
    late.measure([MAIN.name, ROWS])
    assert late.results["parts"] == {} and f"goes on with: {MAIN.name} {ROWS}" in capsys.readouterr().err


def test_where_the_time_is_too_short_for_a_part_a_smaller_one_is_begun(tmp_path, capsys):
    short = report(tmp_path, end=time.monotonic() + gpu_report.RESERVE + 50)
    short.measure([MAIN.name, ROWS, TESTS])
    assert list(short.results["parts"]) == [ROWS] and f"goes on with: {MAIN.name} {TESTS}" in capsys.readouterr().err


@pytest.mark.parametrize("runs", [True, False])
def test_the_carried_library_is_taken_where_it_runs_and_one_is_built_where_not(tmp_path, monkeypatch, runs):
    built = {"library": "built", "missing": [], "notes": [], "failure": None}
    monkeypatch.setattr(gpu_build, "build", lambda seconds: built)
    monkeypatch.setattr(cuda, "supports", lambda device, dtype: None if runs else "no code for this GPU")
    made = report(tmp_path, carried=Unpacked("abc", tmp_path / gpu_build.NAME, ["carried in the bundle"]))
    made.dry = False
    made.measure([])
    found = json.loads((tmp_path / "gpu.json").read_text())["build"]
    assert found["library"] == (gpu_build.NAME if runs else "built")
    assert found["notes"] == (
        ["carried in the bundle"] if runs else ["the bundle's library was not used: no code for this GPU"]
    )


def test_tests_have_seconds_of_their_own_and_go_on_where_an_earlier_call_ended(tmp_path, monkeypatch):
    asked = []

    def run(device, seconds, folder, *, suites, select, before):
        (folder / "tests.xml").write_text("<testsuites/>")
        asked.append((round(seconds), before and before["tests"], len(suites)))
        return {"tests": 5, "complete": len(asked) > 1, "failed": [], **dict.fromkeys(gpu_tests.COUNTS[1:], 0)}

    monkeypatch.setattr(gpu_tests, "run_tests", run)
    for _ in range(2):
        report(tmp_path, tests_seconds=77).measure([TESTS])
    assert asked == [(77, None, len(gpu_tests.SUITES)), (77, 5, len(gpu_tests.SUITES))]
    assert report(tmp_path).has(TESTS) and (tmp_path / "tests.xml").exists()
    without = report(None)
    without.dry, without.results["build"] = False, {"library": None}
    assert "were left out" in without._tests(tmp_path)["left_out"]
    assert asked[-1][2] == len(gpu_tests.SUITES) - len(gpu_tests.CUDA_SUITES)


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
    return dict(rows=rows, logits_bytes=1000, head_gradient_bytes=250, gradient_bytes=500, frozen_gradient_bytes=50)


def kernel(name: str, seconds: float, floor: float, **other) -> dict:
    times = dict(both=[seconds] * 3, floor=[floor] * 3)
    return {**dict(provider=name, failure=None, bytes=None, floor_bytes=None, error=None, wrong=None), **times, **other}


def test_a_target_is_a_ratio_of_what_was_measured():
    errors = dict(d_hidden=3.0, d_weight=1.0), dict(d_hidden=2.0, d_weight=0.5)
    found = measured(
        row(GEMM, "floor", 2.0), row("triton, recompute", seconds=3.0, peak=1000, error=errors[0]),
        row("fast", "peer", 4.0, error=errors[1]), row("broken", "peer", 0.1, failure="out of memory"),
    )  # fmt: skip
    way = "triton, recompute"
    assert gpu_tables.reached(Target(way, "forward", GEMM), found) == 1.5
    assert gpu_tables.reached(Target(way, "memory", LOGITS), found) == 0.5
    assert gpu_tables.reached(Target(way, "memory", HEAD_GRADIENT), found) == 2.0
    assert gpu_tables.reached(Target(way, "memory", BUDGET), found) == 500 / 2**28
    assert gpu_tables.reached(Target(way, "both", "fast", beaten=True), found) == 0.75
    assert gpu_tables.reached(Target(way, "error", "fast"), found) == 2.0
    assert gpu_tables.reached(Target(way, "both", "broken"), found) is None
    assert gpu_tables.reached(Target("cuda, recompute", "both", GEMM), found) is None
    calls = dict(rows=[kernel("linear_logprobs, N 512", 1.05, 1.0)])
    assert gpu_tables.reached(Target("linear_logprobs, N 512", "forward", FLOOR, part=TOKENS), calls) == 1.05


def test_a_kernels_ratio_is_for_each_byte_where_its_floor_is_a_copy_of_another_size():
    assert gpu_tables.against_floor(kernel("x", 3.0, 2.0)) == 1.5
    assert gpu_tables.against_floor(kernel("x", 1.0, 1.0, bytes=50, floor_bytes=100)) == 2.0
    assert gpu_tables.against_floor(kernel("x", 1.0, 1.0, failure="no")) is None
    text = gpu_tables.kernel_table(dict(rows=[
        kernel("bad", 1.0, 1.0, peak_bytes=None, error=dict(lse=0.5), wrong=["lse"]),
        kernel("good", 1.0, 1.0, peak_bytes=2**20, error=dict(lse=1e-6), wrong=[]),
    ]))  # fmt: skip
    assert "NO: lse" in text and "1.0e-06" in text and text.count("yes") == 1


def test_the_targets_table_says_met_missed_and_not_measured():
    environment = dict(dry=False)
    cell = measured(row(GEMM, "floor", 2.0), row("cuda, single_pass", seconds=2.2), row("quack", "peer", 2.2))
    cell["environment"] = environment
    rows = [kernel("cuda, gradient", 1.0, 1.0, bytes=95, floor_bytes=100)]
    text = gpu_tables.targets_table({MAIN.name: cell, ROWS: dict(rows=rows, environment=environment)})
    lines = {line.split("|")[1].strip(): line for line in text.splitlines()}
    reached = lines[f"cuda, single_pass: forward + backward / {GEMM}"]
    assert " met " in reached and "1.100" in reached and "<= 1.1" in reached
    beaten = lines["cuda, single_pass: forward + backward / quack"]
    assert "missed" in beaten and "1.000" in beaten and "< 1" in beaten
    assert "not measured" in lines["cuda, single_pass: forward + backward / Liger scaled"]
    assert "not measured" in lines[f"linear_logprobs, N 512: forward / {FLOOR}"]
    assert "0.950" in lines["cuda, gradient: share of copy bandwidth"]
    rows[0]["bytes"] = 50
    assert "missed" in next(
        line for line in gpu_tables.targets_table({ROWS: dict(rows=rows)}).splitlines() if "cuda, gradient" in line
    )


@pytest.mark.parametrize("target", gpu_tables.TARGETS, ids=lambda target: f"{target.way}-{target.relative_to}")
def test_every_target_is_of_a_way_that_the_report_measures(target):
    names = {way.name for way in WAYS}
    if target.part == MAIN.name:
        assert target.way in names and target.relative_to in {*names, LOGITS, HEAD_GRADIENT, BUDGET}
    else:
        inputs = MAIN.tiny().inputs(CPU)
        many = inputs._replace(hidden=inputs.hidden.repeat(256, 1), targets=inputs.targets.repeat(256))
        assert target.way in [kernel.name for kernel in PARTS[target.part](many)]


# ---------------------------------------------------------------------------------------------------------------------
# Tools


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!{sys.executable}\nimport sys\n{text}")
    (folder / name).chmod(0o755)


#: Writes the report that it is asked for, and tells what is in it.
NCU = """
if "--import" in sys.argv:
    print("  Duration      ms   12.5\\n  Something else")
else:
    open(sys.argv[sys.argv.index("--export") + 1], "w").write(" ".join(sys.argv))
"""
MEASURED = {
    FORWARD: dict(rows=[kernel("cuda, fused", 1.0, 1.0), kernel(gpu_kernels.BY_CHUNKS, 9.0, 1.0)]),
    ROWS: dict(rows=[
        kernel("cuda, statistics", 3.0, 1.0), kernel("cuda, gradient", 2.0, 1.0), kernel("chunked, gradient", 9.0, 1.0),
        kernel("triton, gradient", 4.0, 1.0), kernel("triton, statistics", 9.0, 1.0, failure="no"),
    ]),
}  # fmt: skip


def test_the_kernels_furthest_from_their_floor_are_profiled(monkeypatch, tmp_path):
    program(tmp_path, "ncu", NCU)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = gpu_tools.profile(MEASURED, tmp_path, far())
    names = ["rows: triton, gradient", "rows: cuda, statistics", "rows: cuda, gradient"]
    assert [kernel["kernel"] for kernel in found["kernels"]] == names and found["complete"]
    assert all(kernel["summary"] == ["Duration      ms   12.5"] for kernel in found["kernels"])
    command = (tmp_path / "profile-2.ncu-rep").read_text()
    assert "--profile-from-start off" in command and command.endswith("benchmarks.gpu_once rows cuda, statistics")
    assert "rows: cuda, gradient, 2.00 of its floor" in (tmp_path / "profiles.txt").read_text()


def test_a_profiler_that_is_absent_or_forbidden_is_a_line(monkeypatch, tmp_path):
    program(tmp_path, "ncu", "print('==ERROR== ERR_NVGPUCTRPERM')\nprint('more')\nsys.exit(1)")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = gpu_tools.profile(MEASURED, tmp_path, far())
    assert found["kernels"][0]["failure"] == "ncu ended with 1: ==ERROR== ERR_NVGPUCTRPERM" and found["complete"]
    assert not gpu_tools.profile({}, tmp_path, far())["complete"]
    (tmp_path / "ncu").unlink()
    assert gpu_tools.profile(MEASURED, tmp_path, far())["failure"] == "ncu is not in PATH"
    assert gpu_tools.sanitize(tmp_path, far())["failure"] == "compute-sanitizer is not in PATH"


def test_without_time_for_a_tool_the_part_is_not_complete_and_goes_on_later(monkeypatch, tmp_path):
    program(tmp_path, "ncu", NCU)
    program(tmp_path, "compute-sanitizer", "print(sys.argv[2])")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for found in (
        gpu_tools.profile(MEASURED, tmp_path, time.monotonic()),
        gpu_tools.sanitize(tmp_path, time.monotonic()),
    ):
        assert not found["complete"] and found["failure"] is None
    first = dict(kernels=[dict(kernel="the first")])
    found = gpu_tools.profile(MEASURED, tmp_path, far(), first)
    assert [x["kernel"] for x in found["kernels"]] == ["the first", "rows: cuda, statistics", "rows: cuda, gradient"]
    reports = {path.name for path in tmp_path.glob("*.ncu-rep")}
    assert reports == {"profile-2.ncu-rep", "profile-3.ncu-rep"} and found["complete"]
    found = gpu_tools.sanitize(tmp_path, far(), dict(tools=[dict(tool="memcheck")]))
    assert [x["tool"] for x in found["tools"]] == ["memcheck", "racecheck", "synccheck"]
    assert found["tools"][1]["summary"] == "racecheck"


def test_everything_is_at_most_eight_files_without_a_folder(monkeypatch, tmp_path):
    program(tmp_path, "ncu", NCU)
    program(tmp_path, "compute-sanitizer", "print('========= ERROR SUMMARY: 0 errors')")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    out = tmp_path / "out"
    made = report(out)
    about = dict(environment=made.about, complete=True, problem="made up")
    made.results["parts"] = {name: {**part, **about} for name, part in MEASURED.items()}
    for part in made.results["parts"].values():
        for line in part["rows"]:
            line["peak_bytes"] = None
    made.measure([TESTS, PROFILES, SANITIZER])
    profiles = [f"profile-{n}.ncu-rep" for n in (1, 2, 3)]
    expected = ["gpu.json", "gpu.md", *profiles, "profiles.txt", "sanitizer.txt", "tests.xml"]
    assert sorted(path.name for path in out.iterdir()) == expected
    text = (out / "gpu.md").read_text()
    assert "memcheck ended with 0: ========= ERROR SUMMARY: 0 errors" in text and "0 failures, 0 errors" in text
    assert "- rows: triton, gradient, 4.00 of its floor: Duration ms 12.5" in text
