"""A process of its own for judgements that a model's text can bring to a halt, such as the value of 9**9**9.

A thread cannot be stopped. A signal reaches only the main thread, and there only between two steps of Python. The end
of a process is certain. One helper of a kind serves this process; after its end the next question starts another.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from logitless.rewards.judge import READY

_PROGRAM = Path(__file__).with_name("judge.py")


class UnansweredError(RuntimeError):
    """A judgement took more than its time or memory, or its library crashed."""


class _Helper:
    """A running helper process of a kind that judge.py knows."""

    def __init__(self, kind: str) -> None:
        path = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        if self._replies.readline().strip() != READY:
            self.end()
            raise RuntimeError(f"the helper process of {kind!r} rewards did not start; its message is above")

    def ask(self, request: str) -> str:
        """The line that answers a line; an empty one where the process ended over it."""
        try:
            print(request, file=self._requests, flush=True)
            return self._replies.readline()
        except BrokenPipeError:
            return ""

    def end(self) -> None:
        """Ends the process, if it has not ended already."""
        self._process.kill()
        self._process.wait()
        self._replies.close()
        with contextlib.suppress(BrokenPipeError):  # of a request that it did not take
            self._requests.close()


_LOCK = threading.Lock()
_HELPERS: dict[str, _Helper] = {}


def ask(kind: str, time_limit: float, **arguments: Any) -> Any:
    """What a judge of judge.py answers.

    Args:
        kind: the judge's name.
        time_limit: seconds of processor time.
        arguments: what JSON can say.

    Raises:
        UnansweredError: the judgement took more time or memory than it may, or its library crashed.
        ValueError: the judge refuses the arguments; or the time limit is not positive.
    """
    if not time_limit > 0:
        raise ValueError(f"time_limit: expected seconds above 0, got {time_limit}")
    request = json.dumps({"time_limit": time_limit, "arguments": arguments})
    with _LOCK:
        if kind not in _HELPERS:
            _HELPERS[kind] = _Helper(kind)
        reply = ""
        try:
            reply = _HELPERS[kind].ask(request)
        finally:
            if not reply:  # it ended, or the caller was interrupted before the answer came
                _HELPERS.pop(kind).end()
    if not reply:
        raise UnansweredError(f"{kind}: no answer within {time_limit} seconds of processor time: {request[:200]}")
    answer = json.loads(reply)
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["value"]


def require_package(module: str, package: str, reward: str) -> None:
    """Raises ImportError where the optional package of a reward is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{reward} needs {package}: pip install 'logitless[rewards]'")


@atexit.register
def _end_helpers() -> None:
    while _HELPERS:
        _HELPERS.popitem()[1].end()


def _forget_helpers() -> None:
    """The helpers are the parent's, whose questions the child must not answer."""
    global _LOCK
    _LOCK = threading.Lock()
    _HELPERS.clear()


os.register_at_fork(after_in_child=_forget_helpers)
