"""A session: every part of a request, measured in a worker process, and the files that tell of it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from logitless.training.errors import InputError
from logitless.training.files import write_text

from . import memory
from .curves import Curve, Known
from .environment import describe
from .limits import Limit
from .machine import available_memory
from .measure import Method, Part
from .model_step import ModelPart
from .page import html_page
from .progress import Progress
from .provider import ROLES
from .report import Report
from .request import PARTS, Request
from .results import FORMAT
from .sections import file_markdown, section
from .targets import Json
from .worker import PATIENCE, Worker

#: What a step's checks and rounds may take of its share. The rest is for memory, each in a process of its own.
ROUNDS_SHARE = 0.75
#: Seconds after the end in which a step that has begun may end.
GRACE = 60.0
#: Seconds between two savings of what a part has so far.
SAVING = 5.0
#: The share of the free memory that a curve may fill.
FILLED = 0.7
#: Tokens of the curves along the vocabulary and the hidden size, at most.
FEW_TOKENS = {"cpu": 512, "cuda": 4096}
#: The child compiles in its own process: a pool of others would outlive one that is ended.
VARIABLES = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
#: The sequence that the search for the longest begins with.
FIRST_LENGTH = 128
#: How the names of the model's parts begin; its loss follows.
MODEL = "model: "
METHOD = Method(may_fail=ROLES, whole=True)


class Session(Report):
    """The file of a request's results, brought up to date part by part.

    Args:
        folder: for bench.json, bench.md and bench.html.
        start: when the command began, on `time.monotonic`'s clock.
        patience: seconds without a word after which a competitor counts as hung.

    Raises:
        InputError: the folder has results of another request.
    """

    def __init__(
        self, request: Request, folder: Path, progress: Progress, *, start: float, patience: float = PATIENCE
    ) -> None:
        super().__init__(
            "bench",
            folder,
            describe(gpu=request.gpu),
            end=start + 60 * request.minutes,
            tiny=False,
            tables=file_markdown,
            text=section,
        )
        self.request, self.progress = request, progress
        self.part, self.saved = "", 0.0
        self.names = [name for part in request.parts for name in _names(part, request)]
        if found := self.results.get("request"):
            request = self.request = _continued(request, found, folder)
        self.results = {"format": FORMAT, "request": request.as_json(), "parts": self.results["parts"]}
        peers = frozenset(p.name for p in request.competitors() if p.role == "peer")
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "bench.log"
        self.worker = Worker(peers=peers, patience=patience, variables=VARIABLES, heard=self._hear, log=self.log)

    def run(self) -> None:
        """Measures what is not complete yet, or everything where all is; what an interruption leaves is kept."""
        names = [name for name in self.names if not self.has(name)] or self.names
        try:
            with self.progress:
                self.measure(names)
        finally:
            self.worker.stop()
            self.save()
            self._write_page()

    def measure_part(self, name: str) -> Json:
        self.part = name
        self.about = describe(gpu=self.request.gpu)
        end = self._share(name)
        if name == "step":
            return self._step(end)
        if name.startswith(MODEL):
            return self._model(name.removeprefix(MODEL), end)
        if name in ("longest", "pairs"):
            return self._limit(name, end)
        return self._curve(name, end)

    def _share(self, name: str) -> float:
        """When the part should end: the time that is left is for it and for those that follow."""
        following = self.names[self.names.index(name) :]
        now = time.monotonic()
        share = max(0.0, self.end - now) * self._weight(name) / sum(map(self._weight, following))
        self.progress.begin(name, now + share, self.end)
        return now + share

    def _weight(self, name: str) -> float:
        return PARTS["model"] / len(self.request.losses) if name.startswith(MODEL) else PARTS[name]

    def _step(self, end: float) -> Json:
        request, now = self.request, time.monotonic()
        providers = (*request.floors(), *request.competitors())
        part = Part("step", request.problem(), providers, method=replace(METHOD, rounds=request.rounds))
        deadline = now + ROUNDS_SHARE * (end - now)
        result = self.worker.measure(part, deadline, self.end + GRACE, gpu=request.gpu)
        for row in () if request.gpu else result["rows"]:
            if row["role"] != "floor" and row["failure"] is None and time.monotonic() < end:
                self.progress.show(f"memory of {row['provider']}", None)
                self._memory(part, row)
        return {"kind": "step", "loss": request.loss, **part.problem.about(), **result}

    def _memory(self, part: Part, row: Json) -> None:
        """Takes memory in a process of its own, which shows what libraries allocate beside tensors."""
        try:
            row["memory"] = memory.in_process(part, part.provider(row["provider"]), self.log)
        except RuntimeError as reason:
            self.progress.note(f"memory of {row['provider']} in a process of its own: {reason}")

    def _curve(self, axis: str, end: float) -> Json:
        request = self.request
        few = {} if axis == "tokens" else {"tokens": min(FEW_TOKENS[request.device], request.tokens)}
        curve = Curve(
            axis,
            request.loss,
            lambda value: request.problem(**few | {axis: value}),
            (*request.floors()[:1], *request.competitors()),
            int(FILLED * available_memory(gpu=request.gpu)),
        )
        known = Known(request.problem(), self._step_rows())
        return curve.measure(self.worker, end, gpu=request.gpu, known=known, keep=self._keep_so_far)

    def _limit(self, name: str, end: float) -> Json:
        """The longest sequence of the request's loss, or the most pairs of DPO."""
        request, loss = self.request, "dpo" if name == "pairs" else self.request.loss
        problem, first = (request.pairs, 1) if name == "pairs" else (request.sequence, FIRST_LENGTH)
        limit = Limit(name, loss, problem, request.competitors(loss), request.memory, first)
        rows = self._step_rows() if loss == request.loss else []
        skip = {row["provider"]: row["failure"] for row in rows if row["failure"]}
        return limit.measure(self.worker, end, gpu=request.gpu, skip=skip, keep=self._keep_so_far)

    def _model(self, loss: str, end: float) -> Json:
        """The whole step of the request's model with one loss."""
        request, problem = self.request, self.request.model_problem(loss)
        part = ModelPart(
            self.part,
            problem,
            request.competitors(loss),
            method=replace(METHOD, rounds=request.rounds),
            model=request.model or "",
            loss=loss,
            length=request.length,
            checkpointing=request.checkpointing,
        )
        part.fetch()
        measured = self.worker.measure(part, end, self.end + GRACE, gpu=request.gpu)
        return {**part.about(), "parameters": None, **measured}

    def _step_rows(self) -> list[Json]:
        """What the step says of everyone: who was absent, wrong or failed, and how long it took."""
        return self.results["parts"].get("step", {"rows": []})["rows"]

    def _hear(self, doing: str, so_far: Json) -> None:
        self.progress.show(doing, so_far.get("seconds_left"))
        if self.part == "step" and so_far.get("rows"):
            self._keep_so_far({"kind": "step", "loss": self.request.loss, **so_far})
        elif self.part.startswith(MODEL) and so_far.get("rows"):
            self._keep_so_far(so_far)  # which names its kind and its loss

    def _keep_so_far(self, result: Json) -> None:
        """Keeps a part that is not complete, so that an interrupted command loses seconds."""
        self.results["parts"][self.part] = {**result, "complete": False, "environment": self.about}
        if time.monotonic() > self.saved + SAVING:
            self.save()
            self.saved = time.monotonic()

    def _write_page(self) -> None:
        assert self.path is not None
        write_text(self.path.with_suffix(".html"), html_page({"this run": self.results}))


def _continued(request: Request, found: Json, folder: Path) -> Request:
    """The request, with the memory of the one that was found unless it was given one.

    Raises:
        InputError: another field is different.
    """
    if not request.memory_given:  # by default it is a share of what is free, which is never twice the same
        request = replace(request, memory=found.get("memory", request.memory))
    different = [name for name, x in request.as_json().items() if found.get(name) != x]
    if different:
        raise InputError(
            f"output: {folder} has results of a request with another {', '.join(different)}; name another folder"
        )
    return request


def _names(part: str, request: Request) -> list[str]:
    """The names that a part has in the file: one for each loss of the model's step."""
    return [f"{MODEL}{loss}" for loss in request.losses] if part == "model" else [part]
