"""What a run reports: metrics.jsonl, TensorBoard, and progress on the terminal.

metrics.jsonl holds one JSON object per line with the keys that users of Transformers know: `step`, `epoch`, `loss`,
`grad_norm`, `learning_rate`, `num_tokens`, `rewards/...`, `eval_loss`; and `tokens_per_second` and `peak_memory`
(bytes: the GPU's allocator, or the process's resident set on a CPU).
"""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import torch

from logitless.training import files
from logitless.training.errors import InputError

FILE = "metrics.jsonl"
Record = dict[str, Any]


def peak_memory(device: torch.device) -> int:
    """Highest use in bytes since `reset_peak_memory`: allocated on the GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new measurement, so that loading the model does not count; where the system has no reset, it does."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


class Reporter:
    """Writes the records of one run. `is_main` False makes every method do nothing."""

    def __init__(self, output_dir: Path, *, report_to: str, resumed_step: int, total_steps: int, is_main: bool) -> None:
        self._is_main = is_main
        if not is_main:
            return
        self._path = output_dir / FILE
        _keep_until(self._path, resumed_step)
        self._board = _tensorboard(output_dir, resumed_step) if report_to == "tensorboard" else None
        self._progress = Progress(resumed_step, total_steps)

    def say(self, line: str) -> None:
        """A line for the reader of the terminal."""
        if self._is_main:
            self._progress.say(line)

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        if self._is_main:
            self._progress.advance(step)

    def record(self, record: Record) -> None:
        """Writes a record everywhere."""
        if not self._is_main:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._progress.show(record)
        if self._board is not None:
            for key, value in record.items():
                if isinstance(value, int | float) and key != "step":
                    name = f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
                    self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Ends the progress bar and flushes what is buffered."""
        if self._is_main:
            self._progress.stop()
            if self._board is not None:
                self._board.close()


def read_metrics(output_dir: Path) -> list[Record]:
    """The records of a run, in order; a line that a killed process left half-written at the end is skipped."""
    path = output_dir / FILE
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def _keep_until(path: Path, step: int) -> None:
    """Drops the records behind the checkpoint that a run resumes from: their steps are taken again."""
    kept = [record for record in read_metrics(path.parent) if record["step"] <= step and step > 0]
    files.write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def _tensorboard(output_dir: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("report_to=tensorboard needs the tensorboard package (pip install tensorboard)") from error
    return SummaryWriter(output_dir / "runs", purge_step=step + 1)


class Progress:
    """A rich progress bar on a terminal, one plain line per record elsewhere."""

    def __init__(self, step: int, total: int) -> None:
        self._bar = self._task = None
        try:
            from rich import progress
            from rich.console import Console
        except ImportError:
            return
        console = Console()
        if not console.is_terminal:
            return
        self._bar = progress.Progress(
            progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[status]}"),
            progress.TextColumn("ETA"),
            progress.TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("train", total=total, completed=step, status="")
        self._bar.start()

    def advance(self, step: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)

    def say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, flush=True)

    def show(self, record: Record) -> None:
        if self._bar is None or self._task is None:
            print(plain(record), flush=True)
        elif "loss" in record:
            self._bar.update(self._task, status=_status(record))
        else:
            self.say(plain(record))

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def plain(record: Record) -> str:
    """A record on one line, numbers shortened."""
    return "  ".join(f"{key} {_short(key, value)}" for key, value in record.items())


def _status(record: Record) -> str:
    return (
        f"loss {record['loss']:.4f}  {record['tokens_per_second']:.0f} tok/s  "
        f"peak {_short('peak_memory', record['peak_memory'])}"
    )


def _short(key: str, value: Any) -> str:
    if key == "peak_memory":
        return f"{value / 2**20:.0f} MiB"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
