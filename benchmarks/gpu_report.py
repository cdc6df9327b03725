"""The Triton and CUDA kernels on this machine's GPU: tested, timed against cuBLAS, a copy and the peers, and profiled.

python -m benchmarks.gpu_report                      all parts that benchmarks/results/gpu.json does not have yet
python -m benchmarks.gpu_report --bundle .gpu --output FOLDER --minutes 9
                                                     on a machine without a network: see benchmarks/gpu_bundle.py
python -m benchmarks.gpu_report --only tests rows    these parts, again
python -m benchmarks.gpu_report --dry                the same steps in seconds, tiny, on a CPU; not saved by itself

A part counts as there when it is complete and from the same device and commit. The most valuable part comes first, all
is written after every part, and after --minutes (everything included) what is left is named: the next call goes on with
it. FOLDER then holds at most eight files: gpu.json and gpu.md, tests.xml, profile-1.ncu-rep to profile-3.ncu-rep with
profiles.txt, sanitizer.txt.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from logitless.backends import cuda

from . import cpu_report, environment, gpu_build, gpu_bundle, gpu_kernels, gpu_tables, gpu_tests, gpu_tools
from .gpu_bundle import MissingPiece, Unpacked
from .gpu_cells import CELLS, MAIN
from .gpu_tables import PROFILES, SANITIZER, TESTS
from .gpu_ways import WAYS, Way, cce_build
from .gpu_worker import Worker
from .report import Json

RESULTS = Path(__file__).resolve().parent / "results"
PARTS = (
    *(gpu_kernels.FORWARD, gpu_kernels.ROWS, TESTS, MAIN.name, gpu_kernels.TOKENS, gpu_kernels.CHUNKS),
    *(gpu_kernels.CONFIGURATIONS, PROFILES, gpu_kernels.PRODUCTS_OF_CHUNKS, SANITIZER, gpu_kernels.FLOAT16),
    *(cell.name for cell in CELLS[1:]),
)
#: What a build may take of all the time, and the seconds kept back for a last step to end in.
BUILD_SHARE, RESERVE = 0.3, 20.0
#: Seconds of the tests, by default.
TESTS_SECONDS = 240.0
#: Seconds that a part must have left to be begun. Where it has not, a smaller one may.
NEEDED = {TESTS: 60.0, PROFILES: 60.0, SANITIZER: 60.0, **{cell.name: 60.0 for cell in CELLS}}
#: In dry mode: the parts, and the quickest of the tests.
DRY_PARTS = PARTS[: -len(CELLS) + 1]
DRY_TESTS = "test_same_bits_twice"


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
    """The file of results, brought up to date part by part.

    Args:
        folder: where it and what the tools leave are written; None: nowhere.
        earlier: a file of results to go on with where the folder has none.
        carried: what a bundle brought; None: there was none.
    """

    def __init__(
        self,
        folder: Path | None,
        about: Json,
        *,
        end: float,
        dry: bool,
        tests_seconds: float = TESTS_SECONDS,
        earlier: Path | None = None,
        carried: Unpacked | None = None,
        ways: tuple[Way, ...] = WAYS,
    ):
        self.folder, self.about, self.end, self.dry = folder, about, end, dry
        self.tests_seconds, self.carried = tests_seconds, carried
        self.worker = Worker(dry=dry, ways=ways)
        self.results: Json = {"build": None, "parts": {}}
        files = (path for path in (folder and folder / "gpu.json", earlier) if path is not None and path.exists())
        if found := next(files, None):
            self.results = json.loads(found.read_text())

    def has(self, name: str) -> bool:
        """Complete, from this device and this commit."""
        found = self._found(name)
        return found is not None and found["complete"]

    def _found(self, name: str) -> Json | None:
        """As far as it came, from this device and this commit."""
        found = self.results["parts"].get(name)
        same = found and all(found["environment"][key] == self.about[key] for key in ("device", "commit"))
        return found if same else None

    def _unfinished(self, name: str) -> Json | None:
        """What a part that can go on has found so far."""
        found = self._found(name)
        return None if found is None or found["complete"] else found

    def measure(self, names: Sequence[str]) -> None:
        """The library, then the parts in order; says on standard error what there was no time for."""
        try:
            self._library()
            left = []
            for name in names:
                if time.monotonic() + NEEDED.get(name, 0.0) > self.deadline:
                    left.append(name)
                    continue
                print(name, file=sys.stderr)
                self._keep(name, self._measure(name))
            if left:
                print(f"out of time; the same command goes on with: {' '.join(left)}", file=sys.stderr)
        finally:
            self.worker.stop()

    @property
    def deadline(self) -> float:
        """Nothing new begins after it."""
        return self.end - RESERVE

    def _library(self) -> None:
        """The carried one where it runs here, else built here."""
        nothing: Json = {"library": None, "missing": [], "notes": [], "failure": "a dry run builds nothing"}
        self.results["build"] = self._carried() or (
            nothing if self.dry else gpu_build.build(BUILD_SHARE * (self.end - time.monotonic()))
        )
        if self.carried is not None and self.carried.library is None:
            self.results["build"]["notes"] += self.carried.notes
        if self.results["build"]["failure"]:
            print(f"CUDA library: {self.results['build']['failure']}", file=sys.stderr)
        self._save()

    def _carried(self) -> Json | None:
        if self.carried is None or self.carried.library is None:
            return None
        refusal = None if self.dry else cuda.supports(torch.device("cuda", 0), torch.bfloat16)
        if refusal is not None:
            self.carried = Unpacked(self.carried.commit, None, [f"the bundle's library was not used: {refusal}"])
            return None
        return {"library": gpu_build.NAME, "missing": [], "notes": self.carried.notes, "failure": None}

    def _measure(self, name: str) -> Json:
        if name not in (TESTS, PROFILES, SANITIZER):
            return self.worker.measure(name, self.deadline, self.end)
        self.worker.stop()  # it holds most of the device's memory
        with tempfile.TemporaryDirectory() as scratch:
            if name == TESTS:
                return self._tests(Path(scratch))
            folder = self.folder or Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            if name == PROFILES:
                return gpu_tools.profile(self.results["parts"], folder, self.deadline, self._unfinished(PROFILES))
            return gpu_tools.sanitize(folder, self.deadline, self._unfinished(SANITIZER))

    def _tests(self, scratch: Path) -> Json:
        """The suites of the CUDA library are left out where there is none: each would try to build it."""
        seconds = min(self.tests_seconds, self.deadline - time.monotonic())
        device, select = ("cpu", DRY_TESTS) if self.dry else ("cuda", "")
        there = self.dry or self.results["build"]["library"] is not None
        suites = [suite for suite in gpu_tests.SUITES if there or suite not in gpu_tests.CUDA_SUITES]
        before = self._unfinished(TESTS)
        found = gpu_tests.run_tests(device, seconds, scratch, suites=suites, select=select, before=before)
        if self.folder is not None and (scratch / "tests.xml").exists():
            shutil.copyfile(scratch / "tests.xml", self.folder / "tests.xml")
        return {**found, "left_out": None if there else "The CUDA library's own suites were left out"}

    def _keep(self, name: str, found: Json) -> None:
        parts = {**self.results["parts"], name: {**found, "environment": self.about}}
        self.results["parts"] = {name: parts[name] for name in PARTS if name in parts}
        self._save()
        print(gpu_tables.section(name, parts[name]), flush=True)

    def _save(self) -> None:
        if self.folder is not None:
            cpu_report.save(self.results, self.folder / "gpu.json", gpu_tables.markdown)


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"again: {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=9, help="for everything (default 9)")
    parser.add_argument("--tests-seconds", type=float, default=TESTS_SECONDS, help="of them (default 240)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default benchmarks/results")
    parser.add_argument("--bundle", type=Path, metavar="FOLDER", help="what benchmarks.gpu_bundle made")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="earlier gpu.json (default: the bundle's, if any)")
    parser.add_argument("--commit", help="to write down where the tree is a copy without .git (default: the bundle's)")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU: to see that everything runs")
    given = parser.parse_args(arguments)
    if not given.dry and not torch.cuda.is_available():
        sys.exit(
            f"gpu_report: torch {torch.__version__} finds no GPU here; --dry runs the same steps, tiny, on the CPU"
        )
    try:
        carried = given.bundle and gpu_bundle.unpack(given.bundle)
    except MissingPiece as reason:
        sys.exit(f"gpu_report: {reason}")
    made = Report(
        given.output or (None if given.dry else RESULTS),
        describe(given.commit or (carried and carried.commit), dry=given.dry),
        end=start + 60 * given.minutes,
        dry=given.dry,
        tests_seconds=given.tests_seconds,
        earlier=given.resume or (given.bundle and given.bundle / "gpu.json"),
        carried=carried,
    )
    wanted = DRY_PARTS if given.dry else PARTS
    made.measure(given.only or [name for name in wanted if not made.has(name)])
    print(gpu_tables.targets_table(made.results["parts"]))


if __name__ == "__main__":
    main()
