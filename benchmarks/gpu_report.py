"""The Triton and CUDA kernels on this machine's GPU: built, tested, and timed against cuBLAS, a copy and the peers.

python -m benchmarks.gpu_report                      all parts that benchmarks/results/gpu.json does not have yet
python -m benchmarks.gpu_report --only tests rows    these parts, again
python -m benchmarks.gpu_report --output FOLDER      FOLDER/gpu.json and gpu.md in place of benchmarks/results
python -m benchmarks.gpu_report --dry                the same steps in seconds, tiny, on a CPU; not saved by itself

A part counts as there when it is complete and from the same device and commit. The most valuable part comes first, and
after --minutes (8, everything included) what is left is named: the next call goes on with it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import cpu_report, environment, gpu_build, gpu_tables
from .gpu_cells import CELLS, MAIN
from .gpu_ways import WAYS, Way, cce_build
from .gpu_worker import ROWS, Worker
from .report import Json

RESULTS = Path(__file__).resolve().parent / "results"
TESTS = "tests"
PARTS = (TESTS, MAIN.name, ROWS, *(cell.name for cell in CELLS[1:]))
#: Of all the time: what the build and the tests may take each, and what is kept back for a last step to end in.
BUILD_SHARE, TESTS_SHARE, RESERVE = 0.3, 0.25, 0.05
#: In dry mode: a part of each kind, and the quickest of the tests.
DRY_PARTS, DRY_TESTS = (TESTS, MAIN.name, ROWS), "test_same_bits_twice"


def describe(commit: str | None, *, dry: bool) -> Json:
    """What a measurement depends on beside the code. `commit` is for a copy of the tree that Git does not know."""
    about: Json = dict(environment.describe())
    about["commit"] = commit or about["commit"]
    about["cut_cross_entropy"] = cce_build()
    about["missing"] = {way.name: reason for way in WAYS if (reason := way.missing())}
    about |= {"dry": dry, "device": about["cpu"], "driver": None, "cuda": None}
    if not dry:
        found = torch.cuda.get_device_properties(0)
        about |= {
            "device": found.name,
            "driver": _driver(),
            "cuda": torch.version.cuda or torch.version.hip,
            "capability": f"{found.major}.{found.minor}",
            "memory_bytes": found.total_memory,
            "multiprocessors": found.multi_processor_count,
            "l2_bytes": found.L2_cache_size,
        }
    return about


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


class Report:
    """The file of results, brought up to date part by part. `folder` None: nothing is written."""

    def __init__(self, folder: Path | None, about: Json, *, minutes: float, dry: bool, ways: tuple[Way, ...] = WAYS):
        self.path = None if folder is None else folder / "gpu.json"
        self.about, self.dry, self.seconds = about, dry, 60 * minutes
        self.end = time.monotonic() + self.seconds
        self.worker = Worker(dry=dry, ways=ways)
        self.results: Json = {"build": None, "parts": {}}
        if self.path is not None and self.path.exists():
            self.results = json.loads(self.path.read_text())

    def has(self, name: str) -> bool:
        """Complete, from this device and this commit."""
        found = self.results["parts"].get(name)
        same = found and all(found["environment"][key] == self.about[key] for key in ("device", "commit"))
        return bool(same and found["complete"])

    def measure(self, names: Sequence[str]) -> None:
        """Builds, then the parts in order; says on standard error where the time ends."""
        try:
            self._build()
            for i, name in enumerate(names):
                if time.monotonic() > self.deadline:
                    print(f"out of time; the same command goes on with: {' '.join(names[i:])}", file=sys.stderr)
                    return
                print(name, file=sys.stderr)
                found = self._tests() if name == TESTS else self.worker.measure(name, self.deadline, self.end)
                self.results["parts"][name] = {**found, "environment": self.about}
                self.save()
        finally:
            self.worker.stop()

    @property
    def deadline(self) -> float:
        """Nothing new begins after it."""
        return self.end - RESERVE * self.seconds

    def _build(self) -> None:
        nothing: Json = {"library": None, "missing": [], "notes": [], "failure": "a dry run builds nothing"}
        self.results["build"] = nothing if self.dry else gpu_build.build(BUILD_SHARE * self.seconds)
        if self.results["build"]["failure"]:
            print(f"CUDA library: {self.results['build']['failure']}", file=sys.stderr)
        self.save()

    def _tests(self) -> Json:
        seconds = min(TESTS_SHARE * self.seconds, self.deadline - time.monotonic())
        with tempfile.TemporaryDirectory() as folder:
            device, select = ("cpu", DRY_TESTS) if self.dry else ("cuda", "")
            return gpu_build.run_tests(device, seconds, Path(folder), select=select)

    def save(self) -> None:
        if self.path is not None:
            cpu_report.save(self.results, self.path, gpu_tables.markdown)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"again: {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=8, help="for everything (default 8)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default benchmarks/results")
    parser.add_argument("--commit", help="to write down where the tree is a copy without .git")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU: to see that everything runs")
    given = parser.parse_args(arguments)
    if not given.dry and not torch.cuda.is_available():
        sys.exit(
            f"gpu_report: torch {torch.__version__} finds no GPU here; --dry runs the same steps, tiny, on the CPU"
        )
    folder = given.output or (None if given.dry else RESULTS)
    made = Report(folder, describe(given.commit, dry=given.dry), minutes=given.minutes, dry=given.dry)
    wanted = DRY_PARTS if given.dry else PARTS
    made.measure(given.only or [name for name in wanted if not made.has(name)])
    made.save()
    print(gpu_tables.markdown(made.results))


if __name__ == "__main__":
    main()
