"""Files as `python -m logitless bench` writes them, made up: no number in them was measured."""

from __future__ import annotations

import json
import random
from typing import Any

Json = dict[str, Any]
MIB = 2**20
ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef",
    "cpu": "AMD EPYC",
    "units": ["AVX2", "AVX-512", "bf16"],
    "capability": "AVX512",
    "bf16_units": True,
    "threads": 2,
    "load": 0.5,
    "python": "3.11.0",
    "versions": {"torch": "2.13.0", "logitless": "0.1.0", "quack-kernels": None},
    "cut_cross_entropy": None,
    "tiny": False,
    "device": "AMD EPYC",
}
GPU = {
    **ENVIRONMENT,
    "device": "NVIDIA H100 80GB HBM3",
    "driver": "550.1",
    "cuda": "12.8",
    "capability": "9.0",
    "memory_bytes": 80 * 2**30,
    "multiprocessors": 132,
    "l2_bytes": 50 * MIB,
}
REQUEST = {
    "loss": "nll",
    "dtype": "float32",
    "tokens": 4096,
    "hidden": 576,
    "vocabulary": 49152,
    "model": None,
    "against": ["liger", "cce"],
    "quick": False,
}
ABSENT = "not installed: no module named 'cut_cross_entropy'"
WRONG = "wrong: d_weight is 3.1e-01 from float64, at most 1e-04 was allowed"
CRASHED = "RuntimeError: no such device"
#: Providers with their role, their time over that of the products alone, and their memory over that of the logits.
PROVIDERS = (
    ("materialised", "materialised", 1.2, 2.8),
    ("logitless", "logitless", 0.65, 0.04),
    ("logitless, recompute", "logitless", 0.83, 0.04),
    ("Liger scaled cross-entropy", "peer", 2.3, 0.2),
)
FAILING = (("Cut Cross-Entropy, compiled", ABSENT), ("torch F.linear_cross_entropy", WRONG), ("quack", CRASHED))


def row(provider: str, role: str, seconds: list[float], memory: int | None = None, **more: Any) -> Json:
    """A row of times; a field that is not given is as the row of a provider that was not measured has it."""
    error = {"loss": 1e-7, "d_hidden": 4e-7, "d_weight": 2e-7} if seconds and role != "floor" else None
    sizes = None if memory is None else {"allocated": memory, "resident": None}
    plain: Json = dict.fromkeys(("first_call_seconds", "loss", "work", "wrong", "bytes", "floor_bytes", "failure"))
    lists = {"forward": [], "backward": [x / 2 for x in seconds], "floor": []}
    own = {"provider": provider, "role": role, "frozen": False, "seconds": seconds, "error": error, "memory": sizes}
    return {**own, **lists, **plain, **more}


def problem(tokens: int, vocabulary: int = 49152) -> Json:
    return {
        "problem": f"N {tokens} H 576 V {vocabulary} float32",
        "logits_bytes": 4 * tokens * vocabulary,
        "head_gradient_bytes": 4 * vocabulary * 576,
    }


def step_rows(floor_seconds: float, logits: int, rounds: int, noise: float, draw: random.Random) -> list[Json]:
    """Rows of a step: rounds differ by a fifth from one to the next, and within a round by the noise."""
    turns = [floor_seconds * draw.uniform(0.9, 1.1) for _ in range(rounds)]

    def times(scale: float) -> list[float]:
        return [scale * turn * (1 + draw.gauss(0, noise)) for turn in turns]

    measured = [row(name, role, times(own), int(memory * logits)) for name, role, own, memory in PROVIDERS]
    floors = [row("GEMMs alone", "floor", times(1)), row("copy", "floor", times(0.1), bytes=2 * logits)]
    return [*floors, *measured]


def step(rounds: int = 5, noise: float = 0.01, seed: int = 0, tokens: int = 4096) -> Json:
    own = problem(tokens)
    draw = random.Random(seed)
    rows = step_rows(tokens / 1170, own["logits_bytes"], rounds, noise, draw)
    return {"kind": "step", "loss": "nll", "environment": ENVIRONMENT, **own, "rows": rows, "complete": True}


def apart(results: Json) -> Json:
    """A copy of which no two places are one object."""
    return json.loads(json.dumps(results))


def with_failures(part: Json) -> Json:
    """The part with an absent, a wrong, a crashed and an unreached provider more."""
    failing = [row(name, "peer", [], failure=failure) for name, failure in FAILING]
    return {**part, "rows": [*part["rows"], *failing, row("TRL ChunkedLogProbFunction", "peer", [])]}


def curve(rounds: int = 3, axis: str = "vocabulary") -> Json:
    """Time and memory that grow with the axis; the materialised loss does not fit at the last value."""
    points = []
    for place, value in enumerate((16384, 32768, 65536, 131072)):
        own = problem(1024, value) if axis == "vocabulary" else problem(value)
        rows = step_rows(value / 80000, own["logits_bytes"], rounds, 0.01, random.Random(place))
        if place == 3:
            rows = [row(*x, [], failure="out of memory") if x[0] == "materialised" else y for x, y in named(rows)]
        points.append({"value": value, **own, "rows": rows, "complete": True})
    return {
        "kind": "curve",
        "axis": axis,
        "loss": "nll",
        "environment": ENVIRONMENT,
        "points": points,
        "complete": True,
    }


def named(rows: list[Json]) -> list[tuple[tuple[str, str], Json]]:
    return [((one["provider"], one["role"]), one) for one in rows]


def limit_row(provider: str, role: str, largest: int | None, ended_by: str, failure: str | None = None) -> Json:
    steps = [largest // 2, largest, 2 * largest] if largest else []
    tried = [
        {
            "value": value,
            "bytes": 1000 * value,
            "seconds": value / 1000,
            "fits": value <= (largest or 0),
            "failure": None if value <= (largest or 0) else "out of memory",
        }
        for value in steps
    ]
    own = {"provider": provider, "role": role, "largest": largest, "bytes": largest and 60000 * largest}
    return {**own, "ended_by": ended_by, "tried": tried, "failure": failure}


def limit(unit: str = "tokens") -> Json:
    rows = [
        limit_row("materialised", "materialised", 4096, "memory"),
        limit_row("logitless", "logitless", 262144, "cap"),
        limit_row("Liger scaled cross-entropy", "peer", 65536, "memory"),
        limit_row("Cut Cross-Entropy, compiled", "peer", None, "failure", ABSENT),
    ]
    length = {"length": 512} if unit == "pairs" else {}
    return {
        "kind": "limit",
        "unit": unit,
        **length,
        "loss": "nll",
        "environment": ENVIRONMENT,
        "problem": problem(4096)["problem"],
        "memory_bytes": 2048 * MIB,
        "rows": rows,
        "complete": True,
    }


def model(rounds: int = 5) -> Json:
    draw = random.Random(7)
    rows = [
        row(name, role, [(3 + own) * draw.uniform(0.98, 1.02) for _ in range(rounds)], int((900 + 300 * memory) * MIB))
        for name, role, own, memory in PROVIDERS
    ]
    return {
        "kind": "model",
        "model": "SmolLM2-135M",
        "parameters": 134_500_000,
        "loss": "nll",
        "environment": ENVIRONMENT,
        "sequences": 4,
        "length": 512,
        "tokens": 2048,
        **problem(2048),
        "rows": rows,
        "complete": True,
    }


def whole(rounds: int = 5) -> Json:
    """A file with a part of each kind."""
    parts = {
        "step": with_failures(step(rounds)),
        "by vocabulary": curve(),
        "most tokens": limit(),
        "model": model(rounds),
    }
    return apart({"format": "logitless-bench/1", "request": REQUEST, "parts": parts})


def only(part: Json) -> Json:
    """A file with one part, named step."""
    return apart({"format": "logitless-bench/1", "request": REQUEST, "parts": {"step": part}})


def on_gpu(results: Json) -> Json:
    """A copy of the file, as if it were of a GPU."""
    parts = {name: {**part, "environment": GPU} for name, part in results["parts"].items()}
    return apart({**results, "parts": parts})
