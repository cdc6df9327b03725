"""The test-suite on the device, through pytest: what was finished counts, however the run ends.

As a plugin of pytest this module writes every outcome down as it comes, leaves out what an earlier run finished, and
ends a process that a kernel took the device from.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from logitless.bench.targets import Json

from .commands import run

if TYPE_CHECKING:
    import pytest

#: What runs on a device: the CUDA kernels one by one, the ops over every backend, their bits, and the Triton kernels.
CUDA_SUITES = tuple(f"tests/test_cuda_{name}.py" for name in ("forward", "chunk", "sparse", "tail"))
SUITES = (
    *CUDA_SUITES,
    "tests/device_suite.py",
    *(f"tests/test_{name}.py" for name in ("triton", "triton_tail", "triton_divergence")),
)
#: Failures that the report repeats, and how much of each.
SHOWN, LINES = 20, 12
#: Folder of the plugin's two files.
VARIABLE = "LOGITLESS_TEST_RECORDS"
OUTCOMES, FINISHED = "outcomes.jsonl", "finished.json"
#: What of an earlier run is added to.
COUNTS = ("tests", "failures", "errors", "skipped", "seconds")


def run_tests(
    device: str,
    seconds: float,
    folder: Path,
    *,
    suites: Sequence[str] = SUITES,
    select: str = "",
    before: Json | None = None,
) -> Json:
    """The suites on the device, ready for JSON; `complete` if all were run. JUnit's report stays in the folder.

    `before`: what an incomplete run result, which this one goes on with and adds to.
    """
    before = before or {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OUTCOMES).unlink(missing_ok=True)
    (folder / FINISHED).write_text(json.dumps(before.get("finished", [])))
    start = time.monotonic()
    # Without the last, PyTorch refuses cuBLAS in deterministic mode.
    variables = {"LOGITLESS_TEST_DEVICE": device, VARIABLE: str(folder), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    status, output = run([*_command(device, folder), *suites, *(["-k", select] if select else [])], seconds, variables)
    result: Json = {"device": device, "status": status, "complete": status in (0, 1, _NONE_LEFT)}
    outcomes = _outcomes(folder / OUTCOMES)
    counted = {**_counts(outcomes), "seconds": time.monotonic() - start}
    result |= {name: counted[name] + before.get(name, 0) for name in COUNTS}
    result["failed"] = (before.get("failed", []) + [_failure(x) for x in outcomes if x["outcome"] == "failed"])[:SHOWN]
    if not result["complete"]:
        result["finished"] = [*before.get("finished", []), *dict.fromkeys(x["id"] for x in outcomes)]
    if not result["complete"] and not outcomes:
        result["failure"] = f"no test was finished: {output[-2000:]}"
    return result


#: Pytest's status where every test was left out.
_NONE_LEFT = 5


def _command(device: str, folder: Path) -> list[str]:
    plugins = ["-p", "no:cacheprovider", "-p", __name__, f"--junitxml={folder / 'tests.xml'}"]
    # Where these are installed: processes for Triton's compiler, and an end for a kernel that hangs.
    if device != "cpu" and importlib.util.find_spec("xdist"):
        plugins += ["-n", str(min(8, os.cpu_count() or 1))]
    if importlib.util.find_spec("pytest_timeout"):
        plugins += ["--timeout", "90", "--timeout-method", "thread"]
    return [sys.executable, "-m", "pytest", "-q", "--tb=short", *plugins]


def _outcomes(path: Path) -> list[Json]:
    """A line that was being written when the run ended is no outcome."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _counts(outcomes: list[Json]) -> dict[str, int]:
    return {
        "tests": len({x["id"] for x in outcomes}),
        "failures": sum(x["outcome"] == "failed" and x["when"] == "call" for x in outcomes),
        "errors": sum(x["outcome"] == "failed" and x["when"] != "call" for x in outcomes),
        "skipped": sum(x["outcome"] == "skipped" for x in outcomes),
    }


def _failure(outcome: Json) -> str:
    return "\n".join([f"{outcome['id']}:", *outcome["text"].strip().splitlines()[-LINES:]])[:2000]


def text(result: Json) -> str:
    """Counts and failures as Markdown."""
    counts = ", ".join(f"{result[name]} {name}" for name in ("tests", "failures", "errors", "skipped"))
    suites = "" if result["left_out"] is None else f" {result['left_out']}."
    return "\n".join([f"{counts} in {result['seconds']:.0f} s.{suites}", *(_quoted(x) for x in result["failed"])])


def _quoted(failure: str) -> str:
    name, *lines = failure.splitlines()
    return "\n".join([f"- {name}", *(f"      {line}" for line in lines)])


# ---------------------------------------------------------------------------------------------------------------------
# In pytest's own process


class Recorder:
    """Writes outcomes down; a test counts once it has been called, skipped or broken on its way."""

    def __init__(self, folder: Path, *, writes: bool) -> None:
        self.folder, self.writes = folder, writes

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        finished = set(json.loads((self.folder / FINISHED).read_text()))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in finished])
        items[:] = [item for item in items if item.nodeid not in finished]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.writes and (report.when == "call" or report.outcome != "passed"):
            text = report.longreprtext if report.outcome == "failed" else ""
            line = {"id": report.nodeid, "when": report.when, "outcome": report.outcome, "text": text}
            with (self.folder / OUTCOMES).open("a") as file:
                file.write(json.dumps(line) + "\n")


class Guard:
    """Ends the process once its device is lost, as after an illegal access: each later test there would fail too.

    Where it is a worker of pytest-xdist, another takes its place; else the next run goes on with what is left.
    """

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if device_is_lost():
            sys.stderr.write(f"{nodeid}: the device is lost, and this process ends\n")
            os._exit(LOST)


#: Status of such a process.
LOST = 71


def device_is_lost() -> bool:
    """Whether CUDA refuses this process any further work."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def pytest_configure(config: pytest.Config) -> None:
    """A worker of pytest-xdist collects and tests like a run of one process, and what started it does the writing."""
    if folder := os.environ.get(VARIABLE):
        worker = hasattr(config, "workerinput")
        config.pluginmanager.register(Recorder(Path(folder), writes=not worker))
        if worker or not config.getoption("numprocesses", None):
            config.pluginmanager.register(Guard())
