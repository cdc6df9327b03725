"""The Triton and CUDA kernels on this machine's GPU: tested, timed against cuBLAS, a copy and the peers, and profiled.

python -m benchmarks gpu                      all parts that this machine's gpu.json in benchmarks/results has not yet
python -m benchmarks gpu --bundle .gpu --output FOLDER --minutes 9
                                              on a machine without a network: see `python -m benchmarks bundle --help`
python -m benchmarks gpu --only tests rows    these parts, again
python -m benchmarks gpu --tiny               the same steps in seconds, on a CPU; not saved by itself (or: --dry)
python -m benchmarks gpu --tables FILE.json   the tables of a file again, without measuring

A part counts as there when it is complete and from the same device and commit. The most valuable part comes first, all
is written after every part, and after --minutes (everything included) what is left is named: the next call goes on with
it. FOLDER then holds at most eight files: gpu.json and gpu.md, tests.xml, profile-1.ncu-rep to profile-3.ncu-rep with
profiles.txt, sanitizer.txt.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from logitless.bench.environment import describe
from logitless.bench.measure import Method, Part
from logitless.bench.problem import Data, Problem
from logitless.bench.provider import ROLES, Provider
from logitless.bench.providers import floors, materialised, own, peers
from logitless.bench.report import Report, about, heading, markdown, section, targets_table
from logitless.bench.targets import BUDGET, COPY, HALF_LOGITS, HEAD_GRADIENT, PRODUCT, Json, Target
from logitless.bench.worker import Worker

from .. import internals
from ..gpu import build, bundle, device_tests, kernels, tools
from ..gpu.kernels import KernelPart
from .suite import options, output, tables_again

# ---------------------------------------------------------------------------------------------------------------------
# What is measured

HEADS = ((4096, 128256), (2304, 256000), (8192, 128256), (576, 49152))  # Llama 3 8B, Gemma 2 2B, Llama 3 70B, SmolLM2
TOKENS = (8192, 2048, 32768)
METHOD = Method(rounds=20, seconds=12.0, may_fail=ROLES, whole=True, forwards=True)
COLUMNS = (
    *("forward ms", "forward / GEMM", "backward ms", "step ms", "/ GEMMs", "/ materialised"),
    *("extra MiB", "of logits", "loss", "error of d_hidden", "error of d_weight"),
)
PROVIDERS = (
    *(floors.GEMMS, floors.FROZEN_GEMMS, materialised.NLL, materialised.COMPILED_NLL),
    *own.STRATEGIES,
    *peers.ON_GPU,
)

#: The most valuable first: the one that the targets are about, its random twin, then every shape once.
DATA: tuple[Data, ...] = ("peaked", "random")
_SHAPES = [(n, head, data) for data in DATA for n in TOKENS for head in HEADS]
_MOST_VALUABLE_FIRST = dict.fromkeys([*((TOKENS[0], HEADS[0], data) for data in DATA), *_SHAPES])
PROBLEMS = tuple(Problem(n, *head, dtype=torch.bfloat16, data=data) for n, head, data in _MOST_VALUABLE_FIRST)
MAIN = PROBLEMS[0]

_STEP, _FROZEN, _TAIL = "cuda, single_pass", "cuda, frozen head", "cuda, tail_corrected"
_BEATEN = (
    *(materialised.NLL, materialised.COMPILED_NLL, peers.LIGER_FUSED, peers.LIGER_FUSED_FLOAT32, peers.LIGER),
    *(peers.CCE_KERNELS, peers.CCE_UNFILTERED, peers.TRL, peers.QUACK),
)
MAIN_TARGETS = (
    Target(_STEP, "seconds", floors.GEMMS.name, 1.10),
    *(Target(_STEP, "seconds", provider.name, 1.0, "<") for provider in _BEATEN),
    Target(_FROZEN, "seconds", floors.FROZEN_GEMMS.name, 1.10),
    Target(_STEP, "memory", HEAD_GRADIENT, 2.0),
    Target(_FROZEN, "memory", BUDGET, 1.0),
    Target(_TAIL, "seconds", floors.GEMMS.name, 0.6),
    Target(_TAIL, "error", _STEP, 2.0),
    Target("triton, single_pass", "seconds", floors.GEMMS.name, 1.15),
    Target("triton, recompute", "forward", floors.GEMMS.name, 1.25),
    *(Target(f"{backend}, recompute", "seconds", floors.GEMMS.name, 1.6) for backend in ("cuda", "triton")),
    *(Target(f"{backend}, recompute", "memory", HALF_LOGITS, 0.01) for backend in ("cuda", "triton")),
)
TOKENS_TARGETS = tuple(Target(f"linear_logprobs, N {n}", "forward", PRODUCT, 1.10) for n in (8192, 512))
ROWS_TARGETS = tuple(Target(f"cuda, {what}", "bandwidth", COPY, 0.9, ">=") for what in ("statistics", "gradient"))


def _cell(problem: Problem) -> Part:
    name = f"n{problem.tokens}-h{problem.hidden}-v{problem.vocabulary}-{problem.data}"
    targets = MAIN_TARGETS if problem is MAIN else ()
    return Part(name, problem, PROVIDERS, targets, METHOD, COLUMNS)


CELLS = tuple(_cell(problem) for problem in PROBLEMS)
_KERNEL_TARGETS = {kernels.ROWS: ROWS_TARGETS, kernels.TOKENS: TOKENS_TARGETS}
KERNEL_PARTS = tuple(KernelPart(name, MAIN, targets=_KERNEL_TARGETS.get(name, ())) for name in kernels.KERNELS)
#: Everything that the worker measures, by name.
MEASURED: dict[str, Part] = {part.name: part for part in (*KERNEL_PARTS, *CELLS)}

#: The parts that run other programs, and their headings.
TESTS, PROFILES, SANITIZER = "tests", "profiles", "sanitizer"
HEADINGS = {TESTS: "Tests on the device", PROFILES: "Nsight Compute", SANITIZER: "compute-sanitizer"}
PARTS = (
    *(kernels.FORWARD, kernels.ROWS, TESTS, CELLS[0].name, kernels.TOKENS, kernels.CHUNKS),
    *(kernels.CONFIGURATIONS, PROFILES, kernels.PRODUCTS_OF_CHUNKS, SANITIZER, kernels.FLOAT16),
    *(cell.name for cell in CELLS[1:]),
)
#: In a tiny run: the parts, and the quickest of the tests.
TINY_PARTS = PARTS[: -len(CELLS) + 1]
TINY_TESTS = "test_same_bits_twice"
#: What a build may take of all the time, and seconds of the tests, by default.
BUILD_SHARE, TESTS_SECONDS = 0.3, 240.0


def needs(name: str) -> float:
    """Seconds that a part must have left to be begun. Where it has not, a smaller one may."""
    return 60.0 if name in HEADINGS or MEASURED[name].providers else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Tables

HOW_TO_READ = (
    "Medians of the device's own time, the providers in turns, the L2 cache overwritten before each. Forward is "
    "without gradients; a step is forward and backward, the column before it the backward alone (a single pass does "
    "its work in the forward). Ratios are medians over rounds of the ratio within a round, a frozen head's to the "
    "products of a frozen head. Extra memory is the peak of a step beyond the inputs and one copy of the gradients and"
    " of their float32 accumulators (a provider without such accumulators may show less than nothing), also as a share"
    " of the float32 logits. Errors are relative, against float64 on 256 tokens. Of a kernel or call, the floor is "
    "cuBLAS's products as large, or a copy (then the ratio is for each byte), in the same turns; right is what is no "
    "further from float64, in the first and last rows, than rounding may bring it."
)


def tables(results: Json) -> str:
    """The whole report; what was not measured is left out."""
    parts = results["parts"]
    targets = targets_table([(name, MEASURED[name].targets) for name in PARTS if name in MEASURED], parts)
    head = [HOW_TO_READ, _build_text(results["build"]), "## Targets", targets]
    sections = [part_section(name, parts[name]) for name in PARTS if name in parts]
    return markdown(heading("Measured on a GPU", parts), [*head, *sections])


def part_section(name: str, result: Json) -> str:
    """One part: when and where it was measured, and its results."""
    texts = {TESTS: device_tests.text, PROFILES: tools.profiles_text, SANITIZER: tools.sanitizer_text}
    if name in texts:
        return "\n\n".join([f"## {HEADINGS[name]}", about(result), texts[name](result)])
    return section(MEASURED[name], result)


def _build_text(result: Json) -> str:
    """What the last run built, and what its parts left out."""
    what = result["library"] or result["failure"].splitlines()[0]
    return " ".join(
        [f"CUDA library: {what}.", *(note.removeprefix("-- logitless: ") + "." for note in result["notes"])]
    )


# ---------------------------------------------------------------------------------------------------------------------
# The report


class GpuReport(Report):
    """The CUDA library, then parts by a worker, the tests and the tools.

    Args:
        carried: what a bundle brought; None: there was none.
        providers: of every cell.
    """

    RESERVE = 20.0

    def __init__(
        self,
        folder: Path | None,
        about: Json,
        *,
        end: float,
        tiny: bool,
        tests_seconds: float = TESTS_SECONDS,
        earlier: Path | None = None,
        carried: bundle.Unpacked | None = None,
        providers: tuple[Provider, ...] = PROVIDERS,
    ) -> None:
        super().__init__("gpu", folder, about, end=end, tiny=tiny, tables=tables, text=part_section, earlier=earlier)
        self.results.setdefault("build", None)
        self.tests_seconds, self.carried, self.providers = tests_seconds, carried, providers
        names = frozenset(provider.name for provider in providers if provider.role == "peer")
        self.worker = Worker(plain=tiny, peers=names)

    def run(self, names: Sequence[str]) -> None:
        """The library, then the parts in order; says on standard error what there was no time for."""
        try:
            self._library()
            self.measure(names, needs)
        finally:
            self.worker.stop()

    def _library(self) -> None:
        """Takes the carried CUDA library if it runs here, else builds one."""
        nothing: Json = {"library": None, "missing": [], "notes": [], "failure": "a tiny run builds nothing"}
        self.results["build"] = self._carried() or (
            nothing if self.tiny else build.build(BUILD_SHARE * (self.end - time.monotonic()))
        )
        if self.carried is not None and self.carried.library is None:
            self.results["build"]["notes"] += self.carried.notes
        if self.results["build"]["failure"]:
            print(f"CUDA library: {self.results['build']['failure']}", file=sys.stderr)
        self.save()

    def _carried(self) -> Json | None:
        if self.carried is None or self.carried.library is None:
            return None
        refusal = None if self.tiny else internals.unsupported("cuda", torch.device("cuda", 0), torch.bfloat16)
        if refusal is not None:
            self.carried = bundle.Unpacked(self.carried.commit, None, [f"the bundle's library was not used: {refusal}"])
            return None
        return {"library": build.NAME, "missing": [], "notes": self.carried.notes, "failure": None}

    def measure_part(self, name: str) -> Json:
        if name in MEASURED:
            part = MEASURED[name].tiny() if self.tiny else MEASURED[name]
            part = replace(part, providers=self.providers) if part.providers else part
            result = self.worker.measure(part, self.deadline, self.end, gpu=not self.tiny)
            return {**result, "fatal": dict(self.worker.fatal)}
        self.worker.stop()  # it holds most of the device's memory
        with tempfile.TemporaryDirectory() as scratch:
            if name == TESTS:
                return self.tests(Path(scratch))
            folder = self.folder or Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            if name == PROFILES:
                return tools.profile(self.results["parts"], folder, self.deadline, self._unfinished(PROFILES))
            return tools.sanitize(folder, self.deadline, self._unfinished(SANITIZER))

    def spare(self) -> None:
        """Does not call again what hung or ended a process in an earlier run, which would take as long once more."""
        for part in filter(None, map(self.earlier, self.results["parts"])):
            self.worker.fatal |= part.get("fatal", {})

    def _unfinished(self, name: str) -> Json | None:
        """Results so far of a part that can go on."""
        return None if self.has(name) else self.earlier(name)

    def tests(self, scratch: Path) -> Json:
        """Runs the tests. Suites of the CUDA library are left out if there is none: each would try to build it."""
        seconds = min(self.tests_seconds, self.deadline - time.monotonic())
        device, select = ("cpu", TINY_TESTS) if self.tiny else ("cuda", "")
        there = self.tiny or self.results["build"]["library"] is not None
        suites = [suite for suite in device_tests.SUITES if there or suite not in device_tests.CUDA_SUITES]
        before = self._unfinished(TESTS)
        result = device_tests.run_tests(device, seconds, scratch, suites=suites, select=select, before=before)
        if self.folder is not None and (scratch / "tests.xml").exists():
            shutil.copyfile(scratch / "tests.xml", self.folder / "tests.xml")
        return {**result, "left_out": None if there else "The CUDA library's own suites were left out"}


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.monotonic()
    parser = options("gpu", __doc__, PARTS, minutes=9)
    parser.add_argument("--dry", action="store_true", dest="tiny", help="the same as --tiny")
    parser.add_argument("--tests-seconds", type=float, default=TESTS_SECONDS, help="of the minutes (default 240)")
    parser.add_argument("--bundle", type=Path, metavar="FOLDER", help="what `python -m benchmarks bundle` made")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="earlier gpu.json (default: the bundle's, if any)")
    parser.add_argument("--commit", help="to write down where the tree is a copy without .git (default: the bundle's)")
    given = parser.parse_args(arguments)
    if given.tables is not None:
        return tables_again(given.tables, tables)
    if not given.tiny and not torch.cuda.is_available():
        sys.exit(f"gpu: torch {torch.__version__} finds no GPU here; --tiny runs the same steps, tiny, on the CPU")
    try:
        carried = given.bundle and bundle.unpack(given.bundle)
    except bundle.MissingPiece as reason:
        sys.exit(f"gpu: {reason}")
    about = describe(gpu=not given.tiny, tiny=given.tiny, commit=given.commit or (carried and carried.commit))
    report = GpuReport(
        output(given, about),
        about,
        end=start + 60 * given.minutes,
        tiny=given.tiny,
        tests_seconds=given.tests_seconds,
        earlier=given.resume or (given.bundle and given.bundle / "gpu.json"),
        carried=carried,
    )
    if not given.only:
        report.spare()
    report.run(given.only or [name for name in (TINY_PARTS if given.tiny else PARTS) if not report.has(name)])
    print(targets_table([(part.name, part.targets) for part in MEASURED.values()], report.results["parts"]))
    return None
