"""Nsight Compute on the kernels that are furthest from their floor, and compute-sanitizer on all of them, small.

Both look at `once`. Where a tool is missing, or may not read the device, that is the part's result.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from logitless.bench.targets import Json, against_floor

from .commands import find, run
from .kernels import BY_CHUNKS, FORWARD, OWN, ROWS

#: Kernels that are profiled, and the parts they are chosen from.
PROFILED, CHOSEN_FROM = 3, (FORWARD, ROWS)
#: Seconds for one kernel under ncu, and for one of the sanitizer's tools: the first waits for Triton's compiler.
PROFILE_SECONDS, SANITIZER_SECONDS = 110.0, 150.0
OPTIONS = "--clock-control none --profile-from-start off --target-processes all --force-overwrite"
SECTIONS = (
    *("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "SchedulerStats", "Occupancy", "LaunchStats"),
    "InstructionStats",
)
#: Lines of ncu's text that the report repeats.
TOLD = (
    *("Duration", "Compute (SM) Throughput", "Memory Throughput", "DRAM Throughput", "L2 Hit Rate"),
    *("Registers Per Thread", "Achieved Occupancy", "No Eligible", "Issued Warp"),
)
SUMMARIES = ("==ERROR==", "========= ERROR SUMMARY", "========= RACECHECK SUMMARY")
TOOLS = ("memcheck", "racecheck", "synccheck")
#: An error ends the kernel that made it; the others are looked at too.
SANITIZER_OPTIONS = "--target-processes all --print-limit 5 --destroy-on-device-error kernel"
#: Each tensor has memory of its own. In the segments that PyTorch keeps, an access beyond one would be in another.
NO_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
KERNELS = (sys.executable, "-m", "benchmarks.gpu.once")


def worst(parts: Json, count: int = PROFILED) -> list[tuple[str, str, float]]:
    """Part, name and ratio of our own kernels whose time is largest against their floor's."""
    result = []
    for part in CHOSEN_FROM:
        for row in parts.get(part, {}).get("rows", []):
            ratio = against_floor(row)
            if ratio is not None and row["provider"].startswith(OWN) and row["provider"] != BY_CHUNKS:
                result.append((part, row["provider"], ratio))
    return sorted(result, key=lambda x: -x[2])[:count]


def profile(parts: Json, folder: Path, end: float, before: Json | None = None) -> Json:
    """Writes `profile-1.ncu-rep` and on, and their text to `profiles.txt`; `complete` if each was tried.

    `before`: what an incomplete part result, which this one goes on with.
    """
    ncu, chosen = find("ncu"), worst(parts)
    if ncu is None:
        return {"kernels": [], "complete": True, "failure": "ncu is not in PATH"}
    if not chosen:
        return {
            "kernels": [],
            "complete": False,
            "failure": f"{' and '.join(CHOSEN_FROM)} have no kernel to choose yet",
        }
    kernels = list(before["kernels"]) if before else []
    text_file = _text_file(folder / "profiles.txt", before)
    for part, name, ratio in chosen[len(kernels) :]:
        if end - time.monotonic() < PROFILE_SECONDS / 2:
            break
        report = folder / f"profile-{len(kernels) + 1}.ncu-rep"
        text, failure = _profile_one(ncu, part, name, report, end)
        told = [line.strip() for line in text.splitlines() if line.strip().startswith(TOLD)]
        kernels.append({"kernel": f"{part}: {name}", "ratio": ratio, "failure": failure, "summary": told})
        _append(text_file, f"{report.name}: {part}: {name}, {ratio:.2f} of its floor\n\n{failure or ''}\n{text}")
    return {"kernels": kernels, "complete": len(kernels) >= len(chosen), "failure": None}


def _profile_one(ncu: str, part: str, name: str, report: Path, end: float) -> tuple[str, str | None]:
    """ncu's text, and why there is none that can be used."""
    options = [*OPTIONS.split(), *(x for section in SECTIONS for x in ("--section", section))]
    seconds = min(PROFILE_SECONDS, end - time.monotonic())
    status, output = run([ncu, *options, "--export", str(report), *KERNELS, part, name], seconds)
    if status != 0 or not report.exists():
        return output[-4000:], f"ncu ended with {status}: {_reason(output)}"
    _, text = run([ncu, "--import", str(report), "--page", "details"], PROFILE_SECONDS)
    return text, None


def sanitize(folder: Path, end: float, before: Json | None = None) -> Json:
    """Every tool over every kernel, small and ragged; the text in `sanitizer.txt`. `before` as in `profile`."""
    sanitizer = find("compute-sanitizer")
    if sanitizer is None:
        return {"tools": [], "complete": True, "failure": "compute-sanitizer is not in PATH"}
    result = list(before["tools"]) if before else []
    text_file = _text_file(folder / "sanitizer.txt", before)
    for tool in TOOLS[len(result) :]:
        seconds = min(SANITIZER_SECONDS, end - time.monotonic())
        if seconds < SANITIZER_SECONDS / 2:
            break
        command = [sanitizer, "--tool", tool, *SANITIZER_OPTIONS.split(), *KERNELS, "--small"]
        status, output = run(command, seconds, NO_CACHE)
        result.append({"tool": tool, "status": status, "summary": _reason(output)})
        _append(text_file, f"{tool} ended with {status}\n\n{output[-200_000:]}")
    return {"tools": result, "complete": len(result) == len(TOOLS), "failure": None}


def _text_file(path: Path, before: Json | None) -> Path:
    """The file, without the text of an earlier run that this one does not go on with."""
    if before is None:
        path.unlink(missing_ok=True)
    return path


def _append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(f"{text}\n\n")


def _reason(output: str) -> str:
    """The last line that says how it went."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(SUMMARIES)]
    return next(reversed(telling or lines), "no output")[:300]


def profiles_text(result: Json) -> str:
    """What ncu told of each kernel, as Markdown."""
    lines = []
    for kernel in result["kernels"]:
        told = kernel["failure"] or "; ".join(" ".join(line.split()) for line in kernel["summary"])
        lines.append(f"- {kernel['kernel']}, {kernel['ratio']:.2f} of its floor: {told}")
    return "\n".join(lines)


def sanitizer_text(result: Json) -> str:
    """How each of the sanitizer's tools ended, as Markdown."""
    return "\n".join(f"- {x['tool']} ended with {x['status']}: {x['summary']}" for x in result["tools"])
