r"""The data sets of recipes/papers that need another form, as rows: prompt, completion and right answer.

    python recipes/paper_data.py rows openr1 --output data/openr1.jsonl
    python recipes/paper_data.py rows gsm8k math --output data/gsm8k-math.jsonl
    python recipes/paper_data.py right runs/samples/rollouts --output data/right.jsonl

`rows` reads data sets from the hub; `right` keeps what a run with `log_completions` sampled and the reward found right.

    gsm8k        openai/gsm8k, without its calculator's marks; the answer in a box
    gsm8k-reft   the same as text, in the words of lqtrung1998/mwp_ReFT
    math         DigitalLearningGmbH/MATH-lighteval
    math-3-5     its levels 3 to 5
    openr1       Elliott/Openr1-Math-46k-8192, with DeepSeek-R1's solutions: LUFFY, Prefix-RFT, SRFT
    dapo         BytedTsinghua-SIA/DAPO-Math-17k, each question once
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from reasoning_data import write_jsonl

Row = dict[str, Any]

#: Asks for the box in which rewards find an answer.
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
_MARKS = re.compile(r"<<.*?>>")  # <<48/2=24>>, for a calculator


class Source(NamedTuple):
    """A data set of the hub, and what makes a row of one of its own; None leaves it out."""

    name: str
    config: str | None
    row: Callable[[Row], Row | None]


def gsm8k_row(given: Row) -> Row:
    """A question of GSM8K with its solution, whose answer is boxed."""
    steps, answer = _gsm8k(given)
    return _turns(f"{given['question'].strip()}\n\n{BOXED}", f"{steps}\nThe answer is \\boxed{{{answer}}}.", answer)


def gsm8k_reft_row(given: Row) -> Row:
    """A question of GSM8K as text, with the words that ReFT puts around it."""
    steps, answer = _gsm8k(given)
    prompt = f"Question:\n{given['question'].strip()}\nAnswer reasoning:\n"
    return {"prompt": prompt, "completion": f"{steps}\nTherefore, the answer is: {answer}", "answer": answer}


def _gsm8k(given: Row) -> tuple[str, str]:
    steps, answer = given["answer"].split("####")
    return _MARKS.sub("", steps).strip(), answer.strip().replace(",", "")


def math_row(given: Row) -> Row:
    """A question of MATH with its solution, in which the answer is boxed."""
    return _turns(f"{given['problem'].strip()}\n\n{BOXED}", given["solution"].strip(), given["solution"])


def hard_math_row(given: Row) -> Row | None:
    """The same, of levels 3 to 5 alone."""
    return math_row(given) if given["level"] in ("Level 3", "Level 4", "Level 5") else None


def verl_row(given: Row) -> Row:
    """A row in the form of verl's data, whose `target` is a demonstration where there is one."""
    shown = {"completion": given["target"]} if given.get("target") else {}
    return {"prompt": given["prompt"], **shown, "answer": str(given["reward_model"]["ground_truth"])}


def _turns(question: str, solution: str, answer: str) -> Row:
    asked, told = {"role": "user", "content": question}, {"role": "assistant", "content": solution}
    return {"prompt": [asked], "completion": [told], "answer": answer}


SOURCES = {
    "gsm8k": Source("openai/gsm8k", "main", gsm8k_row),
    "gsm8k-reft": Source("openai/gsm8k", "main", gsm8k_reft_row),
    "math": Source("DigitalLearningGmbH/MATH-lighteval", None, math_row),
    "math-3-5": Source("DigitalLearningGmbH/MATH-lighteval", None, hard_math_row),
    "openr1": Source("Elliott/Openr1-Math-46k-8192", None, verl_row),
    "dapo": Source("BytedTsinghua-SIA/DAPO-Math-17k", None, verl_row),
}


def rows_of(given: Iterable[Row], row: Callable[[Row], Row | None]) -> Iterator[Row]:
    """The rows that `row` makes of the given ones, the first of those with equal prompts."""
    seen = set()
    for made in map(row, given):
        key = None if made is None else json.dumps(made["prompt"])
        if made is not None and key not in seen:
            seen.add(key)
            yield made


def right_rows(folder: Path) -> Iterator[Row]:
    """The completions in a run's `rollouts` folder that ended and have the full reward, 1, as rows."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            made = json.loads(line)
            if made["ended"] and made["reward"] >= 1:
                yield {"prompt": made["prompt"], "completion": _like(made["prompt"], made["completion"])}


def _like(prompt: Any, text: str) -> Any:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _from_hub(names: Iterable[str]) -> Iterator[Row]:
    import datasets

    for source in (SOURCES[name] for name in names):
        yield from rows_of(datasets.load_dataset(source.name, source.config, split="train"), source.row)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Data sets of recipes/papers as rows.")
    commands = parser.add_subparsers(dest="command", required=True)
    rows = commands.add_parser("rows", help="data sets of the hub")
    rows.add_argument("names", nargs="+", choices=SOURCES)
    rows.add_argument("--skip", type=int, default=0, help="rows left out at the start (default: %(default)s)")
    rows.add_argument("--count", type=int, help="rows written at most (default: all)")
    right = commands.add_parser("right", help="right completions that a run sampled")
    right.add_argument("folder", type=Path, help="rollouts folder of the run")
    for command in (rows, right):
        command.add_argument("--output", type=Path, required=True, help=".jsonl file")
    given = parser.parse_args(arguments)
    if given.command == "rows":
        end = None if given.count is None else given.skip + given.count
        made = list(_from_hub(given.names))[given.skip : end]
    else:
        made = list(right_rows(given.folder))
    if not made:
        parser.error("there are no such rows")
    write_jsonl(given.output, made)
    print(f"{given.output}: {len(made)} rows")


if __name__ == "__main__":
    main()
