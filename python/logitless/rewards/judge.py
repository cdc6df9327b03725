r"""The program of the helper process: a judgement for each line of JSON on its standard input.

    {"time_limit": seconds, "arguments": {...}}  ->  {"value": ...} or {"error": "..."}

A judgement that takes longer ends the process: the kernel's timer does it, whatever code is running then. Time is the
processor's, so that a busy machine turns no right answer into a wrong one. Nothing of this package is imported here,
because the process would then load PyTorch.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

#: Bytes that a judgement may take beside what the libraries hold.
MEMORY = 2 << 30
#: The first line of the output, once the libraries are loaded.
READY = "ready"
#: Entries of a reasoning-gym data set whose options name no size; each is made when it is asked for.
GYM_SIZE = 1_000_000
#: Tasks of reasoning-gym 0.1.25 whose questions depend on the order of Python's sets, or on the size.
UNREPEATABLE = frozenset(
    ("acre", "isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder")
)

#: Characters of mathematics, and what LaTeX writes for them.
_LATEX = {
    "\u2212": "-",
    "\u2013": "-",
    "\u00d7": r"\times ",
    "\u00f7": r"\div ",
    "\u00b7": r"\cdot ",
    "\u2044": "/",
    "\u03c0": r"\pi ",
    "\u221e": r"\infty ",
    "\u221a": r"\sqrt ",
    "\u2264": r"\le ",
    "\u2265": r"\ge ",
    "\u222a": r"\cup ",
    "\u00b2": "^2",
    "\u00b3": "^3",
    "\u00bd": r"\frac{1}{2}",
    "\u00bc": r"\frac{1}{4}",
}
#: A number and a word that says what it counts.
_NUMBER_OF = re.compile(
    r"([-+]?\.?\d[\d.,]*)\s*(?!percent|hundred|thousand|million|billion|trillion|dozen)[A-Za-z]{3,}"
)


def math_judge() -> Callable[..., bool | None]:
    """Whether an answer equals the right one in mathematics; None where the right one cannot be read."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()  # they say of each call that its own time limit is off
    normalization = NormalizationConfig(units=True, malformed_operators=True, nits=True, boxed="last")
    config = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=normalization)]

    def read(text: str) -> list[Any]:
        found: list[Any] = parse(rf"\boxed{{{as_latex(text)}}}", config, parsing_timeout=None)
        return found

    def equal(gold: str, answer: str) -> bool | None:
        right = read(gold)
        return bool(verify(right, read(answer), timeout_seconds=None)) if right else None

    equal("1", r"\frac{2}{2}")  # the first call builds the tables of the grammar
    return equal


def as_latex(text: str) -> str:
    """An answer as LaTeX's mathematics, without what sets it off from prose and without the word after a number."""
    for character, command in _LATEX.items():
        text = text.replace(character, command)
    text = text.replace(r"\$", "").replace("$", "").strip(" \t.*`")
    counted = _NUMBER_OF.fullmatch(text)
    return counted[1] if counted else text


def gym_judge() -> Callable[..., float]:
    """The score in [0, 1] that reasoning-gym gives an answer; 0 where it fails on the answer."""
    import reasoning_gym  # noqa: F401 (before the time counts)

    def score(task: str, options: str, answer: str, seed: int = 0, index: int = 0, entry: str | None = None) -> float:
        if entry is None:
            if task in UNREPEATABLE:
                raise ValueError(f"{task} makes another question in every process; expected the column entry")
            dataset = gym_dataset(task, seed, options)
            question = dataset[index]
        else:
            dataset = gym_dataset(task, seed, json.dumps({"size": 1} | json.loads(options)))
            question = json.loads(entry)
        try:
            return float(dataset.score_answer(answer=answer, entry=question))
        except Exception:
            return 0.0

    return score


@functools.lru_cache(maxsize=256)
def gym_dataset(task: str, seed: int, options: str) -> Any:
    """The data set of a reasoning-gym task.

    Args:
        task: a name that reasoning-gym knows.
        seed: its seed.
        options: the task's other options, as a JSON object.
    """
    import reasoning_gym

    return reasoning_gym.create_dataset(task, **({"size": GYM_SIZE} | json.loads(options) | {"seed": seed}))


JUDGES: dict[str, Callable[[], Callable[..., Any]]] = {"math": math_judge, "gym": gym_judge}


def serve(judge: Callable[..., Any], requests: TextIO, replies: TextIO) -> None:
    """Answers every line of the requests until there are no more."""
    for line in requests:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["time_limit"])
        try:
            reply = {"value": judge(**request["arguments"])}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=replies, flush=True)


def _limit_memory() -> None:
    with open("/proc/self/statm") as sizes:
        held = int(sizes.read().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = held + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))


def _main(kind: str) -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no reply
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the caller's, who then closes the input
    judge = JUDGES[kind]()
    _limit_memory()
    print(READY, file=replies, flush=True)
    serve(judge, sys.stdin, replies)


if __name__ == "__main__":
    _main(sys.argv[1])
