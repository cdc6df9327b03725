"""Kernels called once, for a profiler or a sanitizer to look at.

python -m benchmarks.gpu.once forward "triton, fused"    between a profiler's start and stop, after a first call
python -m benchmarks.gpu.once --small                    every kernel and strategy of ours, ragged and small
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch

from logitless.bench.machine import Machine, this_machine
from logitless.bench.problem import Problem
from logitless.bench.providers.own import STRATEGIES

from .. import internals
from ..suites.gpu import MAIN
from .kernels import CONFIGURATIONS, FORWARD, KERNELS, OWN, ROWS, Kernel

#: Ragged in every dimension, and seconds under a sanitizer; a chunk holds 64 tokens.
SMALL = Problem(300, 136, 1000, dtype=torch.bfloat16, chunk_bytes=64 * 4 * 1000, data="peaked")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=KERNELS)
    parser.add_argument("name", nargs="?")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args(arguments)
    there = torch.cuda.is_available()
    machine = this_machine(gpu=there)
    if given.small:
        return _everything(machine)
    problem = MAIN if there else MAIN.tiny()
    kernels = {kernel.name: kernel for kernel in KERNELS[given.part](problem.inputs(machine.device))}
    if given.name not in kernels:
        parser.error(f"name: expected one of {list(kernels)}, got {given.name!r}")
    _profiled(kernels[given.name], machine)


def _profiled(kernel: Kernel, machine: Machine) -> None:
    """`ncu --profile-from-start off` sees the second call alone."""
    kernel.once()
    arguments = kernel.prepare()
    machine.recover()
    with torch.cuda.profiler.profile() if torch.cuda.is_available() else nullcontext():
        kernel.run(*arguments)
        machine.recover()


def _everything(machine: Machine) -> None:
    inputs = SMALL.inputs(machine.device)
    for part in (FORWARD, ROWS, CONFIGURATIONS):
        for kernel in KERNELS[part](inputs):
            if part == CONFIGURATIONS or kernel.name.startswith(OWN):
                _run(f"{part}: {kernel.name}", kernel.failure, kernel.once)
    for provider in STRATEGIES:
        if provider.name.startswith(OWN):
            failure = internals.unsupported(provider.name.split(",")[0], machine.device, inputs.weight.dtype)
            _run(f"step: {provider.name}", failure, partial(provider.step, inputs))
    machine.recover()


def _run(name: str, failure: str | None, function: Callable[[], object]) -> None:
    print(f"{name}: {failure or 'runs'}", flush=True)
    if failure is None:
        function()


if __name__ == "__main__":
    main()
